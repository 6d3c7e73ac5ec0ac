"""An ID model (SASRec, BERT4Rec, GRU4Rec) from an initialisation: trains, evaluates, writes a run.

    python train_seq.py pantry --model sasrec --variants random pt-trainable --seeds 0 1 2
    python train_seq.py drugstore --model bert4rec --hidden 64 --epochs 1 --lrs 0.001      # a look

Variants: random; E-freeze (item table fixed), E-trainable (tuned too), E-id+text (fixed, added to a
trained ID table; paper table 5); E-further-all and E-further-emb (from the E-freeze model of the
same seed: tune all, or the item table alone). E: lf, pt, ft or any runs/<dataset>/embeddings/E.pt.
All --lrs are tried with the first seed; the best by validation NDCG@10 (100 negatives) serves the
other seeds. Each variant, rate and seed is a run, a folder of its own.

Reads:  data/<dataset>/prepared.npz, runs/<dataset>/embeddings/E.pt (export_embeddings.py).
Writes: runs/<dataset>/<model>-<loss>-<variant>-<scale>-<width>-lr<rate>-seed<seed>/.
"""
import re

import torch
from numpy.random import default_rng

from common.arrays import parts, take
from common.data import load
from common.files import Diverged, UserError, command, digest, load_pt, lock, runs_root, save_pt
from common.initial import SCALES, origin_of, read_embeddings, starting_tables
from common.metrics import result_of, value_of
from common.models import MODELS
from common.options import (COUNT, RATE, add_training_options, number, option, option_identity,
                            options_parser)
from common.runs import Run, code_of, read_row
from common.sequence import ItemTable, draw_training_negatives
from common.training import Training, start

MODES = r'freeze|trainable|further-all|further-emb|id\+text'


# ------------------------------------------------------------------------ options

def variant(text):
    """An argparse type: 'random', or an embedding's name and a mode -> (source, mode)."""
    if text == 'random':
        return text, text
    found = re.fullmatch(rf'(?!random-(?:{MODES})$)([\w+.,-]+?)-({MODES})', text)
    if not found:
        raise ValueError
    return found.groups()


# argparse prints it
variant.__name__ = f'variant (random, or E- and {MODES})'.replace('\\', '')


def parse_args(argv=None):
    p = options_parser(__doc__)
    option(p, 'dataset', 'name of a prepared dataset')
    option(p, '--model', 'of common/models.py', choices=MODELS, required=True)
    option(p, '--variants', 'see above', variant, [('random', 'random')], nargs='+')
    option(p, '--init-scale',
           "of the embeddings: raw (paper); centred or whitened, then scaled to a random table's "
           'mean row norm; permuted = centred, in a random order of items (a control)',
           str, 'raw', choices=SCALES)
    option(p, '--hidden', "width, below the embeddings' own their principal components (ours); "
           'default: their own, of random the first ones in --variants, else 768 (paper sec. 4.2)',
           number(1, 65_536))
    option(p, '--max-items', "newest of a history (authors' code)", number(2, 10_000), 50)
    option(p, '--loss', 'bce: one negative (paper table 3); ce: full softmax (table 4); sampled: '
           "softmax over --negatives (ours); masked; default: the model's own")
    option(p, '--negatives', 'of --loss sampled (default: 256)', number(2))
    option(p, '--lrs', "Adam's (paper sec. 4.2)", RATE, [0.0003, 0.001, 0.003, 0.01], nargs='+')
    # authors' code: 200 epochs; paper sec. 4.2: patience
    add_training_options(p, epochs=200, patience=10)
    option(p, '--seeds', 'of weights, dropout, order and negatives', COUNT, [0], nargs='+')
    args = p.parse_args(argv)
    kind = MODELS[args.model]
    args.loss = args.loss or kind.losses[0]
    args.batch = args.batch or kind.batch
    if args.loss not in kind.losses:
        p.error(f'--loss {args.loss}: {args.model} knows {", ".join(kind.losses)} only')
    if args.loss == 'sampled':
        args.negatives = args.negatives or 256
    elif args.negatives:
        p.error(f'--negatives: --loss {args.loss} draws none')
    return args


# ------------------------------------------------------------------------ order

def with_freeze(variants):
    """The variants in order, each further-* after the freeze run that it starts from."""
    ordered = {}
    for source, mode in variants:
        if mode.startswith('further'):
            ordered[source, 'freeze'] = None
        ordered[source, mode] = None
    return list(ordered)


# ------------------------------------------------------------------------ one run

def build(data, embedding, about, begun=None):
    """The model at the start of training. embedding: Embeddings, None for random rows; about: the
    run's options; begun: weights of the freeze run, of further-*."""
    kind = MODELS[about['model']]
    table = ItemTable(*starting_tables(kind, data.n_items, embedding, about))
    model = kind(table, about['max_items'])
    if begun:
        model.load_state_dict(begun)
    model.requires_grad_(about['mode'] != 'further-emb')
    table.weight.requires_grad_(about['mode'] != 'freeze')
    return model


def fit(data, model, run, about):
    """Train `model`; returns what the row says of it."""
    args = run.args
    seed = about['seed']
    items, offsets = data.training()
    users = data.users_with(model.least)
    batches = parts(len(users), args.batch)
    optimizer = torch.optim.Adam(model.parameters(), about['lr'], model.betas, fused=True)
    with Training(run, model, optimizer, len(batches)) as training:
        for epoch in training.epochs():
            model.train()
            rng = default_rng([seed, 7, epoch])
            order = rng.permutation(users)
            if args.loss == 'bce':
                negatives = draw_training_negatives(items, offsets, data.n_items, rng)
            for step in training.steps():
                batch = order[batches[step]]
                drawn = args.negatives
                if args.loss == 'bce':
                    drawn, _ = take(negatives, offsets, batch)
                rng = default_rng([seed, 8, epoch, step])
                with model.machine.autocast():
                    loss = model.loss(*take(items, offsets, batch), rng, args.loss, drawn)
                loss.backward()
                training.update(loss=loss)
            training.end_epoch(value_of(model.ranks(data, 'valid')))
    return training.restore_best()


def one_run(args, machine, data, embedding, about, start_from):
    """Train and evaluate one model, or find it up to date: its row. Diverged where it did."""
    source = about['init']
    what = source if source == 'random' else f'{source}-{about["mode"]}-{about["scale"]}'
    name = (f'{args.model}-{args.loss}-{what}-{about["hidden"]}-lr{about["lr"]:g}'
            f'-seed{about["seed"]}')
    folder = runs_root() / data.name / name
    begun = start_from and load_pt(start_from / 'model.pt', 'seq')['model']
    identity = {'options': about, 'data': data.fingerprint,
                'embedding': embedding and embedding.digest,
                'from': begun and digest(*begun.values())}
    code = code_of('train_seq.py', f'{MODELS[args.model].__module__.replace(".", "/")}.py')
    run = Run(args, folder, identity, code)
    with lock(folder):
        if row := run.finished():
            return row
        model = build(data, embedding, about, begun).on(machine)
        found = fit(data, model, run, about)
        ranks = model.ranks(data, 'test')
        save_pt(folder / 'model.pt', 'seq', about=about, data=data.fingerprint,
                model=model.state_dict())
        row = run.write(**found, **origin_of(embedding), **result_of(data, ranks))
    bound = read_row(folder.parent / 'popularity')  # evaluate.py untrained's
    if bound.get('data') == data.fingerprint and found['valid'] <= bound['valid']:
        print(f'{name}: NO BETTER THAN POPULARITY on validation ({100 * bound["valid"]:.2f})')
    return row


# ------------------------------------------------------------------------ main

def main(args):
    data = load(args.dataset)
    machine = start(args)
    if machine.world > 1:
        raise UserError('train_seq.py: one process trains a run: leave torchrun out')
    folder = runs_root() / data.name
    embeddings = {source: read_embeddings(folder / 'embeddings' / f'{source}.pt', data)
                  for source in dict(args.variants) if source != 'random'}
    widths = {source: found.matrix.shape[1] for source, found in embeddings.items()}
    widths.setdefault('random', next(iter(widths.values()), 768))
    best = {}  # (source, mode, seed) -> name of the run of its best rate
    for source, mode in with_freeze(args.variants):
        embedding = embeddings.get(source)
        rates = args.lrs
        for seed in args.seeds:
            start_from = None
            if mode.startswith('further'):
                start_from = folder / best[source, 'freeze', seed]
            rows = []
            for lr in rates:
                about = {**option_identity(args), 'init': source, 'mode': mode,
                         'scale': 'raw' if source == 'random' else args.init_scale,
                         'hidden': args.hidden or widths[source], 'lr': lr, 'seed': seed}
                try:
                    rows.append(one_run(args, machine, data, embedding, about, start_from))
                except Diverged as error:
                    print(f'{args.model} {source} {mode}, rate {lr:g}, seed {seed}: {error}')
            if not rows:
                raise UserError(f'{args.model} {source} {mode}, seed {seed}: training diverged '
                                f'with all of the rates {rates}; give lower --lrs')
            row = max(rows, key=lambda row: row['valid'])
            best[source, mode, seed] = row['run']
            rates = [row['lr']]  # the first seed chooses for the others


if __name__ == '__main__':
    command(main, parse_args())
