"""Runs -> the tables and figures; what needs no training; comparisons; recommendations.

    python evaluate.py untrained drugstore              # popularity, nearest neighbours: a run each
    python evaluate.py table drugstore                  # prints and writes results.md, two pictures
    python evaluate.py compare drugstore RUN_A RUN_B    # names of folders in runs/drugstore/
    python evaluate.py inspect drugstore RUN ...        # size, items new to training
    python evaluate.py recommend drugstore RUN --k 20 --out recs.csv       # all users
    python evaluate.py recommend drugstore RUN --items 27334 30012         # after these
    python evaluate.py neighbours drugstore --item 27334     # nearest by each of the embeddings
    python evaluate.py attention drugstore --seq RUN    # figure 1: figure1.png, figure1.md
    python evaluate.py curve drugstore                  # figure 2, after run_all.sh --figure2;
                                                        # over the steps of a tuning: pt-step<N>

Reads:  runs/<dataset>/*/, runs/<dataset>/embeddings/, data/<dataset>/prepared.npz.
Writes: runs/<dataset>/results.*, curves.png, inspect.md, figure1.*, figure2.*, steps.*; --out.
"""
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from common.backbone import load_recformer, start_model, untouched
from common.baselines import directions, untrained
from common.data import draw_evaluation_negatives, load
from common.figures import (MEASURES, STRATA, average, cls_attention, draw_attention, draw_bars,
                            draw_lines, findings, learning, numbers)
from common.files import UserError, command, runs_root, save_json, save_text
from common.initial import origin_of, read_embeddings
from common.metrics import compare, per_user, result_of, summarise
from common.models import load_seq
from common.options import (POSITIVE, add_earlier_options, add_machine_options, flag, option,
                            options_parser)
from common.recommend import began_table, recommend, with_cold
from common.report import AGAINST, SHOWN, cells_of, markdown, render
from common.runs import Run, code_of, load_rows, read_ranks
from common.text import item_tokens
from common.training import start

# In the names of embeddings that `curve` compares: its files, and what the number says
MOMENTS = {'share': ('figure2', 'share of the source users in stage-PT, percent'),
           'step': ('steps', 'steps of stage-PT')}


# ------------------------------------------------------------------------ no training

def embeddings_of(data, folder, cold=False):
    """{name: Embeddings} of all that were exported; see read_embeddings."""
    return {path.stem: read_embeddings(path, data, cold)
            for path in sorted((folder / 'embeddings').glob('*.pt'))}


def write_untrained(args, data, folder):
    """A run for every ranking that needs no training, of all embeddings that are there."""
    embeddings = embeddings_of(data, folder)
    digests = {name: found.digest for name, found in embeddings.items()}
    identity = {'data': data.fingerprint, 'embeddings': digests}
    # popularity is the last that is written
    run = Run(args, folder / 'popularity', identity, code_of('common/baselines.py'))
    if run.finished():
        return
    matrices = {name: found.matrix for name, found in embeddings.items()}
    for name, fields, ranks in reversed(list(untrained(data, matrices))):
        origin = origin_of(embeddings.get(fields['init']))
        run._replace(folder=folder / name).write(model='untrained', **fields, **origin,
                                                 **result_of(data, ranks))


def show_neighbours(args, data, folder):
    """The items nearest to --item by each of the embeddings, by cosine of centred rows."""
    wide = with_cold(data)
    if args.item not in wide.item_ids:
        raise UserError(f'--item {args.item}: no such item in {data.name}')
    item = wide.item_ids.index(args.item) + 1
    end = data.n_items + 1
    columns = {}
    for name, found in embeddings_of(data, folder, item >= end).items():
        rows = directions(found.matrix, end)
        cosine = rows[:end] @ rows[item]
        near = [i for i in cosine.argsort(descending=True).tolist() if i not in (0, item)]
        columns[name.upper()] = [f'{cosine[i]:.2f} {data.title(i)} ({data.item_ids[i - 1]})'
                                 for i in near[:args.k]]
    if not columns:
        raise UserError(f'{folder / "embeddings"}: no embeddings; export_embeddings.py makes them')
    table = markdown(columns, zip(*columns.values()))
    print(f'nearest to {wide.title(item)} ({args.item})\n\n{table}')


# ------------------------------------------------------------------------ table, compare

def finish(path, text):
    """Save a text, print it, and say where it is."""
    save_text(path, text)
    print(f'{text}\nwritten to {path}')


def current_of(rows, data):
    """Those rows that are of this version of the data."""
    current = [row for row in rows if row['data'] == data.fingerprint]
    if len(current) < len(rows):
        print(f'{len(rows) - len(current)} runs of another version of the data are left out')
    return current


def show_tables(args, data, folder):
    """Print results.md, made of whatever rows there are; draw bars and learning curves."""
    every = load_rows(data.name)
    rows = current_of(every, data)
    if not rows:
        raise UserError(f'{folder}: no results yet; bash run_all.sh {data.name} makes them')
    save_json(folder / 'results.json', every)
    finish(folder / 'results.md', render(data, rows))
    cells = cells_of(rows)
    draw_bars(folder / 'results.png', cells)
    draw_lines(folder / 'curves.png', learning(cells),
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
            print(f'{ranking:8}{name:16}{100 * difference:+11.2f}  '
                  f'[{100 * low:+7.2f}, {100 * high:+7.2f}]  {p:7.4f}'
                  f'{"  tie" if low <= 0 <= high else ""}')


# ------------------------------------------------------------------------ saved ID models

def inspect(args, data, folder):
    """The size of each saved ID model, and what it reaches on users whose test item is in nobody's
    training part (the paper leaves them out): with the rows that these items had before training,
    which knew them as negatives only and pushed them down."""
    machine, body = start(args), []
    known, _ = data.training()
    new = np.setdiff1d(np.arange(1, data.n_items + 1), known)
    last = data.items[data.offsets[1:] - 1]
    users = np.flatnonzero(np.isin(last, new))
    negatives = draw_evaluation_negatives(data.items, data.offsets, users, data.n_items)
    asked = replace(data, evaluated=users, negatives=negatives)
    for run in args.runs:
        row, _ = read_ranks(data.name, run)
        model, _ = load_seq(folder / run, data)
        began, reached = began_table(folder, row, model, data), ['-', '-']
        if len(users) and began is not None:
            model.item_embedding.weight.data[new] = began[new]
            found = summarise(model.on(machine).ranks(asked, 'test'))
            reached = [f'{100 * found["sampled"]["NDCG@10"]:.2f}',
                       f'{100 * found["full"]["HR@50"]:.2f}']
        body.append([run, f'{row["parameters"]:,}', *reached])
    head = ['', 'parameters', 'NDCG@10', 'HR@50 of all items']
    text = f'{len(users):,} users whose test item is new to training\n\n{markdown(head, body)}'
    finish(folder / 'inspect.md', text)


# ------------------------------------------------------------------------ figures

def show_attention(args, data, folder):
    """Figure 1: the paper's four findings as numbers over many users, and maps of one as a PNG."""
    tuned, machine = load_recformer(args.checkpoint or folder / 'ft1-seed0'), start(args)
    layers = tuned.config.layers
    if layers < 3:
        raise UserError(f'{data.name}: its language model has {layers} layers; thirds of the depth '
                        'need three')
    vanilla = untouched(start_model(None, args.plm or tuned.plm, layers))
    if vanilla.word_table.shape != tuned.word_table.shape:
        raise UserError(f'--plm {vanilla.plm}: is not what the checkpoint was tuned from')
    vanilla.config = tuned.config  # its limits of items and tokens
    users = np.random.default_rng(0).permutation(data.evaluated)[:args.users]
    items, offsets, _ = data.split('test', users)
    likes = [None] * len(users)
    if args.seq:
        model, _ = load_seq(folder / args.seq, data)
        if not hasattr(model, 'attention_weights'):
            raise UserError(f'--seq {args.seq}: SASRec is needed here')
        histories = np.split(items, offsets[1:-1])
        likes = [model.attention_weights(history[-model.max_items:])[:, ::-1]  # newest first
                 for history in histories]
    tokens = item_tokens(data, tuned.words)
    drawn = np.diff(offsets).argmin()  # on the maps: a short history
    maps, averages, body = {}, [], []
    for name, model in (('vanilla', vanilla), ('tuned', tuned)):
        model.on(machine).eval()
        each = list(cls_attention(model, items, offsets, tokens))
        packed, maps[f'{name} ({model.stage})'] = each[drawn]
        values = average([numbers(*one, like) for one, like in zip(each, likes)])
        averages.append(values)
        for third, of_third in zip(STRATA, values):
            body.append([name, third, *(f'{value:.3f}' for value in of_third)])
    head = ['model', 'third', *MEASURES]
    text = f'CLS attention of {len(users)} users of {data.name}\n\n{markdown(head, body)}\n'
    for finding, shown in findings(*averages).items():
        text += f'- {finding}: {"yes" if shown else "no"}\n'
    finish(folder / 'figure1.md', text)
    words = list(map(tuned.words.backend.id_to_token, packed.tokens.tolist()))
    draw_attention(folder / 'figure1.png', maps, packed, words, likes[drawn])


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
    cells = cells_of(current_of(load_rows(data.name), data))
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
            line = [method, f'{number:g}']
            for measure, (value, spread) in values.items():
                line.append(f'{value:.2f} ± {spread:.2f}')
                panels.setdefault(measure, {}).setdefault(method, {})[number] = value, spread
            body.append(line)
        finish(folder / f'{file}.md', markdown(['', below, *values], body))
        draw_lines(folder / f'{file}.png', panels, below, log=word == 'share')


# ------------------------------------------------------------------------ main

ACTIONS = {
    'untrained': write_untrained,
    'table': show_tables,
    'compare': show_comparison,
    'inspect': inspect,
    'recommend': recommend,
    'neighbours': show_neighbours,
    'attention': show_attention,
    'curve': show_curve,
}


def parse_args(argv=None):
    p = options_parser(__doc__)
    commands = p.add_subparsers(dest='action', required=True)
    for name, action in ACTIONS.items():
        g = commands.add_parser(name, help=action.__doc__, allow_abbrev=False)
        g.add_argument('dataset')
        if name in ('inspect', 'recommend', 'attention'):
            add_machine_options(g, name == 'attention', trains=False)
    of = commands.choices
    add_earlier_options(of['untrained'])
    of['compare'].add_argument('runs', nargs=2)
    of['inspect'].add_argument('runs', nargs='+')
    of['recommend'].add_argument('run')
    for name in ('neighbours', 'recommend'):
        option(of[name], '--k', 'items', POSITIVE, 10)
    option(of['neighbours'], '--item', 'its id', required=True)
    g = of['recommend']
    option(g, '--out', 'file to write: CSV, or JSON lines (.jsonl); default: printed', Path)
    flag(g, '--cold', 'also items that nobody has')
    flag(g, '--with-history', 'also what the user has')
    g = g.add_mutually_exclusive_group()
    option(g, '--users', 'ids, or a file of one id a line (default: all)', nargs='+')
    option(g, '--items', 'ids of a history, oldest first', nargs='+')
    option(g, '--histories', 'a CSV file of new users: user,item and perhaps timestamp; or JSON '
           'lines (.jsonl): {"user": "ann", "items": ["a7", "b2"]}', Path)
    g = of['attention']
    option(g, '--checkpoint', 'tuned language model (default: runs/<dataset>/ft1-seed0)')
    option(g, '--plm', 'what it was tuned from (default: where that lay then)')
    option(g, '--seq', 'run of a SASRec to compare with')
    option(g, '--users', 'of the numbers', POSITIVE, 200)
    return p.parse_args(argv)


def main(args):
    data = load(args.dataset)
    ACTIONS[args.action](args, data, runs_root() / args.dataset)


if __name__ == '__main__':
    command(main, parse_args())
