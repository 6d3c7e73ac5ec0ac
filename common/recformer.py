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

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import take
from common.layers import Model, additive, attend, dropout, half, remade, rows
from common.progress import progress
from common.text import RECTANGLE, micro_batches, pack, pack_items

BLOCK = 64   # queries per block of the windowed attention; a matter of speed only
TEMPERATURE = 0.05  # RecFormer


@dataclass
class Config:
    """Shape of the model; everything but the last three comes from the backbone."""
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


class Batch:
    """Packed sequences (text.Packed) on a device, and the layout of their attention, the same for
    every layer. Everything but the tokens is made on the device, from the lengths.

    Global attention: `all` [B, L] are rows of the packed tokens, `real` [B, L] those that exist.
    Windowed attention: N blocks of Q queries against K keys. `queries` [N, Q] and `keys` [N, K] are
    rows of the packed tokens, `mask` [N, 1, Q, K] is 0 where a query attends, else -inf, `place`
    [T] finds token t in the blocks' outputs [N * Q]. Every query attends the CLS of its sequence
    (column 0) and, as distances allow, window / 2 tokens to each side.
    """

    def __init__(self, packed, window, machine):
        self.tokens, self.types = machine.put(packed.tokens), machine.put(packed.types)
        self.item_positions = machine.put(packed.item_positions)
        self.lengths = machine.put(packed.lengths)
        self.cls = self.lengths.cumsum(0) - self.lengths
        self.positions = self.columns(len(packed.tokens)) - self.of_tokens(self.cls)
        columns = self.columns(int(packed.lengths.max()))
        self.real = columns < self.lengths[:, None]
        self.all = self.cls[:, None] + columns * self.real
        if len(columns) <= RECTANGLE:
            self.one_rectangle(columns, window // 2)
        else:
            self.blocks(machine.put(-(-packed.lengths // BLOCK)), window // 2,
                        int((-(-packed.lengths // BLOCK)).sum()))

    def columns(self, n):
        return torch.arange(n, device=self.tokens.device)

    def of_tokens(self, x):
        """A value of each sequence [B], at each of its tokens [T]."""
        return torch.repeat_interleave(x, self.lengths, output_size=len(self.tokens))

    def one_rectangle(self, columns, side):
        """Short sequences: all tokens of one against all."""
        near = (columns[:, None] - columns).abs() <= side
        seen = (near | (columns == 0)) & self.real[:, None]
        self.queries = self.keys = self.all
        self.mask = additive(seen[:, None])
        start = self.columns(len(self.lengths)) * len(columns)
        self.place = self.of_tokens(start) + self.positions

    def blocks(self, count, side, total):
        """Long ones: blocks of queries, each against CLS and the keys that its window reaches.
        count [B]: blocks of each sequence; total: of all, known to the host."""
        before = count.cumsum(0) - count
        owner = torch.repeat_interleave(self.columns(len(count)), count, output_size=total)
        first = (self.columns(total) - before[owner])[:, None] * BLOCK
        length, start = self.lengths[owner, None], self.cls[owner, None]
        ahead = self.columns(BLOCK + 2 * side)  # from the first key that the first query sees
        q, k = first + ahead[:BLOCK], first + ahead - side
        known = (k >= 1) & (k < length)
        distance = ahead - ahead[:BLOCK, None]
        near = (distance >= 0) & (distance <= 2 * side)
        self.queries = start + q * (q < length)
        self.keys = torch.cat([start, start + k * known], 1)
        # one sum of the mask's size: 0 + 0, or -inf from either side; CLS is always seen
        near, known = F.pad(near, (1, 0), value=True), F.pad(known, (1, 0), value=True)
        self.mask = (additive(near) + additive(known)[:, None])[:, None]
        self.place = self.of_tokens(before * BLOCK) + self.positions


# ------------------------------------------------------------------------ layers

class SelfAttention(nn.Module):
    """Windowed attention of all tokens, global attention of each CLS, with projections of its own."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        for name in ('query', 'key', 'value', 'query_global', 'key_global', 'value_global'):
            setattr(self, name, nn.Linear(c.hidden, c.hidden))

    def forward(self, x, batch):
        """[T, H] -> [T, H]. Its inside is made again for the gradient."""
        return remade(self.mix, x, self.query(x), self.key(x), self.value(x), batch)

    def mix(self, x, q, k, v, batch):
        return self.local(q, k, v, batch).index_copy(0, batch.cls, self.cls(x, batch).to(x.dtype))

    def in_blocks(self, y, index):
        """[T, H] -> [N, h, Q or K, d]."""
        return rows(y, index).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def local(self, q, k, v, batch):
        """Windowed attention, with a CLS as any other token: [T, H]. Weights get no dropout
        (README, differences)."""
        y = attend(self.in_blocks(q, batch.queries), self.in_blocks(k, batch.keys),
                   self.in_blocks(v, batch.keys), batch.mask)
        return rows(y.transpose(1, 2).flatten(2).flatten(0, 1), batch.place)

    def by_head(self, weight):
        """[H, H] -> [h, d, H]."""
        return weight.view(self.heads, -1, weight.shape[1])

    def cls_weights(self, x, batch):
        """Attention of each CLS over its own tokens: (weights [B, h, L], tokens' states [B, L, H])."""
        q = self.query_global(rows(x, batch.cls)).unflatten(1, (self.heads, -1))       # [B, h, d]
        # the key's bias adds the same to every score of a head: it drops out of the softmax
        key = self.by_head(self.key_global.weight)
        q = torch.einsum('bhd,hdk->bhk', q, key) / q.shape[-1] ** 0.5                  # [B, h, H]
        states = rows(x, batch.all)
        scores = torch.bmm(q, states.transpose(1, 2)).float()
        return scores.masked_fill(~batch.real[:, None], -torch.inf).softmax(-1), states

    def cls(self, x, batch):
        """Global attention of each sequence's CLS over all its tokens: [B, H]."""
        weights, states = self.cls_weights(x, batch)
        mixed = torch.bmm(weights.to(states.dtype), states)                            # [B, h, H]
        out = torch.einsum('bhk,hdk->bhd', mixed, self.by_head(self.value_global.weight))
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


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self, self.output = SelfAttention(c), Output(c.hidden, c)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.output = Attention(c), Output(c.intermediate, c)
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(c.hidden, c.intermediate)})

    def forward(self, x, batch, last=None):
        """[T, H] -> [T, H]; with `last`, only what is asked for leaves: 'cls' -> [B, H], or row
        numbers [R] -> [R, H]."""
        attention, h = self.attention.self, half(x)
        if isinstance(last, str):
            y, x = attention.cls(h, batch), rows(x, batch.cls)
        else:
            y = attention(h, batch)
            if last is not None:
                y, x = rows(y, last), rows(x, last)
        x = self.attention.output(self.attention.output.dense(y), x)
        return self.output(remade(self.feed_forward, self.intermediate.dense(x)), x)

    def feed_forward(self, y):
        return self.output.dense(F.gelu(y))


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
        x = self.word_embeddings(batch.tokens)
        x = x + self.position_embeddings(batch.positions + self.offset)
        x = x + self.token_type_embeddings(batch.types)
        x = x + self.item_position_embeddings(batch.item_positions)
        return dropout(self.LayerNorm(x), self.dropout, self.training)


# ------------------------------------------------------------------------ the model

class RecFormer(Model):
    """words: its tokenizer (text.Words); stage: 'lf', 'pt', 'ft1', 'ft2' or 'published'; plm: the
    language model it began as, as typed; items, data: stage-FT's item table [n + 1, H] and the
    fingerprint of its dataset."""
    words, stage, plm, items, data = None, None, None, None, None

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.longformer = nn.ModuleDict({'embeddings': Embeddings(c),
                                         'encoder': nn.ModuleDict({'layer': layers})})
        self.lm_head = nn.ModuleDict({'dense': nn.Linear(c.hidden, c.hidden),
                                      'layer_norm': nn.LayerNorm(c.hidden, c.layer_norm_eps)})
        self.lm_head.register_parameter('bias', nn.Parameter(torch.zeros(c.vocab_size)))

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
        return pack_items(ids, tokens, self.words.cls)

    def forward(self, packed, last='cls'):
        """Last layer's states of Packed sequences: of each CLS [B, H]; of the row numbers `last`
        (array [R]) [R, H]; of all tokens [T, H] with last=None."""
        with self.machine.autocast():
            batch = Batch(packed, self.config.window, self.machine)
            x = half(self.longformer.embeddings(batch))
            for layer in self.layers[:-1]:
                x = layer(x, batch)
            if isinstance(last, np.ndarray):
                last = self.machine.put(last)
            return self.layers[-1](x, batch, last)

    def mlm_logits(self, states):
        """[R, H] -> [R, vocabulary]; the output table is the word table."""
        with self.machine.autocast():
            x = self.lm_head.layer_norm(F.gelu(self.lm_head.dense(states)))
            return F.linear(x, self.word_table, self.lm_head.bias)

    @torch.no_grad()
    def encode(self, packed, label=None):
        """CLS states without training, in passes of bounded size: float32 [B, H] on the device."""
        training = self.training
        self.eval()
        out = torch.empty(len(packed.lengths), self.config.hidden, device=self.machine.device)
        groups = micro_batches(packed.lengths, self.machine.micro_tokens)
        for group in progress(groups, desc=label or 'encode', unit='batch', disable=label is None):
            out[self.machine.put(group)] = self(packed.rows(group)).float()
        self.train(training)
        return out

    def encode_histories(self, items, offsets, tokens, label=None, at_once=20_000):
        """CLS state of each history (ragged): float32 [B, H] on the device; packed in parts."""
        parts = np.array_split(np.arange(len(offsets) - 1), -(-(len(offsets) - 1) // at_once))
        return torch.cat([self.encode(self.pack(*take(items, offsets, part), tokens), label)
                          for part in parts])

    def encode_items(self, tokens):
        """Embeddings of all items: float32 [n + 1, H] on the device, row 0 zeros."""
        states = self.encode(self.pack_items(np.arange(1, tokens.n + 1), tokens), 'encode items')
        return F.pad(states, (0, 0, 1, 0))

    @torch.no_grad()
    def cls_attention(self, packed):
        """Attention weights of CLS in every layer: [layers, B, h, L]."""
        with self.machine.autocast():
            batch, found = Batch(packed, self.config.window, self.machine), []
            x = half(self.longformer.embeddings(batch))
            for layer in self.layers:
                found.append(layer.attention.self.cls_weights(half(x), batch)[0])
                x = layer(x, batch)
        return torch.stack(found)


def cosine_logits(states, table):
    """RecFormer's score: cosine / 0.05 of states [B, H] with table rows [n, H]: float32 [B, n]."""
    table = table.float()
    scale = (TEMPERATURE * table.norm(dim=-1)).clamp_min(1e-12)
    return F.linear(F.normalize(states.float(), dim=-1), table) / scale
