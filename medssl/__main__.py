"""python -m medssl: the methods with one line each, and the commands to start.
python -m medssl METHOD: what its file says, and a picture of what it sees, asks and answers."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import METHODS
from .common import cli, data, encoders, files, portraits, presets, settings
from .common.errors import UserError

START = """
To start:
  python train.py                                  the default on built-in images, about two minutes on two CPU cores
  python train.py --method spark --data FOLDER     a method on your images; a+b trains several at once
  python -m medssl METHOD --data FOLDER            what a method sees of them, and what a network answers: one picture
  python -m medssl.common.data FOLDER              what is in a folder of images?
  python evaluate.py runs/NAME                     what are the features worth?"""


def main(argv=None):
    args = parse(argv)
    if args.method is None:
        return overview()
    names = settings.names_of(args.method, METHODS)
    out = Path(args.out or f"{args.method}.png")
    if out.suffix != ".png" or out.is_dir():
        raise UserError(f"--out {out}: a file that ends in .png")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    for name in (*names, "together")[:len(names) + (len(names) > 1)]:
        print(sys.modules[METHODS[name].__module__].__doc__)
    dataset, networks = trained(args) if args.run else untrained(args, names)
    with cli.told(args.method, *(sys.modules[METHODS[name].__module__].__file__ for name in names)):
        portraits.portrait(networks, dataset, portraits.some_rows(dataset)).save(out)
    print(f"what goes in, what is asked and what is answered: {out}")
    if not args.run:
        print(f"the network is a random one; train one with python train.py --method {args.method} --data {args.data}, "
              "then give its folder with --run")


def overview():
    print("Self-supervised pretraining for 2D medical images. The methods:\n")
    for name, cls in METHODS.items():
        first = sys.modules[cls.__module__].__doc__.splitlines()[0]
        print(f"  {'a+b' if name == 'together' else name:12} {first.split(': ', 1)[-1]}")
    print(START)


def parse(argv):
    parser = cli.Parser(prog="python -m medssl", description=__doc__.splitlines()[1])
    add = parser.add_argument
    add("method", nargs="?", help="one of the methods, or several joined by +; left out: a list of them")
    add("--data", type=cli.filled, help="folder or file of images (default: phantoms, built in; with --run its own)")
    add("--run", type=cli.filled, metavar="FOLDER", help="of train.py, for a trained network beside a random one")
    add("--out", type=cli.filled, metavar="FILE.png", help="the picture (default: METHOD.png)")
    args = parser.parse_args(argv)
    if args.method is None and (args.data or args.run or args.out):
        parser.error("name a method, such as simclr")
    args.data = args.data or (None if args.run else "phantoms")
    return args


def untrained(args, names):
    """The set, and the method as train.py would make it for the set, with random weights."""
    found = presets.look(args.data, "label")
    plan = presets.small([METHODS[name] for name in names], found)
    parts = settings.parts_of(METHODS, names, found=found)
    dataset = data.load(args.data, plan["size"])
    method = made(parts, dataset, plan["encoder"], plan.get("stem", "default"), plan["size"])
    return dataset, {"random network": method}


def made(parts, dataset, encoder, stem, size, seed=0):
    """The method before training."""
    torch.manual_seed(seed)
    channels = dataset.images.shape[1]
    encoder = encoders.build(encoder, channels, stem, dataset.mean, dataset.std)
    return settings.build(METHODS, parts, encoder, channels, size)


def trained(args):
    """The set that the run learnt from, or another one, and the method before and after."""
    folder = Path(args.run)
    if not (folder / "checkpoint.pt").is_file():
        raise UserError(f"--run {folder}: there is no checkpoint.pt; train.py leaves one")
    run, config = settings.stored(folder, "cpu", METHODS), files.read_config(folder)
    if run.method != args.method:
        raise UserError(f"--run {folder}: it trained {run.method}, not {args.method}")
    dataset = data.load(args.data or run.data, run.size, config["data"]["channels"], run.label, run.cache)
    seen = config["encoder"]                                                # the images of the run, perhaps not these
    learnt = replace(dataset, mean=tuple(seen["mean"]), std=tuple(seen["std"]))
    before, after = (made(run.parts, learnt, run.encoder, run.stem, run.size, run.seed) for _ in range(2))
    state = files.load_torch(folder / "checkpoint.pt")
    try:
        after.load_state_dict(state["method"])
    except (RuntimeError, KeyError):
        raise UserError(f"--run {folder}: its checkpoint.pt is not of the method in its config.json, or of an earlier "
                        "version of it") from None
    return dataset, {"random network": before, f"after {state['step']} steps": after}


if __name__ == "__main__":
    cli.run(main)
