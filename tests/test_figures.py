"""Figures, cold items and footprint: by hand, and as commands on made-up data. Run: python -m pytest tests/test_figures.py"""
import numpy as np
import pytest
import torch

import evaluate
import export_embeddings
import finetune
import train_seq
from common import data
from common.figures import average, findings, first_tokens, numbers, sasrec_attention
from common.files import UserError, load_pt
from common.sasrec import Layout, SASRec
from common.text import Packed
from tests.toy import canonical, tiny_bert


def packed(positions):
    p = np.array(positions)
    return Packed(np.zeros(len(p), np.int64), np.zeros(len(p), np.int64), p, np.zeros(len(p), bool), np.array([len(p)]))


def test_numbers_by_hand():
    """Three layers of two heads over [CLS], item 1 (two tokens), item 2 (two tokens)."""
    p = packed([0, 1, 1, 2, 2])
    assert first_tokens(p).tolist() == [False, True, False, True, False]
    even, first, newest = [.6, .1, .1, .1, .1], [0, .5, 0, .5, 0], [.2, .4, .4, 0, 0]
    n = numbers(p, np.array([[even, even], [first, first], [newest, even]]))
    assert n['bottom']['itself'] == pytest.approx(.6) and n['bottom']['heads'] == pytest.approx(1) and n['bottom']['first'] == pytest.approx(1)
    assert n['middle']['first'] == pytest.approx(2) and n['middle']['newest'] == pytest.approx(1)
    assert n['middle']['border'] == pytest.approx(.5 ** .5)       # (1 1 1 1) against (1 0 1 0)
    assert n['top']['heads'] == pytest.approx(.5 ** .5) and n['top']['itself'] == pytest.approx(.4)
    assert n['top']['newest'] == pytest.approx((1 / 1.2) / .5) and np.isnan(n['top']['layers'])


def test_findings_follow_the_numbers():
    flat = {'itself': .5, 'heads': .5, 'layers': .5, 'border': .6, 'first': 1.0, 'newest': 1.0, 'sasrec': 0.0}
    same = {s: dict(flat) for s in ('bottom', 'middle', 'top')}
    assert [yes for _, yes, _ in findings(same, same)] == [False] * 4
    tuned = {'bottom': {**flat, 'layers': .95}, 'middle': {**flat, 'first': 3.0, 'layers': .95}, 'top': {**flat, 'sasrec': .7, 'layers': .95}}
    assert [yes for _, yes, _ in findings(same, tuned)] == [True] * 4
    assert average([same, tuned])['top']['sasrec'] == pytest.approx(.35)


def test_sasrecs_weights_are_those_of_its_attention():
    torch.manual_seed(0)
    model = SASRec(SASRec.random_table(20, 16), max_items=10).eval()
    items = np.array([3, 9, 4, 1], np.int32)
    weights = sasrec_attention(model, items)
    assert weights.shape == (2, 4) and weights.sum(1) == pytest.approx(1)
    layout = Layout(np.array([4]), 10, True, 'cpu')
    x = model.item_embedding()[items] * 4 + model.position_embedding(layout.position)
    block = model.blocks[0]
    mixed = torch.from_numpy(weights[0]) @ block.attention.value(x)
    torch.testing.assert_close(block.attention.out(mixed), block.attention(block.attention_norm(x), x, layout)[-1], atol=1e-5, rtol=1e-4)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A data set with one cold test item, a tiny language model tuned for a moment, and two ID models."""
    for name, folder in (('ELEPHANT_DATA', 'data'), ('ELEPHANT_RUNS', 'runs')):
        monkeypatch.setenv(name, str(tmp_path / folder))
    canonical(tmp_path / 'data' / 'one')
    with open(tmp_path / 'data' / 'one' / 'interactions.csv', 'a') as f:
        f.write(''.join(f'cold,{item},{t}\n' for t, item in enumerate(('i1', 'i2', 'i3', 'new'))))
    with open(tmp_path / 'data' / 'one' / 'items.jsonl', 'a') as f:
        f.write('{"id": "new", "title": "fine salt"}\n')
    data.prepare('one', data.DEFAULT)
    run, plm = tmp_path / 'runs' / 'one', str(tiny_bert(tmp_path / 'plm', layers=3))
    finetune.main(finetune.parse_args(['one', '--stage', '1', '--plm', plm, '--epochs', '1']))
    export_embeddings.main(export_embeddings.parse_args(['one', '--plm', plm, '--out', str(run / 'embeddings' / 'lf.pt')]))
    train_seq.main(train_seq.parse_args(['one', '--model', 'sasrec', '--variants', 'random', 'lf-trainable', '--lrs', '0.01', '--epochs', '2',
                                         '--init_scale', 'centred']))
    return run


def call(*options):
    evaluate.main(evaluate.parse_args([str(o) for o in options]))


def test_commands(world, capsys):
    files = sorted((world / 'seq').glob('*.pt'))
    lf, random = files
    call('cold', 'one', *files)
    text = capsys.readouterr().out
    assert '1 users of one' in text and text.count('sasrec-bce') == 2 and (world / 'cold.md').exists()
    call('footprint', 'one', *files)
    row = capsys.readouterr().out.splitlines()[2].split('|')
    assert float(row[4]) == pytest.approx(lf.stat().st_size / 1e6, abs=0.06) and float(row[6]) >= 0
    call('attention', 'one', '--seq', lf, '--users', '5')
    assert capsys.readouterr().out.count('\n- (') == 4 and (world / 'figure1.png').read_bytes()[:4] == b'\x89PNG'
    with pytest.raises(UserError, match='no runs of one'):
        call('curve', 'one')
    share = world.parent / 'figure2' / '10' / 'one'
    share.mkdir(parents=True)
    (share / 'results.json').write_text((world / 'results.json').read_text().replace('"lf"', '"pt"'))
    call('curve', 'one')
    assert 'PT centred, 10 % of' in capsys.readouterr().out and (world / 'figure2.png').exists()
    with pytest.raises(UserError, match='no such user'):
        call('attention', 'one', '--user', 'nobody')


def test_a_cold_item_gets_the_row_it_started_from(world):
    d = data.load('one')
    file = next((world / 'seq').glob('*lf-trainable*.pt'))
    model, meta = evaluate.load_model(file, d)
    new, before = d.item_ids.index('new') + 1, model.item_embedding.weight.clone()
    evaluate.give_back(model, meta, np.array([new]), d, world)
    rows = load_pt(world / 'embeddings' / 'lf.pt', 'embeddings')['matrix'][1:]
    start = (rows - rows.mean(0))[new - 1]
    now = model.item_embedding.weight
    assert torch.nn.functional.cosine_similarity(now[new], start, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert not torch.equal(before[new], now[new]) and torch.equal(before[:new], now[:new]) and torch.equal(before[new + 1:], now[new + 1:])
