"""Time and memory against what published code does, and against what the machine can do.

    python -m tests.tools.bench [--quick] [--only WORD ...] [--json FILE] [--device cpu]
    python -m tests.tools.bench --profile --only fine-tune      # where ours spends its time

Each row runs the baseline (tests/tools/published.py) and ours in a process of its own, alternating,
and takes medians; memory is the peak of that process, everything counted. Work too long to repeat
is timed on a part and scaled up ('x N'). Random weights, made-up data of the real sizes.

'of peak': useful FLOPs a second, against the rate of a large matrix product of the same dtype that
is measured in the same process. Useful is what the result needs: no padding, no sequence without
a target, and of a last layer only the rows that a loss or a score asks for. Exit code 1 where a
target is missed.

On a machine with CUDA the rows are others, of a GPU's sizes; both sides compute on it, and MB are
the most that torch held of its memory. `--device cpu` has the CPU's rows there.
"""
import argparse
import contextlib
import gzip
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import finetune
import pretrain
from common import data
from common.arrays import offsets_of, take
from common.bert4rec import LAST_ONLY, MASK_SHARE, BERT4Rec
from common.files import save_json
from common.layers import Machine
from common.metrics import product_scorer, rank_counts
from common.progress import progress
from common.recformer import Batch, Config, RecFormer
from common.sasrec import SASRec
from common.sequence import ItemTable, draw_training_negatives
from common.text import ItemTokens, Packed, mask_words, pack
from common.training import start

MINILM = dict(vocab_size=30522, hidden=384, layers=6, heads=12, intermediate=1536, positions=1100,
              position_offset=2, layer_norm_eps=1e-12, dropout=0.1)
BASE = dict(vocab_size=50265, hidden=768, layers=12, heads=12, intermediate=3072, positions=1100,
            position_offset=2, layer_norm_eps=1e-5, dropout=0.1)
PER_ITEM = 38  # tokens of an item
CLS, MASK = 0, 3


@dataclass
class Work:
    """run(): the work itself; scale: how many times it stands for; flops: useful ones of one run;
    sent: bytes that one run sends to the device (None: not counted)."""
    run: Callable
    scale: float = 1
    flops: float | None = None
    sent: int | None = None


@dataclass
class Row:
    """work(ours) -> Work; alone: no baseline; once: neither warmed up nor repeated. Targets:
    `share` of the machine's product rate at least; at most `memory` of the baseline's memory; at
    most so many MB, ms, MB sent."""
    work: Callable
    share: float | None = None
    memory: float | None = None
    mb: float | None = None
    ms: float | None = None
    sent: float | None = None
    alone: bool = False
    once: bool = False


def baseline():
    """tests/tools/published.py, imported only where it runs: transformers costs memory."""
    from tests.tools import published
    return published


def runtime():
    """The Machine that scripts compute on here, made as they make it."""
    return start(argparse.Namespace(device='auto', deterministic=False, precision='auto'))


def on_gpu():
    return torch.cuda.is_available()


# ------------------------------------------------------------------------ made-up data

def item_tokens(n, tokens, seed=0):
    """ItemTokens of n items that have `tokens` tokens in all (their own CLS not counted)."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(3.5, 0.35, n), 4, 96)
    lengths = np.maximum(1, np.floor(lengths * (tokens / lengths.sum()))).astype(int)
    lengths[:tokens - lengths.sum()] += 1
    starts = rng.random(tokens) < 0.6
    starts[np.cumsum(lengths) - lengths] = True
    ids = rng.integers(5, 30000, tokens).astype(np.int32)
    types = rng.integers(1, 3, tokens).astype(np.int8)
    return ItemTokens(ids, types, starts, np.concatenate([[0, 0], np.cumsum(lengths)]))


def histories(users, mean, n, seed=1, most=None):
    """Ragged item ids of `users` users, `mean` items on average, long-tailed."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.geometric(1 / max(1, mean - 1), users) + 1, 2, most)
    return rng.integers(1, n + 1, lengths.sum()).astype(np.int32), offsets_of(lengths)


def lengths_up_to(longest, total, seed=0):
    """Lengths that sum to `total`, the first of them `longest`, the others 32 ... longest but for
    the last, which fills up."""
    drawn = np.random.default_rng(seed).integers(32, longest + 1, total)
    drawn[0] = longest
    lengths = np.diff(np.minimum(np.cumsum(drawn), total), prepend=0)
    return lengths[lengths > 0]


def skewed(rng, n, size, head, share):
    """`size` numbers below n: `share` of them, long-tailed, among the first `head` of the numbers,
    the others evenly among the rest."""
    first = int(n * head)
    often = np.floor(first * rng.random(size) ** 2)
    seldom = rng.integers(first, n, size)
    return np.where(rng.random(size) < share, often, seldom).astype(int)


def amazon_files(raw, ratings):
    """Books.csv and meta_Books.json.gz in `raw`. Of 51 million ratings as many users, products and
    5-core rows as the real files have, about; rows in no order."""
    users, products = int(0.3 * ratings), int(0.057 * ratings)
    rng = np.random.default_rng(0)
    raw.mkdir(parents=True)
    with open(raw / 'Books.csv', 'w') as f:
        for begin in range(0, ratings, 10 ** 6):
            size = min(10 ** 6, ratings - begin)
            columns = (skewed(rng, products, size, 0.25, 0.9), skewed(rng, users, size, 0.12, 0.53),
                       rng.integers(10000, 17800, size) * 86400)
            rows = zip(*(column.tolist() for column in columns))
            f.writelines(f'{item:010X},A{user:013X},5.0,{time}\n' for item, user, time in rows)
    words = [f'word{word}' for word in range(5000)]
    texts = [' '.join(words[word] for word in rng.integers(0, 5000, 50)) for _ in range(5000)]
    with gzip.open(raw / 'meta_Books.json.gz', 'wt', 1) as f:
        for item in range(products):
            text = texts[item % 5000]
            about = {'asin': f'{item:010X}', 'title': f'{text[:60]} {item}', 'brand': text[60:75],
                     'category': ['Books', text[75:90], text[90:110]], 'description': [text]}
            f.write(f'{json.dumps(about)}\n')


# ------------------------------------------------------------------------ preparation rows

def temporary_data():
    """An empty data folder for this process, removed when the row is done."""
    folder = tempfile.TemporaryDirectory(dir=os.environ.get('TMPDIR'))
    os.environ |= {'ELEPHANT_DATA': folder.name, 'ELEPHANT_ANY_VERSION': '1'}
    return folder


def preparation(ours, ratings):
    """Raw Amazon files -> canonical files -> prepared.npz, as python -m common.data books."""
    folder = temporary_data()
    amazon_files(Path(folder.name, 'raw'), ratings)

    def run(folder=folder):  # which keeps it
        data.prepare('books', [None, None, None])
    return Work(run)


def opening(ours, items=937000, users=530600):
    """load() of a dataset that another process prepared; so many items and users that 930,000 and
    403,000 pass the filters."""
    folder = temporary_data()
    place = Path(folder.name, 'mine')
    place.mkdir()
    rows, offsets = histories(users, 8.8, items)
    with open(place / 'interactions.csv', 'w') as f:
        f.write('user,item,timestamp\n')
        for user in range(users):
            f.writelines(f'A{user:013X},{item:010X},{time}\n' for time, item
                         in enumerate(rows[offsets[user]:offsets[user + 1]].tolist()))
    with open(place / 'items.jsonl', 'w') as f:
        f.writelines(json.dumps({'id': f'{item:010X}', 'title': f'book {item}'}) + '\n'
                     for item in range(1, items + 1))
    prepare = 'from common import data; data.prepare("mine", data.DEFAULT)'
    subprocess.run([sys.executable, '-c', prepare], check=True)
    return Work(lambda folder=folder: data.load('mine'))


# ------------------------------------------------------------------------ language model rows

def lm_flops(shape, lengths):
    """Forward products for the CLS of sequences of these lengths: all layers but the last, whose
    one global query is not worth counting."""
    hidden = shape['hidden']
    linear = 2 * (4 * hidden ** 2 + 2 * hidden * shape['intermediate']) * lengths.sum()
    attention = 4 * hidden * (lengths * np.minimum(lengths, 65)).sum()
    return (shape['layers'] - 1) * (linear + attention)


def masked_flops(shape, lengths):
    """Products of a training pass for the masked tokens: of the last layer keys and values of all
    tokens and the rest of the masked ones'; the output table is frozen."""
    hidden, masked = shape['hidden'], MASK_SHARE * lengths.sum()
    keys = 2 * 2 * hidden ** 2 * lengths.sum()
    rest = 2 * (2 * hidden ** 2 + 2 * hidden * shape['intermediate']) * masked
    head, logits = 2 * hidden ** 2 * masked, 2 * hidden * shape['vocab_size'] * masked
    return 3 * (lm_flops(shape, lengths) + keys + rest + head) + 2 * logits


class LanguageModel:
    """One of the two models of a shape, and the data. A step is its loss and gradients; the
    optimizer is the same for both."""

    def __init__(self, ours, shape, items, tokens):
        torch.manual_seed(0)
        self.tokens, config = item_tokens(items, tokens), Config(**shape)
        if ours:
            self.model = RecFormer(config).on(runtime())
            self.model.words = SimpleNamespace(cls=CLS, mask=MASK)
        else:
            self.published = baseline()
            self.model = self.published.longformer(config)
        self.model.train()
        self.device = next(self.model.parameters()).device

    def half(self):
        """Half precision for published code, which has it on a GPU alone."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != 'cpu')


def pack_alone(ids, tokens, cls):
    """Each of these items as a history of its own."""
    return pack(ids, np.arange(len(ids) + 1), tokens, cls)


def encode(ours, shape, items, tokens):
    s = LanguageModel(ours, shape, items, tokens - items)  # `tokens` counts each item's CLS

    def published():
        s.model.eval()
        with torch.no_grad(), s.half():
            for ids in np.array_split(np.arange(1, items + 1), -(-items // 32)):
                s.published.cls(s.model, pack_alone(ids, s.tokens, CLS))

    def run():
        if ours:
            s.model.encode_items(s.tokens)
        else:
            published()
    return Work(run, flops=lm_flops(shape, 1 + np.diff(s.tokens.offsets)[1:]))


def finetune_step(ours, shape, users, tokens, most, items=8249):
    """most: items of the longest history, so that the baseline's padding needs the memory that
    published code was seen to need."""
    s = LanguageModel(ours, shape, 512, 512 * PER_ITEM)
    rows = histories(users, tokens / users / PER_ITEM, 512, most=most)
    packed = pack(*rows, s.tokens, CLS)
    table = torch.randn(items + 1, shape['hidden'], device=s.device)
    labels = np.arange(1, users + 1)

    def run():
        if ours:
            finetune.add_gradients(s.model, table, packed, labels)
        else:
            with s.half():
                logits = s.published.cosine(s.published.cls(s.model, packed), table)
            label = torch.as_tensor(labels, device=s.device)
            torch.nn.functional.cross_entropy(logits, label).backward()
        s.model.zero_grad(set_to_none=True)
    scores = 2 * users * items * shape['hidden']  # the table is fixed: one product back
    return Work(run, flops=3 * lm_flops(shape, packed.lengths) + 2 * scores)


def pretrain_step(ours, shape, users, tokens, most=18, micro=None):
    """most: items of the longest history; micro: the machine's micro_tokens."""
    s = LanguageModel(ours, shape, 512, 512 * PER_ITEM)
    if micro:
        s.model.machine.micro_tokens = micro
    rows = histories(users, tokens / users / PER_ITEM, 512, most=most)
    history, items = pack(*rows, s.tokens, CLS), np.arange(1, users + 1)
    target = pack_alone(items, s.tokens, CLS)
    rng = np.random.default_rng(0)
    s.model.longformer.embeddings.word_embeddings.weight.requires_grad_(False)

    def step():
        loss, _ = pretrain.contrastive(s.model, history, target, items)
        loss.backward()
        for packed in (history, target):
            masked = mask_words(packed, rng, MASK, shape['vocab_size'])
            pretrain.masked_gradients(s.model, packed, *masked, 0.1)

    def published():
        with s.half():
            states = s.published.cls(s.model, history), s.published.cls(s.model, target)
            logits = s.published.cosine(*states)
        label = torch.arange(users, device=s.device)
        loss = torch.nn.functional.cross_entropy(logits, label)
        for packed in (history, target):
            ids, chosen = mask_words(packed, rng, MASK, shape['vocab_size'])
            with s.half():
                loss = loss + 0.1 * s.published.masked_loss(s.model, packed, ids, chosen)
        loss.backward()

    def run():
        if ours:
            step()
        else:
            published()
        s.model.zero_grad(set_to_none=True)
    lengths = np.concatenate([history.lengths, target.lengths])
    return Work(run, flops=3 * lm_flops(shape, lengths) + masked_flops(shape, lengths))


# ------------------------------------------------------------------------ rows without a model

def masking(ours, users=16, tokens=4600):
    texts, rng = item_tokens(512, 512 * PER_ITEM), np.random.default_rng(0)
    items, offsets = histories(users, tokens / users / PER_ITEM, 512, most=18)
    targets = np.arange(1, users + 1)
    published = None if ours else baseline()
    tokenizer = None if ours else published.made_up_tokenizer(50265)
    rows = [items[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:])]

    def run():
        for _ in range(10):
            if ours:
                for packed in (pack(items, offsets, texts, CLS), pack_alone(targets, texts, CLS)):
                    mask_words(packed, rng, MASK, 50265)
            else:
                for lists in (rows, [[target] for target in targets]):
                    published.masked_batch(lists, texts, rng, tokenizer)
    return Work(run, 0.1)


def packing(ours, users=64, tokens=28694):
    """Histories of different items, so that they have exactly so many tokens with their CLS."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 21, users)
    items, offsets = rng.permutation(lengths.sum()) + 1, offsets_of(lengths)
    texts = item_tokens(len(items), tokens - users)
    assert len(pack(items, offsets, texts, CLS).tokens) == tokens

    def run():
        for _ in range(10):
            mask_words(pack(items, offsets, texts, CLS), rng, MASK, 50265)
    return Work(run, 0.1)


@dataclass
class Counting(Machine):
    """A Machine that counts the bytes that are sent to it."""
    sent: int = 0

    def put(self, array):
        self.sent += array.nbytes
        return super().put(array)


def layout(ours, tokens=16384, longest=840):
    """class Batch on one thread; on a CPU its device's part of the work is counted too."""
    torch.set_num_threads(1)
    lengths, zeros = lengths_up_to(longest, tokens), np.zeros(tokens, np.int64)
    packed = Packed(zeros, zeros, zeros, zeros.astype(bool), lengths)
    machine = runtime()
    counting = Counting(machine.device, machine.bfloat16)
    Batch(packed, Config.window, counting)

    def run():
        with torch.no_grad(), machine.autocast():
            for _ in range(50):
                Batch(packed, Config.window, machine)
    return Work(run, 0.02, sent=counting.sent)


# ------------------------------------------------------------------------ ID model rows

class Sequences:
    """An ID model and training parts of `users` users, `mean` items on average."""

    def __init__(self, ours, kind, items, hidden, users=22601, mean=6.0):
        torch.manual_seed(0)
        self.ours, self.items = ours, items
        if ours:
            table = kind.draw(torch.empty(items + 1, hidden))
            self.model = kind(ItemTable(table), 50).on(runtime())
        else:
            self.published = baseline()
            self.model = getattr(self.published, kind.__name__)(items, hidden)
        self.rows = histories(users, mean, items)
        parameters = self.model.parameters()
        self.optimizer = torch.optim.Adam(parameters, lr=1e-3, betas=kind.betas, fused=ours)
        self.model.train()

    def step(self, users, loss, rng):
        items, offsets = take(*self.rows, users)
        negatives = None
        if loss == 'bce':
            negatives = draw_training_negatives(items, offsets, self.items, rng)
        if self.ours:
            with self.model.machine.autocast():
                value = self.model.loss(items, offsets, rng, loss, negatives)
        else:
            value = self.published_loss(items, offsets, loss)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def published_loss(self, items, offsets, loss):
        if loss == 'masked':
            targets = self.published.squares(items, offsets)
            masked = (torch.rand(targets.shape, device=targets.device) < 0.15) & (targets > 0)
            shown = targets.masked_fill(masked, self.items + 1)
            return self.model.loss(shown, targets * masked, None)
        bounds = list(zip(offsets[:-1], offsets[1:]))
        first = np.concatenate([items[a:b - 1] for a, b in bounds])
        rest = np.concatenate([items[a + 1:b] for a, b in bounds])
        ends = offsets - np.arange(len(offsets))
        squares = self.published.squares(first, ends), self.published.squares(rest, ends)
        wrong = None
        if loss == 'bce':
            wrong = torch.randint_like(squares[0], 1, self.items + 1)
        return self.model.loss(*squares, wrong)


def epoch_flops(loss, lengths, hidden, items):
    """Training's products for users with so many items. SASRec: 2 blocks of 6 H^2 weights at every
    item but the last. BERT4Rec: 12 H^2 a block, for users of whom an item is masked (expected: no
    draw is made here); of the second block keys and values of every item, and the rest of the
    masked ones'."""
    if loss == 'masked':
        lengths = np.minimum(lengths, 50)
        places = (lengths * (1 - (1 - LAST_ONLY) * (1 - MASK_SHARE) ** lengths)).sum()
        masked = ((1 - LAST_ONLY) * MASK_SHARE * lengths + LAST_ONLY).sum()
        weights = (12 + 2) * hidden ** 2 * places + (12 - 2) * hidden ** 2 * masked
        scores = items * masked
    else:
        places = np.minimum(lengths - 1, 50).sum()
        weights = 12 * hidden ** 2 * places
        scores = (items if loss == 'ce' else 2) * places
    return 3 * 2 * (weights + hidden * scores)


def epoch(ours, kind, loss, items=8249, hidden=768, users=22601, steps=None):
    """steps: so many of the epoch's, scaled up; by default a twelfth of them, or the baseline's
    first."""
    s = Sequences(ours, kind, items, hidden, users)
    order = np.random.default_rng(0).permutation(users)
    batches = np.array_split(order, -(-users // kind.batch))
    some = batches[:steps or (max(1, len(batches) // 12) if ours else 1)]
    lengths = np.diff(s.rows[1])[np.concatenate(some)]

    def run():
        for number, batch in enumerate(some):
            s.step(batch, loss, np.random.default_rng(number))
    return Work(run, len(batches) / len(some), epoch_flops(loss, lengths, hidden, items))


def evaluation(ours, kind, items=8249, hidden=768, users=21300):
    part = users // 4 if ours else 512
    s = Sequences(ours, kind, items, hidden, part, 7)
    rng = np.random.default_rng(0)
    targets = rng.integers(1, items + 1, part)
    negatives = rng.integers(1, items + 1, (part, 100))
    data_there = SimpleNamespace(n_items=items, negatives=negatives,
                                 split=lambda which: (*s.rows, targets))
    s.model.eval()

    def published():
        rows = s.published.squares(*s.rows)
        for sampled in (True, False):  # two passes, as published
            s.published.ranks(s.model, rows, torch.as_tensor(targets, device=rows.device),
                              torch.as_tensor(negatives, device=rows.device), sampled)

    def run():
        if ours:
            score = product_scorer(s.model.all_states(*s.rows), *s.model.scorer())
            rank_counts(score, data_there, 'test')
        else:
            published()
    return Work(run, users / part)


# ------------------------------------------------------------------------ the table

ROWS = {
    'MiniLM size, encode 512 items':
        Row(partial(encode, shape=MINILM, items=512, tokens=19739), share=0.6),
    'MiniLM size, fine-tune step, 16 users':
        Row(partial(finetune_step, shape=MINILM, users=16, tokens=4600, most=24),
            share=0.6, memory=1 / 8),
    'MiniLM size, pre-train step, 16 users':
        Row(partial(pretrain_step, shape=MINILM, users=16, tokens=4600),
            share=0.6, memory=1 / 10),
    'MiniLM size, pre-train step, 64 users, gradient caching':
        Row(partial(pretrain_step, shape=MINILM, users=64, tokens=18400), mb=2048, alone=True),
    'Longformer size, encode 64 items':
        Row(partial(encode, shape=BASE, items=64, tokens=2573), share=0.7),
    'Longformer size, fine-tune step, 4 users':
        Row(partial(finetune_step, shape=BASE, users=4, tokens=1438, most=18),
            share=0.7, memory=1 / 3),
    'pre-training batch, 16 users, no model': Row(masking),
    'SASRec 768, BCE epoch': Row(partial(epoch, kind=SASRec, loss='bce'), share=0.75),
    'SASRec 768, cross-entropy epoch': Row(partial(epoch, kind=SASRec, loss='ce'), share=0.75),
    'SASRec 768, evaluation': Row(partial(evaluation, kind=SASRec)),
    'BERT4Rec 768, epoch': Row(partial(epoch, kind=BERT4Rec, loss='masked'), share=0.8),
    'BERT4Rec 768, evaluation': Row(partial(evaluation, kind=BERT4Rec)),
    'opening 930,000 items, 403,000 users': Row(opening, ms=3000, mb=600, alone=True),
    'preparing 1 million ratings, 57,000 products':
        Row(partial(preparation, ratings=10 ** 6), alone=True, once=True),
    'preparing 10 million ratings, 570,000 products':
        Row(partial(preparation, ratings=10 ** 7), alone=True, once=True),
    'preparing 51 million ratings, 2.9 million products':
        Row(partial(preparation, ratings=51 * 10 ** 6), ms=900_000, mb=3000, alone=True, once=True),
    'layout of attention, 16,384 tokens, one thread': Row(layout, ms=1.5, sent=1, alone=True),
    'packing and masking, 64 histories, 28,694 tokens': Row(packing, alone=True),
    'SASRec 768, cross-entropy epoch, 138,116 items':
        Row(partial(epoch, kind=SASRec, loss='ce', items=138116, steps=2), mb=4096, alone=True),
}


def growth_rows():
    """How time and memory grow with items and users: no targets."""
    sizes = [('ce', items, 22601) for items in (8249, 50000, 138116, 930000)]
    sizes += [('bce', 8249, users) for users in (20000, 130000, 400000)]
    rows = {}
    for loss, items, users in sizes:
        work = partial(epoch, kind=SASRec, loss=loss, items=items, hidden=128, users=users, steps=4)
        rows[f'SASRec 128, {loss} epoch, {items:,} items, {users:,} users'] = Row(work, alone=True)
    for items in (8249, 50000, 138116, 930000):
        work = partial(evaluation, kind=SASRec, items=items, hidden=128, users=1000)
        rows[f'SASRec 128, evaluation of 1,000 users, {items:,} items'] = Row(work, alone=True)
    return rows


ROWS |= growth_rows()

# A GPU's: the batches of the paper and of RecFormer, on its own datasets' sizes
GPU_ROWS = {
    'MiniLM size, encode 2,048 items':
        Row(partial(encode, shape=MINILM, items=2048, tokens=78848), share=0.6),
    'MiniLM size, fine-tune step, 128 users':
        Row(partial(finetune_step, shape=MINILM, users=128, tokens=46000, most=26), share=0.6),
    'MiniLM size, pre-train step, 64 users':
        Row(partial(pretrain_step, shape=MINILM, users=64, tokens=28694, most=26), share=0.6),
    'Longformer size, encode 1,024 items':
        Row(partial(encode, shape=BASE, items=1024, tokens=39424), share=0.7),
    'Longformer size, fine-tune step, 128 users':
        Row(partial(finetune_step, shape=BASE, users=128, tokens=46000, most=26), share=0.7,
            memory=1 / 3),
    'Longformer size, pre-train step, 64 users':
        Row(partial(pretrain_step, shape=BASE, users=64, tokens=28694, most=26), share=0.7,
            memory=1 / 3),
    'Longformer size, pre-train step, 64 users, passes of a card of 16 GB':
        Row(partial(pretrain_step, shape=BASE, users=64, tokens=28694, most=26, micro=16384),
            mb=15000, alone=True),
    'SASRec 768, BCE epoch': Row(partial(epoch, kind=SASRec, loss='bce', steps=16), share=0.75),
    'SASRec 768, cross-entropy epoch':
        Row(partial(epoch, kind=SASRec, loss='ce', steps=16), share=0.75),
    'SASRec 768, cross-entropy epoch, 138,116 items':
        Row(partial(epoch, kind=SASRec, loss='ce', items=138116, steps=4), share=0.75),
    'SASRec 768, evaluation': Row(partial(evaluation, kind=SASRec)),
    'BERT4Rec 768, epoch':
        Row(partial(epoch, kind=BERT4Rec, loss='masked', steps=16), share=0.8),
    'BERT4Rec 768, evaluation': Row(partial(evaluation, kind=BERT4Rec)),
    'layout of attention, 16,384 tokens, one thread': Row(layout, ms=1.5, sent=1, alone=True),
}


# ------------------------------------------------------------------------ measuring

class Found(NamedTuple):
    """What was measured of one side: median seconds, peak MB, seconds that its useful FLOPs take at
    the machine's product rate (or None), Work.scale, MB sent (or None)."""
    seconds: float
    mb: float
    best: float | None
    scale: float
    sent: float | None

    @property
    def share(self):
        """Useful FLOPs a second as a share of the machine's product rate."""
        return self.best and self.best / self.seconds


def product_rate(autocast):
    """FLOPs a second of a large square product in autocast's dtype: the best of several."""
    size, device = (8192, 'cuda') if on_gpu() else (2048, 'cpu')
    with autocast(), torch.no_grad():
        x = torch.randn(size, size, device=device)
        x = x.to((x @ x).dtype)
        best = min(clock(lambda: x @ x) for _ in range(5))
    return 2 * size ** 3 / best


def clock(run):
    """Seconds that run() takes, with all that it asked of the device."""
    began = time.perf_counter()
    run()
    if on_gpu():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def worker(pipe, name, ours):
    """A process of its own: says 'ready', runs when told, at the end reports what Found holds."""
    try:
        work = ROWS[name].work(ours)
        if not ROWS[name].once:
            work.run()  # to warm up
        pipe.send('ready')
        while pipe.recv() == 'run':
            pipe.send(clock(work.run) * work.scale)
        mb, best = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, None
        if ours and work.flops:
            best = work.flops * work.scale / product_rate(runtime().autocast)
        pipe.send((mb, best, work.scale, work.sent and work.sent / 1e6))
    except Exception as error:
        pipe.send(error)


def receive(pipe):
    """What a worker sends. Errors: its own, or EOFError where it was killed."""
    answer = pipe.recv()
    if isinstance(answer, Exception):
        raise answer
    return answer


def measure(name, repeats):
    """{ours: Found} of a row, its sides alternating."""
    context, running = multiprocessing.get_context('spawn'), {}
    for ours in (True,) if ROWS[name].alone else (False, True):
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(there, name, ours), daemon=True)
        process.start()
        there.close()
        running[ours] = here, process
        receive(here)
    seconds = {ours: [] for ours in running}
    for _ in range(1 if ROWS[name].once else repeats):
        for ours, (pipe, _) in running.items():
            pipe.send('run')
            seconds[ours].append(receive(pipe))
    found = {}
    for ours, (pipe, process) in running.items():
        pipe.send('stop')
        found[ours] = Found(median(seconds[ours]), *receive(pipe))
        process.join()
    return found


def measure_on_gpu(name, repeats):
    """{ours: Found} of a row, in this process: a GPU's memory can be counted anew."""
    row, found = GPU_ROWS[name], {}
    for ours in (True,) if row.alone else (False, True):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.set_default_device('cpu' if ours else 'cuda')
        work = row.work(ours)
        work.run()
        seconds = median(clock(work.run) for _ in range(repeats)) * work.scale
        mb, best = torch.cuda.max_memory_allocated() / 2 ** 20, None
        torch.set_default_device('cpu')
        if ours and work.flops:
            best = work.flops * work.scale / product_rate(runtime().autocast)
        found[ours] = Found(seconds, mb, best, work.scale, work.sent and work.sent / 1e6)
        del work
    return found


def targets(row, ours, published):
    """[(a target of this row, whether it is met)]."""
    checks = []
    if row.share:
        checks.append((f'{row.share:.0%} of peak', ours.share >= row.share))
    if row.memory:
        checks.append((f'1/{1 / row.memory:.0f} MB', ours.mb <= row.memory * published.mb))
    if row.mb:
        checks.append((f'{row.mb:,} MB', ours.mb <= row.mb))
    if row.ms:
        checks.append((f'{row.ms} ms', 1000 * ours.seconds <= row.ms))
    if row.sent:
        checks.append((f'{row.sent} MB sent', ours.sent <= row.sent))
    return checks


def profiled(row):
    """The operations (on a GPU kernels, too) that take most of one run of ours, as a table."""
    work = row.work(True)
    if not row.once:
        work.run()  # to warm up
    where = 'cuda' if on_gpu() else 'cpu'
    with torch.profiler.profile() as found:
        clock(work.run)
    return found.key_averages().table(sort_by=f'self_{where}_time_total', row_limit=25,
                                      max_name_column_width=70)


# ------------------------------------------------------------------------ printing

def duration(seconds):
    """Seconds as text with three digits: '0.52 ms', '12.3 s', '1,178 s'."""
    value, unit = (seconds, 's') if seconds >= 0.1 else (1000 * seconds, 'ms')
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f'{value:,.{digits}f} {unit}'


def number(x, form):
    return '' if x is None else format(x, form)


def line(row):
    """A row of the JSON as a row of the table."""
    published = row['baseline_s'] and duration(row['baseline_s'])
    notes = [f'x {row["scale"]:.0f}' if row['scale'] > 1 else '',
             f'published x {row["baseline_scale"]:.0f}' if (row['baseline_scale'] or 0) > 1 else '',
             f'{row["sent_mb"]:.2f} MB sent' if row['sent_mb'] else '']
    cells = [row['name'], published or '', duration(row['ours_s']), number(row['ratio'], '.1f'),
             number(row['baseline_mb'], ',.0f'), number(row['ours_mb'], ',.0f'),
             number(row['mfu'], '.0%'), row['target'], ', '.join(filter(None, notes))]
    return f'| {" | ".join(cells)} |'


def measured(name, row, repeats):
    """A row of the JSON."""
    found = measure_on_gpu(name, repeats) if on_gpu() else measure(name, repeats)
    ours, published = found[True], found.get(False, Found(*[None] * 5))
    checks = targets(row, ours, published)
    target = ', '.join(text if met else f'{text} MISSED' for text, met in checks)
    return {'name': name, 'baseline_s': published.seconds, 'ours_s': ours.seconds,
            'ratio': published.seconds and published.seconds / ours.seconds,
            'baseline_mb': published.mb, 'ours_mb': ours.mb, 'mfu': ours.share,
            'sent_mb': ours.sent, 'scale': ours.scale, 'baseline_scale': published.scale,
            'target': target, 'met': all(met for _, met in checks) if checks else None}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--quick', action='store_true', help='one repeat each: a look')
    p.add_argument('--profile', action='store_true', help='no table: what takes the time of ours')
    p.add_argument('--only', default=[''], nargs='+', metavar='WORD',
                   help='rows whose name holds one of these')
    p.add_argument('--json', type=Path, metavar='FILE', help='write the rows')
    p.add_argument('--device', default='auto', choices=['auto', 'cpu'], help='cpu: hide the GPUs')
    args = p.parse_args(argv)
    if args.device == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # of the rows' processes too
    rows_here = GPU_ROWS if on_gpu() else ROWS
    names = [name for name in rows_here if any(word in name for word in args.only)]
    if not names:
        p.error(f'--only {" ".join(args.only)}: no row has it in its name')
    if args.profile:
        for name in names:
            print(f'{name}\n{profiled(rows_here[name])}')
        return 0
    machine = runtime()
    dtype = 'bfloat16' if machine.bfloat16 else 'float32'
    where = platform.processor() or platform.machine()
    if on_gpu():
        where = torch.cuda.get_device_name()
    print(f'{where}, {torch.get_num_threads()} threads, '
          f'torch {torch.__version__}, {dtype} products at '
          f'{product_rate(machine.autocast) / 1e9:,.0f} GFLOP/s, float32 at '
          f'{product_rate(contextlib.nullcontext) / 1e9:,.0f}\n')
    print('| work | published | ours | ratio | published MB | ours MB | of peak | target | |')
    print('|---|' + '---:|' * 6 + '---|' * 2)
    rows = []
    for name in progress(names, desc='bench', unit='row'):
        row = rows_here[name]
        repeats = 1 if args.quick else 3 if row.alone else 5
        rows.append(measured(name, row, repeats))
        tqdm.write(line(rows[-1]), file=sys.stdout)
        sys.stdout.flush()
    if args.json:
        save_json(args.json, rows)
    return int(any(row['met'] is False for row in rows))


if __name__ == '__main__':
    sys.exit(main())
