"""SASRec, BERT4Rec and GRU4Rec against plain implementations, and train_seq.py's runs.

Run: python -m pytest tests/test_seq_models.py
"""
import contextlib
import json
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common.runs
import train_seq
from common import bert4rec, initial, layers, sequence, training
from common.arrays import take
from common.bert4rec import BERT4Rec, BERT4RecBlock, BERT4RecTied
from common.data import load, prepare
from common.files import (ROOT, UserError, command, load_pt, runs_root, save_json, save_pt,
                          stop)
from common.gru4rec import GRU4Rec
from common.layers import Machine
from common.metrics import product_scorer, rank_counts
from common.models import MODELS, load_seq
from common.runs import changed_code, code_of, load_rows, read_ranks, read_row
from common.sasrec import SASRec
from common.sequence import (ItemTable, Layout, SelfAttention, SoftmaxLoss,
                             draw_training_negatives)
from common.training import Training
from tests.toy import canonical

N, H = 20, 16
KINDS = [SASRec, BERT4Rec, GRU4Rec]
LOSSES = {'sasrec': 'bce', 'bert4rec': 'masked', 'bert4rec-tied': 'masked',
          'gru4rec': 'ce'}  # default ones
TABLE = 'item_embedding.weight'


def model(kind, text=None):
    torch.manual_seed(0)
    return kind(ItemTable(random_table(kind), text), 10).eval()


def random_table(kind, n=N, hidden=H):
    return initial.starting_tables(kind, n, None, {'seed': 0, 'hidden': hidden})[0]


def shaken(m):
    """The model with no parameter left at a value that hides a mistake (norms, biases)."""
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return m


def ragged_of(*rows):
    items = np.concatenate([np.array(row, np.int32) for row in rows])
    return items, np.cumsum([0] + [len(row) for row in rows])


def layout_of(lengths, causal):
    return Layout(np.array(lengths), 10, causal, Machine())


def close(a, b, atol=1e-5, rtol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def gradients(m, loss):
    """Of the parameters that the loss reaches, by name; zeros for the others."""
    named = dict(m.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(named.items(), found)}


def same_gradients(m, ours, plain, unused='nothing'):
    """Of every parameter; each has one, but those whose name begins with `unused`."""
    a, b = gradients(m, ours), gradients(m, plain)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-3,
                                   msg=lambda text: f'{name}: {text}')
        # the softmax takes no notice of a key's bias
        none = name.startswith(unused) or name.endswith('key.bias')
        assert a[name].any() or none, f'{name} has no gradient at all'


@pytest.fixture
def dropped(monkeypatch):
    """Dropout without chance: everything shrinks. It shows where dropout stands, with which p."""
    monkeypatch.setattr(layers.Dropout, 'forward', lambda self, x: shrink(x, self.p, self.training))


def shrink(x, p, training):
    return x * (1 - p) ** 2 if training else x


# ------------------------------------------------------------------------ plain implementations

def plain_attention(m, q, x, seen, drop):
    """Head after head, query after query, over the positions that it may see."""
    query, key, value = m.query(q), m.key(x), m.value(x)
    width = q.shape[1] // m.heads
    rows = []
    for i in range(len(q)):
        parts = []
        for head in range(m.heads):
            own = slice(head * width, (head + 1) * width)
            scores = [query[i, own] @ key[j, own] / width ** 0.5 for j in seen[i]]
            weights = drop(torch.stack(scores).softmax(0))
            parts.append(sum(w * value[j, own] for w, j in zip(weights, seen[i])))
        rows.append(torch.cat(parts))
    return m.out(torch.stack(rows))


def norm(m, x):
    """A layer norm, written out."""
    x = x - x.mean(-1, keepdim=True)
    return m.weight * x / (x.square().mean(-1, keepdim=True) + m.eps).sqrt() + m.bias


def padded(m, history, width):
    """A history's rows at the right end of `width` places: (x [width, H], places in use)."""
    table = m.item_embedding()
    empty = [torch.full((table.shape[1],), 77.0)] * (width - len(history))  # never to be seen
    rows = [m.mask if item == 'mask' else table[item] for item in history]
    return torch.stack(empty + rows), range(width - len(history), width)


def plain_bert4rec(m, history):
    """BERT4Rec over one padded sequence of items and 'mask': states at the history's places."""
    def drop(x):
        return shrink(x, m.dropout, m.training)
    x, used = padded(m, history, m.max_items)
    x = drop(x + m.position_embedding.weight)
    seen = [used] * len(x)
    for block in m.blocks:
        x = norm(block.attention_norm, x + drop(plain_attention(block.attention, x, x, seen, drop)))
        y = block.inner(x)
        y = drop(y * (1 + torch.erf(y / 2 ** 0.5)) / 2)
        x = drop(norm(block.ffn_norm, x + drop(block.outer(y))))
    return x[used.start:]


def plain_sasrec(m, history):
    """SASRec over one padded sequence: states at the history's places."""
    def drop(x):
        return shrink(x, m.dropout, m.training)
    x, used = padded(m, history, m.max_items)
    x = drop(x * H ** 0.5 + m.position_embedding.weight)
    seen = [range(min(i, used.start), i + 1) for i in range(len(x))]
    for block in m.blocks:
        q = norm(block.attention_norm, x)
        x = norm(block.ffn_norm, q + plain_attention(block.attention, q, x, seen, drop))
        x = x + drop(block.outer(drop(block.inner(x).clamp_min(0))))
    return norm(m.norm, x)[used.start:]


def plain_gru4rec(m, history):
    """torch's own GRU over one sequence alone."""
    def drop(x):
        return shrink(x, m.dropout, m.training)
    x = norm(m.norm, drop(m.item_embedding()[list(history)]))
    return drop(m.gru(x[:, None])[0][:, 0])


PLAIN = {SASRec: plain_sasrec, BERT4Rec: plain_bert4rec, GRU4Rec: plain_gru4rec}


# ------------------------------------------------------------------------ attention, blocks

@pytest.mark.parametrize('causal', [True, False])
def test_attention_equals_torchs_own(causal):
    torch.manual_seed(0)
    ours = SelfAttention(H, 2, 0.0)
    theirs = torch.nn.MultiheadAttention(H, 2, batch_first=True)
    three = ours.query, ours.key, ours.value
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.weight for layer in three]))
        theirs.in_proj_bias.copy_(torch.cat([layer.bias for layer in three]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    q, x = torch.randn(9, H), torch.randn(9, H)
    layout = layout_of([3, 1, 5], causal)
    out = ours(q, x, layout)
    wanted = torch.tensor([8, 2, 3])
    close(ours(q, x, layout, wanted), out[wanted])
    for a, b in ((0, 3), (3, 4), (4, 9)):
        mask = torch.ones(b - a, b - a).triu(1).bool() if causal else None
        keys = x[None, a:b]
        expected, weights = theirs(q[None, a:b], keys, keys, attn_mask=mask,
                                   average_attn_weights=False)
        torch.testing.assert_close(out[a:b], expected[0], atol=1e-6, rtol=1e-5)
        close(ours.weights(q[b - 1:b], x[a:b]), weights[0, :, -1:])


def test_bert4recs_block_equals_torchs_encoder_layer():
    """torch's post-norm layer; its fast path and its slow one."""
    torch.manual_seed(0)
    ours = shaken(BERT4RecBlock(H, 2, 0.1)).eval()
    theirs = nn.TransformerEncoderLayer(H, 2, 4 * H, 0.1, 'gelu', batch_first=True,
                                        norm_first=False).eval()
    a, b = ours.attention, theirs.self_attn
    with torch.no_grad():
        b.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        b.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
    for mine, other in ((a.out, b.out_proj), (ours.inner, theirs.linear1),
                        (ours.outer, theirs.linear2), (ours.attention_norm, theirs.norm1),
                        (ours.ffn_norm, theirs.norm2)):
        other.load_state_dict(mine.state_dict())
    x = torch.randn(5, H)
    layout = layout_of([5], False)
    torch.testing.assert_close(ours(x, layout), theirs(x[None])[0], atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, layout), theirs(x[None])[0], atol=1e-5, rtol=1e-5)


def test_bert4recs_block_with_weights_by_hand():
    """One item: attention is value, then out. Identities and simple numbers for all weights."""
    block = BERT4RecBlock(2, 1, 0.0).eval()
    eye = torch.eye(2)
    for layer, weight in ((block.attention.query, eye), (block.attention.key, eye),
                          (block.attention.value, eye), (block.attention.out, 2 * eye),
                          (block.inner, torch.zeros(8, 2)), (block.outer, torch.zeros(2, 8))):
        layer.weight.data, layer.bias.data = weight, torch.zeros(len(weight))
    block.outer.bias.data = torch.tensor([0.0, 4.0])
    # x + Attn(x) = 3 x = (9, 3), normed (1, -1); plus (0, 4) = (1, 3), normed (-1, 1)
    out = block(torch.tensor([[3.0, 1.0]]), layout_of([1], False))
    torch.testing.assert_close(out, torch.tensor([[-1.0, 1.0]]), atol=1e-4, rtol=0)
    # the norm is the last step: its bias comes out as it is
    block.ffn_norm.bias.data = torch.tensor([10.0, 20.0])
    out = block(torch.tensor([[3.0, 1.0]]), layout_of([1], False))
    torch.testing.assert_close(out, torch.tensor([[9.0, 21.0]]), atol=1e-4, rtol=0)


# ------------------------------------------------------------------------ whole models

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', KINDS)
def test_packed_states_equal_a_plain_padded_implementation(kind, training, dropped):
    """All states of a batch, those after each history, and the gradient of every parameter."""
    m = shaken(model(kind)).train(training)
    histories = [1, 2, 3], [4], [5, 6, 5, 7, 8, 9, 10, 11, 12], [2, 20]
    items, offsets = ragged_of(*histories)
    if kind is BERT4Rec:
        shown = [['mask', 2, 3], ['mask'], [5, 6, 'mask', 7, 8, 9, 10, 'mask', 12], [2, 20]]
        items_shown = np.array([0 if item == 'mask' else item for row in shown for item in row])
        after = [[*history, 'mask'] for history in histories]
    else:
        shown = after = histories
        items_shown = items
    x = m.look_up(items_shown)
    found = m(x, np.diff(offsets))
    some = m(x, np.diff(offsets), m.ids(np.array([7, 0])))
    close(some, found[[7, 0]])
    plain = torch.cat([PLAIN[kind](m, row) for row in shown])
    close(found, plain)
    aim = torch.randn(plain.shape)
    same_gradients(m, (found * aim).sum(), (plain * aim).sum(), unused='output')
    close(m.states(items, offsets), torch.stack([PLAIN[kind](m, row)[-1] for row in after]))


@pytest.mark.parametrize('kind', [SASRec, GRU4Rec])
def test_a_later_item_changes_no_earlier_state(kind):
    m = shaken(model(kind))

    def states(*items):
        return m(m.item_embedding()[list(items)], np.array([len(items)]))
    before, after = states(1, 2, 3, 4, 5), states(1, 2, 3, 9, 5)
    assert torch.equal(before[:3], after[:3])
    assert not torch.allclose(before[3], after[3]) and not torch.allclose(before[4], after[4])


def test_bert4rec_looks_both_ways():
    m = shaken(model(BERT4Rec))

    def states(*items):
        return m(m.look_up(np.array(items)), np.array([len(items)]))
    before, after = states(1, 2, 3), states(1, 2, 9)
    assert not torch.allclose(before[0], after[0])


@pytest.mark.parametrize('kind', KINDS)
def test_a_batch_changes_no_state_and_old_items_are_cut(kind):
    m = shaken(model(kind))
    rows = [1, 2, 3], [4], list(range(1, 20)), [7, 7]
    together = m.states(*ragged_of(*rows))
    alone = torch.cat([m.states(*ragged_of(row)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    most = 9 if kind is BERT4Rec else 10
    cut = m.states(*ragged_of(rows[2][-most:]))
    torch.testing.assert_close(alone[2:3], cut, atol=1e-5, rtol=1e-5)
    fewer = m.states(*ragged_of(rows[2][1 - most:]))
    assert not torch.allclose(alone[2:3], fewer, atol=1e-4), 'all of the newest count'


@pytest.mark.parametrize('kind', KINDS)
def test_all_states_are_the_states_in_parts_without_training(kind):
    m = shaken(model(kind)).train()
    items, offsets = ragged_of([1, 2], [3], [4, 5, 6], [7], list(range(1, 20)))
    found = m.all_states(items, offsets, at_once=2)
    assert not m.training and not found.requires_grad and found.dtype == torch.float32
    close(found, m.states(items, offsets))


def test_the_newest_item_has_the_last_position():
    layout = layout_of([3, 1], True)
    assert layout.position.tolist() == [7, 8, 9, 9]


def test_sequences_that_do_not_fit_begin_the_next_square():
    layout = layout_of([40, 30, 20], True)
    assert layout.queries.shape == (2, sequence.WIDTH)
    assert layout.place.tolist() == [*range(40), *range(64, 64 + 50)]
    long = layout_of([3, 70, 60], True)
    assert long.queries.shape == (3, 70), 'a longer sequence makes the squares larger'


def test_gru4rec_equals_torchs_gru_with_its_weights():
    """A batch_first GRU of its own, given the weights, over each sequence alone."""
    m = shaken(model(GRU4Rec))
    theirs = nn.GRU(H, H, batch_first=True)
    theirs.load_state_dict(m.gru.state_dict())
    rows = [3, 1, 3], [9], list(range(1, 9)), [2, 20]
    items, offsets = ragged_of(*rows)
    found = m(m.item_embedding()[m.ids(items)], np.diff(offsets))
    for row, a, b in zip(rows, offsets[:-1], offsets[1:]):
        x = F.layer_norm(m.item_embedding()[list(row)], (H,), m.norm.weight, m.norm.bias)
        close(found[a:b], theirs(x[None])[0][0], atol=1e-6)


def test_attention_weights_are_those_of_the_newest_position():
    m = shaken(model(SASRec))
    weights = m.attention_weights(np.array([4, 5, 6]))
    assert weights.shape == (2, 3) and np.allclose(weights.sum(1), 1, atol=1e-5)
    x = m.item_embedding()[[4, 5, 6]] * H ** 0.5 + m.position_embedding.weight[-3:]
    block = m.blocks[0].attention
    query = block.query(norm(m.blocks[0].attention_norm, x[-1]))
    expected = (query @ block.key(x).T / H ** 0.5).softmax(0)
    close(weights[0].flip(0), expected.detach())


@pytest.mark.parametrize('kind', KINDS)
def test_a_fixed_text_is_added_to_the_table(kind):
    text = torch.randn(N + 1, H)
    m = shaken(model(kind, text=text))
    plain = model(kind)
    plain.load_state_dict({name: x for name, x in m.state_dict().items() if 'text' not in name})
    with torch.no_grad():
        plain.item_embedding.weight += text
    batch = ragged_of([1, 2, 3], [4, 5])
    close(m.states(*batch), plain.states(*batch))
    close(m.scorer()[0], plain.scorer()[0])
    m.loss(*batch, np.random.default_rng(1), kind.losses[0], np.array([6, 7, 8, 9, 10])).backward()
    assert m.item_embedding.weight.grad.any() and not m.item_embedding.text.requires_grad


# ------------------------------------------------------------------------ losses

@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind', [SASRec, GRU4Rec])
def test_next_item_losses_equal_the_plain_ones_with_gradients(kind, training, dropped):
    m = shaken(model(kind)).train(training)
    items, offsets = ragged_of([1, 2, 3], [4, 5], list(range(1, 15)), [6, 6, 6])
    negatives = draw_training_negatives(items, offsets, N, np.random.default_rng(0))
    states, targets, wrong = [], [], []
    for a, b in zip(offsets[:-1], offsets[1:]):
        row = items[a:b][-11:]  # ten inputs at most, each with the item after it
        states.append(PLAIN[kind](m, row[:-1].tolist()))
        targets += row[1:].tolist()
        wrong += negatives[a:b][-11:][1:].tolist()
    logits = torch.cat(states) @ m.item_embedding().T
    ce = F.cross_entropy(logits[:, 1:], torch.tensor(targets) - 1)
    ours = m.loss(items, offsets, None, 'ce')
    close(ours, ce)
    same_gradients(m, ours, ce)

    def at(ids):
        return logits[torch.arange(len(ids)), torch.tensor(ids)]
    bce = (F.binary_cross_entropy_with_logits(at(targets), torch.ones(len(targets)))
           + F.binary_cross_entropy_with_logits(at(wrong), torch.zeros(len(wrong))))
    ours = m.loss(items, offsets, None, 'bce', negatives)
    close(ours, bce)
    same_gradients(m, ours, bce)


@pytest.mark.parametrize('training', [False, True])
def test_bert4recs_loss_equals_the_plain_one_with_gradients(training, dropped):
    m = shaken(model(BERT4Rec)).train(training)
    # those of 2, 1 and 7 items have none masked: they are left out
    histories = [list(range(1, k)) for k in (3, 12, 5, 11, 2, 8)]
    seen, original, look_up = {}, m.forward, m.look_up

    def forward(x, lengths, wanted):
        seen.update(lengths=lengths.tolist(), wanted=wanted)
        return original(x, lengths, wanted)

    def looked_up(shown):
        seen.update(shown=shown)
        return look_up(shown)
    m.forward, m.look_up = forward, looked_up
    ours = m.loss(*ragged_of(*histories), np.random.default_rng(6))
    tokens = [item or 'mask' for item in seen['shown'].tolist()]
    cut = [row[-10:] for row in histories if min(len(row), 10) in seen['lengths']]
    assert [len(row) for row in cut] == seen['lengths'] == [10, 4, 10]
    states, start = [], 0
    for row in cut:
        part = range(start, start + len(row))
        assert set(part) & set(seen['wanted'].tolist())
        states.append(plain_bert4rec(m, [tokens[place] for place in part]))
        start += len(row)
    wanted = seen['wanted']
    targets = torch.tensor([item for row in cut for item in row])[wanted]
    logits = torch.cat(states)[wanted] @ m.output.weight.T + m.output.bias
    plain = F.cross_entropy(logits[:, 1:], targets - 1)
    assert 3 < len(wanted) < len(tokens)
    close(ours, plain)
    same_gradients(m, ours, plain)


def test_softmax_in_parts_equals_torchs_cross_entropy_with_gradients():
    def plain(states, table, bias, target):
        return F.cross_entropy((states @ table.T + bias)[:, 1:], target - 1)

    def parts(*inputs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sequence, 'LOGITS', 50)
            return SoftmaxLoss.apply(*inputs)
    found = []
    for f in (plain, parts, SoftmaxLoss.apply):
        torch.manual_seed(1)
        shapes = (9, H), (N + 1, H), (N + 1,)
        inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
        loss = f(*inputs, torch.arange(1, 10)) * 3
        loss.backward()
        found.append([loss, *(x.grad for x in inputs)])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b)
    assert not found[1][2][0].any(), 'padding gets no gradient'
    frozen = torch.randn(N + 1, H)
    SoftmaxLoss.apply(inputs[0], frozen, None, torch.arange(1, 10)).backward()
    assert frozen.grad is None


def test_a_probability_of_0_costs_87_and_stays_finite():
    states = torch.tensor([[1000.0]], requires_grad=True)
    table = torch.tensor([[0.0], [-1.0], [1.0]])
    loss = SoftmaxLoss.apply(states, table, None, torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(87.3, abs=0.1) and states.grad.tolist() == [[2.0]]


@pytest.mark.parametrize('kind', KINDS)
def test_the_loss_in_bfloat16_is_near_the_exact_one(kind):
    m = shaken(model(kind))
    batch = ragged_of(*[list(range(1, k)) for k in (5, 12, 9, 19)])
    found = []
    for bfloat16 in (False, True):
        m.on(Machine(bfloat16=bfloat16))
        with m.machine.autocast():
            loss = m.loss(*batch, np.random.default_rng(2), 'ce')
        found.append((loss.float().detach(), gradients(m, loss)))
    (exact, slopes), (loss, ours) = found
    close(loss, exact, atol=0.02, rtol=0.02)
    for name, slope in slopes.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - slope).norm() <= 0.1 * slope.norm() + 0.01, name


@pytest.mark.parametrize('kind', [SASRec, BERT4Rec])
def test_in_bfloat16_products_see_few_numbers_of_rows(kind, monkeypatch):
    """A CPU's bfloat16 kernels are made for one number of rows: a batch's items are many."""
    m = model(kind).on(Machine(bfloat16=True))
    batch = ragged_of(*[list(range(1, k)) for k in (5, 12, 9, 19)])
    seen = []
    monkeypatch.setattr(sequence, 'half', lambda x: seen.append(len(x)) or layers.half(x))

    def loss():
        with m.machine.autocast():
            return m.loss(*batch, np.random.default_rng(2), 'ce')
    maps = layers.watched(nn.Linear, loss)
    assert maps and {len(x) for _, (x,), _ in maps} == {64}
    assert set(seen) <= {64, N + 1}


@pytest.mark.parametrize('kind', [SASRec, BERT4Rec, BERT4RecTied])
@pytest.mark.parametrize('logits', [2 ** 27, 50 * (N + 1)])
def test_in_bfloat16_the_rows_that_are_added_change_nothing(kind, logits, monkeypatch):
    monkeypatch.setattr(sequence, 'LOGITS', logits)
    m = shaken(model(kind)).on(Machine(bfloat16=True))
    batch = ragged_of(*[list(range(1, k)) for k in (5, 12, 9, 19, 19, 19, 19, 19, 19)])
    found = []
    for _ in range(2):
        with m.machine.autocast():
            loss = m.loss(*batch, np.random.default_rng(2), 'ce')
        found.append({'loss': loss.detach(), 'states': m.all_states(*batch), **gradients(m, loss)})
        monkeypatch.setattr(sequence, 'rounded', lambda x: x)
    for name, value in found[0].items():  # a sum over other rows rounds differently
        assert (value - found[1][name]).norm() <= 0.05 * found[1][name].norm() + 1e-6, name


# ------------------------------------------------------------------------ sampled softmax

@pytest.mark.parametrize('text', [None, torch.ones(N + 1, H)])
@pytest.mark.parametrize('kind', [SASRec, GRU4Rec])
def test_the_sampled_loss_of_all_items_is_the_softmax_over_all(kind, text):
    m = shaken(model(kind, text=text))
    batch = ragged_of([1, 2, 3], [4, 5], list(range(1, 15)), [6, 6, 6])
    ours = m.loss(*batch, np.random.default_rng(0), 'sampled', 999)
    plain = m.loss(*batch, None, 'ce')
    close(ours, plain)
    same_gradients(m, ours, plain)


class Chosen:
    """Draws that are given."""

    def __init__(self, *drawn):
        self.drawn = np.array(drawn)

    def choice(self, n, size, replace):
        assert n == N and size == len(self.drawn) and not replace
        return self.drawn - 1


def test_the_sampled_loss_by_hand():
    """Scores of items 1..20 are given by the state alone; three are drawn, one of them a target."""
    m = model(SASRec)
    scores = torch.randn(N + 1)
    with torch.no_grad():
        m.item_embedding.weight.zero_()
        m.item_embedding.weight[:, 0] = scores
    m.forward = lambda x, lengths: F.one_hot(torch.zeros(len(x), dtype=torch.int64), H).float()
    found = m.loss(*ragged_of([1, 2, 3]), Chosen(3, 9, 17), 'sampled', 3)
    e = scores.exp()
    first = -(e[2] / (e[2] + 19 / 3 * (e[3] + e[9] + e[17]))).log()
    second = -(e[3] / (e[3] + 19 / 2 * (e[9] + e[17]))).log()  # 3 is the target here
    close(found, (first + second) / 2)


def test_the_sampled_softmax_is_the_full_one_on_average():
    """The sum that it estimates, over many draws of 2 of the 20 items."""
    m = shaken(model(SASRec))
    with torch.no_grad():
        m.item_embedding.weight *= 0.1  # a small spread: the logarithm of a mean is near its mean
        batch = ragged_of([1, 2, 3], [4, 5])
        rng = np.random.default_rng(0)
        found = [m.loss(*batch, rng, 'sampled', 2).item() for _ in range(400)]
        assert np.mean(found) == pytest.approx(m.loss(*batch, None, 'ce').item(), rel=0.01)


@pytest.mark.parametrize('kind', ['sasrec', 'gru4rec'])
def test_sampled_runs_train_what_they_name_and_go_on_with_the_same_bits(toy, monkeypatch, kind):
    _, folder = toy
    more = '--loss', 'sampled', '--negatives', '5', '--batch', '8', '--save-every', '0'
    names = [f'{kind}-sampled-{variant}-16-lr0.01-seed0' for variant in
             ('random', 'ft-freeze-raw', 'ft-further-emb-raw', 'ft-id+text-raw')]
    run(*more, '--variants', 'random', 'ft-further-emb', 'ft-id+text', model=kind)
    whole, frozen, further, _ = [state_of(folder, name) for name in names]
    e = load_pt(folder / 'embeddings' / 'ft.pt', 'embeddings')['matrix']
    assert torch.equal(frozen[TABLE], e) and moved(frozen, further) == {TABLE}
    shutil.rmtree(folder / names[0])
    with killed(monkeypatch, [7], Gone):
        run(*more, model=kind)
    run(*more, model=kind)
    assert not moved(whole, state_of(folder, names[0]))
    assert read_row(folder / names[0])['identity']['options']['negatives'] == 5


def test_negatives_of_training_are_never_the_users_own():
    items, offsets = ragged_of(range(1, 19), [3, 3, 3], range(1, 21))
    out = draw_training_negatives(items, offsets, N, np.random.default_rng(0))
    assert set(out[:18]) == {19, 20} and 3 not in out[18:21]
    assert out.min() >= 1 and out.max() <= N and len(out) == len(items)
    many = ragged_of(*[[1]] * 4000)
    counts = np.bincount(draw_training_negatives(*many, N, np.random.default_rng(0)))
    assert not counts[:2].any() and np.abs(counts[2:] - 4000 / 19).max() < 60, 'uniform'


def test_bert4rec_masks_15_percent_and_learns_at_masked_places_only(monkeypatch):
    """Of 400 users with ten items each, all different; a user of whom none is masked is left out."""
    m, seen = model(BERT4Rec), {}

    def forward(shown, lengths, wanted):
        seen.update(shown=shown, lengths=lengths, wanted=wanted)
        return torch.randn(len(wanted), H)

    def loss(states, table, bias, target):
        seen.update(target=target)
        return states.sum()
    m.forward, m.look_up = forward, torch.from_numpy
    monkeypatch.setattr(bert4rec.SoftmaxLoss, 'apply', loss)
    m.loss(np.arange(1, 4001, dtype=np.int32), np.arange(0, 4001, 10), np.random.default_rng(0))
    wanted, shown, target = seen['wanted'], seen['shown'], seen['target']
    users = torch.unique((target - 1) // 10)
    assert abs(len(users) / 400 - (1 - 0.91 * 0.85 ** 10)) < 0.04
    assert seen['lengths'].tolist() == [10] * len(users)
    truth = (users[:, None] * 10 + torch.arange(1, 11)).flatten()
    assert torch.equal(target, truth[wanted]), 'targets are the items that were there'
    assert abs(len(wanted) / 4000 - (0.91 * 0.15 + 0.09 * 0.1)) < 0.02
    masked, unchanged = shown == 0, shown == truth
    assert abs(masked.sum().item() / 4000 - (0.91 * 0.15 * 0.8 + 0.09 * 0.1)) < 0.02
    chosen = torch.zeros(len(truth), dtype=torch.bool)
    chosen[wanted] = True
    assert not (masked & ~chosen).any() and unchanged[~chosen].all()
    other = (chosen & ~unchanged & ~masked).sum().item() / len(wanted)
    assert abs(other - 0.09) < 0.04  # 10 % of 91 %, less luck
    alone = chosen.view(-1, 10).sum(1) == 1
    last = masked.view(-1, 10)[:, -1] & alone
    assert 0.09 < last.sum().item() / 400 < 0.09 + 0.91 * 0.15 * 0.5


def test_a_batch_without_a_masked_item_learns_at_its_last():
    m = model(BERT4Rec).train()

    class Never:
        """Draws that choose nothing."""

        def random(self, size):
            return np.full(size, 0.99)

        def integers(self, low, high, size):
            return np.full(size, low)
    loss = m.loss(*ragged_of([1, 2, 3], [4]), Never())
    loss.backward()
    assert loss.item() > 0 and m.output.weight.grad[4].any()


@pytest.mark.parametrize('kind, name', [(SASRec, 'ce'), (SASRec, 'bce'), (BERT4Rec, 'masked')])
def test_savings_change_no_loss_and_no_gradient(kind, name, monkeypatch):
    """The same batch in squares of another width, all rows leaving the last block, and the softmax
    two positions at a time."""
    m = shaken(model(kind))
    batch = ragged_of(*[list(range(1, k)) for k in (3, 12, 5, 19, 7, 3, 4)])
    negatives = np.full(len(batch[0]), 20)

    def found():
        m.zero_grad()
        loss = m.loss(*batch, np.random.default_rng(5), name, negatives)
        loss.backward()
        slopes = [p.grad.clone() for p in m.parameters() if p.grad is not None]
        return [loss.detach(), m.states(*batch).detach(), *slopes]
    ours, original = found(), kind.forward

    def forward(self, *given):
        whole = original(self, *given[:2])
        return whole[given[2]] if len(given) > 2 else whole
    monkeypatch.setattr(sequence, 'WIDTH', 1)
    monkeypatch.setattr(sequence, 'LOGITS', 2 * (N + 1))
    monkeypatch.setattr(kind, 'forward', forward)
    again = found()
    assert len(ours) == len(again)
    for a, b in zip(ours, again):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_bert4recs_head_is_a_table_of_its_own_and_the_mask_trains():
    m = model(BERT4Rec)
    table, bias = m.scorer()
    assert table is m.output.weight and table.shape == (N + 1, H) and bias.shape == (N + 1,)
    batch = ragged_of(list(range(1, 20)), list(range(2, 20)))
    m.train().loss(*batch, np.random.default_rng(1)).backward()
    assert m.mask.grad.any(), 'the mask vector trains'


@pytest.mark.parametrize('text', [None, torch.ones(N + 1, H)])
def test_a_tied_head_is_the_item_table(text, monkeypatch):
    """The gradient of the one table is the sum of what the two of an untied model get, both of
    which begin as that table (with its text, where it has one)."""
    tied, untied = shaken(model(BERT4RecTied, text)), model(BERT4Rec, text)
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1
    untied.load_state_dict(tied.state_dict())
    untied.output.weight.data = tied.item_embedding().detach().clone()
    batch = ragged_of(list(range(1, 20)), list(range(2, 20)))
    close(tied.all_states(*batch) @ tied.scorer()[0].T + tied.scorer()[1],
          untied.all_states(*batch) @ untied.scorer()[0].T + untied.scorer()[1])
    losses = [m.loss(*batch, np.random.default_rng(1)) for m in (tied, untied)]
    close(*losses)
    one, two = map(gradients, (tied, untied), losses)
    close(one[TABLE], two[TABLE] + two['output.weight'])
    assert two['output.weight'].any() and two[TABLE].any()


def test_random_tables():
    """Row 0 is zeros; Xavier-normal for SASRec and GRU4Rec, N(0, 0.02) for BERT4Rec."""
    torch.manual_seed(0)
    for kind in KINDS:
        table = random_table(kind, 999, 64)
        expected = 0.02 if kind is BERT4Rec else (2 / (1000 + 64)) ** 0.5
        assert table.shape == (1000, 64) and not table[0].any()
        assert table[1:].std().item() == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------ initial tables

def test_scales():
    torch.manual_seed(0)
    matrix = torch.cat([torch.zeros(1, H), 4 + torch.randn(N, H)])
    made = {scale: initial.initial_table(matrix, H, scale, 0.4, 0, N) for scale in initial.SCALES}
    assert set(made) == {'raw', 'centred', 'whitened', 'permuted'}
    assert torch.equal(made['raw'], matrix)
    for name, table in made.items():
        assert not table[0].any()
        if name != 'raw':
            assert table[1:].norm(dim=1).mean().item() == pytest.approx(0.4, rel=1e-5)
    assert made['centred'][1:].mean(0).abs().max() < 1e-6
    covariance = torch.cov(made['whitened'][1:].T)
    close(covariance, torch.eye(H) * covariance[0, 0], rtol=1e-3)

    def rows(table):
        return sorted(map(tuple, (table * 1e4).round().tolist()))
    assert rows(made['permuted']) == rows(made['centred'])
    assert not torch.equal(made['permuted'], made['centred'])
    other = initial.initial_table(matrix, H, 'permuted', 0.4, 1, N)
    assert not torch.equal(made['permuted'], other), "the order is the seed's"


def test_whitening_leaves_directions_without_variance_alone():
    torch.manual_seed(0)
    matrix = torch.cat([torch.zeros(1, H), torch.randn(N, 3) @ torch.randn(3, H)])
    table = initial.initial_table(matrix, H, 'whitened', 0.4, 0, N)[1:]
    values = torch.linalg.svdvals(table)
    assert values[3:].max() < 1e-4 * values[0] and values[2] > 0.999 * values[0]


def components(matrix, width, n):
    """A table of another width, not scaled."""
    return initial.initial_table(matrix, width, 'raw', 1.0, 0, n)


def test_components_are_the_principal_ones():
    torch.manual_seed(0)
    matrix = torch.cat([torch.zeros(1, H), 4 + torch.randn(N, H)])
    full = matrix[1:] - matrix[1:].mean(0)
    small = components(matrix, 3, N)
    assert small.shape == (N + 1, 3) and not small[0].any()
    values = torch.linalg.svdvals(full)
    close(small[1:].norm(), values[:3].norm())
    close(small[1:].T @ small[1:], torch.diag(values[:3] ** 2), atol=1e-3)
    # the covariance with the data gives the axes back: they are orthonormal directions of it
    axes = torch.linalg.lstsq(full, small[1:]).solution
    close(axes.T @ axes, torch.eye(3))
    flat = torch.cat([matrix[:1], 4 + torch.randn(N, 3) @ torch.randn(3, H)])
    whole = components(flat, 3, N)
    close(torch.cdist(whole[1:], whole[1:]), torch.cdist(flat[1:], flat[1:]), atol=1e-3)


def test_components_by_hand_and_at_most_as_many_as_there_are():
    # items at 1, 2, 3 times (3, 4) from (10, 20): one direction holds everything
    matrix = torch.tensor([[0.0, 0.0], [13, 24], [16, 28], [19, 32]])
    found = components(matrix, 1, 3)[:, 0]
    close(found.abs(), torch.tensor([0.0, 5, 0, 5]), atol=1e-4)
    assert found[1] * found[3] < 0
    with pytest.raises(UserError, match='--hidden 3: at most 2 '):
        components(matrix, 3, 3)
    with pytest.raises(UserError, match='--hidden 4: at most 3 '):
        components(torch.randn(4, 9), 4, 3)


def test_geometry_by_hand():
    # norms 5, 2, 5; cosines 4/5 (first, second), 3/5 (first, third), 0
    found = initial.geometry(torch.tensor([[3.0, 4], [0, 2], [5, 0]]))
    assert found['norm'] == pytest.approx(4) and found['cosine'] == pytest.approx(1.4 / 3)
    opposite = initial.geometry(torch.tensor([[1.0, 0], [-2, 0]]))
    assert opposite == {'norm': pytest.approx(1.5), 'cosine': pytest.approx(-1)}
    alike = initial.geometry(torch.full((50, 8), 0.1))
    assert alike['cosine'] == pytest.approx(1)
    assert initial.geometry(torch.tensor([[3.0, 4]])) == {'norm': 5.0, 'cosine': 1.0}


# ------------------------------------------------------------------------ train_seq.py in-process

@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path / 'runs'))
    canonical(tmp_path / 'data' / 'toy')
    data = prepare('toy', (4, 1, 0))
    folder = tmp_path / 'runs' / 'toy'
    for source in ('lf', 'ft'):
        torch.manual_seed(len(source) + ord(source[0]))
        matrix = torch.cat([torch.zeros(1, H), 5 + 3 * torch.randn(data.n_items, H)])
        head = {'identity': {'data': data.fingerprint}, 'dataset': 'toy', 'plm': 'p', 'norm': 2.0}
        save_pt(folder / 'embeddings' / f'{source}.pt', 'embeddings', head=head, matrix=matrix,
                items=data.item_ids)
    return data, folder


def arguments(*options, model='sasrec', epochs=2):
    return train_seq.parse_args(['toy', '--model', model, '--lrs', '0.01', '--epochs', str(epochs),
                                 '--hidden', '16', '--precision', 'float32', *options])


def run(*options, **more):
    train_seq.main(arguments(*options, **more))


def name_of(kind, variant='random', lr=0.01, seed=0):
    raw = '' if variant == 'random' else '-raw'
    return f'{kind}-{LOSSES[kind]}-{variant}{raw}-16-lr{lr:g}-seed{seed}'


def state_of(folder, name):
    return load_pt(folder / name / 'model.pt', 'seq')['model']


def edit_embeddings(folder, change):
    path = folder / 'embeddings' / 'lf.pt'
    content = load_pt(path, 'embeddings')
    content.pop('kind')
    change(content)
    save_pt(path, 'embeddings', **content)


def moved(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def no_training(monkeypatch):
    def fail(*a, **k):
        pytest.fail('it trains')
    monkeypatch.setattr(Training, 'update', fail)


@pytest.mark.parametrize('kind', MODELS)
def test_every_mode_trains_exactly_what_it_names(toy, kind):
    data, folder = toy
    e = load_pt(folder / 'embeddings' / 'ft.pt', 'embeddings')['matrix']
    run('--variants', 'random', 'ft-freeze', 'ft-trainable', 'ft-further-all', 'ft-further-emb',
        'ft-id+text', model=kind)

    def state(variant):
        return state_of(folder, name_of(kind, variant))
    frozen = state('ft-freeze')
    assert torch.equal(frozen[TABLE], e), 'freeze: the table is the embeddings to the bit'
    assert not torch.equal(state('ft-trainable')[TABLE], e)
    table = {TABLE, 'output.weight'} if kind == 'bert4rec-tied' else {TABLE}
    assert moved(frozen, state('ft-further-emb')) == table
    names = moved(frozen, state('ft-further-all'))
    # no gradient reaches the key bias, a constant in the softmax; the rest must move
    assert names >= {k for k in frozen if not k.endswith('key.bias') and 'position' not in k}
    both = state('ft-id+text')
    assert torch.equal(both['item_embedding.text'], e)
    assert both[TABLE].norm() < e.norm() / 3
    rows = {row['run']: row for row in load_rows('toy')}
    assert len(rows) == 6
    row = rows[name_of(kind, 'ft-freeze')]
    assert (row['model'], row['init'], row['mode'], row['scale']) == (kind, 'ft', 'freeze', 'raw')
    assert (row['loss'], row['hidden'], row['lr'], row['plm']) == (LOSSES[kind], H, 0.01, 'p')
    assert row['dataset'] == 'toy' and row['data'] == data.fingerprint and row['norm'] == 2
    assert 1 <= row['best_epoch'] <= row['epochs'] == 2


def test_a_run_of_another_model_than_todays_is_refused_in_one_line(toy, monkeypatch):
    data, folder = toy
    run()
    with monkeypatch.context() as patch:
        patch.setattr(SASRec, 'depth', 3)
        with pytest.raises(UserError, match="model.pt: is of another sasrec than today's"):
            load_seq(folder / name_of('sasrec'), data)
    monkeypatch.delitem(MODELS, 'sasrec')
    with pytest.raises(UserError, match="model.pt: is of another sasrec than today's"):
        load_seq(folder / name_of('sasrec'), data)


@pytest.mark.parametrize('kind', MODELS)
def test_a_saved_model_gives_the_ranks_of_its_run_again(toy, kind):
    data, folder = toy
    run('--variants', 'ft-id+text', model=kind)
    name = name_of(kind, 'ft-id+text')
    m = load_seq(folder / name, data)
    assert type(m) is MODELS[kind] and not m.training
    items, offsets, _ = data.split('test')
    score = product_scorer(m.all_states(items, offsets), *m.scorer())
    found = rank_counts(score, data, 'test')
    row, ranks = read_ranks('toy', name)
    assert np.array_equal(ranks['users'], data.evaluated)
    assert set(found) == {'sampled', 'full', 'new'} == set(row['metrics'])
    assert all(np.array_equal(found[key], ranks[key]) for key in found)
    assert sorted(path.name for path in (folder / name).iterdir()) == [
        '.lock', 'log.csv', 'model.pt', 'ranks.npz', 'row.json']


def test_the_width_is_that_of_every_variant(toy, capsys, monkeypatch):
    """--hidden reduces wider embeddings; without it a random table takes the embeddings' width."""
    data, folder = toy
    options = ['toy', '--model', 'sasrec', '--lrs', '0.01', '--epochs', '1', '--precision',
               'float32', '--variants', 'random', 'ft-freeze']
    train_seq.main(train_seq.parse_args(options))
    assert {row['hidden'] for row in load_rows('toy')} == {H}
    train_seq.main(train_seq.parse_args([*options, '--hidden', '4']))
    e = load_pt(folder / 'embeddings' / 'ft.pt', 'embeddings')['matrix']
    small = state_of(folder, 'sasrec-bce-ft-freeze-raw-4-lr0.01-seed0')[TABLE]
    assert torch.equal(small, components(e, 4, data.n_items))
    assert len(load_rows('toy')) == 4
    with pytest.raises(UserError, match='--hidden 17: at most 16 '):
        train_seq.main(train_seq.parse_args([*options, '--hidden', '17']))
    capsys.readouterr()
    train_seq.main(train_seq.parse_args([*options, '--hidden', '16']))
    assert capsys.readouterr().out.count('up to date') == 2, 'the same width, said or not'
    args = train_seq.parse_args(['toy', '--model', 'sasrec'])
    about = []
    monkeypatch.setattr(train_seq, 'one_run', lambda *given: about.append(given[4]) or
                        {'run': 'x', 'valid': 1, 'lr': 1})
    train_seq.main(args)
    assert {found['hidden'] for found in about} == {768}


def test_the_best_epoch_is_kept_and_patience_ends_training(toy, monkeypatch):
    _, folder = toy
    original, name = Training.end_epoch, name_of('sasrec')

    def trained(values, *options):
        left = iter(values)
        monkeypatch.setattr(Training, 'end_epoch',
                            lambda self, metric: original(self, next(left)))
        run(*options, epochs=9)
        assert not list(left)
        return state_of(folder, name), read_row(folder / name)
    kept, row = trained([0.3, 0.9, 0.1, 0.9], '--patience', '2')
    assert (row['valid'], row['best_epoch'], row['epochs']) == (0.9, 2, 4)
    lines = (folder / name / 'log.csv').read_text().splitlines()
    assert [line.split(',')[0] for line in lines] == ['epoch', '1', '2', '3', '4']
    first, row = trained([0.3, 0.2], '--patience', '1')
    assert (row['valid'], row['best_epoch'], row['epochs']) == (0.3, 1, 2)
    second, _ = trained([0.3, 0.9, 0.1], '--patience', '1', '--again')
    assert moved(kept, first) and not moved(kept, second)


# ------------------------------------------------------------------------ order, rates

@pytest.mark.parametrize('given, ordered', [
    ('random lf-trainable', 'random lf-trainable'),
    ('ft-further-all', 'ft-freeze ft-further-all'),
    ('ft-further-emb lf-further-all', 'ft-freeze ft-further-emb lf-freeze lf-further-all'),
    ('ft-further-all ft-freeze ft-further-emb', 'ft-freeze ft-further-all ft-further-emb'),
    ('pt-share0.1-further-all', 'pt-share0.1-freeze pt-share0.1-further-all')])
def test_further_training_comes_after_its_freeze_run(given, ordered):
    variants = arguments('--variants', *given.split()).variants
    expected = [train_seq.variant(text) for text in ordered.split()]
    assert train_seq.with_freeze(variants) == expected


def test_further_alone_trains_its_freeze_runs_first(toy, capsys):
    """Every seed of it starts from the freeze run of that seed, with the rate that was chosen."""
    _, folder = toy
    run('--variants', 'ft-further-emb', '--seeds', '0', '1', '--lrs', '0.01', '0.002')
    printed = [line.split(':')[0] for line in capsys.readouterr().out.splitlines()
               if 'written to' in line]
    assert [('freeze' in line, line[-1]) for line in printed] == [
        (True, '0'), (True, '0'), (True, '1'), (False, '0'), (False, '0'), (False, '1')]
    rows = load_rows('toy')
    freeze = {row['seed']: row for row in rows if row['mode'] == 'freeze'}
    tried = [row for row in rows if row['mode'] == 'freeze' and row['seed'] == 0]
    best = max(tried, key=lambda row: row['valid'])
    assert freeze[1]['lr'] == best['lr']
    for row in rows:
        if row['mode'] == 'further-emb':
            origin = name_of('sasrec', 'ft-freeze', best['lr'], row['seed'])
            before, after = state_of(folder, origin), state_of(folder, row['run'])
            assert moved(before, after) == {TABLE}, row['run']
        else:
            assert row['identity']['from'] is None


@pytest.mark.parametrize('kind', MODELS)
def test_rate_is_chosen_on_validation_with_the_first_seed(toy, kind):
    _, folder = toy
    run('--seeds', '3', '4', '5', '--lrs', '0.0001', '0.01', model=kind)
    rows = {(row['seed'], row['lr']): row for row in load_rows('toy')}
    # the first one where both are as good
    best = max((0.0001, 0.01), key=lambda lr: rows[3, lr]['valid'])
    assert set(rows) == {(3, 0.0001), (3, 0.01), (4, best), (5, best)}
    for (seed, lr), row in rows.items():
        assert row['run'] == name_of(kind, lr=lr, seed=seed)


def test_the_choice_of_a_rate_looks_at_validation_alone(toy, monkeypatch):
    """The rate that is better on test but worse on validation is not the one that is kept."""
    valid = {0.1: 0.3, 0.2: 0.5, 0.3: 0.4}
    made = []

    def one_run(args, machine, data, embedding, about, start_from):
        made.append((about['mode'], about['seed'], about['lr'], start_from and start_from.name))
        lr, mode = about['lr'], about['mode']
        sign = -1 if mode == 'further-all' else 1
        return {'run': f'{mode}{lr}', 'lr': lr, 'valid': sign * valid[lr],
                'metrics': {'sampled': {'NDCG@10': -sign * valid[lr]}}}
    monkeypatch.setattr(train_seq, 'one_run', one_run)
    run('--variants', 'ft-further-all', '--seeds', '7', '8', '--lrs', '0.1', '0.2', '0.3')
    assert made == [('freeze', 7, 0.1, None), ('freeze', 7, 0.2, None), ('freeze', 7, 0.3, None),
                    ('freeze', 8, 0.2, None)] + [
                    ('further-all', 7, lr, 'freeze0.2') for lr in (0.1, 0.2, 0.3)] + [
                    ('further-all', 8, 0.1, 'freeze0.2')]


def test_further_training_leaves_the_freeze_rows_as_they_are(toy):
    """Each variant keeps the rate of its own first seed, also where further- starts from a freeze
    of another rate."""
    rates = '--lrs', '0.01', '0.00001', '--seeds', '0', '1'
    run('--variants', 'ft-freeze', *rates)
    before = {row['run']: row for row in load_rows('toy')}
    run('--variants', 'ft-further-all', *rates)
    after = {row['run']: row for row in load_rows('toy')}
    assert all(after[name] == row for name, row in before.items())
    assert len(before) == 3 and len(after) == 6


def test_a_rate_that_diverges_is_left_out(toy, capsys):
    run('--lrs', '1e18', '0.01')
    assert 'rate 1e+18, seed 0: ' in capsys.readouterr().out
    assert [row['lr'] for row in load_rows('toy')] == [0.01]
    with pytest.raises(UserError, match=r'seed 1: training diverged with all of the rates \[1e\+18\]'):
        run('--lrs', '1e18', '--seeds', '1')


# ------------------------------------------------------------------------ what is up to date

def test_finished_runs_are_found_and_changed_ones_done_again(toy, capsys):
    _, folder = toy
    run('--variants', 'lf-freeze')
    first = load_rows('toy')
    run('--variants', 'lf-freeze')
    assert 'up to date' in capsys.readouterr().out and load_rows('toy') == first
    edit_embeddings(folder, lambda content: content['matrix'].mul_(2))
    run('--variants', 'lf-freeze')
    out = capsys.readouterr().out
    assert 'up to date' not in out and 'made again, as it was made with other embedding' in out
    assert len(load_rows('toy')) == 1 and load_rows('toy') != first
    run('--variants', 'lf-freeze', epochs=1)
    assert 'made with other options.epochs' in capsys.readouterr().out
    run('--variants', 'lf-freeze', '--keep')
    assert 'made with other options.epochs' in capsys.readouterr().out, '--keep is about code alone'


@pytest.mark.parametrize('bound, of_today, told', [(1.0, True, True), (-1.0, True, False), (1.0, False, False),
                                                   (None, True, False)])
def test_what_does_not_beat_popularity_says_so(toy, capsys, bound, of_today, told):
    """After its result, and only where counting reaches at least as much on validation of these data."""
    if bound is not None:
        save_json(runs_root() / 'toy' / 'popularity' / 'row.json',
                  {'run': 'popularity', 'identity': {}, 'code': {}, 'seconds': 1, 'valid': bound,
                   'data': toy[0].fingerprint if of_today else 'other'})
    run()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith('NO BETTER THAN POPULARITY on validation (100.00)') == told


def test_new_data_makes_a_run_again(toy, capsys):
    data, folder = toy
    run()
    canonical(folder / 'again' / 'toy', seed=1)
    shutil.copytree(folder / 'again' / 'toy', data.folder, dirs_exist_ok=True)
    assert prepare('toy', (4, 1, 0)).fingerprint != data.fingerprint
    capsys.readouterr()
    run()
    assert 'made again, as it was made with other data' in capsys.readouterr().out


def test_what_changes_no_number_makes_nothing_again(toy, capsys, monkeypatch):
    run('--variants', 'random', 'lf-freeze')
    no_training(monkeypatch)
    capsys.readouterr()
    run('--variants', 'lf-freeze', 'random', '--seeds', '0', '--device', 'cpu', '--save-every', '3',
        '--loss', 'bce', '--batch', '128', '--max-items', '50')
    assert capsys.readouterr().out.count('up to date') == 2


def test_a_scale_of_the_embeddings_makes_no_random_run_again(toy, capsys, monkeypatch):
    """A random table has no scale, and the run keeps its name."""
    run()
    no_training(monkeypatch)
    run('--init-scale', 'centred')
    assert 'up to date' in capsys.readouterr().out


def test_an_edit_of_the_code_is_never_answered_with_an_old_number(toy, capsys, monkeypatch):
    _, folder = toy
    run('--variants', 'lf-freeze')
    place = folder / name_of('sasrec', 'lf-freeze')
    old = read_row(place)
    original = common.runs.code_digest
    monkeypatch.setattr(common.runs, 'code_digest',
                        lambda file: 'edited' if file == 'common/sequence.py' else original(file))
    capsys.readouterr()
    calls = counted(monkeypatch)

    # kept where that is asked for
    run('--variants', 'lf-freeze', '--keep')
    out = capsys.readouterr().out
    assert 'kept, though made by other code (common/sequence.py)' in out and 'up to date' in out
    assert read_row(place) == old and not calls, 'what is kept still says which code made it'

    # made again, and why
    run('--variants', 'lf-freeze')
    out = capsys.readouterr().out
    assert 'made again, as it was made with other code (common/sequence.py)' in out
    assert calls and 'up to date' not in out
    new = read_row(place)
    assert new['code'] == {**old['code'], 'common/sequence.py': 'edited'}
    assert new['identity'] == old['identity'] and new['metrics'] == old['metrics']

    # then it is up to date, and made again all the same where that is asked for
    calls.clear()
    run('--variants', 'lf-freeze')
    assert 'up to date' in capsys.readouterr().out and not calls
    run('--variants', 'lf-freeze', '--again')
    assert 'up to date' not in capsys.readouterr().out and calls
    assert read_row(place)['metrics'] == old['metrics']


def counted(monkeypatch):
    """A list that gets an entry with every step of training."""
    calls, original = [], Training.update

    def update(self, **losses):
        calls.append(self.step)
        original(self, **losses)
    monkeypatch.setattr(Training, 'update', update)
    return calls


@pytest.mark.parametrize('what', ['code', 'options'])
def test_what_took_long_is_given_up_only_when_that_is_said(toy, capsys, monkeypatch, what):
    _, folder = toy
    run()
    place = folder / name_of('sasrec')
    row = read_row(place)
    row['seconds'] = 3 * 3600
    epochs = 2
    if what == 'code':
        row['code']['common/sasrec.py'] = 'older'
    else:
        epochs = 1
    (place / 'row.json').write_text(json.dumps(row))
    calls = counted(monkeypatch)
    with pytest.raises(SystemExit) as exit_:
        command(train_seq.main, arguments(epochs=epochs))
    line, = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and 'took 180 minutes' in line and '--again' in line
    assert ('common/sasrec.py' if what == 'code' else 'options.epochs') in line
    assert ('--keep' in line) == (what == 'code')
    if what == 'code':
        run('--keep', epochs=epochs)
        assert 'kept' in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match='options.epochs'):
            run('--keep', epochs=epochs)
    assert read_row(place) == row and not calls
    run('--again', epochs=epochs)
    assert calls and read_row(place)['epochs'] == epochs


def test_a_half_trained_run_that_is_kept_says_what_its_first_steps_were_made_by(toy, monkeypatch):
    _, folder = toy
    place = folder / name_of('sasrec')
    with killed(monkeypatch, [2], signal.SIGINT):
        run(epochs=2)
    content = load_pt(place / 'resume.pt', 'resume')
    content['head']['code']['common/sequence.py'] = 'older'
    content.pop('kind')
    save_pt(place / 'resume.pt', 'resume', **content)
    run('--keep', epochs=2)
    assert changed_code(read_row(place)) == ['common/sequence.py']


def test_a_half_trained_run_of_other_code_is_not_gone_on_with(toy, capsys, monkeypatch):
    _, folder = toy
    run(epochs=2)
    place = folder / name_of('sasrec')
    whole = state_of(folder, place.name)
    shutil.rmtree(place)
    with killed(monkeypatch, [3], signal.SIGINT):
        run('--batch', '8', epochs=2)
    shutil.move(place / 'resume.pt', place / 'kept.pt')
    content = load_pt(place / 'kept.pt', 'resume')
    content['head']['code']['common/sequence.py'] = 'older'
    content['head']['identity']['options']['batch'] = 128
    content.pop('kind')
    save_pt(place / 'resume.pt', 'resume', **content)
    (place / 'kept.pt').unlink()
    capsys.readouterr()
    run(epochs=2)
    out = capsys.readouterr().out
    assert 'other code (common/sequence.py)' in out and 'goes on from' not in out
    again = state_of(folder, place.name)
    assert not moved(whole, again) and not (place / 'resume.pt').exists()


def test_further_training_from_a_freeze_run_of_other_code_is_made_again(toy, capsys, monkeypatch):
    """The freeze run was kept once, and today's code went on from it. Without --keep the freeze run
    is made again with other numbers, and so must be what started from it."""
    run('--variants', 'ft-freeze')
    original = common.runs.code_digest
    monkeypatch.setattr(common.runs, 'code_digest',
                        lambda file: 'edited' if file == 'common/sasrec.py' else original(file))
    monkeypatch.setattr(SASRec, 'betas', (0.5, 0.9))  # the edit
    run('--variants', 'ft-further-all', '--keep')
    capsys.readouterr()
    run('--variants', 'ft-further-all')
    out = capsys.readouterr().out
    assert out.count('made again') == 2 and 'up to date' not in out, out


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A copy of the code, whose digests count: tree(file, old, new) edits a file of it."""
    root = tmp_path / 'tree'
    shutil.copytree(ROOT / 'common', root / 'common', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'train_seq.py', root)
    monkeypatch.setattr(common.runs, 'ROOT', root)

    def edit(file, old, new):
        text = (root / file).read_text()
        assert old in text, f'{file}: no {old!r}'
        (root / file).write_text(text.replace(old, new, 1))
        common.runs.parsed.cache_clear()
    common.runs.parsed.cache_clear()
    yield edit
    common.runs.parsed.cache_clear()


def file_of(kind):
    return f'{MODELS[kind].__module__.replace(".", "/")}.py'


def code_of_model(kind):
    return code_of('train_seq.py', file_of(kind))


def test_what_defines_a_models_numbers_is_in_its_digest(tree):
    """Every file but those that read, print or look up; of the three models its own alone."""
    shared = {f'common/{name}.py' for name in
              ('arrays', 'data', 'initial', 'layers', 'metrics', 'sequence', 'training')}
    for kind in MODELS:
        assert set(code_of_model(kind)) == shared | {'train_seq.py', file_of(kind)}


@pytest.mark.parametrize('file, old, new, changed', [
    ('common/sasrec.py', 'SASRecBlock, 1, True', 'SASRecBlock, 2, True', True),
    ('common/sasrec.py', 'widening = 1e-8', 'widening = 1e-5', True),
    ('common/sasrec.py', '1e-8, 1  #', '1e-8, 1  # another comment:', False),
    ('common/sasrec.py', 'eps, widening = 1e-8', '\n\n    eps, widening = (1e-8)', False),
    ('common/sasrec.py', '"""SASRec without padding.', '"""Another text.', False),
    ('common/sasrec.py', '"""The state at each', '"""Another text on each', False),
    ('common/sequence.py', 'F.softplus(-up)', 'F.softplus(up)', True),
    ('common/layers.py', 'q.shape[-1] ** -0.5', 'q.shape[-1] ** -1', True),
    ('common/arrays.py', 'np.minimum(np.diff(offsets), most)', 'np.diff(offsets)', True),
    ('common/initial.py', 's[0] * 1e-4', 's[0] * 1e-3', True),
    ('common/metrics.py', 'equal - 1', 'equal - 0', True),
    ('train_seq.py', 'rng.permutation(users)', 'users', True),
    ('common/bert4rec.py', 'dropout = 0.1', 'dropout = 0.0', False),
    ('common/progress.py', 'mininterval=30', 'mininterval=10', False)])
def test_an_edit_of_the_code_changes_its_digest_but_one_of_a_comment_does_not(
        tree, file, old, new, changed):
    before = code_of_model('sasrec')
    tree(file, old, new)
    after = code_of_model('sasrec')
    assert common.runs.differences(before, after) == ([file] if changed else [])


def test_a_real_edit_makes_a_finished_run_again(toy, tree, capsys):
    """The code in the copy is what a run is compared with, as in a user's folder."""
    _, folder = toy
    run()
    tree('common/sasrec.py', '1e-8, 1  #', '1e-8, 1  # said otherwise:')
    capsys.readouterr()
    run()
    assert 'up to date' in capsys.readouterr().out
    tree('common/sasrec.py', 'widening = 1e-8', 'widening = 1e-5')
    run()
    out = capsys.readouterr().out
    assert 'made again, as it was made with other code (common/sasrec.py)' in out
    run(model='bert4rec')
    tree('common/sasrec.py', 'widening = 1e-5', 'widening = 1e-6')
    capsys.readouterr()
    run(model='bert4rec')
    assert 'up to date' in capsys.readouterr().out, "SASRec's file is nothing to BERT4Rec"


# ------------------------------------------------------------------------ killed and started again

class Gone(Exception):
    """Stands for SIGKILL: nobody catches it, nothing is saved on the way out."""


@contextlib.contextmanager
def killed(monkeypatch, at, how):
    """In here the steps numbered `at` (from 1, over all calls) raise `how`, or get that signal."""
    original, calls = Training.update, []
    stopping = isinstance(how, signal.Signals)
    before = stopping and signal.signal(how, stop)  # as `command` does

    def update(self, **losses):
        calls.append(1)
        if len(calls) in at:
            if stopping:
                signal.raise_signal(how)
            raise how
        original(self, **losses)
    with monkeypatch.context() as patch:
        patch.setattr(Training, 'update', update)
        with pytest.raises(SystemExit if stopping else how) as stopped:
            yield
        if stopping:
            signal.signal(how, before)
            assert stopped.value.code == 128 + how


@pytest.mark.parametrize('how, every', [
    (signal.SIGINT, '10'), (signal.SIGTERM, '10'), (Gone, '0'), (Gone, '10')])
@pytest.mark.parametrize('kind', MODELS)
def test_killed_and_started_again_gives_the_same_bits(toy, monkeypatch, capsys, kind, how, every):
    """Saved on the way out; after every step; or at the end of the last epoch alone."""
    monkeypatch.setattr(training, 'EPOCHS_APART', -1)
    _, folder = toy
    more = '--batch', '8', '--save-every', every
    run(*more, model=kind, epochs=3)
    place = folder / name_of(kind)
    whole, row = state_of(folder, place.name), read_row(place)
    log = (place / 'log.csv').read_text()
    shutil.rmtree(place)
    for at in (8, 4):  # in the second epoch, then in what is left
        with killed(monkeypatch, [at], how):
            run(*more, model=kind, epochs=3)
        assert (place / 'resume.pt').exists() and not (place / 'row.json').exists()
    capsys.readouterr()
    run(*more, model=kind, epochs=3)
    assert 'goes on from' in capsys.readouterr().out
    assert not moved(whole, state_of(folder, place.name))
    again = read_row(place)
    for key in ('metrics', 'valid', 'best_epoch', 'epochs', 'identity', 'code'):
        assert again[key] == row[key]
    assert without_seconds((place / 'log.csv').read_text()) == without_seconds(log)
    assert not (place / 'resume.pt').exists()


def without_seconds(log):
    head, *lines = [line.split(',') for line in log.splitlines()]
    place = head.index('seconds')
    return [line[:place] + line[place + 1:] for line in lines]


@pytest.mark.parametrize('how', [KeyboardInterrupt, Gone])
def test_stopped_between_the_last_step_of_an_epoch_and_its_validation(toy, monkeypatch, how):
    _, folder = toy
    more = '--batch', '8', '--save-every', '0'
    run(*more)
    name = name_of('sasrec')
    whole = state_of(folder, name)
    shutil.rmtree(folder / name)

    def stopped(*a):
        raise how
    with monkeypatch.context() as patch:
        patch.setattr(SASRec, 'ranks', stopped)
        with pytest.raises(how):
            run(*more)
    run(*more)
    assert not moved(whole, state_of(folder, name))


def test_stopped_after_training_and_before_the_row(toy, monkeypatch):
    _, folder = toy
    run()
    name = name_of('sasrec')
    whole, row = state_of(folder, name), read_row(folder / name)
    shutil.rmtree(folder / name)

    def stopped(*a, **k):
        raise Gone
    with monkeypatch.context() as patch:
        patch.setattr(common.runs.Run, 'write', stopped)
        with pytest.raises(Gone):
            run()
    no_training(monkeypatch)
    run()
    assert not moved(whole, state_of(folder, name))
    assert read_row(folder / name)['metrics'] == row['metrics']


# ------------------------------------------------------------------------ what is refused

def refused(capsys, *options, **more):
    """The one line that a command ends in."""
    with pytest.raises(SystemExit) as exit_:
        command(lambda: run(*options, **more))
    lines = capsys.readouterr().err.strip().splitlines()
    assert exit_.value.code == 2 and 'error: ' in lines[-1]
    return lines


@pytest.mark.parametrize('kind, options, word', [
    ('bert4rec', ['--loss', 'ce'], '--loss ce: bert4rec knows masked only'),
    ('bert4rec', ['--loss', 'bce'], '--loss bce: bert4rec knows masked only'),
    ('bert4rec', ['--loss', 'sampled'], '--loss sampled: bert4rec knows masked only'),
    ('sasrec', ['--negatives', '9'], '--negatives: --loss bce'),
    ('sasrec', ['--loss', 'sampled', '--negatives', '1'], '--negatives'),
    ('sasrec', ['--loss', 'masked'], '--loss'),
    ('gru4rec', ['--loss', 'masked'], '--loss'),
    ('sasrec', ['--max-items', '1'], '--max-items'),
    ('sasrec', ['--variants', 'lf'], '--variants'),
    ('sasrec', ['--variants', 'lf-frozen'], '--variants'),
    ('sasrec', ['--variants', '-freeze'], '--variants'),
    ('sasrec', ['--init-scale', 'scaled'], '--init-scale'),
    ('sasrec', ['--init-scale', 'rescaled'], '--init-scale'),
    ('sasrec', ['--again', '--keep'], '--keep'),
    ('sasrec', ['--tie-output'], '--tie-output'),
    ('sasrec', ['--pca', '4'], '--pca'),
    ('sasrec', ['--exclude-history'], '--exclude-history'),
    ('sasrec', ['--micro-tokens', '4'], '--micro-tokens'),
    ('sasrec', ['--max_items', '4'], '--max_items'),
    ('sasrec', ['--epoch', '4'], '--epoch'),
    ('caser', [], '--model')])
def test_options_that_do_not_belong_are_refused(kind, options, word, capsys):
    assert word in refused(capsys, *options, model=kind)[-1]


@pytest.mark.parametrize('text, found', [
    ('random', ('random', 'random')), ('lf-freeze', ('lf', 'freeze')),
    ('pt-share10-trainable', ('pt-share10', 'trainable')), ('ft-id+text', ('ft', 'id+text')),
    ('my-own-further-emb', ('my-own', 'further-emb'))])
def test_variants_are_an_embedding_and_a_mode(text, found):
    assert train_seq.variant(text) == found


@pytest.mark.parametrize('source', ['../lf', '/tmp/lf', 'a/b', '$(x)', 'x\ny', ''])
def test_the_name_of_an_embedding_is_no_path(source):
    with pytest.raises(ValueError):
        train_seq.variant(f'{source}-freeze')


def test_each_model_has_its_own_defaults():
    found = {kind: arguments(model=kind) for kind in MODELS}
    assert {kind: (args.loss, args.batch) for kind, args in found.items()} == {
        'sasrec': ('bce', 128), 'bert4rec': ('masked', 256), 'bert4rec-tied': ('masked', 256),
        'gru4rec': ('ce', 128)}
    assert arguments('--loss', 'ce', '--batch', '3').loss == 'ce'
    assert SASRec.betas == GRU4Rec.betas == (0.9, 0.98) and BERT4Rec.betas == (0.9, 0.999)


def test_what_cannot_train_is_refused(toy, monkeypatch):
    with pytest.raises(UserError, match='4 heads'):
        run('--hidden', '18', model='bert4rec')
    monkeypatch.setenv('ELEPHANT_DATA', str(toy[1].parent / 'short'))
    canonical(toy[1].parent / 'short' / 'toy', length=(3, 4))
    prepare('toy', (3, 1, 0))
    for kind in ('sasrec', 'gru4rec'):
        with pytest.raises(UserError, match='toy: no user has 4 interactions'):
            run(model=kind)
    run(model='bert4rec', epochs=1)
    assert [row['model'] for row in load_rows('toy')] == ['bert4rec']


@pytest.mark.parametrize('change, word', [
    (lambda c: c.update(items=c['items'][::-1]), 'other items'),
    (lambda c: c['head']['identity'].update(data='x'), 'another version'),
    (lambda c: c['matrix'].__setitem__((3, 2), float('nan')), 'finite'),
    (lambda c: c['matrix'].__setitem__((3, 2), float('inf')), 'finite'),
    (lambda c: c.update(matrix=c['matrix'][:-1]), 'rows'),
    (lambda c: c['matrix'][1:].fill_(0.3), 'all items have the same row'),
    (lambda c: c['matrix'][1:].copy_(c['matrix'][1].clone()), 'all items have the same row'),
    (lambda c: c['matrix'].zero_(), 'all items have the same row')])
def test_embeddings_of_something_else_are_refused(toy, change, word, capsys):
    _, folder = toy
    edit_embeddings(folder, change)
    line, = refused(capsys, '--variants', 'lf-freeze')
    assert word in line and 'lf.pt' in line
    assert not load_rows('toy') and not list(folder.glob('sasrec*'))


def test_embeddings_that_are_not_there_are_refused(toy, capsys):
    line, = refused(capsys, '--variants', 'random', 'pt-freeze')
    assert 'pt.pt: no such file' in line and not load_rows('toy')


def test_training_parts_hold_neither_validation_nor_test_items(toy, monkeypatch):
    """Whatever a model is trained on comes from the training parts."""
    data, _ = toy
    seen, original = [], SASRec.loss

    def loss(self, items, offsets, *more):
        seen.append((items, offsets))
        return original(self, items, offsets, *more)
    monkeypatch.setattr(SASRec, 'loss', loss)
    run('--batch', '7', epochs=1)
    rows = sorted(tuple(items[a:b]) for items, offsets in seen
                  for a, b in zip(offsets[:-1], offsets[1:]))
    items, offsets = load('toy').training()
    expected = [take(items, offsets, np.array([user]))[0] for user in range(len(data.user_ids))]
    assert rows == sorted(tuple(row) for row in expected if len(row) >= 2)
    assert all(len(row) == data.lengths[user] - 2 for user, row in enumerate(expected))
