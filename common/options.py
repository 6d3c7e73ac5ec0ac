"""Options that the scripts share, and the types of their values."""
import argparse


def options_parser(doc):
    """An argparse parser that prints a script's docstring and takes no abbreviations."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def option(group, name, kind, default, text, **more):
    """One option: its name, the type of its value, its default, its help."""
    group.add_argument(name, type=kind, default=default, help=text, **more)


def number(kind, least, most=1e99):
    """An argparse type: a finite int or float, at least `least` and at most `most`."""
    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    noun = 'whole number' if kind is int else 'number'
    convert.__name__ = f'{noun} from {least:g} to {most:g}:'  # argparse prints it
    return convert


COUNT, POSITIVE = number(int, 0), number(int, 1)
WEIGHT, RATE = number(float, 0), number(float, 1e-12)


def add_plm_options(parser):
    """--plm, --layers: the language model to start from."""
    g = parser.add_argument_group('language model')
    option(g, '--plm', str, None, 'longformer (paper), minilm, a hub name or a local folder')
    option(g, '--layers', POSITIVE, None, 'its first LAYERS layers only (default: all)')
    return g


def add_optimizer_options(parser, epochs, patience, batch):
    """--epochs ... --weight-decay; defaults are RecFormer's where its paper or code has them."""
    g = parser.add_argument_group('optimisation')
    option(g, '--epochs', POSITIVE, epochs, 'at most')
    option(g, '--patience', POSITIVE, patience, 'epochs without a better validation')
    option(g, '--batch', number(int, 2), batch, 'users')
    option(g, '--lr', RATE, 5e-5, 'peak rate')
    option(g, '--warmup', COUNT, 100, 'steps of a rising rate; it then falls linearly to 0')
    option(g, '--weight-decay', WEIGHT, 0.0, "AdamW's")
    return g


def add_machine_options(parser, language_model=False, trains=True):
    """--device, --precision, ..., and what to do with an earlier result."""
    g = parser.add_argument_group('machine')
    if language_model:
        option(g, '--micro-tokens', POSITIVE, None,
               'tokens in one pass of the model: memory only (default: 2048, on CUDA 16384)')
    option(g, '--device', str, 'auto', 'auto (CUDA where there is one), cpu, cuda:1, ...')
    option(g, '--precision', str, 'auto', 'of matrix products; weights stay float32. auto: '
           'bfloat16 where the hardware has it', choices=['auto', 'bfloat16', 'float32'])
    g.add_argument('--deterministic', action='store_true', help='CUDA: only kernels that give the '
                   'same bits on every run (slower; a CPU always does)')
    if trains:
        option(g, '--save-every', WEIGHT, 10, 'minutes between checkpoints inside an epoch (ours)')
    add_earlier_options(parser)


def add_earlier_options(parser):
    """--again, --keep: what to do with an earlier result."""
    g = parser.add_argument_group('an earlier result').add_mutually_exclusive_group()
    g.add_argument('--again', action='store_true', help='make it again, whatever is there')
    g.add_argument('--keep', action='store_true',
                   help='use it as it is where only the code has changed since')


# Options that change no number, and those whose meaning is known by content (data, weights).
NO_IDENTITY = set('dataset sources out checkpoint plm layers seeds lrs variants init_scale device '
                  'deterministic micro_tokens save_every again keep'.split())


def option_identity(args):
    """The options that make a result what it is."""
    return {key: value for key, value in sorted(vars(args).items()) if key not in NO_IDENTITY}
