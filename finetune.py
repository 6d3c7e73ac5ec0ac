"""Stage-FT1 and stage-FT2: tune RecFormer on a target domain, and its row (REC) of the tables.

    python finetune.py pantry --stage 1 --checkpoint runs/pretrained/longformer-books+clothing+...
    python finetune.py pantry --stage 2 --seeds 0 1             # from ft1-seed0, ft1-seed1
    python finetune.py drugstore --stage 1 --plm minilm --max-tokens 32 --epochs 1 --out /tmp/look

Stage 1: before each epoch all items are encoded; everything trains with a full softmax over that
fixed table, on one random non-empty prefix per user and epoch (the next item is the label).
Stage 2: the table of stage 1's best model stays for good, and that model too where no epoch has a
better validation. Stage 0 trains nothing: it evaluates the checkpoint (or, without one, the
untouched language model) as it is.

Reads:  data/<dataset>/prepared.npz, --checkpoint (stage 2: stage 1's).
Writes: --out, a folder: model.pt (with the item table), row.json, ranks.npz, log.csv.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import cut, parts, take
from common.backbone import save_recformer, start_model, weights_digest
from common.data import load
from common.files import UserError, command, lock, runs_root
from common.metrics import product_scorer, rank_counts, result_of, value_of
from common.options import COUNT, add_tuning_options, flag, option, option_identity, options_parser
from common.recformer import cosine_logits
from common.runs import Run, code_of
from common.text import item_tokens
from common.training import Training, prefetch, start


# ------------------------------------------------------------------------ options

def parse_args(argv=None):
    p = options_parser(__doc__)
    option(p, 'dataset', 'name of a prepared dataset')
    option(p, '--stage', 'see above', int, choices=[0, 1, 2], required=True)
    option(p, '--checkpoint',
           'a folder of pretrain.py or finetune.py, or published weights (with --plm)')
    option(p, '--out', 'folder to write (default: runs/<dataset>/ft<stage>-...-seed<N>)', Path)
    add_tuning_options(p, epochs=128, batch=128)  # RecFormer: 16 users x 8 accumulated
    option(p, '--tune-layers', 'encoder layers that train: 3,7,11 (paper table 1); all: everything',
           str, 'all')
    flag(p, '--trainable-items', 'stage 2: the item table trains too (paper table 5)')
    flag(p, '--freeze-words', 'the word embeddings stay as they are (published code: they train)')
    option(p, '--seeds', 'one after the other', COUNT, [0], nargs='+')
    args = p.parse_args(argv)
    wrong = args.trainable_items or not (args.checkpoint or args.plm)
    if args.stage == 2:
        wrong = args.plm
    if wrong:
        p.error('--stage 0 and 1 start from a --checkpoint (pretrain.py makes one) or a --plm; '
                '--stage 2 from stage 1, without --plm, and it alone takes --trainable-items')
    if args.out and len(args.seeds) > 1:
        p.error('--out: one folder takes one of the --seeds')
    return args


# ------------------------------------------------------------------------ tune

def choose_layers(model, text):
    """Freeze all but the encoder layers named in `text` ('3,7,11'); 'all' leaves all to train."""
    if text == 'all':
        return
    layers = dict(model.longformer.encoder.layer.named_children())
    model.requires_grad_(False)
    for name in text.split(','):
        if name not in layers:
            raise UserError(f'--tune-layers {text}: all, or some of 0 to {len(layers) - 1}: 3,7,11')
        layers[name].requires_grad_(True)


def prefixes(data, users, rng):
    """One prefix of each user's training part (two items at least) and the item after it: ragged
    (items, offsets), labels [users]."""
    begin = data.offsets[users]
    size = rng.integers(1, data.lengths[users] - 2)  # 1 ... one less than the training part
    return cut(data.items, begin, size), data.items[begin + size]


def add_gradients(model, table, packed, labels):
    """Add the gradients of the softmax loss of histories (Packed) with their labels [B] over the
    item table [n + 1, H], in passes of bounded size. Returns this process's part of the mean
    loss."""
    machine = model.machine
    total = torch.zeros((), device=machine.device)
    for group in model.passes(packed):
        logits = cosine_logits(model(packed.rows(group)), table)
        logits[:, 0] = -torch.inf  # padding is no target
        label = machine.put(labels[group]).long()
        loss = F.cross_entropy(logits, label, reduction='sum') / len(labels)
        loss.backward()
        total += loss.detach()
    return total


def tune(args, data, model, tokens, run):
    """Train `model`, and with --trainable-items its item table; what the row says of it."""
    machine = model.machine
    # the same memory as model.items, which thus is what trains and what the best weights bring back
    table = torch.nn.Embedding.from_pretrained(model.items, freeze=not args.trainable_items)
    tuned = torch.nn.ModuleDict({'model': model, 'item_table': table})
    users = data.users_with(2)  # a prefix and a label
    shares = parts(len(users), args.batch)
    # RecFormer's AdamW has no decay: that is Adam
    optimizer = torch.optim.Adam(tuned.parameters(), args.lr, fused=True)
    training = Training(run, tuned, optimizer, len(shares), args.warmup)
    with training:
        if args.stage == 2 and training.best < 0:
            # stage 1's best stays where no epoch is better (RecFormer's code)
            training.keep(value_of(ranks_of(model, tokens, data, 'valid')))
        for epoch in training.epochs():
            tuned.train()
            rng = np.random.default_rng([args.seed, 5, epoch, args.stage - 1])
            histories, labels = prefixes(data, rng.permutation(users), rng)
            batches = ((model.pack(*take(*histories, shares[step]), tokens), labels[shares[step]])
                       for step in training.steps())
            for packed, label in prefetch(batches, machine):
                if machine.rank:  # dropout; the first goes on with the generator as it is
                    torch.manual_seed(hash((args.seed, epoch, training.step, machine.rank)))
                loss = add_gradients(model, table.weight, packed, label)
                machine.sum_gradients(tuned)
                training.update(loss=machine.sum(loss))
            if args.stage == 1:
                model.items.copy_(model.encode_items(tokens))
            value = value_of(ranks_of(model, tokens, data, 'valid'))
            training.end_epoch(value)
            print(f'epoch {epoch + 1}: validation NDCG@10 {value:.4f} (best {training.best:.4f})')
    return training.restore_best()


# ------------------------------------------------------------------------ evaluate and write

def ranks_of(model, tokens, data, which):
    """Ranks of the evaluated users' targets under cosine scores with the model's item table."""
    items, offsets, _ = data.split(which)
    states = model.encode_histories(items, offsets, tokens, f'{which} users')
    score = product_scorer(F.normalize(states), F.normalize(model.items))
    return rank_counts(score, data, which)


def one_run(args, machine, data):
    """Load, tune, evaluate, write the checkpoint and the row; stage 0 evaluates only."""
    code = code_of('finetune.py')  # now: an edit while the model loads is not what runs
    folder = runs_root() / data.name
    layers = '' if args.tune_layers == 'all' else f'-layers{args.tune_layers}'
    items = '-items' * args.trainable_items
    checkpoint = args.checkpoint
    if args.stage == 2:
        checkpoint = checkpoint or folder / f'ft1{layers}-seed{args.seed}'
    model = start_model(checkpoint, args.plm, args.seed if args.stage else None)
    if args.stage == 2 and (model.stage, model.data) != ('ft1', data.fingerprint):
        raise UserError(f"{checkpoint}: is not --stage 1's, of today's {data.name}: run that first")
    if args.max_tokens:
        model.config.max_tokens = args.max_tokens
    model.word_table.requires_grad_(not args.freeze_words)
    choose_layers(model, args.tune_layers)
    model.lm_head.requires_grad_(False)
    tokens = item_tokens(data, model.words)
    init = model.stage
    stage = f'ft{args.stage}' if args.stage else f'ft0-{init}'
    out = args.out or folder / f'{stage}{layers}{items}-seed{args.seed}'
    identity = {'options': option_identity(args), 'data': data.fingerprint,
                'tokens': tokens.fingerprint, 'start': weights_digest(model)}
    run = Run(args, out, identity, code)
    with lock(out):
        if run.finished():
            return
        model.on(machine)
        if args.stage < 2:
            model.items = model.encode_items(tokens)
        found = {'valid': None, 'epochs': 0, 'seconds': 0}
        if args.stage:
            found = tune(args, data, model, tokens, run)
            model.stage = stage
            model.data = data.fingerprint
        ranks = ranks_of(model, tokens, data, 'test')
        if machine.rank:
            return
        if args.stage:
            save_recformer(out / 'model.pt', model)
        run.write(model='recformer', init=init, mode=model.stage, hidden=model.config.hidden,
                  plm=model.plm, config=vars(model.config), **found, **result_of(data, ranks))


# ------------------------------------------------------------------------ main

def main(args):
    machine = start(args)
    data = load(args.dataset)
    for args.seed in args.seeds:  # from here on an option as any other: a run's identity has it
        one_run(args, machine, data)


if __name__ == '__main__':
    command(main, parse_args())
