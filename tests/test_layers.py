"""Pieces that the models share, against torch's own. Run: python -m pytest tests/test_layers.py"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.layers import Dropout, Machine, Model, additive, attend, half, rounded, rows


def inputs(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, dtype=dtype).requires_grad_() for n in (5, 7, 7))
    seen = torch.from_numpy(np.random.default_rng(0).random((3, 1, 5, 7)) < 0.5)
    seen[..., 0] = True
    return (q, k, v), seen, additive(seen).to(dtype)


# ------------------------------------------------------------------------ attention

@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_attention_equals_torchs_with_gradients(dtype, close):
    """In bfloat16 the plain products round scores and weights: about 2^-8 of a value."""
    qkv, seen, mask = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    ours = attend(*qkv, mask, Dropout(0.0))
    torchs = F.scaled_dot_product_attention(*exact, attn_mask=seen)
    aim = torch.randn(ours.shape)
    (ours.float() * aim).sum().backward()
    (torchs * aim).sum().backward()
    torch.testing.assert_close(ours.double(), torchs, atol=close, rtol=0)
    for x, y in zip(qkv, exact):
        torch.testing.assert_close(x.grad.double(), y.grad, atol=3 * close, rtol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_dropped_weights_average_to_attention_and_masked_keys_stay_unseen(dtype):
    (q, k, v), seen, mask = inputs(dtype)
    v = torch.eye(7, dtype=dtype).expand(3, 2, 7, 7)  # so that the output is the weights
    drop = Dropout(0.5)
    drawn = torch.stack([attend(q, k, v, mask, drop).float() for _ in range(400)])
    whole = attend(q, k, v, mask, Dropout(0.0)).float()
    torch.testing.assert_close(drawn.mean(0), whole, atol=0.15, rtol=0)
    assert not drawn[:, ~seen.expand(whole.shape)].any()
    assert (drawn == 0).float().mean() > 0.5
    untrained = attend(q, k, v, mask, drop.eval()).float()
    assert torch.equal(untrained, whole), 'no dropout outside training'


def test_the_path_with_dropout_equals_torchs_where_nothing_is_dropped():
    """float32 in training takes plain products; a share of 2^-16 drops next to nothing."""
    qkv, seen, mask = inputs(torch.float32)
    torch.manual_seed(3)
    ours = attend(*qkv, mask, Dropout(2 ** -16))
    torchs = F.scaled_dot_product_attention(*qkv, attn_mask=seen)
    torch.testing.assert_close(ours, torchs, atol=1e-4, rtol=1e-4)


def test_a_mask_is_0_or_minus_infinity_in_the_type_of_the_products():
    seen = torch.tensor([[True, False]])
    mask = additive(seen)
    assert mask.tolist() == [[0.0, -torch.inf]] and mask.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        mask = additive(seen)
    assert mask.tolist() == [[0.0, -torch.inf]] and mask.dtype == torch.bfloat16


# ------------------------------------------------------------------------ dropout

@pytest.mark.parametrize('p', [0.1, 0.3, 0.5])  # 16 random bits an element, and 8
def test_dropout_keeps_its_share_and_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 101, requires_grad=True)
    drop = Dropout(p)
    y = drop(x)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.01
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y), 'the gradient is dropped with the value'
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize('p', [0.1, 0.5])
def test_dropout_decides_each_element_alone_and_by_the_seed(p):
    """Eight bits of one word are eight elements: neighbours must not go together."""
    def kept(seed):
        torch.manual_seed(seed)
        return Dropout(p)(torch.ones(100_003)) != 0
    one = kept(0)
    for apart in (1, 2, 3, 4, 8):
        both = (one[apart:] & one[:-apart]).float().mean()
        assert abs(both - (1 - p) ** 2) < 0.01
    assert torch.equal(one, kept(0)) and not torch.equal(one, kept(1))


def test_dropout_of_nothing_and_of_bfloat16():
    assert Dropout(0.5)(torch.ones(0, 4)).shape == (0, 4)
    y = Dropout(0.5)(torch.ones(64, 64, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and set(y.flatten().tolist()) == {0.0, 2.0}


# ------------------------------------------------------------------------ machine

def test_half_casts_where_autocast_is_on():
    x = torch.randn(3)
    assert half(x) is x
    with torch.autocast('cpu', torch.bfloat16):
        assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize('shape', [(3,), (64, 2), (65, 2)])
def test_rows_are_rounded_up_with_zeros_where_autocast_is_on(shape):
    x = torch.ones(shape)
    assert rounded(x) is x
    with torch.autocast('cpu', torch.bfloat16):
        y = rounded(x)
    assert len(y) % 64 == 0 and len(y) - len(x) < 64 and y.shape[1:] == x.shape[1:]
    assert torch.equal(y[:len(x)], x) and not y[len(x):].any()


@pytest.mark.parametrize('bfloat16', [False, True])
def test_a_machines_products_run_in_its_precision(bfloat16):
    machine = Machine(bfloat16=bfloat16)
    layer = nn.Linear(4, 4)
    with machine.autocast():
        y = layer(torch.randn(2, 4))
    assert y.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    assert layer.weight.dtype == torch.float32, 'weights stay as they are'


def test_a_machine_puts_any_array_and_a_model_knows_its_machine():
    array = np.arange(12).reshape(3, 4)[:, ::2]
    assert Machine().put(array).tolist() == array.tolist()
    model, machine = Model(), Machine(bfloat16=True)
    assert model.machine == Machine() and model.on(machine) is model
    assert model.machine is machine and Model().machine == Machine(), 'of this model alone'


def test_every_process_has_its_share():
    shares = [Machine(rank=rank, world=3).share(8).tolist() for rank in range(3)]
    assert shares == [[0, 1, 2], [3, 4, 5], [6, 7]]
    x = torch.ones(3, requires_grad=True)
    assert Machine().share(3).tolist() == [0, 1, 2] and Machine().sum(x) is x


def test_a_sum_over_processes_has_the_gradient_of_ones_own_part(monkeypatch):
    """The other process has 10 times as much of everything."""
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda x: x.mul_(11))
    machine, model = Machine(world=2), nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    x = torch.tensor([0.1, 0.2], requires_grad=True)
    total = machine.sum(x)
    total.square().sum().backward()
    torch.testing.assert_close(total, 11 * x)
    torch.testing.assert_close(x.grad, 2 * 11 * x)
    machine.sum_gradients(model)
    assert not model.weight.grad.any() and model.bias.grad is None, 'it had none: zeros'
    model.weight.grad += 1
    machine.sum_gradients(model)
    assert (model.weight.grad == 11).all()


def test_rows_are_those_of_indexing_with_their_gradient():
    index = torch.tensor([[2, 0], [2, 1]])
    found = []
    for f in (rows, lambda x, i: x[i]):
        x = torch.arange(12.0).reshape(4, 3).requires_grad_()
        y = f(x, index)
        (y * y).sum().backward()
        found.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))
