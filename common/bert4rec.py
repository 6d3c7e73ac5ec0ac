"""BERT4Rec without padding. Sun et al., "BERT4Rec" (2019), in the variant that the paper's code
trains. Letters as in common/sequence.py. The mask vector is a parameter of its own, always trained.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import newest, ragged
from common.layers import rows
from common.sequence import ALL, AttentionBlock, AttentionModel, softmax_loss

MASK_SHARE, LAST_ONLY = 0.15, 0.09  # of the items; of the draws (paper's code)


class BERT4RecBlock(AttentionBlock):
    """x = LN(x + Attn(x)); x = LN(x + FFN(x)); GELU, FFN 4H; dropout on each branch and once more
    at the end: the published, post-norm block."""
    eps, widening = 1e-5, 4

    def forward(self, x, layout, wanted=ALL):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        y = self.attention(x, x, layout, wanted)
        x = self.attention_norm(rows(x, wanted) + self.drop(y))
        y = self.outer(self.drop(F.gelu(self.inner(x))))
        return self.drop(self.ffn_norm(x + self.drop(y)))


class BERT4Rec(AttentionModel):
    """Masked items are predicted from both sides. Sizes: paper's code (output table not tied to the
    item table)."""
    block, heads, causal = BERT4RecBlock, 4, False
    dropout = 0.1
    batch = 256
    betas = 0.9, 0.999
    losses = ('masked',)
    least = 1

    def __init__(self, item_embedding, max_items):
        super().__init__(item_embedding, max_items)
        self.mask = nn.Parameter(torch.empty(self.hidden))
        self.output = nn.Linear(self.hidden, len(item_embedding.weight))
        self.draw(self.mask)
        self.draw_matrices()

    @staticmethod
    def draw(matrix):
        """Random start of a matrix, in place: N(0, 0.02) (ours, as the BERT4Rec paper)."""
        return nn.init.normal_(matrix, std=0.02)

    def scorer(self):
        """(table [n + 1, H], bias [n + 1]): score of item i = state . table[i] + bias[i]."""
        return self.output.weight, self.output.bias

    def forward(self, items, masked, lengths, wanted=ALL):
        """items [T] (any id where masked [T]) -> states [T, H], or of the rows `wanted` [R]."""
        x = torch.where(masked[:, None], self.mask, rows(self.item_embedding(), items))
        return self.encoded(x, lengths, wanted)

    def states(self, items, offsets):
        """State of a mask put after each history: [B, H]."""
        items, lengths = newest(items, offsets, self.max_items - 1)
        shown = self.ids(np.insert(items, np.cumsum(lengths), 0))
        lengths = lengths + 1
        return self(shown, shown == 0, lengths, self.ids(np.cumsum(lengths) - 1))

    def loss(self, items, offsets, rng, *_):
        """Mean cross-entropy over the masked items of training parts; zero where none was masked.

        15 % of the items, of those 80 % as mask, 10 % a random item, 10 % kept; in 9 % of the draws
        only the last, as mask.
        """
        items, lengths = newest(items, offsets, self.max_items)
        last = ragged(-lengths, lengths) == -1
        only_last = np.repeat(rng.random(len(lengths)) < LAST_ONLY, lengths)
        chosen = np.where(only_last, last, rng.random(len(items)) < MASK_SHARE)
        how = rng.random(len(items))
        how[only_last] = 0
        masked = chosen & (how < 0.8)
        other = chosen & ~masked & (how < 0.9)
        drawn = rng.integers(1, len(self.item_embedding.weight), len(items))
        shown = self.ids(np.where(other, drawn, items))
        places = np.flatnonzero(chosen)
        x = self(shown, self.machine.put(masked), lengths, self.ids(places))
        if not len(places):
            return x.sum() * 0
        return softmax_loss(x, *self.scorer(), self.ids(items[places]))
