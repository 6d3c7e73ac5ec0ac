"""Canonical files -> prepared arrays: filters, leave-one-out split, evaluated users, negatives, counts.

    python -m common.data NAME          # data/NAME/interactions.csv[.gz] + items.jsonl[.gz] -> data/NAME/prepared.npz

Ids: items 1..n in the order of `item_ids` (sorted as text), 0 = padding, the same everywhere; users are rows 0..U-1.
"""
import argparse
import gzip
import json
import os
import re
import zipfile
import zlib
from array import array
from dataclasses import dataclass

import numpy as np

from common.files import ROOT, UserError, command, data_root, digest, load_json, lock, save_json, sha256, whole
from common.sources import AMAZON, canonical_from_amazon
from common.text import ragged

# name -> (fewest interactions of a user, of an item, users sampled; 0 = all). Filters: paper sec. 4.2. Table 2's source
# domains hold about a ninth of the users that pass; how they were drawn is not said, ours is a seeded sample of that size.
FILTERS = {'movies': (5, 5, 30570), 'sports': (5, 5, 39477), 'books': (5, 5, 197891), 'clothing': (5, 5, 135041)}
DEFAULT = (4, 1, 0)
PUBLISHED_EVALUATED = {'pantry': 21300, 'instruments': 49592, 'arts': 95095, 'movies': 26342, 'sports': 21801}  # their code
NEGATIVES, NEGATIVE_SEED = 100, 98765  # paper sec. 4.2, authors' code
LONGEST_TEXT = 2000  # characters kept of an attribute: far more than its 32 tokens need


@dataclass
class Dataset:
    """One prepared dataset. The sequence of user u is items[offsets[u]:offsets[u + 1]], oldest first, at least 3 long:
    all but the last two are training, then the validation item, then the test item."""
    name: str
    item_ids: list         # text ids; item i is item_ids[i - 1]
    attributes: list       # item i at i - 1: list of (name, value) in reading order
    user_ids: list
    items: np.ndarray      # int32 [N]
    offsets: np.ndarray    # int64 [U + 1]
    evaluated: np.ndarray  # int32 [E] users whose validation and test item both occur in somebody's training part
    negatives: np.ndarray  # int32 [E, 100], the same for validation and test; 0 = the catalogue had no more
    counts: dict
    fingerprint: str       # digest of all of the above

    n_items = property(lambda self: len(self.item_ids))
    n_users = property(lambda self: len(self.user_ids))
    lengths = property(lambda self: np.diff(self.offsets))

    def split(self, which, users=None):
        """Histories and targets of `users` (default: the evaluated): ragged (items, offsets) and targets, row for row.

        'valid': training part -> validation item; 'test': training part and validation item -> test item.
        """
        users = self.evaluated if users is None else users
        kept = self.lengths[users] - {'valid': 2, 'test': 1}[which]
        begin = self.offsets[users]
        return self.items[ragged(begin, kept)], np.concatenate([[0], np.cumsum(kept)]), self.items[begin + kept]


# ---------------------------------------------------------------------------- reading the canonical files

def folder_of(name):
    if not re.fullmatch(r'[A-Za-z0-9_-]+', name):
        raise UserError(f'dataset name {name!r}: letters, digits, - and _ only')
    return data_root() / name


def canonical(folder, stem):
    """The canonical file `stem` or `stem`.gz; UserError where neither or both are there."""
    found = [p for p in (folder / stem, folder / f'{stem}.gz') if p.exists()]
    if not found:
        raise UserError(f'{folder / stem}: no such file (nor .gz); data/README.md says what it must hold')
    if len(found) == 2:
        raise UserError(f'{folder}: has both {stem} and {stem}.gz; remove one')
    return found[0]


def lines(path):
    """(number, text) of each line, 1-based, without BOM and line ends; UserError where the file is damaged or not UTF-8."""
    number = 0
    try:
        with (gzip.open if path.suffix == '.gz' else open)(path, 'rt', encoding='utf-8-sig', newline='\n') as f:
            for number, line in enumerate(f, 1):
                yield number, line.rstrip('\r\n')
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f'{path}: damaged after line {number} ({error}); get it again') from None
    except UnicodeDecodeError:
        raise UserError(f'{path}: line {number + 1} is not UTF-8 text; convert the file') from None


def read_items(path):
    """{id: [(name, value), ...]} from items.jsonl: one object a line, `id` and text attributes in reading order."""
    found = {}
    for number, line in lines(path):
        if not line.strip():
            continue
        where = f'{path}: line {number}'
        try:
            item = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f'{where} is not a JSON object') from None
        if not isinstance(item, dict) or not isinstance(item.get('id'), (str, int)) or not str(item['id']).strip():
            raise UserError(f'{where} is not an object with an "id"')
        key = str(item.pop('id')).strip()
        if key in found:
            raise UserError(f'{where} repeats the id {key}')
        try:
            found[key] = [(as_text(name, where), as_text(value, f'{where}: {name}')) for name, value in item.items()]
        except RecursionError:
            raise UserError(f'{where} holds lists of lists too deep to be a text') from None
    if not found:
        raise UserError(f'{path}: holds no items')
    return found


def as_text(value, where):
    if value is None:
        return ''
    if isinstance(value, list):
        return ' '.join(as_text(v, where) for v in value)[:LONGEST_TEXT]
    if isinstance(value, dict):
        raise UserError(f'{where} is an object; attributes are texts, numbers or lists of them')
    return str(value)[:LONGEST_TEXT].encode('utf-8', 'replace').decode()  # a lone surrogate cannot be tokenized


def read_interactions(path, known):
    """Users, items, times of the rows whose item is known (int32, int32, int64 arrays), user ids, item ids, unknown rows."""
    rows, header = lines(path), 'user,item,timestamp'
    number, first = next(rows, (0, ''))
    if first.replace(' ', '').lower() != header:
        raise UserError(f'{path}: line 1 must be {header}' + ('' if number else '; the file is empty'))
    users, items, unknown = {}, {}, 0
    kept_users, kept_items, times = array('i'), array('i'), array('q')  # 16 bytes an interaction, however many
    for number, line in rows:
        if not line:
            continue
        parts = line.split(',')
        if len(parts) != 3:
            raise UserError(f'{path}: line {number} has {len(parts)} columns, not 3 ({header})')
        user, item, stamp = (p.strip().strip('"') for p in parts)
        if not user or not item:
            raise UserError(f'{path}: line {number} has an empty user or item')
        try:
            time = int(stamp) if stamp.isdecimal() else int(float(stamp))
            if time < 0 or time >= 2 ** 62 or float(stamp) != time:
                raise ValueError
        except (ValueError, OverflowError):
            raise UserError(f'{path}: line {number}: timestamp {stamp[:40]!r} is not a whole number from 0 up') from None
        if item not in known:
            unknown += 1
            continue
        kept_users.append(users.setdefault(user, len(users)))
        kept_items.append(items.setdefault(item, len(items)))
        times.append(time)
    if not times:
        raise UserError(f'{path}: no interaction with an item of items.jsonl ({unknown} rows with unknown items)')
    return (np.array(kept_users, np.int32), np.array(kept_items, np.int32), np.array(times, np.int64),
            np.array(list(users), object), np.array(list(items), object), unknown)


# ---------------------------------------------------------------------------- filters, split, negatives

def core(user, item, min_user, min_item):
    """Rows left when users with fewer than min_user, items with fewer than min_item rows are dropped until none is."""
    rows = np.arange(len(user))
    while True:
        u, i = user[rows], item[rows]
        keep = (np.bincount(u)[u] >= min_user) & (np.bincount(i)[i] >= min_item)
        if keep.all():
            return rows
        rows = rows[keep]
        if not len(rows):
            return rows


def draw_negatives(items, offsets, evaluated, n, seed=NEGATIVE_SEED):
    """[E, 100] item ids: uniform without replacement outside the user's sequence; 0 where the catalogue has no more."""
    rng = np.random.default_rng(seed)
    out = np.zeros((len(evaluated), NEGATIVES), np.int32)
    for row, user in enumerate(evaluated):
        own = np.unique(items[offsets[user]:offsets[user + 1]])
        draw = rng.choice(n, min(n, NEGATIVES + len(own)), replace=False) + 1  # shuffled, so what is left is uniform too
        draw = draw[~np.isin(draw, own)][:NEGATIVES]
        out[row, :len(draw)] = draw
    return out


def evaluated_users(items, offsets):
    """Users whose validation and test item both occur in somebody's training part (paper sec. 4.2: no cold items)."""
    train = np.zeros(items.max() + 1, bool)
    train[items[ragged(offsets[:-1], np.diff(offsets) - 2)]] = True
    return np.flatnonzero(train[items[offsets[1:] - 1]] & train[items[offsets[1:] - 2]]).astype(np.int32)


def build(name, folder, min_user, min_item, sample):
    """The Dataset of the canonical files in `folder`."""
    known = read_items(canonical(folder, 'items.jsonl'))
    path = canonical(folder, 'interactions.csv')
    user, item, time, user_ids, item_ids, unknown = read_interactions(path, known)
    read = len(user)
    order = np.lexsort((np.arange(read), time, item, user))              # equal rows side by side, the first kept
    same = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0) & (np.diff(time[order]) == 0)
    kept = np.sort(order[np.r_[True, ~same]])
    kept = kept[core(user[kept], item[kept], max(3, min_user), min_item)]
    alive = np.unique(user[kept])
    if sample and sample < len(alive):
        alive = np.random.default_rng([NEGATIVE_SEED, 1]).choice(alive, sample, replace=False)
        kept = kept[np.isin(user[kept], alive)]
    if not len(kept):
        raise UserError(f'{path}: no user has {max(3, min_user)} interactions; lower --min_user (3 at least)')
    kept = kept[np.lexsort((kept, time[kept], user[kept]))]              # by user, time, position in the file
    users, first, lengths = np.unique(user[kept], return_index=True, return_counts=True)
    catalogue = sorted(set(item_ids[np.unique(item[kept])].tolist()))
    number = np.zeros(len(item_ids), np.int32)
    position = {key: i for i, key in enumerate(catalogue, 1)}
    number[:] = [position.get(key, 0) for key in item_ids.tolist()]
    items, offsets = number[item[kept]], np.concatenate([first, [len(kept)]]).astype(np.int64)
    evaluated = evaluated_users(items, offsets)
    if not len(evaluated):
        raise UserError(f"{path}: no user's last two items both occur in a training sequence; there is nothing to evaluate")
    negatives = draw_negatives(items, offsets, evaluated, len(catalogue))
    inner = np.ones(len(kept), bool)
    inner[first] = False
    ties = float((np.diff(time[kept], prepend=-1) == 0)[inner].mean())
    counts = {'users': len(users), 'items': len(catalogue), 'interactions': len(kept), 'avg_len': len(kept) / len(users),
              'evaluated': len(evaluated), 'tied_neighbours': ties, 'rows_unknown_item': unknown,
              'rows_repeated': read - int(1 + (~same).sum()), 'short_of_negatives': int((negatives[:, -1] == 0).sum())}
    attributes = [known[key] for key in catalogue]
    names = user_ids[users].tolist()
    print_ = digest(catalogue, attributes, names, items, offsets, evaluated, negatives)
    return Dataset(name, catalogue, attributes, names, items, offsets, evaluated, negatives, counts, print_)


# ---------------------------------------------------------------------------- prepared.npz

def identity_of(folder, filters):
    """What prepared.npz is made from: digests of the two canonical files, and the filters."""
    return {'interactions': sha256(canonical(folder, 'interactions.csv')), 'items': sha256(canonical(folder, 'items.jsonl')),
            'filters': list(filters), 'version': 1}


def prepare(name, filters):
    """Write data/<name>/prepared.npz where it is not there or was made from something else."""
    folder = folder_of(name)
    if name in AMAZON:
        canonical_from_amazon(name, folder, filters[0], filters[1])
    elif not folder.is_dir():
        raise UserError(f'unknown dataset {name}: known are grocery, household, {", ".join(AMAZON)}; for your own put '
                        f'interactions.csv and items.jsonl into {folder}')
    with lock(folder):
        identity = identity_of(folder, filters)
        try:
            data = load(name)
            if saved_identity(folder) == identity:
                return data
        except UserError:
            pass
        data = build(name, folder, *filters)
        texts = [identity, data.item_ids, data.attributes, data.user_ids, data.counts, data.fingerprint]
        blob = lambda value: np.frombuffer(json.dumps(value, ensure_ascii=False).encode(), np.uint8)
        with whole(folder / 'prepared.npz') as part, open(part, 'wb') as f:
            np.savez_compressed(f, texts=blob(texts), items=data.items, offsets=data.offsets, evaluated=data.evaluated,
                                negatives=data.negatives)
        save_json(folder / 'counts.json', data.counts)
        return data


def read_prepared(folder):
    path = folder / 'prepared.npz'
    try:
        with np.load(path, allow_pickle=False) as f:
            return json.loads(f['texts'].tobytes()), {k: f[k] for k in ('items', 'offsets', 'evaluated', 'negatives')}
    except FileNotFoundError:
        raise UserError(f'{folder.name} is not prepared: run python -m common.data {folder.name}') from None
    except (ValueError, KeyError, OSError, EOFError, zlib.error, zipfile.BadZipFile):
        raise UserError(f'{path}: damaged; run python -m common.data {folder.name}') from None


def saved_identity(folder):
    return read_prepared(folder)[0][0]


def load(name):
    """The prepared dataset. UserError where it is not there, or where the canonical files have changed since."""
    folder = folder_of(name)
    (identity, item_ids, attributes, user_ids, counts, fingerprint), arrays = read_prepared(folder)
    if identity != identity_of(folder, identity['filters']):
        raise UserError(f'{folder}: its files have changed since it was prepared: run python -m common.data {name}')
    attributes = [[tuple(pair) for pair in pairs] for pairs in attributes]
    return Dataset(name, item_ids, attributes, user_ids, **arrays, counts=counts, fingerprint=fingerprint)


def report(data):
    """Counts beside the paper's Table 2 and the published code's evaluated users; a warning where they differ."""
    c, paper = data.counts, load_json(ROOT / 'common' / 'paper.json')['table2']
    known = dict(zip(paper['columns'], paper['rows'].get(data.name, [])))
    if data.name in PUBLISHED_EVALUATED:
        known['evaluated'] = PUBLISHED_EVALUATED[data.name]
    for key in ('users', 'items', 'interactions', 'avg_len', 'evaluated'):
        value = f'{c[key]:,.1f}' if key == 'avg_len' else f'{c[key]:,}'
        print(f'  {key:13}{value:>12}' + (f'   paper {known[key]:,}' if key in known else ''))
    print(f'  neighbours with the same timestamp: {c["tied_neighbours"]:.1%} (their order is the file\'s)')
    if c['rows_unknown_item'] or c['rows_repeated']:
        print(f'  dropped: {c["rows_unknown_item"]:,} rows whose item has no text, {c["rows_repeated"]:,} repeated rows')
    if c['short_of_negatives']:
        print(f'  warning: {c["short_of_negatives"]:,} users have fewer than {NEGATIVES} negatives: the catalogue is small')
    off = [k for k, v in known.items() if round(c[k], 1) != v]
    if off:
        print(f'  warning: {", ".join(off)} differ from the published numbers')


def main(argv=None):
    from common.training import positive
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('name', help=f'dataset: {", ".join(AMAZON)}, grocery, household, or a folder of data/')
    p.add_argument('--min_user', type=positive(), help='fewest interactions of a user (paper: 4, sources 5; at least 3)')
    p.add_argument('--min_item', type=positive(), help='fewest interactions of an item (paper: source domains 5, else 1)')
    p.add_argument('--users', type=positive(zero=True), help="seeded sample of so many users, 0 = all (sources: Table 2's)")
    p.add_argument('--any_version', action='store_true', help='accept Amazon ratings whose sha256 is not the known one')
    args = p.parse_args(argv)
    if args.any_version:
        os.environ['ELEPHANT_ANY_VERSION'] = '1'
    given = (args.min_user, args.min_item, args.users)
    filters = [d if g is None else g for g, d in zip(given, FILTERS.get(args.name, DEFAULT))]
    data = prepare(args.name, filters)
    print(f'{args.name}: prepared in {folder_of(args.name) / "prepared.npz"}')
    report(data)


if __name__ == '__main__':
    command(main)
