"""What SASRec, BERT4Rec and GRU4Rec share: item table, layout of attention, losses, negatives.

B = sequences, T = their items one after the other (no padding), H = hidden size, n = items (ids
1..n, 0 padding). Histories are ragged (items, offsets), oldest item first.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import ragged, row_numbers, take
from common.files import UserError
from common.layers import Model, additive, attend, half, rows

WIDTH = 64  # items of the sequences that share a square of attention; a matter of speed only


class ItemTable(nn.Module):
    """Item embeddings [n + 1, H], row 0 (padding) never used; `text` is a fixed matrix added to it
    (paper table 5)."""

    def __init__(self, weight, trainable=True, text=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
        self.register_buffer('text', text)

    def forward(self):
        return self.weight if self.text is None else self.weight + self.text


class SequenceModel(Model):
    """A model that predicts the next item; subclasses define `forward` and `states`.

    batch, betas: users of a step, Adam's (paper's code). losses: names for --loss, default first.
    least: training items a user needs.
    """
    batch, betas, losses, least = 128, (0.9, 0.98), ('bce', 'ce'), 2

    @staticmethod
    def random_table(n, hidden):
        """Random item table [n + 1, H], row 0 zeros: Xavier-normal (paper's code)."""
        table = nn.init.xavier_normal_(torch.empty(n + 1, hidden))
        table[0] = 0
        return table

    def scorer(self):
        """(table [n + 1, H], bias [n + 1] or None): score of item i = state . table[i] + bias[i]."""
        return self.item_embedding(), None

    @torch.no_grad()
    def all_states(self, items, offsets, at_once=512):
        """`states` of many histories, in parts and without training: float32 [B, H]."""
        training = self.training
        self.eval()
        parts = np.array_split(np.arange(len(offsets) - 1), -(-(len(offsets) - 1) // at_once))
        with self.machine.autocast():
            found = [self.states(*take(items, offsets, part)).float() for part in parts]
        self.train(training)
        return torch.cat(found)

    def next_item_loss(self, items, offsets, kind, negatives):
        """Mean loss over the positions of training parts: each predicts the item after it.

        `forward(x [T, H], lengths [B]) -> [T, H]` gives the states. kind 'ce': softmax over all n
        items. 'bce': the item after it against one negative; `negatives` [N] aligned with items.
        """
        # input: all but the last item of each (its newest max_items); target: the item after each
        lengths = np.minimum(np.diff(offsets) - 1, self.max_items)
        place = ragged(offsets[1:] - 1 - lengths, lengths)
        given, target = self.ids(items[place]), self.ids(items[place + 1])
        table = self.item_embedding()
        if kind == 'ce':
            x, table = LookUp.apply(table, given)
            return softmax_loss(self(x, lengths), table, None, target)
        three = torch.stack([given, target, self.ids(negatives[place + 1])])
        x, right, wrong = rows(table, three)  # at once: each look-up makes a gradient of a table
        x = self(x, lengths)
        up, down = (x * right).sum(1).float(), (x * wrong).sum(1).float()
        return F.softplus(-up).mean() + F.softplus(down).mean()

    def ids(self, items):
        """Item ids as an int64 tensor on the model's device."""
        return self.machine.put(items.astype(np.int64))


# ------------------------------------------------------------------------ attention

class Layout:
    """Where the T items of B sequences stand when attention lays them out; for every layer alike.

    Whole sequences fill S squares of W places, W = WIDTH or the longest: `items` [S, W] are rows of
    the packed items, `mask` [S, 1, W, W] is 0 where a query (second last) attends a key, else -inf;
    `place` [T] finds item t in the squares' outputs; `position` [T]: the newest item has the last
    position, max_items - 1; `last` [B] is the row of the newest.
    """

    def __init__(self, lengths, max_items, causal, machine):
        width, start, end = max(WIDTH, int(lengths.max())), [], 0
        for length in lengths.tolist():
            if end % width + length > width:  # it does not fit: it begins the next square
                end += -end % width
            start.append(end)
            end += length
        age = ragged(np.zeros(len(lengths), np.int64), lengths)  # 0 for the oldest
        place = np.repeat(start, lengths) + age
        squares = -(-end // width)
        owner, items = np.full((2, squares * width), -1)
        owner[place], items[place] = row_numbers(lengths), np.arange(len(place))
        put = machine.put
        self.items = put(np.maximum(items, 0).reshape(squares, width))
        self.place, self.last = put(place), put(np.cumsum(lengths) - 1)
        self.position = put(max_items - np.repeat(lengths, lengths) + age)
        owner = put(owner.reshape(squares, width))
        seen = owner[:, :, None] == owner[:, None]
        if causal:
            seen &= torch.ones(width, width, dtype=torch.bool, device=owner.device).tril()
        self.mask = additive(seen[:, None])


class SelfAttention(nn.Module):
    """Multi-head attention over packed rows: queries from one tensor, keys and values from another,
    both [T, H]. With `wanted` [R] only these rows' outputs are made: [R, H]."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        if hidden % heads:
            raise UserError(f'a width of {hidden} cannot be split among {heads} heads; '
                            'choose another --hidden')
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def in_squares(self, y, layout):
        """[T, H] -> [S, h, W, d]."""
        return rows(y, layout.items).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, q, x, layout, wanted=None):
        x_half = half(x)
        q = x_half if q is x else half(q)
        query, key = self.in_squares(self.query(q), layout), self.in_squares(self.key(x_half), layout)
        value = self.in_squares(self.value(x_half), layout)
        y = attend(query, key, value, layout.mask, self.dropout, self.training)
        place = layout.place if wanted is None else layout.place[wanted]
        return self.out(rows(y.transpose(1, 2).flatten(2).flatten(0, 1), place))

    def weights(self, q, x):
        """Attention weights of the queries q [Q, H] of one sequence over x [T, H]: [h, Q, T]."""
        query = self.query(q).unflatten(1, (self.heads, -1)).transpose(0, 1)
        key = self.key(x).unflatten(1, (self.heads, -1)).transpose(0, 1)
        return (query @ key.transpose(1, 2) / query.shape[2] ** 0.5).softmax(2)


# ------------------------------------------------------------------------ softmax over all items

class LookUp(torch.autograd.Function):
    """(rows `ids` of a table, the table for the softmax that follows): both gradients in one tensor
    as large as the table."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx, of_rows, of_table):
        # in place: SoftmaxLoss made of_table for this alone
        return of_table.index_add_(0, ctx.saved_tensors[0], of_rows), None


def softmax_loss(states, table, bias, target, chunk=2 ** 27):
    """Mean cross-entropy of targets [P] over items 1..n: states [P, H], table [n + 1, H], bias
    [n + 1] or None. At most `chunk` logits exist at a time: memory grows with items alone."""
    return SoftmaxLoss.apply(states, table, bias, target, max(1, chunk // len(table)))


class SoftmaxLoss(torch.autograd.Function):
    """Mean of cross-entropies, `size` positions at a time. The gradient is made along with the loss,
    from the same softmax: in autocast's type (float32 inside), as the products that follow need it.
    A probability that rounds to 0 costs 87, not inf."""

    @staticmethod
    def forward(ctx, states, table, bias, target, size):
        weight, share = half(table), 1 / len(states)
        total, d_states, d_table, d_bias = 0, [], None, None
        parts = zip(half(states).split(size), half(states * share).split(size),
                    target[:, None].split(size))
        for state, scaled, aim in parts:
            logits = F.linear(state, weight, bias)
            logits[:, 0] = -torch.inf  # padding is no candidate
            p = logits.softmax(1, dtype=logits.dtype)
            likely = p.gather(1, aim).float().clamp_min(torch.finfo(torch.float32).tiny)
            total = total - share * likely.log().sum()
            # gradient of the logits: the softmax, less one at the target
            p[torch.arange(len(aim), device=p.device), aim[:, 0]] -= 1
            d_states.append((p @ weight).float().mul_(share))
            if ctx.needs_input_grad[1]:
                d_table = added(d_table, p.T @ scaled)
            if ctx.needs_input_grad[2]:
                d_bias = added(d_bias, share * p.sum(0, dtype=torch.float32))
        ctx.gradients = torch.cat(d_states).to(states.dtype), d_table, d_bias
        return total

    @staticmethod
    def backward(ctx, gradient):
        made, ctx.gradients = ctx.gradients, None  # handed over, so that none need be copied
        scaled = [x if x is None else x.mul_(gradient) for x in made]
        return *scaled, None, None


def added(so_far, x):
    """so_far + x in float32, in place; x where there is none yet."""
    return x.float() if so_far is None else so_far.add_(x)


# ------------------------------------------------------------------------ negatives of training

def draw_training_negatives(items, offsets, n, rng):
    """For every item of the ragged rows one uniform item outside its row: [N] (a row of all n items
    gets any)."""
    row = row_numbers(np.diff(offsets))
    own = np.unique(row * (n + 1) + items)
    out = rng.integers(1, n + 1, len(items))
    for _ in range(100):
        again = np.flatnonzero(np.isin(row * (n + 1) + out, own))
        if not len(again):
            break
        out[again] = rng.integers(1, n + 1, len(again))
    return out

