"""BERT4Rec without padding. Sun et al., "BERT4Rec" (2019), in the variant that the paper's code trains.

Letters as in common/sasrec.py. The mask vector is a parameter of its own, always trained; it is row n + 1 of no table.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.layers import dropout
from common.sasrec import ItemTable, Layout, SelfAttention, newest, softmax_loss

MASK_SHARE, LAST_ONLY = 0.15, 0.09  # of the items; of the draws (paper's code)


class Block(nn.Module):
    """x = x + Attn(LN(x)); x = x + FFN(LN(x)); GELU, FFN 4H."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner, self.outer, self.dropout = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden), dropout

    def forward(self, x, layout, rows=None):
        """[T, H] -> [T, H], or with `rows` [R] their outputs alone: [R, H]."""
        drop = lambda y: dropout(y, self.dropout, self.training)
        y = self.attention_norm(x)
        x = (x if rows is None else F.embedding(rows, x)) + drop(self.attention(y, y, layout, rows))
        return drop(x + drop(self.outer(drop(F.gelu(self.inner(self.ffn_norm(x)))))))


class BERT4Rec(nn.Module):
    """Masked items are predicted from both sides. Defaults: paper's code (2 blocks, 4 heads, dropout 0.1, 50 places)."""
    causal, batch, betas = False, 256, (0.9, 0.999)

    def __init__(self, table, trainable=True, text=None, blocks=2, heads=4, dropout=0.1, max_items=50, tied=False):
        super().__init__()
        n, hidden = len(table) - 1, table.shape[1]
        self.max_items, self.dropout = max_items, dropout
        self.item_embedding = ItemTable(table, trainable, text)
        self.mask = nn.Parameter(torch.empty(hidden))
        self.position_embedding = nn.Embedding(max_items, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(blocks))
        self.output = None if tied else nn.Linear(hidden, n + 1)
        self.output_bias = nn.Parameter(torch.zeros(n + 1)) if tied else None
        for name, p in self.named_parameters():  # ours: N(0, 0.02), as the BERT4Rec paper; the mask as a random item's row
            if not name.startswith('item_embedding') and (p.dim() > 1 or name == 'mask'):
                nn.init.normal_(p, std=0.02)

    @staticmethod
    def random_table(n, hidden):
        """[n + 1, H] N(0, 0.02), row 0 zeros."""
        table = torch.randn(n + 1, hidden) * 0.02
        table[0] = 0
        return table

    def forward(self, items, masked, layout, rows=None):
        """items [T] (any id where masked [T] is True) -> states [T, H], or of `rows` alone [R, H]."""
        x = torch.where(masked[:, None], self.mask, F.embedding(items, self.item_embedding()))
        x = dropout(x + self.position_embedding(layout.position), self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.blocks[-1](x, layout, rows)

    def states(self, items, offsets, device):
        """State of a mask put after each history (ragged, oldest first): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items - 1)
        ends = np.cumsum(lengths)
        layout = Layout(lengths + 1, self.max_items, False, device)
        full = torch.from_numpy(np.insert(items, ends, 0)).to(device)
        return self(full, full == 0, layout, layout.last)

    def scorer(self):
        """(table [n + 1, H], bias [n + 1]): score of item i = state . table[i] + bias[i]."""
        return (self.item_embedding(), self.output_bias) if self.output is None else (self.output.weight, self.output.bias)

    def loss(self, items, offsets, rng, device, kind='masked', negatives=None):
        """Mean cross-entropy over the masked items of training parts (ragged); zero where none was masked.

        15 % of the items, of those 80 % as mask, 10 % a random item, 10 % kept; in 9 % of the draws only the last, as mask.
        """
        items, lengths = newest(items, offsets, self.max_items)
        last = np.zeros(len(items), bool)
        last[np.cumsum(lengths) - 1] = True
        only_last = np.repeat(rng.random(len(lengths)) < LAST_ONLY, lengths)
        chosen = np.where(only_last, last, rng.random(len(items)) < MASK_SHARE)
        how = rng.random(len(items))
        masked, other = chosen & (only_last | (how < 0.8)), chosen & ~only_last & (how >= 0.8) & (how < 0.9)
        put = lambda x: torch.from_numpy(x).to(device)
        shown = np.where(other, rng.integers(1, len(self.item_embedding.weight), len(items)), items)
        rows = np.flatnonzero(chosen)
        x = self(put(shown), put(masked), Layout(lengths, self.max_items, False, device), put(rows))
        return softmax_loss(x, *self.scorer(), put(items[rows])) if len(rows) else x.sum() * 0
