"""Outside files -> rows and texts: the canonical two files, and Amazon 2018 -> canonical.

Amazon: ratings `<Category>.csv` (item,user,rating,timestamp; no header), `meta_<Category>.json.gz`
(one object a line), from data/raw/ or downloaded into it. Conversion streams: memory is bounded by
the users and items kept.
"""
import contextlib
import csv
import errno
import gzip
import hashlib
import html
import http.client
import io
import json
import os
import re
import sys
import urllib.error
import urllib.request
import zlib
from array import array
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.files import UserError, data_root, load_json, lock, save_json, sha256, whole

# dataset -> (category, sha256 of its ratings file where known)
AMAZON = {
    'pantry': ('Prime_Pantry',
               'ed55b1f239c4ec3402fdd15a603a4b84210177678c36c01db59487a8fddf685c'),
    'instruments': ('Musical_Instruments',
                    '8933b17434e4984bcce8cf4ec43d847e0af6aa6d46add28bbb37b80e06da1b06'),
    'arts': ('Arts_Crafts_and_Sewing',
             'ab42ec44840c130b8bcb1993bad37021b5ff98f3aae55a120c2a0d0624be3be5'),
    'movies': ('Movies_and_TV',
               'c7a6ca7769a34fd0d335e1cd25e359c18a8fcd474515f8b62986297e35b5fc4f'),
    'sports': ('Sports_and_Outdoors',
               'da8d746f1602d5ff01d4056c8f55b228996a30d40069b658d71388b0bf3df5d6'),
    'clothing': ('Clothing_Shoes_and_Jewelry',
                 '8b78d8a965e2351468deeebe99edb6118561711be4d5b6294e24e25f910c4d3d'),
    'books': ('Books',
              '2ff13d9763d38118851d8f8a4ab530f958e08ad48aa764c2d9bbe16ec227a3b8'),
    'industrial': ('Industrial_and_Scientific', None),
    'office': ('Office_Products', None),
}
# The data has moved before; ELEPHANT_AMAZON_URL names another mirror.
HOSTS = ('https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/',
         'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/',
         'https://jmcauley.ucsd.edu/data/amazon_v2/')
MOST_MALFORMED = 0.01  # share of lines; above it the file is not what it should be
LONGEST_TEXT = 2000    # characters kept of an attribute: far more than its 32 tokens need
SLOTS = 2 ** 24        # of the tables that count users and items in bounded memory
HEADER = ['user', 'item', 'timestamp']
DAMAGED = EOFError, gzip.BadGzipFile, zlib.error


def open_text(path, errors='strict'):
    """A text file, plain or .gz, without a byte-order mark; line ends as they are."""
    opener = gzip.open if path.suffix == '.gz' else open
    return opener(path, 'rt', encoding='utf-8-sig', errors=errors, newline='')


# ------------------------------------------------------------------------ the canonical files

def canonical_file(folder, stem):
    """The file `stem` or `stem`.gz; UserError where neither or both are there."""
    found = [path for path in (folder / stem, folder / f'{stem}.gz') if path.exists()]
    if not found:
        raise UserError(f'{folder / stem}: no such file (nor .gz); '
                        'data/README.md says what it must hold')
    if len(found) == 2:
        raise UserError(f'{folder}: has both {stem} and {stem}.gz; remove one')
    return found[0]


def lines(path):
    """(number, text) of each line, 1-based, its end kept; UserError: damaged, or not UTF-8."""
    number = 0
    try:
        with open_text(path) as f:
            for number, line in enumerate(f, 1):
                yield number, line
    except DAMAGED as error:
        raise UserError(f'{path}: damaged after line {number} ({error}); get it again') from None
    except UnicodeDecodeError:
        raise UserError(f'{path}: line {number + 1} is not UTF-8 text; convert the file') from None


def read_items(path):
    """{id: [(name, value), ...]} from items.jsonl: one object a line, `id` and text attributes in
    reading order."""
    found = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f'{path}: line {number}'
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f'{where} is not a JSON object') from None
        key = item.pop('id', None) if isinstance(item, dict) else None
        if not isinstance(key, (str, int)) or not str(key).strip():
            raise UserError(f'{where} is not an object with an "id"')
        key = str(key).strip()
        if key in found:
            raise UserError(f'{where} repeats the id {key}')
        try:
            found[key] = [(as_text(name, where), as_text(value, f'{where}: {name}'))
                          for name, value in item.items()]
        except RecursionError:
            raise UserError(f'{where} holds lists of lists too deep to be a text') from None
    if not found:
        raise UserError(f'{path}: holds no items')
    return found


def as_text(value, where):
    """An attribute's value as one text. UserError: it is an object."""
    if value is None or value != value:  # JSON's NaN is a missing value, not a word
        return ''
    if isinstance(value, list):
        return ' '.join(as_text(v, where) for v in value)[:LONGEST_TEXT]
    if isinstance(value, dict):
        raise UserError(f'{where} is an object; attributes are texts, numbers or lists of them')
    # a lone surrogate cannot be tokenized
    return str(value)[:LONGEST_TEXT].encode('utf-8', 'replace').decode()


def read_interactions(path, known):
    """Users, items, times of the rows whose item is known (int32, int32, int64 arrays), the ids of
    users and of items (lists), how many rows have an unknown item."""
    rows = csv.reader((line for _, line in lines(path)), strict=True)
    users, items, unknown = {}, {}, 0
    user_column, item_column, time_column = array('i'), array('i'), array('q')  # 16 bytes a row
    try:
        header = next(rows, [])
        if [cell.strip().lower() for cell in header] != HEADER:
            empty = '' if rows.line_num else '; the file is empty'
            raise UserError(f'{path}: line 1 must be {",".join(HEADER)}{empty}')
        for row in rows:
            if not row:
                continue
            user, item, time = parsed_row(row, path, rows.line_num)
            if item not in known:
                unknown += 1
                continue
            user_column.append(users.setdefault(user, len(users)))
            item_column.append(items.setdefault(item, len(items)))
            time_column.append(time)
    except csv.Error as error:
        raise UserError(f'{path}: line {rows.line_num} is not CSV ({error})') from None
    if not time_column:
        raise UserError(f'{path}: no interaction with an item of items.jsonl '
                        f'({unknown} rows with unknown items)')
    return (np.array(user_column, np.int32), np.array(item_column, np.int32),
            np.array(time_column, np.int64), list(users), list(items), unknown)


def parsed_row(row, path, number):
    """(user, item, seconds) of one row of interactions.csv; UserError names the line."""
    if len(row) != 3:
        raise UserError(f'{path}: line {number} has {len(row)} columns, not 3 ({",".join(HEADER)})')
    user, item, stamp = (cell.strip(' \t\r\n') for cell in row)
    if not user or not item:
        raise UserError(f'{path}: line {number} has an empty user or item')
    try:
        time = int(stamp) if stamp.isdecimal() else int(float(stamp))
        if not 0 <= time < 2 ** 62 or float(stamp) != time:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f'{path}: line {number}: timestamp {stamp[:40]!r} is not a whole number '
                        'from 0 up') from None
    return user, item, time


# ------------------------------------------------------------------------ getting the Amazon files

def download(url, path, expected=None):
    """Fetch `url` to `path`, going on from an earlier partial download; UserError where it breaks
    off or its hash differs."""
    part = path.with_name(path.name + '.part')
    have = part.stat().st_size if part.exists() else 0
    headers = {'Range': f'bytes={have}-'} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        if error.headers.get('Content-Range') == f'bytes */{have}':
            return keep(part, path, url, expected)  # stopped after the last byte, not yet renamed
        part.unlink()  # longer than the file: not a part of it
        raise
    with answer:
        if url.startswith('https://') and not answer.url.startswith('https://'):
            raise UserError(f'{url}: leads to {answer.url}; only https')
        if answer.status != 206:  # the server sends everything again
            have = 0
        left = answer.length
        total = have + left if left else None
        with open(part, 'ab' if have else 'wb') as f, tqdm(
                total=total, initial=have, unit='B', unit_scale=True, desc=path.name) as bar:
            while chunk := answer.read(2 ** 20):
                f.write(chunk)
                bar.update(len(chunk))
    if total and part.stat().st_size < total:
        raise UserError(f'{url}: the download broke off; run the same command again to go on '
                        f'from {part}')
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
    except DAMAGED as error:
        raise UserError(f'{path}: is damaged ({error}); remove it and run again') from None


def fetch(name, remote, path, expected):
    """Download `remote` from the first host that has it; UserError says what to put where."""
    mirror = os.environ.get('ELEPHANT_AMAZON_URL')
    for host in (mirror.rstrip('/') + '/',) if mirror else HOSTS:
        if not host.startswith(('https://', 'http://127.0.0.1:')):
            raise UserError(f'ELEPHANT_AMAZON_URL {host}: only https')
        try:
            return download(host + remote, path, expected)
        except (OSError, http.client.HTTPException) as error:
            here = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES
            if getattr(error, 'errno', None) in here:
                raise  # of this machine: another host would not help
            print(f'{host + remote}: {error}', file=sys.stderr)
    category = AMAZON[name][0]
    raise UserError(f'{name} could not be downloaded: put {category}.csv and '
                    f'meta_{category}.json.gz (Amazon 2018, ratings only and metadata) into '
                    f'{path.parent}, or run drugstore, which needs neither')


def raw_file(name, remote, expected=None):
    """data/raw/<file name>, downloaded where it is not there. Errors: UserError."""
    path = data_root() / 'raw' / Path(remote).name
    path.parent.mkdir(parents=True, exist_ok=True)
    expected = None if 'ELEPHANT_ANY_VERSION' in os.environ else expected
    packed = path.with_name(path.name + '.gz')
    if path.suffix == '.csv' and not path.exists() and packed.exists():
        path = packed
        check_gzip(path)
    if not path.exists():
        fetch(name, remote, path, expected)
    if expected and content_sha256(path) != expected:
        raise UserError(f'{path}: its sha256 is not that of the version the paper used; remove it '
                        'to download that one, or go on with this one: --any-version, or '
                        'ELEPHANT_ANY_VERSION=1 for a whole chain')
    return path


# ------------------------------------------------------------------------ Amazon -> canonical

class Malformed:
    """Counts lines that cannot be read; says so at the end, and refuses a file of which more than
    1 % cannot."""

    def __init__(self, path):
        self.path, self.lines, self.bad, self.first = path, 0, 0, None

    def note(self, number):
        self.bad += 1
        self.first = self.first or number

    def close(self):
        if self.bad > MOST_MALFORMED * self.lines:
            raise UserError(f'{self.path}: {self.bad:,} of {self.lines:,} lines cannot be read, the '
                            f'first is line {self.first}; is it the right file?')
        if self.bad:
            print(f'  {self.path.name}: {self.bad:,} malformed lines skipped, '
                  f'the first is line {self.first}')


def ratings(path, quiet=False):
    """(user, item, timestamp text) of each well-formed line item,user,rating,timestamp."""
    bad = Malformed(path)
    with open_text(path, 'replace') as f:
        bar = tqdm(f, unit='line', unit_scale=True, desc=path.name, leave=False)
        for number, line in enumerate(bar, 1):
            bad.lines = number
            cells = line.strip().split(',')
            if len(cells) != 4 or not cells[0] or not cells[1] or not cells[3].isdecimal():
                bad.note(number)
                continue
            yield cells[1], cells[0], cells[3]
    if not quiet:
        bad.close()


def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def clean(value):
    """One line of text without HTML entities and tags; '' for what is no text."""
    if not isinstance(value, str):
        return ''
    text = html.unescape(value).encode('utf-8', 'replace').decode()  # no lone surrogates
    return ' '.join(re.sub(r'<[^<>]*>', ' ', text).split())


def attributes(product):
    """{'id', title, brand, category} of a metadata object. A title that is JavaScript is blanked
    (a fault of the source)."""
    title = product.get('title')
    if isinstance(title, str) and ('getTime' in title or '<span id' in title):
        title = ''
    category = product.get('category') or []
    category = category if isinstance(category, list) else [category]
    words = [clean(part) for part in category if isinstance(part, str)]
    return {'id': product['asin'], 'title': clean(title), 'brand': clean(product.get('brand')),
            'category': ' '.join(words)}


def canonical_from_amazon(name, folder, min_user, min_item):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz from the raw files, where they were
    not made from these. The exact filters are common/data.py's."""
    category, expected = AMAZON[name]
    targets = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    plain = [target.with_suffix('') for target in targets]
    foreign = any(target.exists() for target in targets) and not source.exists()
    if foreign or any(path.exists() for path in plain):
        print(f'{folder}: canonical files that were not made here are used as they are')
        return
    ratings_file = raw_file(name, f'categoryFilesSmall/{category}.csv', expected)
    metadata = raw_file(name, f'metaFiles2/meta_{category}.json.gz')
    identity = {'ratings': sha256(ratings_file), 'metadata': sha256(metadata),
                'min_user': min_user, 'min_item': min_item}
    if source.exists() and all(t.exists() for t in targets) and load_json(source) == identity:
        return
    with lock(folder):
        save_json(source, {'unfinished': identity})  # what lies here was made here, if killed now
        wanted = write_interactions(ratings_file, targets[0], min_user, min_item)
        write_items(metadata, targets[1], wanted)
        save_json(source, identity)


def write_interactions(path, target, min_user, min_item):
    """interactions.csv.gz of the ratings; returns the set of its items. Rows are dropped only where
    they can never pass the filters: users and items are counted in tables whose slots several may
    share, so a count is never too low."""
    users, items, wanted = np.zeros(SLOTS, np.uint8), np.zeros(SLOTS, np.uint8), set()
    for user, item, _ in ratings(path):
        for table, key in ((users, slot(user)), (items, slot(item))):
            table[key] += table[key] < 255
    least_user, least_item = min(min_user, 255), min(min_item, 255)
    with whole(target) as part, gzip_writer(part) as f:
        f.write(','.join(HEADER) + '\n')
        for user, item, stamp in ratings(path, quiet=True):
            if users[slot(user)] >= least_user and items[slot(item)] >= least_item:
                wanted.add(item)
                f.write(f'{user},{item},{stamp}\n')
        if not wanted:
            raise UserError(f'{path}: no user has {min_user} ratings of items with {min_item}; '
                            'is it the right file?')
    return wanted


def write_items(metadata, target, wanted):
    """items.jsonl.gz of the wanted ids: the first line of each id counts."""
    bad, number = Malformed(metadata), 0
    try:
        with whole(target) as part, gzip_writer(part) as f, open_text(metadata, 'replace') as given:
            bar = tqdm(given, unit='line', unit_scale=True, desc=metadata.name, leave=False)
            for number, line in enumerate(bar, 1):
                bad.lines = number
                try:
                    product = json.loads(line)
                    key = product['asin']
                    if not isinstance(key, str):
                        raise ValueError
                except (ValueError, KeyError, TypeError, RecursionError):
                    bad.note(number)
                    continue
                if key in wanted:
                    wanted.remove(key)
                    f.write(json.dumps(attributes(product), ensure_ascii=False) + '\n')
            bad.close()
    except DAMAGED as error:
        raise UserError(f'{metadata}: is damaged after line {number:,} ({error}); '
                        'remove it and run again') from None
    if wanted:
        print(f'  {len(wanted):,} rated items have no metadata; their interactions are dropped')


@contextlib.contextmanager
def gzip_writer(path):
    """Text writer whose bytes depend on the text alone (no time, no name in the header)."""
    with open(path, 'wb') as raw, gzip.GzipFile('', 'wb', 6, raw, mtime=0) as packed:
        with io.TextIOWrapper(packed, encoding='utf-8', newline='\n') as f:
            yield f
