"""Ranks -> HR and NDCG, without luck in ties; a paired comparison of two runs.

A user's rank is a pair (g, t): g candidates score strictly higher than the target, t others exactly
equal. E = evaluated users, n = items; ids 1..n, column 0 is padding and never a candidate.
Three rankings from one pass: `sampled` (100 negatives), `full` (all items, the user's history
included, as the paper), `new` (all items but the history; a target in it stays a candidate).
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import row_numbers, take
from common.files import Diverged

CUTOFFS = {'sampled': (5, 10), 'full': (5, 10, 50), 'new': (5, 10, 50)}  # paper sec. 4.2, table 4


def product_scorer(states, table, bias=None):
    """Scores of user rows: states [E, H] times table [n + 1, H], plus bias [n + 1]; float32.

    Returns score(rows): a slice of users -> [rows, n + 1] on the table's device.
    """
    table = table.float()

    def score(rows):
        return F.linear(states[rows].to(table.device).float(), table, bias)
    return score


@torch.no_grad()
def rank_counts(score, n, targets, negatives, history, chunk=2 ** 24):
    """(g, t) of every target in the three rankings, from one pass over the scores.

    score: see product_scorer; targets [E] ids; negatives [E, 100] ids, 0 = none; history: ragged
    (items, offsets) of the same users; chunk: scores held at a time. Returns {'sampled', 'full',
    'new': int32 [E, 2]}. Errors: Diverged where a score is not finite. Never one row alone: it
    rounds differently, and breaks ties.
    """
    users = len(targets)
    out = {name: np.zeros((users, 2), np.int32) for name in CUTOFFS}
    parts = max(1, min(users // 2, -(-users * (n + 1) // chunk)))
    for index in np.array_split(np.arange(users), parts):
        rows = slice(index[0], index[-1] + 1)
        scores = score(rows)
        target = torch.from_numpy(targets[rows].astype(np.int64)).to(scores.device)[:, None]
        negative = torch.from_numpy(negatives[rows].astype(np.int64)).to(scores.device)
        if not torch.isfinite(scores[:, 1:].sum()):  # one that is not finite makes the sum so
            raise Diverged('a score is not a finite number: the model diverged; '
                           'train again with a lower rate')
        scores[:, 0] = -torch.inf
        own = scores.gather(1, target)
        sampled = counts(scores.gather(1, negative), own)  # padding has score -inf
        full = counts(scores, own)
        full[:, 1] -= 1  # the target itself
        new = full - history_counts(scores, own, target, *take(*history, index))
        for name, found in (('sampled', sampled), ('full', full), ('new', new)):
            out[name][rows] = found.cpu().numpy()
    return out


def counts(scores, own):
    """[rows, 2]: how many of the scores are above the target's, how many equal it."""
    higher = (scores > own).sum(1, dtype=torch.int32)
    equal = (scores == own).sum(1, dtype=torch.int32)
    return torch.stack([higher, equal], 1)


def history_counts(scores, own, target, items, offsets):
    """[rows, 2]: `counts` of each user's distinct history items other than the target."""
    key = row_numbers(np.diff(offsets)) * np.int64(scores.shape[1]) + items
    row, item = np.divmod(np.unique(key), scores.shape[1])
    row = torch.from_numpy(row).to(scores.device)
    item = torch.from_numpy(item).to(scores.device)
    score, aim = scores[row, item], own[row, 0]
    other = item != target[row, 0]
    found = torch.stack([(score > aim) & other, (score == aim) & other], 1).int()
    return torch.zeros(len(own), 2, dtype=torch.int32, device=scores.device).index_add_(0, row, found)


def per_user(ranks, metric, k):
    """Expected HR@k or NDCG@k of each user over the t + 1 places a tie leaves open: float [E].

    Five items score 3 2 2 2 1 and the target is a 2: g = 1, t = 2, so it takes place 1, 2 or 3
    (0-based). HR@3 = clip(3 - 1, 0, 3) / 3 = 2/3; NDCG@3 = (1/log2(3) + 1/log2(4)) / 3 = 0.377.
    """
    g, t = ranks[:, 0].astype(np.int64), ranks[:, 1].astype(np.int64)
    if metric == 'HR':
        return np.clip(k - g, 0, t + 1) / (t + 1)
    gain = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(k) + 2))])  # of the first r places
    return (gain[np.minimum(g + t + 1, k)] - gain[np.minimum(g, k)]) / (t + 1)


def summarise(ranks):
    """{'sampled': {'HR@5': ..}, 'full': .., 'new': ..}: fractions, sums over users divided once."""
    return {name: {f'{metric}@{k}': float(per_user(ranks[name], metric, k).mean())
                   for metric in ('HR', 'NDCG') for k in cutoffs}
            for name, cutoffs in CUTOFFS.items()}


def tie_share(ranks):
    """Share of users whose target ties with another candidate, for each ranking."""
    return {name: float((ranks[name][:, 1] > 0).mean()) for name in CUTOFFS}


def result_of(data, ranks):
    """What a row says of a model's ranks on a dataset's evaluated users."""
    return {'dataset': data.name, 'data': data.fingerprint, 'users': len(data.evaluated),
            'metrics': summarise(ranks), 'tie_share': tie_share(ranks)}


def compare(a, b):
    """Paired difference a - b of per-user values [E]: (mean, its 95 % interval (low, high),
    two-sided p). A t-test whose statistic is taken as normal, as users are many."""
    difference = np.asarray(a, float) - np.asarray(b, float)
    mean = difference.mean()
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    interval = mean - 1.96 * error, mean + 1.96 * error
    p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(not mean)
    return mean, interval, p
