"""Files that are whole or absent, identities of what they were made from, errors a user can act on.

Every output is written beside its final name and renamed; every `.pt` carries a `meta` dictionary that says
what it is (`kind`) and what made it (`identity`), and lies beside a readable copy of that dictionary.
"""
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import subprocess
import sys

import numpy as np
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent
HOST = platform.node() or 'here'


class UserError(Exception):
    """Something the user can mend: its text is the one line they see; the exit code is 2."""


class Diverged(UserError):
    """A loss, a gradient or a score is not finite."""


def command(main, *args):
    """Run a script's main; a UserError becomes one line on standard error and exit code 2."""
    try:
        main(*args)
    except UserError as error:
        sys.exit(fail(error))
    except OSError as error:  # a full disk, a folder without permission: the name and the reason are in its text
        sys.exit(fail(f'{error.filename or "writing"}: {error.strerror or error}'))
    except (torch.OutOfMemoryError, MemoryError) as error:
        sys.exit(fail(out_of_memory(error)))
    except RuntimeError as error:  # a CPU's allocator has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
        sys.exit(fail(out_of_memory(error)))
    except KeyboardInterrupt:
        print('interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        sys.exit(130)


def out_of_memory(error):
    why = str(error).splitlines()[0] if str(error) else 'no more to be had'
    return f'out of memory ({why}): lower --batch, or --micro_tokens where the script has it; what was saved is kept'


def fail(error):
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------- identities

def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def digest(*parts):
    """16 hex digits over numpy arrays and JSON-able values, in order: the identity of what they hold."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            h.update(f'{part.dtype.str}{part.shape}'.encode())
            h.update(np.ascontiguousarray(part).data)
        else:
            h.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
    return h.hexdigest()[:16]


def same(a, b):
    """Whether two identities are equal once written as JSON (which knows no tuples)."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def provenance():
    """What travels with every result: commit (with '+' where the tree was changed), versions, command."""
    import transformers
    git = lambda *a: subprocess.run(['git', '-C', str(ROOT), *a], capture_output=True, text=True).stdout.strip()
    commit = git('rev-parse', '--short=12', 'HEAD') or 'unknown'
    return {'commit': commit + ('+' if git('status', '--porcelain', '-uno') else ''), 'torch': str(torch.__version__),
            'transformers': transformers.__version__, 'command': ' '.join(map(str, sys.argv))}


# ---------------------------------------------------------------------------- writing

@contextlib.contextmanager
def whole(path):
    """Yield a temporary path beside `path`; rename it on success, remove it on any error."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f'.*.{HOST}.*.part'):  # of a process of this machine that was killed while it wrote
        if not pathlib.Path('/proc', stale.name.split('.')[-2]).exists() and pathlib.Path('/proc/self').exists():
            stale.unlink(missing_ok=True)
    part = path.with_name(f'.{path.name}.{HOST}.{os.getpid()}.part')
    try:
        yield part
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:  # of a full disk, which names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def save_text(path, text):
    with whole(path) as part:
        part.write_text(text, encoding='utf-8')


def save_json(path, value):
    save_text(path, json.dumps(value, indent=1, ensure_ascii=False) + '\n')


def load_json(path):
    try:
        return json.loads(pathlib.Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except ValueError as error:
        raise UserError(f'{path}: not valid JSON ({error}); remove it and run again') from None


def save_pt(path, kind, meta, **content):
    """Write {'meta': ..., **content} to `path`, and meta once more as readable JSON beside it."""
    meta = {'kind': kind, **meta}
    with whole(path) as part:
        try:
            torch.save({'meta': meta, **content}, part)
        except RuntimeError as error:  # torch's own text for a failed write
            raise UserError(f'{path}: could not be written ({error}); is the disk full?') from None
    if kind != 'resume':
        save_json(pathlib.Path(path).with_suffix('.json'), meta)


def load_pt(path, kind, device='cpu'):
    """Read what save_pt wrote. UserError where the file is missing, cut short, not ours, or of another kind."""
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        found = content['meta']['kind']
    except FileNotFoundError:
        raise UserError(f'{path}: no such file') from None
    except OSError:
        raise
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged or foreign file
        reason = str(error).split('\n')[0][:120]
        raise UserError(f'{path}: not a readable {kind} file ({type(error).__name__}: {reason})') from None
    if found != kind:
        raise UserError(f'{path}: is a {found} file; a {kind} file is needed here')
    return content


def made_from(path, kind, identity):
    """What load_pt gives where `path` is a readable file of this kind with this meta['identity'], else None."""
    if not pathlib.Path(path).exists():
        return None
    try:
        content = load_pt(path, kind)
    except UserError as error:
        return print(f'{error}; it is made again')
    return content if same(content['meta']['identity'], identity) else None


@contextlib.contextmanager
def lock(folder, wait=False):
    """Hold `folder` for this process; a second holder waits, or is refused with the first one's number and command."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'a+') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            f.seek(0)
            raise UserError(f'{folder} is in use by {f.read().strip()}: wait for it or stop it') from None
        f.truncate(0)
        f.write(f'process {os.getpid()} ({" ".join(sys.argv)})')
        f.flush()
        yield


def data_root():
    return pathlib.Path(os.environ.get('ELEPHANT_DATA', ROOT / 'data'))


def runs_root():
    return pathlib.Path(os.environ.get('ELEPHANT_RUNS', ROOT / 'runs'))
