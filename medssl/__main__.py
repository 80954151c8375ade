"""python -m medssl: the methods with one line each.
python -m medssl METHOD: what the file of a method says of it."""

import sys

from . import METHODS
from .common import cli

START = """
To start:
  python train.py                                  the default on built-in images
  python train.py --method spark --data FOLDER     a method on your images; a+b trains several at once
  python -m medssl METHOD                          idea, algorithm, shapes and differences of a method
  python -m medssl.common.data FOLDER              what is in a folder of images?
  python evaluate.py runs/NAME                     what are the features worth?"""


def main(argv=None):
    parser = cli.Parser(prog="python -m medssl", description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="?", choices=METHODS, help="left out: a list of them")
    name = parser.parse_args(argv).method
    if name:
        print(header(name))
    else:
        first = {name: header(name).splitlines()[0].split(": ", 1)[-1] for name in METHODS}
        print("Self-supervised pretraining for 2D medical images. The methods:\n")
        print("\n".join(f"  {'a+b' if name == 'together' else name:12} {line}" for name, line in first.items()))
        print(START)


def header(name):
    return sys.modules[METHODS[name].__module__].__doc__


if __name__ == "__main__":
    cli.run(main)
