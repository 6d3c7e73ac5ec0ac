"""Results -> the paper's tables; paired comparison of two runs; metrics and recommendations of a saved ID model.

    python evaluate.py table grocery                              # prints, and writes runs/grocery/results.md
    python evaluate.py compare grocery RUN_A RUN_B                # names of rows in runs/grocery/results.json
    python evaluate.py checkpoint grocery runs/grocery/seq/X.pt   # computes its metrics again
    python evaluate.py topk grocery runs/grocery/seq/X.pt --user 1 --k 10
    python evaluate.py cold grocery runs/grocery/seq/X.pt runs/grocery/seq/Y.pt    # users whose test item nobody trained on
    python evaluate.py footprint grocery runs/grocery/seq/X.pt    # size and time at inference
    python evaluate.py attention grocery --seq runs/grocery/seq/X.pt               # figure 1: figure1.png, figure1.md
    python evaluate.py curve grocery                              # figure 2, after run_all.sh --figure2

Reads: runs/<dataset>/results.json, ranks/<run>.npz, seq/*.pt, recformer/*.pt, data/<dataset>/prepared.npz.
Writes: runs/<dataset>/results.md, cold.md, footprint.md, figure1.*, figure2.*
"""
import argparse
import pathlib
import time
import zipfile
from statistics import mean, median, stdev

import numpy as np
import torch
from tqdm import tqdm

from common.bert4rec import BERT4Rec
from common.data import draw_negatives, load
from common.figures import average, cls_attention, draw_attention, draw_curve, findings, numbers, sasrec_attention
from common.files import UserError, command, digest, load_pt, runs_root, save_text
from common.initial import read_embeddings, reduce_dimensions, starting_table
from common.metrics import FULL, SAMPLED, compare, load_rows, per_user, rank_counts, summarise
from common.recformer import from_backbone, lf_untouched
from common.recformer import load_model as load_recformer
from common.report import render
from common.report import table as markdown
from common.sasrec import SASRec, all_states
from common.sources import fetch_plm
from common.text import load_tokenizer, ragged, tokenize
from common.training import positive, seed_all, start

COLD = [('sampled', 'HR@10'), ('sampled', 'NDCG@10'), ('full', 'HR@10'), ('full', 'HR@50'), ('full', 'NDCG@10')]


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest='action', required=True)
    add = lambda name, text: commands.add_parser(name, help=text)
    for name, text in (('table', 'all tables that the results have rows for'), ('compare', 'paired difference of two runs'),
                       ('checkpoint', 'metrics of a saved ID model'), ('topk', 'recommendations of a saved ID model'),
                       ('cold', 'saved ID models on the users that the paper leaves out'),
                       ('footprint', 'size and speed of saved ID models'), ('attention', 'figure 1: what CLS attends to'),
                       ('curve', 'figure 2: quality over the share of source users')):
        sub = add(name, text)
        sub.add_argument('dataset')
        if name == 'compare':
            sub.add_argument('a', metavar='RUN_A')
            sub.add_argument('b', metavar='RUN_B')
            sub.add_argument('--draws', type=positive(), default=10_000, help='of the bootstrap and of the permutation test')
        if name in ('checkpoint', 'topk'):
            sub.add_argument('file', help='runs/<dataset>/seq/*.pt')
        if name in ('cold', 'footprint'):
            sub.add_argument('files', nargs='+', metavar='FILE', help='runs/<dataset>/seq/*.pt')
        if name == 'attention':
            sub.add_argument('--checkpoint', help='tuned language model (default: runs/<dataset>/recformer/ft1.pt)')
            sub.add_argument('--seq', metavar='FILE', help='SASRec to compare with: runs/<dataset>/seq/sasrec-*.pt')
            sub.add_argument('--user', help='user of the maps, as in interactions.csv (default: one with three items)')
            sub.add_argument('--users', type=positive(), default=200, help='users of the numbers')
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


def precision(name):
    """autocast of common/training.py on the CPU."""
    return start(argparse.Namespace(device='cpu', deterministic=False, precision=name))[1]


def metrics_of(model, meta, data, users=None, negatives=None):
    """Metrics of a model for test items, in its own run's precision: bfloat16 moves the ranks of a few users in a hundred."""
    items, offsets, targets = data.split('test', users)
    autocast = precision(meta['identity']['options']['precision'])
    table, bias = model.scorer()
    return summarise(rank_counts(all_states(model, items, offsets, 'cpu', autocast), table, targets,
                                 data.negatives if negatives is None else negatives, bias))


def show_checkpoint(file, data):
    model, meta = load_model(file, data)
    print(f'{meta["run"]}, lr {meta["lr"]:g}, {len(data.evaluated):,} users, history among the candidates, percent')
    for ranking, values in metrics_of(model, meta, data).items():
        print(f'  {ranking:8}' + '  '.join(f'{k} {100 * v:.2f}' for k, v in values.items()))


@torch.no_grad()
def give_back(model, meta, cold, data, folder):
    """Set these items' rows of a trained table to what they were before training."""
    embeddings = None
    if meta['source'] != 'random':
        path = folder / 'embeddings' / f'{meta["source"]}.pt'
        embeddings = read_embeddings(path, data)[0]
        if digest(embeddings.numpy()) != meta['identity']['embedding'] and not meta['pca']:
            raise UserError(f'{path}: has changed since {meta["run"]} was trained from it; train it again')
        embeddings = reduce_dimensions(embeddings, meta['pca'], path) if meta['pca'] else embeddings
    seed_all(meta['seed'])
    table, given = starting_table(type(model), data.n_items, meta['hidden'], embeddings, meta['scale'], meta['seed'])
    model.item_embedding.weight[cold] = (table if meta['mode'] in ('random', 'id+text') else given)[cold]


def show_cold(files, data, folder):
    """Users whose test item is in nobody's training part: the paper leaves them out, the embeddings know these items.

    Candidates are all items, or 100 drawn as for the others. Training meets a cold item as a negative only, and pushes it
    down; so each cold item gets back the row that it started from. BERT4Rec's untied output has no such row: refused.
    """
    rest = np.setdiff1d(np.arange(data.n_users), data.evaluated)
    trained = np.unique(data.items[ragged(data.offsets[:-1], data.lengths - 2)])
    users = rest[~np.isin(data.items[data.offsets[rest + 1] - 1], trained)]
    if not len(users):
        raise UserError(f"{data.name}: every user's test item is in somebody's training part; there is nothing cold")
    negatives, body = draw_negatives(data.items, data.offsets, users, data.n_items), []
    for file in files:
        model, meta = load_model(file, data)
        if meta['model'] == 'bert4rec' and not meta['tied']:
            raise UserError(f'{file}: its output table knows no embeddings; train BERT4Rec with --tie_output')
        give_back(model, meta, np.setdiff1d(np.arange(1, data.n_items + 1), trained), data, folder)
        found = metrics_of(model, meta, data, users, negatives)
        body.append([meta['run']] + [f'{100 * found[r][m]:.2f}' for r, m in COLD])
    head = [''] + [f'{"100 neg." if r == "sampled" else "full"} {m}' for r, m in COLD]
    finish(folder / 'cold.md', f"{len(users):,} users of {data.name} whose test item is in nobody's training part, percent\n\n"
           + markdown(head, body))


def show_footprint(files, data, folder):
    """What each checkpoint costs: size, time of an epoch (as trained), milliseconds for the top 10 of 1,000 users here."""
    rows, body = {r['run']: r for r in load_rows(folder)}, []
    users = np.resize(data.evaluated, 1000)
    items, offsets, _ = data.split('test', users)
    for file in files:
        model, meta = load_model(file, data)
        autocast = precision('auto')
        table, bias = model.scorer()
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.nn.functional.linear(all_states(model, items, offsets, 'cpu', autocast), table, bias).topk(10)
            times.append(time.perf_counter() - began)
        m = rows[meta['run']]['metrics'] if meta['run'] in rows else None
        size = pathlib.Path(file).stat().st_size / 1e6
        body.append([meta['run'], str(meta['hidden']), f'{meta["parameters"]:,}', f'{size:.1f}',
                     f'{meta["seconds"] / meta["epochs"]:.1f}', f'{1000 * median(times[1:]):.0f}']
                    + [f'{100 * m[r]["NDCG@10"]:.2f}' if m else '-' for r in ('sampled', 'full')])
    head = ['', 'width', 'parameters', 'MB', 's an epoch', 'ms for 1,000 users', 'NDCG@10', 'full NDCG@10']
    finish(folder / 'footprint.md', markdown(head, body))


# ---------------------------------------------------------------------------- figures

def show_attention(args, data, folder):
    """Figure 1: maps of one user as a PNG, and the paper's four findings as numbers over many users."""
    tuned, meta = load_recformer(args.checkpoint or folder / 'recformer' / 'ft1.pt')
    if tuned.config.layers < 3:
        raise UserError(f'{data.name}: its language model has {tuned.config.layers} layers; thirds of the depth need three')
    plm = fetch_plm(meta['plm'])
    vanilla, tokenizer = lf_untouched(from_backbone(plm, tuned.config.layers)), load_tokenizer(plm)
    seq = load_model(args.seq, data)[0] if args.seq else None
    if seq is not None and not isinstance(seq, SASRec):
        raise UserError(f'--seq {args.seq}: SASRec is needed here')
    tokens = tokenize(data.attributes, tokenizer)
    if args.user is not None and args.user not in data.user_ids:
        raise UserError(f'--user {args.user}: no such user in {data.name}')
    users = np.random.default_rng(0).permutation(data.evaluated)[:args.users]
    short = [u for u in data.evaluated if data.lengths[u] == 4] or [data.evaluated[np.argmin(data.lengths[data.evaluated])]]
    one = data.user_ids.index(args.user) if args.user is not None else short[0]
    items, offsets, _ = data.split('test', np.append(users, one))
    maps, averages = {}, {}
    for name, model in (('vanilla', vanilla.eval()), ('tuned', tuned.eval())):
        found = []
        each = cls_attention(model, items, offsets, tokens, tokenizer.cls, 'cpu')
        for u, (packed, weights) in enumerate(tqdm(each, total=len(offsets) - 1, desc=name, unit='user', leave=False)):
            like = None if seq is None else sasrec_attention(seq, items[offsets[u]:offsets[u + 1]])[:, ::-1]
            found.append(numbers(packed, weights, None if like is None else like.mean(0)))
        which = meta['plm'] if name == 'vanilla' else meta.get('stage', 'published')
        maps[f'{name} ({which})'] = weights  # the last user is the one of the maps
        averages[name] = average(found[:-1])
    shown = items[offsets[-2]:][::-1]
    draw_attention(folder / 'figure1.png', maps, packed, tokenizer.convert_ids_to_tokens(packed.tokens.tolist()),
                   [next((v for _, v in data.attributes[i - 1] if v), data.item_ids[i - 1]) for i in shown], like)
    body = [[name, s] + [f'{v:.3f}' for v in averages[name][s].values()] for name in averages for s in averages[name]]
    found = findings(averages['vanilla'], averages['tuned'])
    text = (f'CLS attention of {len(users)} users of {data.name}\n\n'
            + markdown(['model', 'third', *averages['tuned']['top']], body) + '\n'
            + ''.join(f'- {what}: {"yes" if true else "no"} ({how})\n' for what, true, how in found))
    finish(folder / 'figure1.md', text)
    print(f'the maps of user {data.user_ids[one]}: {folder / "figure1.png"}')


def show_curve(data, folder):
    """Figure 2: SASRec from PT of a share of the source users (`run_all.sh --figure2`) against LF and random."""
    def spread(rows, init, scale):
        """[(mean, standard deviation)] over the seeds of an initialisation, [] where there are no rows."""
        wanted = 'sasrec', 'bce', init, scale, 'random' if init == 'random' else 'trainable'
        values = [100 * r['metrics']['sampled']['NDCG@10'] for r in rows
                  if (r['model'], r['loss'], r['init'], r['scale'], r['mode']) == wanted]
        return [(mean(values), stdev(values) if len(values) > 1 else 0.0)] if values else []
    files = runs_root().glob(f'figure2/*/{data.name}/results.json')
    shares = sorted(((float(p.parts[-3]), load_rows(p.parent)) for p in files), key=lambda pair: pair[0])
    points = {(scale, share): value for scale in ('raw', 'centred') for share, rows in shares
              for value in spread(rows, 'pt', scale)}
    others = {'random': ('random', 'raw'), 'LF raw': ('lf', 'raw'), 'LF centred': ('lf', 'centred')}
    bands = {name: value for name, what in others.items() for value in spread(load_rows(folder), *what)}
    if not points:
        raise UserError(f'{runs_root() / "figure2"}: no runs of {data.name}; '
                        f'bash run_all.sh {data.name} --figure2 makes them')
    draw_curve(folder / 'figure2.png', points, bands, 'NDCG@10 (100 negatives)')
    body = [[name, f'{m:.2f} ± {s:.2f}'] for name, (m, s) in bands.items()]
    body += [[f'PT {scale}, {share:g} % of the source users', f'{m:.2f} ± {s:.2f}'] for (scale, share), (m, s) in points.items()]
    finish(folder / 'figure2.md', markdown(['SASRec from', 'NDCG@10'], body))


def finish(path, text):
    save_text(path, text)
    print(f'{text}\nwritten to {path}')


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
    elif args.action == 'cold':
        show_cold(args.files, data, folder)
    elif args.action == 'footprint':
        show_footprint(args.files, data, folder)
    elif args.action == 'attention':
        show_attention(args, data, folder)
    elif args.action == 'curve':
        show_curve(data, folder)
    else:
        show_topk(args.file, data, args.user, args.k)


if __name__ == '__main__':
    command(main, parse_args())
