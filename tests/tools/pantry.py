"""`bash run_all.sh pantry --toy` on made-up Amazon files, with a random Longformer of the real
size: does the chain of the paper's datasets end here, and how long does each step take?

    python -m tests.tools.pantry FOLDER [--users 1500]

FOLDER is made; the files of five categories, the model (0.6 GB) and the runs (2.5 GB) lie there
and stay. With --users 300 it takes seven minutes on one thread of a CPU (float32 at 166 GFLOP/s).
Prints the chain's output, each line with the seconds since its start. Again in the same FOLDER, it
goes on.
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common.files import ROOT
from common.formats import AMAZON
from tests.tools.bench import BASE
from tests.toy import amazon, tiny_longformer

DATASETS = 'pantry books clothing sports movies'.split()


def make(folder, users):
    """Files of all datasets, with two thirds as many items as users, and the Longformer, last."""
    for seed, name in enumerate(DATASETS):
        category, _ = AMAZON[name]
        amazon(folder / 'raw', category, users, 2 * users // 3, quirks=False, seed=seed)
    tiny_longformer(folder / 'plm' / 'longformer', vocab=BASE['vocab_size'], layers=BASE['layers'],
                    hidden=BASE['hidden'], heads=BASE['heads'], inner=BASE['intermediate'])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--users', type=int, default=1500, help='of each category, when it is made')
    args = p.parse_args()
    folder = args.folder.absolute()
    if not (folder / 'plm' / 'longformer' / 'model.safetensors').exists():
        make(folder, args.users)
    os.environ |= {'ELEPHANT_DATA': str(folder), 'ELEPHANT_RUNS': str(folder / 'runs'),
                   'ELEPHANT_ANY_VERSION': '1', 'PYTHON': sys.executable}
    command = ['bash', 'run_all.sh', 'pantry', '--toy', '--seeds', '0']
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as chain:
        for line in chain.stdout:
            print(f'{time.monotonic() - began:6.0f} s  {line}', end='', flush=True)
    return chain.returncode


if __name__ == '__main__':
    sys.exit(main())
