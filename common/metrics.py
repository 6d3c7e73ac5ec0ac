"""Ranks -> HR and NDCG, without luck in ties; the result rows; a paired comparison of two runs.

A user's rank is a pair (g, t): g candidates score strictly higher than the target, t others exactly equal. E = evaluated
users, n = items; item ids 1..n, column 0 of a score table is padding and never a candidate.
"""
import numpy as np
import torch
import torch.nn.functional as F

from common.files import Diverged, UserError, load_json, lock, same, save_json, whole

SAMPLED, FULL = (5, 10), (5, 10, 50)  # paper sec. 4.2 and table 4


@torch.no_grad()
def rank_counts(states, table, targets, negatives, bias=None, exclude=None, chunk=2 ** 24):
    """(g, t) of every target among its 100 negatives and among all items, from one product of scores.

    states float [E, H]; table float [n + 1, H]; bias [n + 1] or None; targets [E] ids; negatives [E, 100] ids, 0 = none;
    exclude: ragged (items, offsets) whose items are no candidates of their row (the target always is one).
    chunk: scores held at a time. Returns {'sampled': int32 [E, 2], 'full': int32 [E, 2]}.
    Errors: UserError where a score is not finite. Never a product of one row alone: it rounds differently, and breaks ties.
    """
    device, n = table.device, len(table) - 1
    out = {k: np.zeros((len(targets), 2), np.int32) for k in ('sampled', 'full')}
    targets, negatives = torch.from_numpy(targets.astype(np.int64)), torch.from_numpy(negatives.astype(np.int64))
    parts = max(1, min(len(targets) // 2, -(-len(targets) * (n + 1) // chunk)))
    for index in np.array_split(np.arange(len(targets)), parts):
        rows = slice(index[0], index[-1] + 1)
        scores = F.linear(states[rows].to(device).float(), table.float(), bias)
        target, negative = targets[rows].to(device)[:, None], negatives[rows].to(device)
        own = scores.gather(1, target)
        if not torch.isfinite(scores[:, 1:].sum()):  # one number that is not finite makes the sum so
            raise Diverged('a score is not a finite number: the model diverged; train again with a lower --lr')
        scores[:, 0] = -torch.inf
        among = scores.gather(1, negative)                                     # padding has score -inf
        if exclude is not None:
            items, offsets = exclude[0], exclude[1]
            lengths = np.diff(offsets)[index]
            row = torch.from_numpy(np.repeat(np.arange(len(index)), lengths)).to(device)
            column = torch.from_numpy(items[offsets[rows.start]:offsets[rows.stop]].astype(np.int64)).to(device)
            scores[row, column] = -torch.inf
            scores.scatter_(1, target, own)
        for name, s, itself in (('sampled', among, 0), ('full', scores, 1)):
            counts = torch.stack([(s > own).sum(1, dtype=torch.int32), (s == own).sum(1, dtype=torch.int32) - itself], 1)
            out[name][rows] = counts.cpu().numpy()
    return out


def per_user(ranks, metric, k):
    """Expected HR@k or NDCG@k of each user over the t + 1 places a tie leaves open: float [E].

    Five items score 3 2 2 2 1 and the target is a 2: g = 1, t = 2, so it takes place 1, 2 or 3 (0-based).
    HR@3 = clip(3 - 1, 0, 3) / 3 = 2/3; NDCG@3 = (1/log2(3) + 1/log2(4)) / 3 = 0.377.
    """
    g, t = ranks[:, 0].astype(np.int64), ranks[:, 1].astype(np.int64)
    if metric == 'HR':
        return np.clip(k - g, 0, t + 1) / (t + 1)
    gain = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(k) + 2))])     # gain[r] = sum over the first r places
    return (gain[np.minimum(g + t + 1, k)] - gain[np.minimum(g, k)]) / (t + 1)


def summarise(ranks):
    """{'sampled': {'HR@5': ..}, 'full': {..}} as fractions: sums over users, divided once."""
    return {name: {f'{m}@{k}': float(per_user(ranks[name], m, k).mean()) for m in ('HR', 'NDCG') for k in ks}
            for name, ks in (('sampled', SAMPLED), ('full', FULL))}


def tie_share(ranks):
    """Share of users whose target ties with another candidate."""
    return {name: float((ranks[name][:, 1] > 0).mean()) for name in ('sampled', 'full')}


def compare(a, b, draws=10_000, seed=0):
    """Paired difference a - b of per-user values [E]: (mean, 95 % bootstrap interval (low, high), permutation p-value).

    Bootstrap over users; the permutation test flips the signs of the differences (two-sided, +1 in both counts).
    """
    d, rng = np.asarray(a, float) - np.asarray(b, float), np.random.default_rng(seed)
    means, flips = np.empty(draws), np.empty(draws)
    for i in range(draws):
        means[i] = d[rng.integers(0, len(d), len(d))].mean()
        flips[i] = (d * rng.choice((-1, 1), len(d))).mean()
    low, high = np.quantile(means, (0.025, 0.975))
    return d.mean(), (low, high), (1 + (np.abs(flips) >= abs(d.mean()) - 1e-15).sum()) / (1 + draws)


# ---------------------------------------------------------------------------- rows of runs/<dataset>/results.json

def load_rows(folder):
    """The rows of a run folder, [] where there are none yet. Errors: UserError for a file that is not ours."""
    path = folder / 'results.json'
    rows = load_json(path) if path.exists() else []
    if not (isinstance(rows, list) and all(isinstance(r, dict) and 'run' in r and 'metrics' in r for r in rows)):
        raise UserError(f'{path}: is not a list of result rows; move it away and run again')
    return rows


def find_row(folder, run, identity):
    """The row of this run where it was made from the same inputs and options, else None."""
    return next((r for r in load_rows(folder) if r['run'] == run and same(r['identity'], identity)), None)


def save_row(folder, row, ranks):
    """Write the per-user ranks {'users', 'sampled', 'full'}, then the row, in place of an earlier one of the same name."""
    path = folder / 'ranks' / f'{row["run"]}.npz'
    with whole(path) as part, open(part, 'wb') as f:
        np.savez_compressed(f, **ranks)
    with lock(folder / 'ranks', wait=True):  # another script may be adding its row
        save_json(folder / 'results.json', [r for r in load_rows(folder) if r['run'] != row['run']] + [row])
