"""Recommendations, cold items, neighbours, and rows of other encoders: by hand, and as commands.
Run: python -m pytest tests/test_recommend.py
"""
import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import evaluate
import export_embeddings
import train_seq
from common import baselines, data, initial
from common.files import UserError, digest, load_pt, save_pt
from common.initial import read_embeddings
from common.models import load_seq
from common.recommend import new_users, quoted
from common.runs import read_row
from tests.toy import canonical, tiny_bert

LF = 'sasrec-bce-lf-trainable-centred-8-lr0.01-seed0'
OWN = 'sasrec-bce-own-freeze-raw-8-lr0.01-seed0'
RANDOM = 'sasrec-bce-random-8-lr0.01-seed0'
BERT = 'bert4rec-masked-lf-trainable-centred-8-lr0.01-seed0'
TIED = BERT.replace('rec-', 'rec-tied-')
COLD = ['x1', 'x2']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A data set with two cold items, a title that CSV must quote and a user whom the filters drop;
    embeddings of a tiny language model; ID models and rankings without training. Yields the folder
    of the runs."""
    folder = tmp_path_factory.mktemp('recommend')
    one = folder / 'data' / 'one'
    canonical(one)
    lines = (one / 'items.jsonl').read_text().splitlines()
    lines[3] = json.dumps({'id': 'i3', 'title': 'red, "fine" salt', 'brand': 'acme'})
    lines += [json.dumps({'id': 'x1', 'title': 'sea salt'}), json.dumps({'id': 'x2', 'title': 'tea'})]
    (one / 'items.jsonl').write_text('\n'.join(lines))
    with open(one / 'interactions.csv', 'a') as f:
        f.write('short,i1,1\n')
    plm = str(tiny_bert(folder / 'plm'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        patch.setenv('ELEPHANT_RUNS', str(folder / 'runs'))
        data.prepare('one', data.DEFAULT)
        run = folder / 'runs' / 'one'
        export('--plm', plm, '--out', run / 'embeddings' / 'lf.pt')
        train('random', 'lf-trainable')
        train('lf-trainable', model='bert4rec')
        train('lf-trainable', model='bert4rec-tied')
        call('untrained', 'one')
        yield run


@pytest.fixture
def found(world):
    return data.load('one')


def export(*options):
    export_embeddings.main(export_embeddings.parse_args(
        ['one', '--precision', 'float32', *map(str, options)]))


def train(*variants, model='sasrec', scale='centred'):
    train_seq.main(train_seq.parse_args(
        ['one', '--model', model, '--lrs', '0.01', '--epochs', '1', '--hidden', '8', '--precision',
         'float32', '--init-scale', scale, '--variants', *variants]))


def call(*options):
    evaluate.main(evaluate.parse_args([str(value) for value in options]))


def recommended(path, run, *options):
    """The rows that a command writes."""
    call('recommend', 'one', run, '--precision', 'float32', '--out', path, *options)
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def history(found, user):
    row = found.user_ids.index(user)
    return found.items[found.offsets[row]:found.offsets[row + 1]]


@torch.no_grad()
def scores_by_hand(world, found, run, items):
    model = load_seq(world / run, found)
    states = model.states(np.array(items), np.array([0, len(items)]))
    table, bias = model.scorer()
    return (states @ table.T)[0].numpy() + (0 if bias is None else bias.numpy())


# ------------------------------------------------------------------------ whole files

@pytest.mark.parametrize('run', [LF, BERT])
def test_all_users_as_csv(world, found, tmp_path, capsys, run):
    """In the order of the scores, without what the user had; the last line says how many."""
    rows = recommended(tmp_path / 'recs.csv', run, '--k', '4')
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('40 users in ') and last.endswith(f'written to {tmp_path / "recs.csv"}')
    assert ' a second), 4 items for each' in last
    assert [row['user'] for row in rows] == [user for user in found.user_ids for _ in range(4)]
    assert [row['rank'] for row in rows] == list('1234') * 40
    for user in ('u0', 'u17'):
        own = history(found, user)
        scores = scores_by_hand(world, found, run, own)
        left = np.setdiff1d(np.arange(1, found.n_items + 1), own)
        best = left[np.argsort(-scores[left])][:4]
        mine = [row for row in rows if row['user'] == user]
        assert [row['item'] for row in mine] == [found.item_ids[item - 1] for item in best]
        assert [row['title'] for row in mine] == [found.title(item) for item in best]
        np.testing.assert_allclose([float(row['score']) for row in mine], scores[best], atol=1e-4)
    rows = recommended(tmp_path / 'recs.csv', run, '--k', '40')
    assert 'red, "fine" salt' in {row['title'] for row in rows}, 'quoted as CSV asks'


def test_json_lines_say_what_csv_says(world, tmp_path):
    rows = recommended(tmp_path / 'recs.csv', LF)
    call('recommend', 'one', LF, '--precision', 'float32', '--out', tmp_path / 'recs.jsonl')
    lines = (tmp_path / 'recs.jsonl').read_text().splitlines()
    for row in rows:
        row.update(rank=int(row['rank']), score=float(row['score']))
    assert list(map(json.loads, lines)) == rows and len(rows) == 40 * 10


def test_any_text_comes_back_from_csv():
    texts = ['', 'a', 'a,b', '"', 'say ""no""', 'two\nlines', 'a\rb', ' blank ', "it's", 'é;\t%s']
    line = ','.join(map(quoted, texts)) + '\n'
    assert list(csv.reader(io.StringIO(line, newline=''))) == [texts]


@pytest.mark.parametrize('name', ['recs.csv.gz', 'recs.json', 'recs.parquet', 'recs'])
def test_a_form_that_is_not_written_is_refused_at_once(world, tmp_path, name):
    with pytest.raises(UserError, match='--out .*recs.*: must end in .csv or .jsonl'):
        call('recommend', 'one', LF, '--precision', 'float32', '--out', tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_with_history_and_no_more_than_there_are(world, found, tmp_path):
    rows = recommended(tmp_path / 'a.csv', LF, '--users', 'u3', '--k', '1000')
    own = {found.item_ids[item - 1] for item in history(found, 'u3')}
    assert len(rows) == found.n_items - len(own) and not own & {row['item'] for row in rows}
    rows = recommended(tmp_path / 'a.csv', LF, '--users', 'u3', '--k', '1000', '--with-history')
    assert {row['item'] for row in rows} == {*found.item_ids}


def test_a_file_is_whole_or_absent(world, tmp_path, monkeypatch):
    def stops(*_):
        yield 'u,1,i,0.5,title\n'
        raise UserError('stopped')
    monkeypatch.setattr('common.recommend.best', stops)
    with pytest.raises(UserError, match='stopped'):
        recommended(tmp_path / 'recs.csv', LF)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------ for whom

def test_users_named_or_in_a_file(world, tmp_path, capsys):
    every = recommended(tmp_path / 'all.csv', LF)
    wanted = [row for user in ('u7', 'u2') for row in every if row['user'] == user]
    typed = recommended(tmp_path / 'a.csv', LF, '--users', 'u7', 'u2')
    assert [(row['user'], row['item']) for row in typed] \
        == [(row['user'], row['item']) for row in wanted]
    (tmp_path / 'users.txt').write_text('u7 \nshort\n\tu2\r\nnobody\n')
    capsys.readouterr()
    assert recommended(tmp_path / 'a.csv', LF, '--users', tmp_path / 'users.txt') == typed
    assert capsys.readouterr().err == (
        f'note: {tmp_path / "users.txt"}: short: left out by the filters of the data; '
        '2 of 4 are left out\n')
    for user, words in (('nobody', '--users .ids, or one file that is there.: nobody: not in this dataset'),
                        ('short', '--users .*: short: left out by the filters')):
        with pytest.raises(UserError, match=words):
            call('recommend', 'one', LF, '--users', 'u7', user)
    (tmp_path / 'users.txt').write_text('nobody\n')
    with pytest.raises(UserError, match='nobody to recommend to'):
        call('recommend', 'one', LF, '--users', tmp_path / 'users.txt')


def test_a_history_typed_in_is_that_of_the_user_who_has_it(world, found, capsys):
    own = [found.item_ids[item - 1] for item in history(found, 'u5')]
    capsys.readouterr()
    call('recommend', 'one', LF, '--users', 'u5')
    of_user = capsys.readouterr().out
    call('recommend', 'one', LF, '--items', *own)
    typed = capsys.readouterr().out
    assert [line.split()[1:] for line in typed.splitlines()] \
        == [line.split()[1:] for line in of_user.splitlines()] and 'new ' in typed
    for item, words in (('y9', '--items: y9: not in this dataset'), ('x1', '--items: x1: .* --cold knows it')):
        with pytest.raises(UserError, match=words):
            call('recommend', 'one', LF, '--items', 'i1', item)


def test_histories_of_new_users(world, tmp_path, capsys):
    """By their time, whatever the form."""
    text = 'user,item,timestamp\nzoe,i2,30\nann,i9,5\nzoe,i2,30\nzoe,i1,4.5\nzoe,gone,31\nbob,gone,1\n'
    (tmp_path / 'h.csv').write_text(text)
    keys = text.split()[0].split(',')
    (tmp_path / 'h.jsonl').write_text(''.join(json.dumps(dict(zip(keys, line.split(',')))) + '\n'
                                              for line in text.split()[1:]))
    capsys.readouterr()
    first = recommended(tmp_path / 'a.csv', LF, '--histories', tmp_path / 'h.csv')
    said = capsys.readouterr().err
    assert 'h.csv: gone: not in this dataset; 2 of 5 are left out' in said
    assert 'h.csv: bob: a user without any known item; 1 of 3 are left out' in said
    assert first == recommended(tmp_path / 'a.csv', LF, '--histories', tmp_path / 'h.jsonl')
    typed = recommended(tmp_path / 'a.csv', LF, '--items', 'i1', 'i2')
    assert [row['item'] for row in first if row['user'] == 'zoe'] == [row['item'] for row in typed]
    assert [row['user'] for row in first] == ['zoe'] * 10 + ['ann'] * 10
    (tmp_path / 'own.csv').write_text(text.replace('user,item,timestamp', 'who,what,when'))
    own = recommended(tmp_path / 'a.csv', LF, '--histories', tmp_path / 'own.csv', '--columns',
                      'user=who,item=what,time=when')
    assert own == first, 'columns of other names'
    with pytest.raises(UserError, match='--columns goes with --histories'):
        call('recommend', 'one', LF, '--columns', 'user=who')


@pytest.mark.parametrize('option, name, text', [
    ('--users', 'h.csv', 'u1\n'), ('--histories', 'h.csv', 'user,item,timestamp\na,i1,1\n'),
    ('--histories', 'h.jsonl', '{"user": "a", "item": "i1", "time": 1}\n'),
    ('--histories', 'h.jsonl', '{"user": "a", "item": "i1", "time": 1}\n{"user": "a", "rank": 1}\n'),
    (None, 'h.csv', 'user,rank,name\na,1,general\n'), (None, 'h.csv', '\nb')])
def test_recommendations_replace_nothing_but_recommendations(world, tmp_path, option, name, text):
    path = tmp_path / name
    path.write_text(text)
    given = [option, path] if option else []
    with pytest.raises(UserError, match=f'--out .*{name}: holds no recommendations'):
        call('recommend', 'one', LF, *given, '--out', path)
    assert path.read_text() == text


@pytest.mark.parametrize('name', ['a.csv', 'a.jsonl'])
def test_recommendations_replace_earlier_ones_and_an_empty_file(world, tmp_path, name):
    (tmp_path / name).touch()
    first = recommended(tmp_path / name, LF, '--k', '2')
    assert recommended(tmp_path / name, LF, '--k', '2') == first


@pytest.mark.parametrize('name, text, words', [
    ('h.csv', 'who,item\na,i1\n', 'no column .user'), ('h.csv', 'user,item\na,i1\n', 'no column .timestamp'),
    ('h.csv', 'user,item,timestamp\na,i1,soon\n', "line 2 is no record with a user, .*'soon'"),
    ('h.jsonl', '{"user": "a"}\n', 'no column .item'), ('h.jsonl', '[1]\n', 'no column .user'),
    ('h.jsonl', '{"user": "a", "item": {}, "time": 1}\n', 'line 1 is no record'),
    ('h.jsonl', '[' * 100_000, 'no column .user'), ('h.csv', '', 'no column .user'),
    ('h.csv', b'\xff\xfe\x00', 'no column .user')])
def test_histories_that_are_none(world, tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words) as said:
        call('recommend', 'one', LF, '--histories', path)
    assert len(str(said.value)) - len(str(path)) < 250


def test_numbers_are_ids_too(tmp_path):
    path = tmp_path / 'h.jsonl'
    path.write_text('{"user": 7, "item": "b", "time": 2}\n{"user": 7, "item": 1, "time": 1}\n')
    args, data = SimpleNamespace(items=None, histories=path, columns={}), SimpleNamespace(cold_ids=[])
    assert new_users(args, data, SimpleNamespace(item_ids=['b', '1'])) == {'7': [2, 1]}


# ------------------------------------------------------------------------ without training

@pytest.mark.parametrize('run', ['popularity', 'item-knn', 'text-knn-lf', 'item+text-knn-lf'])
def test_rankings_without_training(world, found, tmp_path, run):
    """Their rank of the test item is that of their evaluation ("new": all but the history)."""
    with open(tmp_path / 'h.csv', 'w') as f:
        f.write('user,item,timestamp\n')
        for user in found.user_ids:
            f.writelines(f'{user},{found.item_ids[item - 1]},{time}\n'
                         for time, item in enumerate(history(found, user)[:-1]))
    rows = recommended(tmp_path / 'a.csv', run, '--histories', tmp_path / 'h.csv', '--k', '99')
    of_run = np.load(world / run / 'ranks.npz')
    for user, (higher, ties) in list(zip(of_run['users'], of_run['new']))[:20]:
        name, target = found.user_ids[user], found.item_ids[history(found, found.user_ids[user])[-1] - 1]
        place = next(int(row['rank']) for row in rows
                     if (row['user'], row['item']) == (name, target))
        assert higher < place <= higher + ties + 1


def test_a_ranking_that_todays_code_lacks_is_named(world, monkeypatch):
    """README invites to edit the weights: then the run that has another is made again."""
    monkeypatch.setattr(baselines, 'WEIGHTS', (7.0,))
    with pytest.raises(UserError, match="knn-lf: is not today's; evaluate.py untrained makes it"):
        call('recommend', 'one', 'item+text-knn-lf')


def test_a_title_is_one_line(found):
    found.attributes = [[['title', ' red\ntea '], ['brand', 'acme']], [['title', '']],
                        [['title', ' \n'], ['brand', 'zenith']]]
    assert [found.title(item) for item in (1, 2, 3)] == ['red tea', found.item_ids[1], 'zenith']


# ------------------------------------------------------------------------ cold items

def rows_of(world, name='lf'):
    """(rows of the catalogue, of the cold items) of an embedding file."""
    content = load_pt(world / 'embeddings' / f'{name}.pt', 'embeddings')
    assert len(content['cold']) == 2
    return content['matrix'][1:], content['cold']


@pytest.mark.parametrize('scale', initial.SCALES)
def test_more_rows_get_what_the_items_rows_give(scale):
    """A cold row that equals an item's gets that item's row; the items' own do not change."""
    torch.manual_seed(0)
    matrix = torch.cat([torch.zeros(1, 6), 4 + torch.randn(30, 6)])
    alone = initial.initial_table(matrix, 6, scale, 0.4, 0, 30)
    twin = initial.initial_table(torch.cat([matrix, matrix[[5, 9]]]), 6, scale, 0.4, 0, 30)
    assert torch.equal(twin[:31], alone)
    if scale == 'permuted':  # its items have other items' rows
        alone = initial.initial_table(matrix, 6, 'centred', 0.4, 0, 30)
    torch.testing.assert_close(twin[31:], alone[[5, 9]])
    small = initial.initial_table(torch.cat([matrix, matrix[[5, 9]]]), 3, 'raw', 1.0, 0, 30)
    torch.testing.assert_close(small[31:], small[[5, 9]])
    torch.testing.assert_close(small[:31], initial.initial_table(matrix, 3, 'raw', 1.0, 0, 30))


def test_cold_items_are_scored_by_the_rows_they_would_have_begun_with(world, found, tmp_path):
    rows = recommended(tmp_path / 'a.csv', LF, '--cold', '--users', 'u5', '--k', '99')
    assert {row['item'] for row in rows} > {*COLD} and len(rows) == 32 - len(history(found, 'u5'))
    matrix, cold = (x.double() for x in rows_of(world))
    values, axes = torch.linalg.eigh(torch.cov(matrix.T))
    small = (torch.cat([matrix, cold]) - matrix.mean(0)) @ axes[:, -8:]
    model, about = load_seq(world / LF, found), read_row(world / LF)
    torch.manual_seed(0)
    norm = model.draw(torch.empty(found.n_items + 1, 8))[1:].norm(dim=1).mean()
    factor = norm / small[:-2].norm(dim=1).mean()
    # by the cosines with the first rows, as an axis has no sign of its own
    begun = initial.starting_tables(type(model), found.n_items, initial.read_embeddings(
        world / 'embeddings' / 'lf.pt', found, cold=True), about)[0]
    expected = factor * small
    torch.testing.assert_close((begun[1:] @ begun[1:].T).double(), expected @ expected.T,
                               atol=1e-4, rtol=1e-3)
    own = history(found, 'u5')
    state = model.eval().requires_grad_(False).states(own, np.array([0, len(own)]))[0]
    for item, title, row in zip(COLD, ('sea salt', 'tea'), begun[-2:]):
        mine = next(line for line in rows if line['item'] == item)
        assert float(mine['score']) == pytest.approx(float(state @ row), abs=1e-4)
        assert mine['title'] == title
    others = recommended(tmp_path / 'b.csv', LF, '--users', 'u5', '--k', '99')
    assert [row['item'] for row in rows if row['item'] not in COLD] \
        == [row['item'] for row in others]
    typed = recommended(tmp_path / 'b.csv', LF, '--cold', '--items', 'i1', 'x1')
    assert 'x1' not in {row['item'] for row in typed}, 'a history may hold them'


def test_cold_items_without_training(world, found, tmp_path):
    """Cosines of rows centred by the catalogue's mean; item-kNN knows nothing of them."""
    rows = recommended(tmp_path / 'a.csv', 'text-knn-lf', '--cold', '--items', 'i4', '--k', '99')
    matrix, cold = rows_of(world)
    unit = F.normalize(torch.cat([matrix, cold]) - matrix.mean(0), dim=1)
    cosine = unit @ unit[found.item_ids.index('i4')]
    for place, item in ((-2, 'x1'), (-1, 'x2'), (found.item_ids.index('i8'), 'i8')):
        mine = next(row for row in rows if row['item'] == item)
        assert float(mine['score']) == pytest.approx(float(cosine[place]), abs=1e-4)
    both = recommended(tmp_path / 'a.csv', 'item+text-knn-lf', '--cold', '--items', 'i4', '--k', '99')
    assert {*COLD} < {row['item'] for row in both}


def test_why_cold_items_cannot_be_recommended(world, found, tmp_path, monkeypatch):
    for run, words in ((RANDOM, 'started from no embeddings'), ('popularity', 'started from no'),
                       (BERT, 'scores items by rows that cold items lack'),
                       (TIED, 'scores items by rows that cold items lack')):
        with pytest.raises(UserError, match=f'--cold: {run} .*{words}'):
            call('recommend', 'one', run, '--cold')
    path = world / 'embeddings' / 'lf.pt'
    before, content = path.read_bytes(), load_pt(path, 'embeddings')
    content.pop('kind')
    try:
        for ids, texts in ((['x1'], found.cold_attributes[:1]), (COLD, [[['title', 'new']]] * 2)):
            identity = {**content['head']['identity'], 'cold': digest(ids, texts)}
            head = {**content['head'], 'identity': identity}
            save_pt(path, 'embeddings', **{**content, 'head': head})
            with pytest.raises(UserError, match="lf.pt: .* other cold items than today's; export"):
                call('recommend', 'one', LF, '--cold')
        save_pt(path, 'embeddings', **{**content, 'cold': content['cold'][:1]})
        with pytest.raises(UserError, match="lf.pt: .* other cold items than today's; export"):
            call('recommend', 'one', LF, '--cold')
        content['cold'] = content['cold'] * 2  # of other cold items
        save_pt(path, 'embeddings', **content)
        for run in (LF, 'text-knn-lf'):
            call('recommend', 'one', run, '--cold', '--users', 'u1')
        content['matrix'][3] *= 1.000001
        save_pt(path, 'embeddings', **content)
        for run in (LF, 'text-knn-lf'):
            with pytest.raises(UserError, match=f'lf.pt: was made again since {run}'):
                call('recommend', 'one', run, '--cold')
        call('recommend', 'one', LF, '--users', 'u1')  # needs no embeddings
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize('run', ['popularity', LF])
def test_a_run_of_other_data_recommends_nothing(world, run):
    row = world / run / 'row.json'
    before = row.read_text()
    try:
        row.write_text(json.dumps(json.loads(before) | {'data': 'older'}))
        with pytest.raises(UserError, match=f"{run}: is not of today's one, or RecFormer"):
            call('recommend', 'one', run, '--users', 'u1')
    finally:
        row.write_text(before)


# ------------------------------------------------------------------------ neighbours

@pytest.mark.parametrize('item', ['i4', 'x1'])
def test_neighbours(world, found, capsys, item):
    """Cosines of centred rows, of the catalogue alone, by hand."""
    capsys.readouterr()
    call('neighbours', 'one', '--item', item, '--k', '3')
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('nearest to ') and lines[0].endswith(f'({item})')
    cells = [line.strip('| ') for line in lines if line.startswith('|')]
    assert cells[0].split(' | ')[0] == 'LF' and len(cells) == 5
    matrix, cold = rows_of(world)
    unit = F.normalize(torch.cat([matrix, cold]) - matrix.mean(0), dim=1)
    ids = found.item_ids + COLD
    cosine = (unit @ unit[ids.index(item)])[:found.n_items]
    order = [i for i in cosine.argsort(descending=True).tolist() if ids[i] != item][:3]
    assert [line.split(' | ')[0] for line in cells[2:]] \
        == [f'{cosine[i]:.2f} {found.title(i + 1)} ({ids[i]})' for i in order]
    with pytest.raises(UserError, match='--item y9: no such item in one'):
        call('neighbours', 'one', '--item', 'y9')


def test_embeddings_of_other_data_are_left_out_and_hold_nothing_up(world, capsys):
    """Own rows that nobody made again after the data had changed stopped the whole chain."""
    before = load_pt(world / 'embeddings' / 'lf.pt', 'embeddings')
    identity = before['head']['identity'] | {'data': 'older'}
    save_pt(world / 'embeddings' / 'own.pt', **before | {'head': before['head'] | {'identity': identity}})
    try:
        for command in (['untrained', 'one'], ['neighbours', 'one', '--item', 'i4']):
            capsys.readouterr()
            call(*command)
            out = capsys.readouterr().out
            assert 'note: left out: ' in out and 'own.pt: is of another version of one' in out
            assert 'OWN' not in out and ('up to date' in out or '| LF |' in out)
    finally:
        (world / 'embeddings' / 'own.pt').unlink()


# ------------------------------------------------------------------------ files for others, of others

def test_exports_for_other_programs(world, found, tmp_path):
    matrix, cold = rows_of(world)
    for out in (tmp_path / 'lf.npy', tmp_path / 'lf.safetensors'):
        export('--plm', world.parent.parent / 'plm', '--out', out)
        rows = torch.from_numpy(np.load(out)) if out.suffix == '.npy' else load_file(out)['embeddings']
        assert torch.equal(rows, torch.cat([matrix, cold]))
    assert (tmp_path / 'lf.ids.txt').read_text() == '\n'.join([*found.item_ids, *COLD, ''])
    assert len(list(tmp_path.iterdir())) == 4, 'and a lock'


@pytest.fixture
def rows(found, tmp_path):
    """rows.npy and ids.txt, in an order of their own, with the cold items."""
    ids = (found.item_ids + COLD)[::-1]
    rows = np.random.default_rng(0).normal(size=(len(ids), 8)).astype(np.float64) + 2
    np.save(tmp_path / 'rows.npy', rows)
    (tmp_path / 'ids.txt').write_text('\n'.join(ids))
    return ids, rows


def test_rows_are_exported_again_once_cold_items_have_other_texts(world, found, rows, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'own.pt'
    own(tmp_path, out)
    other = data.load('one')
    other.cold_attributes = [[['title', 'new']]] * 2
    monkeypatch.setattr(export_embeddings, 'load', lambda name: other)
    with pytest.raises(UserError, match='other cold items'):
        read_embeddings(out, other, cold=True)
    own(tmp_path, out)
    assert 'made again, as it was made with other cold' in capsys.readouterr().out
    assert len(read_embeddings(out, other, cold=True).matrix) == len(rows[0]) + 1


def own(tmp_path, out):
    export('--from-npy', tmp_path / 'rows.npy', '--ids', tmp_path / 'ids.txt', '--out', out)


def test_rows_of_any_encoder_become_an_initialisation(world, found, rows, tmp_path, capsys):
    """A table's start, rankings without training, recommendations, rows in the tables."""
    ids, matrix = rows
    out = world / 'embeddings' / 'own.pt'
    try:
        own(tmp_path, out)
        own(tmp_path, out)
        assert capsys.readouterr().out.endswith(f'{out} is up to date\n')
        content = load_pt(out, 'embeddings')
        place = [ids.index(key) for key in found.item_ids + COLD]
        expected = torch.from_numpy(matrix[place]).float()
        assert torch.equal(content['matrix'][1:], expected[:-2]) and not content['matrix'][0].any()
        assert torch.equal(content['cold'], expected[-2:])
        assert content['head']['identity']['cold'] == digest(COLD, found.cold_attributes)
        assert content['head']['plm'] == 'rows.npy'
        train('own-freeze', scale='raw')
        model = load_seq(world / OWN, found)
        assert torch.equal(model.item_embedding.weight[1:], expected[:-2])
        assert recommended(tmp_path / 'a.csv', OWN, '--cold', '--users', 'u5')
        call('untrained', 'one')
        assert recommended(tmp_path / 'a.csv', 'item+text-knn-own', '--users', 'u5')
        capsys.readouterr()
        call('table', 'one')
        table = capsys.readouterr().out
        assert '| text-knn-own | ' in table and '| own-freeze-raw-8 | ' in table
        assert 'Language model: ' in table and 'rows.npy' in table
        call('neighbours', 'one', '--item', 'i4')
        assert '| LF | OWN |' in capsys.readouterr().out
    finally:
        out.unlink()


@pytest.mark.parametrize('name', ['lf.npy', 'lf.safetensors'])
def test_a_file_for_other_programs_is_replaced_only_where_that_is_asked_for(world, tmp_path, name):
    """It may be the user's own rows, and their ids."""
    out, ids = tmp_path / name, tmp_path / 'lf.ids.txt'
    out.write_text('mine')
    ids.write_text('mine')
    options = '--plm', str(world.parent.parent / 'plm'), '--out', out
    with pytest.raises(UserError, match=f'{name}: is there; --again replaces it, and its .ids.txt'):
        export(*options)
    assert out.read_text() == ids.read_text() == 'mine'
    export(*options, '--again')
    assert out.stat().st_size > 99 and len(ids.read_text().splitlines()) > 9


def test_without_rows_of_the_cold_items(world, found, rows, tmp_path):
    ids, matrix = rows
    np.save(tmp_path / 'rows.npy', matrix[2:])
    (tmp_path / 'ids.txt').write_text('\n'.join(ids[2:]))
    own(tmp_path, tmp_path / 'own.pt')
    initial.read_embeddings(tmp_path / 'own.pt', found)
    with pytest.raises(UserError, match="other cold items than today's"):
        initial.read_embeddings(tmp_path / 'own.pt', found, cold=True)


def listed(change):
    """A change of the ids."""
    return lambda ids, rows: (change(ids), rows)


def of_rows(change):
    return lambda ids, rows: (ids, change(rows))


def not_finite(rows):
    rows[3, 2] = np.nan
    return rows


FAULTS = {
    r'rows.npy: has the shape \[32, 8\]; .* 32 lines of .*ids.txt, which name 31 items':
        listed(lambda ids: ['x1' if key == 'i7' else key for key in ids]),
    "ids.txt: 2 ids are missing or unknown, as 'i7'":
        listed(lambda ids: ['y' if key == 'i7' else key for key in ids]),
    "ids.txt: 1 ids are missing or unknown, as 'zz'":
        lambda ids, rows: ([*ids, 'zz'], np.concatenate([rows, rows[:1]])),
    r'rows.npy: has the shape \[33, 8\]; .* 33 lines of .*, which name 32 items':
        lambda ids, rows: ([*ids, 'i7'], np.concatenate([rows, rows[:1]])),
    "1 ids are missing or unknown, as 'x2'": lambda ids, rows: (ids[1:], rows[1:]),
    r'rows.npy: has the shape \[31, 8\]; .* 32 lines of': of_rows(lambda rows: rows[1:]),
    r'rows.npy: has the shape \[256\]': of_rows(lambda rows: rows.ravel()),
    'rows.npy: gives embeddings that are not finite': of_rows(not_finite),
    'rows.npy: is no matrix of numbers': of_rows(lambda rows: rows.astype(str)),
    'rows.npy: is no matrix of numbers in': of_rows(lambda rows: rows.astype(object)),
}


@pytest.mark.parametrize('words', FAULTS)
def test_what_is_wrong_with_rows_is_said(world, rows, tmp_path, words):
    ids, matrix = FAULTS[words](*rows)
    np.save(tmp_path / 'rows.npy', matrix, allow_pickle=True)
    (tmp_path / 'ids.txt').write_text('\n'.join(ids))
    with pytest.raises(UserError, match=words):
        own(tmp_path, tmp_path / 'own.pt')
    (tmp_path / 'rows.npy').write_bytes(b'PK\x03\x04 cut short')
    with pytest.raises(UserError, match='is no matrix of numbers'):
        own(tmp_path, tmp_path / 'own.pt')
    assert not (tmp_path / 'own.pt').exists()


def test_from_npy_needs_ids_and_no_model(world, capsys):
    for more in ([], ['--plm', 'p'], ['--ids', 'ids.txt', '--plm', 'p'], ['--ids', 'ids.txt', '--checkpoint', 'c']):
        with pytest.raises(SystemExit):
            export('--from-npy', 'rows.npy', '--out', 'own.pt', *more)
    assert '--from-npy and --ids' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['alike', 'but for rounding', 'zero'])
def test_rows_that_are_all_alike_are_refused_before_anything_is_divided_by_them(
        world, found, rows, tmp_path, kind):
    ids, matrix = rows
    matrix[:] = {'zero': 0, 'alike': matrix[0]}.get(
        kind, matrix[0] * (1 + 1e-7 * matrix[:, :1]))
    np.save(tmp_path / 'rows.npy', matrix)
    own(tmp_path, tmp_path / 'own.pt')
    with pytest.raises(UserError, match='own.pt: all items have the same row'):
        initial.read_embeddings(tmp_path / 'own.pt', found)
