"""Whole-or-absent files, refusals, locks, resume. Run: python -m pytest tests/test_files.py"""
import os
import pickle
import subprocess
import sys

import pytest
import torch

from common.files import HOST, ROOT, UserError, digest, load_pt, lock, made_from, save_pt, save_text, whole
from common.training import EarlyStopping, State, adamw, apply_gradients, linear_schedule


class Trap:
    def __reduce__(self):
        return os.system, ('echo trapped > trapped',)


def test_a_booby_trapped_file_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'meta': {'kind': 'seq'}, 'x': Trap()}, 'a.pt')
    (tmp_path / 'b.pt').write_bytes(pickle.dumps(Trap()))
    for name in ('a.pt', 'b.pt'):
        with pytest.raises(UserError, match='not a readable seq file'):
            load_pt(name, 'seq')
    assert not (tmp_path / 'trapped').exists()


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / 'x.pt'
    save_pt(path, 'seq', {'identity': {'a': (1, 2)}}, model=torch.ones(3))
    assert made_from(path, 'seq', {'a': [1, 2]}) and not made_from(path, 'seq', {'a': [1]})
    with pytest.raises(UserError, match='is a seq file; a resume file'):
        load_pt(path, 'resume')
    bytes_ = path.read_bytes()
    for cut in (0, 10, len(bytes_) // 2):
        path.write_bytes(bytes_[:cut])
        with pytest.raises(UserError, match='x.pt'):
            load_pt(path, 'seq')
        assert not made_from(path, 'seq', {'a': [1, 2]})
    with pytest.raises(UserError, match='no such file'):
        load_pt(tmp_path / 'y.pt', 'seq')


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    save_text(tmp_path / 'x', 'old')
    with pytest.raises(RuntimeError):
        with whole(tmp_path / 'x') as part:
            part.write_text('half')
            raise RuntimeError
    assert (tmp_path / 'x').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path):
    dead = subprocess.Popen(['true'])
    dead.wait()
    left = [f'.x.pt.{HOST}.{os.getppid()}.part', f'.x.pt.another-{HOST}.{dead.pid}.part']  # of a living process; of another machine
    for name in (f'.x.pt.{HOST}.{dead.pid}.part', *left):
        (tmp_path / name).write_text('half')
    save_text(tmp_path / 'y', 'whole')
    assert {p.name for p in tmp_path.iterdir()} == {'y', *left}


WRITES = {  # file: (how a script writes it, with 100 kB too many)
    'x.pt': 'save_pt(path, "seq", {}, model=torch.ones(10 ** 6))', 'results.json': 'save_json(path, ["x" * 10 ** 6])',
    'results.md': 'save_text(path, "x" * 10 ** 6)',
    'ranks/run.npz': 'metrics.save_row(path.parent.parent, {"run": "run"}, {"users": np.random.default_rng(0).random(10 ** 6)})'}


@pytest.mark.parametrize('name', WRITES)
def test_a_file_size_limit_leaves_the_earlier_file(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('earlier')
    code = ('import pathlib; from common import metrics; from common.files import *\n'
            f'path = pathlib.Path({str(path)!r})\ncommand(lambda: {WRITES[name]})')
    out = subprocess.run(['bash', '-c', 'ulimit -f 100; exec "$0" -c "$1"', sys.executable, code], cwd=ROOT,
                         capture_output=True, text=True)
    assert out.returncode == 2 and out.stderr.startswith('error: '), out.stderr
    assert path.name in out.stderr and len(out.stderr.splitlines()) == 1, out.stderr
    assert path.read_text() == 'earlier' and [p for p in tmp_path.rglob('*') if p.is_file()] == [path]


def test_a_second_user_of_a_folder_is_refused_by_name(tmp_path):
    with lock(tmp_path):
        with pytest.raises(UserError, match=f'in use by process {os.getpid()}'):
            with lock(tmp_path):
                pass
    with lock(tmp_path):
        pass


def test_digest_sees_type_shape_and_order():
    import numpy as np
    a = np.arange(6)
    assert len({digest(a), digest(a.reshape(2, 3)), digest(a.astype('int32')), digest(a[::-1]), digest(a, 1), digest(1, a)}) == 6


def test_schedule_rises_then_falls_without_a_jump():
    p = torch.nn.Linear(1, 1)
    optimizer = adamw(p, 1.0, 0.0)
    schedule = linear_schedule(optimizer, 10, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    steps = [b - a for a, b in zip(rates, rates[1:])]
    assert 0 < rates[0] < 0.11 and max(rates) == 1 and rates[-1] > 0 and max(map(abs, steps)) < 0.1
    assert optimizer.param_groups[0]['lr'] == 0


def test_decay_leaves_biases_and_norms_alone():
    model = torch.nn.ModuleDict({'dense': torch.nn.Linear(2, 2), 'LayerNorm': torch.nn.LayerNorm(2)})
    decay, plain = adamw(model, 1.0, 0.1).param_groups
    assert len(decay['params']) == 1 and decay['params'][0] is model.dense.weight and len(plain['params']) == 3


def test_state_of_other_options_is_not_used(tmp_path):
    model = torch.nn.Linear(2, 2)
    best = EarlyStopping(model, 2)
    state = State(tmp_path / 'r.resume', {'lr': 1}, 5, model=model, best=best)
    best.update(0.5, 0)
    state.next_epoch()
    torch.manual_seed(7)
    state.save()
    expected = torch.rand(1)
    fresh = EarlyStopping(model, 2)
    assert State(tmp_path / 'r.resume', {'lr': 1}, 5, model=model, best=fresh).epoch == 1 and fresh.best == 0.5
    assert torch.equal(torch.rand(1), expected), "torch's generator goes on"
    assert State(tmp_path / 'r.resume', {'lr': 2}, 5, model=model, best=fresh).epoch == 0
    with pytest.raises(UserError, match='validation metric is nan'):
        best.update(float('nan'), 1)


@pytest.mark.parametrize('saved', [False, True])
def test_training_that_goes_wrong_names_the_step_and_the_last_good_state(tmp_path, saved):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    state = State(tmp_path / 'x.resume', {}, 10, model=model)
    if saved:
        state.save()
    model.weight.grad = torch.tensor([[float('nan'), 1.0]])
    before = model.weight.detach().clone()
    with pytest.raises(UserError, match=f'epoch 1, step 1.*{"x.resume holds" if saved else "nothing was saved yet"}.*--lr'):
        apply_gradients(1.0, model, optimizer, state)
    assert torch.equal(model.weight, before), 'the step was not taken'
