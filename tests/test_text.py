"""Token arrays, packing and masking, by hand. Run: python -m pytest tests/test_text.py"""
import numpy as np
import pytest

from common.text import NAME, VALUE, ItemTokens, load_tokenizer, mask_words, micro_batches, pack, pack_items, tokenize
from tests.toy import wordpiece


@pytest.fixture
def tokenizer(tmp_path):
    wordpiece(tmp_path)
    return load_tokenizer(tmp_path)


def words(tokenizer, ids):
    return tokenizer.convert_ids_to_tokens(list(map(int, ids)))


def test_attribute_is_name_then_value_cut_to_32_at_most_three(tokenizer):
    items = [[('title', 'red tea'), ('brand', ''), ('category', 'sea')], [('title', 'salt ' * 50)],
             [('title', 'red'), ('brand', 'acme'), ('category', 'sea'), ('price', 'blue')], []]
    t = tokenize(items, tokenizer)
    assert words(tokenizer, t.ids[:6]) == ['title', 'red', 'tea', 'brand', 'category', 'sea']
    assert t.types[:6].tolist() == [NAME, VALUE, VALUE, NAME, NAME, VALUE]
    assert np.diff(t.offsets).tolist() == [0, 6, 32, 6, 0], 'item 0 is padding; 32 tokens an attribute; a fourth attribute is dropped'


def test_words_start_where_the_tokenizer_says_and_names_are_words_of_their_own(tokenizer):
    t = tokenize([[('title', 'xy red-tea')]], tokenizer)
    assert words(tokenizer, t.ids) == ['title', 'x', '##y', 'red', '[UNK]', 'tea']
    assert t.starts.tolist() == [True, True, False, True, True, True]


def toy_tokens():
    """Item 1 = 10 11, item 2 = 20, item 3 = nothing, item 4 = 40 41 42."""
    ids = np.array([10, 11, 20, 40, 41, 42], np.int32)
    return ItemTokens(ids, np.full(6, VALUE, np.int8), np.array([1, 0, 1, 1, 0, 1], bool), np.array([0, 0, 2, 3, 3, 6]))


def test_pack_by_hand():
    p = pack(np.array([1, 2, 4, 3, 2, 3]), np.array([0, 3, 5, 5, 6]), toy_tokens(), cls=7)
    assert p.tokens.tolist() == [7, 40, 41, 42, 20, 10, 11, 7, 20, 7, 7], 'newest item first; an item without tokens takes a place'
    assert p.item_positions.tolist() == [0, 1, 1, 1, 2, 3, 3, 0, 1, 0, 0]
    assert p.lengths.tolist() == [7, 2, 1, 1]
    assert p.starts.tolist() == [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]


def test_pack_limits():
    history = np.array([1, 2, 4]), np.array([0, 3])
    assert pack(*history, toy_tokens(), 7, max_items=2).tokens.tolist() == [7, 40, 41, 42, 20]
    assert pack(*history, toy_tokens(), 7, max_tokens=3).tokens.tolist() == [7, 40, 41]
    assert pack_items([2, 4], toy_tokens(), 7).tokens.tolist() == [7, 20, 7, 40, 41, 42]


def test_micro_batches_hold_every_row_once_and_keep_the_limit():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    groups = micro_batches(lengths, 120)
    assert sorted(np.concatenate(groups)) == list(range(200))
    assert all(len(g) == 1 or len(g) * lengths[g].max() <= 120 for g in groups)
    long = micro_batches(np.array([700, 20, 300, 40]), 1050)  # these share no rectangle: their own tokens count
    assert [g.tolist() for g in long] == [[0, 2, 3], [1]]


def test_masking_masks_whole_words_about_15_percent_and_one_at_least():
    rng = np.random.default_rng(0)
    n = 300
    starts = np.r_[True, rng.random(n - 1) < 0.6]
    tokens = ItemTokens(np.arange(100, 100 + n, dtype=np.int32), np.full(n, VALUE, np.int8), starts, np.array([0, 0, n - 3, n]))
    p = pack(np.array([1, 2]), np.array([0, 1, 2]), tokens, 7)
    share, short, changed = [], [], []
    for _ in range(300):
        out, rows = mask_words(p, rng, mask=5, vocabulary=50)
        word = np.cumsum(p.starts)
        assert not (set(word[rows]) & set(np.delete(word, np.r_[rows, 0, n - 2]))), 'a word is masked whole or not at all'
        assert 0 not in rows and n - 2 not in rows, 'CLS is never masked'
        assert (np.delete(out, rows) == np.delete(p.tokens, rows)).all()
        share.append((rows < n - 2).sum() / (n - 3))
        short.append((rows > n - 2).sum())
        changed.append([(out[rows] == 5).mean(), (out[rows] == p.tokens[rows]).mean()])
    assert abs(np.mean(share) - 0.15) < 0.01 and min(short) >= 1
    assert np.abs(np.mean(changed, 0) - [0.8, 0.1]).max() < 0.02
