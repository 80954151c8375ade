"""python -m medssl: the methods with one line each, and the commands to start."""

import sys

from . import METHODS


def main():
    print("Self-supervised pretraining for 2D medical images. The methods:\n")
    for name, cls in METHODS.items():
        first = sys.modules[cls.__module__].__doc__.splitlines()[0]
        print(f"  {'a+b' if name == 'together' else name:12} {first.split(': ', 1)[-1]}")
    print("""
To start:
  python train.py                                  the default on built-in images, about two minutes on two CPU cores
  python train.py --method spark --data FOLDER     a method on your images; a+b trains several at once
  python -m medssl.common.data FOLDER              what is in a folder of images?
  python evaluate.py runs/NAME                     what are the features worth?""")


if __name__ == "__main__":
    main()
