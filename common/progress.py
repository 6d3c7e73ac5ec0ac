"""Progress with a rate: a bar on a terminal, plain lines at most every 30 s in a log."""
import sys

from tqdm import tqdm

from common.files import follower


class Lines:
    """What tqdm writes to where there is no terminal: each state a line of its own."""

    @staticmethod
    def write(text):
        text = text.strip()
        if text:
            sys.stderr.write(text + '\n')


LOG = dict(file=Lines, position=0, mininterval=30, maxinterval=1e9, delay=30,
           bar_format='{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]')


def progress(things=None, **options):
    """tqdm over `things` (or by hand, with total=); gone from the terminal once it is done."""
    if follower():
        options['disable'] = True
    if not sys.stderr.isatty():
        options |= LOG
    return tqdm(things, leave=False, dynamic_ncols=True, **options)
