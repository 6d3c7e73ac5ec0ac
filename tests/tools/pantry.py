"""`bash run_all.sh pantry --toy` on made-up Amazon files, with a random Longformer of the real size:
does the chain of the paper's datasets end on this machine, and how long does each step take?

    python -m tests.tools.pantry FOLDER [--users 1500]

FOLDER is made; the files of five categories, the model (0.6 GB) and the runs (6 GB) lie there and
stay. On one GPU minutes, on two CPU cores more than an hour. Prints the chain's output, each line
with the seconds since its start. Again in the same FOLDER, it goes on (or is up to date).
"""
import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common.files import ROOT
from tests.tools.bench import BASE
from tests.toy import amazon, tiny_longformer

CATEGORIES = ('Prime_Pantry', 'Books', 'Clothing_Shoes_and_Jewelry', 'Sports_and_Outdoors',
              'Movies_and_TV')


def make(folder, users):
    """Files of all categories, with two thirds as many items as users, and the Longformer."""
    for seed, category in enumerate(CATEGORIES):
        amazon(folder / 'raw', category, users, 2 * users // 3, quirks=False, seed=seed)
    tiny_longformer(folder / 'plm' / 'longformer', vocab=BASE['vocab_size'], layers=BASE['layers'],
                    hidden=BASE['hidden'], heads=BASE['heads'], inner=BASE['intermediate'])


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--users', type=int, default=1500, help='of each category')
    args = p.parse_args()
    if not args.folder.exists():
        make(args.folder, args.users)
    environment = {'ELEPHANT_DATA': args.folder, 'ELEPHANT_RUNS': args.folder / 'runs',
                   'ELEPHANT_ANY_VERSION': 1, 'PYTHON': sys.executable}
    for name, value in environment.items():
        os.environ[name] = str(value.absolute() if isinstance(value, Path) else value)
    command = ['bash', 'run_all.sh', 'pantry', '--toy', '--seeds', '0']
    began = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as chain:
        for line in chain.stdout:
            print(f'{time.monotonic() - began:6.0f} s  {line}', end='', flush=True)
    return chain.returncode


if __name__ == '__main__':
    sys.exit(main())
