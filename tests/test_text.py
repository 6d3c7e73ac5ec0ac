"""Tokenizers, token arrays, packing and masking, by hand.

Run: python -m pytest tests/test_text.py
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from common import text
from common.backbone import load_words
from common.files import UserError, load_pt, save_pt
from common.text import (ItemTokens, Packed, Words, item_tokens, joined, mask_words,
                         pack, tokenize)
from tests.toy import ANY_MODEL, wordpiece

NAME, VALUE = 1, 2  # types of tokens


@pytest.fixture
def words(tmp_path):
    wordpiece(tmp_path)
    return load_words(tmp_path, ANY_MODEL)


def spelled(words, ids):
    return [words.backend.id_to_token(int(i)) for i in ids]


# ------------------------------------------------------------------------ tokenizers

def test_a_tokenizer_goes_through_a_checkpoint(words, tmp_path):
    assert spelled(words, [words.cls, words.mask]) == ['[CLS]', '[MASK]']
    save_pt(tmp_path / 'x.pt', 'toy', words=words._asdict())
    again = Words(**load_pt(tmp_path / 'x.pt', 'toy')['words'])
    assert again == words
    items = [[('title', 'red tea, xy'), ('brand', 'acme')]]
    assert tokenize(items, again).fingerprint == tokenize(items, words).fingerprint


def test_truncation_and_padding_of_the_tokenizer_are_off(words):
    backend = Tokenizer.from_str(words.text)
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    again = Words(backend.to_str(), words.cls, words.mask)
    tokens = tokenize([[('red green blue', 'tea')]], again)
    assert spelled(again, tokens.ids) == ['red', 'green', 'blue', 'tea']


def test_no_special_tokens_are_added(words):
    assert spelled(words, tokenize([[('red', 'tea')]], words).ids) == ['red', 'tea']


def test_a_bos_token_serves_where_there_is_no_cls(tmp_path):
    fast = wordpiece(tmp_path)
    fast.cls_token, fast.bos_token = None, '[SEP]'
    fast.save_pretrained(tmp_path / 'bos')
    assert load_words(tmp_path / 'bos', ANY_MODEL).cls == fast.convert_tokens_to_ids('[SEP]')


def test_what_is_no_tokenizer_for_this_is_refused(tmp_path):
    with pytest.raises(UserError, match='no language model could be loaded .AutoTokenizer'):
        load_words(tmp_path / 'nothing', ANY_MODEL)
    fast = wordpiece(tmp_path)
    fast.mask_token = None
    fast.save_pretrained(tmp_path / 'maskless')
    with pytest.raises(UserError, match='a mask and a cls or bos token'):
        load_words(tmp_path / 'maskless', ANY_MODEL)


# ------------------------------------------------------------------------ items -> tokens

def test_attribute_is_name_then_value_cut_to_32_at_most_three(words):
    items = [[('title', 'red tea'), ('brand', ''), ('category', 'sea')],
             [('title', 'salt ' * 50)],
             [('title', 'red'), ('brand', 'acme'), ('category', 'sea'), ('price', 'blue')],
             []]
    t = tokenize(items, words)
    assert spelled(words, t.ids[:6]) == ['title', 'red', 'tea', 'brand', 'category', 'sea']
    assert t.types[:6].tolist() == [NAME, VALUE, VALUE, NAME, NAME, VALUE]
    sizes = np.diff(t.offsets).tolist()
    assert sizes == [0, 6, 32, 6, 0], 'item 0 is padding; 32 an attribute; no fourth attribute'
    assert n_items(t) == 4
    assert (t.ids.dtype, t.types.dtype, t.starts.dtype) == (np.int32, np.int8, bool)


def test_words_start_where_the_tokenizer_says_and_names_are_words_of_their_own(words):
    t = tokenize([[('title', 'xy red-tea')]], words)
    assert spelled(words, t.ids) == ['title', 'x', '##y', 'red', '[UNK]', 'tea']
    assert t.starts.tolist() == [True, True, False, True, True, True]
    assert text.word_starts([0, 0, 1, None, None, 2, 1]) == [True, False] + [True] * 5


def test_a_name_of_32_tokens_leaves_no_place_for_a_value(words):
    t = tokenize([[('red ' * 40, 'tea')]], words)
    assert spelled(words, t.ids) == ['red'] * 32 and set(t.types) == {NAME}


def test_pieces_change_nothing(words, monkeypatch):
    rng = np.random.default_rng(0)
    items = []
    for i in range(25):
        sizes = rng.integers(0, 9, 3)
        some = [' '.join(rng.choice(['red', 'tea', 'xyz', 'salt'], n)) for n in sizes]
        items.append(list(zip(('title', 'brand', 'category'), some)))
    whole = tokenize(items, words)
    monkeypatch.setattr(text, 'AT_ONCE', 7)
    parts = tokenize(items, words)
    assert parts.fingerprint == whole.fingerprint and n_items(parts) == 25


def test_fingerprint_sees_every_array(words):
    make = lambda: tokenize([[('title', 'xy tea')], [('brand', 'acme')]], words)
    found = {make().fingerprint}
    for name in ItemTokens._fields:
        changed = make()
        array = getattr(changed, name)
        array[1] = not array[1] if name == 'starts' else array[1] + 1
        found.add(changed.fingerprint)
    assert len(found) == 5 and make().fingerprint in found


# ------------------------------------------------------------------------ kept tokens

ITEMS = [[('title', 'red tea'), ('brand', 'acme')], [], [('title', 'xy salt')]]


def dataset(folder, items=ITEMS, fingerprint='one'):
    """What item_tokens asks of a Dataset; `read` counts how often its texts were."""
    data = SimpleNamespace(folder=folder, fingerprint=fingerprint, read=0)

    def each(name):
        assert name == 'attributes'
        data.read += 1
        yield from items
    data.each = each
    return data


def n_items(tokens):
    return len(tokens.offsets) - 2


def same_tokens(a, b):
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b))


def test_tokens_are_made_once_for_a_dataset_and_a_tokenizer(words, tmp_path):
    data, other = dataset(tmp_path / 'data'), Words(words.text + ' ', words.cls, words.mask)
    first, again = item_tokens(data, words), item_tokens(data, words)
    assert data.read == 1 and n_items(first) == 3
    assert same_tokens(first, again) and same_tokens(first, tokenize(ITEMS, words))
    assert first.fingerprint == again.fingerprint == tokenize(ITEMS, words).fingerprint
    [file] = (tmp_path / 'data').iterdir()
    item_tokens(data, other)
    assert data.read == 2 and len(list((tmp_path / 'data').iterdir())) == 2
    item_tokens(data, words)
    assert data.read == 2, 'both are kept'


def test_kept_tokens_that_may_not_be_read_are_made_again(words, tmp_path, monkeypatch):
    """Of a colleague's, in a shared folder; a preparation that may not be read is an error."""
    data = dataset(tmp_path)
    first = item_tokens(data, words)

    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(np, 'load', refuse)
    assert same_tokens(first, item_tokens(data, words)) and data.read == 2


def test_kept_tokens_of_other_texts_code_or_library_are_made_again(words, tmp_path, monkeypatch):
    item_tokens(dataset(tmp_path), words)
    changed = dataset(tmp_path, ITEMS[:2], 'two')
    assert n_items(item_tokens(changed, words)) == 2 and changed.read == 1
    for name, value in (('code_digest', 'other'), ('version', '0.0')):
        monkeypatch.setattr(text, name, lambda _: value)
        item_tokens(changed, words)
    assert changed.read == 3 and len(list(tmp_path.glob('tokens-*'))) == 1
    item_tokens(changed, words)
    assert changed.read == 3


def test_damaged_or_unwritable_tokens_are_made_again_in_silence(words, tmp_path, capfd):
    data = dataset(tmp_path / 'data')
    item_tokens(data, words)
    [file] = (tmp_path / 'data').iterdir()
    cut, pickled = file.read_bytes()[:-60], {**np.load(file), 'ids': np.array([print], object)}
    file.write_bytes(cut)
    assert n_items(item_tokens(data, words)) == 3 and data.read == 2
    item_tokens(data, words)
    assert data.read == 2, 'the damaged file was replaced'
    np.savez(file, **pickled)
    assert item_tokens(data, words).ids.dtype == np.int32 and data.read == 3
    (tmp_path / 'blocked').write_text('a file where a folder should be')
    unwritable = dataset(tmp_path / 'blocked' / 'data')
    assert n_items(item_tokens(unwritable, words)) == n_items(item_tokens(unwritable, words)) == 3
    assert unwritable.read == 2 and capfd.readouterr() == ('', '')


def test_joined_tokens_are_those_of_all_items(words):
    parts = [tokenize(items, words) for items in (ITEMS, ITEMS[1:2], ITEMS[:1])]
    assert same_tokens(joined(parts), tokenize(ITEMS + ITEMS[1:2] + ITEMS[:1], words))
    assert same_tokens(joined(parts[:1]), parts[0])


# ------------------------------------------------------------------------ packing

def toy_tokens():
    """Item 1 = 10 11, item 2 = 20, item 3 = nothing, item 4 = 40 41 42."""
    ids = np.array([10, 11, 20, 40, 41, 42], np.int32)
    starts = np.array([1, 0, 1, 1, 0, 1], bool)
    return ItemTokens(ids, np.full(6, VALUE, np.int8), starts, np.array([0, 0, 2, 3, 3, 6]))


def toy_packed():
    return pack(np.array([1, 2, 4, 3, 2, 3]), np.array([0, 3, 5, 5, 6]), toy_tokens(), cls=7)


def test_pack_by_hand():
    p = toy_packed()
    assert p.tokens.tolist() == [7, 40, 41, 42, 20, 10, 11, 7, 20, 7, 7], \
        'newest item first; an item without tokens takes a place'
    assert p.item_positions.tolist() == [0, 1, 1, 1, 2, 3, 3, 0, 1, 0, 0]
    assert p.types.tolist() == [0] + [VALUE] * 6 + [0, VALUE, 0, 0]
    assert p.lengths.tolist() == [7, 2, 1, 1]
    assert p.starts.tolist() == [0, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]


def test_a_place_without_tokens_is_counted():
    p = pack(np.array([1, 3, 2]), np.array([0, 3]), toy_tokens(), cls=7)
    assert p.tokens.tolist() == [7, 20, 10, 11]
    assert p.item_positions.tolist() == [0, 1, 3, 3], 'item 3 is at place 2'


def test_pack_limits():
    history = np.array([1, 2, 4]), np.array([0, 3])
    assert pack(*history, toy_tokens(), 7, max_items=2).tokens.tolist() == [7, 40, 41, 42, 20]
    assert pack(*history, toy_tokens(), 7, max_tokens=3).tokens.tolist() == [7, 40, 41]
    assert pack(*history, toy_tokens(), 7, max_tokens=1).tokens.tolist() == [7]


def test_chosen_rows_are_those_of_the_whole():
    p = toy_packed()
    q = p.rows(np.array([1, 0]))
    assert isinstance(q, Packed)
    assert q.tokens.tolist() == [7, 20, 7, 40, 41, 42, 20, 10, 11] and q.lengths.tolist() == [2, 7]
    assert q.item_positions.tolist() == [0, 1, 0, 1, 1, 1, 2, 3, 3]
    assert q.starts.tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 0]
    assert p.index(np.array([2, 1])).tolist() == [9, 7, 8]


# ------------------------------------------------------------------------ masking

def test_masking_masks_whole_words_about_15_percent_and_one_at_least():
    rng = np.random.default_rng(0)
    n = 300
    starts = np.r_[True, rng.random(n - 1) < 0.6]
    ids = np.arange(100, 100 + n, dtype=np.int32)
    tokens = ItemTokens(ids, np.full(n, VALUE, np.int8), starts, np.array([0, 0, n - 3, n]))
    p = pack(np.array([1, 2]), np.array([0, 1, 2]), tokens, 7)
    word = np.cumsum(p.starts)
    share, short, changed = [], [], []
    for _ in range(300):
        out, rows = mask_words(p, rng, mask=5, vocabulary=50)
        left = np.delete(word, np.r_[rows, 0, n - 2])
        assert not set(word[rows]) & set(left), 'a word is masked whole or not at all'
        assert 0 not in rows and n - 2 not in rows, 'CLS is never masked'
        assert (np.delete(out, rows) == np.delete(p.tokens, rows)).all()
        share.append((rows < n - 2).sum() / (n - 3))
        short.append((rows > n - 2).sum())
        changed.append([(out[rows] == 5).mean(), (out[rows] == p.tokens[rows]).mean()])
    assert abs(np.mean(share) - 0.15) < 0.01 and min(short) >= 1
    assert np.abs(np.mean(changed, 0) - [0.8, 0.1]).max() < 0.02


def test_masking_leaves_its_input_alone_and_takes_sequences_without_words():
    rng, p = np.random.default_rng(0), toy_packed()
    before = p.tokens.copy()
    for _ in range(20):
        out, rows = mask_words(p, rng, mask=5, vocabulary=50)
        assert (p.tokens == before).all() and out is not p.tokens
        owner = np.repeat(np.arange(4), p.lengths)[rows]
        assert set(owner) == {0, 1}, 'the other two are CLS alone'
        assert rows.tolist() == sorted(rows)
    empty = p.rows(np.array([2, 3]))
    out, rows = mask_words(empty, rng, mask=5, vocabulary=50)
    assert out.tolist() == [7, 7] and len(rows) == 0


def test_masking_is_the_same_for_the_same_generator():
    p = toy_packed()
    draw = lambda: mask_words(p, np.random.default_rng([3, 1]), mask=5, vocabulary=50)
    (a, rows_a), (b, rows_b) = draw(), draw()
    assert (a == b).all() and (rows_a == rows_b).all()
    state = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is not used"
