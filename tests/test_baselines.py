"""Rankings that need no training, worked by hand. Run: python -m pytest tests/test_baselines.py"""
import dataclasses
import inspect
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
from common import baselines
from common.arrays import offsets_of, row_numbers
from common.baselines import (DECAYS, WEIGHTS, item_knn, popularity, ranks_of, row_sums, some_of,
                              text_knn, untrained_lines, value_of, weighted, weighted_sum)
from common.data import Dataset, prepare
from common.files import UserError, load_pt, save_pt
from common.metrics import rank_counts, result_of, summarise
from common.runs import load_rows, read_ranks
from tests.toy import canonical

# Training part, validation item, test item. Item 6 is in no training part: user 3 is not evaluated.
ROWS = [1, 2, 1, 3, 4], [2, 3, 1, 2], [3, 1, 2, 3, 5], [5, 4, 2, 6]
NEGATIVES = [5, 6], [4, 5, 6], [4, 6]
# Who has which items in the training part: 1 {0, 2}, 2 {0, 1, 2}, 3 {1, 2}, 4 {3}, 5 {3}, 6 nobody.
NEAR, HALF = 2 / 6 ** 0.5, 0.5  # cosines of 1 and 2, of 2 and 3; of 1 and 3; that of 4 and 5 is 1
# Less their mean (5, 7) the rows are (1, 0), (0, 1), (2, 2), (-1, 0), (0, -3), (-2, 0).
MATRIX = torch.tensor([[0.0, 0], [6, 7], [5, 8], [7, 9], [4, 7], [5, 4], [3, 7]])
DIAGONAL = 0.5 ** 0.5


def dataset(rows=ROWS, evaluated=(0, 1, 2), given=NEGATIVES, n=6):
    items = np.concatenate([np.array(row, np.int32) for row in rows])
    offsets = np.cumsum([0] + [len(row) for row in rows])
    negatives = np.zeros((len(given), 100), np.int32)
    for row, ids in zip(negatives, given):
        row[:len(ids)] = ids
    item_ids, user_ids = [f'i{i}' for i in range(1, n + 1)], [f'u{u}' for u in range(len(rows))]
    return Dataset('hand', item_ids, user_ids, items, offsets, np.array(evaluated, np.int32),
                   negatives, {}, 'f', Path('nowhere'))


def sparse(items, offsets, values, n):
    """These values of the items of ragged rows as a sparse matrix [rows, n + 1]."""
    lengths = np.diff(offsets)
    index = np.stack([row_numbers(lengths), items])
    return torch.sparse_coo_tensor(index, values, (len(lengths), n + 1),
                                   check_invariants=True).float().coalesce()


def untrained(data, matrices):
    """(name, the choice, ranks) of each baseline."""
    embeddings = {name: types.SimpleNamespace(matrix=rows) for name, rows in matrices.items()}
    for name, row in baselines.untrained(data, embeddings):
        ranks = row['ranks']
        assert np.array_equal(ranks.pop('users'), data.evaluated)
        yield name, {key: row[key] for key in ('init', 'seconds', 'valid', 'weight', 'decay')}, ranks


def weights_of(*rows):
    """Sparse weights of histories from dictionaries {item: weight}."""
    items = np.array([item for history in rows for item in history])
    values = np.array([weight for history in rows for weight in history.values()], float)
    return sparse(items, offsets_of([len(history) for history in rows]), values, 6)


def close(found, *expected):
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------------ scorers

def test_equal_places_of_a_sparse_matrix_add_up():
    found = weighted(np.array([2, 2, 0]), np.array([0, 2, 3]), 0.5, 2)
    assert found.to_dense().tolist() == [[0, 0, 1.5], [1, 0, 0]]


def test_sums_of_rows_by_the_entries_of_a_sparse_matrix():
    """Rows 0, 2 and 4 have no entry; an entry's value has no say."""
    matrix = sparse(np.array([2, 0, 1]), np.array([0, 0, 2, 2, 3, 3]), np.array([5.0, 1, 9]), 2)
    table = torch.tensor([[1.0, 2], [10, 20], [100, 200]])
    assert row_sums(matrix)(table).tolist() == [[0, 0], [101, 202], [0, 0], [10, 20], [0, 0]]


def test_popularity_counts_training_parts_alone():
    """Item 1 stands twice in user 0's; 3, 4 and 2 that are validated and tested do not count."""
    found = popularity(dataset())(weights_of({1: 1.0}, {4: 0.5, 5: 1.0}))
    assert found.tolist() == [[0, 3, 3, 2, 1, 1, 0]] * 2


def test_item_knn_is_the_cosine_of_the_sets_of_users():
    """An item says nothing about itself; that a user has it twice changes no cosine."""
    score = item_knn(dataset())
    close(score(weights_of({1: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0}, {6: 1.0})),
          [0.0, 0, NEAR, HALF, 0, 0, 0], [0.0, NEAR, 0, NEAR, 0, 0, 0],
          [0.0, HALF, NEAR, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 1, 0], [0.0, 0, 0, 0, 0, 0, 0])
    close(score(weights_of({1: 0.625, 2: 0.25, 3: 1.0})),
          [0.0, 0.25 * NEAR + HALF, 0.625 * NEAR + NEAR, 0.625 * HALF + 0.25 * NEAR, 0, 0, 0])


def test_text_knn_is_the_cosine_of_centred_rows():
    score = text_knn(MATRIX)
    close(score(weights_of({1: 1.0}, {3: 2.0}, {4: 1.0})),
          [0.0, 0, 0, DIAGONAL, -1, 0, -1],
          [0.0, 2 * DIAGONAL, 2 * DIAGONAL, 0, -2 * DIAGONAL, -2 * DIAGONAL, -2 * DIAGONAL],
          [0.0, -1, 0, -DIAGONAL, 0, 0, 1])
    # a history's weights add up
    close(score(weights_of({1: 0.5, 2: 0.25})),
          [0.0, 0, 0, 0.75 * DIAGONAL, -0.5, -0.25, -0.5])
    # neither a shift nor the lengths of the centred rows matter
    close(text_knn(MATRIX * 3 + torch.tensor([[2.0, -4]]))(weights_of({1: 1.0})),
          [0.0, 0, 0, DIAGONAL, -1, 0, -1])


def test_a_row_that_is_the_mean_is_near_nothing():
    matrix = torch.tensor([[0.0, 0], [1, 1], [2, 2], [0, 0]])
    close(text_knn(matrix)(sparse(np.array([1, 2]), np.arange(3), np.ones(2), 3)),
          [0.0, 0, 0, 0], [0.0, 0, 0, -1])


def test_a_weighted_sum_takes_each_scorer_over_its_largest_score():
    data = dataset()
    both = weighted_sum(item_knn(data), text_knn(MATRIX), 0.5)
    close(both(weights_of({1: 2.0}, {4: 1.0})),
          [0.0, 0, 1 + 0, HALF / NEAR + 0.5, -0.5 / DIAGONAL, 0, -0.5 / DIAGONAL],
          [0.0, -0.5, 0, -0.5 * DIAGONAL, 0, 1 + 0, 0.5])


def test_where_one_scorer_says_nothing_the_other_decides():
    """Item 6 is in nobody's training part."""
    both = weighted_sum(item_knn(dataset()), text_knn(MATRIX), 0.5)
    close(both(weights_of({6: 1.0})), [0.0, -0.5, 0, -0.5 * DIAGONAL, 0.5, 0, 0])


def test_an_item_that_nobody_has_beside_another_says_nothing():
    """However many users have it alone: what rounding leaves of 1 - 1 must not decide."""
    history, text, wrong = weights_of({1: 1.3}), text_knn(MATRIX), []
    for users in range(1, 30):
        rows = [[1, 1, 2, 3]] * users + [[2, 3, 2, 3], [3, 4, 3, 2], [5, 6, 2, 3]]
        items = item_knn(dataset(rows, [0], [[4, 5]]))
        both = weighted_sum(items, text, 0.5)(history)
        if items(history).any() or not torch.allclose(both, 0.5 * top(text(history))):
            wrong.append((users, items(history)[0, 1].item(), both[0, 1].item()))
    assert not wrong, 'users, score of the item itself, and of the sum'


def top(scores):
    return scores / scores.max(1, keepdim=True).values


@pytest.mark.parametrize('decay', [1.0, 0.6])
def test_scorers_equal_plain_loops(decay, toy):
    """On made-up data with repeats, for every evaluated user."""
    data, matrix = toy
    items, offsets, _ = data.split('test')
    train, of = data.training()
    had = [set(train[a:b]) for a, b in zip(of[:-1], of[1:])]
    users = [{u for u, own in enumerate(had) if i in own} for i in range(data.n_items + 1)]
    centred = (matrix[1:] - matrix[1:].mean(0)).double().numpy()
    seen = capture(data, decay)
    item_scores, text_scores = item_knn(data)(seen), text_knn(matrix)(seen)
    for row, (a, b) in enumerate(zip(offsets[:-1], offsets[1:])):
        item_sum, text_sum = np.zeros((2, data.n_items + 1))
        for age, i in enumerate(reversed(items[a:b].tolist())):
            for j in range(1, data.n_items + 1):
                if i == j:
                    continue
                both = len(users[i] & users[j])
                item_sum[j] += decay ** age * both / max(1, len(users[i]) * len(users[j])) ** 0.5
                x, y = centred[i - 1], centred[j - 1]
                text_sum[j] += decay ** age * (x @ y) / np.sqrt((x @ x) * (y @ y))
        assert np.allclose(item_scores[row], item_sum, atol=1e-5)
        assert np.allclose(text_scores[row], text_sum, atol=1e-5)


def capture(data, decay):
    """The weights of all evaluated users' test histories, as `ranks_of` makes them."""
    seen = []

    def scorer(weights):
        seen.append(weights.to_dense())
        return torch.zeros(weights.shape)
    ranks_of(data, 'test', scorer, decay)
    return torch.cat(seen).to_sparse()


# ------------------------------------------------------------------------ ranks

def test_a_history_counts_with_decay_to_the_age():
    """The newest item counts 1, whichever split; items that stand twice add up."""
    data, seen = dataset(), []

    def scorer(weights):
        seen.append(weights.to_dense())
        return torch.zeros(weights.shape)
    ranks_of(data, 'test', scorer, 0.5)
    ranks_of(data, 'valid', scorer, 0.5)
    assert torch.cat(seen).tolist() == [
        [0, 0.625, 0.25, 1, 0, 0, 0],      # 1 2 1 3
        [0, 1, 0.25, 0.5, 0, 0, 0],        # 2 3 1
        [0, 0.25, 0.5, 1.125, 0, 0, 0],    # 3 1 2 3
        [0, 1.25, 0.5, 0, 0, 0, 0],        # 1 2 1
        [0, 0, 0.5, 1, 0, 0, 0],           # 2 3
        [0, 0.5, 1, 0.25, 0, 0, 0]]        # 3 1 2


def pairs(ranks):
    return {name: found.tolist() for name, found in ranks.items()}


def test_ranks_of_popularity_with_their_ties():
    """Scores 3 3 2 1 1 0. Test targets 4, 2, 5; validation targets 3, 1, 3."""
    data = dataset()
    assert pairs(ranks_of(data, 'test', popularity(data))) == {
        'sampled': [[0, 1], [0, 0], [0, 1]],  # against 5 6, 4 5 6, 4 6
        'full': [[3, 1], [0, 1], [3, 1]],
        'new': [[0, 1], [0, 0], [0, 1]]}  # but for the histories 1 2 3, 2 3 1, 3 1 2
    # validation chooses by its candidates alone: 3 against 5 6, 1 against 4 5 6, 3 against 4 6
    assert pairs(ranks_of(data, 'valid', popularity(data)))['sampled'] == [[0, 0]] * 3
    assert value_of(ranks_of(data, 'valid', popularity(data))) == 1


def test_ranks_of_item_knn_with_their_ties():
    """What nobody has beside a history's items has score 0: targets 4 and 5 tie with the rest."""
    data = dataset()
    assert pairs(ranks_of(data, 'test', item_knn(data), 0.5)) == {
        'sampled': [[0, 2], [0, 0], [0, 2]],
        'full': [[3, 2], [0, 0], [3, 2]],
        'new': [[0, 2], [0, 0], [0, 2]]}
    # validation of user 0, target 3, history 1 2 1: w HALF + d NEAR against w NEAR of item 2, where
    # w = 1 + d * d; it wins with d = 0.5 (1.033, 1.021) and loses with d = 0.4 (0.907, 0.947)
    data = dataset(given=[[2], [4], [4]])
    assert pairs(ranks_of(data, 'valid', item_knn(data), 0.5))['sampled'] == [[0, 0]] * 3
    assert pairs(ranks_of(data, 'valid', item_knn(data), 0.4))['sampled'] == [[1, 0], [0, 0], [0, 0]]


def test_ranks_of_text_knn():
    """Test target 4 of user 0 has the direction of 6, which no candidate is below."""
    data = dataset()
    found = pairs(ranks_of(data, 'test', text_knn(MATRIX), 0.5))
    assert found['full'][0] == [4, 1]
    assert found['new'][0] == found['sampled'][0] == [1, 1]


@pytest.mark.parametrize('scorer', ['popularity', 'item', 'text'])
def test_parts_of_the_users_change_no_rank(scorer, toy, monkeypatch):
    data, matrix = toy
    often = np.tile(np.arange(len(data.evaluated)), 4)
    data = dataclasses.replace(data, evaluated=data.evaluated[often],
                               negatives=data.negatives[often])
    score = {'popularity': popularity(data), 'item': item_knn(data),
             'text': text_knn(matrix)}[scorer]
    whole = ranks_of(data, 'test', score, 0.8)
    calls = []

    def in_parts(counted, *more):
        def score(rows):
            calls.append(rows)
            return counted(rows)
        return rank_counts(score, *more[:-1], 3 * (data.n_items + 1))
    monkeypatch.setattr(baselines, 'rank_counts', in_parts)
    parts = ranks_of(data, 'test', score, 0.8)
    assert len(calls) > 5 and len(whole) == 3
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


# ------------------------------------------------------------------------ choice on validation

@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    """Users who walk through the items and come back to where they were; a matrix of the items."""
    folder = tmp_path_factory.mktemp('toy')
    canonical(folder / 'data' / 'toy', users=60, length=(5, 12))
    path = folder / 'data' / 'toy' / 'interactions.csv'
    lines = path.read_text().splitlines()
    again = [line.replace(',100', ',200') for line in lines[1::5]]
    path.write_text('\n'.join(lines + again) + '\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        data = prepare('toy', (4, 1, 0))
        assert any(len(set(row)) < len(row) for row in np.split(data.items, data.offsets[1:-1]))
        data.attributes
    torch.manual_seed(0)
    near = torch.cumsum(torch.randn(data.n_items, 6), 0)
    return data, torch.cat([torch.zeros(1, 6), near + 3])


def test_a_bounded_part_of_the_users_is_every_kth(toy):
    """At a large catalogue: decay and weight are chosen, and data is looked at, on fewer users."""
    data, _ = toy
    users = len(data.evaluated)
    for scores, k in ((10 ** 9, 1), (users * data.n_items, 1), (users * data.n_items - 1, 2),
                      (20 * data.n_items, -(-users // 20))):
        part = some_of(data, scores)
        assert np.array_equal(part.evaluated, data.evaluated[::k])
        assert np.array_equal(part.negatives, data.negatives[::k])
        assert part.n_items * len(part.evaluated) <= scores + data.n_items
    assert inspect.signature(some_of).parameters['scores'].default == 2 ** 29


def test_the_choice_is_made_on_a_part_and_all_are_tested(toy, monkeypatch):
    data, matrix = toy
    monkeypatch.setattr(baselines, 'some_of', lambda data: dataclasses.replace(
        data, evaluated=data.evaluated[::3], negatives=data.negatives[::3]))
    part = baselines.some_of(data)
    for name, fields, ranks in untrained(data, {'e': matrix}):
        scorer = scorers(data, matrix)[name][fields['weight']]
        assert fields['valid'] == value_of(ranks_of(part, 'valid', scorer, fields['decay']))
        assert len(ranks['full']) == len(data.evaluated)
    assert all(f'{len(part.evaluated):,} users' in line for line in untrained_lines(data))


def scorers(data, matrix):
    """{name: {weight: scorer}}, as the module says them."""
    items, text = item_knn(data), text_knn(matrix)
    return {'item-knn': {None: items}, 'text-knn-e': {None: text},
            'item+text-knn-e': {w: weighted_sum(items, text, w) for w in WEIGHTS},
            'popularity': {None: popularity(data)}}


def test_decay_and_weight_are_the_best_of_all_on_validation(toy):
    data, matrix = toy
    tried, found = scorers(data, matrix), list(untrained(data, {'e': matrix}))
    assert [name for name, _, _ in found] == list(tried)
    for name, fields, ranks in found:
        decays = (1.0,) if name == 'popularity' else DECAYS
        values = {(weight, decay): value_of(ranks_of(data, 'valid', scorer, decay))
                  for weight, scorer in tried[name].items() for decay in decays}
        chosen = fields['weight'], fields['decay']
        assert fields['valid'] == values[chosen] == max(values.values())
        assert fields['init'] == ('e' if name.endswith('-e') else None) and fields['seconds'] >= 0
        expected = ranks_of(data, 'test', tried[name][fields['weight']], fields['decay'])
        assert pairs(ranks) == pairs(expected)
    assert {fields['decay'] for _, fields, _ in found} != {1.0}


def test_test_items_have_no_say_in_the_choice(toy):
    data, matrix = toy
    items = data.items.copy()
    last = data.offsets[1:] - 1
    # somebody's first item comes last: what counts now is what is old
    items[last] = items[data.offsets[:-1]]
    other = dataclasses.replace(data, items=items)
    better_on_test = 0
    for (name, a, ranks_a), (_, b, ranks_b) in zip(untrained(data, {'e': matrix}),
                                                   untrained(other, {'e': matrix})):
        assert {**a, 'seconds': 0} == {**b, 'seconds': 0}, name
        assert pairs(ranks_a) != pairs(ranks_b)
        values = [value_of(ranks_of(other, 'test', scorer, decay))
                  for scorer in scorers(other, matrix)[name].values() for decay in DECAYS]
        better_on_test += max(values) > value_of(ranks_b)
    assert better_on_test, 'a choice on test would have been another one'


def test_another_ranking_may_choose_on_validation(toy, monkeypatch):
    """README invites to edit value_of: what asks for the whole catalogue found no such ranking."""
    data, matrix = toy

    def by_all(ranks):
        return summarise(ranks)['full']['NDCG@5']
    monkeypatch.setattr(baselines, 'value_of', by_all)
    for name, row, _ in untrained(data, {'e': matrix}):
        values = [by_all(ranks_of(data, 'valid', scorer, decay))
                  for scorer in scorers(data, matrix)[name].values() for decay in DECAYS]
        assert row['valid'] == max(values) and (min(values) < max(values) or name == 'popularity')


def test_the_lines_of_prepare(toy):
    data, _ = toy
    lines = list(untrained_lines(data))
    assert [line.split()[0] for line in lines] == ['item-knn', 'popularity']
    for line, (_, fields, ranks) in zip(lines, untrained(data, {})):
        value = 100 * summarise(ranks)['full']['NDCG@10']
        assert f'{value:.2f} (all items)' in line and f'recency weight {fields["decay"]:g}' in line


# ------------------------------------------------------------------------ evaluate.py untrained

@pytest.fixture
def world(toy, tmp_path, monkeypatch):
    data, matrix = toy
    monkeypatch.setenv('ELEPHANT_DATA', str(data.folder.parent))
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path))
    head = {'identity': {'data': data.fingerprint}, 'dataset': 'toy', 'plm': 'p', 'cosine': 0.5}
    save_pt(tmp_path / 'toy' / 'embeddings' / 'lf.pt', 'embeddings', head=head, matrix=matrix,
            items=data.item_ids)
    return data, matrix, tmp_path / 'toy'


def write(*options):
    args = evaluate.parse_args(['untrained', 'toy', *options])
    evaluate.main(args)


def test_every_ranking_without_training_is_a_run(world, capsys):
    data, matrix, folder = world
    write()
    rows = {row['run']: row for row in load_rows('toy')}
    assert set(rows) == {'popularity', 'item-knn', 'text-knn-lf', 'item+text-knn-lf'}
    for name, fields, ranks in untrained(data, {'lf': matrix}):
        row, saved = read_ranks('toy', name)
        assert row['model'] == 'untrained' and np.array_equal(saved['users'], data.evaluated)
        assert all(np.array_equal(saved[key], ranks[key]) for key in ranks)
        assert {key: row[key] for key in ('init', 'weight', 'decay', 'valid')} == {
            key: fields[key] for key in ('init', 'weight', 'decay', 'valid')}
        expected = result_of(data, ranks)
        kept = expected.pop('ranks')
        assert (kept.pop('users') == data.evaluated).all() and kept.keys() == ranks.keys()
        assert {key: row[key] for key in expected} == expected
        assert row['plm'] == ('p' if fields['init'] else None)
    assert rows['popularity']['tie_share']['sampled'] > 0.1, 'counts tie'
    assert sorted(path.name for path in (folder / 'popularity').iterdir()) == [
        'ranks.npz', 'row.json']
    capsys.readouterr()
    write()
    assert 'up to date' in capsys.readouterr().out


def test_rankings_of_embeddings_that_are_gone_go_too(world):
    data, _, folder = world
    write()
    (folder / 'embeddings' / 'lf.pt').unlink()
    shutil.copytree(folder / 'item-knn', folder / 'oracle')  # of a scorer that was added and removed
    write()
    assert {row['run'] for row in load_rows('toy')} == {'popularity', 'item-knn'}


def test_new_embeddings_and_new_code_make_them_again(world, capsys, monkeypatch):
    data, matrix, folder = world
    write()
    path = folder / 'embeddings' / 'lf.pt'
    content = load_pt(path, 'embeddings')
    content.pop('kind')
    content['matrix'] = matrix.flip(1) * torch.arange(1.0, 7)
    save_pt(path, 'embeddings', **content)
    capsys.readouterr()
    write()
    assert 'made again, as it was made with other embeddings.lf' in capsys.readouterr().out
    save_pt(path.with_name('pt.pt'), 'embeddings', **content)
    write()
    assert 'other embeddings.pt' in capsys.readouterr().out and (folder / 'text-knn-pt').exists()
    monkeypatch.setattr('common.runs.code_digest', lambda file: file)
    write('--keep')
    assert 'kept, though made by other code' in capsys.readouterr().out
    write()
    out = capsys.readouterr().out
    assert 'other code (common/arrays.py, common/baselines.py, common/data.py, common/metrics.py)' in out
    assert out.count('written to') == 6


def test_embeddings_whose_rows_are_all_alike_are_refused(world):
    _, _, folder = world
    path = folder / 'embeddings' / 'lf.pt'
    content = load_pt(path, 'embeddings')
    content.pop('kind')
    content['matrix'][1:] = 0.1
    save_pt(path, 'embeddings', **content)
    with pytest.raises(UserError, match='lf.pt: all items have the same row'):
        write()
    assert not load_rows('toy')
