"""The scripts as a user runs them: `bash run_all.sh ... --toy` end to end. Run: python -m pytest tests/test_chain.py (about 2 minutes)."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from common.files import ROOT
from tests.toy import amazon, canonical, tiny_bert, tiny_longformer


def environment(tmp_path, **more):
    return {**os.environ, 'ELEPHANT_DATA': str(tmp_path / 'data'), 'ELEPHANT_RUNS': str(tmp_path / 'runs'), 'ELEPHANT_ANY_VERSION': '1',
            'HF_HUB_OFFLINE': '1', 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', **more}


def call(tmp_path, *command, **more):
    out = subprocess.run(command, cwd=ROOT, env=environment(tmp_path, **more), capture_output=True, text=True, timeout=280)
    return out.returncode, out.stdout, out.stderr


def script(tmp_path, name, *options):
    return call(tmp_path, sys.executable, name, *map(str, options))


@pytest.mark.parametrize('binary', [False, True])
def test_pantry_with_longformer_end_to_end(tmp_path, binary):
    """Made-up Amazon files under data/raw/, a random Longformer saved as safetensors or as pytorch_model.bin."""
    amazon(tmp_path / 'data' / 'raw', 'Prime_Pantry')
    amazon(tmp_path / 'data' / 'raw', 'Movies_and_TV', users=50, quirks=False, seed=1)
    plm = tiny_longformer(tmp_path / 'plm', binary)
    command = ['bash', 'run_all.sh', 'pantry', '--toy', '--plm', str(plm), '--source', 'movies', '--seeds', '0', '--quick-table']
    code, out, err = call(tmp_path, *command)
    assert code == 0, err[-3000:]
    run = tmp_path / 'runs' / 'pantry'
    rows = json.loads((run / 'results.json').read_text())
    assert len([r for r in rows if r['model'] == 'sasrec']) == len([r for r in rows if r['model'] == 'bert4rec']) == 9
    assert {'ft1', 'ft2'} == {r['mode'] for r in rows if r['model'] == 'recformer'}
    for r in rows:
        assert r['users'] == rows[0]['users'] and set(r['metrics']['full']) == {f'{m}@{k}' for m in ('HR', 'NDCG') for k in (5, 10, 50)}
        assert all(0 <= v <= 1 for ranking in r['metrics'].values() for v in ranking.values()) and r['commit'] and r['seconds'] >= 0
    text = (run / 'results.md').read_text()
    assert '[32.56]' in text and '[27.40]' in text, "the paper's numbers stand beside ours"
    assert 'published' in out and '22,601' in out
    if binary:
        return
    before = {p: p.stat().st_mtime_ns for p in run.rglob('*.pt')}
    code, out, err = call(tmp_path, *command)
    assert code == 0 and out.count('up to date') >= 6 + 18, out
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob('*.pt')}, 'nothing is made twice'
    name = next(r['run'] for r in rows if r['init'] == 'pt' and r['model'] == 'sasrec')
    code, out, _ = script(tmp_path, 'evaluate.py', 'compare', 'pantry', name, 'sasrec-bce-random-raw-seed0', '--draws', '50')
    assert code == 0 and 'NDCG@10' in out
    file = next((run / 'seq').glob('bert4rec-masked-ft-trainable*.pt'))
    code, out, _ = script(tmp_path, 'evaluate.py', 'checkpoint', 'pantry', file)
    row = next(r for r in rows if r['run'] == 'bert4rec-masked-ft-trainable-raw-seed0')
    printed = float(re.search(r'NDCG@10 ([0-9.]+)', out)[1])
    assert code == 0 and abs(printed - 100 * row['metrics']['sampled']['NDCG@10']) < 2
    code, out, _ = script(tmp_path, 'evaluate.py', 'topk', 'pantry', file, '--user', 'U1', '--k', '3')
    assert code == 0 and len(out.splitlines()) == 3


def test_own_data_without_a_source(tmp_path):
    canonical(tmp_path / 'data' / 'mine')
    code, out, err = call(tmp_path, 'bash', 'run_all.sh', 'mine', '--toy', '--plm', str(tiny_bert(tmp_path / 'plm')), '--quick-table', '--table4', '--table5',
                          '--rec_seeds', '1')
    assert code == 0, err[-3000:]
    assert 'results.md' in out and '| N@10 |' in out
    rows = json.loads((tmp_path / 'runs' / 'mine' / 'results.json').read_text())
    assert [r['seed'] for r in rows if r['mode'] == 'ft2'] == [0, 1] and '(RecFormer 0, 1)' in out, "REC's row has its own seeds"


@pytest.mark.parametrize('stage', ['pretrain', 'finetune'])
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM])
def test_language_model_stages_killed_and_started_again_give_the_same_bits(tmp_path, stage, how):
    import torch

    from common.files import load_pt
    canonical(tmp_path / 'data' / 'mine')
    plm = tiny_bert(tmp_path / 'plm')
    assert call(tmp_path, sys.executable, '-m', 'common.data', 'mine')[0] == 0
    tail = ['--plm', plm, '--lr', '0.01', '--save_every', '1', '--epochs', '3', '--batch', '4', '--precision', 'float32']
    command = lambda out: [sys.executable, *(['pretrain.py', 'mine', '--accumulate', '2'] if stage == 'pretrain' else ['finetune.py', 'mine', '--stage', '1']),
                           *map(str, tail), '--out', str(out)]
    whole, killed = tmp_path / 'a' / 'whole.pt', tmp_path / 'b' / 'killed.pt'
    assert call(tmp_path, *command(whole))[0] == 0
    process = subprocess.Popen(command(killed), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.time() + 60
    while not killed.with_suffix('.resume').exists() and time.time() < until:
        time.sleep(0.01)
    process.send_signal(how)
    err = process.communicate()[1]
    assert not killed.exists(), 'it was not stopped in time to show anything'
    if how == signal.SIGTERM:
        assert process.returncode == 143 and 'the same command goes on' in err
    code, out, _ = call(tmp_path, *command(killed))
    assert code == 0 and 'goes on from' in out
    a, b = (load_pt(p, 'recformer') for p in (whole, killed))
    assert all(torch.equal(v, b['model'][k]) for k, v in a['model'].items()) and not killed.with_suffix('.resume').exists()
    if stage == 'finetune':
        assert torch.equal(a['items'], b['items'])


WRONG = [
    (['run_all.sh', 'nosuch'], 'unknown dataset nosuch'), (['run_all.sh', '../x'], 'letters, digits'), (['run_all.sh', '--wrong'], 'unknown option --wrong'),
    (['run_all.sh', 'grocery', '--seeds'], '--seeds needs a value'),
    (['train_seq.py', 'mine', '--model', 'sasrec', '--lrs', '-1'], '--lrs'), (['train_seq.py', 'mine', '--model', 'sasrec', '--epochs', '0'], '--epochs'),
    (['train_seq.py', 'mine', '--model', 'sasrec', '--lrs', 'nan'], '--lrs'), (['train_seq.py', 'mine', '--model', 'bert4rec', '--max_items', '1'], '--max_items'),
    (['train_seq.py', 'mine', '--model', 'sasrec', '--variants', 'xx-freeze'], 'invalid choice'),
    (['train_seq.py', 'mine', '--model', 'sasrec', '--variants', 'lf-freeze'], 'lf.pt: no such file'),
    (['train_seq.py', 'mine', '--model', 'sasrec', '--device', 'cuda:99', '--hidden', '8'], '--device cuda:99'),
    (['train_seq.py', 'nosuch', '--model', 'sasrec'], 'not prepared'),
    (['finetune.py', 'mine', '--stage', '2'], 'ft1.pt'), (['finetune.py', 'mine', '--stage', '1'], '--checkpoint'),
    (['finetune.py', 'mine', '--stage', '1', '--plm', 'PLM', '--tune_layers', '9'], 'layers 0 to 1'),
    (['finetune.py', 'mine', '--stage', '1', '--plm', '/nosuch/model'], 'no such folder'), (['finetune.py', 'mine', '--stage', '1', '--plm', 'PLM', '--layers', '5'], '--layers 5'),
    (['pretrain.py', 'mine', '--plm', 'PLM', '--batch', '1', '--out', 'X'], '--batch'), (['pretrain.py', 'mine', '--plm', 'PLM'], '--out'),
    (['pretrain.py', 'mine', '--plm', 'PLM', '--share', '0', '--out', 'X'], '--share'), (['pretrain.py', 'mine', '--plm', 'PLM', '--lr', 'inf', '--out', 'X'], '--lr'),
    (['export_embeddings.py', 'mine', '--out', 'X'], '--checkpoint'), (['export_embeddings.py', 'mine', '--out', 'X', '--checkpoint', 'nosuch.pt'], 'nosuch.pt'),
    (['evaluate.py', 'table', 'mine'], 'no results yet'), (['evaluate.py', 'compare', 'mine', 'a', 'b'], 'no such run'),
    (['evaluate.py', 'checkpoint', 'mine', 'nosuch.pt'], 'no such file'),
]


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wrong')
    canonical(folder / 'data' / 'mine')
    tiny_bert(folder / 'PLM')
    assert call(folder, sys.executable, '-m', 'common.data', 'mine')[0] == 0
    return folder


@pytest.mark.parametrize('command, word', WRONG, ids=[' '.join(c) for c, _ in WRONG])
def test_what_a_user_gets_wrong_ends_in_one_clear_line(prepared, command, word, monkeypatch, capsys):
    """In this process where argparse and main can be called (an import costs seconds), else by bash."""
    if command[0] == 'run_all.sh':
        code, _, err = call(prepared, 'bash', *command)
    else:
        import importlib
        for key, value in environment(prepared).items():
            monkeypatch.setenv(key, value)
        module = importlib.import_module(command[0].removesuffix('.py'))
        from common.files import command as run
        argv = [str(prepared / o) if o in ('PLM', 'X') else o for o in command[1:]]
        with pytest.raises(SystemExit) as exit_:
            run(lambda: module.main(module.parse_args(argv)))
        code, err = exit_.value.code, capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert code == 2 and word in last and 'error: ' in last and 'Traceback' not in err, err
    assert not (prepared / 'X').exists()
