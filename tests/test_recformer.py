"""RecFormer against transformers' own models, its layout of attention against plain masks, its
checkpoints. Run: python -m pytest tests/test_recformer.py (no download).
"""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from common import layers, recformer
from common.backbone import (from_backbone, load_named, load_words, save_recformer, start_model,
                             weights_digest)
from common.files import UserError, save_pt
from common.layers import Machine
from common.recformer import Batch, RecFormer, cosine_logits
from common.text import ItemTokens, Packed, tokenize
from tests.toy import ANY_MODEL, longformer, tiny_bert, tiny_longformer

LENGTHS = [[1], [5, 1, 40], [150, 3, 64, 65], [160, 1], [161, 1], [400, 1, 161, 64, 129, 128, 192]]


def packed(lengths, vocab=100, seed=0):
    """Random sequences of these lengths, of special tokens at item position 0."""
    lengths = np.array(lengths)
    zeros = np.zeros(lengths.sum(), np.int64)
    tokens = np.random.default_rng(seed).integers(2, vocab, lengths.sum())
    return Packed(tokens, zeros, zeros, zeros.astype(bool), lengths)


def all_of(p):
    """Every row of Packed sequences."""
    return np.arange(len(p.tokens))


def joined(a, b):
    """The sequences of two Packed, as one."""
    names = 'tokens', 'types', 'item_positions', 'starts', 'lengths'
    return Packed(*(np.concatenate([getattr(a, name), getattr(b, name)]) for name in names))


# ------------------------------------------------------------------------ layout of attention

def reference(lengths, window):
    """For every token, in order, the sorted rows of the tokens that it attends: CLS, and window / 2
    tokens to each side of it."""
    found, begin = [], 0
    for length in lengths:
        for query in range(length):
            seen = [key for key in range(length) if key == 0 or abs(key - query) <= window // 2]
            found.append([begin + key for key in seen])
        begin += length
    return found


def attended(batch):
    """The same of a Batch; a token that would count twice stands there twice."""
    block = batch.place // batch.queries.shape[1]
    query = batch.place % batch.queries.shape[1]
    seen = batch.mask[block, 0, query] == 0
    keys = batch.keys[block]
    return [sorted(row[kept].tolist()) for row, kept in zip(keys, seen)]


@pytest.mark.parametrize('window', [2, 8, 64])
@pytest.mark.parametrize('lengths', LENGTHS)
def test_layout_is_that_of_plain_masks(lengths, window):
    batch = Batch(packed(lengths), window, Machine())
    assert attended(batch) == reference(lengths, window)
    total = torch.arange(sum(lengths))
    assert torch.equal(batch.queries.flatten()[batch.place], total), 'each token asks for itself'
    assert ((batch.mask == 0) | (batch.mask == -torch.inf)).all()
    assert (batch.mask == 0).any(-1).all(), 'a query that attends nothing gives NaN'
    begin = 0
    for row, length in enumerate(lengths):
        assert batch.real[row].tolist() == [column < length for column in range(max(lengths))]
        assert batch.all[row, :length].tolist() == list(range(begin, begin + length))
        assert batch.positions[begin:begin + length].tolist() == list(range(length))
        assert batch.cls[row] == begin
        begin += length


class Counting(Machine):
    """A machine that notes how many numbers each copy to the device has."""

    def put(self, array):
        self.sizes = getattr(self, 'sizes', []) + [array.size]
        return super().put(array)


@pytest.mark.parametrize('lengths', [[150, 3, 64, 65], [400, 1, 161, 64, 129]])
def test_host_sends_tokens_and_lengths_and_waits_for_nothing(lengths, monkeypatch):
    """Tensors of the device 'meta' have no values: whatever asked for one would fail."""
    monkeypatch.setattr(layers, 'half', lambda x: x)  # autocast knows no such device
    monkeypatch.setattr(recformer, 'rounded', lambda x: x)
    machine = Counting(torch.device('meta'))
    batch = Batch(packed(lengths), 64, machine)
    assert sorted(machine.sizes, reverse=True)[:3] == [sum(lengths)] * 3
    assert max(machine.sizes[3:]) <= len(lengths) and len(machine.sizes) <= 5
    assert batch.mask.numel() > 20 * sum(machine.sizes), 'queries x keys'
    assert {value.device.type for value in vars(batch).values()} == {'meta'}
    real = Batch(packed(lengths), 64, Machine())
    for name, value in vars(batch).items():
        assert (value.shape, value.dtype) == (getattr(real, name).shape, getattr(real, name).dtype)


# ------------------------------------------------------------------------ against transformers

def square(p, pad=1):
    """Packed sequences as padded ids, mask, and global mask [B, L], for the reference."""
    ids = torch.full((len(p.lengths), p.lengths.max()), pad)
    mask = torch.zeros_like(ids)
    begin = 0
    for row, length in enumerate(p.lengths):
        ids[row, :length] = torch.from_numpy(p.tokens[begin:begin + length])
        mask[row, :length] = 1
        begin += length
    everywhere = torch.zeros_like(ids)
    everywhere[:, 0] = 1
    return ids, mask, everywhere


def ours_of(theirs, folder, window):
    """RecFormer with the weights of a transformers model, without item positions."""
    theirs.save_pretrained(folder)
    model = from_backbone(folder).eval()
    model.longformer.embeddings.item_position_embeddings.weight.data.zero_()
    model.config.window = window
    return model


@pytest.mark.parametrize('window', [8, 64])
@pytest.mark.parametrize('lengths', LENGTHS)
def test_equals_transformers_longformer(tmp_path, window, lengths):
    torch.manual_seed(1)
    theirs = longformer(window)
    model, p = ours_of(theirs, tmp_path, window), packed(lengths)
    ids, mask, everywhere = square(p)
    found = theirs.longformer(ids, mask, everywhere, output_attentions=True)
    hidden, valid = found.last_hidden_state, found.last_hidden_state[mask.bool()]
    close = dict(atol=1e-5, rtol=0)
    torch.testing.assert_close(model(p, all_of(p)), valid, **close, msg='all tokens')
    torch.testing.assert_close(model(p), hidden[:, 0], **close, msg='CLS, alone in the last layer')
    chosen = np.arange(0, len(valid), 3)
    torch.testing.assert_close(model(p, chosen), valid[chosen], **close, msg='chosen rows only')
    logits = theirs(ids, mask, everywhere).logits[mask.bool()]
    torch.testing.assert_close(model.mlm_logits(model(p, all_of(p))), logits, **close)
    of_cls = torch.stack(found.global_attentions)[..., 0]  # [layers, B, h, L and what pads it]
    of_cls = of_cls[..., :ids.shape[1]].masked_fill(mask[:, None] == 0, 0)
    torch.testing.assert_close(model.cls_attention(p), of_cls, **close)


@pytest.mark.parametrize('lengths', [[70, 3, 200], [70, 3, 20]])
def test_gradients_equal_transformers_longformer(tmp_path, lengths):
    torch.manual_seed(1)
    theirs = longformer(8)
    model, p = ours_of(theirs, tmp_path, 8), packed(lengths)
    ids, mask, everywhere = square(p)
    aim = torch.randn(3, 16)
    hidden = theirs.longformer(ids, mask, everywhere).last_hidden_state
    (hidden[:, 0] * aim).sum().backward()
    (model(p) * aim).sum().backward()
    known, checked = dict(theirs.named_parameters()), 0
    for name, ours in model.named_parameters():
        if name in known and known[name].grad is not None and 'token_type' not in name:
            gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
            torch.testing.assert_close(gradient, known[name].grad, atol=1e-5, rtol=1e-4, msg=name)
            checked += 1
    assert checked > 30


def test_a_bert_whose_text_fits_the_window_is_unchanged(tmp_path):
    """Copied global projections, no position offset: within 32 tokens RecFormer is BERT."""
    torch.manual_seed(1)
    shape = dict(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=24, max_position_embeddings=64)
    bert = BertForMaskedLM(BertConfig(**shape)).eval()
    model, p = ours_of(bert, tmp_path, 64), packed([20, 1, 32])
    ids, mask, _ = square(p, 0)
    hidden = bert.bert(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(model(p, all_of(p)), hidden, atol=1e-5, rtol=0)
    logits = bert(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(model.mlm_logits(hidden), logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize('lengths', [[200, 7], [100, 7]])
def test_bfloat16_differs_by_rounding_alone(tmp_path, lengths):
    """It takes other products than float32's fused kernel."""
    model, p = ours_of(longformer(8), tmp_path, 8), packed(lengths)
    exact = model(p, all_of(p))
    found = model.on(Machine(bfloat16=True))(p, all_of(p)).float()
    assert (F.cosine_similarity(found, exact) > 0.999).all()


def test_in_bfloat16_layers_see_few_numbers_of_rows(tmp_path):
    """A CPU's bfloat16 kernels are made for one number of rows: of tokens there are many."""
    model = ours_of(longformer(8), tmp_path, 8).on(Machine(bfloat16=True))
    p = packed([30, 7, 11])
    seen = layers.watched(nn.Linear, model, p)
    assert {len(x) for _, (x,), _ in seen} == {64, len(p.lengths)}

    def logits():
        return model.mlm_logits(model(p, np.arange(20)))
    seen = layers.watched(nn.Linear, logits)
    assert {len(x) for _, (x,), _ in seen} == {64, len(p.lengths)}
    assert len(model(p, all_of(p))) == 48 and len(logits()) == 20


def test_in_bfloat16_the_rows_that_are_added_change_nothing(tmp_path, monkeypatch):
    model = ours_of(longformer(8), tmp_path, 8).on(Machine(bfloat16=True))
    p = packed([30, 7, 11])
    found = []
    for _ in range(2):
        logits = model.mlm_logits(model(p, np.arange(20)))
        model.zero_grad()
        (model(p).float().square().sum() + logits.float().square().sum()).backward()
        found.append([logits.detach(), *(q.grad for q in model.parameters() if q.grad is not None)])
        monkeypatch.setattr(recformer, 'rounded', lambda x: x)
    for with_them, without in zip(*found):  # a sum over other rows rounds differently
        assert (with_them - without).norm() <= 0.05 * without.norm() + 1e-6


def test_positions_are_tiled(tmp_path):
    model = from_backbone(tiny_bert(tmp_path, layers=3))
    table = model.longformer.embeddings.position_embeddings.weight
    assert table.shape[0] == 1024 and torch.equal(table[:64], table[64:128])
    assert len(model.longformer.encoder.layer) == model.config.layers == 3
    types = model.longformer.embeddings.token_type_embeddings.weight
    assert types.shape[0] == 4 and torch.equal(types[0], types[3])


def test_without_a_seed_the_random_item_positions_are_switched_off(tmp_path):
    plm = str(tiny_bert(tmp_path))
    tables = [start_model(None, plm, seed=seed).longformer.embeddings.item_position_embeddings.weight
              for seed in (0, None)]
    assert tables[0].shape == (51, 16) and 0.015 < tables[0].std() < 0.025
    assert not tables[1].any()


# ------------------------------------------------------------------------ encoding

@pytest.mark.parametrize('lengths', [(200, 7), (100, 7)])
def test_sequences_do_not_see_each_other(tmp_path, lengths):
    model = from_backbone(tiny_bert(tmp_path)).eval()
    a, b = (packed([length], 60, seed=length) for length in lengths)
    alone = torch.cat([model(a), model(b)])
    torch.testing.assert_close(model(joined(a, b)), alone, atol=1e-5, rtol=0)


def tokens_of_four():
    """ItemTokens of four items, the first and the third of a few tokens, the second of one."""
    ids = np.arange(5, 17, dtype=np.int32)
    offsets = np.array([0, 0, 5, 6, 10, 12])
    return ItemTokens(ids, np.full(12, 2, np.int8), np.ones(12, bool), offsets)


def passes_of(lengths, micro_tokens):
    """`passes` of sequences of these lengths."""
    model = SimpleNamespace(machine=Machine(micro_tokens=micro_tokens))
    return RecFormer.passes(model, SimpleNamespace(lengths=lengths))


def test_passes_hold_every_row_once_and_keep_the_limit():
    lengths = np.random.default_rng(0).integers(1, 50, 200)
    groups = passes_of(lengths, 120)
    assert sorted(np.concatenate(groups)) == list(range(200))
    assert all(len(g) == 1 or len(g) * lengths[g].max() <= 120 for g in groups)
    long = passes_of(np.array([700, 20, 300, 40]), 1050)
    assert [g.tolist() for g in long] == [[0, 2, 3], [1]], 'no rectangle: their own tokens count'
    alone = passes_of(np.array([700, 900]), 100)
    assert [g.tolist() for g in alone] == [[1], [0]], 'one row at least'


def test_encode_items_restores_order_and_evaluates(tmp_path):
    model = start_model(None, str(tiny_bert(tmp_path))).train()
    tokens = tokens_of_four()
    many = model.on(Machine(micro_tokens=1000)).encode_items(tokens)
    few = model.on(Machine(micro_tokens=4)).encode_items(tokens)
    assert not model.training and many.shape == (5, 16) and many.dtype == torch.float32
    assert not many[0].any() and many[1:].any(1).all() and not many.requires_grad
    torch.testing.assert_close(many, few, atol=1e-5, rtol=0)
    model.eval()
    one_by_one = torch.cat([model(model.pack_items(np.array([item]), tokens)) for item in (1, 2, 3, 4)])
    torch.testing.assert_close(many[1:], one_by_one, atol=1e-5, rtol=0)


def test_encode_histories_in_parts(tmp_path):
    model = start_model(None, str(tiny_bert(tmp_path))).eval()
    tokens, items, offsets = tokens_of_four(), np.array([1, 2, 3, 4, 1]), np.array([0, 2, 3, 5])
    whole = model.encode_histories(items, offsets, tokens, 'users')
    parts = model.encode_histories(items, offsets, tokens, 'users', at_once=1)
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, model(model.pack(items, offsets, tokens)), atol=1e-5, rtol=0)


def test_histories_are_cut_to_the_models_limits(tmp_path):
    model, tokens = start_model(None, str(tiny_bert(tmp_path))), tokens_of_four()
    items, offsets = np.array([1, 3, 4]), np.array([0, 3])
    assert model.pack(items, offsets, tokens).lengths.tolist() == [1 + 2 + 4 + 5]
    model.config.max_tokens = 5
    assert model.pack(items, offsets, tokens).lengths.tolist() == [5]
    model.config.max_items = 1
    cls = model.words.cls
    assert model.pack(items, offsets, tokens).tokens.tolist() == [cls, 15, 16]
    alone = model.pack_items(np.array([2, 1]), tokens)
    assert alone.tokens.tolist() == [cls, 10, cls, 5, 6, 7, 8, 9], 'an item alone is not cut'
    assert alone.item_positions.tolist() == [0, 1, 0, 1, 1, 1, 1, 1]


def test_cosine_logits_by_hand():
    states, table = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0], [6, 8], [4, -3], [0, 2]])
    found = cosine_logits(states.bfloat16(), table)
    torch.testing.assert_close(found, torch.tensor([[0, 20, 0, 16.0]]), atol=1e-5, rtol=1e-6)


# ------------------------------------------------------------------------ published files

def published(model):
    """The names that RecFormer's published files have: ours, a tied output table, a buffer, a table
    of items."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state['longformer.embeddings.position_ids'] = torch.arange(5)
    state['lm_head.decoder.weight'] = state['lm_head.decoder.bias'] = torch.zeros(2)
    state['item_embedding.weight'] = torch.zeros(7, 16)
    return state


def same_weights(a, b):
    there = b.state_dict()
    return all(torch.equal(value, there[name]) for name, value in a.state_dict().items())


@pytest.mark.parametrize('binary', [False, True])
def test_published_state_dict_loads_with_every_name_accounted_for(tmp_path, binary):
    folder = tiny_longformer(tmp_path / 'plm', binary)
    model = from_backbone(folder)
    with torch.no_grad():
        model.longformer.encoder.layer[0].output.dense.weight.add_(1)
    torch.save(published(model), tmp_path / 'published.bin')
    loaded = start_model(tmp_path / 'published.bin', str(folder))
    assert same_weights(model, loaded)
    assert (loaded.plm, loaded.stage, loaded.items) == (str(folder), 'published', None)
    assert loaded.words.text == load_words(folder, ANY_MODEL).text
    with pytest.raises(UserError, match='published.bin.*add --plm'):
        start_model(tmp_path / 'published.bin')
    state = published(model)
    of_other_shape = {'lm_head.bias': torch.zeros(3)}
    unknown = {'longformer.encoder.layer.9.x': torch.zeros(1)}
    for change, words in ((unknown, 'Unexpected.*layer.9.x'), (of_other_shape, 'mismatch.*lm_head.bias')):
        with pytest.raises(UserError, match=words):
            load_named(from_backbone(folder), state | change, 'file')
    del state['lm_head.bias']
    with pytest.raises(UserError, match='file: is of another model.*Missing.*lm_head.bias'):
        load_named(from_backbone(folder), state, 'file')


# ------------------------------------------------------------------------ checkpoints

ATTRIBUTES = [[('title', 'fine sea salt'), ('brand', 'acme')], [('title', 'green tea')]]


@pytest.mark.parametrize('make', [tiny_bert, tiny_longformer])
def test_a_checkpoint_needs_no_other_file(tmp_path, make):
    folder = make(tmp_path / 'plm')
    model = start_model(None, str(folder), seed=3)
    model.stage, model.data, model.config.max_tokens = 'ft1', 'fingerprint', 77
    items = torch.randn(3, 16)
    model.items = items
    save_recformer(tmp_path / 'run' / 'model.pt', model)
    tokens = tokenize(ATTRIBUTES, model.words)
    encoded = model.encode_items(tokens)
    shutil.rmtree(folder)
    for path in (tmp_path / 'run', tmp_path / 'run' / 'model.pt', str(tmp_path / 'run')):
        again = start_model(path)
        assert same_weights(model, again) and again.config == model.config
        assert (again.plm, again.stage, again.data) == (str(folder), 'ft1', 'fingerprint')
        assert torch.equal(again.items, items)
    assert weights_digest(again) == weights_digest(model)
    found = tokenize(ATTRIBUTES, again.words)
    assert found.fingerprint == tokens.fingerprint and len(found.ids) > 4
    assert (again.words.cls, again.words.mask) == (model.words.cls, model.words.mask)
    assert torch.equal(again.encode_items(found), encoded)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    save_recformer(tmp_path / 'm.pt', start_model(None, str(tiny_bert(tmp_path / 'plm'))))
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'm.pt').read_bytes()[:1000])
    save_pt(tmp_path / 'seq.pt', 'seq')
    (tmp_path / 'empty').mkdir()
    for name, words in (('cut.pt', 'cut.pt: is no readable'), ('seq.pt', 'is no readable recformer'),
                        ('nosuch.pt', 'nosuch.pt'), ('empty', 'empty/model.pt')):
        with pytest.raises((UserError, FileNotFoundError), match=words):
            start_model(tmp_path / name)


def test_the_seed_draws_the_item_positions_and_nothing_else(tmp_path):
    folder = str(tiny_bert(tmp_path))
    a, again, b = (start_model(None, folder, seed=seed).state_dict() for seed in (0, 0, 1))
    apart = [name for name in a if not torch.equal(a[name], b[name])]
    assert apart == ['longformer.embeddings.item_position_embeddings.weight']
    assert all(torch.equal(a[name], again[name]) for name in a)


# ------------------------------------------------------------------------ language models

def test_folders_that_hold_no_fitting_model_are_refused(tmp_path):
    with pytest.raises(UserError, match='no language model could be loaded'):
        start_model(None, str(half_a_model(tmp_path / 'cut')))
    shape = dict(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / 'gpt')
    with pytest.raises(UserError, match='gpt'):
        from_backbone(tmp_path / 'gpt')
    bare = tiny_bert(tmp_path / 'bare')
    (bare / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match='token'):
        start_model(None, str(bare))


def half_a_model(folder):
    """A language model's folder whose weights were cut short."""
    weights = tiny_bert(folder) / 'model.safetensors'
    weights.write_bytes(weights.read_bytes()[:5000])
    return folder


def test_a_backbone_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    file = tiny_bert(tmp_path) / 'model.safetensors'
    state = load_file(file)
    lost = 'bert.encoder.layer.1.output.dense.weight'
    del state[lost]
    save_file(state, file, {'format': 'pt'})
    with pytest.raises(UserError, match=f'lack 1 tensors, the first {lost}'):
        from_backbone(tmp_path)
