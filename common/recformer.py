"""RecFormer: a Longformer with token-type and item-position embeddings, computed without padding.

Li et al., "Text Is All You Need" (2023), on Beltagy et al., "Longformer" (2020). B = sequences, T =
their tokens one after the other, L = longest sequence, H = hidden size, h = heads, d = H / h.
Modules are named as transformers' Longformer names its tensors, so published state dicts load by
name. What saves time, without changing a result beyond rounding:
- linear layers see the T real tokens; only attention is laid out in padded blocks (class Batch);
- the one global query (CLS): its scores are (Wk' q) . x and its value is Wv (sum of a x), so the
  global key and value projections of all tokens are never computed;
- only rows that are asked for (CLS, or masked tokens) leave the last layer.
"""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import offsets_of, parts, take
from common.layers import Model, additive, attend, dropout, half, remade, rows
from common.progress import progress
from common.text import RECTANGLE, micro_batches, pack

BLOCK = 64   # queries per block of the windowed attention; a matter of speed only
TEMPERATURE = 0.05  # RecFormer
KEPT = 4  # passes whose worth of CLS is encoded at once: time against memory
# None: gelu, so that a model which knew nothing else keeps its identity
ACTIVATIONS = {None: F.gelu, 'gelu_new': partial(F.gelu, approximate='tanh'), 'relu': F.relu,
               'silu': F.silu}


@dataclass
class Config:
    """What the model computes; everything but window and limits comes from the backbone."""
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int           # rows of the position table
    position_offset: int     # row of the first token: pad id + 1 = 2 (RoBERTa), 0 (BERT)
    layer_norm_eps: float
    dropout: float
    window: int = 64         # RecFormer: 32 tokens to each side
    max_items: int = 50      # of a history (RecFormer)
    max_tokens: int = 1024   # of a history (RecFormer)
    activation: str = None       # of the feed-forward layers: of ACTIVATIONS
    head_activation: str = None  # of the masked-language-model head


class Batch:
    """Packed sequences (text.Packed) on a device, and the layout of their attention, the same for
    every layer. Everything but the tokens is made on the device, from the lengths.

    Global attention: `all` [B, L] are rows of the packed tokens, `real` [B, L] those that exist.
    Windowed attention: N blocks of Q queries against K keys. `queries` [N, Q] and `keys` [N, K] are
    rows of the packed tokens, `mask` [N, 1, Q, K] is 0 where a query attends, else -inf, `place`
    [T] finds token t in the blocks' outputs [N * Q]. Every query attends the CLS of its sequence
    (column 0) and, as distances allow, window / 2 tokens to each side. Where all sequences are
    short a block is a whole sequence; else the keys are CLS and what the block's windows reach.
    """

    def __init__(self, packed, window, machine):
        self.tokens = machine.put(packed.tokens)
        self.types = machine.put(packed.types)
        self.item_positions = machine.put(packed.item_positions)
        lengths = machine.put(packed.lengths)
        row = torch.arange(len(packed.tokens), device=machine.device)
        owner = torch.repeat_interleave(lengths, output_size=len(row))  # sequence of a token
        self.cls = lengths.cumsum(0) - lengths
        self.positions = row - self.cls[owner]
        longest = packed.lengths.max()
        column = torch.arange(longest, device=machine.device)
        self.real = column < lengths[:, None]
        self.all = self.cls[:, None] + column * self.real

        width = longest if longest <= RECTANGLE else BLOCK
        first = offsets_of(-(-packed.lengths // width) * width)  # slot of each sequence
        self.place = machine.put(first[:-1])[owner] + self.positions
        slots = row.new_full([first[-1]], -1).index_copy(0, self.place, row)  # -1: stays empty
        queries = slots.view(-1, width)
        of_block = owner[queries[:, :1]]  # its first slot is never empty
        cls, length = self.cls[of_block], lengths[of_block]
        side = window // 2
        keys, begin = queries, -side  # column where the window of a block's first query begins
        if longest > RECTANGLE:
            reach = F.pad(slots, (side, side), value=-1).unfold(0, width + 2 * side, width)
            keys, begin = torch.cat([cls, reach], 1), 1
        known = (keys > cls) & (keys < cls + length)
        self.queries, self.keys = queries.maximum(cls), keys.where(known, cls)
        near = known.new_ones(width, keys.shape[1]).triu(begin).tril(begin + 2 * side)
        near[:, 0] = known[:, 0] = True  # CLS
        # a sum is the only pass over the mask's size: 0 + 0, or -inf from either side
        self.mask = (additive(near) + additive(known)[:, None])[:, None]


# ------------------------------------------------------------------------ layers

class WindowedAttention(nn.Module):
    """Windowed attention of all tokens, global attention of each CLS, each with own projections."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        for name in ('query', 'key', 'value', 'query_global', 'key_global', 'value_global'):
            setattr(self, name, nn.Linear(c.hidden, c.hidden))

    def forward(self, x, batch):
        """[T, H] -> [T, H]. Its inside is made again for the gradient."""
        return remade(self.mix, x, self.query(x), self.key(x), self.value(x), batch)

    def mix(self, x, q, k, v, batch):
        """Windowed attention with a CLS as any other token, then the outputs of each CLS replaced.
        Weights get no dropout (README, differences)."""
        y = attend(self.in_blocks(q, batch.queries), self.in_blocks(k, batch.keys),
                   self.in_blocks(v, batch.keys), batch.mask)
        y = rows(y.transpose(1, 2).flatten(2).flatten(0, 1), batch.place)
        return y.index_copy(0, batch.cls, self.cls(x, batch))

    def in_blocks(self, y, index):
        """[T, H] -> [N, h, Q or K, d]."""
        return rows(y, index).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def cls_weights(self, x, batch):
        """Attention of each CLS over its tokens: (weights [B, h, L], their states [B, L, H])."""
        q = self.query_global(rows(x, batch.cls)).unflatten(1, (self.heads, -1))       # [B, h, d]
        # the key's bias adds the same to every score of a head: it drops out of the softmax
        key = self.key_global.weight.unflatten(0, (self.heads, -1))                    # [h, d, H]
        q = torch.einsum('bhd,hdk->bhk', q, key) / q.shape[-1] ** 0.5                  # [B, h, H]
        states = rows(x, batch.all)
        scores = (q @ states.mT).float()
        return scores.masked_fill(~batch.real[:, None], -torch.inf).softmax(-1), states

    def cls(self, x, batch):
        """Global attention of each sequence's CLS over all its tokens: [B, H]."""
        weights, states = self.cls_weights(x, batch)
        mixed = weights.to(states.dtype) @ states                                      # [B, h, H]
        value = self.value_global.weight.unflatten(0, (self.heads, -1))                # [h, d, H]
        out = torch.einsum('bhk,hdk->bhd', mixed, value)
        return out.flatten(1) + self.value_global.bias.to(out.dtype)


class Output(nn.Module):
    """Linear (the layer applies it), dropout, residual, LayerNorm."""

    def __init__(self, inside, c):
        super().__init__()
        self.dense = nn.Linear(inside, c.hidden)
        self.LayerNorm = nn.LayerNorm(c.hidden, c.layer_norm_eps)
        self.dropout = c.dropout

    def forward(self, y, x):
        return self.LayerNorm(dropout(y, self.dropout, self.training) + x)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention = nn.ModuleDict({'self': WindowedAttention(c),
                                        'output': Output(c.hidden, c)})
        self.output = Output(c.intermediate, c)
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(c.hidden, c.intermediate)})
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x, batch, wanted=slice(None)):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        if wanted is batch.cls:  # no windowed attention
            y = self.attention.self.cls(half(x), batch)
        else:
            y = rows(self.attention.self(half(x), batch), wanted)
        x = self.attention.output(self.attention.output.dense(y), rows(x, wanted))
        return self.output(remade(self.feed_forward, self.intermediate.dense(x)), x)

    def feed_forward(self, y):
        return self.output.dense(self.activation(y))


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden)
        self.position_embeddings = nn.Embedding(c.positions, c.hidden)
        self.token_type_embeddings = nn.Embedding(4, c.hidden)  # special, name, value, padding
        self.item_position_embeddings = nn.Embedding(c.max_items + 1, c.hidden)  # 0 is CLS
        self.LayerNorm = nn.LayerNorm(c.hidden, c.layer_norm_eps)
        self.offset, self.dropout = c.position_offset, c.dropout

    def forward(self, batch):
        x = (self.word_embeddings(batch.tokens)
             + self.position_embeddings(batch.positions + self.offset)
             + self.token_type_embeddings(batch.types)
             + self.item_position_embeddings(batch.item_positions))
        return dropout(self.LayerNorm(x), self.dropout, self.training)


# ------------------------------------------------------------------------ the model

class RecFormer(Model):
    """words: its tokenizer (text.Words); stage: 'lf', 'pt', 'ft1', 'ft2' or 'published'; plm: the
    language model it began as, as typed; items, data: stage-FT's item table [n + 1, H] and the
    fingerprint of its dataset."""
    words = stage = plm = items = data = None

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        encoder = nn.ModuleDict({'layer': layers})
        self.longformer = nn.ModuleDict({'embeddings': Embeddings(c), 'encoder': encoder})
        dense = nn.Linear(c.hidden, c.hidden)
        norm = nn.LayerNorm(c.hidden, c.layer_norm_eps)
        self.lm_head = nn.ModuleDict({'dense': dense, 'layer_norm': norm})
        self.lm_head.bias = nn.Parameter(torch.zeros(c.vocab_size))
        nn.init.eye_(self.lm_head.dense.weight)  # where the backbone has no head
        nn.init.zeros_(self.lm_head.dense.bias)

    @property
    def layers(self):
        return self.longformer.encoder.layer

    @property
    def word_table(self):
        return self.longformer.embeddings.word_embeddings.weight

    def pack(self, items, offsets, tokens):
        """Histories (ragged, oldest first) as Packed, cut to this model's limits."""
        return pack(items, offsets, tokens, self.words.cls, self.config.max_items,
                    self.config.max_tokens)

    def pack_items(self, ids, tokens):
        """Each of these items alone, as Packed."""
        return pack(np.asarray(ids), np.arange(len(ids) + 1), tokens, self.words.cls)

    def forward(self, packed, wanted=None):
        """Last layer's states of Packed sequences: of each CLS [B, H], or of the rows `wanted`
        (their numbers, an array [R]) [R, H]."""
        with self.machine.autocast():
            batch = Batch(packed, self.config.window, self.machine)
            x = half(self.longformer.embeddings(batch))
            for layer in self.layers[:-1]:
                x = layer(x, batch)
            wanted = batch.cls if wanted is None else self.machine.put(wanted)
            return self.layers[-1](x, batch, wanted)

    def mlm_logits(self, states):
        """[R, H] -> [R, vocabulary]; the output table is the word table."""
        with self.machine.autocast():
            activation = ACTIVATIONS[self.config.head_activation]
            x = self.lm_head.layer_norm(activation(self.lm_head.dense(states)))
            return F.linear(x, self.word_table, self.lm_head.bias)

    def passes(self, packed):
        """Numbers of the sequences that this process computes, in groups of bounded size."""
        mine = self.machine.share(len(packed.lengths))
        groups = micro_batches(packed.lengths[mine], self.machine.micro_tokens)
        return [mine[group] for group in groups]

    def encode(self, packed, label=None, kept=KEPT):
        """CLS states: float32 [B, H] on the device. The machine's processes encode a share each,
        and a gradient flows into a process's own rows alone.

        Gradient caching: a share of at most `kept` passes is one pass; of a larger one nothing is
        kept, and each pass is made again for the gradient, with the dropout that it had: memory is
        that of one pass. label: of a progress bar.
        """
        out = torch.zeros(len(packed.lengths), self.config.hidden, device=self.machine.device)
        groups = self.passes(packed)
        if 0 < len(groups) <= kept:
            groups = [self.machine.share(len(packed.lengths))]

        def states(part, _):
            return self(part)
        for group in progress(groups, desc=label, unit='batch', disable=not label):
            part = packed.rows(group)
            if len(groups) == 1:
                x = self(part)
            else:  # the word table says whose random numbers
                x = remade(states, part, self.word_table, draws=True)
            out.index_copy_(0, self.machine.put(group), x.float())
        return self.machine.sum(out)

    @torch.no_grad()
    def infer(self, packed, label):
        """`encode` without dropout and gradient."""
        training = self.training
        out = self.eval().encode(packed, label, kept=0)
        self.train(training)
        return out

    def encode_histories(self, items, offsets, tokens, label, at_once=20_000):
        """CLS state of each history (ragged): float32 [B, H] on the device; packed in parts."""
        return torch.cat([self.infer(self.pack(*take(items, offsets, part), tokens), label)
                          for part in parts(len(offsets) - 1, at_once)])

    def encode_items(self, tokens):
        """Embeddings of all items: float32 [n + 1, H] on the device, row 0 zeros."""
        packed = self.pack_items(np.arange(1, tokens.n + 1), tokens)
        return F.pad(self.infer(packed, 'encode items'), (0, 0, 1, 0))

    @torch.no_grad()
    def cls_attention(self, packed):
        """Attention weights of CLS in every layer: [layers, B, h, L]."""
        with self.machine.autocast():
            batch = Batch(packed, self.config.window, self.machine)
            x = half(self.longformer.embeddings(batch))
            found = []
            for layer in self.layers:
                weights, _ = layer.attention.self.cls_weights(half(x), batch)
                found.append(weights)
                x = layer(x, batch)
        return torch.stack(found)


def cosine_logits(states, table):
    """RecFormer's score: cosine / 0.05 of states [B, H] with table rows [n, H]: float32 [B, n]."""
    table = table.float()
    scale = (TEMPERATURE * table.norm(dim=-1)).clamp_min(1e-12)
    return F.linear(F.normalize(states.float(), dim=-1), table) / scale
