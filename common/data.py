"""Canonical files -> prepared arrays: filters, leave-one-out split, evaluated users, negatives.

    python -m common.data NAME   # data/NAME/interactions.csv[.gz], items.jsonl[.gz] -> prepared.npz

Ids: items 1..n in the order of `item_ids` (sorted as text), 0 = padding, the same everywhere;
users are rows 0..U-1. Ends with what two rankings that need no training reach on these data.
"""
import contextlib
import functools
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.arrays import offsets_of, ragged
from common.files import (UserError, command, data_root, digest, file_stamp, load_npz, lock, paper,
                          save_json, save_npz)
from common.formats import canonical_from_amazon, convert, named_columns
from common.options import COUNT, POSITIVE, option, options_parser
from common.runs import code_digest
from common.sources import AMAZON, canonical_file, read_interactions, read_items

# name -> [fewest interactions of a user, of an item, users sampled; 0 = all]. Filters: paper sec.
# 4.2. Table 2's source domains hold about a ninth of the users that pass; how they were drawn is
# not said, ours is a seeded sample of that size.
FILTERS = paper()['filters']
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
        text = prepared(self.folder, 'attributes')['attributes'].tobytes()
        return [list(map(tuple, item)) for item in json.loads(text)]

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
        values = (value for _, value in self.attributes[item - 1] if value)
        return next(values, self.item_ids[item - 1])


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
    while True:
        u, i = user[rows], item[rows]
        keep = (np.bincount(u)[u] >= min_user) & (np.bincount(i)[i] >= min_item)
        if keep.all():
            return rows
        rows = rows[keep]


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
    trained = items[ragged(offsets[:-1], np.diff(offsets) - 2)]
    last_two = items[offsets[1:] - [[2], [1]]]  # [2, U]
    return np.flatnonzero(np.isin(last_two, trained).all(0)).astype(np.int32)


def filtered(rows, filters):
    """The rows [N, 3] of users and items that stay, by user, time and place in the file."""
    min_user, min_item, sample = filters
    rows = rows[core(rows[:, 0], rows[:, 1], max(3, min_user), min_item)]
    alive = np.unique(rows[:, 0])
    if 0 < sample < len(alive):
        alive = np.random.default_rng([NEGATIVE_SEED, 1]).choice(alive, sample, replace=False)
        rows = rows[np.isin(rows[:, 0], alive)]
    return rows[np.lexsort((rows[:, 2], rows[:, 0]))]


def build(folder, filters):
    """(arrays, what else makes a Dataset, attributes) of the canonical files in `folder`."""
    known = read_items(canonical_file(folder, 'items.jsonl'))
    path = canonical_file(folder, 'interactions.csv')
    rows, user_ids, item_ids, unknown = read_interactions(path, known)
    first = np.unique(rows, axis=0, return_index=True)[1]  # an exact repeat counts once
    user, item, time = filtered(rows[np.sort(first)], filters).T
    if not len(user):
        raise UserError(f'{path}: no user has {max(3, filters[0])} interactions; '
                        'lower --min-user (3 at least)')
    users, lengths = np.unique(user, return_counts=True)
    catalogue = sorted({item_ids[i] for i in item})
    number = {key: i for i, key in enumerate(catalogue, 1)}
    items = np.array([number[item_ids[i]] for i in item], np.int32)
    offsets = offsets_of(lengths)
    evaluated = evaluated_users(items, offsets)
    if not len(evaluated):
        raise UserError(f"{path}: no user's last two items both occur in a training sequence; "
                        'there is nothing to evaluate')
    negatives = draw_evaluation_negatives(items, offsets, evaluated, len(catalogue))
    # a user's first item has no neighbour before it
    tied = np.delete(np.diff(time, prepend=-1) == 0, offsets[:-1])
    attributes = [known[key] for key in catalogue]
    texts = {tuple(value for _, value in pairs if value) for pairs in attributes}
    counts = {'users': len(users), 'items': len(catalogue), 'interactions': len(items),
              'avg_len': len(items) / len(users), 'evaluated': len(evaluated),
              'tied_neighbours': float(tied.mean()), 'rows_unknown_item': unknown,
              'rows_repeated': len(rows) - len(first), 'distinct_texts': len(texts),
              'short_of_negatives': int((negatives[:, -1] == 0).sum())}
    names = [user_ids[u] for u in users]
    fingerprint = digest(catalogue, attributes, names, items, offsets, evaluated, negatives)
    head = {'item_ids': catalogue, 'user_ids': names, 'counts': counts, 'fingerprint': fingerprint}
    return dict(zip(ARRAYS, (items, offsets, evaluated, negatives))), head, attributes


# ------------------------------------------------------------------------ prepared.npz

def filters_of(name, given):
    """[fewest interactions of a user, of an item, users sampled]: as given, else the dataset's."""
    own = FILTERS.get(name, DEFAULT)
    return [default if value is None else value for value, default in zip(given, own)]


def identity_of(folder, given, known):
    """What prepared.npz is made from: stamps of the two canonical files (`known`: an earlier
    identity, which saves reading untouched files), filters, and code."""
    stamps = {stem: file_stamp(canonical_file(folder, stem), known.get(stem))
              for stem in ('interactions.csv', 'items.jsonl')}
    return {**stamps, 'given': list(given), 'filters': filters_of(folder.name, given),
            'code': list(map(code_digest, CODE))}


def prepare(name, given):
    """The dataset, prepared anew where prepared.npz is not there or of something else. given: the
    filters that the user named, None for each that he did not; all None: those of last time."""
    folder = folder_of(name)
    if not any(value is not None for value in given):
        with contextlib.suppress(UserError):
            given = head_of(folder)['identity'].get('given', given)
    filters = filters_of(name, given)
    if name in AMAZON:
        canonical_from_amazon(name, folder, *filters[:2])
    elif not folder.is_dir():
        raise UserError(f'unknown dataset {name}: known are drugstore, grocery, '
                        f'{", ".join(AMAZON)}; for your own put interactions.csv and items.jsonl '
                        f'into {folder}')
    with contextlib.suppress(UserError):  # it is made now
        return load(name, given)
    with lock(folder):
        identity = identity_of(folder, given, {})
        arrays, head, attributes = build(folder, filters)
        arrays['head'] = json.dumps({'identity': identity, **head}).encode()
        arrays['attributes'] = json.dumps(attributes).encode()
        save_npz(folder / 'prepared.npz', arrays)
        save_json(folder / 'counts.json', head['counts'])
    return load(name)


def prepared(folder, *names):
    """{name: array} of members of prepared.npz; 'head' and 'attributes' are bytes of JSON."""
    path, remedy = folder / 'prepared.npz', f'run python -m common.data {folder.name}'
    if not path.exists():
        raise UserError(f'{folder.name} is not prepared: {remedy}')
    return load_npz(path, names, remedy)


def head_of(folder):
    """What prepared.npz says of itself: identity, ids, counts, fingerprint."""
    return json.loads(prepared(folder, 'head')['head'].tobytes())


def load(name, given=None):
    """The prepared dataset. UserError where it is not there, or where the canonical files, the code
    or the filters (`given`; None: as they were given) have changed since."""
    folder = folder_of(name)
    head = head_of(folder)
    then = head.pop('identity')
    now = identity_of(folder, given or then.get('given', DEFAULT), then)
    if now != then:
        what = 'its files have' if now['code'] == then['code'] else 'common/data.py has'
        raise UserError(f'{folder}: {what} changed since it was prepared: '
                        f'run python -m common.data {name}')
    return Dataset(name, folder=folder, **head, **prepared(folder, *ARRAYS))


# ------------------------------------------------------------------------ report

def published_counts(name):
    """What the paper's table 2 and its code say of a dataset: {count: value}, {} where nothing."""
    return paper()['table2'].get(name, {})


def report(data):
    """Counts beside the published ones, and warnings about what will not work well."""
    c, known = data.counts, published_counts(data.name)
    for key in ('users', 'items', 'interactions', 'avg_len', 'evaluated'):
        theirs = f'   paper {known[key]:,}' if key in known else ''
        print(f'  {key:13}{round(c[key], 1):>12,}{theirs}')
    print(f'  neighbours with the same timestamp: {c["tied_neighbours"]:.1%} (the file\'s order)')
    if c['rows_unknown_item'] or c['rows_repeated']:
        print(f'  dropped: {c["rows_unknown_item"]:,} rows whose item has no text, '
              f'{c["rows_repeated"]:,} repeated rows')
    if c['short_of_negatives']:
        print(f'  warning: {c["short_of_negatives"]:,} users have fewer than {NEGATIVES} '
              'negatives: the catalogue is small')
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
    option(p, '--from', Path, None, 'files of another form to convert: a folder, a stem or a file of '
           'interactions (data/README.md)', dest='source')
    option(p, '--items', Path, None, 'with --from FILE: the file of texts')
    option(p, '--columns', named_columns, {}, 'with --from: user=..,item=..,time=.. where the names '
           'are others, id=.. of the file of texts')
    p.add_argument('--any-version', action='store_true',
                   help='accept Amazon ratings whose sha256 is not the known one')
    return p.parse_args(argv)


def main(args):
    from common.baselines import untrained_lines
    if args.any_version:
        os.environ['ELEPHANT_ANY_VERSION'] = '1'
    if args.source:
        convert(folder_of(args.name), args.source, args.items, args.columns)
    data = prepare(args.name, [args.min_user, args.min_item, args.users])
    user, item, sample = head_of(data.folder)['identity']['filters']
    print(f'{args.name}: prepared in {data.folder / "prepared.npz"}; users with {user} '
          f'interactions, items with {item}{f", {sample:,} users sampled" if sample else ""}')
    report(data)
    for line in untrained_lines(data):
        print(f'  {line}')


if __name__ == '__main__':
    command(main, parse_args())
