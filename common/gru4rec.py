"""GRU4Rec: one GRU layer over a history. Hidasi et al., "Session-based Recommendations with
Recurrent Neural Networks" (2016), with the full softmax of its later versions.

Here to test the paper's word that its initialisation is universal, and to show what a third model
takes: this file and its line in common/models.py.
"""
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from common.layers import rows
from common.sequence import SequenceModel


class GRU4Rec(SequenceModel):
    """The state after each item scores the item after it. Sizes: ours, as SASRec's."""
    losses = 'ce', 'bce', 'sampled'
    dropout = 0.5

    def make(self):
        self.gru = nn.GRU(self.hidden, self.hidden)
        self.norm = nn.LayerNorm(self.hidden)

    def forward(self, x, lengths, wanted=...):
        """Rows of the item table [T, H], sequences one after the other -> states [T, H], or of the
        rows `wanted` [R] alone."""
        numbers = torch.arange(len(x)).split(lengths.tolist())
        longest_first = sorted(numbers, key=len, reverse=True)
        packed = pack_sequence(longest_first)  # the rows' numbers step after step
        order = self.machine.put(packed.data)
        x = self.drop(rows(x, order))
        # the norm of an item's row says nothing; its scale would saturate the gates
        # cuDNN would take float16 for any half type, in which small gradients are lost
        with torch.autocast('cuda', enabled=False):
            y, _ = self.gru(PackedSequence(self.norm(x), packed.batch_sizes))
        return rows(self.drop(y.data), order.argsort()[wanted])
