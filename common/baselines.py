"""Rankings that need no training: what a trained model has to beat.

popularity: how often an item occurs in training parts. item-kNN: cosine of co-occurrence in
training parts. text-kNN: cosine of centred embeddings. item + text: a weighted sum of both, each
over its largest score. A history counts with a recency weight, decay ** age (0 = newest item); an
item says nothing about itself. Decay and weight are chosen on validation NDCG@10, 100 negatives.
"""
import time

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import ragged, row_numbers
from common.metrics import rank_counts, result_of, summarise

DECAYS = 1.0, 0.9, 0.8, 0.6, 0.4
WEIGHTS = 0.1, 0.3, 1.0, 3.0  # of the text beside the items


# ------------------------------------------------------------------------ scores

def popularity(data, device='cpu'):
    """How often each item occurs in training parts: float [n + 1], 0 for padding."""
    items, _ = data.training()
    counts = np.bincount(items, minlength=data.n_items + 1)
    return torch.from_numpy(counts).float().to(device)


def recency(items, offsets, n, decay):
    """Weights of the histories' items: sparse [B, n + 1], decay ** age, repeats added up."""
    lengths = np.diff(offsets)
    age = np.repeat(lengths, lengths) - 1 - ragged(np.zeros(len(lengths), int), lengths)
    index = torch.from_numpy(np.stack([row_numbers(lengths), items]))
    weights = torch.from_numpy(decay ** age).float()
    return sparse(index, weights, (len(lengths), n + 1))


def sparse(index, values, size):
    """A sparse matrix; equal places are added up."""
    return torch.sparse_coo_tensor(index, values, size, check_invariants=False).coalesce()


class ItemKNN:
    """score(j) = sum over the history's items i other than j of weight(i) cos(i, j), the cosine of
    the sets of users who have i and j in their training parts."""

    def __init__(self, data):
        items, offsets = data.training()
        users = row_numbers(np.diff(offsets))
        pairs = np.unique(np.stack([users, items]), axis=1)
        size = data.n_users, data.n_items + 1
        self.had = sparse(torch.from_numpy(pairs), torch.ones(pairs.shape[1]), size)
        self.of_items = self.had.t().coalesce()
        counts = np.bincount(pairs[1], minlength=size[1])
        self.norm = torch.from_numpy(counts).float().clamp_min(1).sqrt()
        self.known = torch.from_numpy(counts > 0).float()

    def __call__(self, weights):
        """Sparse weights [B, n + 1] -> scores [B, n + 1]."""
        dense = weights.to_dense()
        met = torch.sparse.mm(self.had, (dense / self.norm).t())          # [users, B]
        scores = torch.sparse.mm(self.of_items, met).t() / self.norm
        return scores - dense * self.known  # cos(i, i) = 1


class TextKNN:
    """score(j) = sum over the history's items i other than j of weight(i) cos(E_i, E_j), of rows
    from which the mean row is taken away."""

    def __init__(self, matrix):
        rows = matrix[1:] - matrix[1:].mean(0)
        self.unit = F.pad(F.normalize(rows, dim=1), (0, 0, 1, 0))
        self.own = self.unit.square().sum(1)

    def __call__(self, weights):
        """Sparse weights [B, n + 1] -> scores [B, n + 1]."""
        return torch.sparse.mm(weights, self.unit) @ self.unit.t() - weights.to_dense() * self.own


class Sum:
    """item-kNN over its largest score plus `weight` times text-kNN over its largest."""

    def __init__(self, item, text, weight):
        self.item, self.text, self.weight = item, text, weight

    def __call__(self, weights):
        item, text = self.item(weights), self.text(weights)
        return top(item) + self.weight * top(text)


def top(scores):
    """Each row over its largest entry, which stays above 0."""
    return scores / scores.max(1, keepdim=True).values.clamp_min(1e-12)


# ------------------------------------------------------------------------ ranks, choice on validation

def ranks_of(data, which, kind, decay):
    """Ranks of the evaluated users' targets under a scorer of weighted histories."""
    items, offsets, targets = data.split(which)

    def score(rows):
        part = offsets[rows.start:rows.stop + 1]
        begin, end = part[0], part[-1]
        return kind(recency(items[begin:end], part - begin, data.n_items, decay))
    chunk = 2 ** 22  # a scorer makes several matrices of this size
    return rank_counts(score, data.n_items, targets, data.negatives, (items, offsets), chunk)


def popularity_ranks(data, which):
    """Ranks under how often items occur, the same for every user."""
    items, offsets, targets = data.split(which)
    row = popularity(data)

    def score(rows):
        return row.expand(rows.stop - rows.start, -1).clone()
    return rank_counts(score, data.n_items, targets, data.negatives, (items, offsets))


def value_of(ranks):
    """NDCG@10 against 100 negatives."""
    return summarise(ranks)['sampled']['NDCG@10']


def popularity_value(data):
    """Validation NDCG@10 (100 negatives) of popularity."""
    return value_of(popularity_ranks(data, 'valid'))


def best_knn(data, kinds):
    """Of scorers {setting: scorer} and the decays the best on validation: (its value, setting,
    decay, ranks on test)."""
    tried = [(value_of(ranks_of(data, 'valid', kind, decay)), setting, decay)
             for setting, kind in kinds.items() for decay in DECAYS]
    value, setting, decay = max(tried, key=lambda entry: entry[0])
    return value, setting, decay, ranks_of(data, 'test', kinds[setting], decay)


def untrained(data, embeddings):
    """(name, row fields, ranks) of every baseline; embeddings: {'lf': matrix [n + 1, H], ...}."""
    ranks = popularity_ranks(data, 'test')
    valid = popularity_value(data)
    yield 'popularity', {'init': None, 'valid': valid, 'seconds': 0}, ranks
    item = ItemKNN(data)
    for name, kinds, init in knn_kinds(item, embeddings):
        began = time.monotonic()
        valid, setting, decay, ranks = best_knn(data, kinds)
        yield name, {'init': init, 'valid': valid, 'decay': decay, 'weight': setting,
                     'seconds': round(time.monotonic() - began, 1)}, ranks


def knn_kinds(item, embeddings):
    """(name, {setting: scorer}, embedding's name) of each nearest-neighbour baseline."""
    yield 'item-knn', {None: item}, None
    for init, matrix in embeddings.items():
        text = TextKNN(matrix)
        yield f'text-knn-{init}', {None: text}, init
        yield f'item+text-knn-{init}', {w: Sum(item, text, w) for w in WEIGHTS}, init


def untrained_lines(data):
    """What popularity and item-kNN reach, a line each: is there anything to learn?"""
    for name, fields, ranks in untrained(data, {}):
        metrics = result_of(data, ranks)['metrics']
        decay = f' (recency weight {fields["decay"]:g} a step)' if 'decay' in fields else ''
        yield (f'{name:12}NDCG@10 {100 * metrics["sampled"]["NDCG@10"]:6.2f} (100 negatives) '
               f'{100 * metrics["full"]["NDCG@10"]:6.2f} (all items){decay}')
