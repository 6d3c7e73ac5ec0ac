"""The scripts as a user runs them. Run: python -m pytest tests/test_chain.py (about a minute).

Most of a short command is its imports. So whole chains, `bash run_all.sh`, have a Python that makes
them once and forks for each command; single commands run in the tests' own process where they can.
"""
import contextlib
import csv
import importlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from common.backbone import start_model, weights_digest
from common.files import ROOT, command, load_json, load_pt, lock
from tests.toy import amazon, canonical, tiny_bert, tiny_longformer

TINY = ['--model', 'sasrec', '--hidden', '8', '--lrs', '0.01', '--epochs', '1']  # of train_seq.py
NAME_OF_TINY = 'sasrec-bce-random-8-lr0.01-seed0'


# ------------------------------------------------------------------------ running commands

def environment(folder, **more):
    """With data and runs below `folder`."""
    return {**os.environ, 'ELEPHANT_DATA': str(folder / 'data'),
            'ELEPHANT_RUNS': str(folder / 'runs'), 'ELEPHANT_ANY_VERSION': '1',
            'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1', 'PYTHON': sys.executable, **more}


def call(folder, *argv, cwd=ROOT, **more):
    """A process of its own: (exit code, stdout, stderr)."""
    done = subprocess.run(list(map(str, argv)), cwd=cwd, env=environment(folder, **more),
                          capture_output=True, text=True, timeout=280)
    return done.returncode, done.stdout, done.stderr


def begin(folder, *argv):
    """A process that goes on beside the test."""
    argv = [sys.executable, *map(str, argv)]
    return subprocess.Popen(argv, cwd=ROOT, env=environment(folder), text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def here(folder, *argv, **more):
    """A script's command in this process: (exit code, stdout, stderr)."""
    name, *options = map(str, argv)
    if name == '-m':
        name, *options = options
    script, code = importlib.import_module(name.removesuffix('.py')), 0
    before = signal.getsignal(signal.SIGTERM)
    with mock.patch.dict(os.environ, environment(folder, **more)), \
            contextlib.redirect_stdout(io.StringIO()) as out, \
            contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            command(lambda: script.main(script.parse_args(options)))
        except SystemExit as error:
            code = error.code
    signal.signal(signal.SIGTERM, before)
    return code, out.getvalue(), err.getvalue()


def done(folder, *argv, **more):
    """What a command printed, which has to succeed."""
    code, out, err = here(folder, *argv, **more)
    assert code == 0, err
    return out


def record(folder, *options, cwd=ROOT, **more):
    """What `run_all.sh` would run, without running it: [(runs, data, command)]; for a language
    model of 12 layers."""
    log = folder / 'recorded'
    log.unlink(missing_ok=True)
    stand_in = folder / 'stand-in'
    stand_in.write_text('#!/usr/bin/env bash\n'
                        'if [ "$1" = -c ]; then echo 12; exit; fi\n'
                        'printf "%s\\0" "$ELEPHANT_RUNS" "$ELEPHANT_DATA" "$@" >> "$RECORDED"\n'
                        'printf "\\n\\0" >> "$RECORDED"\n')
    stand_in.chmod(0o755)
    found = call(folder, 'bash', ROOT / 'run_all.sh', *options, cwd=cwd, PYTHON=str(stand_in),
                 RECORDED=str(log), **more)
    assert found[0] == 0, found[2]
    lines = [line.split('\0') for line in log.read_text().split('\0\n\0')[:-1]]
    return [(Path(runs), Path(data), argv) for runs, data, *argv in lines]


# ------------------------------------------------------------------------ a Python for chains

SCRIPTS = ('common.data', 'pretrain', 'finetune', 'export_embeddings', 'train_seq', 'evaluate')
CLIENT = """#!{python} -IS
import json, os, socket, sys
places = {{key: value for key, value in os.environ.items() if key.startswith('ELEPHANT_')}}
with socket.socket(socket.AF_UNIX) as s:
    s.connect({path!r})
    socket.send_fds(s, [json.dumps([sys.argv[1:], places]).encode()], [0, 1, 2])
    code = s.recv(1)
sys.exit(code[0] if code else 1)
"""


@pytest.fixture(scope='module')
def fast(tmp_path_factory):
    """Path of a program that does what Python does with a script of this repository."""
    folder = tmp_path_factory.mktemp('fast')
    program, path = folder / 'python', str(folder / 'socket')
    program.write_text(CLIENT.format(python=sys.executable, path=path))
    program.chmod(0o755)
    server = [sys.executable, '-c', f'from tests.test_chain import serve; serve({path!r})']
    server = subprocess.Popen(server, cwd=ROOT, env=environment(folder), stdout=subprocess.PIPE)
    assert server.stdout.readline() == b'ready\n'
    yield str(program)
    server.terminate()
    server.communicate()


def serve(path):
    """Fork a process for each command that a client sends."""
    for name in SCRIPTS:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print('ready', flush=True)
        while True:
            asked, _ = server.accept()
            message, streams, _, _ = socket.recv_fds(asked, 2 ** 16, 3)
            if not os.fork():
                code = run_as_python(*json.loads(message), streams)
                asked.send(bytes([code]))
                os._exit(code)
            asked.close()
            for stream in streams:
                os.close(stream)


def run_as_python(argv, places, streams):
    """What `python argv...` does, in this forked process: its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.update(places)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    try:
        if argv[0] == '-c':
            sys.argv = ['-c', *argv[2:]]
            exec(argv[1], {})
        elif argv[0] == '-m':
            sys.argv = argv[1:]
            del sys.modules[argv[1]]
            runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name='__main__')
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    return code


# ------------------------------------------------------------------------ looking at what was made

def rows_of(run):
    return load_json(run / 'results.json')


def stamps(folder):
    """{file: time of its last change} below a folder, but for locks, tables, pictures."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*')
            if path.is_file() and path.suffix != '.png'
            and path.name not in ('.lock', 'results.md', 'results.json')}


def until(happened, seconds=60):
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, 'it did not come'
        time.sleep(0.005)


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """As in the processes: sums of several threads may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------ whole chains

@pytest.fixture(scope='module')
def pantry(tmp_path_factory, fast):
    """Made-up Amazon files, a random Longformer, and the chain on them: (folder, options, output).

    Called from a folder of the user's, with relative paths.
    """
    folder = tmp_path_factory.mktemp('pantry')
    amazon(folder / 'data' / 'raw', 'Prime_Pantry')
    amazon(folder / 'data' / 'raw', 'Movies_and_TV', users=50, quirks=False, seed=1)
    tiny_longformer(folder / 'models' / 'tiny')
    options = ['pantry', '--toy', '--plm', 'models/tiny', '--source', 'movies', '--seeds', '0']
    code, out, err = call(folder, 'bash', ROOT / 'run_all.sh', *options, cwd=folder, PYTHON=fast,
                          ELEPHANT_DATA='data', ELEPHANT_RUNS='./runs')
    assert code == 0, err[-3000:]
    return folder, options, out, err


def place(folder):
    """Where the chain of `pantry` puts its runs."""
    return folder / 'runs' / 'toy' / 'tiny' / 'from-movies'


def test_pantry_with_longformer_end_to_end(pantry):
    folder, _, out, err = pantry
    run = place(folder) / 'pantry'
    rows = rows_of(run)
    counts = {model: len([r for r in rows if r['model'] == model])
              for model in ('sasrec', 'bert4rec', 'gru4rec', 'recformer', 'untrained')}
    assert counts == {'sasrec': 19, 'bert4rec': 4, 'gru4rec': 4, 'recformer': 2, 'untrained': 8}
    assert len(rows) == sum(counts.values())
    assert {'ft1', 'ft2'} == {r['mode'] for r in rows if r['model'] == 'recformer'}
    wide = {f'{metric}@{k}' for metric in ('HR', 'NDCG') for k in (5, 10, 50)}
    for r in rows:
        assert r['users'] == rows[0]['users']
        assert set(r['metrics']['full']) == set(r['metrics']['new']) == wide
        assert set(r['metrics']['sampled']) == {name for name in wide if '@50' not in name}
        assert all(0 <= v <= 1 for ranking in r['metrics'].values() for v in ranking.values())
        assert r['commit'] and r['seconds'] >= 0
        assert load_json(run / r['run'] / 'row.json') == r
    text = (run / 'results.md').read_text()
    assert '[32.56]' in text and '[27.40]' in text, "the paper's numbers stand beside ours"
    assert 'paper 22,601' in out and text in out
    assert '\r' not in out + err, 'not on a terminal: whole lines'
    assert 'Traceback' not in err


def test_a_chain_writes_where_it_says_and_nowhere_else(pantry):
    folder, _, out, _ = pantry
    assert [path.name for path in (folder / 'runs').iterdir()] == ['toy']
    assert {path.name for path in place(folder).iterdir()} == {'pretrained', 'pantry', '.place'}
    assert f'export ELEPHANT_RUNS={place(folder)} ' in out
    left = [p.name for p in folder.rglob('*') if p.name == 'resume.pt' or p.suffix == '.part']
    assert not left, 'left behind'
    row = load_json(place(folder) / 'pantry' / 'ft1-seed0' / 'row.json')
    assert row['plm'] == str(folder / 'models' / 'tiny'), 'relative to where the user stands'


def test_no_chain_is_put_into_the_place_of_another(pantry, fast):
    """Its last line says to export ELEPHANT_RUNS; where that is forgotten all would be made anew."""
    folder, options, _, _ = pantry
    for given in (options, ['pantry'], ['drugstore', '--longer']):
        code, out, err = call(folder, 'bash', ROOT / 'run_all.sh', *given, cwd=folder, PYTHON=fast,
                              ELEPHANT_RUNS=str(place(folder)))
        assert (code, out, err.count('\n')) == (2, '', 1)
        assert 'is where a chain puts its runs: unset it' in err


def test_the_same_chain_again_makes_nothing(pantry, fast):
    folder, options, _, _ = pantry
    before = stamps(folder / 'runs')
    code, out, err = call(folder, 'bash', ROOT / 'run_all.sh', *options, cwd=folder, PYTHON=fast)
    assert code == 0, err
    assert out.count('up to date') == 2 + 7 + 27, out  # the first: two datasets' files
    assert before == stamps(folder / 'runs')


def test_other_commands_on_the_runs_of_a_chain(pantry):
    folder, _, _, _ = pantry
    runs = str(place(folder))
    rows = rows_of(place(folder) / 'pantry')

    def evaluate(*argv):
        return done(folder, 'evaluate.py', *argv, ELEPHANT_RUNS=runs)

    name = next(r['run'] for r in rows if r['init'] == 'pt' and r['model'] == 'sasrec')
    out = evaluate('compare', 'pantry', name, 'sasrec-bce-random-16-lr0.001-seed0')
    assert 'NDCG@10' in out and len(out.splitlines()) == 2 + 2 * (2 + 3 + 3)
    row = next(r for r in rows if r['run'] == 'bert4rec-masked-ft-trainable-raw-16-lr0.001-seed0')
    out = evaluate('recommend', 'pantry', row['run'], '--users', 'U1', 'U2', '--k', '3')
    assert [line.split()[:2] for line in out.splitlines()] \
        == [[user, str(rank)] for user in ('U1', 'U2') for rank in (1, 2, 3)]


def test_weights_as_pytorch_model_bin_give_the_same_embeddings(pantry):
    folder, options, _, _ = pantry
    shutil.copytree(folder / 'models', folder / 'binary')
    shutil.rmtree(folder / 'binary' / 'tiny')
    plm = tiny_longformer(folder / 'binary' / 'tiny', binary=True)
    options = [plm if option == 'models/tiny' else option for option in options]
    recorded = record(folder, *options, ELEPHANT_RUNS=str(folder / 'of-binary'))
    for runs, _, argv in recorded:
        if argv[0] in ('pretrain.py', 'finetune.py', 'export_embeddings.py'):
            done(folder, *argv, ELEPHANT_RUNS=str(runs))
    for name in ('lf', 'pt', 'ft'):
        file = f'pantry/embeddings/{name}.pt'
        ours = load_pt(folder / 'of-binary' / 'toy' / 'tiny' / 'from-movies' / file, 'embeddings')
        theirs = load_pt(place(folder) / file, 'embeddings')
        assert torch.equal(ours['matrix'], theirs['matrix']), name
    shutil.rmtree(folder / 'binary')


def test_own_data_without_a_source(tmp_path, fast):
    """Also tables 1 and 5, and several seeds of the language model alone."""
    canonical(tmp_path / 'data' / 'mine')
    plm = tiny_bert(tmp_path / 'plm', layers=3)
    code, out, err = call(tmp_path, 'bash', 'run_all.sh', 'mine', '--toy', '--plm', plm,
                          '--table5', '--table1', '--rec-seeds', '0 1', PYTHON=fast)
    assert code == 0, err[-3000:]
    run = tmp_path / 'runs' / 'toy' / 'plm' / 'mine'
    assert 'stage-PT' not in out and not (run.parent / 'pretrained').exists()
    assert not list(run.glob('*-pt-*'))
    assert f'written to {run / "results.md"}' in out and '| random-16 |' in out
    rows = rows_of(run)
    whole = [r for r in rows if r['model'] == 'recformer' and r['mode'] == 'ft2'
             and r['tune_layers'] == 'all' and not r['trainable_items']]
    assert [r['seed'] for r in whole] == [0, 1]
    mean = r'\d+\.\d'
    assert re.search(rf'\| ft2 \| {mean} ± {mean} ', out), 'its own seeds'
    assert re.search(rf'\| ft2-items \| {mean} \([<=>] ', out)
    assert re.search(rf'\| random-16 \| {mean} \([<=>] ', out)
    assert {r['seed'] for r in rows if r['model'] == 'sasrec'} == {0}
    tuned = {r['tune_layers'] for r in rows if r.get('mode') == 'ft1'}
    assert tuned == {'all', '0,1,2', '0', '1', '2'}
    for label in ('lf-id+text-raw-16', 'ft-id+text-raw-16', 'ft0-lf'):
        assert f'| {label} |' in out
    head = load_pt(run / 'embeddings' / 'ft.pt', 'embeddings')['head']
    assert head['identity']['model'] == weights_digest(start_model(run / 'ft1-seed0'))


# ------------------------------------------------------------------------ what run_all.sh runs

BUDGETS = ['--toy', '--longer', '--full', '']
EXTRA = ['--table1', '--table5', '--figure2', '--again']


@pytest.mark.parametrize('budget', BUDGETS)
@pytest.mark.parametrize('name', ['drugstore', 'pantry', 'industrial', 'mine'])
def test_every_command_of_every_budget_is_one_that_its_script_takes(tmp_path, name, budget):
    options = [name, *filter(None, [budget]), *EXTRA] + ['--source', 'other'] * (name == 'mine')
    recorded = record(tmp_path, *options)
    for _, _, argv in recorded:
        script, *rest = argv[1:] if argv[0] == '-m' else argv
        importlib.import_module(script.removesuffix('.py')).parse_args(rest)
        trains = script in ('train_seq.py', 'finetune.py', 'pretrain.py', 'export_embeddings.py')
        assert trains == ('--again' in rest) or rest[0] == 'untrained'
    scripts = [argv[0] for _, _, argv in recorded]
    assert scripts.index('pretrain.py') < scripts.index('finetune.py') \
        < scripts.index('export_embeddings.py') < scripts.index('train_seq.py')
    tuned = [argv[argv.index('--tune-layers') + 1] for _, _, argv in recorded
             if '--tune-layers' in argv and '1' in argv[argv.index('--stage') + 1]]
    assert tuned == ['0,4,8', '1,5,9', '2,6,10', '3,7,11', '3', '7', '11'], 'paper table 1'
    pretrained = [argv for _, _, argv in recorded if argv[0] == 'pretrain.py']
    exported = {Path(argv[argv.index('--out') + 1]).stem: argv for _, _, argv in recorded
                if argv[0] == 'export_embeddings.py'}
    pt, whole = exported['pt'], exported['pt-share100']
    assert pt[pt.index('--checkpoint') + 1] == whole[whole.index('--checkpoint') + 1], 'figure 2'
    shares = [name for name in exported if name.startswith('pt-share')]
    assert len(pretrained) == len(shares), 'the whole one and all but the share of 100'
    assert all(('--leave-out' in argv) == (name == 'pantry') for argv in pretrained)


def test_stage_pt_never_trains_on_what_its_target_is_tested_by(tmp_path):
    for source in ('mine', 'other mine'):
        recorded = record(tmp_path, 'mine', '--toy', '--source', source)
        assert ['--leave-out' in argv for _, _, argv in recorded if argv[0] == 'pretrain.py'] == [True]


def test_published_weights_need_no_source_domains(tmp_path):
    (tmp_path / 'weights.pt').touch()
    options = ['pantry', '--toy', '--pretrained', str(tmp_path / 'weights.pt')]
    for more, prepared in (([], 1), (['--figure2'], 5)):
        recorded = record(tmp_path, *options, *more)
        assert len([argv for _, _, argv in recorded if argv[0] == '-m']) == prepared
        exported = [argv for _, _, argv in recorded if argv[0] == 'export_embeddings.py']
        published = [argv for argv in exported if str(tmp_path / 'weights.pt') in argv]
        assert published and all('--plm' in argv for argv in published), 'such weights name no backbone'


def test_a_checkpoint_of_ours_says_what_lf_is_made_of(tmp_path):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'row.json').touch()
    for more, plm in (([], '12'), (['--plm', 'other'], 'other')):  # what the stand-in says of a row
        recorded = record(tmp_path, 'drugstore', '--toy', '--pretrained', str(tmp_path / 'mine'), *more)
        lf = next(argv for _, _, argv in recorded if any(word.endswith('lf.pt') for word in argv))
        assert lf[lf.index('--plm') + 1] == plm


def test_a_checkpoint_whose_row_is_broken_is_named(tmp_path):
    (tmp_path / 'row.json').write_text('{broken')
    code, out, err = call(tmp_path, 'bash', ROOT / 'run_all.sh', 'drugstore', '--toy', '--pretrained',
                          str(tmp_path))
    assert code == 2 and not out and err == f'error: {tmp_path}/row.json: no row of ours; remove it\n'


@pytest.mark.parametrize('group', [False, True])
@pytest.mark.parametrize('how, code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_chain_that_is_told_to_end_leaves_nothing_running(tmp_path, how, code, group):
    """The shell alone is told so (but for Ctrl-C, which the terminal gives to both), or both."""
    step = tmp_path / 'step'
    step.write_text('#!/usr/bin/env bash\n'
                    'trap "echo ended >> $HERE/said; exit 1" TERM INT\n'
                    'echo $$ > $HERE/pid\n'
                    'for ((i = 0; i < 600; i++)); do sleep 0.05; done\n')
    step.chmod(0o755)
    chain = subprocess.Popen(['bash', ROOT / 'run_all.sh', 'mine', '--toy'], start_new_session=True,
                             stderr=subprocess.PIPE, text=True,
                             env={**environment(tmp_path), 'PYTHON': str(step), 'HERE': str(tmp_path)})
    until((tmp_path / 'pid').exists)
    if group or how == signal.SIGINT:
        os.killpg(chain.pid, how)
    else:
        chain.send_signal(how)
    err = chain.communicate(timeout=20)[1]
    assert chain.returncode == code and 'run_all' not in err  # where the shell itself complains
    assert set((tmp_path / 'said').read_text().split()) == {'ended'}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / 'pid').read_text()), 0)


PLACES = [
    (['mine'], ''), (['mine', '--toy'], 'toy'), (['mine', '--full'], 'full'),
    (['mine', '--longer'], 'longer'), (['pantry'], ''), (['pantry', '--full'], ''),
    (['pantry', '--toy'], 'toy'), (['mine', '--plm', 'longformer'], 'longformer'),
    (['mine', '--plm', 'a/b/hub-name'], 'hub-name'), (['mine', '--plm', 'folder'], 'folder'),
    (['mine', '--plm', 'folder/'], 'folder'), (['mine', '--plm', './folder'], 'folder'),
    (['drugstore', '--source', 'other'], 'from-other'),
    (['drugstore', '--source', 'two others'], 'from-two+others'),
    (['pantry', '--toy', '--plm', 'minilm', '--source', 'movies'], 'toy/minilm/from-movies'),
    (['pantry', '--source', 'movies', '--plm', 'minilm', '--toy'], 'toy/minilm/from-movies'),
]


@pytest.mark.parametrize('options, below', PLACES, ids=[' '.join(o) for o, _ in PLACES])
def test_each_budget_model_and_source_has_a_place_of_its_own(tmp_path, options, below):
    (tmp_path / 'folder').mkdir()
    recorded = record(tmp_path, *options, cwd=tmp_path)
    root = tmp_path / 'runs' / below
    assert {runs for runs, _, _ in recorded} == {root}
    outs = [argv[argv.index('--out') + 1] for _, _, argv in recorded if '--out' in argv]
    assert outs and all(Path(out).is_relative_to(root) for out in outs), outs


def test_a_checkpoint_to_start_from_takes_the_place_of_stage_pt(tmp_path):
    (tmp_path / 'published').mkdir()
    recorded = record(tmp_path, 'pantry', '--pretrained', 'published', cwd=tmp_path)
    assert not any(argv[0] == 'pretrain.py' for _, _, argv in recorded)
    starts = {argv[argv.index('--checkpoint') + 1] for _, _, argv in recorded
              if argv[0] == 'finetune.py' and '1' in argv[argv.index('--stage') + 1]}
    assert starts == {str(tmp_path / 'published')}, 'relative to where the user stands'
    assert {runs for runs, _, _ in recorded} == {tmp_path / 'runs' / 'pretrained-published'}


def test_relative_paths_are_the_users(tmp_path):
    home = tmp_path / 'home'
    (home / 'models' / 'tiny').mkdir(parents=True)
    recorded = record(tmp_path, 'mine', '--plm', 'models/tiny', cwd=home, ELEPHANT_DATA='my data',
                      ELEPHANT_RUNS='../elsewhere')
    assert {data for _, data, _ in recorded} == {home / 'my data'}
    assert {runs for runs, _, _ in recorded} == {tmp_path / 'elsewhere' / 'tiny'}
    named = [argv[argv.index('--plm') + 1] for _, _, argv in recorded if '--plm' in argv]
    assert set(named) == {str(home / 'models' / 'tiny')}
    recorded = record(tmp_path, 'mine', '--plm', 'org/name', cwd=home)
    named = [argv[argv.index('--plm') + 1] for _, _, argv in recorded if '--plm' in argv]
    assert set(named) == {'org/name'}, 'a hub name'


def test_without_a_place_named_runs_lie_beside_run_all_sh(tmp_path):
    recorded = record(tmp_path, 'mine', cwd=tmp_path, ELEPHANT_RUNS='', ELEPHANT_DATA='')
    assert {runs for runs, _, _ in recorded} == {ROOT / 'runs'}


# ------------------------------------------------------------------------ killed and started again

@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """A prepared dataset `mine` and a tiny language model PLM."""
    folder = tmp_path_factory.mktemp('prepared')
    canonical(folder / 'data' / 'mine')
    tiny_bert(folder / 'PLM')
    done(folder, '-m', 'common.data', 'mine')
    return folder


STAGES = {'pretrain': ['pretrain.py', 'mine', '--accumulate', '2'],
          'finetune': ['finetune.py', 'mine', '--stage', '1']}


def stage(folder, name, out):
    """A command that saves after every step."""
    return [*STAGES[name], '--plm', folder / 'PLM', '--lr', '0.01', '--save-every', '0',
            '--epochs', '6', '--batch', '4', '--precision', 'float32', '--out', out]


@pytest.fixture(scope='module', params=STAGES)
def undisturbed(request, prepared):
    """(stage, its folder after a run that nothing stopped)."""
    out = prepared / 'whole' / request.param
    done(prepared, *stage(prepared, request.param, out))
    return request.param, out


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_started_again_gives_the_same_bits(prepared, undisturbed, how):
    name, whole = undisturbed
    killed = prepared / how.name / name
    process = begin(prepared, *stage(prepared, name, killed))
    log = killed / 'log.csv'
    until(lambda: log.exists() and len(log.read_text().splitlines()) > 1)  # an epoch is over
    process.send_signal(how)
    err = process.communicate()[1]
    assert not (killed / 'row.json').exists(), 'it was not stopped in time to show anything'
    assert (killed / 'resume.pt').exists()
    if how == signal.SIGTERM:
        assert process.returncode == 143 and 'the same command goes on' in err
        assert 'Traceback' not in err
    assert 'goes on from' in done(prepared, *stage(prepared, name, killed))
    a, b = (load_pt(folder / 'model.pt', 'recformer') for folder in (whole, killed))
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items())
    rows = [load_json(folder / 'row.json') for folder in (whole, killed)]
    for row in rows:
        for key in ('run', 'seconds', 'date', 'command', 'commit'):
            del row[key]
    assert rows[0] == rows[1]
    logs = [list(csv.DictReader((folder / 'log.csv').open())) for folder in (whole, killed)]
    for line in (*logs[0], *logs[1]):
        del line['seconds']
    assert logs[0] == logs[1] and len(logs[0]) == rows[0]['epochs'] > 1
    if name == 'finetune':
        assert torch.equal(a['items'], b['items'])
        ours, theirs = (np.load(folder / 'ranks.npz') for folder in (whole, killed))
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert not (killed / 'resume.pt').exists()
    assert not list(killed.glob('.*.part')), 'half-written'


def test_out_elsewhere_leaves_the_dataset_s_runs_alone(prepared):
    run = prepared / 'runs' / 'mine'
    tail = ['--epochs', '1', '--batch', '8']
    first = ['finetune.py', 'mine', '--stage', '1', '--plm', prepared / 'PLM', *tail]
    done(prepared, *first)
    before = stamps(prepared / 'runs')
    look = prepared / 'look'
    done(prepared, *first, '--lr', '0.001', '--out', look / 'ft1')
    done(prepared, 'finetune.py', 'mine', '--stage', '2', *tail, '--out', look / 'ft2')
    done(prepared, 'pretrain.py', 'mine', '--plm', prepared / 'PLM', *tail, '--out', look / 'pt')
    export = ['export_embeddings.py', 'mine', '--plm', prepared / 'PLM']
    done(prepared, *export, '--out', look / 'lf.pt')
    assert stamps(prepared / 'runs') == before
    assert {p.parent.name for p in before} == {'ft1-seed0'} and run.is_dir()
    assert all((look / name / 'row.json').exists() for name in ('ft1', 'ft2', 'pt'))
    assert 'up to date' in done(prepared, *first), 'what the elsewhere holds is another run'


# ------------------------------------------------------------------------ processes

def test_sigterm_outside_training_exits_with_143(tmp_path):
    canonical(tmp_path / 'data' / 'mine', users=10_000, items=1_000)
    folder = tmp_path / 'data' / 'mine'
    process = begin(tmp_path, '-m', 'common.data', 'mine')
    until((folder / '.lock').exists)
    process.terminate()
    err = process.communicate()[1]
    assert process.returncode == 143 and not err
    names = {path.name for path in folder.iterdir()}
    assert names == {'interactions.csv', 'items.jsonl', '.lock'}, 'whole or not at all'
    with lock(folder):
        pass


@pytest.mark.parametrize('pipe', ['|', '2>&1 |'])
def test_a_closed_pipe_ends_quietly_and_is_no_success(prepared, pipe):
    """`true` reads nothing: its end is closed before the first line is written. What is left was
    not done: a chain must not go on as if it were."""
    line = f'"$PYTHON" -m common.data mine {pipe} true; exit ${{PIPESTATUS[0]}}'
    assert call(prepared, 'bash', '-c', line) == (141, '', '')


def test_variants_run_side_by_side_but_no_run_twice(prepared):
    out = prepared / 'runs' / 'mine' / 'embeddings' / 'lf.pt'
    done(prepared, 'export_embeddings.py', 'mine', '--plm', prepared / 'PLM', '--out', out)
    long = ['train_seq.py', 'mine', *TINY[:-1], '20000', '--patience', '20000', '--save-every', '0']
    process = begin(prepared, *long)
    try:
        resume = prepared / 'runs' / 'mine' / NAME_OF_TINY / 'resume.pt'
        until(resume.exists)
        beside = done(prepared, 'train_seq.py', 'mine', *TINY, '--variants', 'lf-trainable')
        assert 'sasrec-bce-lf-trainable-raw-8-lr0.01-seed0: best epoch 1 of 1' in beside
        code, _, err = here(prepared, *long)
        assert code == 2 and err.count('\n') == 1, err
        assert f'{NAME_OF_TINY} is in use by process {process.pid} (train_seq.py mine' in err
        assert process.poll() is None, 'it was still running all the while'
    finally:
        process.terminate()
        err = process.communicate()[1]
    assert process.returncode == 143 and f'goes on from {resume}' in err


def test_no_git_on_the_machine(prepared, tmp_path):
    run = prepared / 'runs' / 'mine' / 'sasrec-bce-random-8-lr0.02-seed0'
    done(prepared, 'train_seq.py', 'mine', *TINY, '--lrs', '0.02', PATH=str(tmp_path))
    assert load_json(run / 'row.json')['commit'] == 'unknown'
    commits = re.search(r'; commits (.+)\.\n', done(prepared, 'evaluate.py', 'table', 'mine'))[1]
    assert 'unknown' in commits.split(', ')


def test_progress_is_whole_lines_where_there_is_no_terminal(prepared, monkeypatch):
    from common import progress
    often = {'delay': 0, 'mininterval': 0}

    def at_once(things=None, **options):
        return tqdm(things, **{**options, **often})
    tqdm = progress.tqdm
    monkeypatch.setattr(progress, 'tqdm', at_once)
    code, out, err = here(prepared, 'train_seq.py', 'mine', *TINY[:-1], '2', '--batch', '16',
                          '--lrs', '0.03')
    assert code == 0 and '\r' not in out + err and '\x1b' not in out + err
    lines = err.splitlines()
    assert len(lines) >= 6 and err.endswith('\n')
    name = re.escape('sasrec-bce-random-8-lr0.03-seed0')
    wanted = re.compile(rf'{name}: +\d+/6 \[\d\d:\d\d<[^\]]*, [^\]]*(, loss=[\d.]+)?\]')
    assert all(wanted.fullmatch(line) for line in lines), lines


# ------------------------------------------------------------------------ the code is edited

def test_what_edited_code_would_change_is_made_again(prepared, tmp_path):
    copy = tmp_path / 'copy'
    shutil.copytree(ROOT / 'common', copy / 'common', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copy(ROOT / 'train_seq.py', copy)
    shutil.copytree(prepared / 'data', tmp_path / 'data')
    row = tmp_path / 'runs' / 'mine' / NAME_OF_TINY / 'row.json'
    file = copy / 'common' / 'sasrec.py'

    def train():
        code, out, err = call(tmp_path, sys.executable, 'train_seq.py', 'mine', *TINY, cwd=copy)
        assert code == 0, err
        return out

    def edit(old, new):
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))

    done(tmp_path, 'train_seq.py', 'mine', *TINY)
    first = load_json(row)
    edit('class SASRec(AttentionModel):', '# said in a comment\nclass SASRec(AttentionModel):')
    edit("Sizes: paper's code.", 'Said in a docstring.')
    assert f'{NAME_OF_TINY} is up to date' in train()
    assert load_json(row) == first
    edit('dropout = 0.5', 'dropout = 0.25')
    out = train()
    assert f'{row.parent}: made again, as it was made with other code (common/sasrec.py)' in out
    assert 'best epoch 1 of 1' in out
    second = load_json(row)
    assert second['valid'] != first['valid'] or second['metrics'] != first['metrics']
    changed = {key for key in first['code'] if first['code'][key] != second['code'][key]}
    assert changed == {'common/sasrec.py'}


# ------------------------------------------------------------------------ wrong commands

SASREC = ['train_seq.py', 'mine', '--model', 'sasrec']
FT1 = ['finetune.py', 'mine', '--stage', '1']
PT = ['pretrain.py', 'mine', '--plm', 'PLM', '--out', 'X']
WRONG = [
    (['run_all.sh', 'nosuch'], '/nosuch: must hold one of'),
    (['run_all.sh', '../x'], 'letters, digits'),
    (['run_all.sh', '--seeds', '0,1'], "take numbers, such as '0 1', not '0,1'"), (['run_all.sh', '--rec-seeds', '1.5'], 'take numbers'),
    (['run_all.sh', '--seeds', ' '], 'take numbers'), (['run_all.sh', '--shares', '1.2.3'], 'take numbers'),
    (['run_all.sh', '--pretrained', '/nosuch/x'], '--pretrained /nosuch/x: no such'),
    (['run_all.sh', '--wrong'], 'unknown option --wrong'),
    (['run_all.sh', 'grocery', '--seeds'], '--seeds needs a value'),
    (['run_all.sh', 'grocery', '--plm'], '--plm needs a value'),
    (['run_all.sh', 'grocery', 'pantry'], 'one dataset at a time: grocery, pantry'),
    (['run_all.sh', 'mine', '--figure2'], '--figure2 needs a --source'),
    (['-m', 'common.data', 'nosuch'], '/nosuch: must hold one of'),
    ([*SASREC, '--lrs', '-1'], '--lrs'), ([*SASREC, '--epochs', '0'], '--epochs'),
    ([*SASREC, '--lrs', 'nan'], '--lrs'),
    (['train_seq.py', 'mine', '--model', 'bert4rec', '--max-items', '1'], '--max-items'),
    (['train_seq.py', 'mine', '--model', 'bert4rec', '--loss', 'bce'], '--loss bce'),
    ([*SASREC, '--variants', 'xx-thaw'], '--variants'),
    ([*SASREC, '--variants', 'lf-freeze'], 'lf.pt: no such file'),
    ([*SASREC, '--device', 'cuda:99', '--hidden', '8'], '--device cuda:99'),
    (['train_seq.py', 'mine', '--model', 'bert4rec', '--hidden', '9'], '--hidden: 9 cannot be split among 4 heads; try another'),
    (['train_seq.py', 'nosuch', '--model', 'sasrec'], 'run python -m common.data nosuch'),
    (['finetune.py', 'mine', '--stage', '2'], 'ft1-seed0'), (FT1, '--checkpoint'),
    ([*FT1, '--plm', 'PLM', '--tune-layers', '9'], '--tune-layers 9: all, or some of 0 to 1'),
    ([*FT1, '--plm', 'PLM', '--tune-layers', 'top'], '--tune-layers top'),
    ([*FT1, '--plm', '/nosuch/model'], '--plm /nosuch/model: no language model'),
    ([*FT1, '--plm', 'PLM', '--trainable-items'], '--stage 2'),
    ([*FT1, '--plm', 'PLM', '--out', 'X', '--seeds', '0', '1'], '--out'),
    (['finetune.py', 'mine', '--stage', '2', '--plm', 'PLM'], 'without --plm'),
    ([*PT, '--batch', '1'], '--batch'), ([*PT, '--share', '0'], '--share'),
    ([*PT, '--lr', 'inf'], '--lr'), ([*PT, '--again', '--keep'], '--keep'),
    (['pretrain.py', 'nosuch', '--plm', 'PLM', '--out', 'X'], 'run python -m common.data nosuch'),
    (['pretrain.py', 'mine', '--plm', '/nosuch/model', '--out', 'X'], '--plm /nosuch/model: no language model'),
    (['export_embeddings.py', 'mine', '--out', 'X'], '--checkpoint'),
    (['export_embeddings.py', 'mine', '--out', 'X.pt', '--checkpoint', 'nosuch.pt'], 'nosuch.pt'),
    (['export_embeddings.py', 'mine', '--from-npy', 'a.npy', '--ids', 'b.txt', '--out', './a.npy'], 'of --from-npy: .pt alone'),
    (['export_embeddings.py', 'mine', '--from-npy', 'a.npy', '--ids', 'b.ids.txt', '--out', 'b.safetensors'], '.pt alone'),
    (['export_embeddings.py', 'mine', '--plm', 'PLM', '--out', '.'], 'an --out that ends in .pt, .npy, .safetensors'),
    (['evaluate.py', 'table', 'mine'], 'no results yet'),
    (['evaluate.py', 'compare', 'mine', 'a', 'b'], 'no such run'),
    (['evaluate.py', 'recommend', 'mine', '../x'], 'no such run'),
    (['evaluate.py', 'recommend', 'mine', 'nosuch', '--users', 'u1'], 'no such run'),
    (['evaluate.py', 'attention', 'mine', '--seq', 'a'], 'no such file'),
    (['evaluate.py', 'curve', 'mine'], 'no pt-share<percent>: run_all.sh mine --figure2'),
]


@pytest.fixture(scope='module')
def without_runs(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp('wrong')
    shutil.copytree(prepared / 'data', folder / 'data')
    shutil.copytree(prepared / 'PLM', folder / 'PLM')
    return folder


@pytest.mark.parametrize('argv, word', WRONG, ids=[' '.join(argv) for argv, _ in WRONG])
def test_what_a_user_gets_wrong_ends_in_one_clear_line(without_runs, tmp_path, argv, word):
    argv = [{'PLM': without_runs / 'PLM', 'X': tmp_path / 'X'}.get(o, o) for o in argv]
    if argv[0] == 'run_all.sh':
        code, _, err = call(without_runs, 'bash', *argv)
    else:
        code, _, err = here(without_runs, *argv)
    last = err.strip().splitlines()[-1]
    assert code == 2 and word in last and 'error: ' in last and 'Traceback' not in err, err
    assert not (tmp_path / 'X').exists(), 'a refused command writes nothing'
    runs = [path for path in (without_runs / 'runs').rglob('*') if path.is_file()]
    assert {path.name for path in runs} <= {'.lock'}
