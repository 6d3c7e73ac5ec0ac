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


def take(items, offsets, rows):
    """The rows `rows` of (items, offsets), as another such pair."""
    begin = offsets[rows]
    lengths = offsets[rows + 1] - begin
    return items[ragged(begin, lengths)], offsets_of(lengths)


def newest(items, offsets, most):
    """The last `most` items of each row: (items int64 [T], lengths [R])."""
    lengths = np.minimum(np.diff(offsets), most)
    begin = offsets[1:] - lengths
    return items[ragged(begin, lengths)].astype(np.int64), lengths


def row_numbers(lengths):
    """The row of every element of rows of these lengths: int64 [sum]."""
    rows = np.arange(len(lengths))
    return np.repeat(rows, lengths)


def parts(count, most):
    """The numbers 0 ... count - 1 in parts of about equal size, at most `most` each."""
    groups = -(-count // most)
    return np.array_split(np.arange(count), groups)
