"""Stage-PT's draws and losses, stage-FT's prefixes, losses and item tables, by hand.
Run: python -m pytest tests/test_pretrain.py
"""
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import export_embeddings
import finetune
import pretrain
from common.backbone import from_backbone, start_model
from common.data import prepare
from common.files import UserError, load_json, load_pt
from common.layers import Dropout, Machine
from common.recformer import KEPT, cosine_logits
from common.text import mask_words, tokenize
from tests.toy import canonical, tiny_bert

FILTERS = 4, 1, 0


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with two data sets and a tiny language model; the environment points to it."""
    folder = tmp_path_factory.mktemp('pretrain')
    canonical(folder / 'data' / 'one')
    canonical(folder / 'data' / 'two', items=20, seed=1)
    tiny_bert(folder / 'plm')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ELEPHANT_DATA', str(folder / 'data'))
        patch.setenv('ELEPHANT_RUNS', str(folder / 'runs'))
        yield folder


@pytest.fixture(scope='module')
def data(place):
    return [prepare(name, FILTERS) for name in ('one', 'two')]


@pytest.fixture
def model(place):
    return start_model(None, str(place / 'plm')).eval()


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def options(*more):
    return pretrain.parse_args(['one', 'two', '--batch', '4', *more])


@pytest.fixture
def sources(data, model):
    return pretrain.Sources(options(), model.words)


# ------------------------------------------------------------------------ stage-PT: data

def test_two_domains_share_no_item_and_split_points_come_from_the_second_half(data, sources, model):
    (one, two), s = data, sources
    users = np.arange(len(s.lengths))
    seen = {user: set() for user in users}
    for seed in range(60):
        packed, _, targets = s.draw(users, np.random.default_rng(seed), model)
        begin = np.cumsum(packed.lengths) - packed.lengths
        held = np.maximum.reduceat(packed.item_positions, begin)
        assert (held > 0).all(), 'a history is never empty'
        for user, target in enumerate(targets):
            own = s.items[s.begin[user]:s.begin[user] + s.lengths[user]]
            point = int(np.flatnonzero(own == target)[0])
            seen[user].add(point)
            assert held[user] == point, 'a history is all that came before'
    assert all(seen[user] == set(range(s.lengths[user] // 2, s.lengths[user])) for user in users)
    assert s.items[s.begin[len(one.user_ids)]:].min() > one.n_items
    assert s.items.max() == one.n_items + two.n_items == len(s.tokens.offsets) - 2


def test_what_is_drawn_is_the_history_newest_first_and_the_target(data, sources, model):
    s, user = sources, len(data[0].user_ids) + 3
    for seed in range(10):
        histories, targets, ids = s.draw(np.array([user]), np.random.default_rng(seed), model)
        own = s.items[s.begin[user]:s.begin[user] + s.lengths[user]].tolist()
        point = own.index(ids[0])
        known = tokenize(data[0].attributes + data[1].attributes, model.words)

        def tokens_of(items):
            parts = [known.ids[known.offsets[item]:known.offsets[item + 1]] for item in items]
            return [model.words.cls, *np.concatenate(parts)]
        assert histories.tokens.tolist() == tokens_of(own[:point][::-1])
        assert targets.tokens.tolist() == tokens_of(ids)


def test_users_are_held_out_left_out_and_shared_out(sources, model):
    s = sources
    assert not set(s.valid) & set(s.train)
    assert len(s.valid) + len(s.train) == len(s.lengths) and len(s.valid) == 4
    left = pretrain.Sources(options('--leave-out'), model.words)
    assert (left.lengths == s.lengths - 2).all()
    few = pretrain.Sources(options('--share', '10'), model.words)
    assert len(few.train) == round(len(s.train) / 10) and set(few.train) < set(s.train)
    assert (few.valid == s.valid).all(), 'the held-out users do not depend on the share'
    least = pretrain.Sources(options('--share', '0.01'), model.words)
    assert len(least.train) == 4, 'a batch at least'
    twice = pretrain.parse_args(['one', 'two', 'one', '--batch', '4'])
    assert np.array_equal(pretrain.Sources(twice, model.words).items, s.items), 'each once'
    other = pretrain.Sources(options('--seed', '1'), model.words)
    assert set(other.valid) != set(s.valid)


# ------------------------------------------------------------------------ stage-PT: losses

def test_a_target_twice_in_a_batch_is_no_negative_of_itself(sources, model):
    histories, _, _ = sources.draw(np.arange(4), np.random.default_rng(0), model)
    items = np.array([5, 9, 5, 7])
    targets = model.pack_items(items, sources.tokens)
    loss, accuracy = pretrain.contrastive(model, histories, targets, items)
    logits = cosine_logits(model(histories), model(targets))
    candidates = [0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]
    losses, right = [], []
    for row, kept in enumerate(candidates):
        label = torch.tensor([kept.index(row)])
        losses.append(F.cross_entropy(logits[row, kept][None], label))
        right.append(float(logits[row, kept].argmax() == label))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert float(accuracy) == np.mean(right)


def test_masked_model_in_parts_equals_the_whole(sources, model):
    packed, _, _ = sources.draw(np.arange(8), np.random.default_rng(0), model)
    masked = mask_words(packed, np.random.default_rng(3), model.words.mask, 40)
    found = []
    for size in (100_000, 40):
        model.on(Machine(micro_tokens=size)).zero_grad()
        value = pretrain.masked_gradients(model, packed, *masked, 0.5)
        weights = model.lm_head.dense.weight, model.longformer.encoder.layer[0].attention.self.key.weight
        found.append((value, [weight.grad.clone() for weight in weights]))
    (whole, expected), (parts, gradients) = found
    assert float(whole) == pytest.approx(float(parts), rel=1e-5) and whole > 0
    for a, b in zip(expected, gradients):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_texts_of_which_nothing_is_masked_cost_nothing(sources, model):
    packed, _, _ = sources.draw(np.arange(8), np.random.default_rng(0), model)
    nothing = np.array([], int)
    assert pretrain.masked_gradients(model, packed, packed.tokens, nothing, 0.5) == 0


def test_a_steps_gradients_are_those_of_the_mean_loss_over_its_batches(sources, model):
    args = options('--mlm-weight', '0.3')
    training = SimpleNamespace(epoch=2, per_epoch=3, steps=lambda: [1])
    (seed, batches), = sources.steps(training, model, args)
    found = pretrain.step_gradients(model, batches, args)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    order = np.random.default_rng([0, 3, 2]).permutation(sources.train)
    users, rng = np.array_split(order, 3)[1], np.random.default_rng([0, 4, 2, 1])
    assert seed == rng.integers(2 ** 62)
    parts = np.array_split(users, -(-len(users) // 4))
    total, contrastive, mlm = 0, [], []
    for batch in parts:
        histories, targets, ids = sources.draw(batch, rng, model)
        loss, _ = pretrain.contrastive(model, histories, targets, ids)
        contrastive.append(loss.item())
        of_words = 0
        for packed in (histories, targets):
            tokens, chosen = mask_words(packed, rng, model.words.mask, model.config.vocab_size)
            right = torch.from_numpy(packed.tokens[chosen])
            packed = packed._replace(tokens=tokens)
            logits = model.mlm_logits(model(packed, np.arange(len(tokens))))[chosen]
            of_words = of_words + F.cross_entropy(logits, right)
        mlm.append(of_words.item())
        total = total + (loss + 0.3 * of_words) / len(parts)
    total.backward()
    assert float(found['contrastive']) == pytest.approx(np.mean(contrastive), rel=1e-5)
    assert float(found['mlm']) == pytest.approx(np.mean(mlm), rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def one_pass(model, packed, groups):
    """CLS of all sequences with the gradient of one pass: the groups one after the other."""
    states = torch.cat([model(packed.rows(group)) for group in groups])
    return states[torch.from_numpy(np.argsort(np.concatenate(groups)))]


@pytest.mark.parametrize('dropout', [0.0, 0.2])
@pytest.mark.parametrize('size', [20, 35])
def test_encoding_in_parts_has_the_gradients_of_one_pass(place, sources, size, dropout):
    """Gradient caching: the same states, gradients and dropout, and no pass larger than asked."""
    model = start_model(None, str(place / 'plm')).train()
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = dropout
    histories, targets, ids = sources.draw(np.arange(16), np.random.default_rng(0), model)
    seen, found = [], []
    model.on(Machine(micro_tokens=size))
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0].tokens)))
    groups = {id(packed): model.passes(packed) for packed in (histories, targets)}
    most = max(size, histories.lengths.max())
    made = sum(map(len, groups.values()))
    encode = model.encode
    for model.encode in encode, lambda packed: one_pass(model, packed, groups[id(packed)]):
        torch.manual_seed(4)
        model.zero_grad()
        seen.clear()
        loss, _ = pretrain.contrastive(model, histories, targets, ids)
        assert len(seen) == made > 9 and max(seen) <= most
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((loss, torch.rand(3), gradients))
        if model.encode is encode:
            assert len(seen) == 2 * made and max(seen) <= most, 'each one again'
    (a, drawn, mine), (b, next_drawn, whole) = found
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    assert torch.equal(drawn, next_drawn), 'what comes later draws as after one pass'
    assert mine.keys() == whole.keys() and len(mine) > 30
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-6, rtol=1e-5, msg=name)


def test_what_is_small_is_encoded_once_as_it_stands(place, sources):
    model = start_model(None, str(place / 'plm')).train()
    packed, _, _ = sources.draw(np.arange(16), np.random.default_rng(0), model)
    model.on(Machine(micro_tokens=len(packed.tokens) // 3))
    assert 1 < len(model.passes(packed)) <= KEPT
    torch.manual_seed(4)
    plain = model(packed)
    torch.manual_seed(4)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    states = model.encode(packed)
    states.sum().backward()
    assert torch.equal(states, plain) and len(seen) == 1


def test_held_out_users_are_drawn_alike_each_time(sources, model):
    args = options('--batch', '2')
    values = [pretrain.held_out_accuracy(model.train(), sources, args) for _ in range(2)]
    assert values[0] == values[1] and not model.training
    right = 0
    for number, group in enumerate(np.array_split(sources.valid, 2)):
        rng = np.random.default_rng([0, 2, number])
        histories, targets, _ = sources.draw(group, rng, model.eval())
        logits = cosine_logits(model(histories), model(targets))
        right += int((logits.argmax(1) == torch.arange(len(group))).sum())
    assert values[0] == right / len(sources.valid)


def test_stage_pt_as_a_command(place, data, tmp_path, capsys):
    """It leaves the word table as it was, and a checkpoint that knows its limit of tokens."""
    out = tmp_path / 'pt'
    command = ['one', 'two', '--plm', str(place / 'plm'), '--batch', '8', '--accumulate', '2',
               '--max-steps', '6', '--max-tokens', '64', '--lr', '0.001', '--warmup', '0',
               '--out', str(out)]
    pretrain.main(pretrain.parse_args(command))
    assert names(out) == ['.lock', 'log.csv', 'model.pt', 'row.json']
    tuned, begun = start_model(out), from_backbone(place / 'plm')
    assert (tuned.stage, tuned.config.max_tokens, tuned.items) == ('pt', 64, None)
    assert torch.equal(tuned.word_table, begun.word_table), 'frozen in pre-training'
    assert not torch.equal(tuned.longformer.encoder.layer[0].output.dense.weight, begun.longformer.encoder.layer[0].output.dense.weight)
    row = load_json(out / 'row.json')
    assert row['stage'] == 'pt' and 0 <= row['valid'] <= 1 and 'metrics' not in row
    log = (out / 'log.csv').read_text().splitlines()
    assert log[0] == 'epoch,seconds,contrastive,mlm,accuracy,valid'
    assert len(log) == row['epochs'] + 1
    capsys.readouterr()
    pretrain.main(pretrain.parse_args(command))
    assert 'is up to date' in capsys.readouterr().out


# ------------------------------------------------------------------------ stage-FT

def test_prefixes_are_of_the_training_part_with_the_item_after(data):
    data = data[0]
    users = np.flatnonzero(data.lengths >= 4)
    sizes = {user: set() for user in users}
    for seed in range(60):
        (items, offsets), labels = finetune.prefixes(data, users, np.random.default_rng(seed))
        for row, user in enumerate(users):
            train = data.items[data.offsets[user]:data.offsets[user + 1] - 2]
            size = offsets[row + 1] - offsets[row]
            assert (items[offsets[row]:offsets[row + 1]] == train[:size]).all()
            assert labels[row] == train[size]
            sizes[user].add(int(size))
    assert all(sizes[user] == set(range(1, data.lengths[user] - 2)) for user in users)


@pytest.mark.parametrize('size', [100_000, 30])
def test_fine_tunings_loss_is_a_softmax_over_all_items(data, model, size):
    tokens = tokenize(data[0].attributes, model.words)
    table = model.encode_items(tokens).requires_grad_()
    histories, labels = finetune.prefixes(data[0], np.arange(8), np.random.default_rng(0))
    model.on(Machine(micro_tokens=size))
    packed = model.pack(*histories, tokens)
    loss = finetune.add_gradients(model, table, packed, labels)
    states = model(packed)
    cosine = F.cosine_similarity(states[:, None], table[None, 1:], dim=2) / 0.05
    expected = F.cross_entropy(cosine, torch.from_numpy(labels).long() - 1)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    weight = model.longformer.encoder.layer[0].output.dense.weight
    of_weight, of_table = torch.autograd.grad(expected, [weight, table])
    torch.testing.assert_close(weight.grad, of_weight, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(table.grad, of_table, atol=1e-5, rtol=1e-3)


def test_tuned_layers(model):
    finetune.choose_layers(model, 'all')
    assert all(p.requires_grad for p in model.parameters())
    refused = ('2', 'some of 0 to 1'), ('1,x', 'some of 0 to 1'), ('', 'some of 0 to 1')
    for wrong, words in refused:
        with pytest.raises(UserError, match=f'--tune-layers {wrong}.*{words}'):
            finetune.choose_layers(model, wrong)
    finetune.choose_layers(model, '1')
    trained = {name.split('.')[3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {'1'}


def tuned(place, stage, *more):
    """Run finetune.py for a moment; returns the folder of its runs."""
    args = ['one', '--stage', stage, '--epochs', '2', '--batch', '16', '--lr', '0.001',
            '--warmup', '0', '--precision', 'float32', *map(str, more)]
    finetune.main(finetune.parse_args(args))
    return place / 'runs' / 'one'


def test_item_tables_of_the_two_stages(place, data, monkeypatch):
    """Stage 1 ends with the items as its best weights encode them; stage 2 keeps that table, or
    tunes it too; each stage's row says what it is."""
    folder = tuned(place, '1', '--plm', place / 'plm')
    first = start_model(folder / 'ft1-seed0')
    tokens = tokenize(data[0].attributes, first.words)
    assert torch.equal(first.items, first.encode_items(tokens))
    assert (first.stage, first.data) == ('ft1', data[0].fingerprint)
    rising = iter(range(9))  # each epoch is the best so far
    monkeypatch.setattr(finetune, 'value_of', lambda ranks: next(rising))
    tuned(place, '2')
    second = start_model(folder / 'ft2-seed0')
    assert torch.equal(second.items, first.items) and second.stage == 'ft2'
    assert not torch.equal(second.word_table, first.word_table)
    tuned(place, '2', '--trainable-items')
    third = start_model(folder / 'ft2-items-seed0')
    assert not torch.equal(third.items, first.items) and not third.items[0].any()
    tuned(place, '1', '--plm', place / 'plm', '--tune-layers', '1')
    layer = start_model(folder / 'ft1-layers1-seed0')
    begun = from_backbone(place / 'plm')
    moved = {name for name, value in layer.state_dict().items()
             if not torch.equal(value, begun.state_dict()[name])}
    positions = 'longformer.embeddings.item_position_embeddings.weight'
    assert {name.split('.')[3] for name in moved - {positions}} == {'1'}
    told = {name: load_json(folder / name / 'row.json') for name in
            ('ft1-seed0', 'ft2-seed0', 'ft2-items-seed0', 'ft1-layers1-seed0')}
    assert [(row['init'], row['mode'], row['trainable_items'], row['tune_layers']) for row in told.values()] \
        == [('lf', 'ft1', False, 'all'), ('ft1', 'ft2', False, 'all'), ('ft1', 'ft2', True, 'all'),
            ('lf', 'ft1', False, '1')]


@pytest.mark.parametrize('values, best', [([.5, .4, .3], 0), ([.5, .4, .6], 2), ([.5, .5, .5], 0)])
def test_stage_two_keeps_stage_ones_model_where_no_epoch_is_better(place, data, monkeypatch, values, best):
    first = start_model(tuned(place, '1', '--plm', place / 'plm') / 'ft1-seed0').state_dict()
    coming = iter(values)
    monkeypatch.setattr(finetune, 'value_of', lambda ranks: next(coming))
    folder = tuned(place, '2', '--again') / 'ft2-seed0'
    row = load_json(folder / 'row.json')
    assert (row['best_epoch'], row['valid'], row['epochs']) == (best, max(values), 2)
    second = start_model(folder).state_dict()
    assert all(torch.equal(second[name], value) for name, value in first.items()) == (best == 0)
    assert len((folder / 'log.csv').read_text().splitlines()) == 3, 'a line an epoch'


def test_stage_two_knows_what_it_began_with_after_a_stop(place, data, monkeypatch):
    """Stopped in its first epoch: what is kept is stage 1's model, not the one that was stopped."""
    tuned(place, '1', '--plm', place / 'plm')
    update = finetune.Training.update

    def stop(training, **losses):
        update(training, **losses)
        raise SystemExit(143)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(finetune.Training, 'update', stop)
        tuned(place, '2', '--again')
    coming = iter([.0, .0])  # of the epochs alone: the first validation is not made again
    monkeypatch.setattr(finetune, 'value_of', lambda ranks: next(coming))
    folder = tuned(place, '2')
    row = load_json(folder / 'ft2-seed0' / 'row.json')
    assert row['best_epoch'] == 0 and row['valid'] == load_json(folder / 'ft1-seed0' / 'row.json')['valid']
    first, second = (start_model(folder / name).state_dict() for name in ('ft1-seed0', 'ft2-seed0'))
    assert all(torch.equal(second[name], value) for name, value in first.items())


def test_the_stages_draw_prefixes_of_their_own(place, data, monkeypatch):
    drawn = []
    prefixes = finetune.prefixes

    def keep(*args):
        drawn.append(prefixes(*args))
        return drawn[-1]
    monkeypatch.setattr(finetune, 'prefixes', keep)
    tuned(place, '1', '--plm', place / 'plm', '--again')
    tuned(place, '2', '--again')
    assert len(drawn) == 4
    assert len({labels.tobytes() for _, labels in drawn}) == 4


def test_stage_pt_is_as_published_where_nothing_is_said():
    """RecFormer's code: 32 epochs, all of them, from the full rate on."""
    args = options()
    assert (args.epochs, args.patience, args.warmup, args.lr) == (32, 32, 0, 5e-5)


def test_words_are_frozen_where_that_is_asked_for(place, data):
    folder = tuned(place, '1', '--plm', place / 'plm')
    begun = from_backbone(place / 'plm').word_table
    assert not torch.equal(start_model(folder / 'ft1-seed0').word_table, begun)
    tuned(place, '1', '--plm', place / 'plm', '--freeze-words', '--again')
    frozen = start_model(folder / 'ft1-seed0')
    assert torch.equal(frozen.word_table, begun)
    weight = frozen.longformer.encoder.layer[0].output.dense.weight
    assert not torch.equal(weight, from_backbone(place / 'plm').longformer.encoder.layer[0].output.dense.weight)


def test_stage_two_needs_stage_ones_table_of_this_data(place, data, tmp_path):
    tuned(place, '1', '--plm', place / 'plm')
    first = place / 'runs' / 'one' / 'ft1-seed0'
    with pytest.raises(UserError, match="ft1-seed0: is not --stage 1's, of today's two: run that first"):
        finetune.main(finetune.parse_args(['two', '--stage', '2', '--checkpoint', str(first)]))
    tuned(place, '2')
    with pytest.raises(UserError, match="is not --stage 1's, of today's"):
        tuned(place, '2', '--checkpoint', place / 'runs' / 'one' / 'ft2-seed0')


def test_stage_zero_is_the_untouched_model_and_trains_nothing(place, data):
    folder = tuned(place, '0', '--plm', place / 'plm') / 'ft0-lf-seed0'
    assert names(folder) == ['.lock', 'ranks.npz', 'row.json']
    row = load_json(folder / 'row.json')
    assert (row['mode'], row['epochs'], row['valid']) == ('lf', 0, None)


# ------------------------------------------------------------------------ export

def export(*options):
    command = ['one', '--precision', 'float32', *map(str, options)]
    export_embeddings.main(export_embeddings.parse_args(command))


def test_exports_are_the_models_own_encodings(place, data, tmp_path, capsys):
    """Of the vanilla model without its random item positions; of a checkpoint, which needs no
    language model's folder."""
    plm = shutil.copytree(place / 'plm', tmp_path / 'plm')
    out = tmp_path / 'lf.pt'
    export('--plm', plm, '--out', out)
    content = load_pt(out, 'embeddings')
    vanilla = start_model(None, str(plm))
    vanilla.longformer.embeddings.item_position_embeddings.weight.data.zero_()
    tokens = tokenize(data[0].attributes, vanilla.words)
    torch.testing.assert_close(content['matrix'], vanilla.encode_items(tokens), atol=1e-5, rtol=0)
    assert content['items'] == data[0].item_ids and not content['matrix'][0].any()
    head = content['head']
    assert (head['plm'], head['dataset']) == (str(plm), 'one')
    rows = content['matrix'][1:].double()
    unit = F.normalize(rows, dim=1)
    others = ~torch.eye(len(rows), dtype=torch.bool)
    assert head['norm'] == pytest.approx(float(rows.norm(dim=1).mean()))
    assert head['cosine'] == pytest.approx(float((unit @ unit.T)[others].mean()))
    tuned(place, '1', '--plm', plm)
    shutil.rmtree(plm)
    out, folder = tmp_path / 'ft.pt', place / 'runs' / 'one' / 'ft1-seed0'
    export('--checkpoint', folder, '--out', out)
    items = start_model(folder).items
    torch.testing.assert_close(load_pt(out, 'embeddings')['matrix'], items, atol=1e-5, rtol=0)
    capsys.readouterr()
    export('--checkpoint', folder, '--out', out)
    assert 'is up to date' in capsys.readouterr().out
