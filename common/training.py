"""What every training script shares: device and precision, seeds, optimiser, early stopping, resumable state.

A script shows its own loop. Each draw that a loop makes comes either from torch's generator, whose state is saved, or from
`np.random.default_rng([seed, epoch, ...])`, which a restart makes again: a run that was killed ends with the same numbers.
"""
import contextlib
import copy
import ctypes
import math
import os
import pathlib
import random
import signal
import sys

import numpy as np
import torch
import torch.nn.functional as F

from common.files import Diverged, UserError, made_from, save_pt

STOPPED = 143  # exit code after SIGTERM (128 + 15), what a shell would report
_stop = False


def positive(kind=int, zero=False, most=None):
    """An argparse type: a number above 0 (or at least 0 with `zero`), finite, at most `most`."""
    def number(text):
        value = kind(text)
        low = value >= 0 if zero else value > 0
        if not (low and math.isfinite(value) and (most is None or value <= most)):
            raise ValueError
        return value
    bound = f'{"at least 0" if zero else "above 0"}' + (f' and at most {most}' if most is not None else '')
    number.__name__ = f'{"whole number" if kind is int else "number"} ({bound})'  # argparse prints this name
    return number


def add_runtime_options(parser, language_model=False):
    group = parser.add_argument_group('machine')
    if language_model:
        group.add_argument('--micro_tokens', type=positive(),
                           help='tokens in one pass of the model: memory only (default: 2048, on CUDA 16384)')
    group.add_argument('--device', default='auto', help='auto (CUDA where there is one), cpu, cuda, cuda:1, ...')
    group.add_argument('--precision', default='auto', choices=['auto', 'bfloat16', 'float32'],
                       help='of matrix products; weights stay float32. auto: bfloat16 where the hardware has it')
    group.add_argument('--deterministic', action='store_true',
                       help='CUDA: only kernels that give the same bits on every run (slower; a CPU always does)')
    group.add_argument('--save_every', type=positive(), default=500, metavar='STEPS',
                       help='steps between checkpoints inside an epoch (ours); one is written after every epoch too')


def keep_freed_memory():
    """Let glibc keep what is freed for the next step. It hands large blocks back to the kernel, whose fresh pages cost a CPU
    more than many a layer's work on them. Elsewhere (no glibc) nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2 ** 31 - 1)


def start(args):
    """(device, autocast) for these options: `with autocast():` runs matrix products in the chosen precision."""
    try:
        device = torch.device((f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if torch.cuda.is_available() else 'cpu')
                              if args.device == 'auto' else args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {args.device}: {str(error).splitlines()[0]}; try --device cpu') from None
    if getattr(args, 'micro_tokens', 1) is None:
        args.micro_tokens = 16384 if device.type == 'cuda' else 2048
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS asks for it before its first product
        torch.use_deterministic_algorithms(True)
    if device.type == 'cpu':
        keep_freed_memory()
    bfloat16 = args.precision == 'bfloat16' or args.precision == 'auto' and (
        torch.cuda.is_bf16_supported() if device.type == 'cuda' else torch.cpu.get_capabilities().get('avx512_bf16', False))
    return device, lambda: torch.autocast(device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()


class Ranks:
    """The processes that share one training run (torchrun starts them; without it there is one).

    Each draws the same numbers, computes its share of the sequences, and ends every step with the same gradients: those of
    one process that computed them all. The first one alone prints, saves and is stopped.
    """

    def __init__(self, device):
        self.rank, self.world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        if self.world > 1:
            if device.type == 'cuda':
                torch.cuda.set_device(device)
            torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
            if self.rank:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends this one after the first has saved
                sys.stdout = sys.stderr = open(os.devnull, 'w')

    def share(self, n):
        """This process's part of 0 ... n - 1."""
        return np.array_split(np.arange(n), self.world)[self.rank]

    def gather(self, x, n):
        """All processes' rows [n, H] from this one's `share(n)`; a gradient flows into its own rows alone."""
        if self.world == 1:
            return x
        sizes = [len(part) for part in np.array_split(np.arange(n), self.world)]
        own = F.pad(x.detach(), (0, 0, 0, sizes[0] - len(x)))
        rows = [torch.empty_like(own) for _ in sizes]
        torch.distributed.all_gather(rows, own)
        rows = [r[:size] for r, size in zip(rows, sizes)]
        rows[self.rank] = x
        return torch.cat(rows)

    def sum(self, tensors):
        """Replace each tensor by its sum over the processes."""
        if self.world > 1:
            for x in tensors:
                torch.distributed.all_reduce(x)


def _ask_to_stop(*_):
    global _stop
    _stop = True


def seed_all(seed):
    """Seed torch (initial weights, dropout); numpy draws have generators of their own."""
    random.seed(seed)
    torch.manual_seed(seed)


def adamw(model, lr, weight_decay):
    """AdamW over the parameters that train; no decay on biases and LayerNorm (RecFormer's settings)."""
    decay, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if name.endswith('bias') or 'layernorm' in name.lower().replace('_', '') else decay).append(p)
    return torch.optim.AdamW([{'params': decay, 'weight_decay': weight_decay}, {'params': plain, 'weight_decay': 0.0}],
                             lr=lr, fused=True)


def linear_schedule(optimizer, warmup, total):
    """Rate rises linearly over `warmup` steps (at most half of all), then falls linearly to 0 at step `total`."""
    warmup = min(warmup, total // 2)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (warmup + 1), (total - step) / max(1, total - warmup)))


def apply_gradients(loss, model, optimizer, state, clip=None):
    """One optimizer step, refused where the loss or a gradient is not finite. loss: float, of this step."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip) if clip else torch.nn.utils.get_total_norm(
        [p.grad for p in parameters if p.grad is not None])
    if not (math.isfinite(loss) and torch.isfinite(norm)):
        saved = f'{state.path} holds the last good state' if state.path.exists() else 'nothing was saved yet'
        raise Diverged(f'training went wrong at {state.where()}: loss {loss}, gradient norm {float(norm)}; {saved}; '
                       'try a lower --lr or --precision float32')
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class EarlyStopping:
    """Keeps the best weights by a validation metric (higher is better) and counts epochs without a better one."""

    def __init__(self, model, patience):
        self.model, self.patience = model, patience
        self.best, self.best_epoch, self.bad, self.weights = -math.inf, -1, 0, None

    def update(self, metric, epoch):
        """Take one epoch's metric; True where it is the best so far."""
        if not math.isfinite(metric):
            raise Diverged(f'validation metric is {metric} after epoch {epoch}: try a lower --lr')
        better = metric > self.best
        if better:
            self.best, self.best_epoch, self.bad = metric, epoch, 0
            self.weights = copy.deepcopy(self.model.state_dict())
        else:
            self.bad += 1
        return better

    @property
    def stop(self):
        return self.bad >= self.patience

    def restore(self):
        """Put the best weights back into the model."""
        self.model.load_state_dict(self.weights)

    def state_dict(self):
        return {k: getattr(self, k) for k in ('best', 'best_epoch', 'bad', 'weights')}

    def load_state_dict(self, state):
        vars(self).update(state)


class State:
    """Where a training run stands: epoch (0-based), step within it, torch's generators, and its parts' state dicts.

    The file holds everything that the next step depends on (SIGTERM is caught from here on: the loop saves and leaves);
    `identity` (options and input digests) must match for it to be used. Loops skip the first `state.step` batches of an
    epoch and call `advance()` after every step.
    """

    def __init__(self, path, identity, save_every, **parts):
        self.path, self.identity, self.save_every, self.parts = pathlib.Path(path), identity, save_every, parts
        self.epoch = self.step = 0
        self.tensors = {}  # what a loop carries besides its parts, e.g. the item table of this epoch
        self.writes = not int(os.environ.get('RANK', 0))  # of several processes the first
        if self.writes:
            signal.signal(signal.SIGTERM, _ask_to_stop)
        saved = made_from(self.path, 'resume', identity)
        if saved:
            self.epoch, self.step, self.tensors = saved['epoch'], saved['step'], saved['tensors']
            for name, part in parts.items():
                part.load_state_dict(saved['parts'][name])
            torch.set_rng_state(saved['rng'])
            if torch.cuda.is_available() and saved['cuda_rng']:
                torch.cuda.set_rng_state_all(saved['cuda_rng'])
            print(f'goes on from {self.path}: {self.where()}')

    def where(self):
        return f'epoch {self.epoch + 1}, step {self.step + 1}'

    def save(self):
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        save_pt(self.path, 'resume', {'identity': self.identity}, epoch=self.epoch, step=self.step, tensors=self.tensors,
                rng=torch.get_rng_state(), cuda_rng=cuda, parts={k: p.state_dict() for k, p in self.parts.items()})

    def advance(self):
        """Count one finished step; save when due; after SIGTERM save and leave."""
        self.step += 1
        self._save_if(self.step % self.save_every == 0)

    def next_epoch(self):
        self.epoch, self.step = self.epoch + 1, 0
        self._save_if(True)

    def _save_if(self, due):
        if self.writes and (due or _stop):
            self.save()
        if _stop:
            print(f'stopped by SIGTERM before {self.where()}; the same command goes on from {self.path}', file=sys.stderr)
            sys.exit(STOPPED)

    def finish(self):
        """The result is written: the resume file has done its work."""
        if self.writes:
            self.path.unlink(missing_ok=True)
