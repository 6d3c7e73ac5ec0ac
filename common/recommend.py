"""Recommendations of a run: by which scores, for whom, and the k best of each as lines of a file.

B = users, n = items (ids 1..n, 0 padding); cold items, where they count, are n + 1 ..., in their
order. Histories are ragged (items, offsets), oldest first.
"""
import json
import re
import sys
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from common.arrays import offsets_of, parts, row_numbers
from common.baselines import all_scorers, weighted
from common.files import UserError, whole
from common.initial import read_embeddings, starting_tables
from common.models import load_seq
from common.progress import progress
from common.runs import read_ranks
from common.sequence import ItemTable
from common.sources import interactions
from common.training import start

AT_ONCE = 512  # users; a matter of speed and memory only


# ------------------------------------------------------------------------ scores

def with_cold(data):
    """The dataset with its cold items as items n + 1 ..., to score and to name."""
    wide = replace(data, item_ids=data.item_ids + data.cold_ids)
    wide.attributes = data.attributes + data.cold_attributes
    return wide


def began_with(folder, row, data, cold):
    """The Embeddings that a run began with, None of random rows; `cold`: with those of cold items.
    UserError: they are others by now, or know no cold items."""
    if row['init'] in (None, 'random'):
        if cold:
            raise UserError(f'--cold: {row["run"]} started from no embeddings, which that needs')
        return None
    path = folder / 'embeddings' / f'{row["init"]}.pt'
    found = read_embeddings(path, data, cold)
    # to the last bit: principal components may turn round where a row rounds differently. (The
    # identity of an ID model has one digest, that of a ranking without training those of all.)
    if found.digest not in str(row['identity']):
        raise UserError(f'{path}: was made again since {row["run"]}, which must be, too')
    return found


def scorer_of(folder, row, data, wide, machine):
    """score(items, offsets) of a run: scores after histories [B, n + 1], of the items of `wide`:
    the dataset, or the dataset with its cold items."""
    cold = wide is not data
    if row['model'] == 'untrained':
        found = began_with(folder, row, data, cold)
        embeddings = {row['init']: found} if found else {}
        scorers = all_scorers(wide, embeddings, data.n_items + 1)
        try:
            scorer = scorers[row['run']][1][row['weight']]
        except KeyError:
            raise UserError(f"{row['run']}: is not today's; evaluate.py untrained makes it"
                            ) from None

        def score(items, offsets):
            return scorer(weighted(items, offsets, row['decay'], wide.n_items))
        return score
    model = load_seq(folder / row['run'], data)
    if cold:
        table, bias = model.scorer()
        if table is not model.item_embedding.weight or bias is not None:
            raise UserError(f'--cold: {row["run"]} scores items by rows that cold items lack')
        embeddings = began_with(folder, row, data, cold)
        began, _ = starting_tables(type(model), data.n_items, embeddings, row)
        began[:data.n_items + 1] = model.item_embedding.weight.detach()
        model.item_embedding = ItemTable(began)
    table_and_bias = model.on(machine).scorer()

    @torch.no_grad()
    def score(items, offsets):
        states = model.all_states(items, offsets)
        return torch.nn.functional.linear(states, *table_and_bias)
    return score


# ------------------------------------------------------------------------ for whom

def known_of(keys, known, reasons, source):
    """{key: known[key]} of the keys that are known. The others are said, with the reason: UserError
    where they were typed in, so that `source` is an option."""
    lost = [key for key in keys if key not in known]
    if lost:
        text = (f'{source}: {lost[0] or "a blank line"}: '
                f'{reasons.get(lost[0], "not in this dataset")}')
        if source.startswith('--'):
            raise UserError(text)
        print(f'note: {text}; {len(lost):,} of {len(keys):,} are left out', file=sys.stderr)
    return {key: known[key] for key in keys if key in known}


def new_users(args, data, wide):
    """{name: its history} of --items, or of --histories: interactions in any form that --from
    takes (one file)."""
    pairs = [('new', item) for item in args.items or ()]
    if args.histories:
        # a line that repeats another goes
        rows = dict.fromkeys(interactions(args.histories, args.columns))
        pairs = [row[:2] for row in sorted(rows, key=itemgetter(3))]  # by time
    number = {key: i for i, key in enumerate(wide.item_ids, 1)}
    reasons = dict.fromkeys(data.cold_ids, 'in nobody\'s sequence; --cold knows it')
    source = str(args.histories or '--items')
    known = known_of([item for _, item in pairs], number, reasons, source)
    found = {}
    for user, item in pairs:
        if item in known:
            found.setdefault(user, []).append(known[item])
    users = dict.fromkeys(dict(pairs), 'a user without any known item')
    return known_of(users, found, users, source)


def asked(args, data, wide):
    """{name: its history, item numbers, oldest first} of those that the options ask for."""
    if args.items or args.histories:
        return new_users(args, data, wide)
    everybody = dict(zip(data.user_ids, np.split(data.items, data.offsets[1:-1])))
    if not args.users:
        return everybody
    source = '--users (ids, or one file that is there)'
    names = args.users
    if len(names) == 1 and Path(names[0]).is_file():
        source = names[0]
        names = [line.strip() for line in
                 Path(source).read_text(encoding='utf-8-sig', errors='replace').splitlines()]
    reasons = dict.fromkeys(data.dropped_users, 'left out by the filters of the data')
    return known_of(names, everybody, reasons, source)


# ------------------------------------------------------------------------ lines

def quoted(text):
    """As a field of a CSV file."""
    return '"%s"' % text.replace('"', '""')


# How user, item and title are written, and a line: by the ending of --out; None: printed.
FORMS = {None: (str, '%-12s %3d  %-16s %8.3f  %.80s\n'),
         '.csv': (quoted, '%s,%d,%s,%.6f,%s\n'),
         '.jsonl': (json.JSONEncoder(ensure_ascii=False).encode,
                    '{"user": %s, "rank": %d, "item": %s, "score": %.6f, "title": %s}\n')}


def best(args, score, histories, wide, kind):
    """Lines of a kind of FORMS: of each user the k best items, best first."""
    written, form = FORMS[kind]
    users = list(histories.items())
    ids = list(map(written, wide.item_ids))
    titles = [written(wide.title(item)) for item in range(1, len(ids) + 1)]

    if kind == '.csv':
        yield 'user,rank,item,score,title\n'
    most = min(AT_ONCE, 1 + 2 ** 28 // len(ids))  # a gigabyte of scores
    for part in progress(parts(len(users), most), desc=args.run, unit='user', unit_scale=most,
                         disable=not args.out):
        names, own = zip(*(users[i] for i in part))
        lengths = list(map(len, own))
        items = np.concatenate(own)
        scores = score(items, offsets_of(lengths))
        if not args.with_history:
            scores[row_numbers(lengths), items] = -torch.inf
        values, found = scores[:, 1:].topk(min(args.k, len(ids)))  # without padding's
        for name, *pairs in zip(map(written, names), values.tolist(), found.tolist()):
            for rank, (value, place) in enumerate(zip(*pairs), 1):
                if value > -torch.inf:  # else fewer than k are left
                    yield form % (name, rank, ids[place], value, titles[place])


def recommend(args, data, folder):
    """The k best items for all users, or for those that the options name."""
    row, _ = read_ranks(data.name, args.run)
    if row['model'] == 'recformer' or row['data'] != data.fingerprint:
        raise UserError(f"{args.run}: is not of today's {data.name}, or RecFormer (tables only)")
    if args.columns and not args.histories:
        raise UserError('--columns goes with --histories')
    kind = args.out and args.out.suffix
    if kind not in FORMS:
        raise UserError(f'--out {args.out}: must end in .csv or .jsonl')
    ours = b'user,rank,item,score,title\n|{"user": .*, "rank": |$'
    if kind and args.out.exists() and not re.match(ours, args.out.read_bytes()):
        raise UserError(f'--out {args.out}: holds no recommendations, and stays; choose another')
    wide = with_cold(data) if args.cold else data
    score = scorer_of(folder, row, data, wide, start(args))
    histories = asked(args, data, wide)
    if not histories:
        raise UserError('none of those users or items is known: nobody to recommend to')
    lines = best(args, score, histories, wide, kind)
    began = time.monotonic()
    if not args.out:
        sys.stdout.writelines(lines)
        return
    with whole(args.out) as part, open(part, 'w', encoding='utf-8', newline='') as f:
        f.writelines(lines)
    seconds = time.monotonic() - began
    print(f'{len(histories):,} users in {seconds:.1f} s ({len(histories) / seconds:,.0f} a second)'
          f', {args.k} items for each at most, written to {args.out}')
