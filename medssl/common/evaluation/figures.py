"""What an evaluation found, in pictures."""

import math

import numpy as np

from .. import feed, metrics, pictures
from . import robustness
from .report import chance_of, describe, rare_recall
from .study import file_name
from .tasks import TASKS, WORDS

AXES = {"labels": "training images with labels (log scale)",
        "imbalance": "images of each other class for one of the rare class (log scale)",
        "augment": "strength of augmentation, S0 to S6", "stage": "stage of the network"}


def draw(study, records, summaries):
    """The pictures that these results allow; returns their names."""
    names = []

    def path(name):
        names.append(file_name(name) + ".png")
        return study.out / names[-1]
    scored = [s for s in summaries if TASKS[s.cell.task].target]
    if scored:
        draw_scores(study, scored, path("scores"))
    for task in dict.fromkeys(s.cell.task for s in scored):
        own = [s for s in scored if s.cell.task == task]
        for axis in AXES:
            if len({getattr(s.cell, axis) for s in own}) > 1:
                draw_series(study, own, axis, path(f"{axis}-{task}"))
        if sum(m.step is not None for m in study.models) > 1:
            draw_steps(study, own, path(f"steps-{task}"))
        if task == "robustness":
            draw_robustness(study, own, path("robustness"))
    for task in dict.fromkeys(r.cell.task for r in records):
        start = next(r for r in records if r.cell.task == task)
        draw_fits(study, [r for r in records if r.cell == start.cell], path)
    spectra = {r.model: r.spectrum for r in records if r.spectrum is not None and r.seed == 0}
    if spectra:
        pictures.spectrum_chart(spectra, path("spectrum"))
    return names


def draw_fits(study, records, path):
    """What is drawn of single fits, for the first cell of a task and its first seed."""
    start = records[0]
    task, target = start.cell.task, study.targets.get(TASKS[start.cell.task].target)
    if start.curve:
        draw_convergence(study, records, path(f"convergence-{task}"))
    for r in (r for r in records if r.seed == start.seed):
        if r.examples:
            draw_examples(study, r.examples, path(f"overlay-{task}-{r.model}"))
        elif target and r.answers.ndim == 2:
            counts = metrics.confusion(target.values[target.rows["test"]], r.answers.argmax(1), len(target.classes))
            title = f"{study.dataset.name}, test: {TASKS[task].title}, {r.model}"
            pictures.confusion_picture(counts, target.classes, path(f"confusion-{task}-{r.model}"), title)


def draw_examples(study, examples, path):
    rows, target = examples["rows"], study.targets["masks"]
    titles = [f"{name}, Dice {dice:.3f}" for name, dice in zip(("best", "median", "worst"), examples["dice"])]
    images = feed.batch(study.dataset.images, rows, "cpu")
    masks = {"truth": target.values[rows], "prediction": examples["predictions"]}
    pictures.overlays(images, masks, target.classes, titles, path)


def title_of(study, summary):
    return f"{study.dataset.name}, test: {TASKS[summary.cell.task].title}"


def band(summary):
    """Mean and ± one spread over seeds; with one seed the interval by patient."""
    mean, spread = summary.scores[summary.main].values()
    return (mean, mean - spread, mean + spread) if math.isfinite(spread) else (mean, *summary.interval[summary.main])


def band_words(seeds):
    """Seeds draw the labelled patients, the head's first weights and the order; the pretraining stays the same one."""
    return f"band: ± standard deviation over {seeds} read-outs" if seeds > 1 else "band: 95 % interval by patient"


def levels(study, task):
    chance = chance_of(study, task)
    return {"chance": chance} if chance else {}


def draw_scores(study, summaries, path):
    """Bars for the first cell of every task."""
    there = {s.model for s in summaries}                                    # a normalised network is never trained
    names, series, intervals, chances = [m.name for m in study.models if m.name in there], {}, {}, {}
    for task in dict.fromkeys(s.cell.task for s in summaries):
        start = next(s for s in summaries if s.cell.task == task)
        own = {s.model: s for s in summaries if s.cell == start.cell}
        label = f"{TASKS[task].title}: {WORDS[start.main]}, {describe(start.cell)}"
        series[label] = [own[n].mean(start.main) if n in own else math.nan for n in names]
        ends = [own[n].interval[start.main] if n in own else (math.nan, math.nan) for n in names]
        intervals[label], chances = list(zip(*ends)), chances | levels(study, task)
    title = f"{study.dataset.name}: test split, 95 % intervals by patient"
    pictures.bars(pictures.Bars(names, series, title, "score", intervals, chances), path)


def draw_series(study, summaries, axis, path):
    """Score against one axis of the series, a line per model; the other axes stay at their first value. Under imbalance
    also the rare class's recall."""
    start, others = summaries[0], [key for key in AXES if key != axis]
    summaries = [s for s in summaries if all(getattr(s.cell, key) == getattr(start.cell, key) for key in others)]

    def place(s):
        return {"labels": s.train["train_images"], "imbalance": s.cell.imbalance, "stage": s.cell.stage or 0,
                "augment": int((s.cell.augment or "S0")[1:])}[axis]
    lines = {m.name: sorted((s for s in summaries if s.model == m.name), key=place) for m in study.models}
    lines = {name: own for name, own in lines.items() if own}
    xs = {name: [place(s) for s in own] for name, own in lines.items()}
    shared = {"log_x": axis in ("labels", "imbalance"), "x_label": AXES[axis]}
    charts = [pictures.Chart({name: (xs[name], [band(s)[0] for s in own]) for name, own in lines.items()}, **shared,
                          bands={name: tuple(zip(*(band(s)[1:] for s in own))) for name, own in lines.items()},
                          title=f"{title_of(study, start)}; {band_words(start.seeds)}", y_label=WORDS[start.main],
                          horizontal=levels(study, start.cell.task))]
    if axis == "imbalance":
        rare = rare_recall(study)
        series = {name: (xs[name], [s.mean(rare) for s in own]) for name, own in lines.items()}
        charts.append(pictures.Chart(series, "the class that is made rare", y_label=rare, **shared))
    pictures.panels(charts, path, size=(760, 460))


def draw_steps(study, summaries, path):
    """Score against the step of pretraining, a line per run that several checkpoints were given of, and the random
    models as levels."""
    start, runs = summaries[0], {}
    own = {s.model: band(s) for s in summaries if s.cell == start.cell}
    for m in sorted((m for m in study.models if m.step is not None and m.name in own), key=lambda m: m.step):
        runs.setdefault(str(m.name).split("@")[0], []).append((m.step, *own[m.name]))
    random = {m.name: own[m.name][0] for m in study.models if m.random and m.name in own}
    pictures.curves({name: tuple(zip(*points))[:2] for name, points in runs.items()}, path,
                 f"{title_of(study, start)}; {band_words(start.seeds)}", "steps of pretraining", WORDS[start.main],
                 bands={name: tuple(zip(*points))[2:] for name, points in runs.items()},
                 horizontal=random | levels(study, start.cell.task))


def draw_robustness(study, summaries, path):
    """Balanced accuracy against the strength of each change."""
    start, steps, charts = summaries[0], (0, *robustness.STRENGTHS), []
    for name in robustness.CHANGES:
        keys = ["balanced_accuracy", *(f"{name} {strength}" for strength in robustness.STRENGTHS)]
        series = {s.model: (steps, [s.mean(key) for key in keys]) for s in summaries if s.cell == start.cell}
        charts.append(pictures.Chart(series, f"{study.dataset.name}: test images {name}", "strength (0: as they are)",
                                  "balanced accuracy", horizontal=levels(study, "robustness")))
    pictures.panels(charts, path, columns=2)


def draw_convergence(study, records, path):
    """Validation score against epochs: mean over seeds and the range of one spread."""
    series, bands, cell = {}, {}, records[0].cell
    for m in study.models:
        curves = np.array([r.curve for r in records if r.model == m.name])  # (seeds, looks, 2)
        if len(curves):
            epochs, mean, spread = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 1].std(0)
            series[m.name], bands[m.name] = (epochs, mean), (mean - spread, mean + spread)
    title = (f"{study.dataset.name}, validation: {TASKS[cell.task].title}, {describe(cell)}; "
             f"{band_words(len({r.seed for r in records}))}")
    score = "balanced_accuracy" if TASKS[cell.task].target == "labels" else "dice"
    pictures.curves(series, path, title, "epochs", WORDS[score], bands=bands, horizontal=levels(study, cell.task))
