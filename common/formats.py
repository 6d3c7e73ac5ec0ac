r"""Files as others publish them -> the canonical two: RecBole, MovieLens, Amazon, CSV and TSV.

    python -m common.data NAME --from PATH [--items FILE]
                            [--columns user=..,item=..,time=..,id=..,text=..]

A pair of files is known by its names (PAIRS), what its columns hold by theirs (COLUMNS in
common/sources.py). Every interaction counts, whatever its rating. Amazon's files lie in data/raw/
or are downloaded into it.
"""
import csv
import gzip
import json
import os
import re
import sys
import zlib
from array import array
from functools import partial
from http.client import HTTPException
from itertools import permutations
from urllib.request import Request, urlopen

from common.files import (PAPER, UserError, data_root, file_stamp, load_json, lock, save_json,
                          whole)
from common.progress import progress
from common.runs import code_digest
from common.sources import COLUMNS, interactions, items

AMAZON = PAPER['amazon']  # dataset -> (category, sha256 of its ratings file where known)
# The data has moved before; ELEPHANT_AMAZON_URL names another mirror.
HOSTS = '''https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/
           https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/
           https://jmcauley.ucsd.edu/data/amazon_v2/'''
CODE = 'common/formats.py', 'common/sources.py'  # makes the canonical files
# A file of interactions and its file of texts, without .gz. RecBole; MovieLens; Amazon 2018 and
# 2023, also of users with five reviews; whatever else.
PAIRS = (r'(?i)(.*)\.inter \1\.item|u\.data u\.item|ratings\.(dat|csv) movies\.\2|'
         r'(.*?)(_5)?\.(csv|jsonl?) meta_\3\.jsonl?|interactions\.(csv|tsv) items\.(\6|jsonl)')
SLOTS = 2 ** 26  # of the table, 4 bytes each, that counts users and items


# ------------------------------------------------------------------------ what there is

def find_pair(path):
    """(file of interactions, file of texts) in a folder, or of a stem or a file of interactions.
    UserError: none, or several."""
    folder, start = (path, '') if path.is_dir() else (path.parent, path.name)
    found = []
    for rows, texts in permutations(sorted(folder.iterdir()), 2):
        both = f'{rows.name} {texts.name}'.replace('.gz', '')
        if rows.name.startswith(start) and re.fullmatch(PAIRS, both):
            found.append((rows, texts))
    if len(found) != 1:
        names = ', '.join(f'{rows.name} {texts.name}' for rows, texts in found)
        raise UserError(f'{path}: is not there, or holds not one pair of files of a known form '
                        f'(data/README.md), but {names or "none"}; name one: --from INTERACTIONS '
                        '--items TEXTS')
    return found[0]


# ------------------------------------------------------------------------ getting the Amazon files

def safe(url):
    """The address. UserError: what comes from it could be another's."""
    if not url.startswith(('https://', 'http://127.0.0.1:')):
        raise UserError(f'{url}: downloads come over https only')
    return url


def download(url, path):
    """Fetch `url` to `path`, going on where an earlier download broke off."""
    with open(path, 'ab') as f:
        answer = urlopen(Request(safe(url), headers={'Range': f'bytes={f.tell()}-'}), timeout=30)
        safe(answer.url)  # it may have been sent elsewhere
        if answer.status == 200:  # the server sends everything again
            f.truncate(0)
        chunks = iter(partial(answer.read, 2 ** 20), b'')
        f.writelines(progress(chunks, unit='MB', desc=path.name))
    if answer.length:
        raise UserError(f'{url}: the download broke off; the same command goes on from {path}')


def raw_file(remote):
    """data/raw/<file name> (or .gz), downloaded from the first host that has it where it is not
    there. Errors: UserError, which says what to put where."""
    path = data_root() / 'raw' / os.path.basename(remote)
    for file in (path.with_name(f'{path.name}.gz'), path):
        if file.exists():
            return file
    os.makedirs(path.parent, exist_ok=True)
    part = path.with_name(f'part-{path.name}')
    for host in (os.environ.get('ELEPHANT_AMAZON_URL') or HOSTS).split():
        url = f'{host.rstrip("/")}/{remote}'
        try:
            download(url, part)
            return part.replace(path)
        except (OSError, HTTPException) as error:
            if getattr(error, 'code', None) == 416:  # nothing is left: whole, or of another file
                part.unlink()
            print(f'{url}: {error}', file=sys.stderr)
    raise UserError(f'{path.name} could not be downloaded: put it (Amazon 2018, ratings only and '
                    f'metadata) into {path.parent}, or run drugstore, which needs no download')


# ------------------------------------------------------------------------ writing

def slot(text):
    """The place of an id in a table that several ids may share."""
    return zlib.crc32(text.encode()) % SLOTS


def passing(path, named, min_user, min_item):
    """The interactions but those that can never pass the filters. Several ids may share a count, so
    it is never too low."""
    counts = array('i', [0]) * SLOTS
    for row in interactions(path, named):
        for key in row[:2]:
            counts[slot(key)] += 1
    for row in interactions(path, named):
        if counts[slot(row[0])] >= min_user and counts[slot(row[1])] >= min_item:
            yield row


def canonical_from(folder, pair, named, filters, expected=None):
    """Write data/<name>/interactions.csv.gz and items.jsonl.gz, where they were not made from
    these two files, options and code. With filters only what may pass them; the first line of each
    id counts. `expected`: the sha256 that the first file must have, or None."""
    made = folder / 'interactions.csv.gz', folder / 'items.jsonl.gz'
    source = folder / 'source.json'
    with lock(folder, wait=True):  # two chains may need the same source
        then = load_json(source)
        stamps = list(map(file_stamp, pair, then.get('files', [{}, {}])))
        if (expected not in (None, stamps[0]['sha256'])
                and 'ELEPHANT_ANY_VERSION' not in os.environ):
            raise UserError(f'{pair[0]}: its sha256 is not that of the version the paper used; '
                            'remove it to download that; ELEPHANT_ANY_VERSION=1 goes on with it')
        now = {'files': stamps, 'columns': named, 'filters': filters,
               'code': list(map(code_digest, CODE))}
        if now == then and all(map(os.path.exists, made)):
            print(f'{folder}: the canonical files are up to date')
            return
        used = set()
        seen = set()
        repeats = 0
        read = passing if filters else interactions
        with (whole(made[0]) as part, whole(made[1]) as other,
              gzip.open(part, 'wt', 4, 'utf-8') as rows,
              gzip.open(other, 'wt', 4, 'utf-8') as texts):
            out = csv.writer(rows, lineterminator='\n')
            rows.write('user,item,timestamp\n')
            for *row, _ in read(pair[0], named, *filters):
                out.writerow(row)  # user, item, time as it stands
                used.add(row[1])
            if not used:
                raise UserError(f'{pair[0]}: no rows, or none that passes --min-user, --min-item')
            for key, pairs in items(pair[1], named):
                if key in seen:
                    repeats += 1
                elif key in used or not filters:
                    seen.add(key)
                    texts.write(json.dumps(dict(pairs) | {'id': key}, ensure_ascii=False) + '\n')
            # should this be killed now: what lies here was made here, and is no pair
            save_json(source, {})
            made[0].unlink(missing_ok=True)
        save_json(source, now)
    print(f'  {len(used):,} items with interactions, {len(used - seen):,} of them without texts; '
          f'{len(seen):,} with texts; {repeats:,} lines that repeat an id are left out')


def users_own(folder):
    """Whether there are canonical files that were not made here."""
    return any(folder.glob('i*s.*')) and not (folder / 'source.json').exists()


def canonical_from_amazon(folder, filters):
    """The canonical files of one of the paper's datasets, from its raw files; those that were not
    made here are used as they are."""
    if users_own(folder):
        return
    category, expected = AMAZON[folder.name]
    ratings = raw_file(f'categoryFilesSmall/{category}.csv')
    texts = raw_file(f'metaFiles2/meta_{category}.json.gz')
    canonical_from(folder, [ratings, texts], {}, filters, expected)


def convert(folder, path, texts, named):
    """The canonical files of a dataset from files of another form: --from, --items, --columns.
    Nothing is filtered, and items in nobody's sequence stay."""
    if users_own(folder) or folder.name in AMAZON:
        raise UserError(f"{folder}: is the paper's, or was not made by --from: choose another name")
    pair = (path, texts) if texts else find_pair(path)
    print(f'{folder.name}: interactions of {pair[0]}, texts of {pair[1]}')
    canonical_from(folder, pair, named, [])


def named_columns(text):
    """The value of --columns as {role: column}; an id's is that of the item where it is not said.
    ValueError."""
    named = dict(pair.split('=', 1) for pair in text.split(','))
    if not named.keys() <= {*COLUMNS, 'text'}:
        raise ValueError
    named.setdefault('id', named.get('item', COLUMNS['id']))
    return named


named_columns.__name__ = 'user=..,item=..,time=..,id=..,text=..+..'  # argparse prints it
