"""SASRec or BERT4Rec from an initialisation: trains, evaluates, writes one row of the result table per variant and seed.

    python train_seq.py pantry --model sasrec --variants random pt-trainable --lrs 0.0003 0.001 0.003 0.01 --seeds 0 1 2
    python train_seq.py grocery --model bert4rec --variants random --epochs 1 --hidden 64          # a look, seconds

Variants: random; lf-, pt-, ft- with -freeze (item table fixed), -trainable (tuned too), -id+text (fixed, added to a trained
ID table; paper table 5); -further-all and -further-emb (from the best -freeze model: tune all, or the item table alone).
All --lrs are tried with the first seed; the best by validation NDCG@10 (100 negatives) serves the other seeds.

Reads:  data/<dataset>/prepared.npz, runs/<dataset>/embeddings/{lf,pt,ft}.pt (export_embeddings.py).
Writes: runs/<dataset>/results.json (a row per run), ranks/<run>.npz, seq/<run>-lr<lr>.pt, while it runs seq/*.resume.
"""
import argparse
import datetime
import time

import numpy as np
import torch
from tqdm import tqdm

from common.bert4rec import BERT4Rec
from common.data import load
from common.files import Diverged, UserError, command, digest, load_pt, lock, made_from, provenance, runs_root, save_pt
from common.initial import read_embeddings, reduce_dimensions, starting_table
from common.metrics import find_row, rank_counts, save_row, summarise, tie_share
from common.sasrec import SASRec, all_states, draw_negatives
from common.text import ragged, take
from common.training import EarlyStopping, State, add_runtime_options, apply_gradients, positive, seed_all, start

SOURCES, MODES = ('lf', 'pt', 'ft'), ('freeze', 'trainable', 'further-all', 'further-emb', 'id+text')
MODELS = {'sasrec': SASRec, 'bert4rec': BERT4Rec}


# ---------------------------------------------------------------------------- options

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('dataset', help='name of a prepared dataset')
    g = p.add_argument_group('model')
    g.add_argument('--model', choices=MODELS, required=True)
    g.add_argument('--variants', nargs='+', default=['random'], metavar='VARIANT',
                   choices=['random'] + [f'{s}-{m}' for s in SOURCES for m in MODES], help='see above')
    g.add_argument('--init_scale', default='raw', choices=['raw', 'rescaled', 'centred', 'whitened', 'permuted'],
                   help="of the embeddings: raw (paper); rescaled to a random table's mean row norm; centred or whitened, then "
                        'rescaled; permuted = centred, in a random order of items (a control)')
    g.add_argument('--pca', type=positive(), metavar='DIM', help='reduce the embeddings to DIM dimensions first (ours)')
    g.add_argument('--hidden', type=positive(zero=True, most=65_536), default=0,
                   help="of `random`; 0: the embeddings' width where there are any, else 768 (paper sec. 4.2)")
    g.add_argument('--tie_output', action='store_true', help='BERT4Rec: score with the item table (authors\' code does not)')
    g.add_argument('--max_items', type=positive(most=10_000), default=50, help='newest items of a history (authors\' code)')
    g = p.add_argument_group('optimisation')
    g.add_argument('--loss', choices=['bce', 'ce'], default='bce',
                   help='SASRec: one negative (table 3), full softmax (table 4)')
    g.add_argument('--lrs', type=positive(float), nargs='+', default=[0.0003, 0.001, 0.003, 0.01],
                   help="Adam's (paper sec. 4.2)")
    g.add_argument('--batch', type=positive(), help='users (paper sec. 4.2: 128 SASRec, 256 BERT4Rec)')
    g.add_argument('--epochs', type=positive(), default=200, help='at most (authors\' code)')
    g.add_argument('--patience', type=positive(), default=10,
                   help='epochs with no better validation NDCG@10 (paper sec. 4.2)')
    g.add_argument('--exclude_history', action='store_true', help="full ranking without the user's own history")
    g.add_argument('--seeds', type=positive(zero=True), nargs='+', default=[0])
    add_runtime_options(p)
    args = p.parse_args(argv)
    if args.model == 'bert4rec' and args.max_items < 2:
        p.error('--max_items: BERT4Rec needs 2 at least, one for the mask')
    args.loss = args.loss if args.model == 'sasrec' else 'masked'
    return args


# ---------------------------------------------------------------------------- one run

class Experiment:
    """Everything the runs of one command share."""

    def __init__(self, args):
        self.args, self.data, self.folder = args, load(args.dataset), runs_root() / args.dataset
        self.device, self.autocast = start(args)
        self.kind = MODELS[args.model]
        train = np.arange(self.data.n_users)
        lengths = self.data.lengths - 2
        self.train = self.data.items[ragged(self.data.offsets[:-1], lengths)], np.concatenate([[0], np.cumsum(lengths)])
        # SASRec needs an item and the one after it
        self.users = train[lengths >= 2] if args.model == 'sasrec' else train
        if not len(self.users):
            raise UserError(f'{self.data.name}: SASRec needs users with two training items (four interactions)')
        self.embeddings, self.chosen = {}, {}  # chosen: variant -> the learning rate that its first seed's validation chose

    def embedding(self, source):
        if source not in self.embeddings:
            path = self.folder / 'embeddings' / f'{source}.pt'
            matrix, meta = read_embeddings(path, self.data)
            matrix = reduce_dimensions(matrix, self.args.pca, path) if self.args.pca else matrix
            self.embeddings[source] = matrix, meta['plm'], digest(matrix.numpy())
        return self.embeddings[source]

    def hidden(self):
        if self.args.pca or self.args.hidden:
            return self.args.pca or self.args.hidden
        found = [s for s in SOURCES if (self.folder / 'embeddings' / f'{s}.pt').exists()]
        return self.embedding(found[0])[0].shape[1] if found else 768

    def build(self, source, mode, seed, freeze_file):
        """The model at the start of training."""
        seed_all(seed)
        width = self.hidden() if source == 'random' else self.embedding(source)[0].shape[1]
        embeddings = None if source == 'random' else self.embedding(source)[0]
        table, given = starting_table(self.kind, self.data.n_items, width, embeddings, self.args.init_scale, seed)
        table, text = (table, given) if mode in ('random', 'id+text') else (given, None)
        options = {'tied': self.args.tie_output} if self.args.model == 'bert4rec' else {}
        model = self.kind(table, mode != 'freeze', text, max_items=self.args.max_items, **options)
        if freeze_file:
            model.load_state_dict(load_pt(freeze_file, 'seq')['model'])
            if mode == 'further-emb':
                model.requires_grad_(False)
                model.item_embedding.weight.requires_grad_(True)
        return model.to(self.device)

    def ranks(self, model, which):
        items, offsets, targets = self.data.split(which)
        model.eval()
        states = all_states(model, items, offsets, self.device, self.autocast)
        model.train()
        table, bias = model.scorer()
        exclude = (items, offsets) if self.args.exclude_history else None
        return rank_counts(states, table, targets, self.data.negatives, bias, exclude)

    def checkpoint(self, run, lr):
        return self.folder / 'seq' / f'{run}-lr{lr:g}.pt'

    def fit(self, run, identity, source, mode, seed, lr, freeze_file):
        """Train one model -> (checkpoint path, its meta). A finished one of the same identity is used as it is."""
        args, out = self.args, self.checkpoint(run, lr)
        if done := made_from(out, 'seq', identity):
            return out, done['meta']
        model = self.build(source, mode, seed, freeze_file).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=lr, betas=model.betas, fused=True)
        best = EarlyStopping(model, args.patience)
        state = State(out.with_suffix('.resume'), identity, args.save_every, model=model, optimizer=optimizer, best=best)
        began, batch = time.time() - state.tensors.get('seconds', 0), args.batch or model.batch
        bar = tqdm(total=args.epochs, initial=state.epoch, unit='epoch', desc=f'{run} lr {lr:g}', leave=False)
        while state.epoch < args.epochs and not best.stop:
            rng = np.random.default_rng([seed, 7, state.epoch])
            order = rng.permutation(self.users)
            negatives = draw_negatives(*self.train, self.data.n_items, rng) if args.loss == 'bce' else None
            for step, users in enumerate(np.array_split(order, -(-len(order) // batch))):
                if step < state.step:
                    continue
                step_rng = np.random.default_rng([seed, 8, state.epoch, step])
                items, offsets = take(*self.train, users)
                drawn = take(negatives, self.train[1], users)[0] if negatives is not None else None
                with self.autocast():
                    loss = model.loss(items, offsets, step_rng, self.device, args.loss, drawn)
                loss.backward()
                state.tensors['loss'] = float(loss.detach())
                apply_gradients(state.tensors['loss'], model, optimizer, state)
                state.advance()
            value = summarise(self.ranks(model, 'valid'))['sampled']['NDCG@10']
            best.update(value, state.epoch)
            bar.update()
            bar.set_postfix_str(f'loss {state.tensors["loss"]:.3f} NDCG@10 {value:.4f} best {best.best:.4f}')
            state.tensors['seconds'] = time.time() - began
            state.next_epoch()
        bar.close()
        best.restore()
        meta = {'identity': identity, 'run': run, 'model': args.model, 'dataset': self.data.name, 'lr': lr, 'seed': seed,
                'source': source, 'mode': mode, 'scale': args.init_scale, 'tied': args.tie_output, 'pca': args.pca,
                'hidden': model.item_embedding.weight.shape[1], 'max_items': args.max_items, 'loss': args.loss,
                'valid_ndcg10': best.best, 'epochs': state.epoch, 'best_epoch': best.best_epoch + 1,
                'seconds': round(state.tensors['seconds'], 1), 'data': self.data.fingerprint,
                'parameters': sum(p.numel() for p in model.parameters()), **provenance()}
        save_pt(out, 'seq', meta, model=model.state_dict())
        state.finish()
        return out, meta

    def identity(self, source, mode, seed, freeze_identity):
        unused = ('device', 'save_every', 'deterministic', 'variants', 'seeds', 'lrs', 'dataset', 'exclude_history',
                  'hidden')
        options = {k: v for k, v in vars(self.args).items() if k not in unused}
        width = self.hidden() if source == 'random' else None
        if source == 'random':  # the embeddings, and what is done to them, play no part
            options = {k: v for k, v in options.items() if k not in ('init_scale', 'pca')}
        return {'options': options, 'data': self.data.fingerprint, 'mode': mode, 'seed': seed, 'width': width,
                'embedding': None if source == 'random' else self.embedding(source)[2], 'from': freeze_identity}

    def variant(self, name, seed):
        """Train (or find) one variant with one seed, its row written: (row, checkpoint). All --lrs are tried with the first
        seed; a rate with which training diverges is left out."""
        args = self.args
        source, _, mode = name.partition('-')
        mode = mode or 'random'
        scale = 'raw' if source == 'random' else args.init_scale
        parts = [args.model, args.loss, name, scale] + ['tied'] * args.tie_output + [f'pca{args.pca}'] * bool(args.pca) \
            + [f'h{args.hidden}'] * bool(args.hidden) + [f'seed{seed}']
        trained, freeze, freeze_identity = '-'.join(parts), None, None
        run = '-'.join(parts[:-1] + ['nohistory'] * args.exclude_history + parts[-1:])
        if mode.startswith('further'):
            row, freeze = self.variant(f'{source}-freeze', seed)
            freeze_identity = digest(row['identity'], row['lr'])
        base = self.identity(source, mode, seed, freeze_identity)
        lrs = [self.chosen[name]] if name in self.chosen else args.lrs
        identity = {**base, 'lrs': list(lrs)}
        row = find_row(self.folder, run, identity)
        if row and made_from(path := self.checkpoint(trained, row['lr']), 'seq', {**base, 'lr': row['lr']}):
            print(f'{run}: up to date (NDCG@10 {row["metrics"]["sampled"]["NDCG@10"]:.4f})')
            self.chosen[name] = row['lr']
            return row, path
        tried = []
        for lr in lrs:
            try:
                tried.append(self.fit(trained, {**base, 'lr': lr}, source, mode, seed, lr, freeze))
            except Diverged as error:
                print(f'{trained} lr {lr:g}: {error}')
        if not tried:
            raise UserError(f'{trained}: training diverged with every rate of --lrs; add lower ones')
        path, meta = max(tried, key=lambda t: t[1]['valid_ndcg10'])
        self.chosen[name] = meta['lr']
        model = self.build(source, mode, seed, None)
        model.load_state_dict(load_pt(path, 'seq', self.device)['model'])
        ranks = self.ranks(model, 'test')
        row = {'run': run, 'identity': identity, 'dataset': self.data.name,
               'plm': None if source == 'random' else self.embedding(source)[1], 'model': args.model, 'init': source,
               'mode': mode, 'scale': scale, 'dim': args.pca, 'loss': args.loss, 'tied': args.tie_output,
               'exclude_history': args.exclude_history, 'users': len(self.data.evaluated), 'tie_share': tie_share(ranks),
               'metrics': summarise(ranks), 'device': str(self.device), 'date': datetime.date.today().isoformat(),
               **{k: meta[k] for k in ('lr', 'seed', 'hidden', 'valid_ndcg10', 'seconds', 'epochs', 'best_epoch', 'parameters',
                                       'commit', 'torch', 'transformers', 'command')}}
        save_row(self.folder, row, {'users': self.data.evaluated, **ranks})
        m = row['metrics']
        print(f'{run}: lr {row["lr"]:g}, best epoch {row["best_epoch"]} of {row["epochs"]}, {row["seconds"]:.0f} s, NDCG@10 '
              f'{m["sampled"]["NDCG@10"]:.4f} (100 negatives) {m["full"]["NDCG@10"]:.4f} (all items) '
              f'-> {self.folder / "results.json"}', flush=True)
        return row, path


# ---------------------------------------------------------------------------- main

def main(args):
    experiment = Experiment(args)
    with lock(experiment.folder / 'seq'):
        for name in args.variants:
            for seed in args.seeds:
                experiment.variant(name, seed)


if __name__ == '__main__':
    command(main, parse_args())
