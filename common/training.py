"""What every training script shares: device and precision, optimiser, and one run's training with
its early stopping, its log, and its resumable state.

A script shows its own loop. Each draw that a loop makes comes either from torch's generator, whose
state is saved, or from `np.random.default_rng([seed, k, epoch, ...])`, which a restart makes again
(k, a number of its own for each kind of draw), as it does the seeds of other processes' dropout: a
run that was killed ends with the same numbers.
"""
import contextlib
import copy
import ctypes
import math
import os
import signal
import sys
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import distributed
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from common.files import STOPPING, Diverged, UserError, follower, load_pt, save_pt, save_text
from common.layers import Machine
from common.progress import progress
from common.runs import differences

EPOCHS_APART = 30  # seconds: a large model is written in more than a short epoch's time


# ------------------------------------------------------------------------ machine

def start(args):
    """The Machine for these options, in which 'auto' is replaced. Errors: UserError where the
    device cannot be had."""
    if args.device == 'auto':
        args.device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if args.device == 'cuda':  # LOCAL_RANK: torchrun's number of this process
        args.device = f'cuda:{os.environ.get("LOCAL_RANK", 0)}'
    try:
        device = torch.empty(1, device=args.device).device
    except Exception as error:  # of several kinds
        raise UserError(f'--device {args.device}: {str(error).splitlines()[0]}') from None
    if args.deterministic:
        # cuBLAS asks for it before its first product
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)  # a product with numbers below 1e-38 takes 60 times as long
    torch.backends.cudnn.allow_tf32 = False  # float32 means that, in a GRU too
    # NaN gradients where a mask has 64 keys (torch 2.13 on an H100); a plan is made for each shape
    torch.backends.cuda.enable_cudnn_sdp(False)
    # what is freed is kept for the next step: fresh pages from the kernel cost a CPU more than many
    # a layer's work on them
    with contextlib.suppress(AttributeError):  # no glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # malloc.h: M_MMAP_MAX
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD
    if args.precision == 'auto':  # results say what they were made with
        args.precision = 'bfloat16' if faster_in_bfloat16(device) else 'float32'
    tokens = 2048
    if device.type == 'cuda':  # one a MiB: Longformer-base keeps half of that of a token, in
        # float32 nearly twice as much
        tokens = torch.cuda.get_device_properties(device).total_memory // 2 ** 20
        tokens //= 1 + (args.precision == 'float32')
    tokens = getattr(args, 'micro_tokens', None) or tokens
    return join(Machine(device, args.precision == 'bfloat16', tokens))


def faster_in_bfloat16(device):
    """Whether matrix products are: on a GPU where it has the type. A CPU tries (some that have it
    are twice as slow in it, others forty times): the fastest of 15 in one thread, the types in
    turns, as other work may slow any of them."""
    if device.type == 'cuda':
        return torch.cuda.get_device_capability(device) >= (8, 0)  # older ones emulate it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = [torch.ones(256, 256, dtype=kind) for kind in (torch.bfloat16, torch.float32)]
    seconds = [[timeit.timeit(partial(x.mm, x), number=1) for x in kinds] for _ in range(15)]
    torch.set_num_threads(threads)
    half, single = np.min(seconds, 0)
    return half < 0.8 * single


def join(machine):
    """The Machine, together with torchrun's other processes where it started some: they share each
    step, and end it with the gradients of one process that computed all."""
    if 'RANK' not in os.environ:
        return machine
    backend = 'gloo'
    if machine.device.type == 'cuda':
        backend = 'nccl'
        torch.cuda.set_device(machine.device)
    distributed.init_process_group(backend)
    machine.rank = distributed.get_rank()
    machine.world = distributed.get_world_size()
    if machine.rank:
        for number in STOPPING:  # torchrun ends it after the first saved
            signal.signal(number, signal.SIG_IGN)
        sys.stdout = open(os.devnull, 'w')  # but its errors are said
    return machine


def prefetch(things, machine):
    """The same things in the same order; but on a CPU, which has no time to spare for it, a thread
    makes the next one while the caller computes with this one. Making them must not draw from
    torch's generator. An error comes where its thing would have come; the thread ends with the
    loop, however that ends."""
    if machine.device.type == 'cpu':
        yield from things
        return
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, things, None)
        while (thing := coming.result()) is not None:
            coming = thread.submit(next, things, None)
            yield thing


# ------------------------------------------------------------------------ optimiser

def linear_schedule(optimizer, warmup, total):
    """Rate rises linearly over `warmup` steps (at most half of all), then falls linearly to 0 at
    step `total`; None: it stays."""
    def factor(step):
        if warmup is None:
            return 1
        rising = min(warmup, total // 2)
        return min((step + 1) / (rising + 1), (total - step) / (total - rising))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# ------------------------------------------------------------------------ one run's training

@contextlib.contextmanager
def uninterrupted():
    """What happens in here happens whole before a SIGTERM or Ctrl-C is obeyed."""
    came = {}  # by number; a handler is called with that and a frame
    before = {number: signal.signal(number, came.setdefault) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class Training(contextlib.AbstractContextManager):
    """One run's training: where it stands, its best weights, its log; it saves itself and goes on.

        with training:
            for epoch in training.epochs():
                for step in training.steps():
                    ...; loss.backward(); training.update(loss=loss)
                training.end_epoch(metric)
        training.restore_best()

    epoch, step: 0-based, those that are left. The validation metric is better when higher.
    steps: of an epoch; warmup: see linear_schedule; clip: of the gradient's norm; most: steps.
    Everything that the next step depends on is in resume.pt, which is used again only for the same
    identity and code. It is written too where a signal ends the process (see `command`).
    """

    def __init__(self, run, model, optimizer, steps, warmup=None, clip=None, most=None):
        self.epoch = self.step = self.best_epoch = 0
        self.best = -math.inf
        self.best_weights = None
        self.losses = {}
        self.log = []
        self.rng = rng_state()
        self.kept = list(vars(self))  # all of the above is in resume.pt
        self.run = run
        self.path = run.folder / 'resume.pt'
        self.model = model
        self.optimizer = optimizer
        self.per_epoch = steps
        self.clip = clip
        self.total = min(steps * run.args.epochs, most or math.inf)
        self.schedule = linear_schedule(optimizer, warmup, self.total)
        self.began = self.saved_at = time.monotonic()
        if self.path.exists():
            self.resume()
        self.bar = progress(total=self.total, initial=self.epoch * steps + self.step, unit='step',
                            desc=run.folder.name)

    # -------------------------------------------------- the loop

    def epochs(self):
        """Numbers of the epochs that are left."""
        while (self.epoch * self.per_epoch < self.total
               and self.epoch - self.best_epoch < self.run.args.patience):
            yield self.epoch

    def steps(self):
        """Numbers of this epoch's steps that are left."""
        return range(self.step, min(self.per_epoch, self.total - self.epoch * self.per_epoch))

    def update(self, **losses):
        """One optimiser step with the gradients as they are, refused where a loss or a gradient is
        not finite; saved when due. losses: scalar tensors, for the log; the first is minimised."""
        moving = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in moving])
        if self.clip:
            clip_grads_with_norm_(moving, self.clip, norm)
        # the one time in a step that the host waits for the device
        values = torch.stack([*losses.values(), norm]).tolist()
        if not all(map(math.isfinite, values)):
            raise Diverged(f'training went wrong at {self.where()}: loss {values[0]}, gradient '
                           f'norm {values[-1]}; try a lower rate or --precision float32')
        with uninterrupted():
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step()
            self.step += 1
            self.rng = rng_state()
            self.losses = {name: round(value, 5) for name, value in zip(losses, values)}
        self.bar.set_postfix(self.losses, refresh=False)
        self.bar.update()
        if time.monotonic() - self.saved_at >= 60 * self.run.args.save_every:
            self.save()

    def keep(self, metric):
        """Keep the weights as they are, where their validation metric is the best so far."""
        if metric > self.best:
            self.best_weights = copy.deepcopy(self.model.state_dict())
            self.best_epoch = self.epoch
            self.best = metric  # the last, should a signal come between them

    def end_epoch(self, metric):
        """Take one epoch's validation metric; keep its weights where it is the best so far."""
        with uninterrupted():
            self.epoch += 1
            self.step = 0
            self.keep(metric)
            entry = {'epoch': self.epoch, 'seconds': self.seconds(), **self.losses,
                     'valid': metric}
            self.log = self.log or [','.join(entry)]
            self.log.append(','.join(map(str, entry.values())))
        if time.monotonic() - self.saved_at > EPOCHS_APART:
            self.save()

    def restore_best(self):
        """Put the best weights back into the model; what the run's row says of its training."""
        self.model.load_state_dict(self.best_weights)
        return {'valid': self.best, 'best_epoch': self.best_epoch, 'epochs': self.epoch,
                'seconds': self.seconds()}

    def seconds(self):
        """Spent on this run, earlier sittings included."""
        return round(time.monotonic() - self.began, 1)

    def where(self):
        return f'epoch {self.epoch + 1}, step {self.step + 1}'

    # -------------------------------------------------- stopping and going on

    def __exit__(self, kind, *_):
        with uninterrupted():
            self.bar.close()
            if kind in (None, SystemExit):
                self.save()
            if kind is SystemExit:
                print(f'stopped before {self.where()}; the same command goes on from {self.path} '
                      '(leave --again out)', file=sys.stderr)

    def save(self):
        """Write resume.pt and log.csv."""
        self.saved_at = time.monotonic()
        if follower():
            return
        head = {'identity': self.run.identity, 'code': self.run.code, 'seconds': self.seconds()}
        states = {name: getattr(self, name).state_dict()
                  for name in ('model', 'optimizer', 'schedule')}
        stand = {key: getattr(self, key) for key in self.kept}
        save_pt(self.path, 'resume', head=head, states=states, stand=stand)
        save_text(self.run.folder / 'log.csv', '\n'.join([*self.log, '']))

    def resume(self):
        """Go on from resume.pt where it is of this identity and code."""
        try:
            saved = load_pt(self.path, 'resume')
        except UserError as error:
            print(f'{error}; training starts over')
            return
        if not self.run.usable(saved['head'], self.path):
            return
        for name, state in saved['states'].items():
            getattr(self, name).load_state_dict(state)
        vars(self).update(saved['stand'])
        # with --keep: of two codes, so that it is up to date with neither
        other = differences(saved['head']['code'], self.run.code)
        self.run.code.update(dict.fromkeys(other, ''))
        self.began -= saved['head']['seconds']
        cpu, gpus = self.rng
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(gpus[:torch.cuda.device_count()])  # it may be fewer by now
        print(f'goes on from {self.path}: {self.where()}')


def rng_state():
    """States of torch's generators, of the CPU and of every GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()
