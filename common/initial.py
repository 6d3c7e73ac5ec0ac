"""What an ID model's item table starts from: exported embeddings, their scale, their components."""
from typing import NamedTuple

import torch
from numpy.random import default_rng
from torch.nn.functional import normalize, pad

from common.files import UserError, digest, load_pt

SCALES = 'raw centred whitened permuted'.split()


class OtherData(UserError):
    """Embeddings are of other data, or of other items, than today's."""


class Embeddings(NamedTuple):
    """An embedding file: matrix float32 [n + 1, H], row 0 zeros; a digest of it; what made it.
    With cold items their rows stand behind: [n + 1 + c, H]."""
    matrix: torch.Tensor
    digest: str
    head: dict


def read_embeddings(path, data, cold=False):
    """The Embeddings in an export for exactly this dataset, `cold`: with the rows of its cold
    items; UserError where anything is off, OtherData where it was made for another version."""
    content = load_pt(path, 'embeddings')
    matrix = content['matrix']
    head = content['head']
    known = digest(matrix)
    ours = (content['items'] == data.item_ids and head['identity']['data'] == data.fingerprint
            and len(matrix) == data.n_items + 1
            and (not cold or head['identity'].get('cold')
                 == digest(data.cold_ids, data.cold_attributes)
                 and len(content['cold']) == len(data.cold_ids)))
    if not ours:
        raise OtherData(f'{path}: is of another version of {head["dataset"]}, of other items, rows '
                        "or other cold items than today's; export it again, or remove it")
    rows = matrix[1:]
    if not (rows - rows.mean(0)).norm() > 1e-5 * rows.norm():  # nothing but rounding, or NaN
        raise UserError(f'{path}: all items have the same row (alike texts?), or not all is finite')
    if cold:
        matrix = torch.cat([matrix, content['cold']])
    return Embeddings(matrix, known, head)


def origin_of(embeddings):
    """What a row says of the Embeddings it started from: Nones of a random table (None)."""
    head = embeddings.head if embeddings else {}
    return {key: head.get(key) for key in ('plm', 'norm', 'cosine')}


def geometry(rows):
    """{'norm': mean row norm, 'cosine': mean cosine of two different items} of rows [n, H]."""
    rows = rows.double()
    unit = normalize(rows, dim=1)
    n = len(unit)
    of_pairs = unit.sum(0).square().sum() - unit.square().sum()
    cosine = of_pairs / (n * (n - 1)) if n > 1 else 1.0
    return {'norm': float(rows.norm(dim=1).mean()), 'cosine': float(cosine)}


def initial_table(matrix, width, scale, norm, seed, n):
    """Embeddings [n + 1, H] as an initial item table [n + 1, width], row 0 zeros: of another width
    their first principal components. norm: mean row norm of the random table.

    scale raw: unchanged (paper). The others are ours; each is centred, and ends with one factor for
    all rows, which gives them that norm. permuted: in a random order of the items (a control). More
    rows (of cold items) get what the n items give: their mean, their axes, their factor.
    """
    rows = matrix[1:]
    if width != matrix.shape[1]:
        rows = rows - rows[:n].mean(0)
        _, _, axes = torch.linalg.svd(rows[:n], full_matrices=False)
        if width > len(axes):
            raise UserError(f'--hidden {width}: at most {len(axes)} ({n} rows x {matrix.shape[1]})')
        rows = rows @ axes[:width].T
    if scale != 'raw':
        rows = rows - rows[:n].mean(0)
        if scale == 'whitened':  # unit covariance along the principal axes; no variance: stays
            u, s, v = torch.linalg.svd(rows[:n], full_matrices=False)
            least = s[0] * 1e-4
            more = rows[n:] @ v.T / s.clamp_min(least)
            rows = torch.cat([u, more]) * (s > least) @ v
        if scale == 'permuted':
            order = default_rng([seed, 6]).permutation(n)
            rows[:n] = rows[order]
        rows = rows * (norm / rows[:n].norm(dim=1).mean())
    return pad(rows, (0, 0, 1, 0))


def starting_tables(kind, n, embeddings, about):
    """(item table [n + 1, H] that a run begins with, fixed text [n + 1, H] added to it or None).
    Where the embeddings have cold items, with the rows that the run would have given these.

    kind: class of the model; embeddings: None for a random table; about: what the run is (see
    train_seq.py). Seeds torch's generator and draws from it.
    """
    torch.manual_seed(about['seed'])
    table = kind.draw(torch.empty(n + 1, about['hidden']))
    table[0] = 0
    if embeddings is None:
        return table, None
    norm = float(table[1:].norm(dim=1).mean())
    given = initial_table(embeddings.matrix, about['hidden'], about['scale'], norm, about['seed'],
                          n)
    if about['mode'] == 'id+text':
        return table, given
    return given, None
