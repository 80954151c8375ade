"""What an evaluation found, in pictures."""

import math

import numpy as np

from .. import feed, metrics, pictures
from .report import cell_words, chance_of, rare_recall
from .scores import SHARES, slice_dice
from .study import file_name
from .tasks import TASKS, WORDS

# Series: the axis' words, and where a summary lies on it.
AXES = {"labels": ("training images with labels (log scale)", lambda s: s.train["train_images"]),
        "imbalance": ("images of each other class for one of the rare class (log scale)", lambda s: s.cell.imbalance),
        "augment": ("strength of augmentation, S0 to S6", lambda s: int((s.cell.augment or "S0")[1:])),
        "stage": ("stage of the network", lambda s: s.cell.stage or 0)}


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
    for task in dict.fromkeys(r.cell.task for r in records):
        start = next(r for r in records if r.cell.task == task)
        draw_fits(study, [r for r in records if r.cell == start.cell], path)
    spectra = {r.model: r.spectrum for r in records if r.spectrum is not None and r.seed == study.seeds[0]}
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
        if r.examples is not None:
            draw_examples(study, r, path(f"overlay-{task}-{r.model}"))
        elif TASKS[task].answers is SHARES:
            counts = metrics.confusion(target.test, r.answers.argmax(1), len(target.classes))
            pictures.confusion_picture(counts, target.classes, path(f"confusion-{task}-{r.model}"),
                                       f"{title_of(study, start)}, {r.model}")


def draw_examples(study, record, path):
    target = study.targets["masks"]
    rows, dice = target.rows["test"][record.examples], slice_dice(record.answers)[record.examples]
    titles = [f"{name}, Dice {value:.3f}" for name, value in zip(("best", "median", "worst"), dice)]
    pictures.overlays(feed.batch(study.dataset.images, rows, "cpu"), {"truth": target.values[rows],
                      "prediction": record.masks}, target.classes, titles, path)


def title_of(study, summary):
    return f"{study.dataset.name}, test: {TASKS[summary.cell.task].title}"


def band(summary):
    """Mean and ± one spread over seeds; with one seed the interval by patient."""
    mean, spread = summary.scores[summary.main].values()
    ends = summary.interval.get(summary.main, (math.nan, math.nan))
    return (mean, mean - spread, mean + spread) if math.isfinite(spread) else (mean, *ends)


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
        label = f"{TASKS[task].title}: {WORDS.get(start.main, start.main)}, {cell_words(start.cell)}"
        series[label] = [own[n].mean(start.main) if n in own else math.nan for n in names]
        ends = [own[n].interval.get(start.main) if n in own else None for n in names]
        intervals[label], chances = list(zip(*(e or (math.nan, math.nan) for e in ends))), chances | levels(study, task)
    title = f"{study.dataset.name}: test split, 95 % intervals by patient"
    pictures.bars(pictures.Bars(names, series, title, "score", intervals, chances), path)


def draw_series(study, summaries, axis, path):
    """Score against one axis of the series, a line per model; the other axes stay at their first value. Under imbalance
    also the rare class's recall."""
    start, others, (words, place) = summaries[0], [key for key in AXES if key != axis], AXES[axis]
    summaries = [s for s in summaries if all(getattr(s.cell, key) == getattr(start.cell, key) for key in others)]
    lines = {m.name: sorted((s for s in summaries if s.model == m.name), key=place) for m in study.models}
    lines = {name: ([place(s) for s in own], own) for name, own in lines.items() if own}
    shared = {"log_x": axis in ("labels", "imbalance"), "x_label": words}
    charts = [pictures.Chart({name: (xs, [band(s)[0] for s in own]) for name, (xs, own) in lines.items()}, **shared,
                             bands={name: tuple(zip(*(band(s)[1:] for s in own))) for name, (_, own) in lines.items()},
                             title=f"{title_of(study, start)}; {band_words(start.seeds)}",
                             y_label=WORDS.get(start.main, start.main), horizontal=levels(study, start.cell.task))]
    if axis == "imbalance":
        rare = rare_recall(study)
        series = {name: (xs, [s.mean(rare) for s in own]) for name, (xs, own) in lines.items()}
        charts.append(pictures.Chart(series, "the class that is made rare", y_label=rare, **shared))
    pictures.panels(charts, path, size=(760, 460))


def draw_convergence(study, records, path):
    """Validation score against epochs: mean over seeds and the range of one spread."""
    series, bands, cell = {}, {}, records[0].cell
    for m in study.models:
        curves = np.array([r.curve for r in records if r.model == m.name])  # (seeds, looks, 2)
        if len(curves):
            epochs, mean, spread = curves[0, :, 0], curves[:, :, 1].mean(0), curves[:, :, 1].std(0)
            series[m.name], bands[m.name] = (epochs, mean), (mean - spread, mean + spread)
    title = (f"{study.dataset.name}, validation: {TASKS[cell.task].title}, {cell_words(cell)}; "
             f"{band_words(len({r.seed for r in records}))}")
    score = "balanced_accuracy" if TASKS[cell.task].target == "labels" else "dice"
    pictures.curves(series, path, title, "epochs", WORDS[score], bands=bands, horizontal=levels(study, cell.task))
