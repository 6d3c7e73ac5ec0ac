"""Stage-PT's draws and losses, FT1's prefixes, by hand. Run: python -m pytest tests/test_pretrain.py"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import finetune
import pretrain
from common.data import prepare
from common.files import ROOT, load_pt
from common.recformer import Batch, cosine_logits, from_backbone
from common.text import load_tokenizer, pack_items
from tests.toy import canonical, tiny_bert


@pytest.fixture
def setting(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    canonical(tmp_path / 'data' / 'one')
    canonical(tmp_path / 'data' / 'two', items=20, seed=1)
    data = [prepare(n, (4, 1, 0)) for n in ('one', 'two')]
    tokenizer = load_tokenizer(tiny_bert(tmp_path / 'plm'))
    return data, tokenizer, from_backbone(tmp_path / 'plm').eval()


def sources(tokenizer, *options):
    return pretrain.Sources(pretrain.parse_args(['one', 'two', '--out', 'x', '--batch', '4', *options]), tokenizer)


def test_two_domains_share_no_item_and_split_points_come_from_the_second_half(setting):
    (one, two), tokenizer, _ = setting
    s = sources(tokenizer)
    users = np.arange(len(s.lengths))
    seen = {u: set() for u in users}
    for seed in range(60):
        packed, targets = s.draw(users, np.random.default_rng(seed), tokenizer.cls)
        held = np.add.reduceat(packed.item_positions, np.cumsum(packed.lengths) - packed.lengths)
        assert (held > 0).all(), 'a history is never empty'
        for u, t in enumerate(targets):
            seen[u].add(int(np.flatnonzero(s.items[s.begin[u]:s.begin[u] + s.lengths[u]] == t)[0]))
    assert all(seen[u] == set(range(s.lengths[u] // 2, s.lengths[u])) for u in users)
    assert s.items[s.begin[one.n_users]:].min() > one.n_items and s.items.max() == one.n_items + two.n_items
    assert not set(s.valid) & set(s.train) and len(s.valid) + len(s.train) == len(users)
    assert (sources(tokenizer, '--leave_out').lengths == s.lengths - 2).all()
    assert len(sources(tokenizer, '--share', '10').train) == round(len(s.train) / 10)


def test_a_target_twice_in_a_batch_is_no_negative_of_itself(setting):
    _, tokenizer, model = setting
    s = sources(tokenizer)
    histories, _ = s.draw(np.arange(4), np.random.default_rng(0), tokenizer.cls)
    items = np.array([5, 9, 5, 7])
    targets = pack_items(items, s.tokens, tokenizer.cls)
    loss, _ = pretrain.contrastive(model, histories, targets, items, 'cpu')
    logits = cosine_logits(model(Batch(histories, 64, 'cpu')), model(Batch(targets, 64, 'cpu')))
    expected = [F.cross_entropy(logits[i, keep][None], torch.tensor([keep.index(i)])) for i, keep in
                enumerate(([0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]))]
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_masked_model_in_parts_equals_the_whole(setting):
    import contextlib
    _, tokenizer, model = setting
    s, grads = sources(tokenizer), []
    packed, _ = s.draw(np.arange(8), np.random.default_rng(0), tokenizer.cls)
    for size in ('100000', '40'):
        model.zero_grad()
        args = pretrain.parse_args(['one', '--out', 'x', '--micro_tokens', size])
        value = pretrain.masked_model(model, packed, np.random.default_rng(3), tokenizer, args, 'cpu', contextlib.nullcontext, 0.5, pretrain.Ranks(torch.device('cpu')))
        grads.append((value, model.lm_head.dense.weight.grad.clone(), model.layers[0].attention.self.key.weight.grad.clone()))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-5)
    for a, b in zip(grads[0][1:], grads[1][1:]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_prefixes_are_of_the_training_part_with_the_item_after(setting):
    (data, _), _, _ = setting
    users = np.flatnonzero(data.lengths >= 4)
    sizes = {u: set() for u in users}
    for seed in range(60):
        items, offsets, labels = finetune.prefixes(data, users, np.random.default_rng(seed))
        for row, u in enumerate(users):
            train = data.items[data.offsets[u]:data.offsets[u + 1] - 2]
            n = offsets[row + 1] - offsets[row]
            assert (items[offsets[row]:offsets[row + 1]] == train[:n]).all() and labels[row] == train[n]
            sizes[u].add(int(n))
    assert all(sizes[u] == set(range(1, data.lengths[u] - 2)) for u in users)


def test_tuned_layers(setting):
    _, _, model = setting
    finetune.choose_layers(model, '1')
    assert {n.split('.')[3] for n, p in model.named_parameters() if p.requires_grad} == {'1'}


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """torchrun on two CPU processes: negatives gathered, gradients summed, masks shared. No dropout, so it can be compared."""
    canonical(tmp_path / 'data' / 'one')
    plm = tiny_bert(tmp_path / 'plm')
    config = json.loads((plm / 'config.json').read_text())
    (plm / 'config.json').write_text(json.dumps({**config, 'hidden_dropout_prob': 0.0}))
    environment = {**os.environ, 'ELEPHANT_DATA': str(tmp_path / 'data'), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    run = lambda *command: subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run('-m', 'common.data', 'one').returncode == 0
    options = ['pretrain.py', 'one', '--plm', plm, '--batch', '9', '--accumulate', '2', '--epochs', '2', '--lr', '0.01', '--warmup', '0',
               '--precision', 'float32', '--device', 'cpu', '--out']
    alone, shared = tmp_path / 'a' / 'pt.pt', tmp_path / 'b' / 'pt.pt'
    assert run(*options, alone).returncode == 0
    out = run('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', *options, shared)
    assert out.returncode == 0, out.stderr
    a, b = (load_pt(p, 'recformer') for p in (alone, shared))
    torch.manual_seed(0)
    start = from_backbone(plm).state_dict()
    # against how far each tensor moved; Adam blows up the rounding of gradients near zero, such as a key.s bias, so: the median
    apart = [float((v - b['model'][k]).norm() / (v - start[k]).norm()) for k, v in a['model'].items() if not torch.equal(v, start[k])]
    assert np.median(apart) < 0.01
    assert a['meta']['accuracy'] == pytest.approx(b['meta']['accuracy'])
    assert out.stdout.count('written to') == 1
