"""Item embeddings of any RecFormer checkpoint, or of the untouched language model, as one file.

    python export_embeddings.py pantry --plm longformer --out runs/pantry/embeddings/lf.pt
    python export_embeddings.py pantry --checkpoint runs/pantry/ft1-seed0 --out .../ft.pt
    python export_embeddings.py drugstore --plm minilm --out /tmp/look.npy
    python export_embeddings.py mine --from-npy rows.npy --ids ids.txt --out .../own.pt

The .pt file: a matrix [items + 1, H], row i for item i (1-based, the order of `items`), row 0 zeros
for padding; `cold`, rows of the items in nobody's sequence; what it was made of (dataset, model,
cold items' ids and texts); its mean row norm and the mean cosine of different items.
train_seq.py refuses a file of another dataset or order. With --from-npy the rows are any encoder's:
`--variants own-trainable`.

An --out that ends in .npy or .safetensors is for other programs: one matrix without a padding row,
the cold items last, and beside it <name>.ids.txt, an id for each row. --again replaces them.

Reads:  data/<dataset>/prepared.npz; --checkpoint, --plm, or --from-npy.    Writes: --out.
"""
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from common.backbone import start_model, weights_digest
from common.data import load
from common.files import UserError, command, digest, load_pt, lock, save_pt, save_text, whole
from common.initial import geometry
from common.options import (add_earlier_options, add_machine_options, add_plm_options, option,
                            options_parser)
from common.runs import Run, code_of
from common.text import item_tokens, tokenize
from common.training import start

ENDINGS = '.pt', '.npy', '.safetensors'  # of --out: ours, then those for other programs


def parse_args(argv=None):
    p = options_parser(__doc__)
    option(p, 'dataset', 'name of a prepared dataset')
    option(p, '--out',
           'file to write: runs/<dataset>/embeddings/<name>.pt, or a .npy or .safetensors', Path,
           required=True)
    option(p, '--checkpoint',
           "a folder of pretrain.py or finetune.py, or published weights; default: --plm's own")
    option(p, '--from-npy', "another encoder's rows: a matrix, an item each", Path)
    option(p, '--ids', "the rows' items: a text file, an id of items.jsonl a line", Path)
    add_plm_options(p)
    add_machine_options(p)
    add_earlier_options(p)
    args = p.parse_args(argv)
    given = args.checkpoint or args.plm
    if args.from_npy:  # a .npy and its ids would be replaced, were they named alike
        given = args.ids and not given and args.out.suffix == '.pt'
    if not given or args.out.suffix not in ENDINGS:
        p.error('name a --checkpoint, or a --plm, or --from-npy and --ids, and an --out that ends '
                f'in {", ".join(ENDINGS)} (of --from-npy: .pt alone)')
    return args


def read_rows(path, ids, data):
    """Rows of the items, then of the cold items, all or none: [n + c, H] or [n, H], float32, of a
    .npy file and the ids of its rows. UserError: what is wrong."""
    keys = ids.read_text(encoding='utf-8-sig', errors='replace').splitlines()
    try:
        rows = torch.from_numpy(np.load(path)).float()
        place = dict(zip(keys, rows))
    except Exception:  # half a dozen kinds for a missing, damaged or foreign file
        raise UserError(f'{path}: is no matrix of numbers in a .npy file, or not there') from None
    if rows.dim() != 2 or not len(rows) == len(keys) == len(place):
        raise UserError(f'{path}: has the shape {list(rows.shape)}; it needs a row for each '
                        f'of the {len(keys):,} lines of {ids}, which name {len({*keys}):,} items')
    wanted = data.item_ids
    if len(place) > data.n_items:
        wanted = wanted + data.cold_ids
    wrong = sorted(place.keys() ^ wanted)
    if wrong:
        raise UserError(f'{ids}: {len(wrong):,} ids are missing or unknown, as {wrong[0]!r}; give '
                        f'{data.n_items:,} items, all or none of {len(data.cold_ids):,} cold ones')
    return torch.stack([place[key] for key in wanted])


def main(args):
    code = code_of('export_embeddings.py')  # now: an edit while the model loads is not what runs
    machine = start(args)
    data = load(args.dataset)
    out = args.out
    began = time.monotonic()

    # ---------------------------------------------------- rows, or a model
    if args.from_npy:
        rows = read_rows(args.from_npy, args.ids, data)
        plm = args.from_npy.name
        identity = {'rows': digest(rows)}
    else:
        model = start_model(args.checkpoint, args.plm, seed=None)
        plm = model.plm
        tokens = item_tokens(data, model.words)
        cold = tokenize(data.cold_attributes, model.words)
        identity = {'model': weights_digest(model), 'tokens': tokens.fingerprint,
                    'precision': args.precision}
    identity |= {'data': data.fingerprint, 'cold': digest(data.cold_ids, data.cold_attributes)}
    run = Run(args, out, identity, code)

    # ---------------------------------------------------- encode
    with lock(out.parent, wait=not machine.rank):
        ours = out.suffix == '.pt'
        if out.exists() and not args.again:
            if not ours:  # it may be another's
                raise UserError(f'{out}: is there; --again replaces it, and its .ids.txt')
            if run.usable(load_pt(out, 'embeddings')['head'], out):
                print(f'{out} is up to date')
                return
        if not args.from_npy:  # the cold items apart: new ones change no row of the others
            model.on(machine)
            rows = torch.cat([model.encode_items(each)[1:].cpu() for each in (tokens, cold)])
            if machine.rank:
                return
        if not torch.isfinite(rows).all():
            raise UserError(f'{args.from_npy or args.checkpoint or args.plm}: gives embeddings '
                            'that are not finite; of a language model: try --precision float32')

        # ------------------------------------------------ save, in the format that the name ends in
        items, cold = rows.tensor_split([data.n_items])
        head = {'identity': identity, 'code': run.code, 'seconds': time.monotonic() - began,
                'dataset': data.name, 'plm': plm, **geometry(items)}
        ids = (data.item_ids + data.cold_ids)[:len(rows)]
        if ours:
            matrix = torch.nn.functional.pad(items, (0, 0, 1, 0))
            save_pt(out, 'embeddings', head=head, matrix=matrix, items=data.item_ids,
                    cold=cold.clone())  # of a view all rows would be saved
        else:
            with whole(out) as part, open(part, 'wb') as f:
                if out.suffix == '.npy':
                    np.save(f, rows)
                else:
                    f.write(safetensors.torch.save({'embeddings': rows}))
            save_text(out.with_suffix('.ids.txt'), '\n'.join(ids) + '\n')
        print(f'{len(items):,} items and {len(cold):,} cold ones x {rows.shape[1]}, mean norm '
              f'{head["norm"]:.2f}, mean cosine {head["cosine"]:.2f}, written to {out}')


if __name__ == '__main__':
    command(main, parse_args())
