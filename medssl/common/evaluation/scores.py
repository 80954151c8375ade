"""From answers to scores per image, slice and patient; what intervals are drawn from; what a difference is worth.

Answers are what a fit says of the test images. Two kinds are known here: class shares (N, K), and for masks the pixels
of each class in each slice, (N, 3, K): in both masks, in the predicted one, in the true one. To add a score: a function
in metrics.py and a line in one of the two tables below. Another kind of answer: an Answers of its own, beside its task.
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
SLICE = "_per_slice"
WORDS = {name: score.words for name, score in (CLASS_SCORES | MASK_SCORES).items()}
WORDS |= {name + SLICE: f"{score.words}/slice" for name, score in MASK_SCORES.items()}


@dataclass
class Scored:
    """The scores of one fit, and those among them that intervals are drawn for."""
    scores: dict                                # name: value
    heads: tuple = ()                           # names of the drawn ones
    again: Callable | None = None               # units drawn -> their values (heads,)
    units: np.ndarray | None = None             # the patient of each unit


@dataclass(frozen=True)
class Answers:
    """What a task answers about the test images, and how that is scored."""
    words: str                                  # what they are, and their shape
    blank: Callable                             # target -> answers of this shape that know nothing
    score: Callable                             # (answers, target) -> Scored


# ---- classes

def class_scores(labels, shares, classes, groups):
    """Of labels (N,) and class shares (N, K)."""
    scores = {name: score.value(labels, shares) for name, score in CLASS_SCORES.items()}
    recalls = metrics.recalls(labels, shares.argmax(1), len(classes))       # (K,)
    scores |= {f"recall {name}": float(value) for name, value in zip(classes, recalls)}
    heads = tuple(name for name, score in CLASS_SCORES.items() if shares.shape[1] <= score.most_classes)
    return Scored(scores, heads, lambda rows: np.array([CLASS_SCORES[name].value(labels[rows], shares[rows])
                                                        for name in heads]), groups)


def by_patient(labels, shares, classes, groups):
    """One label and the mean class shares for each patient: (patients,), (patients, K)."""
    patients, start, member, counts = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    own = labels[start]
    torn = np.flatnonzero(labels != own[member])
    if len(torn):
        patient = member[torn[0]]
        raise UserError(f"--per patient: patient {patients[patient]} has images of class {classes[own[patient]]} and "
                        f"of class {classes[labels[torn[0]]]}; patients with several classes, as "
                        f"{len(np.unique(member[torn]))} have here, can be scored by image only")
    sums = np.zeros((len(patients), shares.shape[1]))
    np.add.at(sums, member, shares)
    return own, sums / counts[:, None]


def score_shares(shares, target):
    labels, groups = target.test, target.test_groups
    if target.per_patient:
        labels, shares = by_patient(labels, shares, target.classes, groups)
        groups = np.arange(len(labels))
    return class_scores(labels, shares, target.classes, groups)


def even_chance(target):
    """Balanced accuracy of a guess."""
    return 1 / len(np.unique(target.test))


SHARES = Answers("class shares (images, classes)",
                 lambda target: np.full((len(target.test), len(target.classes)), 1 / len(target.classes)),
                 score_shares)


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


PIXELS = Answers("pixels of each class (images, 3, classes)",
                 lambda target: np.ones((len(target.test), 3, len(target.classes)), np.int64),
                 lambda counts, target: mask_scores(counts, target.classes, target.test_groups))


# ---- differences

@dataclass(frozen=True)
class Gain:
    """What a difference of two models is worth."""
    mean: float
    interval: list                              # 95 %, the test patients drawn anew
    half_width_over_seeds: float                # of the 95 % t interval
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
    if len(draws) < 2 or patients < 2:
        return Gain(mean, [math.nan] * 2, over_seeds, len(by_seed), settled=False)
    deviation = draws.std() * math.sqrt(patients / (patients - 1))          # draws vary by n - 1 in n too little
    over_patients = metrics.t_quantile(patients - 1) * deviation
    return Gain(mean, np.percentile(draws, [2.5, 97.5]).tolist(), over_seeds, len(by_seed),
                settled=bool(abs(mean) > math.hypot(over_patients, over_seeds)))


def steps_to(curve, level):
    """The first step at which a validation curve [(step, score)] reaches this level; nan if it never does."""
    return next((step for step, score in curve if score >= level), math.nan)
