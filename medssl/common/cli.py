"""What the scripts share at the command line: errors in one line with status 2, suggestions, values, Ctrl-C."""

import argparse
import difflib
import signal
import sys
import threading

import torch
import torch.distributed as dist

from .. import __version__
from .errors import Full, UserError

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
        self.exit(2, printable(f"{self.prog}: {message} ({hint})\n"))


# ---- for argparse's type=

def not_negative(text):
    """A number from 0 up."""
    if not 0 <= float(text) <= MUCH:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to {MUCH:,}")
    return float(text)


def positive_number(text):
    if not not_negative(text):
        raise argparse.ArgumentTypeError("0 is not above 0")
    return float(text)


def whole(text, least=0, most=2**63 - 1):
    """A whole number; by default, what a generator takes as its seed."""
    if not (text.isdecimal() and least <= int(text) <= most):
        raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
    return int(text)


def positive(text):
    return whole(text, 1, MUCH)


def side(text):
    """Pixels: Pillow and the memory of a batch set an end."""
    return whole(text, 1, 2**15)


def filled(text):
    """Any word but the empty one, and none that cannot be printed or stored."""
    if not text or printable(text) != text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{printable(text)!r} is no name to work with")
    return text


# ---- errors

def run(main):
    """Exit status 0; 2 after one line where the user can mend something; 1 where a disk is full; 130 after a second
    Ctrl-C."""
    try:
        main()
    except Full as error:
        sys.exit(complain(error, 1))
    except (UserError, OSError) as error:
        sys.exit(complain(error, 2))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        sys.exit(complain("needs more memory than there is; a smaller --size or --batch needs less", 2))
    except KeyboardInterrupt:
        sys.exit(complain("stopped", 130))


def out_of_memory(error):
    """On a CPU torch has no class of its own for that."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def complain(error, status):
    print(printable(f"{sys.argv[0].rsplit('/', 1)[-1]}: {' '.join(str(error).split())[:1000]}"), file=sys.stderr)
    return status


def printable(text):
    """File names may hold bytes that no terminal shows."""
    return text.encode("utf-8", "replace").decode()


def one_of(name, names, what):
    """`name` if it is one of `names`, else an error that suggests the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, list(names), 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
    raise UserError(f"unknown {what} '{name}'; {hint}")


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

    def seen(self, world, device, logging):
        if world == 1 or not logging:
            return self.flag and world == 1
        flag = torch.tensor(float(self.flag), device=device)
        dist.all_reduce(flag)                                       # all processes stop after the same step
        return flag.item() > 0
