"""What the paper's datasets, and one far larger, cost: a table computed from counts and rates.

    python -m tests.tools.cost [--tflops 100] [--check]

Tokens and FLOPs are counted as the code computes them (Longformer-base; products only), GPU-hours
are FLOPs at --tflops, a rate that one GPU reaches, to be replaced by what yours reaches. Bytes are
those of the arrays that must be held at once; preparation's bytes a row and rows a second were
measured with a made-up Books of 51 million ratings, on one core. --check runs one part here at two
sizes: the time of the larger must be what this model says of it, given that of the smaller.
"""
import argparse
import time
from functools import partial
from typing import NamedTuple

import numpy as np

from common.files import PAPER
from common.report import markdown
from tests.tools.bench import BASE, MINILM, PER_ITEM, encode, epoch_flops, lm_flops, masked_flops

EPOCHS_PT, EPOCHS_FT = 32, 10  # at most (RecFormer); assumed, as early stopping may end it
ROW_BYTES, ROWS_A_SECOND = 45, 75_000  # of preparation: a rating that is read, one core
# ratings that are read
PREPARED = {'pantry': 471_615, 'arts': 2_875_917, 'pretraining': 51_311_621}


class Size(NamedTuple):
    """Counts of one dataset after its filters."""
    users: int
    items: int
    interactions: int
    ratings: int  # before the filters

    @property
    def mean(self):
        """Items that a user trains with: all but the last two."""
        return max(1, self.interactions / self.users - 2)


def sizes():
    """{name: Size} of the table's columns."""
    found = {}
    for name, ratings in PREPARED.items():
        c = PAPER['table2'][name]
        found[name] = Size(c['users'], c['items'], c['interactions'], ratings)
    found['10 M items, 1 B rows'] = Size(100_000_000, 10_000_000, 10 ** 9, 10 ** 9)
    return found


def sequences(users, items):
    """Lengths in tokens of `users` histories of so many items on average, cut to 1,024 tokens."""
    drawn = np.random.default_rng(0).geometric(1 / max(1, items), 10_000)
    lengths = 1 + np.minimum(1023, PER_ITEM * np.minimum(drawn, 50))
    return lengths, users / len(lengths)


def pretraining(size, shape):
    """(tokens, FLOPs) of an epoch of stage-PT: histories of three quarters of a sequence and their
    targets, encoded once without and once with a gradient (gradient caching: a forward pass more),
    and the masked pass."""
    lengths, times = sequences(size.users, 0.75 * size.mean)
    lengths = np.concatenate([lengths, np.full(len(lengths), 1 + PER_ITEM)])
    flops = 4 * lm_flops(shape, lengths) + masked_flops(shape, lengths)
    return times * lengths.sum(), times * flops


def finetuning(size, shape):
    """(tokens, FLOPs) of an epoch of stage-FT1: all items, a prefix of each user, validation."""
    prefix, times = sequences(size.users, 0.5 * size.mean)
    whole, _ = sequences(size.users, size.mean)
    items = np.full(10_000, 1 + PER_ITEM)
    of_items = size.items / len(items)
    tokens = times * (prefix.sum() + whole.sum()) + of_items * items.sum()
    flops = times * (3 * lm_flops(shape, prefix) + lm_flops(shape, whole))
    flops += of_items * lm_flops(shape, items)
    return tokens, flops + 4 * size.users * size.items * shape['hidden']


def sasrec(size, hidden, scored):
    """FLOPs of an epoch of SASRec whose loss scores so many items at a position."""
    lengths = np.random.default_rng(0).geometric(1 / size.mean, 10_000)
    return size.users / len(lengths) * epoch_flops('ce', lengths, hidden, scored)


def column(size, tflops):
    """One column of the table: {row: text}."""
    hour = 3600 * tflops * 1e12
    pt_tokens, pt = pretraining(size, BASE)
    ft_tokens, ft = finetuning(size, BASE)
    hidden = BASE['hidden']
    scored = size.items if size.items < 10 ** 6 else 257  # beyond, --loss sampled
    id_model = 50 * sasrec(size, hidden, scored)
    table = 4 * size.items * hidden
    disk = 4 * size.interactions + 404 * size.users + 9 * PER_ITEM * size.items
    return {'stage-PT on it, an epoch: M tokens': f'{pt_tokens / 1e6:,.0f}',
            f'{EPOCHS_PT} epochs: PFLOP': f'{EPOCHS_PT * pt / 1e15:,.0f}',
            f'{EPOCHS_PT} epochs: GPU-hours': f'{EPOCHS_PT * pt / hour:,.1f}',
            f'FT1 on it, {EPOCHS_FT} epochs: M tokens': f'{EPOCHS_FT * ft_tokens / 1e6:,.0f}',
            f'{EPOCHS_FT} epochs: GPU-hours': f'{EPOCHS_FT * ft / hour:,.1f}',
            'SASRec, 50 epochs: GPU-hours': f'{id_model / hour:,.2f}',
            'item table, gradient, Adam, best weights: GB': f'{5 * table / 1e9:,.1f}',
            'preparation: GB of memory': f'{size.ratings * ROW_BYTES / 1e9:,.1f}',
            'preparation: minutes of a core': f'{size.ratings / ROWS_A_SECOND / 60:,.0f}',
            'prepared, with tokens: GB of disk': f'{disk / 1e9:,.1f}'}


def check():
    """Seconds to encode items at two sizes, and what the FLOPs of the larger say."""
    seconds, flops = {}, {}
    for items in (256, 1024):
        work = partial(encode, True, MINILM, items, items * (1 + PER_ITEM))()
        work.run()
        began = time.perf_counter()
        work.run()
        seconds[items], flops[items] = time.perf_counter() - began, work.flops
    expected = seconds[256] * flops[1024] / flops[256]
    print(f'encode 256 items: {seconds[256]:.2f} s; 1,024: {seconds[1024]:.2f} s, the model says '
          f'{expected:.2f} s')


def main():
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--tflops', type=float, default=100.0, help='that one GPU reaches, in 10^12/s')
    p.add_argument('--check', action='store_true', help='measure one part at two sizes')
    args = p.parse_args()
    columns = {name: column(size, args.tflops) for name, size in sizes().items()}
    first = next(iter(columns.values()))
    print(markdown(['', *columns], [[row, *(found[row] for found in columns.values())]
                                    for row in first]))
    if args.check:
        check()


if __name__ == '__main__':
    main()
