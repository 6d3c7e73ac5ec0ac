"""A run is a folder: model.pt, row.json, ranks.npz, log.csv; while it trains, resume.pt.

row.json is written last: where it stands, the rest is whole. It holds what made the run:
- `identity`: options, and digests of the inputs' content (data, tokens, weights, embeddings);
- `code`: a digest of every source file that defines its numbers.
A finished run is used as it is only where both are what this command would use.
"""
import ast
import functools
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from common.files import (ROOT, UserError, digest, load_json, load_npz, runs_root, save_json,
                          save_npz)

LONG = 600  # seconds: what took longer than this is replaced only when asked to (--again)
# Files that read, write, print and look up, but define no number.
NO_NUMBERS = set('''common/files.py common/formats.py common/models.py common/options.py
                common/progress.py common/runs.py common/sources.py'''.split())


# ------------------------------------------------------------------------ code

@functools.cache
def parsed(file):
    """A source file's text without comments and docstrings (and without a body where that was one),
    a statement a line; '' where there is no such file. Read once: a table asks for every run."""
    path = ROOT / file
    if not path.exists():
        return ''
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        with suppress(TypeError):  # a node that has no docstring
            if ast.get_docstring(node):
                del node.body[0]
    return ast.unparse(tree)


def code_digest(file):
    """16 hex digits of what a source file does."""
    return digest(parsed(file))


def code_of(*files):
    """{file: digest} of these source files and of all of ours that they import at their top (an
    import inside a function is for reading, printing or drawing)."""
    found = {}
    files = list(files)
    for file in files:  # which grows meanwhile
        if file not in found and parsed(file):
            found[file] = code_digest(file)
            for line in re.findall('(?m)^(?:from|import) .*', parsed(file)):
                folder = 'common/' if re.search(r'common|from \.', line) else ''
                imported = {f'{folder}{word}.py' for word in re.findall(r'\w+', line)}
                files += sorted(imported - NO_NUMBERS)
    return found


def changed_code(row):
    """Files that define a run's numbers and are not today what they were when it was made."""
    return [file for file, then in row.get('code', {}).items() if code_digest(file) != then]


def differences(old, new):
    """Names of what differs between two nested dictionaries, dots between the levels."""
    names = []
    for key in sorted({*old, *new}):
        a = old.get(key)
        b = new.get(key)
        if type(a) is type(b) is dict:
            names += [f'{key}.{name}' for name in differences(a, b)]
        elif digest(a) != digest(b):  # as JSON, which knows no tuples
            names.append(key)
    return names


# ------------------------------------------------------------------------ one run

class Run(NamedTuple):
    """One run: the command's options, its folder, and what makes it what it is (see above)."""
    args: Namespace
    folder: Path
    identity: dict
    code: dict

    def usable(self, found, where):
        """Whether `found` (a row, or a resume file's head) can stand for this run. What took long
        is never given up silently: UserError unless --again or --keep is said."""
        if self.args.again:
            return False
        options = differences(found['identity'], self.identity)
        files = differences(found['code'], self.code)
        why = f'other {", ".join(options)}' if options else f'other code ({", ".join(files)})'
        if not options and (self.args.keep or not files):
            if files:
                print(f'{where}: kept, though made by {why}')
            return True
        if found['seconds'] > LONG:
            keep = '' if options else ', --keep uses it as it is'
            raise UserError(f'{where}: was made with {why} and took {found["seconds"] / 60:.0f} '
                            f'minutes; --again makes it again{keep}')
        print(f'{where}: made again, as it was made with {why}')
        return False

    def finished(self):
        """The row of the finished run in the folder where it is up to date, which is said; else
        None."""
        row = read_row(self.folder)
        if row and self.usable(row, self.folder):
            print(f'{self.folder} is up to date ({result_line(row)})')
            return row
        if row:  # the files beside it will not be those that it tells of, nor a checkpoint
            for name in ('row.json', 'model.pt'):
                (self.folder / name).unlink(missing_ok=True)  # another process may be faster

    def write(self, ranks=None, **row):
        """Write ranks.npz (per-user ranks, where there are any), then row.json, which says the
        options too; returns the row. resume.pt has done its work."""
        # of today's code ('+': it was changed since); there may be no git on this machine
        git = ('git describe --always --exclude="*" --abbrev=12 --dirty=+ 2>/dev/null'
               ' || echo unknown')
        row = {'run': self.folder.name, **self.identity.get('options', {}), **row,
               'commit': subprocess.check_output(git, shell=True, cwd=ROOT, text=True).strip(),
               'device': getattr(self.args, 'device', 'cpu'), 'torch': version('torch'),
               'transformers': version('transformers'), 'command': ' '.join(sys.argv),
               'date': str(date.today()), 'identity': self.identity, 'code': self.code}
        if ranks:
            save_npz(self.folder / 'ranks.npz', ranks)
        save_json(self.folder / 'row.json', row)
        (self.folder / 'resume.pt').unlink(missing_ok=True)
        print(f'{self.folder.name}: {result_line(row)}, written to {self.folder}', flush=True)
        return row


# ------------------------------------------------------------------------ rows

def read_row(folder):
    """The row of a finished run, {} where there is none. UserError: row.json is not ours."""
    return load_json(folder / 'row.json', 'run', 'identity', 'code', 'seconds')


def result_line(row):
    """What a row says of its run: its training, where it had one; NDCG@10 in the two main rankings,
    in percent, or stage-PT's held-out accuracy."""
    trained = ''
    if row.get('epochs'):
        trained = f'best epoch {row["best_epoch"]} of {row["epochs"]}, {row["seconds"]:.0f} s, '
    if 'metrics' not in row:
        return f'{trained}held-out accuracy {row["valid"]:.4f}'
    metrics = row['metrics']
    return (f'{trained}NDCG@10 {100 * metrics["sampled"]["NDCG@10"]:.2f} (100 negatives), '
            f'{100 * metrics["full"]["NDCG@10"]:.2f} (all items)')


def load_rows(dataset):
    """All rows of a dataset that have metrics, by name of their run."""
    folders = sorted((runs_root() / dataset).glob('*'))
    # as they are called here: one may be a copy
    rows = [read_row(folder) | {'dataset': dataset, 'run': folder.name} for folder in folders]
    return [row for row in rows if 'metrics' in row]


def read_ranks(dataset, run):
    """(row, {'users', 'sampled', 'full', 'new'}) of a run. UserError: there is none, or damaged."""
    folder = runs_root() / dataset / run
    row = read_row(folder)
    if 'metrics' not in row or row['run'] != run:  # a run's name leads to no other folder
        raise UserError(f'{run}: no such run in {runs_root() / dataset} (a whole name is needed; '
                        'ELEPHANT_RUNS: elsewhere; a renamed folder is none: move it out)')
    return row, load_npz(folder / 'ranks.npz', 'users sampled full new'.split(),
                         f'remove {folder} and run again, --again')
