"""Rows of runs -> one flat table, what needs no training first, and the paper's tables.

A cell is one variant of one model: its runs differ in seed and rate alone. The rate is the one with
the best validation of the lowest seed; a cell whose runs differ in anything else that made them
(epochs, batch, embeddings, code ...) shows 'mixed' and no number.
"""
from statistics import mean, stdev

import numpy as np

from common.data import published_counts
from common.files import ROOT, load_json
from common.metrics import compare, per_user
from common.runs import differences, read_ranks

COLUMNS = {('sasrec', 'bce'): 'SASRec, one negative', ('sasrec', 'ce'): 'SASRec, cross-entropy',
           ('bert4rec', 'masked'): 'BERT4Rec'}
MODES = ('random', 'freeze', 'trainable', 'further-all', 'further-emb', 'id+text')
SCALES = ('raw', 'rescaled', 'centred', 'whitened', 'permuted')
UNTRAINED = ('popularity', 'item-knn', 'text-knn', 'item+text-knn')
RANKINGS = {'sampled': '100 neg.', 'full': 'all', 'new': 'new'}
STAGES = {'lf': 'vanilla', 'pt': 'after PT', 'ft1': 'after FT1', 'ft2': 'after FT2'}
ALPHA = 0.05  # of the paired tests


# ------------------------------------------------------------------------ cells

class Cell:
    """One variant of one model: its runs, one per seed, all with the chosen rate."""

    def __init__(self, rows):
        lowest = min(row.get('seed', 0) for row in rows)
        tried = [row for row in rows if row.get('seed', 0) == lowest]
        best = max(tried, key=lambda row: row['valid'] or 0)
        self.rows = [row for row in rows if row.get('lr') == best.get('lr')]
        self.first = self.rows[0]
        # but for what a seed's own earlier stage gave it
        free = {'options.seed', 'options.lr', 'from', 'start', 'items'}
        self.mixed = any(set(differences(self.first['identity'], row['identity'])) - free
                         or row['code'] != self.first['code'] for row in self.rows)
        self.mixed |= len({row.get('seed', 0) for row in self.rows}) < len(self.rows)
        self.known = {}

    def users(self, ranking):
        """NDCG@10 of every user, mean over the seeds: [E]."""
        if ranking not in self.known:
            ranks = [read_ranks(row['dataset'], row['run'])[1][ranking] for row in self.rows]
            self.known[ranking] = np.mean([per_user(r, 'NDCG', 10) for r in ranks], axis=0)
        return self.known[ranking]

    def text(self, ranking, metric='NDCG@10'):
        """'mean ± sd' over the seeds in percent, 'mixed' where they may not be averaged."""
        values = [100 * row['metrics'][ranking][metric] for row in self.rows]
        if self.mixed:
            return 'mixed'
        return f'{mean(values):.2f}' + (f' ± {stdev(values):.2f}' if len(values) > 1 else '')

    def against(self, other, ranking):
        """'>', '<', or '=' where a test paired over users sees no difference at 5 %."""
        difference, _, p = compare(self.users(ranking), other.users(ranking))
        return '=' if p >= ALPHA else '>' if difference > 0 else '<'

    def marked(self, ranking, best, random=None):
        """text, in bold where it is ahead of `random`, and how it stands to the cell `best`."""
        text = self.text(ranking)
        if self.mixed:
            return text
        ahead = random not in (None, self) and not random.mixed
        if ahead and self.against(random, ranking) == '>':
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


def order_of(cell):
    """Sort key of an ID model's row: wide first, then scale, mode, initialisation."""
    row = cell.first
    return -row['hidden'], SCALES.index(row['scale']), MODES.index(row['mode']), row['init']


def cells_of(rows):
    """{(model, loss): {label: Cell}}; without training: ('untrained', None)."""
    groups = {}
    for row in rows:
        column = groups.setdefault((row['model'], row.get('loss')), {})
        column.setdefault(label_of(row), []).append(row)
    return {column: {label: Cell(members) for label, members in found.items()}
            for column, found in groups.items()}


# ------------------------------------------------------------------------ tables

def markdown(head, body):
    """A Markdown table."""
    lines = [head, ['---'] * len(head), *body]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def data_table(data):
    """Table 2: counts, the paper's beside ours."""
    keys = ('users', 'items', 'interactions', 'avg_len', 'evaluated')
    sets = {'ours': data.counts, 'paper': published_counts(data.name)}
    body = [[name] + [f'{round(counts[key], 1):,}' if key in counts else '-' for key in keys]
            for name, counts in sets.items() if counts]
    return '## Data (table 2)\n\n' + markdown(['', *keys], body)


def untrained_table(cells, best):
    """What needs no training, with the geometry of the rows it uses; RecFormer itself."""
    body = []
    for column in (('untrained', None), ('recformer', 'ce')):
        found = cells.get(column, {})
        if column[1] is None:
            found = dict(sorted(found.items(), key=lambda pair: UNTRAINED.index(pair[0].split()[0])))
        for label, cell in found.items():
            given = best if column[1] else dict.fromkeys(best)
            numbers = [cell.marked(ranking, given.get(ranking)) for ranking in RANKINGS]
            shape = [f'{cell.first[key]:.2f}' if cell.first.get(key) else '' for key in
                     ('norm', 'cosine')]
            body.append([label, *numbers, *shape])
    head = ['', *RANKINGS.values(), "rows' norm", 'cosine']
    return '## No training, and RecFormer itself\n\n' + markdown(head, body)


def id_table(cells, best):
    """The ID models: a row per initialisation, two columns per model and loss."""
    columns = [column for column in cells if column[0] not in ('untrained', 'recformer')]
    columns.sort(key=lambda column: (list(COLUMNS).index(column) if column in COLUMNS else 9, column))
    labels = sorted({label: order_of(cell) for column in columns
                     for label, cell in cells[column].items()}.items(), key=lambda pair: pair[1])
    body = []
    for label, _ in labels:
        line = [label]
        for column in columns:
            cell = cells[column].get(label)
            random = cells[column].get(f'random, {cell.first["hidden"]} wide') if cell else None
            line += [cell.marked(ranking, best.get(ranking), random) if cell else '-'
                     for ranking in ('sampled', 'full')]
        body.append(line)
    names = [COLUMNS.get(column, ', '.join(column)) for column in columns]
    head = [f'{name}, {RANKINGS[ranking]}' for name in names for ranking in ('sampled', 'full')]
    return '## ID models by what their item table starts from\n\n' + markdown(['', *head], body)


def paper():
    """The paper's tables (percentages), and which of our rows stands in each column."""
    return load_json(ROOT / 'common' / 'paper.json')


def paper_table(table, dataset, rows):
    """One of the paper's tables: a line per column of theirs, ours with the paper's in brackets; ''
    where the paper has none for this dataset."""
    published = table['rows'].get(dataset)
    if not published:
        return ''
    body = []
    for number, (column, wanted) in enumerate(table['ours'].items()):
        found = [row for row in rows if all(row.get(key) == wanted[key] for key in wanted)]
        widest = max((row['hidden'] for row in found), default=None)  # the paper's is the model's
        cell = Cell([row for row in found if row['hidden'] == widest]) if found else None
        line = [column.replace('_', ' ')]
        for short, values in published.items():
            metric = short.replace('H@', 'HR@').replace('N@', 'NDCG@')
            ours = cell.text(table['ranking'], metric) if cell else '-'
            line.append(f'{ours} [{values[number]:.2f}]')
        body.append(line)
    return f'## {table["title"]}\n\n' + markdown(['', *published], body)


# ------------------------------------------------------------------------ everything

def footer(rows):
    """How the numbers were made, and what the marks say."""
    def several(key):
        return ', '.join(sorted({str(row[key]) for row in rows if row.get(key) is not None}))
    ties = max(max(row['tie_share'].values()) for row in rows)
    return (f'NDCG@10 in percent, {rows[0]["users"]:,} users, mean ± standard deviation over seeds '
            f'({several("seed")}). Candidates: 100 negatives; all items; "new": all but the history.\n'
            'After a number: > better, = no difference, < worse than the best ranking that needs no '
            'training; **bold**: better than random rows\nof the same model and width (paired over '
            f'users, 5 %). Targets tie with a candidate for at most {ties:.1%} of the users.\n'
            f'Language model: {several("plm") or "none"}; {several("date")}; commits '
            f'{several("commit")}.\n')


def render(data, rows):
    """All tables of these rows as Markdown. Rows of another version of the data are left out."""
    current = [row for row in rows if row['data'] == data.fingerprint]
    cells = cells_of(current)
    free = cells.get(('untrained', None), {}).values()
    best = {ranking: max(free, key=lambda cell: cell.first['metrics'][ranking]['NDCG@10'])
            for ranking in RANKINGS} if free else {}
    parts = [f'# Results: {data.name}\n', data_table(data), untrained_table(cells, best),
             id_table(cells, best), footer(current) if current else '']
    parts += [paper_table(table, data.name, current) for table in paper().values() if 'ours' in table]
    if len(current) < len(rows):
        parts.append(f'{len(rows) - len(current)} runs of another version of the data are left out.\n')
    return '\n'.join(filter(None, parts))
