"""Ranks, ties and metrics worked by hand. Run: python -m pytest tests/test_metrics.py"""
from multiprocessing import Process

import numpy as np
import pytest
import torch

from common.files import UserError
from common.metrics import compare, find_row, load_rows, per_user, rank_counts, save_row, summarise, tie_share


def ranks(scores, target, negatives, **more):
    """One state per score row: the table is the identity, so a state's entries are the scores. Two users, as one rounds alone."""
    scores = torch.tensor([scores, scores], dtype=torch.float32)
    two = lambda x: np.array([x, x])
    return rank_counts(scores, torch.eye(scores.shape[1]), two(target), two(negatives), **more)


def test_counts_by_hand():
    # items 1..5 score 3 2 2 2 1; column 0 (padding) scores 9 and must not count
    out = ranks([9, 3, 2, 2, 2, 1], 3, [1, 2, 5, 0])
    assert out['full'].tolist() == [[1, 2]] * 2, 'one higher, two others equal'
    assert out['sampled'].tolist() == [[1, 1]] * 2, 'candidates 1, 2, 5: one higher, one equal; 0 is no candidate'


def test_tied_metrics_by_hand():
    r = np.array([[1, 2]])
    assert per_user(r, 'HR', 3)[0] == pytest.approx(2 / 3)
    assert per_user(r, 'HR', 1)[0] == 0 and per_user(r, 'HR', 4)[0] == 1
    assert per_user(r, 'NDCG', 3)[0] == pytest.approx((1 / np.log2(3) + 1 / np.log2(4)) / 3)
    assert per_user(np.array([[0, 0], [9, 0], [10, 0]]), 'NDCG', 10).tolist() == pytest.approx([1, 1 / np.log2(11), 0])


def test_constant_scorer_gets_what_a_random_order_gets():
    n, users = 40, 6
    out = rank_counts(torch.zeros(users, 3), torch.zeros(n + 1, 3), np.arange(1, users + 1), np.tile(np.arange(10, 31), (users, 1)))
    m = summarise(out)
    assert m['full']['HR@10'] == pytest.approx(10 / n) and m['sampled']['HR@5'] == pytest.approx(5 / 22)
    assert m['full']['NDCG@5'] == pytest.approx(sum(1 / np.log2(np.arange(5) + 2)) / n)
    assert tie_share(out) == {'sampled': 1.0, 'full': 1.0}


def test_chunks_and_order_of_candidates_change_nothing():
    torch.manual_seed(0)
    states, table, rng = torch.randn(50, 8), torch.randn(31, 8), np.random.default_rng(0)
    targets, negatives = rng.integers(1, 31, 50), rng.integers(1, 31, (50, 10))
    whole, parts = (rank_counts(states, table, targets, negatives, chunk=c) for c in (10 ** 9, 100))
    scores = states @ table.T
    g = [(scores[u, 1:] > scores[u, t]).sum().item() for u, t in enumerate(targets)]
    assert whole['full'][:, 0].tolist() == g and all((whole[k] == parts[k]).all() for k in whole)


def test_equal_rows_tie():
    torch.manual_seed(0)
    table = torch.randn(41, 16)
    table[21:] = table[1:21]
    out = rank_counts(torch.randn(10, 16), table, np.arange(1, 11), np.arange(21, 31)[:, None])
    assert (out['full'][:, 1] == 1).all() and (out['sampled'][:, 1] == 1).all()


def test_excluded_history_is_no_candidate_but_the_target_is():
    out = ranks([9, 3, 2, 2, 2, 1], 3, [1, 2], exclude=(np.array([1, 3, 1, 3]), np.array([0, 2, 4])))
    assert out['full'].tolist() == [[0, 2]] * 2 and out['sampled'].tolist() == [[1, 1]] * 2


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_scores_that_are_no_numbers_are_refused(bad):
    with pytest.raises(UserError, match='not a finite number'):
        ranks([0, 1, bad, 2], 1, [3])


def test_compare():
    rng = np.random.default_rng(0)
    a = rng.random(200)
    d, (low, high), p = compare(a + 0.1, a, 500)
    assert d == pytest.approx(0.1) and low == pytest.approx(0.1) and high == pytest.approx(0.1) and p < 0.01
    d, (low, high), p = compare(a, rng.permutation(a), 500)
    assert low < 0 < high and p > 0.05


def test_rows_replace_their_earlier_selves_and_damage_is_named(tmp_path):
    r = {'users': np.arange(2), 'sampled': np.zeros((2, 2)), 'full': np.zeros((2, 2))}
    for lr, run in ((1, 'a'), (2, 'b'), (3, 'a')):
        save_row(tmp_path, {'run': run, 'identity': {'lr': lr}, 'metrics': {}}, r)
    assert [(x['run'], x['identity']['lr']) for x in load_rows(tmp_path)] == [('b', 2), ('a', 3)]
    assert find_row(tmp_path, 'a', {'lr': 3}) and not find_row(tmp_path, 'a', {'lr': 1})
    for text in ('[{"run"', '{}', '[1]'):
        (tmp_path / 'results.json').write_text(text)
        with pytest.raises(UserError, match='results.json'):
            load_rows(tmp_path)


def test_rows_written_at_the_same_time_are_all_kept(tmp_path):
    ranks = {'users': np.zeros(1, np.int32), 'sampled': np.zeros((1, 2), np.int32), 'full': np.zeros((1, 2), np.int32)}
    jobs = [Process(target=save_row, args=(tmp_path, {'run': f'r{i}', 'metrics': {}}, ranks)) for i in range(8)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert {r['run'] for r in load_rows(tmp_path)} == {f'r{i}' for i in range(8)}
