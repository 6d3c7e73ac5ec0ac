"""What every training loop relies on: the next batch from a thread, no hidden waits for the device,
several processes that end as one. Run: python -m pytest tests/test_training.py
"""
import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import pretrain
import train_seq
from common.backbone import start_model
from common.data import prepare
from common.files import UserError, load_json, load_npz, load_pt
from common.layers import Machine
from common.progress import progress
from common.recformer import RecFormer
from common.sasrec import SASRec
from common.training import Training, join, prefetch, start
from tests.toy import canonical, tiny_bert

FILTERS = 4, 1, 0
GPU = SimpleNamespace(device=torch.device('cuda'))
PLM = ['--lr', '0.01', '--warmup', '0', '--precision', 'float32', '--device', 'cpu']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a dataset and a tiny language model without dropout."""
    folder = tmp_path_factory.mktemp('training')
    canonical(folder / 'data' / 'one')
    plm = tiny_bert(folder / 'plm')
    config = json.loads((plm / 'config.json').read_text())
    (plm / 'config.json').write_text(json.dumps({**config, 'hidden_dropout_prob': 0.0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        patch.setenv('ELEPHANT_RUNS', str(folder / 'runs'))
        prepare('one', FILTERS)
        yield folder


# ------------------------------------------------------------------------ the next batch

def threads():
    return {thread.name for thread in threading.enumerate()}


def counted(n, made):
    for i in range(n):
        made.append((i, threading.current_thread()))
        yield i


def test_a_thread_makes_the_same_things_in_the_same_order():
    made, before = [], threads()
    assert list(prefetch(counted(20, made), GPU)) == list(range(20))
    assert threading.main_thread() not in {thread for _, thread in made}
    assert threads() == before, 'it is gone'
    made.clear()
    assert list(prefetch(counted(5, made), Machine())) == list(range(5))
    assert {thread for _, thread in made} == {threading.main_thread()}, 'none on a CPU'
    assert list(prefetch(counted(0, made), GPU)) == []


def test_one_thing_is_made_ahead_while_one_is_used():
    made, ready = [], threading.Event()

    def things():
        for i in range(3):
            made.append(i)
            yield i
            ready.set()
    loop = prefetch(things(), GPU)
    assert next(loop) == 0 and ready.wait(30), 'made without being asked for'
    loop.close()
    assert made[:2] == [0, 1] and 2 not in made


def test_an_error_comes_in_its_place_and_a_loop_that_is_left_ends_the_thread():
    def things():
        yield 1
        raise KeyError('bad')
    before, seen = threads(), []
    with pytest.raises(KeyError, match='bad'):
        for thing in prefetch(things(), GPU):
            seen.append(thing)
    assert seen == [1] and threads() == before
    with pytest.raises(SystemExit):
        for thing in prefetch(counted(100, []), GPU):
            raise SystemExit(143)
    assert threads() == before
    for thing in prefetch(counted(100, []), GPU):
        break
    assert threads() == before


def options(script, place, out):
    """A command of a few steps, of the two scripts that make batches ahead."""
    if script is pretrain:
        command = ['one', '--plm', str(place / 'plm'), '--batch', '9', '--epochs', '2',
                   '--accumulate', '2', '--save-every', '0', '--out', str(out), *PLM]
    else:
        command = ['one', '--stage', '1', '--plm', str(place / 'plm'), '--batch', '16',
                   '--epochs', '2', '--save-every', '0', '--out', str(out), *PLM]
    return script.parse_args(command)


@pytest.mark.parametrize('script', [pretrain, finetune])
def test_batches_of_a_thread_give_the_same_bits_also_when_killed(place, tmp_path, monkeypatch,
                                                                 script):
    script.main(options(script, place, tmp_path / 'plain'))
    monkeypatch.setattr(script, 'prefetch', lambda things, _: prefetch(things, GPU))
    makers, pack = set(), RecFormer.pack

    def noticed(*args):
        makers.add(threading.current_thread())
        return pack(*args)
    monkeypatch.setattr(RecFormer, 'pack', noticed)
    script.main(options(script, place, tmp_path / 'ahead'))
    assert len(makers - {threading.main_thread()}) == 2, 'one each epoch'
    update, left = Training.update, [4]

    def killed(self, **losses):
        update(self, **losses)
        left[0] -= 1
        if not left[0]:
            raise ZeroDivisionError
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Training, 'update', killed)
        script.main(options(script, place, tmp_path / 'killed'))
    assert not left[0] and (tmp_path / 'killed' / 'resume.pt').exists()
    torch.manual_seed(99)
    script.main(options(script, place, tmp_path / 'killed'))
    names = 'plain', 'ahead', 'killed'
    a, b, c = (start_model(tmp_path / name).state_dict() for name in names)
    begun = start_model(None, str(place / 'plm')).state_dict()
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in a)
    assert sum(not torch.equal(a[name], begun[name]) for name in a) > 30


# ------------------------------------------------------------------------ no hidden waits

class Blind(Machine):
    """A machine on a device of no values, or on CUDA: whatever reads one fails."""

    def autocast(self):
        return contextlib.nullcontext()  # knows no such device as 'meta'


DEVICES = ['meta', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='needs CUDA'))]
READS = {'item': lambda x: x.sum().item(), 'float': lambda x: float(x.sum()),
         'if': lambda x: bool((x > 0).any()), 'cpu': lambda x: x.cpu(),
         'to': lambda x: x.to('cpu'), 'numpy': lambda x: x.detach().numpy(),
         'nonzero': lambda x: (x > 0).nonzero(), 'mask': lambda x: x[x > 0],
         'select': lambda x: x.masked_select(x > 0), 'where': lambda x: torch.where(x > 0),
         'repeat': lambda x: torch.repeat_interleave((x.flatten() > 0).long()),
         'put': lambda x: x.clone().__setitem__(x > 0, x), 'tolist': lambda x: x.tolist()}


@pytest.fixture(params=DEVICES)
def watched(request, monkeypatch):
    """The device; its steps may read once, in Training.update: `reads` counts such reads."""
    device = torch.device(request.param)
    reads = []

    def tolist(self):
        assert self.device.type == device.type
        reads.append(1)
        return [1.0] * self.numel()

    def watch(self, **losses):
        update(self, **losses)
        torch.cuda.set_sync_debug_mode('error')  # from the second step on

    def relax(self, *_, **__):
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
        self.epoch, self.step = self.epoch + 1, 0
        self.best_weights = self.model.state_dict()

    adam = torch.optim.Adam

    def unfused(*args, fused, **more):
        return adam(*args, foreach=False, **more)
    if device.type == 'cuda':
        update = Training.update
        monkeypatch.setattr(Training, 'update', watch)
    else:  # which has no fused kernel
        monkeypatch.setattr(torch.optim, 'Adam', unfused)
    monkeypatch.setattr(torch, 'is_autocast_enabled', lambda *_: False)
    monkeypatch.setattr(torch.Tensor, 'tolist', tolist)
    monkeypatch.setattr(Training, 'end_epoch', relax)
    monkeypatch.setattr(Training, 'save', lambda self: None)
    with NoMasks():
        yield SimpleNamespace(machine=Blind(device), reads=reads)
    if device.type == 'cuda':  # a test that raised left it as it was
        torch.cuda.set_sync_debug_mode('default')


class NoMasks(TorchDispatchMode):
    """Refuses to write where a mask is true: CUDA would count them, 'meta' lets it pass."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_):
            if any(index.dtype == torch.bool for index in args[1] if index is not None):
                raise RuntimeError('a mask as an index')
        return function(*args, **(kwargs or {}))


def run_of(folder, args):
    return SimpleNamespace(folder=folder, args=args, identity={}, code={}, usable=lambda *_: False)


def loop(name, place, folder, watched, monkeypatch):
    """One epoch of a script's own loop on the watched machine: the number of its steps."""
    machine = watched.machine
    if name in ('pretrain', 'finetune'):
        script = {'pretrain': pretrain, 'finetune': finetune}[name]
        args = options(script, place, folder)
        args.epochs, args.seed = 1, 0
        model = start_model(None, args.plm)
        tokens = pretrain.Sources(options(pretrain, place, folder), model.words)
        model.on(machine).train()
    if name == 'pretrain':
        monkeypatch.setattr(pretrain, 'held_out_accuracy', lambda *_: 0.5)
        pretrain.tune(args, model, tokens, run_of(folder, args))
    elif name == 'finetune':
        monkeypatch.setattr(finetune, 'ranks_of', lambda *_: None)
        monkeypatch.setattr(finetune, 'value_of', lambda _: 0.5)
        model.items = model.encode_items(tokens.tokens)
        finetune.tune(args, finetune.load('one'), model, tokens.tokens, run_of(folder, args))
    else:
        kind, loss = name.split()
        args = train_seq.parse_args(['one', '--model', kind, '--loss', loss, '--hidden', '16',
                                     '--epochs', '1', '--batch', '16', '--device', 'cpu'])
        data = train_seq.load('one')
        about = {'model': kind, 'loss': loss, 'init': 'random', 'mode': 'random', 'scale': 'raw',
                 'hidden': 16, 'max_items': 50, 'lr': 0.01, 'seed': 0}
        monkeypatch.setattr(train_seq, 'value_of', lambda _: 0.5)
        model = train_seq.build(data, None, about).on(machine)
        model.ranks = lambda *_: None
        train_seq.fit(data, model, run_of(folder, args), about)


LOOPS = ['pretrain', 'finetune', 'sasrec bce', 'sasrec ce', 'sasrec sampled', 'bert4rec masked',
         'gru4rec ce', 'gru4rec bce']


@pytest.mark.parametrize('name', LOOPS)
def test_a_step_waits_for_the_device_once(place, tmp_path, watched, monkeypatch, name):
    steps, update = [], Training.update
    monkeypatch.setattr(Training, 'update', lambda *a, **k: (update(*a, **k), steps.append(1)))
    loop(name, place, tmp_path, watched, monkeypatch)
    assert len(steps) > 1 and len(watched.reads) == len(steps)


@pytest.mark.parametrize('read', READS)
def test_every_read_of_a_device_value_is_noticed(place, tmp_path, watched, monkeypatch, read):
    """The test above can fail: one more read in a step, of each kind, is refused or counted."""
    loss = SASRec.loss

    def reading(self, *batch):
        value = loss(self, *batch)
        READS[read](torch.stack([value, value]))
        return value
    monkeypatch.setattr(SASRec, 'loss', reading)
    if read == 'tolist':
        loop('sasrec bce', place, tmp_path, watched, monkeypatch)
        assert len(watched.reads) == 2 * 3
    else:
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            loop('sasrec bce', place, tmp_path, watched, monkeypatch)


# ------------------------------------------------------------------------ several processes

CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload([__name__])


def process(environment, said, work, args):
    """One of torchrun's processes: its environment, then the work; what it prints is in a file."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with (open(said, 'w') as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        work(*args)


def together(folder, world, work, *args):
    """work(*args) in processes that know each other as torchrun's do, without its agent: a store in
    this process, on a port that the system gives, is all that they need. Returns what each says."""
    said = [folder / f'said-{rank}' for rank in range(world)]
    store = torch.distributed.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    names = {'WORLD_SIZE': world, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': store.port,
             'TORCHELASTIC_USE_AGENT_STORE': True, 'TORCHELASTIC_RESTART_COUNT': 0,
             **{name: os.environ[name] for name in ('ELEPHANT_DATA', 'ELEPHANT_RUNS')}}
    running = []
    for rank in range(world):
        own = {**names, 'RANK': rank, 'LOCAL_RANK': rank}
        environment = {name: str(value) for name, value in own.items()}
        running.append(CONTEXT.Process(target=process, daemon=True,
                                       args=(environment, said[rank], work, args)))
        running[-1].start()
    for one in running:
        one.join(600)
    assert [one.exitcode for one in running] == [0] * world
    return [file.read_text() for file in said]


def computed(plm, out, world=1):
    """Gradients of a step of each stage, and encodings, as this process ends with them; the first
    one saves them."""
    torch.set_num_threads(1)  # with more, rounding may part two equal scores: a tie less
    machine = join(Machine(micro_tokens=30))
    model = start_model(None, plm).on(machine).train()
    for p in model.longformer.embeddings.parameters():
        p.data.mul_(40)  # LayerNorm of next to nothing would multiply rounding
    args = pretrain.parse_args(['one', '--plm', plm, '--batch', '9', '--accumulate', '2'])
    sources = pretrain.Sources(args, model.words)
    fake = SimpleNamespace(epoch=0, per_epoch=2, steps=lambda: [0])
    (_, batches), = sources.steps(fake, model, args)
    found = {'encoded': model.encode_items(sources.tokens)}
    found |= {f'PT {key}': x for key, x in pretrain.step_gradients(model, batches, args).items()}
    found |= gradients(model, 'PT')
    data = pretrain.load('one')
    for users in (3, 20):  # three histories among four processes: one has none
        histories, labels = finetune.prefixes(data, np.arange(users), np.random.default_rng(0))
        items = torch.nn.Embedding.from_pretrained(found['encoded'], freeze=False)
        packed = model.pack(*histories, sources.tokens)
        found[f'states {users}'] = model.encode(packed).detach()
        loss = finetune.add_gradients(model, items.weight, packed, labels)
        tuned = torch.nn.ModuleDict({'model': model, 'table': items})
        machine.sum_gradients(tuned)
        for p in tuned.parameters() if world > 1 else ():
            first = p.grad.clone()
            torch.distributed.broadcast(first, 0)
            assert torch.equal(p.grad, first), 'the same bits in each process'
        found |= {f'FT {users} loss': machine.sum(loss), **gradients(tuned, f'FT {users}')}
    items, offsets, _ = data.split('test')
    found['histories'] = model.encode_histories(items, offsets, sources.tokens, 'users', 13)
    model.items = found['encoded']
    ranks = finetune.ranks_of(model, sources.tokens, data, 'test')
    found |= {f'ranks {name}': torch.from_numpy(of).float() for name, of in ranks.items()}
    assert machine.world == world
    if not machine.rank:
        torch.save(found, out)


def gradients(model, name):
    """{name: gradient}; the model has none afterwards."""
    found = {f'{name} {key}': p.grad.clone() for key, p in model.named_parameters()
             if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize('world', [2, 4])
def test_processes_compute_what_one_does(place, tmp_path, world):
    """Nobody twice, nobody left out: encodings, losses and gradients of each stage."""
    threads = torch.get_num_threads()
    computed(str(place / 'plm'), tmp_path / 'one')
    torch.set_num_threads(threads)
    together(tmp_path, world, computed, str(place / 'plm'), tmp_path / 'shared', world)
    one, shared = (torch.load(tmp_path / name) for name in ('one', 'shared'))
    assert len(one) > 100 and one.keys() <= shared.keys()
    for key in shared:
        expected = one.get(key, torch.zeros(()))  # what takes no part has a gradient of zeros
        most = 1e-6 * max(1, expected.abs().max())
        assert (shared[key] - expected).abs().max() <= most, key


def says():
    """What a script says in its ways, and a bar that is drawn at once."""
    machine = join(Machine())
    print(f'result of {machine.rank}', flush=True)
    print(f'error of {machine.rank}', file=sys.stderr)
    list(progress(range(3), desc=f'bar of {machine.rank}', delay=0, mininterval=0))


def test_of_a_follower_errors_alone_are_seen(tmp_path):
    first, follower = together(tmp_path, 2, says)
    assert 'result of 0' in first and 'error of 0' in first and follower == 'error of 1\n'


def script(name, command):
    """A script's main, by its name: what a process takes along must be plain."""
    module = importlib.import_module(name)
    module.main(module.parse_args(command))


def test_two_processes_end_with_the_weights_of_one(place, tmp_path):
    """Both scripts as torchrun starts them: one row, one checkpoint, the weights of one process."""
    plm = str(place / 'plm')
    commands = {'pt': ('pretrain', ['one', '--plm', plm, '--batch', '9', '--accumulate', '2']),
                'ft1': ('finetune', ['one', '--stage', '1', '--plm', plm, '--batch', '16']),
                'ft2': ('finetune', ['one', '--stage', '2', '--batch', '16',
                             '--trainable-items'])}
    begun = start_model(None, plm).state_dict()
    for name, (module, command) in commands.items():
        more = ['--epochs', '2', *PLM, '--out']
        if name == 'ft2':
            more = ['--checkpoint', str(tmp_path / 'alone' / 'ft1'), *more]
        folders = [tmp_path / where / name for where in ('alone', 'shared')]
        script(module, [*command, *more, str(folders[0])])
        said = together(tmp_path, 2, script, module, [*command, *more, str(folders[1])])
        assert said[0].count('written to') == 1 and not said[1], 'the first alone prints'
        files = [sorted(file.name for file in folder.iterdir()) for folder in folders]
        assert files[0] == files[1] and 'row.json' in files[0]
        a, b = (start_model(folder).state_dict() for folder in folders)
        # against how far each tensor moved; Adam blows up the rounding of gradients near zero, such
        # as a key's bias, so: the median
        apart = [float((value - b[key]).norm() / (value - begun[key]).norm())
                 for key, value in a.items() if not torch.equal(value, begun[key])]
        assert len(apart) > 30 and np.median(apart) < 0.01
        rows = [load_json(folder / 'row.json') for folder in folders]
        assert rows[0]['best_epoch'] > 0, 'stage 2 is compared with itself, not with stage 1'
        assert rows[0]['valid'] == pytest.approx(rows[1]['valid'], abs=0.02)
        logs = [np.genfromtxt(folder / 'log.csv', delimiter=',', names=True) for folder in folders]
        for column in set(logs[0].dtype.names) & {'contrastive', 'mlm', 'loss'}:
            assert logs[0][column] == pytest.approx(logs[1][column], rel=1e-3), column
        exports = [tmp_path / where / f'{name}.pt' for where in ('alone', 'shared')]
        export = ['one', '--checkpoint', str(folders[0]), '--precision', 'float32', '--out']
        script('export_embeddings', [*export, str(exports[0])])
        together(tmp_path, 2, script, 'export_embeddings', [*export, str(exports[1])])
        a, b = (load_pt(path, 'embeddings')['matrix'] for path in exports)
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        if module == 'finetune':
            users = [load_npz(folder / 'ranks.npz', ['users'], '')['users'] for folder in folders]
            assert np.array_equal(*users)


@pytest.mark.parametrize('device', ['auto', 'cuda'])
def test_each_process_of_torchrun_takes_a_gpu_of_its_own(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setenv('LOCAL_RANK', '99')  # which nobody has
    with pytest.raises(UserError, match='--device cuda:99'):
        start(SimpleNamespace(device=device))


def alone(signals):
    """What each of the processes does: it says which signals it ignores, then tries train_seq.py."""
    machine = start(SimpleNamespace(device='cpu', deterministic=False, precision='float32'))
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
    ignored = [signal.getsignal(number) is signal.SIG_IGN for number in signals]
    assert ignored == [machine.rank > 0] * len(signals)
    args = train_seq.parse_args(['one', '--model', 'sasrec'])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match='leave torchrun out'):
        patch.setattr(train_seq, 'start', lambda args: machine)
        train_seq.main(args)


def test_other_processes_leave_signals_to_the_first_and_id_models_to_one(place, tmp_path):
    """torchrun passes Ctrl-C on to all: one that left at once would keep the first from saving. Two
    processes of train_seq.py would write the same files."""
    together(tmp_path, 2, alone, [signal.SIGTERM, signal.SIGINT])
