r"""Files as others publish them -> the canonical two: RecBole, MovieLens, Amazon, CSV and TSV.

    python -m common.data NAME --from PATH [--items FILE] [--columns user=..,item=..,time=..,id=..]

A pair of files is known by its names (PAIRS), what its columns hold by theirs (COLUMNS). Everything
streams. Bytes that are not UTF-8 are read as Latin-1 (MovieLens). Every interaction counts,
whatever its rating.
"""
import codecs
import csv
import gzip
import itertools
import json
import os
import re
import zlib
from array import array
from html import unescape
from operator import itemgetter

from common.files import UserError, file_stamp, load_json, save_json, whole
from common.runs import code_digest
from common.sources import (AMAZON, HEADER, as_text, csv_rows, event, item_of, lines, objects,
                            raw_file, readable, tell_objects)

# A file of interactions and its file of texts, without .gz; X is what varies. RecBole; MovieLens;
# Amazon 2018 and 2023; whatever else.
PAIRS = ('X.inter X.item, u.data u.item, ratings.dat movies.dat, ratings.csv movies.csv, '
         'X.csv meta_X.json, X.json meta_X.json, X_5.json meta_X.json, '
         'X.csv meta_X.jsonl, X.jsonl meta_X.jsonl, interactions.csv items.csv, '
         'interactions.tsv items.tsv, interactions.csv items.jsonl, interactions.tsv items.jsonl')
JSON, CSV = {'.json', '.jsonl'}, {'.csv', '.tsv'}
# What a column is called, the first that is there counts; `id` is an item's in the file of texts.
ITEM = 'item item_id itemId movieId movie_id parent_asin asin product_id'
COLUMNS = {'user': 'user user_id userId reviewerID customer_id', 'item': ITEM, 'id': f'{ITEM} id',
           'time': 'timestamp time unixReviewTime datetime date'}
GENRES = ('unknown Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy '
          'Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western')
# The first line of files without a header -> their columns: MovieLens, Amazon 2018.
HEADLESS = {r'\d+(\t|::)\d+\1[\d.]+\1\d+': 'user item rating time',
            r'\d+::.*::.*': 'item title genres',
            r'\d+\|.*(\|[01]){19}': f'item title released video IMDb {GENRES}',
            r'[^,"]+,[^,"]+,[1-5]\.0,\d+': 'item user rating time'}
PRODUCT = {'title': 'title', 'brand': 'store', 'category': 'categories'}  # Amazon 2018's: 2023's
MOST_MALFORMED = 0.01  # share of rows; above it the file is not what it should be
SLOTS = 2 ** 26        # of the table, 4 bytes each, that counts users and items


# ------------------------------------------------------------------------ rows of any such file

def find_pair(path):
    """(file of interactions, file of texts) in a folder, or of a stem or a file of interactions.
    UserError: none, or several."""
    folder, start = (path, '') if path.is_dir() else (path.parent, path.name)
    there = {file.name.removesuffix('.gz'): file for file in sorted(folder.iterdir())}
    found = {}
    for pair, name in itertools.product(PAIRS.split(', '), there):
        ending, mate = pair.removeprefix('X').split()
        texts = there.get(mate.replace('X', name.removesuffix(ending)))
        if texts and name.endswith(ending) and there[name].name.startswith(start):
            found[there[name]] = texts
    if len(found) != 1:
        names = ', '.join(file.name for file in found or there.values()
                          if file.name.startswith(start))
        raise UserError(f'{path}: holds not one pair of files of a known form (data/README.md), '
                        f'but {names[:80] or "nothing"}; name one: --from INTERACTIONS --items '
                        'TEXTS [--columns user=..,item=..,time=..]')
    return found.popitem()


def latin(error):
    """What cannot be UTF-8 is Latin-1."""
    return error.object[error.start:error.end].decode('latin-1'), error.end


codecs.register_error('latin', latin)


def table(path):
    """({column: its place in a row}, (line number, row) of each). A row is a list of cells, None
    where they are too many or too few; or of JSON an object, whose places are its names."""
    if not JSON.isdisjoint(path.suffixes):
        first = next((row for _, row in objects(path, 'latin') if isinstance(row, dict)), {})
        return dict(zip(first, first)), objects(path, 'latin')
    _, head = next(lines(path, 'latin'), (0, ''))
    mark = next((mark for mark in ('::', '\t', '|', ';') if mark in head), ',')
    if not CSV.isdisjoint(path.suffixes):
        rows = csv_rows(path, 'latin', mark)
    else:  # a quote is a character like any other
        rows = ((n, line.rstrip('\r\n').split(mark)) for n, line in lines(path, 'latin'))
    known = [names.split() for first, names in HEADLESS.items()
             if re.fullmatch(first, head.strip())]
    header = known[0] if known else next(rows, (0, []))[1]
    names = [re.sub(':(token|float)(_seq)?$', '', cell.strip()) for cell in header]
    places = {name: place for place, name in enumerate(names)}
    width = len(names)
    if len(places) < width:
        raise UserError(f'{path}: two columns have one name: {", ".join(names)[:150]}')
    return places, ((n, row if len(row) == width else None) for n, row in rows)


def column(path, names, role, named):
    """The name of the column that holds `role`. UserError: there is none."""
    wanted = [named[role]] if role in named else COLUMNS[role].split()
    for name in wanted:
        if name in names:
            return name
    raise UserError(f'{path}: has no column {" or ".join(wanted)}, but '
                    f'{", ".join(names)[:100] or "nothing"}; say --columns {role}=NAME')


def interactions(path, named):
    """(user, item, time), as texts, of each row of a file of interactions."""
    places, rows = table(path)
    roles = 'user', 'item', 'time'
    pick = itemgetter(*[places[column(path, places, role, named)] for role in roles])

    def parse(row):
        cells = pick(row)
        if isinstance(row, dict):
            cells = list(map(as_text, cells))
        user, item, _ = event(cells)
        return user, item, cells[2]

    return readable(path, rows, parse, MOST_MALFORMED)


def items(path, named):
    """(id, [(name, text)], number of objects left out) of each row of a file of texts."""
    places, rows = table(path)
    key = column(path, places, 'id', named)

    def parse(row):
        if isinstance(row, list):
            row = tidy(dict(zip(places, row)))
        elif key.endswith('asin'):
            row = {key: row[key], **product(row)}
        return item_of(row, key)

    return readable(path, rows, parse, MOST_MALFORMED)


def tidy(row):
    """A table's row with MovieLens's genres, flags or parted by bars, as words, and without what
    has no name (the row's number, as pandas writes it)."""
    row.pop('', None)
    if 'IMDb' in row:
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


# ------------------------------------------------------------------------ writing

def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def passing(path, named, min_user, min_item):
    """The interactions but those that can never pass the filters. Several ids may share a count, so
    it is never too low."""
    counts = array('i', [0]) * SLOTS
    for user, item, _ in interactions(path, named):
        counts[slot(user)] += 1
        counts[slot(item)] += 1
    for row in interactions(path, named):
        if counts[slot(row[0])] >= min_user and counts[slot(row[1])] >= min_item:
            yield row


def write(rows_file, texts_file, pair, named, filters):
    """The canonical rows and texts of a pair of files. With filters only what may pass them; the
    first line of each id counts."""
    used, seen, repeats, left_out = set(), set(), 0, 0
    rows_file.write(f'{HEADER}\n')
    out = csv.writer(rows_file, lineterminator='\n')
    read = passing if filters else interactions
    for row in read(pair[0], named, *filters):
        out.writerow(row)
        used.add(row[1])
    for key, pairs, skipped in items(pair[1], named):
        if key in seen:
            repeats += 1
        elif key in used or not filters:
            seen.add(key)
            left_out += skipped
            item = {'id': key} | dict(pairs) | {'id': key}  # first, and not another
            texts_file.write(json.dumps(item, ensure_ascii=False) + '\n')
    tell_objects(pair[1], left_out)
    print(f'  {len(used):,} items with interactions, {len(used - seen):,} of them without texts; '
          f'{len(seen):,} with texts; {repeats:,} lines that repeat an id are left out')


def canonical_from(folder, pair, named, filters, expected):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz, where they were not made from
    these two files, options and code. `expected`: the sha256 that the first must have, or None."""
    made = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    then = load_json(source) if source.exists() else {}
    stamps = list(map(file_stamp, pair, then.get('files', [{}, {}])))
    if expected not in (None, stamps[0]['sha256']):
        raise UserError(f'{pair[0]}: its sha256 is not that of the version the paper used; remove '
                        'it to download that one; ELEPHANT_ANY_VERSION=1 goes on with this one')
    now = {'files': stamps, 'columns': named, 'filters': filters,
           'code': code_digest('common/formats.py')}
    if now == then and all(path.exists() for path in made):
        if not filters:
            print(f'{folder}: the canonical files are up to date')
        return
    with (whole(made[0]) as part, whole(made[1]) as other,
          gzip.open(part, 'wt', 4, 'utf-8', 'replace') as rows,
          gzip.open(other, 'wt', 4, 'utf-8', 'replace') as texts):
        write(rows, texts, pair, named, filters)
        save_json(source, {})  # what lies here was made here, should this be killed now
    save_json(source, now)


def users_own(folder):
    """Whether there are canonical files that were not made here."""
    return any(folder.glob('i*s.*')) and not (folder / 'source.json').exists()


def canonical_from_amazon(folder, filters):
    """The canonical files of one of the paper's datasets, from its raw files."""
    if users_own(folder):
        print(f'{folder}: canonical files that were not made here are used as they are')
        return
    category, expected = AMAZON[folder.name]
    remotes = f'categoryFilesSmall/{category}.csv', f'metaFiles2/meta_{category}.json.gz'
    pair = [raw_file(category, remote) for remote in remotes]
    if 'ELEPHANT_ANY_VERSION' in os.environ:
        expected = None
    canonical_from(folder, pair, {}, filters, expected)


def convert(folder, path, texts, named):
    """The canonical files of a dataset from files of another form: --from, --items, --columns.
    Nothing is filtered, and items that nobody has stay."""
    if users_own(folder) or folder.name in AMAZON:
        raise UserError(f'{folder}: is for the paper\'s data, or holds files that --from did not '
                        'make and never overwrites: choose another name')
    pair = (path, texts) if texts else find_pair(path)
    print(f'{folder.name}: interactions of {pair[0]}, texts of {pair[1]}')
    canonical_from(folder, pair, named, [], None)


def named_columns(text):
    """The value of --columns as {role: column}; an id's is that of the item where it is not said.
    ValueError."""
    named = dict(pair.split('=', 1) for pair in text.split(','))
    if not named.keys() <= COLUMNS.keys():
        raise ValueError
    return {'id': named['item'], **named} if 'item' in named else named


named_columns.__name__ = 'user=..,item=..,time=..,id=..'  # argparse prints it
