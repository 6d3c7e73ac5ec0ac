"""What the layers of all models share: where and how they compute, dropout, attention."""
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from common.files import UserError


@dataclass
class Machine:
    """Where a model computes, in which precision its matrix products run, and with how many others:
    `world` processes (training.join) draw the same numbers, and each computes its share."""
    device: torch.device = torch.device('cpu')
    bfloat16: bool = False
    micro_tokens: int = 2048  # in one pass of a language model: memory, and dropout's draws
    rank: int = 0             # number of this process; the first alone prints and saves
    world: int = 1

    def autocast(self):
        """Context in which matrix products run in the chosen precision."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def put(self, array):
        """A numpy array as a tensor on the device; the host does not wait for the copy."""
        tensor = torch.as_tensor(array)
        if self.device.type == 'cuda':
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def share(self, n):
        """This process's part of 0 ... n - 1."""
        return np.array_split(np.arange(n), self.world)[self.rank]

    def sum(self, x):
        """Sum of a tensor over the processes; a gradient flows into this one's part alone."""
        if self.world == 1:
            return x
        total = x.detach().clone()
        torch.distributed.all_reduce(total)
        return x + (total - x.detach())

    def sum_gradients(self, model):
        """Replace each gradient by its sum over the processes; one that has none adds zeros."""
        for p in model.parameters():
            if self.world > 1 and p.requires_grad:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                torch.distributed.all_reduce(p.grad)  # the same bits in each


class Model(nn.Module):
    """A module that knows its machine."""
    machine = Machine()

    def on(self, machine):
        """Move to this machine; returns the model."""
        self.machine = machine
        return self.to(machine.device)


def half(x):
    """x in autocast's type, where that is on: cast once for several products."""
    if torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def rounded(x):
    """x [R, ...] with rows of zeros up to a multiple of 64, where autocast is on: a CPU makes its
    bfloat16 kernels anew for each number of rows, which takes longer than a small product."""
    if not torch.is_autocast_enabled(x.device.type):
        return x
    return torch.cat([x, x.new_zeros(-len(x) % 64, *x.shape[1:])])


def rows(x, index):
    """x[index] along the first axis, x itself where index is `...`. The fastest backward: several
    times that of indexing on a CPU; on a GPU all others sort the index."""
    if index is ...:
        return x
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU 8 or 16 random bits decide an element (p to 1/65536), in a fraction of
    the time of torch's draw."""

    def forward(self, x):
        if not (self.training and self.p and x.device.type == 'cpu'):
            return super().forward(x)
        kind = torch.int8 if self.p * 256 % 1 == 0 else torch.int16
        bits = 8 * kind.itemsize
        count = -(-x.numel() * bits // 64)
        words = torch.empty(count, dtype=torch.int64).random_(-2 ** 63, None)
        drawn = words.view(kind)[:x.numel()].view(x.shape)
        low = round(self.p * 2 ** bits) - 2 ** (bits - 1) - 1
        # 0 or 1: clamping and shifting integers is faster than comparing to a bool
        kept = drawn.clamp_(low, low + 1).sub_(low)
        return x * kept.to(x.dtype).mul_(1 / (1 - self.p))


@torch.no_grad()
def watched(kind, run, *inputs):
    """[(module, its inputs, its output)] of every module of this class while run(*inputs) runs."""
    seen = []

    def keep(*called):
        if isinstance(called[0], kind):
            seen.append(called)
    with nn.modules.module.register_module_forward_hook(keep):
        run(*inputs)
    return seen


# ------------------------------------------------------------------------ attention

def additive(seen):
    """A bool tensor, True where a query attends, as what is added to its scores: 0 or -inf, in
    autocast's type."""
    return half(torch.where(seen, 0.0, -torch.inf))


def attend(q, k, v, mask, drop):
    """softmax(q k' / sqrt(d) + mask) v, the weights dropped out by `drop`, a Dropout.

    q [..., Q, d], k and v [..., K, d], mask as of `additive` -> [..., Q, d]. torch's fused kernel
    but for two cases on a CPU: in bfloat16 it is slower than plain products on sequences this
    short, and it takes no dropout.
    """
    p = drop.p * drop.training
    if q.device.type != 'cpu' or (q.dtype == torch.float32 and not p):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    q = q * q.shape[-1] ** -0.5
    scores = q @ k.mT
    weights = scores.add_(mask).softmax(-1, dtype=q.dtype)
    return drop(weights) @ v


class Attention(nn.Module):
    """Linear maps called query, key, value, and those that a subclass names as `more`; attention
    with `heads` heads, whose weights are dropped out."""

    def __init__(self, hidden, heads, dropout=0.0):
        super().__init__()
        if hidden % heads:
            raise UserError(f'--hidden: {hidden} cannot be split among {heads} heads; try another')
        self.heads = heads
        self.softmax = nn.Softmax(-1)
        self.drop = Dropout(dropout)
        for name in ('query', 'key', 'value', *self.more):
            setattr(self, name, nn.Linear(hidden, hidden))

    def split(self, y):
        """[..., T, H] -> [..., h, T, d]."""
        return y.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def packed(self, q, k, v, layout, wanted=...):
        """Attention of T tokens, one sequence after the other: [T, H], or of the rows `wanted` [R].

        q, k, v [T, H]. layout: `queries` [N, Q] and `keys` [N, K], the rows that stand in N blocks;
        `mask` as of `additive`; `place` [T], where token t stands among the N * Q queries.
        """
        query = self.split(rows(q, layout.queries))
        key = self.split(rows(k, layout.keys))
        value = self.split(rows(v, layout.keys))
        y = attend(query, key, value, layout.mask, self.drop)
        y = y.transpose(1, 2).flatten(2).flatten(0, 1)  # [N * Q, H]
        return rows(y, layout.place[wanted])
