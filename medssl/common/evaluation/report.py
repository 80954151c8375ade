"""What an evaluation found, in numbers: a table per task on the terminal, results.json and results.csv.

A record is one fit (one model, cell and seed). A summary is all seeds of one model and cell: mean and spread (standard
deviation) over seeds, and the 95 % interval of the mean when the test patients are drawn anew. Differences are taken
seed by seed on the same patients, so that what two models share cancels.
"""

import csv
import itertools
import math
import platform
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .. import files, metrics
from .scores import Gain, gain, never_predicted, steps_to
from .study import Cell
from .tasks import SPEED, TASKS, WORDS

LEGEND = """[ ]: 95 % when the test patients are drawn anew; ±: standard deviation over seeds; P: share of those draws
in which the gain is not above 0, and in how many seeds it is above 0; *: settled, that is larger than what the draw of
test patients and of seeds make of no gain at all (95 %; seeds are those of the read-outs, not of pretraining)"""


@dataclass
class Summary:
    cell: Cell
    model: str
    seeds: int
    train: dict                                 # train_images, train_patients: mean over seeds; empty where none is
    scores: dict                                # name: {"mean", "spread"}
    interval: dict                              # name: [low, high], for the drawn scores
    never_predicted: dict                       # class: in how many fits

    @property
    def main(self):
        return main_of(self.cell)

    def mean(self, name):
        return self.scores[name]["mean"] if name in self.scores else math.nan


@dataclass
class Difference:
    """first - second."""
    cell: Cell
    first: str
    second: str
    metric: str
    gain: Gain


def main_of(cell):
    """The score that is charted, and whose differences are printed."""
    return TASKS[cell.task].columns[0]


def summarise(study, records):
    """The summaries and the differences of every two models, cell by cell."""
    add_speed(study, records)
    summaries, differences = [], []
    for cell in dict.fromkeys(r.cell for r in records):
        new, pairs = summarise_cell(study, [r for r in records if r.cell == cell])
        summaries, differences = summaries + new, differences + pairs
    return summaries, differences


def add_speed(study, records):
    """Epochs until the validation score reaches 95 % of its last value, and of the last value of the random model of
    the same seed."""
    curves = {(r.model, r.seed, r.cell): r.curve for r in records if r.curve}
    for r in (r for r in records if r.curve):
        base = curves.get((study.bases_of(r.model)[0], r.seed, r.cell), [(0, math.nan)])
        for name, curve in zip(SPEED, (r.curve, base)):
            r.scored.scores[name] = steps_to(r.curve, 0.95 * curve[-1][1])


def summarise_cell(study, records):
    models = {m.name: [r for r in records if r.model == m.name] for m in study.models}
    models = {name: own for name, own in models.items() if own}
    seeds = set.intersection(*({r.seed for r in own} for own in models.values()))       # a stopped run lacks some
    models = {name: [r for r in own if r.seed in seeds] for name, own in models.items()}
    start, pairs = records[0].scored, list(itertools.combinations(models, 2))
    patients = len(np.unique(start.units)) if start.heads else 0

    def again(rows):
        each = [np.mean([r.scored.again(rows) for r in fits], 0) for fits in models.values()]
        return np.array(each)                                               # (models, heads)
    drawn, ends = {}, {}
    if start.heads:
        drawn = dict(zip(models, metrics.draws(again, start.units).swapaxes(0, 1)))     # (draws, heads) each
        ends = {name: np.transpose(metrics.ends(own)) for name, own in drawn.items()}   # (heads, 2) each
    summaries = [summary_of(study, name, fits, dict(zip(start.heads, ends.get(name, []))))
                 for name, fits in models.items()]
    differences = []
    for a, b in pairs:
        for i, head in enumerate(start.heads):
            by_seed = [two.scored.scores[head] - one.scored.scores[head] for one, two in zip(models[a], models[b])]
            found = gain(by_seed, drawn[b][:, i] - drawn[a][:, i], patients)
            differences.append(Difference(records[0].cell, b, a, head, found))
    return summaries, differences


def summary_of(study, name, fits, interval):
    cell, target = fits[0].cell, study.targets.get(TASKS[fits[0].cell.task].target)
    train = {key: float(np.mean([getattr(r, key) for r in fits])) for key in ("train_images", "train_patients")
             if getattr(fits[0], key) is not None}
    values = {key: np.array([r.scored.scores[key] for r in fits]) for key in fits[0].scored.scores}
    dead = Counter()
    if target:
        answers = [r.answers[0] if cell.task == "robustness" else r.answers for r in fits]
        dead = Counter(c for answer in answers for c in never_predicted(answer, target.classes))
    return Summary(cell, name, len(fits), train, {key: mean_and_spread(v) for key, v in values.items()},
                   {head: list(ends) for head, ends in interval.items()}, dict(dead))


def mean_and_spread(values):
    spread = float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else math.nan
    return {"mean": metrics.mean_defined(values), "spread": spread}


def describe(cell):
    words = [cell.labels and f"labels {cell.labels}", cell.imbalance and f"imbalance {cell.imbalance:g}", cell.augment,
             cell.stage and f"stage {cell.stage}"]
    return ", ".join(filter(None, words))


def chance_of(study, task):
    """Balanced accuracy of a guess; nothing is known of one of masks."""
    target = study.targets.get("labels")
    return 1 / len(np.unique(target.values[target.rows["test"]])) if TASKS[task].target == "labels" else None


# ---- files

def tidy(value):
    """Plain Python for JSON: nan becomes null."""
    if isinstance(value, dict):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [tidy(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def flat(found):
    """A summary or difference as one level of keys, its cell and gain spread out."""
    own = asdict(found)
    return {**own.pop("cell")._asdict(), **own.pop("train", {}), **own.pop("gain", {}), **own}


def facts(record):
    """The plain fields of a record, with its scores."""
    left_out = ("answers", "measures", "examples", "scored", "cell")
    own = {key: value for key, value in vars(record).items() if key not in left_out}
    return {**own, **record.cell._asdict(), "scores": record.scored.scores}


def write_json(study, records, summaries, differences, stopped=False):
    dataset = study.dataset
    files.write_json(study.out / "results.json", tidy({
        "settings": asdict(study.settings), "stopped": stopped, "notes": study.notes,
        "tasks": {task: TASKS[task].words for task in dict.fromkeys(r.cell.task for r in records)},
        "data": {"name": dataset.name, "shape": dataset.images.shape[1:],
                 **{kind: {"classes": target.classes, "images": {name: len(rows) for name, rows in target.rows.items()},
                           "patients": {name: len(np.unique(study.groups[rows])) for name, rows in target.rows.items()}}
                    for kind, target in study.targets.items()}},
        "models": [{"name": m.name, "encoder": m.encoder, "stem": m.stem, "step": m.step, "normalised": m.normalised,
                    "file": m.file and str(m.file)} for m in study.models],
        "cells": [flat(s) for s in summaries], "differences": [flat(d) for d in differences],
        "fits": [facts(r) for r in records],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                     "device": str(study.device)}}))


def write_csv(study, records):
    """One line for each score of each fit."""
    with files.whole(study.out / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["model", *Cell._fields, "seed", "train_images", "train_patients", "metric", "value"])
        lines.writerows([r.model, *r.cell, r.seed, r.train_images, r.train_patients, name, tidy(value)]
                        for r in records for name, value in r.scored.scores.items())


# ---- on the terminal

def number(value, sign=""):
    return "n/a" if not math.isfinite(value) else f"{value:{sign}.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"


def bracket(ends):
    return f" [{number(ends[0])}, {number(ends[1])}]" if len(ends) and all(map(math.isfinite, ends)) else ""


def worth(found):
    """A gain in one phrase."""
    text = f"{number(found.mean, '+')}{bracket(found.interval)}{'*' * found.settled}"
    if math.isfinite(found.not_positive):
        text += f" P {found.not_positive:.3f}, {found.seeds_above} of {found.seeds}"
    return text


def print_table(study, task, summaries, differences):
    """One line per summary: the main score, what it gains over each random model, the other scores' means."""
    summaries = [s for s in summaries if s.cell.task == task]
    first, *others = TASKS[task].columns
    others = [name for name in others if any(name in s.scores for s in summaries)]
    others += [rare_recall(study)] if any(s.cell.imbalance for s in summaries) else []
    learns, shown = bool(TASKS[task].target), {s.model for s in summaries}
    bases = dict.fromkeys(b for s in summaries for b in study.bases_of(s.model) if learns and b in shown)
    lines = [["encoder", "learnt from" * learns, WORDS.get(first, first), *(f"over {base}" for base in bases),
              *(WORDS.get(key, key) for key in others)]]
    for s in summaries:
        learnt_from = f"{describe(s.cell)} ({s.train['train_images']:.0f} images)" if learns else ""
        gains = [gain_over(study, differences, s, base, first) for base in bases]
        lines.append([s.model, learnt_from, main_text(s, first), *gains, *(number(s.mean(key)) for key in others)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{heading(study, task, summaries)}")
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())
    for s in (s for s in summaries if s.never_predicted):
        dead = ", ".join(f"{name} ({fits} of {s.seeds} fits)" for name, fits in s.never_predicted.items())
        print(f"  never predicted by {s.model}, {describe(s.cell)}: {dead}")


def heading(study, task, summaries):
    words = ["encoder frozen: unchanged, the same hash before and after" if TASKS[task].frozen else "encoder trained"]
    chance = chance_of(study, task)
    words += [f"chance {number(chance)}"] if chance else []
    words.append(f"seeds: {', '.join(sorted({str(s.seeds) for s in summaries}))}")
    return f"{TASKS[task].title}: {'; '.join(words)}"


def main_text(summary, name):
    spread = summary.scores[name]["spread"]
    return (number(summary.mean(name)) + (f" ± {number(spread)}" if math.isfinite(spread) else "")
            + bracket(summary.interval.get(name, [])))


def rare_recall(study):
    target = study.targets["labels"]
    return f"recall {target.classes[target.rare]}"


def gain_over(study, differences, summary, base, metric):
    """What the model gains over one of the random models of its own network."""
    bases = study.bases_of(summary.model)
    if summary.model in bases or base not in bases:
        return ""
    wanted = summary.cell, summary.model, base, metric
    found = [d for d in differences if (d.cell, d.first, d.second, d.metric) == wanted]
    return worth(found[0].gain) if found else ""


def print_differences(study, differences):
    """Between the models that are not random, for the first cell of each task; the others are in results.json."""
    random, first = {m.name for m in study.models if m.random}, {}
    for d in differences:
        first.setdefault(d.cell.task, d.cell)
    shown = [d for d in differences
             if not {d.first, d.second} & random and d.metric == main_of(d.cell) and d.cell == first[d.cell.task]]
    if shown:
        print("\npaired differences")
    for d in shown:
        what = f"{TASKS[d.cell.task].title}, {describe(d.cell)}: {d.first} - {d.second}"
        print(f"  {what}: {WORDS[d.metric]} {worth(d.gain)}")
    if len(shown) > 1:
        print(f"  these are {len(shown)} comparisons: with no difference anywhere, up to {0.05 * len(shown):.1f} of "
              "them would be called settled")
    if differences:
        print(f"\n{LEGEND}")
