"""Figures, new items, size: by hand, and as commands on made-up data.
Run: python -m pytest tests/test_figures.py
"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
import export_embeddings
import finetune
import train_seq
from common import data
from common.arrays import offsets_of
from common.backbone import load_recformer
from common.figures import (MEASURES, STRATA, average, cls_attention, draw_attention, draw_curve,
                            findings, first_tokens, numbers)
from common.files import UserError, load_json, load_pt, save_json
from common.layers import Machine
from common.models import load_seq
from common.recommend import began_table
from common.sasrec import SASRec
from common.sequence import ItemTable, Layout
from common.text import Packed, tokenize
from tests.toy import canonical, tiny_bert

PNG = b'\x89PNG'


def packed(positions):
    """One sequence of tokens at these item positions."""
    p = np.array(positions)
    zeros = np.zeros(len(p), np.int64)
    return Packed(zeros, zeros, p, zeros.astype(bool), np.array([len(p)]))


# ------------------------------------------------------------------------ numbers

def named(table):
    """{third: {measure: value}} of what `numbers` and `average` give."""
    return {third: dict(zip(MEASURES, values)) for third, values in zip(STRATA, table)}


def table_of(strata):
    """The inverse of `named`."""
    return np.array([[strata[third][measure] for measure in MEASURES] for third in STRATA])


def test_numbers_by_hand():
    """Three layers of two heads over [CLS], item 1 (two tokens), item 2 (two tokens)."""
    p = packed([0, 1, 1, 2, 2])
    assert first_tokens(p).tolist() == [False, True, False, True, False]
    even, first, newest = [.6, .1, .1, .1, .1], [0, .5, 0, .5, 0], [.2, .4, .4, 0, 0]
    found = named(numbers(p, np.array([[even, even], [first, first], [newest, even]])))
    bottom, middle, top = (found[name] for name in ('bottom', 'middle', 'top'))
    assert bottom['heads'] == pytest.approx(1)
    assert bottom['first'] == pytest.approx(1) and np.isnan(bottom['border'])
    assert middle['first'] == pytest.approx(2)
    assert middle['border'] == pytest.approx(.5 ** .5)  # (1 1 1 1) against (1 0 1 0)
    assert top['heads'] == pytest.approx(.5 ** .5) and top['first'] == pytest.approx(1)
    assert np.isnan(top['layers']) and np.isnan(top['sasrec'])


def test_resemblance_to_sasrec_by_hand():
    """Per item the top third gives .1, .2, .6 (its last token is cut off the middle item)."""
    p = packed([0, 1, 2, 2, 3])
    weights = np.tile([.1, .1, .05, .15, .6], (3, 2, 1))
    found = named(numbers(p, weights, np.array([[.3, .4, .3], [.1, .2, .7]])))
    expected = np.corrcoef([.1, .2, .6], [.2, .3, .5])[0, 1]
    assert found['top']['sasrec'] == pytest.approx(expected), 'the mean of its blocks'
    two = named(numbers(packed([0, 1, 2, 2]), weights[:, :, :4], np.array([[.4, .6]])))
    assert np.isnan(two['top']['sasrec']), 'two items always lie on a line'


def test_findings_follow_the_numbers():
    flat = {'heads': .5, 'layers': .5, 'border': .6, 'first': 1.0, 'sasrec': 0.0}
    same = table_of({stratum: flat for stratum in STRATA})
    assert [yes for _, yes, _ in findings(same, same)] == [False] * 4
    tuned = table_of({'bottom': {**flat, 'layers': .95},
                      'middle': {**flat, 'first': 3.0, 'layers': .95},
                      'top': {**flat, 'sasrec': .7, 'layers': .95}})
    assert [yes for _, yes, _ in findings(same, tuned)] == [True] * 4
    assert named(average([same, tuned]))['top']['sasrec'] == pytest.approx(.35)
    assert [yes for _, yes, _ in findings(tuned, tuned)] == [True, False, False, True], \
        'the vanilla model shows the second and third as well'


def test_average_leaves_out_users_without_a_value():
    users = np.array([np.full((3, 5), 1.), np.full((3, 5), 3.)])
    users[1, 2] = np.nan
    users[:, 0, 0] = np.nan
    users[1, 2, 4] = .4
    found = named(average(list(users)))
    assert found['bottom']['first'] == 2.0 and np.isnan(found['bottom']['heads'])
    assert found['top']['first'] == 1.0 and found['top']['sasrec'] == .7


def test_a_third_of_one_layer_has_no_neighbours():
    """Of four layers only the bottom third has two: its number stands, the others' are none."""
    p, weights = packed([0, 1, 1, 2, 2]), np.tile([.2, .4, .2, .1, .1], (4, 2, 1))
    table = average([numbers(p, weights)])
    found = named(table)
    assert found['bottom']['layers'] == pytest.approx(1)
    assert np.isnan(found['middle']['layers']) and np.isnan(found['top']['layers'])
    assert np.isnan(found['bottom']['border'])
    table[:, MEASURES.index('border')] = np.nan, .6, .6
    _, yes, how = findings(table, table)[0]
    assert yes and how == '1.000 against 0.600'


def test_sasrecs_weights_are_those_of_its_attention():
    torch.manual_seed(0)
    model = SASRec(ItemTable(SASRec.random_table(20, 16)), 10).eval()
    items = np.array([3, 9, 4, 1], np.int32)
    weights = model.attention_weights(items)
    assert weights.shape == (2, 4) and weights.sum(1) == pytest.approx(1)
    layout = Layout(np.array([4]), 10, True, Machine())
    x = model.item_embedding()[items] * 4 + model.position_embedding(layout.position)
    block = model.blocks[0]
    mixed = block.attention.out(torch.from_numpy(weights[0]) @ block.attention.value(x))
    expected = block.attention(block.attention_norm(x), x, layout)[-1]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------ drawing

def test_dollars_in_titles_and_words_are_text(tmp_path):
    r"""matplotlib would read '$x_$' as a formula, and fail."""
    p, weights = packed([0, 1, 1, 2, 2]), np.full((3, 2, 5), .2)
    words = ['$', 'x_$', r'$\frac{$', '$5 off$', '_^$']
    maps = {'tuned $^{$': weights, r'vanilla $\x$': weights}
    draw_attention(tmp_path / 'a.png', maps, p, words, np.array([[.3, .7]]))
    draw_attention(tmp_path / 'b.png', maps, p, words)
    draw_curve(tmp_path / 'c.png', {'$_$': [(1.0, 2.0, .1)]}, {'$^{$': (1.0, .1)})
    for name in 'abc':
        assert (tmp_path / f'{name}.png').read_bytes()[:4] == PNG
    assert sorted(file.name for file in tmp_path.iterdir()) == ['a.png', 'b.png', 'c.png']


def test_a_user_of_one_item_and_a_sasrec_of_fewer_items_can_be_drawn(tmp_path):
    weights = np.full((4, 1, 2), .5)
    draw_attention(tmp_path / 'one.png', {'tuned': weights}, packed([0, 1]), ['a', 'b'])
    p, weights = packed([0, 1, 2, 3]), np.full((3, 1, 4), .25)
    draw_attention(tmp_path / 'few.png', {'tuned': weights}, p, list('abcd'), np.array([[.3, .7]]))


# ------------------------------------------------------------------------ commands

RANDOM = 'sasrec-bce-random-16-lr0.01-seed0'
LF = 'sasrec-bce-lf-trainable-centred-16-lr0.01-seed0'
BERT = 'bert4rec-masked-random-16-lr0.01-seed0'


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A data set with one cold test item, a tiny language model tuned for a moment, ID models.
    Yields the folder of the runs."""
    folder = tmp_path_factory.mktemp('figures')
    canonical(folder / 'data' / 'one')
    with open(folder / 'data' / 'one' / 'interactions.csv', 'a') as f:
        f.write(''.join(f'cold,{item},{t}\n' for t, item in enumerate(('i1', 'i2', 'i3', 'new'))))
    with open(folder / 'data' / 'one' / 'items.jsonl', 'a') as f:
        f.write('{"id": "new", "title": "fine salt"}\n')
    plm = str(tiny_bert(folder / 'plm', layers=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        patch.setenv('ELEPHANT_RUNS', str(folder / 'runs'))
        data.prepare('one', data.DEFAULT)
        run = folder / 'runs' / 'one'
        tune = ['one', '--stage', '1', '--plm', plm, '--epochs', '1', '--max-tokens', '40']
        finetune.main(finetune.parse_args(tune))
        out = str(run / 'embeddings' / 'lf.pt')
        export_embeddings.main(export_embeddings.parse_args(['one', '--plm', plm, '--out', out]))
        train('random', 'lf-trainable')
        yield run


def train(*variants, model='sasrec', more=()):
    options = ['one', '--model', model, '--lrs', '0.01', '--epochs', '2', '--hidden', '16',
               '--init-scale', 'centred', '--variants', *variants, *more]
    train_seq.main(train_seq.parse_args(options))


def call(*options):
    evaluate.main(evaluate.parse_args([str(value) for value in options]))


def cells_of(line):
    """The cells of one line of a Markdown table."""
    return [cell.strip() for cell in line.strip('|').split('|')]


def test_inspect(world, capsys):
    train('lf-id+text')
    train('random', model='bert4rec')
    both = 'sasrec-bce-lf-id+text-centred-16-lr0.01-seed0'
    capsys.readouterr()
    call('inspect', 'one', RANDOM, LF, both, BERT)
    out = capsys.readouterr().out
    assert out.startswith('1 users whose test item is new to training\n')
    assert (world / 'inspect.md').read_text() in out and 'inspect.md' in out.splitlines()[-1]
    table = {cells_of(line)[0]: cells_of(line) for line in out.splitlines() if line.startswith('|')}
    assert list(table)[2:] == [RANDOM, LF, both, BERT]
    for run in (RANDOM, LF, both, BERT):
        row = load_json(world / run / 'row.json')
        assert table[run][1] == f'{row["parameters"]:,}'
    assert table[both][2:] == table[BERT][2:] == ['-', '-'], 'they score by other rows'
    for run in (RANDOM, LF):
        assert [float(cell) for cell in table[run][2:]] == \
            pytest.approx([100 * gain_of_the_cold_item(world, run), 100], abs=.006)


@torch.no_grad()
def gain_of_the_cold_item(world, run):
    """NDCG@10 of the one cold user, whose negatives are all other items (there are few)."""
    found = data.load('one')
    model, _ = load_seq(world / run, found)
    row, new = found.user_ids.index('cold'), found.item_ids.index('new') + 1
    model.item_embedding.weight[new] = began(world, run, found)[new]
    own = found.items[found.offsets[row]:found.offsets[row + 1]]
    assert own[-1] == new
    scores = (model.states(own[:-1], np.array([0, 3])) @ model.item_embedding().T)[0].numpy()
    others = np.setdiff1d(np.arange(1, found.n_items + 1), own)
    rank = (scores[others] > scores[new]).sum()
    return 1 / np.log2(rank + 2) if rank < 10 else 0.0


def began(world, run, found):
    """The item table that a run's training began with."""
    return began_table(world, load_json(world / run / 'row.json'), load_seq(world / run, found)[0], found)


def test_a_cold_item_gets_the_row_it_started_from(world):
    found = data.load('one')
    new = found.item_ids.index('new') + 1
    rows = load_pt(world / 'embeddings' / 'lf.pt', 'embeddings')['matrix'][1:]
    start = (rows - rows.mean(0))[new - 1]
    row = began(world, LF, found)[new]
    assert F.cosine_similarity(row, start, dim=0).item() == pytest.approx(1, abs=1e-5)


def test_a_random_models_cold_row_is_the_one_its_training_began_with(world):
    found = data.load('one')
    args = train_seq.parse_args(['one', '--model', 'sasrec', '--hidden', '16'])
    _, about = load_seq(world / RANDOM, found)
    begun = train_seq.build(train_seq.make_world(args), about).item_embedding.weight
    assert torch.equal(began(world, RANDOM, found), begun)


@pytest.mark.parametrize('command', [['inspect', 'one'], ['recommend', '--users=u1', 'one'],
                                     ['attention', 'one', '--seq']])
def test_what_is_no_id_model_is_refused(world, command):
    for run, words in (('nosuch', 'no such'), ('ft1-seed0', 'is a recformer file')):
        with pytest.raises(UserError, match=words):
            call(*command, run)


def test_attention(world, capsys):
    call('attention', 'one', '--seq', LF, '--users', '5')
    out = capsys.readouterr().out
    assert out.startswith('CLS attention of 5 users of one\n') and out.count('\n- (') == 4
    assert (world / 'figure1.md').read_text() in out
    assert (world / 'figure1.png').read_bytes()[:4] == PNG
    rows = [cells_of(line) for line in out.splitlines() if line.startswith('|')][2:]
    assert [row[:2] for row in rows] == [[model, third] for model in ('vanilla', 'tuned')
                                         for third in ('bottom', 'middle', 'top')]
    assert {len(row) for row in rows} == {2 + len(MEASURES)}
    call('attention', 'one', '--users', '2', '--checkpoint', world / 'ft1-seed0')
    assert capsys.readouterr().out.count('\n- (') == 4, 'without SASRec'
    train('random', model='bert4rec')
    with pytest.raises(UserError, match='SASRec is needed here'):
        call('attention', 'one', '--seq', BERT)


def test_attention_needs_three_layers(world, tmp_path):
    plm = str(tiny_bert(tmp_path / 'plm', layers=2))
    options = ['one', '--stage', '1', '--plm', plm, '--epochs', '1', '--out', str(tmp_path / 'ft1')]
    finetune.main(finetune.parse_args(options))
    with pytest.raises(UserError, match='has 2 layers; thirds of the depth need three'):
        call('attention', 'one', '--checkpoint', tmp_path / 'ft1')


def test_both_models_see_the_same_tokens(world, monkeypatch):
    """The tuned one was made with --max-tokens 40; histories of all others are longer."""
    seen = []

    def noticed(model, items, offsets, tokens):
        for found in cls_attention(model, items, offsets, tokens):
            seen.append(found[0].tokens.tolist())
            yield found
    monkeypatch.setattr(evaluate, 'cls_attention', noticed)
    call('attention', 'one', '--users', '20')
    vanilla, tuned = seen[:20], seen[20:]
    assert max(map(len, tuned)) == 40, 'some are cut'
    assert vanilla == tuned


def test_cls_attention_of_one_user_at_a_time_is_that_of_many(world):
    found, model = data.load('one'), load_recformer(world / 'ft1-seed0').eval()
    tokens = tokenize(found.attributes, model.words)
    items, offsets, _ = found.split('test', found.evaluated[:7])
    many = list(cls_attention(model, items, offsets, tokens))
    few = list(cls_attention(model, items, offsets, tokens, at_once=2))
    assert len(many) == len(few) == 7
    for row, ((p, weights), (same, others)) in enumerate(zip(many, few)):
        history = items[offsets[row]:offsets[row + 1]]
        alone = model.pack(history, offsets_of([len(history)]), tokens)
        assert p.tokens.tolist() == same.tokens.tolist() == alone.tokens.tolist()
        assert weights.shape == (3, 2, len(p.tokens))
        assert weights.sum(2) == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(weights, others, atol=1e-5)


# ------------------------------------------------------------------------ figure 2

def made_up(folder, init, mode, scale, value, loss='bce', lr=0.001, seed=0, valid=0.5, **more):
    """The row of a SASRec run, with this NDCG@10."""
    run = f'sasrec-{loss}-{init}-{mode}-{scale}-lr{lr}-seed{seed}{"".join(map(str, more.values()))}'
    metrics = {'sampled': {'NDCG@10': value}, 'full': {'NDCG@10': value}}
    row = {'run': run, 'dataset': 'one', 'model': 'sasrec', 'loss': loss, 'init': init,
           'mode': mode, 'scale': scale, 'hidden': 16, 'lr': lr, 'seed': seed, 'valid': valid,
           'seconds': 1, 'data': data.load('one').fingerprint, 'metrics': metrics, 'code': {},
           'identity': {'options': {'lr': lr, 'seed': seed}}, **more}
    save_json(folder / run / 'row.json', row)


@pytest.fixture
def shares(world, tmp_path, monkeypatch):
    """A folder of runs from two shares of the source users, beside random and LF."""
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path))
    folder = tmp_path / 'one'
    for seed, value in enumerate((.10, .12)):
        made_up(folder, 'random', 'random', 'raw', value, seed=seed)
    made_up(folder, 'lf', 'trainable', 'raw', .2)
    made_up(folder, 'lf', 'trainable', 'centred', .3)
    for share, value in (('10', .40), ('0.5', .35)):
        made_up(folder, f'pt-share{share}', 'trainable', 'centred', value)
    return folder


def curve(capsys, folder):
    """Lines of the curve's table: {what: number}."""
    capsys.readouterr()
    call('curve', 'one')
    out = capsys.readouterr().out
    assert (folder / 'figure2.md').read_text() in out
    assert (folder / 'figure2.png').read_bytes()[:4] == PNG
    return dict(cells_of(line) for line in out.splitlines() if line.startswith('|'))


EXPECTED = {'SASRec from': 'NDCG@10', '---': '---',
            'random': '11.00 ± 1.41',
            'LF raw': '20.00 ± 0.00',
            'LF centred': '30.00 ± 0.00',
            'PT centred, 0.5 % of the source users': '35.00 ± 0.00',
            'PT centred, 10 % of the source users': '40.00 ± 0.00'}


def test_curve(shares, capsys):
    assert curve(capsys, shares) == EXPECTED


def test_curve_without_shares_says_what_makes_them(world):
    with pytest.raises(UserError, match='bash run_all.sh one --figure2 makes them'):
        call('curve', 'one')


@pytest.mark.parametrize('other', [dict(loss='ce'), dict(lr=0.01, valid=0.1), dict(data='older'),
                                   dict(hidden=8, mode='random', init='random', scale='raw')])
def test_curve_averages_over_seeds_alone(shares, capsys, other):
    """Not over losses, rates that were tried, widths, and versions of the data."""
    given = {'init': 'pt-share10', 'mode': 'trainable', 'scale': 'centred', **other}
    made_up(shares, value=.9, **given)
    assert curve(capsys, shares) == EXPECTED
