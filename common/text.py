"""Item texts -> token arrays -> packed batches of histories; whole-word masking.

B = sequences, T = tokens of all sequences one after the other (no padding anywhere), n = items.
Item ids are 1..n as in common/data.py; histories are ragged pairs (items, offsets), oldest first.
"""
from array import array
from contextlib import suppress
from importlib.metadata import version
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np

from common.arrays import offsets_of, ragged, row_numbers
from common.files import UserError, digest, load_npz, save_npz
from common.runs import code_digest

MOST_ATTRIBUTES = 3  # of an item (RecFormer)
MOST_TOKENS = 32     # of an attribute, its name included (RecFormer)
AT_ONCE = 20_000  # items tokenized at a time: memory only


class ItemTokens(NamedTuple):
    """Tokens of all items: item i has ids[offsets[i]:offsets[i + 1]]; item 0 (padding) has none."""
    ids: np.ndarray      # int32 [T]
    types: np.ndarray    # int8 [T], RecFormer's: 1 in a name, 2 in a value
    starts: np.ndarray   # bool [T], first token of a word (attribute names are words of their own)
    offsets: np.ndarray  # int64 [n + 2]

    @property
    def fingerprint(self):
        return digest(*self)


class Packed(NamedTuple):
    """B token sequences, each [CLS] + items newest first, one after the other."""
    tokens: np.ndarray          # int64 [T]
    types: np.ndarray           # int64 [T]
    item_positions: np.ndarray  # int64 [T], 0 for CLS, 1 for the newest item
    starts: np.ndarray          # bool [T], first token of a word; CLS is not part of one
    lengths: np.ndarray         # int64 [B]

    def index(self, sequences):
        """Rows of the tokens of these sequences."""
        begin = offsets_of(self.lengths)
        return ragged(begin[sequences], self.lengths[sequences])

    def rows(self, sequences):
        """These sequences alone."""
        *arrays, lengths = self
        index = self.index(sequences)
        return Packed(*(array[index] for array in arrays), lengths[sequences])


# ------------------------------------------------------------------------ tokens

class Words(NamedTuple):
    """A language model's fast tokenizer, in a form that a checkpoint carries along.

    cls, mask: ids of the token that begins a sequence, and of the one that hides a word.
    """
    text: str
    cls: int
    mask: int

    @property
    def backend(self):
        """The tokenizer itself; making it takes a while."""
        from tokenizers import Tokenizer
        backend = Tokenizer.from_str(self.text)
        backend.enable_truncation(MOST_TOKENS)
        backend.no_padding()
        return backend


def tokenize(attributes, words):
    """Tokens of every item's attributes: the name's, then the value's, cut to 32 together; at most
    three attributes. Equal texts are tokenized once.

    attributes: in the order of the items, of each a list of (name, value) -> ItemTokens.
    """
    ids = array('i')
    types = array('b')
    starts = array('b')
    offsets = array('q', [0, 0])
    items = iter(attributes)
    backend = words.backend
    while some := list(islice(items, AT_ONCE)):
        texts = list({text for pairs in some for pair in pairs for text in pair})
        known = dict(zip(texts, backend.encode_batch(texts, add_special_tokens=False)))
        for pairs in some:
            for pair in pairs[:MOST_ATTRIBUTES]:
                end = len(ids) + MOST_TOKENS
                for kind, text in enumerate(pair, 1):
                    ids.extend(known[text].ids)
                    starts.extend(word_starts(known[text].word_ids))
                    types.extend([kind] * len(known[text]))
                del ids[end:], types[end:], starts[end:]
            offsets.append(len(ids))
    # the arrays' own memory, not copies of it
    return ItemTokens(np.asarray(ids), np.asarray(types), np.asarray(starts).view(bool),
                      np.asarray(offsets))


def word_starts(word_ids):
    """Which tokens begin a word; a token of no word (None) is a word of its own."""
    return [word is None or word != before for before, word in pairwise([None, *word_ids])]


def item_tokens(data, words):
    """ItemTokens of a Dataset. They are kept beside prepared.npz, a file for each tokenizer, until
    the texts or this code are others; not where the folder cannot be written."""
    path = data.folder / f'tokens-{digest(words.text)[:8]}.npz'
    made_from = digest(data.fingerprint, words.text, code_digest('common/text.py'),
                       version('tokenizers'))
    with suppress(UserError, PermissionError):  # none of ours, or another's: they are made now
        *arrays, known = load_npz(path, [*ItemTokens._fields, 'made_from'], '').values()
        if known == made_from:
            return ItemTokens(*arrays)
    tokens = tokenize(data.each('attributes'), words)
    with suppress(OSError):
        save_npz(path, tokens._asdict() | {'made_from': made_from})
    return tokens


def joined(parts):
    """ItemTokens of several datasets as one, their items numbered on from one to the next."""
    *arrays, offsets = zip(*parts)
    lengths = [np.diff(each)[1:] for each in offsets]  # without item 0
    return ItemTokens(*map(np.concatenate, arrays),
                      np.append(0, offsets_of(np.concatenate(lengths))))


# ------------------------------------------------------------------------ packed sequences

def pack(items, offsets, tokens, cls, max_items=50, max_tokens=1024):
    """[CLS] and the newest `max_items` items of each history, newest first, cut to `max_tokens`.

    Both limits are RecFormer's. An empty history is CLS alone. Returns Packed.
    """
    count = np.minimum(np.diff(offsets), max_items)
    position = ragged(1, count)                       # 1 for the newest item
    newest = items[np.repeat(offsets[1:], count) - position]
    start = tokens.offsets[newest]
    lengths = tokens.offsets[newest + 1] - start
    done = offsets_of(lengths)
    begin = done[offsets_of(count)]                   # of each history, CLS not counted
    before = done[:-1] - np.repeat(begin[:-1], count)  # tokens of its newer items
    lengths = np.clip(max_tokens - 1 - before, 0, lengths)
    total = np.minimum(np.diff(begin), max_tokens - 1)
    source = ragged(start, lengths)
    heads = offsets_of(total)[:-1]

    def with_cls(values, value=0):
        return np.insert(values, heads, value).astype(np.int64)
    return Packed(with_cls(tokens.ids[source], cls), with_cls(tokens.types[source]),
                  with_cls(np.repeat(position, lengths)),
                  np.insert(tokens.starts[source], heads, False), total + 1)


# ------------------------------------------------------------------------ masking

def mask_words(packed, rng, mask, vocabulary):
    """Whole-word masking: per sequence random words up to 15 % of its tokens, at least one.

    Of the chosen tokens 80 % become `mask`, 10 % a random token, 10 % stay (BERT). CLS is never
    chosen. Returns (tokens with masks [T], rows of the chosen); labels are packed.tokens[rows].
    """
    real = np.flatnonzero(packed.item_positions)              # rows, without those of CLS
    word = np.cumsum(packed.starts[real]) - 1                 # of each real row
    sequence = row_numbers(packed.lengths)[packed.starts]     # of each word
    # words in random order in each sequence, which leaves `sequence` as it is
    order = np.lexsort((rng.random(len(sequence)), sequence))
    size = np.bincount(word)[order]
    total = packed.lengths - 1
    done = np.cumsum(size) - size - offsets_of(total)[sequence]  # tokens of words drawn before
    chosen = np.zeros(len(order), bool)
    # the half rounds to the nearest
    chosen[order] = (done == 0) | (done + size / 2 <= 0.15 * total[sequence])
    rows = real[chosen[word]]
    tokens = packed.tokens.copy()
    kind = rng.random(len(rows))
    tokens[rows[kind < 0.8]] = mask
    noisy = rows[(kind >= 0.8) & (kind < 0.9)]
    tokens[noisy] = rng.integers(0, vocabulary, len(noisy))
    return tokens, rows
