"""Runs -> the tables and figures; what needs no training; comparisons; recommendations.

    python evaluate.py untrained drugstore              # popularity, nearest neighbours: a run each
    python evaluate.py table drugstore                  # prints, writes runs/drugstore/results.md
    python evaluate.py compare drugstore RUN_A RUN_B    # names of folders in runs/drugstore/
    python evaluate.py inspect drugstore RUN ...        # size, time, cold items of saved ID models
    python evaluate.py recommend drugstore RUN --users 1 2 --k 10
    python evaluate.py attention drugstore --seq RUN    # figure 1: figure1.png, figure1.md
    python evaluate.py curve drugstore                  # figure 2, after run_all.sh --figure2

Reads:  runs/<dataset>/*/, runs/<dataset>/embeddings/, data/<dataset>/prepared.npz.
Writes: runs/<dataset>/results.md, results.json, inspect.md, figure1.*, figure2.*
"""
import itertools
import time
from statistics import mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F

from common.backbone import load_recformer, start_model, untouched
from common.baselines import untrained
from common.data import draw_evaluation_negatives, load
from common.figures import average, cls_attention, draw_attention, draw_curve, findings, numbers
from common.files import UserError, command, runs_root, save_json, save_text
from common.initial import read_embeddings, starting_tables
from common.metrics import (CUTOFFS, compare, per_user, product_scorer, rank_counts, result_of,
                            summarise)
from common.models import load_seq
from common.options import POSITIVE, add_machine_options, option, options_parser
from common.progress import progress
from common.report import cells_of, markdown, render
from common.runs import code_of, finished, load_rows, read_ranks, result_line, write_row
from common.text import tokenize
from common.training import start


# ------------------------------------------------------------------------ no training

def write_untrained(args, data, folder):
    """A run for every ranking that needs no training, of all embeddings that are there."""
    embeddings = {path.stem: read_embeddings(path, data)
                  for path in sorted((folder / 'embeddings').glob('*.pt'))}
    identity = {'data': data.fingerprint,
                'embeddings': {name: found.digest for name, found in embeddings.items()}}
    code = code_of('common/baselines.py')
    if finished(folder / 'popularity', identity, code, args):
        print(f'{folder}: rankings without training are up to date')
        return
    matrices = {name: found.matrix for name, found in embeddings.items()}
    for name, fields, ranks in reversed(list(untrained(data, matrices))):  # popularity is last
        head = embeddings[fields['init']].head if fields['init'] else {}
        origin = {key: head.get(key) for key in ('plm', 'norm', 'cosine')}
        row = write_row(folder / name, identity, code, {'users': data.evaluated, **ranks},
                        model='untrained', **fields, **origin, **result_of(data, ranks))
        print(f'{name}: {result_line(row)}, written to {folder / name}')


# ------------------------------------------------------------------------ table, compare

def finish(path, text):
    """Save a text, print it, and say where it is."""
    save_text(path, text)
    print(f'{text}\nwritten to {path}')


def show_tables(args, data, folder):
    """Print results.md, made of whatever rows there are."""
    rows = load_rows(data.name)
    if not rows:
        raise UserError(f'{folder}: no results yet; bash run_all.sh {data.name} makes them')
    save_json(folder / 'results.json', rows)
    finish(folder / 'results.md', render(data, rows))


def show_comparison(args, data, folder):
    """Paired difference of two runs, for every metric."""
    (row_a, a), (row_b, b) = (read_ranks(data.name, run) for run in (args.run_a, args.run_b))
    if not np.array_equal(a['users'], b['users']) or row_a['data'] != row_b['data']:
        raise UserError(f'{args.run_a} and {args.run_b} were evaluated on different users; '
                        'run both again on the same data')
    print(f'{args.run_a} minus {args.run_b}, {len(a["users"]):,} users, percent')
    print(f'{"":24}{"difference":>11}  {"95 % interval":>18}  {"p":>7}')
    for ranking, cutoffs in CUTOFFS.items():
        for metric, k in itertools.product(('HR', 'NDCG'), cutoffs):
            values_a, values_b = (per_user(ranks[ranking], metric, k) for ranks in (a, b))
            difference, (low, high), p = compare(values_a, values_b)
            tie = '  tie' if low <= 0 <= high else ''
            print(f'{ranking:8}{metric}@{k:<11}{100 * difference:+15.2f}  '
                  f'[{100 * low:+7.2f}, {100 * high:+7.2f}]  {p:7.4f}{tie}')


# ------------------------------------------------------------------------ saved ID models

@torch.no_grad()
def give_back(model, about, items, data, folder):
    """Set these items' rows of a trained table to what they were before training, which knew them
    as negatives only and pushed them down."""
    embeddings = None
    if about['init'] != 'random':
        embeddings = read_embeddings(folder / 'embeddings' / f'{about["init"]}.pt', data)
    torch.manual_seed(about['seed'])
    random, given = starting_tables(type(model), data.n_items, about['hidden'], embeddings,
                                    about['scale'], about['seed'])
    begun = random if about['mode'] in ('random', 'id+text') else given
    table = model.item_embedding.weight
    table[items] = begun[items].to(table.device)


def metrics_for(model, data, users, negatives):
    """Metrics of a model for the test items of these users."""
    items, offsets, targets = data.split('test', users)
    score = product_scorer(model.all_states(items, offsets), *model.scorer())
    return summarise(rank_counts(score, data.n_items, targets, negatives, (items, offsets)))


def milliseconds(model, data):
    """Median time for the top 10 of 1,000 users."""
    items, offsets, _ = data.split('test', np.resize(data.evaluated, 1000))
    table, bias = model.scorer()
    times = []
    for _ in range(6):
        began = time.perf_counter()
        F.linear(model.all_states(items, offsets), table, bias).topk(10)
        times.append(1000 * (time.perf_counter() - began))
    return median(times[1:])


def inspect(args, data, folder):
    """What each saved ID model costs and reaches, also on users whose test item is cold: in nobody's
    training part (the paper leaves them out; the embeddings know the items)."""
    machine, body = start(args), []
    cold = np.setdiff1d(np.arange(1, data.n_items + 1), data.training()[0])
    users = np.flatnonzero(np.isin(data.items[data.offsets[1:] - 1], cold))
    negatives = draw_evaluation_negatives(data.items, data.offsets, users, data.n_items)
    for run in args.runs:
        row, _ = read_ranks(data.name, run)
        model, about = load_seq(folder / run, data)
        found = metrics_for(model.on(machine), data, data.evaluated, data.negatives)
        line = [run, f'{row["parameters"]:,}',
                f'{(folder / run / "model.pt").stat().st_size / 1e6:.1f}',
                f'{row["seconds"] / row["epochs"]:.1f}', f'{milliseconds(model, data):.0f}',
                *(f'{100 * found[ranking]["NDCG@10"]:.2f}' for ranking in ('sampled', 'full'))]
        if len(users) and model.scorer()[0] is model.item_embedding.weight:
            give_back(model, about, cold, data, folder)
            found = metrics_for(model, data, users, negatives)
            line += [f'{100 * found["sampled"]["NDCG@10"]:.2f}', f'{100 * found["full"]["HR@50"]:.2f}']
        body.append(line + ['-'] * (9 - len(line)))
    head = ['', 'parameters', 'MB', 's an epoch', 'ms for 1,000 users', 'NDCG@10', 'all items',
            'cold: NDCG@10', 'cold: HR@50 of all']
    finish(folder / 'inspect.md', f'{len(users):,} users with a cold test item\n\n'
           + markdown(head, body))


@torch.no_grad()
def recommend(args, data, folder):
    """The k best items for each user, his own left out."""
    model = load_seq(folder / args.run, data)[0].on(start(args))
    table, bias = model.scorer()
    for user in args.users:
        if user not in data.user_ids:
            raise UserError(f'--users {user}: no such user in {data.name}')
        row = data.user_ids.index(user)
        history = data.items[data.offsets[row]:data.offsets[row + 1]]
        scores = F.linear(model.all_states(history, np.array([0, len(history)])), table, bias)[0]
        scores[[0, *history]] = -torch.inf
        count = min(args.k, int(torch.isfinite(scores).sum()))
        for rank, item in enumerate(scores.topk(count).indices.tolist(), 1):
            print(f'{user:12} {rank:3}  {data.item_ids[item - 1]:16} {float(scores[item]):8.3f}  '
                  f'{data.title(item)[:80]}')


# ------------------------------------------------------------------------ figures

def show_attention(args, data, folder):
    """Figure 1: the paper's four findings as numbers over many users, and maps of one as a PNG."""
    tuned = load_recformer(args.checkpoint or folder / 'ft1-seed0')
    if tuned.config.layers < 3:
        raise UserError(f'{data.name}: its language model has {tuned.config.layers} layers; thirds '
                        'of the depth need three')
    models = {'vanilla': untouched(start_model(None, tuned.plm, tuned.config.layers)), 'tuned': tuned}
    models['vanilla'].config = tuned.config  # its limits of items and tokens
    seq = load_seq(folder / args.seq, data)[0] if args.seq else None
    if seq and not hasattr(seq, 'attention_weights'):
        raise UserError(f'--seq {args.seq}: SASRec is needed here')
    tokens, machine = tokenize(data.attributes, tuned.words), start(args)
    users = np.random.default_rng(0).permutation(data.evaluated)[:args.users]
    items, offsets, _ = data.split('test', np.append(users, user_of_maps(args, data)))
    histories = [items[a:b] for a, b in zip(offsets[:-1], offsets[1:])]
    like = [seq and seq.attention_weights(items[-seq.max_items:])[:, ::-1] for items in histories]
    maps, averages = {}, {}
    for name, model in models.items():
        each = cls_attention(model.on(machine).eval(), items, offsets, tokens)
        each = list(progress(each, total=len(histories), desc=name, unit='user'))
        averages[name] = average([numbers(*found, weights if weights is None else weights.mean(0))
                                  for found, weights in zip(each[:-1], like)])
        packed, maps[f'{name} ({model.stage})'] = each[-1]
    body = [[name, stratum, *(f'{value:.3f}' for value in found.values())]
            for name, strata in averages.items() for stratum, found in strata.items()]
    lines = [f'- {what}: {"yes" if true else "no"} ({how})\n'
             for what, true, how in findings(averages['vanilla'], averages['tuned'])]
    head = ['model', 'third', *averages['tuned']['top']]
    finish(folder / 'figure1.md', f'CLS attention of {len(users)} users of {data.name}\n\n'
           f'{markdown(head, body)}\n{"".join(lines)}')
    words = [tuned.words.backend.id_to_token(int(token)) for token in packed.tokens]
    draw_attention(folder / 'figure1.png', maps, packed, words, like[-1])
    print(f'the maps of one user: {folder / "figure1.png"}')


def user_of_maps(args, data):
    """--user, or the evaluated user with the shortest history."""
    if args.user is None:
        return data.evaluated[np.argmin(data.lengths[data.evaluated])]
    if args.user not in data.user_ids:
        raise UserError(f'--user {args.user}: no such user in {data.name}')
    return data.user_ids.index(args.user)


def show_curve(args, data, folder):
    """Figure 2: SASRec from PT of a share of the source users (embeddings pt-share<percent>), beside
    LF and random."""
    rows = [row for row in load_rows(data.name) if row['data'] == data.fingerprint]
    cells = cells_of(rows).get(('sasrec', 'bce'), {}).values()
    cells = [cell for cell in cells if cell.first['mode'] in ('random', 'trainable')]
    shared = [cell for cell in cells if cell.first['init'].startswith('pt-share')]
    width = max((cell.first['hidden'] for cell in shared), default=None)
    found = {}
    for cell in cells:
        if cell.first['hidden'] == width and not cell.mixed:
            v = [100 * row['metrics']['sampled']['NDCG@10'] for row in cell.rows]
            spread = stdev(v) if len(v) > 1 else 0.0
            found[cell.first['init'], cell.first['scale']] = mean(v), spread
    points = {(scale, float(init.removeprefix('pt-share'))): value
              for (init, scale), value in found.items() if init.startswith('pt-share')}
    if not points:
        raise UserError(f'{folder}: no runs from a share of the source users; '
                        f'bash run_all.sh {data.name} --figure2 makes them')
    others = {'random': ('random', 'raw'), 'LF raw': ('lf', 'raw'), 'LF centred': ('lf', 'centred')}
    bands = {name: found[key] for name, key in others.items() if key in found}
    named = bands | {f'PT {scale}, {share:g} % of the source users': value
                     for (scale, share), value in sorted(points.items())}
    body = [[name, f'{m:.2f} ± {s:.2f}'] for name, (m, s) in named.items()]
    finish(folder / 'figure2.md', markdown(['SASRec from', 'NDCG@10'], body))
    draw_curve(folder / 'figure2.png', dict(sorted(points.items())), bands)


# ------------------------------------------------------------------------ main

ACTIONS = {'untrained': (write_untrained, 'popularity and nearest neighbours: a run each'),
           'table': (show_tables, 'all tables that the runs have rows for'),
           'compare': (show_comparison, 'paired difference of two runs'),
           'inspect': (inspect, 'size, time and cold items of saved ID models'),
           'recommend': (recommend, 'the best items for users'),
           'attention': (show_attention, 'figure 1: what CLS attends to'),
           'curve': (show_curve, 'figure 2: quality over the share of source users')}


def parse_args(argv=None):
    p = options_parser(__doc__)
    commands = p.add_subparsers(dest='action', required=True)
    of = {name: commands.add_parser(name, help=text, allow_abbrev=False)
          for name, (_, text) in ACTIONS.items()}
    for name, command_ in of.items():
        command_.add_argument('dataset')
        if name in ('untrained', 'inspect', 'recommend', 'attention'):
            add_machine_options(command_, name == 'attention', trains=False)
    of['compare'].add_argument('run_a', metavar='RUN_A')
    of['compare'].add_argument('run_b', metavar='RUN_B')
    of['inspect'].add_argument('runs', nargs='+', metavar='RUN')
    of['recommend'].add_argument('run', metavar='RUN')
    option(of['recommend'], '--users', str, None, 'as in interactions.csv', nargs='+', required=True)
    option(of['recommend'], '--k', POSITIVE, 10, 'items for each')
    g = of['attention']
    option(g, '--checkpoint', str, None, 'tuned language model (default: runs/<dataset>/ft1-seed0)')
    option(g, '--seq', str, None, 'SASRec to compare with', metavar='RUN')
    option(g, '--user', str, None, 'of the maps (default: one with a short history)')
    option(g, '--users', POSITIVE, 200, 'of the numbers')
    return p.parse_args(argv)


def main(args):
    data = load(args.dataset)
    action, _ = ACTIONS[args.action]
    action(args, data, runs_root() / args.dataset)


if __name__ == '__main__':
    command(main, parse_args())
