"""What the scripts share at the command line: errors in one line with status 2, suggestions, values, Ctrl-C."""

import argparse
import ast
import difflib
import math
import re
import signal
import sys
import threading
import traceback
from contextlib import contextmanager

import torch
import torch.distributed as dist

from .. import __version__
from .data.pixels import MOST
from .errors import UserError

MUCH = 10 ** 9                                                              # steps, images, epochs: nothing is more


class Parser(argparse.ArgumentParser):
    """argparse with --version, and an error of one line instead of the whole usage."""

    def __init__(self, **words):
        super().__init__(**words)
        self.add_argument("--version", action="version", version=f"medssl {__version__}")

    def error(self, message):
        unknown = [word.partition("=")[0] for word in message.partition("unrecognized arguments: ")[2].split()]
        near = [name for word in unknown for name in difflib.get_close_matches(word, self._option_string_actions, 1)]
        hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
        self.exit(2, f"{self.prog}: {message} ({hint})\n")


def positive(text):
    """For argparse: a whole number from 1 up."""
    if int(text) < 1:
        raise ValueError
    return int(not_negative(text))


def side(text):
    """For argparse: how many pixels wide and high images may be."""
    if not 1 <= int(text) <= MOST:
        raise argparse.ArgumentTypeError(f"images have from 1 to {MOST} pixels a side, not {text}")
    return int(text)


def whole(text):
    """For argparse: a whole number from 0 up, at most what a generator takes as its seed."""
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 0 to 2^63 - 1")
    return int(text)


def filled(text):
    """For argparse: any word but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("an empty word says nothing")
    return text


def device(text):
    """For argparse: where this program runs."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text} is none of auto, cpu, cuda, cuda:1, ..., mps")
    return text


def positive_number(text):
    if not not_negative(text):
        raise ValueError
    return float(text)


def not_negative(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    if float(text) > MUCH:
        raise argparse.ArgumentTypeError(f"{text} is more than {MUCH:,}, the most that makes sense anywhere")
    return float(text)


def run(main):
    """Exit status 0; or 2 after one line where the user can mend something; or 130 after a second Ctrl-C."""
    try:
        main()
    except (UserError, OSError) as error:
        text = " ".join(str(error).split())
        sys.exit(complain(text, 2))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(complain("needs more memory than there is; a smaller --size or --batch needs less", 2))
    except KeyboardInterrupt:
        sys.exit(complain("stopped", 130))


def out_of_memory(error):
    """On a CPU torch has no class of its own for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def complain(text, status):
    print(f"{sys.argv[0].rsplit('/', 1)[-1]}: {text}", file=sys.stderr)
    return status


def one_of(name, names, what):
    """`name` if it is one of `names`, else an error that suggests the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, list(names), 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise UserError(f"unknown {what} '{name}'; {hint}")


def read_settings(pairs, flag="--set"):
    """--set name=value ... as a dict; values are Python numbers, True, False, None, or else words."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{flag} {pair}: write name=value")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
        if isinstance(settings[name], float) and not math.isfinite(settings[name]):
            raise UserError(f"{flag} {pair}: not a finite number")
    return settings


KINDS = {bool: bool, int: int, float: (int, float), str: (str, type(None))}  # kind of a default -> what may replace it


def check_settings(settings, signature, reserved, what):
    """Every name must be a word of the constructor, every value of the kind of its default."""
    words = {k: p.default for k, p in signature.parameters.items() if k not in reserved}
    for name, value in settings.items():
        default = words[one_of(name, words, f"setting of {what}")]
        if type(default) in KINDS and not is_kind(value, KINDS[type(default)]):
            kind = type(default).__name__
            raise UserError(f"--set {name}={value}: {what} takes {kind} values there, for example {default}")


def is_kind(value, kind):
    """isinstance, but True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


@contextmanager
def told(what, *files):
    """A ValueError that one of these files raises itself, about what it was given, becomes the user's line, which
    begins with `what`. One that only passes through them, raised by torch, say, is a mistake in the code and keeps its
    traceback."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if frame.filename in files and frame.line.startswith("raise"):
            raise UserError(f"{what}: {error}") from None
        raise


class StopSignal:
    """The first Ctrl-C (or SIGTERM) lets the step finish and the run be saved; the second stops at once."""

    def __enter__(self):
        self.flag, self.old = False, {}
        if threading.current_thread() is threading.main_thread():
            self.old = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, _):
        self.flag = True
        self.__exit__()

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)

    def asked(self, world, device, logging):
        if world == 1 or not logging:
            return self.flag and world == 1
        flag = torch.tensor(float(self.flag), device=device)
        dist.all_reduce(flag)                                       # all processes stop after the same step
        return flag.item() > 0
