"""Kills every stage at random moments, starts it again, and compares the end with an undisturbed run, bit for bit.

    python -m tests.chaos --kills 50          # five to ten minutes; exit code 1 where anything differs

Made-up data, a tiny language model. Each command of a small chain is killed its share of times (SIGKILL, SIGTERM or SIGINT, to the
process or to its whole group), then let through; at last `bash run_all.sh --toy` is killed as a whole.
"""
import argparse
import collections
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
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def chain(plm):
    """The commands, as run_all.sh gives them, with enough steps to be hit in the middle."""
    lm = ['--batch', '4', '--save_every', '2', '--lr', '0.001']
    seq = ['--lrs', '0.01', '0.001', '--epochs', '6', '--batch', '8', '--save_every', '2', '--seeds', '0', '1']
    run = 'runs/mine/'
    return [
        ['-m', 'common.data', 'mine'], ['-m', 'common.data', 'other'],
        ['pretrain.py', 'other', '--plm', plm, '--out', run + 'recformer/pt.pt', '--accumulate', '1', '--epochs', '4', *lm],
        ['finetune.py', 'mine', '--stage', '1', '--checkpoint', run + 'recformer/pt.pt', '--epochs', '4', *lm],
        ['finetune.py', 'mine', '--stage', '2', '--epochs', '3', *lm],
        ['export_embeddings.py', 'mine', '--plm', plm, '--out', run + 'embeddings/lf.pt'],
        ['export_embeddings.py', 'mine', '--checkpoint', run + 'recformer/ft1.pt', '--out', run + 'embeddings/ft.pt'],
        ['train_seq.py', 'mine', '--model', 'sasrec', '--variants', 'random', 'lf-trainable', 'ft-further-all', *seq],
        ['train_seq.py', 'mine', '--model', 'bert4rec', '--variants', 'random', 'ft-freeze', *seq],
        ['evaluate.py', 'table', 'mine']]


class World:
    """A folder with the data, and runs of its own; commands run in it from the repository's root."""

    def __init__(self, folder, plm):
        self.folder = folder
        canonical(folder / 'data' / 'mine')
        canonical(folder / 'data' / 'other', seed=1)
        self.plm = plm
        self.environment = {**os.environ, 'ELEPHANT_DATA': str(folder / 'data'), 'ELEPHANT_RUNS': str(folder / 'runs'),
                            'PYTHON': sys.executable, 'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}

    def start(self, command):
        program = ['bash'] if command[0].endswith('.sh') else [sys.executable]
        command = [str(self.folder / c) if c.startswith('runs/') else c for c in command]
        return subprocess.Popen(program + command, cwd=ROOT, env=self.environment, start_new_session=True, text=True,
                                stdout=subprocess.DEVNULL, stderr=open(self.folder / 'stderr', 'w'))

    def finish(self, command):
        """Run to the end: seconds. A command that fails ends the test."""
        began, process = time.time(), self.start(command)
        if process.wait():
            sys.exit(f'{" ".join(command)} failed:\n{(self.folder / "stderr").read_text()[-2000:]}')
        return time.time() - began

    def kill(self, command, after, how, everyone):
        """Start, wait `after` seconds, send `how`; True where it was still running. Nothing of it is left behind."""
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
            text = (self.folder / 'stderr').read_text()
            if 'Traceback' in text and 'KeyboardInterrupt' not in text:
                sys.exit(f'{" ".join(command)}: after {how.name}:\n{text[-2000:]}')
            return process.returncode != 0
        return False


def content(folder):
    """{name: comparable content} of everything that a run leaves."""
    found = {}
    for path in sorted((folder / 'runs').rglob('*')):
        name = str(path.relative_to(folder))
        if path.name in ('.lock', 'results.md') or path.is_dir() or path.suffix == '.json' and path.name != 'results.json':
            continue
        if path.name == 'results.json':
            found[name] = sorted(json.dumps({k: v for k, v in row.items() if k not in MAY_DIFFER}, sort_keys=True)
                                 for row in json.loads(path.read_text()))
        elif path.suffix == '.npz':
            with np.load(path) as f:
                found[name] = {k: f[k].tobytes() for k in f}
        elif path.suffix == '.pt':
            saved = torch.load(path, weights_only=True)
            found[name] = {k: v.numpy().tobytes() for part in saved.values() if isinstance(part, dict) for k, v in part.items()
                           if isinstance(v, torch.Tensor)} | {k: v.numpy().tobytes() for k, v in saved.items() if isinstance(v, torch.Tensor)}
        else:
            found[name] = 'left behind'
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--kills', type=int, default=50)
    p.add_argument('--seed', type=int, default=0)
    args = p.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have it ignored
    draw, counts = random.Random(args.seed), collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        plm = str(tiny_bert(Path(folder) / 'plm'))
        calm, killed = World(Path(folder) / 'calm', plm), World(Path(folder) / 'killed', plm)
        whole = ['run_all.sh', 'mine', '--toy', '--plm', plm, '--source', 'other', '--quick-table']
        commands = chain(plm) + [whole]
        takes = [calm.finish(command) for command in tqdm(commands, unit='command', desc='undisturbed')]
        bar = tqdm(total=args.kills, unit='kill')
        done = 0
        for number, command in enumerate(commands):
            name = ' '.join(command[:4 if command[0] == 'train_seq.py' else 2])
            while done < args.kills * (number + 1) // len(commands):
                how, everyone = draw.choice(SIGNALS), draw.random() < 0.5 or command is whole
                # most of a short command is its imports: aim at the rest
                if killed.kill(command, takes[number] * draw.uniform(0.02 if command is whole else 0.4, 0.95), how, everyone):
                    counts[name, how.name] += 1
                    done += 1
                    bar.update()
                else:  # it came to its end; what is left of it takes less time
                    takes[number] *= 0.8
            killed.finish(command)
        bar.close()
        a, b = content(calm.folder), content(killed.folder)
    for name in dict.fromkeys(n for n, _ in counts):
        print(f'{name:36}' + '  '.join(f'{s.name} {counts[name, s.name]:2}' for s in SIGNALS))
    wrong = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    print(f'{done} kills; {len(a)} files compared with an undisturbed run: '
          + (f'{len(wrong)} differ: {", ".join(wrong)}' if wrong else 'all equal, bit for bit'))
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
