"""Stage-PT: tune a language model on users' histories in source domains (RecFormer's pre-training).

    python pretrain.py books clothing sports movies --plm longformer --batch 64 --leave_out --out runs/pretrained/paper.pt
    python pretrain.py household --plm minilm --max_steps 20 --batch 16 --accumulate 1 --out /tmp/look.pt          # a look

For each user and epoch: a split point drawn from the second half of the sequence, history = items before it, target = the
item there. Loss = cross-entropy of cosine / 0.05 between a history's CLS and the targets' CLS of the batch, + 0.1 x masked
language model on histories and targets in a pass of its own. The best by held-out contrastive accuracy is kept.

Reads:  data/<source>/prepared.npz (python -m common.data <source>), the language model.
Writes: --out (.pt, and its readable .json), while it runs <out>.resume.
"""
import argparse
import contextlib
import pathlib
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.data import load
from common.files import UserError, command, lock, made_from, provenance
from common.recformer import Batch, cosine_logits, from_backbone, save_model
from common.sources import fetch_plm
from common.text import load_tokenizer, mask_words, micro_batches, pack, pack_items, ragged, tokenize
from common.training import (EarlyStopping, Ranks, State, adamw, add_runtime_options, apply_gradients, linear_schedule,
                             positive, seed_all, start)


# ---------------------------------------------------------------------------- options

def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('sources', nargs='+', help='names of prepared datasets')
    p.add_argument('--out', required=True, help='checkpoint to write')
    g = p.add_argument_group('model')
    g.add_argument('--plm', default='longformer', help='longformer (paper), minilm, a hub name or a local folder')
    g.add_argument('--layers', type=positive(), help='use the first LAYERS layers only (default: all)')
    g = p.add_argument_group('data')
    g.add_argument('--leave_out', action='store_true',
                   help="leave out each user's last two items (for sources that are targets too; paper silent)")
    g.add_argument('--share', type=positive(float, most=100), default=100.,
                   help='percent of the source users (paper sec. 4.6)')
    g.add_argument('--valid_share', type=positive(float, most=50), default=5., help='percent of users held out (ours)')
    g = p.add_argument_group('optimisation')
    g.add_argument('--epochs', type=positive(), default=32, help='at most (RecFormer)')
    g.add_argument('--max_steps', type=positive(), help='at most this many optimizer steps in all (ours, for small budgets)')
    g.add_argument('--patience', type=positive(), default=5, help='epochs without a better accuracy (ours)')
    g.add_argument('--batch', type=positive(), default=64, help='users whose targets are each other\'s negatives '
                   '(RecFormer: 16 on each of 4 GPUs; torchrun splits them)')
    g.add_argument('--accumulate', type=positive(), default=8, help='batches per optimizer step (RecFormer)')
    g.add_argument('--lr', type=positive(float), default=5e-5, help='peak learning rate (RecFormer)')
    g.add_argument('--warmup', type=positive(zero=True), default=100, help='warm-up steps (ours; as in FT1)')
    g.add_argument('--weight_decay', type=positive(float, zero=True), default=0.0, help="AdamW's (RecFormer)")
    g.add_argument('--mlm_weight', type=positive(float, zero=True), default=0.1,
                   help='of the masked language model loss (RecFormer)')
    g.add_argument('--seed', type=positive(zero=True), default=0)
    add_runtime_options(p, language_model=True)
    args = p.parse_args(argv)
    if args.batch < 2:
        p.error('--batch: at least 2, or there is no negative')
    return args


# ---------------------------------------------------------------------------- data

class Sources:
    """Sequences of all source domains, one after the other; their items numbered on from one domain to the next."""

    def __init__(self, args, tokenizer):
        items, lengths, attributes, self.fingerprints = [], [], [], []
        for name in args.sources:
            data = load(name)
            kept = data.lengths - (2 if args.leave_out else 0)
            items.append(data.items[ragged(data.offsets[:-1], kept)] + len(attributes))
            lengths.append(kept)
            attributes += data.attributes
            self.fingerprints.append([name, data.fingerprint])
        self.items, self.lengths = np.concatenate(items), np.concatenate(lengths)
        self.begin = np.cumsum(self.lengths) - self.lengths
        self.tokens = tokenize(attributes, tokenizer)
        users = np.random.default_rng([args.seed, 1]).permutation(np.flatnonzero(self.lengths >= 2))
        held = max(2, round(len(users) * args.valid_share / 100))
        self.valid, self.train = users[:held], users[held:][:max(args.batch, round((len(users) - held) * args.share / 100))]
        if len(self.train) < 2:
            raise UserError(f'{" ".join(args.sources)}: only {len(users)} users have two items; stage-PT needs more')

    def draw(self, users, rng, cls):
        """One split point a user, from the second half of the sequence: (packed histories, target items).

        With n items the target's 0-based index is uniform over n // 2 ... n - 1, at least 1: a history is never empty.
        """
        point = np.maximum(1, rng.integers(self.lengths[users] // 2, self.lengths[users]))
        items = self.items[ragged(self.begin[users], point)]
        return pack(items, np.concatenate([[0], np.cumsum(point)]), self.tokens, cls), self.items[self.begin[users] + point]


# ---------------------------------------------------------------------------- losses

def contrastive(model, histories, targets, items, device, ranks=None):
    """Cosine / 0.05 of each history's CLS with each target's: (loss, accuracy) over B pairs.

    Another row with the same target item is no negative of it (ours; published code counts it). With `ranks` each process
    encodes its share, and all compute the same loss over all pairs: their gradients' sum is that of one process.
    """
    def encode(packed):
        part = packed if ranks is None else packed.rows(ranks.share(len(items)))
        states = model(Batch(part, model.config.window, device)).float()
        return states if ranks is None else ranks.gather(states, len(items))
    logits = cosine_logits(encode(histories), encode(targets))
    same = torch.from_numpy(items[:, None] == items).to(device)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    label = torch.arange(len(items), device=device)
    return F.cross_entropy(logits, label), (logits.argmax(1) == label).float().mean()


def masked_model(model, packed, rng, tokenizer, args, device, autocast, scale, ranks):
    """Masked-language-model loss of packed sequences, in passes of bounded size; gradients are added as it goes.

    scale: factor of the loss before backward. Returns this process's part of the mean loss over the masked tokens (float).
    """
    tokens, chosen = mask_words(packed, rng, tokenizer.mask_token_id, model.config.vocab_size)
    total, picked = 0.0, np.zeros(len(tokens), bool)
    picked[chosen] = True
    mine = ranks.share(len(packed.lengths))
    for group in micro_batches(packed.lengths[mine], args.micro_tokens):
        index = packed.index(mine[group])
        part = replace(packed.rows(mine[group]), tokens=tokens[index])
        rows = np.flatnonzero(picked[index])
        if not len(rows):
            continue
        labels = torch.from_numpy(packed.tokens[index][rows]).to(device)
        with autocast():
            logits = model.mlm_logits(model(Batch(part, model.config.window, device), torch.from_numpy(rows).to(device)))
        loss = F.cross_entropy(logits.float(), labels, reduction='sum') / len(chosen)
        (scale * loss).backward()
        total += float(loss.detach())
    return total


@torch.no_grad()
def accuracy(model, sources, args, tokenizer, device, autocast, ranks):
    """Share of held-out users whose target scores highest in their group of --batch; the same draws each time."""
    model.eval()
    right = torch.zeros(1, device=device)
    groups = np.array_split(sources.valid, max(1, round(len(sources.valid) / args.batch)))
    for number, users in list(enumerate(groups))[ranks.rank::ranks.world]:
        histories, targets = sources.draw(users, np.random.default_rng([args.seed, 2, number]), tokenizer.cls)
        with autocast():
            _, share = contrastive(model, histories, pack_items(targets, sources.tokens, tokenizer.cls), targets, device)
        right += share * len(users)
    model.train()
    ranks.sum([right])
    return float(right) / len(sources.valid)


# ---------------------------------------------------------------------------- main

def main(args):
    device, autocast = start(args)
    ranks = Ranks(device)
    seed_all(args.seed)
    folder = fetch_plm(args.plm)
    tokenizer = load_tokenizer(folder)
    sources = Sources(args, tokenizer)
    unused = ('out', 'device', 'save_every', 'deterministic', 'micro_tokens')
    options = {k: v for k, v in vars(args).items() if k not in unused}
    identity = {'options': options, 'sources': sources.fingerprints, 'tokenizer': tokenizer.fingerprint}
    out = pathlib.Path(args.out)
    with lock(out.parent) if not ranks.rank else contextlib.nullcontext():
        if made_from(out, 'recformer', identity):
            return print(f'{out} is up to date')
        model = from_backbone(folder, args.layers).to(device).train()
        model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)  # RecFormer: frozen in pre-training

        # ------------------------------------------------ optimizer
        group = args.batch * args.accumulate
        steps = -(-len(sources.train) // group)                                   # per epoch
        total = min(args.epochs * steps, args.max_steps or args.epochs * steps)
        optimizer = adamw(model, args.lr, args.weight_decay)
        schedule = linear_schedule(optimizer, args.warmup, total)
        best = EarlyStopping(model, args.patience)
        state = State(out.with_suffix('.resume'), identity, args.save_every, model=model, optimizer=optimizer,
                      schedule=schedule, best=best)
        if min(args.batch, len(sources.train)) < 2 * ranks.world:
            raise UserError(f'--batch {args.batch}: {ranks.world} processes share it; each needs two users')
        print(f'stage-PT: {len(sources.train):,} users train, {len(sources.valid):,} are held out, at most {total:,} steps')

        # ------------------------------------------------ loop
        bar = tqdm(total=total, initial=min(total, state.epoch * steps + state.step), unit='step', desc='stage-PT')
        while state.epoch * steps < total and not best.stop:
            order = np.random.default_rng([args.seed, 3, state.epoch]).permutation(sources.train)
            for step in range(state.step, min(steps, total - state.epoch * steps)):
                rng = np.random.default_rng([args.seed, 4, state.epoch, step])
                torch.manual_seed(rng.integers(2 ** 62) + ranks.rank)             # dropout
                chunk = np.array_split(order, steps)[step]                        # of equal size: none of a single user
                batches = np.array_split(chunk, -(-len(chunk) // args.batch))
                losses = np.zeros(3)
                for users in batches:
                    histories, items = sources.draw(users, rng, tokenizer.cls)
                    targets = pack_items(items, sources.tokens, tokenizer.cls)
                    with autocast():
                        loss, right = contrastive(model, histories, targets, items, device, ranks)
                    (loss / len(batches)).backward()
                    losses += [float(loss.detach()), 0, float(right)]
                    for packed in (histories, targets) if args.mlm_weight else ():
                        losses[1] += masked_model(model, packed, rng, tokenizer, args, device, autocast,
                                                  args.mlm_weight / len(batches), ranks)
                losses /= len(batches)
                ranks.sum(p.grad for p in model.parameters() if p.grad is not None)
                apply_gradients(losses[0] + losses[1], model, optimizer, state, clip=1.0)
                schedule.step()
                bar.set_postfix_str(f'contrastive {losses[0]:.3f} mlm {losses[1]:.3f} accuracy {losses[2]:.2f}')
                bar.update()
                state.advance()
            value = accuracy(model, sources, args, tokenizer, device, autocast, ranks)
            best.update(value, state.epoch)
            bar.write(f'epoch {state.epoch + 1}: held-out accuracy {value:.4f} (best {best.best:.4f})')
            state.next_epoch()
        bar.close()

        # ------------------------------------------------ result
        best.restore()
        if ranks.rank:
            return
        save_model(out, model, {'identity': identity, 'plm': args.plm, 'tokenizer': tokenizer.fingerprint, 'stage': 'pt',
                                'accuracy': best.best, 'epoch': best.best_epoch + 1, **provenance()})
        state.finish()
        print(f'stage-PT: held-out accuracy {best.best:.4f} of {args.batch}, epoch {best.best_epoch + 1}, written to {out}')


if __name__ == '__main__':
    command(main, parse_args())
