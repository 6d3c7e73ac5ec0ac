"""Progress with a rate: a bar on a terminal; in a log it is written at most every 30 s."""
import sys

from tqdm import tqdm


def progress(things=None, **options):
    """tqdm over `things` (or by hand, with total=); gone from the terminal once it is done."""
    every = 0.1 if sys.stderr.isatty() else 30
    return tqdm(things, leave=False, dynamic_ncols=True, mininterval=every, maxinterval=every,
                delay=every, **options)
