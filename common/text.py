"""Item texts -> token arrays -> packed batches of histories; whole-word masking.

B = sequences, T = tokens of all sequences one after the other (no padding anywhere), n = items.
Item ids are 1..n as in common/data.py; histories are ragged pairs (items, offsets), oldest first.
"""
from dataclasses import dataclass

import numpy as np

from common.arrays import offsets_of, ragged, row_numbers
from common.files import UserError, digest

NAME, VALUE = 1, 2  # token types; 0 is the special token, 3 padding (RecFormer), unused when packed
MOST_ATTRIBUTES, MOST_TOKENS = 3, 32  # of an item; of an attribute, its name included (RecFormer)
RECTANGLE = 160  # up to this length attention is one rectangle, all against all: speed only
AT_ONCE = 20_000  # items tokenized at a time: memory only


@dataclass
class ItemTokens:
    """Tokens of all items: item i has ids[offsets[i]:offsets[i + 1]]; item 0 (padding) has none."""
    ids: np.ndarray      # int32 [T]
    types: np.ndarray    # int8 [T], NAME or VALUE
    starts: np.ndarray   # bool [T], first token of a word (attribute names are words of their own)
    offsets: np.ndarray  # int64 [n + 2]

    @property
    def n(self):
        return len(self.offsets) - 2

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
        begin = np.cumsum(self.lengths) - self.lengths
        return ragged(begin[sequences], self.lengths[sequences])

    def rows(self, sequences):
        """These sequences alone."""
        i = self.index(sequences)
        return Packed(self.tokens[i], self.types[i], self.item_positions[i], self.starts[i],
                      self.lengths[sequences])


# ------------------------------------------------------------------------ tokens

class Words:
    """A language model's fast tokenizer, in a form that a checkpoint carries along.

    cls, mask: ids of the token that begins a sequence, and of the one that hides a word.
    """

    def __init__(self, text, cls, mask):
        from tokenizers import Tokenizer
        self.text, self.cls, self.mask = text, cls, mask
        self.backend = Tokenizer.from_str(text)
        self.backend.no_truncation()
        self.backend.no_padding()

    def state(self):
        """What a checkpoint keeps: Words(**state) is this tokenizer again."""
        return {'text': self.text, 'cls': self.cls, 'mask': self.mask}

    def encode(self, texts):
        """tokenizers.Encoding of each text, without special tokens."""
        return self.backend.encode_batch(texts, add_special_tokens=False)


def load_words(path):
    """The tokenizer of a language model, from a local folder or hub name. Errors: UserError."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f'--plm {path}: no tokenizer could be loaded ({why})') from None
    cls = tokenizer.cls_token_id
    if cls is None:
        cls = tokenizer.bos_token_id
    if not tokenizer.is_fast or tokenizer.mask_token_id is None or cls is None:
        raise UserError(f'--plm {path}: its tokenizer must be a fast one with a mask token and a cls '
                        'or bos token (BERT, RoBERTa, Longformer)')
    return Words(tokenizer.backend_tokenizer.to_str(), cls, tokenizer.mask_token_id)


def tokenize(attributes, words):
    """Tokens of every item's attributes: the name's, then the value's, cut to 32 together; at most
    three attributes.

    attributes: for item i at i - 1 the list of (name, value) -> ItemTokens.
    """
    parts = []
    for begin in range(0, len(attributes), AT_ONCE):
        parts.append(tokenize_some(attributes[begin:begin + AT_ONCE], words))
    ids, types, starts, counts = (np.concatenate(arrays) for arrays in zip(*parts))
    return ItemTokens(ids, types, starts, offsets_of(np.concatenate([[0], counts])))


def tokenize_some(attributes, words):
    """(ids, types, starts, tokens of each item) of some items; equal texts are tokenized once."""
    kept = [pairs[:MOST_ATTRIBUTES] for pairs in attributes]
    texts = list(dict.fromkeys(text for pairs in kept for pair in pairs for text in pair if text))
    known = {'': ([], [])}
    for text, encoding in zip(texts, words.encode(texts)):
        known[text] = encoding.ids[:MOST_TOKENS], word_starts(encoding.word_ids[:MOST_TOKENS])
    ids, types, starts, counts = [], [], [], []
    for pairs in kept:
        before = len(ids)
        for name, value in pairs:
            (name_ids, name_starts), (value_ids, value_starts) = known[name], known[value]
            ids += (name_ids + value_ids)[:MOST_TOKENS]
            starts += (name_starts + value_starts)[:MOST_TOKENS]
            types += ([NAME] * len(name_ids) + [VALUE] * len(value_ids))[:MOST_TOKENS]
        counts.append(len(ids) - before)
    return (np.array(ids, np.int32), np.array(types, np.int8), np.array(starts, bool),
            np.array(counts, np.int64))


def word_starts(word_ids):
    """Which tokens begin a word; a token of no word (None) is a word of its own."""
    starts, before = [], None
    for word in word_ids:
        starts.append(word is None or word != before)
        before = word
    return starts


# ------------------------------------------------------------------------ packed sequences

def pack(items, offsets, tokens, cls, max_items=50, max_tokens=1024):
    """[CLS] and the newest `max_items` items of each history, newest first, cut to `max_tokens`.

    Both limits are RecFormer's. An empty history is CLS alone. Returns Packed.
    """
    count = np.minimum(np.diff(offsets), max_items)
    age = ragged(np.zeros(len(count), np.int64), count)                # 0 for the newest item
    newest = items[np.repeat(offsets[1:] - 1, count) - age]
    lengths = tokens.offsets[newest + 1] - tokens.offsets[newest]
    done = offsets_of(lengths)                                         # tokens of all items before,
    before = 1 + done[:-1] - np.repeat(done[np.cumsum(count) - count], count)  # of this history
    lengths = np.clip(max_tokens - before, 0, lengths)
    owner = row_numbers(count)
    total = 1 + np.bincount(owner, lengths, len(count)).astype(np.int64)
    begin = np.cumsum(total) - total
    source = ragged(tokens.offsets[newest], lengths)
    place = ragged(begin[owner] + before, lengths)
    size = total.sum()
    out = Packed(np.full(size, cls, np.int64), np.zeros(size, np.int64), np.zeros(size, np.int64),
                 np.zeros(size, bool), total)
    out.tokens[place] = tokens.ids[source]
    out.types[place] = tokens.types[source]
    out.starts[place] = tokens.starts[source]
    out.item_positions[place] = np.repeat(age + 1, lengths)
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
        if longest <= RECTANGLE:
            size = max_tokens // longest
        else:
            size = np.searchsorted(done, done[begin] - longest + max_tokens, 'right') - begin
        size = max(1, int(size))
        groups.append(order[begin:begin + size])
        begin += size
    return groups


# ------------------------------------------------------------------------ masking

def mask_words(packed, rng, mask, vocabulary, share=0.15):
    """Whole-word masking: per sequence words in random order up to 15 % of its tokens, at least one.

    Of the chosen tokens 80 % become `mask`, 10 % a random token, 10 % stay (BERT). CLS is never
    chosen. Returns (tokens with masks [T], rows of the chosen); labels are packed.tokens[rows].
    """
    first_rows = np.flatnonzero(packed.starts)                   # of each word
    if not len(first_rows):
        return packed.tokens, np.zeros(0, np.int64)
    inside = np.ones(len(packed.tokens), bool)
    inside[np.cumsum(packed.lengths) - packed.lengths] = False   # CLS
    word = np.cumsum(packed.starts) - 1                          # of each row
    size = np.bincount(word[inside], minlength=len(first_rows))
    sequence = row_numbers(packed.lengths)[first_rows]
    order = np.lexsort((rng.random(len(first_rows)), sequence))  # random in each sequence
    size, sequence = size[order], sequence[order]
    first = np.r_[True, sequence[1:] != sequence[:-1]]           # first word drawn of a sequence
    done = np.cumsum(size) - size
    done -= np.repeat(done[first], np.diff(np.r_[np.flatnonzero(first), len(order)]))
    budget = share * (packed.lengths - 1)[sequence]
    chosen = np.zeros(len(first_rows), bool)
    chosen[order] = first | (done + size / 2 <= budget)          # the half rounds to the nearest
    rows = np.flatnonzero(inside & chosen[np.maximum(word, 0)])
    tokens, kind = packed.tokens.copy(), rng.random(len(rows))
    tokens[rows[kind < 0.8]] = mask
    noisy = rows[(kind >= 0.8) & (kind < 0.9)]
    tokens[noisy] = rng.integers(0, vocabulary, len(noisy))
    return tokens, rows
