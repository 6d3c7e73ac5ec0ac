"""What the layers of RecFormer, SASRec and BERT4Rec have in common: precision, dropout, attention."""
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def half(x):
    """x in autocast's type, where that is on: cast once for several products."""
    return x.to(torch.get_autocast_dtype(x.device.type)) if torch.is_autocast_enabled(x.device.type) else x


class Dropout(torch.autograd.Function):
    """Dropout on a CPU: 8 or 16 random bits decide an element (p to 1/65536), in a fraction of the time of torch's draw."""

    @staticmethod
    def forward(ctx, x, p):
        kind, bits = (torch.int8, 8) if p * 2 ** 8 % 1 == 0 else (torch.int16, 16)
        drawn = torch.empty(-(-x.numel() * bits // 64), dtype=torch.int64).random_(-2 ** 63, None).view(kind)[:x.numel()]
        low, ctx.scale = round(p * 2 ** bits) - 2 ** (bits - 1) - 1, 1 / (1 - p)
        kept = drawn.view(x.shape).clamp_(low, low + 1).sub_(low).to(torch.int8)  # 0 or 1; a comparison to bool is slower
        ctx.save_for_backward(kept)
        return x * kept.to(x.dtype).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].to(gradient.dtype).mul_(ctx.scale), None


def dropout(x, p, training):
    """F.dropout, on a CPU by the class above."""
    return Dropout.apply(x, p) if training and p and x.device.type == 'cpu' else F.dropout(x, p, training)


def additive(mask, device):
    """A bool array, True where a query attends, as what is added to its scores: 0 or -inf, a tensor in autocast's type."""
    return half(torch.from_numpy(np.where(mask, np.float32(0), np.float32(-np.inf))).to(device, non_blocking=True))


def remade(function, *inputs):
    """function(*inputs), whose intermediate results are made again for the gradient instead of kept: for cheap steps through
    large tensors, with no random draws. (What the last step keeps is made again without that step.)"""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def attend(q, k, v, mask, p=0.0, training=False):
    """softmax(q k' / sqrt(d) + mask) v, the weights dropped out with p: q [..., Q, d], k and v [..., K, d] -> [..., Q, d].

    torch's fused kernel but for two cases on a CPU: in bfloat16 it is slower than plain products on sequences this
    short, and it takes no dropout.
    """
    p = p if training else 0.0
    if q.device.type != 'cpu' or (q.dtype == torch.float32 and not p):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).add_(mask)
    return dropout(scores.softmax(-1, dtype=q.dtype), p, training) @ v
