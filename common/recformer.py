"""RecFormer: a Longformer with token-type and item-position embeddings, computed without padding.

Li et al., "Text Is All You Need" (2023), on Beltagy et al., "Longformer" (2020). B = sequences, T = their tokens one after
the other, L = longest sequence, H = hidden size, h = heads, d = H / h. Modules are named as transformers' Longformer
names its tensors, so published state dicts load by name. What saves time, without changing a result beyond rounding:
- linear layers see the T real tokens; only attention is laid out in padded blocks (class Batch);
- the one global query (CLS): its scores are (Wk' q) . x and its value is Wv (sum of a x), so the global key and value
  projections of all tokens are never computed;
- only rows that are asked for (CLS, or masked tokens) leave the last layer.
"""
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.files import UserError, load_pt, save_pt, sha256
from common.layers import additive, attend, dropout, half, remade
from common.sources import fetch_plm
from common.text import RECTANGLE, micro_batches, pack_items, ragged

BLOCK = 64   # queries per block of the windowed attention; a matter of speed only
SIZES = (64, 128, 256, 512)  # lengths up to which sequences share a rectangle; a matter of speed only


@dataclass
class Config:
    """Shape of the model; everything but the last three comes from the backbone."""
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    positions: int           # rows of the position table
    position_offset: int     # row of the first token: pad id + 1 = 2 (RoBERTa, Longformer), 0 (BERT)
    layer_norm_eps: float
    dropout: float
    window: int = 64         # RecFormer: 32 tokens to each side
    max_items: int = 50      # RecFormer
    max_tokens: int = 1024   # RecFormer


class Batch:
    """Tensors of packed sequences (text.Packed) and the layout of their attention, the same for every layer.

    Windowed attention: N blocks of Q queries against K keys. `queries` [N, Q] and `keys` [N, K] are rows of the packed
    tokens, `mask` [N, 1, Q, K] is 0 where a query attends, else -inf, `place` [T] finds token t in the blocks' outputs [N * Q].
    Every query attends the CLS of its sequence (column 0) and, as distances allow, window / 2 tokens to each side.
    Global attention: `groups` of sequences of similar length, of each the rows and which are real, both [b, L]; `grouped`
    [B] are the sequences in the groups' order, `order` [B] the way back.
    """

    def __init__(self, packed, window, device):
        lengths, side = packed.lengths, window // 2
        begin, longest = np.cumsum(lengths) - lengths, int(lengths.max())
        position = ragged(np.zeros(len(lengths), np.int64), lengths)
        columns = np.arange(longest)
        put = lambda x: torch.from_numpy(np.ascontiguousarray(x)).to(device, non_blocking=True)
        size = np.searchsorted(SIZES, lengths)
        grouped, self.groups = np.argsort(size, kind='stable'), []
        self.grouped, self.order = put(grouped), put(np.argsort(grouped))
        for i in np.unique(size):
            valid = columns[:lengths[size == i].max()] < lengths[size == i, None]
            self.groups.append((put(begin[size == i, None] + np.where(valid, columns[:valid.shape[1]], 0)), put(valid)))
        if longest <= RECTANGLE:
            valid = columns < lengths[:, None]
            padded = begin[:, None] + np.where(valid, columns, 0)
            queries = keys = padded
            mask = ((np.abs(columns[:, None] - columns) <= side) | (columns == 0)) & valid[:, None]
            place = np.repeat(np.arange(len(lengths)) * longest, lengths) + position
        else:
            blocks = -(-lengths // BLOCK)                                     # per sequence
            owner = np.repeat(np.arange(len(lengths)), blocks)
            q = ragged(np.zeros(len(lengths), np.int64), blocks)[:, None] * BLOCK + np.arange(BLOCK)
            k = q[:, :1] + np.arange(-side, BLOCK + side)
            known = (k >= 1) & (k < lengths[owner, None])
            near = (np.abs(np.arange(BLOCK)[:, None] + side - np.arange(BLOCK + 2 * side)) <= side) & known[:, None]
            mask = np.concatenate([np.ones((*near.shape[:2], 1), bool), near], 2)
            start = begin[owner, None]
            queries = start + np.where(q < lengths[owner, None], q, 0)
            keys = np.concatenate([start, start + np.where(known, k, 0)], 1)
            place = np.repeat((np.cumsum(blocks) - blocks) * BLOCK, lengths) + position
        self.tokens, self.types = put(packed.tokens), put(packed.types)
        self.item_positions, self.positions = put(packed.item_positions), put(position)
        self.cls, self.longest = put(begin), longest
        self.queries, self.keys, self.place = put(queries), put(keys), put(place)
        self.mask = additive(mask[:, None], device)


def rows(x, index):
    """x[index] along the first axis; embedding's backward is several times faster on a CPU than indexing's."""
    return F.embedding(index, x)


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        for name in ('query', 'key', 'value', 'query_global', 'key_global', 'value_global'):
            setattr(self, name, nn.Linear(c.hidden, c.hidden))

    def forward(self, x, batch):
        """Windowed attention of all tokens, but global attention of each CLS: [T, H] -> [T, H]."""
        return remade(self.mix, x, self.query(x), self.key(x), self.value(x), batch)

    def mix(self, x, q, k, v, batch):
        return self.local(q, k, v, batch).index_copy(0, batch.cls, self.global_(x, batch).to(x.dtype))

    def local(self, q, k, v, batch):
        """Windowed attention, with a CLS as any other token: [T, H]. Weights get no dropout (README, differences)."""
        split = lambda y, index: rows(y, index).unflatten(2, (self.heads, -1)).transpose(1, 2)   # [N, h, Q|K, d]
        y = attend(split(q, batch.queries), split(k, batch.keys), split(v, batch.keys), batch.mask)
        return rows(y.transpose(1, 2).flatten(2).flatten(0, 1), batch.place)

    def global_(self, x, batch, weights=False):
        """Attention of each sequence's CLS over all its tokens: [B, H] (with `weights`, the weights [B, h, L])."""
        b, h = len(batch.cls), self.heads
        q = self.query_global(rows(x, batch.cls)).view(b, h, -1)                           # [B, h, d]
        by_head = lambda w: w.view(h, -1, w.shape[1])                                      # [h, d, H]
        # the key's bias adds the same to every score of a head, so it drops out of the softmax
        qk = torch.einsum('bhd,hdk->bhk', q, by_head(self.key_global.weight)) / q.shape[-1] ** 0.5
        found = []
        for qk_, (index, valid) in zip(qk[batch.grouped].split([len(v) for _, v in batch.groups]), batch.groups):
            padded = rows(x, index)                                                        # [b, L, H]
            scores = torch.bmm(qk_, padded.transpose(1, 2)).float()                        # [b, h, L]
            a = scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
            found.append(F.pad(a, (0, batch.longest - a.shape[2])) if weights else torch.bmm(a.to(padded.dtype), padded))
        mixed = torch.cat(found)[batch.order]                                              # [B, h, H]
        if weights:
            return mixed
        out = torch.einsum('bhk,hdk->bhd', mixed, by_head(self.value_global.weight)).reshape(b, -1)
        return out + self.value_global.bias.to(out.dtype)


class Output(nn.Module):
    """Linear (the layer applies it), dropout, residual, LayerNorm."""

    def __init__(self, inside, c):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(inside, c.hidden), nn.LayerNorm(c.hidden, c.layer_norm_eps)
        self.dropout = c.dropout

    def forward(self, y, x):
        return self.LayerNorm(dropout(y, self.dropout, self.training) + x)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self, self.output = SelfAttention(c), Output(c.hidden, c)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention, self.output = Attention(c), Output(c.intermediate, c)
        self.intermediate = nn.ModuleDict({'dense': nn.Linear(c.hidden, c.intermediate)})

    def forward(self, x, batch, last=None):
        """[T, H] -> [T, H]; with `last`, only what is asked for leaves: 'cls' -> [B, H], or row numbers [R] -> [R, H]."""
        attention, h = self.attention.self, half(x)
        if isinstance(last, str):
            y, x = attention.global_(h, batch), rows(x, batch.cls)
        else:
            y = attention(h, batch)
            if last is not None:
                y, x = rows(y, last), rows(x, last)
        x = self.attention.output(self.attention.output.dense(y), x)
        return self.output(remade(lambda h: self.output.dense(F.gelu(h)), self.intermediate.dense(x)), x)


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden)
        self.position_embeddings = nn.Embedding(c.positions, c.hidden)
        self.token_type_embeddings = nn.Embedding(4, c.hidden)                     # special, name, value, padding
        self.item_position_embeddings = nn.Embedding(c.max_items + 1, c.hidden)    # 0 is CLS
        self.LayerNorm = nn.LayerNorm(c.hidden, c.layer_norm_eps)
        self.offset, self.dropout = c.position_offset, c.dropout

    def forward(self, batch):
        x = self.word_embeddings(batch.tokens) + self.position_embeddings(batch.positions + self.offset) \
            + self.token_type_embeddings(batch.types) + self.item_position_embeddings(batch.item_positions)
        return dropout(self.LayerNorm(x), self.dropout, self.training)


class RecFormer(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.longformer = nn.ModuleDict({'embeddings': Embeddings(c), 'encoder': nn.ModuleDict(
            {'layer': nn.ModuleList(Layer(c) for _ in range(c.layers))})})
        self.lm_head = nn.ModuleDict({'dense': nn.Linear(c.hidden, c.hidden),
                                      'layer_norm': nn.LayerNorm(c.hidden, c.layer_norm_eps)})
        self.lm_head.register_parameter('bias', nn.Parameter(torch.zeros(c.vocab_size)))

    @property
    def layers(self):
        return self.longformer.encoder.layer

    def forward(self, batch, last='cls'):
        """Last layer's states: of each CLS [B, H]; of the row numbers `last` [R, H]; of all tokens [T, H] with last=None."""
        x = half(self.longformer.embeddings(batch))
        for layer in self.layers[:-1]:
            x = layer(x, batch)
        return self.layers[-1](x, batch, last)

    def mlm_logits(self, states):
        """[R, H] -> [R, vocabulary]; the output table is the word table."""
        x = self.lm_head.layer_norm(F.gelu(self.lm_head.dense(states)))
        return F.linear(x, self.longformer.embeddings.word_embeddings.weight, self.lm_head.bias)

    @torch.no_grad()
    def cls_attention(self, batch):
        """Attention weights of CLS in every layer: [layers, B, h, L]."""
        x, found = self.longformer.embeddings(batch), []
        for layer in self.layers:
            found.append(layer.attention.self.global_(x, batch, weights=True))
            x = layer(x, batch)
        return torch.stack(found)


def cosine_logits(states, table, temperature=0.05):
    """RecFormer's score: cosine / 0.05 of states [B, H] with table rows [n, H] -> float32 [B, n]."""
    table = table.float()
    return F.linear(F.normalize(states.float(), dim=-1), table) / (temperature * table.norm(dim=-1)).clamp_min(1e-12)


@torch.no_grad()
def encode_items(model, tokens, cls, device, autocast, micro_tokens):
    """Embeddings of all items: float32 [n + 1, H] on the CPU, row 0 zeros. Leaves the model's mode as it found it."""
    training = model.training
    model.eval()
    n = len(tokens.offsets) - 2
    matrix = torch.zeros(n + 1, model.config.hidden)
    groups = micro_batches(1 + np.diff(tokens.offsets)[1:], micro_tokens)
    for group in tqdm(groups, desc='encode items', unit='batch', leave=False):
        with autocast():
            matrix[group + 1] = model(Batch(pack_items(group + 1, tokens, cls), model.config.window, device)).float().cpu()
    model.train(training)
    return matrix


# ---------------------------------------------------------------------------- weights

def from_backbone(path, layers=None):
    """RecFormer with a BERT-, RoBERTa- or Longformer-like encoder's weights (local folder or hub name), its first `layers`.

    Where the backbone has no global projections they are copies of its own, and a short position table is tiled up to
    1,024 tokens (as Longformer was made from RoBERTa); the token-type rows are copies of its row 0; the item-position
    table is N(0, 0.02). The MLM head is the backbone's where it has one, else identity and the word table.
    """
    from transformers import AutoModelForMaskedLM
    from transformers.utils import logging
    logging.set_verbosity_error()  # its report of unused pooler weights; the names are accounted for below
    try:
        backbone, info = AutoModelForMaskedLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # transformers and torch raise many kinds for a missing, damaged or foreign file
        why = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f'--plm {path}: no language model could be loaded ({why})') from None
    b, prefix = backbone.config, f'{backbone.base_model_prefix}.'
    if b.model_type not in ('bert', 'roberta', 'longformer'):
        raise UserError(f'--plm {path}: is a {b.model_type}; a BERT-, RoBERTa- or Longformer-like encoder is needed')
    lost = [k for k in info['missing_keys'] if k.startswith(prefix) and 'pooler' not in k]
    if lost:  # transformers would go on with random weights
        raise UserError(f'--plm {path}: its weights lack {len(lost)} tensors, the first {lost[0]}')
    if layers is not None and not 1 <= layers <= b.num_hidden_layers:
        raise UserError(f'--layers {layers}: the model has {b.num_hidden_layers}')
    offset = 0 if b.model_type == 'bert' else b.pad_token_id + 1
    c = Config(b.vocab_size, b.hidden_size, layers or b.num_hidden_layers, b.num_attention_heads, b.intermediate_size,
               max(b.max_position_embeddings, offset + Config.max_tokens), offset, b.layer_norm_eps, b.hidden_dropout_prob)
    given = {k.replace(prefix, 'longformer.', 1): v for k, v in backbone.state_dict().items()}
    heads = {'cls.predictions.transform.dense.': 'lm_head.dense.', 'cls.predictions.bias': 'lm_head.bias',
             'cls.predictions.transform.LayerNorm.': 'lm_head.layer_norm.'}
    for old, new in heads.items():
        given = {k.replace(old, new): v for k, v in given.items()}
    for key in [k for k in given if '.attention.self.' in k and '_global' not in k]:
        name = key.rsplit('.', 1)
        given.setdefault(f'{name[0]}_global.{name[1]}', given[key])
    table = given['longformer.embeddings.position_embeddings.weight']
    usable, missing = table[offset:], c.positions - len(table)
    given['longformer.embeddings.position_embeddings.weight'] = torch.cat(
        [table] + [usable] * (-(-missing // len(usable))))[:c.positions]
    types = 'longformer.embeddings.token_type_embeddings.weight'
    given[types] = given[types][:1].repeat(4, 1)
    given['longformer.embeddings.item_position_embeddings.weight'] = torch.randn(c.max_items + 1, c.hidden) * 0.02
    if any('lm_head' in k or 'cls.predictions.transform' in k for k in info['missing_keys']):
        given |= {'lm_head.dense.weight': torch.eye(c.hidden), 'lm_head.dense.bias': torch.zeros(c.hidden),
                  'lm_head.layer_norm.weight': torch.ones(c.hidden), 'lm_head.layer_norm.bias': torch.zeros(c.hidden),
                  'lm_head.bias': torch.zeros(c.vocab_size)}
    model = RecFormer(c)
    beyond = tuple(f'longformer.encoder.layer.{i}.' for i in range(c.layers, b.num_hidden_layers))
    load_named(model, given, path, also_dropped=beyond)
    return model


# in published files, and not part of the model: buffers, tables of items, the output table tied to the word table
DROPPED = ('longformer.embeddings.position_ids', 'longformer.embeddings.token_type_ids', 'longformer.pooler.',
           'item_embedding.weight', 'lm_head.decoder.', 'cls.')


def load_named(model, state, source, also_dropped=()):
    """Load a state dict of published names; UserError unless every name is loaded or known to be dropped."""
    own = model.state_dict()
    unknown = [k for k in state if k not in own and not k.startswith(DROPPED + also_dropped)]
    missing = [k for k in own if k not in state]
    wrong = [f'{k} {list(state[k].shape)}, not {list(own[k].shape)}' for k in own
             if k in state and own[k].shape != state[k].shape]
    for what, names in (('unknown', unknown), ('missing', missing), ('of another shape', wrong)):
        if names:
            raise UserError(f'{source}: {len(names)} tensors {what}, the first {names[0]}; it is of another model')
    model.load_state_dict({k: state[k] for k in own})


def lf_untouched(model):
    """The vanilla model (LF): the added item-position table is random before training, so it is switched off."""
    with torch.no_grad():
        model.longformer.embeddings.item_position_embeddings.weight.zero_()
    return model


def save_model(path, model, meta, **more):
    """Checkpoint of kind 'recformer': weights, and a meta that says shape, backbone, tokenizer and what made it."""
    save_pt(path, 'recformer', {'config': asdict(model.config), **meta}, model=model.state_dict(), **more)


def load_model(path, plm=None):
    """(model, meta) of a checkpoint that these scripts wrote, or of a published RecFormer state dict (needs `plm`)."""
    try:
        raw = torch.load(path, map_location='cpu', weights_only=True)
    except Exception:
        raw = None  # load_pt says what is wrong with it
    if isinstance(raw, dict) and 'meta' not in raw and any(k.startswith('longformer.') for k in raw):
        if plm is None:
            raise UserError(f'{path}: a published state dict does not name its backbone: add --plm longformer (or yours)')
        model = from_backbone(fetch_plm(plm))
        load_named(model, raw, path)
        return model, {'plm': plm, 'identity': {'file': sha256(path)}}
    content = load_pt(path, 'recformer')
    meta = content['meta']
    if plm not in (None, meta['plm']):
        raise UserError(f'{path}: was made with --plm {meta["plm"]}, not {plm}: leave --plm out')
    model = RecFormer(Config(**meta['config']))
    load_named(model, content['model'], path)
    return model, meta
