"""Does lists of train.py and evaluate.py commands, seed by seed. What is finished is skipped, what was stopped goes on.

A work is two plain dicts: PRETRAIN {name: flags of train.py} and EVALUATE {name: (rows, flags of evaluate.py)}, rows
being names of PRETRAIN or other words that evaluate.py takes. `{runs}` is the folder of this seed's runs. A line with
`{generic}` needs --generic, weights of another domain, and is left out without it.
"""

import argparse
import glob
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from medssl.common import files  # noqa: E402


def main(words, pretrain, evaluate, masks=None, argv=None):
    """masks: what is evaluated instead of `evaluate` where --masks is given."""
    args = parse(words, masks, argv)
    evaluate = masks if masks and args.masks else evaluate
    for seed in range(args.seeds):
        for line, folder, is_done in of_seed(args, pretrain, evaluate, seed):
            if args.list:
                print(f"python {shlex.join(line)}")
            elif is_done(folder):
                print(f"done already: {folder}")
            else:
                do(line, folder)
    for name in evaluate:
        print(f"next: python experiments/over_seeds.py {args.out}/seed*/results/{name}/results.csv --over random")


def do(line, folder):
    if line[0] == "train.py" and (folder / "checkpoint.pt").is_file():
        line = ["train.py", "--resume", "--out", str(folder)]
    print(f"+ python {shlex.join(line)}", flush=True)
    line = [word for each in line for word in (sorted(glob.glob(each)) if "*" in each else [each])]
    subprocess.run([sys.executable, str(ROOT / line[0]), *line[1:]], check=True)


def parse(words, masks, argv):
    parser = argparse.ArgumentParser(description=words.split("\n")[0])
    add = parser.add_argument
    add("--data", required=True, help="folder of images, or phantoms")
    add("--out", required=True, metavar="DIR")
    add("--seeds", type=int, default=3, help="pretrainings of each")
    add("--deal", action="store_true", help="cross-validation: each seed also deals the patients anew")
    add("--generic", metavar="FILE", help="weights of another domain, ImageNet's say: a row, and a start for others")
    add("--steps", type=int, help="of each training: a rehearsal")
    add("--train", default="", metavar="FLAGS", help="more flags for every train.py: --train='--size 64'")
    add("--evaluate", default="", metavar="FLAGS", help="more flags for every evaluate.py")
    add("--list", action="store_true", help="print the commands, do nothing")
    if masks:
        add("--masks", action="store_true", help="of a set with masks: segment")
    return parser.parse_args(argv)


def of_seed(args, pretrain, evaluate, seed):
    """(words, the folder that they fill, whether that is done) of one seed."""
    runs, deal = Path(args.out) / f"seed{seed}", ["--deal", str(seed)] * args.deal
    for name, flags in pretrain.items():
        if args.generic or "{generic}" not in flags:
            yield (["train.py", "--data", args.data, "--seed", str(seed), *filled(args, flags, runs), *deal,
                    *shlex.split(args.train), "--out", str(runs / name)], runs / name, trained)
    for name, (rows, flags) in evaluate.items():
        rows = [word for row in rows for word in filled(args, row, runs) if args.generic or "{generic}" not in row
                and "{generic}" not in pretrain.get(row, "")]
        rows = [str(runs / row) if row.split("+")[0] in pretrain else row for row in rows]
        out = runs / "results" / name
        yield (["evaluate.py", *rows, "--data", args.data, *filled(args, flags, runs), *deal,
                *shlex.split(args.evaluate), "--out", str(out)], out, evaluated)


def filled(args, flags, runs):
    """Flags as words, with the folders in their places. A rehearsal has --steps in the place of its length."""
    words = shlex.split(flags.replace("{runs}", str(runs)).replace("{generic}", args.generic or "{generic}"))
    if args.steps and flags.startswith("--"):
        for length in ("--epochs", "--freeze"):
            if length in words:
                del words[words.index(length):words.index(length) + 2]
        words += ["--steps", str(args.steps)]
    return words


def trained(folder):
    if not (folder / "checkpoint.pt").is_file():
        return False
    return files.load_torch(folder / "checkpoint.pt")["step"] >= files.read_config(folder)["arguments"]["steps"]


def evaluated(folder):
    results = folder / "results.json"
    return results.is_file() and not json.loads(results.read_text())["stopped"]
