"""SASRec without padding. Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), in the
variant that the paper's code trains. Letters as in common/sequence.py.
"""
import torch
from torch import nn

from common.layers import rows, watched
from common.sequence import AttentionBlock, AttentionModel, SelfAttention


class SASRecBlock(AttentionBlock):
    """q = LN(x); x = q + Attn(q, x, x); x = LN(x); x = x + FFN(x): only queries are normalised
    before attention, as in the paper's code."""
    eps, widening = 1e-8, 1  # paper's code

    def forward(self, x, layout, wanted=...):
        """[T, H] -> [T, H], or with `wanted` [R] the outputs of these rows alone: [R, H]."""
        q = self.attention_norm(x)
        y = self.attention(q, x, layout, wanted)
        x = self.ffn_norm(rows(q, wanted) + y)
        y = self.drop(torch.relu(self.inner(x)))
        return x + self.drop(self.outer(y))


class SASRec(AttentionModel):
    """The state at each position scores the item after it. Sizes: paper's code."""
    block, heads, causal = SASRecBlock, 1, True
    dropout = 0.5

    def make_head(self):
        self.norm = nn.LayerNorm(self.hidden, SASRecBlock.eps)

    def forward(self, x, lengths, wanted=...):
        """Rows of the item table [T, H], which are scaled -> states [T, H], or of the rows
        `wanted` [R] alone."""
        return self.norm(super().forward(x * self.hidden ** 0.5, lengths, wanted))

    @torch.no_grad()
    def attention_weights(self, items):
        """Weights of the newest position over one history, heads averaged: items int [T], oldest
        first -> [blocks, the newest max_items of them], newest first."""
        seen = watched(SelfAttention, self.states, items, [0, len(items)])
        weights = [module.weights(q[-1:], x).mean(0)[0] for module, (q, x, *_), _ in seen]
        return torch.stack(weights).flip(1)
