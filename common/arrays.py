"""Ragged rows: a pair (items, offsets), row r being items[offsets[r]:offsets[r + 1]]."""
import numpy as np


def ragged(starts, lengths):
    """Indices starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1] ...: int64 [sum].
    `starts` may be one number for all."""
    before = np.cumsum(lengths) - lengths
    shift = np.repeat(starts - before, lengths)
    return np.arange(len(shift)) + shift


def offsets_of(lengths):
    """Offsets [R + 1] of rows of these lengths [R]."""
    return np.r_[0, np.cumsum(lengths)]


def cut(items, starts, lengths):
    """What begins at each of `starts` in `items` and is so long, as such a pair."""
    return items[ragged(starts, lengths)], offsets_of(lengths)


def take(items, offsets, rows):
    """The rows `rows` of (items, offsets), as another such pair."""
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    return cut(items, starts, lengths)


def newest(items, offsets, most):
    """The last `most` items of each row: (items [T], lengths [R])."""
    lengths = np.minimum(np.diff(offsets), most)
    place = ragged(offsets[1:] - lengths, lengths)
    return items[place], lengths


def row_numbers(lengths):
    """The row of every element of rows of these lengths: int64 [sum]."""
    return np.repeat(np.arange(len(lengths)), lengths)


def parts(n, most):
    """Numbers 0 ... n - 1 in parts of almost equal size, each of at most `most`."""
    return np.array_split(np.arange(n), -(-n // most))
