"""GRU4Rec: one GRU layer over a history. Hidasi et al., "Session-based Recommendations with
Recurrent Neural Networks" (2016), with the full softmax of its later versions.

Here to test the paper's word that its initialisation is universal, and to show what a third model
takes: this file and its line in common/models.py.
"""
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from common.arrays import newest
from common.layers import dropout, rows
from common.sequence import ItemTable, SequenceModel


class GRU4Rec(SequenceModel):
    """The state after each item scores the item after it. Sizes: ours, as SASRec's."""
    losses = ('ce', 'bce')

    def __init__(self, table, trainable=True, text=None, dropout=0.5, max_items=50):
        super().__init__()
        hidden = table.shape[1]
        self.max_items, self.dropout = max_items, dropout
        self.item_embedding = ItemTable(table, trainable, text)
        self.gru = nn.GRU(hidden, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x, lengths):
        """Rows of the item table [T, H], sequences one after the other -> states [T, H]."""
        by_time, counts = time_order(lengths)
        order = self.ids(by_time)
        x = dropout(rows(x, order).float(), self.dropout, self.training)
        # the norm of an item's row says nothing; its scale would saturate the gates
        y, _ = self.gru(PackedSequence(self.norm(x), torch.from_numpy(counts)))
        back = self.ids(np.argsort(by_time))
        return rows(dropout(y.data, self.dropout, self.training), back)

    def states(self, items, offsets):
        """State after each history (its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        x = self(rows(self.item_embedding(), self.ids(items)), lengths)
        return x[self.ids(np.cumsum(lengths) - 1)]

    def loss(self, items, offsets, rng, kind='ce', negatives=None):
        """See SequenceModel.next_item_loss."""
        return self.next_item_loss(items, offsets, kind, negatives)


def time_order(lengths):
    """(rows in the order of a PackedSequence, how many sequences reach each step).

    Step after step, of the longest sequences first.
    """
    step = np.concatenate([np.arange(length) for length in lengths])
    rank = np.empty(len(lengths), np.int64)
    rank[np.argsort(-lengths, kind='stable')] = np.arange(len(lengths))
    order = np.lexsort((np.repeat(rank, lengths), step))
    return order, np.bincount(step)
