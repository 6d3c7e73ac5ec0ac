"""Outside files -> rows and texts: the canonical two files, and Amazon 2018 -> canonical.

Amazon: ratings `<Category>.csv` (item,user,rating,timestamp; no header), `meta_<Category>.json.gz`
(one object a line), from data/raw/ or downloaded into it. Conversion streams: memory is bounded by
the users and items kept.
"""
import contextlib
import csv
import errno
import gzip
import http.client
import io
import json
import os
import re
import sys
import zlib
from array import array
from html import unescape
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from common.files import (UserError, data_root, file_stamp, load_json, lock, paper, save_json,
                          unpacked, whole)
from common.progress import progress
from common.runs import code_digest

AMAZON = paper()['amazon']  # dataset -> (category, sha256 of its ratings file where known)
# The data has moved before; ELEPHANT_AMAZON_URL names another mirror.
HOSTS = ('https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/ '
         'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/ '
         'https://jmcauley.ucsd.edu/data/amazon_v2/')
MOST_MALFORMED = 0.01  # share of lines; above it the file is not what it should be
LONGEST_TEXT = 2000    # characters kept of an attribute: far more than its 32 tokens need
SLOTS = 2 ** 26        # of the tables, a byte each, that count users and items
MOST_COUNTED = 255     # what a byte holds
HEADER = 'user,item,timestamp'
SAFE = 'https://', 'http://127.0.0.1:'


# ------------------------------------------------------------------------ reading lines

def lines(path, errors='strict'):
    """(number, text) of each line of a text file or .gz, 1-based, its end kept; without a
    byte-order mark. UserError: damaged, or not UTF-8."""
    number = 0
    try:
        with unpacked(path) as f:
            for number, line in enumerate(io.TextIOWrapper(f, 'utf-8-sig', errors, newline=''), 1):
                yield number, line
    except UnicodeDecodeError:
        raise UserError(f'{path}: line {number + 1} is not UTF-8 text; convert the file') from None


def records(path, parse, quiet=False):
    """parse(line) of each line of a file from elsewhere. Lines for which it raises ValueError are
    skipped and counted; more than 1 % of them is an error."""
    number = bad = first = 0
    read = lines(path, 'replace')
    for number, line in progress(read, unit='line', unit_scale=True, desc=path.name):
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
    if len(found) > 1:
        raise UserError(f'{folder}: has both {stem} and {stem}.gz; remove one')
    return found[0]


def read_items(path):
    """{id: JSON of [[name, value], ...]} from items.jsonl: one object a line, `id` and text
    attributes in reading order. As text they take half of the memory."""
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
            key = storable(str(key).strip(' \t'))
            pairs = [(as_text(name), as_text(value)) for name, value in item.items()]
        except (KeyError, AttributeError, TypeError):
            raise UserError(f'{where} is not an object with an "id" and texts, numbers or lists of '
                            'them') from None
        except (ValueError, RecursionError):
            raise UserError(f'{where} is not a JSON object') from None
        if key in found:
            raise UserError(f'{where} repeats the id {key}')
        found[key] = json.dumps(pairs, ensure_ascii=False)
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
    """The columns user, item (int32 [N]) and time (int64 [N]) of the rows whose item is known; the
    ids of users and of items (lists; numbers are their places); how many rows have an unknown
    item."""
    rows = csv.reader((line for _, line in lines(path)), strict=True)
    users, items, unknown = {}, {}, 0
    columns = array('i'), array('i'), array('q')  # 16 bytes a row
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        if ','.join(header) != HEADER:
            empty = '' if rows.line_num else '; the file is empty'
            raise UserError(f'{path}: line 1 must be {HEADER}{empty}')
        for row in filter(None, rows):
            user, item, time = parsed_row(row, f'{path}: line {rows.line_num}')
            if item not in known:
                unknown += 1
                continue
            columns[0].append(users.setdefault(user, len(users)))
            columns[1].append(items.setdefault(item, len(items)))
            columns[2].append(time)
    except csv.Error as error:
        raise UserError(f'{path}: line {rows.line_num} is not CSV ({error})') from None
    if not items:
        raise UserError(f'{path}: no interaction with an item of items.jsonl '
                        f'({unknown} rows with unknown items)')
    columns = [np.frombuffer(column, column.typecode) for column in columns]
    return columns, list(users), list(items), unknown


def parsed_row(row, where):
    """(user, item, seconds) of one row of interactions.csv; UserError says where and what."""
    if len(row) != 3:
        raise UserError(f'{where} has {len(row)} columns, not 3 ({HEADER})')
    user, item, stamp = (cell.strip(' \t') for cell in row)
    if not user or not item:
        raise UserError(f'{where} has an empty user or item')
    try:
        time = float(stamp)
        if not time.is_integer() or not 0 <= time < 2 ** 53:
            raise ValueError
    except ValueError:
        raise UserError(f'{where}: timestamp {stamp[:40]!r} is not a whole number of seconds from '
                        '0 up') from None
    return user, item, int(time)


# ------------------------------------------------------------------------ getting the Amazon files

def download(url, path):
    """Fetch `url` to `path`, going on where an earlier download broke off."""
    # the last byte is asked for again, so that there is one to send where nothing else is left
    have = max(0, path.stat().st_size - 1) if path.exists() else 0
    try:
        answer = urlopen(Request(url, headers={'Range': f'bytes={have}-'}), timeout=30)
    except HTTPError as error:
        if error.code == 416 and have:  # it is longer than the file: of another one
            path.unlink()
        raise
    if not answer.url.startswith(SAFE):
        raise UserError(f'{url}: leads to {answer.url}; only https')
    if answer.status != 206:  # the server sends everything again
        have = 0
    total = have + answer.length if answer.length else None
    bar = progress(total=total, initial=have, unit='B', unit_scale=True, desc=path.name)
    with answer, bar, open(path, 'ab') as f:
        f.truncate(have)
        while chunk := answer.read(2 ** 20):
            bar.update(f.write(chunk))
    if answer.length:
        raise UserError(f'{url}: the download broke off; run the same command again to go on '
                        f'from {path}')


def download_any(name, remote, path):
    """Fetch a file to `path` from the first host that has it. Errors: UserError, which says what to
    put where."""
    for host in os.environ.get('ELEPHANT_AMAZON_URL', HOSTS).split():
        url = f'{host.rstrip("/")}/{remote}'
        if not url.startswith(SAFE):
            raise UserError(f'ELEPHANT_AMAZON_URL {host}: only https')
        try:
            return download(url, path)
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
                raise  # of this machine: another host would not help
            print(f'{url}: {error}', file=sys.stderr)
    category = AMAZON[name][0]
    raise UserError(f'{name} could not be downloaded: put {category}.csv and '
                    f'meta_{category}.json.gz (Amazon 2018, ratings only and metadata) into '
                    f'{path.parent}, or run drugstore, which needs neither')


def raw_file(name, remote, expected=None, known=None):
    """data/raw/<file name> (or .gz), downloaded where it is not there. UserError: its content has
    another sha256 than expected. known: an earlier stamp of it, see file_stamp."""
    path = data_root() / 'raw' / os.path.basename(remote)
    packed = path.with_name(f'{path.name}.gz')
    path = packed if packed.exists() else path
    found = path
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        found = path.with_name(f'part-{path.name}')
        download_any(name, remote, found)
    any_version = not expected or 'ELEPHANT_ANY_VERSION' in os.environ
    if not any_version and file_stamp(found, known)['sha256'] != expected:
        raise UserError(f'{found}: its sha256 is not that of the version the paper used; remove it '
                        'to download that one; ELEPHANT_ANY_VERSION=1 goes on with this one')
    if found != path:
        found.replace(path)
    return path


# ------------------------------------------------------------------------ Amazon -> canonical

def rating(line):
    """(user, item, timestamp text) of a line item,user,rating,timestamp; ValueError."""
    item, user, _, stamp = line.strip().split(',')
    if not (item and user and stamp.isdecimal()):
        raise ValueError
    return user, item, stamp


def product(line):
    """{'id', title, brand, category} of a line of metadata. A title that is JavaScript is blanked
    (a fault of the source). ValueError, KeyError, TypeError where it is no product."""
    given = json.loads(line)
    if not isinstance(given['asin'], str):
        raise ValueError
    if re.search('getTime|<span id', str(given.get('title'))):
        given['title'] = ''
    texts = {name: clean(given.get(name)) for name in ('title', 'brand', 'category')}
    return {'id': given['asin'], **texts}


def clean(value):
    """One line of text, or of a list of texts, without HTML entities and tags; '' for all else."""
    if isinstance(value, list):
        return ' '.join(filter(None, map(clean, value)))
    text = unescape(value) if isinstance(value, str) else ''
    return ' '.join(re.sub('<[^<>]*>', ' ', storable(text)).split())


def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def canonical_from_amazon(name, folder, min_user, min_item):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz from the raw files, where they were
    not made from these. The exact filters are common/data.py's."""
    category, expected = AMAZON[name]
    interactions, items = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    made_here = [interactions, items] if source.exists() else []
    if any(path not in made_here for path in folder.glob('i*s.*')):
        print(f'{folder}: canonical files that were not made here are used as they are')
        return
    then = load_json(source) if made_here else {}
    known = then.get('files', [None, None])
    ratings = raw_file(name, f'categoryFilesSmall/{category}.csv', expected, known[0])
    metadata = raw_file(name, f'metaFiles2/meta_{category}.json.gz')
    identity = {'files': list(map(file_stamp, (ratings, metadata), known)),
                'min_user': min_user, 'min_item': min_item,
                'code': code_digest('common/sources.py')}
    if interactions.exists() and items.exists() and then == identity:
        return
    with lock(folder):
        save_json(source, {'unfinished': identity})  # what lies here was made here, if killed now
        wanted = write_interactions(ratings, interactions, min_user, min_item)
        write_items(metadata, items, wanted)
        save_json(source, identity)


def write_interactions(path, target, min_user, min_item):
    """interactions.csv.gz of the ratings; returns the set of its items. Rows are dropped only where
    they can never pass the filters: users and items are counted in tables whose slots several may
    share, so a count up to MOST_COUNTED is never too low."""
    users, items, wanted = bytearray(SLOTS), bytearray(SLOTS), set()
    for user, item, _ in records(path, rating):
        user, item = slot(user), slot(item)
        users[user] += users[user] < MOST_COUNTED
        items[item] += items[item] < MOST_COUNTED
    many = min(min_user, MOST_COUNTED), min(min_item, MOST_COUNTED)
    with gzip_writer(target) as f:
        f.write(f'{HEADER}\n')
        for user, item, stamp in records(path, rating, quiet=True):
            if users[slot(user)] >= many[0] and items[slot(item)] >= many[1]:
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
            with io.TextIOWrapper(packed, 'utf-8') as f:
                yield f
