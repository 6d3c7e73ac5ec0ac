"""Time and memory against what published code does: python -m tests.bench [--quick] [--json FILE] [--only WORD]

Each row runs the baseline (tests/published.py) and ours in a process of its own, alternating, and takes medians; memory is the
peak of that process, everything counted. 'of peak': useful FLOPs (no padding, nothing that need not be computed) a second,
against the rate of a large matrix product of the same dtype, measured in the same process. Work too long to repeat is timed
on a part and scaled up ('x N'). Random weights, made-up data of the real sizes. Exit code 1 where a target is missed.
"""
import argparse
import contextlib
import multiprocessing
import platform
import resource
import sys
import time
from dataclasses import dataclass
from statistics import median
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

MINILM = dict(vocab_size=30522, hidden=384, layers=6, heads=12, intermediate=1536, positions=1100, position_offset=2,
              layer_norm_eps=1e-12, dropout=0.1)
BASE = dict(vocab_size=50265, hidden=768, layers=12, heads=12, intermediate=3072, positions=1100, position_offset=2,
            layer_norm_eps=1e-5, dropout=0.1)


@dataclass
class Work:
    """run(): the work itself; scale: how many times it stands for; flops: useful ones of one run (None: not counted)."""
    run: Callable
    scale: float = 1
    flops: float | None = None


# ---------------------------------------------------------------------------- made-up data

def item_tokens(n, tokens, seed=0):
    """ItemTokens of n items that have `tokens` tokens in all (their own CLS not counted)."""
    from common.text import ItemTokens
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.5, 0.35, n), 4, 96)
    lengths = np.maximum(1, np.floor(lengths * (tokens / lengths.sum()))).astype(int)
    lengths[:tokens - lengths.sum()] += 1
    starts = rng.random(tokens) < 0.6
    starts[np.cumsum(lengths) - lengths] = True
    return ItemTokens(rng.integers(5, 30000, tokens).astype(np.int32), rng.integers(1, 3, tokens).astype(np.int8), starts,
                      np.concatenate([[0, 0], np.cumsum(lengths)]))


def histories(users, mean, n, seed=1, most=None):
    """Ragged item ids of `users` users, `mean` items on average, long-tailed."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.geometric(1 / max(1, mean - 1), users) + 1, 2, most)
    return rng.integers(1, n + 1, lengths.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(lengths)])


# ---------------------------------------------------------------------------- language model rows

def lm_flops(c, lengths, layers_of_all=None):
    """Forward products of the tokens that must be computed: all layers but the last for every token, the last for CLS."""
    layer = 2 * (4 * c['hidden'] ** 2 + 2 * c['hidden'] * c['intermediate'])
    attended = np.minimum(lengths, 65)
    return (c['layers'] - 1 if layers_of_all is None else layers_of_all) * (
        layer * lengths.sum() + 4 * c['hidden'] * (lengths * attended).sum())


class LanguageModel:
    """One of the two models of a shape, and the data. A step is its loss and gradients; the optimizer is the same for both."""

    def __init__(self, ours, shape, items, tokens):
        from common.recformer import Config, RecFormer
        torch.manual_seed(0)
        self.ours, self.tokens, self.published = ours, item_tokens(items, tokens), None if ours else baseline()
        self.model = RecFormer(Config(**shape)) if ours else self.published.longformer(Config(**shape))
        self.model.train()
        self.device, self.autocast = runtime() if ours else (None, None)  # which speeds up whatever the process does


def encode(ours, shape, items, tokens):
    from common.recformer import encode_items
    from common.text import pack_items
    s = LanguageModel(ours, shape, items, tokens - items)  # `tokens` counts each item's CLS

    def run():
        if ours:
            return encode_items(s.model, s.tokens, 0, s.device, s.autocast, 2048)
        s.model.eval()
        with torch.no_grad():
            return [s.published.cls(s.model, pack_items(ids, s.tokens, 0)) for ids in np.array_split(np.arange(1, items + 1), -(-items // 32))]
    return Work(run, flops=lm_flops(shape, 1 + np.diff(s.tokens.offsets)[1:]))


def finetune_step(ours, shape, users, tokens, most, items=8249):
    """most: items of the longest history, so that the baseline's padding needs the memory that published code was seen to need."""
    import finetune
    from common.text import pack
    per_item = 38
    s = LanguageModel(ours, shape, 512, 512 * per_item)
    rows = histories(users, tokens / users / per_item, 512, most=most)
    packed = pack(*rows, s.tokens, 0)
    table, labels = torch.randn(items + 1, shape['hidden']), np.arange(1, users + 1)
    args = argparse.Namespace(micro_tokens=2048)

    def run():
        if ours:
            finetune.add_gradients(s.model, table, rows, labels, s.tokens, 0, args, s.device, s.autocast)
        else:
            logits = s.published.cosine(s.published.cls(s.model, packed), table)
            torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        s.model.zero_grad(set_to_none=True)
    return Work(run, flops=3 * (lm_flops(shape, packed.lengths) + 2 * users * items * shape['hidden']))


def pretrain_step(ours, shape, users, tokens):
    import pretrain
    from common.text import mask_words, pack, pack_items
    from common.training import Ranks
    per_item = 38
    s = LanguageModel(ours, shape, 512, 512 * per_item)
    rows = histories(users, tokens / users / per_item, 512, most=18)
    history, items = pack(*rows, s.tokens, 0), np.arange(1, users + 1)
    target = pack_items(items, s.tokens, 0)
    rng = np.random.default_rng(0)
    args, ranks = argparse.Namespace(micro_tokens=2048), Ranks(s.device)
    tokenizer = argparse.Namespace(mask_token_id=3)
    word = s.model.longformer.embeddings.word_embeddings
    word.weight.requires_grad_(False)

    def run():
        if ours:
            with s.autocast():
                loss, _ = pretrain.contrastive(s.model, history, target, items, s.device, ranks)
            loss.backward()
            for packed in (history, target):
                pretrain.masked_model(s.model, packed, rng, tokenizer, args, s.device, s.autocast, 0.1, ranks)
        else:
            logits = s.published.cosine(s.published.cls(s.model, history), s.published.cls(s.model, target))
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(users))
            for packed in (history, target):
                ids, chosen = mask_words(packed, rng, 3, shape['vocab_size'])
                loss = loss + 0.1 * s.published.masked_loss(s.model, packed, ids, chosen)
            loss.backward()
        s.model.zero_grad(set_to_none=True)
    lengths = np.concatenate([history.lengths, target.lengths])
    masked = 0.15 * lengths.sum()
    head = masked * 2 * shape['hidden'] * (shape['vocab_size'] + 4 * shape['hidden'] + 2 * shape['intermediate'])
    return Work(run, flops=3 * (2 * lm_flops(shape, lengths) + head))


def masking(ours, users=16, tokens=4600):
    from common.text import mask_words, pack, pack_items
    published = None if ours else baseline()
    tokenizer = None if ours else published.made_up_tokenizer(50265)
    texts, rng = item_tokens(512, 512 * 38), np.random.default_rng(0)
    items, offsets = histories(users, tokens / users / 38, 512, most=18)
    targets = np.arange(1, users + 1)
    lists = [items[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])], [[t] for t in targets]

    def run():
        for _ in range(10):
            if ours:
                for packed in (pack(items, offsets, texts, 0), pack_items(targets, texts, 0)):
                    mask_words(packed, rng, 3, 50265)
            else:
                for rows in lists:
                    published.masked_batch(rows, texts, rng, tokenizer)
    return Work(run, 0.1)


# ---------------------------------------------------------------------------- ID model rows

class Sequences:
    """An ID model and training parts of `users` users, `mean` items on average."""

    def __init__(self, ours, kind, items, hidden, users=22601, mean=6.0):
        from common import bert4rec, sasrec
        torch.manual_seed(0)
        self.ours, self.items, self.published = ours, items, None if ours else baseline()
        own = {'SASRec': sasrec.SASRec, 'BERT4Rec': bert4rec.BERT4Rec}[kind]
        self.model = own(own.random_table(items, hidden)) if ours else getattr(self.published, kind)(items, hidden)
        self.batch, self.rows = own.batch, histories(users, mean, items)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, betas=own.betas, fused=ours)
        self.model.train()
        self.device, self.autocast = runtime() if ours else (None, None)

    def step(self, users, loss, rng):
        from common.sasrec import draw_negatives
        from common.text import take
        items, offsets = take(*self.rows, users)
        negatives = draw_negatives(items, offsets, self.items, rng) if loss == 'bce' else None
        if self.ours:
            with self.autocast():
                value = self.model.loss(items, offsets, rng, self.device, loss, negatives)
        elif loss == 'masked':
            targets = self.published.squares(items, offsets)
            masked = (torch.rand(targets.shape) < 0.15) & (targets > 0)
            value = self.model.loss(targets.masked_fill(masked, self.items + 1), targets * masked, None)
        else:
            first, rest = [np.concatenate([items[a:b - 1] for a, b in zip(offsets[:-1], offsets[1:])]),
                           np.concatenate([items[a + 1:b] for a, b in zip(offsets[:-1], offsets[1:])])]
            ends = offsets - np.arange(len(offsets))
            wrong = None if negatives is None else torch.randint(1, self.items + 1, (len(users), 50))
            value = self.model.loss(self.published.squares(first, ends), self.published.squares(rest, ends), wrong)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def epoch(ours, kind, loss, items=8249, hidden=768, users=22601, steps=None):
    s = Sequences(ours, kind, items, hidden, users)
    batches = np.array_split(np.random.default_rng(0).permutation(users), -(-users // s.batch))
    some = batches[:steps or (max(1, len(batches) // 12) if ours else 1)]
    s.model.train()
    tokens = sum(np.diff(s.rows[1])[b].sum() for b in some)
    size = 12 if kind == 'SASRec' else 24
    made = {'bce': 2 * tokens, 'ce': items * tokens, 'masked': 0.15 * items * tokens}[loss]

    def run():
        for number, batch in enumerate(some):
            s.step(batch, loss, np.random.default_rng(number))
    return Work(run, len(batches) / len(some), 3 * 2 * hidden * (size * hidden * tokens + made))


def evaluation(ours, kind, items=8249, hidden=768, users=21300):
    from common.metrics import rank_counts
    from common.sasrec import all_states
    part = users // 4 if ours else 512
    s = Sequences(ours, kind, items, hidden, part, 7)
    rng = np.random.default_rng(0)
    targets, negatives = rng.integers(1, items + 1, part), rng.integers(1, items + 1, (part, 100))
    s.model.eval()

    def run():
        if ours:
            table, bias = s.model.scorer()
            rank_counts(all_states(s.model, *s.rows, s.device, s.autocast), table, targets, negatives, bias)
        else:
            rows, t, n = s.published.squares(*s.rows), torch.from_numpy(targets), torch.from_numpy(negatives)
            for sampled in (True, False):  # two passes, as published
                s.published.ranks(s.model, rows, t, n, sampled)
    return Work(run, users / part)


# ---------------------------------------------------------------------------- the table

ROWS = {  # name: (work, at least this many times faster, at most this share of the baseline's memory)
    'MiniLM size, encode 512 items': (lambda ours: encode(ours, MINILM, 512, 19739), 10, None),
    'MiniLM size, fine-tune step, 16 users': (lambda ours: finetune_step(ours, MINILM, 16, 4600, 24), 12, 1 / 8),
    'MiniLM size, pre-train step, 16 users': (lambda ours: pretrain_step(ours, MINILM, 16, 4600), 15, 1 / 10),
    'Longformer size, encode 64 items': (lambda ours: encode(ours, BASE, 64, 2573), 8, None),
    'Longformer size, fine-tune step, 4 users': (lambda ours: finetune_step(ours, BASE, 4, 1438, 18), 8, 1 / 3),
    'pre-training batch, 16 users, no model': (lambda ours: masking(ours), 20, None),
    'SASRec 768, BCE epoch': (lambda ours: epoch(ours, 'SASRec', 'bce'), 20, None),
    'SASRec 768, cross-entropy epoch': (lambda ours: epoch(ours, 'SASRec', 'ce'), 40, None),
    'SASRec 768, evaluation': (lambda ours: evaluation(ours, 'SASRec'), 20, None),
    'BERT4Rec 768, epoch': (lambda ours: epoch(ours, 'BERT4Rec', 'masked'), 40, None),
    'BERT4Rec 768, evaluation': (lambda ours: evaluation(ours, 'BERT4Rec'), 40, None),
}
ALONE = {  # ours only: name: (work, most MB)
    'SASRec 768, cross-entropy epoch, 138,116 items': (lambda: epoch(True, 'SASRec', 'ce', 138116, steps=2), 4096)}
GROWTH = {f'SASRec 128, {loss} epoch, {items:,} items, {users:,} users':
          ((lambda loss=loss, items=items, users=users: epoch(True, 'SASRec', loss, items, 128, users, steps=4)), None)
          for loss, items, users in [('ce', n, 22601) for n in (8249, 50000, 138116, 930000)]
          + [('bce', 8249, n) for n in (20000, 130000, 400000)]}
GROWTH |= {f'SASRec 128, evaluation of 1,000 users, {items:,} items':
           ((lambda items=items: evaluation(True, 'SASRec', items, 128, 1000)), None) for items in (8249, 50000, 138116, 930000)}


def baseline():
    """tests/published.py, imported only where it runs: transformers costs memory."""
    from tests import published
    return published


def runtime():
    from common.training import start
    return start(argparse.Namespace(device='cpu', deterministic=False, precision='auto'))


def product_rate(autocast):
    """FLOPs a second of a 2048 x 2048 x 2048 product in autocast's dtype: the best of several."""
    with autocast(), torch.no_grad():
        x = torch.randn(2048, 2048)
        x = (x @ x).to((x @ x).dtype)
        best = min(clock(lambda: x @ x) for _ in range(5))
    return 2 * 2048 ** 3 / best


def clock(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def worker(pipe, group, name, ours):
    """A process of its own: says 'ready', runs when told, reports its peak memory at the end."""
    try:
        entry = {'rows': ROWS, 'alone': ALONE, 'growth': GROWTH}[group][name][0]
        work = entry(ours) if group == 'rows' else entry()
        work.run()  # once to warm up
        pipe.send('ready')
        while pipe.recv() == 'run':
            pipe.send(clock(work.run) * work.scale)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        share = work.flops and work.flops * work.scale / product_rate(runtime()[1])
        pipe.send((peak, share, work.scale))
    except Exception as error:
        pipe.send(error)


def measure(group, name, sides, repeats):
    """{ours: (median seconds, peak MB, seconds that the useful FLOPs take at the rate of a product, scale)}, alternating."""
    context, running = multiprocessing.get_context('spawn'), {}
    for ours in sides:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, group, name, ours), daemon=True)
        process.start()
        running[ours] = here, process
        receive(here)
    seconds = {ours: [] for ours in sides}
    for _ in range(repeats):
        for ours in sides:
            running[ours][0].send('run')
            seconds[ours].append(receive(running[ours][0]))
    found = {}
    for ours, (pipe, process) in running.items():
        pipe.send('stop')
        found[ours] = (median(seconds[ours]), *receive(pipe))
        process.join()
    return found


def receive(pipe):
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='one repeat each: a look')
    p.add_argument('--json', metavar='FILE', help='write the rows')
    p.add_argument('--only', default='', metavar='WORD', help='rows whose name holds WORD')
    args = p.parse_args(argv)
    _, autocast = runtime()
    with autocast():
        dtype = str((torch.ones(2, 2) @ torch.ones(2, 2)).dtype).removeprefix('torch.')
    print(f'{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, '
          f'{dtype} products at {product_rate(autocast) / 1e9:,.0f} GFLOP/s, float32 at {product_rate(contextlib.nullcontext) / 1e9:,.0f}\n')
    print('| work | published s | ours s | ratio | published MB | ours MB | of peak | target | |\n' + '|---|' + '---:|' * 7 + '---|')
    groups = [('rows', n) for n in ROWS] + [('alone', n) for n in ALONE] + [('growth', n) for n in GROWTH]
    rows = []
    for group, name in tqdm([g for g in groups if args.only in g[1]], unit='row', leave=False):
        found = measure(group, name, (False, True) if group == 'rows' else (True,), 1 if args.quick else 5 if group == 'rows' else 3)
        (ours_s, ours_mb, best, scale), (base_s, base_mb, *_) = found[True], found.get(False, (None, None))
        target, met, note = '', None, f'x {scale:.0f}' if scale > 1 else ''
        if group == 'rows':
            _, faster, smaller = ROWS[name]
            target = f'{faster}x' + (f', 1/{1 / smaller:.0f} MB' if smaller else '')
            met = base_s >= faster * ours_s and (not smaller or ours_mb <= smaller * base_mb)
            note = ', '.join(filter(None, (note, f'published x {found[False][3]:.0f}' if found[False][3] > 1 else '')))
        elif group == 'alone':
            most = ALONE[name][1]
            target, met = f'{most:,} MB', ours_mb <= most
        ratio, mfu = base_s and base_s / ours_s, best and best / ours_s
        rows.append({'name': name, 'baseline_s': base_s, 'ours_s': ours_s, 'ratio': ratio, 'baseline_mb': base_mb, 'ours_mb': ours_mb,
                     'mfu': mfu, 'target': target, 'met': met})
        number = lambda x, form: '' if x is None else format(x, form)
        tqdm.write(f'| {name} | {number(base_s, ",.3g")} | {ours_s:,.3g} | {number(ratio, ".1f")} | {number(base_mb, ",.0f")} | '
                   f'{ours_mb:,.0f} | {number(mfu, ".0%")} | {target}{"" if met in (None, True) else " MISSED"} | {note} |', file=sys.stdout)
    if args.json:
        from common.files import save_json
        save_json(args.json, rows)
    return int(any(r['met'] is False for r in rows))


if __name__ == '__main__':
    sys.exit(main())
