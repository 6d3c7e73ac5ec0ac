"""What SASRec, BERT4Rec and GRU4Rec share: item table, states, losses, attention, negatives.

B = sequences, T = their items one after the other (no padding), H = hidden size, n = items (ids
1..n, 0 padding). Histories are ragged (items, offsets), oldest item first.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.arrays import newest, parts, ragged, row_numbers, take
from common.layers import Attention, Dropout, Model, additive, half, rounded, rows
from common.metrics import product_scorer, rank_counts

WIDTH = 64  # items of the sequences that share a square of attention; a matter of speed only
LOGITS = 2 ** 27  # that exist at a time in a softmax over all items: memory grows with items alone


class ItemTable(nn.Module):
    """Item embeddings [n + 1, H], row 0 (padding) never used; `text` is a fixed matrix added to it
    (paper table 5)."""

    def __init__(self, weight, text=None):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.register_buffer('text', text)

    def forward(self, ids=...):
        """Rows of these items, or of all."""
        found = rows(self.weight, ids)
        return found if self.text is None else found + rows(self.text, ids)


class SequenceModel(Model):
    """A model of histories over an ItemTable; subclasses define `make`, which makes their layers,
    and `forward`.

    `forward(x [T, H], lengths [B]) -> [T, H]`: from rows of the item table the states, each of
    which scores the item after it; with `wanted` [R] those of these rows alone, [R, H].

    batch, betas, dropout: users of a step, Adam's, share (paper's code). losses: names for --loss,
    default first. least: training items a user needs. draw: random start of a matrix, in place.
    """
    batch = 128
    betas = 0.9, 0.98
    losses = 'bce', 'ce', 'sampled'
    least = 2
    draw = staticmethod(nn.init.xavier_normal_)  # paper's code

    def __init__(self, item_embedding, max_items):
        super().__init__()
        self.item_embedding = item_embedding
        self.max_items = max_items
        self.hidden = item_embedding.weight.shape[1]
        self.drop = Dropout(self.dropout)
        self.make()

    def ids(self, items):
        """Item ids as an int64 tensor on the model's device."""
        return self.machine.put(items.astype(np.int64))

    def look_up(self, items):
        """What `forward` takes of these items."""
        return self.item_embedding(self.ids(items))

    def scorer(self):
        """(table [n + 1, H], bias [n + 1] or None): item i scores state . table[i] + bias[i]. The
        losses of few negatives know the item table alone: override both or neither."""
        return self.item_embedding(), None

    def states(self, items, offsets):
        """State after each history (its newest max_items used): [B, H]."""
        items, lengths = newest(items, offsets, self.max_items)
        return self(self.look_up(items), lengths, self.ids(np.cumsum(lengths) - 1))

    @torch.no_grad()
    def all_states(self, items, offsets, at_once=512):
        """`states` of many histories, in parts: float32 [B, H]. The model is in evaluation mode
        from here on."""
        self.eval()
        users = parts(len(offsets) - 1, at_once)
        with self.machine.autocast():
            found = [self.states(*take(items, offsets, part)) for part in users]
        return torch.cat(found).float()

    def ranks(self, data, which):
        """Ranks of the evaluated users' targets; see `rank_counts`, and `split` of a Dataset."""
        items, offsets, _ = data.split(which)
        score = product_scorer(self.all_states(items, offsets), *self.scorer())
        return rank_counts(score, data, which)

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
            x = self(self.item_embedding(given), lengths)
            return SoftmaxLoss.apply(x, *self.scorer(), target)
        if kind == 'bce':
            wrong = self.ids(negatives[place + 1])
        else:  # shared by all positions: a product instead of a look-up for each
            n = len(self.item_embedding.weight) - 1
            wrong = self.ids(1 + rng.choice(n, min(n, negatives), replace=False))
        ids = [given, target, wrong]
        found = self.item_embedding(torch.cat(ids))
        x, right, others = found.split(list(map(len, ids)))
        x = self(x, lengths)
        up = (x * right).sum(1).float()
        if kind == 'bce':
            down = (x * others).sum(1).float()
            return F.softplus(-up).mean() + F.softplus(down).mean()
        down = F.linear(x, others).float()
        same = target[:, None] == wrong
        share = (n - 1) / (~same).sum(1)
        down = down.masked_fill(same, -torch.inf).logsumexp(1) + share.log()
        return F.softplus(down - up).mean()


# ------------------------------------------------------------------------ attention

class AttentionModel(SequenceModel):
    """A model of positions and blocks. Subclasses name the class of a `block`, how many, their
    `heads`, and whether an item attends to older ones only (`causal`); in `make_head` they make
    what stands after the blocks."""
    depth = 2  # blocks (paper's code)

    def make(self):
        self.position_embedding = nn.Embedding(self.max_items, self.hidden)
        self.blocks = nn.ModuleList(self.block(self.hidden, self.heads, self.dropout)
                                    for _ in range(self.depth))
        self.make_head()
        for p in self.parameters():  # every matrix anew, but for the item table
            if p.dim() > 1 and p is not self.item_embedding.weight:
                self.draw(p)

    def forward(self, x, lengths, wanted=...):
        """Rows of the item table [T, H] -> what the last block gives: [T, H], or of the rows
        `wanted` [R] alone: [R, H]."""
        size = len(x)
        layout = Layout(lengths, self.max_items, self.causal, self.machine)
        x = self.drop(rounded(x + self.position_embedding(layout.position)))
        *before, last = self.blocks
        for block in before:
            x = block(x, layout)
        if wanted is not ...:
            size = len(wanted)
            wanted = rounded(wanted)
        return last(x, layout, wanted)[:size]


class AttentionBlock(nn.Module):
    """The layers of a block; subclasses say in `forward` how they are joined, and name `eps` of the
    norms and how many times as wide as a state the inner layer is (`widening`)."""

    def __init__(self, hidden, heads, dropout):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden, self.eps)
        self.ffn_norm = nn.LayerNorm(hidden, self.eps)
        self.attention = SelfAttention(hidden, heads, dropout)
        self.inner = nn.Linear(hidden, self.widening * hidden)
        self.outer = nn.Linear(self.widening * hidden, hidden)
        self.drop = Dropout(dropout)


class Layout:
    """Where the T items of B sequences stand when attention lays them out; for every layer alike.

    Whole sequences fill S squares of W places, W = WIDTH or the longest: `queries`, which are the
    `keys` too, [S, W]; `mask` [S, 1, W, W]; `place` [T], `rounded` (see `Attention.packed`).
    `position` [T]: the newest item has the last one, max_items - 1.
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
        self.queries = self.keys = machine.put(items)
        self.place = rounded(machine.put(place))
        self.position = machine.put(ragged(max_items - lengths, lengths))
        owner = machine.put(owner)
        seen = owner[:, :, None] == owner[:, None]
        if causal:
            seen = seen.tril()
        self.mask = additive(seen[:, None])


class SelfAttention(Attention):
    """Multi-head attention over packed rows: queries from one tensor, keys and values from another,
    both [T, H]. With `wanted` [R] only these rows' outputs are made: [R, H]."""
    more = 'out',

    def forward(self, q, x, layout, wanted=...):
        x_half = half(x)
        q = x_half if q is x else half(q)
        y = self.packed(self.query(q), self.key(x_half), self.value(x_half), layout, wanted)
        return self.out(y)

    def weights(self, q, x):
        """Attention weights of the queries q [Q, H] of one sequence over x [T, H]: [h, Q, T]."""
        query = self.split(self.query(q))
        key = self.split(self.key(x))
        scores = query @ key.mT / query.shape[2] ** 0.5
        return self.softmax(scores)


# ------------------------------------------------------------------------ softmax over all items

class SoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy of targets [P] over items 1..n: states [P, H], table [n + 1, H], bias
    [n + 1] or None. The gradient is made along with the loss, from the same softmax, in autocast's
    type (float32 inside): the next products need it so. A probability that rounds to 0 costs 87,
    not inf."""

    @staticmethod
    def forward(ctx, states, table, bias, target):
        size = LOGITS // len(table)
        weight = half(table)
        share = 1 / len(target)
        states = rounded(states)
        total = 0
        d_states = []
        d_table = torch.zeros_like(table) if ctx.needs_input_grad[1] else None
        d_bias = None if bias is None else torch.zeros_like(bias)
        whole = half(states), half(states * share), target
        for state, scaled, aim in zip(*(x.split(size) for x in whole)):
            logits = F.linear(state, weight, bias)
            logits[:, 0] = -torch.inf  # padding is no candidate
            p = logits.softmax(1, dtype=logits.dtype)
            one = torch.arange(len(aim), device=aim.device), aim
            at_least = p[one].float().clamp_min(torch.finfo(torch.float32).tiny)
            total = total - share * at_least.log().sum()
            p[one] -= 1  # gradient of the logits: the softmax, less one at the target
            p[len(aim):] = 0  # of what `rounded` added
            d_states.append((p @ weight).float().mul_(share))
            if d_table is not None:
                d_table += p.T @ scaled
            if d_bias is not None:
                d_bias += share * p.sum(0, dtype=torch.float32)
        ctx.gradients = torch.cat(d_states)[:len(target)].to(states.dtype), d_table, d_bias
        return total

    @staticmethod
    def backward(ctx, gradient):
        made, ctx.gradients = ctx.gradients, None  # handed over, so that none need be copied
        scaled = [x if x is None else x.mul_(gradient) for x in made]
        return *scaled, None


# ------------------------------------------------------------------------ negatives of training

def draw_training_negatives(items, offsets, n, rng):
    """For every item of the ragged rows one uniform item outside its row: [N] (a row of all n items
    gets any)."""
    row = row_numbers(np.diff(offsets)) * (n + 1)
    own = row + items
    out = own - row  # none is outside yet
    for _ in range(101):
        again = np.flatnonzero(np.isin(row + out, own))
        if not len(again):
            break
        out[again] = rng.integers(1, n + 1, len(again))
    return out
