"""What an evaluation is about to do, in words; and what came out, in numbers: a table per task on the terminal,
results.csv and results.json.

A record is one fit (one model, cell and seed). A summary is all seeds of one model and cell: mean and spread (standard
deviation) over seeds, and the 95 % interval of the mean when the test patients are drawn anew. Differences are taken
seed by seed on the same patients, so that what two models share cancels.
"""

import csv
import itertools
import math
import platform
from collections import namedtuple
from dataclasses import asdict, dataclass

import numpy as np
import torch

from .. import files, metrics
from ..data.dataset import by
from .scores import gain, steps_to
from .study import Cell
from .tasks import SPEED, TASKS, WORDS, schedule, training_rows

LEGEND = """[ ]: 95 % when the test patients are drawn anew. *: settled, larger than what the draws of test patients and
of seeds (of read-outs, not of pretraining) make of no gain at all. Other scores: results.csv, --all-columns"""


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
        return main_of(self.cell)

    def mean(self, name):
        return self.scores[name]["mean"] if name in self.scores else math.nan


Difference = namedtuple("Difference", "cell first second metric gain")      # first - second


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
            differences.append(Difference(records[0].cell, b, a, head,
                                          gain(by_seed, drawn[b][:, i] - drawn[a][:, i], patients)))
    return summaries, differences


def summary_of(study, name, fits, interval):
    train = {key: float(np.mean([getattr(r, key) for r in fits])) for key in ("train_images", "train_patients")
             if getattr(fits[0], key) is not None}
    values = {key: np.array([r.scored.scores[key] for r in fits]) for key in fits[0].scored.scores}
    return Summary(fits[0].cell, name, len(fits), train, {key: mean_and_spread(v) for key, v in values.items()},
                   {head: list(ends) for head, ends in interval.items()})


def mean_and_spread(values):
    spread = float(np.nanstd(values, ddof=1)) if np.isfinite(values).sum() > 1 else math.nan
    return {"mean": metrics.mean_defined(values), "spread": spread}


def cell_words(cell):
    words = [cell.labels and f"labels {cell.labels}", cell.imbalance and f"imbalance {cell.imbalance:g}", cell.augment,
             cell.stage and f"stage {cell.stage}"]
    return ", ".join(filter(None, words))


def chance_of(study, task):
    """The first score of a guess, where the task knows one."""
    task = TASKS[task]
    return task.chance(study.targets[task.target]) if task.chance else None


# ---- before

def say(study, cells):
    """What is about to be done, task by task, with numbers of images and patients."""
    args = study.args
    print(f"{study.dataset.name}: images {by(study.dataset.images.shape[1:])}; {len(study.models)} models on "
          f"{study.device}, seeds: {args.seeds}")
    for name in dict.fromkeys(cell.task for cell in cells):
        task = TASKS[name]
        words = [f"{name}: {'encoder frozen; ' * task.frozen}{task.words}"]
        if task.trains:
            per_epoch, steps, frozen = schedule(args, name, study.targets[task.target])
            words.append(f"{steps} steps of {args.batch} ({steps / per_epoch:.3g} epochs)"
                         + f", in the first {frozen} the encoder is frozen" * (0 < frozen < steps))
        if task.chosen:
            chosen = "rate and " * (task.trains and len(args.lr) > 1) + task.chosen
            words.append(f"{chosen} chosen on validation: {count(study, study.targets[task.target].rows['val'])}")
        if task.target:
            words.append(f"scored once on test: {count(study, study.targets[task.target].rows['test'])}")
        print("; ".join(words))
    learning = dict.fromkeys(cell._replace(augment=None, stage=None) for cell in cells if TASKS[cell.task].target)
    for cell in {(TASKS[cell.task].target, cell[1:]): cell for cell in learning}.values():
        say_training(study, cell)


def say_training(study, cell):
    """The images that a cell learns from, and which classes are not among them."""
    target = study.targets[TASKS[cell.task].target]
    each = [training_rows(study, cell, seed) for seed in study.seeds]
    print(f"    {cell_words(cell)}: training on {count(study, each[0])}{' (first seed)' * (len(each) > 1)}")
    lost = [c for i, c in enumerate(target.classes) if TASKS[cell.task].target == "labels"
            and any(i not in target.values[rows] for rows in each)]
    if lost:
        more = f" and {len(lost) - 4} more classes" if len(lost) > 4 else ""
        study.note(f"{cell_words(cell)}: in some seeds no training image of {', '.join(lost[:4])}{more}; scored with "
                   "what is there")


def count(study, rows):
    patients = len(np.unique(study.groups[rows]))
    return f"{len(rows)} images of {patients} patients" if study.dataset.groups is not None else f"{len(rows)} images"


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


def plain(summary):
    own = asdict(summary)
    return {**own.pop("cell")._asdict(), **own.pop("train"), **own}


def facts(record):
    """The plain fields of a record, with its scores."""
    left_out = ("answers", "measures", "examples", "masks", "scored", "cell", "notes")
    own = {key: value for key, value in vars(record).items() if key not in left_out}
    return {**own, **record.cell._asdict(), "scores": record.scored.scores}


def write_results_json(study, records, summaries, differences, stopped=False):
    dataset = study.dataset
    files.write_json(study.out / "results.json", tidy({
        "settings": vars(study.args), "stopped": stopped, "notes": study.notes,
        "tasks": {task: TASKS[task].words for task in dict.fromkeys(r.cell.task for r in records)},
        "data": {"name": dataset.name, "shape": dataset.images.shape[1:],
                 **{kind: {"classes": target.classes, "images": {name: len(rows) for name, rows in target.rows.items()},
                           "patients": {name: len(np.unique(study.groups[rows])) for name, rows in target.rows.items()}}
                    for kind, target in study.targets.items()}},
        "models": [{"name": m.name, "encoder": m.encoder, "stem": m.stem, "step": m.step, "normalised": m.normalised,
                    "file": m.file and str(m.file)} for m in study.models],
        "cells": [plain(s) for s in summaries],
        "differences": [{**d.cell._asdict(), "first": d.first, "second": d.second, "metric": d.metric, **asdict(d.gain)}
                        for d in differences],
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


def worth(gain):
    """A gain in one phrase."""
    return f"{number(gain.mean, '+')}{bracket(gain.interval)}{'*' * gain.settled}"


def print_results(study, summaries, differences):
    for task in dict.fromkeys(s.cell.task for s in summaries):
        print_table(study, [s for s in summaries if s.cell.task == task], differences)
    print_differences(study, differences)
    if differences:
        print(f"\n{LEGEND}")


def print_table(study, summaries, differences):
    """One line per summary: the main score, what it gains over the random network, other scores if they are asked
    for."""
    task, (first, *others) = summaries[0].cell.task, columns_of(study, summaries)
    learns = [1] * bool(TASKS[task].target)                                 # else these two columns are not there
    lines = [["encoder", *["learnt from"] * len(learns), WORDS.get(first, first), *["over random"] * len(learns),
              *(WORDS.get(name, name) for name in others)]]
    lines += [[s.model, *[f"{cell_words(s.cell)} ({s.train['train_images']:.0f} images)" for _ in learns],
               main_text(study, s), *[over_random(study, differences, s) for _ in learns],
               *(number(s.mean(name)) for name in others)] for s in summaries]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{heading(study, task, summaries)}")
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def columns_of(study, summaries):
    """The scores that are shown; of a task without labels all."""
    task = TASKS[summaries[0].cell.task]
    if task.target and not study.args.all_columns:
        return task.columns[:1]
    rare = [rare_recall(study)] if any(s.cell.imbalance for s in summaries) else []
    return [*(name for name in task.columns if any(name in s.scores for s in summaries)), *rare]


def heading(study, task, summaries):
    words = ["encoder frozen: the same hash before and after" if TASKS[task].frozen else "encoder trained"]
    chance = chance_of(study, task)
    words += [f"chance {number(chance)}"] if chance else []
    words += ["by patient"] if study.args.per == "patient" and TASKS[task].target == "labels" else []
    return f"{TASKS[task].title}: {'; '.join(words)}; seeds: {', '.join(sorted({str(s.seeds) for s in summaries}))}"


def main_text(study, summary):
    spread = summary.scores[summary.main]["spread"]
    return (number(summary.mean(summary.main)) + bracket(summary.interval.get(summary.main, []))
            + (f" ± {number(spread)}" if study.args.all_columns and math.isfinite(spread) else ""))


def rare_recall(study):
    target = study.targets["labels"]
    return f"recall {target.classes[target.rare]}"


def over_random(study, differences, summary):
    """What the model gains over the random one of its own network."""
    bases = study.bases_of(summary.model)
    wanted = summary.cell, summary.model, bases[0], summary.main
    gains = [d.gain for d in differences if d[:4] == wanted and summary.model not in bases]
    return worth(gains[0]) if gains else ""


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
        what = f"{TASKS[d.cell.task].title}, {cell_words(d.cell)}: {d.first} - {d.second}"
        print(f"  {what}: {worth(d.gain)}")
    if len(shown) > 1:
        print(f"  these are {len(shown)} comparisons: with no difference anywhere, up to {0.05 * len(shown):.1f} of "
              "them would be called settled")
