"""SASRec without padding, and the pieces it shares with BERT4Rec: item table, layout, attention, losses.

Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), in the variant that the paper's code trains (SPEC: README,
"Models"). B = sequences, T = their items one after the other, L = longest, H = hidden size, n = items (ids 1..n, 0 padding).
Linear layers see the T real items only; attention is laid out as [B, L] with padded keys masked.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.files import UserError
from common.text import ragged, take
from common.training import dropout, half

SIZES = (4, 8, 16, 32)  # lengths up to which sequences share a rectangle of attention; a matter of speed only


class ItemTable(nn.Module):
    """Item embeddings [n + 1, H], row 0 (padding) never used; `text` is a fixed matrix added to it (paper table 5)."""

    def __init__(self, weight, trainable=True, text=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
        self.register_buffer('text', text)

    def forward(self):
        return self.weight if self.text is None else self.weight + self.text


class Layout:
    """Where the T items of B sequences stand when attention lays them out; the same for every layer.

    Sequences of similar length share a rectangle. `groups`: of each its rows of the packed items [b, L], and a mask
    [b, 1, L, L], True where a query (second last) attends a key; `place` [T] finds item t in all rectangles' outputs;
    `position` [T]: the newest item has the last position, max_items - 1; `last` [B] row of the newest.
    """

    def __init__(self, lengths, max_items, causal, device):
        put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
        begin, start, done, self.groups = np.cumsum(lengths) - lengths, np.zeros(len(lengths), np.int64), 0, []
        size = np.searchsorted(SIZES, lengths)
        for i in np.unique(size):
            rows = np.flatnonzero(size == i)
            columns = np.arange(lengths[rows].max())
            valid = columns < lengths[rows, None]
            mask = np.repeat(valid[:, None], len(columns), 1) & ((columns <= columns[:, None]) | (not causal))
            self.groups.append((put(begin[rows, None] + np.where(valid, columns, 0)), put(mask[:, None])))
            start[rows] = done + np.arange(len(rows)) * len(columns)
            done += valid.size
        inside = ragged(np.zeros(len(lengths), np.int64), lengths)
        self.place, self.last = put(np.repeat(start, lengths) + inside), put(begin + lengths - 1)
        self.position = put(max_items - np.repeat(lengths, lengths) + inside)


class SelfAttention(nn.Module):
    """Multi-head attention over packed rows: queries from one tensor, keys and values from another, both [T, H].
    With `rows` [R] only these rows' outputs are made: [R, H]."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        if hidden % heads:
            raise UserError(f'a width of {hidden} cannot be split among {heads} heads; choose another --hidden or --pca')
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def forward(self, q, x, layout, rows=None):
        q, x = (half(q), half(x)) if q is not x else [half(x)] * 2
        qkv, outputs = (self.query(q), self.key(x), self.value(x)), []
        for padded, mask in layout.groups:
            split = [F.embedding(padded, y).unflatten(2, (self.heads, -1)).transpose(1, 2) for y in qkv]  # [b, h, L, d]
            y = F.scaled_dot_product_attention(*split, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
            outputs.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
        place = layout.place if rows is None else layout.place[rows]
        return self.out(F.embedding(place, torch.cat(outputs)))


class Block(nn.Module):
    """q = LN(x); x = q + Attn(q, x, x); x = LN(x); x = x + FFN(x)  (pre-norm queries only, as the paper's code)."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(hidden, 1e-8), nn.LayerNorm(hidden, 1e-8)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner, self.outer, self.dropout = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden), dropout

    def forward(self, x, layout, rows=None):
        """[T, H] -> [T, H], or with `rows` [R] their outputs alone: [R, H]."""
        drop = lambda y: dropout(y, self.dropout, self.training)
        q = self.attention_norm(x)
        y = self.attention(q, x, layout, rows)
        x = self.ffn_norm((q if rows is None else F.embedding(rows, q)) + y)
        return x + drop(self.outer(drop(F.relu(self.inner(x)))))


class SASRec(nn.Module):
    """State at each position scores the item after it. Defaults: paper's code (2 blocks, 1 head, dropout 0.5, 50 items)."""
    causal, batch, betas = True, 128, (0.9, 0.98)

    def __init__(self, table, trainable=True, text=None, blocks=2, heads=1, dropout=0.5, max_items=50, tied=True):
        super().__init__()
        hidden = table.shape[1]
        self.max_items, self.dropout = max_items, dropout
        self.item_embedding = ItemTable(table, trainable, text)
        self.position_embedding = nn.Embedding(max_items, hidden)
        self.blocks = nn.ModuleList(Block(hidden, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden, 1e-8)
        for name, p in self.named_parameters():
            if p.dim() > 1 and not name.startswith('item_embedding'):
                nn.init.xavier_normal_(p)

    @staticmethod
    def random_table(n, hidden):
        """[n + 1, H] Xavier-normal, row 0 zeros (paper's code)."""
        table = nn.init.xavier_normal_(torch.empty(n + 1, hidden))
        table[0] = 0
        return table

    def forward(self, items, layout, rows=None):
        """items [T] -> states [T, H], or of `rows` alone [R, H]."""
        x = F.embedding(items, self.item_embedding()) * self.norm.normalized_shape[0] ** 0.5
        x = dropout(x + self.position_embedding(layout.position), self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.norm(self.blocks[-1](x, layout, rows))

    def states(self, items, offsets, device):
        """State after each history (ragged, oldest first, its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        layout = Layout(lengths, self.max_items, True, device)
        return self(torch.from_numpy(items).to(device), layout, layout.last)

    def scorer(self):
        """(table [n + 1, H], bias): score of item i = state . table[i] + bias[i]."""
        return self.item_embedding(), None

    def loss(self, items, offsets, rng, device, kind='bce', negatives=None):
        """Mean loss over the positions of training parts (ragged); each position predicts the item after it.

        kind 'ce': softmax over all n items. 'bce': the item after it against one negative, `negatives` aligned with items.
        """
        # input: all but the last item of each (its newest max_items); target: the item after each
        lengths = np.minimum(np.diff(offsets) - 1, self.max_items)
        rows = ragged(offsets[1:] - 1 - lengths, lengths)
        put = lambda x: torch.from_numpy(x.astype(np.int64)).to(device)
        x = self(put(items[rows]), Layout(lengths, self.max_items, True, device))
        table, target = self.item_embedding(), put(items[rows + 1])
        if kind == 'ce':
            return softmax_loss(x, table, None, target)
        score = lambda ids: (x * F.embedding(ids, table)).sum(1).float()
        return F.softplus(-score(target)).mean() + F.softplus(score(put(negatives[rows + 1]))).mean()


@torch.no_grad()
def all_states(model, items, offsets, device, autocast, at_once=512):
    """model.states of many histories, in parts: float32 [B, H]."""
    with autocast():
        return torch.cat([model.states(*take(items, offsets, rows), device).float()
                          for rows in np.array_split(np.arange(len(offsets) - 1), -(-(len(offsets) - 1) // at_once))])


def newest(items, offsets, most):
    """The last `most` items of each ragged row: (items int64 [T], lengths [B])."""
    lengths = np.minimum(np.diff(offsets), most)
    return items[ragged(offsets[1:] - lengths, lengths)].astype(np.int64), lengths


def softmax_loss(states, table, bias, target, chunk=2 ** 25):
    """Mean cross-entropy of targets [P] over items 1..n: states [P, H], table [n + 1, H], bias [n + 1] or None.

    At most `chunk` logits exist at a time: memory grows with items and not with positions x items.
    """
    return SoftmaxLoss.apply(states, table, bias, target, max(1, chunk // len(table))) / len(states)


class SoftmaxLoss(torch.autograd.Function):
    """Sum of cross-entropies, `size` positions at a time. The gradient is made along with the loss, from the same logits."""

    @staticmethod
    def forward(ctx, states, table, bias, target, size):
        weight, total = half(table), 0
        d_states = torch.empty_like(states, dtype=torch.float32)
        d_table, d_bias = (torch.zeros_like(x) if needed else None
                           for x, needed in zip((table, bias), ctx.needs_input_grad[1:]))
        for s, t, d in zip(half(states).split(size), target[:, None].split(size), d_states.split(size)):
            logits = F.linear(s, weight, bias).float()
            logits[:, 0] = -torch.inf  # padding is no candidate
            norm = logits.logsumexp(1, keepdim=True)
            total = total + (norm - logits.gather(1, t)).sum()
            p = logits.sub_(norm).exp_()
            p[torch.arange(len(t), device=p.device), t[:, 0]] -= 1  # gradient of the logits: softmax, less one at the target
            if d_bias is not None:
                d_bias += p.sum(0)
            p = p.to(weight.dtype)
            d.copy_(p @ weight)
            if d_table is not None:
                d_table += p.T @ s
        ctx.save_for_backward(d_states, d_table, d_bias)
        ctx.of = states.dtype
        return total

    @staticmethod
    def backward(ctx, gradient):
        states, table, bias = (None if x is None else gradient * x for x in ctx.saved_tensors)
        return states.to(ctx.of), table, bias, None, None


def draw_negatives(items, offsets, n, rng):
    """For every item of the ragged rows one uniform item outside its row: int32 [N] (a row of all n items gets any)."""
    row = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    own = np.unique(row * (n + 1) + items)
    out = rng.integers(1, n + 1, len(items))
    for _ in range(100):
        again = np.flatnonzero(np.isin(row * (n + 1) + out, own))
        if not len(again):
            break
        out[again] = rng.integers(1, n + 1, len(again))
    return out
