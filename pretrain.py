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
import contextlib
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.nn.functional as F

from common.arrays import offsets_of, ragged
from common.backbone import save_recformer, start_model, weights_digest
from common.data import load
from common.files import UserError, command, lock, runs_root
from common.options import (add_machine_options, option_identity, options_parser, real_number,
                            whole_number)
from common.recformer import cosine_logits
from common.runs import code_of, finished, write_row
from common.text import mask_words, micro_batches, tokenize
from common.training import Processes, Training, adamw, linear_schedule, start


# ------------------------------------------------------------------------ options

def parse_args(argv=None):
    p = options_parser(__doc__)
    p.add_argument('sources', nargs='+', help='names of prepared datasets')
    p.add_argument('--out', help='folder to write (default: runs/pretrained/<plm>-<sources>)')
    g = p.add_argument_group('model')
    g.add_argument('--plm', default='longformer',
                   help='longformer (paper), minilm, a hub name or a local folder')
    g.add_argument('--layers', type=whole_number(1), help='its first LAYERS layers only (default: all)')
    g.add_argument('--max-tokens', type=whole_number(2, 1024), default=1024,
                   help='newest tokens of a history (RecFormer: 1024; it says that 256 cost nothing)')
    g = p.add_argument_group('data')
    g.add_argument('--leave-out', action='store_true',
                   help="leave out each user's last two items (for sources that are targets too; "
                        'paper silent)')
    g.add_argument('--share', type=real_number(above=0, most=100), default=100.0,
                   help='percent of the source users (paper sec. 4.6)')
    g.add_argument('--valid-share', type=real_number(above=0, most=50), default=5.0,
                   help='percent of users held out (ours)')
    g = p.add_argument_group('optimisation')
    g.add_argument('--epochs', type=whole_number(1), default=32, help='at most (RecFormer)')
    g.add_argument('--max-steps', type=whole_number(1),
                   help='at most this many optimizer steps in all (ours, for small budgets)')
    g.add_argument('--patience', type=whole_number(1), default=5,
                   help='epochs without a better accuracy (ours)')
    g.add_argument('--batch', type=whole_number(2), default=64,
                   help="users whose targets are each other's negatives (RecFormer: 16 on each of 4 "
                        'GPUs; torchrun splits them)')
    g.add_argument('--accumulate', type=whole_number(1), default=8,
                   help='batches per optimizer step (RecFormer)')
    g.add_argument('--lr', type=real_number(above=0), default=5e-5, help='peak rate (RecFormer)')
    g.add_argument('--warmup', type=whole_number(0), default=100, help='steps (ours; as in FT1)')
    g.add_argument('--weight-decay', type=real_number(least=0), default=0.0, help='(RecFormer)')
    g.add_argument('--mlm-weight', type=real_number(least=0), default=0.1,
                   help='of the masked-language-model loss (RecFormer)')
    g.add_argument('--seed', type=whole_number(0), default=0)
    add_machine_options(p, language_model=True)
    return p.parse_args(argv)


# ------------------------------------------------------------------------ data

class Sources:
    """Sequences of all source domains, one after the other; their items numbered on from one domain
    to the next. Users without two items are left out; `valid` and `train` are seeded."""

    def __init__(self, args, words):
        items, lengths, attributes, self.fingerprints = [], [], [], []
        for name in args.sources:
            data = load(name)
            part, offsets = data.training(2 if args.leave_out else 0)
            items.append(part + len(attributes))
            lengths.append(np.diff(offsets))
            attributes += data.attributes
            self.fingerprints.append([name, data.fingerprint])
        self.items, self.lengths = np.concatenate(items), np.concatenate(lengths)
        self.begin = np.cumsum(self.lengths) - self.lengths
        self.tokens = tokenize(attributes, words)
        users = np.flatnonzero(self.lengths >= 2)
        users = np.random.default_rng([args.seed, 1]).permutation(users)
        held = max(2, round(len(users) * args.valid_share / 100))
        kept = max(args.batch, round((len(users) - held) * args.share / 100))
        self.valid, self.train = users[:held], users[held:][:kept]
        if len(self.train) < 2:
            raise UserError(f'{" ".join(args.sources)}: only {len(users)} users have two items; '
                            'stage-PT needs more')

    def draw(self, users, rng):
        """One split point a user: histories (ragged) and the target items [users].

        With n items the target's 0-based index is uniform over n // 2 ... n - 1, at least 1: a
        history is never empty.
        """
        point = np.maximum(1, rng.integers(self.lengths[users] // 2, self.lengths[users]))
        begin = self.begin[users]
        return (self.items[ragged(begin, point)], offsets_of(point)), self.items[begin + point]


# ------------------------------------------------------------------------ losses

def contrastive(model, histories, targets, items, processes=None):
    """Cosine / 0.05 of each history's CLS with each target's: (loss, accuracy) over B pairs.

    histories, targets: Packed; items [B]: the targets' ids. Another row with the same target is no
    negative of it (ours; published code counts it). With `processes` each encodes its share, and
    all compute the same loss over all pairs: their gradients' sum is that of one process.
    """
    def encode(packed):
        if processes is None:
            return model(packed).float()
        mine = model(packed.rows(processes.share(len(items)))).float()
        return processes.gather(mine, len(items))

    with model.machine.autocast():
        logits = cosine_logits(encode(histories), encode(targets))
    same = model.machine.put(items[:, None] == items)
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, -torch.inf)
    label = torch.arange(len(items), device=logits.device)
    return F.cross_entropy(logits, label), (logits.argmax(1) == label).float().mean()


def masked_gradients(model, packed, rng, scale, processes):
    """Masked-language-model loss of Packed sequences, in passes of bounded size; `scale` times its
    gradients are added as it goes. Returns this process's part of the mean over masked tokens."""
    tokens, chosen = mask_words(packed, rng, model.words.mask, model.config.vocab_size)
    picked = np.zeros(len(tokens), bool)
    picked[chosen] = True
    mine = processes.share(len(packed.lengths))
    total = torch.zeros((), device=model.machine.device)
    for group in micro_batches(packed.lengths[mine], model.machine.micro_tokens):
        index = packed.index(mine[group])
        places = np.flatnonzero(picked[index])
        if not len(places):
            continue
        part = replace(packed.rows(mine[group]), tokens=tokens[index])
        logits = model.mlm_logits(model(part, places))
        labels = model.machine.put(packed.tokens[index][places])
        loss = F.cross_entropy(logits.float(), labels, reduction='sum') / len(chosen)
        (scale * loss).backward()
        total += loss.detach()
    return total


@torch.no_grad()
def held_out_accuracy(model, sources, args, processes):
    """Share of held-out users whose target scores highest in their group of --batch; the same draws
    each time."""
    model.eval()
    right = torch.zeros(1, device=model.machine.device)
    groups = np.array_split(sources.valid, max(1, round(len(sources.valid) / args.batch)))
    for number in range(processes.rank, len(groups), processes.world):
        users, rng = groups[number], np.random.default_rng([args.seed, 2, number])
        histories, items = sources.draw(users, rng)
        _, share = contrastive(model, model.pack(*histories, sources.tokens),
                               model.pack_items(items, sources.tokens), items)
        right += share * len(users)
    model.train()
    processes.sum([right])
    return float(right) / len(sources.valid)


def step_gradients(model, sources, users, rng, args, processes):
    """Add the gradients of one optimizer step over these users, in batches of --batch; returns
    (contrastive loss, masked-language-model loss, accuracy), means over the batches."""
    batches = np.array_split(users, -(-len(users) // args.batch))
    losses = torch.zeros(3, device=model.machine.device)
    for batch in batches:
        histories, items = sources.draw(batch, rng)
        histories = model.pack(*histories, sources.tokens)
        targets = model.pack_items(items, sources.tokens)
        loss, right = contrastive(model, histories, targets, items, processes)
        (loss / len(batches)).backward()
        losses[0] += loss.detach()
        losses[2] += right
        if args.mlm_weight:
            for packed in (histories, targets):
                losses[1] += masked_gradients(model, packed, rng, args.mlm_weight / len(batches),
                                              processes)
    processes.sum(p.grad for p in model.parameters() if p.grad is not None)
    return losses / len(batches)


# ------------------------------------------------------------------------ main

def main(args):
    machine = start(args)
    processes = Processes(machine.device)
    plm = args.plm.rstrip('/').split('/')[-1]
    folder = args.out or runs_root() / 'pretrained' / f'{plm}-{"+".join(args.sources)}'
    with contextlib.nullcontext() if processes.rank else lock(folder):
        model = start_model(None, args.plm, args.layers, args.seed)
        model.config.max_tokens = args.max_tokens
        sources = Sources(args, model.words)
        if min(args.batch, len(sources.train)) < 2 * processes.world:
            raise UserError(f'--batch {args.batch}: {processes.world} processes share it; '
                            'each needs two users')
        identity = {'options': option_identity(args), 'data': sources.fingerprints,
                    'tokens': sources.tokens.fingerprint, 'start': weights_digest(model)}
        code = code_of('pretrain.py')
        if row := finished(folder, identity, code, args):
            print(f'{folder} is up to date (held-out accuracy {row["accuracy"]:.4f})')
            return
        model.on(machine).train()
        model.word_table.requires_grad_(False)  # RecFormer: frozen in pre-training

        # ---------------------------------------------------- loop
        steps = -(-len(sources.train) // (args.batch * args.accumulate))  # per epoch
        total = min(args.epochs * steps, args.max_steps or args.epochs * steps)
        optimizer = adamw(model, args.lr, args.weight_decay)
        training = Training((folder, identity, code, 'stage-PT'), args, model, optimizer, steps,
                            args.epochs, args.patience, clip=1.0, total=total,
                            schedule=linear_schedule(optimizer, args.warmup, total))
        print(f'stage-PT: {len(sources.train):,} users train, {len(sources.valid):,} are held out, '
              f'at most {total:,} steps')
        with training:
            for epoch in training.epochs():
                order = np.random.default_rng([args.seed, 3, epoch]).permutation(sources.train)
                shares = np.array_split(order, steps)  # of equal size: none of a single user
                for step in training.steps():
                    rng = np.random.default_rng([args.seed, 4, epoch, step])
                    torch.manual_seed(rng.integers(2 ** 62) + processes.rank)  # dropout
                    found = step_gradients(model, sources, shares[step], rng, args, processes)
                    training.update(contrastive=found[0], mlm=found[1], accuracy=found[2])
                value = held_out_accuracy(model, sources, args, processes)
                training.end_epoch(value)
                print(f'epoch {epoch + 1}: held-out accuracy {value:.4f} (best {training.best:.4f})')

        # ---------------------------------------------------- result
        if processes.rank:
            return
        training.restore_best()
        model.stage = 'pt'
        save_recformer(f'{folder}/model.pt', model)
        write_row(folder, identity, code, stage='pt', plm=args.plm, config=asdict(model.config),
                  accuracy=training.best, best_epoch=training.best_epoch, epochs=training.epoch,
                  seconds=round(training.seconds, 1), device=str(machine.device))
        training.finish()
        print(f'stage-PT: held-out accuracy {training.best:.4f} of {args.batch}, epoch '
              f'{training.best_epoch}, written to {folder}')


if __name__ == '__main__':
    command(main, parse_args())
