"""Item embeddings of any RecFormer checkpoint, or of the untouched language model, as one file.

    python export_embeddings.py pantry --plm longformer --out runs/pantry/embeddings/lf.pt
    python export_embeddings.py pantry --checkpoint runs/pretrained/paper.pt --out runs/pantry/embeddings/pt.pt
    python export_embeddings.py grocery --plm minilm --layers 2 --out /tmp/look.pt                                  # a look

The file: {'meta', 'matrix'}; matrix float32 [items + 1, H], row i for item i (1-based, the order of meta['items']), row 0
zeros for padding. meta says which dataset and checkpoint it is of; train_seq.py refuses a file of another dataset or order.

Reads:  data/<dataset>/prepared.npz, --checkpoint or --plm.    Writes: --out.
"""
import argparse
import pathlib

import torch

from common.data import load
from common.files import UserError, command, lock, made_from, provenance, save_pt
from common.recformer import encode_items, from_backbone, lf_untouched, load_model
from common.sources import fetch_plm
from common.text import load_tokenizer, tokenize
from common.training import add_runtime_options, positive, start


def parse_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('dataset', help='name of a prepared dataset')
    p.add_argument('--out', required=True, help='file to write')
    p.add_argument('--checkpoint', help="pretrain.py's or finetune.py's, or a published RecFormer state dict (with --plm)")
    p.add_argument('--plm', help='without --checkpoint: the language model itself (longformer, minilm, hub name, folder)')
    p.add_argument('--layers', type=positive(), help='with --plm: its first LAYERS layers only (default: all)')
    add_runtime_options(p, language_model=True)
    args = p.parse_args(argv)
    if not args.checkpoint and not args.plm:
        p.error('name a --checkpoint or a --plm')
    return args


def main(args):
    device, autocast = start(args)
    data, out = load(args.dataset), pathlib.Path(args.out)

    # ---------------------------------------------------- model
    if args.checkpoint:
        model, meta = load_model(args.checkpoint, args.plm)
    else:
        model = lf_untouched(from_backbone(fetch_plm(args.plm), args.layers))
        meta = {'plm': args.plm, 'stage': 'lf', 'identity': None}
    tokenizer = load_tokenizer(fetch_plm(meta['plm']))
    if meta.get('tokenizer', tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(f'{args.checkpoint}: was made with another tokenizer than {meta["plm"]} has now')
    tokens = tokenize(data.attributes, tokenizer)
    identity = {'data': data.fingerprint, 'model': meta['identity'], 'plm': meta['plm'], 'layers': model.config.layers,
                'tokens': tokens.fingerprint, 'precision': args.precision}

    # ---------------------------------------------------- encode, save
    with lock(out.parent):
        if made_from(out, 'embeddings', identity):
            return print(f'{out} is up to date')
        matrix = encode_items(model.to(device), tokens, tokenizer.cls, device, autocast, args.micro_tokens)
        if not torch.isfinite(matrix).all():
            raise UserError(f'{args.checkpoint or args.plm}: gives embeddings that are not finite; try --precision float32')
        save_pt(out, 'embeddings', {
            'identity': identity, 'dataset': data.name, 'fingerprint': data.fingerprint, 'source': meta.get('stage', 'published'),
            'plm': meta['plm'], 'hidden': matrix.shape[1], **provenance(), 'items': data.item_ids}, matrix=matrix)
        print(f'{data.n_items:,} items x {matrix.shape[1]}, mean norm {matrix[1:].norm(dim=1).mean():.2f}, written to {out}')


if __name__ == '__main__':
    command(main, parse_args())
