"""Item embeddings of any RecFormer checkpoint, or of the untouched language model, as one file.

    python export_embeddings.py pantry --plm longformer --out runs/pantry/embeddings/lf.pt
    python export_embeddings.py pantry --checkpoint runs/pantry/ft1-seed0 --out .../ft.pt
    python export_embeddings.py drugstore --plm minilm --layers 2 --out /tmp/look.pt

The file: a matrix [items + 1, H], row i for item i (1-based, the order of `items`), row 0 zeros for
padding; which dataset and model it is of; its mean row norm and the mean cosine of different items.
train_seq.py refuses a file of another dataset or order.

Reads:  data/<dataset>/prepared.npz, --checkpoint or --plm.    Writes: --out.
"""
import pathlib
import time

import torch

from common.backbone import start_model, untouched, weights_digest
from common.data import load
from common.files import UserError, command, load_pt, lock, save_pt
from common.initial import geometry
from common.options import add_machine_options, add_plm_options, option, options_parser
from common.runs import Run, code_of
from common.text import item_tokens
from common.training import start


def parse_args(argv=None):
    p = options_parser(__doc__)
    p.add_argument('dataset', help='name of a prepared dataset')
    option(p, '--out', str, None, 'file to write: runs/<dataset>/embeddings/<name>.pt',
           required=True)
    option(p, '--checkpoint', str, None, 'a folder of pretrain.py or finetune.py, or a published '
           "RecFormer state dict (with --plm); default: --plm's language model itself")
    add_plm_options(p)
    add_machine_options(p, language_model=True, trains=False)
    args = p.parse_args(argv)
    if not args.checkpoint and not args.plm:
        p.error('name a --checkpoint or a --plm')
    return args


def main(args):
    machine, data, out = start(args), load(args.dataset), pathlib.Path(args.out)
    began = time.monotonic()

    # ---------------------------------------------------- model
    model = start_model(args.checkpoint, args.plm, args.layers)
    if model.stage == 'lf':
        untouched(model)
    tokens = item_tokens(data, model.words)
    identity = {'data': data.fingerprint, 'model': weights_digest(model),
                'tokens': tokens.fingerprint, 'precision': args.precision}
    run = Run(args, out, identity, code_of('export_embeddings.py'))

    # ---------------------------------------------------- encode, save
    with lock(out.parent, wait=True):
        if out.exists() and run.usable(load_pt(out, 'embeddings')['head'], out):
            print(f'{out} is up to date')
            return
        matrix = model.on(machine).encode_items(tokens).cpu()
        if not torch.isfinite(matrix).all():
            raise UserError(f'{args.checkpoint or args.plm}: gives embeddings that are not finite; '
                            'try --precision float32')
        shape = geometry(matrix)
        head = {'identity': identity, 'code': run.code, 'seconds': time.monotonic() - began,
                'dataset': data.name, 'stage': model.stage, 'plm': model.plm, **shape}
        save_pt(out, 'embeddings', head=head, matrix=matrix, items=data.item_ids)
        print(f'{data.n_items:,} items x {matrix.shape[1]}, mean norm {shape["norm"]:.2f}, mean '
              f'cosine of two items {shape["cosine"]:.2f}, written to {out}')


if __name__ == '__main__':
    command(main, parse_args())
