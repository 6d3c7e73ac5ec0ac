"""Made-up data and language models for the tests: seconds on a CPU, no download."""
import gzip
import json
from types import SimpleNamespace

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM, LongformerConfig, LongformerForMaskedLM, PreTrainedTokenizerFast

from common import report
from common.files import runs_root

WORDS = ('red green blue salt sugar tea coffee bread fine coarse large small pack box bag of the ounce organic sea '
         'title brand category acme zenith').split()

ANY_MODEL = SimpleNamespace(vocab_size=10 ** 6, position_offset=0)  # a Config that every tokenizer fits


def canonical(folder, users=40, items=30, seed=0, length=(4, 9)):
    """data/<name>/ with users who walk through the items in order from a random start: something to learn."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    rows = ['user,item,timestamp']
    for u in range(users):
        start = rng.integers(items)
        rows += [f'u{u},i{(start + k) % items},{1000 + k}' for k in range(rng.integers(*length))]
    (folder / 'interactions.csv').write_text('\n'.join(rows) + '\n')
    text = lambda n: ' '.join(rng.choice(WORDS, n))
    (folder / 'items.jsonl').write_text(''.join(json.dumps(
        {'id': f'i{i}', 'title': text(4), 'brand': text(1), 'category': text(2)}) + '\n' for i in range(items)))


def wordpiece(folder):
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'] + WORDS + list('abcdefghijklmnopqrstuvwxyz0123456789') \
        + ['##' + c for c in 'abcdefghijklmnopqrstuvwxyz0123456789']
    t = Tokenizer(models.WordPiece({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token='[UNK]'))
    t.normalizer, t.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=t, pad_token='[PAD]', unk_token='[UNK]',
                                   cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')
    fast.save_pretrained(folder)
    return fast


def tiny_bert(folder, layers=2):
    """A random BERT with a WordPiece tokenizer, saved as transformers saves them."""
    fast = wordpiece(folder)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=len(fast), hidden_size=16, num_hidden_layers=layers, num_attention_heads=2,
                               intermediate_size=24, max_position_embeddings=64)).save_pretrained(folder)
    return folder


def tiny_longformer(folder, binary=False, **sizes):
    """A random Longformer with a byte-level BPE tokenizer; as model.safetensors or as pytorch_model.bin."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(WORDS * 5, vocab_size=400,
                            special_tokens=['<s>', '<pad>', '</s>', '<unk>', '<mask>'])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token='<s>',
                                   eos_token='</s>', pad_token='<pad>',
                                   unk_token='<unk>', cls_token='<s>', sep_token='</s>', mask_token='<mask>')
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model = longformer(**{'window': 64, 'vocab': len(fast)} | sizes)
    model.save_pretrained(folder)
    if binary:
        (folder / 'model.safetensors').unlink()
        torch.save(model.state_dict(), folder / 'pytorch_model.bin')
    return folder


def longformer(window, vocab=100, layers=2, hidden=16, heads=2, inner=24):
    config = LongformerConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers,
                              num_attention_heads=heads, intermediate_size=inner,
                              max_position_embeddings=1100, attention_window=[window] * layers,
                              pad_token_id=1, type_vocab_size=1)
    model = LongformerForMaskedLM(config).eval()
    with torch.no_grad():  # LayerNorms and biases too: nothing may stay at a value that hides a mistake
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def amazon(raw, category, users=60, items=30, quirks=True, seed=0):
    """<Category>.csv and meta_<Category>.json.gz with the source's quirks."""
    rng = np.random.default_rng(seed)
    raw.mkdir(parents=True, exist_ok=True)
    rows = []
    for u in range(users):
        start = rng.integers(items)
        rows += [f'A{(start + k) % items:04},U{u},{rng.integers(1, 6)}.0,'
                 f'{1400000000 + 86400 * (k // 2)}' for k in range(rng.integers(5, 10))]
    meta = [json.dumps({'asin': f'A{i:04}', 'title': f'{" ".join(rng.choice(WORDS, 3))}',
                        'brand': 'Acme', 'category': ['Sea', 'Salt']}) for i in range(items)]
    if quirks:
        # a repeat; a user with one rating; an item without metadata
        rows += [rows[0], 'A0000,short,5.0,1400000000', 'B9999,U0,5.0,1400000000',
                 'B9999,U1,5.0,1400000000']
        meta[1] = json.dumps({'asin': 'A0001'})
        meta[2] = json.dumps({'asin': 'A0002', 'title': 'Tea &amp; <b>Coffee</b>', 'brand': None, 'category': []})
        meta[3] = json.dumps({'asin': 'A0003', 'title': 'var x = new Date().getTime(); <span id="a">', 'brand': 'Z'})
        meta += [json.dumps({'asin': 'A0004', 'title': 'second line of the same id'}),
                 json.dumps({'asin': 'C0000', 'title': 'never rated'})]
    (raw / f'{category}.csv').write_text('\n'.join(rows) + '\n')
    with gzip.open(raw / f'meta_{category}.json.gz', 'wt') as f:
        f.write('\n'.join(meta) + '\n')


def metrics_for_ranks(monkeypatch):
    """From here on a Cell takes rows that have no ranks on disk at their word: each user has the
    metrics that the row says."""
    real = report.Cell.by_user

    def by_user(cell, ranking, metric=report.SHOWN):
        folders = [runs_root() / row['dataset'] / row['run'] for row in cell.rows]
        if any((folder / 'ranks.npz').exists() for folder in folders):
            return real(cell, ranking, metric)
        return np.array([[row['metrics'][ranking][metric]] * row['users'] for row in cell.rows])
    monkeypatch.setattr(report.Cell, 'by_user', by_user)
