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
from common.metrics import rank_counts, result_of, value_of
from common.runs import result_line

DECAYS = 1.0, 0.9, 0.8, 0.6, 0.4
WEIGHTS = 0.1, 0.3, 1.0, 3.0  # of the text beside the items


def weighted(items, offsets, decay, n):
    """Histories (ragged) with their recency weights, as a scorer takes them: those of an item that
    a row has twice are added up."""
    lengths = np.diff(offsets)
    age = -1 - ragged(-lengths, lengths)
    index = np.stack([row_numbers(lengths), items])
    size = len(lengths), n + 1
    found = torch.sparse_coo_tensor(index, decay ** age, size, check_invariants=False)
    return found.float().coalesce()


# ------------------------------------------------------------------------ scorers

def popularity(data):
    """How often items occur in training parts, whatever the history."""
    items, _ = data.training()
    row = torch.from_numpy(items).bincount(minlength=data.n_items + 1).float()

    def score(weights):
        return row.repeat(len(weights), 1)
    return score


def item_knn(data):
    """score(j) = sum over the history's items i other than j of weight(i) cos(i, j), the cosine of
    the sets of users who have i and j in their training parts."""
    had = weighted(*data.training(), 1.0, data.n_items)  # however often
    over_items = row_sums(had)
    over_users = row_sums(had.t().coalesce())
    counts = had.indices()[1].bincount(minlength=data.n_items + 1)
    norm = counts.clamp_min(1).sqrt()[:, None]

    def score(weights):
        met = over_items(weights.t().to_dense() / norm)  # [users, B]
        scores = over_users(met).div_(norm)
        return without(scores.t().contiguous(), weights, counts > 0)  # cos(i, i) = 1
    return score


def row_sums(matrix):
    """A function of a table [columns, B]: for each row of a sparse matrix the sum of the table's
    rows that its entries stand for, [rows, B]."""
    rows, columns = matrix.indices()
    begin = torch.searchsorted(rows, torch.arange(len(matrix)))

    def add_up(table):
        return F.embedding_bag(columns, table, begin, mode='sum')
    return add_up


def directions(matrix, end):
    """Rows [n + 1, H] less their mean (of those before `end`: not of cold items), of length 1; row
    0 zeros."""
    centred = matrix - matrix[1:end].mean(0)
    centred[0] = 0
    return F.normalize(centred, dim=1)


def text_knn(matrix, end=None):
    """score(j) = sum over the history's items i other than j of weight(i) cos(E_i, E_j), of the
    directions of the rows."""
    unit = directions(matrix, end)
    own = unit.square().sum(1)

    def score(weights):
        return without(torch.sparse.mm(weights, unit) @ unit.t(), weights, own)
    return score


def without(scores, weights, own):
    """Scores less what each item of the history says of itself, weight x own [n + 1]; exactly 0
    where only rounding is left."""
    place = tuple(weights.indices())
    itself = weights.values() * own[place[1]]
    left = scores[place] - itself
    scores[place] = left * (left.abs() > 1e-5 * itself)
    return scores


def weighted_sum(first, second, weight):
    """The first scorer over its largest score plus `weight` times the second over its largest."""
    def top(scores):
        return scores / scores.amax(1, keepdim=True).clamp_min(1e-12)

    def score(weights):
        return top(first(weights)) + weight * top(second(weights))
    return score


def all_scorers(data, embeddings, end=None):
    """{name: (its embeddings' name or None, {weight: scorer})} of every baseline; embeddings {name:
    Embeddings}, `end` as in text_knn."""
    items = item_knn(data)
    found = {'item-knn': (None, {None: items})}
    for init, given in embeddings.items():
        text = text_knn(given.matrix, end)
        both = {weight: weighted_sum(items, text, weight) for weight in WEIGHTS}
        found[f'text-knn-{init}'] = init, {None: text}
        found[f'item+text-knn-{init}'] = init, both
    found['popularity'] = None, {None: popularity(data)}
    return found


# ------------------------------------------------------------------------ choice on validation

def some_of(data, scores=2 ** 29):
    """The dataset with every k-th evaluated user only, k such that users times items are at most
    `scores` (ours: a minute's work). 20,000 users and 25,000 items are still taken as they are."""
    step = -(-len(data.evaluated) * data.n_items // scores)
    return replace(data, evaluated=data.evaluated[::step], negatives=data.negatives[::step])


def ranks_of(data, which, scorer, decay=1.0):
    """Ranks of the evaluated users' targets under a scorer."""
    *histories, _ = data.split(which)

    def score(users):
        return scorer(weighted(*take(*histories, users), decay, data.n_items))
    # a scorer makes several matrices of a chunk's size
    return rank_counts(score, data, which, 2 ** 22)


def untrained(data, embeddings):
    """(name, what Run.write takes) of every baseline; embeddings {name: Embeddings}."""
    part = some_of(data)
    for name, (init, scorers) in all_scorers(data, embeddings).items():
        began = time.monotonic()
        valid = {(weight, decay): value_of(ranks_of(part, 'valid', scorers[weight], decay))
                 for weight, decay in product(scorers, DECAYS)}
        weight, decay = max(valid, key=valid.get)
        ranks = ranks_of(data, 'test', scorers[weight], decay)
        yield name, {'model': 'untrained',
                     'init': init,
                     'seconds': round(time.monotonic() - began, 1),
                     'valid': valid[weight, decay],
                     'weight': weight,
                     'decay': decay,
                     **result_of(data, ranks)}


def untrained_lines(data):
    """What popularity and item-kNN reach, a line each: is there anything to learn?"""
    for name, row in untrained(some_of(data), {}):
        yield (f'{name:12}{result_line(row)}, recency weight {row["decay"]:g} a step; '
               f'{row["users"]:,} users')
