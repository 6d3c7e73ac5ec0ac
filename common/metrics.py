"""Ranks -> HR and NDCG, without luck in ties; a paired comparison of two runs.

A user's rank is a pair (g, t): g candidates score strictly higher than the target, t others exactly
equal. E = evaluated users, n = items; ids 1..n, column 0 is padding and never a candidate.
Three rankings from one pass: `sampled` (100 negatives), `full` (all items, the user's history
included, as the paper), `new` (all items but the history; a target in it stays a candidate).
"""
from math import erfc

import numpy as np
import torch

from common.arrays import parts, row_numbers, take
from common.files import Diverged

# What a run's row holds of each ranking; NDCG@10 is needed in all
METRICS = {'sampled': 'HR@5 HR@10 NDCG@5 NDCG@10',  # paper sec. 4.2
           'full': 'HR@5 HR@10 HR@50 NDCG@5 NDCG@10 NDCG@50',  # paper table 4
           'new': 'HR@5 HR@10 HR@50 NDCG@5 NDCG@10 NDCG@50'}


def product_scorer(states, table, bias=None):
    """Scores of users: states [E, H] times table [n + 1, H], plus bias [n + 1]; float32.

    Returns score(users): numbers of users -> [users, n + 1] on the table's device.
    """
    def score(users):
        return torch.nn.functional.linear(states[users], table, bias)
    return score


@torch.no_grad()
def rank_counts(score, data, which, chunk=2 ** 24):
    """(g, t) of the target of every evaluated user in the three rankings, from one pass over the
    scores.

    score: see product_scorer; which: see `split` of a Dataset; chunk: scores held at a time, but
    those of some 32 users: each time the table is read, and a user alone rounds differently, which
    breaks ties. Returns {'sampled', 'full', 'new': int32 [E, 2]}. Errors: Diverged where a score is
    not finite.
    """
    *history, targets = data.split(which)
    candidates = np.column_stack([targets, data.negatives])
    found = []
    for users in parts(len(targets), max(32, chunk // (data.n_items + 1))):
        scores = score(users)
        if not torch.isfinite(scores[:, 1:].sum()):  # one that is not finite makes the sum so
            raise Diverged('a score is not a finite number: the model diverged; try a lower rate')
        scores[:, 0] = -torch.inf  # padding
        candidate = scores.new_tensor(candidates[users], dtype=torch.int64)
        of_candidates = scores.gather(1, candidate)
        own = of_candidates[:, :1]
        ranks = [counts(of_candidates, own), counts(scores, own)]
        items, offsets = take(*history, users)
        lengths = np.diff(offsets)
        scores[row_numbers(lengths), items] = -torch.inf
        scores.scatter_(1, candidate[:, :1], own)  # a target in its history stays
        ranks.append(counts(scores, own))
        found.append(torch.stack(ranks).cpu())
    return dict(zip(METRICS, torch.cat(found, 1).numpy()))


def counts(scores, own):
    """int32 [users, 2]: how many of the scores are above the target's, how many others equal it."""
    higher = (scores > own).sum(1, dtype=torch.int32)
    equal = (scores == own).sum(1, dtype=torch.int32)
    return torch.stack([higher, equal - 1], 1)


def per_user(ranks, metric):
    """A metric such as 'HR@5' or 'NDCG@10' of each user, the mean over the t + 1 places that a tie
    leaves open: float [E].

    Five items score 3 2 2 2 1 and the target is a 2: g = 1, t = 2, so it takes place 1, 2 or 3
    (0-based). HR@3 = (1 + 1 + 0) / 3 = 2/3; NDCG@3 = (1/log2(3) + 1/log2(4) + 0) / 3 = 0.377.
    """
    g, t = ranks.T
    name, cutoff = metric.split('@')
    k = int(cutoff)
    gain = {'HR': np.ones(k), 'NDCG': 1 / np.log2(np.arange(k) + 2)}[name]  # of a place
    total = np.r_[0, np.cumsum(gain)]  # of the first r places
    end = g + t + 1
    first, last = np.minimum([g, end], k)
    return (total[last] - total[first]) / (t + 1)


def summarise(ranks):
    """{'sampled': {'HR@5': ..}, 'full': .., 'new': ..}: fractions, sums over users divided once."""
    return {name: {metric: float(per_user(pairs, metric).mean())
                   for metric in METRICS[name].split()}
            for name, pairs in ranks.items()}


def value_of(ranks):
    """NDCG@10 against 100 negatives (paper): all that is chosen on validation is chosen by it."""
    return summarise(ranks)['sampled']['NDCG@10']


def result_of(data, ranks):
    """What Run.write takes of a model's ranks on a dataset's evaluated users: `ranks` for their own
    file, the rest for the row; tie_share: of those whose target ties with another candidate, for
    each ranking."""
    return {'dataset': data.name,
            'data': data.fingerprint,
            'users': len(data.evaluated),
            'metrics': summarise(ranks),
            'tie_share': {name: float((pairs[:, 1] > 0).mean()) for name, pairs in ranks.items()},
            'ranks': {'users': data.evaluated} | ranks}


def compare(a, b):
    """Paired difference a - b of per-user values [E]: (mean, its 95 % interval (low, high),
    two-sided p). A t-test whose statistic is taken as normal, as users are many."""
    difference = np.subtract(a, b)
    mean = difference.mean()
    error = difference.std(ddof=1) / len(difference) ** 0.5
    interval = mean - 1.96 * error, mean + 1.96 * error
    p = erfc(abs(mean) / error / 2 ** 0.5) if error else float(not mean)
    return mean, interval, p
