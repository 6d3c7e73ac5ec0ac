"""Canonical files -> prepared arrays: filters, leave-one-out split, evaluated users, negatives.

    python -m common.data NAME   # data/NAME/interactions.csv[.gz], items.jsonl[.gz] -> prepared.npz

Ids: items 1..n in the order of `item_ids` (sorted as text), 0 = padding, the same everywhere;
users are rows 0..U-1. Ends with what two rankings that need no training reach on these data.
"""
import io
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from pathlib import Path

import numpy as np

from common.arrays import cut, offsets_of
from common.files import (PAPER, UserError, command, data_root, digest, file_stamp, load_npz, lock,
                          save_npz)
from common.formats import AMAZON, canonical_from_amazon, convert, named_columns
from common.options import COUNT, POSITIVE, option, options_parser
from common.runs import code_digest
from common.sources import read_interactions, read_items

# name -> [fewest interactions of a user, of an item, users sampled; 0 = all]. Filters: paper sec.
# 4.2. Table 2's source domains hold about a ninth of the users that pass; how they were drawn is
# not said, ours is a seeded sample of that size.
FILTERS = PAPER['filters']
DEFAULT = 4, 1, 0
NEGATIVES = 100  # paper sec. 4.2
NEGATIVE_SEED = 98765  # authors' code
ARRAYS = 'items offsets evaluated negatives'.split()
CODE = 'common/arrays.py', 'common/data.py', 'common/sources.py'  # makes prepared.npz


def as_lines(texts):
    """Texts of JSON, one a line, as the bytes of one member of prepared.npz."""
    return np.frombuffer('\n'.join(texts).encode(), np.uint8)


def member(name):
    """A property of a Dataset: the values of a member, read when they are first asked for."""
    def read(data):
        return list(data.each(name))
    return cached_property(read)


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
    fingerprint: str       # digest of all of the above but counts, and of the items' texts
    folder: Path
    identity: dict = None  # what it was prepared from, see identity_of

    # of item i at i - 1: list of [name, value] in reading order
    attributes = member('attributes')
    # Items that have a text but are in nobody's sequence: sorted text ids, and their attributes in
    # that order. They are none of the items 1..n, and the fingerprint knows nothing of them.
    cold_ids = member('cold_ids')
    cold_attributes = member('cold_attributes')
    # text ids of users of interactions.csv whom the filters or the sample left out
    dropped_users = member('dropped_users')

    def __post_init__(self):
        self.n_items = len(self.item_ids)
        self.lengths = np.diff(self.offsets)

    def each(self, name):
        """The values of one of these four lists, one by one, and none of it is kept."""
        lines = prepared(self.folder, name)[name]
        return map(json.loads, io.BytesIO(lines))

    def split(self, which):
        """Histories and targets of the evaluated users: ragged (items, offsets) and targets [E].
        'valid': training part -> validation item; 'test': training part and validation item -> test
        item."""
        leave = {'valid': 2, 'test': 1}[which]
        targets = self.items[self.offsets[self.evaluated + 1] - leave]
        return *self.training(leave, self.evaluated), targets

    def training(self, leave=2, users=slice(None)):
        """Sequences of `users` (default: all) but their last `leave` items: ragged (items,
        offsets)."""
        begin = self.offsets[:-1][users]
        return cut(self.items, begin, self.lengths[users] - leave)

    def users_with(self, least):
        """Numbers of the users with so many training items. UserError: there are none."""
        users = np.flatnonzero(self.lengths - 2 >= least)
        if not users.size:
            raise UserError(f'{self.name}: no user has {least + 2} interactions')
        return users

    def title(self, item):
        """The first attribute of an item that says something, else its id; in one line."""
        values = (' '.join(value.split()) for _, value in self.attributes[item - 1])
        return next(filter(None, values), self.item_ids[item - 1])


def folder_of(name):
    """data/<name>. UserError: a name that is more than a word."""
    if not re.fullmatch(r'[A-Za-z0-9_-]+', name):
        raise UserError(f'dataset name {name!r}: letters, digits, - and _ only')
    return data_root() / name


def canonical_file(folder, stem):
    """The file `stem` or `stem`.gz; UserError where neither or both are there."""
    found = [*folder.glob(stem), *folder.glob(f'{stem}.gz')]
    if len(found) != 1:
        raise UserError(f'{folder}: must hold one of {stem} and {stem}.gz (data/README.md), not '
                        f'{len(found)}; known datasets: drugstore, grocery, {", ".join(AMAZON)}')
    return found[0]


# ------------------------------------------------------------------------ filters, split, negatives

def repeats(columns):
    """The rows that repeat an earlier one in all columns."""
    order = np.lexsort(columns)  # stable: of equal rows the first stays the first
    same = [np.diff(column[order]) == 0 for column in columns]
    return order[1:][np.all(same, 0)]


def core(columns, min_user, min_item):
    """The columns user, item, time without the rows of users who have fewer than min_user and of
    items that have fewer than min_item, until there are none."""
    while True:
        user, item, _ = columns
        keep = (np.bincount(user) >= min_user)[user] & (np.bincount(item) >= min_item)[item]
        if keep.all():
            return columns
        columns = [column[keep] for column in columns]


def draw_evaluation_negatives(items, offsets, users, n):
    """[users, 100] item ids: uniform without replacement outside the user's sequence; 0 where the
    catalogue has no more. The same on every call."""
    rng = np.random.default_rng(NEGATIVE_SEED)
    out = np.zeros((len(users), NEGATIVES), np.int32)
    for row, user in zip(out, users):
        own = set(items[offsets[user]:offsets[user + 1]].tolist())
        # drawn in random order, so what is left after the user's own is uniform too
        drawn = rng.choice(n, min(n, NEGATIVES + len(own)), replace=False) + 1
        others = [item for item in drawn.tolist() if item not in own]
        row[:len(others)] = others[:NEGATIVES]
    return out


def evaluated_users(items, offsets):
    """Users whose validation and test item both occur in somebody's training part (paper sec. 4.2:
    no cold items)."""
    last_two = offsets[1:] - [[2], [1]]  # [2, U]
    trained = np.delete(items, last_two)
    return np.flatnonzero(np.isin(items[last_two], trained).all(0)).astype(np.int32)


def filtered(columns, min_user, min_item, sample):
    """The three columns without the users and items that go, by user, time and place in the
    file."""
    user, _, time = columns = core(columns, max(3, min_user), min_item)
    order = np.lexsort((time, user))
    alive = np.unique(user)
    if 0 < sample < len(alive):
        alive = np.random.default_rng([NEGATIVE_SEED, 1]).choice(alive, sample, replace=False)
        order = order[np.isin(user[order], alive)]
    return [column[order] for column in columns]


def build(folder, filters, identity):
    """{name: array}, what prepared.npz holds of the canonical files in `folder`."""
    texts = read_items(canonical_file(folder, 'items.jsonl'))
    path = canonical_file(folder, 'interactions.csv')
    columns, user_ids, unknown, lost = read_interactions(path, texts)
    repeated = repeats(columns)
    columns = [np.delete(column, repeated) for column in columns]
    user, item, time = filtered(columns, *filters)
    users, lengths = np.unique(user, return_counts=True)
    offsets = offsets_of(lengths)
    kept = np.bincount(item) > 0
    items = np.cumsum(kept, dtype=np.int32)[item]  # item_ids are sorted
    evaluated = evaluated_users(items, offsets)
    if not len(evaluated):
        raise UserError(f'{path}: no user has {max(3, filters[0])} interactions (--min-user; '
                        f'--min-item: {filters[1]}) and two last items that occur in training '
                        f'parts; rows whose item has no text: {unknown:,}, as of {lost!r}')
    user_ids = np.array(user_ids, object)
    user_names = user_ids[users].tolist()
    catalogue = list(compress(texts, kept))
    attributes = [texts.pop(key) for key in catalogue]  # what is left in `texts` is cold
    negatives = draw_evaluation_negatives(items, offsets, evaluated, len(catalogue))
    neighbours = np.diff(user) == 0
    tied = np.diff(time)[neighbours] == 0
    # hashes, as the values of a million items would take much memory
    different = {hash(tuple(v for _, v in json.loads(text) if v)) for text in attributes}
    counts = {
        'users': len(users), 'items': len(catalogue), 'interactions': len(items),
        'avg_len': lengths.mean(), 'evaluated': len(evaluated),
        "% of neighbours have one timestamp, in the file's order (data/README.md)":
            100 * tied.mean(),
        'users of these files left out by the filters or the sample': len(user_ids) - len(users),
        f'rows dropped, as their item has no text (the first: {lost!r})': unknown,
        'rows dropped, as they repeat another': len(repeated),
        'interactions with an item that the user had before': len(repeats([user, item])),
        "items in nobody's sequence (evaluate.py recommend --cold knows them)": len(texts),
        'warning: items whose text, or lack of one, another item has too':
            len(catalogue) - len(different),
        f'warning: users with fewer than {NEGATIVES} negatives, as the catalogue is small':
            negatives[:, -1].tolist().count(0)}
    fingerprint = digest(catalogue, f'[{", ".join(attributes)}]'.encode(), user_names, items,
                         offsets, evaluated, negatives)
    head = {'identity': identity, 'item_ids': catalogue, 'user_ids': user_names, 'counts': counts,
            'fingerprint': fingerprint}
    dropped = np.delete(user_ids, users)
    return {
        'head': as_lines([json.dumps(head)]),
        'items': items, 'offsets': offsets, 'evaluated': evaluated, 'negatives': negatives,
        'attributes': as_lines(attributes),
        'cold_ids': as_lines(map(json.dumps, texts)), 'cold_attributes': as_lines(texts.values()),
        'dropped_users': as_lines(map(json.dumps, dropped))}


# ------------------------------------------------------------------------ prepared.npz

def identity_of(folder, filters, known):
    """What prepared.npz is made from: stamps of the two canonical files (`known`: an earlier
    identity, which saves reading untouched files), filters, and code."""
    identity = {'filters': filters, 'code': list(map(code_digest, CODE))}
    for stem in ('interactions.csv', 'items.jsonl'):
        identity[stem] = file_stamp(canonical_file(folder, stem), known.get(stem, {}))
    return identity


def prepare(name, given):
    """The dataset, prepared anew where prepared.npz is not there or of something else. given: the
    filters that the user named; for each None that of last time counts, else the dataset's."""
    folder = folder_of(name)
    known = FILTERS.get(name, DEFAULT)
    with suppress(UserError):
        known = head_of(folder)['identity']['filters']
    filters = [old if new is None else new for new, old in zip(given, known)]
    if name in AMAZON:
        canonical_from_amazon(folder, filters[:2])
    with suppress(UserError):  # it is made now
        return load(name, filters)
    identity = identity_of(folder, filters, {})
    with lock(folder, wait=True):
        save_npz(folder / 'prepared.npz', build(folder, filters, identity))
    return load(name)


def prepared(folder, *names):
    """{name: array} of members of prepared.npz."""
    return load_npz(folder / 'prepared.npz', names, f'run python -m common.data {folder.name}')


def head_of(folder):
    """What prepared.npz says of itself: identity, ids, counts, fingerprint."""
    return json.loads(prepared(folder, 'head')['head'].tobytes())


def load(name, filters=None):
    """The prepared dataset. UserError where it is not there, or where the canonical files, the code
    or the filters (None: they are as they were) have changed since."""
    folder = folder_of(name)
    head = head_of(folder)
    then = head['identity']
    if identity_of(folder, filters or then['filters'], then) != then:
        raise UserError(f'{folder}: its files, or the code that prepares them, have changed since '
                        f'it was prepared: run python -m common.data {name}')
    return Dataset(name, folder=folder, **head, **prepared(folder, *ARRAYS))


# ------------------------------------------------------------------------ report

def report(data):
    """All counts but zeros, beside those of the paper's table 2 and code."""
    known = PAPER['table2'].get(data.name, {})
    for what, count in data.counts.items():
        ours = round(count, 1)
        note = ''
        if what in known:
            note = f'   paper {known[what]:,}{"" if ours == known[what] else "   warning: differs"}'
        if ours:
            print(f'{ours:>12,}  {what}{note}')


def parse_args(argv=None):
    p = options_parser(__doc__)
    option(p, 'name', f'{", ".join(AMAZON)}, drugstore, grocery, or a folder of data/')
    option(p, '--min-user', 'fewest interactions of a user (at first 4, sources 5; at least 3)',
           POSITIVE)
    option(p, '--min-item', 'fewest interactions of an item (at first 1, source domains 5)',
           POSITIVE)
    option(p, '--users', "seeded sample of so many, 0 = all (sources: Table 2's)", COUNT)
    option(p, '--from', 'make its files from others: a folder, stem or file (data/README.md)',
           Path, dest='source')
    option(p, '--items', 'the file of texts, where --from names a file', Path)
    option(p, '--columns', 'user=..,item=..,time=..,id=..,text=..+..: names (id: of the texts; '
           'else as item; text: what is read, three at most)', named_columns, {})
    return p.parse_args(argv)


def main(args):
    from common.baselines import untrained_lines
    if args.source:
        convert(folder_of(args.name), args.source, args.items, args.columns)
    elif args.items or args.columns:
        raise UserError('--items and --columns go with --from')
    data = prepare(args.name, [args.min_user, args.min_item, args.users])
    print(f'{args.name}: prepared in {data.folder / "prepared.npz"}; fewest interactions of a '
          f'user, of an item, users sampled (0 = all): {data.identity["filters"]}; of an item the '
          'first three of these are read (--from with --columns text=.. chooses): '
          f'{str(dict(next(data.each("attributes"))))[:300]}')
    report(data)
    for line in untrained_lines(data):
        print(f'  {line}')


if __name__ == '__main__':
    command(main, parse_args())
