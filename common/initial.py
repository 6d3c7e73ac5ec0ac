"""What an ID model's item table starts from: exported embeddings, their scale, their principal components."""
import numpy as np
import torch

from common.files import UserError, load_pt


def read_embeddings(path, data):
    """(matrix [n + 1, H], meta) of an export for exactly this dataset; UserError where anything is off."""
    content = load_pt(path, 'embeddings')
    matrix, meta = content['matrix'], content['meta']
    again = f'export it again for {data.name}'
    if meta['fingerprint'] != data.fingerprint or meta['items'] != data.item_ids:
        raise UserError(f'{path}: is of another version of {meta["dataset"]}, or of other items; {again}')
    if matrix.shape != (data.n_items + 1, meta['hidden']) or not torch.isfinite(matrix).all() or matrix[0].any():
        size = f'{data.n_items + 1} x {meta["hidden"]}'
        raise UserError(f'{path}: its matrix is not {size} finite numbers with a zero row 0; {again}')
    return matrix.float(), meta


def initial_table(matrix, scale, norm, seed):
    """The embeddings [n + 1, H] as an initial item table. norm: mean row norm of the random table.

    raw: unchanged (paper). The others are ours; each ends with one factor for all rows.
    """
    rows = matrix[1:]
    if scale == 'raw':
        return matrix
    if scale != 'rescaled':
        rows = rows - rows.mean(0)
    if scale == 'whitened':  # to unit covariance along the principal axes; directions of no variance stay zero
        u, s, v = torch.linalg.svd(rows, full_matrices=False)
        rows = u * (s > s[0] * 1e-4) @ v
    if scale == 'permuted':
        rows = rows[torch.from_numpy(np.random.default_rng([seed, 6]).permutation(len(rows)))]
    return torch.cat([matrix[:1], rows * (norm / rows.norm(dim=1).mean())])


def reduce_dimensions(matrix, dim, path):
    """Principal components: [n + 1, H] -> [n + 1, dim], row 0 zeros."""
    if dim > min(len(matrix) - 1, matrix.shape[1]):
        raise UserError(f'--pca {dim}: {path} has {len(matrix) - 1} items of {matrix.shape[1]} dimensions')
    rows = matrix[1:] - matrix[1:].mean(0)
    return torch.cat([matrix.new_zeros(1, dim), rows @ torch.linalg.svd(rows, full_matrices=False)[2][:dim].T])


def starting_table(kind, n, width, embeddings, scale, seed):
    """(random table [n + 1, H] of the model class `kind`, the embeddings [n + 1, H] as an initial table or None)."""
    table = kind.random_table(n, width)
    if embeddings is None:
        return table, None
    return table, initial_table(embeddings, scale, float(table[1:].norm(dim=1).mean()), seed)
