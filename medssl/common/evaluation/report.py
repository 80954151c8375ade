"""What an evaluation found, in numbers: a table per task on the terminal, results.json and results.csv.

A record is one fit (one model, cell and seed). A summary is all seeds of one model and cell: mean and spread (standard
deviation) over seeds, and the 95 % interval of the mean when the test patients are drawn anew. Differences are taken
seed by seed on the same patients, so that what two models share cancels.
"""

import csv
import itertools
import math
import platform
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .. import files, metrics
from .scores import steps_to
from .study import Cell
from .tasks import SPEED, TASKS, WORDS

MAIN = ("balanced_accuracy", "dice")                                        # charted, and differences printed


@dataclass
class Summary:
    cell: Cell
    model: str
    seeds: int
    train: dict                                 # train_images, train_patients: mean over seeds; empty where none is
    scores: dict                                # name: {"mean", "spread"}
    interval: dict                              # name: [low, high], for the drawn scores

    @property
    def main(self):
        return next(name for name in MAIN if name in self.scores)

    def mean(self, name):
        return self.scores[name]["mean"]


@dataclass
class Difference:
    """first - second."""
    cell: Cell
    first: str
    second: str
    metric: str
    mean: float
    interval: list
    half_width_over_seeds: float


def summarise(study, records):
    """The summaries and the differences of every two models, cell by cell."""
    add_speed(study, records)
    summaries, differences = [], []
    for cell in dict.fromkeys(r.cell for r in records):
        new, pairs = summarise_cell(study, cell, [r for r in records if r.cell == cell])
        summaries, differences = summaries + new, differences + pairs
    return summaries, differences


def add_speed(study, records):
    """Epochs until the validation score reaches 95 % of its last value, and of the last value of the random model of
    the same seed."""
    curves = {(r.model, r.seed, r.cell): r.curve for r in records if r.curve}
    for r in (r for r in records if r.curve):
        base = curves.get((study.base_of(r.model), r.seed, r.cell), [(0, math.nan)])
        for name, curve in zip(SPEED, (r.curve, base)):
            r.scored.scores[name] = steps_to(r.curve, 0.95 * curve[-1][1])


def summarise_cell(study, cell, records):
    models = {m.name: [r for r in records if r.model == m.name] for m in study.models}
    models = {name: own for name, own in models.items() if own}
    seeds = set.intersection(*({r.seed for r in own} for own in models.values()))
    models = {name: [r for r in own if r.seed in seeds] for name, own in models.items()}                    # a stopped run lacks some
    heads, pairs = records[0].scored.heads, list(itertools.combinations(models, 2))

    def again(rows):
        own = {name: np.mean([r.scored.again(rows) for r in fits], 0) for name, fits in models.items()}     # (heads,) each
        return np.array([*own.values(), *(own[b] - own[a] for a, b in pairs)])                              # (models + pairs, heads)
    ends = metrics.bootstrap(again, records[0].scored.units) if heads else None

    def interval(number):
        return {head: [ends[0][number, i], ends[1][number, i]] for i, head in enumerate(heads)}
    summaries, differences = [], []
    for number, (name, fits) in enumerate(models.items()):
        train = {key: float(np.mean([getattr(r, key) for r in fits])) for key in ("train_images", "train_patients")
                 if getattr(fits[0], key) is not None}
        values = {key: np.array([r.scored.scores[key] for r in fits]) for key in fits[0].scored.scores}
        summaries.append(Summary(cell, name, len(fits), train, {key: mean_and_spread(v) for key, v in values.items()}, interval(number)))
    for number, (a, b) in enumerate(pairs, len(models)):
        for head in heads:
            mean, half = metrics.paired_difference(*([r.scored.scores[head] for r in models[name]] for name in (b, a)))
            differences.append(Difference(cell, b, a, head, mean, interval(number)[head], half))
    return summaries, differences


def mean_and_spread(values):
    spread = float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else math.nan
    return {"mean": metrics.mean_defined(values), "spread": spread}


def describe(cell):
    words = [f"labels {cell.labels}", cell.imbalance and f"imbalance {cell.imbalance:g}", cell.augment]
    return ", ".join(filter(None, words)) if cell.labels else ""


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
    """A summary or difference as one level of keys, its cell spread out."""
    own = asdict(found)
    return {**own.pop("cell")._asdict(), **own.pop("train", {}), **own}


def write_json(study, records, summaries, differences):
    dataset = study.dataset
    files.write_json(study.out / "results.json", tidy({
        "settings": asdict(study.settings), "notes": study.notes,
        "tasks": {task: TASKS[task].words for task in dict.fromkeys(r.cell.task for r in records)},
        "data": {"name": dataset.name, "shape": dataset.images.shape[1:],
                 **{kind: {"classes": target.classes, "images": {name: len(rows) for name, rows in target.rows.items()},
                           "patients": {name: len(np.unique(study.groups[rows])) for name, rows in target.rows.items()}}
                    for kind, target in study.targets.items()}},
        "models": [{"name": m.name, "encoder": m.encoder, "stem": m.stem, "step": m.step, "file": m.file and str(m.file)}
                   for m in study.models],
        "cells": [flat(s) for s in summaries], "differences": [flat(d) for d in differences], "fits": [r.facts() for r in records],
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
    return f" [{number(ends[0])}, {number(ends[1])}]" if all(map(math.isfinite, ends)) else ""


def print_table(study, task, summaries, differences):
    """One line per summary. The first score with spread over seeds and interval; what it gains over the random model;
    the other scores' means."""
    summaries = [s for s in summaries if s.cell.task == task]
    first, *others = TASKS[task].columns
    learns, frozen = bool(summaries[0].interval), TASKS[task].needs != "network"
    others += [rare_recall(study)] if any(s.cell.imbalance for s in summaries) else []
    lines = [["encoder", "learnt from" * learns, f"{WORDS[first]} ± seeds" + " [95 %]" * learns] + ["over random [95 %]"] * learns
             + [WORDS.get(key, key) for key in others]]
    for s in summaries:
        spread = s.scores[first]["spread"]
        line = [s.model, f"{describe(s.cell)} ({s.train['train_images']:.0f} images)" if learns else "",
                number(s.mean(first)) + (f" ± {number(spread)}" if math.isfinite(spread) else "") + bracket(s.interval.get(first, [math.nan]))]
        line += [gain_over_random(study, differences, s, first)] * learns
        lines.append(line + [number(s.mean(key)) for key in others])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{task}: {'encoder frozen: unchanged, the same hash before and after' if frozen else 'encoder trained'}")
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def rare_recall(study):
    target = study.targets["labels"]
    return f"recall {target.classes[target.rare]}"


def gain_over_random(study, differences, summary, metric):
    base = study.base_of(summary.model)
    found = [d for d in differences if (d.cell, d.first, d.second, d.metric) == (summary.cell, summary.model, base, metric)]
    if summary.model == base:
        return ""
    return number(found[0].mean, "+") + bracket(found[0].interval) if found else "n/a"


def print_differences(study, differences):
    """Between the models that are not random, for the first cell of each task; the others are in results.json."""
    random, first = {m.name for m in study.models if not m.file}, {}
    for d in differences:
        first.setdefault(d.cell.task, d.cell)
    shown = [d for d in differences if not {d.first, d.second} & random and d.metric in MAIN and d.cell == first[d.cell.task]]
    if shown:
        print("\npaired differences [95 % by patient] (± 95 % over seeds)")
    for d in shown:
        half = f" (± {number(d.half_width_over_seeds)})" if math.isfinite(d.half_width_over_seeds) else ""
        print(f"  {d.cell.task}, {describe(d.cell)}: {d.first} - {d.second}: {WORDS[d.metric]} {number(d.mean, '+')}{bracket(d.interval)}{half}")
