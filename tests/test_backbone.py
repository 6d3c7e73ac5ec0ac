"""Language models as people have them: published files in all their forms, settings of a config.json,
tokenizers of every kind, folders that move. Run: python -m pytest tests/test_backbone.py
"""
import json
import shutil
from collections import OrderedDict
from dataclasses import fields

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (AutoModelForMaskedLM, BertConfig, CamembertConfig, CamembertTokenizer, LongformerConfig,
                          PreTrainedTokenizerFast, RobertaConfig, XLMRobertaConfig, XLMRobertaTokenizer)

import evaluate
import export_embeddings
from common.backbone import (from_backbone, load_words, save_recformer, start_model,
                             weights_digest)
from common.data import prepare
from common.files import UserError
from common.sasrec import SASRec
from common.sequence import ItemTable
from common.text import mask_words, pack, tokenize
from tests.test_recformer import all_of, packed, published, square
from tests.toy import ANY_MODEL, WORDS, canonical, tiny_bert, tiny_longformer

# ------------------------------------------------------------------------ published files


@pytest.fixture(scope='module')
def tuned(tmp_path_factory):
    """(folder of a Longformer, its tensors, a RecFormer begun as it whose every tensor but the
    frozen word table is another, that RecFormer as save_recformer writes it)."""
    folder = tiny_longformer(tmp_path_factory.mktemp('published') / 'plm')
    model = start_model(None, str(folder))
    backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if 'word_embeddings' not in name:
                tensor.add_(torch.randn_like(tensor))
    save_recformer(folder.parent / 'ours.pt', model)
    return folder, backbone, model, start_model(folder.parent / 'ours.pt')


def wrapped(prefix):
    return lambda state: {f'{prefix}{name}': tensor for name, tensor in state.items()}


def without(*words):
    return lambda state: {name: tensor for name, tensor in state.items()
                          if not any(word in name for word in words)}


def bare(state):
    """The encoder's tensors alone, as of a model without a head."""
    return {name.removeprefix('longformer.'): tensor for name, tensor in state.items()
            if name.startswith('longformer.')}


def lightning(state):
    return {'epoch': 3, 'state_dict': OrderedDict(wrapped('model.')(state)), 'loops': {'fit': {'done': [1, 2]}},
            'optimizer_states': [{'state': {0: {'step': torch.ones(1)}}}], 'hyper_parameters': {'learning_rate': 5e-5}}


def deepspeed(state):
    """What its converter makes of Lightning's model: without what was frozen."""
    return wrapped('_forward_module.model.')(without('word_embeddings', 'item_embedding')(state))


FORMS = {
    'as it is': (lambda state: state, []),
    'DataParallel': (wrapped('module.'), []),
    'Lightning module': (wrapped('model.'), []),
    'Lightning in DeepSpeed': (wrapped('_forward_module.model.'), []),
    'compiled in parallel': (wrapped('module._orig_mod.'), []),
    'Lightning checkpoint': (lightning, []),
    'converted by DeepSpeed': (deepspeed, ['longformer.embeddings.word_embeddings']),
    'no head': (without('lm_head'), ['lm_head']),
    'encoder alone': (bare, ['lm_head']),
    'encoder alone, wrapped': (lambda state: wrapped('_forward_module.model.')(bare(state)), ['lm_head']),
    'encoder alone, no words': (lambda state: without('word_embeddings')(bare(state)),
                                ['longformer.embeddings.word_embeddings', 'lm_head'])}


@pytest.mark.parametrize('form', FORMS)
def test_every_published_form_gives_the_weights_that_ours_gives(tuned, tmp_path, form, capsys):
    folder, backbone, model, ours = tuned
    change, taken = FORMS[form]
    file = tmp_path / 'published.bin'
    torch.save(change(published(model)), file)
    found = start_model(file, str(folder))
    for name, tensor in ours.state_dict().items():
        source = backbone[name] if name.startswith(tuple(taken)) else tensor
        assert torch.equal(found.state_dict()[name], source), name
    said = capsys.readouterr().out.splitlines()
    assert said == [f'no {part} in {file}: that of {folder} is used' for part in taken]
    assert (found.stage, found.words, found.plm) == ('published', model.words, str(folder))


def test_a_published_file_starts_with_the_dropout_of_its_seed(tuned, tmp_path):
    folder, _, model, _ = tuned
    file = tmp_path / 'published.bin'
    torch.save(published(model), file)
    drawn = []
    for seed in (0, 1, 1):
        start_model(file, str(folder), seed)
        drawn.append(torch.rand(1).item())
    assert drawn[0] != drawn[1] == drawn[2]


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', ['half.bin', 'half.safetensors'])
def test_half_precision_and_safetensors(tuned, tmp_path, kind, name):
    folder, _, model, _ = tuned
    state = {key: tensor.to(kind) for key, tensor in published(model).items()}
    if name.endswith('.bin'):
        torch.save(state, tmp_path / name)
    else:
        state = {key: tensor.clone() for key, tensor in state.items()}
        save_file(wrapped('model.')(state), tmp_path / name)
    found = start_model(tmp_path / name, str(folder)).state_dict()
    assert all(torch.equal(found[key], tensor.to(kind).float()) for key, tensor in model.state_dict().items())


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ('code from a file was run',)


def test_published_files_whose_names_do_not_add_up_are_refused(tuned, tmp_path, capsys):
    folder, _, model, _ = tuned
    state, file = published(model), tmp_path / 'x.bin'
    twice = {**state, **wrapped('model.')({name: tensor + 1 for name, tensor in state.items() if tensor.dim() > 1})}
    cases = {'Unexpected.*teacher.longformer': {**state, 'teacher.longformer.x': torch.ones(1)},
             'Missing.*lm_head.dense': without('lm_head.dense')(state),
             'Missing.*item_position': without('item_position')(state),
             'Missing.*position_embeddings': without('position_embeddings')(state),
             'is no readable recformer file': {'state_dict': state, 'callbacks': Code()},
             'is no readable recformer file: damaged': twice}
    for words, content in cases.items():
        torch.save(content, file)
        with pytest.raises(UserError, match=f'{file}: .*{words}') as caught:
            start_model(file, str(folder))
        assert '\n' not in str(caught.value)
    assert 'code from a file' not in capsys.readouterr().out
    (tmp_path / 'cut.safetensors').write_bytes(b'\x08' * 40)
    with pytest.raises(UserError, match='cut.safetensors: is no readable'):
        start_model(tmp_path / 'cut.safetensors', str(folder))


# ------------------------------------------------------------------------ settings of a config.json

KINDS = {'bert': BertConfig, 'roberta': RobertaConfig, 'longformer': LongformerConfig,
         'xlm-roberta': XLMRobertaConfig, 'camembert': CamembertConfig}
# What becomes of every setting of these five. Honoured: it is in our Config, or its tensors are.
HONOURED = set('vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size '
               'hidden_dropout_prob max_position_embeddings layer_norm_eps pad_token_id'.split())
REFUSED = {'is_decoder': True, 'add_cross_attention': True, 'tie_word_embeddings': False,
           'position_embedding_type': 'relative_key', 'hidden_act': 'gelu_new', 'model_type': 'electra'}
# Of no effect on the states; each with a value that is not its default.
NO_EFFECT = {
    'type_vocab_size': 3,               # row 0 alone is used: there is one segment
    'attention_window': 128,            # RecFormer's is 64
    'attention_probs_dropout_prob': 0.5,  # README, differences: none
    'initializer_range': 0.05, 'use_cache': False, 'classifier_dropout': 0.3, 'onnx_export': True,
    'bos_token_id': 7, 'eos_token_id': 8, 'sep_token_id': 9,  # the tokenizer's are used
    'chunk_size_feed_forward': 2,       # the same in pieces
    'output_hidden_states': True, 'return_dict': True, 'is_encoder_decoder': False,
    'id2label': {0: 'x'}, 'label2id': {'x': 0}, 'problem_type': 'regression',
    'dtype': 'float32', 'transformers_version': '4.0', 'architectures': ['X']}


@pytest.mark.parametrize('kind', KINDS)
def test_every_setting_is_classified(kind):
    known = {field.name for field in fields(KINDS[kind])}
    assert known <= HONOURED | set(REFUSED) | set(NO_EFFECT), known - HONOURED - set(REFUSED) - set(NO_EFFECT)


def model_of(kind, **settings):
    """A random model of a kind, of LayerNorms and biases too."""
    shape = dict(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=24, max_position_embeddings=80)
    torch.manual_seed(1)
    config = KINDS[kind](**shape | settings)
    model = AutoModelForMaskedLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def states_of(theirs, p):
    """Last states and logits of transformers' model on Packed sequences: [T, H], [T, vocabulary]."""
    ids, mask, everywhere = square(p, theirs.config.pad_token_id)
    more = {'global_attention_mask': everywhere} if theirs.config.model_type == 'longformer' else {}
    found = theirs(ids, attention_mask=mask, output_hidden_states=True, **more)
    return found.hidden_states[-1][:, :ids.shape[1]][mask.bool()], found.logits[mask.bool()]


SETTINGS = {'no effect': NO_EFFECT,
            'some effect': dict(layer_norm_eps=0.1, num_attention_heads=4, pad_token_id=3)}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('settings', SETTINGS)
def test_states_and_logits_are_those_of_transformers(tmp_path, kind, settings):
    known = {field.name for field in fields(KINDS[kind])} - {'architectures'}
    chosen = {name: value for name, value in SETTINGS[settings].items() if name in known}
    theirs = model_of(kind, **chosen)
    theirs.save_pretrained(tmp_path)
    model, p = from_backbone(tmp_path).eval(), packed([20, 1, 32])
    model.longformer.embeddings.item_position_embeddings.weight.data.zero_()
    p.tokens[p.tokens == theirs.config.pad_token_id] = 50  # padding stands in no text
    hidden, logits = states_of(theirs, p)
    close = dict(atol=1e-5, rtol=0)
    found = model(p, all_of(p))
    torch.testing.assert_close(found, hidden, **close)
    torch.testing.assert_close(model.mlm_logits(found), logits, **close)
    torch.testing.assert_close(model(p), hidden[[0, 20, 21]], **close)
    if settings != 'no effect':  # a checkpoint knows it; another is another model
        model.words = load_words(tiny_bert(tmp_path / 'words'), ANY_MODEL)
        save_recformer(tmp_path / 'model.pt', model)
        again = start_model(tmp_path / 'model.pt').eval()
        assert torch.equal(again(p), model(p)) and again.config == model.config
        then, model.config.heads = weights_digest(model), 2
        assert weights_digest(again) == then != weights_digest(model)


@pytest.mark.parametrize('name, value', [*REFUSED.items(), ('model_type', 'xlm')])  # as xlm-roberta begins
def test_settings_that_cannot_be_computed_are_refused_by_name(tmp_path, name, value):
    model_of('roberta').save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match=f'{tmp_path}: {name} is {value} in its config.json; known'):
        from_backbone(tmp_path)


def test_code_that_lies_in_a_folder_is_not_run(tmp_path):
    config = {'model_type': 'mine', 'auto_map': {'AutoConfig': 'mine.Config', 'AutoModelForMaskedLM': 'mine.Model'}}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'mine.py').write_text(f'open({str(tmp_path / "ran")!r}, "w")')
    with pytest.raises(UserError, match='no language model could be loaded'):
        from_backbone(tmp_path)
    assert not (tmp_path / 'ran').exists()


# ------------------------------------------------------------------------ tokenizers

def pieces(special):
    """A Unigram vocabulary of (piece, score), the special tokens first."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=75, special_tokens=special, unk_token='<unk>', show_progress=False)
    tokenizer.train_from_iterator(WORDS * 5, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())['model']['vocab']]


def tiny_sentencepiece(folder, kind):
    """A random XLM-RoBERTa or CamemBERT with its own tokenizer class."""
    if kind == 'xlm-roberta':
        tokenizer = XLMRobertaTokenizer(vocab=pieces(['<s>', '<pad>', '</s>', '<unk>', '<mask>']))
    else:
        special = ['<s>NOTUSED', '<pad>', '</s>NOTUSED', '<unk>', '<unk>NOTUSED', '<s>', '</s>', '<mask>']
        tokenizer = CamembertTokenizer(vocab=pieces(special))
    tokenizer.save_pretrained(folder)
    model_of(kind, bos_token_id=tokenizer.bos_token_id).save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize('kind', ['xlm-roberta', 'camembert'])
def test_sentencepiece_models_go_all_the_way(tmp_path, kind):
    theirs = tiny_sentencepiece(tmp_path / 'plm', kind)
    model = start_model(None, str(tmp_path / 'plm')).eval()
    words = model.words
    assert (words.cls, words.mask) == (theirs.cls_token_id, theirs.mask_token_id)
    assert model.config.position_offset == theirs.pad_token_id + 1 == 2
    value = 'red  tea, organic-sea SALT coffees'
    tokens = tokenize([[('brand', value)]], words)
    spelled = [words.backend.id_to_token(int(token)) for token in tokens.ids]
    whole = theirs('brand', add_special_tokens=False).input_ids + theirs(value, add_special_tokens=False).input_ids
    assert tokens.ids.tolist() == whole
    assert tokens.starts.tolist() == [piece.startswith('▁') for piece in spelled], spelled
    assert tokens.starts.sum() == 6 < len(tokens.ids), 'the name and five words'
    p = pack(np.array([1]), np.array([0, 1]), tokens, words.cls)
    masked = [tuple(mask_words(p, np.random.default_rng(seed), words.mask, 100)[1]) for seed in range(50)]
    begin = [1 + place for place in np.flatnonzero(tokens.starts)] + [1 + len(spelled)]
    each = [tuple(range(*pair)) for pair in zip(begin, begin[1:])]
    assert set(masked) >= set(each), 'every word, whole'
    save_recformer(tmp_path / 'model.pt', model)
    shutil.rmtree(tmp_path / 'plm')
    again = start_model(tmp_path / 'model.pt')
    assert torch.equal(again.encode_items(tokenize([[('brand', value)]], again.words)), model.encode_items(tokens))


def test_a_tokenizer_of_another_model_is_refused_at_once(tmp_path):
    wordpiece, bytes_ = tiny_bert(tmp_path / 'bert'), tiny_longformer(tmp_path / 'longformer')
    added = PreTrainedTokenizerFast.from_pretrained(bytes_)
    added.add_tokens(['<new>'])
    added.save_pretrained(tmp_path / 'added')
    last, new = (max(load_words(folder, ANY_MODEL).backend.get_vocab().values()) for folder in (wordpiece, tmp_path / 'added'))
    assert new == len(added) - 1 == len(load_words(bytes_, ANY_MODEL).backend.get_vocab())
    for number, (tokenizer, kind, settings, words) in enumerate([
            (wordpiece, 'bert', {'vocab_size': last}, f'ids up to {last}, 0 for padding.*{last} words'),
            (wordpiece, 'bert', {'vocab_size': last + 1}, None),
            (tmp_path / 'added', 'roberta', {'vocab_size': new}, f'ids up to {new}, 1 for padding.*{new} words'),
            (tmp_path / 'added', 'roberta', {'vocab_size': new + 1}, None),
            (bytes_, 'roberta', {'vocab_size': 999, 'pad_token_id': 0}, '1 for padding.*positions from 1'),
            (wordpiece, 'roberta', {'vocab_size': 999}, '0 for padding.*positions from 2'),
            (bytes_, 'roberta', {'vocab_size': 999, 'pad_token_id': None}, '1 for padding.*positions from 1')]):
        folder = tmp_path / str(number)
        model_of(kind, **settings).save_pretrained(folder)
        for file in tokenizer.glob('tokenizer*.json'):
            shutil.copy(file, folder)
        if words is None:
            assert start_model(None, str(folder)).config.vocab_size == settings['vocab_size']
            continue
        with pytest.raises(UserError, match=f'--plm {folder}: its tokenizer has .*{words}') as caught:
            start_model(None, str(folder))
        assert '\n' not in str(caught.value)


@pytest.mark.parametrize('made', [tiny_bert, tiny_longformer])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, made):
    """Transformers makes one up, to which every word is unknown."""
    folder = made(tmp_path)
    for path in folder.iterdir():
        if 'token' in path.name or path.name.startswith(('vocab', 'merges')):
            path.unlink()
    with pytest.raises(UserError, match=f'--plm {folder}: '):
        start_model(None, str(folder))


def test_a_damaged_tokenizer_is_said_in_one_line(tmp_path):
    folder = tiny_bert(tmp_path)
    for text in ('{', '{"version": "1.0", "model": 3}', ''):
        (folder / 'tokenizer.json').write_text(text)
        with pytest.raises(UserError, match='--plm'):
            start_model(None, str(folder))


# ------------------------------------------------------------------------ what a language model is

@pytest.fixture
def world(tmp_path, monkeypatch):
    """A prepared dataset `one` and a language model `plm`."""
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path / 'runs'))
    canonical(tmp_path / 'data' / 'one')
    prepare('one', [None] * 3)
    tiny_bert(tmp_path / 'plm', layers=3)
    return tmp_path


def export(world, plm, capsys):
    """What exporting the language model's embeddings says last."""
    out = world / 'runs' / 'one' / 'embeddings' / 'lf.pt'
    export_embeddings.main(export_embeddings.parse_args(['one', '--plm', str(plm), '--out', str(out)]))
    return capsys.readouterr().out.splitlines()[-1]


def test_a_moved_language_model_is_the_same_and_a_changed_one_is_not(world, capsys):
    assert 'written to' in export(world, world / 'plm', capsys)
    (world / 'plm').rename(world / 'moved')
    assert 'is up to date' in export(world, world / 'moved', capsys)
    config = world / 'moved' / 'config.json'
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-05'))
    assert 'written to' in export(world, world / 'moved', capsys)
    model = AutoModelForMaskedLM.from_pretrained(world / 'moved')
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    model.save_pretrained(world / 'moved')
    assert 'written to' in export(world, world / 'moved', capsys)


def test_attention_of_a_model_whose_origin_moved(world, monkeypatch):
    model = start_model(None, str(world / 'plm'))
    model.stage = 'ft1'
    save_recformer(world / 'runs' / 'one' / 'ft1-seed0' / 'model.pt', model)
    (world / 'plm').rename(world / 'moved')
    monkeypatch.setattr(evaluate, 'draw_attention', lambda *_: None)
    sasrec = SASRec(ItemTable(torch.rand(40, 8)), 10).eval()
    monkeypatch.setattr(evaluate, 'load_seq', lambda *_: sasrec)
    line = ['attention', 'one', '--users', '2', '--seq', 'it']
    with pytest.raises(UserError, match=f'--plm {world / "plm"}: no language model could be loaded'):
        evaluate.main(evaluate.parse_args(line))
    model_of('bert', num_hidden_layers=3, vocab_size=200).save_pretrained(world / 'other')
    shutil.copy(world / 'moved' / 'tokenizer.json', world / 'other')
    shutil.copy(world / 'moved' / 'tokenizer_config.json', world / 'other')
    with pytest.raises(UserError, match='not what the checkpoint was tuned from'):
        evaluate.main(evaluate.parse_args([*line, '--plm', str(world / 'other')]))
    evaluate.main(evaluate.parse_args([*line, '--plm', str(world / 'moved')]))
    assert '| lf | 0 |' in (world / 'runs' / 'one' / 'figure1.md').read_text()
