"""Split, cold exclusion and negatives by hand on ten users; broken files. Run: python -m pytest tests/test_data.py"""
import gzip
import json

import numpy as np
import pytest

from common import data
from common.files import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path))
    return tmp_path


def write(root, rows, items='abcdefghijkl', name='toy'):
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / 'interactions.csv').write_text('user,item,timestamp\n' + '\n'.join(f'{u},{i},{t}' for u, i, t in rows) + '\n')
    (folder / 'items.jsonl').write_text('\n'.join(json.dumps({'id': i, 'title': f'item {i}'}) for i in items) + '\n')
    return folder


TEN = {'u0': 'abcd', 'u1': 'bcda', 'u2': 'cdab', 'u3': 'abce', 'u4': 'abec', 'u5': 'abcdf', 'u6': 'fabcd', 'u7': 'abc', 'u8': 'gabcd',
       'u9': 'abcgd'}


def ten_users(root):
    return write(root, [(u, i, t) for u, s in TEN.items() for t, i in enumerate(s)])


def test_ten_users_by_hand(root):
    """u7 has three interactions and goes; e occurs only as somebody's last two, so u3 and u4 are not evaluated."""
    ten_users(root)
    d = data.prepare('toy', data.DEFAULT)
    assert d.item_ids == list('abcdefg') and d.n_users == 9 and 'u7' not in d.user_ids
    sequences = {u: ''.join(d.item_ids[i - 1] for i in d.items[d.offsets[r]:d.offsets[r + 1]]) for r, u in enumerate(d.user_ids)}
    assert sequences == {u: s for u, s in TEN.items() if u != 'u7'}
    assert [d.user_ids[u] for u in d.evaluated] == ['u0', 'u1', 'u2', 'u5', 'u6', 'u8', 'u9']
    items, offsets, targets = d.split('valid')
    assert ''.join(d.item_ids[i - 1] for i in items[offsets[3]:offsets[4]]) == 'abc' and d.item_ids[targets[3] - 1] == 'd', 'u5'
    items, offsets, targets = d.split('test')
    assert ''.join(d.item_ids[i - 1] for i in items[offsets[3]:offsets[4]]) == 'abcd' and d.item_ids[targets[3] - 1] == 'f', 'u5'
    for row, user in zip(d.negatives, d.evaluated):
        own, given = set(d.items[d.offsets[user]:d.offsets[user + 1]]), row[row > 0]
        assert set(given) == set(range(1, 8)) - own and len(set(given)) == len(given), 'a small catalogue: all others'
    again = data.load('toy')
    assert again.fingerprint == d.fingerprint and (again.negatives == d.negatives).all() and again.attributes == d.attributes


def test_order_is_time_then_place_in_the_file_and_repeats_count_once(root):
    write(root, [('u', 'd', 5), ('u', 'a', 1), ('u', 'c', 3), ('u', 'b', 3), ('u', 'c', 3), ('v', 'c', 1), ('v', 'a', 2), ('v', 'd', 3), ('v', 'b', 4), ('w', 'a', 1), ('w', 'b', 1), ('w', 'c', 1), ('w', 'd', 1), ('w', 'a', 2), ('w', 'a', 3)])
    d = data.prepare('toy', data.DEFAULT)
    assert [d.item_ids[i - 1] for i in d.items[:4]] == ['a', 'c', 'b', 'd']
    assert d.counts['rows_repeated'] == 1 and d.counts['interactions'] == 14


def test_core_is_repeated_until_nothing_changes():
    # item 2 falls first; user 1 then has one row left and falls; user 0 is left with items 0 and 1 at two rows each
    user = np.array([0, 0, 0, 0, 1, 1])
    item = np.array([0, 0, 1, 1, 0, 2])
    assert data.core(user, item, 2, 2).tolist() == [0, 1, 2, 3]


def test_negatives_are_uniform_and_the_same_on_every_run():
    items, offsets = np.tile(np.array([1, 2, 3], np.int32), 3000), np.arange(0, 9001, 3)
    first, second = (data.draw_negatives(items, offsets, np.arange(3000), 203) for _ in range(2))
    assert (first == second).all() and first.shape == (3000, 100) and first.min() == 4
    counts = np.bincount(first.ravel(), minlength=204)[4:]
    assert abs(counts / 1500 - 1).max() < 0.12, 'each of 200 items half the time'
    assert all(len(set(row)) == 100 for row in first[:50])


def test_sample_of_users_is_seeded(root):
    ten_users(root)
    a, b = (data.build('toy', root / 'toy', 4, 1, 7) for _ in range(2))
    assert a.n_users == 7 and a.user_ids == b.user_ids


def test_bom_crlf_gzip_and_odd_texts_are_read(root):
    folder = ten_users(root)
    text = (folder / 'interactions.csv').read_text().replace('\n', '\r\n')
    (folder / 'interactions.csv').unlink()
    with gzip.open(folder / 'interactions.csv.gz', 'wb') as f:
        f.write(b'\xef\xbb\xbf' + text.encode())
    odd = [{'id': 'a', 'title': 'x' * 100_000}, {'id': 'b', 'title': '\U0001f600 \x00\x1b', 'brand': None}, {'id': 'c', 'category': ['p', 'q'], 'price': 3}]
    odd.append({'id': ' d ', 'na\ud800me': 'half a \ud800 pair'})
    (folder / 'items.jsonl').write_text('\n'.join(json.dumps(o) for o in odd + [{'id': i} for i in 'efg']))
    d = data.prepare('toy', data.DEFAULT)
    assert len(d.attributes[0][0][1]) == 2000 and d.attributes[1][1] == ('brand', '') and d.attributes[2] == [('category', 'p q'), ('price', '3')]
    assert d.attributes[3] == [('na?me', 'half a ? pair')]


def test_ids_that_end_in_a_control_character_stay_apart(root):
    write(root, [(u, i + '\0' * (i == 'a'), t) for u, s in TEN.items() for t, i in enumerate(s)], items=['a', 'a\0', *'bcdefg'])
    assert data.prepare('toy', data.DEFAULT).item_ids[:2] == ['a\0', 'b']


def test_a_changed_file_is_noticed(root):
    folder = ten_users(root)
    data.prepare('toy', data.DEFAULT)
    with open(folder / 'interactions.csv', 'a') as f:
        f.write('u0,a,99\n')
    with pytest.raises(UserError, match='changed since'):
        data.load('toy')
    assert data.prepare('toy', data.DEFAULT).counts['interactions'] == 41


HEADER = 'user,item,timestamp\n'
BAD_INTERACTIONS = {
    '': 'file is empty', 'u,a,1\n': 'line 1 must be', HEADER: 'no interaction', HEADER + 'u,a\n': 'line 2 has 2 columns',
    HEADER + 'u,a,1,9\n': 'line 2 has 4 columns', HEADER + 'u,a,1\nu,b,soon\n': "line 3: timestamp 'soon'", HEADER + 'u,a,nan\n': 'timestamp',
    HEADER + 'u,a,-5\n': 'timestamp', HEADER + 'u,a,1.5\n': 'timestamp', HEADER + 'u,a,inf\n': 'timestamp', HEADER + 'u,a,\n': 'timestamp',
    HEADER + ',a,1\n': 'empty user or item', HEADER + 'u,,1\n': 'empty user or item', HEADER + 'u,zzz,1\n': 'unknown items',
    HEADER + 'u,a,1\nu,b,2\nu,c,3\n': 'no user has 4', HEADER + 'u,a,' + '9' * 30 + '\n': 'timestamp',
    HEADER + 'u,a,1\nu,b,2\nu,c,3\nu,d,4\n': 'nothing to evaluate',
}
BAD_ITEMS = {
    '': 'holds no items', '\n\n': 'holds no items', 'id,title\n': 'line 1 is not a JSON object', '[]\n': 'line 1 is not an object with',
    '{"title": "x"}\n': 'with an "id"', '{"id": ""}\n': 'with an "id"', '{"id": null}\n': 'with an "id"', '{"id": "a"}\n{"id": "a"}\n': 'line 2 repeats the id a',
    '{"id": "a", "title": {"x": 1}}\n': 'title is an object', '{"id": "a"\n': 'line 1 is not a JSON',
    '{"id": "a", "title": ' + '[' * 600 + ']' * 600 + '}\n': 'line 1 (holds lists|is not)', '{"id": "a"}\n{"id": "b", "title": "cut': 'line 2',
}


@pytest.mark.parametrize('text', BAD_INTERACTIONS)
def test_bad_interactions(root, text):
    folder = ten_users(root)
    (folder / 'interactions.csv').write_text(text)
    with pytest.raises(UserError, match=BAD_INTERACTIONS[text]):
        data.prepare('toy', data.DEFAULT)
    assert not (folder / 'prepared.npz').exists()


@pytest.mark.parametrize('text', BAD_ITEMS)
def test_bad_items(root, text):
    folder = ten_users(root)
    (folder / 'items.jsonl').write_text(text)
    with pytest.raises(UserError, match=BAD_ITEMS[text]):
        data.prepare('toy', data.DEFAULT)
    assert not (folder / 'prepared.npz').exists()


def test_damaged_files(root):
    folder = ten_users(root)
    whole = gzip.compress((folder / 'interactions.csv').read_bytes())
    (folder / 'interactions.csv').unlink()
    for bytes_, word in ((whole[:-20], 'damaged'), (b'not gzip', 'damaged'), (b'', 'line 1 must be'), (whole[:30] + b'xx' + whole[32:], 'damaged'),
                         (gzip.compress(HEADER.encode() + b'\xff\xfe,a,1\n'), 'not UTF-8')):
        (folder / 'interactions.csv.gz').write_bytes(bytes_)
        with pytest.raises(UserError, match=word):
            data.prepare('toy', data.DEFAULT)
    (folder / 'interactions.csv').write_text(HEADER)
    with pytest.raises(UserError, match='has both'):
        data.prepare('toy', data.DEFAULT)


@pytest.mark.parametrize('name', ['../x', 'a/b', '', 'x y', 'x;ls', '.'])
def test_names_are_plain_words(root, name):
    with pytest.raises(UserError, match='letters, digits'):
        data.prepare(name, data.DEFAULT)


def test_missing_and_damaged_preparation(root):
    with pytest.raises(UserError, match='unknown dataset nothing'):
        data.prepare('nothing', data.DEFAULT)
    folder = ten_users(root)
    with pytest.raises(UserError, match='run python -m common.data toy'):
        data.load('toy')
    for text in (b'', b'junk', b'PK\x03\x04junk'):
        (folder / 'prepared.npz').write_bytes(text)
        with pytest.raises(UserError, match='damaged'):
            data.load('toy')
    data.prepare('toy', data.DEFAULT)
    assert data.load('toy').n_users == 9
