"""Pieces that the models share, against torch's own. Run: python -m pytest tests/test_layers.py"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.layers import additive, attend, dropout, half, remade


def inputs(dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, n, 8, dtype=dtype).requires_grad_() for n in (5, 7, 7))
    seen = np.random.default_rng(0).random((3, 1, 5, 7)) < 0.5
    seen[..., 0] = True
    return (q, k, v), torch.from_numpy(seen), additive(seen, 'cpu').to(dtype)


@pytest.mark.parametrize('dtype, close', [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_attention_equals_torchs_with_gradients(dtype, close):
    """In bfloat16 the plain products round scores and weights: about 2^-8 of a value."""
    qkv, seen, mask = inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    ours, torchs = attend(*qkv, mask), F.scaled_dot_product_attention(*exact, attn_mask=seen)
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
    whole = attend(q, k, v, mask).float()
    drawn = torch.stack([attend(q, k, v, mask, 0.5, True).float() for _ in range(400)])
    torch.testing.assert_close(drawn.mean(0), whole, atol=0.15, rtol=0)
    assert not drawn[:, ~seen.expand(whole.shape)].any() and (drawn == 0).float().mean() > 0.5
    assert torch.equal(attend(q, k, v, mask, 0.5, False).float(), whole), 'no dropout outside training'


def test_what_is_made_again_has_the_same_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    w = torch.randn(3, 3, requires_grad=True)
    f = lambda y: F.gelu(y @ w).exp() @ w
    found = []
    for run in (f, lambda y: remade(f, y)):
        x.grad = w.grad = None
        run(x).sum().backward()
        found.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize('p', [0.3, 0.5])  # 16 random bits an element, and 8
def test_dropout_keeps_its_share_and_the_mean(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 101, requires_grad=True)
    y = dropout(x, p, True)
    kept = y != 0
    assert abs(kept.float().mean() - (1 - p)) < 0.01 and torch.allclose(y[kept], torch.tensor(1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y), 'the gradient is dropped with the value'
    assert torch.equal(dropout(x, p, False), x)


def test_half_casts_where_autocast_is_on():
    x = torch.randn(3)
    assert half(x) is x
    with torch.autocast('cpu', torch.bfloat16):
        assert half(x).dtype == torch.bfloat16
