"""Results -> the paper's tables; paired comparison of two runs; metrics and recommendations of a saved ID model.

    python evaluate.py table grocery                              # prints, and writes runs/grocery/results.md
    python evaluate.py compare grocery RUN_A RUN_B                # names of rows in runs/grocery/results.json
    python evaluate.py checkpoint grocery runs/grocery/seq/X.pt   # computes its metrics again
    python evaluate.py topk grocery runs/grocery/seq/X.pt --user 1 --k 10

Reads: runs/<dataset>/results.json, ranks/<run>.npz, seq/*.pt, data/<dataset>/prepared.npz.    Writes: results.md.
"""
import argparse
import zipfile

import numpy as np
import torch

from common.bert4rec import BERT4Rec
from common.data import load
from common.files import UserError, command, load_pt, runs_root, save_text
from common.metrics import FULL, SAMPLED, compare, load_rows, per_user, rank_counts, summarise
from common.report import render
from common.sasrec import SASRec
from common.text import take
from common.training import positive, start


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest='action', required=True)
    add = lambda name, text: commands.add_parser(name, help=text)
    for name, text in (('table', 'all tables that the results have rows for'), ('compare', 'paired difference of two runs'),
                       ('checkpoint', 'metrics of a saved ID model'), ('topk', 'recommendations of a saved ID model')):
        sub = add(name, text)
        sub.add_argument('dataset')
        if name == 'compare':
            sub.add_argument('a', metavar='RUN_A')
            sub.add_argument('b', metavar='RUN_B')
            sub.add_argument('--draws', type=positive(), default=10_000, help='of the bootstrap and of the permutation test')
        if name in ('checkpoint', 'topk'):
            sub.add_argument('file', help='runs/<dataset>/seq/*.pt')
        if name == 'topk':
            sub.add_argument('--user', required=True, help='user id as in interactions.csv')
            sub.add_argument('--k', type=positive(), default=10)
    return p.parse_args(argv)


# ---------------------------------------------------------------------------- table, compare

def show_tables(folder, data):
    rows = load_rows(folder)
    if not rows:
        raise UserError(f'{folder / "results.json"}: no results yet; bash run_all.sh {data.name} makes them')
    text = render(data, rows)
    save_text(folder / 'results.md', text)
    print(text)
    print(f'written to {folder / "results.md"}; the rows are in {folder / "results.json"}')


def read_ranks(folder, run):
    """(row, arrays users, sampled, full) of a run of results.json."""
    row = next((r for r in load_rows(folder) if r['run'] == run), None)
    if row is None:
        raise UserError(f'{run}: no such run in {folder / "results.json"}')
    path = folder / 'ranks' / f'{run}.npz'
    try:
        with np.load(path, allow_pickle=False) as f:
            return row, {k: f[k] for k in ('users', 'sampled', 'full')}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        raise UserError(f'{path}: missing or damaged; take {run} out of results.json and run it again') from None


def show_comparison(folder, args):
    (row_a, a), (row_b, b) = read_ranks(folder, args.a), read_ranks(folder, args.b)
    if not np.array_equal(a['users'], b['users']) or row_a['identity']['data'] != row_b['identity']['data']:
        raise UserError(f'{args.a} and {args.b} were evaluated on different users; run both again on the same data')
    if row_a['exclude_history'] != row_b['exclude_history']:
        raise UserError(f'{args.a} and {args.b}: one was ranked with --exclude_history, the other without; run both alike')
    print(f'{args.a} minus {args.b}, {len(a["users"]):,} users, percent')
    print(f'{"":24}{"difference":>11}  {"95 % interval":>18}  {"p":>7}')
    for ranking, ks in (('sampled', SAMPLED), ('full', FULL)):
        for metric in ('HR', 'NDCG'):
            for k in ks:
                d, (low, high), p = compare(per_user(a[ranking], metric, k), per_user(b[ranking], metric, k), args.draws)
                print(f'{ranking:8}{metric}@{k:<11}{100 * d:+15.2f}  [{100 * low:+7.2f}, {100 * high:+7.2f}]  {p:7.4f}'
                      + ('  tie' if low <= 0 <= high else ''))


# ---------------------------------------------------------------------------- saved ID models

def load_model(file, data):
    """The ID model of a checkpoint of train_seq.py; UserError where it was trained on other data."""
    content = load_pt(file, 'seq')
    meta, state = content['meta'], content['model']
    if meta['data'] != data.fingerprint:
        raise UserError(f'{file}: was trained on another version of {meta["dataset"]}')
    options = {'tied': meta['tied']} if meta['model'] == 'bert4rec' else {}
    model = {'sasrec': SASRec, 'bert4rec': BERT4Rec}[meta['model']](
        state['item_embedding.weight'], True, state.get('item_embedding.text'), max_items=meta['max_items'], **options)
    model.load_state_dict(state)
    return model.eval(), meta


@torch.no_grad()
def show_checkpoint(file, data):
    model, meta = load_model(file, data)
    items, offsets, targets = data.split('test')
    # the precision of the run's own evaluation: bfloat16 against float32 moves the ranks of a few users in a hundred
    precision = meta['identity']['options']['precision']
    _, autocast = start(argparse.Namespace(device='cpu', deterministic=False, precision=precision))
    chunks = np.array_split(np.arange(len(targets)), -(-len(targets) // 512))
    with autocast():
        states = torch.cat([model.states(*take(items, offsets, rows), 'cpu').float() for rows in chunks])
        table, bias = model.scorer()
    metrics = summarise(rank_counts(states, table, targets, data.negatives, bias))
    print(f'{meta["run"]}, lr {meta["lr"]:g}, {len(targets):,} users, precision {precision}, history among the candidates, percent')
    for ranking, values in metrics.items():
        print(f'  {ranking:8}' + '  '.join(f'{k} {100 * v:.2f}' for k, v in values.items()))


@torch.no_grad()
def show_topk(file, data, user, k):
    if user not in data.user_ids:
        raise UserError(f'--user {user}: no such user in {data.name}')
    model, _ = load_model(file, data)
    u = data.user_ids.index(user)
    history = data.items[data.offsets[u]:data.offsets[u + 1]]
    table, bias = model.scorer()
    scores = (model.states(history, np.array([0, len(history)]), 'cpu') @ table.T)[0] + (0 if bias is None else bias)
    scores[0] = -torch.inf
    scores[torch.from_numpy(np.unique(history)).long()] = -torch.inf
    for rank, item in enumerate(scores.topk(min(k, int(torch.isfinite(scores).sum()))).indices.tolist(), 1):
        print(f'{rank:3}  {data.item_ids[item - 1]:16} {float(scores[item]):8.3f}  '
              + ' | '.join(value for _, value in data.attributes[item - 1] if value)[:100])


def main(args):
    data = load(args.dataset)
    folder = runs_root() / args.dataset
    if args.action == 'table':
        show_tables(folder, data)
    elif args.action == 'compare':
        show_comparison(folder, args)
    elif args.action == 'checkpoint':
        show_checkpoint(args.file, data)
    else:
        show_topk(args.file, data, args.user, args.k)


if __name__ == '__main__':
    command(main, parse_args())
