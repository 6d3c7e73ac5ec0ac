"""Rows of results.json -> the paper's tables, mean ± standard deviation over seeds, the paper's numbers in brackets.

Only rows of one protocol (evaluated users, data, language model, width, PCA, tied output, history excluded or not) enter one
table. Within a cell only the seed and the learning rate may differ: a cell whose rows differ in anything else that made them
(epochs, batch, embeddings ...) shows 'mixed' and no number.
"""
import json
from statistics import mean, stdev

from common.files import ROOT

SHORT = {'HR': 'H', 'NDCG': 'N'}
COLUMNS = [('REC', ('recformer', 'ft2')),
           ('freeze LF', ('lf', 'freeze')), ('freeze PT', ('pt', 'freeze')), ('freeze FT', ('ft', 'freeze')),
           ('train LF', ('lf', 'trainable')), ('train PT', ('pt', 'trainable')), ('train FT', ('ft', 'trainable')),
           ('further All', ('ft', 'further-all')), ('further Emb', ('ft', 'further-emb'))]
PAPER_KEYS = ['SAS', 'REC', 'freeze_LF', 'freeze_PT', 'freeze_FT', 'train_LF', 'train_PT', 'train_FT',
              'further_all', 'further_emb']
NAMES = {'sasrec': 'SASRec', 'bert4rec': 'BERT4Rec', 'recformer': 'RecFormer'}
MODELS = [('sasrec', 'bce'), ('bert4rec', 'masked'), ('sasrec', 'ce')]
REC = {'model': 'recformer', 'mode': 'ft2', 'tune_layers': 'all'}


def paper():
    """The paper's tables 1-5 (percentages)."""
    return json.loads((ROOT / 'common' / 'paper.json').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------- what may be averaged and compared

def recipe(value):
    """What made a row, as text, without what may differ between the rows of a cell ('from': the freeze run of the same seed)."""
    def strip(x):
        return {k: strip(v) for k, v in x.items() if k not in ('seed', 'lr', 'lrs', 'from')} if isinstance(x, dict) else x
    return json.dumps(strip(value), sort_keys=True)


class Cell:
    """One variant: its rows, one per seed. Values in percent."""

    def __init__(self, rows):
        self.rows = rows
        self.mixed = len({recipe(r.get('identity')) for r in rows}) > 1 or len({r['seed'] for r in rows}) < len(rows)
        self.usable = bool(rows) and not self.mixed

    def values(self, ranking, metric):
        return [100 * r['metrics'][ranking][metric] for r in self.rows]

    def text(self, ranking, metric, published=None, base=None):
        """'mean ± sd [paper]'; '-' without rows; '≈' where the difference from `base` (random) is inside the spread;
        '(n=..)' seeds where that is not base's number."""
        out = 'mixed' if self.mixed else '-'
        if self.usable:
            v = self.values(ranking, metric)
            out = f'{mean(v):.2f}' + (f' ± {stdev(v):.2f}' if len(v) > 1 else '')
            if base is not None and base is not self and base.usable and tie(v, base.values(ranking, metric)):
                out += ' ≈'
            if base is not None and base.rows and len(v) != len(base.rows):
                out += f' (n={len(v)})'
        return out + (f' [{published:.2f}]' if published is not None else '')


def tie(a, b):
    """True where two means differ by no more than the larger standard deviation over seeds; never with one seed each."""
    spread = max((stdev(x) for x in (a, b) if len(x) > 1), default=-1)
    return abs(mean(a) - mean(b)) <= spread


def select(rows, **wanted):
    return Cell([r for r in rows if all(r.get(k) == v for k, v in wanted.items())])


def protocols(rows):
    """{protocol text: its rows}. Random initialisation knows no language model and joins each one's rows of its own width;
    RecFormer's rows have no width or PCA and join the ID models that start from its language model."""
    shared = lambda r: (r['users'], (r.get('identity') or {}).get('data'), r['exclude_history'])
    key = lambda r: (*shared(r), r.get('dim'), r.get('hidden'), r['tied'])
    ids = [r for r in rows if r['model'] != 'recformer']
    groups = {}
    for r in (r for r in ids if r['plm']):
        groups.setdefault((r['plm'], *key(r)), []).append(r)
    for r in (r for r in ids if not r['plm']):
        wanted = shared(r) + (r.get('hidden'), r['tied'])  # PCA or not
        for g in [g for g in groups if g[0] and g[1:4] + g[5:] == wanted] or [(None, *key(r))]:
            groups.setdefault(g, []).append(r)
    homes = list(groups)
    for r in (r for r in rows if r['model'] == 'recformer'):
        for g in [g for g in homes if g[:4] == (r['plm'], *shared(r))] or [(r['plm'], *shared(r), None, None, False)]:
            groups.setdefault(g, []).append(r)
    several = len({g[2] for g in groups}) > 1
    return {f'{users:,} users' + (f', {plm}' if plm else '') + (', history excluded' if excluded else '')
            + (f', PCA {dim}' if dim else f', {hidden} dimensions' if hidden else '') + (', tied output' if tied else '')
            + (f', data {data}' if several else ''): mine
            for (plm, users, data, excluded, dim, hidden, tied), mine in groups.items()}


# ---------------------------------------------------------------------------- pieces of a table

def table(head, body):
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)] + ['| ' + ' | '.join(r) + ' |' for r in body]
    return '\n'.join(lines) + '\n'


def foot(cells, ranking=None):
    """The line under a table: users, candidates, seeds, language model, commits, dates of the rows in it."""
    rows = [r for c in cells for r in c.rows]
    of = lambda key, some=rows: ', '.join(map(str, sorted({r[key] for r in some if r[key] is not None})))
    rec = [r for r in rows if r['model'] == 'recformer']
    ids = [r for r in rows if r['model'] != 'recformer'] or rec
    seeds = f'seeds {of("seed", ids)}'
    if rec and of('seed', rec) != of('seed', ids):
        seeds += f' (RecFormer {of("seed", rec)})'
    full = 'all items but the history' if rows[0]['exclude_history'] else 'all items'
    candidates = {'sampled': '100 negatives', 'full': full, None: f'100 negatives or {full}'}[ranking]
    # columns whose ID models had unequal budgets are shown together, but not without saying so
    trained = [r for r in ids if r['mode'] != 'none']
    given = lambda k: sorted({str(((r.get('identity') or {}).get('options') or {}).get(k)) for r in trained})
    unequal = ''.join(f'; UNEQUAL {k}: {", ".join(given(k))}' for k in ('epochs', 'patience', 'batch', 'max_items')
                      if len(given(k)) > 1)
    days = sorted({r['date'] for r in rows})
    return (f'\n{rows[0]["users"]:,} users; {candidates}; {seeds}; {of("plm") or "no language model"}; commits {of("commit")}; '
            + ' to '.join(dict.fromkeys((days[0], days[-1]))) + unequal + '\n')


def metrics_of(ranking):
    ks = (5, 10) if ranking == 'sampled' else (5, 10, 50)
    return [(f'{m}@{k}', f'{SHORT[m]}@{k}') for m in ('HR', 'NDCG') for k in ks]


# ---------------------------------------------------------------------------- the tables

def table2(data):
    published = paper()['table2']
    known = dict(zip(published['columns'], published['rows'].get(data.name, [])))
    keys = ('users', 'items', 'interactions', 'avg_len', 'evaluated')
    show = lambda c, k: '-' if k not in c else f'{c[k]:,.1f}' if k == 'avg_len' else f'{c[k]:,}'
    body = [[name] + [show(c, k) for k in keys] for name, c in (('ours', data.counts), ('paper', known)) if c]
    return '## Table 2: data\n\n' + table([''] + list(keys), body)


def table3(rows, dataset, model, ranking, loss=None):
    """Random, REC, 6 embedding-initialised and 2 further-trained variants in the paper's setting: raw embeddings, BCE or masked.
    With loss='ce', SASRec trained by cross-entropy in the same layout (the paper prints three of its columns: table 4)."""
    own = {'sasrec': 'bce', 'bert4rec': 'masked'}[model]
    loss = loss or own
    rows = [r for r in rows if r['scale'] == 'raw' or r['model'] == 'recformer']
    random = select(rows, model=model, init='random', loss=loss)
    cells = [random, select(rows, **REC)] + [select(rows, model=model, init=init, mode=mode, loss=loss) for _, (init, mode) in COLUMNS[1:]]
    if not any(c.rows for c in cells if c.rows and c.rows[0]['model'] == model):
        return ''
    published = paper()['table3']['rows'][model].get(dataset, {}) if ranking == 'sampled' and loss == own else {}
    body = []
    for metric, short in metrics_of(ranking):
        given = dict(zip(PAPER_KEYS, published.get(short, [])))
        row = [c.text(ranking, metric, given.get(key), random) for c, key in zip(cells, PAPER_KEYS)]
        best = max((mean(c.values(ranking, metric)) for c in cells[2:] if c.usable), default=None)
        start = mean(random.values(ranking, metric)) if random.usable else 0
        gain = f'{best / start - 1:+.1%}' if best is not None and start else '-'
        body.append([short] + row + [gain + (f' [{published[short][-1]:+.1f}%]' if short in published else '')])
    what = ('' if loss == own else 'cross-entropy, ') + ('100 negatives' if ranking == 'sampled' else 'all items')
    head = ['', NAMES[model]] + [n for n, _ in COLUMNS] + ['improv.']
    return f'### {NAMES[model]}, {what}\n\n' + table(head, body) + foot(cells, ranking)


def scales(rows):
    """NDCG@10 and full HR@10 of trainable initialisations per scale, for each model and loss (beyond the paper)."""
    out = []
    order = ['raw', 'rescaled', 'centred', 'whitened', 'permuted']
    for model, loss in MODELS:
        mine = [r for r in rows if r['model'] == model and r['loss'] == loss and r['mode'] in ('random', 'trainable')]
        random = select(mine, init='random')
        used = [s for s in order if any(r['scale'] == s and r['init'] != 'random' for r in mine)]
        if not used:
            continue
        body, all_cells = [], [random]
        for ranking, metric in (('sampled', 'NDCG@10'), ('full', 'NDCG@10'), ('full', 'HR@10')):
            for init in ('lf', 'pt', 'ft'):
                cells = [select(mine, init=init, scale=s) for s in used]
                if any(c.rows for c in cells):
                    all_cells += cells
                    name = f'{"100 neg." if ranking == "sampled" else "full"} {metric}'
                    body.append([name, init.upper(), random.text(ranking, metric)]
                                + [c.text(ranking, metric, None, random) for c in cells])
        out.append(f'### {NAMES[model]} ({loss}), trainable embeddings by scale\n\n'
                   + table(['', 'init', 'random'] + used, body) + foot(all_cells))
    return '\n'.join(out)


def simple(rows, title, published, columns, ranking, base=None):
    """A table of the paper whose columns are single variants. columns: [(name, selection)], base: number of random's column,
    published: {'H@5': [value or None for each column], ...}."""
    cells = [select(rows, **wanted) for _, wanted in columns]
    random, body = None if base is None else cells[base], []
    for metric, short in metrics_of(ranking):
        given = published.get(short) or [None] * len(cells)
        body.append([short] + [c.text(ranking, metric, p, random) for c, p in zip(cells, given)])
    return f'## {title}\n\n' + table([''] + [n for n, _ in columns], body) + foot(cells, ranking)


def table1(rows, dataset, stage):
    """RecFormer by tuned layers after 'ft1' or 'ft2', where any were run. None: the untouched language model (paper sec. 3.3).
    The paper's numbers stand beside ft2, whose 'All' is table 3's REC."""
    mine = [r for r in rows if r['model'] == 'recformer']
    found = {r['tune_layers'] for r in mine if r['mode'] == stage} - {'all'}
    if not found:
        return ''
    given = paper()['table1']
    values = given['rows'].get(dataset, {}) if stage == 'ft2' else {}
    sets = given['columns'][2:] if values else []
    sets = sets + sorted(found - set(sets) - {'none'}, key=lambda s: (-s.count(','), [int(i) for i in s.split(',')]))
    none = {'mode': stage, 'tune_layers': 'none'} if 'none' in found else {'mode': 'none', 'init': 'lf'}
    columns = [('None', none)] + [(s, {'mode': stage, 'tune_layers': s.lower()}) for s in ['All'] + sets]
    published = {short: [dict(zip(given['columns'], v)).get(name) for name, _ in columns] for short, v in values.items()}
    return simple(mine, f'Table 1: tuned layers, stage-{stage.upper()}', published, columns, 'sampled')


def table4(rows, dataset):
    sas = {'model': 'sasrec', 'scale': 'raw', 'loss': 'ce'}
    columns = [('REC', REC), ('SASRec', {**sas, 'init': 'random'}), ('FT-init', {**sas, 'init': 'ft', 'mode': 'trainable'})]
    if not any(select(rows, **wanted).rows for _, wanted in columns[1:]):
        return ''
    return simple(rows, 'Table 4: all items, cross-entropy', paper()['table4']['rows'].get(dataset, {}), columns, 'full', 1)


def table5(rows, dataset):
    sas = {'model': 'sasrec', 'scale': 'raw', 'loss': 'bce'}
    texts = [(f'ID + {s.upper()}', {**sas, 'init': s, 'mode': 'id+text'}) for s in ('lf', 'pt', 'ft')]
    items = ('REC trainable', {**REC, 'mode': 'trainable'})
    columns = [('SASRec', {**sas, 'init': 'random'}), *texts, ('REC', REC), items]
    if not any(select(rows, **wanted).rows for _, wanted in [*texts, items]):
        return ''
    return simple(rows, 'Table 5: with trainable IDs', paper()['table5']['rows'].get(dataset, {}), columns, 'sampled', 0)


def render(data, rows):
    """All tables that these rows have something for, as Markdown."""
    parts = [f'# Results: {data.name}\n', table2(data)]
    for protocol, mine in protocols(rows).items():
        parts.append(f'## Table 3: {protocol}\n')
        parts += [table3(mine, data.name, m, ranking, loss) for m, loss in MODELS for ranking in ('sampled', 'full')]
        parts += [scales(mine), *(table1(mine, data.name, stage) for stage in ('ft1', 'ft2')),
                  table4(mine, data.name), table5(mine, data.name)]
        most = max(max(r['tie_share'].values()) for r in mine)
        parts.append(f'Targets tie with a candidate for at most {most:.1%} of the users.\n')
    parts.append('Percent; mean ± standard deviation over seeds; ≈: no further from random initialisation than the larger of the two '
                 'deviations\n(with one seed each, none is known and none is marked); (n=..): another number of seeds than random; '
                 '- not run; [paper].\n')
    text = '\n'.join(p for p in parts if p)
    if '| mixed' in text:
        text += ('mixed: the seeds were trained with different options, data or embeddings and are not averaged; '
                 'run them again in one command.\n')
    return text
