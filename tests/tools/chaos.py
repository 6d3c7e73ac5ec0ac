"""Kills every stage at random moments, starts it again, and compares the end with an undisturbed
run, bit for bit.

    python -m tests.tools.chaos --kills 50    # about ten minutes; exit code 1: something differs

Made-up data, a tiny language model. Each command of a small chain is killed its share of times
(SIGKILL, SIGTERM or SIGINT, to the process or to its whole group), then let through; at last
`bash run_all.sh --toy` is killed as a whole.
"""
import argparse
import collections
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.files import ROOT
from tests.toy import canonical, tiny_bert

MAY_DIFFER = ('seconds', 'date', 'commit', 'command')
SKIPPED = '.lock', 'results.md', 'results.png', 'curves.png'  # results.json holds what they show
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def chain(plm):
    """The commands, as run_all.sh gives them, with enough steps to be hit in the middle; every step
    is saved."""
    lm = ['--batch', '4', '--save-every', '0', '--lr', '0.001']
    seq = ['--lrs', '0.01', '0.001', '--seeds', '0', '1', '--epochs', '6', '--batch', '8',
           '--save-every', '0']
    pretrained, embeddings = 'runs/pretrained/plm-other', 'runs/mine/embeddings/'
    return [
        ['-m', 'common.data', 'mine'], ['-m', 'common.data', 'other'],
        ['pretrain.py', 'other', '--plm', plm, '--accumulate', '1', '--epochs', '4', *lm],
        ['finetune.py', 'mine', '--stage', '1', '--checkpoint', pretrained, '--epochs', '4', *lm],
        ['finetune.py', 'mine', '--stage', '2', '--epochs', '3', *lm],
        ['finetune.py', 'mine', '--stage', '2', '--trainable-items', '--epochs', '3', *lm],
        ['export_embeddings.py', 'mine', '--plm', plm, '--out', embeddings + 'lf.pt'],
        ['export_embeddings.py', 'mine', '--checkpoint', 'runs/mine/ft1-seed0', '--out',
         embeddings + 'ft.pt'],
        ['evaluate.py', 'untrained', 'mine'],
        ['train_seq.py', 'mine', '--model', 'sasrec', '--variants', 'random', 'lf-trainable',
         'ft-further-all', *seq],
        ['train_seq.py', 'mine', '--model', 'bert4rec', '--variants', 'random', 'ft-freeze', *seq],
        ['train_seq.py', 'mine', '--model', 'gru4rec', '--variants', 'ft-trainable', *seq],
        ['evaluate.py', 'table', 'mine']]


def name_of(command):
    """A command in a few words."""
    return ' '.join(command[:4 if command[0] in ('train_seq.py', 'finetune.py') else 2])


class World:
    """A folder with data and runs of its own; its commands run from the repository's root."""

    def __init__(self, folder, plm):
        self.folder = folder
        canonical(folder / 'data' / 'mine')
        canonical(folder / 'data' / 'other', seed=1)
        self.plm = plm
        self.environment = {**os.environ, 'ELEPHANT_DATA': str(folder / 'data'),
                            'ELEPHANT_RUNS': str(folder / 'runs'), 'PYTHON': sys.executable,
                            'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}

    def start(self, command):
        program = ['bash'] if command[0].endswith('.sh') else [sys.executable]
        command = [str(self.folder / c) if c.startswith('runs/') else c for c in command]
        with open(self.folder / 'stderr', 'w') as errors:
            return subprocess.Popen(program + command, cwd=ROOT, env=self.environment,
                                    start_new_session=True, stdout=subprocess.DEVNULL,
                                    stderr=errors)

    def errors(self):
        return (self.folder / 'stderr').read_text()

    def finish(self, command):
        """Run to the end: seconds. A command that fails ends the test."""
        began, process = time.monotonic(), self.start(command)
        if process.wait():
            sys.exit(f'{" ".join(command)} failed:\n{self.errors()[-2000:]}')
        return time.monotonic() - began

    def kill(self, command, after, how, everyone):
        """Start, wait `after` seconds, send `how`; True where it was still running."""
        process = self.start(command)
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            (os.killpg if everyone else os.kill)(process.pid, how)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                sys.exit(f'{" ".join(command)}: still running a minute after {how.name}')
            if how == signal.SIGKILL:
                return True
            text = self.errors()
            if ', in command\n' in text:  # before it there are only imports, the libraries' affair
                sys.exit(f'{" ".join(command)}: after {how.name}:\n{text[-2000:]}')
            return process.returncode != 0
        return False


# ------------------------------------------------------------------------ what a run leaves

def comparable(value):
    """A nested value without what may differ, tensors as bytes."""
    if isinstance(value, dict):
        return {key: comparable(v) for key, v in value.items() if key not in MAY_DIFFER}
    if isinstance(value, (list, tuple)):
        return [comparable(v) for v in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    return value


def read(path):
    """Comparable content of one file."""
    if path.suffix == '.json':
        return comparable(json.loads(path.read_text()))
    if path.suffix == '.csv':
        return comparable(list(csv.DictReader(path.open())))
    if path.suffix == '.npz':
        with np.load(path) as f:
            return {key: f[key].tobytes() for key in f}
    if path.suffix == '.pt' and path.name != 'resume.pt':
        return comparable(torch.load(path, weights_only=True))
    return 'left behind'


def content(folder):
    """{name: comparable content} of everything that a run leaves."""
    return {str(path.relative_to(folder)): read(path)
            for path in sorted((folder / 'runs').rglob('*'))
            if path.is_file() and path.name not in SKIPPED}


# ------------------------------------------------------------------------ main

def kill_and_finish(world, commands, takes, kills, draw):
    """Kill each command its share of times, then let it through: Counter of (command, signal)."""
    counts, bar = collections.Counter(), tqdm(total=kills, unit='kill')
    for number, command in enumerate(commands):
        whole = command[0] == 'run_all.sh'
        while counts.total() < kills * (number + 1) // len(commands):
            how, everyone = draw.choice(SIGNALS), draw.random() < 0.5 or whole
            # most of a short command is its imports: aim at the rest
            after = takes[number] * draw.uniform(0.02 if whole else 0.4, 0.95)
            if world.kill(command, after, how, everyone):
                counts[name_of(command), how.name] += 1
                bar.update()
            else:  # it came to its end; what is left of it takes less time
                takes[number] *= 0.8
        world.finish(command)
    bar.close()
    return counts


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    with tempfile.TemporaryDirectory() as folder:
        plm = str(tiny_bert(Path(folder) / 'plm'))
        calm, killed = World(Path(folder) / 'calm', plm), World(Path(folder) / 'killed', plm)
        whole = ['run_all.sh', 'mine', '--toy', '--plm', plm, '--source', 'other']
        commands = chain(plm) + [whole]
        takes = [calm.finish(command)
                 for command in tqdm(commands, unit='command', desc='undisturbed')]
        counts = kill_and_finish(killed, commands, takes, args.kills, random.Random(args.seed))
        a, b = content(calm.folder), content(killed.folder)
    for name in dict.fromkeys(name for name, _ in counts):
        print(f'{name:40}' + '  '.join(f'{s.name} {counts[name, s.name]:2}' for s in SIGNALS))
    wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    differ = f'{len(wrong)} differ: {", ".join(wrong)}' if wrong else 'all equal, bit for bit'
    print(f'{counts.total()} kills; {len(a)} files compared with an undisturbed run: {differ}')
    return int(bool(wrong) or 'left behind' in a.values())


if __name__ == '__main__':
    sys.exit(main())
