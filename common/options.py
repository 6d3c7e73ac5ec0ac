"""Options that the scripts share, and the types of their values."""
import argparse


def options_parser(doc):
    """An argparse parser that prints a script's docstring and takes no abbreviations."""
    return argparse.ArgumentParser(description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def option(parser, name, text, kind=str, default=None, **more):
    """One option: its name, its help, the type of its value, its default."""
    if default:
        text += ' (default: %(default)s)'
    parser.add_argument(name, help=text, type=kind, default=default, **more)


def flag(parser, name, text):
    """An option without a value: True where it is given."""
    parser.add_argument(name, help=text, action='store_true')


def number(least, most=1e18):
    """An argparse type: a finite number of the type of `least`, from that to `most`."""
    kind = type(least)

    def convert(text):
        value = kind(text)
        if not least <= value <= most:
            raise ValueError
        return value
    # argparse prints it
    convert.__name__ = f'{kind.__name__} ({least:g} {f"to {most:g}" if most < 1e18 else "or more"})'
    return convert


COUNT = number(0)
POSITIVE = number(1)
WEIGHT = number(0.0)
RATE = number(1e-12)


def add_plm_options(parser):
    """--plm: the language model to start from; --micro-tokens: the memory it takes."""
    option(parser, '--plm', 'longformer (paper), minilm, a hub name or a local folder')
    option(parser, '--micro-tokens',
           "in one pass: memory, dropout's draws (default: 2048; CUDA: one a MiB, float32 half)",
           POSITIVE)


def add_training_options(parser, epochs, patience, batch=None):
    """--epochs ... --save-every: how long a training goes on; and the options of the two functions
    that it ends with."""
    option(parser, '--epochs', 'at most', POSITIVE, epochs)
    option(parser, '--patience', 'epochs without a better validation', POSITIVE, patience)
    option(parser, '--batch', 'users (an ID model, if not said: its own)', number(2), batch)
    option(parser, '--save-every', 'minutes between checkpoints inside an epoch (ours)', WEIGHT, 10)
    add_machine_options(parser)
    add_earlier_options(parser)


def add_tuning_options(parser, epochs, batch):
    """All that stage-PT and stage-FT share; defaults are RecFormer's where its paper or code has
    them (but its patience counts validations, one in three epochs; ours, epochs)."""
    add_plm_options(parser)
    option(parser, '--max-tokens', "newest of a history (RecFormer's 1024, or the checkpoint's)",
           number(2, 1024))
    add_training_options(parser, epochs, 5, batch)
    option(parser, '--lr', 'peak rate', RATE, 5e-5)
    option(parser, '--warmup', 'steps of a rising rate; it then falls linearly to 0', COUNT, 100)


def add_machine_options(parser):
    """--device, --precision, --deterministic."""
    option(parser, '--device', 'auto (CUDA where there is one), cpu, cuda:1, ...', str, 'auto')
    option(parser, '--precision',
           'of matrix products; weights stay float32. auto: bfloat16 where it is faster',
           str, 'auto', choices=['auto', 'bfloat16', 'float32'])
    flag(parser, '--deterministic',
         'CUDA: only kernels that give the same bits on every run (slower; a CPU always does)')


def add_earlier_options(parser):
    """--again, --keep: what to do with an earlier result."""
    either = parser.add_mutually_exclusive_group()
    flag(either, '--again', 'make an earlier result again, whatever is there')
    flag(either, '--keep', 'use it as it is where only the code has changed since')


# Options that change no number (but with device and micro_tokens other dropout is drawn), and those
# whose meaning is known by content (data, weights).
NO_IDENTITY = '''dataset sources out checkpoint plm seeds lrs variants init_scale device
                 deterministic micro_tokens save_every again keep'''.split()


def option_identity(args):
    """The options that make a result what it is."""
    return {key: value for key, value in vars(args).items() if key not in NO_IDENTITY}
