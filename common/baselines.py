"""Rankings that need no training: what a trained model has to beat.

popularity: how often an item occurs in training parts. item-kNN: cosine of co-occurrence in
training parts. text-kNN: cosine of centred embeddings. item + text: a weighted sum of both, each
over its largest score. A history counts with a recency weight, decay ** age (0 = newest item); an
item says nothing about itself. Decay and weight are chosen on validation NDCG@10, 100 negatives.

A scorer takes the weights of histories, sparse [B, n + 1], and gives scores [B, n + 1].
"""
import time
from dataclasses import replace
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import ragged, row_numbers, take
from common.metrics import rank_counts, summarise

DECAYS = 1.0, 0.9, 0.8, 0.6, 0.4
WEIGHTS = 0.1, 0.3, 1.0, 3.0  # of the text beside the items


def sparse(items, offsets, values, n):
    """Values of the items of ragged rows as a sparse float matrix [rows, n + 1]; those of an item
    that a row has twice are added up."""
    lengths = np.diff(offsets)
    index = np.stack([row_numbers(lengths), items])
    size = len(lengths), n + 1
    found = torch.sparse_coo_tensor(index, values, size, check_invariants=False)
    return found.float().coalesce()


# ------------------------------------------------------------------------ scorers

def popularity(data):
    """How often items occur in training parts, whatever the history."""
    items, _ = data.training()
    counts = np.bincount(items, minlength=data.n_items + 1)
    row = torch.from_numpy(counts).float()

    def score(weights):
        return row.repeat(len(weights), 1)
    return score


def item_knn(data):
    """score(j) = sum over the history's items i other than j of weight(i) cos(i, j), the cosine of
    the sets of users who have i and j in their training parts."""
    items, offsets = data.training()
    had = sparse(items, offsets, np.ones(len(items)), data.n_items)
    had.values().fill_(1)  # however often
    of_items = had.t().coalesce()
    counts = torch.sparse.sum(had, 0).to_dense()
    norm = counts.clamp_min(1).sqrt()

    def score(weights):
        weights = weights.to_dense()
        met = torch.sparse.mm(had, (weights / norm).t())  # [users, B]
        scores = torch.sparse.mm(of_items, met).t() / norm
        return without(scores, weights * (counts > 0))  # cos(i, i) = 1
    return score


def text_knn(matrix, end=None):
    """score(j) = sum over the history's items i other than j of weight(i) cos(E_i, E_j), of rows
    [n + 1, H] from which the mean row is taken away (of those before `end`: not of cold items)."""
    unit = F.pad(F.normalize(matrix[1:] - matrix[1:end].mean(0), dim=1), (0, 0, 1, 0))
    own = unit.square().sum(1)

    def score(weights):
        return without(torch.sparse.mm(weights, unit) @ unit.t(), weights.to_dense() * own)
    return score


def without(scores, own):
    """Scores less what each item says of itself; exactly 0 where only rounding is left."""
    left = scores - own
    return left * (left.abs() > 1e-5 * own)


def weighted_sum(first, second, weight):
    """The first scorer over its largest score plus `weight` times the second over its largest."""
    def top(scores):
        return scores / scores.amax(1, keepdim=True).clamp_min(1e-12)

    def score(weights):
        return top(first(weights)) + weight * top(second(weights))
    return score


def all_scorers(data, embeddings, end=None):
    """{name: (its embeddings' name or None, {weight: scorer})} of every baseline; embeddings {name:
    [n + 1, H]}, `end` as in text_knn."""
    items = item_knn(data)
    found = {'popularity': (None, {None: popularity(data)}), 'item-knn': (None, {None: items})}
    for init, matrix in embeddings.items():
        text = text_knn(matrix, end)
        both = {weight: weighted_sum(items, text, weight) for weight in WEIGHTS}
        found[f'text-knn-{init}'] = init, {None: text}
        found[f'item+text-knn-{init}'] = init, both
    return found


def weighted(items, offsets, decay, n):
    """Histories (ragged) with their recency weights, as a scorer takes them."""
    lengths = np.diff(offsets)
    age = -1 - ragged(-lengths, lengths)
    return sparse(items, offsets, decay ** age, n)


# ------------------------------------------------------------------------ choice on validation

def ranks_of(data, which, scorer, decay=1.0):
    """Ranks of the evaluated users' targets under a scorer."""
    items, offsets, targets = data.split(which)

    def score(users):
        return scorer(weighted(*take(items, offsets, users), decay, data.n_items))
    # a scorer makes several matrices of a chunk's size
    return rank_counts(score, data.n_items, targets, data.negatives, (items, offsets), 2 ** 22)


def value_of(ranks):
    """NDCG@10 against 100 negatives."""
    return summarise(ranks)['sampled']['NDCG@10']


def popularity_value(data):
    """Validation NDCG@10 (100 negatives) of popularity."""
    return value_of(ranks_of(data, 'valid', popularity(data)))


def untrained(data, embeddings):
    """(name, what a row says, ranks on test) of every baseline; embeddings {name: [n + 1, H]}."""
    for name, (init, scorers) in all_scorers(data, embeddings).items():
        began = time.monotonic()
        valid = {}
        for weight, decay in product(scorers, DECAYS[:1] if name == 'popularity' else DECAYS):
            ranks = ranks_of(data, 'valid', scorers[weight], decay)
            valid[weight, decay] = value_of(ranks)
        weight, decay = max(valid, key=valid.get)
        ranks = ranks_of(data, 'test', scorers[weight], decay)
        fields = {'init': init, 'seconds': round(time.monotonic() - began, 1),
                  'valid': valid[weight, decay], 'weight': weight, 'decay': decay}
        yield name, fields, ranks


def untrained_lines(data, most=5000):
    """What popularity and item-kNN reach, on at most so many users, a line each: is there anything
    to learn?"""
    chosen = np.random.default_rng(0).permutation(len(data.evaluated))[:most]
    chosen.sort()
    part = replace(data, evaluated=data.evaluated[chosen], negatives=data.negatives[chosen])
    for name, fields, ranks in untrained(part, {}):
        found = summarise(ranks)
        yield (f'{name:12}NDCG@10 {100 * found["sampled"]["NDCG@10"]:6.2f} (100 negatives) '
               f'{100 * found["full"]["NDCG@10"]:6.2f} (all items), recency weight '
               f'{fields["decay"]:g} a step; {len(chosen):,} users')
