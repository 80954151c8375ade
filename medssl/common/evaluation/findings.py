"""What a study found: scores by pretraining seed, gains over random weights, verdicts on claims, a table and charts.

Random weights are drawn once for each seed of the read-outs, and the gain of a run is taken read-out seed by read-out
seed: same subset of labels, same head. The mean over these is the run's number; intervals are over pretraining seeds.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import files, metrics, plots
from .claims import CLAIMS
from .report import describe, number
from .study import Cell
from .tasks import SPEED, TASKS, WORDS

RANDOM = ("random", "random, normalised")
LAST = 5                                        # records of a log that speak for its end
SHOWN = ("balanced_accuracy", "dice", *SPEED, "rank_me", "alpha_req")


@dataclass(frozen=True)
class Fit:
    """One read-out of one run, of random weights, or of a file."""
    row: str                                    # as in Run; ROW@STEP for an encoder kept on the way
    seed: int | None                            # of pretraining
    fit: int                                    # seed of the read-out
    part: str
    beside: str                                 # the row that was read out in the same evaluation
    cell: Cell
    scores: dict
    curve: list | None                          # [(epoch, validation score)]


class Found:
    """All fits of a study. What is not there is nan."""

    def __init__(self, given, evaluations, folder):
        self.given, self.folder, self.fits = given, Path(folder), []
        for evaluation in evaluations:
            path = self.folder / "results" / evaluation.name / "results.json"
            if path.is_file():
                self.fits += fits_of(evaluation, json.loads(path.read_text()))
        names = {name for fit in self.fits for name in fit.scores}
        self.recalls = sorted(name for name in names if name.startswith("recall "))

    def find(self, row, task, part, beside, cell):
        """The fits of a row; of several cells those of the first."""
        def wanted(fit):
            return (fit.row, fit.cell.task, fit.part) == (row, task, part) and beside in (None, fit.beside) \
                and all(getattr(fit.cell, key) == value for key, value in cell.items())
        own = [fit for fit in self.fits if wanted(fit)]
        return [fit for fit in own if fit.cell == own[0].cell]

    def score(self, row, task, metric=None, part="", beside=None, **cell):
        """(seeds,) The mean over read-outs of each pretrained run; the same number for what has no such seed."""
        own = self.find(row, task, part, beside, cell)
        return self.by_seed(own, [value_of(fit, metric) for fit in own])

    def gain(self, row, task, metric=None, over=RANDOM[0], part="", **cell):
        """(seeds,) The same, less that of random weights with the same seed of the read-out."""
        own = self.find(row, task, part, None, cell)
        return self.by_seed(own, self.differences(own, metric, over))

    def differences(self, fits, metric, over):
        """(fits,) Each fit's score less that of random weights with the same seed of the read-out."""
        values = []
        for fit in fits:
            base = [other for other in self.find(over, fit.cell.task, fit.part, fit.beside, cell_words(fit.cell))
                    if other.fit == fit.fit]
            values.append(value_of(fit, metric) - value_of(base[0], metric) if base else math.nan)
        return values

    def by_seed(self, fits, values):
        seeds = range(self.given.seeds)
        each = [[value for fit, value in zip(fits, values) if fit.seed in (None, seed)] for seed in seeds]
        return np.array([metrics.mean_defined(own) if own else math.nan for own in each])

    def between(self, first, second, task=None, part=""):
        """(seeds,) first - second, in the read-out that speaks for the study."""
        task = task or self.given.main
        return self.score(first, task, part=part) - self.score(second, task, part=part)

    def logged(self, row, name):
        """(seeds,) A value of the run's log at its end."""
        logs = [files.read_log(self.folder / "runs" / f"{row}-{seed}" / "log.jsonl")
                for seed in range(self.given.seeds)]
        last = [[record[name] for record in log[-LAST:] if name in record] for log in logs]
        return np.array([np.mean(values) if values else math.nan for values in last])


def fits_of(evaluation, results):
    runs = {run.name: run for run in evaluation.runs}
    for fit in results["fits"]:
        name, _, step = fit["model"].partition("@")
        run, cell = runs.get(name), Cell(*(fit[key] for key in Cell._fields))
        row = fit["model"] if run is None else run.row + (step and f"@{step}")
        scores = {key: math.nan if value is None else value for key, value in fit["scores"].items()}
        yield Fit(row, run and run.seed, fit["seed"], evaluation.part, evaluation.row, cell, scores, fit["curve"])


def value_of(fit, metric):
    """The score that is asked for, or the main one of the fit's task."""
    return fit.scores.get(metric or TASKS[fit.cell.task].columns[0], math.nan)


# ---- verdicts

def verdict(effect):
    """holds or does not hold where the 95 % interval over pretraining seeds says so, else open."""
    mean, half = metrics.mean_interval(effect.values)
    low, high = (mean - half, mean + half) if math.isfinite(half) else (-math.inf, math.inf)
    if effect.within is not None:
        holds, fails = -effect.within < low and high < effect.within, low > effect.within or high < -effect.within
    else:
        holds, fails = low > effect.over, high < effect.over
    return "holds" if holds else "does not hold" if fails else "open"


def verdicts(claims, effects):
    """For each claim the verdict, which is that of its weakest effect; and the effects with intervals."""
    told = [{"claim": effect.claim, "effect": effect.words, "verdict": verdict(effect),
             "values": [value if math.isfinite(value) else None for value in map(float, effect.values)],
             **dict(zip(("mean", "half"), map(finite, metrics.mean_interval(effect.values)))),
             "holds if": f"within {effect.within:g}" if effect.within else f"above {effect.over:g}"}
            for effect in effects]
    summary = []
    for claim in claims:
        own = {each["verdict"] for each in told if each["claim"] == claim}
        worst = next((word for word in ("does not hold", "open", "holds") if word in own), "not looked at")
        summary.append({"claim": claim, "text": CLAIMS[claim], "verdict": worst})
    return {"claims": summary, "effects": told}


def finite(value):
    return float(value) if math.isfinite(value) else None


# ---- the table

def table(found):
    """Markdown, a line for each row, read-out and measure: mean ± half of the 95 % t interval, over pretraining seeds
    or, for what has none, over read-outs."""
    lines = ["| read-out | learnt from | measure | encoder | value | over random | over random, normalised | n |",
             "|---|---|---|---|---|---|---|---|"]
    for part, cell, metric in measures(found):
        own = [fit for fit in found.fits if (fit.part, fit.cell) == (part, cell) and metric in fit.scores]
        for name, fits in lines_of(own, metric):
            values = [value_of(fit, metric) for fit in fits]
            gains = {over: found.differences(fits, metric, over) for over in RANDOM if fits[0].row not in RANDOM}
            if fits[0].seed is not None:                                    # the read-outs of a run are one number
                values, gains = found.by_seed(fits, values), {k: found.by_seed(fits, v) for k, v in gains.items()}
            texts = [mean_text(gains[over], "+") if over in gains else "" for over in RANDOM]
            title = f"{TASKS[cell.task].title}{part and f', {part}'}"
            lines.append(f"| {title} | {describe(cell)} | {WORDS.get(metric, metric)} | {name} | {mean_text(values)} | "
                         f"{' | '.join(texts)} | {np.isfinite(values).sum()} |")
    return "\n".join(lines)


def measures(found):
    """(part, cell, metric) of everything that is shown, in the order of the evaluations."""
    rare = f"recall {found.given.rare}"
    for part, cell in dict.fromkeys((fit.part, fit.cell) for fit in found.fits):
        names = {name for fit in found.fits if (fit.part, fit.cell) == (part, cell) for name in fit.scores}
        names -= set(SPEED) if TASKS[cell.task].frozen else set()           # how fast is asked of what is trained whole
        names -= set() if cell.imbalance else {rare}
        yield from ((part, cell, name) for name in (*SHOWN, rare) if name in names)


def cell_words(cell):
    return {key: getattr(cell, key) for key in Cell._fields[1:]}


def lines_of(fits, metric):
    """(name, fits) of each line. Random weights are read out beside every row: where the network is the same, so are
    they, and stand in one line."""
    seen = {}
    for row in dict.fromkeys(fit.row for fit in fits):
        own = [fit for fit in fits if fit.row == row]
        for beside in dict.fromkeys(fit.beside for fit in own):
            those = [fit for fit in own if fit.beside == beside]
            values = tuple(value_of(fit, metric) for fit in those) if those[0].seed is None else beside
            seen.setdefault(row, {}).setdefault(str(values), those)
    for row, different in seen.items():
        for those in different.values():
            yield f"{row} (beside {those[0].beside})" if len(different) > 1 else row, those


def mean_text(values, sign=""):
    """Empty where there is nothing, as there is no second random row where all of the network is trained."""
    mean, half = metrics.mean_interval(values)
    if not math.isfinite(mean):
        return ""
    return number(mean, sign) + (f" ± {number(half)}" if math.isfinite(half) else "")


def verdict_text(told):
    """Markdown: the claims, and the effects that they rest on."""
    lines = ["| claim | verdict |", "|---|---|"]
    lines += [f"| {each['claim']}: {each['text']} | {each['verdict']} |" for each in told["claims"]]
    lines += ["", "| effect | claim | mean ± half of the 95 % interval | holds if | |", "|---|---|---|---|---|"]
    for each in told["effects"]:
        values = [math.nan if value is None else value for value in each["values"]]
        claimed = each["claim"] is not None
        lines.append(f"| {each['effect']} | {each['claim'] or ''} | {mean_text(values, '+')} | "
                     f"{each['holds if'] if claimed else ''} | {each['verdict'] if claimed else ''} |")
    return "\n".join(lines)


# ---- the charts

AXES = {"imbalance": "images of each other class for one of the rare class (log scale)",
        "augment": "strength of augmentation, S0 to S6", "labels": "share of the labels (log scale)"}


def draw(found, title):
    """chart.png: the series, or else the gains over random weights; curves.png where read-outs were trained. Returns
    their names."""
    lines = [(part, task, axis) for part, task in dict.fromkeys((fit.part, fit.cell.task) for fit in found.fits)
             for axis in AXES if len(places_of(found, part, task, axis)) > 1]
    if lines:
        charts = [series_of(found, title, *each) for each in lines]
        plots.panels(charts, found.folder / "chart.png", columns=2, size=(760, 460))
    else:
        draw_gains(found, title, found.folder / "chart.png")
    curves = [curves_of(found, *each) for each in trained(found)]
    if curves:
        plots.panels(curves, found.folder / "curves.png", columns=2)
    return ["chart.png"] + ["curves.png"] * bool(curves)


def draw_gains(found, title, path):
    """What each row gains over random weights, in each read-out."""
    rows, series, intervals = list(dict.fromkeys(fit.row for fit in found.fits if fit.row not in RANDOM)), {}, {}
    for part, cell in dict.fromkeys((fit.part, fit.cell) for fit in found.fits if TASKS[fit.cell.task].target):
        over = RANDOM[1] if TASKS[cell.task].frozen else RANDOM[0]
        ends = [metrics.mean_interval(found.gain(row, cell.task, part=part, over=over, **cell_words(cell)))
                for row in rows]
        mean, half = np.array(ends).T                                       # (rows,) each
        name = f"{TASKS[cell.task].title}{part and f', {part}'}: over {over}"
        series[name], intervals[name] = mean, (mean - half, mean + half)
    plots.bars(plots.Bars(rows, series, title, "gain; intervals: 95 % over pretraining seeds", intervals), path)


def places_of(found, part, task, axis):
    return list(dict.fromkeys(getattr(fit.cell, axis) for fit in found.fits
                              if (fit.part, fit.cell.task) == (part, task)))


def series_of(found, title, part, task, axis):
    """Score against one axis, a line for each row; bands are 95 % over pretraining seeds."""
    places, series, bands = places_of(found, part, task, axis), {}, {}
    xs = [float(str(place).strip("S")) for place in places]
    for row in dict.fromkeys(fit.row for fit in found.fits if (fit.part, fit.cell.task) == (part, task)):
        ends = [metrics.mean_interval(found.score(row, task, part=part, **{axis: place})) for place in places]
        mean, half = np.array(ends).T                                       # (places,) each
        series[row], bands[row] = (xs, mean), (mean - half, mean + half)
    return plots.Chart(series, f"{title}; {TASKS[task].title}{part and f', {part}'}", AXES[axis],
                       WORDS[TASKS[task].columns[0]], log_x=axis != "augment", bands=bands)


def trained(found):
    return dict.fromkeys((fit.part, fit.cell) for fit in found.fits if fit.curve)


def curves_of(found, part, cell):
    """Validation score against epochs, mean over all fits of a row."""
    series = {}
    for row in dict.fromkeys(fit.row for fit in found.fits if (fit.part, fit.cell) == (part, cell)):
        curves = [fit.curve for fit in found.fits if (fit.part, fit.cell, fit.row) == (part, cell, row) and fit.curve]
        points = np.mean(curves, 0)                                         # (looks, 2)
        series[row] = points[:, 0], points[:, 1]
    return plots.Chart(series, f"{TASKS[cell.task].title}{part and f', {part}'}: {describe(cell)}", "epochs",
                       "validation score")


def write(found, study, line, protocol):
    """table.md, verdicts.json and the charts, and the table on the terminal."""
    effects = list(protocol.effects(found))
    told = verdicts(protocol.claims, effects)
    text = f"{study}: {line}\n\n{table(found)}\n\n{verdict_text(told)}\n"
    with files.whole(found.folder / "table.md") as temporary:
        temporary.write_text(text)
    files.write_json(found.folder / "verdicts.json", {"study": study, "seeds": found.given.seeds, **told})
    print(f"\n{text}")
    return draw(found, f"{study}: {Path(found.given.data).name}")              # no path in a picture
