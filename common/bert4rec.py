"""BERT4Rec without padding. Sun et al., "BERT4Rec" (2019), in the variant that the paper's code
trains. Letters as in common/sequence.py. The mask vector is a parameter of its own, always trained.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import newest
from common.layers import dropout, rows
from common.sequence import ItemTable, Layout, SelfAttention, SequenceModel, softmax_loss

MASK_SHARE, LAST_ONLY = 0.15, 0.09  # of the items; of the draws (paper's code)


class Block(nn.Module):
    """x = LN(x + Attn(x)); x = LN(x + FFN(x)); GELU, FFN 4H; dropout on each branch and once more
    at the end: the published, post-norm block."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner, self.outer = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)
        self.dropout = dropout

    def forward(self, x, layout, wanted=None):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        y = self.attention(x, x, layout, wanted)
        if wanted is not None:
            x = rows(x, wanted)
        x = self.attention_norm(x + self.drop(y))
        y = self.outer(self.drop(F.gelu(self.inner(x))))
        return self.drop(self.ffn_norm(x + self.drop(y)))

    def drop(self, y):
        return dropout(y, self.dropout, self.training)


class BERT4Rec(SequenceModel):
    """Masked items are predicted from both sides. Defaults: paper's code (output table not tied to
    the item table)."""
    batch, betas, losses, least = 256, (0.9, 0.999), ('masked',), 1

    def __init__(self, table, trainable=True, text=None, blocks=2, heads=4, dropout=0.1,
                 max_items=50):
        super().__init__()
        if max_items < 2:
            raise ValueError('BERT4Rec needs two places at least, one for the mask')
        n, hidden = len(table) - 1, table.shape[1]
        self.max_items, self.dropout = max_items, dropout
        self.item_embedding = ItemTable(table, trainable, text)
        self.mask = nn.Parameter(torch.empty(hidden))
        self.position_embedding = nn.Embedding(max_items, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(blocks))
        self.output = nn.Linear(hidden, n + 1)
        for name, p in self.named_parameters():  # ours: N(0, 0.02), as the BERT4Rec paper
            if not name.startswith('item_embedding') and (p.dim() > 1 or name == 'mask'):
                nn.init.normal_(p, std=0.02)

    @staticmethod
    def random_table(n, hidden):
        """Random item table [n + 1, H], row 0 zeros: N(0, 0.02) (ours, as the BERT4Rec paper)."""
        table = torch.randn(n + 1, hidden) * 0.02
        table[0] = 0
        return table

    def scorer(self):
        """(table [n + 1, H], bias [n + 1]): score of item i = state . table[i] + bias[i]."""
        return self.output.weight, self.output.bias

    def forward(self, items, masked, lengths, wanted=None):
        """items [T] (any id where masked [T]) -> states [T, H]; 'last': of each sequence's last
        place [B, H]; row numbers [R]: of these alone [R, H]."""
        layout = Layout(lengths, self.max_items, False, self.machine)
        x = torch.where(masked[:, None], self.mask, rows(self.item_embedding(), items))
        x = x + self.position_embedding(layout.position)
        x = dropout(x, self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.blocks[-1](x, layout, layout.last if isinstance(wanted, str) else wanted)

    def states(self, items, offsets):
        """State of a mask put after each history: [B, H]."""
        items, lengths = newest(items, offsets, self.max_items - 1)
        shown = self.ids(np.insert(items, np.cumsum(lengths), 0))
        return self(shown, shown == 0, lengths + 1, 'last')

    def loss(self, items, offsets, rng, kind='masked', negatives=None):
        """Mean cross-entropy over the masked items of training parts; zero where none was masked.

        15 % of the items, of those 80 % as mask, 10 % a random item, 10 % kept; in 9 % of the draws
        only the last, as mask.
        """
        items, lengths = newest(items, offsets, self.max_items)
        last = np.zeros(len(items), bool)
        last[np.cumsum(lengths) - 1] = True
        only_last = np.repeat(rng.random(len(lengths)) < LAST_ONLY, lengths)
        chosen = np.where(only_last, last, rng.random(len(items)) < MASK_SHARE)
        how = rng.random(len(items))
        masked = chosen & (only_last | (how < 0.8))
        other = chosen & ~only_last & (how >= 0.8) & (how < 0.9)
        drawn = rng.integers(1, len(self.item_embedding.weight), len(items))
        shown = self.ids(np.where(other, drawn, items))
        places = np.flatnonzero(chosen)
        x = self(shown, self.machine.put(masked), lengths, self.ids(places))
        if not len(places):
            return x.sum() * 0
        return softmax_loss(x, *self.scorer(), self.ids(items[places]))
