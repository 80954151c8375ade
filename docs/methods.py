"""Draws the pictures of docs/methods.md: a short training of each method on the built-in images, then its portrait.

    python docs/methods.py [NAME ...]       all of them, or these; a training that is there already does not run again

About half an hour on one quiet CPU core. The trainings stay in runs/methods/, or where --runs says.
"""

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from medssl import METHODS  # noqa: E402
from medssl import __main__ as shown  # noqa: E402
from medssl.common import files, pen  # noqa: E402

PAGE = ROOT / "docs" / "methods.md"
STEPS = {"simclr": 500, "dcl": 300, "simsiam": 200, "byol": 200, "vicreg": 200, "lejepa": 200, "swav": 200, "moco": 500,
         "medmoco": 500, "spark": 200, "rotation": 200, "relative": 300, "jigsaw": 300, "autoencoder": 300,
         "genesis": 300, "rubik": 300, "pcrl": 150, "together": 150}
MOST = 80_000                                                               # bytes of a picture
TOGETHER = "rotation+simclr"                                                # what stands for all sums of methods


def trained(name, runs):
    """The folder of the training."""
    run = runs / f"{name}-{STEPS[name]}"
    if not (run / "checkpoint.pt").is_file():
        train.main(["--method", TOGETHER if name == "together" else name, "--size", "64", "--out", str(run),
                    "--steps", str(STEPS[name]), "--log-every", str(STEPS[name] // 2), "--device", "cpu"])
    return run


def draw(name, run):
    """docs/methods/NAME.png."""
    path = PAGE.with_suffix("") / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        shown.main([TOGETHER if name == "together" else name, "--run", str(run), "--out", str(path)])
    for greys in (40, 24, 16):                                              # noise takes room
        pen.few_colours(path, greys)
        if path.stat().st_size <= MOST:
            break


def tell(name, run):
    """What the picture was made with, into the page."""
    used = files.read_config(run)["arguments"]
    words = f"{used['steps']} steps of {used['batch']} images, {used['size']} pixels, {used['encoder']}, {used['data']}"
    text = PAGE.read_text()
    PAGE.write_text(re.sub(rf"(<!-- {name} -->)[^<]*(<!-- / -->)", rf"\g<1>{words}\g<2>", text))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *METHODS], help="default: all methods")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "methods", help="where the trainings are kept")
    args = parser.parse_args()
    for name in args.names or METHODS:
        run = trained(name, args.runs)
        draw(name, run)
        tell(name, run)
        print(f"docs/methods/{name}.png", flush=True)


if __name__ == "__main__":
    main()
