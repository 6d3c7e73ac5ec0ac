"""Ranks, ties, metrics and comparisons worked by hand.

Run: python -m pytest tests/test_metrics.py
"""
import math
import types

import numpy as np
import pytest
import torch

from common import metrics
from common.files import Diverged
from common.metrics import compare, per_user, product_scorer, result_of, summarise


def rank_counts(score, n, targets, negatives, history, *chunk):
    """Of a Dataset that is no more than this."""
    data = types.SimpleNamespace(n_items=n, negatives=negatives,
                                 split=lambda which: (*history, targets))
    return metrics.rank_counts(score, data, 'test', *chunk)


def no_history(users):
    return np.zeros(0, np.int32), np.zeros(users + 1, np.int64)


def ranks(scores, target, negatives, history=()):
    """One state per score row: the table is the identity, so a state's entries are the scores. Two
    users, as one rounds alone."""
    scores = torch.tensor([scores, scores], dtype=torch.float32)
    score = product_scorer(scores, torch.eye(scores.shape[1]))
    items, offsets = np.array([*history, *history], np.int32), np.arange(3) * len(history)
    two = lambda x: np.array([x, x])
    return rank_counts(score, scores.shape[1] - 1, two(target), two(negatives), (items, offsets))


# ------------------------------------------------------------------------ ranks

def test_counts_by_hand():
    # items 1..5 score 3 2 2 2 1; column 0 (padding) scores 9 and must not count
    out = ranks([9, 3, 2, 2, 2, 1], 3, [1, 2, 5, 0])
    assert out['full'].tolist() == [[1, 2]] * 2, 'one higher, two others equal'
    assert out['sampled'].tolist() == [[1, 1]] * 2, 'of 1, 2, 5 one higher, one equal; 0 is none'
    assert out['new'].tolist() == [[1, 2]] * 2, 'nothing was in the history'
    assert all(found.dtype == np.int32 for found in out.values())


@pytest.mark.parametrize('history, new', [
    ([1], [0, 2]),           # it scored higher
    ([2], [1, 1]),           # it tied
    ([5], [1, 2]),           # it scored lower
    ([1, 1, 1], [0, 2]),     # bought three times, one item
    ([2, 1, 2, 4], [0, 0]),
    ([3], [1, 2]),           # the target stays a candidate
    ([3, 3, 1], [0, 2]),
    ([1, 2, 3, 4, 5], [0, 0]),
])
def test_new_leaves_the_history_out_by_hand(history, new):
    # items 1..5 score 3 2 2 2 1; the target is item 3
    out = ranks([9, 3, 2, 2, 2, 1], 3, [1, 2, 5, 0], history)
    assert out['new'].tolist() == [new] * 2
    assert out['full'].tolist() == [[1, 2]] * 2, 'the others count the history as before'
    assert out['sampled'].tolist() == [[1, 1]] * 2


def test_each_user_has_a_history_of_their_own():
    scores = torch.tensor([[0, 5, 4, 3, 2], [0, 2, 3, 4, 5], [0, 1, 1, 1, 1]], dtype=torch.float32)
    score = product_scorer(scores, torch.eye(5))
    history = np.array([1, 4, 1, 4, 3], np.int32), np.array([0, 2, 2, 5])
    negatives = np.zeros((3, 2), np.int32)
    out = rank_counts(score, 4, np.array([3, 1, 1]), negatives, history)
    assert out['full'].tolist() == [[2, 0], [3, 0], [0, 3]]
    assert out['new'].tolist() == [[1, 0], [3, 0], [0, 1]]
    assert out['sampled'].tolist() == [[0, 0]] * 3, 'no negatives at all'


def test_new_equals_plain_counting():
    rng = np.random.default_rng(0)
    users, n = 40, 25
    scores = torch.from_numpy(rng.integers(0, 6, (users, n + 1)).astype(np.float32))
    targets = rng.integers(1, n + 1, users)
    negatives = rng.integers(0, n + 1, (users, 10))
    lengths = rng.integers(0, 12, users)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = rng.integers(1, n + 1, offsets[-1]).astype(np.int32)
    given = scores.clone()
    out = rank_counts(lambda rows: given[rows], n, targets, negatives, (items, offsets), 99)
    for u, target in enumerate(targets):
        others = set(range(1, n + 1)) - set(items[offsets[u]:offsets[u + 1]].tolist()) - {target}
        own = scores[u, target]
        plain = [sum(scores[u, i] > own for i in others), sum(scores[u, i] == own for i in others)]
        assert out['new'][u].tolist() == plain
    assert (out['new'] <= out['full']).all()


def test_constant_scorer_gets_what_a_random_order_gets():
    n, users = 40, 6
    negatives = np.tile(np.arange(10, 31), (users, 1))
    score = product_scorer(torch.zeros(users, 3), torch.zeros(n + 1, 3))
    history = np.tile(np.arange(31, 36), users), 5 * np.arange(users + 1)
    out = rank_counts(score, n, np.arange(1, users + 1), negatives, history)
    m = summarise(out)
    assert m['full']['HR@10'] == pytest.approx(10 / n)
    assert m['sampled']['HR@5'] == pytest.approx(5 / 22)
    assert m['new']['HR@10'] == pytest.approx(10 / (n - 5))
    assert m['full']['NDCG@5'] == pytest.approx(sum(1 / np.log2(np.arange(5) + 2)) / n)
    data = types.SimpleNamespace(name='toy', fingerprint='f', evaluated=np.arange(users))
    assert result_of(data, out)['tie_share'] == {'sampled': 1.0, 'full': 1.0, 'new': 1.0}


def test_chunks_and_order_of_candidates_change_nothing():
    torch.manual_seed(0)
    states, table, bias = torch.randn(150, 8), torch.randn(31, 8), torch.randn(31)
    rng = np.random.default_rng(0)
    targets, negatives = rng.integers(1, 31, 150), rng.integers(1, 31, (150, 10))
    history = rng.integers(1, 31, 450).astype(np.int32), 3 * np.arange(151)
    score = product_scorer(states, table, bias)
    run = lambda chunk: rank_counts(score, 30, targets, negatives, history, chunk)
    whole, parts, least = run(10 ** 9), run(31 * 40), run(1)
    scores = states @ table.T + bias
    g = [(scores[u, 1:] > scores[u, t]).sum().item() for u, t in enumerate(targets)]
    assert whole['full'][:, 0].tolist() == g
    assert all((whole[k] == parts[k]).all() and (whole[k] == least[k]).all() for k in whole)


def test_users_are_scored_in_parts_of_a_bounded_size_and_none_alone():
    """However large the catalogue, some users share each reading of the table."""
    sizes = []

    def score(rows):
        sizes.append(len(rows))
        return torch.zeros(sizes[-1], 4)

    def run(users, chunk):
        sizes.clear()
        targets, none = np.ones(users, int), np.zeros((users, 1), int)
        rank_counts(score, 3, targets, none, no_history(users), chunk)
        assert sum(sizes) == users
        return sizes
    assert run(7, 1) == [7]
    assert run(33, 1) == [17, 16]
    assert run(100, 1) == [25] * 4
    assert run(100, 4 * 50) == [50, 50]
    assert run(101, 4 * 50) == [34, 34, 33]


def test_equal_rows_tie():
    torch.manual_seed(0)
    table = torch.randn(41, 16)
    table[21:] = table[1:21]
    score = product_scorer(torch.randn(10, 16), table)
    negatives = np.arange(21, 31)[:, None]
    out = rank_counts(score, 40, np.arange(1, 11), negatives, no_history(10))
    assert (out['full'][:, 1] == 1).all() and (out['sampled'][:, 1] == 1).all()


@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(Diverged, match='not a finite number'):
        ranks([0, 1, bad, 2], 1, [3])


def test_the_padding_may_have_any_score():
    score = lambda rows: torch.tensor([[float('nan'), 1.0, 2.0]] * 2)
    out = rank_counts(score, 2, np.array([1, 1]), np.array([[2], [0]]), no_history(2))
    assert out['full'].tolist() == [[1, 0]] * 2 and out['sampled'].tolist() == [[1, 0], [0, 0]]


# ------------------------------------------------------------------------ metrics

def test_tied_metrics_by_hand():
    r = np.array([[1, 2]])
    assert per_user(r, 'HR@3')[0] == pytest.approx(2 / 3)
    assert per_user(r, 'HR@1')[0] == 0 and per_user(r, 'HR@4')[0] == 1
    for name in ('MRR@10', 'ndcg@10', 'Recall@10'):
        with pytest.raises(KeyError):  # not HR under another name
            per_user(r, name)
    assert per_user(r, 'NDCG@3')[0] == pytest.approx((1 / np.log2(3) + 1 / np.log2(4)) / 3)
    clear = per_user(np.array([[0, 0], [9, 0], [10, 0]]), 'NDCG@10')
    assert clear.tolist() == pytest.approx([1, 1 / np.log2(11), 0])


def test_summary_names_every_ranking_and_cutoff():
    r = {name: np.array([[0, 0], [7, 0], [60, 3]]) for name in ('sampled', 'full', 'new')}
    m = summarise(r)
    assert list(m) == ['sampled', 'full', 'new']
    assert list(m['sampled']) == ['HR@5', 'HR@10', 'NDCG@5', 'NDCG@10'] and list(m['full']) == [
        'HR@5', 'HR@10', 'HR@50', 'NDCG@5', 'NDCG@10', 'NDCG@50'] == list(m['new'])
    assert m['new']['HR@5'] == pytest.approx(1 / 3) and m['new']['HR@10'] == pytest.approx(2 / 3)
    data = types.SimpleNamespace(name='toy', fingerprint='f', evaluated=np.arange(3))
    found = result_of(data, r)
    kept = found.pop('ranks')
    assert kept.pop('users').tolist() == [0, 1, 2] and kept == r
    assert found == {'dataset': 'toy', 'data': 'f', 'users': 3, 'metrics': m,
                     'tie_share': {name: 1 / 3 for name in r}}


# ------------------------------------------------------------------------ comparison

def test_compare_by_hand():
    # differences 1 2 3 6: mean 3, variance 14/3, error sqrt(14/3/4) = 1.0801, statistic 2.7775
    d, (low, high), p = compare([2, 4, 6, 9], [1, 2, 3, 3])
    error = math.sqrt(14 / 3 / 4)
    assert d == 3
    assert (low, high) == pytest.approx((3 - 1.96 * error, 3 + 1.96 * error))
    assert p == pytest.approx(0.00548, abs=5e-6)
    back, (low_back, high_back), p_back = compare([1, 2, 3, 3], [2, 4, 6, 9])
    assert (back, low_back, high_back, p_back) == pytest.approx((-d, -high, -low, p))


def test_compare():
    rng = np.random.default_rng(0)
    a = rng.random(200)
    d, (low, high), p = compare(a + 0.1, a)
    assert d == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1)
    assert p < 0.01
    d, (low, high), p = compare(a, rng.permutation(a))
    assert low < 0 < high and p > 0.05


def test_compare_where_all_differences_are_equal():
    same = np.array([0.5, 1.0, 0.25])
    assert compare(same, same) == (0, (0, 0), 1)
    assert compare(same + 0.5, same) == (0.5, (0.5, 0.5), 0), 'a difference without any doubt'


def test_p_is_as_often_below_5_percent_as_it_says():
    rng = np.random.default_rng(0)
    below = [compare(rng.random(100), rng.random(100))[2] < 0.05 for _ in range(2000)]
    assert abs(np.mean(below) - 0.05) < 0.015
