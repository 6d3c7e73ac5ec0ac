"""Amazon's files with every quirk, from data/raw/ and from a local web server; MiniLM's checks. Run: python -m pytest tests/test_sources.py"""
import functools
import gzip
import http.server
import json
import threading

import pytest

from common import data, sources
from common.files import UserError
from tests.toy import amazon


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path))
    monkeypatch.setenv('ELEPHANT_ANY_VERSION', '1')
    return tmp_path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves ranges; the first answer for a ratings file breaks off half-way."""
    broken = set()

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.translate_path(self.path)
        try:
            body = open(path, 'rb').read()
        except OSError:
            return self.send_error(404)
        begin = int(self.headers['Range'][6:-1]) if 'Range' in self.headers else 0
        if begin >= len(body) > 0:
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(body)}')
            return self.end_headers()
        self.send_response(206 if begin else 200)
        self.send_header('Content-Length', str(len(body) - begin))
        self.end_headers()
        if path.endswith('.csv') and path not in self.broken:
            self.broken.add(path)
            self.wfile.write(body[:len(body) // 2])
            return
        self.wfile.write(body[begin:])


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp('server')
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', f'http://127.0.0.1:{httpd.server_port}')
    yield folder
    httpd.shutdown()


def check_quirks(d, root):
    texts = dict(zip(d.item_ids, d.attributes))
    assert texts['A0001'] == [('title', ''), ('brand', ''), ('category', '')], 'missing keys'
    assert texts['A0002'][0] == ('title', 'Tea & Coffee') and texts['A0002'][1] == ('brand', ''), 'entities, tags, null'
    assert texts['A0003'][:2] == [('title', ''), ('brand', 'Z')], 'a title that is JavaScript; the item stays'
    assert texts['A0004'][0][1] != 'second line of the same id' and texts['A0005'][2] == ('category', 'Sea Salt')
    assert 'C0000' not in texts and 'B9999' not in texts and 'short' not in d.user_ids
    assert d.counts['rows_unknown_item'] == 2 and d.counts['rows_repeated'] == 1 and 0.3 < d.counts['tied_neighbours'] < 0.7


def test_quirks_from_raw_files(root):
    amazon(root / 'raw', 'Prime_Pantry')
    check_quirks(data.prepare('pantry', data.DEFAULT), root)
    made = (root / 'pantry' / 'interactions.csv.gz').read_bytes()
    assert b'short' not in gzip.decompress(made), 'users that can never pass are dropped while streaming'
    source = (root / 'pantry' / 'source.json').stat().st_mtime_ns
    data.prepare('pantry', data.DEFAULT)
    assert (root / 'pantry' / 'source.json').stat().st_mtime_ns == source, 'made once'
    amazon(root / 'raw', 'Prime_Pantry', users=70)
    assert data.prepare('pantry', data.DEFAULT).n_users == 70, 'made again when a raw file changes'


def test_download_goes_on_where_it_broke_off(root, server):
    amazon(server / 'all', 'Prime_Pantry')
    for folder, file in (('categoryFilesSmall', 'Prime_Pantry.csv'), ('metaFiles2', 'meta_Prime_Pantry.json.gz')):
        (server / folder).mkdir()
        (server / 'all' / file).rename(server / folder / file)
    with pytest.raises(UserError, match='broke off; run the same command again'):
        data.prepare('pantry', data.DEFAULT)
    assert not (root / 'raw' / 'Prime_Pantry.csv').exists() and (root / 'raw' / 'Prime_Pantry.csv.part').stat().st_size
    check_quirks(data.prepare('pantry', data.DEFAULT), root)


def test_wrong_hash_and_no_server(root, server, monkeypatch):
    amazon(server / 'categoryFilesSmall', 'Prime_Pantry')
    Handler.broken.add(str(server / 'categoryFilesSmall' / 'Prime_Pantry.csv'))
    monkeypatch.delenv('ELEPHANT_ANY_VERSION')
    with pytest.raises(UserError, match='sha256 is not the known one'):
        data.prepare('pantry', data.DEFAULT)
    assert not list((root / 'raw').glob('Prime*')), 'nothing is kept'
    with pytest.raises(UserError, match='Arts_Crafts_and_Sewing.csv and meta_Arts_Crafts_and_Sewing.json.gz.*grocery'):
        data.prepare('arts', data.DEFAULT)
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', 'http://example.org')
    with pytest.raises(UserError, match='only https'):
        data.prepare('arts', data.DEFAULT)
    amazon(root / 'raw', 'Prime_Pantry')
    with pytest.raises(UserError, match='Prime_Pantry.csv: its sha256 is not that of the version the paper used'):
        data.prepare('pantry', data.DEFAULT)


def test_damaged_raw_files(root):
    amazon(root / 'raw', 'Prime_Pantry')
    meta, csv = root / 'raw' / 'meta_Prime_Pantry.json.gz', root / 'raw' / 'Prime_Pantry.csv'
    good_meta, good_csv = meta.read_bytes(), csv.read_text()
    meta.write_bytes(good_meta[:-30])
    with pytest.raises(UserError, match='meta_Prime_Pantry.json.gz: is damaged'):
        data.prepare('pantry', data.DEFAULT)
    meta.write_bytes(good_meta)
    csv.write_text(good_csv + 'only,three,columns\n' * 100)
    with pytest.raises(UserError, match='lines cannot be read, the first is line'):
        data.prepare('pantry', data.DEFAULT)
    assert not (root / 'pantry' / 'items.jsonl.gz').exists() and not (root / 'pantry' / 'prepared.npz').exists()
    csv.write_text(good_csv + 'only,three,columns\n')
    assert data.prepare('pantry', data.DEFAULT).n_users == 60, 'one bad line of hundreds is skipped and counted'


def test_canonical_files_of_the_user_are_never_overwritten(root):
    amazon(root / 'raw', 'Prime_Pantry')
    folder = root / 'pantry'
    folder.mkdir()
    (folder / 'interactions.csv').write_text('user,item,timestamp\n' + ''.join(f'u{u},{i},{k}\n' for u in range(9) for k, i in enumerate('abcd')))
    (folder / 'items.jsonl').write_text('\n'.join(json.dumps({'id': i}) for i in 'abcd'))
    rows = (folder / 'interactions.csv').read_text()
    with pytest.raises(UserError, match='nothing to evaluate'):  # d is nobody's training item
        data.prepare('pantry', data.DEFAULT)
    assert (folder / 'interactions.csv').read_text() == rows and not (folder / 'interactions.csv.gz').exists()


def test_minilm_is_checked_whatever_its_origin(root, monkeypatch):
    def fetch(new, _):
        (new / 'model.safetensors').write_bytes(b'something else')
    fetch.__name__ = 'minilm_from_test'
    monkeypatch.setattr(sources, 'minilm_from_hub', fetch)
    with pytest.raises(UserError, match='another sha256'):
        sources.fetch_plm('minilm')
    assert not (root / 'plm' / 'minilm').exists() and [p.name for p in (root / 'plm').iterdir()] == ['.lock']
    (root / 'plm' / 'minilm').mkdir()
    with pytest.raises(UserError, match='remove'):
        sources.fetch_plm('minilm')
    (root / 'empty').mkdir()
    with pytest.raises(UserError, match='no config.json'):
        sources.fetch_plm(str(root / 'empty'))


def test_download_stopped_after_its_last_byte_and_a_part_of_something_else(root, server, monkeypatch):
    amazon(server / 'categoryFilesSmall', 'Prime_Pantry')
    csv = server / 'categoryFilesSmall' / 'Prime_Pantry.csv'
    Handler.broken.add(str(csv))
    monkeypatch.setattr(sources, 'HOSTS', ())
    part = root / 'raw' / 'Prime_Pantry.csv.part'
    part.parent.mkdir()
    part.write_bytes(csv.read_bytes())
    assert sources.raw_file('pantry', 'categoryFilesSmall/Prime_Pantry.csv').read_bytes() == csv.read_bytes()
    (root / 'raw' / 'Prime_Pantry.csv').unlink()
    part.write_bytes(csv.read_bytes() + b'more')
    with pytest.raises(UserError, match='could not be downloaded'):
        sources.raw_file('pantry', 'categoryFilesSmall/Prime_Pantry.csv')
    assert not part.exists()
    assert sources.raw_file('pantry', 'categoryFilesSmall/Prime_Pantry.csv').read_bytes() == csv.read_bytes()


def test_gzipped_ratings_odd_texts_and_large_thresholds(root):
    amazon(root / 'raw', 'Prime_Pantry')
    csv, meta = root / 'raw' / 'Prime_Pantry.csv', root / 'raw' / 'meta_Prime_Pantry.json.gz'
    with gzip.open(meta, 'at') as f:
        f.write('{"asin": "L0001", "title": "x\\ud800y"}\n')  # half of a surrogate pair
    rows = csv.read_text() + ''.join(f'L0001,long,5.0,{k}\n' for k in range(300))
    (root / 'raw' / 'Prime_Pantry.csv.gz').write_bytes(gzip.compress(rows.encode()))
    csv.unlink()
    d = data.prepare('pantry', data.DEFAULT)
    assert 'long' in d.user_ids and d.attributes[d.item_ids.index('L0001')][0] == ('title', 'x?y')
    assert data.prepare('pantry', (290, 1, 0)).user_ids == ['long'], 'a threshold above what the table counts to'
    (root / 'raw' / 'Prime_Pantry.csv.gz').write_bytes(gzip.compress(rows.encode())[:-50])
    with pytest.raises(UserError, match='Prime_Pantry.csv.gz: is damaged'):
        data.prepare('pantry', data.DEFAULT)
    (root / 'raw' / 'Prime_Pantry.csv.gz').unlink()
    csv.write_text('')
    with pytest.raises(UserError, match='Prime_Pantry.csv: no user has 4 ratings'):
        data.prepare('pantry', data.DEFAULT)
