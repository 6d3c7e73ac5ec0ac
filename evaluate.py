"""Runs -> the tables and figures; what needs no training; comparisons; recommendations.

    python evaluate.py untrained drugstore              # popularity, nearest neighbours: a run each
    python evaluate.py table drugstore                  # prints and writes results.md, two pictures
    python evaluate.py compare drugstore RUN_A RUN_B    # names of folders in runs/drugstore/
    python evaluate.py inspect drugstore RUN ...        # size, time, cold items of saved ID models
    python evaluate.py recommend drugstore RUN --users 1 2 --k 10
    python evaluate.py attention drugstore --seq RUN    # figure 1: figure1.png, figure1.md
    python evaluate.py curve drugstore                  # figure 2, after run_all.sh --figure2;
                                                        # over the steps of a tuning: pt-step<N>

Reads:  runs/<dataset>/*/, runs/<dataset>/embeddings/, data/<dataset>/prepared.npz.
Writes: runs/<dataset>/results.*, curves.png, inspect.md, figure1.*, figure2.*, steps.*
"""
import re
import timeit
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import take
from common.backbone import load_recformer, start_model, untouched
from common.baselines import untrained
from common.data import draw_evaluation_negatives, load
from common.figures import (MEASURES, STRATA, average, cls_attention, draw_attention, draw_bars,
                            draw_lines, findings, learning, numbers)
from common.files import UserError, command, runs_root, save_json, save_text
from common.initial import origin_of, read_embeddings, starting_tables
from common.metrics import compare, per_user, result_of, summarise
from common.models import load_seq
from common.options import POSITIVE, add_machine_options, option, options_parser
from common.progress import progress
from common.report import AGAINST, SHOWN, cells_of, markdown, render
from common.runs import Run, code_of, load_rows, read_ranks
from common.text import item_tokens
from common.training import start

# In the names of embeddings that `curve` compares: its files, and what the number says
MOMENTS = {'share': ('figure2', 'share of the source users in stage-PT, percent'),
           'step': ('steps', 'steps of stage-PT')}


# ------------------------------------------------------------------------ no training

def write_untrained(args, data, folder):
    """A run for every ranking that needs no training, of all embeddings that are there."""
    embeddings = {path.stem: read_embeddings(path, data)
                  for path in sorted((folder / 'embeddings').glob('*.pt'))}
    identity = {'data': data.fingerprint,
                'embeddings': {name: found.digest for name, found in embeddings.items()}}
    code = code_of('common/baselines.py')
    if Run(args, folder / 'popularity', identity, code).finished():  # the last that is written
        return
    matrices = {name: found.matrix for name, found in embeddings.items()}
    for name, fields, ranks in reversed(list(untrained(data, matrices))):  # popularity is last
        run = Run(args, folder / name, identity, code)
        run.write(model='untrained', **fields, **origin_of(embeddings.get(fields['init'])),
                  **result_of(data, ranks))


# ------------------------------------------------------------------------ table, compare

def finish(path, text):
    """Save a text, print it, and say where it is."""
    save_text(path, text)
    print(f'{text}\nwritten to {path}')


def current_rows(data):
    """The rows of this version of the data."""
    rows = load_rows(data.name)
    current = [row for row in rows if row['data'] == data.fingerprint]
    if len(current) < len(rows):
        print(f'{len(rows) - len(current)} runs of another version of the data are left out')
    return current


def show_tables(args, data, folder):
    """Print results.md, made of whatever rows there are; draw bars and learning curves."""
    rows = current_rows(data)
    if not rows:
        raise UserError(f'{folder}: no results yet; bash run_all.sh {data.name} makes them')
    save_json(folder / 'results.json', load_rows(data.name))
    finish(folder / 'results.md', render(data, rows))
    cells = cells_of(rows)
    draw_bars(folder / 'results.png', cells)
    panels = learning(cells)
    if panels:
        draw_lines(folder / 'curves.png', panels,
                   'epoch (upwards: NDCG@10 on validation, 100 negatives, percent)')


def show_comparison(args, data, folder):
    """Paired difference of two runs, for every metric."""
    (row, a), (other, b) = (read_ranks(data.name, run) for run in args.runs)
    if not np.array_equal(a['users'], b['users']) or row['data'] != other['data']:
        raise UserError(f'{args.runs[0]} and {args.runs[1]} were evaluated on different users; '
                        'run both again on the same data')
    print(f'{args.runs[0]} minus {args.runs[1]}, {len(a["users"]):,} users, percent')
    print(f'{"":24}{"difference":>11}  {"95 % interval":>18}  {"p":>7}')
    for ranking, metrics in row['metrics'].items():
        for name in metrics:
            metric, k = name.split('@')
            values = [per_user(ranks[ranking], metric, int(k)) for ranks in (a, b)]
            difference, (low, high), p = compare(*values)
            tie = '  tie' if low <= 0 <= high else ''
            print(f'{ranking:8}{name:16}{100 * difference:+11.2f}  '
                  f'[{100 * low:+7.2f}, {100 * high:+7.2f}]  {p:7.4f}{tie}')


# ------------------------------------------------------------------------ saved ID models

@torch.no_grad()
def give_back(model, about, items, data, folder):
    """Set these items' rows of a trained table to what they were before training, which knew them
    as negatives only and pushed them down."""
    embeddings = None
    if about['init'] != 'random':
        embeddings = read_embeddings(folder / 'embeddings' / f'{about["init"]}.pt', data)
    begun, _ = starting_tables(type(model), data.n_items, embeddings, about)
    table = model.item_embedding.weight
    table[items] = begun[items].to(table.device)


@torch.no_grad()
def scores_of(model, items, offsets):
    """Scores of all items after each history: [B, n + 1]."""
    return F.linear(model.all_states(items, offsets), *model.scorer())


def milliseconds(model, data):
    """Median time for the top 10 of 1,000 users."""
    items, offsets, _ = data.split('test', np.resize(data.evaluated, 1000))

    def best():
        scores_of(model, items, offsets).topk(10)
    return 1000 * median(timeit.repeat(best, number=1, repeat=6)[1:])


def inspect(args, data, folder):
    """What each saved ID model costs and reaches, also on users whose test item is cold: in
    nobody's training part (the paper leaves them out; the embeddings know the items)."""
    machine, body = start(args), []
    cold = np.setdiff1d(np.arange(1, data.n_items + 1), data.training()[0])
    users = np.flatnonzero(np.isin(data.items[data.offsets[1:] - 1], cold))
    negatives = draw_evaluation_negatives(data.items, data.offsets, users, data.n_items)
    for run in args.runs:
        row, _ = read_ranks(data.name, run)
        model, about = load_seq(folder / run, data)
        model.on(machine)
        speed, reached = milliseconds(model, data), ['-', '-']
        if len(users) and model.scorer()[0] is model.item_embedding.weight:
            give_back(model, about, cold, data, folder)
            found = summarise(model.ranks(data, 'test', users, negatives))
            reached = [f'{100 * found["sampled"]["NDCG@10"]:.2f}',
                       f'{100 * found["full"]["HR@50"]:.2f}']
        body.append([run, f'{row["parameters"]:,}',
                     f'{(folder / run / "model.pt").stat().st_size / 1e6:.1f}',
                     f'{row["seconds"] / row["epochs"]:.1f}', f'{speed:.0f}',
                     f'{100 * row["metrics"]["sampled"]["NDCG@10"]:.2f}',
                     f'{100 * row["metrics"]["full"]["NDCG@10"]:.2f}', *reached])
    head = ['', 'parameters', 'MB', 's an epoch', 'ms for 1,000 users', 'NDCG@10', 'all items',
            'cold: NDCG@10', 'cold: HR@50 of all']
    finish(folder / 'inspect.md',
           f'{len(users):,} users with a cold test item\n\n{markdown(head, body)}')


def row_of(user, data, name):
    """The row of a user as named by this option; UserError where there is none."""
    if user not in data.user_ids:
        raise UserError(f'{name} {user}: no such user in {data.name}')
    return data.user_ids.index(user)


def recommend(args, data, folder):
    """The k best items for each user, his own left out."""
    model, _ = load_seq(folder / args.run, data)
    model.on(start(args))
    for user in args.users:
        row = row_of(user, data, '--users')
        items, offsets = take(data.items, data.offsets, np.array([row]))
        scores = scores_of(model, items, offsets)[0]
        scores[[0, *items]] = -torch.inf
        count = min(args.k, data.n_items - len(set(items)))
        for rank, item in enumerate(scores.topk(count).indices.tolist(), 1):
            print(f'{user:12} {rank:3}  {data.item_ids[item - 1]:16} {float(scores[item]):8.3f}  '
                  f'{data.title(item)[:80]}')


# ------------------------------------------------------------------------ figures

def show_attention(args, data, folder):
    """Figure 1: the paper's four findings as numbers over many users, and maps of one as a PNG."""
    tuned = load_recformer(args.checkpoint or folder / 'ft1-seed0')
    layers = tuned.config.layers
    if layers < 3:
        raise UserError(f'{data.name}: its language model has {layers} layers; thirds of the depth '
                        'need three')
    vanilla = untouched(start_model(None, args.plm or tuned.plm, layers))
    if vanilla.word_table.shape != tuned.word_table.shape:
        raise UserError(f'--plm {vanilla.plm}: is not what the checkpoint was tuned from')
    vanilla.config = tuned.config  # its limits of items and tokens
    shown = data.evaluated[data.lengths[data.evaluated].argmin()]  # on the maps
    if args.user is not None:
        shown = row_of(args.user, data, '--user')
    users = np.random.default_rng(0).permutation(data.evaluated)[:args.users]
    items, offsets, _ = data.split('test', np.append(users, shown))
    likes = sasrec_weights(args, data, folder, np.split(items, offsets[1:-1]))
    tokens, machine = item_tokens(data, tuned.words), start(args)
    maps, averages, body = {}, [], []
    for name, model in (('vanilla', vanilla), ('tuned', tuned)):
        each = cls_attention(model.on(machine).eval(), items, offsets, tokens)
        each = list(progress(each, total=len(likes), desc=name, unit='user'))
        packed, maps[f'{name} ({model.stage})'] = each.pop()
        found = average([numbers(*pair, like) for pair, like in zip(each, likes)])
        averages.append(found)
        for third, values in zip(STRATA, found):
            body.append([name, third, *(f'{value:.3f}' for value in values)])
    text = f'CLS attention of {len(users)} users of {data.name}\n\n'
    text += f'{markdown(["model", "third", *MEASURES], body)}\n'
    for what, true, how in findings(*averages):
        text += f'- {what}: {"yes" if true else "no"} ({how})\n'
    finish(folder / 'figure1.md', text)
    words = [tuned.words.backend.id_to_token(int(token)) for token in packed.tokens]
    draw_attention(folder / 'figure1.png', maps, packed, words, likes[-1])
    print(f'the maps of one user: {folder / "figure1.png"}')


def sasrec_weights(args, data, folder, histories):
    """Weights [blocks, items] of --seq on each history, newest item first; None without --seq."""
    if not args.seq:
        return [None] * len(histories)
    model, _ = load_seq(folder / args.seq, data)
    if not hasattr(model, 'attention_weights'):
        raise UserError(f'--seq {args.seq}: SASRec is needed here')
    return [model.attention_weights(items[-model.max_items:])[:, ::-1] for items in histories]


def over_tuning(cells, word):
    """{(method, number): Cell} of embeddings called pt-<word><number>, LF as number 0, beside
    random rows; {} where there are none."""
    found = {}
    for cell in cells:
        name = re.fullmatch(f'pt-{word}([0-9.]+)|lf', cell.init or '')
        if name and not cell.mixed:
            for shown in filter(None, (cell.random, cell)):
                found[f'{shown.title}, {shown.variant}', float(name[1] or 0)] = shown
    more = {method for method, number in found if number}  # than LF
    return {key: found[key] for key in sorted(found) if key[0] in more}


def show_curve(args, data, folder):
    """Figure 2 and its like: what embeddings of several moments of stage-PT reach, called
    pt-share<percent of the source users> or pt-step<number>."""
    cells = cells_of(current_rows(data))
    found = {word: over_tuning(cells, word) for word in MOMENTS}
    if not any(found.values()):
        raise UserError(f'{folder}: no runs from a share of the source users; '
                        f'bash run_all.sh {data.name} --figure2 makes them')
    for word in filter(found.get, MOMENTS):
        file, below = MOMENTS[word]
        panels, body = {}, []
        for (method, number), cell in found[word].items():
            values = {f'{SHOWN}, {AGAINST[ranking]}': cell.value(ranking) for ranking in AGAINST}
            values['mean cosine'] = cell.first.get('cosine') or 0, 0  # of random rows: 0
            body.append([method, f'{number:g}', *(f'{value:.2f} ± {spread:.2f}'
                                                  for value, spread in values.values())])
            for measure, value in values.items():
                panels.setdefault(measure, {}).setdefault(method, {})[number] = value
        finish(folder / f'{file}.md', markdown(['', below, *values], body))
        draw_lines(folder / f'{file}.png', panels, below, log=word == 'share')


# ------------------------------------------------------------------------ main

ACTIONS = {'untrained': write_untrained, 'table': show_tables, 'compare': show_comparison,
           'inspect': inspect, 'recommend': recommend, 'attention': show_attention,
           'curve': show_curve}


def parse_args(argv=None):
    p = options_parser(__doc__)
    commands = p.add_subparsers(dest='action', required=True)
    of = {}
    for name, action in ACTIONS.items():
        g = of[name] = commands.add_parser(name, help=action.__doc__, allow_abbrev=False)
        g.add_argument('dataset')
        if name in ('untrained', 'inspect', 'recommend', 'attention'):
            add_machine_options(g, name == 'attention', trains=False)
    of['compare'].add_argument('runs', nargs=2, metavar='RUN')
    of['inspect'].add_argument('runs', nargs='+', metavar='RUN')
    g = of['recommend']
    g.add_argument('run', metavar='RUN')
    option(g, '--users', str, None, 'as in interactions.csv', nargs='+', required=True)
    option(g, '--k', POSITIVE, 10, 'items for each')
    g = of['attention']
    option(g, '--checkpoint', str, None, 'tuned language model (default: runs/<dataset>/ft1-seed0)')
    option(g, '--plm', str, None, 'what it was tuned from (default: where that lay then)')
    option(g, '--seq', str, None, 'SASRec to compare with', metavar='RUN')
    option(g, '--user', str, None, 'of the maps (default: one with a short history)')
    option(g, '--users', POSITIVE, 200, 'of the numbers')
    return p.parse_args(argv)


def main(args):
    data = load(args.dataset)
    ACTIONS[args.action](args, data, runs_root() / args.dataset)


if __name__ == '__main__':
    command(main, parse_args())
