"""SASRec and BERT4Rec: causality, padding, losses, and which tensors each mode moves. Run: python -m pytest tests/test_seq_models.py"""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train_seq
from common import initial
from common.bert4rec import BERT4Rec, Block
from common.data import prepare
from common.files import UserError, load_pt, save_pt
from common.metrics import load_rows
from common.sasrec import Layout, SASRec, SelfAttention, draw_negatives, softmax_loss
from tests.toy import canonical

N, H = 20, 16


def model(kind, **options):
    torch.manual_seed(0)
    return kind(kind.random_table(N, H), max_items=10, **options).eval()


def ragged_of(*rows):
    return np.concatenate([np.array(r, np.int32) for r in rows]), np.cumsum([0] + [len(r) for r in rows])


@pytest.mark.parametrize('causal', [True, False])
def test_attention_equals_torchs_own(causal):
    torch.manual_seed(0)
    ours, theirs = SelfAttention(H, 2, 0.0), torch.nn.MultiheadAttention(H, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    lengths = np.array([3, 1, 5])
    q, x = torch.randn(9, H), torch.randn(9, H)
    out = ours(q, x, Layout(lengths, 10, causal, 'cpu'))
    for i, (a, b) in enumerate(((0, 3), (3, 4), (4, 9))):
        mask = torch.ones(b - a, b - a).triu(1).bool() if causal else None
        torch.testing.assert_close(out[a:b], theirs(q[None, a:b], x[None, a:b], x[None, a:b], attn_mask=mask)[0][0], atol=1e-6, rtol=1e-5)


def test_bert4recs_block_equals_torchs_encoder_layer():
    torch.manual_seed(0)
    ours = Block(H, 2, 0.1).eval()
    theirs = torch.nn.TransformerEncoderLayer(H, 2, 4 * H, 0.1, 'gelu', batch_first=True, norm_first=True).eval()
    with torch.no_grad():
        a, b = ours.attention, theirs.self_attn
        b.in_proj_weight.copy_(torch.cat([a.query.weight, a.key.weight, a.value.weight]))
        b.in_proj_bias.copy_(torch.cat([a.query.bias, a.key.bias, a.value.bias]))
    for mine, other in ((ours.attention.out, theirs.self_attn.out_proj), (ours.inner, theirs.linear1), (ours.outer, theirs.linear2),
                        (ours.attention_norm, theirs.norm1), (ours.ffn_norm, theirs.norm2)):
        other.load_state_dict(mine.state_dict())
    x = torch.randn(5, H)
    torch.testing.assert_close(ours(x, Layout(np.array([5]), 10, False, 'cpu')), theirs(x[None])[0], atol=1e-6, rtol=1e-5)


def test_sasrec_is_causal():
    m, lengths = model(SASRec), np.array([5])
    states = lambda *items: m(m.item_embedding()[list(items)], Layout(lengths, 10, True, 'cpu'))
    before, after = states(1, 2, 3, 4, 5), states(1, 2, 3, 9, 5)
    assert torch.equal(before[:3], after[:3]) and not torch.allclose(before[3:], after[3:])


@pytest.mark.parametrize('kind', [SASRec, BERT4Rec])
def test_a_batch_changes_no_state_and_old_items_are_cut(kind):
    m = model(kind)
    rows = [1, 2, 3], [4], list(range(1, 20))
    together = m.states(*ragged_of(*rows), 'cpu')
    alone = torch.cat([m.states(*ragged_of(r), 'cpu') for r in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    most = 10 if kind is SASRec else 9
    torch.testing.assert_close(alone[2:], m.states(*ragged_of(rows[2][-most:]), 'cpu'), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('kind', [SASRec, BERT4Rec])
def test_the_newest_item_has_the_last_position(kind):
    assert Layout(np.array([3, 1]), 10, True, 'cpu').position.tolist() == [7, 8, 9, 9]


def test_sasrec_losses_equal_the_plain_ones():
    m = model(SASRec)
    items, offsets = ragged_of([1, 2, 3], [4, 5], list(range(1, 15)))
    negatives = draw_negatives(items, offsets, N, np.random.default_rng(0))
    states, targets, wrong = [], [], []
    for a, b in zip(offsets[:-1], offsets[1:]):
        row = items[a:b][-11:]  # ten inputs at most, each with the item after it
        states.append(m(m.item_embedding()[row[:-1]], Layout(np.array([len(row) - 1]), 10, True, 'cpu')))
        targets += row[1:].tolist()
        wrong += negatives[a:b][-11:][1:].tolist()
    states, table = torch.cat(states), m.item_embedding()
    logits = states @ table.T
    ce = F.cross_entropy(logits[:, 1:], torch.tensor(targets) - 1)
    ours = m.loss(items, offsets, None, 'cpu', 'ce')
    torch.testing.assert_close(ours, ce)
    for a, b in zip(*(torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for loss in (ours, ce))):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    at = lambda ids: logits[torch.arange(len(ids)), torch.tensor(ids)]
    bce = F.binary_cross_entropy_with_logits(at(targets), torch.ones(len(targets))) + F.binary_cross_entropy_with_logits(at(wrong), torch.zeros(len(wrong)))
    torch.testing.assert_close(m.loss(items, offsets, None, 'cpu', 'bce', negatives), bce)


def test_softmax_in_parts_equals_torchs_cross_entropy_with_gradients():
    plain = lambda states, table, bias, target: F.cross_entropy((states @ table.T + bias)[:, 1:], target - 1)
    parts = lambda *inputs: softmax_loss(*inputs, chunk=50)
    found = []
    for f in (plain, parts, softmax_loss):
        torch.manual_seed(1)
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((9, H), (N + 1, H), (N + 1,))]
        loss = f(*inputs, torch.arange(1, 10)) * 3
        loss.backward()
        found.append([loss, *(x.grad for x in inputs)])
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b)
    assert not found[1][2][0].any(), 'padding gets no gradient'
    frozen = torch.randn(N + 1, H)
    softmax_loss(inputs[0], frozen, None, torch.arange(1, 10)).backward()
    assert frozen.grad is None


def test_negatives_of_training_are_never_the_users_own():
    items, offsets = ragged_of(range(1, 19), [3, 3, 3], range(1, 21))
    out = draw_negatives(items, offsets, N, np.random.default_rng(0))
    assert set(out[:18]) <= {19, 20} and 3 not in out[18:21] and out.min() >= 1 and out.max() <= N


def test_bert4rec_masks_15_percent_and_learns_at_masked_places_only():
    m, rng = model(BERT4Rec), np.random.default_rng(0)
    items, offsets = np.tile(np.arange(1, 11, dtype=np.int32), 400), np.arange(0, 4001, 10)
    seen = {}
    m.forward = lambda shown, masked, layout, rows: (seen.update(shown=shown, masked=masked), torch.randn(len(rows), H))[1]
    import common.bert4rec as module
    original, module.softmax_loss = module.softmax_loss, lambda s, t, b, target: seen.update(target=target) or s.sum()
    try:
        m.loss(items, offsets, rng, 'cpu')
    finally:
        module.softmax_loss = original
    expected = 0.91 * 0.15 + 0.09 * 0.1
    assert abs(len(seen['target']) / 4000 - expected) < 0.02
    assert abs(seen['masked'].float().mean().item() - (0.91 * 0.15 * 0.8 + 0.09 * 0.1)) < 0.02
    untouched = torch.from_numpy(items.astype(np.int64)) == seen['shown']
    assert untouched.float().mean() > 0.97


@pytest.mark.parametrize('kind', [SASRec, BERT4Rec])
def test_savings_change_no_loss_and_no_gradient(kind, monkeypatch):
    """The same batch in squares of another width, all rows leaving the last block, and the softmax in one piece."""
    m = model(kind)
    batch = ragged_of(*[list(range(1, k)) for k in (3, 12, 5, 19, 7, 3, 4)])
    name = 'ce' if kind is SASRec else 'masked'

    def found():
        m.zero_grad()
        loss = m.loss(*batch, np.random.default_rng(5), 'cpu', name)
        loss.backward()
        return [loss.detach(), m.states(*batch, 'cpu').detach()] + [p.grad.clone() for p in m.parameters()]
    ours = found()
    original, given = kind.forward, 2 if kind is SASRec else 3
    monkeypatch.setattr('common.sasrec.WIDTH', 1)
    monkeypatch.setattr(kind, 'forward', lambda self, *a: original(self, *a[:given]) if len(a) == given else original(self, *a[:given])[a[given]])
    for a, b in zip(ours, found()):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize('tied', [True, False])
def test_bert4rec_heads(tied):
    m = model(BERT4Rec, tied=tied)
    table, bias = m.scorer()
    assert (table is m.item_embedding.weight) == tied and bias.shape == (N + 1,)
    m.train().loss(*ragged_of(list(range(1, 20)), list(range(2, 20))), np.random.default_rng(1), 'cpu').backward()
    assert m.mask.grad.any(), 'the mask vector trains'


# ---------------------------------------------------------------------------- train_seq.py in-process

@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_DATA', str(tmp_path / 'data'))
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path / 'runs'))
    canonical(tmp_path / 'data' / 'toy')
    data = prepare('toy', (4, 1, 0))
    for source in ('lf', 'ft'):
        torch.manual_seed(len(source) + ord(source[0]))
        matrix = torch.cat([torch.zeros(1, H), 5 + 3 * torch.randn(data.n_items, H)])
        save_pt(tmp_path / 'runs' / 'toy' / 'embeddings' / f'{source}.pt', 'embeddings', {
            'identity': source, 'dataset': 'toy', 'fingerprint': data.fingerprint, 'items': data.item_ids, 'plm': 'p', 'hidden': H}, matrix=matrix)
    return data, tmp_path / 'runs' / 'toy'


def run(*options, model='sasrec', epochs=2):
    args = train_seq.parse_args(['toy', '--model', model, '--lrs', '0.01', '--epochs', str(epochs), '--precision', 'float32', *options])
    train_seq.main(args)


def moved(before, after):
    return {k for k in before if not torch.equal(before[k], after[k])}


@pytest.mark.parametrize('kind', ['sasrec', 'bert4rec'])
def test_every_mode_trains_exactly_what_it_names(toy, kind):
    data, folder = toy
    e = load_pt(folder / 'embeddings' / 'ft.pt', 'embeddings')['matrix']
    run('--variants', 'random', 'ft-freeze', 'ft-trainable', 'ft-further-all', 'ft-further-emb', 'ft-id+text', model=kind)
    loss = 'bce' if kind == 'sasrec' else 'masked'
    state = lambda v: load_pt(folder / 'seq' / f'{kind}-{loss}-{v}-raw-seed0-lr0.01.pt', 'seq')['model']
    frozen = state('ft-freeze')
    table = 'item_embedding.weight'
    assert torch.equal(frozen[table], e), 'freeze: the table is the embeddings to the bit'
    assert not torch.equal(state('ft-trainable')[table], e)
    further_all, further_emb, both = state('ft-further-all'), state('ft-further-emb'), state('ft-id+text')
    assert moved(frozen, further_emb) == {table}
    names = moved(frozen, further_all)
    # no gradient reaches: the key bias (a constant in the softmax); with a patience of epochs the rest must move
    assert names >= {k for k in frozen if not k.endswith('key.bias') and 'position' not in k}
    assert torch.equal(both['item_embedding.text'], e) and both[table].norm() < e.norm() / 3
    assert len(load_rows(folder)) == 6


def test_scales():
    torch.manual_seed(0)
    matrix = torch.cat([torch.zeros(1, H), 4 + torch.randn(N, H)])
    made = {s: initial.initial_table(matrix, s, 0.4, 0) for s in ('raw', 'rescaled', 'centred', 'whitened', 'permuted')}
    assert torch.equal(made['raw'], matrix)
    for name, t in made.items():
        assert not t[0].any()
        if name != 'raw':
            assert t[1:].norm(dim=1).mean().item() == pytest.approx(0.4, rel=1e-5)
    assert made['centred'][1:].mean(0).abs().max() < 1e-6
    c = torch.cov(made['whitened'][1:].T)
    torch.testing.assert_close(c, torch.eye(H) * c[0, 0], atol=1e-5, rtol=1e-3)
    rows = lambda t: sorted(map(tuple, (t * 1e4).round().tolist()))
    assert rows(made['permuted']) == rows(made['centred']) and not torch.equal(made['permuted'], made['centred'])
    small = initial.reduce_dimensions(matrix, 3, 'x')
    full = matrix[1:] - matrix[1:].mean(0)
    assert small.shape == (N + 1, 3) and (small[1:].norm() / full.norm()).item() == pytest.approx(
        (torch.linalg.svdvals(full)[:3].norm() / torch.linalg.svdvals(full).norm()).item(), rel=1e-4)


def test_rate_is_chosen_on_validation_with_the_first_seed(toy):
    _, folder = toy
    run('--seeds', '3', '4', '--lrs', '0.01', '0.0001')
    tried = {p.name for p in (folder / 'seq').glob('*.pt')}
    rows = {r['seed']: r for r in load_rows(folder)}
    best = max((0.01, 0.0001), key=lambda lr: load_pt(folder / 'seq' / f'sasrec-bce-random-raw-seed3-lr{lr:g}.pt', 'seq')['meta']['valid_ndcg10'])
    assert rows[3]['lr'] == rows[4]['lr'] == best and len(tried) == 3


def test_finished_runs_are_found_and_changed_ones_done_again(toy, capsys):
    _, folder = toy
    run('--variants', 'lf-freeze')
    first = load_rows(folder)
    run('--variants', 'lf-freeze')
    assert 'up to date' in capsys.readouterr().out and load_rows(folder) == first
    content = load_pt(folder / 'embeddings' / 'lf.pt', 'embeddings')
    save_pt(folder / 'embeddings' / 'lf.pt', 'embeddings', content['meta'], matrix=content['matrix'] * 2)
    run('--variants', 'lf-freeze')
    assert 'up to date' not in capsys.readouterr().out and len(load_rows(folder)) == 1


@pytest.mark.parametrize('kind', ['sasrec', 'bert4rec'])
def test_killed_and_started_again_gives_the_same_bits(toy, monkeypatch, kind):
    _, folder = toy
    file = folder / 'seq' / f'{kind}-{"bce" if kind == "sasrec" else "masked"}-random-raw-seed0-lr0.01.pt'
    more = '--batch', '8', '--save_every', '2'
    run(*more, model=kind, epochs=3)
    whole, row = load_pt(file, 'seq')['model'], load_rows(folder)[0]
    file.unlink()
    (folder / 'results.json').unlink()
    calls = []

    def killed(*a, **k):
        calls.append(1)
        if len(calls) in (4, 9):
            raise KeyboardInterrupt
        return original(*a, **k)
    original = train_seq.apply_gradients
    monkeypatch.setattr(train_seq, 'apply_gradients', killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(*more, model=kind, epochs=3)
    run(*more, model=kind, epochs=3)
    again = load_pt(file, 'seq')['model']
    assert all(torch.equal(whole[k], again[k]) for k in whole) and load_rows(folder)[0]['metrics'] == row['metrics']
    assert not list((folder / 'seq').glob('*.resume'))


def test_stopped_between_the_last_step_of_an_epoch_and_its_validation(toy, monkeypatch):
    _, folder = toy
    file = folder / 'seq' / 'sasrec-bce-random-raw-seed0-lr0.01.pt'
    more = '--batch', '8', '--save_every', '1'
    run(*more)
    whole = load_pt(file, 'seq')['model']
    file.unlink()
    original = train_seq.Experiment.ranks
    monkeypatch.setattr(train_seq.Experiment, 'ranks', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(*more)
    monkeypatch.setattr(train_seq.Experiment, 'ranks', original)
    run(*more)
    again = load_pt(file, 'seq')['model']
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_further_training_leaves_the_freeze_rows_as_they_are(toy):
    """Each variant keeps the rate of its own first seed, also where further- starts from a freeze of another rate."""
    _, folder = toy
    rates = '--lrs', '0.01', '0.00001', '--seeds', '0', '1'
    run('--variants', 'ft-freeze', *rates)
    before = {r['run']: r for r in load_rows(folder)}
    run('--variants', 'ft-further-all', *rates)
    after = {r['run']: r for r in load_rows(folder)}
    assert all(after[k] == v for k, v in before.items()) and len(after) == 4


def test_leaving_the_history_out_trains_nothing_again(toy, monkeypatch):
    _, folder = toy
    run()
    monkeypatch.setattr(train_seq, 'apply_gradients', lambda *a: pytest.fail('it trains'))
    run('--exclude_history')
    rows = {r['exclude_history']: r['metrics'] for r in load_rows(folder)}
    assert rows[True]['sampled'] == rows[False]['sampled'] and rows[True]['full'] != rows[False]['full']


def test_a_rate_that_diverges_is_left_out(toy, capsys):
    _, folder = toy
    run('--lrs', '1e30', '0.01')
    assert 'random-raw-seed0 lr 1e+30: ' in capsys.readouterr().out and load_rows(folder)[0]['lr'] == 0.01
    with pytest.raises(UserError, match='diverged with every rate'):
        run('--lrs', '1e30', '--seeds', '1')


def test_what_cannot_train_is_refused(toy, monkeypatch):
    with pytest.raises(UserError, match='4 heads'):
        run('--hidden', '18', model='bert4rec')
    monkeypatch.setenv('ELEPHANT_DATA', str(toy[1].parent / 'short'))
    canonical(toy[1].parent / 'short' / 'toy', length=(3, 4))
    prepare('toy', (3, 1, 0))
    with pytest.raises(UserError, match='two training items'):
        run('--hidden', '16')


@pytest.mark.parametrize('change, word', [
    (lambda m, e: m.update(items=m['items'][::-1]), 'other items'), (lambda m, e: m.update(fingerprint='x'), 'another version'),
    (lambda m, e: e.__setitem__((3, 2), float('nan')), 'finite'), (lambda m, e: e.__setitem__((0, 0), 1.0), 'zero row 0'),
    (lambda m, e: m.update(hidden=99), 'x 99')])
def test_embeddings_of_something_else_are_refused(toy, change, word):
    _, folder = toy
    content = load_pt(folder / 'embeddings' / 'lf.pt', 'embeddings')
    change(content['meta'], content['matrix'])
    save_pt(folder / 'embeddings' / 'lf.pt', 'embeddings', content['meta'], matrix=content['matrix'])
    with pytest.raises(UserError, match=word):
        run('--variants', 'lf-freeze')
    assert not (folder / 'results.json').exists()
