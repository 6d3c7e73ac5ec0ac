"""What a user, or a file from elsewhere, gets wrong: one clear line, exit code 2, nothing run,
nothing written. Bad data files: test_data.py, test_sources.py; whole commands: test_chain.py.

Run: python -m pytest tests/test_bad_input.py (about 15 seconds)
"""
import ast
import importlib
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from common import data
from common.files import ROOT, command, save_json, save_pt
from tests.toy import canonical, tiny_bert

# ------------------------------------------------------------------------ options

ABOVE_ZERO, FROM_ZERO = ('0', '-1', '1e309', 'nan', 'x', ''), ('-1', '1e309', 'nan', 'x', '')
RECOMMEND = ['recommend', 'one', 'x', '--users', 'u']
OPTIONS = [  # script, a command line that is right, options above 0, options from 0
    ('common.data', ['one'], '--min-user --min-item', '--users'),
    ('pretrain', ['one', '--out', 'x'], '--max-tokens --share --epochs '
     '--max-steps --patience --batch --accumulate --lr --micro-tokens',
     '--warmup --mlm-weight --seed --save-every'),
    ('finetune', ['one', '--stage', '1', '--plm', 'p'], '--max-tokens --epochs --patience '
     '--batch --lr --micro-tokens', '--warmup --seeds --save-every'),
    ('export_embeddings', ['one', '--out', 'x.pt', '--plm', 'p'], '--micro-tokens', ''),
    ('train_seq', ['one', '--model', 'sasrec'], '--hidden --max-items --lrs --batch --epochs '
     '--patience', '--seeds --save-every'),
    ('evaluate', RECOMMEND, '--k', ''),
    ('evaluate', ['attention', 'one', '--seq', 'm'], '--users', ''),
]
RIGHT = {script: line for script, line, _, _ in OPTIONS} | {'evaluate': RECOMMEND}
WRONG_VALUES = [(script, line, option, value) for script, line, above, least in OPTIONS
                for options, values in ((above, ABOVE_ZERO), (least, FROM_ZERO))
                for option in options.split() for value in values]
CHOICES = [
    ('finetune', '--stage', '3'), ('train_seq', '--model', 'gru'), ('train_seq', '--loss', 'mse'),
    ('train_seq', '--init-scale', 'big'), ('train_seq', '--variants', 'pt'),
    ('train_seq', '--variants', '-freeze'), ('train_seq', '--variants', 'pt-frozen'),
    ('train_seq', '--variants', '../x-freeze'), ('train_seq', '--variants', '/x-freeze'),
    ('pretrain', '--precision', 'float16'), ('pretrain', '--share', '101'),
    ('pretrain', '--max-tokens', '1'),
    ('pretrain', '--max-tokens', '1025'), ('train_seq', '--max-items', '10000000'),
    ('train_seq', '--hidden', '10000000'), ('pretrain', '--batch', '1'),
    ('finetune', '--batch', '1'), ('pretrain', '--nosuch', '1'),
    ('export_embeddings', '--out', 'lf'), ('export_embeddings', '--out', 'lf.csv'),
    ('export_embeddings', '--out', 'lf.pt.gz'), ('evaluate', '--again', ''),
    ('pretrain', '--max_steps', '1'), ('pretrain', '--max', '1'),
    ('evaluate', '--precision', 'float16'), ('evaluate', '--nosuch', '1'),
]
WRONG_OPTIONS = WRONG_VALUES + [(script, RIGHT[script], *rest) for script, *rest in CHOICES]


def said_of(script, line, capsys):
    """The last line that a wrong command line is answered with."""
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(script).parse_args(line)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize('script, line, option, value', WRONG_OPTIONS,
                         ids=[f'{script} {option} {v}' for script, _, option, v in WRONG_OPTIONS])
def test_options_out_of_range_are_named(script, line, option, value, capsys):
    assert option in said_of(script, [*line, option, value], capsys)


@pytest.mark.parametrize('script, line', RIGHT.items(), ids=RIGHT)
def test_the_command_lines_above_are_right_but_for_the_option(script, line):
    importlib.import_module(script).parse_args(line)


@pytest.mark.parametrize('script', ['pretrain', 'finetune', 'export_embeddings', 'train_seq'])
def test_again_and_keep_exclude_each_other(script, capsys):
    assert '--again' in said_of(script, [*RIGHT[script], '--keep', '--again'], capsys)


# ------------------------------------------------------------------------ files from elsewhere

class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    """A prepared dataset `one`, a language model `plm`, the row of a run `m`."""
    folder = tmp_path_factory.mktemp('bad')
    canonical(folder / 'data' / 'one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        found = data.prepare('one', data.DEFAULT)
    tiny_bert(folder / 'plm')
    row = {'run': 'm', 'dataset': 'one', 'model': 'sasrec', 'init': 'random', 'valid': 0.5, 'users': 40,
           'data': found.fingerprint, 'identity': {}, 'code': {}, 'seconds': 0,
           'metrics': {'sampled': {'HR@5': 0.5}}}
    save_json(folder / 'runs' / 'one' / 'm' / 'row.json', row)
    ranks = {name: np.zeros((40, 2), np.int32) for name in ('sampled', 'full', 'new')}
    np.savez(folder / 'runs' / 'one' / 'm' / 'ranks.npz', users=np.arange(40), **ranks)
    return folder


@pytest.fixture
def world(ready, tmp_path, monkeypatch):
    shutil.copytree(ready, tmp_path / 'w')
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'w' / 'data'))
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path / 'w' / 'runs'))
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    return tmp_path / 'w'


def refused(script, capsys, *options):
    """Run a script's main in this process: its one line."""
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as exit_:
        command(module.main, module.parse_args([str(o) for o in options]))
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith('error: ')]
    assert exit_.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def contents(world):
    """{path: bytes} of all files, but for locks and kept tokens."""
    return {path: path.read_bytes() for path in world.rglob('*')
            if path.is_file() and path.name != '.lock' and not path.name.startswith('tokens-')}


EXPORT = ['export_embeddings', 'one', '--out', 'out.pt']
PT = ['pretrain', 'one', '--plm', 'plm', '--out', 'out']
FT1 = ['finetune', 'one', '--stage', '1']
RECOMMEND_M = ['evaluate', 'recommend', 'one', 'm', '--users', 'u1']
SASREC = ['train_seq', 'one', '--model', 'sasrec']
PLACES = {
    'checkpoint of finetune': ('x.pt', [*FT1, '--checkpoint', 'x.pt']),
    'checkpoint in a folder': ('x/model.pt', [*FT1, '--checkpoint', 'x']),
    'checkpoint of stage 0': ('x.pt', ['finetune', 'one', '--stage', '0', '--checkpoint', 'x.pt']),
    'stage 1 for stage 2': ('runs/one/ft1-seed0/model.pt', ['finetune', 'one', '--stage', '2']),
    'checkpoint of export': ('x.pt', [*EXPORT, '--checkpoint', 'x.pt']),
    'published state dict': ('x.pt', [*EXPORT, '--checkpoint', 'x.pt', '--plm', 'plm']),
    'embeddings that are there': ('there.pt', [*EXPORT[:-1], 'there.pt', '--plm', 'plm']),
    'embeddings': ('runs/one/embeddings/lf.pt', [*SASREC, '--variants', 'lf-freeze']),
    'embeddings without training': ('runs/one/embeddings/lf.pt', ['evaluate', 'untrained', 'one']),
    'ID model of recommend': ('runs/one/m/model.pt', RECOMMEND_M),
    'ranks': ('runs/one/m/ranks.npz', ['evaluate', 'compare', 'one', 'm', 'm']),
    'checkpoint of attention': ('x.pt', ['evaluate', 'attention', 'one', '--seq', 'm',
                                         '--checkpoint', 'x.pt']),
    'language model': ('plm/pytorch_model.bin', PT),
    'prepared data': ('data/one/prepared.npz', [*SASREC, '--hidden', '8']),
    'prepared data of a source': ('data/one/prepared.npz', PT),
}


def trap(path, sprung):
    if path.suffix == '.npz':
        names = ('head', 'item_ids', 'user_ids', 'attributes', *data.ARRAYS, 'users', 'sampled',
                 'full', 'new')
        np.savez(path, **{name: np.array([Trap(sprung)], object) for name in names})
    else:
        content = {'kind': Trap(sprung), 'head': Trap(sprung), 'longformer.x': Trap(sprung)}
        torch.save(content, path, pickle_module=pickle)


def old_trap(path, sprung):
    """In torch's older format, a plain pickle; where numpy reads, a pickle alone."""
    if path.suffix == '.npz':
        path.write_bytes(pickle.dumps(Trap(sprung)))
    else:
        torch.save({'longformer.x': Trap(sprung)}, path, pickle_module=pickle,
                   _use_new_zipfile_serialization=False)


def junk(path, _):
    path.write_bytes(b'PK\x03\x04 this is no file of ours')


def empty(path, _):
    path.write_bytes(b'')


def cut_short(path, _):
    save_pt(path, 'recformer', matrix=torch.zeros(20, 20))
    path.write_bytes(path.read_bytes()[:-200])


def of_another_kind(path, _):
    save_pt(path, 'picture', identity={'options': 1}, matrix=torch.zeros(2, 2))


MAKERS = [trap, old_trap, junk, empty, cut_short, of_another_kind]


@pytest.mark.parametrize('make', MAKERS)
@pytest.mark.parametrize('place', PLACES)
def test_no_file_that_is_read_runs_or_passes(world, place, make, capsys):
    file, (script, *options) = PLACES[place]
    if file.startswith('plm'):
        (world / 'plm' / 'model.safetensors').unlink()
    (world / file).parent.mkdir(parents=True, exist_ok=True)
    sprung = world / 'sprung'
    make(world / file, sprung)
    before = contents(world)
    ours = {file, file.removesuffix('/model.pt'), 'plm', 'out.pt', 'out'}
    line = refused(script, capsys, *[world / o if o in ours else o for o in options])
    assert not sprung.exists(), 'the file was run'
    assert str(world / file) in line or str(world / 'plm') in line, line
    assert contents(world) == before, 'something was written'


def test_the_traps_would_spring(tmp_path):
    for make in (trap, old_trap):
        make(tmp_path / 'x.pt', tmp_path / 'sprung')
        with pytest.raises(Exception):
            torch.load(tmp_path / 'x.pt', weights_only=False)['no such key']
        (tmp_path / 'sprung').unlink()
    trap(tmp_path / 'x.npz', tmp_path / 'sprung')
    with np.load(tmp_path / 'x.npz', allow_pickle=True) as f, pytest.raises(Exception):
        f['head'].no_such_attribute
    assert (tmp_path / 'sprung').exists()


@pytest.mark.parametrize('make', MAKERS)
def test_a_bad_resume_file_is_not_used_and_training_starts_over(world, make, capsys):
    import train_seq
    folder = world / 'runs' / 'one' / 'sasrec-bce-random-8-lr0.01-seed0'
    folder.mkdir(parents=True)
    make(folder / 'resume.pt', world / 'sprung')
    line = ['one', '--model', 'sasrec', '--hidden', '8', '--lrs', '0.01', '--epochs', '1']
    train_seq.main(train_seq.parse_args(line))
    out = capsys.readouterr().out
    assert f'{folder}/resume.pt' in out and 'training starts over' in out
    assert not (world / 'sprung').exists()
    assert (folder / 'row.json').exists() and not (folder / 'resume.pt').exists()


@pytest.mark.parametrize('text', ['', '[]', '{"run": 1}', '{', 'null', '\x00'])
@pytest.mark.parametrize('options', [
    ['evaluate', 'table', 'one'], ['evaluate', 'compare', 'one', 'm', 'm'],
    ['evaluate', 'recommend', 'one', 'm'],
    [*SASREC, '--hidden', '8', '--lrs', '0.01', '--epochs', '1']])
def test_a_row_that_is_none_is_named(world, options, text, capsys):
    run = 'sasrec-bce-random-8-lr0.01-seed0' if options[0] == 'train_seq' else 'm'
    file = world / 'runs' / 'one' / run / 'row.json'
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    before = contents(world)
    assert str(file) in refused(options[0], capsys, *options[1:])
    assert contents(world) == before


# ------------------------------------------------------------------------ names

NAMES = ['../one', 'a/b', '$(touch x)', '`touch x`', '/etc', 'one;ls', 'One two', '\n', 'é', '.',
         '..']
SCRIPTS = {'common.data': ['NAME'], 'train_seq': ['NAME', '--model', 'sasrec'],
           'finetune': ['NAME', '--stage', '1', '--plm', 'plm'],
           'pretrain': ['NAME', '--plm', 'plm'],
           'export_embeddings': ['NAME', '--out', 'x.pt', '--plm', 'plm'],
           **{f'evaluate {action}': [action, 'NAME', *rest] for action, rest in {
               'untrained': [], 'table': [], 'compare': ['a', 'b'],
               'recommend': ['a', '--users', 'u1'], 'attention': ['--seq', 'a'], 'curve': []}.items()}}


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('script', SCRIPTS)
def test_names_like_paths_or_commands_are_refused(world, script, name, capsys):
    before = set(world.parent.rglob('*'))
    options = [{'NAME': name, 'plm': world / 'plm'}.get(o, o) for o in SCRIPTS[script]]
    assert 'letters, digits' in refused(script.split()[0], capsys, *options)
    assert set(world.parent.rglob('*')) == before, 'not even a folder'


@pytest.mark.parametrize('run', ['../one/m', '/etc', 'a/b', '$(x)', '', '\n', 'm\n'])
def test_runs_are_names_of_folders(world, run, capsys):
    for options in (['compare', run, 'm'], ['compare', 'm', run], ['recommend', run]):
        options.insert(1, 'one')
        assert 'no such run in' in refused('evaluate', capsys, *options)


# ------------------------------------------------------------------------ machines

def machine(monkeypatch, capsys, **what):
    """What common/__init__.py says on a machine whose sys is so: (exit code, lines)."""
    for name, value in what.items():
        monkeypatch.setattr(sys, name, value)
    code = 0
    try:
        runpy.run_path(str(ROOT / 'common' / '__init__.py'))
    except SystemExit as leave:
        code = leave.code
    return code, capsys.readouterr().err.splitlines()


def test_an_old_python_and_windows_are_told_in_one_line(monkeypatch, capsys):
    assert machine(monkeypatch, capsys) == (0, [])
    assert machine(monkeypatch, capsys, version_info=(3, 11, 0, 'final', 0)) == (0, [])
    code, [said] = machine(monkeypatch, capsys, version_info=(3, 10, 14, 'final', 0),
                           version='3.10.14 (main, ...)')
    assert code == 2 and re.fullmatch('error: Python 3.11 or later is needed, .* with 3.10.14', said)
    monkeypatch.undo()
    code, [said] = machine(monkeypatch, capsys, platform='win32')
    assert code == 2 and re.fullmatch(r'error: .* on Windows .*\(WSL\); this is win32 .*', said)


def test_an_old_python_reads_as_far_as_the_line_that_it_is_told():
    """A script is compiled whole before it imports common/__init__.py."""
    for file in [*ROOT.glob('*.py'), ROOT / 'common' / '__init__.py']:
        ast.parse(file.read_text(encoding='utf-8'), feature_version=(3, 8))
    with pytest.raises(SyntaxError):
        ast.parse('match x:\n    case 1: pass', feature_version=(3, 8))


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1:strict'])
def test_a_terminal_without_utf8_shows_a_question_mark(encoding):
    code = r'from common.files import command; command(lambda: print("caf\u00e9 \u8336"))'
    environment = {**os.environ, 'PYTHONIOENCODING': encoding}
    out = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=environment,
                         capture_output=True)
    accented = b'?' if encoding == 'ascii' else 'é'.encode('latin-1')
    assert (out.returncode, out.stdout, out.stderr) == (0, b'caf' + accented + b' ?\n', b'')
