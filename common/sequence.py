"""What SASRec, BERT4Rec and GRU4Rec share: item table, states, losses, attention, negatives.

B = sequences, T = their items one after the other (no padding), H = hidden size, n = items (ids
1..n, 0 padding). Histories are ragged (items, offsets), oldest item first.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import newest, parts, ragged, row_numbers, take
from common.files import UserError
from common.layers import Model, additive, attend, dropout, half, rows
from common.metrics import product_scorer, rank_counts

WIDTH = 64  # items of the sequences that share a square of attention; a matter of speed only
ALL = slice(None)  # of the rows


class ItemTable(nn.Module):
    """Item embeddings [n + 1, H], row 0 (padding) never used; `text` is a fixed matrix added to it
    (paper table 5)."""

    def __init__(self, weight, trainable=True, text=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone(), requires_grad=trainable)
        self.register_buffer('text', text)

    def forward(self):
        return self.weight if self.text is None else self.weight + self.text

    def of(self, ids):
        """Rows of these items."""
        found = rows(self.weight, ids)
        return found if self.text is None else found + rows(self.text, ids)


class SequenceModel(Model):
    """A model of histories over an ItemTable; subclasses define `forward`.

    `forward(x [T, H], lengths [B]) -> [T, H]`: from rows of the item table the states, each of
    which scores the item after it; with `wanted` [R] those of these rows alone, [R, H]. (BERT4Rec
    has another one, and its own `states` and `loss`.)

    batch, betas, dropout: users of a step, Adam's, share (paper's code). losses: names for --loss,
    default first. least: training items a user needs.
    """
    batch = 128
    betas = 0.9, 0.98
    losses = 'bce', 'ce', 'sampled'
    least = 2

    def __init__(self, item_embedding, max_items):
        super().__init__()
        self.item_embedding = item_embedding
        self.max_items = max_items
        self.hidden = item_embedding.weight.shape[1]

    @staticmethod
    def draw(matrix):
        """Random start of a matrix, in place: Xavier-normal (paper's code)."""
        return nn.init.xavier_normal_(matrix)

    @classmethod
    def random_table(cls, n, hidden):
        """Random item table [n + 1, H], row 0 zeros."""
        table = cls.draw(torch.empty(n + 1, hidden))
        table[0] = 0
        return table

    def draw_matrices(self):
        """Every matrix of the model anew, but for the item table."""
        for p in self.parameters():
            if p.dim() > 1 and p is not self.item_embedding.weight:
                self.draw(p)

    def drop(self, x):
        """Dropout."""
        return dropout(x, self.dropout, self.training)

    def ids(self, items):
        """Item ids as an int64 tensor on the model's device."""
        return self.machine.put(items.astype(np.int64))

    def scorer(self):
        """(table [n + 1, H], bias [n + 1] or None): item i scores state . table[i] + bias[i]."""
        return self.item_embedding(), None

    def states(self, items, offsets):
        """State after each history (its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        x = self.item_embedding.of(self.ids(items))
        return self(x, lengths, self.ids(np.cumsum(lengths) - 1))

    @torch.no_grad()
    def all_states(self, items, offsets, at_once=512):
        """`states` of many histories, in parts: float32 [B, H]. The model is in evaluation mode
        from here on."""
        self.eval()
        with self.machine.autocast():
            found = [self.states(*take(items, offsets, part))
                     for part in parts(len(offsets) - 1, at_once)]
        return torch.cat(found).float()

    def ranks(self, data, which, users=None, negatives=None):
        """Ranks of these users' targets among these negatives (default: the evaluated users, the
        data set's negatives); see `rank_counts` and the `split` of a Dataset."""
        items, offsets, targets = data.split(which, users)
        score = product_scorer(self.all_states(items, offsets), *self.scorer())
        negatives = data.negatives if negatives is None else negatives
        return rank_counts(score, data.n_items, targets, negatives, (items, offsets))

    def loss(self, items, offsets, rng, kind, negatives=None):
        """Mean loss over the positions of training parts: each predicts the item after it.

        kind 'ce': softmax over all n items. 'bce': the item after it against one negative;
        `negatives` [N] aligned with items. 'sampled': the softmax estimated from `negatives` items
        that `rng` draws for all positions; each that is not the target stands for as many of the
        n - 1 wrong items (log Q correction; Jean et al., "On Using Very Large Target Vocabulary",
        2015). All n drawn, it is 'ce'.
        """
        # input: all but the last item of each (its newest max_items); target: the item after each
        lengths = np.minimum(np.diff(offsets) - 1, self.max_items)
        place = ragged(offsets[1:] - 1 - lengths, lengths)
        given = self.ids(items[place])
        target = self.ids(items[place + 1])
        if kind == 'ce':
            x, table = LookUp.apply(self.item_embedding(), given)
            return softmax_loss(self(x, lengths), table, None, target)
        sampled = kind == 'sampled'
        n = len(self.item_embedding.weight) - 1
        if sampled:  # shared by all positions: a product instead of a look-up for each
            wrong = self.ids(1 + rng.choice(n, min(n, negatives), replace=False))
        else:
            wrong = self.ids(negatives[place + 1])
        found = self.item_embedding.of(torch.cat([given, target, wrong]))
        x, right, others = found.split([len(given), len(given), len(wrong)])
        x = self(x, lengths)
        up = (x * right).sum(1).float()
        if not sampled:
            down = (x * others).sum(1).float()
            return F.softplus(-up).mean() + F.softplus(down).mean()
        down = F.linear(half(x), half(others)).float()
        same = target[:, None] == wrong
        share = (n - 1) / (~same).sum(1)
        down = down.masked_fill(same, -torch.inf).logsumexp(1) + share.log()
        return F.softplus(down - up).mean()


# ------------------------------------------------------------------------ attention

class AttentionModel(SequenceModel):
    """A model of positions and blocks. Subclasses name the class of a `block`, how many, their
    `heads`, and whether an item attends to older ones only (`causal`)."""
    depth = 2  # blocks (paper's code)

    def __init__(self, item_embedding, max_items):
        super().__init__(item_embedding, max_items)
        self.position_embedding = nn.Embedding(max_items, self.hidden)
        self.blocks = nn.ModuleList(
            self.block(self.hidden, self.heads, self.dropout) for _ in range(self.depth))

    def placed(self, x, lengths):
        """(x [T, H] with its positions, the Layout): what the first block takes."""
        layout = Layout(lengths, self.max_items, self.causal, self.machine)
        return self.drop(x + self.position_embedding(layout.position)), layout

    def encoded(self, x, lengths, wanted=ALL):
        """What the last block gives: [T, H], or of the rows `wanted` [R] alone: [R, H]."""
        x, layout = self.placed(x, lengths)
        for block in self.blocks[:-1]:
            x = block(x, layout)
        return self.blocks[-1](x, layout, wanted)


class AttentionBlock(nn.Module):
    """The layers of a block; subclasses say in `forward` how they are joined, and name `eps` of the
    norms and how many times as wide as a state the inner layer is (`widening`)."""
    drop = SequenceModel.drop

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden, self.eps)
        self.ffn_norm = nn.LayerNorm(hidden, self.eps)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner = nn.Linear(hidden, self.widening * hidden)
        self.outer = nn.Linear(self.widening * hidden, hidden)
        self.dropout = dropout


class Layout:
    """Where the T items of B sequences stand when attention lays them out; for every layer alike.

    Whole sequences fill S squares of W places, W = WIDTH or the longest: `items` [S, W] are rows of
    the packed items, `mask` [S, 1, W, W] is 0 where a query (second last) attends a key, else -inf;
    `place` [T] finds item t in the squares' outputs; `position` [T]: the newest item has the last
    position, max_items - 1.
    """

    def __init__(self, lengths, max_items, causal, machine):
        width = max(WIDTH, int(lengths.max()))
        start = []
        end = 0
        for length in lengths.tolist():
            if end % width + length > width:  # it does not fit: it begins the next square
                end += -end % width
            start.append(end)
            end += length
        place = ragged(start, lengths)
        items = np.zeros((-(-end // width), width), np.int64)
        owner = items - 1  # whose place it is; -1: nobody's
        items.flat[place] = np.arange(len(place))
        owner.flat[place] = row_numbers(lengths)
        self.items = machine.put(items)
        self.place = machine.put(place)
        self.position = machine.put(ragged(max_items - lengths, lengths))
        owner = machine.put(owner)
        seen = owner[:, :, None] == owner[:, None]
        if causal:
            seen = seen.tril()
        self.mask = additive(seen[:, None])


class SelfAttention(nn.Module):
    """Multi-head attention over packed rows: queries from one tensor, keys and values from another,
    both [T, H]. With `wanted` [R] only these rows' outputs are made: [R, H]."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        if hidden % heads:
            raise UserError(f'a width of {hidden} cannot be split among {heads} heads; '
                            'choose another --hidden')
        self.heads = heads
        self.dropout = dropout
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

    def split(self, y):
        """[..., W, H] -> [..., h, W, d]."""
        return y.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def forward(self, q, x, layout, wanted=ALL):
        x_half = half(x)
        q = x_half if q is x else half(q)
        made = self.query(q), self.key(x_half), self.value(x_half)
        three = [self.split(rows(y, layout.items)) for y in made]
        y = attend(*three, layout.mask, self.dropout, self.training)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)
        return self.out(rows(y, layout.place[wanted]))

    def weights(self, q, x):
        """Attention weights of the queries q [Q, H] of one sequence over x [T, H]: [h, Q, T]."""
        query = self.split(self.query(q))
        key = self.split(self.key(x))
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
    """Mean of cross-entropies, `size` positions at a time. The gradient is made along with the
    loss, from the same softmax, in autocast's type (float32 inside): the next products need it so.
    A probability that rounds to 0 costs 87, not inf."""

    @staticmethod
    def forward(ctx, states, table, bias, target, size):
        weight = half(table)
        share = 1 / len(states)
        total = 0
        d_states = []
        d_table = table.new_zeros(table.shape) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else torch.zeros_like(bias)
        parts = zip(half(states).split(size), half(states * share).split(size),
                    target.split(size))
        for state, scaled, aim in parts:
            logits = F.linear(state, weight, bias)
            logits[:, 0] = -torch.inf  # padding is no candidate
            p = logits.softmax(1, dtype=logits.dtype)
            one = torch.arange(len(aim), device=aim.device), aim
            at_least = p[one].float().clamp_min(torch.finfo(torch.float32).tiny)
            total = total - share * at_least.log().sum()
            p[one] -= 1  # gradient of the logits: the softmax, less one at the target
            d_states.append((p @ weight).float().mul_(share))
            if d_table is not None:
                d_table += p.T @ scaled
            if d_bias is not None:
                d_bias += share * p.sum(0, dtype=torch.float32)
        ctx.gradients = torch.cat(d_states).to(states.dtype), d_table, d_bias
        return total

    @staticmethod
    def backward(ctx, gradient):
        made, ctx.gradients = ctx.gradients, None  # handed over, so that none need be copied
        scaled = [x if x is None else x.mul_(gradient) for x in made]
        return *scaled, None, None


# ------------------------------------------------------------------------ negatives of training

def draw_training_negatives(items, offsets, n, rng):
    """For every item of the ragged rows one uniform item outside its row: [N] (a row of all n items
    gets any)."""
    row = row_numbers(np.diff(offsets)) * (n + 1)
    own = row + items
    out = rng.integers(1, n + 1, len(items))
    for _ in range(100):
        again = np.flatnonzero(np.isin(row + out, own))
        if not len(again):
            break
        out[again] = rng.integers(1, n + 1, len(again))
    return out
