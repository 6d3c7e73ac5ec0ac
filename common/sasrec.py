"""SASRec without padding. Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), in the
variant that the paper's code trains. Letters as in common/sequence.py.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import newest
from common.layers import dropout, rows
from common.sequence import ItemTable, Layout, SelfAttention, SequenceModel

EPS = 1e-8  # of its layer norms (paper's code)


class Block(nn.Module):
    """q = LN(x); x = q + Attn(q, x, x); x = LN(x); x = x + FFN(x): only queries are normalised
    before attention, as in the paper's code."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden, EPS), nn.LayerNorm(hidden, EPS)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner, self.outer = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.dropout = dropout

    def forward(self, x, layout, wanted=None):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        q = self.attention_norm(x)
        y = self.attention(q, x, layout, wanted)
        if wanted is not None:
            q = rows(q, wanted)
        x = self.ffn_norm(q + y)
        y = dropout(F.relu(self.inner(x)), self.dropout, self.training)
        return x + dropout(self.outer(y), self.dropout, self.training)


class SASRec(SequenceModel):
    """The state at each position scores the item after it. Defaults: paper's code."""

    def __init__(self, table, trainable=True, text=None, blocks=2, heads=1, dropout=0.5,
                 max_items=50):
        super().__init__()
        hidden = table.shape[1]
        self.max_items, self.dropout = max_items, dropout
        self.item_embedding = ItemTable(table, trainable, text)
        self.position_embedding = nn.Embedding(max_items, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden, EPS)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith('item_embedding'):
                nn.init.xavier_normal_(p)

    def embedded(self, x, layout):
        """Rows of the item table [T, H], scaled, with their positions."""
        x = x * self.norm.normalized_shape[0] ** 0.5
        x = x + self.position_embedding(layout.position)
        return dropout(x, self.dropout, self.training)

    def forward(self, x, lengths, last=False):
        """Rows of the item table [T, H] -> states [T, H], or of each newest item alone [B, H]."""
        layout = Layout(lengths, self.max_items, True, self.machine)
        x = self.embedded(x, layout)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.norm(self.blocks[-1](x, layout, layout.last if last else None))

    def states(self, items, offsets):
        """State after each history (its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        return self(rows(self.item_embedding(), self.ids(items)), lengths, last=True)

    def loss(self, items, offsets, rng, kind='bce', negatives=None):
        """See SequenceModel.next_item_loss."""
        return self.next_item_loss(items, offsets, kind, negatives)

    @torch.no_grad()
    def attention_weights(self, items):
        """Weights of the newest position over one history, heads averaged: items int [T], oldest
        first (at most max_items) -> [blocks, T]."""
        lengths = np.array([len(items)])
        layout = Layout(lengths, self.max_items, True, self.machine)
        x = self.embedded(rows(self.item_embedding(), self.ids(items)), layout)
        found = []
        for block in self.blocks:
            found.append(block.attention.weights(block.attention_norm(x)[-1:], x).mean(0)[0])
            x = block(x, layout)
        return torch.stack(found).cpu().numpy()
