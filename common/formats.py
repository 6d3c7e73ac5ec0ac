r"""Files as others publish them -> the canonical two: RecBole, MovieLens, Amazon, CSV and TSV.

    python -m common.data NAME --from PATH [--items FILE] [--columns user=..,item=..,time=..,id=..]

A pair of files is known by its names (PAIRS), what its columns hold by theirs (COLUMNS). Everything
streams. Bytes that are not UTF-8 are read as Latin-1 (MovieLens). Every interaction counts,
whatever its rating.
"""
import codecs
import contextlib
import csv
import gzip
import itertools
import json
import re
import zlib
from html import unescape

import numpy as np

from common.files import UserError, file_stamp, load_json, lock, save_json, whole
from common.progress import progress
from common.runs import code_digest
from common.sources import (AMAZON, HEADER, as_text, csv_rows, event, item_of, lines, objects,
                            raw_file, readable, tell_objects)

# A file of interactions and its file of texts, without .gz; X is what varies. RecBole; MovieLens;
# Amazon 2018 and 2023; whatever else.
PAIRS = ('X.inter X.item, u.data u.item, ratings.dat movies.dat, ratings.csv movies.csv, '
         'X.csv meta_X.json, X.json meta_X.json, X_5.json meta_X.json, '
         'X.csv meta_X.jsonl, X.jsonl meta_X.jsonl, interactions.csv items.csv, '
         'interactions.tsv items.tsv, interactions.csv items.jsonl, interactions.tsv items.jsonl')
# What a column is called, the first that is there counts; `id` is an item's in the file of texts.
COLUMNS = {'user': 'user user_id userid reviewerid customer_id',
           'item': 'item item_id itemid movieid movie_id parent_asin asin product_id',
           'time': 'timestamp time unixreviewtime datetime date',
           'id': 'item item_id itemid movieid movie_id parent_asin asin product_id id'}
GENRES = ('unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy '
          'Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western')
# The first line of files without a header -> their columns: MovieLens, Amazon 2018.
HEADLESS = {r'\d+(\t|::)\d+\1[\d.]+\1\d+': 'user item rating time',
            r'\d+::.*::.*': 'item title genres',
            r'\d+\|.*(\|[01]){19}': f'item title released video IMDb {GENRES}',
            r'[^,"]+,[^,"]+,[1-5]\.0,\d+': 'item user rating time'}
MOST_MALFORMED = 0.01  # share of rows; above it the file is not what it should be
SLOTS = 2 ** 24        # of the table that counts users and items in bounded memory


# ------------------------------------------------------------------------ rows of any such file

def find_pair(path):
    """(file of interactions, file of texts) in a folder, or of a stem or a file of interactions.
    UserError: none, or several."""
    folder, start = (path, '') if path.is_dir() else (path.parent, path.name.removesuffix('.gz'))
    there = {file.name.removesuffix('.gz'): file for file in sorted(folder.iterdir())}
    found = {}
    for name, pair in itertools.product(there, PAIRS.split(', ')):
        ending, mate = pair.split()
        stem = name.removesuffix(ending.removeprefix('X'))
        texts = there.get(mate.replace('X', stem))
        if texts and stem != name and name.startswith(start):
            found[there[name]] = texts
    if len(found) != 1:
        names = ', '.join(file.name for file in found or there.values())
        raise UserError(f'{path}: holds not one pair of files that is known ({PAIRS}; each also '
                        f'.gz), but {names[:300] or "nothing"}; name one: --from INTERACTIONS '
                        '--items TEXTS [--columns user=..,item=..,time=..]')
    return found.popitem()


def latin(error):
    """What cannot be UTF-8 is Latin-1."""
    return error.object[error.start:error.end].decode('latin-1'), error.end


codecs.register_error('latin', latin)


def table(path):
    """(names of columns, (line number, {column: value}) of each row); None for a row that has more
    or fewer cells, or is no object of JSON."""
    name = path.name.removesuffix('.gz')
    if name.endswith(('.json', '.jsonl')):
        some = itertools.islice(objects(path, 'latin'), 100)
        return dict.fromkeys(key for _, row in some for key in row or ()), objects(path, 'latin')
    head = next(lines(path, 'latin'), (0, ''))[1].strip()
    mark = next((mark for mark in ('::', '\t', '|', ';') if mark in head), ',')
    if name.endswith(('.csv', '.tsv')):
        rows = csv_rows(path, (line for _, line in lines(path, 'latin')), delimiter=mark)
    else:  # a quote is a character like any other
        rows = ((n, line.rstrip('\r\n').split(mark)) for n, line in lines(path, 'latin'))
    known = [names.split() for first, names in HEADLESS.items() if re.fullmatch(first, head)]
    header = known[0] if known else next(rows, (0, []))[1]
    columns = [re.sub(':(token|float)(_seq)?$', '', cell.strip()) for cell in header]
    return columns, ((n, dict(zip(columns, row)) if len(row) == len(columns) else None)
                     for n, row in rows)


def column(path, columns, role, named):
    """The name of the column that holds `role`. UserError: there is none."""
    wanted = [named[role]] if role in named else COLUMNS[role].split()
    known = {name.lower(): name for name in columns}
    for name in wanted:
        if name.lower() in known:
            return known[name.lower()]
    raise UserError(f'{path}: has no column {" or ".join(wanted)}, but {", ".join(columns)}; say '
                    f'--columns {role}=NAME')


def records(path, rows, parse):
    """parse(row) of the rows that it can be made of."""
    return readable(path, progress(rows, unit='line', unit_scale=True, desc=path.name), parse,
                    MOST_MALFORMED)


def interactions(path, named):
    """(user, item, time), as texts, of each row of a file of interactions."""
    columns, rows = table(path)
    names = [column(path, columns, role, named) for role in ('user', 'item', 'time')]

    def parse(row):
        cells = [row[name] for name in names]
        cells = [cell if isinstance(cell, str) else as_text(cell) for cell in cells]
        user, item, _ = event(cells)
        return user, item, cells[2]

    return records(path, rows, parse)


def items(path, named):
    """(id, [(name, text)], number of objects left out) of each row of a file of texts."""
    columns, rows = table(path)
    key = column(path, columns, 'id', named)
    amazon = key.endswith('asin') and '.json' in path.name

    def parse(row):
        if amazon:
            row = {key: row[key], **product(row)}
        elif 'IMDb' in row:
            genres = ' '.join(genre for genre in GENRES.split() if row[genre] == '1')
            row = {key: row[key], 'title': row['title'], 'genres': genres}
        elif isinstance(row.get('genres'), str):
            row['genres'] = row['genres'].replace('|', ' ')
        return item_of(row, key)

    return records(path, rows, parse)


# ------------------------------------------------------------------------ Amazon's texts

def product(row):
    """Title, brand and category of Amazon's metadata of 2018 or 2023. A title that is JavaScript is
    blanked (a fault of the source)."""
    if re.search('getTime|<span id', str(row.get('title'))):
        row['title'] = ''
    return {'title': clean(row.get('title')), 'brand': clean(row.get('brand') or row.get('store')),
            'category': clean(row.get('category') or row.get('categories'))}


def clean(value):
    """One line of text without HTML entities and tags."""
    return ' '.join(re.sub('<[^<>]*>', ' ', unescape(as_text(value))).split())


# ------------------------------------------------------------------------ writing

def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def write_interactions(f, path, named, min_user, min_item):
    """All rows but those that can never pass the filters; returns the set of their items. Several
    ids may share a count, so a count is never too low."""
    counts, found = np.zeros(SLOTS, np.int32), set()
    if min_user:
        for user, item, _ in interactions(path, named):
            counts[slot(user)] += 1
            counts[slot(item)] += 1
    writer = csv.writer(f, lineterminator='\n')
    writer.writerow(HEADER.split(','))
    for user, item, stamp in interactions(path, named):
        if counts[slot(user)] >= min_user and counts[slot(item)] >= min_item:
            writer.writerow((user, item, stamp))
            found.add(item)
    if not found:
        raise UserError(f'{path}: no user has {min_user} ratings of items with {min_item}; '
                        'is it the right file?')
    return found


def write_items(f, path, named, used, every):
    """The items that are used, or `every` one: the first of each id counts."""
    seen, repeats, left_out = set(), 0, 0
    for key, pairs, skipped in items(path, named):
        if key in seen:
            repeats += 1
        elif every or key in used:
            seen.add(key)
            left_out += skipped
            f.write(json.dumps({'id': key, **dict(pairs), 'id': key}, ensure_ascii=False) + '\n')
    tell_objects(path, left_out)
    print(f'  {len(seen):,} items')


def canonical_from(folder, pair, named, filters=(0, 0)):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz, where they were not made from
    these two files, options and code."""
    made = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    then = load_json(source) if source.exists() else {}
    now = {path.name: file_stamp(path, then.get(path.name)) for path in pair}
    now |= {'columns': named, 'filters': list(filters), 'code': code_digest('common/formats.py')}
    if all(path.exists() for path in made) and now == then:
        return
    with lock(folder):
        with writer(made[0]) as rows, writer(made[1]) as texts:
            used = write_interactions(rows, pair[0], named, *filters)
            write_items(texts, pair[1], named, used, every=not filters[0])
            save_json(source, {'unfinished': now})  # what lies here was made here, if killed now
        save_json(source, now)


@contextlib.contextmanager
def writer(path):
    """Text writer to a whole .gz."""
    with whole(path) as part, gzip.open(part, 'wt', 6, 'utf-8', 'replace') as f:
        yield f


def users_own(folder):
    """Canonical files that were not made here."""
    ours = ['interactions.csv.gz', 'items.jsonl.gz'] if (folder / 'source.json').exists() else []
    return [path for path in folder.glob('i*s.*') if path.name not in ours]


def canonical_from_amazon(name, folder, min_user, min_item):
    """The canonical files of one of the paper's datasets, from its raw files. Their rows are fewer
    than common/data.py's filters ask for, and items are those of the rows: memory."""
    if users_own(folder):
        print(f'{folder}: canonical files that were not made here are used as they are')
        return
    category, expected = AMAZON[name]
    pair = (raw_file(name, f'categoryFilesSmall/{category}.csv', expected),
            raw_file(name, f'metaFiles2/meta_{category}.json.gz'))
    canonical_from(folder, pair, {}, (min_user, min_item))


def convert(folder, path, items=None, named={}):
    """The canonical files of a dataset from files of another form: --from, --items, --columns.
    Nothing is filtered, and items that nobody has stay."""
    for file in users_own(folder):
        raise UserError(f'{file}: was not made by --from, and is never overwritten: choose another '
                        'name, or move it away')
    pair = (path, items) if items else find_pair(path)
    print(f'{folder.name}: interactions of {pair[0]}, texts of {pair[1]}')
    canonical_from(folder, pair, named)


def named_columns(text):
    """The value of --columns as {role: column}; ValueError."""
    named = dict(pair.split('=', 1) for pair in text.split(','))
    if not named.keys() <= COLUMNS.keys():
        raise ValueError
    return named
