"""Stage-PT: tune a language model on users' histories in source domains (RecFormer's pre-training).

    python pretrain.py books clothing sports movies --plm longformer --leave-out
    python pretrain.py grocery --plm minilm --max-steps 20 --batch 16 --accumulate 1 --out /tmp/look

For each user and epoch: a split point drawn from the second half of the sequence, history = items
before it, target = the item there. Loss = cross-entropy of cosine / 0.05 between a history's CLS
and the targets' CLS of the batch, + 0.1 x masked language model on histories and targets in a pass
of its own. The best by held-out contrastive accuracy is kept.

Reads:  data/<source>/prepared.npz (python -m common.data <source>), the language model.
Writes: --out, a folder: model.pt, row.json, log.csv; while it runs resume.pt.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import default_rng

from common.arrays import cut, offsets_of, parts
from common.backbone import save_recformer, start_model, weights_digest
from common.data import load
from common.files import UserError, command, lock, runs_root
from common.options import (COUNT, POSITIVE, WEIGHT, add_tuning_options, flag, number, option,
                            option_identity, options_parser)
from common.recformer import cosine_logits
from common.runs import Run, code_of
from common.text import item_tokens, joined, mask_words
from common.training import Training, prefetch, start

HELD_OUT = 0.05  # of the users (ours)


# ------------------------------------------------------------------------ options

def parse_args(argv=None):
    p = options_parser(__doc__)
    option(p, 'sources', 'names of prepared datasets', nargs='+')
    option(p, '--out', 'folder to write (default: runs/pretrained/<plm>-<sources>)', Path)
    # RecFormer: 16 users on each of 4 GPUs, 32 epochs, no warm-up, no early stopping
    add_tuning_options(p, epochs=32, batch=64)
    p.set_defaults(plm='longformer', max_tokens=1024, warmup=0, patience=32)
    flag(p, '--leave-out', "leave out users' last two items (of targets too; paper silent)")
    option(p, '--share', 'percent of the source users, a batch at least (paper sec. 4.6)',
           number(1e-6, 100), 100.0)
    option(p, '--accumulate', 'batches per optimizer step (RecFormer)', POSITIVE, 8)
    option(p, '--max-steps', 'at most so many optimizer steps (ours)', POSITIVE)
    option(p, '--mlm-weight', 'of the masked-language-model loss (RecFormer)', WEIGHT, 0.1)
    option(p, '--seed', 'of split points, order, masks and dropout', COUNT, 0)
    return p.parse_args(argv)


# ------------------------------------------------------------------------ data

class Sources:
    """Sequences of all source domains, one after the other; their items numbered on from one domain
    to the next. `train`, `valid`: users with two items at least, seeded."""

    def __init__(self, args, words):
        leave = 2 * args.leave_out  # items
        domains = [load(name) for name in dict.fromkeys(args.sources)]
        self.fingerprints = [data.fingerprint for data in domains]
        self.tokens = joined([item_tokens(data, words) for data in domains])
        self.lengths = np.concatenate([data.lengths - leave for data in domains])
        self.begin = offsets_of(self.lengths)
        before = offsets_of([data.n_items for data in domains])  # items of the domains before
        self.items = np.concatenate([data.training(leave)[0] + shift
                                     for data, shift in zip(domains, before)])
        users = np.flatnonzero(self.lengths >= 2)
        users = default_rng([args.seed, 1]).permutation(users)
        held = max(2, round(len(users) * HELD_OUT))
        self.valid, users = np.split(users, [held])
        kept = max(args.batch, round(len(users) * args.share / 100))
        self.train = users[:kept]

    def draw(self, users, rng, model):
        """One split point a user: (histories, targets, both Packed, ids of the targets).

        With n items the target's 0-based index is uniform over n // 2 ... n - 1, at least 1: a
        history is never empty.
        """
        begin = self.begin[users]
        length = self.lengths[users]
        point = np.maximum(1, rng.integers(length // 2, length))
        history = cut(self.items, begin, point)
        ids = self.items[begin + point]
        return model.pack(*history, self.tokens), model.pack_items(ids, self.tokens), ids

    def steps(self, training, model, args):
        """What each step that is left of this epoch computes with: a seed of its dropout, and for
        each batch (histories, targets), ids, and each of the two with what `mask_words` gives of
        it."""
        order = default_rng([args.seed, 3, training.epoch]).permutation(self.train)
        shares = np.array_split(order, training.per_epoch)  # of equal size: none of a single user
        for step in training.steps():
            rng = default_rng([args.seed, 4, training.epoch, step])
            seed = rng.integers(2 ** 62)
            batches = []
            users = shares[step]
            for part in parts(len(users), args.batch):
                *pair, ids = self.draw(users[part], rng, model)
                masked = [(packed, *mask_words(packed, rng, model.words.mask,
                                               model.config.vocab_size))
                          for packed in pair if args.mlm_weight]
                batches.append((pair, ids, masked))
            yield seed, batches


# ------------------------------------------------------------------------ losses

def contrastive(model, histories, targets, ids):
    """Cosine / 0.05 of each history's CLS with each target's: (loss, accuracy) over B pairs.

    histories, targets: Packed; ids [B] of the targets. Another row with the same target is no
    negative of it (ours; published code counts it). Each process computes the same loss over all
    pairs: their gradients' sum is that of one process.
    """
    states = model.encode(histories)
    aims = model.encode(targets)
    logits = cosine_logits(states, aims)
    same = model.machine.put(ids[:, None] == ids)
    logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
    label = torch.arange(len(ids), device=logits.device)
    right = logits.argmax(1) == label
    return F.cross_entropy(logits, label), right.float().mean()


def masked_gradients(model, packed, tokens, chosen, scale):
    """Masked-language-model loss of Packed sequences and what `mask_words` gave of them, in passes
    of bounded size; `scale` times its gradients are added as it goes. Returns this process's part
    of the mean over masked tokens."""
    shown = packed._replace(tokens=tokens)
    total = 0.0
    for group in model.passes(packed):
        index = packed.index(group)
        places = np.flatnonzero(np.isin(index, chosen))
        if not len(places):
            continue
        logits = model.mlm_logits(model(shown.rows(group), places))
        labels = model.machine.put(packed.tokens[index[places]])
        loss = F.cross_entropy(logits.float(), labels, reduction='sum') / len(chosen)
        (scale * loss).backward()
        total += loss.detach()
    return total


def step_gradients(model, batches, args):
    """Add the gradients of one optimizer step over these batches; returns {loss or accuracy: mean
    over the batches}."""
    machine = model.machine
    share = 1 / len(batches)
    losses = torch.zeros(3, device=machine.device)
    for pair, ids, masked in batches:
        loss, right = contrastive(model, *pair, ids)
        (share * loss).backward()
        of_words = torch.zeros_like(right)
        for each in masked:
            of_words += masked_gradients(model, *each, share * args.mlm_weight)
        losses += share * torch.stack([loss.detach(), of_words, right])
    machine.sum_gradients(model)
    loss, of_words, right = losses
    return {'contrastive': loss, 'mlm': machine.sum(of_words), 'accuracy': right}


@torch.no_grad()
def held_out_accuracy(model, sources, args):
    """Share of held-out users whose target scores highest in their group, of about --batch; the
    same draws each time. The model is in evaluation mode from here on."""
    model.eval()
    right = 0.0
    count = max(1, round(len(sources.valid) / args.batch))
    groups = np.array_split(sources.valid, count)
    for place, users in enumerate(groups):
        rng = default_rng([args.seed, 2, place])
        drawn = sources.draw(users, rng, model)
        _, share = contrastive(model, *drawn)
        right += float(share) * len(users)
    return right / len(sources.valid)


# ------------------------------------------------------------------------ main

def tune(args, model, sources, run):
    """Train `model`; returns what the row says of it."""
    steps = -(-len(sources.train) // (args.batch * args.accumulate))  # per epoch
    # RecFormer's AdamW has no decay: that is Adam
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    training = Training(run, model, optimizer, steps, args.warmup, 1.0, args.max_steps)
    print(f'stage-PT: {len(sources.train):,} users train, {len(sources.valid):,} are held out, '
          f'at most {training.total:,} steps')
    with training:
        for epoch in training.epochs():
            model.train()
            made = sources.steps(training, model, args)
            for seed, batches in prefetch(made, model.machine):
                torch.manual_seed(seed + model.machine.rank)  # dropout
                training.update(**step_gradients(model, batches, args))
            value = held_out_accuracy(model, sources, args)
            training.end_epoch(value)
            print(f'epoch {epoch + 1}: held-out accuracy {value:.4f} (best {training.best:.4f})')
    return training.restore_best()


def main(args):
    code = code_of('pretrain.py')  # now: an edit while the model loads is not what runs
    machine = start(args)
    model = start_model(None, args.plm, args.seed)
    model.config.max_tokens = args.max_tokens
    sources = Sources(args, model.words)
    least = min(args.batch, len(sources.train), 2 * len(sources.valid))
    if least < 2 * machine.world:
        raise UserError(f'{" ".join(args.sources)}: {len(sources.train)} users train, '
                        f'{len(sources.valid)} are held out: too few, or --batch {args.batch} is')
    folder = args.out or runs_root() / f'pretrained/{Path(args.plm).name}-{"+".join(args.sources)}'
    identity = {'options': option_identity(args),
                'data': sources.fingerprints,
                'tokens': sources.tokens.fingerprint,
                'start': weights_digest(model)}
    run = Run(args, folder, identity, code)
    with lock(folder):
        if run.finished():
            return
        model.on(machine)
        model.word_table.requires_grad_(False)  # RecFormer: frozen in pre-training
        found = tune(args, model, sources, run)
        if machine.rank:
            return
        model.stage = 'pt'
        save_recformer(folder / 'model.pt', model)
        run.write(stage='pt', plm=args.plm, config=vars(model.config), **found)


if __name__ == '__main__':
    command(main, parse_args())
