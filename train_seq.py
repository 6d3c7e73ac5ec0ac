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
import inspect
import pathlib
from typing import NamedTuple

import numpy as np
import torch

from common.arrays import take
from common.data import Dataset, load
from common.files import (ROOT, Diverged, UserError, command, digest, load_pt, lock, runs_root,
                          save_pt)
from common.initial import SCALES, components, initial_table, read_embeddings
from common.layers import Machine
from common.metrics import product_scorer, rank_counts, result_of, summarise
from common.models import MODELS
from common.options import (add_machine_options, option_identity, options_parser, real_number,
                            whole_number)
from common.runs import code_of, finished, read_row, result_line, write_row
from common.sequence import draw_training_negatives
from common.training import Training, start

MODES = 'freeze', 'trainable', 'further-all', 'further-emb', 'id+text'


# ------------------------------------------------------------------------ options

def parse_args(argv=None):
    p = options_parser(__doc__)
    p.add_argument('dataset', help='name of a prepared dataset')
    g = p.add_argument_group('model')
    g.add_argument('--model', choices=MODELS, required=True)
    g.add_argument('--variants', nargs='+', default=[('random', 'random')], type=variant,
                   metavar='VARIANT', help='see above')
    g.add_argument('--init-scale', default='raw', choices=SCALES,
                   help="of the embeddings: raw (paper); rescaled to a random table's mean row norm; "
                        'centred or whitened, then rescaled; permuted = centred, in a random order '
                        'of items (a control)')
    g.add_argument('--hidden', type=whole_number(1, 65_536),
                   help="width. Wider embeddings are reduced to their principal components (ours); "
                        "default: the embeddings' width, for random that of the first embeddings "
                        'in --variants, else 768 (paper sec. 4.2)')
    g.add_argument('--max-items', type=whole_number(2, 10_000), default=50,
                   help="newest items of a history (authors' code)")
    g = p.add_argument_group('optimisation')
    g.add_argument('--loss', choices=['bce', 'ce'],
                   help='one negative (SASRec, paper table 3) or full softmax (table 4); '
                        "default: the model's own; BERT4Rec has one only")
    g.add_argument('--lrs', type=real_number(above=0), nargs='+', default=[0.0003, 0.001, 0.003, 0.01],
                   help="Adam's (paper sec. 4.2)")
    g.add_argument('--batch', type=whole_number(1),
                   help='users (paper sec. 4.2: 128, BERT4Rec 256)')
    g.add_argument('--epochs', type=whole_number(1), default=200, help="at most (authors' code)")
    g.add_argument('--patience', type=whole_number(1), default=10,
                   help='epochs with no better validation NDCG@10 (paper sec. 4.2)')
    g.add_argument('--seeds', type=whole_number(0), nargs='+', default=[0])
    add_machine_options(p)
    args = p.parse_args(argv)
    losses = MODELS[args.model].losses
    if args.loss and args.loss not in losses:
        p.error(f'--loss {args.loss}: {args.model} knows {", ".join(losses)} only')
    args.loss = args.loss or losses[0]
    args.batch = args.batch or MODELS[args.model].batch
    return args


def variant(text):
    """An argparse type: 'random' or an embedding's name and a mode -> (source, mode)."""
    if text == 'random':
        return text, text
    for mode in MODES:
        source = text.removesuffix(f'-{mode}')
        if source != text and source:
            return source, mode
    raise ValueError


variant.__name__ = f'variant (random, or E- and one of {", ".join(MODES)})'


# ------------------------------------------------------------------------ what all runs share

class World(NamedTuple):
    """Everything that the runs of one command share."""
    args: object
    data: Dataset
    machine: Machine
    kind: type           # class of the model
    code: dict           # digests of what defines it
    folder: pathlib.Path
    train: tuple         # all users' training parts, ragged
    users: np.ndarray    # those who have enough training items
    embeddings: dict     # source -> initial.Embeddings


def make_world(args):
    """Load data and embeddings. Errors: UserError where something is missing or foreign."""
    data, kind = load(args.dataset), MODELS[args.model]
    folder = runs_root() / args.dataset
    train = data.training()
    users = np.flatnonzero(np.diff(train[1]) >= kind.least)
    if not len(users):
        raise UserError(f'{data.name}: {args.model} needs users with two training items '
                        '(four interactions)')
    sources = dict.fromkeys(source for source, _ in args.variants if source != 'random')
    embeddings = {source: read_embeddings(folder / 'embeddings' / f'{source}.pt', data)
                  for source in sources}
    file = pathlib.Path(inspect.getfile(kind)).relative_to(ROOT)
    return World(args, data, start(args), kind, code_of('train_seq.py', str(file)), folder, train,
                 users, embeddings)


def with_freeze(variants):
    """The variants in order, each further-* after the freeze run that it starts from."""
    ordered = []
    for source, mode in variants:
        if mode.startswith('further'):
            ordered.append((source, 'freeze'))
        ordered.append((source, mode))
    return list(dict.fromkeys(ordered))


def width_of(world, source):
    """The model's width for this source of its initial rows."""
    if world.args.hidden:
        return world.args.hidden
    if source == 'random':
        source = next(iter(world.embeddings), None)
    return world.embeddings[source].matrix.shape[1] if source else 768


# ------------------------------------------------------------------------ one run

def build(world, source, mode, seed, start_from=None):
    """The model at the start of training; start_from: the freeze run of further-*."""
    torch.manual_seed(seed)
    width = width_of(world, source)
    table, text = world.kind.random_table(world.data.n_items, width), None
    if source != 'random':
        given = world.embeddings[source].matrix
        if given.shape[1] != width:
            path = world.folder / 'embeddings' / f'{source}.pt'
            given = components(given, width, path)
        norm = float(table[1:].norm(dim=1).mean())
        given = initial_table(given, world.args.init_scale, norm, seed)
        table, text = (table, given) if mode == 'id+text' else (given, None)
    model = world.kind(table, mode != 'freeze', text, max_items=world.args.max_items)
    if start_from:
        model.load_state_dict(load_pt(start_from / 'model.pt', 'seq')['model'])
        if mode == 'further-emb':
            model.requires_grad_(False)
            model.item_embedding.weight.requires_grad_(True)
    return model.on(world.machine)


def ranks_of(world, model, which):
    """Ranks of the evaluated users' targets."""
    data = world.data
    items, offsets, targets = data.split(which)
    score = product_scorer(model.all_states(items, offsets), *model.scorer())
    return rank_counts(score, data.n_items, targets, data.negatives, (items, offsets))


def fit(world, model, run, seed, lr):
    """Train `model` -> the Training, its best weights restored."""
    args = world.args
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr, betas=model.betas, fused=True)
    steps = -(-len(world.users) // args.batch)
    training = Training(run, args, model.train(), optimizer, steps, args.epochs, args.patience)
    with training:
        for epoch in training.epochs():
            rng = np.random.default_rng([seed, 7, epoch])
            batches = np.array_split(rng.permutation(world.users), steps)
            negatives = None
            if args.loss == 'bce':
                negatives = draw_training_negatives(*world.train, world.data.n_items, rng)
            for step in training.steps():
                items, offsets = take(*world.train, batches[step])
                drawn = None
                if negatives is not None:
                    drawn, _ = take(negatives, world.train[1], batches[step])
                rng = np.random.default_rng([seed, 8, epoch, step])
                with world.machine.autocast():
                    loss = model.loss(items, offsets, rng, args.loss, drawn)
                loss.backward()
                training.update(loss=loss)
            found = summarise(ranks_of(world, model, 'valid'))
            training.end_epoch(found['sampled']['NDCG@10'], full=found['full']['NDCG@10'])
    training.restore_best()
    return training


def one_run(world, source, mode, seed, lr, start_from):
    """Train and evaluate one model, or find it up to date: its row. Diverged where it did."""
    args, data, width = world.args, world.data, width_of(world, source)
    scale = 'raw' if source == 'random' else args.init_scale
    what = source if source == 'random' else f'{source}-{mode}-{scale}'
    name = f'{args.model}-{args.loss}-{what}-{width}-lr{lr:g}-seed{seed}'
    folder = world.folder / name
    begun = digest_of(start_from)
    identity = {'options': {**option_identity(args), 'init_scale': scale, 'hidden': width},
                'data': data.fingerprint, 'mode': mode, 'seed': seed, 'lr': lr, 'from': begun,
                'embedding': None if source == 'random' else world.embeddings[source].digest}
    with lock(folder):
        if row := finished(folder, identity, world.code, args):
            print(f'{name}: up to date ({result_line(row)})')
            return row
        run = folder, identity, world.code, name
        model = build(world, source, mode, seed, start_from)
        training = fit(world, model, run, seed, lr)
        ranks = ranks_of(world, model, 'test')
        head = {} if source == 'random' else world.embeddings[source].head
        about = {'model': args.model, 'init': source, 'mode': mode, 'scale': scale, 'hidden': width,
                 'loss': args.loss, 'seed': seed, 'lr': lr, 'plm': head.get('plm'),
                 'max_items': args.max_items}
        save_pt(folder / 'model.pt', 'seq', about=about, items=data.item_ids,
                data=data.fingerprint, model=model.state_dict())
        row = write_row(folder, identity, world.code, {'users': data.evaluated, **ranks}, **about,
                        norm=head.get('norm'), cosine=head.get('cosine'), valid=training.best,
                        best_epoch=training.best_epoch, epochs=training.epoch,
                        seconds=round(training.seconds, 1), device=str(world.machine.device),
                        parameters=sum(p.numel() for p in model.parameters()),
                        **result_of(data, ranks))
        training.finish()
    print(f'{name}: best epoch {row["best_epoch"]} of {row["epochs"]}, {row["seconds"]:.0f} s, '
          f'{result_line(row)}{warning(world, row)}, written to {folder}', flush=True)
    return row


def digest_of(folder):
    """What a freeze run was made from, for the run that starts from it; None for no folder."""
    if folder is None:
        return None
    row = read_row(folder)
    return digest(row['identity'], row['code'])


def warning(world, row):
    """Said where a model did no better on validation than counting how often items were bought."""
    from common.baselines import popularity_value
    bound = popularity_value(world.data)
    if row['valid'] > bound:
        return ''
    return f' (NO BETTER THAN POPULARITY on validation: {100 * bound:.2f})'


# ------------------------------------------------------------------------ main

def main(args):
    world = make_world(args)
    best = {}  # (variant, seed) -> row of its best rate
    for source, mode in with_freeze(args.variants):
        rates = args.lrs
        for seed in args.seeds:
            start_from = None
            if mode.startswith('further'):
                start_from = world.folder / best[(source, 'freeze'), seed]['run']
            rows = []
            for lr in rates:
                try:
                    rows.append(one_run(world, source, mode, seed, lr, start_from))
                except Diverged as error:
                    print(f'{args.model} {source}-{mode}, rate {lr:g}, seed {seed}: {error}')
            if not rows:
                raise UserError(f'{args.model} {source}-{mode}: training diverged with every rate of '
                                '--lrs; add lower ones')
            found = max(rows, key=lambda row: row['valid'])
            best[(source, mode), seed] = found
            rates = [found['lr']]  # the first seed chooses for the others


if __name__ == '__main__':
    command(main, parse_args())
