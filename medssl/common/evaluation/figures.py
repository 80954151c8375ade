"""What an evaluation found, in pictures."""

import math

import numpy as np

from .. import feed, plots, sheets
from .report import describe, rare_recall
from .study import file_name
from .tasks import TASKS, WORDS

AXES = {"labels": "training images with labels (log scale)", "imbalance": "other classes : rare class in training (log scale)",
        "augment": "strength of augmentation, S0 to S6"}


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
    for task in dict.fromkeys(r.cell.task for r in records):
        start = next(r for r in records if r.cell.task == task)
        fits = [r for r in records if r.cell == start.cell]
        if start.curve:
            draw_convergence(study, fits, path(f"convergence-{task}"))
        for r in (r for r in fits if r.seed == start.seed):
            if r.confusion is not None:
                plots.confusion_picture(r.confusion, study.targets["labels"].classes, path(f"confusion-{task}-{r.model}"),
                                        f"{study.dataset.name}, test: {task}, {r.model}")
            if r.examples:
                draw_examples(study, r.examples, path(f"overlay-{task}-{r.model}"))
    spectra = {r.model: r.spectrum for r in records if r.spectrum is not None and r.seed == 0}
    if spectra:
        plots.spectrum_chart(spectra, path("spectrum"))
    return names


def draw_examples(study, examples, path):
    rows = examples["rows"]
    titles = [f"{name}, Dice {dice:.3f}" for name, dice in zip(("best", "median", "worst"), examples["dice"])]
    sheets.overlays(feed.batch(study.dataset.images, rows, "cpu"), study.targets["masks"].values[rows], examples["predictions"],
                   titles, path)


def band(summary):
    """Mean and ± one spread over seeds; with one seed the interval by patient."""
    mean, spread = summary.scores[summary.main].values()
    return (mean, mean - spread, mean + spread) if math.isfinite(spread) else (mean, *summary.interval[summary.main])


def band_words(summaries):
    return "band: ± standard deviation over seeds" if summaries[0].seeds > 1 else "band: 95 % interval by patient"


def draw_scores(study, summaries, path):
    """Bars for the first cell of every task."""
    names, series, intervals = [m.name for m in study.models], {}, {}
    for task in dict.fromkeys(s.cell.task for s in summaries):
        start = next(s for s in summaries if s.cell.task == task)
        own = {s.model: s for s in summaries if s.cell == start.cell}
        label = f"{task}: {WORDS[start.main]}, {describe(start.cell)}"
        series[label] = [own[n].mean(start.main) if n in own else math.nan for n in names]
        intervals[label] = list(zip(*(own[n].interval[start.main] if n in own else (math.nan, math.nan) for n in names)))
    title = f"{study.dataset.name}: test split, 95 % intervals by patient"
    plots.bars(plots.Bars(names, series, title, "score", intervals), path)


def draw_series(study, summaries, axis, path):
    """Score against one axis of the series, a line per model; the other axes stay at their first value. Under imbalance
    also the rare class's recall."""
    others = [key for key in AXES if key != axis]
    start = summaries[0]
    summaries = [s for s in summaries if all(getattr(s.cell, key) == getattr(start.cell, key) for key in others)]

    def place(s):
        return {"labels": s.train["train_images"], "imbalance": s.cell.imbalance, "augment": int((s.cell.augment or "S0")[1:])}[axis]
    lines = {m.name: sorted((s for s in summaries if s.model == m.name), key=place) for m in study.models}
    lines = {name: own for name, own in lines.items() if own}
    xs = {name: [place(s) for s in own] for name, own in lines.items()}
    shared = {"log_x": axis != "augment", "x_label": AXES[axis]}
    charts = [{"series": {name: (xs[name], [band(s)[0] for s in own]) for name, own in lines.items()}, **shared,
               "bands": {name: tuple(zip(*(band(s)[1:] for s in own))) for name, own in lines.items()},
               "title": f"{study.dataset.name}, test: {start.cell.task}; {band_words(summaries)}", "y_label": WORDS[start.main]}]
    if axis == "imbalance":
        rare = rare_recall(study)
        charts.append({"series": {name: (xs[name], [s.mean(rare) for s in own]) for name, own in lines.items()}, **shared,
                       "title": "the class that is made rare", "y_label": rare})
    plots.panels(charts, path, size=(760, 460))


def draw_steps(study, summaries, path):
    """Score against the step of pretraining, a line per run that several checkpoints were given of, and the random
    model as a level."""
    start, runs = summaries[0], {}
    own = {s.model: band(s) for s in summaries if s.cell == start.cell}
    for m in sorted((m for m in study.models if m.step is not None and m.name in own), key=lambda m: m.step):
        runs.setdefault(str(m.name).split("@")[0], []).append((m.step, *own[m.name]))
    levels = {m.name: own[m.name][0] for m in study.models if not m.file and m.name in own}
    plots.curves({name: tuple(zip(*points))[:2] for name, points in runs.items()}, path,
                 f"{study.dataset.name}, test: {start.cell.task}; {band_words(summaries)}", "steps of pretraining",
                 WORDS[start.main], bands={name: tuple(zip(*points))[2:] for name, points in runs.items()}, horizontal=levels)


def draw_convergence(study, fits, path):
    """Validation score against epochs: mean over seeds and the range of one spread."""
    series, bands = {}, {}
    for m in study.models:
        curves = np.array([r.curve for r in fits if r.model == m.name])                                     # (seeds, looks, 2)
        if len(curves):
            epochs, mean, spread = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 1].std(0)
            series[m.name], bands[m.name] = (epochs, mean), (mean - spread, mean + spread)
    cell = fits[0].cell
    plots.curves(series, path, f"{study.dataset.name}, validation: {cell.task}, {describe(cell)}; band: ± standard deviation over seeds",
                 "epochs", WORDS[TASKS[cell.task].columns[0]], bands=bands)
