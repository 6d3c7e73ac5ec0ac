"""Runs -> the tables and figures; what needs no training; comparisons; recommendations.

    python evaluate.py untrained drugstore              # popularity, nearest neighbours: a run each
    python evaluate.py table drugstore                  # prints and writes results.md, two pictures
    python evaluate.py compare drugstore RUN_A RUN_B    # folders in runs/drugstore/; without rate
                                                        # and seed: means over the seeds
    python evaluate.py recommend drugstore RUN --k 20 --out recs.csv       # all users
    python evaluate.py recommend drugstore RUN --items 27334 30012         # after these
    python evaluate.py neighbours drugstore --item 27334     # nearest by each of the embeddings
    python evaluate.py attention drugstore --seq RUN    # figure 1: figure1.png, figure1.md
    python evaluate.py curve drugstore                  # figure 2, after run_all.sh --figure2

Reads:  runs/<dataset>/*/, runs/<dataset>/embeddings/, data/<dataset>/prepared.npz.
Writes: runs/<dataset>/results.*, curves.png, figure1.*, figure2-*; --out.
"""
import re
from pathlib import Path

import numpy as np
import torch

from common.backbone import start_model
from common.baselines import directions, untrained
from common.data import load
from common.figures import MEASURES, draw_attention, draw_bars, draw_lines, learning, numbers
from common.files import UserError, command, runs_root, save_json, save_text
from common.formats import named_columns
from common.initial import OtherData, origin_of, read_embeddings
from common.metrics import METRICS, compare
from common.models import load_seq
from common.options import (POSITIVE, add_earlier_options, add_machine_options, flag, option,
                            options_parser)
from common.progress import progress
from common.recommend import recommend, with_cold
from common.report import RANKINGS, RATE_AND_SEED, SHOWN, Cell, cells_of, markdown, render
from common.runs import Run, changed_code, code_of, load_rows
from common.text import item_tokens
from common.training import start


# ------------------------------------------------------------------------ no training

def embeddings_of(data, folder, cold=False):
    """{name: Embeddings} of all that were exported; see read_embeddings. Those that are of other
    data by now are left out, and said: nobody may need them any more."""
    found = {}
    for path in sorted((folder / 'embeddings').glob('*.pt')):
        try:
            found[path.stem] = read_embeddings(path, data, cold)
        except OtherData as error:
            print(f'note: left out: {error}')
    return found


def write_untrained(args, data, folder):
    """A run for every ranking that needs no training, of all embeddings that are there."""
    embeddings = embeddings_of(data, folder)
    identity = {'data': data.fingerprint,
                'embeddings': {name: found.digest for name, found in embeddings.items()}}
    # popularity is the last that is written
    run = Run(args, folder / 'popularity', identity,
              code_of('common/baselines.py', 'common/data.py'))
    if run.finished():
        return
    for row in load_rows(data.name):  # of embeddings or rankings that may be gone
        if row['model'] == 'untrained':
            (folder / row['run'] / 'row.json').unlink()
    for name, row in untrained(data, embeddings):
        run._replace(folder=folder / name).write(**row, **origin_of(embeddings.get(row['init'])))


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


def current_rows(data):
    """The rows of those runs that are of this version of the data."""
    rows = load_rows(data.name)
    current = [row for row in rows if row['data'] == data.fingerprint]
    if len(current) < len(rows):
        print(f'{len(rows) - len(current)} runs of another version of the data are left out')
    return current


def cell_called(name, rows):
    """The Cell of a run; of a name without rate and seed that of all its runs. UserError: there is
    none, or they differ in more."""
    ending = f'{re.escape(name)}({RATE_AND_SEED})?'
    found = [row for row in rows if re.fullmatch(ending, row['run'])]
    if not found or (cell := Cell(found)).mixed:
        raise UserError(f'{name}: no such run in {runs_root()} (ELEPHANT_RUNS: elsewhere) of these '
                        'data, or several that differ in more than rate and seed')
    if any(map(changed_code, found)):
        print(f"note: {name}: of other code than today's")
    return cell


def show_tables(args, data, folder):
    """Print results.md, made of whatever rows there are; draw bars and learning curves."""
    rows = current_rows(data)
    if not rows:
        raise UserError(f'{folder}: no results yet; bash run_all.sh {data.name} makes them')
    cells = cells_of(rows)
    save_json(folder / 'results.json', rows)
    finish(folder / 'results.md', render(data, cells))
    draw_bars(folder / 'results.png', cells)
    draw_lines(folder / 'curves.png', learning(cells),
               'epoch (upwards: NDCG@10 on validation, 100 negatives, percent)')


def show_comparison(args, data, folder):
    """Paired difference of two runs, or of two lines of the tables (means over their seeds), for
    every metric."""
    rows = current_rows(data)
    cells = [cell_called(name, rows) for name in args.runs]
    print(f'{args.runs[0]} minus {args.runs[1]}, {rows[0]["users"]:,} users, percent')
    print(f'{"":24}{"difference":>11}  {"95 % interval":>18}  {"p":>7}')
    for ranking, metrics in METRICS.items():
        for metric in metrics.split():
            values = [cell.by_user(ranking, metric).mean(0) for cell in cells]
            difference, (low, high), p = compare(*values)
            print(f'{RANKINGS[ranking]:14}{metric:10}{100 * difference:+11.2f}  '
                  f'[{100 * low:+7.2f}, {100 * high:+7.2f}]  {p:7.4f}'
                  f'{"  tie" if low <= 0 <= high else ""}')


# ------------------------------------------------------------------------ figures

def show_attention(args, data, folder):
    """Figure 1: what CLS attends to, before and after tuning, beside SASRec: as numbers over many
    users, and as maps of one of them."""
    tuned = start_model(args.checkpoint or folder / 'ft1-seed0', args.plm)
    machine = start(args)
    vanilla = start_model(None, args.plm or tuned.plm, seed=None)
    if str(vanilla) != str(tuned):  # their layers and widths
        raise UserError(f'--plm {vanilla.plm}: is not what the checkpoint was tuned from')
    items, offsets, _ = data.split('test')
    histories = [items for items in np.split(items, offsets[1:-1])
                 if len(items) > 2]  # two always lie on a line
    if not histories:
        raise UserError(f'{data.name}: no user has three items before the last one')
    np.random.default_rng(0).shuffle(histories)
    histories = sorted(histories[:args.users], key=len)  # the first is drawn: a short one
    sasrec = load_seq(folder / args.seq, data)
    if not hasattr(sasrec, 'attention_weights'):
        raise UserError(f'--seq {args.seq}: SASRec is needed here')
    likes = list(map(sasrec.attention_weights, histories))
    tokens = item_tokens(data, tuned.words)
    packed = [tuned.pack(items, [0, len(items)], tokens) for items in histories]
    maps = {}
    body = []
    for model in (vanilla, tuned):
        model.on(machine).eval()
        weights = [model.cls_attention(one)[:, 0].cpu() for one in progress(packed)]
        maps[model.stage] = weights[0]
        values = torch.stack(list(map(numbers, packed, weights, likes)))
        for layer, of_layer in enumerate(values.nanmean(0).tolist()):
            body.append([model.stage, str(layer), *map('{:.3f}'.format, of_layer)])
    table = markdown(['model', 'layer', *MEASURES], body)
    finish(folder / 'figure1.md',
           f'CLS attention of {len(histories)} users of {data.name}\n\n{table}')
    words = list(map(tuned.words.backend.id_to_token, packed[0].tokens.tolist()))
    draw_attention(folder / 'figure1.png', maps, packed[0], words, likes[0])


def show_curve(args, data, folder):
    """Figure 2: what embeddings after stage-PT on a share of the source users reach, called
    pt-share<percent>, beside LF (0) and random rows."""
    lines = {}  # {method: {number: Cell}}
    for cell in cells_of(current_rows(data)):
        name = re.fullmatch(r'pt-share(\d+\.?\d*)|lf', cell.init or '')
        if name and not cell.mixed:
            for shown in (cell.random, cell):
                if shown and not shown.mixed:
                    method = f'{shown.title}, {shown.variant}'
                    lines.setdefault(method, {})[float(name[1] or 0)] = shown
    share = 'share of the source users in stage-PT, percent'
    panels = {}
    body = []
    for method, points in lines.items():
        if not any(points):  # of LF alone
            continue
        for number, cell in sorted(points.items()):
            line = [method, f'{number:g}']
            for ranking, shown in RANKINGS.items():
                line.append(cell.text(ranking, digits=2))
                panel = panels.setdefault(f'{SHOWN}, {shown}', {})
                panel.setdefault(method, {})[number] = cell.value(ranking)
            body.append(line)
    if not body:
        raise UserError(f'{folder}: no pt-share<percent>: run_all.sh {data.name} --figure2')
    finish(folder / 'figure2-share.md', markdown(['', share, *panels], body))
    draw_lines(folder / 'figure2-share.png', panels, share, log=True)


# ------------------------------------------------------------------------ main

ACTIONS = {
    'untrained': write_untrained,
    'table': show_tables,
    'compare': show_comparison,
    'recommend': recommend,
    'neighbours': show_neighbours,
    'attention': show_attention,
    'curve': show_curve
}


def parse_args(argv=None):
    p = options_parser(__doc__)
    commands = p.add_subparsers(dest='action', required=True)
    for name in ACTIONS:
        g = commands.add_parser(name, allow_abbrev=False)
        g.add_argument('dataset')
    of = commands.choices
    add_earlier_options(of['untrained'])
    of['compare'].add_argument('runs', nargs=2)
    for name in ('neighbours', 'recommend'):
        option(of[name], '--k', 'items', POSITIVE, 10)
    option(of['neighbours'], '--item', 'its id', required=True)
    g = of['recommend']
    add_machine_options(g)
    g.add_argument('run')
    option(g, '--out', 'file to write: CSV, or JSON lines (.jsonl); default: printed', Path)
    flag(g, '--cold', "also items in nobody's sequence")
    flag(g, '--with-history', 'also what the user has')
    option(g, '--columns', 'of --histories: as for common.data', named_columns, {})
    g = g.add_mutually_exclusive_group()
    option(g, '--users', 'ids, or a file of one id a line (default: all)', nargs='+')
    option(g, '--items', 'ids of a history, oldest first', nargs='+')
    option(g, '--histories', 'interactions of users: a file of any form that --from takes', Path)
    g = of['attention']
    add_machine_options(g)
    option(g, '--checkpoint', 'tuned language model (default: runs/<dataset>/ft1-seed0)')
    option(g, '--plm', 'what it was tuned from (default: where that lay then)')
    option(g, '--seq', 'run of a SASRec to compare with', required=True)
    option(g, '--users', 'of the numbers', POSITIVE, 200)
    return p.parse_args(argv)


def main(args):
    data = load(args.dataset)
    ACTIONS[args.action](args, data, runs_root() / args.dataset)


if __name__ == '__main__':
    command(main, parse_args())
