"""What every training script shares: device and precision, optimiser, and one run's training with
its early stopping, its log, and its resumable state.

A script shows its own loop. Each draw that a loop makes comes either from torch's generator, whose
state is saved, or from `np.random.default_rng([seed, epoch, ...])`, which a restart makes again: a
run that was killed ends with the same numbers.
"""
import contextlib
import copy
import csv
import ctypes
import io
import math
import os
import pathlib
import signal
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

from common.files import STOPPED, Diverged, UserError, load_pt, save_pt, save_text
from common.layers import Machine
from common.progress import progress
from common.runs import usable


# ------------------------------------------------------------------------ machine

def start(args):
    """The Machine for these options. Errors: UserError where the device cannot be had."""
    name = args.device
    if name == 'auto':
        local = os.environ.get('LOCAL_RANK', 0)  # torchrun's number of this process
        name = f'cuda:{local}' if torch.cuda.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f'--device {args.device}: {why}; try --device cpu') from None
    if args.deterministic:
        # cuBLAS asks for it before its first product
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    if device.type == 'cpu':
        keep_freed_memory()
        has_bfloat16 = torch.cpu.get_capabilities().get('avx512_bf16', False)
    else:
        has_bfloat16 = torch.cuda.is_bf16_supported()
    bfloat16 = args.precision == 'bfloat16' or args.precision == 'auto' and has_bfloat16
    args.precision = 'bfloat16' if bfloat16 else 'float32'  # what results say they were made with
    most = getattr(args, 'micro_tokens', None) or (16384 if device.type == 'cuda' else 2048)
    return Machine(device, bool(bfloat16), most)


def keep_freed_memory():
    """Let glibc keep what is freed for the next step: fresh pages from the kernel cost a CPU more
    than many a layer's work on them. Elsewhere (no glibc) nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4  # malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2 ** 31 - 1)


class Processes:
    """The processes that share one training run (torchrun starts them; without it there is one).

    Each draws the same numbers, computes its share of the sequences, and ends every step with the
    same gradients: those of one process that computed all. The first alone prints and saves.
    """

    def __init__(self, device):
        self.rank = int(os.environ.get('RANK', 0))
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        if self.world == 1:
            return
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        torch.distributed.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
        if self.rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends it after the first saved
            sys.stdout = sys.stderr = open(os.devnull, 'w')

    def share(self, n):
        """This process's part of 0 ... n - 1."""
        return np.array_split(np.arange(n), self.world)[self.rank]

    def gather(self, x, n):
        """All processes' rows [n, H] from this one's `share(n)`; a gradient flows into its own rows
        alone."""
        if self.world == 1:
            return x
        sizes = [len(part) for part in np.array_split(np.arange(n), self.world)]
        own = F.pad(x.detach(), (0, 0, 0, sizes[0] - len(x)))
        parts = [torch.empty_like(own) for _ in sizes]
        torch.distributed.all_gather(parts, own)
        parts = [part[:size] for part, size in zip(parts, sizes)]
        parts[self.rank] = x
        return torch.cat(parts)

    def sum(self, tensors):
        """Replace each tensor by its sum over the processes."""
        if self.world > 1:
            for x in tensors:
                torch.distributed.all_reduce(x)


# ------------------------------------------------------------------------ optimiser

def adamw(model, lr, weight_decay):
    """AdamW over the parameters that train; no decay on biases and LayerNorm (RecFormer's)."""
    decay, plain = [], []
    for name, p in model.named_parameters():
        norm = 'layernorm' in name.lower().replace('_', '')
        if p.requires_grad:
            (plain if norm or name.endswith('bias') else decay).append(p)
    return torch.optim.AdamW([{'params': decay, 'weight_decay': weight_decay},
                              {'params': plain, 'weight_decay': 0.0}], lr=lr, fused=True)


def linear_schedule(optimizer, warmup, total):
    """Rate rises linearly over `warmup` steps (at most half of all), then falls linearly to 0 at
    step `total`."""
    warmup = min(warmup, total // 2)

    def factor(step):
        return min((step + 1) / (warmup + 1), (total - step) / max(1, total - warmup))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------ one run's training

class Training:
    """One run's training: where it stands, its best weights, its log; it saves itself and goes on.

        with training:
            for epoch in training.epochs():
                for step in training.steps():
                    ...; loss.backward(); training.update(loss=loss)
                training.end_epoch(metric)
        training.restore_best()

    epoch, step: 0-based, those that are left. The validation metric is better when higher.
    `tensors`: what a loop carries besides (the item table of an epoch). Everything that the next
    step depends on is in resume.pt, which is used again only for the same identity and code.
    """

    def __init__(self, run, args, model, optimizer, steps, epochs, patience, schedule=None,
                 clip=None, total=None):
        self.folder, self.identity, self.code, self.label = run
        self.path = pathlib.Path(self.folder) / 'resume.pt'
        self.model, self.optimizer, self.schedule, self.clip = model, optimizer, schedule, clip
        self.per_epoch, self.patience = steps, patience
        self.total = min(total or math.inf, steps * epochs)
        self.save_every = 60 * args.save_every
        self.epoch = self.step = self.bad = 0
        self.best, self.best_epoch, self.best_weights = -math.inf, 0, None
        self.tensors, self.log, self.running = {}, [], {}
        self.first = not int(os.environ.get('RANK', 0))  # of several processes the one that writes
        self.stop = self.busy = False
        self.before = 0.0  # seconds of earlier sittings
        self.rng = rng_state()
        if self.path.exists():
            self.resume(args)
        self.parameters = [p for group in optimizer.param_groups for p in group['params']]
        self.began = self.saved_at = time.monotonic()
        done = self.epoch * steps + self.step
        self.bar = progress(total=int(self.total), initial=done, unit='step', desc=self.label)

    # -------------------------------------------------- the loop

    def epochs(self):
        """Numbers of the epochs that are left."""
        while self.epoch * self.per_epoch < self.total and self.bad < self.patience:
            yield self.epoch

    def steps(self):
        """Numbers of this epoch's steps that are left."""
        last = min(self.per_epoch, self.total - self.epoch * self.per_epoch)
        while self.step < last:
            yield self.step

    def update(self, **losses):
        """One optimiser step with the gradients as they are, refused where a loss or a gradient is
        not finite; saved when due. losses: scalars; their first is the one that was minimised."""
        if self.clip:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters
                                                  if p.grad is not None])
        scalars = [torch.as_tensor(x, dtype=torch.float32, device=norm.device).detach()
                   for x in losses.values()]
        *values, norm = torch.stack([*scalars, norm.float()]).tolist()  # one read of the device
        if not all(map(math.isfinite, [*values, norm])):
            kept = f'{self.path} holds the last good state' if self.path.exists() \
                else 'nothing was saved yet'
            raise Diverged(f'training went wrong at {self.where()}: loss {values[0]}, gradient norm '
                           f'{norm}; {kept}; try a lower rate or --precision float32')
        with self.uninterrupted():
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.schedule:
                self.schedule.step()
            self.step += 1
            self.rng = rng_state()
        self.running = dict(zip(losses, values))
        text = ' '.join(f'{name} {value:.3f}' for name, value in self.running.items())
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if time.monotonic() - self.saved_at >= self.save_every:
            self.save()

    def end_epoch(self, metric, **more):
        """Take one epoch's validation metric; keep its weights where it is the best so far."""
        if not math.isfinite(metric):
            raise Diverged(f'validation metric is {metric} after epoch {self.epoch + 1}: '
                           'try a lower rate')
        with self.uninterrupted():
            self.bad += 1
            self.epoch, self.step = self.epoch + 1, 0
            if metric > self.best:
                self.best, self.best_epoch, self.bad = metric, self.epoch, 0
                self.best_weights = copy.deepcopy(self.model.state_dict())
            self.log.append({'epoch': self.epoch, 'seconds': round(self.seconds, 1), **self.running,
                             'valid': metric, **more})
        self.save()

    def restore_best(self):
        """Put the best weights back into the model."""
        self.model.load_state_dict(self.best_weights)

    @property
    def seconds(self):
        """Spent on this run, earlier sittings included."""
        return self.before + time.monotonic() - self.began

    def where(self):
        return f'epoch {self.epoch + 1}, step {self.step + 1}'

    # -------------------------------------------------- stopping and going on

    def __enter__(self):
        if self.first:
            self.handler = signal.signal(signal.SIGTERM, self.asked_to_stop)
        return self

    def __exit__(self, kind, error, trace):
        self.bar.close()
        if not self.first:
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN if kind else self.handler)
        if kind in (SystemExit, KeyboardInterrupt):
            self.save()
            print(f'stopped before {self.where()}; the same command goes on from {self.path}',
                  file=sys.stderr)

    def asked_to_stop(self, *_):
        """SIGTERM: leave at once, but not from within a change of the state."""
        self.stop = True
        if not self.busy:
            sys.exit(STOPPED)

    @contextlib.contextmanager
    def uninterrupted(self):
        """What happens in here happens whole before a SIGTERM is obeyed."""
        self.busy = True
        yield
        self.busy = False
        if self.stop:
            sys.exit(STOPPED)

    def save(self):
        """Write resume.pt and log.csv."""
        self.saved_at = time.monotonic()
        if not self.first:
            return
        parts = {name: part.state_dict() for name, part in self.parts().items()}
        head = {'identity': self.identity, 'code': self.code, 'seconds': self.seconds}
        stand = {key: getattr(self, key) for key in STAND}
        save_pt(self.path, 'resume', head=head, parts=parts, rng=self.rng, **stand)
        columns = list(dict.fromkeys(key for line in self.log for key in line))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator='\n')
        table.writeheader()
        table.writerows(self.log)
        save_text(self.path.with_name('log.csv'), text.getvalue())

    def resume(self, args):
        """Go on from resume.pt where it is of this identity and code."""
        try:
            saved = load_pt(self.path, 'resume')
        except UserError as error:
            print(f'{error}; training starts over')
            return
        if not usable(saved['head'], self.identity, self.code, args, self.path):
            return
        for name, part in self.parts().items():
            part.load_state_dict(saved['parts'][name])
        for key in STAND:
            setattr(self, key, saved[key])
        self.before, self.rng = saved['head']['seconds'], saved['rng']
        set_rng_state(self.rng)
        print(f'goes on from {self.path}: {self.where()}')

    def parts(self):
        """What has a state dict."""
        parts = {'model': self.model, 'optimizer': self.optimizer, 'schedule': self.schedule}
        return {name: part for name, part in parts.items() if part is not None}

    def finish(self):
        """The result is written: resume.pt has done its work."""
        if self.first:
            self.path.unlink(missing_ok=True)


STAND = ('epoch', 'step', 'bad', 'best', 'best_epoch', 'best_weights', 'tensors', 'log')


def rng_state():
    """State of torch's generators, of the CPU and of every GPU."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {'cpu': torch.get_rng_state(), 'cuda': cuda}


def set_rng_state(state):
    """Put torch's generators back to `state`."""
    torch.set_rng_state(state['cpu'])
    if torch.cuda.is_available() and state['cuda']:
        torch.cuda.set_rng_state_all(state['cuda'])
