"""Files that are whole or absent, identities by content, errors that a user can act on.

Every output is written beside its final name and renamed. Every `.pt` says what it is (`kind`).
"""
import fcntl
import gzip
import hashlib
import json
import os
import re
import signal
import sys
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
STOPPING = signal.SIGTERM, signal.SIGINT  # kill's, and Ctrl-C's


class UserError(Exception):
    """Something the user can mend: its text is the one line they see; the exit code is 2."""


class Diverged(UserError):
    """A loss, a gradient or a score is not finite."""


# ------------------------------------------------------------------------ errors in one line

def command(main, *args):
    """Run a script's main: what a user can mend ends in one line on standard error, exit code 2."""
    try:
        for number in STOPPING:
            signal.signal(number, stop)
        main(*args)
        if torch.distributed.is_initialized():  # not after an error: it would wait for the others
            torch.distributed.destroy_process_group()
        sys.stdout.flush()
        return
    except UserError as error:
        said = str(error)
    except BrokenPipeError:
        # `| head` has read enough; what is left was not done, so a chain must end too (a shell's
        # number for it); what is buffered cannot be written
        os._exit(141)
    except OSError as error:  # a full disk, a folder without permission
        said = f'{error.filename or "writing"}: {error.strerror or error.args}'
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = f'out of memory ({str(error)[:80]}): lower --micro-tokens and go on, or --batch'
    # a file that is no text may be quoted, and control a terminal
    print('error:', re.sub(r'[\s\0-\x1f\x7f-\x9f]+', ' ', said), file=sys.stderr)
    sys.exit(2)


def out_of_memory(error):
    """Whether that is what an error says; a CPU's allocator has no exception of its own."""
    return re.search('out of memory|allocate memory|MemoryError', repr(error))


def stop(number, _):
    """SIGTERM, Ctrl-C: leave at once, as a shell would say it (143, 130); whatever is open cleans
    up on its way out, which the same signal again (run_all.sh's, and its group's) does not hinder.
    Until `command` is entered Python ends the process, which a shell says in the same way.
    """
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


# ------------------------------------------------------------------------ identities

@contextmanager
def unpacked(path):
    """Yield a file open for its bytes, unpacked where it is a .gz. UserError: that is damaged, or
    what it is read as is no text."""
    opener = gzip.open if path.suffix == '.gz' else open
    try:
        with opener(path, 'rb') as f:
            yield f
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f'{path}: is damaged, or no UTF-8 text ({error}); get or convert it again') from None


def content_sha256(path):
    """Hex digest of what a file holds, unpacked where it is a .gz."""
    with unpacked(path) as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def digest(*parts):
    """16 hex digits over arrays, tensors, JSON-able values and bytes of JSON, in order: what they
    hold."""
    h = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor | np.ndarray):
            part = np.asarray(part)
            h.update(f'{part.dtype.str}{part.shape}'.encode())
            part = part.ravel().view('u1')  # no copy where it is in order
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True, ensure_ascii=False).encode()
        h.update(part)
    return h.hexdigest()[:16]


def file_stamp(path, known):
    """{'size', 'time', 'sha256'} of a file; `known`, an earlier stamp, where the content is still
    that. An untouched file is not read again."""
    status = os.stat(path)
    stamp = {'size': status.st_size, 'time': status.st_mtime_ns}
    if stamp.items() <= known.items():
        return known
    stamp['sha256'] = content_sha256(path)
    return known if stamp['sha256'] == known.get('sha256') else stamp


# ------------------------------------------------------------------------ writing

@contextmanager
def whole(path):
    """Yield a temporary path beside `path`; rename it on success, remove it on any error."""
    os.makedirs(path.parent, exist_ok=True)
    for left in path.parent.glob(f'.{path.name}.of-*.part'):  # by a process that was killed
        left.unlink(missing_ok=True)
    part = path.parent / f'.{path.name}.of-{os.getpid()}.part'
    try:
        yield part
        with open(part, 'rb+') as f:
            os.fsync(f.fileno())
        part.replace(path)
    except OSError as error:  # a full disk names no file, others the temporary one
        error.filename = str(error.filename or path).replace(part.name, path.name)
        raise
    finally:
        with suppress(OSError):  # a disk that only reads
            part.unlink()


def save_text(path, text):
    """Write a UTF-8 file, whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding='utf-8')


def save_json(path, value):
    """Write readable JSON, whole or not at all."""
    save_text(path, json.dumps(value, indent=1, ensure_ascii=False) + '\n')


def load_json(path, *names):
    """Read JSON, of an object that has these names; {} where there is no file. UserError: it is
    none of ours."""
    if not path.exists():
        return {}
    with suppress(TypeError, ValueError):
        found = json.loads(path.read_bytes())
        if all(name in found for name in names):
            return found
    raise UserError(f'{path}: no valid JSON of ours; remove it and run again')


def save_npz(path, arrays):
    """Write named arrays, whole or not at all. Not compressed: zlib takes longer than a disk."""
    with whole(path) as part, open(part, 'wb') as f:
        np.savez(f, **arrays)


def load_npz(path, names, remedy):
    """{name: array} of what save_npz wrote; pickles are refused. UserError, which ends in `remedy`:
    missing, damaged or not ours."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return {name: f[name] for name in names}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen kinds for damage
        if out_of_memory(error) or isinstance(error, PermissionError):
            raise
        raise UserError(f'{path}: missing or damaged; {remedy}') from None


def save_pt(path, kind, **content):
    """Write {'kind': kind, **content}: tensors, and plain values that say what they are."""
    with whole(path) as part:
        try:
            torch.save({'kind': kind} | content, part)
        except RuntimeError as error:  # torch's own text for a failed write
            raise UserError(f'{path}: could not be written ({error}); is the disk full?') from None


def load_pt(path, kind):
    """Read what save_pt wrote, to the CPU. UserError: missing, damaged, not ours, or of another
    kind."""
    if not path.exists():
        raise UserError(f'{path}: no such file; export_embeddings.py makes embeddings, the other '
                        'scripts make models (remove a row.json beside it first)')
    with open(path, 'rb') as f:
        try:
            content = torch.load(f, map_location='cpu', weights_only=True)
            # torch does not look at the checksums that it wrote
            if content['kind'] == kind and not ZipFile(f).testzip():
                return content
        except Exception as error:  # half a dozen kinds say that a file is damaged
            if out_of_memory(error):
                raise
    raise UserError(f'{path}: is no readable {kind} file: damaged, of another kind, or not made '
                    'here; remove it and a row.json beside it, then make it again (README.md)')


def follower():
    """Whether this is one of torchrun's processes, and not the first, which writes for all."""
    return os.environ.get('RANK', '0') != '0'


@contextmanager
def lock(folder, wait=False):
    """Hold `folder` for this process; a second holder waits, or is refused with the first one's
    number and command."""
    os.makedirs(folder, exist_ok=True)
    path = folder / '.lock'
    # torchrun's first process holds it for all; where nobody can write nothing is held
    if follower() and not wait or not os.access(folder, os.W_OK):
        yield
        return
    with open(path, 'a') as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f'{folder} is in use by {path.read_text().strip()}: wait, or stop it') from None
        path.write_text(f'process {os.getpid()} ({" ".join(sys.argv)})')
        yield


# ------------------------------------------------------------------------ folders

def data_root():
    """data/, or ELEPHANT_DATA."""
    return Path(os.environ.get('ELEPHANT_DATA') or ROOT / 'data')


def runs_root():
    """runs/, or ELEPHANT_RUNS."""
    return Path(os.environ.get('ELEPHANT_RUNS') or ROOT / 'runs')


# The paper's tables (percentages), which of our rows stands in each column, its data sets.
PAPER = load_json(ROOT / 'common' / 'paper.json')
