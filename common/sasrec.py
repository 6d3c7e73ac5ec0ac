"""SASRec without padding, and the pieces it shares with BERT4Rec: item table, layout, attention, losses.

Kang & McAuley, "Self-Attentive Sequential Recommendation" (2018), in the variant that the paper's code trains (SPEC: README,
"Models"). B = sequences, T = their items one after the other, L = longest, H = hidden size, n = items (ids 1..n, 0 padding).
Linear layers see the T real items only; attention is laid out in squares that whole sequences share.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.files import UserError
from common.layers import additive, attend, dropout, half
from common.text import ragged, take

WIDTH = 64  # items of the sequences that share a square of attention; a matter of speed only


class ItemTable(nn.Module):
    """Item embeddings [n + 1, H], row 0 (padding) never used; `text` is a fixed matrix added to it (paper table 5)."""

    def __init__(self, weight, trainable=True, text=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
        self.register_buffer('text', text)

    def forward(self):
        return self.weight if self.text is None else self.weight + self.text


class LookUp(torch.autograd.Function):
    """(rows `ids` of a table, the table for the softmax that follows): both gradients in one tensor as large as the table."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, rows, whole):
        return whole.index_add_(0, ctx.saved_tensors[0], rows), None  # in place: SoftmaxLoss made it for this alone


class Layout:
    """Where the T items of B sequences stand when attention lays them out; the same for every layer.

    Whole sequences fill S squares of W places, W = WIDTH or the longest: `items` [S, W] are rows of the packed items, `mask`
    [S, 1, W, W] is 0 where a query (second last) attends a key, else -inf; `place` [T] finds item t in the squares' outputs;
    `position` [T]: the newest item has the last position, max_items - 1; `last` [B] row of the newest.
    """

    def __init__(self, lengths, max_items, causal, device):
        put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
        width, start, end = max(WIDTH, int(lengths.max())), [], 0
        for n in lengths.tolist():
            end += -end % width if end % width + n > width else 0  # a sequence that does not fit begins the next square
            start.append(end)
            end += n
        inside = ragged(np.zeros(len(lengths), np.int64), lengths)
        place = np.repeat(start, lengths) + inside
        owner, items = np.full((2, -(-end // width) * width), -1)
        owner[place], items[place] = np.repeat(np.arange(len(lengths)), lengths), np.arange(len(place))
        owner = owner.reshape(-1, width)
        mask = (owner[:, :, None] == owner[:, None]) & (np.tri(width, dtype=bool) | (not causal))
        self.items, self.mask = put(np.maximum(items, 0).reshape(-1, width)), additive(mask[:, None], device)
        self.place, self.last = put(place), put(np.cumsum(lengths) - 1)
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
        split = lambda y: F.embedding(layout.items, y).unflatten(2, (self.heads, -1)).transpose(1, 2)         # [S, h, W, d]
        y = attend(split(self.query(q)), split(self.key(x)), split(self.value(x)), layout.mask, self.dropout, self.training)
        place = layout.place if rows is None else layout.place[rows]
        return self.out(F.embedding(place, y.transpose(1, 2).flatten(2).flatten(0, 1)))


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

    def forward(self, x, layout, rows=None):
        """Rows of the item table [T, H] -> states [T, H], or of `rows` alone [R, H]."""
        x = x * self.norm.normalized_shape[0] ** 0.5
        x = dropout(x + self.position_embedding(layout.position), self.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.norm(self.blocks[-1](x, layout, rows))

    def states(self, items, offsets, device):
        """State after each history (ragged, oldest first, its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        layout = Layout(lengths, self.max_items, True, device)
        return self(F.embedding(torch.from_numpy(items).to(device), self.item_embedding()), layout, layout.last)

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
        put = lambda ids: torch.from_numpy(ids.astype(np.int64)).to(device)
        layout, table, target = Layout(lengths, self.max_items, True, device), self.item_embedding(), put(items[rows + 1])
        if kind == 'ce':
            x, table = LookUp.apply(table, put(items[rows]))
            return softmax_loss(self(x, layout), table, None, target)
        ids = torch.stack([put(items[rows]), target, put(negatives[rows + 1])])
        x, right, wrong = F.embedding(ids, table)  # at once: each look-up would make a gradient as large as the table
        x = self(x, layout)
        score = lambda candidates: (x * candidates).sum(1).float()
        return F.softplus(-score(right)).mean() + F.softplus(score(wrong)).mean()


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


def softmax_loss(states, table, bias, target, chunk=2 ** 27):
    """Mean cross-entropy of targets [P] over items 1..n: states [P, H], table [n + 1, H], bias [n + 1] or None.

    At most `chunk` logits exist at a time: memory grows with items and not with positions x items.
    """
    return SoftmaxLoss.apply(states, table, bias, target, max(1, chunk // len(table)))


class SoftmaxLoss(torch.autograd.Function):
    """Mean of cross-entropies, `size` positions at a time. The gradient is made along with the loss, from the same softmax:
    in autocast's type (float32 inside), as the products that follow need it. A probability that rounds to 0 costs 87, not inf."""

    @staticmethod
    def forward(ctx, states, table, bias, target, size):
        weight, share, total, d_states, d_table, d_bias = half(table), 1 / len(states), 0, [], None, None
        add = lambda so_far, x: x.float() if so_far is None else so_far.add_(x)
        for s, scaled, t in zip(*(x.split(size) for x in (half(states), half(states * share), target[:, None]))):
            logits = F.linear(s, weight, bias)
            logits[:, 0] = -torch.inf  # padding is no candidate
            p = logits.softmax(1, dtype=logits.dtype)
            total = total - share * p.gather(1, t).float().clamp_min(torch.finfo(torch.float32).tiny).log().sum()
            p[torch.arange(len(t), device=p.device), t[:, 0]] -= 1  # gradient of the logits: softmax, less one at the target
            d_states.append((p @ weight).float().mul_(share))
            d_table = add(d_table, p.T @ scaled) if ctx.needs_input_grad[1] else None
            d_bias = add(d_bias, share * p.sum(0, dtype=torch.float32)) if ctx.needs_input_grad[2] else None
        ctx.gradients = torch.cat(d_states).to(states.dtype), d_table, d_bias
        return total

    @staticmethod
    def backward(ctx, gradient):
        made, ctx.gradients = ctx.gradients, None  # handed over, so that they need not be copied
        return *(x if x is None or gradient == 1 else gradient * x for x in made), None, None


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
