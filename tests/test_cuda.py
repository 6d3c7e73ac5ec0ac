"""On a GPU: the numbers of a CPU, the same bits twice, killed and resumed; skipped where there is
none. The loops' waits: test_training.py. Run: python -m pytest --gpu
"""
import json
import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import finetune
import pretrain
import train_seq
from common.backbone import start_model
from common.data import prepare
from common.files import ROOT
from common.layers import Dropout, Machine, attend
from common.metrics import rank_counts
from common.sequence import draw_training_negatives
from common.training import Training, faster_in_bfloat16, start
from tests.toy import canonical, tiny_bert, tiny_longformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
CUDA = Machine(torch.device('cuda'))
SCRIPTS = {'pretrain': pretrain, 'finetune': finetune, 'train_seq': train_seq}
LOSSES = [('sasrec', 'bce'), ('sasrec', 'ce'), ('sasrec', 'sampled'), ('bert4rec', 'masked'),
          ('gru4rec', 'ce')]


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a dataset and two tiny language models without dropout."""
    folder = tmp_path_factory.mktemp('cuda')
    canonical(folder / 'data' / 'one')
    for plm in tiny_bert(folder / 'bert'), tiny_longformer(folder / 'longformer'):
        config = json.loads((plm / 'config.json').read_text())
        (plm / 'config.json').write_text(json.dumps({**config, 'hidden_dropout_prob': 0.0}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        patch.setenv('ELEPHANT_RUNS', str(folder / 'runs'))
        prepare('one', (4, 1, 0))
        yield folder


def near(a, b):
    """Whether two tensors differ by rounding alone."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return (a - b).norm() <= 1e-3 * b.norm() + 1e-6


@pytest.mark.parametrize('length', [64, 128, 160])
def test_gradients_of_attention_are_finite_where_all_scores_are_low(length):
    """cuDNN's kernel gave NaN for the queries where a mask has 64 keys and every score is -120."""
    start(SimpleNamespace(device='cuda', precision='bfloat16', deterministic=False))
    q, k, v = torch.randn(3, 2, 1, length, 128, device='cuda')
    q[..., 0], k[..., 0] = 1.0, -120 * 128 ** 0.5
    q, k, v = (x.bfloat16().requires_grad_() for x in (q, k, v))
    mask = torch.ones(length, length, device='cuda').tril().log().bfloat16()
    attend(q, k, v, mask[None, None], Dropout(0.0)).square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in (q, k, v))


# ------------------------------------------------------------------------ the numbers of a CPU

def tuning_step(plm, machine):
    """Losses and gradients of a step of stage-PT and of stage-FT, and the items' encodings."""
    model = start_model(None, plm, seed=0)
    for p in model.longformer.embeddings.parameters():
        p.data.mul_(40)  # LayerNorm of next to nothing would multiply rounding
    model.on(machine).train()
    args = pretrain.parse_args(['one', '--plm', plm, '--batch', '9', '--accumulate', '2'])
    sources = pretrain.Sources(args, model.words)
    fake = SimpleNamespace(epoch=0, per_epoch=2, steps=lambda: [0])
    (_, batches), = sources.steps(fake, model, args)
    found = dict(pretrain.step_gradients(model, batches, args))
    found |= {f'PT {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    items = model.encode_items(sources.tokens)
    model.train()
    data = finetune.load('one')
    histories, labels = finetune.prefixes(data, np.arange(20), np.random.default_rng(0))
    packed = model.pack(*histories, sources.tokens)
    found['FT'] = finetune.add_gradients(model, items, packed, labels)
    found |= {f'FT {name}': p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, 'items': items}


@pytest.mark.parametrize('tokens', [30, 4096])
@pytest.mark.parametrize('plm', ['bert', 'longformer'])
def test_a_step_of_tuning_is_that_of_a_cpu(place, plm, tokens):
    plm = str(place / plm)
    here = tuning_step(plm, Machine(micro_tokens=tokens))
    there = tuning_step(plm, Machine(CUDA.device, micro_tokens=tokens))
    assert len(here) > 60 and here.keys() == there.keys()
    # a key's bias drops out of a softmax: its gradient is rounding; ties decide the accuracy
    names = [name for name in here if name != 'accuracy' and not name.endswith('key.bias')]
    wrong = [name for name in names if not near(there[name], here[name])]
    assert not wrong
    rounded = tuning_step(plm, Machine(CUDA.device, True, tokens))
    assert (rounded['items'].cpu() - here['items']).norm() < 0.03 * here['items'].norm()


def id_step(kind, loss, machine):
    """Loss and gradients of a step without dropout, and ranks' scores."""
    data = train_seq.load('one')
    about = {'model': kind, 'loss': loss, 'init': 'random', 'mode': 'random', 'scale': 'raw',
             'hidden': 16, 'max_items': 50, 'lr': 0.01, 'seed': 0}
    torch.manual_seed(0)
    model = train_seq.build(data, None, about).on(machine).eval()
    if kind == 'gru4rec':
        model.train()  # cuDNN's backward asks for it
        for module in model.modules():
            module.p = 0.0
    items, offsets = data.training()
    rng = np.random.default_rng(0)
    drawn = draw_training_negatives(items, offsets, data.n_items, rng) if loss == 'bce' else 8
    value = model.loss(items, offsets, rng, loss, drawn)
    value.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, 'loss': value, 'states': model.all_states(items, offsets)}


@pytest.mark.parametrize('kind, loss', LOSSES)
def test_a_step_of_an_id_model_is_that_of_a_cpu(place, kind, loss):
    torch.backends.cudnn.allow_tf32 = False  # as training.start
    here, there = id_step(kind, loss, Machine()), id_step(kind, loss, CUDA)
    wrong = [name for name in here if not near(there[name], here[name])]
    assert not wrong


def test_ranks_are_those_of_a_cpu():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.integers(0, 9, (40, 31))).float()
    targets, negatives = rng.integers(1, 31, 40), rng.integers(0, 31, (40, 10))
    history = rng.integers(1, 31, 120), np.arange(0, 121, 3)
    data = SimpleNamespace(n_items=30, negatives=negatives, split=lambda _: (*history, targets))
    found = [rank_counts(lambda users: scores[users].to(device), data, 'test', 99)
             for device in ('cpu', 'cuda')]
    for name in found[0]:
        assert (found[0][name] == found[1][name]).all()


# ------------------------------------------------------------------------ the same bits twice

def command(script, place, out):
    """Two epochs of three steps, saved after every step."""
    shared = ['one', '--device', 'cuda', '--deterministic', '--epochs', '2', '--save-every', '0']
    if script == 'train_seq':
        return [*shared, '--model', 'sasrec', '--loss', 'ce', '--hidden', '16', '--batch', '16',
                '--lrs', '0.01']
    shared += ['--plm', str(place / 'longformer'), '--batch', '14', '--lr', '0.01', '--out', out]
    return shared + (['--accumulate', '1'] if script == 'pretrain' else ['--stage', '1'])


def spoiled(script, argv, runs, most):
    """A process of its own: the script, which fails after `most` steps."""
    os.environ['ELEPHANT_RUNS'] = runs
    update, left = Training.update, [most]

    def counted(self, **losses):
        update(self, **losses)
        left[0] -= 1
        if not left[0]:
            os._exit(99)
    Training.update = counted
    SCRIPTS[script].main(SCRIPTS[script].parse_args(argv))


@pytest.mark.parametrize('script', SCRIPTS)
def test_the_same_bits_twice_and_killed_and_from_torchrun(place, tmp_path, script):
    context, found = multiprocessing.get_context('spawn'), {}
    for name, kills in (('plain', []), ('again', []), ('killed', [2, 3]), ('torchrun', None)):
        runs = str(tmp_path / name)
        argv = command(script, place, f'{runs}/out')
        if kills is None and script == 'train_seq':
            continue
        if kills is None:
            launch = [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                      '--nproc_per_node', '1']
            done = subprocess.run([*launch, f'{script}.py', *argv], cwd=ROOT, capture_output=True,
                                  text=True, env={**os.environ, 'ELEPHANT_RUNS': runs})
            assert not done.returncode, done.stderr
        for most in [*(kills or []), *([] if kills is None else [1000])]:
            one = context.Process(target=spoiled, args=(script, argv, runs, most), daemon=True)
            one.start()
            one.join(300)
            assert one.exitcode == (99 if most < 1000 else 0)
        saved, = (tmp_path / name).rglob('model.pt')
        found[name] = torch.load(saved, weights_only=True)['model']
    plain = found.pop('plain')
    for name, weights in found.items():
        wrong = [key for key in plain if not torch.equal(plain[key], weights[key])]
        assert not wrong, name


def test_a_gpu_of_this_kind_computes_in_bfloat16():
    assert faster_in_bfloat16(CUDA.device) == (torch.cuda.get_device_capability() >= (8, 0))
    with Machine(CUDA.device, True).autocast():
        x = torch.randn(8, 8, device='cuda')
        assert (x @ x).dtype == torch.bfloat16
