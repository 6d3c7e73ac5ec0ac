"""What a user, or a file from elsewhere, gets wrong: one clear line, exit code 2, nothing run, nothing written.

Bad data files: test_data.py, test_sources.py; whole commands: test_chain.py. Run: python -m pytest tests/test_bad_input.py
"""
import importlib
import pickle
import shutil

import numpy as np
import pytest
import torch

from common import data
from common.files import command, save_pt
from tests.toy import canonical, tiny_bert

ABOVE_ZERO, FROM_ZERO = ('0', '-1', '1e309', 'nan', 'x', ''), ('-1', 'nan', 'x', '')
OPTIONS = {  # script: (a command line that is right, options above 0, options from 0)
    'pretrain': (['one', '--out', 'x'], '--layers --share --valid_share --epochs --max_steps --patience --batch --accumulate --lr '
                 '--micro_tokens --save_every', '--warmup --weight_decay --mlm_weight --seed'),
    'finetune': (['one', '--stage', '1', '--plm', 'p'], '--layers --epochs --patience --batch --lr --micro_tokens --save_every',
                 '--warmup --weight_decay --seed'),
    'export_embeddings': (['one', '--out', 'x', '--plm', 'p'], '--layers --micro_tokens --save_every', ''),
    'train_seq': (['one', '--model', 'sasrec'], '--max_items --lrs --batch --epochs --patience --pca --save_every', '--hidden --seeds'),
    'evaluate': (['topk', 'one', 'x', '--user', 'u'], '--k', ''),
}
WRONG_OPTIONS = [(script, option, value) for script, (_, above, least) in OPTIONS.items()
                 for options, values in ((above, ABOVE_ZERO), (least, FROM_ZERO)) for option in options.split() for value in values]
CHOICES = [('finetune', '--stage', '3'), ('train_seq', '--model', 'gru'), ('train_seq', '--loss', 'mse'), ('train_seq', '--init_scale', 'big'),
           ('train_seq', '--variants', 'pt'), ('pretrain', '--precision', 'float16'), ('pretrain', '--share', '101'),
           ('pretrain', '--valid_share', '51'), ('train_seq', '--max_items', '10000000'), ('train_seq', '--hidden', '10000000'),
           ('pretrain', '--batch', '1'), ('pretrain', '--nosuch', '1')]


@pytest.mark.parametrize('script, option, value', WRONG_OPTIONS + CHOICES)
def test_options_out_of_range_are_named(script, option, value, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(script).parse_args([*OPTIONS[script][0], option, value])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2 and option in last, last


# ---------------------------------------------------------------------------- files that carry code, or are of something else

class Trap:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


@pytest.fixture(scope='module')
def ready(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bad')
    canonical(folder / 'data' / 'one')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        data.prepare('one', data.DEFAULT)
    tiny_bert(folder / 'plm')
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
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith('error: ')]
    assert exit_.value.code == 2 and len(lines) == 1, lines
    return lines[0]


PLACES = {
    'checkpoint of finetune': ('x.pt', ['finetune', 'one', '--stage', '1', '--checkpoint', 'x.pt']),
    'stage 1 for stage 2': ('runs/one/recformer/ft1.pt', ['finetune', 'one', '--stage', '2']),
    'checkpoint of export': ('x.pt', ['export_embeddings', 'one', '--out', 'out.pt', '--checkpoint', 'x.pt']),
    'published state dict': ('x.pt', ['export_embeddings', 'one', '--out', 'out.pt', '--checkpoint', 'x.pt', '--plm', 'plm']),
    'embeddings': ('runs/one/embeddings/lf.pt', ['train_seq', 'one', '--model', 'sasrec', '--variants', 'lf-freeze']),
    'checkpoint of evaluate': ('x.pt', ['evaluate', 'checkpoint', 'one', 'x.pt']),
    'checkpoint of topk': ('x.pt', ['evaluate', 'topk', 'one', 'x.pt', '--user', 'u1']),
    'language model': ('plm/pytorch_model.bin', ['pretrain', 'one', '--plm', 'plm', '--out', 'out.pt']),
    'prepared data': ('data/one/prepared.npz', ['train_seq', 'one', '--model', 'sasrec', '--hidden', '8']),
}


def trap(path, sprung):
    if path.suffix == '.npz':
        np.savez(path, texts=np.array([Trap(sprung)], object), items=np.zeros(1), offsets=np.zeros(1), evaluated=np.zeros(1), negatives=np.zeros(1))
    else:
        torch.save({'meta': Trap(sprung), 'longformer.x': Trap(sprung)}, path, pickle_module=pickle)


def junk(path, _):
    path.write_bytes(b'PK\x03\x04 this is no file of ours')


def empty(path, _):
    path.write_bytes(b'')


def of_another_kind(path, _):
    save_pt(path, 'picture', {'identity': 1}, matrix=torch.zeros(2, 2))


@pytest.mark.parametrize('make', [trap, junk, empty, of_another_kind])
@pytest.mark.parametrize('place', PLACES)
def test_no_file_that_is_read_runs_or_passes(world, place, make, capsys):
    file, (script, *options) = PLACES[place]
    if file.startswith('plm'):
        (world / 'plm' / 'model.safetensors').unlink()
    sprung = world / 'sprung'
    (world / file).parent.mkdir(parents=True, exist_ok=True)
    make(world / file, sprung)
    line = refused(script, capsys, *[world / o if o in (file, 'plm', 'out.pt') else o for o in options])
    assert not sprung.exists(), 'the file was run'
    assert (world / file).name in line or 'plm' in line and str(world / 'plm') in line, line
    assert not (world / 'out.pt').exists() and not (world / 'runs' / 'one' / 'results.json').exists()


def test_a_trapped_resume_file_is_not_used_and_training_starts_over(world, capsys):
    import train_seq
    file = world / 'runs' / 'one' / 'seq' / 'sasrec-bce-random-raw-h8-seed0-lr0.01.resume'
    file.parent.mkdir(parents=True)
    trap(file, world / 'sprung')
    train_seq.main(train_seq.parse_args(['one', '--model', 'sasrec', '--hidden', '8', '--lrs', '0.01', '--epochs', '1']))
    assert 'made again' in capsys.readouterr().out and not (world / 'sprung').exists()


@pytest.mark.parametrize('name', ['../one', 'a/b', '$(touch x)', '`touch x`', '/etc', 'one;ls', 'One two', '\n', 'é'])
@pytest.mark.parametrize('script, options', [('train_seq', ['--model', 'sasrec']), ('finetune', ['--stage', '1', '--plm', 'plm']),
                                             ('export_embeddings', ['--out', 'x', '--plm', 'plm']), ('evaluate', ['table'])])
def test_names_like_paths_or_commands_are_refused(world, script, options, name, capsys):
    line = refused(script, capsys, *([*options, name] if script == 'evaluate' else [name, *options]))
    assert 'letters, digits' in line
