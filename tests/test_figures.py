"""Figures: by hand, and as commands on made-up data.
Run: python -m pytest tests/test_figures.py
"""
import contextlib

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import evaluate
import export_embeddings
import finetune
import train_seq
from common import data, figures, report
from common.backbone import start_model
from common.figures import (MEASURES, draw_attention, draw_bars, draw_lines, first_tokens, learning,
                            numbers)
from common.files import UserError, save_json, save_npz
from common.layers import Machine
from common.runs import load_rows
from common.sasrec import SASRec
from common.sequence import ItemTable, Layout
from common.text import Packed, tokenize
from tests.toy import canonical, metrics_for_ranks, tiny_bert

PNG = b'\x89PNG'


def packed(positions):
    """One sequence of tokens at these item positions."""
    p = np.array(positions)
    zeros = np.zeros(len(p), np.int64)
    return Packed(zeros, zeros, p, zeros.astype(bool), np.array([len(p)]))


# ------------------------------------------------------------------------ numbers

def test_numbers_by_hand():
    """Three layers of two heads over [CLS], item 1 (two tokens), item 2 (two tokens)."""
    p = packed([0, 1, 1, 2, 2])
    assert first_tokens(p).tolist() == [False, True, False, True, False]
    even, first, newest = [.6, .1, .1, .1, .1], [0, .5, 0, .5, 0], [.2, .4, .4, 0, 0]
    weights = torch.tensor([[even, even], [first, first], [newest, even]])
    found = numbers(p, weights, torch.tensor([[.3, .7]]))
    assert found.shape == (3, 4)
    heads, below, on_first, _ = found.T.tolist()
    assert heads == pytest.approx([1, 1, .5 ** .5])
    mean = np.array([.25, .25, .05, .05])
    assert np.isnan(below[0]) and below[1:] == pytest.approx(
        [.5 ** .5, (mean @ [1, 0, 1, 0]) / np.linalg.norm(mean) / 2 ** .5])
    assert on_first == pytest.approx([1, 2, 1])


def test_resemblance_to_sasrec_by_hand():
    """Per item every layer gives .1, .2, .6; an item that SASRec does not know counts for none."""
    weights = torch.tensor([.1, .1, .05, .15, .6]).expand(3, 2, 5)
    sasrec = torch.tensor([[.3, .4, .3], [.1, .2, .7]])
    expected = np.corrcoef([.1, .2, .6], [.2, .3, .5])[0, 1]
    found = numbers(packed([0, 1, 2, 2, 3]), weights, sasrec)
    assert found[:, MEASURES.index('sasrec')].tolist() == pytest.approx([expected] * 3)
    older = torch.cat([sasrec, torch.ones(2, 2)], 1)  # of items that CLS did not see
    found = numbers(packed([0, 1, 2, 2, 3]), weights, older)
    assert found[:, 3].tolist() == pytest.approx([expected] * 3)
    more = torch.cat([weights, torch.ones(3, 2, 1)], 2)
    found = numbers(packed([0, 1, 2, 2, 3, 4]), more, sasrec)
    assert found[:, 3].tolist() == pytest.approx([expected] * 3)


def test_sasrecs_weights_are_those_of_its_attention():
    torch.manual_seed(0)
    model = SASRec(ItemTable(SASRec.draw(torch.empty(21, 16))), 10).eval()
    items = np.array([3, 9, 4, 1], np.int32)
    weights = model.attention_weights(items)
    assert weights.shape == (2, 4) and weights.sum(1).tolist() == pytest.approx([1, 1])
    assert torch.equal(model.attention_weights(np.arange(1, 15)),
                       model.attention_weights(np.arange(5, 15))), 'the newest it knows'
    layout = Layout(np.array([4]), 10, True, Machine())
    x = model.item_embedding()[items] * 4 + model.position_embedding(layout.position)
    block = model.blocks[0]
    mixed = block.attention.out(weights[0].flip(0) @ block.attention.value(x))
    expected = block.attention(block.attention_norm(x), x, layout)[-1]
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------ drawing

def test_dollars_in_titles_and_words_are_text(tmp_path):
    r"""matplotlib would read '$x_$' as a formula, and fail."""
    p, weights = packed([0, 1, 1, 2, 2]), torch.full((3, 2, 5), .2)
    words = ['$', 'x_$', r'$\frac{$', '$5 off$', '_^$']
    maps = {'tuned $^{$': weights, r'vanilla $\x$': weights}
    draw_attention(tmp_path / 'a.png', maps, p, words, torch.tensor([[.3, .7]]))
    draw_attention(tmp_path / 'b.png', maps, p, words, torch.tensor([[.3, .4, .3]]))
    draw_lines(tmp_path / 'c.png', {'$_$': {'$^{$': {1.0: (2.0, .1)}}}, '$x_$', log=True)
    for name in 'abc':
        assert (tmp_path / f'{name}.png').read_bytes()[:4] == PNG
    assert sorted(file.name for file in tmp_path.iterdir()) == ['a.png', 'b.png', 'c.png']


def test_a_user_of_one_item_and_a_sasrec_of_fewer_items_can_be_drawn(tmp_path):
    weights = torch.full((4, 1, 2), .5)
    draw_attention(tmp_path / 'one.png', {'tuned': weights}, packed([0, 1]), ['a', 'b'],
                   torch.tensor([[1.0]]))
    p, weights = packed([0, 1, 2, 3]), torch.full((3, 1, 4), .25)
    draw_attention(tmp_path / 'few.png', {'tuned': weights}, p, list('abcd'), torch.tensor([[.3, .7]]))


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


@pytest.mark.parametrize('command', [['recommend', '--users=u1', 'one'],
                                     ['attention', 'one', '--seq']])
def test_what_is_no_id_model_is_refused(world, command):
    for run, words in (('nosuch', '(?i)no such.*nosuch|nosuch.*no such'),
                       ('ft1-seed0', 'is no readable seq file|ft1-seed0: is not of .*or RecFormer')):
        with pytest.raises((UserError, FileNotFoundError), match=words):
            call(*command, run)


def test_attention(world, capsys):
    call('attention', 'one', '--seq', LF, '--users', '5')
    out = capsys.readouterr().out
    assert out.startswith('CLS attention of 5 users of one\n')
    assert (world / 'figure1.md').read_text() in out
    assert (world / 'figure1.png').read_bytes()[:4] == PNG
    rows = [cells_of(line) for line in out.splitlines() if line.startswith('|')]
    assert rows[0] == ['model', 'layer', *MEASURES]
    assert [row[:2] for row in rows[2:]] == [[model, layer] for model in ('lf', 'ft1')
                                             for layer in '012']
    call('attention', 'one', '--users', '2', '--checkpoint', world / 'ft1-seed0', '--seq', RANDOM)
    assert capsys.readouterr().out.startswith('CLS attention of 2 users of one\n')
    train('random', model='bert4rec')
    with pytest.raises(UserError, match='SASRec is needed here'):
        call('attention', 'one', '--seq', BERT)


def test_both_models_see_the_same_tokens(world, monkeypatch):
    """The tuned one was made with --max-tokens 40; histories of all others are longer."""
    seen = []

    def noticed(packed, weights, sasrec):
        seen.append(packed.tokens.tolist())
        return numbers(packed, weights, sasrec)
    monkeypatch.setattr(evaluate, 'numbers', noticed)
    call('attention', 'one', '--users', '20', '--seq', RANDOM)
    vanilla, tuned = seen[:20], seen[20:]
    assert max(map(len, tuned)) == 40, 'some are cut'
    assert vanilla == tuned


def test_cls_attention_of_one_user_at_a_time_is_that_of_many(world):
    found, model = data.load('one'), start_model(world / 'ft1-seed0').eval()
    tokens = tokenize(found.attributes, model.words)
    items, offsets, _ = found.split('test')
    many = model.pack(items, offsets[:8], tokens)
    weights = model.cls_attention(many)
    for row in range(7):
        alone = many.rows([row])
        length = len(alone.tokens)
        assert weights[:, row, :, :length].sum(2).flatten().tolist() == pytest.approx([1] * 6, abs=1e-5)
        torch.testing.assert_close(model.cls_attention(alone)[:, 0], weights[:, row, :, :length],
                                   atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------ runs as pictures

def made_up(folder, init, mode, scale, value, loss='bce', hidden=16, lr=0.001, seed=0, epochs=0,
            **more):
    """The row of a SASRec run, with this NDCG@10 against 100 negatives and half of it among all
    items, and a log of so many epochs."""
    what = init if init == 'random' else f'{init}-{mode}-{scale}'
    run = more.get('run', f'sasrec-{loss}-{what}-{hidden}-lr{lr}-seed{seed}')
    metrics = {ranking: {'NDCG@10': value * share}
               for ranking, share in (('sampled', 1), ('full', .5), ('new', .1))}
    row = {'run': run, 'dataset': 'one', 'model': 'sasrec', 'loss': loss, 'init': init,
           'mode': mode, 'scale': scale, 'hidden': hidden, 'lr': lr, 'seed': seed, 'valid': .5,
           'seconds': 1, 'data': data.load('one').fingerprint, 'metrics': metrics, 'code': {},
           'users': 40,
           'cosine': None if init == 'random' else value / 2,
           'identity': {'options': {'lr': lr, 'seed': seed}}, **more}
    save_json(folder / f'{run}{more.get("data", "")}' / 'row.json', row)
    if epochs:
        lines = [f'{epoch},1.5,2.5,{epoch / 100},' for epoch in range(1, epochs + 1)]
        (folder / run / 'log.csv').write_text('\n'.join(['epoch,seconds,loss,valid,full', *lines]))


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    """A folder of made-up runs: random, twice, and LF."""
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path))
    metrics_for_ranks(monkeypatch)
    folder = tmp_path / 'one'
    for seed, value in enumerate((.10, .12)):
        made_up(folder, 'random', 'random', 'raw', value, seed=seed, epochs=3)
    made_up(folder, 'lf', 'trainable', 'raw', .2, epochs=1)
    made_up(folder, 'lf', 'trainable', 'centred', .3)
    return folder


def drawn(monkeypatch, function, *args):
    """The figure that a function of common/figures.py draws."""
    kept = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, part, **_: kept.append(figure))
    monkeypatch.setattr(figures, 'whole', lambda path: contextlib.nullcontext(path))
    function('nowhere.png', *args)
    return kept[0]


def test_bars(folder, monkeypatch):
    """One for each cell, its spread over seeds; lines across for what needs no training."""
    made_up(folder, 'pt', 'trainable', 'raw', .9, seed=0)
    made_up(folder, 'pt', 'trainable', 'raw', .9, seed=1, code={'x.py': 'y'})
    for run, value in (('popularity', .05), ('item-knn', .07)):
        made_up(folder, None, run, '', value, loss=None, run=run, model='untrained')
    figure = drawn(monkeypatch, draw_bars, report.cells_of(load_rows('one')))
    names = ['No training: item-knn', 'No training: popularity', 'SASRec, one negative: random-16',
             'SASRec, one negative: lf-trainable-centred-16',
             'SASRec, one negative: lf-trainable-raw-16']
    assert figure.axes[0].yaxis.get_major_formatter().format_ticks(range(5)) == names, 'PT is mixed'
    for axis, share in zip(figure.axes, (100, 50, 10)):
        assert [bar.get_width() for bar in axis.patches] == \
            pytest.approx([share * value for value in (.07, .05, .11, .3, .2)])
        spreads = [np.ptp(segment[:, 0]) for bars in axis.collections
                   for segment in bars.get_segments()]
        assert spreads == pytest.approx([0, 0, 2 * share * np.std([.1, .12], ddof=1), 0, 0])
        assert [line.get_xdata()[0] for line in axis.lines[-2:]] == \
            pytest.approx([share * .07, share * .05])
        assert axis.get_title().endswith('dashed: item-knn\ndotted: popularity')
    assert 'all items' in figure.axes[1].get_title()
    low, high = figure.axes[0].get_ylim()
    assert low > high, 'the first on top'


def test_without_anything_to_show_there_are_no_bars(tmp_path):
    draw_bars(tmp_path / 'a.png', [])
    assert not list(tmp_path.iterdir())


def test_learning_curves(folder, monkeypatch):
    """A panel per variant with random rows in it; of the lowest seed; a run without a log, or with
    a damaged one, has none, one of a single epoch has a point."""
    panels = learning(report.cells_of(load_rows('one')))
    random = {1: (1, 0), 2: (2, 0), 3: (3, 0)}
    assert panels == {
        'SASRec, one negative\nrandom-16': {'random': random},
        'SASRec, one negative\ntrainable-centred-16': {'random': random},
        'SASRec, one negative\ntrainable-raw-16': {'random': random, 'lf': {1: (1, 0)}}}
    figure = drawn(monkeypatch, draw_lines, panels, 'epoch')
    first, _, last = figure.axes
    assert last.get_title().endswith('\ntrainable-raw-16')
    line, point = (container[0] for container in last.containers)
    assert line.get_xydata().tolist() == [[1, 1], [2, 2], [3, 3]]
    assert point.get_xydata().tolist() == [[1, 1]]
    assert line.get_color() == first.containers[0][0].get_color() != point.get_color()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['random', 'lf']
    raw = 'SASRec, one negative\ntrainable-raw-16'
    for damaged in ('epoch,loss\n1,2\n', 'epoch,valid\n1,2\n3\n', '', '\0\0', 'epoch,valid\n1,x\n'):
        (folder / 'sasrec-bce-lf-trainable-raw-16-lr0.001-seed0' / 'log.csv').write_text(damaged)
        panels = learning(report.cells_of(load_rows('one')))[raw]
        drawn_points = [value for value, _ in panels.get('lf', {}).values() if value == value]
        assert panels['random'] == random and not drawn_points, damaged


def test_table_writes_both_pictures(folder, capsys):
    for run in folder.iterdir():
        ranks = np.zeros((len(data.load('one').evaluated), 2), np.int32)
        save_npz(run / 'ranks.npz', {name: ranks for name in ('users', 'sampled', 'full', 'new')})
    rows = load_rows('one')
    for row in rows:
        save_json(folder / row['run'] / 'row.json', {**row, 'users': 9, 'tie_share': {'full': 0}})
    call('table', 'one')
    out = capsys.readouterr().out.splitlines()
    for name in ('results', 'curves'):
        assert (folder / f'{name}.png').read_bytes()[:4] == PNG
        assert f'drawn: {folder / name}.png' in out


# ------------------------------------------------------------------------ figure 2

def curve(capsys, folder):
    """The curve's table: {what: [cells of a line]}."""
    capsys.readouterr()
    call('curve', 'one')
    text = (folder / 'figure2-share.md').read_text()
    assert text in capsys.readouterr().out
    found = {}
    for line in text.splitlines():
        method, *cells = cells_of(line)
        found.setdefault(method, []).append(cells)
    return found


@pytest.fixture
def pictures(monkeypatch):
    """The names of what would be drawn: it takes a second each."""
    names = []
    monkeypatch.setattr(evaluate, 'draw_lines', lambda path, *_, **more: names.append(path.name))
    return names


@pytest.fixture
def shares(folder, pictures):
    """Runs from two shares of the source users, beside those of `folder`."""
    for share, value in (('10', .40), ('0.5', .35)):
        made_up(folder, f'pt-share{share}', 'trainable', 'centred', value)
    return folder


HEAD = ['share of the source users in stage-PT, percent', 'NDCG@10, 100 negatives',
        'NDCG@10, all items', 'NDCG@10, new items']
EXPECTED = {
    '': [HEAD],
    '---': [['---'] * 4],
    'SASRec, one negative, random-16': [[number, '11.00 ± 1.41', '5.50 ± 0.71', '1.10 ± 0.14']
                                        for number in ('0', '0.5', '10')],
    'SASRec, one negative, trainable-centred-16': [
        ['0', '30.00', '15.00', '3.00'],
        ['0.5', '35.00', '17.50', '3.50'],
        ['10', '40.00', '20.00', '4.00']]}


def test_curve(shares, capsys, monkeypatch, pictures):
    found = curve(capsys, shares)
    assert found == EXPECTED, 'raw rows are of LF alone'
    assert pictures == ['figure2-share.png']
    monkeypatch.setattr(evaluate, 'draw_lines', draw_lines)
    call('curve', 'one')
    assert (shares / 'figure2-share.png').read_bytes()[:4] == PNG


def test_numbers_below_are_plain_whatever_the_axis(monkeypatch):
    """A formula's markup would be printed as it is; steps keep their distances."""
    lines = {'a': {0: (1, 0), .01: (2, .1), 50: (3, 0)}}
    for log, name in ((True, 'symlog'), (False, 'linear')):
        axis = drawn(monkeypatch, draw_lines, {'t': lines}, 'x', log).axes[0]
        axis.figure.canvas.draw()
        assert axis.get_xscale() == name
        shown = [text.get_text().replace('\N{MINUS SIGN}', '-') for text in axis.get_xticklabels()]
        assert [float(text) for text in shown] == pytest.approx(axis.get_xticks())


def test_curve_without_shares_says_what_makes_them(world):
    with pytest.raises(UserError, match='no pt-share<percent>: run_all.sh one --figure2'):
        call('curve', 'one')


@pytest.mark.parametrize('other', [dict(lr=0.01, valid=0.1), dict(data='older'),
                                   dict(hidden=8, mode='random', init='random', scale='raw')])
def test_curve_averages_over_seeds_alone(shares, capsys, other):
    """Not over rates that were tried, widths, and versions of the data."""
    given = {'init': 'pt-share10', 'mode': 'trainable', 'scale': 'centred', **other}
    made_up(shares, value=.9, **given)
    assert curve(capsys, shares) == EXPECTED


def test_losses_and_models_have_lines_of_their_own(shares, capsys):
    made_up(shares, 'pt-share10', 'trainable', 'centred', .9, loss='ce')
    made_up(shares, 'pt-share10', '', '', .6, model='untrained', run='text-knn-pt-share10')
    made_up(shares, 'lf', '', '', .6, model='recformer', run='lf', cosine=None)
    found = curve(capsys, shares)
    assert found.pop('SASRec, cross-entropy, trainable-centred-16') == \
        [['10', '90.00', '45.00', '9.00']]
    assert found.pop('No training, text-knn') == \
        [['10', '60.00', '30.00', '6.00']]
    assert found == EXPECTED


@pytest.mark.parametrize('name', ['pt-share', 'pt-share1.2.3', 'pt-share.5', 'pt-share5%'])
def test_what_is_called_nearly_like_a_share_is_none(shares, capsys, name):
    made_up(shares, name, 'trainable', 'centred', .9)
    assert curve(capsys, shares) == EXPECTED
