"""RecFormer against transformers' own models. Run: python -m pytest tests/test_recformer.py (no download)."""
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from common.files import UserError
from common.recformer import Batch, encode_items, from_backbone, lf_untouched, load_model, load_named, save_model
from common.text import ItemTokens, Packed
from tests.toy import longformer, tiny_bert, tiny_longformer


def packed(lengths, vocab=100, seed=0):
    lengths = np.array(lengths)
    zeros = np.zeros(lengths.sum(), np.int64)
    tokens = np.random.default_rng(seed).integers(2, vocab, lengths.sum())
    return Packed(tokens, zeros, zeros, zeros.astype(bool), lengths)


def square(p, pad=1):
    """Padded ids and mask [B, L] of packed sequences, for the reference."""
    ids, mask, begin = torch.full((len(p.lengths), p.lengths.max()), pad), torch.zeros(len(p.lengths), p.lengths.max(), dtype=torch.long), 0
    for row, n in enumerate(p.lengths):
        ids[row, :n], mask[row, :n] = torch.from_numpy(p.tokens[begin:begin + n]), 1
        begin += n
    return ids, mask


def ours_of(reference, tmp_path, window):
    reference.save_pretrained(tmp_path)
    model = lf_untouched(from_backbone(tmp_path)).eval()
    model.config.window = window
    return model


@pytest.mark.parametrize('window', [8, 64])
@pytest.mark.parametrize('lengths', [[1], [5, 1, 40], [150, 3, 64, 65], [400, 1, 161, 64, 129]])
def test_equals_transformers_longformer(tmp_path, window, lengths):
    torch.manual_seed(1)
    reference = longformer(window)
    model, p = ours_of(reference, tmp_path, window), packed(lengths)
    batch, (ids, mask) = Batch(p, window, 'cpu'), square(p)
    globe = torch.zeros_like(ids)
    globe[:, 0] = 1
    hidden = reference.longformer(ids, attention_mask=mask, global_attention_mask=globe).last_hidden_state
    valid = hidden[mask.bool()]
    torch.testing.assert_close(model(batch, None), valid, atol=1e-5, rtol=0, msg='states of all tokens')
    torch.testing.assert_close(model(batch), hidden[:, 0], atol=1e-5, rtol=0, msg='CLS, computed alone in the last layer')
    chosen = torch.arange(0, len(valid), 3)
    torch.testing.assert_close(model(batch, chosen), valid[chosen], atol=1e-5, rtol=0, msg='chosen rows only')
    logits = reference(ids, attention_mask=mask, global_attention_mask=globe).logits[mask.bool()]
    torch.testing.assert_close(model.mlm_logits(model(batch, None)), logits, atol=1e-5, rtol=0)


def test_gradients_equal_transformers_longformer(tmp_path):
    torch.manual_seed(1)
    reference = longformer(8)
    model, p = ours_of(reference, tmp_path, 8), packed([70, 3, 200])
    ids, mask = square(p)
    globe = torch.zeros_like(ids)
    globe[:, 0] = 1
    aim = torch.randn(3, 16)
    (reference.longformer(ids, attention_mask=mask, global_attention_mask=globe).last_hidden_state[:, 0] * aim).sum().backward()
    (model(Batch(p, 8, 'cpu')) * aim).sum().backward()
    theirs = dict(reference.named_parameters())
    checked = 0
    for name, q in model.named_parameters():
        if name in theirs and theirs[name].grad is not None and 'token_type' not in name:
            grad = q.grad if q.grad is not None else torch.zeros_like(q)
            torch.testing.assert_close(grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=name)
            checked += 1
    assert checked > 30


def test_a_bert_whose_text_fits_the_window_is_unchanged(tmp_path):
    """Copied global projections, no position offset: within 32 tokens RecFormer from BERT is BERT."""
    torch.manual_seed(1)
    bert = BertForMaskedLM(BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
                                      max_position_embeddings=64)).eval()
    model, p = ours_of(bert, tmp_path, 64), packed([20, 1, 32])
    ids, mask = square(p, 0)
    hidden = bert.bert(ids, attention_mask=mask).last_hidden_state[mask.bool()]
    torch.testing.assert_close(model(Batch(p, 64, 'cpu'), None), hidden, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.mlm_logits(hidden), bert(ids, attention_mask=mask).logits[mask.bool()], atol=1e-5, rtol=0)


def test_sequences_do_not_see_each_other(tmp_path):
    model = from_backbone(tiny_bert(tmp_path)).eval()
    alone = [model(Batch(packed([n], 60, seed=n), 64, 'cpu')) for n in (200, 7)]
    a, b = packed([200], 60, seed=200), packed([7], 60, seed=7)
    both = Packed(*(np.concatenate([getattr(a, f), getattr(b, f)]) for f in ('tokens', 'types', 'item_positions', 'starts', 'lengths')))
    torch.testing.assert_close(model(Batch(both, 64, 'cpu')), torch.cat(alone), atol=1e-5, rtol=0)


def test_positions_are_tiled_and_first_layers_taken(tmp_path):
    model = from_backbone(tiny_bert(tmp_path, layers=3), layers=2)
    table = model.longformer.embeddings.position_embeddings.weight
    assert table.shape[0] == 1024 and torch.equal(table[:64], table[64:128]) and len(model.layers) == 2
    types = model.longformer.embeddings.token_type_embeddings.weight
    assert types.shape[0] == 4 and torch.equal(types[0], types[3])
    with pytest.raises(UserError, match='--layers 4: the model has 3'):
        from_backbone(tmp_path, layers=4)


def published(model):
    """The names that RecFormer's published files have: ours, a tied output table, a buffer, a table of items."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state['longformer.embeddings.position_ids'] = torch.arange(5)
    state['lm_head.decoder.weight'], state['lm_head.decoder.bias'] = torch.zeros(2), torch.zeros(2)
    state['item_embedding.weight'] = torch.zeros(7, 16)
    return state


@pytest.mark.parametrize('binary', [False, True])
def test_published_state_dict_loads_with_every_name_accounted_for(tmp_path, binary):
    folder = tiny_longformer(tmp_path / 'plm', binary)
    model = from_backbone(folder)
    with torch.no_grad():
        model.layers[0].output.dense.weight.add_(1)
    torch.save(published(model), tmp_path / 'published.bin')
    loaded, meta = load_model(tmp_path / 'published.bin', str(folder))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items()) and meta['plm'] == str(folder)
    with pytest.raises(UserError, match='--plm'):
        load_model(tmp_path / 'published.bin')
    state = published(model)
    for change, word in (({'longformer.encoder.layer.9.x': torch.zeros(1)}, 'unknown'), ({'lm_head.bias': torch.zeros(3)}, 'another shape')):
        with pytest.raises(UserError, match=word):
            load_named(from_backbone(folder), state | change, 'file')
    del state['lm_head.bias']
    with pytest.raises(UserError, match='missing'):
        load_named(from_backbone(folder), state, 'file')


def test_checkpoint_round_trip_and_refusals(tmp_path):
    model = from_backbone(tiny_bert(tmp_path / 'plm'))
    save_model(tmp_path / 'm.pt', model, {'plm': 'x', 'identity': {}})
    again, _ = load_model(tmp_path / 'm.pt')
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(UserError, match='was made with --plm x'):
        load_model(tmp_path / 'm.pt', 'y')
    (tmp_path / 'cut.pt').write_bytes((tmp_path / 'm.pt').read_bytes()[:1000])
    with pytest.raises(UserError, match='cut.pt: not a readable'):
        load_model(tmp_path / 'cut.pt')


def test_encode_items_restores_order_and_mode(tmp_path):
    model = from_backbone(tiny_bert(tmp_path)).train()
    ids = np.arange(5, 17, dtype=np.int32)
    tokens = ItemTokens(ids, np.full(12, 2, np.int8), np.ones(12, bool), np.array([0, 0, 5, 6, 12]))
    import contextlib
    many, few = (encode_items(model, tokens, 2, 'cpu', contextlib.nullcontext, n) for n in (1000, 4))
    assert model.training and not many[0].any() and many.shape == (4, 16)
    torch.testing.assert_close(many, few, atol=1e-5, rtol=0)
