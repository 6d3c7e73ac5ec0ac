"""What published code computes, as the plainest use of public parts: the baselines of bench.py.

transformers' LongformerModel in float32 on inputs padded to the window; SASRec and BERT4Rec padded
to 50 positions with torch's own layers; logits at every position; ranks by sorting. Only for
timing (python -m tests.tools.bench): nothing is trained with it.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LongformerConfig, LongformerForMaskedLM

PLACES = 50


# ------------------------------------------------------------------------ language model

def longformer(config):
    """A random Longformer of this RecFormer Config's shape."""
    c = config
    return LongformerForMaskedLM(LongformerConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, intermediate_size=c.intermediate,
        attention_window=[c.window] * c.layers, max_position_embeddings=1100, pad_token_id=1))


def padded(packed, window, ids=None):
    """Packed sequences as input_ids, attention_mask, global_attention_mask [B, L], L a multiple of
    the window."""
    longest = -(-packed.lengths.max() // window) * window
    device = torch.get_default_device()
    real = np.arange(longest) < packed.lengths[:, None]
    valid = torch.as_tensor(real, device=device)
    tokens = torch.full(valid.shape, 1)
    tokens[valid] = torch.as_tensor(packed.tokens if ids is None else ids, device=device).long()
    everywhere = torch.zeros_like(tokens)
    everywhere[:, 0] = 1
    return {'input_ids': tokens, 'attention_mask': valid.long(),
            'global_attention_mask': everywhere}


def cls(model, packed):
    inputs = padded(packed, model.config.attention_window[0])
    return model.longformer(**inputs).last_hidden_state[:, 0]


def cosine(a, b):
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.05


def masked_loss(model, packed, ids, chosen):
    """Logits at every position, a cross-entropy that ignores all but the chosen."""
    labels = torch.full((len(packed.tokens),), -100)
    device = labels.device
    wanted = torch.as_tensor(packed.tokens[chosen], device=device).long()
    labels[torch.as_tensor(chosen, device=device)] = wanted
    inputs = padded(packed, model.config.attention_window[0], ids)
    square = torch.full(inputs['input_ids'].shape, -100)
    square[inputs['attention_mask'].bool()] = labels
    logits = model(**inputs).logits.flatten(0, 1)
    return F.cross_entropy(logits, square.flatten(), ignore_index=-100)


def made_up_tokenizer(size):
    """A fast tokenizer of `size` made-up tokens; 3 of 5 begin a word."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    words = {('\u0120' if i % 5 < 3 else '') + f'w{i}': i for i in range(size)}
    made = Tokenizer(models.WordLevel(words, next(iter(words))))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def masked_batch(histories, tokens, rng, tokenizer, mask=3):
    """Histories (lists of item ids) to whole-word-masked inputs, token by token in Python; padding
    is masked like the rest."""
    rows = [[], [], [], []]
    for history in histories:
        ids, types, places = [0], [0], [0]
        for place, item in enumerate(reversed(history), 1):
            for k in range(tokens.offsets[item], tokens.offsets[item + 1]):
                ids.append(int(tokens.ids[k]))
                types.append(int(tokens.types[k]))
                places.append(place)
        for row, values in zip(rows, (ids, types, places)):
            row.append(values)
    longest = -(-max(map(len, rows[0])) // 64) * 64
    for row, fill in zip(rows, (1, 3, 50)):
        for values in row:
            values += [fill] * (longest - len(values))
    for ids in rows[0]:
        words = []
        for k, word in enumerate(tokenizer.convert_ids_to_tokens(i) for i in ids):
            # the byte-level mark of a word's first token
            if words and not word.startswith('\u0120'):
                words[-1].append(k)
            else:
                words.append([k])
        labels, left = [-100] * len(ids), 0.15 * len(ids)
        for word in rng.permutation(len(words)):
            if len(words[word]) <= left:
                left -= len(words[word])
                for k in words[word]:
                    labels[k] = ids[k]
        rows[3].append(labels)
    ids, types, places, labels = map(torch.tensor, rows)
    draw, chosen = torch.rand(ids.shape), labels >= 0
    ids = torch.where(chosen & (draw < 0.8), mask, ids)
    ids = torch.where(chosen & (draw >= 0.9), torch.randint(len(tokenizer), ids.shape), ids)
    return ids, types, places, labels


# ------------------------------------------------------------------------ ID models

def squares(items, offsets):
    """Ragged rows as [B, 50], padded with 0 on the left, newest last."""
    out = np.zeros((len(offsets) - 1, PLACES), np.int64)
    for row, (a, b) in enumerate(zip(offsets[:-1], offsets[1:])):
        kept = items[a:b][-PLACES:]
        out[row, PLACES - len(kept):] = kept
    return torch.as_tensor(out, device=torch.get_default_device())


class SASRec(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.items = nn.Embedding(n + 1, hidden, padding_idx=0)
        self.places = nn.Embedding(PLACES, hidden)
        norm = lambda: nn.LayerNorm(hidden, eps=1e-8)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            'norm': norm(), 'attention': nn.MultiheadAttention(hidden, 1, 0.5), 'norm2': norm(),
            'ffn': nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(0.5), nn.ReLU(),
                                 nn.Linear(hidden, hidden), nn.Dropout(0.5))})
            for _ in range(2))
        self.norm, self.drop = norm(), nn.Dropout(0.5)

    def forward(self, rows):
        """[B, 50] -> states [B, 50, H]."""
        x = self.drop(self.items(rows) * self.items.embedding_dim ** 0.5 + self.places.weight)
        real = (rows > 0)[..., None]
        future = torch.ones(PLACES, PLACES, dtype=torch.bool).triu(1)
        x = x * real
        for b in self.blocks:
            q, k = b['norm'](x).transpose(0, 1), x.transpose(0, 1)
            x = b['norm2']((q + b['attention'](q, k, k, attn_mask=future)[0]).transpose(0, 1))
            x = (x + b['ffn'](x)) * real
        return self.norm(x)

    def loss(self, rows, targets, negatives):
        """One negative a position (negatives [B, 50]), or with None a softmax at every position."""
        x = self(rows)
        if negatives is None:
            logits = (x @ self.items.weight.T).flatten(0, 1)
            return F.cross_entropy(logits, targets.flatten(), ignore_index=0)
        score = lambda ids: (x * self.items(ids)).sum(-1)[targets > 0]
        right, wrong = score(targets), score(negatives)
        return F.binary_cross_entropy_with_logits(right, torch.ones_like(right)) \
            + F.binary_cross_entropy_with_logits(wrong, torch.zeros_like(wrong))

    def logits(self, rows):
        return self(rows)[:, -1] @ self.items.weight.T


class BERT4Rec(nn.Module):
    def __init__(self, n, hidden):
        super().__init__()
        self.items = nn.Embedding(n + 2, hidden, padding_idx=0)
        self.places = nn.Embedding(PLACES, hidden)
        layer = nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.1, 'gelu', batch_first=True,
                                           norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(hidden, n + 1)

    def every(self, rows):
        """[B, 50] -> logits at every position [B, 50, n + 1]."""
        x = self.items(rows) + self.places.weight
        return self.out(self.blocks(x, src_key_padding_mask=rows == 0))

    def loss(self, rows, targets, _):
        return F.cross_entropy(self.every(rows).flatten(0, 1), targets.flatten(), ignore_index=0)

    def logits(self, rows):
        return self.every(rows)[:, -1]


@torch.no_grad()
def ranks(model, rows, targets, negatives, sampled, batch=256):
    """Rank of each target among its 100 negatives, or among all items, by sorting."""
    out = []
    for i in range(0, len(rows), batch):
        scores = model.logits(rows[i:i + batch])
        candidates = torch.cat([targets[i:i + batch, None], negatives[i:i + batch]], 1)
        if sampled:
            out.append((-scores.gather(1, candidates)).argsort(1).argsort(1)[:, 0])
        else:
            out.append((-scores).argsort(1).argsort(1).gather(1, targets[i:i + batch, None])[:, 0])
    return torch.cat(out)
