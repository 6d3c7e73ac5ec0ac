"""Whole-or-absent files, refusals, locks; training that is stopped, goes on, or goes wrong.

Run: python -m pytest tests/test_files.py
"""
import csv
import gzip
import hashlib
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from common import files, training
from common.files import (ROOT, Diverged, UserError, command, content_sha256, digest, file_stamp,
                          load_json, load_npz, load_pt, lock, save_json, save_npz, save_pt,
                          save_text, whole)
from common.runs import Run
from common.training import Training, linear_schedule


# ------------------------------------------------------------------------ reading and writing

class Trap:
    def __reduce__(self):
        return os.system, ('echo trapped > trapped',)


def test_a_booby_trapped_file_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'kind': 'seq', 'x': Trap()}, 'a.pt')
    (tmp_path / 'b.pt').write_bytes(pickle.dumps(Trap()))
    for name in ('a.pt', 'b.pt'):
        with pytest.raises(UserError, match='is no readable seq file'):
            load_pt(Path(name), 'seq')
    assert not (tmp_path / 'trapped').exists()


def test_damaged_and_foreign_files_are_named(tmp_path):
    path = tmp_path / 'x.pt'
    save_pt(path, 'seq', identity={'a': (1, 2)}, model=torch.ones(3))
    content = load_pt(path, 'seq')
    assert content['identity'] == {'a': (1, 2)} and torch.equal(content['model'], torch.ones(3))
    with pytest.raises(UserError, match='x.pt: is no readable resume file: .*of another kind'):
        load_pt(path, 'resume')
    good = path.read_bytes()
    for cut in (0, 10, len(good) // 2):
        path.write_bytes(good[:cut])
        with pytest.raises(UserError, match='x.pt: is no readable seq file'):
            load_pt(path, 'seq')
    for foreign in ({'model': torch.ones(3)}, torch.ones(3), [1]):
        torch.save(foreign, path)
        with pytest.raises(UserError, match='x.pt: is no readable seq file'):
            load_pt(path, 'seq')
    with pytest.raises(UserError, match='y.pt: no such file'):
        load_pt(tmp_path / 'y.pt', 'seq')


def test_a_flipped_bit_anywhere_in_a_tensor_is_noticed(tmp_path):
    path = tmp_path / 'x.pt'
    save_pt(path, 'seq', model=torch.ones(64))
    good = path.read_bytes()
    begin = good.index(torch.ones(64).numpy().tobytes())
    for place in range(begin, begin + 256, 17):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1:])
        with pytest.raises(UserError, match='x.pt: is no readable seq file: damaged.*remove it'):
            load_pt(path, 'seq')
    path.write_bytes(good)
    assert torch.equal(load_pt(path, 'seq')['model'], torch.ones(64))


def test_a_place_that_cannot_be_written_is_named_not_the_temporary_file(tmp_path):
    with pytest.raises(OSError):
        save_text(Path('.'), 'x')  # which has no name
    for bad in (tmp_path, Path('/proc/x.csv')):  # a folder; nobody can write there
        with pytest.raises(OSError) as said:
            save_text(bad, 'x')
        assert said.value.filename == str(bad)


def test_a_file_cut_anywhere_is_named(tmp_path):
    path = tmp_path / 'x.pt'
    save_pt(path, 'seq', model={str(i): torch.ones(300) for i in range(20)})
    whole = path.read_bytes()
    assert len(whole) > 20_000
    for cut in [*range(0, len(whole), 997), len(whole) - 100, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match='x.pt: is no readable seq file'):
            load_pt(path, 'seq')


def test_what_may_not_be_read_is_no_damage(tmp_path):
    """A training that starts over because its state may not be read would lose it."""
    with pytest.raises(IsADirectoryError):
        load_pt(tmp_path, 'seq')


def test_no_memory_and_no_permission_are_no_damage(tmp_path, monkeypatch):
    """Training would start over on top of the state that another process could still read, and a
    preparation would lose the filters that it remembers."""
    save_pt(tmp_path / 'x.pt', 'resume', a=torch.ones(3))
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with monkeypatch.context() as patch:
            patch.setattr(torch, 'load', raising(error))
            with pytest.raises(type(error)):
                load_pt(tmp_path / 'x.pt', 'resume')
    assert load_pt(tmp_path / 'x.pt', 'resume')['a'].sum() == 3
    save_npz(tmp_path / 'x.npz', {'a': np.ones(3)})
    for error in (MemoryError(), PermissionError()):
        monkeypatch.setattr(np, 'load', raising(error))
        with pytest.raises(type(error)):
            load_npz(tmp_path / 'x.npz', ['a'], 'make it')


def raising(error):
    """A function that ends in this error."""
    def fail(*_, **__):
        raise error
    return fail


def test_json_is_read_as_it_was_written(tmp_path):
    value = {'a': [1, None, 'ä'], 'b': {'c': 0.1 + 0.2}}
    save_json(tmp_path / 'deep' / 'er' / 'x.json', value)
    assert load_json(tmp_path / 'deep' / 'er' / 'x.json') == value
    assert load_json(tmp_path / 'y.json') == {}, 'there is none'
    assert load_json(tmp_path / 'deep' / 'er' / 'x.json', 'a', 'b') == value
    with pytest.raises(UserError, match='x.json: no valid JSON of ours'):
        load_json(tmp_path / 'deep' / 'er' / 'x.json', 'a', 'c')
    for text in ('{"cut', '[1]', 'null'):
        (tmp_path / 'y.json').write_text(text)
        with pytest.raises(UserError, match='y.json: no valid JSON of ours'):
            load_json(tmp_path / 'y.json', 'a')


def test_a_failed_write_leaves_the_earlier_file(tmp_path):
    save_text(tmp_path / 'x', 'old')
    with pytest.raises(RuntimeError):
        with whole(tmp_path / 'x') as part:
            part.write_text('half')
            raise RuntimeError
    assert (tmp_path / 'x').read_text() == 'old' and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_half_written_goes_with_the_next_write(tmp_path):
    """Two who write one file at the same time: it is whole, and the one who is late hears of it."""
    script = (f'import os\nfrom pathlib import Path\nfrom common.files import whole\nwith whole(Path({str(tmp_path / "x.pt")!r})) as '
              'part:\n    part.write_text("half")\n    os.kill(os.getpid(), 9)')
    assert subprocess.run([sys.executable, '-c', script], cwd=ROOT).returncode == -9
    [left] = tmp_path.iterdir()
    assert left.name != 'x.pt'
    save_text(tmp_path / 'x', 'other')
    assert left.exists(), 'another file has nothing to do with it'
    with pytest.raises(FileNotFoundError), whole(tmp_path / 'x.pt') as part:
        part.write_text('late')
        part.rename(left)
        save_text(tmp_path / 'x.pt', 'whole')
    assert {p.name for p in tmp_path.iterdir()} == {'x', 'x.pt'}
    assert (tmp_path / 'x.pt').read_text() == 'whole'


# file: how a script writes it, with 100 kB too many
WRITES = {
    'x.pt': 'save_pt(path, "seq", model=torch.ones(10 ** 6))',
    'row.json': 'Run(None, path.parent, {"x": "x" * 10 ** 6}, {}).write(seconds=1)',
    'results.md': 'save_text(path, "x" * 10 ** 6)',
    'ranks.npz': 'Run(None, path.parent, {}, {}).write({"users": rng.random(10 ** 6)}, seconds=1)',
    'prepared.npz': 'save_npz(path, {"items": rng.random(10 ** 6)})'}


def test_a_file_size_limit_leaves_the_earlier_file(tmp_path):
    code = ['import contextlib, pathlib; from common.runs import *; from common.files import *',
            'rng = np.random.default_rng(0)']
    for name, write in WRITES.items():
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).write_text('earlier')
        code += [f'path = pathlib.Path({str(tmp_path / name / name)!r})',
                 f'with contextlib.suppress(SystemExit): command(lambda: {write})']
    limited = ['bash', '-c', 'ulimit -f 100; exec "$0" -c "$1"', sys.executable, '\n'.join(code)]
    out = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    said = out.stderr.splitlines()
    assert len(said) == len(WRITES), said
    for name, line in zip(WRITES, said):
        assert line.startswith('error: ') and str(tmp_path / name / name) in line, line
        assert (tmp_path / name / name).read_text() == 'earlier'
        assert [path.name for path in (tmp_path / name).iterdir()] == [name]


def test_a_second_user_of_a_folder_is_refused_by_name(tmp_path):
    with lock(tmp_path):
        with pytest.raises(UserError, match=f'in use by process {os.getpid()}'):
            with lock(tmp_path):
                pass
    with lock(tmp_path):
        pass


def test_where_nothing_can_be_written_nothing_is_locked(tmp_path, monkeypatch):
    """Prepared data, or a finished run, on a read-only disk; the tests may run as root."""
    may = os.access
    monkeypatch.setattr(os, 'access', lambda path, mode: path != tmp_path and may(path, mode))
    with lock(tmp_path), lock(tmp_path):
        assert not list(tmp_path.iterdir())
    with lock(tmp_path / 'other'), pytest.raises(UserError, match='in use'):
        with lock(tmp_path / 'other'):
            pass


def test_a_second_user_who_waits_comes_after_the_first(tmp_path):
    order = []

    def second():
        with lock(tmp_path, wait=True):
            order.append('second')
    thread = threading.Thread(target=second)
    with lock(tmp_path):
        thread.start()
        time.sleep(0.1)
        order.append('first')
    thread.join()
    assert order == ['first', 'second']


# ------------------------------------------------------------------------ identities

def test_digest_sees_type_shape_and_order():
    a = np.arange(6)
    found = {digest(a), digest(a.reshape(2, 3)), digest(a.astype('int32')), digest(a[::-1]),
             digest(a, 1), digest(1, a)}
    assert len(found) == 6
    assert digest(torch.arange(6)) == digest(a) and digest(a[::2]) == digest(a[::2].copy())
    assert digest({'x': 1, 'y': 2}) == digest({'y': 2, 'x': 1})
    assert digest(np.zeros((0, 3))) != digest(np.zeros((3, 0))), 'nothing has a shape too'
    fortran = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert digest(fortran) == digest(a.reshape(2, 3))


def test_digest_is_sha256_of_type_shape_and_bytes_and_copies_nothing():
    """What it says of an array may not change: it stands in every row."""
    x = np.arange(2 ** 20, dtype=np.float32).reshape(2, -1)
    expected = hashlib.sha256(b'<f4(2, 524288)' + x.tobytes()).hexdigest()[:16]
    tracemalloc.start()
    try:
        assert digest(x) == expected
        assert tracemalloc.get_traced_memory()[1] < x.nbytes / 4
    finally:
        tracemalloc.stop()


def test_an_untouched_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / 'x'
    path.write_text('one')
    first = file_stamp(path, {})
    assert first['sha256'] == content_sha256(path) and first['size'] == 3
    read = []
    monkeypatch.setattr(files, 'content_sha256', lambda path: read.append(path) or 'new')
    assert file_stamp(path, first) == first and not read
    os.utime(path, (10 ** 9, 10 ** 9))
    assert file_stamp(path, first)['sha256'] == 'new' and read == [path]
    path.write_text('more')
    os.utime(path, ns=(0, first['time']))
    assert file_stamp(path, first)['sha256'] == 'new' and len(read) == 2


def test_a_damaged_gzip_file_is_named(tmp_path):
    path, good = tmp_path / 'x.gz', gzip.compress(b'some text' * 99)
    path.write_bytes(good)
    plain = tmp_path / 'x'
    plain.write_bytes(b'some text' * 99)
    assert content_sha256(path) == content_sha256(plain)
    for content in (good[:-5], b'junk', good[:15] + b'xx' + good[17:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match='x.gz: .*damaged'):
            content_sha256(path)


# ------------------------------------------------------------------------ errors in one line

@pytest.fixture
def handler():
    """SIGTERM and SIGINT do as in `command`; called, or after the test: what they did before."""
    before = {number: signal.signal(number, files.stop) for number in files.STOPPING}

    def restore():
        for number, action in before.items():
            signal.signal(number, action)
    yield restore
    restore()


def np_error():
    """What np.save raises for a full disk, once `whole` has named the file."""
    error = OSError('9 requested and 1 written')
    error.filename = 'x.npy'
    return error


ERRORS = {
    'two lines': (UserError('two\n lines'), 2, 'error: two lines'),
    'file': (PermissionError(13, 'Permission denied', 'x.pt'), 2, 'error: x.pt: Permission denied'),
    'GPU': (torch.OutOfMemoryError('CUDA out of memory.'), 2, r'error: out of memory .*--batch'),
    'memory': (MemoryError(), 2, 'error: out of memory .*--micro-tokens and go on'),
    'CPU': (RuntimeError("you tried; can't allocate memory: 9 bytes"), 2, 'error: out of memory'),
    'control': (UserError('a\x1b[2J\x00b\x85c é'), 2, r'error: a \[2J b c é$'),
    'numpy': (np_error(), 2, r"error: x.npy: \('9 requested and 1 written',\)"),
    'missing': (FileNotFoundError(2, 'No such file or directory', 'x.pt'), 2,
                'error: x.pt: No such file or directory'),
}


@pytest.mark.parametrize('name', ERRORS)
def test_what_a_user_can_mend_ends_in_one_line(name, handler, capsys):
    error, code, said = ERRORS[name]

    def main(word):
        assert word == 'argument'
        raise error
    with pytest.raises(SystemExit) as leave:
        command(main, 'argument')
    out = capsys.readouterr()
    assert leave.value.code == code and len(out.err.splitlines()) == 1 and out.out == ''
    assert re.match(said, out.err)


@pytest.mark.parametrize('error', [RuntimeError('shapes do not match'), NotImplementedError(),
                                   ValueError('out of memory of names')])
def test_other_errors_keep_their_traceback(error, handler):
    def main():
        raise error
    with pytest.raises(type(error)):
        command(main)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_training_leaves_with_its_number(handler, number, code, capsys):
    signal.signal(number, signal.SIG_IGN)
    with pytest.raises(SystemExit) as leave:
        command(lambda: os.kill(os.getpid(), number))
    assert leave.value.code == code and capsys.readouterr().err == ''


# ------------------------------------------------------------------------ optimiser

def test_schedule_rises_then_falls_without_a_jump():
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), 1.0)
    schedule = linear_schedule(optimizer, 10, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        schedule.step()
    steps = [b - a for a, b in zip(rates, rates[1:])]
    assert 0 < rates[0] < 0.11 and max(rates) == 1 and rates[-1] > 0 and max(map(abs, steps)) < 0.1
    assert optimizer.param_groups[0]['lr'] == 0


def test_without_a_warmup_the_rate_stays():
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), 0.003)
    schedule = linear_schedule(optimizer, None, 10)
    for _ in range(12):
        assert optimizer.param_groups[0]['lr'] == 0.003
        optimizer.step()
        schedule.step()


# ------------------------------------------------------------------------ training: a small loop

IDENTITY, CODE = {'lr': 1}, {'train.py': 'one'}
VALID = 0.5, 0.25, 0.75, 0.75  # of the small loop's epochs
STEPS, EPOCHS = 3, 4


@pytest.fixture(autouse=True)
def on_one_machine(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)


def options(**more):
    given = {'again': False, 'keep': False, 'save_every': 10, 'patience': 9, 'epochs': EPOCHS}
    return types.SimpleNamespace(**{**given, **more})


def small(folder, identity=IDENTITY, code=CODE, **more):
    """(Training, model) of a small model with weights of their own seed."""
    torch.manual_seed(3)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    given = {'clip': more.pop('clip', None), 'most': more.pop('most', None)}
    run = Run(options(**more), folder, identity, code)
    return Training(run, model, optimizer, STEPS, 2, **given), model


def train(folder, disturb=lambda place, epoch, step: None, **more):
    """The small loop, to its end; `disturb` is called at every place. Each step draws from torch's
    generator."""
    t, model = small(folder, **more)
    t.optimizer.register_step_post_hook(lambda *_: disturb('optimiser', t.epoch, t.step))
    visited = []
    with t:
        for epoch in t.epochs():
            disturb('epoch', epoch, t.step)
            for step in t.steps():
                visited.append((epoch, step))
                x = torch.rand(5, 4)
                disturb('forward', epoch, step)
                loss = (model(x) - torch.rand(5, 2)).square().mean()
                loss.backward()
                disturb('backward', epoch, step)
                t.update(loss=loss, more=2 * loss)
                disturb('updated', epoch, step)
            disturb('validation', epoch, t.step)
            t.end_epoch(VALID[epoch])
            disturb('ended', epoch, t.step)
    t.visited = visited
    return t, model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_of(folder):
    """log.csv without its seconds."""
    with open(folder / 'log.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert [float(row['seconds']) for row in rows] == sorted(float(row['seconds']) for row in rows)
    return [{key: value for key, value in row.items() if key != 'seconds'} for row in rows]


def saved(folder):
    return load_pt(folder / 'resume.pt', 'resume')


# ------------------------------------------------------------------------ training: its course

def test_log_best_weights_and_what_a_row_says(tmp_path):
    t, model = train(tmp_path)
    assert t.visited == [(e, s) for e in range(EPOCHS) for s in range(STEPS)]
    lines = (tmp_path / 'log.csv').read_text().splitlines()
    assert lines[0] == 'epoch,seconds,loss,more,valid' and len(lines) == 1 + EPOCHS
    log = log_of(tmp_path)
    assert [row['epoch'] for row in log] == ['1', '2', '3', '4']
    assert [float(row['valid']) for row in log] == list(VALID)
    assert all(float(row['more']) == pytest.approx(2 * float(row['loss']), abs=2e-5) for row in log)
    last = weights(model).clone()
    found = t.restore_best()
    assert found.keys() == {'valid', 'best_epoch', 'epochs', 'seconds'}
    assert (found['valid'], found['best_epoch'], found['epochs']) == (0.75, 3, 4)
    assert found['seconds'] == pytest.approx(t.seconds(), abs=0.1)
    assert not torch.equal(weights(model), last), 'of epoch 3, the first of two as good'
    for _ in range(2):  # the second time there is no resume.pt
        t.run.write(**found)
        assert {path.name for path in tmp_path.iterdir()} == {'log.csv', 'row.json'}


def test_best_weights_are_those_of_their_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(training, 'EPOCHS_APART', -1)
    seen = []

    def disturb(place, epoch, step):
        if place == 'ended':
            seen.append(weights(saved_model(tmp_path)))
    t, model = train(tmp_path, disturb)
    t.restore_best()
    assert torch.equal(weights(model), seen[2])


def saved_model(folder):
    model = torch.nn.Linear(4, 2)
    model.load_state_dict(saved(folder)['states']['model'])
    return model


@pytest.mark.parametrize('patience, epochs', [(1, 2), (2, 4), (3, 4)])
def test_training_ends_when_patience_does(tmp_path, patience, epochs):
    t, _ = train(tmp_path, patience=patience)
    assert len(log_of(tmp_path)) == epochs and t.restore_best()['epochs'] == epochs


def test_a_total_of_steps_ends_within_an_epoch(tmp_path):
    t, _ = train(tmp_path, most=2 * STEPS + 1)
    assert t.visited == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert len(log_of(tmp_path)) == 3
    again, _ = train(tmp_path, most=2 * STEPS + 1)
    assert again.visited == [], 'it is done'


def test_gradients_are_clipped_to_their_norm(tmp_path):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    t = Training(Run(options(), tmp_path, IDENTITY, CODE), model, optimizer, 3, clip=0.5)
    before = weights(model).clone()
    (model(torch.ones(1, 4)).sum() * 100).backward()
    with t:
        t.update(loss=torch.ones(()))
    assert (weights(model) - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('validation, second', [(40, [(1, 0), (1, 0), (1, 3)]),
                                                (30, [(0, 3), (1, 2), (1, 2)])])
def test_state_is_saved_when_it_is_due(tmp_path, monkeypatch, validation, second):
    clock = [0.0]
    monkeypatch.setattr(training.time, 'monotonic', lambda: clock[0])
    stands = []

    def disturb(place, epoch, step):
        clock[0] += {'forward': 50, 'validation': validation}.get(place, 0)
        if place == 'updated':
            stand = saved(tmp_path)['stand'] if (tmp_path / 'resume.pt').exists() else None
            stands.append(stand and (stand['epoch'], stand['step']))
    t, _ = train(tmp_path, disturb, save_every=2, most=6)
    # 50 s a step: after 120 s one is due; the end of an epoch saves too, where nothing has
    # been saved for 30 s, and that of training always
    assert stands == [None, None, (0, 3), *second]
    assert saved(tmp_path)['head']['seconds'] == t.seconds() == 300 + 2 * validation
    assert saved(tmp_path)['stand']['epoch'] == 2 and len(log_of(tmp_path)) == 2
    other = tmp_path / 'other'
    stands.clear()

    def every(place, epoch, step):
        if place == 'updated':
            stands.append(saved(other)['stand']['step'])
    train(other, every, save_every=0, most=6)
    assert stands == [1, 2, 3, 1, 2, 3], '0: after every step'


def test_of_several_processes_the_first_alone_writes(tmp_path, monkeypatch, handler):
    monkeypatch.setenv('RANK', '1')
    before = signal.getsignal(signal.SIGTERM)
    t, _ = train(tmp_path, save_every=0)
    assert t.restore_best()['epochs'] == EPOCHS and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


# ------------------------------------------------------------------------ training: stopped

class Killed(BaseException):
    """As SIGKILL: nothing is saved on the way out."""


def at(place, epoch, step, action):
    """A disturbance: `action` at that moment alone."""
    def disturb(*now):
        if now == (place, epoch, step):
            action()
    return disturb


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def sigint():
    os.kill(os.getpid(), signal.SIGINT)


def kill():
    raise Killed


# place, epoch, step as they are at the moment -> epoch and step that the file then names
MOMENTS = {
    ('epoch', 0, 0): (0, 0), ('forward', 0, 0): (0, 0), ('forward', 1, 1): (1, 1),
    ('backward', 1, 2): (1, 2), ('optimiser', 1, 1): (1, 2), ('optimiser', 1, 2): (1, 3),
    ('updated', 2, 0): (2, 1), ('updated', 2, 2): (2, 3), ('validation', 0, 3): (0, 3),
    ('validation', 1, 3): (1, 3), ('ended', 1, 0): (2, 0), ('ended', 3, 0): (4, 0)}


@pytest.mark.parametrize('stop, code', [(sigterm, 143), (sigint, 130)])
@pytest.mark.parametrize('moment', MOMENTS, ids=lambda moment: '-'.join(map(str, moment)))
def test_stopped_it_goes_on_to_the_same_bits(tmp_path, handler, capsys, stop, code, moment):
    plain, expected = train(tmp_path / 'plain')
    folder, stand = tmp_path / 'stopped', MOMENTS[moment]
    with pytest.raises(SystemExit) as leave:
        train(folder, at(*moment, stop))
    handler()
    assert leave.value.code == code
    where = f'epoch {stand[0] + 1}, step {stand[1] + 1}'
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (f'stopped before {where}; the same command goes on from '
                    f'{folder / "resume.pt"} (leave --again out)')
    found = saved(folder)
    assert (found['stand']['epoch'], found['stand']['step']) == stand
    assert found['head']['identity'] == IDENTITY and found['head']['code'] == CODE
    torch.manual_seed(99)  # whatever the generator is at
    t, model = train(folder)
    assert f'goes on from {folder / "resume.pt"}: {where}' in capsys.readouterr().out
    assert t.visited == plain.visited[STEPS * stand[0] + stand[1]:]
    assert torch.equal(weights(model), weights(expected))
    assert t.losses == plain.losses
    assert log_of(folder) == log_of(tmp_path / 'plain')
    again, best = t.restore_best(), plain.restore_best()
    assert {**again, 'seconds': 0} == {**best, 'seconds': 0}
    assert torch.equal(weights(model), weights(expected))


def test_sigterm_within_a_step_saves_what_was_before_it(tmp_path, handler):
    """Weights, optimiser, rate and torch's generator are those before the step under way."""
    before = {}

    def remember():
        state = {'model': t.model, 'optimizer': t.optimizer, 'schedule': t.schedule}
        before.update({name: pickle.dumps(part.state_dict()) for name, part in state.items()})
        before['rng'] = torch.get_rng_state()
    t, model = small(tmp_path)
    with pytest.raises(SystemExit), t:
        for epoch in t.epochs():
            for step in t.steps():
                if step == 2:
                    remember()
                loss = model(torch.rand(5, 4)).square().mean()
                loss.backward()
                if step == 2:
                    sigterm()
                t.update(loss=loss)
    found = saved(tmp_path)
    assert found['stand']['step'] == 2
    assert torch.equal(found['stand']['rng'][0], before['rng'])
    assert not torch.equal(torch.get_rng_state(), before['rng']), 'the step had drawn already'
    assert torch.equal(found['states']['model']['weight'], pickle.loads(before['model'])['weight'])
    was = pickle.loads(before['optimizer'])['state'][0]
    now = found['states']['optimizer']['state'][0]
    assert all(torch.equal(was[key], now[key]) for key in was)
    assert found['states']['schedule'] == pickle.loads(before['schedule'])
    t, model = small(tmp_path)
    expected = torch.Generator()
    expected.set_state(before['rng'])
    assert torch.equal(torch.rand(5), torch.rand(5, generator=expected)), 'it goes on from there'


def test_a_second_signal_hurts_nothing(tmp_path, handler, monkeypatch):
    """While the state changes, and while it is saved because of the first."""
    _, expected = train(tmp_path / 'plain')

    def saving(*args, **more):
        sigterm()
        save_pt(*args, **more)

    def twice():
        patch.setattr(training, 'save_pt', saving)
        sigterm()
        sigint()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        train(tmp_path / 'stopped', at('optimiser', 1, 1, twice))
    assert saved(tmp_path / 'stopped')['stand']['step'] == 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN, 'it is on its way out'
    assert signal.getsignal(signal.SIGINT) is files.stop
    _, model = train(tmp_path / 'stopped')
    assert torch.equal(weights(model), weights(expected))


@pytest.mark.parametrize('moment', [('forward', 0, 1), ('forward', 2, 1), ('validation', 2, 3),
                                    ('ended', 2, 0), ('validation', 0, 3)])
@pytest.mark.parametrize('save_every', [0, 10])
def test_killed_it_goes_on_to_the_same_bits(tmp_path, moment, save_every):
    plain, expected = train(tmp_path / 'plain')
    folder = tmp_path / 'killed'
    with pytest.raises(Killed):
        train(folder, at(*moment, kill), save_every=save_every)
    t, model = train(folder, save_every=save_every)
    assert torch.equal(weights(model), weights(expected))
    assert log_of(folder) == log_of(tmp_path / 'plain')
    assert t.restore_best()['best_epoch'] == 3


def test_seconds_of_earlier_sittings_count(tmp_path, monkeypatch, handler):
    clock = [0.0]
    monkeypatch.setattr(training.time, 'monotonic', lambda: clock[0])

    def disturb(place, epoch, step):
        if place == 'forward':
            clock[0] += 10
            if (epoch, step) == (1, 0):
                sigterm()
    with pytest.raises(SystemExit):
        train(tmp_path, disturb)
    assert saved(tmp_path)['head']['seconds'] == 40
    clock[0] = 5000.0
    t, _ = small(tmp_path)
    assert t.seconds() == 40


def test_sigterm_does_after_training_what_it_did_before(tmp_path, handler):
    ours = lambda *_: None
    signal.signal(signal.SIGTERM, ours)
    train(tmp_path / 'a')
    assert signal.getsignal(signal.SIGTERM) is ours
    t, model = small(tmp_path / 'b')
    with pytest.raises(Diverged), t:
        t.update(loss=torch.tensor(float('nan')))
    assert signal.getsignal(signal.SIGTERM) is ours, 'the next rate is tried; it can be stopped'


# ------------------------------------------------------------------------ training: which state

def half_way(folder, seconds=None):
    """A resume.pt of epoch 2, step 2; `seconds`: what it says to have taken."""
    with pytest.raises(Killed):
        train(folder, at('updated', 1, 0, kill), save_every=0)
    if seconds is not None:
        content = saved(folder)
        content['head']['seconds'] = seconds
        save_pt(folder / 'resume.pt', **content)


def test_state_of_other_options_is_not_used(tmp_path, capsys):
    half_way(tmp_path)
    t, model = small(tmp_path, identity={'lr': 2})
    assert (t.epoch, t.step, t.log, t.best_weights) == (0, 0, [], None)
    said = capsys.readouterr().out
    assert said == f'{tmp_path / "resume.pt"}: made again, as it was made with other lr\n'
    t, _ = small(tmp_path, keep=True, identity={'lr': 2})
    assert (t.epoch, t.step) == (0, 0)
    t, _ = small(tmp_path)
    assert (t.epoch, t.step, t.best) == (1, 1, 0.5)


def test_state_of_other_code_is_used_where_keep_says_so(tmp_path, capsys):
    half_way(tmp_path)
    t, _ = small(tmp_path, code={'train.py': 'two'})
    assert (t.epoch, t.step) == (0, 0)
    assert 'made again, as it was made with other code (train.py)' in capsys.readouterr().out
    t, _ = small(tmp_path, code={'train.py': 'two'}, keep=True)
    assert (t.epoch, t.step) == (1, 1)
    said = capsys.readouterr().out
    assert 'kept, though made by other code' in said and 'goes on from' in said
    assert t.run.code == {'train.py': ''}, 'its steps are of two codes: it is up to date with neither'


def test_a_state_that_took_long_is_not_given_up_silently(tmp_path):
    half_way(tmp_path, seconds=3600)
    with pytest.raises(UserError, match='resume.pt: was made with other lr and took 60 minutes; '
                                        '--again makes it again$'):
        small(tmp_path, identity={'lr': 2})
    with pytest.raises(UserError, match='--again makes it again, --keep uses it as it is'):
        small(tmp_path, code={'train.py': 'two'})
    assert small(tmp_path)[0].seconds() >= 3600
    assert small(tmp_path, again=True, identity={'lr': 2})[0].epoch == 0


def test_again_starts_over(tmp_path):
    half_way(tmp_path)
    t, _ = train(tmp_path, again=True)
    assert len(t.visited) == STEPS * EPOCHS and len(log_of(tmp_path)) == EPOCHS


def test_a_damaged_state_is_said_and_training_starts_over(tmp_path, capsys):
    half_way(tmp_path)
    path = tmp_path / 'resume.pt'
    path.write_bytes(path.read_bytes()[:-100])
    t, _ = train(tmp_path)
    said = capsys.readouterr().out
    assert 'resume.pt: is no readable resume file' in said and 'training starts over' in said
    assert len(t.visited) == STEPS * EPOCHS


# ------------------------------------------------------------------------ training: gone wrong

@pytest.mark.parametrize('bad', ['loss', 'second loss', 'gradient'])
@pytest.mark.parametrize('clip', [None, 1.0])
@pytest.mark.parametrize('there', [False, True])
def test_what_goes_wrong_names_the_step_and_the_last_good_state(tmp_path, bad, clip, there):
    t, model = small(tmp_path, clip=clip)
    if there:
        t.save()
    nan = float('nan')
    model.weight.grad = torch.ones(2, 4)
    if bad == 'gradient':
        model.weight.grad[1, 2] = nan
    losses = {'loss': torch.tensor(nan if bad == 'loss' else 1.5),
              'more': torch.tensor(nan if bad == 'second loss' else 1.0)}
    before = weights(model).clone()
    good = (tmp_path / 'resume.pt').read_bytes() if there else None
    with pytest.raises(Diverged, match='epoch 1, step 1: loss .*gradient norm .*; '
                                       'try a lower rate or --precision float32'), t:
        t.update(**losses)
    assert torch.equal(weights(model), before) and t.step == 0, 'the step was not taken'
    assert (tmp_path / 'resume.pt').exists() == there
    if there:
        assert (tmp_path / 'resume.pt').read_bytes() == good


def test_what_diverges_once_diverges_again(tmp_path):
    """The state before the step that went wrong is the one that the same command goes on from."""
    def train_on():
        t, model = small(tmp_path, save_every=0)
        with t:
            for epoch in t.epochs():
                for step in t.steps():
                    loss = model(torch.rand(5, 4)).square().mean()
                    loss.backward()
                    t.update(loss=loss if (epoch, step) != (1, 1) else loss * float('inf'))
                t.end_epoch(1.0)
    for _ in range(2):
        with pytest.raises(Diverged, match='epoch 2, step 2: loss inf'):
            train_on()
