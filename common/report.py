"""Rows of runs -> one flat table, what needs no training first, and the paper's tables.

A cell is one variant of one model: its runs differ in seed and rate alone. The rate is the one with
the best validation of the lowest seed; a cell whose runs differ in anything else that made them
(epochs, batch, embeddings, code ...) shows 'mixed' and no number.
"""
import functools
from statistics import mean, stdev

import numpy as np

from common.data import published_counts
from common.files import paper
from common.initial import SCALES
from common.metrics import compare, per_user
from common.runs import changed_code, differences, read_ranks

COLUMNS = {('sasrec', 'bce'): 'SASRec, one negative', ('sasrec', 'ce'): 'SASRec, cross-entropy',
           ('bert4rec', 'masked'): 'BERT4Rec'}
MODES = ('random', 'freeze', 'trainable', 'further-all', 'further-emb', 'id+text')
UNTRAINED = ('popularity', 'item-knn', 'text-knn', 'item+text-knn')
RANKINGS = {'sampled': '100 neg.', 'full': 'all', 'new': 'new'}
SHOWN = 'NDCG@10'  # what the flat tables show and test; any cut-off, as HR@20
MAIN = ('sampled', 'full')  # the rankings that the paper has
STAGES = {'lf': 'vanilla', 'pt': 'after PT', 'ft1': 'after FT1', 'ft2': 'after FT2'}
ALPHA = 0.05  # of the paired tests
# In what a cell's runs may differ: seed, rate, what a seed's own earlier stage gave it.
FREE = {'options.seed', 'options.lr', 'from', 'start', 'items'}


# ------------------------------------------------------------------------ cells

def suitability(row):
    """Of the rows of a variant the one with the largest has the rate that its cell shows."""
    return -row.get('seed', 0), row['valid'] or 0


def of_users(row, ranking, metric):
    """A metric such as 'HR@20' of every user of a run: [E]."""
    _, ranks = read_ranks(row['dataset'], row['run'])
    name, cutoff = metric.split('@')
    return per_user(ranks[ranking], name, int(cutoff))


class Cell:
    """One variant of one model: its runs, one per seed, all with the chosen rate."""

    def __init__(self, rows):
        self.first = max(rows, key=suitability)
        self.rows = [row for row in rows if row.get('lr') == self.first.get('lr')]
        seeds = {row.get('seed') for row in self.rows}
        found = set()
        for row in self.rows:
            found.update(differences(self.first['identity'], row['identity']))
            found.update(differences(self.first['code'], row['code']))
        self.mixed = len(seeds) < len(self.rows) or not found <= FREE

    @functools.cache
    def users(self, ranking):
        """SHOWN of every user, mean over the seeds: [E]."""
        return np.mean([of_users(row, ranking, SHOWN) for row in self.rows], axis=0)

    def value(self, ranking, metric=SHOWN):
        """(mean, standard deviation) over the seeds in percent; one seed has no deviation: 0."""
        values = []
        for row in self.rows:
            value = row['metrics'][ranking].get(metric)
            if value is None:  # a cut-off that is younger than the row
                value = of_users(row, ranking, metric).mean()
            values.append(100 * value)
        return mean(values), stdev(values) if len(values) > 1 else 0.0

    def text(self, ranking, metric=SHOWN):
        """'mean ± sd' over the seeds in percent, 'mixed' where they may not be averaged."""
        if self.mixed:
            return 'mixed'
        middle, spread = self.value(ranking, metric)
        return f'{middle:.2f} ± {spread:.2f}' if len(self.rows) > 1 else f'{middle:.2f}'

    def against(self, other, ranking):
        """'>', '<', or '=' where a test paired over users sees no difference at 5 %."""
        difference, _, p = compare(self.users(ranking), other.users(ranking))
        return '=' if p >= ALPHA else '>' if difference > 0 else '<'

    def marked(self, ranking, best, random=None):
        """text, in bold where it is ahead of `random`, and how it stands to the cell `best`."""
        text = self.text(ranking)
        if self.mixed:
            return text
        if random and not random.mixed and self.against(random, ranking) == '>':
            text = f'**{text}**'
        return f'{text} {self.against(best, ranking)}' if best else text


def label_of(row):
    """What stands in front of a row: everything in which it differs but model, loss, seed, rate."""
    init = (row['init'] or '').upper()
    if row['model'] == 'untrained':
        return f'{row["run"].removesuffix("-" + row["init"])} {init}' if init else row['run']
    if row['model'] == 'recformer':
        label = f'RecFormer {STAGES.get(row["mode"], row["mode"])}'
        label += '' if row['tune_layers'] == 'all' else f', layers {row["tune_layers"]}'
        return label + (', trainable items' if row['items'] else '')
    label = 'random' if row['mode'] == 'random' else f'{row["mode"]} {init}'
    return f'{label}{"" if row["scale"] == "raw" else ", " + row["scale"]}, {row["hidden"]} wide'


def order_of(row):
    """Sort key: what needs no training, RecFormer as it comes, then the ID models, wide first, then
    by scale, mode, initialisation."""
    if row['model'] == 'untrained':
        return 0, UNTRAINED.index(label_of(row).split()[0])
    if row['model'] == 'recformer':
        return (1,)
    return 2, -row['hidden'], SCALES.index(row['scale']), MODES.index(row['mode']), row['init']


def cells_of(rows):
    """{(model, loss, label): Cell}, in the tables' order; the loss is None without training."""
    groups = {}
    for row in sorted(rows, key=order_of):
        key = row['model'], row.get('loss'), label_of(row)
        groups.setdefault(key, []).append(row)
    return {key: Cell(members) for key, members in groups.items()}


# ------------------------------------------------------------------------ tables

def markdown(head, body):
    """A Markdown table."""
    lines = [head, ['---'] * len(head), *body]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def data_table(data):
    """Table 2: counts, the paper's beside ours."""
    keys = ('users', 'items', 'interactions', 'avg_len', 'evaluated')
    body = []
    for name, counts in (('ours', data.counts), ('paper', published_counts(data.name))):
        if counts:
            cells = [f'{round(counts[key], 1):,}' if key in counts else '-' for key in keys]
            body.append([name, *cells])
    return f'## Data (table 2)\n\n{markdown(["", *keys], body)}'


def untrained_table(cells, best):
    """What needs no training, with the geometry of the rows it uses; RecFormer itself."""
    body = []
    for (model, _, label), cell in cells.items():
        if model not in ('untrained', 'recformer'):
            continue
        rivals = best if model == 'recformer' else {}
        numbers = [cell.marked(ranking, rivals.get(ranking)) for ranking in RANKINGS]
        shape = [f'{cell.first[key]:.2f}' if cell.first.get(key) else ''
                 for key in ('norm', 'cosine')]
        body.append([label, *numbers, *shape])
    head = ['', *RANKINGS.values(), "rows' norm", 'cosine']
    return f'## No training, and RecFormer itself\n\n{markdown(head, body)}'


def id_table(cells, best):
    """The ID models: a row per initialisation, two columns per model and loss."""
    ours = [key for key in cells if key[0] not in ('untrained', 'recformer')]
    found = {(model, loss) for model, loss, _ in ours}
    columns = [column for column in COLUMNS if column in found]
    columns += sorted(found - COLUMNS.keys())
    body = []
    for label in dict.fromkeys(label for _, _, label in ours):
        line = [label]
        for column in columns:
            cell = cells.get((*column, label))
            random = cells.get((*column, f'random, {label.split(", ")[-1]}'))
            line += [cell.marked(ranking, best[ranking], random) if cell else '-'
                     for ranking in MAIN]
        body.append(line)
    head = [f'{COLUMNS.get(column, ", ".join(column))}, {RANKINGS[ranking]}'
            for column in columns for ranking in MAIN]
    return f'## ID models by what their item table starts from\n\n{markdown(["", *head], body)}'


def paper_table(table, dataset, cells):
    """One of the paper's tables: a line per column of theirs, ours (the widest) with the paper's in
    brackets; '' where the paper has none for this dataset."""
    published = table['rows'].get(dataset)
    if not published:
        return ''
    body = []
    for number, (column, wanted) in enumerate(table['ours'].items()):
        found = [cell for cell in cells.values() if wanted.items() <= cell.first.items()]
        line = [column]
        for short, values in published.items():
            metric = short.replace('H@', 'HR@').replace('N@', 'NDCG@')
            ours = found[0].text(table['ranking'], metric) if found else '-'
            line.append(f'{ours} [{values[number]:.2f}]')
        body.append(line)
    return f'## {table["title"]}\n\n{markdown(["", *published], body)}'


# ------------------------------------------------------------------------ everything

def footer(rows):
    """How the numbers were made, and what the marks say."""
    def several(key):
        return ', '.join(sorted({str(row[key]) for row in rows if row.get(key) is not None}))
    ties = max(max(row['tie_share'].values()) for row in rows)
    return (f'{SHOWN} in percent, {rows[0]["users"]:,} users, mean ± standard deviation over '
            f'seeds ({several("seed")}). Candidates: 100 negatives; all items; "new": all but the '
            'history.\nAfter a number: > better, = no difference, < worse than the best ranking '
            'that needs no training; **bold**: better than random rows\nof the same model and '
            f'width (paired over users, 5 %). Targets tie with a candidate for at most {ties:.1%} '
            "of the users. A width below the embeddings' own: their principal components, of "
            'centred rows.\n'
            f'Language model: {several("plm") or "none"}; {several("date")}; commits '
            f'{several("commit")}.\n')


def render(data, rows):
    """All tables of these rows as Markdown. Rows of another version of the data are left out."""
    current = [row for row in rows if row['data'] == data.fingerprint]
    cells = cells_of(current)
    free = [cell for cell in cells.values() if cell.first['model'] == 'untrained']
    best = {}
    for ranking in RANKINGS:
        best[ranking] = max(free, key=lambda cell: cell.value(ranking), default=None)
    parts = [f'# Results: {data.name}\n', data_table(data), untrained_table(cells, best),
             id_table(cells, best), footer(current) if current else '']
    stale = [files for files in map(changed_code, current) if files]
    if stale:
        files = sorted({file for files in stale for file in files})
        parts.append(f'**{len(stale)} of these runs were made by other code than today\'s** '
                     f'({", ".join(files)}); the same commands make them again.\n')
    parts += [paper_table(table, data.name, cells) for table in paper().values()
              if 'ours' in table]
    older = len(rows) - len(current)
    if older:
        parts.append(f'{older} runs of another version of the data are left out.\n')
    return '\n'.join(filter(None, parts))
