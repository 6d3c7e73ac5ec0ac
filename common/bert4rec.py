"""BERT4Rec without padding. Sun et al., "BERT4Rec" (2019), in the variant that the paper's code
trains. Letters as in common/sequence.py. The mask vector is a parameter of its own.
"""
from functools import partial

import numpy as np
import torch
from torch import nn

from common.arrays import newest, ragged, row_numbers
from common.layers import rows
from common.sequence import AttentionBlock, AttentionModel, SoftmaxLoss

MASK_SHARE = 0.15  # of the items (paper's code)
LAST_ONLY = 0.09  # of the draws (paper's code)


class BERT4RecBlock(AttentionBlock):
    """x = LN(x + Attn(x)); x = LN(x + FFN(x)); GELU, FFN 4H; dropout on each branch and once more
    at the end: the published, post-norm block."""
    eps = 1e-5
    widening = 4

    def forward(self, x, layout, wanted=...):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        y = self.attention(x, x, layout, wanted)
        x = self.attention_norm(rows(x, wanted) + self.drop(y))
        y = nn.functional.gelu(self.inner(x))
        y = self.outer(self.drop(y))
        y = self.ffn_norm(x + self.drop(y))
        return self.drop(y)


class BERT4Rec(AttentionModel):
    """Masked items are predicted from both sides. Sizes: paper's code (output table not tied to the
    item table)."""
    block = BERT4RecBlock
    heads = 4
    causal = False
    dropout = 0.1
    batch = 256
    betas = 0.9, 0.999
    losses = ('masked',)
    least = 1
    draw = staticmethod(partial(nn.init.normal_, std=0.02))  # ours, as the BERT4Rec paper

    def make_head(self):
        self.mask = nn.Parameter(torch.empty(self.hidden))
        self.output = nn.Linear(self.hidden, len(self.item_embedding.weight))
        self.draw(self.mask)

    def scorer(self):
        """(table [n + 1, H], bias [n + 1]): score of item i = state . table[i] + bias[i]."""
        return self.output.weight, self.output.bias

    def look_up(self, items):
        """What `forward` takes of these items: the mask vector where 0 stands for one."""
        ids = self.ids(items)
        return torch.where((ids == 0)[:, None], self.mask, self.item_embedding(ids))

    def states(self, items, offsets):
        """State of a mask put after each history: [B, H]."""
        shown = np.insert(items, offsets[1:], 0)
        return super().states(shown, offsets + np.arange(len(offsets)))

    def loss(self, items, offsets, rng, *_):
        """Mean cross-entropy over the masked items of training parts. A sequence of which none was
        masked changes nothing and is left out.

        15 % of the items (where the whole batch had none, its last), of those 80 % as mask, 10 % a
        random item, 10 % kept; in 9 % of the draws only the last, as mask.
        """
        items, lengths = newest(items, offsets, self.max_items)
        last = ragged(-lengths, lengths) == -1
        row = row_numbers(lengths)
        only_last = (rng.random(len(lengths)) < LAST_ONLY)[row]
        chosen = np.where(only_last, last, rng.random(len(items)) < MASK_SHARE)
        chosen[-1] |= not chosen.any()
        how = rng.random(len(items))
        how[only_last] = 0
        drawn = rng.integers(1, len(self.item_embedding.weight), len(items))
        shown = np.where(chosen & (how < 0.9), drawn, items)
        shown[chosen & (how < 0.8)] = 0
        some = np.unique(row[chosen])
        kept = np.isin(row, some)
        places = np.flatnonzero(chosen[kept])
        x = self(self.look_up(shown[kept]), lengths[some], self.ids(places))
        return SoftmaxLoss.apply(x, *self.scorer(), self.ids(items[chosen]))


class BERT4RecTied(BERT4Rec):
    """Items are scored by the item table, as in BERT4Rec's own paper."""

    def scorer(self):
        """(item table [n + 1, H], bias [n + 1])."""
        return self.item_embedding(), self.output.bias

    def make_head(self):
        super().make_head()
        self.output.weight = self.item_embedding.weight
