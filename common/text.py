"""Item texts -> token arrays -> packed batches of histories; whole-word masking.

B = sequences, T = tokens of all sequences one after the other (no padding anywhere), n = items.
Item ids are 1..n as in common/data.py; `histories` are ragged pairs (items, offsets), oldest item first.
"""
from dataclasses import dataclass

import numpy as np

from common.files import UserError, digest

RECTANGLE = 160  # up to this length attention is one rectangle, all tokens against all; a matter of speed only
NAME, VALUE = 1, 2  # token types; 0 is the special token, 3 padding (RecFormer), which packed batches do not need


@dataclass
class ItemTokens:
    """Tokens of all items: item i has ids[offsets[i]:offsets[i + 1]]; item 0 (padding) has none."""
    ids: np.ndarray      # int32 [T]
    types: np.ndarray    # int8 [T], NAME or VALUE
    starts: np.ndarray   # bool [T], first token of a word (attribute names are words of their own)
    offsets: np.ndarray  # int64 [n + 2]

    @property
    def fingerprint(self):
        return digest(self.ids, self.types, self.starts, self.offsets)


@dataclass
class Packed:
    """B token sequences, each [CLS] + items newest first, one after the other."""
    tokens: np.ndarray          # int64 [T]
    types: np.ndarray           # int64 [T]
    item_positions: np.ndarray  # int64 [T], 0 for CLS, 1 for the newest item
    starts: np.ndarray          # bool [T], first token of a word; CLS is not part of one
    lengths: np.ndarray         # int64 [B]

    def index(self, sequences):
        """Rows of the tokens of these sequences."""
        return ragged((np.cumsum(self.lengths) - self.lengths)[sequences], self.lengths[sequences])

    def rows(self, sequences):
        """These sequences alone."""
        i = self.index(sequences)
        return Packed(self.tokens[i], self.types[i], self.item_positions[i], self.starts[i], self.lengths[sequences])


def load_tokenizer(path):
    """The backbone's tokenizer, from a local folder or hub name. Errors: UserError where there is none."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f'--plm {path}: no tokenizer could be loaded ({str(error).splitlines()[0]})') from None
    if not tokenizer.is_fast or tokenizer.mask_token_id is None:
        raise UserError(f'--plm {path}: its tokenizer must be a fast one with a mask token (BERT, RoBERTa, Longformer)')
    tokenizer.cls = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    sample = tokenizer('a B-c', add_special_tokens=False).input_ids
    tokenizer.fingerprint = digest(sorted(tokenizer.get_vocab().items()), sample)
    return tokenizer


def tokenize(attributes, tokenizer, max_attributes=3, max_tokens=32):
    """Tokens of every item's attributes: name then value, cut to 32 together, at most three attributes (RecFormer's limits).

    attributes: for item i at i-1 the list of (name, value). Equal texts are tokenized once.
    """
    kept = [pairs[:max_attributes] for pairs in attributes]
    texts = list(dict.fromkeys(text for pairs in kept for pair in pairs for text in pair if text)) or ['']
    encodings = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False,
                          verbose=False).encodings
    known = {'': ([], [])}
    for text, e in zip(texts, encodings):
        words = [-1 - i if w is None else w for i, w in enumerate(e.word_ids[:max_tokens])]
        known[text] = e.ids[:max_tokens], [i == 0 or w != words[i - 1] for i, w in enumerate(words)]
    ids, types, starts, counts = [], [], [], [0, 0]  # item 0 is empty
    for pairs in kept:
        before = len(ids)
        for name, value in pairs:
            (a, start_a), (b, start_b) = known[name], known[value]
            ids += (a + b)[:max_tokens]
            types += ([NAME] * len(a) + [VALUE] * len(b))[:max_tokens]
            starts += (start_a + start_b)[:max_tokens]
        counts.append(len(ids) - before)
    return ItemTokens(np.array(ids, np.int32), np.array(types, np.int8), np.array(starts, bool), np.cumsum(counts))


def ragged(starts, lengths):
    """Indices starts[0], starts[0] + 1, ... (lengths[0] of them), then starts[1] ..., as one int64 array."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(np.asarray(starts) - ends + lengths, lengths)


def take(items, offsets, rows):
    """The ragged rows `rows` of (items, offsets), as another such pair."""
    lengths = offsets[rows + 1] - offsets[rows]
    return items[ragged(offsets[rows], lengths)], np.concatenate([[0], np.cumsum(lengths)])


def pack(items, offsets, tokens, cls, max_items=50, max_tokens=1024):
    """[CLS] and the newest `max_items` items of each history, newest first, cut to `max_tokens` tokens (RecFormer's limits).

    Returns Packed; an empty history is CLS alone.
    """
    count = np.minimum(np.diff(offsets), max_items)
    rank = ragged(np.zeros(len(count), np.int64), count)              # 0 for the newest item of each history
    newest = items[np.repeat(offsets[1:] - 1, count) - rank]
    lengths = tokens.offsets[newest + 1] - tokens.offsets[newest]
    done = np.concatenate([[0], np.cumsum(lengths)])                  # tokens of all items before this one ...
    before = 1 + done[:-1] - np.repeat(done[np.cumsum(count) - count], count)  # ... of the same history, CLS counted
    lengths = np.clip(max_tokens - before, 0, lengths)
    total = 1 + np.bincount(np.repeat(np.arange(len(count)), count), lengths, len(count)).astype(np.int64)
    begin = np.cumsum(total) - total
    source = ragged(tokens.offsets[newest], lengths)
    place = ragged(np.repeat(begin, count) + before, lengths)
    out = Packed(np.full(total.sum(), cls, np.int64), *(np.zeros(total.sum(), t) for t in (np.int64, np.int64, bool)), total)
    out.tokens[place], out.types[place], out.starts[place] = tokens.ids[source], tokens.types[source], tokens.starts[source]
    out.item_positions[place] = np.repeat(rank + 1, lengths)
    return out


def pack_items(ids, tokens, cls):
    """Each item of `ids` alone, as [CLS] + its tokens with item position 1."""
    return pack(np.asarray(ids), np.arange(len(ids) + 1), tokens, cls)


def micro_batches(lengths, max_tokens):
    """Rows in groups of similar length with at most `max_tokens` tokens (at least one row).

    Where none has more than RECTANGLE tokens they share one rectangle, whose padding is counted.
    lengths [B] -> list of int arrays that together hold each row once.
    """
    order = np.argsort(-lengths, kind='stable')
    groups, begin, done = [], 0, np.cumsum(lengths[order])
    while begin < len(order):
        longest = int(lengths[order[begin]])
        whole = np.searchsorted(done, done[begin] - longest + max_tokens, 'right') - begin
        size = max(1, max_tokens // longest if longest <= RECTANGLE else int(whole))
        groups.append(order[begin:begin + size])
        begin += size
    return groups


def mask_words(packed, rng, mask, vocabulary, share=0.15):
    """Whole-word masking: per sequence words in random order up to 15 % of its tokens, at least one word.

    Of the chosen tokens 80 % become `mask`, 10 % a random token, 10 % stay (BERT). CLS is never chosen.
    Returns (tokens with masks [T], rows of the chosen tokens); the labels are packed.tokens[rows].
    """
    inside = np.ones(len(packed.tokens), bool)
    inside[np.cumsum(packed.lengths) - packed.lengths] = False
    begin = np.flatnonzero(packed.starts)                                       # first row of each word
    if not len(begin):
        return packed.tokens, np.zeros(0, np.int64)
    word = np.cumsum(packed.starts) - 1                                         # word of each row
    size = np.bincount(word[inside], minlength=len(begin))
    sequence = np.repeat(np.arange(len(packed.lengths)), packed.lengths)[begin]
    order = np.lexsort((rng.random(len(begin)), sequence))                      # words in random order in each sequence
    first = np.r_[True, sequence[order][1:] != sequence[order][:-1]]
    done = np.cumsum(size[order]) - size[order]
    done -= np.repeat(done[first], np.diff(np.r_[np.flatnonzero(first), len(order)]))
    budget = share * (packed.lengths - 1)[sequence[order]]
    chosen = np.zeros(len(begin), bool)
    chosen[order] = first | (done + size[order] / 2 <= budget)                  # the half: rounds to the nearest word
    rows = np.flatnonzero(inside & chosen[np.maximum(word, 0)])
    tokens, kind = packed.tokens.copy(), rng.random(len(rows))
    tokens[rows[kind < 0.8]] = mask
    noisy = rows[(kind >= 0.8) & (kind < 0.9)]
    tokens[noisy] = rng.integers(0, vocabulary, len(noisy))
    return tokens, rows
