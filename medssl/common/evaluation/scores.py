"""From answers to scores per image, slice and patient; what intervals are drawn from; what a difference is worth.

Answers are what a fit says of the test images: class shares (N, K), or for masks the pixels of each class in each
slice, (N, 3, K): in both masks, in the predicted one, in the true one. To add a score: a function in metrics.py and a
line in one of the two tables below.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import metrics
from ..errors import UserError


@dataclass(frozen=True)
class Score:
    words: str                                  # the head of its column
    value: Callable                             # (labels, shares) -> number, or (both, predicted, true) -> numbers
    most_classes: float = 0                     # intervals are drawn up to so many classes: a thousand draws take time


CLASS_SCORES = {
    "balanced_accuracy": Score("balanced accuracy", lambda y, s: metrics.balanced_accuracy(y, s.argmax(1)), math.inf),
    "auc": Score("AUC", metrics.auc, 2),
    "accuracy": Score("accuracy", lambda y, s: metrics.accuracy(y, s.argmax(1))),
    "macro_f1": Score("F1", lambda y, s: metrics.macro_f1(y, s.argmax(1))),
    "average_precision": Score("AP", metrics.average_precision),
    "quadratic_kappa": Score("kappa", lambda y, s: metrics.quadratic_kappa(y, s.argmax(1))),
}
MASK_SCORES = {
    "dice": Score("Dice", metrics.dice_of, math.inf),
    "iou": Score("IoU", metrics.iou_of, math.inf),
}
SLICE, PATIENT = "_per_slice", "_per_patient"
BY_PATIENT = ("balanced_accuracy", "auc")       # the class scores that --per patient adds
WORDS = {name: score.words for name, score in (CLASS_SCORES | MASK_SCORES).items()}
WORDS |= {name + SLICE: f"{score.words}/slice" for name, score in MASK_SCORES.items()}
WORDS |= {name + PATIENT: f"{CLASS_SCORES[name].words}/patient" for name in BY_PATIENT}


@dataclass
class Scored:
    """The scores of one fit, and those among them that intervals are drawn for."""
    scores: dict                                # name: value
    heads: tuple = ()                           # names of the drawn ones
    again: Callable | None = None               # units drawn -> their values (heads,)
    units: np.ndarray | None = None             # the patient of each unit


# ---- classes

def class_scores(labels, shares, classes, groups, per=None):
    """Of labels (N,) and class shares (N, K); per: what `by_patient` made of the labels, for scores by patient too."""
    scores = {name: score.value(labels, shares) for name, score in CLASS_SCORES.items()}
    found = metrics.recalls(labels, shares.argmax(1), len(classes))         # (K,)
    scores |= {f"recall {name}": float(value) for name, value in zip(classes, found)}
    drawn = [name for name, score in CLASS_SCORES.items() if shares.shape[1] <= score.most_classes]
    heads, parts = list(drawn), [(drawn, labels, shares, lambda rows: rows)]
    if per:
        pooled, chosen = per.pool(shares), [name for name in BY_PATIENT if name in drawn]
        scores |= {name + PATIENT: CLASS_SCORES[name].value(per.labels, pooled) for name in BY_PATIENT}
        heads += [name + PATIENT for name in chosen]
        parts.append((chosen, per.labels, pooled, per.patients_of))

    def again(rows):
        return np.array([CLASS_SCORES[name].value(y[own], s[own]) for names, y, s, of in parts for own in [of(rows)]
                         for name in names])
    return Scored(scores, tuple(heads), again, groups)


@dataclass
class Patients:
    """The test images patient by patient."""
    member: np.ndarray                          # (N,) which patient, from 0
    labels: np.ndarray                          # (patients,)

    def pool(self, shares):
        """Mean class shares of each patient's images, (patients, K)."""
        sums = np.zeros((len(self.labels), shares.shape[1]))
        np.add.at(sums, self.member, shares)
        return sums / np.bincount(self.member)[:, None]

    def patients_of(self, rows):
        """The patients behind drawn rows, each as often as it was drawn: whole patients are drawn, so that its first
        image counts the draws."""
        first = np.zeros(len(self.member), bool)
        first[np.unique(self.member, return_index=True)[1]] = True
        return self.member[rows[first[rows]]]


def by_patient(labels, groups, classes, rule=None):
    """One label for each patient. Several are an error; with the rule "max" the highest counts, as with grades."""
    numbers, member = np.unique(groups, return_inverse=True)
    highest, lowest = np.full(len(numbers), -1), np.full(len(numbers), len(classes))
    np.maximum.at(highest, member, labels)
    np.minimum.at(lowest, member, labels)
    torn = np.flatnonzero(highest != lowest)
    if len(torn) and rule != "max":
        number = torn[0]
        raise UserError(f"--per patient: patient {numbers[number]} has images of class {classes[lowest[number]]} and "
                        f"of class {classes[highest[number]]}, and {len(torn) - 1} more have several classes; "
                        "--patient-label max takes the last of a patient's classes")
    return Patients(member, highest)


# ---- masks

def pixel_counts(predictions, masks, classes):
    """Masks (N, H, W) -> (N, 3, K): pixels of each class in both, predicted, true."""
    return np.array([metrics.overlap(p, m, classes) for p, m in zip(predictions, masks)], np.int64)


def mask_scores(counts, classes, groups):
    """Of pixel counts (N, 3, K): per class over a patient's slices together, and per slice; and the mean over the
    classes but background. A class that is in neither mask has no value there and is left out of the mean; one that is
    in a single mask counts as 0."""
    patient = np.unique(groups, return_inverse=True)[1]
    sums = np.zeros((patient.max() + 1, *counts.shape[1:]))                 # (patients, 3, K)
    np.add.at(sums, patient, counts)
    scores, single = {}, {}
    for unit, parts in (("", sums), (SLICE, counts)):
        for name, score in MASK_SCORES.items():
            single[name + unit] = score.value(*parts.swapaxes(0, 1))        # (patients or N, K)
            each = mean_by_class(single[name + unit])                       # (K,)
            scores[name + unit] = metrics.mean_defined(each[1:])
            scores |= {f"{name}{unit} {c}": float(value) for c, value in list(zip(classes, each))[1:]}
    heads = tuple(MASK_SCORES)

    def again(rows):
        return np.array([metrics.mean_defined(mean_by_class(single[name][rows, 1:])) for name in heads])
    return Scored(scores, heads, again, np.arange(len(sums)))


def mean_by_class(values):
    return metrics.ratio(np.nansum(values, 0), (~np.isnan(values)).sum(0))


def slice_dice(counts):
    """Mean Dice of each slice over its classes but background: (N,); nan where only background is."""
    return np.array([metrics.mean_defined(values) for values in metrics.dice_of(*counts.swapaxes(0, 1))[:, 1:]])


def never_predicted(answers, classes):
    """Names of the classes that are there and that no answer names. answers: shares (N, K), or counts (N, 3, K)."""
    if answers.ndim == 3:
        predicted, true = answers[:, 1].sum(0) > 0, answers[:, 2].sum(0) > 0
    else:
        predicted, true = np.bincount(answers.argmax(1), minlength=len(classes)) > 0, np.ones(len(classes), bool)
    return [name for name, dead in zip(classes, true & ~predicted) if dead]


# ---- differences

@dataclass(frozen=True)
class Gain:
    """What a difference of two models is worth."""
    mean: float
    interval: list                              # 95 %, the test patients drawn anew
    half_width_over_seeds: float                # of the 95 % t interval
    not_positive: float                         # share of the draws in which the difference is not above 0
    seeds_above: int                            # in so many seeds it is above 0
    seeds: int
    settled: bool                               # larger than what the draws of patients and seeds make of nothing


def gain(by_seed, draws, patients):
    """by_seed (S,): the difference in each seed, on the same patients; draws (R,): its mean over the seeds for patients
    drawn anew.

    Settled: the mean lies further from 0 than the two 95 % half widths, that of the draw of patients and that of the
    draw of seeds, added in squares. Either alone is too bold: few patients make all seeds agree, and many patients say
    nothing of a lucky seed; so one seed settles nothing."""
    by_seed, draws = np.asarray(by_seed, float), draws[~np.isnan(draws)]
    mean, over_seeds = metrics.mean_interval(by_seed)
    counts = {"seeds_above": int((by_seed > 0).sum()), "seeds": len(by_seed)}
    if len(draws) < 2 or patients < 2:
        return Gain(mean, [math.nan] * 2, over_seeds, math.nan, **counts, settled=False)
    deviation = draws.std() * math.sqrt(patients / (patients - 1))          # draws vary by n - 1 in n too little
    over_patients = metrics.t_quantile(patients - 1) * deviation
    return Gain(mean, np.percentile(draws, [2.5, 97.5]).tolist(), over_seeds, float((draws <= 0).mean()), **counts,
                settled=bool(abs(mean) > math.hypot(over_patients, over_seeds)))


def steps_to(curve, level):
    """The first step at which a validation curve [(step, score)] reaches this level; nan if it never does."""
    return next((step for step, score in curve if score >= level), math.nan)
