"""What an ID model's item table starts from: exported embeddings, their scale, their components."""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.files import UserError, digest, load_pt

SCALES = ('raw', 'rescaled', 'centred', 'whitened', 'permuted')


class Embeddings(NamedTuple):
    """An embedding file: matrix float32 [n + 1, H], row 0 zeros; a digest of it; what made it."""
    matrix: torch.Tensor
    digest: str
    head: dict


def read_embeddings(path, data):
    """The Embeddings in an export for exactly this dataset; UserError where anything is off."""
    path = Path(path)
    content = load_pt(path, 'embeddings')
    matrix, head = content['matrix'].float(), content['head']
    again = f'export it again for {data.name}'
    if content['items'] != data.item_ids or head['identity']['data'] != data.fingerprint:
        raise UserError(f'{path}: is of another version of {head["dataset"]}, or of other items; '
                        f'{again}')
    if len(matrix) != data.n_items + 1 or not torch.isfinite(matrix).all() or matrix[0].any():
        raise UserError(f'{path}: its matrix is not {data.n_items + 1} rows of finite numbers with a '
                        f'zero row 0; {again}')
    if not (matrix[1:] - matrix[1]).any():
        raise UserError(f'{path}: all items have the same row; their texts tell nothing apart')
    return Embeddings(matrix, digest(matrix), head)


def geometry(matrix):
    """{'norm': mean row norm, 'cosine': mean cosine of two different items} of [n + 1, H]."""
    rows = matrix[1:].double()
    unit = torch.nn.functional.normalize(rows, dim=1)
    n = len(unit)
    cosine = (unit.sum(0).square().sum() - unit.square().sum()) / (n * (n - 1)) if n > 1 else 1.0
    return {'norm': float(rows.norm(dim=1).mean()), 'cosine': float(cosine)}


def components(matrix, width):
    """The first `width` principal components: [n + 1, H] -> [n + 1, width], row 0 zeros."""
    most = min(len(matrix) - 1, matrix.shape[1])
    if width > most:
        raise UserError(f'--hidden {width}: the embeddings are {len(matrix) - 1} rows of '
                        f'{matrix.shape[1]} numbers; at most {most}')
    rows = matrix[1:] - matrix[1:].mean(0)
    axes = torch.linalg.svd(rows, full_matrices=False)[2][:width]
    return torch.cat([matrix.new_zeros(1, width), rows @ axes.T])


def initial_table(matrix, scale, norm, seed):
    """Embeddings [n + 1, H] as an initial item table. norm: mean row norm of the random table.

    raw: unchanged (paper). The others are ours; each ends with one factor for all rows, which gives
    them that norm. permuted: centred, in a random order of the items (a control).
    """
    if scale == 'raw':
        return matrix
    rows = matrix[1:]
    if scale != 'rescaled':
        rows = rows - rows.mean(0)
    if scale == 'whitened':  # unit covariance along the principal axes; those of no variance stay
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        rows = u * (s > s[0] * 1e-4) @ v
    if scale == 'permuted':
        order = np.random.default_rng([seed, 6]).permutation(len(rows))
        rows = rows[torch.from_numpy(order)]
    return torch.cat([matrix[:1], rows * (norm / rows.norm(dim=1).mean())])


def starting_tables(kind, n, width, embeddings, scale, seed):
    """(random table [n + 1, width] of the model class `kind`, the embeddings as an initial table of
    that width, or None without any). The random table is drawn from torch's generator."""
    table = kind.random_table(n, width)
    if embeddings is None:
        return table, None
    given = embeddings.matrix
    if given.shape[1] != width:
        given = components(given, width)
    return table, initial_table(given, scale, float(table[1:].norm(dim=1).mean()), seed)
