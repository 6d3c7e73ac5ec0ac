"""Rows -> tables, exactly. Run: python -m pytest tests/test_report.py"""
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
from common import report
from common.files import UserError
from common.metrics import save_row


def row(model, init, mode, n10, seed=0, **more):
    names = [f'{m}@{k}' for m in ('HR', 'NDCG') for k in (5, 10, 50)]
    loss = {'sasrec': 'bce', 'bert4rec': 'masked', 'recformer': 'ce'}[model]
    return {'run': f'{model}{init}{mode}{seed}{more}', 'model': model, 'init': init, 'mode': mode, 'scale': 'raw', 'loss': loss, 'tied': False,
            'seed': seed, 'plm': None if init == 'random' else 'p', 'users': 10, 'exclude_history': False, 'dim': None, 'tune_layers': 'all',
            'tie_share': {'sampled': 0.1, 'full': 0.2}, 'commit': 'c', 'date': '2026-01-01',
            'metrics': {r: dict.fromkeys(names, n10) for r in ('sampled', 'full')}, **more}


def line(text, start):
    return next(x for x in text.splitlines() if x.startswith(start))


def test_table3_mean_spread_missing_paper_gain_and_tie():
    rows = [row('sasrec', 'random', 'random', v, s) for s, v in enumerate((0.20, 0.22))]
    rows += [row('sasrec', 'pt', 'trainable', v, s) for s, v in enumerate((0.30, 0.32))]
    rows += [row('sasrec', 'lf', 'trainable', v, s) for s, v in enumerate((0.21, 0.22))] + [row('recformer', 'ft1', 'ft2', 0.25)]
    text = report.table3(rows, 'pantry', 'sasrec', 'sampled')
    assert line(text, '| N@10') == ('| N@10 | 21.00 ± 1.41 [27.40] | 25.00 (n=1) [27.54] | - [17.08] | - [27.29] | - [26.35] | 21.50 ± 0.71 ≈ [26.34] | '
                                    '31.00 ± 1.41 [32.56] | - [27.83] | - [31.31] | - [31.01] | +47.6% [+18.8%] |')
    own = report.table3(rows, 'mine', 'sasrec', 'full')
    assert line(own, '| H@50').startswith('| H@50 | 21.00 ± 1.41 | 25.00 (n=1) | - |') and '[' not in own
    assert report.table3(rows, 'mine', 'bert4rec', 'full') == '', 'nothing was run'
    assert text.splitlines()[-1] == '10 users; 100 negatives; seeds 0, 1 (RecFormer 0); p; commits c; 2026-01-01'
    assert '; all items; ' in own.splitlines()[-1]


def test_what_differs_in_protocol_is_never_averaged():
    rows = [row('sasrec', 'random', 'random', 0.2), row('sasrec', 'lf', 'trainable', 0.3), row('sasrec', 'lf', 'trainable', 0.5, plm='q'),
            row('sasrec', 'lf', 'trainable', 0.9, exclude_history=True), row('sasrec', 'lf', 'trainable', 0.8, dim=64),
            row('sasrec', 'lf', 'trainable', 0.7, scale='rescaled'), row('sasrec', 'lf', 'trainable', 0.6, loss='ce')]
    groups = report.protocols(rows)
    assert list(groups) == ['10 users, p', '10 users, q', '10 users, p, history excluded', '10 users, p, PCA 64']
    assert '30.00' in line(report.table3(groups['10 users, p'], 'x', 'sasrec', 'sampled'), '| N@10')
    assert '50.00' in line(report.table3(groups['10 users, q'], 'x', 'sasrec', 'sampled'), '| N@10')
    scales = report.scales(groups['10 users, p'])
    assert '| 100 neg. NDCG@10 | LF | 20.00 | 30.00 | 70.00 |' in scales


def made(epochs, seed=0, **more):
    return {'options': {'epochs': epochs, 'seed': seed, 'lr': seed, **more}, 'data': 'd', 'seed': seed, 'lrs': [seed],
            'from': f'freeze{seed}'}


def test_random_joins_only_rows_of_its_width_and_data():
    rows = [row('sasrec', 'random', 'random', 0.2, hidden=384), row('sasrec', 'random', 'random', 0.9, hidden=64),
            row('sasrec', 'lf', 'trainable', 0.3, hidden=384), row('recformer', 'ft1', 'ft2', 0.4),
            row('bert4rec', 'lf', 'trainable', 0.5, hidden=384, tied=True)]
    groups = report.protocols(rows)
    assert list(groups) == ['10 users, p, 384 dimensions', '10 users, p, 384 dimensions, tied output', '10 users, 64 dimensions']
    assert line(report.table3(groups['10 users, p, 384 dimensions'], 'x', 'sasrec', 'sampled'), '| N@10').startswith('| N@10 | 20.00 | 40.00 | - |')
    smaller = report.protocols(rows + [row('sasrec', 'lf', 'trainable', 0.6, hidden=64, dim=64)])['10 users, p, PCA 64']
    assert line(report.table3(smaller, 'x', 'sasrec', 'sampled'), '| N@10').startswith('| N@10 | 90.00 | 40.00 | - |')
    old = report.protocols(rows + [row('sasrec', 'random', 'random', 0.7, hidden=384, identity={'data': 'old'})])
    assert '10 users, 384 dimensions, data old' in old and len(old) == 4


def test_seeds_trained_differently_are_refused():
    cell = lambda *ids: report.Cell([row('sasrec', 'lf', 'trainable', 0.1 * s, s, identity=i) for s, i in enumerate(ids)])
    assert cell(made(60, 0), made(60, 1)).text('full', 'HR@5') == '5.00 ± 7.07', 'seed, rate and the freeze run of the seed may differ'
    assert cell(made(60, 0), made(30, 1)).text('full', 'HR@5', 27.4) == 'mixed [27.40]'
    assert cell(made(60, 0), {**made(60, 1), 'embedding': 'x'}).text('full', 'HR@5') == 'mixed'
    assert report.Cell([row('sasrec', 'lf', 'trainable', v) for v in (0.1, 0.2)]).text('full', 'HR@5') == 'mixed', 'one seed twice'
    rows = [row('sasrec', 'random', 'random', 0.2, identity=made(60))] + [
        row('sasrec', 'lf', 'trainable', 0.9, s, identity=made(e, s)) for s, e in enumerate((60, 30))]
    text = report.render(SimpleNamespace(name='x', counts={}), rows)
    assert line(text, '| N@10') == '| N@10 | 20.00 | - | - | - | - | mixed | - | - | - | - | - |', 'no gain from a refused cell'
    assert 'UNEQUAL epochs: 30, 60' in text and text.rstrip().splitlines()[-1].startswith('mixed: ')


def test_table1_and_cross_entropy_layout():
    layers = lambda t, v, **more: row('recformer', 'ft1', 'ft2', v, tune_layers=t, **more)
    assert report.table1([layers('all', 0.3)], 'pantry', 'ft2') == ''
    rows = [layers('all', 0.3), layers('3,7,11', 0.35), layers('5', 0.2),
            row('recformer', 'lf', 'none', 0.1), row('recformer', 'pt', 'none', 0.9)]
    text = report.table1(rows, 'pantry', 'ft2')
    assert line(text, '|  |') == '|  | None | All | 0,4,8 | 1,5,9 | 2,6,10 | 3,7,11 | 3 | 7 | 11 | 5 |'
    assert line(text, '| H@5') == ('| H@5 | 10.00 [23.61] | 30.00 [31.37] | - [29.90] | - [31.53] | - [31.20] | 35.00 [32.55] | - [28.97] | '
                                   '- [29.76] | - [30.76] | 20.00 |')
    assert line(report.table1(rows, 'mine', 'ft2'), '| H@5') == '| H@5 | 10.00 | 30.00 | 35.00 | 20.00 |'
    ce = [row('sasrec', 'random', 'random', 0.1, loss='ce'), row('sasrec', 'pt', 'trainable', 0.2, loss='ce')]
    text = report.table3(ce, 'pantry', 'sasrec', 'sampled', 'ce')
    assert text.startswith('### SASRec, cross-entropy, 100 negatives') and '[' not in text, "table 3's numbers are of models trained by BCE"
    assert line(text, '| N@10') == '| N@10 | 10.00 | - | - | - | - | - | 20.00 | - | - | - | +100.0% |'


def test_comparison_by_hand_and_what_it_refuses(tmp_path, capsys):
    """Four users; HR@5 of a: 1 1 1 0, of b: 0 0 1 0 -> difference 1/2; NDCG@5: (1 + 1/log2(3)) / 4 = 0.4077."""
    ranks = lambda *g: np.array([[x, 0] for x in g], np.int32)
    def save(run, g, users=(0, 1, 2, 5), **more):
        arrays = {'users': np.array(users, np.int32), 'sampled': ranks(*g), 'full': ranks(*g)}
        save_row(tmp_path, row('sasrec', 'random', 'random', 0.1, **{'run': run, 'identity': {'data': 'd'}, **more}), arrays)
    save('a', (0, 1, 2, 99))
    save('b', (60, 70, 2, 99))
    save('users', (0, 1, 2, 99), users=(0, 1, 2, 6))
    save('data', (0, 1, 2, 99), identity={'data': 'other'})
    save('history', (0, 1, 2, 99), exclude_history=True)
    against = lambda b: evaluate.show_comparison(tmp_path, SimpleNamespace(a='a', b=b, draws=200))
    against('b')
    out = capsys.readouterr().out
    assert 'a minus b, 4 users' in out and '+50.00' in line(out, 'sampled HR@5') and '+40.77' in line(out, 'sampled NDCG@5')
    against('a')
    same = capsys.readouterr().out.splitlines()[2:]
    assert len(same) == 10 and all('+0.00' in x and '1.0000' in x and x.endswith('tie') for x in same)
    for other, match in (('users', 'different users'), ('data', 'different users'), ('history', '--exclude_history'),
                         ('nosuch', 'no such run')):
        with pytest.raises(UserError, match=match):
            against(other)
    (tmp_path / 'ranks' / 'b.npz').write_bytes(b'PK half a file')
    with pytest.raises(UserError, match='damaged'):
        against('b')


def test_tables_4_and_5_show_what_was_run():
    data = SimpleNamespace(name='pantry', counts={'users': 5, 'items': 7, 'interactions': 20, 'avg_len': 4.0, 'evaluated': 3})
    rows = [row('sasrec', 'random', 'random', 0.1, loss='ce'), row('sasrec', 'ft', 'trainable', 0.2, loss='ce'), row('sasrec', 'random', 'random', 0.15),
            row('sasrec', 'pt', 'id+text', 0.3), row('recformer', 'ft1', 'trainable', 0.4)]
    text = report.render(data, rows)
    assert '| paper | 22,601 | 8,249 | 179,735 | 8.0 | - |' in text
    assert line(text[text.index('Table 4'):], '| H@50') == '| H@50 | - [15.76] | 10.00 [13.25] | 20.00 [18.31] |'
    five = text[text.index('Table 5'):]
    assert line(five, '| H@5') == '| H@5 | 15.00 [31.80] | - [31.71] | 30.00 [38.47] | - [38.32] | - [31.37] | 40.00 [36.71] |'


def test_a_single_seed_is_never_called_a_tie():
    assert not report.tie([1.0], [1.0]) and report.tie([1.0, 2.0], [2.0]) and not report.tie([1.0, 1.1], [2.0])


def test_paper_numbers_are_all_there():
    p = report.paper()
    assert len(p['table3']['rows']['sasrec']) == len(p['table3']['rows']['bert4rec']) == 5
    assert p['table3']['rows']['sasrec']['pantry']['N@10'][-1] == pytest.approx(18.83)
