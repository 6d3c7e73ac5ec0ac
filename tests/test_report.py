"""Rows -> tables, exactly; comparisons.
Run: python -m pytest tests/test_report.py
"""
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import train_seq
from common import data as datasets
from common import report
from common.files import UserError, load_json, save_json, save_npz
from common.initial import SCALES
from common.metrics import METRICS, compare, summarise
from common.models import MODELS
from common.runs import code_digest, load_rows
from tests.toy import canonical, metrics_for_ranks

USERS = 40
RANKS = 'sampled', 'full', 'new'
LOSS = {'sasrec': 'bce', 'bert4rec': 'masked', 'gru4rec': 'ce', 'recformer': 'ce'}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Every test has a folder of runs of its own."""
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path / 'runs'))
    metrics_for_ranks(monkeypatch)
    return tmp_path / 'runs'


# ------------------------------------------------------------------------ made-up runs

def made(model, init, mode, value=0.2, **more):
    """A row in which every metric is `value`."""
    if model == 'untrained':
        about = {'valid': 0.5}
    else:
        about = {'loss': LOSS[model], 'mode': mode, 'scale': 'raw', 'hidden': 16, 'seed': 0,
                 'lr': 0.001, 'valid': 0.5}
        about |= {'tune_layers': 'all', 'trainable_items': False} if model == 'recformer' else {}
    row = {'model': model, 'init': init, **about, 'plm': None if init == 'random' else 'p',
           'dataset': 'mine', 'data': 'd', 'users': USERS, 'seconds': 1, 'commit': 'c',
           'date': '2026-01-01', 'tie_share': {'sampled': 0.1, 'full': 0.02, 'new': 0.0},
           'code': {'train_seq.py': 'x'}, **more}
    if 'run' not in row:
        row['run'] = run_of(row)
    if 'identity' not in row:
        options = {key: row.get(key) for key in ('lr', 'seed', 'hidden', 'scale', 'mode', 'loss')}
        row['identity'] = {'options': {**options, 'epochs': 60}, 'data': 'd'}
    values = {f'{metric}@{k}': value for metric in ('HR', 'NDCG') for k in (5, 10, 50)}
    row['metrics'] = {ranking: dict(values) for ranking in RANKS}
    return row


def run_of(row):
    """What the scripts call a run."""
    if row['model'] == 'recformer':
        layers = '' if row['tune_layers'] == 'all' else f'-layers{row["tune_layers"]}'
        stage = 'ft0-lf' if row['mode'] == 'lf' else row['mode']
        return f'{stage}{layers}{"-items" if row["trainable_items"] else ""}-seed{row["seed"]}'
    what = row['init']
    if what != 'random':
        what += f'-{row["mode"]}-{row["scale"]}'
    return (f'{row["model"]}-{row["loss"]}-{what}-{row["hidden"]}-lr{row["lr"]:g}'
            f'-seed{row["seed"]}')


def saved(runs, places, row):
    """The same with true metrics, and its ranks on disk: places [users], or one for all; or a
    dictionary of them, by ranking."""
    if not isinstance(places, dict):
        places = dict.fromkeys(RANKS, places)
    ranks = {name: np.zeros((USERS, 2), np.int32) for name in RANKS}
    for name in RANKS:
        ranks[name][:, 0] = places[name]
    row['metrics'] = summarise(ranks)
    save_npz(runs / 'mine' / row['run'] / 'ranks.npz', {'users': np.arange(USERS), **ranks})
    save_json(runs / 'mine' / row['run'] / 'row.json', row)
    return row


MINE = SimpleNamespace(name='mine', fingerprint='d', counts={
    'users': 1234, 'items': 7, 'interactions': 20, 'avg_len': 4.04, 'evaluated': 3})
PANTRY = SimpleNamespace(name='pantry', fingerprint='d', counts=MINE.counts)


def rendered(data, rows):
    """The tables of these rows."""
    return report.render(data, report.cells_of(rows))


def line(text, start):
    """The first line that begins so."""
    return next(found for found in text.splitlines() if found.startswith(start))


def section(text, title):
    """The part of a text under this heading."""
    return text[text.index(f'## {title}'):].split('\n## ')[0]


def near(place):
    """This place for three users of four, the next for the fourth."""
    return place + (np.arange(USERS) % 4 == 0)


def gain(place):
    """NDCG@10 of `near`, in percent."""
    return 75 / math.log2(place + 2) + (25 / math.log2(place + 3) if place < 9 else 0)


# ------------------------------------------------------------------------ cells

def two_seeds(model, init, mode, *values):
    return [made(model, init, mode, value, seed=seed) for seed, value in enumerate(values)]


def test_mean_and_spread_over_seeds():
    rows = two_seeds('sasrec', 'lf', 'trainable', .3, .32)
    assert report.Cell(rows).text('sampled') == '31.0 ± 1.4'
    assert report.Cell(rows[:1]).text('full', 'HR@50') == '30.0', 'one seed has no spread'


def test_the_rate_is_the_lowest_seeds_best_on_validation():
    """Whatever other seeds, and the test, say."""
    def rows(first):
        tried = [(first, .1, .2, .9), (first, .01, .3, .1), (first + 1, .01, .1, .2),
                 (first + 1, .1, .9, .8)]
        return [made('sasrec', 'lf', 'trainable', value, seed=seed, lr=lr, valid=valid)
                for seed, lr, valid, value in tried]
    for first in (0, 3):
        for order in (1, -1):
            cell = report.Cell(rows(first)[::order])
            assert {row['lr'] for row in cell.rows} == {.01}
            assert cell.text('sampled') == '15.0 ± 7.1'


def identity(seed, **more):
    """What made a run: its options and what it began with."""
    options = {'seed': seed, 'lr': .001, 'epochs': 60, 'batch': 128, 'max_items': 50}
    return {'options': options, 'data': 'd', 'embedding': 'e', 'from': f'freeze{seed}',
            'start': f'pt{seed}', 'config': {'layers': 6}, **more}


def test_runs_made_differently_are_not_averaged():
    def text(second, **more):
        rows = [made('sasrec', 'lf', 'trainable', .02, seed=0, identity=identity(0)),
                made('sasrec', 'lf', 'trainable', .12, seed=1, identity=second, **more)]
        return report.Cell(rows).text('full', 'HR@5')
    same = identity(1)
    assert text(same) == '7.0 ± 7.1', 'the seed, and what a seed began with, may differ'
    others = {'epochs': 30, 'batch': 64, 'max_items': 20, 'precision': 'float32'}
    for option, value in others.items():
        assert text({**same, 'options': {**same['options'], option: value}}) == 'mixed', option
    for key, value in (('data', 'x'), ('embedding', 'x'), ('config', {'layers': 5}), ('more', 1)):
        assert text({**same, key: value}) == 'mixed', key
    assert text(same, code={'train_seq.py': 'y'}) == 'mixed'
    assert text(same, code={}) == 'mixed'


@pytest.mark.parametrize('epochs, code, shown', [(60, 'c', '10.0'), (30, 'c', 'mixed'), (60, 'd', 'mixed')])
def test_a_rate_is_not_chosen_among_runs_that_differ_in_more(epochs, code, shown):
    """An old run at another rate would win over the one that was just made."""
    rows = [made('sasrec', 'lf', 'trainable', .1, lr=lr, valid=lr, code={'train_seq.py': code},
                 identity=identity(0, options={'lr': lr, 'epochs': epochs}))
            for lr, epochs, code in ((.1, 60, 'c'), (.01, epochs, code))]
    assert report.Cell(rows).text('full') == shown


# ------------------------------------------------------------------------ marks

def beside(best, cell, random=None):
    """The same Cell, with these as the best ranking without training and as its random rows."""
    cell.best = dict.fromkeys(RANKS, best)
    cell.random = random
    return cell


def test_marks_are_paired_tests_against_the_best_ranking_without_training(runs):
    some = np.arange(USERS) % 2  # places 0 and 1, and a user of each rank against each other
    base = saved(runs, some, made('untrained', None, 'popularity', run='popularity'))
    best = report.Cell([base])
    for places, mark in ((0, '>'), (9, '<'), (some, '='), (1 - some, '='),
                         (np.where(np.arange(USERS) < 4, 0, some), '='),
                         (np.where(np.arange(USERS) < 12, 0, some), '>')):
        row = saved(runs, places, made('sasrec', 'lf', 'trainable', run='a'))
        cell = report.Cell([row])
        p = compare(cell.by_user('sampled').mean(0), best.by_user('sampled').mean(0))[2]
        assert cell.against(best, 'sampled') == f'{mark} {p:.3f}'
        mean = 100 * row['metrics']['sampled']['NDCG@10']
        assert beside(best, cell).compared('sampled') == f'{mean:.1f} ({mark} {p:.3f}; -)'
    assert beside(None, cell).compared('sampled') == f'{mean:.1f} (-; -)', 'nothing to compare with'
    assert cell.against(None, 'sampled') == cell.against(cell, 'sampled') == '-'


def test_p_by_hand(runs):
    """Of 40 users 4 differ, by 1 - 1 / log2(3): mean d / 10, deviation sqrt(40 / 39 * 0.09) d."""
    some = np.arange(USERS) % 2
    best = report.Cell([saved(runs, some, made('untrained', None, '', run='popularity'))])
    better = np.where(np.arange(USERS) < 8, 0, some)
    cell = report.Cell([saved(runs, better, made('sasrec', 'lf', 'trainable', run='a'))])
    z = .1 / (math.sqrt(40 / 39 * .1 * .9) / math.sqrt(40))
    assert cell.against(best, 'full') == f'> {math.erfc(z / math.sqrt(2)):.3f}'
    assert cell.against(best, 'full') == '> 0.037'


def test_the_second_in_brackets_is_a_paired_test_against_random_rows(runs):
    some = np.arange(USERS) % 2
    best = report.Cell([saved(runs, near(0), made('untrained', None, '', run='popularity'))])
    random = made('sasrec', 'random', 'random', run='random')
    random = report.Cell([saved(runs, 5 + some, random)])
    for places, beyond, mark in ((near(0), '>', '='), (6 - some, '=', '<'), (9, '<', '<')):
        row = saved(runs, places, made('sasrec', 'lf', 'trainable', run='a'))
        number = f'{100 * row["metrics"]["sampled"]["NDCG@10"]:.1f}'
        cell = beside(best, report.Cell([row]), random)
        assert cell.against(best, 'sampled')[0] == mark
        assert cell.against(random, 'sampled')[0] == beyond
        assert cell.compared('sampled') == (f'{number} ({cell.against(best, "sampled")}; '
                                            f'{cell.against(random, "sampled")})')
    assert beside(best, random, random).compared('sampled').endswith('(< 0.000; -)')


def test_marks_take_the_mean_of_each_user_over_the_seeds(runs):
    """Two seeds, each better for half of the users: on the mean a tie with what is always alike."""
    half = np.where(np.arange(USERS) % 2, 0, 2)
    rows = [saved(runs, places, made('sasrec', 'lf', 'trainable', seed=seed, run=f's{seed}'))
            for seed, places in enumerate((half, 2 - half))]
    assert report.Cell(rows).by_user('full').mean(0) == pytest.approx(np.full(USERS, (1 + 1 / 2) / 2))


def test_a_mixed_cell_has_no_marks_and_gives_none(runs):
    random = [saved(runs, near(8), made('sasrec', 'random', 'random', run=f'r{seed}', seed=seed,
                                      code={'train_seq.py': str(seed)})) for seed in (0, 1)]
    row = saved(runs, 0, made('sasrec', 'lf', 'trainable', run='a'))
    best = report.Cell([saved(runs, near(5), made('untrained', None, '', run='popularity'))])
    random = report.Cell(random)
    assert beside(best, random).compared('full') == 'mixed (-; -)'
    assert beside(best, report.Cell([row]), random).compared('full') == '100.0 (> 0.000; -)'


# ------------------------------------------------------------------------ the flat table

@pytest.fixture
def table(runs):
    """A folder of runs with something of everything; each has its users near one place."""
    def add(places, model, init, mode, **more):
        if isinstance(places, dict):
            places = {name: near(place) for name, place in places.items()}
        else:
            places = near(places)
        return saved(runs, places, made(model, init, mode, **more))
    add({'sampled': 3, 'full': 6, 'new': 6}, 'untrained', None, '', run='popularity')
    add({'sampled': 4, 'full': 5, 'new': 7}, 'untrained', None, '', run='item-knn')
    add(8, 'untrained', 'lf', '', run='text-knn-lf', norm=8.5, cosine=0.672)
    add(7, 'untrained', 'lf', '', run='item+text-knn-lf', norm=8.5, cosine=0.672)
    for seed in (0, 1):
        add(5 + seed, 'sasrec', 'random', 'random', seed=seed)
    add(2, 'sasrec', 'random', 'random', hidden=8)
    add(3, 'sasrec', 'lf', 'trainable')
    add(3, 'sasrec', 'lf', 'trainable', hidden=8)
    add(3, 'sasrec', 'lf', 'freeze', scale='whitened')
    add(3, 'sasrec', 'lf', 'freeze', scale='centred')
    add(3, 'sasrec', 'pt', 'freeze', scale='centred')
    add(9, 'sasrec', 'lf', 'trainable', loss='ce')
    add(9, 'bert4rec', 'ft', 'id+text', hidden=8)
    add(9, 'gru4rec', 'ft', 'trainable')
    add(3, 'recformer', 'ft1', 'ft2', trainable_items=True)
    add(7, 'recformer', 'pt', 'ft1', tune_layers='1,5')
    add(0, 'recformer', 'lf', 'lf', valid=None)
    return load_rows('mine')


def p_of(cell, other, ranking='sampled'):
    """p of two cells, from a test made here."""
    return f'{compare(cell.by_user(ranking).mean(0), other.by_user(ranking).mean(0))[2]:.3f}'


def cells_by_name(table):
    """{(title, label): Cell}."""
    return {(cell.title, cell.label): cell for cell in report.cells_of(table)}


def body(label, *cells, more='|  | 0.001 |'):
    """A line of a table. cells: number, how it stands to the best without training, to random."""
    found = [f'{number} ({best}{" 0.000" if best in "<>" else ""}; {random})'
             for number, best, random in cells]
    return f'| {label} | {" | ".join(found)} {more}'


def test_what_needs_no_training_and_recformer(table):
    """The best ranking may be another in each column, and is compared with nothing there."""
    text = rendered(MINE, table)
    at = {place: f'{gain(place):.1f}' for place in range(10)}

    def line(label, *cells, more='|  | 0.001 |'):
        return body(label, *((at[place], mark, '-') for place, mark in cells), more=more)
    of_text = '| 8.50 / 0.67 |  |'
    assert section(text, 'No training').splitlines() == [
        '## No training', '',
        '|  | 100 negatives | all items | new items | norm / cosine | rate |',
        '| --- | --- | --- | --- | --- | --- |',
        line('item-knn', (4, '<'), (5, '-'), (7, '<'), more='|  |  |'),
        line('popularity', (3, '-'), (6, '<'), (6, '-'), more='|  |  |'),
        line('item+text-knn-lf', (7, '<'), (7, '<'), (7, '<'), more=of_text),
        line('text-knn-lf', (8, '<'), (8, '<'), (8, '<'), more=of_text)]
    assert section(text, 'RecFormer').splitlines()[4:] == [
        line('ft0-lf', (0, '>'), (0, '>'), (0, '>')),
        line('ft1-layers1,5', (7, '<'), (7, '<'), (7, '<')),
        line('ft2-items', (3, '= 1.000'), (3, '>'), (3, '>'))]


def labels(text, title):
    """First cells of the rows below a heading."""
    lines = section(text, title).splitlines()[4:]
    return [found.split('|')[1].strip() for found in lines if found.startswith('|')]


def test_id_models(table):
    """A section per model and loss, wide rows first, of each width random ones first, then by
    variant, so that embeddings stand together; compared with random rows of the same model, loss
    and width alone."""
    text = rendered(MINE, table)
    at = {place: f'{gain(place):.1f}' for place in range(10)}
    spread = np.std([gain(5), gain(6)], ddof=1)
    both = f'{(gain(5) + gain(6)) / 2:.1f} ± {spread:.1f}'

    def better(label, random):
        return body(label, *((at[3], mark, random) for mark in ('= 1.000', '>', '>')))
    assert section(text, 'SASRec, one negative').splitlines()[4:] == [
        body('random-16', (both, '<', '-'), (both, '<', '-'), (both, '>', '-')),
        better('lf-freeze-centred-16', '> 0.000'),
        better('pt-freeze-centred-16', '> 0.000'),
        better('lf-freeze-whitened-16', '> 0.000'),
        better('lf-trainable-raw-16', '> 0.000'),
        body('random-8', *[(at[2], '>', '-')] * 3),
        better('lf-trainable-raw-8', '< 0.000')]
    titles = [found for found in text.splitlines() if found.startswith('## ')]
    assert titles == [f'## {title}' for title in (
        'No training', 'RecFormer', 'SASRec, cross-entropy', 'SASRec, one negative',
        'BERT4Rec, masked items', 'GRU4Rec, cross-entropy')]
    assert labels(text, 'BERT4Rec, masked items') == ['ft-id+text-raw-8']
    assert line(section(text, 'GRU4Rec'), '| ft') == body('ft-trainable-raw-16',
                                                          *[(at[9], '<', '-')] * 3)


def test_models_and_losses_that_are_none_of_ours_have_a_section_too(runs):
    """A line taken out of common/models.py, a loss that somebody added: runs of it remain."""
    mamba = made('gru4rec', 'own', 'trainable') | {'model': 'mamba'}
    rows = [saved(runs, 3, made('sasrec', 'lf', 'trainable', loss='bpr')),
            saved(runs, 3, mamba | {'run': run_of(mamba)}),
            saved(runs, 3, made('sasrec', 'random', 'random'))]
    cells = report.cells_of(rows)
    assert [(cell.title, cell.label) for cell in cells] == [
        ('SASRec, bpr', 'lf-trainable-raw-16'), ('SASRec, one negative', 'random-16'),
        ('mamba, cross-entropy', 'own-trainable-raw-16')]
    assert cells[0].random is cells[2].random is None


def test_a_copied_folder_of_runs_is_that_of_its_own_dataset(runs):
    first = saved(runs, 3, made('sasrec', 'lf', 'trainable'))
    shutil.copytree(runs / 'mine', runs / 'yours')
    saved(runs, 9, made('sasrec', 'lf', 'trainable'))
    for dataset, place in (('mine', 9), ('yours', 3)):
        row, = load_rows(dataset)
        assert row['dataset'] == dataset and row['run'] == first['run']
        assert report.Cell([row]).by_user('full', 'HR@5').mean() == (place < 5), dataset


def test_a_copy_beside_a_run_is_not_averaged_with_it(runs, mine):
    saved(runs, 3, made('sasrec', 'lf', 'trainable', run='a', data=mine.fingerprint))
    shutil.copytree(runs / 'mine' / 'a', runs / 'mine' / 'a-backup')
    assert [row['run'] for row in load_rows('mine')] == ['a', 'a-backup']
    with pytest.raises(UserError, match='a-backup: no such run .*a renamed folder is none: move it'):
        call('table', 'mine')


def test_rows_that_were_trained_otherwise_are_not_compared_with_random_ones(runs):
    random = saved(runs, 3, made('sasrec', 'random', 'random'))
    for option in ('epochs', 'patience', 'batch', 'max_items', 'precision', 'new', *report.VARIED):
        other = made('sasrec', 'lf', 'trainable', run='a')
        for compared in (True, option in report.VARIED):
            found = {cell.init: cell for cell in report.cells_of([random, other])}
            assert (found['lf'].random is found['random']) == compared, option
            other['identity']['options'][option] = 7


def test_one_user_says_nothing(runs, monkeypatch):
    monkeypatch.setattr('tests.test_report.USERS', 1)
    cells = report.cells_of([saved(runs, places, made('sasrec', init, 'trainable'))
                             for init, places in (('random', [3]), ('lf', [0]))])
    with np.errstate(all='ignore'):
        assert [cell.against(cells[0], 'full') for cell in cells] == ['-', '= nan']


@pytest.mark.parametrize('init', ['lf', 'pt-share0.5', 'k', 'knn', 'My_own', 'my-lr-1', 'random-1'])
def test_any_embedding_has_its_rows_called_as_its_file(runs, init):
    """Embeddings may have any name, and rates any size: one row for seeds, none for rates."""
    rows = [saved(runs, 3, made('untrained', init, '', run=f'{kind}-{init}', norm=1.0, cosine=.5))
            for kind in ('text-knn', 'item+text-knn')]
    rows += [saved(runs, 3, made('sasrec', init, mode, seed=seed, lr=lr, valid=lr))
             for mode in ('trainable', 'further-emb')
             for seed, lr in ((0, .01), (0, 1e-5), (1, .01))]
    cells = report.cells_of(rows)
    assert [(cell.label, cell.variant, len(cell.rows)) for cell in cells] == [
        (f'item+text-knn-{init}', 'item+text-knn', 1), (f'text-knn-{init}', 'text-knn', 1),
        (f'{init}-further-emb-raw-16', 'further-emb-raw-16', 2),
        (f'{init}-trainable-raw-16', 'trainable-raw-16', 2)]


def test_the_footer_says_how_the_numbers_were_made(table):
    for row, date in zip(table, ('2026-01-02', '2025-12-31')):
        row |= {'date': date, 'commit': 'a+'}
    table[0]['tie_share']['full'] = .1234
    text = ' '.join(rendered(MINE, table).split())
    assert 'NDCG@10 in percent, 40 users, mean ± standard deviation over seeds (0, 1).' in text
    assert 'Targets tie with a candidate for at most 12.3% of the users.' in text
    assert 'Language model: p; 2025-12-31, 2026-01-01, 2026-01-02; commits a+, c.' in text


def test_runs_of_other_code_than_todays_are_counted(table):
    """These rows say that train_seq.py had the digest 'x'."""
    end = "runs were made by other code than today's** (train_seq.py); run the same"
    assert f'**{len(table)} of these {end}' in rendered(MINE, table)
    for row in table:
        row['code'] = {'train_seq.py': code_digest('train_seq.py')}
    assert 'other code' not in rendered(MINE, table)


def test_a_cut_off_that_no_row_has_comes_from_the_ranks(runs):
    row = saved(runs, 15, made('sasrec', 'random', 'random', run='r'))
    assert report.Cell([row]).text('full', 'HR@20') == '100.0'
    assert report.Cell([row]).by_user('full', 'HR@20').tolist() == [[1] * USERS]


def test_without_rankings_to_compare_with_there_are_no_marks(runs):
    rows = [saved(runs, near(3), made('sasrec', 'random', 'random')),
            saved(runs, 0, made('sasrec', 'lf', 'trainable'))]
    text = rendered(MINE, rows)
    at = f'{gain(3):.1f}'
    assert line(text, '| random') == body('random-16', *[(at, '-', '-')] * 3)
    assert line(text, '| lf') == \
        body('lf-trainable-raw-16', *[('100.0', '-', '> 0.000')] * 3)


# ------------------------------------------------------------------------ the paper's tables

def of_paper(name, rows):
    """{first cell: line} of one of the paper's tables, for pantry."""
    lines = report.paper_table(report.PAPER[name], 'pantry', report.cells_of(rows)).splitlines()
    assert lines[0].startswith('## Table ') and not lines[1]
    return {found.split('|')[1].strip(): found for found in lines[2:]}


def test_table_3_has_the_papers_numbers_beside_ours():
    rows = two_seeds('sasrec', 'random', 'random', .2, .22)
    rows += two_seeds('sasrec', 'pt', 'trainable', .3, .32)
    rows += [made('sasrec', 'ft', 'further-emb', .25), made('recformer', 'ft1', 'ft2', .26),
             made('bert4rec', 'lf', 'freeze', .27)]
    # none of these is a column of it
    rows += [made('sasrec', 'lf', 'trainable', .9, scale='centred'),
             made('sasrec', 'lf', 'freeze', .9, loss='ce'), made('sasrec', 'ft', 'id+text', .9),
             made('recformer', 'ft1', 'ft2', .9, trainable_items=True),
             made('recformer', 'ft1', 'ft2', .9, tune_layers='11'),
             made('recformer', 'pt', 'ft1', .9)]
    assert list(of_paper('table3_sasrec', rows).values()) == [
        '|  | HR@5 | HR@10 | NDCG@5 | NDCG@10 |',
        '| --- | --- | --- | --- | --- |',
        '| SAS | 21.00 ± 1.41 [31.80] | 21.00 ± 1.41 [43.48] | 21.00 ± 1.41 [23.62] | '
        '21.00 ± 1.41 [27.40] |',
        '| REC | 26.00 [31.37] | 26.00 [41.08] | 26.00 [24.41] | 26.00 [27.54] |',
        '| freeze LF | - [20.50] | - [30.93] | - [13.73] | - [17.08] |',
        '| freeze PT | - [31.51] | - [42.43] | - [23.78] | - [27.29] |',
        '| freeze FT | - [30.42] | - [40.91] | - [23.00] | - [26.35] |',
        '| train LF | - [31.78] | - [44.12] | - [22.47] | - [26.34] |',
        '| train PT | 31.00 ± 1.41 [37.85] | 31.00 ± 1.41 [49.81] | 31.00 ± 1.41 [28.71] | '
        '31.00 ± 1.41 [32.56] |',
        '| train FT | - [33.03] | - [45.25] | - [23.90] | - [27.83] |',
        '| further all | - [36.39] | - [48.28] | - [27.48] | - [31.31] |',
        '| further emb | 25.00 [35.92] | 25.00 [48.20] | 25.00 [27.02] | 25.00 [31.01] |']
    bert = of_paper('table3_bert4rec', rows)
    assert bert['freeze LF'] == \
        '| freeze LF | 27.00 [24.49] | 27.00 [36.48] | 27.00 [16.76] | 27.00 [20.57] |'
    assert bert['BERT'].startswith('| BERT | - [28.93] |') and '| 26.00 [31.37] |' in bert['REC']


def test_table_1_has_the_papers_numbers_beside_ours():
    def layers(which, value, **more):
        return made('recformer', 'ft1', 'ft2', value, tune_layers=which, **more)
    rows = [layers('all', .3), layers('3,7,11', .35), layers('5', .9),
            layers('3', .2, seed=0), layers('3', .3, seed=1),
            made('recformer', 'lf', 'lf', .1, valid=None),
            made('recformer', 'pt', 'pt', .9, valid=None)]
    found = of_paper('table1', rows)
    assert found['None'] == \
        '| None | 10.00 [23.61] | 10.00 [30.97] | 10.00 [18.56] | 10.00 [20.92] |'
    assert found['All'] == \
        '| All | 30.00 [31.37] | 30.00 [41.08] | 30.00 [24.41] | 30.00 [27.54] |'
    assert found['3,7,11'].endswith(' | 35.00 [28.42] |')
    assert found['3'].endswith(' | 25.00 ± 7.07 [25.64] |')
    assert [found[which].split(' | ')[-1] for which in ('0,4,8', '1,5,9', '2,6,10', '7', '11')] == \
        ['- [26.33] |', '- [27.49] |', '- [27.33] |', '- [26.26] |', '- [27.07] |']
    assert len(found) == 11 and '5' not in found


def test_tables_4_and_5_have_the_papers_numbers_beside_ours():
    rows = [made('sasrec', 'random', 'random', .1, loss='ce'),
            made('sasrec', 'random', 'random', .15),
            made('sasrec', 'ft', 'trainable', .2, loss='ce'),
            made('sasrec', 'ft', 'trainable', .9),
            made('sasrec', 'pt', 'id+text', .3),
            made('recformer', 'ft1', 'ft2', .4, trainable_items=True)]
    for row in rows:
        full = row['metrics']['full']
        full.update({name: value / 10 for name, value in full.items()})
    assert list(of_paper('table4', rows).values())[2:] == [
        '| REC | - [7.75] | - [9.97] | - [15.76] | - [6.13] | - [6.85] | - [8.12] |',
        '| SAS | 1.00 [7.04] | 1.00 [8.37] | 1.00 [13.25] | 1.00 [5.87] | 1.00 [6.30] | '
        '1.00 [7.35] |',
        '| FT init | 2.00 [9.10] | 2.00 [11.45] | 2.00 [18.31] | 2.00 [6.69] | 2.00 [7.45] | '
        '2.00 [8.96] |']
    assert list(of_paper('table5', rows).values())[2:] == [
        '| SASRec | 15.00 [31.80] | 15.00 [43.48] | 15.00 [23.62] | 15.00 [27.40] |',
        '| ID LF | - [31.71] | - [43.75] | - [22.46] | - [26.43] |',
        '| ID PT | 30.00 [38.47] | 30.00 [50.61] | 30.00 [29.17] | 30.00 [33.10] |',
        '| ID FT | - [38.32] | - [50.38] | - [28.88] | - [32.78] |',
        '| REC | - [31.37] | - [41.08] | - [24.41] | - [27.54] |',
        '| REC trainable | 40.00 [36.71] | 40.00 [47.82] | 40.00 [28.08] | 40.00 [31.66] |']


def test_datasets_that_the_paper_does_not_have_have_no_tables_of_it(runs):
    rows = [saved(runs, 3, made('sasrec', 'random', 'random', run='r'))]
    assert '## Table' not in rendered(MINE, rows)
    sports = SimpleNamespace(name='sports', fingerprint='d', counts=MINE.counts)
    text = rendered(sports, rows)
    assert [found for found in text.splitlines() if found.startswith('## Table')] == \
        ['## Table 3: SASRec', '## Table 3: BERT4Rec', '## Table 4: all items, cross-entropy',
         '## Table 5: with trainable IDs'], 'table 1 is of pantry alone'


def test_a_second_width_does_not_take_the_papers_from_the_table():
    """run_all.sh --full trains random rows 768 and 128 wide; the paper's are the wide ones."""
    rows = [made('sasrec', 'random', 'random', value, hidden=hidden, valid=valid)
            for value, hidden, valid in ((.2, 768, .5), (.3, 128, .6))]
    assert of_paper('table3_sasrec', rows)['SAS'].startswith('| SAS | 20.00 [31.80] |')


def test_refused_cells_of_the_papers_tables_show_no_number():
    rows = [made('sasrec', 'random', 'random', .2, seed=seed, identity=identity(seed, data=seed))
            for seed in (0, 1)]
    assert of_paper('table3_sasrec', rows)['SAS'].startswith('| SAS | mixed [31.80] |')


def test_the_papers_numbers_agree_with_each_other():
    """What was typed in: table 3's last column is the gain of its best over SAS; other tables
    repeat its columns."""
    paper = report.PAPER
    for model in ('sasrec', 'bert4rec'):
        found = paper[f'table3_{model}']
        assert list(found['rows']) == ['arts', 'instruments', 'pantry', 'sports', 'movies']
        for values in (v for metrics in found['rows'].values() for v in metrics.values()):
            assert 100 * (max(values[2:10]) / values[0] - 1) == pytest.approx(values[10], abs=.006)
    sasrec, bert = paper['table3_sasrec']['rows'], paper['table3_bert4rec']['rows']
    for name, metrics in sasrec.items():
        for metric, values in metrics.items():
            assert bert[name][metric][1] == values[1], 'REC'
            if name in paper['table5']['rows']:
                assert paper['table5']['rows'][name][metric][0] == values[0], 'SASRec'
                assert paper['table5']['rows'][name][metric][4] == values[1], 'REC'
    for metric, values in paper['table1']['rows']['pantry'].items():
        assert values[1] == sasrec['pantry'][metric][1], 'All'
    assert sasrec['pantry']['NDCG@10'][-1] == 18.83


def test_each_of_the_papers_columns_names_rows_that_can_be_made():
    losses = {loss for kind in MODELS.values() for loss in kind.losses}
    stages = 'lf', 'pt', 'ft1', 'ft2'
    values = {'model': {*MODELS, 'recformer'}, 'mode': {'random', *train_seq.MODES.replace('\\', '').split('|'), *stages},
              'scale': set(SCALES), 'loss': losses,
              'init': {'lf', 'pt', 'ft'}, 'trainable_items': {True, False}}
    tables = [table for table in report.PAPER.values() if 'ours' in table]
    assert len(tables) == 5
    for table in tables:
        columns = [name for name in table['columns'] if name != 'improv']
        assert list(table['ours']) == columns, 'in the order of the numbers'
        for column, wanted in table['ours'].items():
            for key in wanted.keys() - {'tune_layers'}:
                assert wanted[key] in values[key]
            if wanted['model'] == 'recformer':
                assert wanted['tune_layers'] in ('all', column)
            else:
                assert wanted['loss'] in MODELS[wanted['model']].losses
        short = {metric for metrics in table['rows'].values() for metric in metrics}
        assert short == {*METRICS[table['ranking']].split()}


# ------------------------------------------------------------------------ commands

def call(*options):
    evaluate.main(evaluate.parse_args([str(value) for value in options]))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A prepared data set."""
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    canonical(tmp_path / 'data' / 'mine')
    return datasets.prepare('mine', datasets.DEFAULT)


def test_table_as_a_command(runs, mine, capsys):
    with pytest.raises(UserError, match='no results yet; bash run_all.sh mine makes them'):
        call('table', 'mine')
    known = {'data': mine.fingerprint}
    rows = [saved(runs, near(3), made('sasrec', 'random', 'random', **known)),
            saved(runs, 2, made('untrained', None, '', run='popularity', **known))]
    of_stage_pt = {'run': 'pt', 'identity': {}, 'code': {}, 'seconds': 1}
    save_json(runs / 'mine' / 'pt' / 'row.json', of_stage_pt)
    call('table', 'mine')
    text = (runs / 'mine' / 'results.md').read_text()
    assert text in capsys.readouterr().out and text.startswith('# Results: mine\n')
    assert line(text, '| random').startswith(f'| random-16 | {gain(3):.1f} (< 0.000; -) | ')
    assert load_json(runs / 'mine' / 'results.json') == rows[::-1], 'by name, those with metrics'
    (runs / 'mine' / rows[0]['run'] / 'row.json').write_text('{}')
    with pytest.raises(UserError, match='seed0/row.json: no valid JSON of ours; remove it'):
        call('table', 'mine')


def test_rows_of_another_version_of_the_data_are_left_out_and_counted(runs, mine, capsys):
    row = saved(runs, near(3), made('sasrec', 'random', 'random', data=mine.fingerprint))
    for seed in (1, 2):
        saved(runs, 0, made('sasrec', 'random', 'random', seed=seed, data='old'))
    call('table', 'mine')
    out = capsys.readouterr().out
    assert out.startswith('2 runs of another version of the data are left out\n')
    assert line(out, '| random').startswith(f'| random-16 | {gain(3):.1f} (-; -) | ')
    (runs / 'mine' / row['run'] / 'row.json').unlink()
    with pytest.raises(UserError, match='no results yet; bash run_all.sh mine makes them'):
        call('table', 'mine')


def test_results_are_saved_and_printed_before_anything_is_drawn(runs, mine, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError('no font')
    monkeypatch.setattr(evaluate, 'draw_bars', fail)
    saved(runs, near(3), made('sasrec', 'random', 'random', run='r', data=mine.fingerprint))
    with pytest.raises(RuntimeError, match='no font'):
        call('table', 'mine')
    text = (runs / 'mine' / 'results.md').read_text()
    assert text in capsys.readouterr().out and (runs / 'mine' / 'results.json').exists()


def test_comparison_by_hand_and_what_it_refuses(runs, mine, capsys):
    """Of 40 users 10 are found by both, 20 by a alone, 10 by neither: HR@5 differs by 1/2."""
    group = np.repeat([0, 1, 2, 3], 10)
    a, b = np.array([2, 0, 1, 99])[group], np.array([2, 60, 70, 99])[group]
    for run, places, of in (('a', a, mine.fingerprint), ('b', b, mine.fingerprint), ('data', a, 'x')):
        saved(runs, places, made('sasrec', 'random', 'random', run=run, data=of, code={}))
    call('compare', 'mine', 'a', 'b')
    out = capsys.readouterr().out
    assert 'a minus b, 40 users, percent' in out and len(out.splitlines()) == 3 + 4 + 6 + 6
    error = np.std(np.repeat([0, 1, 1, 0], 10), ddof=1) / np.sqrt(USERS)
    low, high = 50 - 196 * error, 50 + 196 * error
    assert line(out, '100 negatives HR@5').split() == ['100', 'negatives', 'HR@5', '+50.00', '[',
                                                       f'{low:+.2f},', f'{high:+.2f}]', '0.0000']
    assert '+40.77' in line(out, '100 negatives NDCG@5'), '(1 + 1 / log2(3)) / 4'
    call('compare', 'mine', 'b', 'a')
    assert '-50.00' in line(capsys.readouterr().out, 'new items     HR@50')
    call('compare', 'mine', 'a', 'a')
    same = capsys.readouterr().out.splitlines()[3:]
    assert all('+0.00' in found and '1.0000' in found and found.endswith('tie') for found in same)
    for other, words in (('data', 'data: no such run in .* of these data'),
                         ('nosuch', 'nosuch: no such run'),
                         ('../mine/a', 'no such run')):
        with pytest.raises(UserError, match=words):
            call('compare', 'mine', 'a', other)
    saved(runs, b, made('sasrec', 'random', 'random', run='b', data=mine.fingerprint,
                         code={'common/sasrec.py': 'other'}))
    call('compare', 'mine', 'a', 'b')
    assert [text for text in capsys.readouterr().out.splitlines() if 'other code' in text] == ["note: b: of other code than today's"]
    (runs / 'mine' / 'b' / 'ranks.npz').write_bytes(b'PK half a file')
    with pytest.raises(UserError, match='b/ranks.npz: missing or damaged'):
        call('compare', 'mine', 'a', 'b')


def test_lines_of_the_tables_are_compared_by_the_means_over_their_seeds(runs, mine, capsys):
    """Of a name without rate and seed: the runs of the best rate, each user the mean of these."""
    known = {'data': mine.fingerprint}
    lf = [np.array([0, 99]), np.array([0, 0])]
    for seed, places in enumerate(lf):
        saved(runs, np.repeat(places, 20), made('sasrec', 'lf', 'trainable', seed=seed, **known))
    worse = made('sasrec', 'lf', 'trainable', seed=0, lr=0.01, valid=0.1, **known)
    saved(runs, 99, worse)
    saved(runs, np.repeat([99, 0], 20), made('sasrec', 'random', 'random', **known))
    call('compare', 'mine', 'sasrec-bce-lf-trainable-raw-16', 'sasrec-bce-random-16')
    out = capsys.readouterr().out
    # the first 20 users: 1 - 0; the others: 1/2 - 1
    assert line(out, 'new items     HR@5').split()[3] == '+25.00'
    call('compare', 'mine', 'sasrec-bce-lf-trainable-raw-16-lr0.001-seed0', 'sasrec-bce-random-16')
    assert line(capsys.readouterr().out, 'new items     HR@5').split()[3] == '+0.00'
    saved(runs, 0, made('sasrec', 'lf', 'trainable', seed=2, code={'train_seq.py': 'y'},
                        **known))
    for name in ('sasrec-bce-lf-trainable-raw-16', 'sasrec-bce-lf-trainable-raw', 'sasrec-bce-.*'):
        with pytest.raises(UserError, match='no such run .*, or several that differ in more than'):
            call('compare', 'mine', name, 'sasrec-bce-random-16')
