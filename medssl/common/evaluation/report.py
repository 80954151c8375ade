"""What an evaluation found: a table per task, results.json, results.csv and pictures.

A record is one fit (one encoder, task, condition and seed). A cell is all seeds of one encoder, task and condition: mean and spread (standard
deviation) over seeds, and the 95 % interval of the mean when the test patients are drawn anew. Differences are taken seed by seed on the same
patients, so that what two encoders share cancels.
"""

import csv
import itertools
import math
import platform
import re

import numpy as np
import torch

from .. import feed, files, metrics, plots
from . import readouts

CLASSES = ("balanced_accuracy", "auc", "accuracy", "macro_f1", "average_precision", "quadratic_kappa")
MASKS = ("dice", "iou", "dice_per_slice", "iou_per_slice")
MAIN = ("balanced_accuracy", "dice")                                        # charted, and differences printed
SPEED = ("epochs_to_95", "epochs_to_95_of_random")
COLUMNS = {"knn": CLASSES, "linear": CLASSES, "finetune": CLASSES + SPEED, "segment": MASKS + SPEED, "unet": MASKS + SPEED,
           "collapse": ("rank_me", "alpha_req", "participation_ratio", "mean_correlation", "spread")}
SHORT = {"balanced_accuracy": "balanced accuracy", "auc": "AUC", "macro_f1": "F1", "average_precision": "AP", "quadratic_kappa": "kappa", "dice": "Dice",
         "iou": "IoU", "dice_per_slice": "Dice/slice", "iou_per_slice": "IoU/slice", "epochs_to_95": "epochs to 95 %",
         "epochs_to_95_of_random": "to 95 % of random", "rank_me": "RankMe", "alpha_req": "alpha-ReQ", "participation_ratio": "participation",
         "mean_correlation": "correlation"}
AXES = {"labels": "training images with labels (log scale)", "imbalance": "other classes : rare class in training (log scale)",
        "augment": "strength of augmentation, S0 to S6"}


def headlines(record):
    """The scores that `rescore` draws from."""
    return [] if "rescore" not in record else list(MASKS[:2] if "dice" in record["scores"] else CLASSES[:len(record["rescore"](np.arange(1)))])


def describe(condition):
    labels, imbalance, augment = condition
    words = [f"labels {labels}", imbalance and f"imbalance {imbalance:g}", augment]
    return ", ".join(filter(None, words)) if labels else ""


def condition_of(record):
    return record["labels"], record["imbalance"], record["augment"]


def plain(name):
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.@+-]+", "_", name)


def write(study, records, cells, tasks):
    """Everything into the study's folder, and the tables on the terminal."""
    out = study.out
    add_speed(study, records)
    found, differences = [], []
    for task, condition in cells:
        here = [r for r in records if r["task"] == task and condition_of(r) == condition]
        new, pairs = summarise(study, task, condition, here)
        found, differences = found + new, differences + pairs
    write_json(study, records, found, differences, tasks, out)
    write_csv(records, out)
    pictures = draw(study, records, found, out)
    for task in dict.fromkeys(cell["task"] for cell in found):
        print_table(study, task, [c for c in found if c["task"] == task], differences, records)
    print_pairs(study, differences)
    print(f"in {out}: results.json, results.csv; pictures {', '.join(pictures)}")


def base_of(study, name):
    """The random row of the same network."""
    own = next(m for m in study.models if m.name == name)
    return next(m.name for m in study.models if not m.file and (m.encoder, m.stem) == (own.encoder, own.stem))


def add_speed(study, records):
    """Epochs until the validation score reaches 95 % of its final value, and of the final value of the random encoder of the same seed."""
    curves = {(r["model"], r["seed"], cell_of(r)): r["curve"] for r in records if "curve" in r}
    for r in (r for r in records if "curve" in r):
        r["scores"]["epochs_to_95"] = readouts.steps_to(r["curve"], 0.95 * r["curve"][-1][1])
        base = curves.get((base_of(study, r["model"]), r["seed"], cell_of(r)), [(0, math.nan)])
        r["scores"]["epochs_to_95_of_random"] = readouts.steps_to(r["curve"], 0.95 * base[-1][1])


def cell_of(record):
    return record["task"], *condition_of(record)


# ---- numbers

def summarise(study, task, condition, records):
    """The cells of one task and condition, one per encoder, and the differences of every two of them."""
    models = {m.name: [r for r in records if r["model"] == m.name] for m in study.models}
    models = {name: own for name, own in models.items() if own}
    seeds = set.intersection(*({r["seed"] for r in own} for own in models.values())) if models else set()
    models = {name: [r for r in own if r["seed"] in seeds] for name, own in models.items()}                   # a stopped run lacks some
    where = {"task": task, **condition._asdict()}
    heads = headlines(records[0]) if records else []
    pairs = list(itertools.combinations(models, 2))

    def again(rows):
        own = {name: np.mean([r["rescore"](rows) for r in fits], 0) for name, fits in models.items()}           # (heads,) each
        return np.array([*own.values(), *(own[b] - own[a] for a, b in pairs)])                                # (models + pairs, heads)
    ends = metrics.bootstrap(again, records[0]["units"]) if heads else None

    def interval(number):
        return {head: [ends[0][number, i], ends[1][number, i]] for i, head in enumerate(heads)}
    found, differences = [], []
    for number, (name, fits) in enumerate(models.items()):
        values = {key: np.array([r["scores"][key] for r in fits]) for key in fits[0]["scores"]}
        found.append({**where, "model": name, "seeds": len(fits),
                      **{key: float(np.mean([r[key] for r in fits])) for key in ("train_images", "train_patients") if key in fits[0]},
                      "scores": {key: {"mean": metrics.mean_defined(v), "spread": float(np.nanstd(v, ddof=1)) if np.isfinite(v).sum() > 1 else math.nan}
                                 for key, v in values.items()}, "interval": interval(number)})
    for number, (a, b) in enumerate(pairs, len(models)):
        for head in heads:
            each = [[r["scores"][head] for r in models[name]] for name in (b, a)]
            mean, half = metrics.paired_difference(*each)
            differences.append({**where, "first": b, "second": a, "metric": head, "mean": mean, "interval": interval(number)[head],
                                "half_width_over_seeds": half})
    return found, differences


def tidy(value):
    """Plain Python for JSON: nan becomes null."""
    if isinstance(value, dict):
        return {str(k): tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [tidy(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 6) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write_json(study, records, found, differences, tasks, out):
    dataset = study.dataset
    kept = [{k: v for k, v in r.items() if k not in ("rescore", "units", "overlay")} for r in records]
    files.write_json(out / "results.json", tidy({
        "arguments": vars(study.args), "notes": study.notes, "tasks": {task: tasks[task] for task in dict.fromkeys(r["task"] for r in records)},
        "data": {"name": dataset.name, "shape": dataset.images.shape[1:],
                 **{kind: {"classes": target.classes, "images": {name: len(rows) for name, rows in target.rows.items()},
                           "patients": {name: len(np.unique(study.groups[rows])) for name, rows in target.rows.items()}}
                    for kind, target in study.targets.items()}},
        "models": [{"name": m.name, "encoder": m.encoder, "stem": m.stem, "step": m.step, "file": m.file and str(m.file)} for m in study.models],
        "cells": found, "differences": differences, "fits": kept,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__, "device": str(study.device)}}))


def write_csv(records, out):
    """One line for each score of each fit."""
    keys = ("model", "task", "labels", "imbalance", "augment", "seed", "train_images", "train_patients")
    with files.whole(out / "results.csv") as temporary, open(temporary, "w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([*keys, "metric", "value"])
        lines.writerows([*(r.get(key) for key in keys), name, tidy(value)] for r in records for name, value in r["scores"].items())


# ---- on the terminal

def number(value, sign=""):
    return "n/a" if not math.isfinite(value) else f"{value:{sign}.1f}" if abs(value) >= 10 else f"{value:{sign}.3f}"


def bracket(ends):
    return f" [{number(ends[0])}, {number(ends[1])}]" if all(map(math.isfinite, ends)) else ""


def print_table(study, task, cells, differences, records):
    """One line per cell. The first score with spread over seeds and interval; what it gains over the random row; the other scores' means."""
    heads = headlines(next(r for r in records if r["task"] == task))
    first, *others = COLUMNS[task]
    others += [rare_recall(study)] if any(c["imbalance"] for c in cells) else []
    lines = [["encoder", "" if task == "collapse" else "learnt from", f"{SHORT.get(first, first)} ± seeds" + " [95 %]" * bool(heads)]
             + ["over random [95 %]"] * bool(heads) + [SHORT.get(key, key) for key in others]]
    for cell in cells:
        score, base = cell["scores"][first], base_of(study, cell["model"])
        spread = f" ± {number(score['spread'])}" if math.isfinite(score["spread"]) else ""
        line = [cell["model"], f"{describe(condition_of(cell))} ({cell['train_images']:.0f} images)" if heads else "",
                number(score["mean"]) + spread + (bracket(cell["interval"][first]) if heads else "")]
        if heads:
            line.append("" if cell["model"] == base else over(differences, cell, base, first))
        lines.append(line + [number(cell["scores"][key]["mean"]) for key in others])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print(f"\n{task}: {'encoder frozen: unchanged, the same hash before and after' if frozen(records, task) else 'encoder trained'}")
    for line in lines:
        print("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip())


def rare_recall(study):
    target = study.targets["labels"]
    return f"recall {target.classes[target.rare]}"


def frozen(records, task):
    return all("frozen" in r for r in records if r["task"] == task)


def over(differences, cell, base, metric):
    for d in differences:
        if (d["task"], d["first"], d["second"], d["metric"]) == (cell["task"], cell["model"], base, metric) and condition_of(d) == condition_of(cell):
            return number(d["mean"], "+") + bracket(d["interval"])
    return "n/a"


def print_pairs(study, differences):
    """Differences between the encoders that are not random, for the first condition of each task; the others are in results.json."""
    random, first = {m.name for m in study.models if not m.file}, {}
    for d in differences:
        first.setdefault(d["task"], condition_of(d))
    shown = [d for d in differences if not {d["first"], d["second"]} & random and d["metric"] in MAIN and condition_of(d) == first[d["task"]]]
    if shown:
        print("\npaired differences [95 % by patient] (± 95 % over seeds)")
    for d in shown:
        half = f" (± {number(d['half_width_over_seeds'])})" if math.isfinite(d["half_width_over_seeds"]) else ""
        print(f"  {d['task']}, {describe(condition_of(d))}: {d['first']} - {d['second']}: {SHORT[d['metric']]} {number(d['mean'], '+')}{bracket(d['interval'])}{half}")


# ---- pictures

def overlay(study, rows, truth, answers, single):
    """The best, the median and the worst of the test images by their mean Dice; single (N, classes) per image."""
    each = np.array([metrics.mean_defined(values) for values in single])
    order = [i for i in np.argsort(each) if np.isfinite(each[i])]
    if not order:
        return None
    chosen = [order[-1], order[len(order) // 2], order[0]]
    return {"images": feed.batch(study.dataset.images, rows[chosen], "cpu"), "targets": truth[chosen], "predictions": answers[chosen],
            "titles": [f"{name}, Dice {each[i]:.3f}" for name, i in zip(("best", "median", "worst"), chosen)]}


def draw(study, records, found, out):
    """The pictures that these results allow; returns their names."""
    names = []

    def path(name):
        names.append(plain(name) + ".png")
        return out / names[-1]
    scored = [c for c in found if c["task"] != "collapse"]
    if scored:
        draw_scores(study, scored, path("scores"))
    for task in dict.fromkeys(c["task"] for c in scored):
        own = [c for c in scored if c["task"] == task]
        for axis in AXES:
            if len({c[axis] for c in own}) > 1:
                draw_series(study, own, axis, path(f"{axis}-{task}"))
        if sum(m.step is not None for m in study.models) > 1:
            draw_steps(study, own, path(f"steps-{task}"))
    first = {task: next(r for r in records if r["task"] == task) for task in dict.fromkeys(r["task"] for r in records)}
    for task, start in first.items():
        fits = [r for r in records if cell_of(r) == cell_of(start)]
        if "curve" in start:
            draw_convergence(study, fits, path(f"convergence-{task}"))
        for r in (r for r in fits if r["seed"] == start["seed"]):
            if "confusion" in r:
                plots.confusion_picture(r["confusion"], study.targets["labels"].classes, path(f"confusion-{task}-{r['model']}"),
                                        f"{study.dataset.name}, test: {task}, {r['model']}")
            if r.get("overlay"):
                plots.overlays(**r["overlay"], path=path(f"overlay-{task}-{r['model']}"))
    spectra = {r["model"]: r["spectrum"] for r in records if "spectrum" in r and r["seed"] == 0}
    if spectra:
        plots.spectrum_chart(spectra, path("spectrum"))
    return names


def main_metric(cell):
    return next(metric for metric in MAIN if metric in cell["scores"])


def band(cell):
    """Mean and ± one spread over seeds; with one seed the interval by patient."""
    metric = main_metric(cell)
    mean, spread = cell["scores"][metric]["mean"], cell["scores"][metric]["spread"]
    return (mean, mean - spread, mean + spread) if math.isfinite(spread) else (mean, *cell["interval"][metric])


def band_words(cells):
    return "band: ± standard deviation over seeds" if cells[0]["seeds"] > 1 else "band: 95 % interval by patient"


def draw_scores(study, cells, path):
    """Bars for the first condition of every task."""
    first = {task: next(c for c in cells if c["task"] == task) for task in dict.fromkeys(c["task"] for c in cells)}
    names, series, intervals = [m.name for m in study.models], {}, {}
    for task, start in first.items():
        own = {c["model"]: c for c in cells if cell_of(c) == cell_of(start)}
        metric = main_metric(start)
        label = f"{task}: {SHORT[metric]}, {describe(condition_of(start))}"
        series[label] = [own[n]["scores"][metric]["mean"] if n in own else math.nan for n in names]
        intervals[label] = list(zip(*(own[n]["interval"][metric] if n in own else (math.nan, math.nan) for n in names)))
    plots.bars(names, series, path, f"{study.dataset.name}: test split, 95 % intervals by patient", "score", intervals)


def draw_series(study, cells, axis, path):
    """Score against one axis of the series, a line per encoder; the other axes stay at their first value. Under imbalance also the rare class's recall."""
    others = [key for key in AXES if key != axis]
    cells = [c for c in cells if all(c[key] == cells[0][key] for key in others)]
    task, metric, log = cells[0]["task"], main_metric(cells[0]), axis != "augment"

    def place(cell):
        return {"labels": cell.get("train_images"), "imbalance": cell["imbalance"], "augment": int((cell["augment"] or "S0")[1:])}[axis]
    lines = {m.name: sorted((c for c in cells if c["model"] == m.name), key=place) for m in study.models}
    lines = {name: own for name, own in lines.items() if own}
    xs = {name: [place(c) for c in own] for name, own in lines.items()}
    charts = [{"series": {name: (xs[name], [band(c)[0] for c in own]) for name, own in lines.items()}, "log_x": log,
               "bands": {name: tuple(zip(*(band(c)[1:] for c in own))) for name, own in lines.items()},
               "title": f"{study.dataset.name}, test: {task}; {band_words(cells)}", "x_label": AXES[axis], "y_label": SHORT[metric]}]
    if axis == "imbalance":
        rare = rare_recall(study)
        charts.append({"series": {name: (xs[name], [c["scores"][rare]["mean"] for c in own]) for name, own in lines.items()}, "log_x": log,
                       "title": "the class that is made rare", "x_label": AXES[axis], "y_label": rare})
    plots.panels(charts, path, size=(760, 460))


def draw_steps(study, cells, path):
    """Score against the step of pretraining, a line per run that several checkpoints were given of, and the random encoder as a level."""
    same = [c for c in cells if cell_of(c) == cell_of(cells[0])]
    own, runs = {c["model"]: band(c) for c in same}, {}
    for m in sorted((m for m in study.models if m.step is not None and m.name in own), key=lambda m: m.step):
        runs.setdefault(str(m.name).split("@")[0], []).append((m.step, *own[m.name]))
    levels = {m.name: own[m.name][0] for m in study.models if not m.file and m.name in own}
    plots.curves({name: tuple(zip(*points))[:2] for name, points in runs.items()}, path,
                 f"{study.dataset.name}, test: {cells[0]['task']}; {band_words(cells)}", "steps of pretraining", SHORT[main_metric(cells[0])],
                 bands={name: tuple(zip(*points))[2:] for name, points in runs.items()}, horizontal=levels)


def draw_convergence(study, fits, path):
    """Validation score against epochs: mean over seeds and the range of one spread."""
    series, bands = {}, {}
    for m in study.models:
        curves = np.array([r["curve"] for r in fits if r["model"] == m.name])                                 # (seeds, looks, 2)
        if len(curves):
            epochs, mean, spread = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 1].std(0)
            series[m.name], bands[m.name] = (epochs, mean), (mean - spread, mean + spread)
    start = fits[0]
    plots.curves(series, path, f"{study.dataset.name}, validation: {start['task']}, {describe(condition_of(start))}; "
                 "band: ± standard deviation over seeds", "epochs", SHORT[main_metric(start)], bands=bands)
