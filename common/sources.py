"""Rows and texts: reading lines, CSV and the canonical two files; getting Amazon's files.

Amazon's raw files lie in data/raw/ or are downloaded into it; common/formats.py converts them.
"""
import contextlib
import csv
import http.client
import io
import json
import math
import os
import sys
from array import array
from datetime import UTC, datetime
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np

from common.files import UserError, data_root, paper, unpacked
from common.progress import progress

AMAZON = paper()['amazon']  # dataset -> (category, sha256 of its ratings file where known)
# The data has moved before; ELEPHANT_AMAZON_URL names another mirror.
HOSTS = ('https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/ '
         'https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/ '
         'https://jmcauley.ucsd.edu/data/amazon_v2/')
LONGEST_TEXT = 2000    # characters kept of an attribute: far more than its 32 tokens need
HEADER = 'user,item,timestamp'
SAFE = 'https://', 'http://127.0.0.1:'
NETWORK = URLError, ConnectionError, TimeoutError, http.client.HTTPException
UNREADABLE = AttributeError, LookupError, RecursionError, TypeError, ValueError


# ------------------------------------------------------------------------ reading lines

def lines(path, errors='strict'):
    """(number, text) of each line of a text file or .gz, 1-based, its end kept; without a
    byte-order mark. UserError: damaged, or not UTF-8."""
    number = 0
    try:
        with unpacked(path) as f:
            for number, line in enumerate(io.TextIOWrapper(f, 'utf-8-sig', errors, newline=''), 1):
                yield number, line
    except UnicodeDecodeError as error:  # what was read ahead may hold many lines
        number += error.object[:error.start].count(b'\n')
        raise UserError(f'{path}: line {number + 1} is not UTF-8 text; convert the file') from None


def csv_rows(path, errors='strict', delimiter=','):
    """(line number, cells) of each row of a CSV file that holds something. UserError: a quote that
    never ends, or goes on after its end."""
    text = (line for _, line in lines(path, errors))
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f'{path}: line {rows.line_num} is not CSV ({error})') from None


def objects(path, errors='strict'):
    """(line number, value) of each line of JSON that is not blank; None where it is not JSON."""
    for number, line in lines(path, errors):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not line.isspace():
            yield number, found


def readable(path, rows, parse, most=0.0):
    """parse(row) of each of the numbered rows. What cannot be read is left out, counted and told;
    UserError where its share is above `most`."""
    number = bad = 0
    for number, row in progress(rows, unit='line', unit_scale=True, desc=path.name):
        try:
            yield parse(row)
        except UNREADABLE as error:
            if not bad:
                why = error if isinstance(error, ValueError) else ' is no record with all it needs'
                first = f'{path}: line {number}{why}'
            bad += 1
    if bad:
        told = f'{first}; in all {bad:,} of {number:,} lines cannot be read'
        if bad > most * number:
            raise UserError(told)
        print(f'  {told} and are left out')


# ------------------------------------------------------------------------ the canonical files

def canonical_file(folder, stem):
    """The file `stem` or `stem`.gz; UserError where neither or both are there."""
    found = [*folder.glob(stem), *folder.glob(f'{stem}.gz')]
    if not found:
        raise UserError(f'{folder / stem}: no such file (nor .gz); '
                        'data/README.md says what it must hold')
    if len(found) > 1:
        raise UserError(f'{folder}: has both {stem} and {stem}.gz; remove one')
    return found[0]


def read_items(path):
    """{id: JSON of [[name, value], ...]}, ids in order, from items.jsonl: one object a line, `id`
    and text attributes in reading order. As text they take half of the memory. Attributes that are
    objects are left out and counted."""
    found = {}

    def add(given):
        key, pairs, skipped = item_of(given)
        if key in found:
            raise ValueError(f' repeats the id {key}')
        found[key] = json.dumps(pairs, ensure_ascii=False)
        return skipped

    tell_objects(path, sum(readable(path, objects(path), add)))
    if not found:
        raise UserError(f'{path}: holds no items')
    return dict(sorted(found.items()))


def tell_objects(path, count):
    """Say how many attributes were no texts."""
    if count:
        print(f'  {path.name}: {count:,} attributes that are objects are left out')


def item_of(given, name='id'):
    """(id, [(name, text) of each other attribute], how many more are objects) of an object; its id
    goes. ValueError: it has none."""
    key = given.pop(name, None) if isinstance(given, dict) else None
    if not isinstance(key, (str, int)) or not str(key).strip():
        raise ValueError(f' is no row or JSON object with an "{name}"')
    pairs = []
    for attribute, value in given.items():
        with contextlib.suppress(TypeError):
            pairs.append((as_text(attribute), as_text(value)))
    return as_text(key).strip(' \t'), pairs, len(given) - len(pairs)


def as_text(value):
    """An attribute's value as one text; TypeError for an object. JSON's NaN and Infinity are
    missing values, as null is."""
    if isinstance(value, dict):
        raise TypeError
    if isinstance(value, list):
        return ' '.join(map(as_text, value))[:LONGEST_TEXT]
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return ''
    # without lone surrogates, which can be neither tokenized nor written
    return str(value)[:LONGEST_TEXT].encode('utf-8', 'replace').decode()


def read_interactions(path, known):
    """The columns user, item (int32 [N]) and time (int64 [N], microseconds) of the rows whose item
    is known; the ids of users and of items (lists; numbers are their places; items' are `known`);
    how many rows have an unknown item."""
    rows = csv_rows(path)
    _, header = next(rows, (0, ['nothing']))
    if [cell.strip().lower() for cell in header] != HEADER.split(','):
        raise UserError(f'{path}: line 1 must be {HEADER}; it is {",".join(header)[:80]}')
    users, items, unknown = {}, {key: number for number, key in enumerate(known)}, 0
    of_user, of_item, times = array('i'), array('i'), array('q')  # 16 bytes a row
    for user, item, time in readable(path, rows, event):
        if item in items:
            of_user.append(users.setdefault(user, len(users)))
            of_item.append(items[item])
            times.append(time)
        else:
            unknown += 1
    if not users:
        raise UserError(f'{path}: no interaction with an item of items.jsonl '
                        f'(rows with unknown items: {unknown:,})')
    columns = [np.asarray(column) for column in (of_user, of_item, times)]
    return columns, list(users), list(items), unknown


def event(cells):
    """(user, item, microseconds) of three texts. ValueError: its text goes on after "line 7"."""
    if len(cells) != 3:
        raise ValueError(f' has {len(cells)} columns, not 3 ({HEADER})')
    user, item, stamp = cells
    user, item = user.strip(' \t'), item.strip(' \t')
    if not user or not item:
        raise ValueError(' has an empty user or item')
    try:
        return user, item, microseconds(stamp)
    except ValueError:
        raise ValueError(f': timestamp {stamp[:40]!r} is neither a number (of seconds; from 10^11 '
                         'on, of milli-, micro- or nanoseconds) nor an ISO 8601 date') from None


def microseconds(stamp):
    """A time as whole microseconds since 1970. Numbers are seconds, or from 10^11 on (the year
    5138) milliseconds, from 10^14 on microseconds, from 10^17 on nanoseconds, whatever their sign;
    all else is ISO 8601, in UTC where it names no zone. ValueError: it is neither."""
    try:
        value = float(stamp)
    except ValueError:
        moment = datetime.fromisoformat(stamp.strip())
        seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        return round(seconds * 1e6)
    for factor in (1e6, 1e3, 1, 1e-3):
        found = value * factor
        if -1e17 < found < 1e17:
            return int(found)
    raise ValueError


# ------------------------------------------------------------------------ getting the Amazon files

def download(url, path):
    """Fetch `url` to `path`, going on where an earlier download broke off."""
    with open(path, 'ab') as f:
        # the last byte is asked for again, so that there is one to send where nothing else is left
        have = max(0, f.tell() - 1)
        answer = urlopen(Request(url, headers={'Range': f'bytes={have}-'}), timeout=30)
        if not answer.url.startswith(SAFE):
            raise UserError(f'{url}: leads to {answer.url}; only https')
        f.truncate(have if answer.status == 206 else 0)  # else the server sends everything again
        bar = progress(total=answer.length, unit='B', unit_scale=True, desc=path.name)
        with answer, bar:
            while chunk := answer.read(2 ** 20):
                bar.update(f.write(chunk))
    if answer.length:
        raise UserError(f'{url}: the download broke off; run the same command again to go on '
                        f'from {path}')


def raw_file(category, remote):
    """data/raw/<file name> (or .gz), downloaded from the first host that has it where it is not
    there. Errors: UserError, which says what to put where."""
    path = data_root() / 'raw' / os.path.basename(remote)
    for file in (path.with_name(f'{path.name}.gz'), path):
        if file.exists():
            return file
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'part-{path.name}')
    for host in os.environ.get('ELEPHANT_AMAZON_URL', HOSTS).split():
        url = f'{host.rstrip("/")}/{remote}'
        if not url.startswith(SAFE):
            raise UserError(f'ELEPHANT_AMAZON_URL {host}: only https')
        try:
            download(url, part)
            return part.replace(path)
        except NETWORK as error:
            if getattr(error, 'code', None) == 416:  # the part is longer than the file
                part.unlink(missing_ok=True)
            print(f'{url}: {error}', file=sys.stderr)
    raise UserError(f'{path.name} could not be downloaded: put {category}.csv and '
                    f'meta_{category}.json.gz (Amazon 2018, ratings only and metadata) into '
                    f'{path.parent}, or run drugstore, which needs neither')
