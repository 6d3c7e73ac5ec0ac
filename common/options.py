"""Options that the scripts share, and the types of their values."""
import argparse
import math


def options_parser(doc):
    """An argparse parser that prints a script's docstring and takes no abbreviations."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def whole_number(least, most=None):
    """An argparse type: a whole number, at least `least` and at most `most`."""
    return bounded(int, 'whole number', f'at least {least}', lambda value: value >= least, most)


def real_number(above=None, least=None, most=None):
    """An argparse type: a finite number above `above`, or at least `least`, and at most `most`."""
    if above is not None:
        return bounded(float, 'number', f'above {above}', lambda value: value > above, most)
    return bounded(float, 'number', f'at least {least}', lambda value: value >= least, most)


def bounded(kind, noun, bound, holds, most):
    """An argparse type whose name, which argparse prints, says what it takes."""
    def convert(text):
        value = kind(text)
        if not (holds(value) and math.isfinite(value) and (most is None or value <= most)):
            raise ValueError
        return value
    convert.__name__ = f'{noun} ({bound}' + (f' and at most {most})' if most is not None else ')')
    return convert


def add_machine_options(parser, language_model=False, trains=True):
    """--device, --precision, ..., and what to do with an earlier result."""
    g = parser.add_argument_group('machine')
    if language_model:
        g.add_argument('--micro-tokens', type=whole_number(1),
                       help='tokens in one pass of the model: memory only (default: 2048, on CUDA '
                            '16384)')
    g.add_argument('--device', default='auto', help='auto (CUDA where there is one), cpu, cuda:1, ...')
    g.add_argument('--precision', default='auto', choices=['auto', 'bfloat16', 'float32'],
                   help='of matrix products; weights stay float32. auto: bfloat16 where the hardware '
                        'has it')
    g.add_argument('--deterministic', action='store_true',
                   help='CUDA: only kernels that give the same bits on every run (slower; a CPU '
                        'always does)')
    if trains:
        g.add_argument('--save-every', type=real_number(least=0), default=10, metavar='MINUTES',
                       help='between checkpoints inside an epoch (ours); each epoch ends with one')
    add_again_options(parser)


def add_again_options(parser):
    """--again, --keep."""
    g = parser.add_argument_group('an earlier result').add_mutually_exclusive_group()
    g.add_argument('--again', action='store_true', help='make it again, whatever is there')
    g.add_argument('--keep', action='store_true',
                   help='use it as it is where only the code has changed since')


NO_IDENTITY = {'dataset', 'out', 'device', 'deterministic', 'micro_tokens', 'save_every', 'again',
               'keep', 'checkpoint', 'plm', 'layers', 'seeds', 'lrs', 'variants', 'sources'}


def option_identity(args, *more):
    """The options that make a result what it is; what is known by content is left out."""
    return {key: value for key, value in sorted(vars(args).items())
            if key not in NO_IDENTITY and key not in more}
