"""Figure 1 (what CLS attends to, as maps and as numbers), figure 2 (quality over the share of source
users). A user's sequence: [CLS], then the items newest first. h = heads, L = tokens of a sequence.
"""
import itertools

import numpy as np

from common.files import whole

STRATA = ('bottom', 'middle', 'top')  # thirds of the depth (paper sec. 3.2: layers 0-3, 4-7, 8-11)
SAME = 0.9  # cosine above which two heads or layers count as redundant (ours)


# ------------------------------------------------------------------------ attention as numbers

def cls_attention(model, items, offsets, tokens, at_once=16):
    """Of each history (ragged, oldest first) its Packed sequence and the weights of CLS
    [layers, h, L], one after the other."""
    packed = model.pack(items, offsets, tokens)
    count = len(packed.lengths)
    for part in np.array_split(np.arange(count), -(-count // at_once)):
        weights = model.cls_attention(packed.rows(part)).cpu().numpy()
        for number, user in enumerate(part):
            length = packed.lengths[user]
            yield packed.rows(np.array([user])), weights[:, number, :, :length]


def first_tokens(packed):
    """Which of a sequence's tokens are the first of their item: bool [L]."""
    return np.diff(packed.item_positions, prepend=0) > 0


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def numbers(packed, weights, sasrec=None):
    """What one user's CLS weights [layers, h, L] say: {stratum: {name: value}}.

    itself: attention of CLS on CLS; all others look at what is left, on the items' tokens. heads:
    mean cosine of two heads of a layer; layers: of two neighbouring layers of the stratum (mean
    over heads), and border: of the layer before the stratum with its first; first, newest:
    attention per token on the items' first tokens, and on the newest item's, over that on an
    average token (1 = no preference); sasrec: correlation over items with SASRec's weights
    (sasrec [items], newest first), where it has three items at least.
    """
    real = packed.item_positions > 0
    itself, weights = weights[:, :, 0].mean(1), weights * real
    mean = weights.mean(1)  # [layers, L]

    def preference(row, chosen):
        return (row[chosen].sum() / row[real].sum()) / (chosen.sum() / real.sum())

    found = {}
    for name, layers in zip(STRATA, np.array_split(np.arange(len(weights)), 3)):
        part = mean[layers].mean(0)
        heads = [cosine(a, b) for i in layers for a, b in itertools.combinations(weights[i], 2)]
        inside = [cosine(mean[i], mean[i + 1]) for i in layers[:-1]] or [np.nan]
        border = cosine(mean[layers[0] - 1], mean[layers[0]]) if layers[0] else np.nan
        found[name] = {'itself': itself[layers].mean(), 'heads': np.mean(heads),
                       'layers': np.mean(inside), 'border': border,
                       'first': preference(part, first_tokens(packed)),
                       'newest': preference(part, packed.item_positions == 1)}
        if sasrec is not None and len(sasrec) >= 3:
            size = len(sasrec) + 1
            per_item = np.bincount(packed.item_positions, part, size)[1:size]
            found[name]['sasrec'] = float(np.corrcoef(per_item, sasrec)[0, 1])
    return found


def average(of_users):
    """Mean over users of what `numbers` gives; NaN where no user has a value."""
    found = {}
    for stratum in STRATA:
        names = dict.fromkeys(name for user in of_users for name in user[stratum])
        values = {name: np.array([user[stratum].get(name, np.nan) for user in of_users])
                  for name in names}
        found[stratum] = {name: v[np.isfinite(v)].mean() if np.isfinite(v).any() else np.nan
                          for name, v in values.items()}
    return found


def findings(vanilla, tuned):
    """[(the paper's finding, whether these averages show it, the numbers)] (paper sec. 3.2; the
    thresholds are ours)."""
    of = {name: {s: tuned[s].get(name, np.nan) for s in STRATA}
          for name in ('layers', 'border', 'first', 'heads', 'sasrec')}
    inside = [x for x in of['layers'].values() if np.isfinite(x)]  # none: thirds of one layer
    inside = np.mean(inside) if inside else np.nan
    border = np.mean([of['border'][s] for s in STRATA[1:]])  # nothing lies below the bottom
    first, like, before = of['first'], of['sasrec'], vanilla['middle']['first']
    other = vanilla['top'].get('sasrec', np.nan)
    alike = max(*of['heads'].values(), *of['layers'].values())
    return [
        ('(1) strata: neighbouring layers are more alike inside a third of the depth than across its '
         'border', inside > border, f'{inside:.3f} against {border:.3f}'),
        ("(2) the middle third looks at items' first tokens: more than the other thirds, and than the "
         "vanilla model's", first['middle'] > max(1, first['bottom'], first['top'], before),
         f'{first["middle"]:.2f} x an average token; bottom {first["bottom"]:.2f}, top '
         f'{first["top"]:.2f}, vanilla {before:.2f}'),
        ("(3) the top third resembles SASRec: more than the bottom, and than the vanilla model's top",
         like['top'] > max(0, like['bottom'], other),
         f'r = {like["top"]:.2f}; bottom {like["bottom"]:.2f}, vanilla {other:.2f}'),
        ('(4) redundancy: in some third, heads or neighbouring layers are almost the same (cosine '
         f'above {SAME})', alike > SAME, f'at most {alike:.3f}')]


# ------------------------------------------------------------------------ drawing

def canvas(*shape, **options):
    """matplotlib's subplots, without a display. Imported here: most commands draw nothing."""
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot
    pyplot.rcParams['text.parse_math'] = False  # titles are text: '$' is no formula
    return pyplot.subplots(*shape, layout='constrained', squeeze=False, **options)


def save(figure, path):
    """Write a picture, whole or not at all."""
    with whole(path) as part:
        figure.savefig(part, dpi=140, format='png')


def draw_attention(path, maps, packed, words, sasrec=None):
    """Maps of one sequence, a row per layer and head, a red rule where an item begins.

    maps: {title: weights [layers, h, L]}; words [L]; sasrec: weights [blocks, items] or None.
    """
    panels = {f'{title}, heads of layers 0 to {len(weights) - 1} (each row over its maximum outside '
              'CLS)': weights for title, weights in maps.items()}
    if sasrec is not None:
        known = np.minimum(packed.item_positions, sasrec.shape[1])
        spread = np.where(packed.item_positions > 0, sasrec[:, known - 1], 0)
        panels['SASRec, blocks, the newest position over the same items'] = spread[:, None]
    heights = [3 + weights.shape[0] * weights.shape[1] for weights in panels.values()]
    size = min(40, max(9, 0.16 * len(words) + 2)), 1.6 + 0.075 * sum(heights)
    figure, axes = canvas(len(panels), 1, figsize=size, height_ratios=heights)
    for axis, (title, weights) in zip(axes[:, 0], panels.items()):
        layers, heads, _ = weights.shape
        rows = weights.reshape(layers * heads, -1)
        axis.imshow(np.minimum(1, rows / rows[:, 1:].max(1, keepdims=True)), aspect='auto',
                    cmap='viridis', interpolation='nearest')
        axis.set_title(title, fontsize=9, loc='left')
        axis.set_yticks(np.arange(layers) * heads + heads / 2 - 0.5, range(layers), fontsize=7)
        axis.hlines(np.arange(1, layers) * heads - 0.5, -0.5, len(words) - 0.5, 'white', lw=0.6)
        axis.vlines(np.flatnonzero(first_tokens(packed)) - 0.5, -0.5, len(rows) - 0.5, 'red', lw=1)
        axis.set_xticks([])
    axis.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
    save(figure, path)


def draw_curve(path, points, bands):
    """points {(scale, share in percent): (mean, sd)} of PT; bands {name: (mean, sd)} of
    initialisations that know no share."""
    figure, axes = canvas(figsize=(6, 4))
    axis = axes[0, 0]
    for colour, (name, (mean, spread)) in zip(('tab:grey', 'tab:orange', 'tab:red'), bands.items()):
        axis.axhline(mean, color=colour, label=name)
        axis.axhspan(mean - spread, mean + spread, color=colour, alpha=0.2)
    for scale in dict.fromkeys(scale for scale, _ in points):
        mine = [(share, *value) for (s, share), value in points.items() if s == scale]
        shares, means, spreads = zip(*mine)
        axis.errorbar(shares, means, spreads, marker='o', capsize=3, label=f'PT {scale}')
    axis.set_xscale('log')
    axis.set_xlabel('share of the source users in stage-PT, percent')
    axis.set_ylabel('NDCG@10 against 100 negatives, percent')
    axis.legend()
    save(figure, path)
