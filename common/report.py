"""Rows of results.json -> the paper's tables, mean +- standard deviation over seeds, the paper's numbers in brackets.

Only rows of one protocol (language model, evaluated users, history excluded or not, PCA, tied output) enter one table; rows
of a protocol differ in seed, model, initialisation, mode, scale and loss alone.
"""
import json
from statistics import mean, stdev

from common.files import ROOT

SHORT = {'HR': 'H', 'NDCG': 'N'}
COLUMNS = [('REC', ('recformer', 'ft2')), ('freeze LF', ('lf', 'freeze')), ('freeze PT', ('pt', 'freeze')), ('freeze FT', ('ft', 'freeze')),
           ('train LF', ('lf', 'trainable')), ('train PT', ('pt', 'trainable')), ('train FT', ('ft', 'trainable')),
           ('further All', ('ft', 'further-all')), ('further Emb', ('ft', 'further-emb'))]
PAPER_KEYS = ['SAS', 'REC', 'freeze_LF', 'freeze_PT', 'freeze_FT', 'train_LF', 'train_PT', 'train_FT', 'further_all', 'further_emb']
NAMES = {'sasrec': 'SASRec', 'bert4rec': 'BERT4Rec', 'recformer': 'RecFormer'}


def paper():
    """The paper's tables 1-5 (percentages)."""
    return json.loads((ROOT / 'common' / 'paper.json').read_text(encoding='utf-8'))


class Cell:
    """One variant: its rows (one per seed). Values in percent."""

    def __init__(self, rows):
        self.rows = rows

    def values(self, ranking, metric):
        return [100 * r['metrics'][ranking][metric] for r in self.rows]

    def text(self, ranking, metric, published=None, base=None):
        """'mean ± sd [paper]'; '-' without rows; '≈' where the difference from `base` is inside the spread."""
        if not self.rows:
            return '-' if published is None else f'- [{published:.2f}]'
        v = self.values(ranking, metric)
        out = f'{mean(v):.2f}' + (f' ± {stdev(v):.2f}' if len(v) > 1 else '')
        if base is not None and base.rows and tie(v, base.values(ranking, metric)):
            out += ' ≈'
        return out + (f' [{published:.2f}]' if published is not None else '')


def tie(a, b):
    """True where two means differ by no more than the larger standard deviation over seeds; never with one seed each."""
    spread = max((stdev(x) for x in (a, b) if len(x) > 1), default=-1)
    return abs(mean(a) - mean(b)) <= spread


def select(rows, **wanted):
    return Cell([r for r in rows if all(r.get(k) == v for k, v in wanted.items())])


def protocols(rows):
    """{protocol text: rows}: what may be averaged and compared with each other. Random initialisation knows no language model."""
    plms = sorted({r['plm'] for r in rows if r['plm']}) or [None]
    out = {}
    for r in rows:
        for plm in [r['plm']] if r['plm'] else plms:
            text = f'{r["users"]:,} users' + (f', {plm}' if plm else '') + (', history excluded' if r['exclude_history'] else '') \
                + (f', PCA {r["dim"]}' if r.get('dim') else '')
            out.setdefault(text, []).append(r)
    return out


def table(head, body):
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)] + ['| ' + ' | '.join(r) + ' |' for r in body]
    return '\n'.join(lines) + '\n'


def metrics_of(ranking, ks):
    return [(f'{m}@{k}', f'{SHORT[m]}@{k}') for m in ('HR', 'NDCG') for k in ks]


def table2(data):
    published = paper()['table2']
    known = dict(zip(published['columns'], published['rows'].get(data.name, [])))
    keys = ('users', 'items', 'interactions', 'avg_len', 'evaluated')
    show = lambda c, k: '-' if k not in c else f'{c[k]:,.1f}' if k == 'avg_len' else f'{c[k]:,}'
    return '## Table 2: data\n\n' + table([''] + list(keys), [['ours'] + [show(data.counts, k) for k in keys]] + (
        [['paper'] + [show(known, k) for k in keys]] if known else []))


def table3(rows, dataset, model, ranking):
    """Random, REC, 6 embedding-initialised and 2 further-trained variants in the paper's setting: raw embeddings, BCE or masked."""
    loss = {'sasrec': 'bce', 'bert4rec': 'masked'}[model]
    rows = [r for r in rows if r['scale'] == 'raw' and not r['tied'] or r['model'] == 'recformer']
    random = select(rows, model=model, init='random', loss=loss)
    cells = [random] + [select(rows, model='recformer', mode='ft2', tune_layers='all') if name == 'REC' else
                        select(rows, model=model, init=key[0], mode=key[1], loss=loss) for name, key in COLUMNS]
    if not any(c.rows for c in cells if c.rows and c.rows[0]['model'] == model):
        return ''
    published = paper()['table3']['rows'][model].get(dataset, {}) if ranking == 'sampled' else {}
    body = []
    for metric, short in metrics_of(ranking, (5, 10) if ranking == 'sampled' else (5, 10, 50)):
        given = dict(zip(PAPER_KEYS, published.get(short, [])))
        row = [c.text(ranking, metric, given.get(key), random if c is not random else None) for c, key in zip(cells, PAPER_KEYS)]
        best = max((mean(c.values(ranking, metric)) for c in cells[2:] if c.rows), default=None)
        gain = '-' if best is None or not random.rows else f'{best / mean(random.values(ranking, metric)) - 1:+.1%}'
        body.append([short] + row + [gain + (f' [{published[short][-1]:+.1f}%]' if short in published else '')])
    what = '100 negatives' if ranking == 'sampled' else 'all items'
    return f'### {NAMES[model]}, {what}\n\n' + table([''] + [NAMES[model]] + [n for n, _ in COLUMNS] + ['improv.'], body)


def scales(rows):
    """NDCG@10 and full HR@10 of trainable initialisations per scale, for each model and loss (beyond the paper)."""
    out = ''
    order = ['raw', 'rescaled', 'centred', 'whitened', 'permuted']
    for model, loss in (('sasrec', 'bce'), ('sasrec', 'ce'), ('bert4rec', 'masked')):
        mine = [r for r in rows if r['model'] == model and r['loss'] == loss and not r['tied'] and r['mode'] in ('random', 'trainable')]
        random = select(mine, init='random')
        used = [s for s in order if any(r['scale'] == s and r['init'] != 'random' for r in mine)]
        if not used:
            continue
        body = []
        for ranking, metric in (('sampled', 'NDCG@10'), ('full', 'NDCG@10'), ('full', 'HR@10')):
            for init in ('lf', 'pt', 'ft'):
                cells = [select(mine, init=init, scale=s) for s in used]
                if any(c.rows for c in cells):
                    body.append([f'{"100 neg." if ranking == "sampled" else "full"} {metric}', init.upper(), random.text(ranking, metric)]
                                + [c.text(ranking, metric, None, random) for c in cells])
        out += f'### {NAMES[model]} ({loss}), trainable embeddings by scale\n\n' + table(['', 'init', 'random'] + used, body) + '\n'
    return out


def simple(rows, title, key, columns, ranking, ks, dataset):
    """A table of the paper whose columns are single variants. columns: [(name, selection)]."""
    cells = [select(rows, **wanted) for _, wanted in columns]
    if not any(c.rows for c in cells[1:]):
        return ''
    published = paper()[key]['rows'].get(dataset, {})
    body = []
    for metric, short in metrics_of(ranking, ks):
        given = published.get(short, [None] * len(cells))
        body.append([short] + [c.text(ranking, metric, p) for c, p in zip(cells, given)])
    return f'## {title}\n\n' + table([''] + [n for n, _ in columns], body)


def render(data, rows):
    """All tables that these rows have something for, as Markdown."""
    parts = [f'# Results: {data.name}\n', table2(data)]
    for protocol, mine in protocols(rows).items():
        seeds = sorted({r['seed'] for r in mine})
        parts.append(f'## Table 3: {protocol}, seeds {", ".join(map(str, seeds))}\n')
        parts += [table3(mine, data.name, m, ranking) for m in ('sasrec', 'bert4rec') for ranking in ('sampled', 'full')]
        parts.append(scales(mine))
        sas = {'model': 'sasrec', 'scale': 'raw'}
        rec = {'model': 'recformer', 'mode': 'ft2', 'tune_layers': 'all'}
        parts.append(simple(mine, 'Table 4: all items, cross-entropy', 'table4', [('REC', rec), ('SASRec', {**sas, 'loss': 'ce', 'init': 'random'}),
                     ('FT-init', {**sas, 'loss': 'ce', 'init': 'ft', 'mode': 'trainable'})], 'full', (5, 10, 50), data.name))
        ids = [('SASRec', {**sas, 'loss': 'bce', 'init': 'random'})] + [
            (f'ID + {s.upper()}', {**sas, 'loss': 'bce', 'init': s, 'mode': 'id+text'}) for s in ('lf', 'pt', 'ft')]
        if any(r['mode'] in ('id+text', 'trainable') and (r['mode'] == 'id+text' or r['model'] == 'recformer') for r in mine):
            parts.append(simple(mine, 'Table 5: with trainable IDs', 'table5', ids + [('REC', rec), ('REC trainable', {**rec, 'mode': 'trainable'})],
                                'sampled', (5, 10), data.name))
        commits = sorted({r['commit'] for r in mine})
        parts.append(f'Percent; mean ± standard deviation over seeds; ≈: no further from random initialisation than the larger of the two '
                     f'deviations; - not run; [paper]. Targets tie with a candidate for at most '
                     f'{max(max(r["tie_share"].values()) for r in mine):.1%} of the users. Commits {", ".join(commits)}; '
                     f'{min(r["date"] for r in mine)} to {max(r["date"] for r in mine)}.\n')
    return '\n'.join(p for p in parts if p)
