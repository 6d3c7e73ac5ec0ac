"""Rows -> tables, exactly. Run: python -m pytest tests/test_report.py"""
from types import SimpleNamespace

import pytest

from common import report


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
    assert line(text, '| N@10') == ('| N@10 | 21.00 ± 1.41 [27.40] | 25.00 [27.54] | - [17.08] | - [27.29] | - [26.35] | 21.50 ± 0.71 ≈ [26.34] | '
                                    '31.00 ± 1.41 [32.56] | - [27.83] | - [31.31] | - [31.01] | +47.6% [+18.8%] |')
    own = report.table3(rows, 'mine', 'sasrec', 'full')
    assert line(own, '| H@50').startswith('| H@50 | 21.00 ± 1.41 | 25.00 | - |') and '[' not in own
    assert report.table3(rows, 'mine', 'bert4rec', 'full') == '', 'nothing was run'


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
