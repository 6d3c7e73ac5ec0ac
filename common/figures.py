"""Figure 1 (what CLS attends to, as maps and as numbers) and figure 2 (quality over the share of source users).

A user's sequence: [CLS], then the items newest first. h = heads, L = tokens of one sequence; item positions as in common/text.py.
"""
import itertools

import numpy as np
import torch

from common.files import whole
from common.recformer import Batch
from common.text import pack, take

STRATA = ('bottom', 'middle', 'top')  # thirds of the depth (paper sec. 3.2: layers 0-3, 4-7, 8-11)


# ---------------------------------------------------------------------------- attention weights

@torch.no_grad()
def cls_attention(model, items, offsets, tokens, cls, device, at_once=16):
    """Of each history (ragged, oldest first) its packed sequence and the weights of CLS [layers, h, L], one after the other."""
    for rows in np.array_split(np.arange(len(offsets) - 1), -(-(len(offsets) - 1) // at_once)):
        packed = pack(*take(items, offsets, rows), tokens, cls)
        weights = model.cls_attention(Batch(packed, model.config.window, device)).cpu().numpy()
        for number, length in enumerate(packed.lengths):
            yield packed.rows(np.array([number])), weights[:, number, :, :length]


@torch.no_grad()
def sasrec_attention(model, items):
    """Weights of the newest position over its history: items int [T], oldest first (at most the model's) -> [blocks, T]."""
    from common.sasrec import Layout
    items = torch.from_numpy(items[-model.max_items:].astype(np.int64))
    layout = Layout(np.array([len(items)]), model.max_items, True, 'cpu')
    x = model.item_embedding()[items] * model.norm.normalized_shape[0] ** 0.5 + model.position_embedding(layout.position)
    found = []
    for block in model.blocks:
        q, k = block.attention.query(block.attention_norm(x)[-1:]), block.attention.key(x)
        found.append((q @ k.T / q.shape[1] ** 0.5).softmax(1)[0].numpy())
        x = block(x, layout)
    return np.stack(found)


# ---------------------------------------------------------------------------- the paper's findings as numbers

def first_tokens(packed):
    """Which of a sequence's tokens are the first of their item: bool [L]."""
    return np.diff(packed.item_positions, prepend=0) > 0


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def numbers(packed, weights, sasrec=None):
    """What one user's CLS weights [layers, h, L] say: {stratum: {name: value}}.

    itself: attention of CLS on CLS; all others look at what is left, on the items' tokens. heads: mean cosine of two heads of a
    layer; layers: of two neighbouring layers of the stratum (mean over heads), and border: of the layer before the stratum with
    its first; first, newest: attention per token on the items' first tokens, and on the newest item's, over that on an average
    token (1 = no preference); sasrec: correlation over items with SASRec's weights (sasrec [items], newest first), where it
    has three items at least.
    """
    real = packed.item_positions > 0
    share = lambda row, chosen: (row[chosen].sum() / row[real].sum()) / (chosen.sum() / real.sum())
    itself, weights = weights[:, :, 0].mean(1), weights * real
    mean, found = weights.mean(1), {}
    for name, layers in zip(STRATA, np.array_split(np.arange(len(weights)), 3)):
        part = mean[layers].mean(0)
        found[name] = {
            'itself': itself[layers].mean(),
            'heads': np.mean([cosine(a, b) for i in layers for a, b in itertools.combinations(weights[i], 2)]),
            'layers': np.mean([cosine(mean[i], mean[i + 1]) for i in layers[:-1]] or [np.nan]),
            'border': cosine(mean[layers[0] - 1], mean[layers[0]]) if layers[0] else np.nan,
            'first': share(part, first_tokens(packed)), 'newest': share(part, packed.item_positions == 1)}
        if sasrec is not None and len(sasrec) >= 3:
            per_item = np.bincount(packed.item_positions, part, len(sasrec) + 1)[1:len(sasrec) + 1]
            found[name]['sasrec'] = float(np.corrcoef(per_item, sasrec)[0, 1])
    return found


def average(of_users):
    """Mean over users of what `numbers` gives; NaN where no user has a value."""
    names = dict.fromkeys(n for user in of_users for n in user['top'])
    mean = lambda values: float(np.nanmean(values)) if np.isfinite(values).any() else float('nan')
    return {s: {n: mean(np.array([u[s].get(n, np.nan) for u in of_users])) for n in names} for s in STRATA}


def findings(vanilla, tuned):
    """[(the paper's finding, whether these averages show it, the numbers)] (paper sec. 3.2; the thresholds are ours)."""
    inside = np.nanmean([tuned[s]['layers'] for s in STRATA])
    border = np.nanmean([tuned[s]['border'] for s in STRATA])
    first = {s: tuned[s]['first'] for s in STRATA}
    like = {s: tuned[s].get('sasrec', np.nan) for s in STRATA}
    other = vanilla['top'].get('sasrec', np.nan)
    heads = max(max(tuned[s]['heads'], tuned[s]['layers']) for s in STRATA)
    return [('(1) strata: neighbouring layers are more alike inside a third of the depth than across its border', inside > border,
             f'{inside:.3f} against {border:.3f}'),
            ("(2) the middle third looks at items' first tokens: more than the other thirds, and than the vanilla model's",
             first['middle'] > max(1, first['bottom'], first['top'], vanilla['middle']['first']),
             f'{first["middle"]:.2f} x an average token; bottom {first["bottom"]:.2f}, top {first["top"]:.2f}, '
             f'vanilla {vanilla["middle"]["first"]:.2f}'),
            ("(3) the top third resembles SASRec: more than the bottom, and than the vanilla model's top",
             like['top'] > max(0, like['bottom'], other), f'r = {like["top"]:.2f}; bottom {like["bottom"]:.2f}, vanilla {other:.2f}'),
            ('(4) redundancy: in some third, heads or neighbouring layers are almost the same (cosine above 0.9)', heads > 0.9,
             f'at most {heads:.3f}')]


# ---------------------------------------------------------------------------- drawing

def canvas(*args, **options):
    import matplotlib  # here: most commands draw nothing
    matplotlib.use('Agg')
    from matplotlib import pyplot
    return pyplot.subplots(*args, **options)


def save(figure, path):
    with whole(path) as part:
        figure.savefig(part, dpi=140, format='png')


def draw_attention(path, maps, packed, words, titles, sasrec=None):
    """maps: {panel title: weights [layers, h, L]}; words [L]; titles: of the items, newest first; sasrec [blocks, items] or None."""
    length, count = len(words), int(packed.item_positions.max())
    panels = len(maps) + (sasrec is not None)
    heights = [w.shape[0] * w.shape[1] for w in maps.values()] + [10] * (sasrec is not None)
    figure, axes = canvas(panels, 1, figsize=(min(40, max(9, 0.16 * length + 2)), 1.6 + 0.075 * sum(heights)), squeeze=False,
                          height_ratios=heights, layout='constrained')
    borders = [np.flatnonzero(packed.item_positions == i) for i in range(1, count + 1)]
    for axis, (title, weights) in zip(axes[:, 0], maps.items()):
        layers, heads, _ = weights.shape
        rows = weights.reshape(layers * heads, length)
        axis.imshow(np.minimum(1, rows / rows[:, 1:].max(1, keepdims=True)), aspect='auto', cmap='viridis', interpolation='nearest')
        axis.set_yticks(np.arange(layers) * heads + heads / 2 - 0.5, [f'layer {i}' for i in range(layers)], fontsize=7)
        for i in range(1, layers):
            axis.axhline(i * heads - 0.5, color='white', lw=1.6 if i * 3 % layers == 0 else 0.4)
        axis.set_title(f'{title} (each row over its maximum outside CLS)', fontsize=9, loc='left', pad=16)
    if sasrec is not None:
        axis = axes[-1, 0]
        rows = np.zeros((len(sasrec), length))
        for i, columns in enumerate(borders[:sasrec.shape[1]]):
            rows[:, columns] = sasrec[:, i, None]
        axis.imshow(rows / rows.max(1, keepdims=True), aspect='auto', cmap='viridis', interpolation='nearest')
        axis.set_yticks(range(len(sasrec)), [f'block {i}' for i in range(len(sasrec))], fontsize=7)
        axis.set_title('SASRec, the newest position over the same items', fontsize=9, loc='left', pad=16)
    for axis in axes[:, 0]:
        for columns, title in zip(borders, titles):
            if len(columns):
                axis.axvline(columns[0] - 0.5, color='red', lw=1)
                axis.text(columns[0] - 0.4, -0.8, title[:max(6, len(columns) * 3 // 2)], fontsize=6, color='red', va='bottom')
        axis.set_xticks([])
    axes[-1, 0].set_xticks(range(length), words, rotation=90, fontsize=6)
    save(figure, path)


def draw_curve(path, points, bands, metric):
    """points {(scale, share in percent): (mean, sd)} of PT; bands {name: (mean, sd)} of initialisations that know no share."""
    figure, axis = canvas(figsize=(6, 4), layout='constrained')
    for colour, (name, (mean, spread)) in zip(('tab:grey', 'tab:orange', 'tab:red'), bands.items()):
        axis.axhline(mean, color=colour, label=name)
        axis.axhspan(mean - spread, mean + spread, color=colour, alpha=0.2)
    for scale, colour in (('raw', 'tab:cyan'), ('centred', 'tab:blue')):
        if mine := {share: value for (s, share), value in points.items() if s == scale}:
            axis.errorbar(list(mine), *zip(*mine.values()), marker='o', capsize=3, label=f'PT {scale}', color=colour)
    axis.set_xscale('log')
    axis.set_xlabel('share of the source users in stage-PT, percent')
    axis.set_ylabel(f'{metric}, percent')
    axis.legend()
    save(figure, path)
