"""Outside files -> rows and texts: the canonical two files, and Amazon 2018 -> canonical.

Amazon: ratings `<Category>.csv` (item,user,rating,timestamp; no header), `meta_<Category>.json.gz`
(one object a line), from data/raw/ or downloaded into it. Conversion streams: memory is bounded by
the users and items kept.
"""
import contextlib
import csv
import errno
import gzip
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

import numpy as np

from common.files import UserError, content_sha256, data_root, load_json, lock, save_json, whole
from common.progress import progress

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
HOSTS = ('https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/ '
         'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/ '
         'https://jmcauley.ucsd.edu/data/amazon_v2/')
MOST_MALFORMED = 0.01  # share of lines; above it the file is not what it should be
LONGEST_TEXT = 2000    # characters kept of an attribute: far more than its 32 tokens need
SLOTS = 2 ** 24        # of the tables that count users and items in bounded memory
HEADER = ['user', 'item', 'timestamp']


# ------------------------------------------------------------------------ reading lines

def lines(path, errors='strict'):
    """(number, text) of each line of a text file or .gz, 1-based, its end kept; without a byte-order
    mark. UserError: damaged, or not UTF-8."""
    number, opener = 0, gzip.open if path.suffix == '.gz' else open
    try:
        with opener(path, 'rt', encoding='utf-8-sig', errors=errors, newline='') as f:
            for number, line in enumerate(f, 1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{path}: damaged after line {number} ({error}); get it again') from None
    except UnicodeDecodeError:
        raise UserError(f'{path}: line {number + 1} is not UTF-8 text; convert the file') from None


def records(path, parse, quiet=False):
    """parse(line) of each line of a file from elsewhere. Lines for which it raises ValueError are
    skipped and counted; more than 1 % of them is an error."""
    number = bad = first = 0
    bar = progress(lines(path, 'replace'), unit='line', unit_scale=True, desc=path.name)
    for number, line in bar:
        try:
            yield parse(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            first = first or number
            bad += 1
    if bad > MOST_MALFORMED * number:
        raise UserError(f'{path}: {bad:,} of {number:,} lines cannot be read, the first is line '
                        f'{first}; is it the right file?')
    if bad and not quiet:
        print(f'  {path.name}: {bad:,} malformed lines skipped, the first is line {first}')


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
            key = item.pop('id')
            if not isinstance(key, (str, int)) or not str(key).strip():
                raise KeyError
            key = str(key).strip(' \t')
            pairs = [(as_text(name), as_text(value)) for name, value in item.items()]
        except (KeyError, AttributeError, TypeError):
            raise UserError(f'{where} is not an object with an "id" and texts, numbers or lists of '
                            'them') from None
        except (ValueError, RecursionError):
            raise UserError(f'{where} is not a JSON object') from None
        if key in found:
            raise UserError(f'{where} repeats the id {key}')
        found[key] = pairs
    if not found:
        raise UserError(f'{path}: holds no items')
    return found


def as_text(value):
    """An attribute's value as one text; TypeError for an object."""
    if isinstance(value, dict):
        raise TypeError
    if isinstance(value, list):
        return ' '.join(map(as_text, value))[:LONGEST_TEXT]
    if value is None or value != value:  # JSON's NaN is a missing value, not a word
        return ''
    return storable(str(value)[:LONGEST_TEXT])


def storable(text):
    """A text without lone surrogates, which can be neither tokenized nor written."""
    return text.encode('utf-8', 'replace').decode()


def read_interactions(path, known):
    """Users, items, times of the rows whose item is known (int32, int32, int64 arrays), the ids of
    users and of items (lists), how many rows have an unknown item."""
    rows = csv.reader((line for _, line in lines(path)), strict=True)
    users, items, unknown = {}, {}, 0
    user_column, item_column, time_column = array('i'), array('i'), array('q')  # 16 bytes a row
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        if header != HEADER:
            empty = '' if rows.line_num else '; the file is empty'
            raise UserError(f'{path}: line 1 must be {",".join(HEADER)}{empty}')
        for row in filter(None, rows):
            user, item, time = parsed_row(row, f'{path}: line {rows.line_num}')
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
    columns = [np.array(column) for column in (user_column, item_column, time_column)]
    return *columns, list(users), list(items), unknown


def parsed_row(row, where):
    """(user, item, seconds) of one row of interactions.csv; UserError says where and what."""
    if len(row) != 3:
        raise UserError(f'{where} has {len(row)} columns, not 3 ({",".join(HEADER)})')
    user, item, stamp = (cell.strip(' \t') for cell in row)
    if not user or not item:
        raise UserError(f'{where} has an empty user or item')
    try:
        time = int(stamp) if stamp.isdecimal() else int(float(stamp))
        if not 0 <= time < 2 ** 62 or float(stamp) != time:
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f'{where}: timestamp {stamp[:40]!r} is not a whole number from 0 up') from None
    return user, item, time


# ------------------------------------------------------------------------ getting the Amazon files

def download(url, path):
    """Fetch `url` to `path`, going on where an earlier download broke off."""
    have = path.stat().st_size if path.exists() else 0
    headers = {'Range': f'bytes={have}-'} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send, or the part is not of this file
            if error.headers.get('Content-Range') == f'bytes */{have}':
                return
            path.unlink()
        raise
    with answer:
        if answer.url.startswith('http:') and url.startswith('https:'):
            raise UserError(f'{url}: leads to {answer.url}; only https')
        have = have if answer.status == 206 else 0  # else the server sends everything again
        total = have + answer.length if answer.length else None
        with open(path, 'ab' if have else 'wb') as f, progress(
                total=total, initial=have, unit='B', unit_scale=True, desc=path.name) as bar:
            while chunk := answer.read(2 ** 20):
                bar.update(f.write(chunk))
    if total and path.stat().st_size < total:
        raise UserError(f'{url}: the download broke off; run the same command again to go on '
                        f'from {path}')


def check(path, expected):
    """UserError where a file is no whole .gz, or its content has another sha256 than expected."""
    found = content_sha256(path) if expected or path.suffix == '.gz' else None
    if expected and found != expected:
        raise UserError(f'{path}: its sha256 is not that of the version the paper used; remove it '
                        'to download that one, or go on with this one: --any-version, or '
                        'ELEPHANT_ANY_VERSION=1 for a whole chain')


def raw_file(name, remote, expected=None):
    """data/raw/<file name>, downloaded from the first host that has it where it is not there.
    Errors: UserError, which says what to put where."""
    path = data_root() / 'raw' / remote.split('/')[-1]
    packed = path.with_name(path.name + '.gz')
    path = packed if packed.exists() else path
    expected = None if 'ELEPHANT_ANY_VERSION' in os.environ else expected
    if path.exists():
        check(path, expected)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name('part-' + path.name)
    for host in os.environ.get('ELEPHANT_AMAZON_URL', HOSTS).split():
        url = f'{host.rstrip("/")}/{remote}'
        if not host.startswith(('https://', 'http://127.0.0.1:')):
            raise UserError(f'ELEPHANT_AMAZON_URL {host}: only https')
        try:
            download(url, part)
            check(part, expected)
            part.replace(path)
            return path
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise  # of this machine: another host would not help
            print(f'{url}: {error}', file=sys.stderr)
    category = AMAZON[name][0]
    raise UserError(f'{name} could not be downloaded: put {category}.csv and '
                    f'meta_{category}.json.gz (Amazon 2018, ratings only and metadata) into '
                    f'{path.parent}, or run drugstore, which needs neither')


# ------------------------------------------------------------------------ Amazon -> canonical

def rating(line):
    """(user, item, timestamp text) of a line item,user,rating,timestamp; ValueError."""
    item, user, _, stamp = line.strip().split(',')
    if not (item and user and stamp.isdecimal()):
        raise ValueError
    return user, item, stamp


def product(line):
    """{'id', title, brand, category} of a line of metadata. A title that is JavaScript is blanked (a
    fault of the source). ValueError, KeyError, TypeError where it is no product."""
    given = json.loads(line)
    if not isinstance(given['asin'], str):
        raise ValueError
    title, category = given.get('title'), given.get('category')
    if isinstance(title, str) and ('getTime' in title or '<span id' in title):
        title = ''
    parts = category if isinstance(category, list) else [category]
    return {'id': given['asin'], 'title': clean(title), 'brand': clean(given.get('brand')),
            'category': ' '.join(filter(None, map(clean, parts)))}


def clean(value):
    """One line of text without HTML entities and tags; '' for what is no text."""
    text = html.unescape(value) if isinstance(value, str) else ''
    return ' '.join(re.sub(r'<[^<>]*>', ' ', storable(text)).split())


def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def canonical_from_amazon(name, folder, min_user, min_item):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz from the raw files, where they were
    not made from these. The exact filters are common/data.py's."""
    category, expected = AMAZON[name]
    interactions, items = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    plain = [path for path in folder.glob('i*') if path.suffix in ('.csv', '.jsonl')]
    if plain or not source.exists() and (interactions.exists() or items.exists()):
        print(f'{folder}: canonical files that were not made here are used as they are')
        return
    ratings = raw_file(name, f'categoryFilesSmall/{category}.csv', expected)
    metadata = raw_file(name, f'metaFiles2/meta_{category}.json.gz')
    identity = {'ratings': content_sha256(ratings), 'metadata': content_sha256(metadata),
                'min_user': min_user, 'min_item': min_item}
    if interactions.exists() and items.exists() and load_json(source) == identity:
        return
    with lock(folder):
        save_json(source, {'unfinished': identity})  # what lies here was made here, if killed now
        wanted = write_interactions(ratings, interactions, min_user, min_item)
        write_items(metadata, items, wanted)
        save_json(source, identity)


def write_interactions(path, target, min_user, min_item):
    """interactions.csv.gz of the ratings; returns the set of its items. Rows are dropped only where
    they can never pass the filters: users and items are counted in tables whose slots several may
    share, so a count is never too low."""
    users, items, wanted = np.zeros(SLOTS, np.uint8), np.zeros(SLOTS, np.uint8), set()
    for user, item, _ in records(path, rating):
        users[slot(user)] += users[slot(user)] < 255
        items[slot(item)] += items[slot(item)] < 255
    with gzip_writer(target) as f:
        f.write(','.join(HEADER) + '\n')
        for user, item, stamp in records(path, rating, quiet=True):
            if users[slot(user)] >= min(min_user, 255) and items[slot(item)] >= min(min_item, 255):
                wanted.add(item)
                f.write(f'{user},{item},{stamp}\n')
        if not wanted:
            raise UserError(f'{path}: no user has {min_user} ratings of items with {min_item}; '
                            'is it the right file?')
    return wanted


def write_items(metadata, target, wanted):
    """items.jsonl.gz of the wanted ids: the first line of each id counts."""
    with gzip_writer(target) as f:
        for item in records(metadata, product):
            if item['id'] in wanted:
                wanted.remove(item['id'])
                f.write(json.dumps(item, ensure_ascii=False) + '\n')
    if wanted:
        print(f'  {len(wanted):,} rated items have no metadata; their interactions are dropped')


@contextlib.contextmanager
def gzip_writer(path):
    """Text writer to a whole .gz whose bytes depend on the text alone (no time, no name)."""
    with whole(path) as part, open(part, 'wb') as raw:
        with gzip.GzipFile('', 'wb', 6, raw, mtime=0) as packed:
            with io.TextIOWrapper(packed, encoding='utf-8', newline='\n') as f:
                yield f
