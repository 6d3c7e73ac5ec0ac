"""Split, cold exclusion and negatives by hand on ten users; CSV as it occurs; broken files.

Run: python -m pytest tests/test_data.py
"""
import gzip
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from common import data, files
from common.arrays import newest, offsets_of, ragged, row_numbers, take
from common.files import PAPER, UserError, lock
from common.formats import AMAZON
from tests.toy import amazon, canonical


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path))
    return tmp_path


def write(root, rows, items='abcdefghijkl', name='toy'):
    folder = root / name
    folder.mkdir(exist_ok=True)
    lines = ['user,item,timestamp', *(f'{u},{i},{t}' for u, i, t in rows)]
    (folder / 'interactions.csv').write_text('\n'.join(lines) + '\n')
    lines = [json.dumps({'id': i, 'title': f'item {i}'}) for i in items]
    (folder / 'items.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


TIED = "% of neighbours have one timestamp, in the file's order (data/README.md)"
def unknown(d):
    """(how many rows were dropped as their item has no text, what is said of them)."""
    return next((n, what) for what, n in d.counts.items() if 'their item has no text' in what)
TEN = {'u0': 'abcd', 'u1': 'bcda', 'u2': 'cdab', 'u3': 'abce', 'u4': 'abec', 'u5': 'abcdf',
       'u6': 'fabcd', 'u7': 'abc', 'u8': 'gabcd', 'u9': 'abcgd'}


def ten_rows():
    return [(u, i, t) for u, s in TEN.items() for t, i in enumerate(s)]


def ten_users(root):
    return write(root, ten_rows())


def letters(d, items):
    return ''.join(d.item_ids[i - 1] for i in items)


# ------------------------------------------------------------------------ ragged arrays

def test_ragged_arrays_by_hand():
    items, offsets = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 2, 2, 5])
    assert ragged([4, 0, 7], [2, 0, 3]).tolist() == [4, 5, 7, 8, 9]
    nothing = np.zeros(0, np.int64)
    assert ragged(nothing, nothing).tolist() == []
    assert offsets_of([2, 0, 3]).tolist() == [0, 2, 2, 5] and offsets_of(nothing).tolist() == [0]
    taken, where = take(items, offsets, np.array([2, 1, 0, 2]))
    assert taken.tolist() == [7, 8, 9, 5, 6, 7, 8, 9] and where.tolist() == [0, 3, 3, 5, 8]
    last, lengths = newest(items, offsets, 2)
    assert last.tolist() == [5, 6, 8, 9] and lengths.tolist() == [2, 0, 2]
    assert row_numbers([2, 0, 3]).tolist() == [0, 0, 2, 2, 2]
    taken, where = take(items, offsets, nothing)
    assert taken.tolist() == [] and where.tolist() == [0]


# ------------------------------------------------------------------------ split, filters, negatives

def test_ten_users_by_hand(root):
    """u7 has three interactions and goes; e occurs only as somebody's last two, so u3 and u4 are
    not evaluated."""
    ten_users(root)
    d = data.prepare('toy', data.DEFAULT)
    assert d.item_ids == list('abcdefg') and d.n_items == 7
    assert len(d.user_ids) == 9 and 'u7' not in d.user_ids
    rows = [d.items[d.offsets[r]:d.offsets[r + 1]] for r in range(len(d.user_ids))]
    sequences = {u: letters(d, row) for u, row in zip(d.user_ids, rows)}
    assert sequences == {u: s for u, s in TEN.items() if u != 'u7'}
    assert [d.user_ids[u] for u in d.evaluated] == ['u0', 'u1', 'u2', 'u5', 'u6', 'u8', 'u9']
    items, offsets, targets = d.split('valid')
    assert letters(d, items[offsets[3]:offsets[4]]) == 'abc', 'u5'
    assert letters(d, targets) == 'cdadccg'
    items, offsets, targets = d.split('test')
    assert letters(d, items[offsets[3]:offsets[4]]) == 'abcd', 'u5'
    assert letters(d, targets) == 'dabfddd'
    for row, user in zip(d.negatives, d.evaluated):
        own = set(d.items[d.offsets[user]:d.offsets[user + 1]])
        given = row[row > 0]
        assert set(given) == set(range(1, 8)) - own, 'a small catalogue: all others'
        assert len(set(given)) == len(given)
    again = data.load('toy')
    assert again.fingerprint == d.fingerprint
    assert (again.negatives == d.negatives).all() and again.attributes == d.attributes
    assert d.attributes[0] == [['title', 'item a']] and d.title(2) == 'item b'


def test_training_part_and_chosen_users(root):
    ten_users(root)
    d = data.prepare('toy', data.DEFAULT)
    items, offsets = d.training()
    assert letters(d, items) == 'ab' + 'bc' + 'cd' + 'ab' + 'ab' + 'abc' + 'fab' + 'gab' + 'abc'
    assert np.diff(offsets).tolist() == [2, 2, 2, 2, 2, 3, 3, 3, 3]
    items, offsets = d.training(leave=1)
    assert letters(d, items[:offsets[3]]) == 'abc' + 'bcd' + 'cda'
    items, offsets, targets = replace(d, evaluated=np.array([3])).split('test')
    assert (letters(d, items), letters(d, targets)) == ('abc', 'e'), 'u3, though not evaluated'
    assert offsets.tolist() == [0, 3]


def test_order_is_time_then_place_in_the_file_and_repeats_count_once(root):
    rows = [('u', 'd', 5), ('u', 'a', 1), ('u', 'c', 3), ('u', 'b', 3), ('u', 'c', 3)]
    rows += [('v', i, t) for t, i in enumerate('cadb', 1)]
    rows += [('w', i, 1) for i in 'abcd'] + [('w', 'a', 2), ('w', 'a', 3)]
    write(root, rows)
    d = data.prepare('toy', data.DEFAULT)
    assert letters(d, d.items[:4]) == 'acbd'
    assert d.counts['rows dropped, as they repeat another'] == 1 and d.counts['interactions'] == 14
    assert d.counts[TIED] == 100 * (4 / 11), 'one of u, three of w; 14 - 3 neighbours'


def test_core_is_repeated_until_nothing_changes():
    # item 2 falls first; user 1 then has one row left and falls; user 0 is left with items 0 and 1
    # at two rows each
    user = np.array([0, 0, 0, 0, 1, 1])
    item = np.array([0, 0, 1, 1, 0, 2])
    columns = [user, item, np.arange(6)]
    assert [c.tolist() for c in data.core(columns, 2, 2)] == [[0] * 4, [0, 0, 1, 1], [0, 1, 2, 3]]
    assert [c.tolist() for c in data.core(columns, 5, 2)] == [[], [], []]


def test_repeats_are_what_unique_rows_leave_out():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 7, (2000, 3))
    first = np.unique(rows, axis=0, return_index=True)[1]
    found = data.repeats([*rows.T])
    assert 300 < len(first) <= 7 ** 3
    assert sorted(found) == sorted(set(range(2000)) - set(first))
    assert len(data.repeats([np.arange(3)] * 3)) == 0 == len(data.repeats([np.arange(1)] * 3))


@pytest.mark.parametrize('n', [60, 150, 20_000])
def test_negatives_are_drawn_as_ever(n):
    """Published numbers hang on them: the same draws as this plain loop's."""
    rng = np.random.default_rng(n)
    offsets = offsets_of(rng.integers(3, 40, 50))
    items = rng.integers(1, n + 1, offsets[-1]).astype(np.int32)
    users = np.arange(1, 50, 2)
    rng, rows = np.random.default_rng(98765), []
    for user in users:
        own = np.unique(items[offsets[user]:offsets[user + 1]])
        drawn = rng.choice(n, min(n, 100 + len(own)), replace=False) + 1
        drawn = drawn[~np.isin(drawn, own)][:100]
        rows.append(np.pad(drawn, (0, 100 - len(drawn))))
    found = data.draw_evaluation_negatives(items, offsets, users, n)
    assert found.dtype == np.int32 and (found == rows).all()


def test_negatives_are_uniform_and_the_same_on_every_run():
    items, offsets = np.tile(np.array([1, 2, 3], np.int32), 3000), np.arange(0, 9001, 3)
    draw = lambda: data.draw_evaluation_negatives(items, offsets, np.arange(3000), 203)
    first, second = draw(), draw()
    assert (first == second).all() and first.shape == (3000, 100) and first.min() == 4
    counts = np.bincount(first.ravel(), minlength=204)[4:]
    assert abs(counts / 1500 - 1).max() < 0.12, 'each of 200 items half the time'
    assert all(len(set(row)) == 100 for row in first[:50])


def test_sample_of_users_is_seeded(root):
    ten_users(root)
    a, b = (data.build(root / 'toy', (4, 1, 7), {}) for _ in range(2))
    assert len(json.loads(a['head'].tobytes())['user_ids']) == 7
    assert all((a[name] == b[name]).all() for name in a), 'users, fingerprint, counts and the rest'


# ------------------------------------------------------------------------ what is left out

def test_cold_items_and_dropped_users_by_hand(root, capsys):
    """Nobody has h or i, only v has z; e, f, g have too few rows; u3, u4, u7 and v too."""
    rows = [*ten_rows(), ('v', 'z', 0), ('v', 'a', 1)]
    folder = write(root, rows, items='zabcdefgih')
    d = data.prepare('toy', (4, 4, 0))
    assert d.item_ids == list('abcd') and d.attributes[0] == [['title', 'item a']]
    assert d.cold_ids == list('efghiz')
    assert d.cold_attributes == [[['title', f'item {i}']] for i in 'efghiz']
    assert d.dropped_users == ['u3', 'u4', 'u7', 'v']
    data.report(d)
    out = capsys.readouterr().out
    assert "           6  items in nobody's sequence (evaluate.py recommend --cold knows them)\n" in out
    assert '           4  users of these files left out by the filters or the sample\n' in out
    first = d.fingerprint
    write(root, rows, items='abcdefg')
    d = data.prepare('toy', (4, 4, 0))
    assert d.cold_ids == list('efg') and sum('nobody\'s sequence' in what and count == 3 for what, count in d.counts.items()) == 1
    assert d.fingerprint == first, 'of what models learn from; cold items are no part of it'
    text = (folder / 'items.jsonl').read_text().replace('item e', 'item E')
    (folder / 'items.jsonl').write_text(text)
    d = data.prepare('toy', (4, 4, 0))
    assert d.fingerprint == first and d.cold_attributes[0] == [['title', 'item E']]
    d = data.prepare('toy', (3, 1, 0))
    assert d.cold_ids == d.cold_attributes == [] and d.dropped_users == ['v']
    data.report(d)
    assert 'nobody has' not in capsys.readouterr().out


def test_what_is_bought_again_is_counted(root, capsys):
    rows = [('u', item, time) for time, item in enumerate('abcaa')] + [('v', item, time) for time, item in enumerate('cbab')]
    write(root, rows, items='abc')
    data.report(data.prepare('toy', (3, 1, 0)))
    out = capsys.readouterr().out
    assert '           3  interactions with an item that the user had before\n' in out


def test_users_who_are_not_of_the_sample_are_dropped_users(root):
    ten_users(root)
    d = data.prepare('toy', (4, 1, 7))
    assert sorted(d.user_ids + d.dropped_users) == sorted(TEN) and len(d.user_ids) == 7


def test_users_with_so_many_training_items(root):
    canonical(root / 'toy', length=(3, 6))
    d = data.prepare('toy', data.DEFAULT)
    for least in (1, 2, 3):
        assert d.users_with(least).tolist() == [u for u, n in enumerate(d.lengths) if n >= least + 2]
    with pytest.raises(UserError, match='toy: no user has 6 interactions'):
        d.users_with(4)


def test_odd_ids_of_cold_items_and_dropped_users(root):
    """A line break, a control character, half a surrogate pair, which no file can hold."""
    ten_users(root)
    folder = root / 'toy'
    with open(folder / 'interactions.csv', 'a') as f:
        f.write('"a\nb",a,1\n"c\0",a,1\n')
    with open(folder / 'items.jsonl', 'a') as f:
        f.write(r'{"id": "x\ny", "title": "\u2028"}' + '\n' + r'{"id": "\ud800", "a": "\n"}' + '\n')
    d = data.prepare('toy', data.DEFAULT)
    assert d.cold_ids == ['?', *'hijkl', 'x\ny'] and d.dropped_users == ['u7', 'a\nb', 'c\0']
    assert d.cold_attributes[0] == [['a', '\n']] and d.cold_attributes[-1] == [['title', '\u2028']]


def test_opening_reads_neither_texts_nor_cold_items(root, monkeypatch):
    ten_users(root)
    data.prepare('toy', data.DEFAULT)
    asked, real = [], data.load_npz

    def noted(path, names, remedy):
        asked.extend(names)
        return real(path, names, remedy)
    monkeypatch.setattr(data, 'load_npz', noted)
    d = data.load('toy')
    assert asked == ['head', *data.ARRAYS]
    assert d.cold_ids is d.cold_ids and d.title(1) and d.title(2)
    assert asked[5:] == ['cold_ids', 'attributes'], 'once'


# ------------------------------------------------------------------------ files as they occur

def test_bom_crlf_gzip_and_odd_texts_are_read(root):
    folder = ten_users(root)
    text = (folder / 'interactions.csv').read_text().replace('\n', '\r\n')
    (folder / 'interactions.csv').unlink()
    with gzip.open(folder / 'interactions.csv.gz', 'wb') as f:
        f.write(b'\xef\xbb\xbf' + text.encode())
    odd = [{'id': 'a', 'title': 'x' * 100_000},
           {'id': 'b', 'title': '\U0001f600 \x00\x1b', 'brand': None},
           {'id': 'c', 'category': ['p', 'q'], 'price': 3},
           {'id': ' d ', 'na\ud800me': 'half a \ud800 pair'}]
    odd += [{'id': i} for i in 'efg']
    (folder / 'items.jsonl').write_text('\n'.join(map(json.dumps, odd)))
    d = data.prepare('toy', data.DEFAULT)
    assert letters(d, d.items[:4]) == 'abcd' and len(d.user_ids) == 9
    assert len(d.attributes[0][0][1]) == 2000 and d.attributes[1][1] == ['brand', '']
    assert d.attributes[2] == [['category', 'p q'], ['price', '3']]
    assert d.attributes[3] == [['na?me', 'half a ? pair']]
    assert d.title(5) == 'e', 'no text: its id'


def test_missing_values_are_no_words(root):
    """JSON's null and NaN (pandas writes it) are missing, alone and in a list."""
    folder = ten_users(root)
    lines = ['{"id": "a", "title": NaN, "brand": "acme", "price": 0, "size": 2.5}',
             '{"id": "b", "title": null, "tags": ["x", NaN, null, "y"], "sold": false}']
    lines += [json.dumps({'id': i}) for i in 'cdefg']
    (folder / 'items.jsonl').write_text('\n'.join(lines))
    d = data.prepare('toy', data.DEFAULT)
    assert d.attributes[0] == [['title', ''], ['brand', 'acme'], ['price', '0'], ['size', '2.5']]
    title, tags, sold = d.attributes[1]
    assert title == ['title', ''] and tags[1].split() == ['x', 'y'] and sold == ['sold', 'False']
    assert d.title(1) == 'acme'


# An id as it is meant -> as a CSV writer puts it into a file.
QUOTED = {'a': '"a"', 'b, or c': '"b, or c"', 'the "best" c': '"the ""best"" c"', '"': '""""',
          "d'": "d'", 'ä é': '"ä é"', 'e;f': 'e;f'}


def test_quotes_and_commas_in_ids(root):
    folder = ten_users(root)
    named = dict(zip('abcdefg', QUOTED))
    lines = ['"user","Item ","timestamp"']
    lines += [f'"{u}, ""{u}""",{QUOTED[named[i]]},"{t}"' for u, i, t in ten_rows()]
    (folder / 'interactions.csv').write_text('\n'.join(lines), encoding='utf-8')
    texts = [json.dumps({'id': key, 'title': f'item {old}'}) for old, key in named.items()]
    (folder / 'items.jsonl').write_text('\n'.join(texts))
    d = data.prepare('toy', data.DEFAULT)
    assert d.item_ids == sorted(QUOTED) and d.user_ids[0] == 'u0, "u0"'
    assert unknown(d)[0] == 0
    sequence = [d.item_ids[i - 1] for i in d.items[d.offsets[5]:d.offsets[6]]]
    assert sequence == [named[i] for i in 'abcdf'], 'u5'
    assert data.load('toy').item_ids == d.item_ids


@pytest.mark.parametrize('space', [' ', '\t'])
def test_spaces_around_ids_do_not_count(root, space):
    folder = write(root, [], items=[f'{space}{i}{space}' for i in 'abcdefg'])
    rows = [f'{space}{u},"{i}{space}",{t}{space}' for u, i, t in ten_rows()]
    (folder / 'interactions.csv').write_text('\n'.join(['user,item,timestamp', *rows]) + '\n')
    d = data.prepare('toy', data.DEFAULT)
    assert d.item_ids == list('abcdefg') and unknown(d)[0] == 0


@pytest.mark.parametrize('space', ['\u00a0', '\u2003', '\n', '\x1f'])
def test_an_id_that_ends_in_other_white_space_is_the_same_id_in_both_files(root, space):
    folder = write(root, [], items=[i + space for i in 'abcdefg'])
    rows = [f'{u},"{i}{space}",{t}' for u, i, t in ten_rows()]
    (folder / 'interactions.csv').write_text('\n'.join(['user,item,timestamp', *rows]) + '\n')
    d = data.prepare('toy', data.DEFAULT)
    assert d.n_items == 7 and unknown(d)[0] == 0


def test_ids_that_end_in_a_control_character_stay_apart(root):
    rows = [(u, i + '\0' * (i == 'a'), t) for u, i, t in ten_rows()]
    write(root, rows, items=['a', 'a\0', *'bcdefg'])
    assert data.prepare('toy', data.DEFAULT).item_ids[:2] == ['a\0', 'b']


# ------------------------------------------------------------------------ is it up to date?

def test_a_changed_file_is_noticed(root):
    folder = ten_users(root)
    data.prepare('toy', data.DEFAULT)
    with open(folder / 'interactions.csv', 'a') as f:
        f.write('u0,a,99\n')
    with pytest.raises(UserError, match='its files, or .* have changed since.*python -m common.data toy'):
        data.load('toy')
    assert data.prepare('toy', data.DEFAULT).counts['interactions'] == 41
    items = folder / 'items.jsonl'
    items.write_text(items.read_text().replace('item a', 'item A'))
    with pytest.raises(UserError, match='its files, or .* have changed since'):
        data.load('toy')
    assert data.prepare('toy', data.DEFAULT).title(1) == 'item A'


def test_files_that_were_touched_copied_or_packed_are_the_same(root):
    folder = ten_users(root)
    made = data.prepare('toy', data.DEFAULT)
    for name in ('interactions.csv', 'items.jsonl'):
        os.utime(folder / name, (10 ** 9, 10 ** 9))
    assert data.load('toy').fingerprint == made.fingerprint
    rows = folder / 'interactions.csv'
    with gzip.open(folder / 'interactions.csv.gz', 'wb') as f:
        f.write(rows.read_bytes())
    rows.unlink()
    assert data.load('toy').fingerprint == made.fingerprint
    time = (folder / 'prepared.npz').stat().st_mtime_ns
    data.prepare('toy', data.DEFAULT)
    assert (folder / 'prepared.npz').stat().st_mtime_ns == time, 'made once'


def test_what_is_up_to_date_needs_no_lock_writes_nothing_and_is_not_read(root, monkeypatch):
    """A read-only disk, and two chains with one source."""
    folder = ten_users(root)
    data.prepare('toy', [4, None, None])

    def forbidden(*_):
        raise OSError('written or read')
    monkeypatch.setattr(data, 'save_npz', forbidden)
    monkeypatch.setattr(files, 'whole', forbidden)
    real = files.content_sha256
    monkeypatch.setattr(files, 'content_sha256', forbidden)
    with lock(folder):  # as of another process
        monkeypatch.setattr(data, 'lock', forbidden)
        for given in ([None, None, None], [4, None, None]):
            assert len(data.prepare('toy', given).user_ids) == 9
        data.main(data.parse_args(['toy']))
        monkeypatch.setattr(data, 'lock', lock)
        monkeypatch.setattr(files, 'content_sha256', real)
        thread = ThreadPoolExecutor(1)
        coming = thread.submit(data.prepare, 'toy', [3, None, None])
        with pytest.raises(TimeoutError):
            coming.result(0.5)  # what must be made waits for the other process
    with pytest.raises(OSError, match='written'):
        coming.result()
    thread.shutdown()


def test_amazon_files_are_read_once(root, monkeypatch):
    amazon(root / 'raw', 'Prime_Pantry')
    monkeypatch.setenv('ELEPHANT_ANY_VERSION', '1')
    made = data.prepare('pantry', data.DEFAULT)
    monkeypatch.setattr(files, 'content_sha256', None)
    monkeypatch.setattr(data, 'save_npz', None)
    assert data.prepare('pantry', data.DEFAULT).fingerprint == made.fingerprint


def test_amazon_files_of_which_nothing_passes_the_filters(root, monkeypatch):
    amazon(root / 'raw', 'Prime_Pantry')
    monkeypatch.setenv('ELEPHANT_ANY_VERSION', '1')
    with pytest.raises(UserError, match='Prime_Pantry.csv: no rows, or none that passes --min-user, --min-item'):
        data.prepare('pantry', (1000, 1, 0))
    assert not list((root / 'pantry').glob('*.gz*')), 'nothing half-written'
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 60


def test_a_change_within_the_same_size_is_noticed(root):
    folder = ten_users(root)
    data.prepare('toy', data.DEFAULT)
    path = folder / 'interactions.csv'
    path.write_text(path.read_text().replace('u9,d,4', 'u9,e,4'))
    with pytest.raises(UserError, match='its files, or .* have changed since'):
        data.load('toy')


@pytest.mark.parametrize('file', data.CODE)
def test_changed_code_asks_for_preparation(root, monkeypatch, file):
    folder = ten_users(root)
    made = data.prepare('toy', data.DEFAULT)
    real = data.code_digest
    changed = lambda name: 'changed' if name == file else real(name)
    monkeypatch.setattr(data, 'code_digest', changed)
    with pytest.raises(UserError, match='the code that prepares them, have changed since.*-m common.data toy'):
        data.load('toy')
    time = (folder / 'prepared.npz').stat().st_mtime_ns
    assert data.prepare('toy', data.DEFAULT).fingerprint == made.fingerprint
    assert (folder / 'prepared.npz').stat().st_mtime_ns > time, 'made again'
    assert data.load('toy').fingerprint == made.fingerprint


def test_other_filters_make_it_again(root):
    ten_users(root)
    assert len(data.prepare('toy', data.DEFAULT).user_ids) == 9
    assert len(data.prepare('toy', (3, 1, 0)).user_ids) == 10
    assert len(data.load('toy').user_ids) == 10
    d = data.prepare('toy', (4, 4, 0))
    assert len(d.user_ids) == 7 and d.item_ids == list('abcd'), 'e, f, g have two rows; u3, u4 then three'
    assert data.load('toy').fingerprint == d.fingerprint


# ------------------------------------------------------------------------ broken files

HEADER = 'user,item,timestamp\n'
BAD_INTERACTIONS = {
    '': 'has no column .user, .*but nothing',
    'u,a,1\n': 'has no column .user, .*but u, a, 1',
    'user,item\n': 'has no column .timestamp, .*but user, item',
    'user;item;timestamp\n': 'no user has 4',
    HEADER: r'no user has 4 .* has no text: 0, ',
    HEADER + 'u,a\n': r"line 2 is no record with a user, .*: \['u', 'a'\]",
    HEADER + 'u,a,1,9\n': r"line 2 is no record .*: \['u', 'a', '1', '9'\]",
    HEADER + 'u,"a,1\n': 'line 2 is not CSV',
    HEADER + 'u,"a"b,1\n': 'line 2 is not CSV',
    HEADER + '"u\nv",a,1\nu,a\n': r"line 4 is no record .*: \['u', 'a'\]",
    HEADER + 'u,a,1\nu,b,soon\n': "line 3 is no record with .* a time .a number or ISO 8601., in user, item, timestamp: .*'soon'",
    HEADER + 'u,a,nan\n': 'line 2 is no record with .* a time',
    HEADER + 'u,a,inf\n': 'line 2 is no record with .* a time',
    HEADER + 'u,a,2023-13-01\n': 'line 2 is no record with .* a time',
    HEADER + 'u,a,\n': 'line 2 is no record with .* a time',
    HEADER + 'u,a,' + '9' * 30 + '\n': 'line 2 is no record with .* a time',
    HEADER + 'u,a,' + '9' * 5000 + '\n': 'line 2 is no record with .* a time',
    HEADER + 'u,' + 'a' * 140_000 + ',1\n': 'line 2 is not CSV',
    HEADER + ',a,1\n': 'line 2 is no record with a user, an item',
    HEADER + 'u,,1\n': 'line 2 is no record with a user, an item',
    HEADER + 'u,"",1\n': 'line 2 is no record with a user, an item',
    HEADER + 'u,zzz,1\n': "has no text: 1, as of 'zzz'",
    HEADER + 'u,a,1\nu,b,2\nu,c,3\n': 'no user has 4',
    HEADER + 'u,a,1\nu,b,2\nu,c,3\nu,d,4\n': 'and two last items that occur in training parts',
}
OBJECT = 'is no record with an id in the column id: '
NO_OBJECT = 'has no column .id., but nothing'
BAD_ITEMS = {
    '': NO_OBJECT,
    '\n\n': NO_OBJECT,
    'id,title\n': NO_OBJECT,
    '{"id": "a"\n': NO_OBJECT,
    '{"id": "a"}\n{"id": "b", "title": "cut': f'line 2 {OBJECT}',
    '[]\n': NO_OBJECT,
    '7\n': NO_OBJECT,
    '[]\n{"id": "a"}\n': f'line 1 {OBJECT}',
    '{"id": "a"}\n7\n': f'line 2 {OBJECT}',
    '{"id": "a", "title": "x"}\n["b", "y"]\n': f'line 2 {OBJECT}',
    '{"title": "x"}\n': 'has no column .id., but title',
    '{"id": "a"}\n{"title": "x"}\n': f'line 2 {OBJECT}',
    '{"id": ""}\n': f'line 1 {OBJECT}',
    '{"id": " "}\n': f'line 1 {OBJECT}',
    '{"id": null}\n': f'line 1 {OBJECT}',
    '{"id": ["a"]}\n': f'line 1 {OBJECT}',
    '{"id": "a"}\n{"id": "a"}\n': 'two lines have the id a',
    '{"id": 1}\n{"id": "1"}\n': 'two lines have the id 1',
    '{"id": "b"}\n{"id": "a", "title": ' + '[' * 10 ** 5 + ']' * 10 ** 5 + '}\n': 'line 2 is no',
    '{"id": "a", "title": ' + '9' * 5000 + '}\n': NO_OBJECT,
}


@pytest.mark.parametrize('text', BAD_INTERACTIONS, ids=range(len(BAD_INTERACTIONS)))
def test_bad_interactions(root, text):
    folder = ten_users(root)
    (folder / 'interactions.csv').write_text(text)
    with pytest.raises(UserError, match=BAD_INTERACTIONS[text]) as error:
        data.prepare('toy', data.DEFAULT)
    assert str(folder / 'interactions.csv') in str(error.value)
    assert not (folder / 'prepared.npz').exists()


@pytest.mark.parametrize('text', BAD_ITEMS, ids=range(len(BAD_ITEMS)))
def test_bad_items(root, text):
    folder = ten_users(root)
    (folder / 'items.jsonl').write_text(text)
    with pytest.raises(UserError, match=BAD_ITEMS[text]) as error:
        data.prepare('toy', data.DEFAULT)
    assert str(folder / 'items.jsonl') in str(error.value)
    assert not (folder / 'prepared.npz').exists()


def damaged_versions(text):
    """Bytes of a broken .gz of this text, and what is said of it."""
    whole = gzip.compress(text)
    return [(whole[:-20], 'damaged'), (b'not gzip', 'damaged'), (b'', 'has no column'),
            (whole[:30] + b'xx' + whole[32:], 'damaged'),
            (gzip.compress(HEADER.encode() + b'u,a,1\n' * 5 + b'\xff\xfe,a,1\n'),
             "no UTF-8 text .*can't decode byte 0xff.*; get or convert it again")]


def test_damaged_files(root):
    folder = ten_users(root)
    good = (folder / 'interactions.csv').read_bytes()
    (folder / 'interactions.csv').unlink()
    for content, word in damaged_versions(good):
        (folder / 'interactions.csv.gz').write_bytes(content)
        with pytest.raises(UserError, match=f'interactions.csv.gz: .*{word}'):
            data.prepare('toy', data.DEFAULT)
    (folder / 'interactions.csv').write_text(HEADER)
    with pytest.raises(UserError, match='one of interactions.csv and interactions.csv.gz .*, not 2'):
        data.prepare('toy', data.DEFAULT)
    for name in ('interactions.csv', 'interactions.csv.gz'):
        (folder / name).unlink()
    with pytest.raises(UserError, match='one of interactions.csv and .*data/README.md.*, not 0'):
        data.prepare('toy', data.DEFAULT)


def test_files_damaged_after_the_preparation(root):
    folder = ten_users(root)
    data.prepare('toy', data.DEFAULT)
    whole = gzip.compress((folder / 'interactions.csv').read_bytes())
    (folder / 'interactions.csv').unlink()
    for content in (whole[:-20], b'not gzip', whole[:30] + b'xx' + whole[32:]):
        (folder / 'interactions.csv.gz').write_bytes(content)
        with pytest.raises(UserError, match='interactions.csv.gz: .*damaged'):
            data.load('toy')


@pytest.mark.parametrize('name', ['../x', 'a/b', '', 'x y', 'x;ls', '.', 'x\n'])
def test_names_are_plain_words(root, name):
    with pytest.raises(UserError, match='letters, digits'):
        data.prepare(name, data.DEFAULT)
    with pytest.raises(UserError, match='letters, digits'):
        data.load(name)


def test_missing_and_damaged_preparation(root):
    with pytest.raises(UserError, match='/nothing: must hold one of .* not 0; known datasets: drugstore, grocery, '):
        data.prepare('nothing', data.DEFAULT)
    assert not (root / 'nothing').exists()
    folder = ten_users(root)
    with pytest.raises(UserError, match='run python -m common.data toy'):
        data.load('toy')
    path = folder / 'prepared.npz'
    for text in (b'', b'junk', b'PK\x03\x04junk'):
        path.write_bytes(text)
        with pytest.raises(UserError, match='damaged'):
            data.load('toy')
    data.prepare('toy', data.DEFAULT)
    assert len(data.load('toy').user_ids) == 9


def test_any_damage_of_the_preparation_is_named(root):
    """Cut anywhere, or with any byte changed: damaged, or (where nothing reads it) the same."""
    folder = ten_users(root)
    made = data.prepare('toy', data.DEFAULT)
    path = folder / 'prepared.npz'
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(0, len(whole), 197)]
    for place in range(0, len(whole), 47):
        changed = bytearray(whole)
        changed[place] ^= 255
        broken.append(bytes(changed))
    for content in broken:
        path.write_bytes(content)
        try:
            d = data.load('toy')
            assert d.fingerprint == made.fingerprint and d.attributes == made.attributes
            assert (d.items == made.items).all() and (d.negatives == made.negatives).all()
        except UserError as error:
            assert 'damaged; run python -m common.data toy' in str(error)


# ------------------------------------------------------------------------ report

def test_report_counts_and_warns(root, capsys):
    folder = ten_users(root)
    lines = [json.dumps({'id': i, 'title': 'the same'}) for i in 'abcdef']
    (folder / 'items.jsonl').write_text('\n'.join(lines))
    with open(folder / 'interactions.csv', 'a') as f:
        f.write('u0,a,0\n')
    d = data.prepare('toy', data.DEFAULT)
    data.report(d)
    out = capsys.readouterr().out
    assert "           2  rows dropped, as their item has no text (the first: 'g')\n" in out
    assert '           1  rows dropped, as they repeat another\n' in out
    assert f'{len(d.evaluated):>12}  warning: users with fewer than 100 negatives, as the catalogue is small\n' in out
    assert "nobody's sequence" not in out
    assert '           5  warning: items whose text, or lack of one, another item has too\n' in out
    assert 'paper' not in out and 'published' not in out
    d.name = 'pantry'
    data.report(d)
    out = capsys.readouterr().out
    assert 'paper 21,300   warning: differs\n' in out and out.count('warning: differs') == 5
    d.counts['users'] = 22601
    data.report(d)
    assert '      22,601  users   paper 22,601\n' in capsys.readouterr().out


def test_items_without_any_text_are_warned_of(root, capsys):
    folder = ten_users(root)
    empty = ['{}', '{"title": null}', '{"title": ""}', '{"brand": ""}']
    lines = [json.dumps({'id': i} | json.loads(empty[k % 4])) for k, i in enumerate('abcdefg')]
    (folder / 'items.jsonl').write_text('\n'.join(lines))
    data.report(data.prepare('toy', data.DEFAULT))
    assert '           6  warning: items whose text, or lack of one, another item has too\n' in capsys.readouterr().out


@pytest.mark.parametrize('name', ['toy', *AMAZON])
def test_published_counts_of_every_dataset(name):
    known = PAPER['table2'].get(name, {})
    assert bool(known) == (name not in ('toy', 'industrial', 'office'))
    assert known.keys() <= {'users', 'items', 'interactions', 'avg_len', 'evaluated'}
    assert ('evaluated' in known) == (name in ('pantry', 'instruments', 'arts', 'movies', 'sports'))


def test_filters_that_were_given_once_are_remembered(root):
    canonical(root / 'toy')
    nothing = [None, None, None]
    everybody = len(data.prepare('toy', nothing).user_ids)
    fewer = data.prepare('toy', [6, None, None])
    assert len(fewer.user_ids) < everybody and fewer.lengths.min() == 6
    assert len(data.prepare('toy', nothing).user_ids) == len(fewer.user_ids), 'run_all.sh names no filters'
    with open(root / 'toy' / 'interactions.csv', 'a') as f:
        f.write('u0,i1,9999\n')
    again = data.prepare('toy', nothing)
    assert again.lengths.min() == 6 and again.fingerprint != fewer.fingerprint
    assert len(data.prepare('toy', [4, None, None]).user_ids) == everybody


def test_a_preparation_of_another_day_is_made_again(root, monkeypatch):
    """An identity without what is asked of it today."""
    ten_users(root)
    today = data.identity_of
    monkeypatch.setattr(data, 'identity_of', lambda *a: {'filters': [4, 1, 0], 'code': []})
    data.prepare('toy', data.DEFAULT)
    monkeypatch.setattr(data, 'identity_of', today)
    assert len(data.prepare('toy', [None, None, None]).user_ids) == 9
