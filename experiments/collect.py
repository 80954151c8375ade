"""One table and one chart of several sets, from the folders that does_it_help.py (or another script) filled.

    python experiments/collect.py cells=FOLDER X-rays=FOLDER --out docs/results

Leaves scores.csv, a line for each set, deal, read-out and row, and gains.png: the mean gain over random weights with
its 95 % t interval over deals.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import over_seeds  # noqa: E402

from medssl.common import pictures  # noqa: E402


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sets", nargs="+", metavar="NAME=FOLDER", help="a set's name, and the --out of its script")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--rows", nargs="+", default=["medmoco", "thumbnails", "statistics", "medmoco+statistics"],
                        help="of the chart")
    parser.add_argument("--tasks", nargs="+", default=["linear", "segment"], help="of the chart")
    args = parser.parse_args(argv)
    scores = [line for name in args.sets for line in scores_of(*name.split("=", 1))]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    with open(Path(args.out) / "scores.csv", "w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["set", "deal", *over_seeds.CELL, "metric", "row", "score"])
        lines.writerows(scores)
    draw([line for line in scores if line[2] in args.tasks], args.rows, Path(args.out) / "gains.png")


def scores_of(name, folder):
    """[set, deal, *cell, row, score] of all that a script left for one set."""
    for path in sorted(Path(folder).glob("seed*/results/*/results.csv")):
        deal = re.search(r"seed(\d+)", str(path))[1]
        for (cell, row), score in over_seeds.read(path).items():
            if cell[0] != "collapse":
                yield [name, deal, *cell, row, f"{score:.4f}"]


def draw(scores, rows, path):
    """Gains over random weights of the same deal; one group for each set and read-out."""
    known = {(tuple([name, *cell]), deal, row): float(score) for name, deal, *cell, row, score in scores}
    groups, series, ends = list(dict.fromkeys(group for group, *_ in known)), {}, {}
    for row in rows:
        gains = [[known[group, deal, row] - known[group, deal, "random"] for deal in deals_of(known, group, row)]
                 for group in groups]
        series[row] = [np.mean(each) if each else np.nan for each in gains]
        ends[row] = list(zip(*(over_seeds.interval(each, 0.95) for each in gains)))
    words = [f"{name}, {over_seeds.words(tuple(cell))}" for name, *cell in groups]
    pictures.bars(pictures.Bars(words, series, "Gain over random weights, 95 % t intervals over deals of the patients",
                                "gain", ends, {"no gain": 0}), path)


def deals_of(known, group, row):
    return sorted(deal for own, deal, other in known
                  if own == group and other == row and (group, deal, "random") in known)


if __name__ == "__main__":
    main()
