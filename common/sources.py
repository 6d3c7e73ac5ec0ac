"""Rows and texts: the interactions and the items of any pair of files whose columns are known.

The canonical two files are such a pair, read strictly: as UTF-8, and without any line that cannot
be read. Those of others (common/formats.py) may hold some. Everything streams.
"""
import codecs
import csv
import io
import json
import math
import re
import sys
from array import array
from datetime import UTC, datetime
from html import unescape
from itertools import islice, tee

import numpy as np

from common.files import UserError, unpacked
from common.progress import progress

# What a column is called, the first that is there counts; `id` is an item's in the file of texts.
ITEM = 'item, item_id, itemId, movieId, movie_id, parent_asin, asin, product_id'
COLUMNS = {'user': 'user, user_id, userId, reviewerID, customer_id', 'item': ITEM,
           'id': f'{ITEM}, id', 'time': 'timestamp, unixReviewTime, datetime, date, time'}
GENRES = '''unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy
            Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western'''
# The first line of files without a header -> their columns: MovieLens, Amazon 2018.
HEADLESS = {r'\d+(\t|::)\d+\1[\d.]+\1\d{8,}': 'user item rating time',
            r'\d+::.*::.*': 'item title genres',
            r'\d+\|.*(\|[01]){19}': f'item title released video u.item {GENRES}',
            r'[^,"]+,[^,"]+,[1-5]\.0,\d+': 'item user rating time'}
PRODUCT = {'title': 'title', 'brand': 'store', 'category': 'categories'}  # Amazon 2018's: 2023's
LONGEST_TEXT = 2000    # characters kept of an attribute: far more than its 32 tokens need
MOST_MALFORMED = 0.01  # share of rows; above it the file is not what it should be
UNREADABLE = AttributeError, LookupError, RecursionError, TypeError, ValueError


# ------------------------------------------------------------------------ lines and tables

def latin(error):
    """What cannot be UTF-8 is Latin-1 (MovieLens)."""
    return error.object[error.start:error.end].decode('latin-1'), error.end


codecs.register_error('latin', latin)


def lines(path, most):
    """Each line of a text file or .gz, its end kept, without a byte-order mark. UserError: damaged;
    or not UTF-8, where nothing that is malformed may be there (`most` is 0)."""
    errors = 'latin' if most else 'strict'
    with unpacked(path) as f:
        yield from io.TextIOWrapper(f, 'utf-8-sig', errors, newline='')


def csv_rows(path, text, mark):
    """(line number, cells) of each row of CSV that holds something. UserError: a quote that never
    ends, or goes on after its end, or holds whole rows of a .tsv."""
    rows = csv.reader(text, delimiter=mark, strict=True)
    try:
        for row in rows:
            if mark == '\t':
                cells = ''.join(row)
                if 0 < cells.count('\n') * (len(row) - 1) <= cells.count(mark):
                    raise csv.Error('a cell holds rows')
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        raise UserError(f'{path}: line {rows.line_num} is not CSV ({error}): an unclosed quote? If '
                        'quotes are plain characters, rename it to .txt, for --from') from None


def objects(text):
    """(line number, object) of each line of JSON that is not blank; None where it is no object."""
    for number, line in enumerate(text, 1):
        try:
            found = {**json.loads(line)}
        except UNREADABLE:
            found = None
        if not line.isspace():
            yield number, found


def table(path, most):
    """({column: its place in a row}, (line number, row) of each). A row is a list of cells, or of
    JSON an object, whose places are its names."""
    text, ahead = tee(lines(path, most))  # a pipe is read once
    if re.search('(?i)[.](nd)?json', path.name):
        names = {}
        for _, row in objects(islice(ahead, 1000)):
            names |= row or {}
        return dict(zip(names, names)), objects(text)
    head = next(ahead, '')
    mark = re.search(r'::|[\t|;]|$', head)[0] or ','
    if mark != '::' and re.search('(?i)[.][ct]sv', path.name):
        rows = csv_rows(path, text, mark)
    else:  # a quote is a character like any other
        rows = ((n, line.rstrip('\r\n').split(mark)) for n, line in enumerate(text, 1)
                if not line.isspace())
    known = [names.split() for first, names in HEADLESS.items()
             if re.fullmatch(first, head.strip())]
    header = known[0] if known else next(rows, (0, []))[1]
    names = [re.sub(':(token|float)(_seq)?$', '', cell.strip()) for cell in header]
    if len(set(names)) < len(names):
        raise UserError(f'{path}: two of its columns have one name: {", ".join(names)[:200]}')
    return {name: place for place, name in enumerate(names)}, rows


def column(path, names, role, named):
    """The name of the column that holds `role`, in capitals or not. UserError: there is none."""
    wanted = (COLUMNS | named)[role]
    if wanted in names:
        return wanted
    there = {name.lower(): name for name in sorted(names)}  # of Id and id it is id
    for name in wanted.lower().split(', '):
        if name in there:
            return there[name]
    raise UserError(f'{path}: has no column ({wanted}), but '
                    f'{", ".join(names)[:100] or "nothing that can be read"}; with --from or '
                    f'--histories tell its name: --columns {role}=NAME (under a header, or in JSON '
                    'an object a line; .xlsx, .parquet, UTF-16: save as .csv)')


def readable(path, rows, parse, what, most):
    """parse(row) of each of the numbered rows. What is read is told of files of others. What cannot
    be read is left out, counted and told; UserError where its share is above `most`."""
    if most:
        print(f'  {path.name}: {what}', file=sys.stderr)
    number = bad = 0
    first = ''
    for number, row in progress(rows, unit='line', unit_scale=True, desc=path.name):
        try:
            yield parse(row)
        except UNREADABLE:
            bad += 1
            first = first or f'{path}: line {number} is no record with {what}: {str(row)[:300]}'
    if bad:
        told = f'{first}; in all {bad:,} of {number:,} lines cannot be read'
        if bad > most * number:
            raise UserError(told)
        print(f'  {told} and are left out')


# ------------------------------------------------------------------------ interactions

def interactions(path, named, most=MOST_MALFORMED):
    """(user, item, time as it stands, the same in microseconds) of each row of a file of
    interactions."""
    places, rows = table(path, most)
    chosen = [column(path, places, role, named) for role in ('user', 'item', 'time')]
    u, i, t = map(places.get, chosen)
    width = len(places)

    def parse(row):
        user, item, stamp = row[u], row[i], row[t]
        if isinstance(row, dict):
            user, item, stamp = map(as_text, (user, item, stamp))
        elif len(row) != width:
            raise ValueError
        user, item = user.strip(), item.strip()
        if not user or not item:
            raise ValueError
        return user, item, stamp, microseconds(stamp)

    what = f'a user, an item and a time (a number or ISO 8601), in {", ".join(chosen)}'
    return readable(path, rows, parse, what, most)


def microseconds(stamp):
    """A time as whole microseconds since 1970. Numbers are seconds, or from 10^11 on (the year
    5138) milliseconds, from 10^14 on microseconds, from 10^17 on nanoseconds, whatever their sign;
    all else is ISO 8601, in UTC where it names no zone. ValueError: it is neither."""
    try:
        value = float(stamp)
    except ValueError:
        moment = datetime.fromisoformat(stamp.strip(' \t\nUTC'))  # BigQuery ends it with UTC
        seconds = moment.replace(tzinfo=moment.tzinfo or UTC).timestamp()
        return round(seconds * 1e6)
    for factor in (1e6, 1e3, 1, 1e-3):
        found = value * factor
        if -1e17 < found < 1e17:
            return int(found)
    raise ValueError


def read_interactions(path, known):
    """Of the canonical file the columns user, item (int32 [N]) and time (int64 [N], microseconds)
    of the rows whose item is known; the ids of users (numbers are places; items' are places in
    `known`); how many rows have an unknown item, and the first of these."""
    users = {}
    unknown = 0
    first = None
    items = {key: number for number, key in enumerate(known)}
    of_user = array('i')  # 16 bytes a row
    of_item = array('i')
    times = array('q')
    for user, item, _, time in interactions(path, {}, 0):
        if item in items:
            of_user.append(users.setdefault(user, len(users)))
            of_item.append(items[item])
            times.append(time)
        else:
            unknown += 1
            first = first or item
    return list(map(np.asarray, (of_user, of_item, times))), list(users), unknown, first


# ------------------------------------------------------------------------ items

def items(path, named, most=MOST_MALFORMED):
    """(id, [(name, text)]) of each row of a file of texts. Attributes that are objects are left out
    and counted."""
    places, rows = table(path, most)
    key = column(path, places, 'id', named)
    wanted = [column(path, places, 'text', {'text': name})
              for name in named.get('text', '').split('+') if name]
    amazon = key.endswith('asin') and 'title' in places and {'category', 'categories'} & {*places}
    left_out = 0

    def parse(row):
        nonlocal left_out
        if isinstance(row, list):
            row = tidy(dict(zip(places, row, strict=True)))
        elif amazon and not wanted:
            row = {key: row[key], **product(row)}
        given = row.pop(key)
        pairs = []
        item = as_text(given).strip()
        if not item or isinstance(given, list):
            raise ValueError
        if wanted:
            row = {name: row.get(name) for name in wanted}
        for name, value in row.items():
            try:
                pairs.append((as_text(name), as_text(value)))
            except TypeError:
                left_out += 1
        return item, pairs

    yield from readable(path, rows, parse, f'an id in the column {key}', most)
    if left_out:
        print(f'  {path.name}: {left_out:,} attributes that are objects are left out')


def as_text(value):
    """An attribute's value as one text; TypeError for an object. JSON's NaN and Infinity are
    missing values, as null is."""
    if isinstance(value, dict):
        raise TypeError
    if isinstance(value, list):
        value = ' '.join(map(as_text, value))
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return ''
    # without lone surrogates, which can be neither tokenized nor written
    return str(value)[:LONGEST_TEXT].encode('utf-8', 'replace').decode()


def tidy(row):
    """A table's row with MovieLens's genres, flags or parted by bars, as words, and without what
    has no name (the row's number, as pandas writes it)."""
    row.pop('', None)
    if 'u.item' in row:
        genres = ' '.join(genre for genre in GENRES.split() if row[genre] == '1')
        return {'item': row['item'], 'title': row['title'], 'genres': genres}
    if 'genres' in row:
        row['genres'] = row['genres'].replace('(no genres listed)', '').replace('|', ' ')
    return row


def product(row):
    """Title, brand and category of Amazon's metadata, without HTML entities and tags. A title that
    is JavaScript is blanked (a fault of the source)."""
    if re.search('getTime|<span id', str(row.get('title'))):
        row['title'] = ''
    texts = {}
    for name, other in PRODUCT.items():
        text = unescape(as_text(row.get(name) or row.get(other)))
        texts[name] = ' '.join(re.sub('<[^<>]*>', ' ', text).split())
    return texts


def read_items(path):
    """{id: JSON of [[name, value], ...]}, ids in order, of the canonical file: one object a line,
    `id` and text attributes in reading order. As text they take half of the memory."""
    found = {}
    for key, pairs in items(path, {'id': 'id'}, 0):
        if key in found:
            raise UserError(f'{path}: two lines have the id {key}')
        found[key] = json.dumps(pairs, ensure_ascii=False)
    return dict(sorted(found.items()))
