"""Canonical files -> prepared arrays: filters, leave-one-out split, evaluated users, negatives.

    python -m common.data NAME     # data/NAME/interactions.csv[.gz], items.jsonl[.gz] -> prepared.npz

Ids: items 1..n in the order of `item_ids` (sorted as text), 0 = padding, the same everywhere;
users are rows 0..U-1. Ends with what two rankings that need no training reach on these data.
"""
import functools
import json
import os
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.arrays import offsets_of, ragged
from common.files import (ROOT, UserError, command, data_root, digest, file_stamp, load_json, lock,
                          save_json, save_npz)
from common.options import COUNT, POSITIVE, option, options_parser
from common.runs import code_digest
from common.sources import AMAZON, canonical_file, canonical_from_amazon, read_interactions, read_items

# name -> (fewest interactions of a user, of an item, users sampled; 0 = all). Filters: paper sec.
# 4.2. Table 2's source domains hold about a ninth of the users that pass; how they were drawn is
# not said, ours is a seeded sample of that size.
FILTERS = {'movies': (5, 5, 30570), 'sports': (5, 5, 39477), 'books': (5, 5, 197891),
           'clothing': (5, 5, 135041)}
DEFAULT = (4, 1, 0)
NEGATIVES, NEGATIVE_SEED = 100, 98765  # paper sec. 4.2, authors' code
ARRAYS = 'items', 'offsets', 'evaluated', 'negatives'
CODE = 'common/arrays.py', 'common/data.py', 'common/sources.py'  # makes prepared.npz


@dataclass
class Dataset:
    """One prepared dataset. The sequence of user u is items[offsets[u]:offsets[u + 1]], oldest
    first, at least 3 long: all but the last two train, then the validation, then the test item."""
    name: str
    item_ids: list         # text ids; item i is item_ids[i - 1]
    user_ids: list
    items: np.ndarray      # int32 [N]
    offsets: np.ndarray    # int64 [U + 1]
    evaluated: np.ndarray  # int32 [E] users whose last two items both occur in a training part
    negatives: np.ndarray  # int32 [E, 100], of validation and test; 0: the catalogue had no more
    counts: dict
    fingerprint: str       # digest of all of the above and of the texts
    folder: Path

    def __post_init__(self):
        self.n_items, self.n_users = len(self.item_ids), len(self.user_ids)
        self.lengths = np.diff(self.offsets)

    @functools.cached_property
    def attributes(self):
        """Item i at i - 1: list of (name, value) in reading order."""
        pairs = read_member(self.folder, 'attributes')
        return [[tuple(pair) for pair in item] for item in pairs]

    def split(self, which, users=None):
        """Histories and targets of `users` (default: the evaluated): ragged (items, offsets) and
        targets [users]. 'valid': training part -> validation item; 'test': training part and
        validation item -> test item."""
        users = self.evaluated if users is None else users
        kept = self.lengths[users] - {'valid': 2, 'test': 1}[which]
        begin = self.offsets[users]
        return self.items[ragged(begin, kept)], offsets_of(kept), self.items[begin + kept]

    def training(self, leave=2):
        """All users' sequences but their last `leave` items: ragged (items, offsets)."""
        kept = self.lengths - leave
        return self.items[ragged(self.offsets[:-1], kept)], offsets_of(kept)

    def title(self, item):
        """The first attribute of an item that says something, else its id."""
        values = [value for _, value in self.attributes[item - 1] if value]
        return values[0] if values else self.item_ids[item - 1]


def folder_of(name):
    """data/<name>. UserError: a name that is more than a word."""
    if not re.fullmatch(r'[A-Za-z0-9_-]+', name):
        raise UserError(f'dataset name {name!r}: letters, digits, - and _ only')
    return data_root() / name


# ------------------------------------------------------------------------ filters, split, negatives

def core(user, item, min_user, min_item):
    """Rows left when users with fewer than min_user, items with fewer than min_item rows are
    dropped until none is."""
    rows = np.arange(len(user))
    while len(rows):
        u, i = user[rows], item[rows]
        keep = (np.bincount(u)[u] >= min_user) & (np.bincount(i)[i] >= min_item)
        if keep.all():
            break
        rows = rows[keep]
    return rows


def draw_evaluation_negatives(items, offsets, users, n):
    """[users, 100] item ids: uniform without replacement outside the user's sequence; 0 where the
    catalogue has no more. The same on every call."""
    rng = np.random.default_rng(NEGATIVE_SEED)
    out = np.zeros((len(users), NEGATIVES), np.int32)
    for row, user in enumerate(users):
        own = np.unique(items[offsets[user]:offsets[user + 1]])
        # drawn in random order, so what is left after the user's own is uniform too
        draw = rng.choice(n, min(n, NEGATIVES + len(own)), replace=False) + 1
        draw = draw[~np.isin(draw, own)][:NEGATIVES]
        out[row, :len(draw)] = draw
    return out


def evaluated_users(items, offsets):
    """Users whose validation and test item both occur in somebody's training part (paper sec. 4.2:
    no cold items)."""
    trained = np.zeros(items.max() + 1, bool)
    trained[items[ragged(offsets[:-1], np.diff(offsets) - 2)]] = True
    valid, test = items[offsets[1:] - 2], items[offsets[1:] - 1]
    return np.flatnonzero(trained[valid] & trained[test]).astype(np.int32)


def kept_rows(user, item, time, filters):
    """(rows that stay, by user, time and place in the file; how many were exact repeats)."""
    min_user, min_item, sample = filters
    # equal rows lie side by side after this, in the file's order; the first one is kept
    order = np.lexsort((np.arange(len(user)), time, item, user))
    columns = np.stack([user, item, time])[:, order]
    new = np.r_[True, (np.diff(columns) != 0).any(0)]
    kept = np.sort(order[new])
    kept = kept[core(user[kept], item[kept], max(3, min_user), min_item)]
    alive = np.unique(user[kept])
    if sample and sample < len(alive):
        alive = np.random.default_rng([NEGATIVE_SEED, 1]).choice(alive, sample, replace=False)
        kept = kept[np.isin(user[kept], alive)]
    return kept[np.lexsort((kept, time[kept], user[kept]))], int((~new).sum())


def build(name, folder, filters):
    """(Dataset, attributes) of the canonical files in `folder`."""
    known = read_items(canonical_file(folder, 'items.jsonl'))
    path = canonical_file(folder, 'interactions.csv')
    user, item, time, user_ids, item_ids, unknown = read_interactions(path, known)
    kept, repeated = kept_rows(user, item, time, filters)
    if not len(kept):
        raise UserError(f'{path}: no user has {max(3, filters[0])} interactions; '
                        'lower --min-user (3 at least)')
    users, first, lengths = np.unique(user[kept], return_index=True, return_counts=True)
    catalogue = sorted(item_ids[i] for i in np.unique(item[kept]))
    number = {key: i for i, key in enumerate(catalogue, 1)}
    numbers = np.array([number.get(key, 0) for key in item_ids], np.int32)
    items, offsets = numbers[item[kept]], offsets_of(lengths)
    evaluated = evaluated_users(items, offsets)
    if not len(evaluated):
        raise UserError(f"{path}: no user's last two items both occur in a training sequence; "
                        'there is nothing to evaluate')
    negatives = draw_evaluation_negatives(items, offsets, evaluated, len(catalogue))
    # a user's first item has no neighbour before it
    tied = np.delete(np.diff(time[kept], prepend=-1) == 0, first)
    attributes = [known[key] for key in catalogue]
    texts = [tuple(value for _, value in pairs if value) for pairs in attributes]
    counts = {'users': len(users), 'items': len(catalogue), 'interactions': len(kept),
              'avg_len': len(kept) / len(users), 'evaluated': len(evaluated),
              'tied_neighbours': float(tied.mean()), 'rows_unknown_item': unknown,
              'rows_repeated': repeated, 'distinct_texts': len(set(texts)),
              'short_of_negatives': int((negatives[:, -1] == 0).sum())}
    names = [user_ids[u] for u in users]
    fingerprint = digest(catalogue, attributes, names, items, offsets, evaluated, negatives)
    return Dataset(name, catalogue, names, items, offsets, evaluated, negatives, counts,
                   fingerprint, folder), attributes


# ------------------------------------------------------------------------ prepared.npz

def identity_of(folder, filters, known=None):
    """What prepared.npz is made from: stamps of the two canonical files, filters, and code."""
    known = known or {}
    stamps = {stem: file_stamp(canonical_file(folder, stem), known.get(stem))
              for stem in ('interactions.csv', 'items.jsonl')}
    return {**stamps, 'filters': list(filters), 'code': [code_digest(file) for file in CODE]}


def content_of(identity):
    """An identity without the times of its files."""
    stamps = [identity[stem]['sha256'] for stem in ('interactions.csv', 'items.jsonl')]
    return [identity['filters'], identity['code'], *stamps]


def prepare(name, filters):
    """The dataset, prepared anew where prepared.npz is not there or of something else."""
    folder = folder_of(name)
    if name in AMAZON:
        canonical_from_amazon(name, folder, filters[0], filters[1])
    elif not folder.is_dir():
        raise UserError(f'unknown dataset {name}: known are drugstore, grocery, {", ".join(AMAZON)}; '
                        f'for your own put interactions.csv and items.jsonl into {folder}')
    try:
        data = load(name)
        if read_member(folder, 'head')['identity']['filters'] == list(filters):
            return data
    except UserError:
        pass  # it is made now
    with lock(folder):
        identity = identity_of(folder, filters)
        data, attributes = build(name, folder, filters)
        head = {'identity': identity, 'counts': data.counts, 'fingerprint': data.fingerprint}
        members = {key: getattr(data, key) for key in ARRAYS}
        for key, value in (('head', head), ('item_ids', data.item_ids), ('user_ids', data.user_ids),
                           ('attributes', attributes)):
            text = json.dumps(value, ensure_ascii=False)
            members[key] = np.frombuffer(text.encode(), np.uint8)
        save_npz(folder / 'prepared.npz', members)
        save_json(folder / 'counts.json', data.counts)
    return data


def read_member(folder, name):
    """One member of prepared.npz: an array, or a value that was written as JSON."""
    path = folder / 'prepared.npz'
    try:
        with np.load(path, allow_pickle=False) as f:
            return f[name] if name in ARRAYS else json.loads(f[name].tobytes())
    except FileNotFoundError:
        raise UserError(f'{folder.name} is not prepared: run python -m common.data {folder.name}'
                        ) from None
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, zlib.error,
            zipfile.BadZipFile):  # RuntimeError: a flag of the zip's that nothing here writes
        raise UserError(f'{path}: damaged; run python -m common.data {folder.name}') from None


def load(name):
    """The prepared dataset. UserError where it is not there, or where the canonical files have
    changed since."""
    folder = folder_of(name)
    head = read_member(folder, 'head')
    identity = head['identity']
    now = identity_of(folder, identity['filters'], identity)
    if content_of(now) != content_of(identity):
        what = 'its files have' if now['code'] == identity['code'] else 'common/data.py has'
        raise UserError(f'{folder}: {what} changed since it was prepared: '
                        f'run python -m common.data {name}')
    arrays = {key: read_member(folder, key) for key in ARRAYS}
    return Dataset(name, read_member(folder, 'item_ids'), read_member(folder, 'user_ids'), **arrays,
                   counts=head['counts'], fingerprint=head['fingerprint'], folder=folder)


# ------------------------------------------------------------------------ report

def published_counts(name):
    """What the paper's table 2 and its code say of a dataset: {count: value}, {} where nothing."""
    table = load_json(ROOT / 'common' / 'paper.json')['table2']
    known = dict(zip(table['columns'], table['rows'].get(name, [])))
    if name in table['evaluated']:
        known['evaluated'] = table['evaluated'][name]
    return known


def report(data):
    """Counts beside the published ones, and warnings about what will not work well."""
    c, known = data.counts, published_counts(data.name)
    for key in ('users', 'items', 'interactions', 'avg_len', 'evaluated'):
        value = f'{c[key]:,.1f}' if key == 'avg_len' else f'{c[key]:,}'
        print(f'  {key:13}{value:>12}' + (f'   paper {known[key]:,}' if key in known else ''))
    print(f'  neighbours with the same timestamp: {c["tied_neighbours"]:.1%} (the file\'s order)')
    if c['rows_unknown_item'] or c['rows_repeated']:
        print(f'  dropped: {c["rows_unknown_item"]:,} rows whose item has no text, '
              f'{c["rows_repeated"]:,} repeated rows')
    if c['short_of_negatives']:
        print(f'  warning: {c["short_of_negatives"]:,} users have fewer than {NEGATIVES} negatives: '
              'the catalogue is small')
    shared = c['items'] - c['distinct_texts']
    if shared:
        print(f'  items whose text another item has too: {shared:,}')
    if c['distinct_texts'] < 2:
        print('  warning: all items have the same text, or none; a language model learns nothing')
    off = [key for key, value in known.items() if round(c[key], 1) != value]
    if off:
        print(f'  warning: {", ".join(off)} differ from the published numbers')


def parse_args(argv=None):
    p = options_parser(__doc__)
    p.add_argument('name', help=f'{", ".join(AMAZON)}, drugstore, grocery, or a folder of data/')
    option(p, '--min-user', POSITIVE, None,
           'fewest interactions of a user (paper: 4, sources 5; at least 3)')
    option(p, '--min-item', POSITIVE, None,
           'fewest interactions of an item (paper: source domains 5, else 1)')
    option(p, '--users', COUNT, None, "seeded sample of so many, 0 = all (sources: Table 2's)")
    p.add_argument('--any-version', action='store_true',
                   help='accept Amazon ratings whose sha256 is not the known one')
    return p.parse_args(argv)


def main(args):
    from common.baselines import untrained_lines
    if args.any_version:
        os.environ['ELEPHANT_ANY_VERSION'] = '1'
    given = args.min_user, args.min_item, args.users
    filters = [default if value is None else value
               for value, default in zip(given, FILTERS.get(args.name, DEFAULT))]
    data = prepare(args.name, filters)
    print(f'{args.name}: prepared in {folder_of(args.name) / "prepared.npz"}')
    report(data)
    for line in untrained_lines(data):
        print(f'  {line}')


if __name__ == '__main__':
    command(main, parse_args())
