"""What the two scripts share at the command line: errors in one line with exit status 2, names suggested, values read, Ctrl-C."""

import argparse
import ast
import difflib
import math
import signal
import sys
import threading

import torch
import torch.distributed as dist

from .errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse with an error of one line instead of the whole usage."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message} (--help lists the flags)\n")


def positive(text):
    """For argparse: a whole number from 1 up."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def positive_number(text):
    if not not_negative(text):
        raise ValueError
    return float(text)


def not_negative(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def run(main):
    """Exit status 0; or 2 after one line where the user can mend something; or 130 after a second Ctrl-C."""
    try:
        main()
    except (UserError, OSError) as error:
        text = " ".join(str(error).split())
        sys.exit(complain(text, 2))
    except KeyboardInterrupt:
        sys.exit(complain("stopped", 130))


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


def read_settings(pairs):
    """--set name=value ... as a dict; values are Python numbers, True, False, None, or else words."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set {pair}: write name=value")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            settings[name] = value
    return settings


def check_settings(settings, signature, reserved, what):
    """Every name must be a word of the constructor, every value of the kind of its default."""
    words = {k: p.default for k, p in signature.parameters.items() if k not in reserved}
    for name, value in settings.items():
        default = words[one_of(name, words, f"setting of {what}")]
        number = isinstance(default, (int, float)) and not isinstance(default, bool)
        fits = (isinstance(value, bool) if isinstance(default, bool)
                else isinstance(value, int) and not isinstance(value, bool) if isinstance(default, int)
                else isinstance(value, (int, float)) and not isinstance(value, bool) if number
                else True)
        if not fits:
            raise UserError(f"--set {name}={value}: {what} takes {type(default).__name__} values there, for example {default}")


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
