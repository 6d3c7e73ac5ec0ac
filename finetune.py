"""Stage-FT1 and stage-FT2: tune RecFormer on a target domain, and its row (REC) of the result table.

    python finetune.py pantry --checkpoint runs/pretrained/paper.pt --stage 1        # -> runs/pantry/recformer/ft1.pt
    python finetune.py pantry --stage 2 --seeds 0 1                                  # from ft1.pt, ft1-seed1.pt: REC's rows
    python finetune.py grocery --plm minilm --layers 2 --stage 1 --epochs 1 --out /tmp/look.pt                # a look

Stage 1: before each epoch all items are encoded; everything trains with a full softmax over that fixed table, on one random
non-empty prefix per user and epoch (the next item is the label). Stage 2: the table of stage 1's best model stays for good.
Stage 0 trains nothing: it evaluates the checkpoint (or, without one, the untouched language model) as it is.

Reads:  data/<dataset>/prepared.npz, --checkpoint (stage 2: stage 1's).
Writes: --out (weights and the item table), a row in runs/<dataset>/results.json, while it runs <out>.resume.
"""
import argparse
import datetime
import pathlib
import time

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.data import load
from common.files import UserError, command, load_pt, lock, made_from, provenance, runs_root
from common.metrics import find_row, rank_counts, save_row, summarise, tie_share
from common.recformer import Batch, cosine_logits, encode_items, from_backbone, lf_untouched, load_model, save_model
from common.sources import fetch_plm
from common.text import load_tokenizer, micro_batches, pack, ragged, take, tokenize
from common.training import (EarlyStopping, State, adamw, add_runtime_options, apply_gradients, linear_schedule, positive,
                             seed_all, start)


# ---------------------------------------------------------------------------- options

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('dataset', help='name of a prepared dataset')
    p.add_argument('--stage', type=int, choices=[0, 1, 2], required=True)
    p.add_argument('--checkpoint', help="where to start (default: stage 2 this dataset's ft1.pt, else --plm's weights)")
    p.add_argument('--out', help='checkpoint to write (default: runs/<dataset>/recformer/ft1.pt or ft2.pt)')
    g = p.add_argument_group('model')
    g.add_argument('--plm', help='language model where there is no checkpoint: longformer (paper), minilm, hub name, folder')
    g.add_argument('--layers', type=positive(), help='with --plm: its first LAYERS layers only (default: all)')
    g.add_argument('--tune_layers', default='all', help='encoder layers that train: 3,7,11 (paper table 1); all: everything')
    g.add_argument('--trainable_items', action='store_true', help='stage 2: the item table trains too (paper table 5)')
    g.add_argument('--freeze_words', action='store_true', help='word embeddings stay (published code trains them)')
    g = p.add_argument_group('optimisation')
    g.add_argument('--epochs', type=positive(), default=128, help='at most (RecFormer)')
    g.add_argument('--patience', type=positive(), default=5, help='epochs without a better validation NDCG@10 (RecFormer)')
    g.add_argument('--batch', type=positive(), default=128, help='users per optimizer step (RecFormer: 16 x 8 accumulated)')
    g.add_argument('--lr', type=positive(float), default=5e-5, help='peak learning rate (RecFormer)')
    g.add_argument('--warmup', type=positive(zero=True), default=100, help='warm-up steps (RecFormer)')
    g.add_argument('--weight_decay', type=positive(float, zero=True), default=0.0, help="AdamW's (RecFormer)")
    g.add_argument('--exclude_history', action='store_true', help="full ranking without the user's own history")
    g.add_argument('--seeds', type=positive(zero=True), nargs='+', default=[0],
                   help='one after the other; those above 0 have it in their file names, as in ft1-seed1.pt')
    add_runtime_options(p, language_model=True)
    args = p.parse_args(argv)
    if args.trainable_items and args.stage != 2:
        p.error('--trainable_items belongs to --stage 2')
    if args.stage == 2 and args.plm:
        p.error('--stage 2 starts from a checkpoint of stage 1, not from --plm')
    if args.stage != 2 and not args.checkpoint and not args.plm:
        p.error('name a --checkpoint (pretrain.py makes one) or a --plm to start from')
    return args


# ---------------------------------------------------------------------------- pieces

def choose_layers(model, text):
    """Freeze all but the encoder layers named in `text` ('3,7,11'); 'all' leaves everything to train."""
    if text == 'all':
        return
    try:
        wanted = {int(i) for i in text.split(',')}
    except ValueError:
        raise UserError(f'--tune_layers {text}: give layer numbers such as 3,7,11, or all') from None
    if not wanted <= set(range(len(model.layers))):
        raise UserError(f'--tune_layers {text}: this model has layers 0 to {len(model.layers) - 1}')
    model.requires_grad_(False)
    for i in wanted:
        model.layers[i].requires_grad_(True)


def prefixes(data, users, rng):
    """One prefix of each user's training part (two items at least) and the item after it: (items, offsets, labels)."""
    begin, n = data.offsets[users], data.lengths[users] - 2
    size = rng.integers(1, n)  # 1 ... n - 1
    return data.items[ragged(begin, size)], np.concatenate([[0], np.cumsum(size)]), data.items[begin + size]


def add_gradients(model, table, users, labels, tokens, cls, args, device, autocast):
    """Softmax loss of users' prefixes (ragged) with their labels over the item table, in passes of bounded size.

    Gradients are added as it goes. table float [n + 1, H]; labels [B] item ids. Returns the mean loss over users (float).
    """
    total, lengths = 0.0, pack(*users, tokens, cls).lengths
    for group in micro_batches(lengths, args.micro_tokens):
        with autocast():
            states = model(Batch(pack(*take(*users, group), tokens, cls), model.config.window, device))
        logits = cosine_logits(states, table)
        logits[:, 0] = -torch.inf                                                  # padding is no target
        label = torch.from_numpy(labels[group].astype(np.int64)).to(device)
        loss = F.cross_entropy(logits, label, reduction='sum') / len(labels)
        loss.backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def user_states(model, data, which, tokens, cls, args, device, autocast):
    """CLS state of every evaluated user's history: ([E, H] float32 on the CPU, targets [E])."""
    items, offsets, targets = data.split(which)
    packed = pack(items, offsets, tokens, cls)
    states = torch.empty(len(targets), model.config.hidden)
    for rows in tqdm(micro_batches(packed.lengths, args.micro_tokens), desc=f'{which} users', unit='batch', leave=False):
        with autocast():
            batch = Batch(pack(*take(items, offsets, rows), tokens, cls), model.config.window, device)
            states[rows] = model(batch).float().cpu()
    return states, targets


def evaluate(model, table, data, which, tokens, cls, args, device, autocast):
    """Ranks of the targets under cosine scores."""
    model.eval()
    states, targets = user_states(model, data, which, tokens, cls, args, device, autocast)
    model.train()
    exclude = data.split(which)[:2] if args.exclude_history else None
    unit = lambda x: F.normalize(x.float(), dim=-1)
    return rank_counts(unit(states), unit(table).cpu(), targets, data.negatives, exclude=exclude)


# ---------------------------------------------------------------------------- main

def main(args):
    for seed in args.seeds:
        tune(args, seed)


def tune(args, seed):
    device, autocast = start(args)
    seed_all(seed)
    data = load(args.dataset)
    folder = runs_root() / data.name
    of_seed = lambda path: path.with_stem(f'{path.stem}-seed{seed}') if seed else path
    out = of_seed(pathlib.Path(args.out or folder / 'recformer' / f'ft{args.stage}.pt'))
    source = args.checkpoint or (str(of_seed(folder / 'recformer' / 'ft1.pt')) if args.stage == 2 else None)

    # ---------------------------------------------------- model
    if source:
        model, meta = load_model(source, args.plm)
        origin = meta['identity']
    else:
        model, meta, origin = from_backbone(fetch_plm(args.plm), args.layers), {'plm': args.plm}, None
        if args.stage == 0:
            lf_untouched(model)
    tokenizer = load_tokenizer(fetch_plm(meta['plm']))
    if meta.get('tokenizer', tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f'{source}: was made with another tokenizer than {meta["plm"]} has now')
    tokens = tokenize(data.attributes, tokenizer)
    choose_layers(model, args.tune_layers)
    if args.freeze_words:
        model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    model.to(device).train()
    unused = ('out', 'device', 'save_every', 'deterministic', 'micro_tokens', 'checkpoint', 'exclude_history', 'seeds')
    options = {'seed': seed} | {k: v for k, v in vars(args).items() if k not in unused}
    identity = {'options': options, 'data': data.fingerprint, 'start': origin, 'tokenizer': tokenizer.fingerprint}
    stage = ['as it is', 'stage-FT1', 'stage-FT2'][args.stage]
    mode = 'trainable' if args.trainable_items else ['none', 'ft1', 'ft2'][args.stage]
    init = meta.get('stage', 'lf')
    run = '-'.join(['recformer', init if args.stage == 0 else mode]
                   + [f'layers{args.tune_layers}'] * (args.tune_layers != 'all') + ['nohistory'] * args.exclude_history + [f'seed{seed}'])
    encode = lambda: encode_items(model, tokens, tokenizer.cls, device, autocast, args.micro_tokens)

    with lock(out.parent):
        done = made_from(out, 'recformer', identity) if args.stage else None
        if done and find_row(folder, run, identity):
            return print(f'{out} is up to date')
        began = time.time()
        if args.stage == 2:
            table = load_pt(source, 'recformer')['items'] if 'stage' in meta and meta['stage'] == 'ft1' else None
            if table is None:
                raise UserError(f'{source}: stage 2 starts from a checkpoint of finetune.py --stage 1')
            if meta['data'] != data.fingerprint:
                raise UserError(f'{source}: was tuned on another version of {data.name}; run --stage 1 again')
        else:
            table = encode()

        # ------------------------------------------------ optimizer
        train = args.stage and not done
        if train:
            items = torch.nn.Embedding.from_pretrained(table.to(device), freeze=not args.trainable_items)
            tuned = torch.nn.ModuleDict({'model': model, 'item_table': items}) if args.trainable_items else model
            users = np.flatnonzero(data.lengths >= 4)                      # two training items: a prefix and a label
            steps = -(-len(users) // args.batch)
            optimizer = adamw(tuned, args.lr, args.weight_decay)
            schedule = linear_schedule(optimizer, args.warmup, args.epochs * steps)
            best = EarlyStopping(tuned, args.patience)
            state = State(out.with_suffix('.resume'), identity, args.save_every, model=tuned, optimizer=optimizer,
                          schedule=schedule, best=best)
            if args.stage == 1 and state.epoch:
                # the table in use was encoded when the epoch began: from the weights saved then, or now if none was trained
                items.weight.data = state.tensors['items'].to(device)

        # ------------------------------------------------ loop
        while train and state.epoch < args.epochs and not best.stop:
            rng = np.random.default_rng([seed, 5, state.epoch])
            order = rng.permutation(users)
            history, offsets, labels = prefixes(data, order, rng)
            bar = tqdm(range(state.step, steps), initial=state.step, total=steps, unit='step',
                       desc=f'{stage} epoch {state.epoch + 1}')
            for step in bar:
                chunk = np.arange(step * args.batch, min((step + 1) * args.batch, len(order)))
                loss = add_gradients(model, items.weight, take(history, offsets, chunk), labels[chunk], tokens,
                                     tokenizer.cls, args, device, autocast)
                apply_gradients(loss, tuned, optimizer, state)
                schedule.step()
                bar.set_postfix_str(f'loss {loss:.3f}')
                state.advance()
            if args.stage == 1:
                table = encode()
                items.weight.data = table.to(device)
                state.tensors['items'] = table
            else:
                table = items.weight.detach().cpu()
            ranks = evaluate(model, table, data, 'valid', tokens, tokenizer.cls, args, device, autocast)
            value = summarise(ranks)['sampled']['NDCG@10']
            best.update(value, state.epoch)
            print(f'epoch {state.epoch + 1}: validation NDCG@10 {value:.4f} '
                  f'(best {best.best:.4f}, epoch {best.best_epoch + 1})')
            state.next_epoch()

        # ------------------------------------------------ result
        found = {'valid_ndcg10': None, 'epoch': 0, 'epochs': 0}
        if train:
            best.restore()
            table = encode() if args.stage == 1 else items.weight.detach().cpu()  # encoded after the best was chosen
            found = {'valid_ndcg10': best.best, 'epoch': best.best_epoch + 1, 'epochs': state.epoch}
            save_model(out, model, {'identity': identity, 'plm': meta['plm'], 'tokenizer': tokenizer.fingerprint,
                                    'stage': f'ft{args.stage}', 'data': data.fingerprint, **found, **provenance()}, items=table)
            state.finish()
        elif done:  # trained, but stopped before its row was written
            model.load_state_dict(done['model'])
            table, found = done['items'], {k: done['meta'][k] for k in found}
        ranks = evaluate(model, table, data, 'test', tokens, tokenizer.cls, args, device, autocast)
        metrics = summarise(ranks)
        save_row(folder, {
            'run': run, 'identity': identity, 'dataset': data.name, 'plm': meta['plm'], 'model': 'recformer', 'init': init,
            'mode': mode, 'scale': 'raw', 'dim': None, 'loss': 'ce', 'tied': True, 'lr': args.lr, 'seed': seed,
            'users': len(data.evaluated), 'tune_layers': args.tune_layers, 'tie_share': tie_share(ranks),
            'valid_ndcg10': found['valid_ndcg10'], 'metrics': metrics, 'exclude_history': args.exclude_history,
            'seconds': round(time.time() - began, 1), 'epochs': found['epochs'], 'best_epoch': found['epoch'],
            'parameters': sum(p.numel() for p in model.parameters()), 'device': str(device),
            'date': datetime.date.today().isoformat(), **provenance()}, {'users': data.evaluated, **ranks})
        print(f'{stage}: NDCG@10 {metrics["sampled"]["NDCG@10"]:.4f} (100 negatives), '
              f'{metrics["full"]["NDCG@10"]:.4f} (all items) -> {folder / "results.json"}'
              + (f', {out}' if args.stage else ''))


if __name__ == '__main__':
    command(main, parse_args())
