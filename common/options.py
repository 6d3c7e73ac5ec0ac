"""Options that the scripts share, and the types of their values."""
import argparse


def options_parser(doc):
    """An argparse parser that prints a script's docstring and takes no abbreviations."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def option(group, name, text, kind=str, default=None, **more):
    """One option: its name, its help, the type of its value, its default."""
    group.add_argument(name, help=text, type=kind, default=default, **more)


def flag(group, name, text):
    """An option without a value: True where it is given."""
    group.add_argument(name, help=text, action='store_true')


def number(kind, least, most=1e99):
    """An argparse type: a finite int or float, at least `least` and at most `most`."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    noun = 'whole number' if kind is int else 'number'
    # argparse prints it
    convert.__name__ = f'{noun} ({least:g} {f"to {most:g}" if most < 1e99 else "or more"})'
    return convert


COUNT, POSITIVE = number(int, 0), number(int, 1)
WEIGHT, RATE = number(float, 0), number(float, 1e-12)


def add_plm_options(parser):
    """--plm, --layers: the language model to start from."""
    g = parser.add_argument_group('language model')
    option(g, '--plm', 'longformer (paper), minilm, a hub name or a local folder')
    option(g, '--layers', 'its first LAYERS layers only (default: all)', POSITIVE)
    return g


def add_optimizer_options(parser, epochs, patience, batch):
    """--epochs ... --weight-decay; defaults are RecFormer's where its paper or code has them."""
    g = parser.add_argument_group('optimisation')
    option(g, '--epochs', 'at most', POSITIVE, epochs)
    option(g, '--patience', 'epochs without a better validation', POSITIVE, patience)
    option(g, '--batch', 'users', number(int, 2), batch)
    option(g, '--lr', 'peak rate', RATE, 5e-5)
    option(g, '--warmup', 'steps of a rising rate; it then falls linearly to 0', COUNT, 100)
    option(g, '--weight-decay', "AdamW's", WEIGHT, 0.0)
    return g


def add_machine_options(parser, language_model=False, trains=True):
    """--device, --precision, ..., and what to do with an earlier result."""
    g = parser.add_argument_group('machine')
    if language_model:
        option(g, '--micro-tokens',
               'tokens in one pass of the model: memory only (default: 2048, on CUDA 16384)',
               POSITIVE)
    option(g, '--device', 'auto (CUDA where there is one), cpu, cuda:1, ...', str, 'auto')
    option(g, '--precision',
           'of matrix products; weights stay float32. auto: bfloat16 where it is faster',
           str, 'auto', choices=['auto', 'bfloat16', 'float32'])
    flag(g, '--deterministic',
         'CUDA: only kernels that give the same bits on every run (slower; a CPU always does)')
    if trains:
        option(g, '--save-every', 'minutes between checkpoints inside an epoch (ours)', WEIGHT, 10)
    add_earlier_options(parser)


def add_earlier_options(parser):
    """--again, --keep: what to do with an earlier result."""
    g = parser.add_argument_group('an earlier result').add_mutually_exclusive_group()
    flag(g, '--again', 'make it again, whatever is there')
    flag(g, '--keep', 'use it as it is where only the code has changed since')


# Options that change no number, and those whose meaning is known by content (data, weights).
NO_IDENTITY = set('dataset sources out checkpoint plm layers seeds lrs variants init_scale device '
                  'deterministic micro_tokens save_every again keep'.split())


def option_identity(args):
    """The options that make a result what it is."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NO_IDENTITY}
