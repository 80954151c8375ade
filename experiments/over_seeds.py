"""Scores over pretraining seeds or outer splits: each results.csv is one, and they alone are what varies.

    python experiments/over_seeds.py out/seed*/results/classes/results.csv --over random --chart gains.png

Within a file a score is the mean over the seeds of its read-outs. Over the files: the mean, its 95 % t interval, and
the paired gain over a row that all files have, with 95 % and 99 % t intervals.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from medssl.common import pictures  # noqa: E402
from medssl.common.evaluation.tasks import TASKS, WORDS  # noqa: E402

CELL = "task", "labels", "imbalance", "augment", "stage"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", help="results.csv of evaluate.py, one a pretraining seed or outer split")
    parser.add_argument("--over", default="random", metavar="ROW", help="the row that gains are taken over")
    parser.add_argument("--metric", help="default: the first score of each task")
    parser.add_argument("--chart", metavar="FILE.png", help="dots with 95 %% intervals")
    args = parser.parse_args(argv)
    tables = [read(path, args.metric) for path in args.files]
    cells, rows = (dict.fromkeys(key[i] for table in tables for key in table) for i in (0, 1))
    lines = [line_of(tables, cell, row, args.over) for cell in cells for row in rows
             if any((cell, row) in table for table in tables)]
    show(lines, len(tables), args.over)
    if args.chart:
        draw(lines, len(tables), args.chart)


def read(path, metric=None):
    """{(cell, row): mean score over the seeds of the read-outs} of one file."""
    scores = {}
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            wanted = metric or TASKS[line["task"]].columns[0]
            if line["metric"] == wanted and line["value"]:
                cell = (*(line[name] for name in CELL), wanted)
                scores.setdefault((cell, line["model"]), []).append(float(line["value"]))
    return {key: float(np.mean(values)) for key, values in scores.items()}


def t_quantile(freedom, level):
    """How far Student's t goes on either side with this probability. With t = sqrt(freedom) tan(angle) its density is
    cos(angle)^(freedom - 1): summed up by trapezoids."""
    angles = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angles) ** (freedom - 1)
    mass = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2))
    return float(np.sqrt(freedom) * np.tan(np.interp(level, mass / mass[-1], angles)))


def interval(values, level):
    """(low, high) of the mean; nan of a single value."""
    if len(values) < 2:
        return np.nan, np.nan
    half = t_quantile(len(values) - 1, level) * np.std(values, ddof=1) / np.sqrt(len(values))
    return np.mean(values) - half, np.mean(values) + half


def line_of(tables, cell, row, over):
    """Of the files that have it: the mean, its interval, and the gain over a row of the same files."""
    scores = [table[cell, row] for table in tables if (cell, row) in table]
    gains = [table[cell, row] - table[cell, over] for table in tables if {(cell, row), (cell, over)} <= table.keys()]
    line = {"cell": cell, "row": row, "files": len(scores), "mean": np.mean(scores), "interval": interval(scores, 0.95)}
    if gains and row != over:
        line |= {"gain": np.mean(gains), 95: interval(gains, 0.95), 99: interval(gains, 0.99)}
    return line


def show(lines, count, over):
    def ends(pair):
        return f"[{pair[0]:+.3f}, {pair[1]:+.3f}]"
    print(f"{count} files; t intervals over files\n")
    print(f"| task | row | files | mean | 95 % | gain over {over} | 95 % | 99 % |\n|---|---|---|---|---|---|---|---|")
    for line in lines:
        gain = [f"{line['gain']:+.3f}", ends(line[95]), ends(line[99])] if "gain" in line else [""] * 3
        print("| " + " | ".join([words(line["cell"]), line["row"], str(line["files"]), f"{line['mean']:.3f}",
                                 "[{:.3f}, {:.3f}]".format(*line["interval"]), *gain]) + " |")


def words(cell):
    task, labels, imbalance, augment, stage, metric = cell
    more = [labels and f"labels {labels}", imbalance and f"imbalance {imbalance}", augment, stage and f"stage {stage}"]
    return ", ".join([f"{task} {WORDS.get(metric, metric)}", *filter(None, more)])


def draw(lines, count, path):
    rows, cells = ([*dict.fromkeys(line[key] for line in lines)] for key in ("row", "cell"))
    known, none = {(line["cell"], line["row"]): line for line in lines}, {"mean": np.nan, "interval": (np.nan, np.nan)}
    each = {words(cell): [known.get((cell, row), none) for row in rows] for cell in cells}
    pictures.bars(pictures.Bars(rows, {name: [line["mean"] for line in own] for name, own in each.items()},
                                f"Mean over {count} pretrainings or splits, 95 % t intervals", "score",
                                {name: list(zip(*(line["interval"] for line in own))) for name, own in each.items()}),
                  path)


if __name__ == "__main__":
    main()
