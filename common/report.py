"""Rows of runs -> tables: one per model and loss, what needs no training first; the paper's.

A cell is one variant of one model: its runs differ in seed and rate alone, and it is called as they
are. The rate is the one with the best validation of the lowest seed; a cell whose runs differ in
anything else that made them (epochs, batch, embeddings, code ...) shows 'mixed' and no number.
"""
import functools
import itertools
import re
from operator import attrgetter

import numpy as np

from common.files import PAPER
from common.metrics import compare, per_user
from common.models import MODELS
from common.runs import changed_code, differences, read_ranks

TITLES = {'untrained': 'No training', 'recformer': 'RecFormer'}  # of what is no ID model
LOSSES = {'bce': 'one negative', 'ce': 'cross-entropy', 'sampled': 'sampled softmax',
          'masked': 'masked items'}
RANKINGS = {'sampled': '100 negatives', 'full': 'all items', 'new': 'new items'}
SHOWN = 'NDCG@10'  # what the flat tables show and test; any cut-off, as HR@20
ALPHA = 0.05  # of the paired tests
# Options in which a row may differ from random rows and be compared with them.
VARIED = 'init mode scale hidden lr seed'.split()
RATE_AND_SEED = r'(-lr[\d.e-]+)?-seed\d+'  # end the name of a run
# In what a cell's runs may differ: seed, rate, what a seed's own earlier stage gave it.
FREE = {'options.seed', 'options.lr', 'from', 'start'}


# ------------------------------------------------------------------------ cells

def names_of(row):
    """A row's model and loss, and what its run is called besides, without rate and seed:
    ('SASRec, cross-entropy', 'lf-trainable-centred-128')."""
    model = row['model']
    loss = row.get('loss')
    label = re.sub(f'{RATE_AND_SEED}$', '', row['run'])
    if model in TITLES:
        return TITLES[model], label
    name = getattr(MODELS.get(model), '__name__', model)  # a run may be of a model that is gone
    return f'{name}, {LOSSES.get(loss, loss)}', label.removeprefix(f'{model}-{loss}-')


def suitability(row):
    """Of the rows of a variant the one with the largest has the rate that its cell shows."""
    return -row.get('seed', 0), row['valid'] or 0


class Cell:
    """One variant of one model: its runs, one per seed, all with the chosen rate.

    first: the row of the lowest seed; title: model and loss; label: the run's name without these,
    rate and seed; variant: without its embeddings too; kind: title, width, all options but VARIED;
    random: the Cell of random rows of that kind, best: {ranking: the best Cell without training, by
    test}; None: there is none.
    """

    def __init__(self, rows):
        self.first = max(rows, key=suitability)
        self.rows = [row for row in rows if row.get('lr') == self.first.get('lr')]
        found = {name for row in rows for made in ('identity', 'code')
                 for name in differences(self.first[made], row[made])}
        self.mixed = not found <= FREE
        self.init = self.first['init']
        self.title, self.label = names_of(self.first)
        options = self.first['identity'].get('options', {})
        settings = str(options | dict.fromkeys(VARIED))
        self.kind = self.title, -self.first.get('hidden', 0), settings
        self.variant = self.label
        if self.init != 'random':
            self.variant = self.label.removeprefix(f'{self.init}-').removesuffix(f'-{self.init}')

    @functools.lru_cache
    def by_user(self, ranking, metric=SHOWN):
        """A metric such as 'HR@20' of every user, by seed: [seeds, E]."""
        found = [read_ranks(row['dataset'], row['run']) for row in self.rows]
        return np.array([per_user(ranks[ranking], metric) for _, ranks in found])

    def value(self, ranking, metric=SHOWN):
        """(mean, standard deviation) over the seeds in percent; one seed has no deviation: 0."""
        values = 100 * self.by_user(ranking, metric).mean(1)
        return values.mean(), values.std(ddof=len(values) > 1)

    def text(self, ranking, metric=SHOWN, digits=1):
        """'mean ± sd' over the seeds in percent, 'mixed' where they may not be averaged."""
        if self.mixed:
            return 'mixed'
        middle, spread = self.value(ranking, metric)
        text = f'{middle:.{digits}f}'
        if len(self.rows) > 1:  # one seed has no spread
            text += f' ± {spread:.{digits}f}'
        return text

    def against(self, other, ranking):
        """How it stands to another Cell, and p of a test paired over users: '> 0.012', '<', or '='
        where it sees no difference at 5 %; '-' where there is nothing to compare with. Seeds are
        averaged first: the test knows nothing of what another seed would change."""
        if other in (None, self) or self.mixed or other.mixed:
            return '-'
        both = (cell.by_user(ranking).mean(0) for cell in (self, other))
        difference, _, p = compare(*both)
        mark = '=' if not p < ALPHA else '>' if difference > 0 else '<'
        return f'{mark} {p:.3f}'

    def compared(self, ranking):
        """text, and how it stands to the best ranking without training, and to random rows."""
        best = self.against(self.best[ranking], ranking)
        random = self.against(self.random, ranking)
        return f'{self.text(ranking)} ({best}; {random})'


def order_of(cell):
    """Sort key: what needs no training, RecFormer, then the models in the order of MODELS; in each
    wide before narrow, of a width what has no embeddings first."""
    model = cell.first['model']
    place = [*TITLES, *MODELS, model].index(model)
    embedded = cell.init not in (None, 'random')
    return place, cell.kind, embedded, cell.variant, cell.label


def cells_of(rows):
    """The Cells of these rows in the tables' order."""
    ordered = sorted(rows, key=names_of)
    cells = [Cell(list(group)) for _, group in itertools.groupby(ordered, names_of)]
    cells.sort(key=order_of)
    random = {cell.kind: cell for cell in cells if cell.init == 'random'}
    free = [cell for cell in cells if cell.first['model'] == 'untrained']
    best = {ranking: max(free, key=lambda cell: cell.value(ranking), default=None)
            for ranking in RANKINGS}
    for cell in cells:
        cell.random = random.get(cell.kind)
        cell.best = best
    return cells


# ------------------------------------------------------------------------ tables

def markdown(head, body):
    """A Markdown table."""
    lines = [head, ['---'] * len(head), *body]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def group_table(title, cells):
    """What one model reaches with one loss: a row per initialisation, with the geometry of the
    embeddings."""
    body = []
    for cell in cells:
        shape = ''
        if cell.first.get('norm'):
            shape = f'{cell.first["norm"]:.2f} / {cell.first["cosine"]:.2f}'
        found = map(cell.compared, RANKINGS)
        body.append([cell.label, *found, shape, str(cell.first.get('lr', ''))])
    head = ['', *RANKINGS.values(), 'norm / cosine', 'rate']
    return f'## {title}\n\n{markdown(head, body)}'


def paper_table(table, dataset, cells):
    """One of the paper's tables for one of its datasets: a line per column of theirs, ours (the
    widest) with the paper's in brackets."""
    published = table['rows'][dataset]
    body = []
    for number, (column, wanted) in enumerate(table['ours'].items()):
        found = [cell for cell in cells if wanted.items() <= cell.first.items()]
        line = [column]
        for metric, values in published.items():
            text = found[0].text(table['ranking'], metric, 2) if found else '-'
            line.append(f'{text} [{values[number]:.2f}]')
        body.append(line)
    return f'## {table["title"]}\n\n{markdown(["", *published], body)}'


# ------------------------------------------------------------------------ everything

def footer(rows):
    """How the numbers were made, and what the marks say."""
    def several(key):
        found = {str(row.get(key)) for row in rows}
        return ', '.join(sorted(found - {'None'}))
    ties = max(max(row['tie_share'].values()) for row in rows)
    text = f"""\
{SHOWN} in percent, {rows[0]["users"]:,} users, mean ± standard deviation over seeds
({several("seed")}). New items: all but the history (the target stays).
In brackets: > better, = no difference at 5 %, < worse than the ranking without training that is
best on test, and p; after that the same against random rows of the same model, width and training.
p is paired over users, each the mean of its seeds: how far these lie apart is in ± alone; 0.000 is
less than 0.0005. Targets tie with a candidate for at most {ties:.1%} of the users.
The last number of a name is the width; below the embeddings' own: their principal components, of
centred rows. Mixed: its runs, at whatever rate, were made with other options or code; make them
again, or remove the old ones.
Language model: {several("plm") or "none"}; {several("date")}; commits {several("commit")}.
"""
    stale = [files for files in map(changed_code, rows) if files]
    if stale:
        text += (f"\n**{len(stale)} of these runs were made by other code than today's** "
                 f'({", ".join(sorted(set().union(*stale)))}); run the same commands again.\n')
    return text


def render(data, cells):
    """All tables of these cells, in the tables' order, as Markdown."""
    text = f'# Results: {data.name}\n'
    for title, group in itertools.groupby(cells, attrgetter('title')):
        text += f'\n{group_table(title, group)}'
    rows = [row for cell in cells for row in cell.rows]
    text += f'\n{footer(rows)}'
    for table in PAPER.values():
        if 'ours' in table and data.name in table['rows']:
            text += f'\n{paper_table(table, data.name, cells)}'
    return text
