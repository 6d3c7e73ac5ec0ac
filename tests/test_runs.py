"""What a run was made from, whether it still stands, its files.

Run: python -m pytest tests/test_runs.py
"""
import argparse
import json
import types

import numpy as np
import pytest

from common import runs
from common.files import ROOT, UserError
from common.options import add_earlier_options, option_identity


# ------------------------------------------------------------------------ code

@pytest.fixture
def tree(tmp_path, monkeypatch):
    """write(file, text) into a made-up repository that common/runs.py takes for its own."""
    monkeypatch.setattr(runs, 'ROOT', tmp_path)
    (tmp_path / 'common').mkdir()

    def write(file, text):
        (tmp_path / file).write_text(text)
        runs.parsed.cache_clear()
    runs.parsed.cache_clear()
    yield write
    runs.parsed.cache_clear()


PLAIN = '''import math


class A:
    size = 3

    def area(self, r):
        return math.pi * r ** 2


def text():
    return 'area'
'''
COMMENTED = '''"""What this file is for."""
import math  # for pi


class A:
    """Says what it is."""
    size = (3)

    def area(self, r):
        """Of a circle.

        r: its radius.
        """
        # the formula
        return math.pi * r ** 2  # of school


def text():
    """A word."""
    return "area"
'''


def digest_of(tree, text):
    tree('common/x.py', text)
    return runs.code_digest('common/x.py')


def test_digest_of_code_ignores_comments_docstrings_and_layout(tree):
    first = digest_of(tree, PLAIN)
    assert len(first) == 16
    other = COMMENTED.replace('What this', 'Why this').replace('Of a circle.', 'Of any circle.')
    other = other.replace('the formula', 'again').replace('A word', 'One word')
    assert digest_of(tree, COMMENTED) == digest_of(tree, other), 'changed comments and docstrings'
    assert digest_of(tree, PLAIN.replace('\n\n', '\n\n\n')) == first, 'blank lines'
    bare = COMMENTED.replace('# the formula', '').replace('# of school', '').replace('# for pi', '')
    assert digest_of(tree, bare) == digest_of(tree, COMMENTED), 'comments that are gone'


def test_digest_of_code_ignores_docstrings_that_are_new(tree):
    assert digest_of(tree, COMMENTED) == digest_of(tree, PLAIN)


@pytest.mark.parametrize('old, new', [
    ('size = 3', 'size = 4'), ('r ** 2', 'r ** 2.0'), ("'area'", "'areas'"), ('math.pi', 'math.e'),
    ('def text', 'def words'), ('size = 3', 'size = 3\n    more = 1'), ('math.pi * ', '')])
def test_digest_of_code_sees_what_the_code_does(tree, old, new):
    assert old in PLAIN
    assert digest_of(tree, PLAIN.replace(old, new)) != digest_of(tree, PLAIN)


def test_a_text_that_is_no_docstring_counts(tree):
    one, two = (f'"""Doc."""\nname = """{text}"""\n' for text in ('a', 'b'))
    assert digest_of(tree, one) != digest_of(tree, two)
    empty = 'def nothing():\n    """Only says {}."""\n'
    assert digest_of(tree, empty.format('this')) == digest_of(tree, empty.format('that'))


def test_code_follows_the_imports_at_the_top(tree):
    tree('main.py', 'import os, common.a\nfrom common.b import f\nfrom common import files, c\n'
                    'import text\nTEXT = """\nfrom here"""\n\n\n'
                    'def show():\n    from common.drawing import draw\n    draw()\n')
    tree('common/a.py', 'import numpy as np\nfrom common.deep import g\nX = np.pi\n')
    tree('common/b.py', 'from common.a import X\nfrom common.files import open_it\nf = X\n')
    tree('common/deep.py', 'g = 1\n')
    tree('common/drawing.py', 'draw = print\n')
    tree('common/files.py', 'from common.hidden import h\nopen_it = open\n')
    tree('common/hidden.py', 'h = 1\n')
    tree('common/text.py', 'no = 1\n')
    tree('mine.py', 'weight = 1\n')
    tree('common/c.py', 'from common.c import itself\nimport common.nowhere\nfrom mine import weight\n')
    found = runs.code_of('main.py')
    files = ['common/a.py', 'common/b.py', 'common/c.py', 'common/deep.py', 'main.py',
             'mine.py']
    assert sorted(found) == files, "a user's own file too; no drawing, no files.py and nothing that files.py alone needs"
    assert found['common/deep.py'] == runs.code_digest('common/deep.py')
    tree('common/deep.py', 'g = 2\n')
    assert runs.differences(found, runs.code_of('main.py')) == ['common/deep.py']
    tree('common/files.py', 'open_it = None\n')
    assert runs.differences(found, runs.code_of('main.py')) == ['common/deep.py']
    assert sorted(runs.code_of('common/b.py', 'common/c.py')) == [*files[:4], 'mine.py']
    tree('common/d.py', 'from .deep import g\n')
    assert sorted(runs.code_of('common/d.py')) == ['common/d.py', 'common/deep.py'], 'a relative import'
    tree('common/models.py', 'from common.deep import g\n\n\nclass Own:\n    size = g\n')
    assert sorted(runs.code_of('common/models.py')) == ['common/deep.py', 'common/models.py'], 'asked for itself'


def test_code_of_this_repository():
    seq = runs.code_of('train_seq.py', 'common/sasrec.py')
    assert {'train_seq.py', 'common/sasrec.py', 'common/sequence.py', 'common/layers.py',
            'common/training.py', 'common/metrics.py', 'common/arrays.py', 'common/initial.py',
            'common/data.py'} <= seq.keys()
    assert not {'common/bert4rec.py', 'common/gru4rec.py', 'common/recformer.py'} & seq.keys()
    tuned = runs.code_of('finetune.py')
    assert {'common/recformer.py', 'common/text.py', 'common/training.py'} <= tuned.keys()
    assert 'train_seq.py' not in tuned
    for found in (seq, tuned, runs.code_of('pretrain.py'), runs.code_of('export_embeddings.py')):
        assert not runs.NO_NUMBERS & found.keys()
        assert not {'common/report.py', 'common/figures.py', 'common/baselines.py'} & found.keys()
        assert all(len(digest) == 16 for digest in found.values())
    assert all((ROOT / file).exists() for file in runs.NO_NUMBERS), 'no name is out of date'


def test_differences_are_named_with_dots():
    old = {'options': {'lr': 1, 'same': [1, 2], 'gone': 3}, 'data': 'x', 'deep': {'a': {'b': 1}}}
    new = {'options': {'lr': 2, 'same': (1, 2), 'more': 4}, 'data': 'x', 'deep': {'a': {'b': 2}}}
    assert runs.differences(old, new) == ['deep.a.b', 'options.gone', 'options.lr', 'options.more']
    assert runs.differences(old, old) == [] == runs.differences({}, {})
    assert runs.differences({'a': {'b': 1}}, {'a': None}) == ['a']
    assert runs.differences({'a': 1}, {'a': 1.0}) == ['a'], 'as JSON writes them'
    assert runs.differences({'a': 0.1 + 0.2}, json.loads(json.dumps({'a': 0.1 + 0.2}))) == []


# ------------------------------------------------------------------------ is it up to date?

IDENTITY = {'options': {'lr': 0.1, 'batch': 4}, 'data': 'abc'}
CODE = {'common/a.py': 'one', 'train.py': 'two'}
OTHER_OPTIONS = {'options': {'lr': 0.2, 'batch': 4}, 'data': 'abd'}
OTHER_CODE = {'common/a.py': 'changed', 'train.py': 'two'}


def found(seconds=1):
    return {'identity': IDENTITY, 'code': CODE, 'seconds': seconds}


def args_of(word=''):
    return types.SimpleNamespace(again=word == '--again', keep=word == '--keep')


def run_of(identity, code, args, folder=None):
    return runs.Run(args, folder, identity, code)


@pytest.mark.parametrize('word', ['', '--keep'])
@pytest.mark.parametrize('seconds', [1, 10 ** 6])
def test_what_is_the_same_is_used_without_a_word(word, seconds, capsys):
    assert run_of(IDENTITY, CODE, args_of(word)).usable(found(seconds), 'here')
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('identity, code', [
    (IDENTITY, CODE), (OTHER_OPTIONS, CODE), (IDENTITY, OTHER_CODE), (OTHER_OPTIONS, OTHER_CODE)])
@pytest.mark.parametrize('seconds', [1, 10 ** 6])
def test_again_makes_everything_again(identity, code, seconds):
    assert not run_of(identity, code, args_of('--again')).usable(found(seconds), 'here')


def one_line(capsys):
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and out.endswith('\n'), out
    return out.strip()


@pytest.mark.parametrize('seconds', [0, 1, 600])
@pytest.mark.parametrize('word', ['', '--keep'])
def test_other_options_make_it_again(seconds, word, capsys):
    for code in (CODE, OTHER_CODE):
        assert not run_of(OTHER_OPTIONS, code, args_of(word)).usable(found(seconds), 'here')
        said = one_line(capsys)
        assert said == 'here: made again, as it was made with other data, options.lr'


@pytest.mark.parametrize('seconds', [0, 1, 600])
def test_other_code_makes_it_again(seconds, capsys):
    assert not run_of(IDENTITY, OTHER_CODE, args_of()).usable(found(seconds), 'here')
    said = one_line(capsys)
    assert said == 'here: made again, as it was made with other code (common/a.py)'


def test_files_that_came_and_went_are_other_code(capsys):
    code = {'common/a.py': 'one', 'common/new.py': 'three'}
    assert not run_of(IDENTITY, code, args_of()).usable(found(), 'here')
    assert 'other code (common/new.py, train.py)' in one_line(capsys)


@pytest.mark.parametrize('seconds', [1, 10 ** 6])
def test_keep_uses_what_other_code_made(seconds, capsys):
    assert run_of(IDENTITY, OTHER_CODE, args_of('--keep')).usable(found(seconds), 'here')
    assert one_line(capsys) == 'here: kept, though made by other code (common/a.py)'


def refusal(seconds, identity, code, word=''):
    with pytest.raises(UserError) as error:
        run_of(identity, code, args_of(word)).usable(found(seconds), 'here')
    return str(error.value)


def test_what_took_long_is_never_replaced_silently(capsys):
    assert runs.LONG == 600
    said = refusal(601, IDENTITY, OTHER_CODE)
    assert said == ('here: was made with other code (common/a.py) and took 10 minutes; '
                    '--again makes it again, --keep uses it as it is')
    for word in ('', '--keep'):
        said = refusal(7200, OTHER_OPTIONS, OTHER_CODE, word)
        assert said == ('here: was made with other data, options.lr and took 120 minutes; '
                        '--again makes it again'), 'options: to keep it would be wrong'
    assert capsys.readouterr().out == ''


def test_again_and_keep_exclude_each_other(capsys):
    parser = argparse.ArgumentParser()
    add_earlier_options(parser)
    assert not parser.parse_args([]).again and not parser.parse_args([]).keep
    args = parser.parse_args(['--keep'])
    assert args.keep and not {'again', 'keep'} & option_identity(args).keys()
    with pytest.raises(SystemExit) as leave:
        parser.parse_args(['--again', '--keep'])
    assert leave.value.code == 2 and 'not allowed with' in capsys.readouterr().err


# ------------------------------------------------------------------------ the files of a run

def made(folder, code=CODE, **row):
    """A finished run with metrics and ranks."""
    zero = np.zeros((2, 2), np.int32)
    ranks = {'users': np.arange(2), 'sampled': zero, 'full': zero + 1, 'new': zero + 2}
    metrics = {'sampled': {'NDCG@10': 0.25}, 'full': {'NDCG@10': 0.125}}
    row = {'seconds': 1, 'metrics': metrics, **row}
    return run_of(IDENTITY, code, args_of(), folder).write(ranks, **row)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('ELEPHANT_RUNS', str(tmp_path))
    return tmp_path / 'toy'


def test_a_row_says_what_made_it(root):
    row = made(root / 'a', seed=3)
    assert runs.read_row(root / 'a') == row == json.loads((root / 'a' / 'row.json').read_text())
    assert row['run'] == 'a' and row['seed'] == 3
    assert row['identity'] == IDENTITY and row['code'] == CODE
    assert {'commit', 'torch', 'transformers', 'command', 'date'} <= row.keys()
    assert runs.result_line(row) == 'NDCG@10 25.00 (100 negatives), 12.50 (all items)'
    trained = runs.result_line({**row, 'epochs': 5, 'best_epoch': 2})
    assert trained == f'best epoch 2 of 5, 1 s, {runs.result_line(row)}'
    assert runs.result_line({'epochs': 0, 'valid': 0.5}) == 'held-out accuracy 0.5000'
    assert {path.name for path in (root / 'a').iterdir()} == {'row.json', 'ranks.npz'}
    again, ranks = runs.read_ranks('toy', 'a')
    assert again == row and ranks['users'].tolist() == [0, 1]
    assert ranks['new'].tolist() == [[2, 2]] * 2


def test_a_finished_run_is_found_where_it_is_up_to_date(root, capsys):
    folder = root / 'a'
    assert run_of(IDENTITY, CODE, args_of(), folder).finished() is None
    assert runs.read_row(folder) == {}
    row = made(folder)
    assert run_of(IDENTITY, CODE, args_of(), folder).finished() == row
    assert run_of(IDENTITY, OTHER_CODE, args_of('--keep'), folder).finished() == row
    assert run_of(IDENTITY, OTHER_CODE, args_of(), folder).finished() is None
    made(folder)
    assert run_of(OTHER_OPTIONS, CODE, args_of('--keep'), folder).finished() is None
    made(folder)
    assert run_of(IDENTITY, CODE, args_of('--again'), folder).finished() is None
    said = [line for line in capsys.readouterr().out.splitlines() if 'written to' not in line]
    found = f'{folder} is up to date (NDCG@10 25.00 (100 negatives), 12.50 (all items))'
    assert [line for line in said if not line.startswith(f'{folder}: ')] == [found] * 2
    assert [' kept, though' in line for line in said] == [False, True, False, False, False], said
    made(folder, seconds=3600)
    with pytest.raises(UserError, match=f'{folder}: .*60 minutes; --again'):
        run_of(OTHER_OPTIONS, CODE, args_of(), folder).finished()


def test_a_run_that_is_made_again_is_not_taken_for_finished(root):
    """Where row.json stands, the rest is whole. Making a run again replaces log.csv and model.pt
    before row.json; killed between, the old options must not find the old row."""
    folder = root / 'a'
    for identity, code, word in ((OTHER_OPTIONS, CODE, ''), (IDENTITY, OTHER_CODE, ''),
                                 (IDENTITY, CODE, '--again')):
        made(folder)
        (folder / 'model.pt').touch()
        assert run_of(identity, code, args_of(word), folder).finished() is None
        assert run_of(IDENTITY, CODE, args_of(), folder).finished() is None, 'it was not made since'
        assert not (folder / 'model.pt').exists(), 'nothing starts from it'
    (folder / 'model.pt').touch()  # without a row it may be anybody's
    assert run_of(IDENTITY, CODE, args_of(), folder).finished() is None
    assert (folder / 'model.pt').exists()


def test_identities_survive_the_file(root):
    """Tuples, None, long floats and text beyond ASCII are the same after JSON."""
    identity = {'options': {'x': (1, 2), 'y': None, 'z': 0.1 + 0.2, 'ä': 'é'}, 'deep': {}}
    row = run_of(identity, CODE, args_of(), root / 'a').write(seconds=1, valid=0)
    assert run_of(identity, CODE, args_of(), root / 'a').finished() == json.loads(json.dumps(row))


def test_rows_of_a_dataset_are_those_with_metrics(root):
    for name in ('b', 'a'):
        made(root / name)
    run_of(IDENTITY, CODE, args_of(), root / 'pt').write(seconds=1, valid=0)
    (root / 'unfinished').mkdir()
    assert [row['run'] for row in runs.load_rows('toy')] == ['a', 'b']
    made(root / 'a', seed=5)
    assert [row.get('seed') for row in runs.load_rows('toy')] == [5, None], 'in its own place'
    assert runs.load_rows('nothing') == []


@pytest.mark.parametrize('text', ['[{"run"', '', '{}', '[1]', '7', 'null', '"run"', '\ufeff{}',
                                  '{"run": "a", "metrics": {}}', '{"run": "a", "identity": {}}'])
def test_a_row_that_is_not_ours_is_refused(root, text):
    folder = root / 'a'
    folder.mkdir(parents=True)
    (folder / 'row.json').write_text(text)
    for read in (lambda: run_of(IDENTITY, CODE, args_of(), folder).finished(),
                 lambda: run_of(IDENTITY, CODE, args_of('--again'), folder).finished(),
                 lambda: runs.load_rows('toy'), lambda: runs.read_ranks('toy', 'a')):
        with pytest.raises(UserError, match='a/row.json: .*remove it and run again'):
            read()
    assert (folder / 'row.json').read_text() == text, 'it is not touched'


def test_a_row_that_is_not_text_is_refused(root):
    made(root / 'a')
    (root / 'a' / 'row.json').write_bytes(b'\xff\xfe{}')
    with pytest.raises(UserError, match='a/row.json: no valid JSON of ours'):
        runs.load_rows('toy')


def test_missing_and_damaged_ranks_are_named(root):
    made(root / 'a')
    path = root / 'a' / 'ranks.npz'
    whole = path.read_bytes()
    broken = [whole[:n] for n in range(0, len(whole), 61)]
    for place in range(0, len(whole), 17):
        changed = bytearray(whole)
        changed[place] ^= 255
        broken.append(bytes(changed))
    broken += [b'junk', b'PK\x03\x04junk']
    refused = 0
    for content in broken:
        path.write_bytes(content)
        try:
            _, ranks = runs.read_ranks('toy', 'a')
            assert ranks['full'].tolist() == [[1, 1]] * 2, 'a byte that nothing reads'
        except UserError as error:
            assert 'a/ranks.npz: missing or damaged; remove' in str(error)
            refused += 1
    assert refused > len(broken) / 2
    np.savez(path, users=np.arange(2))
    with pytest.raises(UserError, match='a/ranks.npz: missing or damaged'):
        runs.read_ranks('toy', 'a')
    path.unlink()
    with pytest.raises(UserError, match='a/ranks.npz: missing or damaged'):
        runs.read_ranks('toy', 'a')


@pytest.mark.parametrize('name', ['../a', 'a/b', '', 'a b', 'a;ls', 'a\n'])
def test_names_of_runs_are_plain_words(root, name):
    made(root / 'a')
    made(root.parent / 'a')
    with pytest.raises(UserError, match='no such run in .*toy'):
        runs.read_ranks('toy', name)


@pytest.mark.parametrize('name', ['nothing', 'pt', '.', '..'])
def test_a_run_that_is_not_there_is_named(root, name):
    run_of(IDENTITY, CODE, args_of(), root / 'pt').write(seconds=1, valid=0)
    with pytest.raises(UserError, match='no such run in .*toy'):
        runs.read_ranks('toy', name)


def test_a_renamed_run_is_named_with_what_to_do(root):
    made(root / 'a')
    (root / 'a').rename(root / 'b')
    (row,) = runs.load_rows('toy')
    with pytest.raises(UserError, match='^b: no such run .*a renamed folder is none: move it out'):
        runs.read_ranks('toy', row['run'])
