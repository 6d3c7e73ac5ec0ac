"""Figure 1 (what CLS attends to, as maps and as numbers); what runs reached as bars, learning
curves, and over shares of the source users (figure 2). A user's sequence: [CLS], then the items
newest first. h = heads, L = its tokens. Cells: see common/report.py.
"""
import contextlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F

from common.files import runs_root, whole
from common.initial import geometry
from common.report import RANKINGS, SHOWN

MEASURES = 'heads below first sasrec'.split()  # see `numbers`


# ------------------------------------------------------------------------ attention as numbers

def first_tokens(packed):
    """Which of a sequence's tokens are the first of their item: bool [L]."""
    return np.diff(packed.item_positions, prepend=0) > 0


def numbers(packed, weights, sasrec):
    """What one user's CLS weights [layers, h, L] say of each layer: the MEASURES [layers, 4].

    All look at the attention on the items' tokens. heads: mean cosine of two of its heads; below:
    cosine with the layer below (means over heads; NaN: there is none); first: attention per token
    on the items' first tokens over that on an average token (1 = no preference); sasrec:
    correlation with its weights [blocks, items] over the items, means over heads and blocks.
    """
    sasrec = sasrec[:, :packed.item_positions.max()]  # of what CLS sees, older items cut off
    first = first_tokens(packed)[1:]
    weights = weights[:, :, 1:]  # without that on CLS itself
    layers = weights.mean(1)  # [layers, L - 1]
    known = np.arange(1, sasrec.shape[1] + 1)
    of_item = torch.from_numpy(packed.item_positions[1:, None] == known)
    per_item = layers @ of_item.float()
    both = torch.cat([per_item, sasrec.mean(0, keepdim=True)])
    columns = [[geometry(heads)['cosine'] for heads in weights],
               [np.nan, *F.cosine_similarity(layers[1:], layers[:-1])],
               layers[:, first].mean(1) / layers.mean(1),
               both.corrcoef()[-1, :-1]]
    return torch.as_tensor(np.column_stack(columns))


# ------------------------------------------------------------------------ drawing

@contextlib.contextmanager
def picture(path, width, height):
    """An empty figure to draw on, then written, whole or not at all. Imported here: most commands
    draw nothing."""
    from matplotlib import style
    from matplotlib.figure import Figure
    plain = {'font.size': 8, 'text.parse_math': False}  # titles are text: '$' is no formula
    style.use(['tableau-colorblind10', plain])  # colours that every reader tells apart
    figure = Figure((width, height), layout='constrained')
    yield figure
    with whole(path) as part:
        figure.savefig(part, dpi=140, format='png')
    print(f'drawn: {path}')


def draw_attention(path, maps, packed, words, sasrec):
    """Maps of one sequence below each other, a panel per layer, in it a row per head (over its
    maximum outside CLS), a red rule where an item begins.

    maps: {title: weights [layers, h, L]}; words [L]; sasrec: weights [blocks, items], those of the
    newest position over the same items.
    """
    # nothing before the items; older ones than it knows as its oldest
    known = packed.item_positions.clip(max=sasrec.shape[1])
    of_items = F.pad(sasrec, (1, 0))[:, None, known]
    maps = maps | {'SASRec': of_items}
    layers = {f'{title}, {layer}': heads
              for title, weights in maps.items()
              for layer, heads in enumerate(weights)}
    items = np.flatnonzero(first_tokens(packed))
    width = min(4 + 0.16 * len(words), 40)
    with picture(path, width, 2 + 0.6 * len(layers)) as figure:
        axes = figure.subplots(len(layers), sharex=True)
        for axis, (title, heads) in zip(axes, layers.items()):
            highest = heads[:, 1:].amax(1, keepdim=True)
            axis.pcolormesh(heads / highest, vmax=1)
            axis.vlines(items, 0, len(heads), 'red')
            axis.set_ylabel(title, rotation=0, ha='right')
        axis.set_xticks(np.arange(len(words)) + 0.5, words, rotation=90)


def draw_bars(path, cells):
    """SHOWN of each Cell with its spread over seeds, a panel per ranking; lines across: popularity,
    and the best that needs no training."""
    cells = [cell for cell in cells if not cell.mixed]
    if not cells:
        return
    names = [f'{cell.title}: {cell.label}' for cell in cells]
    with picture(path, 11, 1 + 0.18 * len(cells)) as figure:
        axes = figure.subplots(1, len(RANKINGS), sharey=True)
        for axis, ranking in zip(axes, RANKINGS):
            means, spreads = zip(*(cell.value(ranking) for cell in cells))
            axis.barh(names, means, xerr=spreads)
            title = f'{SHOWN} in percent, {RANKINGS[ranking]}'
            across = [cell for cell in cells
                      if cell.label == 'popularity' or cell is cell.best[ranking]]
            for cell, style in zip(across, ('dashed', 'dotted')):
                value, _ = cell.value(ranking)
                axis.axvline(value, color='black', linestyle=style)
                title += f'\n{style}: {cell.label}'
            axis.set_title(title)
        axis.invert_yaxis()


def draw_lines(path, panels, below, log=False):
    """panels {title: {name: {x: (y, spread)}}}: a line per name, of one colour in all panels.
    below: what x is; log: drawn wide apart where it is small."""
    if not panels:
        return
    names = dict.fromkeys(itertools.chain(*panels.values()))
    rows = -(-len(panels) // 3)  # of three panels
    with picture(path, 10, 1 + 2.2 * rows + 0.1 * len(names)) as figure:
        for number, (title, lines) in enumerate(panels.items(), 1):
            axis = figure.add_subplot(rows, 3, number, title=title)
            for name in names:
                points = lines.get(name, {})
                y, spread = np.reshape(list(points.values()), (-1, 2)).T
                axis.errorbar(list(points), y, spread, marker='.', label=name)
            if log:
                axis.set_xscale('symlog', linthresh=0.01)
            axis.xaxis.set_major_formatter('{x:g}')
        figure.legend(*axis.get_legend_handles_labels(),
                      loc='outside upper center',
                      ncols=2)
        figure.supxlabel(below)


def learning(cells):
    """panels for draw_lines: validation of each Cell's first run over the epochs, a panel per
    model, loss and variant, random rows in each."""
    panels = {}
    for cell in cells:
        for shown in filter(None, (cell.random, cell)):
            row = shown.first
            log = runs_root() / row['dataset'] / row['run'] / 'log.csv'
            with contextlib.suppress(Exception):  # no log, or a damaged one: no curve
                epochs = np.genfromtxt(log, delimiter=',', names=True, ndmin=1)
                values = {epoch['epoch']: (100 * epoch['valid'], 0) for epoch in epochs}
                panels.setdefault(f'{cell.title}\n{cell.variant}', {})[shown.init] = values
    return panels
