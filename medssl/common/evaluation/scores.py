"""From answers to scores: per image, per slice and per patient, and what an interval is drawn from.

Answers are what a fit says of the test images: class shares (N, K), or for masks the pixels of each class in each slice,
(N, 3, K): in both masks, in the predicted one, in the true one. To add a score: a function in metrics.py and a line in
one of the two tables below.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import metrics


@dataclass(frozen=True)
class Score:
    words: str                              # the head of its column
    value: Callable                         # (labels, shares) -> number, or (both, predicted, true) -> numbers
    most_classes: float = 0                 # intervals are drawn up to so many classes: a thousand draws take time


CLASS_SCORES = {
    "balanced_accuracy": Score("balanced accuracy", lambda y, s: metrics.balanced_accuracy(y, s.argmax(1)), np.inf),
    "auc": Score("AUC", metrics.auc, 2),
    "accuracy": Score("accuracy", lambda y, s: metrics.accuracy(y, s.argmax(1))),
    "macro_f1": Score("F1", lambda y, s: metrics.macro_f1(y, s.argmax(1))),
    "average_precision": Score("AP", metrics.average_precision),
    "quadratic_kappa": Score("kappa", lambda y, s: metrics.quadratic_kappa(y, s.argmax(1))),
}
MASK_SCORES = {
    "dice": Score("Dice", metrics.dice_of, np.inf),
    "iou": Score("IoU", metrics.iou_of, np.inf),
}
SLICE = "_per_slice"
WORDS = {name: score.words for name, score in (CLASS_SCORES | MASK_SCORES).items()}
WORDS |= {name + SLICE: f"{score.words}/slice" for name, score in MASK_SCORES.items()}


@dataclass
class Scored:
    """The scores of one fit, and those among them that intervals are drawn for."""
    scores: dict                            # name: value
    heads: tuple = ()                       # names of the drawn ones
    again: Callable | None = None           # units drawn -> their values (heads,)
    units: np.ndarray | None = None         # the patient of each unit


def class_scores(labels, shares, classes, groups):
    """Of labels (N,) and class shares (N, K)."""
    scores = {name: score.value(labels, shares) for name, score in CLASS_SCORES.items()}
    found = metrics.recalls(labels, shares.argmax(1), len(classes))         # (K,)
    scores |= {f"recall {name}": float(value) for name, value in zip(classes, found)}
    heads = tuple(name for name, score in CLASS_SCORES.items() if shares.shape[1] <= score.most_classes)

    def again(rows):
        return np.array([CLASS_SCORES[name].value(labels[rows], shares[rows]) for name in heads])
    return Scored(scores, heads, again, groups)


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


def steps_to(curve, level):
    """The first step at which a validation curve [(step, score)] reaches this level; nan if it never does."""
    return next((step for step, score in curve if score >= level), np.nan)
