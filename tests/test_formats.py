"""Files as others publish them, by hand: each format's quirks, times of every kind, what is left out, what is refused.

Run: python -m pytest tests/test_formats.py
"""
import contextlib
import gzip
import json
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from common import data, files, formats, sources
from common.files import UserError, lock
from tests.toy import canonical


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    return tmp_path


def converted(root, *command):
    """What `python -m common.data toy --from ...` makes: rows and items, as they stand in the canonical files."""
    args = data.parse_args(['toy', *map(str, command)])
    folder = root / 'data' / 'toy'
    formats.convert(folder, args.source, args.items, args.columns)
    rows = gzip.decompress((folder / 'interactions.csv.gz').read_bytes()).decode().splitlines()
    texts = gzip.decompress((folder / 'items.jsonl.gz').read_bytes()).decode().splitlines()
    assert rows[0] == 'user,item,timestamp'
    return rows[1:], list(map(json.loads, texts))


def write(folder, **files):
    """Files by name, where __ stands for a dot; a text as UTF-8, a list as one JSON object a line."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            content = '\n'.join(map(json.dumps, content)) + '\n'
        content = content if isinstance(content, bytes) else content.encode()
        name = name.replace('__', '.')
        (folder / name).write_bytes(gzip.compress(content) if name.endswith('.gz') else content)
    return folder


# ------------------------------------------------------------------------ formats

def test_recbole(root, capsys):
    folder = write(root / 'ml', ml__inter='user_id:token\titem_id:token\trating:float\ttimestamp:float\n'
                   '7\t2\t3\t881250949.0\n8\t"1\t5\t881250950\n',
                   ml__item='item_id:token\ttitle:token_seq\tyear:token\tclass:token_seq\n'
                   '2\tGold "Eye\t1995\tAction Adventure\n"1\tToy\t\tComedy\n',
                   ml__user='user_id:token\n7\n', ml__link='item_id:token\tentity:token\n2\tm.1\n')
    expected = (['7,2,881250949.0', '8,"""1",881250950'],
                [{'id': '2', 'title': 'Gold "Eye', 'year': '1995', 'class': 'Action Adventure'},
                 {'id': '"1', 'title': 'Toy', 'year': '', 'class': 'Comedy'}])
    assert converted(root, '--from', folder) == expected
    said = capsys.readouterr().out
    assert f'toy: interactions of {folder / "ml.inter"}, texts of {folder / "ml.item"}' in said
    for path in (folder / 'ml', folder / 'ml.inter'):
        assert converted(root, '--from', path) == expected, 'stem, file'
    (folder / 'ml.inter.gz').write_bytes(gzip.compress((folder / 'ml.inter').read_bytes()))
    (folder / 'ml.inter').unlink()
    assert converted(root, '--from', folder) == expected, 'packed'


@pytest.mark.parametrize('log, goods', [('LOG.CSV', 'ITEMS.CSV'), ('log.Tsv', 'goods.NDJSON'), ('a.JSON', 'b.ndjson')])
def test_endings_in_capitals_are_endings(root, log, goods):
    folder = root / 'in'
    folder.mkdir()
    rows = [{'user': 'ann', 'item': '"A" x', 'time': '7'}]
    texts = [{'item': '"A" x', 'title': 'one, two'}]
    for name, objects in ((log, rows), (goods, texts)):
        mark = '\t' if 'tsv' in name.lower() else ','
        if 'json' in name.lower():
            text = '\n'.join(map(json.dumps, objects))
        else:
            quoted = ['"{}"'.format(value.replace('"', '""')) for value in objects[0].values()]
            text = mark.join(objects[0]) + '\n' + mark.join(quoted) + '\n'
        (folder / name).write_text(text)
    made = converted(root, '--from', folder / log, '--items', folder / goods)
    assert made == (['ann,"""A"" x",7'], [{'title': 'one, two', 'id': '"A" x'}])


def test_pairs_in_capitals_are_found(root):
    folder = write(root / 'in', Interactions__CSV='user,item,time\nann,a,1\n', items__csv='item,title\na,salt\n')
    assert converted(root, '--from', folder)[0] == ['ann,a,1']


@pytest.mark.parametrize('head', ['user,item,timestamp,Timestamp', 'user,item,Timestamp,timestamp', 'USER,user,item,time'])
def test_of_two_columns_that_differ_in_capitals_the_plain_one_is_read(root, head):
    row = ','.join('0' if name != name.lower() else '7' for name in head.split(','))
    folder = write(root / 'in', interactions__csv=f'{head}\n{row}\n', items__csv='item,title\n7,salt\n')
    assert converted(root, '--from', folder)[0] == ['7,7,7']


def test_a_column_that_is_named_as_it_stands_is_that_one(root):
    folder = write(root / 'in', interactions__csv='user,item,time,Time\nann,a,0,7\n', items__csv='item,title\na,salt\n')
    for name, value in (('time', 0), ('Time', 7)):
        assert converted(root, '--from', folder, '--columns', f'time={name}')[0] == [f'ann,a,{value}']


def test_a_conversion_waits_for_another_of_the_same_dataset(root, capsys):
    folder = write(root / 'in', interactions__csv='user,item,time\nann,a,1\n', items__csv='item,title\na,salt\n')
    with ThreadPoolExecutor(1) as thread:
        with lock(root / 'data' / 'toy'):
            coming = thread.submit(converted, root, '--from', folder)
            with pytest.raises(TimeoutError):
                coming.result(0.5)
            assert {path.name for path in (root / 'data' / 'toy').iterdir()} == {'.lock'}
            again = thread.submit(converted, root, '--from', folder)
        assert coming.result()[0] == again.result()[0] == ['ann,a,1']
        assert capsys.readouterr().out.count('up to date') == 1, 'who waited finds it made'


FLAGS = '0|0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0'


def test_movielens_100k(root):
    item = (f'1|Misérables, Les (1995)|01-Jan-1995||http://x?Les%20(1995)|{FLAGS}\n'
            f'2|"Odd" one|||{"|".join("1" * 19).join(["|", ""])}\n').replace('|||1', '|||1')
    folder = write(root / 'ml', u__data='196\t1\t3\t881250949\n186\t2\t3\t891717742\n', u__item=item.encode('latin-1'),
                   u1__base='196\t1\t3\t881250949\n', u__user='1|24|M|technician|85711\n', README='x')
    rows, items = converted(root, '--from', folder)
    assert rows == ['196,1,881250949', '186,2,891717742']
    assert items[0] == {'id': '1', 'title': 'Misérables, Les (1995)', 'genres': 'Children Comedy'}
    assert items[1]['title'] == '"Odd" one' and len(items[1]['genres'].split()) == 19


@pytest.mark.parametrize('code', ['latin-1', 'utf-8'])
def test_movielens_1m_and_10m(root, code):
    text = "1::Mission: Impossible (1996)::Action|Adventure|Children's|Comedy\n2::Café :: bar::Drama\n3::Café|é::Drama\n"
    folder = write(root / 'ml', ratings__dat='1::3::5::978300760\n1::1::3.5::978302109\n', movies__dat=(text * 40).encode(code),
                   users__dat='1::F::1::10::48067\n')
    with pytest.raises(UserError, match='movies.dat: line 2 is no .*all 40 of 120 lines'):
        converted(root, '--from', folder)
    (folder / 'movies.dat').write_bytes(text.replace('Café :: bar', 'Bar').encode(code))
    rows, items = converted(root, '--from', folder)
    assert rows == ['1,3,978300760', '1,1,978302109']
    assert items == [{'id': '1', 'title': 'Mission: Impossible (1996)', 'genres': "Action Adventure Children's Comedy"},
                     {'id': '2', 'title': 'Bar', 'genres': 'Drama'}, {'id': '3', 'title': 'Café|é', 'genres': 'Drama'}]


def test_movielens_csv(root):
    folder = write(root / 'ml', ratings__csv='userId,movieId,rating,timestamp\r\n1,11,4.0,1260759144\r\n',
                   movies__csv='movieId,title,genres\r\n11,"American President, The (1995)",Comedy|Drama|Romance\r\n'
                   '12,x,(no genres listed)\r\n', tags__csv='userId,movieId,tag,timestamp\n1,11,x,5\n', links__csv='movieId,imdbId\n11,1\n')
    rows, items = converted(root, '--from', folder)
    assert rows == ['1,11,1260759144']
    assert items == [{'id': '11', 'title': 'American President, The (1995)', 'genres': 'Comedy Drama Romance'},
                     {'id': '12', 'title': 'x', 'genres': ''}]


META = {'title': 'Tea &amp; <b>Coffee</b>', 'description': ['long'], 'price': '$3'}


def test_amazon_2018(root):
    meta = [{'asin': 'B1', **META, 'brand': 'Acme', 'category': ['Sea', 'Salt']}, {'asin': 'B1', 'title': 'again'},
            {'asin': 'B2', 'title': 'var x = getTime()', 'brand': None}]
    texts = [{'id': 'B1', 'title': 'Tea & Coffee', 'brand': 'Acme', 'category': 'Sea Salt'},
             {'id': 'B2', 'title': '', 'brand': '', 'category': ''}]
    folder = write(root / 'raw', Pantry__csv='B1,U1,5.0,1400000000\nB9,U1,2.0,1400000001\n', meta_Pantry__json__gz=meta)
    assert converted(root, '--from', folder) == (['U1,B1,1400000000', 'U1,B9,1400000001'], texts)
    review = {'overall': 5.0, 'reviewerID': 'U1', 'asin': 'B1', 'reviewText': 'x', 'unixReviewTime': 1400000000}
    write(folder, Pantry_5__json__gz=[review])
    with pytest.raises(UserError, match='but Pantry.csv meta_Pantry.json.gz, '
                                         'Pantry_5.json.gz meta_Pantry.json.gz; name one'):
        converted(root, '--from', folder)
    assert converted(root, '--from', folder / 'Pantry_5.json.gz') == (['U1,B1,1400000000'], texts)


def test_amazon_2023(root):
    meta = [{'main_category': 'X', **META, 'store': 'Acme', 'categories': ['Sea', 'Salt'], 'images': [{'thumb': 'x'}],
             'details': {'Brand': 'no', 'Size': {'x': 1}}, 'parent_asin': 'B1', 'bought_together': None}]
    texts = [{'id': 'B1', 'title': 'Tea & Coffee', 'brand': 'Acme', 'category': 'Sea Salt'}]
    review = {'rating': 5.0, 'title': 'Nice', 'images': [], 'asin': 'B0', 'parent_asin': 'B1', 'user_id': 'AE', 'timestamp': 1677939345945}
    folder = write(root / 'a', Gift__jsonl=[review], meta_Gift__jsonl=meta)
    assert converted(root, '--from', folder) == (['AE,B1,1677939345945'], texts)
    folder = write(root / 'b', Gift__csv='user_id,parent_asin,rating,timestamp\nAE,B1,5.0,1677939345945\n', meta_Gift__jsonl__gz=meta)
    assert converted(root, '--from', folder) == (['AE,B1,1677939345945'], texts)


@pytest.mark.parametrize('mark, ending', [(',', 'csv'), (';', 'csv'), ('\t', 'tsv')])
def test_own_tables(root, mark, ending):
    """Quoted headers; quotes, commas and line breaks in ids; "A" and A are one id, as in any CSV file."""
    table = lambda *rows: '\ufeff' + '\n'.join(mark.join(row) for row in rows) + '\n'
    orders = table(['', '"who is it"', 'sku', 'day'], ['0', '"ann ""A"""', '"a, 1"', '2024-03-01'],
                   ['1', 'A', 'b', '2024-03-02T10:00:00Z'], ['2', '"A"', '"a\n2"', '-5.5'])
    goods = table(['', 'sku', 'name', 'price'], ['0', '"a, 1"', '"salt ""x"""', '3'], ['1', 'b', '', ''])
    folder = write(root / 'x', **{f'orders__{ending}': orders, f'goods__{ending}': goods})
    command = ['--from', folder / f'orders.{ending}', '--items', folder / f'goods.{ending}', '--columns']
    with pytest.raises(UserError, match=f'orders.{ending}: has no column .timestamp, .*, but , who is it, sku, day; with --from .* --columns time=NAME'):
        converted(root, *command, 'user=who is it,item=sku')
    converted(root, *command, 'user=who is it,item=sku,time=day')
    known = sources.read_items(root / 'data' / 'toy' / 'items.jsonl.gz')
    assert {key: json.loads(value) for key, value in known.items()} == {
        'a, 1': [['name', 'salt "x"'], ['price', '3']], 'b': [['name', ''], ['price', '']]}
    known['a\n2'] = ''
    columns, users, unknown, _ = sources.read_interactions(root / 'data' / 'toy' / 'interactions.csv.gz', known)
    assert users == ['ann "A"', 'A'] and unknown == 0
    assert columns[0].tolist() == [0, 1, 1] and columns[2].tolist() == [1709251200 * 10 ** 6, 1709373600 * 10 ** 6, -5_500_000]


def test_own_folder_and_texts_as_json(root, capsys):
    """Numbers as ids; an id that is called otherwise; objects, NaN, null, repeated ids, bad lines."""
    items = ['{"code": 7, "name": "tea", "size": {"x": 1}, "price": NaN, "tags": ["a", null, Infinity]}',
             '{"code": "8", "name": null, "images": [{"u": 1}]}', '{"code": 7, "name": "again"}']
    items += [f'{{"code": "x{i}"}}' for i in range(400)] + ['{"code": "cut', '{"name": "no code"}']
    rows = [{'user': 1, 'item': 7, 'time': 1.5}, {'user': 'u', 'item': '8', 'time': '2024-01-01'}]
    rows += [{'user': 'u', 'item': 'x1', 'time': i} for i in range(300)] + [{'user': None, 'item': 7, 'time': 5}, {'user': 'u'}]
    folder = write(root / 'x', buys__jsonl=rows, goods__jsonl='\n'.join(items))
    made, texts = converted(root, '--from', folder / 'buys.jsonl', '--items', folder / 'goods.jsonl', '--columns', 'id=code')
    assert made[:2] == ['1,7,1.5', 'u,8,2024-01-01'] and len(made) == 302
    assert texts[:2] == [{'id': '7', 'name': 'tea', 'price': '', 'tags': 'a  '}, {'id': '8', 'name': ''}] and len(texts) == 402
    said = capsys.readouterr().out
    assert 'goods.jsonl: 2 attributes that are objects are left out' in said
    assert re.search('buys.jsonl: line 303 is no record with a user, .*; in all 2 of 304 lines cannot be read and are left out', said)
    assert re.search('goods.jsonl: line 404 is no record with an id in the column code: .*; in all 2 of 405 lines', said)
    assert '3 items with interactions, 0 of them without texts; 402 with texts; 1 lines that repeat an id are left out' in said


def test_attributes_that_are_objects_in_canonical_items(root, capsys):
    path = root / 'items.jsonl'
    path.write_text('{"id": "a", "x": {"y": 1}, "title": "t", "z": [{"y": 1}], "n": Infinity, "m": -Infinity, "k": 1e999}\n')
    assert json.loads(sources.read_items(path)['a']) == [['title', 't'], ['n', ''], ['m', ''], ['k', '']]
    assert 'items.jsonl: 2 attributes that are objects are left out' in capsys.readouterr().out


# ------------------------------------------------------------------------ times

TIMES = {'0': 0, '-5': -5 * 10 ** 6, '1.25': 1_250_000, '-0.5': -500_000, '1e3': 10 ** 9, '881250949.0': 881250949 * 10 ** 6,
         '99999999999': 99999999999 * 10 ** 6, '1677939345945': 1677939345945_000, '-100000000000': -10 ** 14,
         '1677939345945123': 1677939345945123, '1677939345945123456': 1677939345945123, '2023-03-04': 1677888000 * 10 ** 6,
         '2023-03-04T14:15:45.945123Z': 1677939345945123, '2023-03-04 15:15:45.945+01:00': 1677939345945_000,
         ' 2023-03-04 14:15:45': 1677939345 * 10 ** 6, '2023-03-04 14:15:45 UTC\n': 1677939345 * 10 ** 6, '1969-12-31T23:59:59': -10 ** 6, '0001-01-01': -62135596800 * 10 ** 6}


@pytest.mark.parametrize('text', TIMES)
def test_times(text):
    assert abs(sources.microseconds(text) - TIMES[text]) <= (len(text) == 19 and text.isdigit())  # nanoseconds: as floats


@pytest.mark.parametrize('text', ['', ' UTC', 'soon', 'nan', 'inf', '-inf', '9' * 30, '9' * 5000, '2023-02-30', '04/03/2023'])
def test_what_is_no_time(text):
    with pytest.raises(ValueError):
        sources.microseconds(text)


@pytest.mark.parametrize('mark, ending', [('::', 'csv'), ('\t', 'inter'), ('::', 'dat')])
def test_blank_lines_and_long_marks_of_tables(root, mark, ending):
    """A file of one row and a blank line at its end had a third of its lines unreadable; Python's
    CSV reader knows no mark of two characters."""
    rows = [mark.join(row.split()) for row in ('user item time', 'a i1 1', '', 'b i2 2', '')]
    log = write(root / 'in', **{f'log__{ending}': '\n'.join(rows) + '\n \n'})
    write(log, goods__csv='item,title\ni1,tea\n\ni2,salt\n')
    found = converted(root, '--from', log / f'log.{ending}', '--items', log / 'goods.csv')
    assert found == (['a,i1,1', 'b,i2,2'], [{'id': 'i1', 'title': 'tea'}, {'id': 'i2', 'title': 'salt'}])


@pytest.mark.parametrize('given, expected', [
    ({'name': 'red tea', 'colour': 'blue'}, {'name': 'red tea', 'colour': 'blue'}),
    ({'description': ['x'], 'category': ['Tea', '<b>red</b>'], 'title': 'Tea &amp; more', 'brand': 'Z'},
     {'title': 'Tea & more', 'brand': 'Z', 'category': 'Tea red'}),
    ({'main_category': 'Food', 'title': 'Tea', 'store': 'Z', 'categories': []},
     {'title': 'Tea', 'brand': 'Z', 'category': ''})])
def test_amazons_texts_are_known_by_what_they_hold(root, given, expected):
    """Whatever the file is called; others with an asin keep all of their attributes."""
    log = write(root / 'in', log__csv='user,asin,time\na,B1,1\n', Goods__jsonl=[{'asin': 'B1', **given}])
    _, items = converted(root, '--from', log / 'log.csv', '--items', log / 'Goods.jsonl')
    assert items == [{**expected, 'id': 'B1'}]


def test_order_within_a_history_whatever_the_times(root):
    """The same sequences from times of every kind in one file."""
    kinds = ['{}', '{}.5', '{}000', '{}000000', '{}000000000']
    canonical(root / 'data' / 'toy')
    first = data.prepare('toy', data.DEFAULT)
    path = root / 'data' / 'toy' / 'interactions.csv'
    rows = [row.split(',') for row in path.read_text().splitlines()[1:]]
    rows = [[user, item, kinds[n % 5].format(1700000000 + int(time))] for n, (user, item, time) in enumerate(rows)]
    path.write_text('user,item,timestamp\n' + '\n'.join(map(','.join, rows[::-1])))
    second = data.prepare('toy', data.DEFAULT)
    sequences = lambda d: {u: d.items[a:b].tolist() for u, a, b in zip(d.user_ids, d.offsets, d.offsets[1:])}
    assert sequences(first) == sequences(second)


@pytest.mark.parametrize('texts, read', [('text=name+price', ['name', 'price']), ('text=PRICE', ['price']),
                                         ('id=sku', ['price', 'stock', 'name'])])
@pytest.mark.parametrize('ending', ['csv', 'jsonl'])
def test_the_columns_that_are_read_may_be_named(root, texts, read, ending):
    goods = [{'price': '1', 'sku': 'a', 'stock': 4, 'name': 'Tea'}, {'sku': 'b', 'price': '2', 'stock': 5, 'name': 'Salt'}]
    table = '\n'.join(','.join(map(str, row)) for row in [goods[0], *[[g[k] for k in goods[0]] for g in goods]])
    folder = write(root / 'x', log__csv='user,sku,time\nu,a,1\n', goods__csv=table, goods__jsonl=goods)
    _, items = converted(root, '--from', folder / 'log.csv', '--items', folder / f'goods.{ending}',
                         '--columns', f'item=sku,{texts}')
    assert items == [{**{name: str(good[name]) for name in read}, 'id': good['sku']} for good in goods]
    assert [name for name in items[0] if name != 'id'] == read, 'in this order'
    with pytest.raises(UserError, match=f'goods.{ending}: has no column .colour., but'):
        converted(root, '--from', folder / 'log.csv', '--items', folder / f'goods.{ending}',
                  '--columns', 'item=sku,text=name+colour')


def test_named_columns_of_amazons_texts_are_read_as_they_are(root):
    meta = [{'asin': 'B1', 'title': 'Tea &amp; Coffee', 'brand': 'Acme', 'category': ['Sea', 'Salt'], 'price': 3}]
    folder = write(root / 'raw', P__csv='B1,U1,5.0,1400000000\n', meta_P__json=meta)
    _, items = converted(root, '--from', folder, '--columns', 'text=category+price')
    assert items == [{'category': 'Sea Salt', 'price': '3', 'id': 'B1'}]


def test_a_table_of_numbers_without_a_header_is_movielens_only_with_its_times(root):
    """customer, sku, time, quantity: the last is no time."""
    folder = write(root / 'x', log__tsv='7\t2\t881250949\t1\n8\t3\t881250950\t2\n', goods__csv='item,title\n2,a\n3,b\n')
    with pytest.raises(UserError, match='log.tsv: has no column .user, '):
        converted(root, '--from', folder / 'log.tsv', '--items', folder / 'goods.csv')


def test_what_is_read_as_user_item_time_and_id_is_said(root, capsys):
    folder = write(root / 'x', log__csv='user,user_id,sku,day,time\nann,7,a,2024-01-02,0157\n', goods__csv='id,sku,title\nv,a,x\n')
    converted(root, '--from', folder / 'log.csv', '--items', folder / 'goods.csv', '--columns', 'item=sku')
    assert capsys.readouterr().err == (
        '  log.csv: a user, an item and a time (a number or ISO 8601), in user, sku, time\n'
        '  goods.csv: an id in the column sku\n')


def test_an_item_table_of_others_may_have_a_column_of_movielens(root):
    folder = write(root / 'x', interactions__csv='user,item,time\nu,a,1\n', items__csv='item,title,IMDb,Film-Noir\na,x,8.0,1\n')
    assert converted(root, '--from', folder)[1] == [{'title': 'x', 'IMDb': '8.0', 'Film-Noir': '1', 'id': 'a'}]


def test_a_quoted_cell_of_a_tsv_may_hold_lines_and_tabs(root):
    texts = 'item\tname\tabout\na\tFilm\t"first line\n\tan indented second"\nb\t"x\ty"\t"one\ntwo"\n'
    folder = write(root / 'x', interactions__csv='user,item,time\nu,a,1\n', items__tsv=texts)
    with pytest.raises(UserError, match='holds not one pair'):
        converted(root, '--from', folder)
    _, items = converted(root, '--from', folder / 'interactions.csv', '--items', folder / 'items.tsv')
    assert [item['about'] for item in items] == ['first line\n\tan indented second', 'one\ntwo']


def test_the_names_of_json_are_those_of_all_its_first_lines(root):
    folder = write(root / 'x', interactions__csv='user,item,time\nu,a,1\n', items__jsonl=[{'id': 'a'}, {'id': 'b', 'brand': 'Acme'}])
    _, items = converted(root, '--from', folder, '--columns', 'text=brand')
    assert items == [{'brand': '', 'id': 'a'}, {'brand': 'Acme', 'id': 'b'}]


def test_a_date_beside_a_time_of_day_is_the_time(root):
    folder = write(root / 'x', interactions__csv='user,item,time,date\nu,a,0157,2024-01-02\n', items__csv='item,title\na,x\n')
    assert converted(root, '--from', folder)[0] == ['u,a,2024-01-02']


# ------------------------------------------------------------------------ again, and what is refused

def own(root, **more):
    return write(root / 'x', interactions__csv='user_id,item_id,date\n' + ''.join(f'u{u},{i},{n}\n' for u in range(9)
                                                                              for n, i in enumerate('abcd' * 2)),
                 items__csv='item_id,name\n' + ''.join(f'{i},tea {i}\n' for i in 'abcd'), **more)


def test_made_once_and_again_when_the_source_changes(root, capsys):
    folder = own(root)
    args = data.parse_args(['toy', '--from', str(folder)])
    data.main(args)
    made = root / 'data' / 'toy' / 'interactions.csv.gz'
    assert '           9  users\n' in capsys.readouterr().out
    time = made.stat().st_mtime_ns
    data.main(args)
    assert made.stat().st_mtime_ns == time and 'canonical files are up to date' in capsys.readouterr().out
    with open(folder / 'items.csv', 'a') as f:
        f.write('e,cold\n')
    assert data.prepare('toy', [None] * 3).cold_ids == [], 'without --from it is what it was'
    data.main(args)
    assert made.stat().st_mtime_ns > time and data.load('toy').cold_ids == ['e'], 'items that nobody has stay'
    before = made.read_bytes()
    (folder / 'items.csv').write_text('item_id,name\na\nb\n')
    with pytest.raises(UserError, match='items.csv: line 2 is no'):
        data.main(args)
    assert made.read_bytes() == before and {p.name for p in made.parent.iterdir()} == {
        '.lock', 'interactions.csv.gz', 'items.jsonl.gz', 'prepared.npz', 'source.json'}, 'whole, both or none'
    assert data.load('toy').cold_ids == ['e']


def test_killed_between_the_two_files_leaves_no_pair_of_old_and_new(root, monkeypatch):
    folder = own(root)
    args = data.parse_args(['toy', '--from', str(folder)])
    data.main(args)
    (folder / 'items.csv').write_text('item_id,name\n' + ''.join(f'{i},salt {i}\n' for i in 'abcd'))
    real = type(folder).replace

    def killed(path, target):
        if target.name == 'interactions.csv.gz':
            raise KeyboardInterrupt
        return real(path, target)
    monkeypatch.setattr(type(folder), 'replace', killed)
    with pytest.raises(KeyboardInterrupt):
        data.main(args)
    monkeypatch.undo()
    monkeypatch.setenv('ELEPHANT_DATA', str(root / 'data'))
    with pytest.raises(UserError, match='must hold one of interactions.csv'):
        data.prepare('toy', [None] * 3)
    data.main(args)
    assert data.load('toy').title(1) == 'salt a'


@pytest.mark.parametrize('name', ['interactions.csv', 'items.jsonl.gz'])
def test_files_of_the_user_are_never_overwritten(root, name):
    folder, mine = own(root), root / 'data' / 'toy' / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b'of the user')
    with pytest.raises(UserError, match='was not made by --from: choose another name'):
        converted(root, '--from', folder)
    assert [p.name for p in mine.parent.iterdir()] == [name] and mine.read_bytes() == b'of the user'


def test_names_of_the_papers_datasets_are_kept_for_them(root):
    with pytest.raises(UserError, match="pantry: is the paper's"):
        data.main(data.parse_args(['pantry', '--from', str(own(root))]))


@pytest.mark.parametrize('files, message', [
    ({}, 'holds not one pair of files of a known form .data/README.md., but none; name one: --from'),
    ({'u__item': '1|x'}, 'but none; name one'), ({'x__inter': 'a', 'y__item': 'b'}, 'but none; name one'),
    ({'u__data': '', 'u__item': '', 'a__inter': '', 'a__item': ''}, 'but a.inter a.item, u.data u.item; name one'),
    ({'a__inter': 'user_id:token\titem_id:token\n1\t2\n', 'a__item': ''}, 'a.inter: has no column .timestamp, .*, but user_id, item_id; with --from'),
    ({'interactions__csv': 'user,item,time\na,b,1\n', 'items__csv': 'item,name,name\na,b,c\n'}, 'items.csv: two of its columns have one name: item, name, name$'),
    ({'interactions__csv': 'user,item,time,,\na,b,1,,\n', 'items__csv': 'item\na'}, 'two of its columns have one name'),
    ({'interactions__csv': 'user,item,time\na,b,1\n', 'items__csv': 'name,brand\n'}, 'has no column .item, .*id., but name, brand; with --from .* --columns id='),
    ({'interactions__csv': 'user,item,time\na,b,soon\n', 'items__csv': 'item\na'}, "line 2 is no record with .* a time .*'soon'.*1 of 2 lines"),
    ({'interactions__csv': 'user,item,time\n"a,b,1\n', 'items__csv': 'item\na'}, 'interactions.csv: line 2 is not CSV'),
    ({'interactions__csv': 'user,item,time\n"a"x,b,1\n', 'items__csv': 'item\na'}, 'interactions.csv: line 2 is not CSV'),
    ({'interactions__csv': 'user,item,time\na,b,c,1\n', 'items__csv': 'item\na'}, 'line 2 is no record with a user'),
    ({'interactions__csv': '196,242,881250949\n', 'items__csv': 'item\na'}, 'has no column .user, .*but 196, 242, 881250949; with --from'),
    ({'interactions__tsv': 'user\titem\ttime\tname\nu\ti\t1\t"Heroes\nv\ti\t2\tx\nw\ti\t3\tSingle 12"\n', 'items__tsv': 'item\na'},
     'interactions.tsv: line 4 is not CSV .a cell holds rows.: .* rename it to .txt, for --from$'),
    ({'interactions__csv': 'user,item,time\n', 'items__csv': 'item,title\na,x\n'}, 'interactions.csv: no rows'),
], ids=range(15))
def test_what_is_not_understood_is_said_in_one_line(root, files, message):
    with pytest.raises(UserError, match=message):
        converted(root, '--from', write(root / 'x', **files))
    assert {path.name for path in (root / 'data' / 'toy').glob('*')} <= {'.lock'}, 'nothing is written'


@pytest.mark.parametrize('options, message', [(['--columns', 'user'], 'invalid user=..,item=..,time=..,id=..,text=..+.. value'),
                                              (['--columns', 'usr=a'], 'invalid user=..,item=..,time=..,id=..,text=..+.. value')])
def test_columns_are_checked(options, message, capsys):
    with pytest.raises(SystemExit):
        data.parse_args(['toy', '--from', 'x', *options])
    assert message in capsys.readouterr().err


def test_options_of_from_alone(root):
    with pytest.raises(UserError, match='--items and --columns go with --from'):
        data.main(data.parse_args(['toy', '--items', 'x']))


def test_damaged_files(root):
    folder = own(root)
    (folder / 'items.csv').unlink()
    write(folder, items__csv__gz='item_id,name\n' + 'a,tea\n' * 99)
    path = folder / 'items.csv.gz'
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match='items.csv.gz: is damaged'):
        converted(root, '--from', folder)


@pytest.mark.parametrize('name, text', [('a.csv', 'user,item\nu,a\n'), ('a.jsonl', '{"id": "a"}\n{"id": "b"}\n')])
def test_sigterm_while_a_file_is_closed_after_its_last_line(tmp_path, monkeypatch, name, text):
    """It ends the process: no generator is left to clean up on its own, where Python would drop it."""
    (tmp_path / name).write_text(text)

    @contextlib.contextmanager
    def closing(path):
        with open(path, 'rb') as f:
            try:
                yield f
            finally:
                signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(sources, 'unpacked', closing)
    before = signal.signal(signal.SIGTERM, files.stop)
    try:
        with pytest.raises(SystemExit) as left:
            list(sources.table(tmp_path / name, 0)[1])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
