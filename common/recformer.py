"""RecFormer: a Longformer with token-type and item-position embeddings, computed without padding.

Li et al., "Text Is All You Need" (2023), on Beltagy et al., "Longformer" (2020). B = sequences, T =
their tokens one after the other, L = longest sequence, H = hidden size, h = heads, d = H / h.
Modules are named as transformers' Longformer names its tensors, so published state dicts load by
name. What saves time, without changing a result beyond rounding:
- linear layers see the T real tokens (in bfloat16 a multiple of 64: `rounded`); only attention is
  laid out in padded blocks (class Batch);
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
from torch.nn import Embedding, LayerNorm, Linear, ModuleDict
from torch.utils.checkpoint import checkpoint

from common.arrays import parts, take
from common.layers import Attention, Dropout, Model, additive, half, rounded, rows, watched
from common.progress import progress
from common.text import pack

RECTANGLE = 160  # up to this length attention is one rectangle, all against all: speed only
BLOCK = 63   # queries per block of the windowed attention, to 128 keys with CLS: speed only
TEMPERATURE = 0.05  # RecFormer
KEPT = 4  # passes whose worth of CLS is encoded at once: time against memory


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


class Batch:
    """Packed sequences (text.Packed) on a device, and the layout of their attention, the same for
    every layer. Everything but the tokens is made on the device, from the lengths.

    Global attention: `all` [B, L] are rows of the packed tokens, `real` [B, L] those that exist.
    Windowed attention: N blocks of Q queries against K keys. `queries` [N, Q] and `keys` [N, K] are
    rows of the packed tokens; `mask` [N, 1, Q, K] and `place` [T], `rounded`: see
    `Attention.packed`. Every query attends the CLS of its sequence (column 0) and, as distances
    allow, window / 2 tokens to each side. Where all sequences are short a block is a whole
    sequence; else the keys are CLS and what the block's windows reach.
    """

    def __init__(self, packed, window, machine):
        self.tokens, self.types, self.item_positions = map(machine.put, packed[:3])
        lengths = machine.put(packed.lengths)
        arange = partial(torch.arange, device=machine.device)
        row = arange(len(packed.tokens))
        owner = torch.repeat_interleave(lengths, output_size=len(row))  # sequence of a token
        self.cls = lengths.cumsum(0) - lengths
        self.positions = row - self.cls[owner]
        longest = packed.lengths.max()
        column = arange(longest)
        self.real = column < lengths[:, None]
        self.all = self.cls[:, None] + column * self.real

        side = window // 2
        if longest <= RECTANGLE:
            width = longest
            reach = arange(1, longest)
        else:
            width = BLOCK
            reach = arange(-side, width + side)
        blocks = -(-lengths // width)
        first = blocks.cumsum(0) - blocks  # block of each sequence
        self.place = rounded(first[owner] * width + self.positions)
        count = np.sum(-(-packed.lengths // width))
        of_block = torch.repeat_interleave(blocks, output_size=count)  # its sequence
        begin = ((arange(count) - first[of_block]) * width)[:, None]
        query = begin + arange(width)       # a token's number in its
        key = F.pad(begin + reach, (1, 0))  # sequence; column 0 is CLS
        cls = self.cls[of_block, None]
        last = lengths[of_block, None] - 1
        self.queries = cls + query.minimum(last)
        self.keys = cls + key.clamp_min(0).minimum(last)
        near = (query[0, :, None] - key[0]).abs() <= side  # the same in every block
        known = (key > 0) & (key <= last)
        near[:, 0] = known[:, 0] = True
        # a sum is the only pass over the mask's size: 0 + 0, or -inf from either side
        self.mask = (additive(near) + additive(known)[:, None])[:, None]


# ------------------------------------------------------------------------ layers

class WindowedAttention(Attention):
    """Windowed attention of all tokens, global attention of each CLS, each with own projections.
    Weights get no dropout (README, differences)."""
    more = 'query_global', 'key_global', 'value_global'

    def forward(self, x, batch, wanted):
        """[T, H] -> [T, H], or of the rows `wanted` [R]: [R, H]. The rows of all CLS need no
        windowed attention."""
        if wanted is batch.cls:
            return self.cls(x, batch)
        y = self.packed(self.query(x), self.key(x), self.value(x), batch)
        y = y.index_copy(0, batch.cls, self.cls(x, batch))  # a CLS was as any other token
        return rows(y, wanted)

    def cls(self, x, batch):
        """Global attention of each sequence's CLS over all its tokens: [B, H]."""
        each = self.heads, -1
        q = self.query_global(rows(x, batch.cls)).unflatten(1, each)    # [B, h, d]
        # the key's bias adds the same to every score of a head: it drops out of the softmax
        key = self.key_global.weight.unflatten(0, each)                 # [h, d, H]
        q = torch.einsum('bhd,hdk->bhk', q, key) / q.shape[-1] ** 0.5   # [B, h, H]
        states = rows(x, batch.all)
        scores = (q @ states.mT).float()
        scores = scores.masked_fill(~batch.real[:, None], -torch.inf)   # [B, h, L]
        mixed = self.softmax(scores).to(states.dtype) @ states          # [B, h, H]
        value = self.value_global.weight.unflatten(0, each)             # [h, d, H]
        out = torch.einsum('bhk,hdk->bhd', mixed, value)
        return out.flatten(1) + self.value_global.bias.to(out.dtype)


def output(inside, c):
    """The last linear map of a branch, and the norm of its sum with what went in."""
    return ModuleDict({'dense': Linear(inside, c.hidden),
                       'LayerNorm': LayerNorm(c.hidden, c.layer_norm_eps)})


class Layer(nn.Module):
    """x = LN(x + Attn(x)); x = LN(x + FFN(x)); GELU; dropout on each branch."""

    def __init__(self, c):
        super().__init__()
        self.attention = ModuleDict({'self': WindowedAttention(c.hidden, c.heads),
                                     'output': output(c.hidden, c)})
        self.output = output(c.intermediate, c)
        self.intermediate = ModuleDict({'dense': Linear(c.hidden, c.intermediate)})
        self.drop = Dropout(c.dropout)

    def forward(self, x, batch, wanted=...):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        y = self.attention.self(half(x), batch, wanted)
        y = self.attention.output.dense(y)
        x = self.attention.output.LayerNorm(self.drop(y) + rows(x, wanted))
        y = self.output.dense(F.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(self.drop(y) + x)


# ------------------------------------------------------------------------ the model

class RecFormer(Model):
    """words: its tokenizer (text.Words); stage: 'lf', 'pt', 'ft1', 'ft2' or 'published'; plm: the
    language model it began as, as typed; items, data: stage-FT's item table [n + 1, H] and the
    fingerprint of its dataset."""
    stage = 'lf'
    words = plm = data = None

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        width = c.hidden
        layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        embeddings = ModuleDict({
            'word_embeddings': Embedding(c.vocab_size, width),
            'position_embeddings': Embedding(c.positions, width),
            'token_type_embeddings': Embedding(4, width),  # special, name, value, padding
            'item_position_embeddings': Embedding(c.max_items + 1, width),  # 0 is CLS
            'LayerNorm': LayerNorm(width, c.layer_norm_eps)})
        self.longformer = ModuleDict({'embeddings': embeddings,
                                      'encoder': ModuleDict({'layer': layers})})
        self.lm_head = ModuleDict({'dense': Linear(width, width),
                                   'layer_norm': LayerNorm(width, c.layer_norm_eps)})
        self.lm_head.bias = nn.Parameter(torch.zeros(c.vocab_size))
        self.drop = Dropout(c.dropout)
        self.register_buffer('items', None, False)  # moves along, but is no part of state_dict()

    @property
    def word_table(self):
        return self.longformer.embeddings.word_embeddings.weight

    def pack(self, items, offsets, tokens):
        """Histories (ragged, oldest first) as Packed, cut to this model's limits."""
        return pack(items, offsets, tokens, self.words.cls, self.config.max_items,
                    self.config.max_tokens)

    def pack_items(self, ids, tokens):
        """Each of these items alone, as Packed."""
        return pack(ids, np.arange(len(ids) + 1), tokens, self.words.cls)

    def forward(self, packed, wanted=None, *_):
        """Last layer's states of Packed sequences: of each CLS [B, H], or of the rows `wanted`
        (their numbers, an array [R]) [R, H]. What follows is for `checkpoint` alone."""
        with self.machine.autocast():
            batch = Batch(packed, self.config.window, self.machine)
            given = self.longformer.embeddings
            x = (given.word_embeddings(batch.tokens)
                 + given.position_embeddings(batch.positions + self.config.position_offset)
                 + given.token_type_embeddings(batch.types)
                 + given.item_position_embeddings(batch.item_positions))
            x = rounded(half(self.drop(given.LayerNorm(x))))
            *before, last = self.longformer.encoder.layer
            for layer in before:
                x = layer(x, batch)
            if wanted is None:
                return last(x, batch, batch.cls)
            return last(x, batch, rounded(self.machine.put(wanted)))[:len(wanted)]

    def mlm_logits(self, states):
        """[R, H] -> [R, vocabulary]; the output table is the word table."""
        with self.machine.autocast():
            head = self.lm_head
            x = head.layer_norm(F.gelu(head.dense(rounded(states))))
            return F.linear(x, self.word_table, head.bias)[:len(states)]

    def passes(self, packed):
        """Numbers of the sequences that this process computes, each once, in groups of similar
        length with at most the machine's micro_tokens (at least one sequence). Where none has more
        than RECTANGLE tokens they share one rectangle, whose padding is counted."""
        lengths = packed.lengths
        most = self.machine.micro_tokens
        left = self.machine.share(len(lengths))
        left = left[np.argsort(-lengths[left], kind='stable')]
        groups = []
        while len(left):
            longest = lengths[left[0]]
            size = most // longest
            if longest > RECTANGLE:
                size = np.searchsorted(np.cumsum(lengths[left]), most, 'right')
            group, left = np.split(left, [max(1, size)])
            groups.append(group)
        return groups

    def encode(self, packed, label=None):
        """CLS states: float32 [B, H] on the device. The machine's processes encode a share each,
        and a gradient flows into a process's own rows alone.

        Gradient caching: a share of at most KEPT passes (on a CPU) is one; of a larger one nothing
        is kept, and each pass is made again for the gradient, with the dropout that it had:
        memory is that of one pass. label: of a progress bar, where no gradient is asked for: passes
        stay as they are.
        """
        out = torch.zeros(len(packed.lengths), self.config.hidden, device=self.machine.device)
        groups = self.passes(packed)
        most = KEPT if self.machine.device.type == 'cpu' else 1  # a GPU's pass is large
        run = self
        if not label and len(groups) > most:
            run = partial(checkpoint, self, use_reentrant=False)
        elif not label and groups:
            groups = [np.sort(np.concatenate(groups))]
        for group in progress(groups, desc=label, disable=not label):
            part = packed.rows(group)
            x = run(part, None, self.word_table)  # the last says whose random numbers
            out.index_copy_(0, self.machine.put(group), x.float())
        return self.machine.sum(out)

    @torch.no_grad()
    def encode_histories(self, items, offsets, tokens, label, at_once=20_000):
        """CLS state of each history (ragged): float32 [B, H] on the device; packed in parts. The
        model is in evaluation mode from here on."""
        self.eval()
        histories = (take(items, offsets, part) for part in parts(len(offsets) - 1, at_once))
        found = [self.encode(self.pack(*some, tokens), label) for some in histories]
        return torch.cat(found)

    @torch.no_grad()
    def encode_items(self, tokens):
        """Embeddings of all items: float32 [n + 1, H] on the device, row 0 zeros. The model is in
        evaluation mode from here on."""
        packed = self.pack_items(np.arange(1, len(tokens.offsets) - 1), tokens)
        found = self.eval().encode(packed, 'encode items')
        return F.pad(found, (0, 0, 1, 0))

    def cls_attention(self, packed):
        """Attention weights of CLS in every layer: [layers, B, h, L]."""
        seen = watched(nn.Softmax, self, packed)
        return torch.stack([weights for _, _, weights in seen])


def cosine_logits(states, table):
    """RecFormer's score: cosine / 0.05 of states [B, H] with table rows [n, H]: float32 [B, n]."""
    scale = (TEMPERATURE * table.norm(dim=-1)).clamp_min(1e-12)
    return F.linear(F.normalize(states.float(), dim=-1), table) / scale
