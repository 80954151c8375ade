"""Scores of predictions, of masks and of features, with intervals. numpy only; tensors from any device are accepted.

Order of arguments: labels first, then scores or predictions (masks: prediction, then target). Labels are class numbers
from 0. A value that the data do not define is nan, never a made-up 0 or 1, and means over classes leave nan out: the
recall of a class that has no sample, the AUC of a class that is absent or alone, the Dice of a class that is in neither
mask. A mean over nothing is nan.

Features are (N, D), one row per image. Three spectra are in use and they are not the same numbers:
    spectrum      singular values of the covariance of the L2-normalised rows (Jing et al. 2022); as in `spectrum.png`
    eigenvalues   of the covariance of the rows as they are; behind `alpha_req`
    rank_me       singular values of the rows themselves, neither centred nor normalised (Garrido et al. 2023)
Compare them between runs of one method on the same images only: they depend on N, on D and on the layer.
"""
import numpy as np

T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)      # 97.5 %, freedom 1 to 10


def array(values):
    """A numpy array on the CPU; half-precision and bfloat16 tensors are raised to float32, which numpy knows."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() and values.element_size() < 4 else values
    return np.asarray(values)


def mean_defined(values):
    """Mean of the values that are not nan; nan where there is none."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def ratio(above, below):
    """above / below, nan where below is 0."""
    above, below = np.asarray(above, float), np.asarray(below, float)
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below != 0)


# ---- classes

def confusion(labels, predictions, classes=None):
    """(classes, classes) counts: rows are the truth, columns the predictions."""
    labels, predictions = array(labels).astype(int).ravel(), array(predictions).astype(int).ravel()
    both = np.concatenate([labels, predictions])
    classes = classes or int(both.max(initial=0)) + 1
    if len(labels) != len(predictions) or np.any((both < 0) | (both >= classes)):
        raise ValueError(f"{len(labels)} labels and {len(predictions)} predictions: "
                         f"need as many of both, all from 0 to {classes - 1}")
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def accuracy(labels, predictions):
    return mean_defined(array(labels) == array(predictions))


def recalls(labels, predictions, classes=None):
    """(classes,) share of each class that is found; nan for a class without samples."""
    counts = confusion(labels, predictions, classes)
    return ratio(np.diag(counts), counts.sum(1))


def balanced_accuracy(labels, predictions):
    """Mean recall over the classes that occur among the labels."""
    return mean_defined(recalls(labels, predictions))


def macro_f1(labels, predictions):
    """Mean F1 over the classes that occur among labels or predictions; 0 for one that is never, or never rightly,
    predicted."""
    counts = confusion(labels, predictions)
    return mean_defined(ratio(2 * np.diag(counts), counts.sum(0) + counts.sum(1)))


def quadratic_kappa(labels, predictions):
    """Cohen's kappa with squared distances between grades. A grade that nobody used still keeps its place on the
    scale."""
    counts = confusion(labels, predictions)
    grade = np.arange(len(counts))
    distance = (grade[:, None] - grade) ** 2
    expected = np.outer(counts.sum(1), counts.sum(0))
    return float(1 - ratio((distance * counts).sum() * counts.sum(), (distance * expected).sum()))


def one_vs_rest(score, labels, scores):
    """score(is_class, scores) for each column of scores (N, K) -> (K,). One column, or two, is one binary question: is
    it class 1?"""
    labels, scores = array(labels).ravel(), array(scores).astype(float)
    if scores.ndim == 2 and scores.shape[1] > 2:
        return np.array([score(labels == c, scores[:, c]) for c in range(scores.shape[1])])
    return np.array([score(labels == 1, scores[:, -1] if scores.ndim == 2 else scores)])


def pair_order(positive, scores):
    """Share of (positive, negative) pairs in which the positive scores higher; a tie counts half. By ranks: no pair is
    counted."""
    ones, zeros = positive.sum(), (~positive).sum()
    if not ones or not zeros or np.isnan(scores).any():
        return np.nan
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]                      # tied scores share their mean rank
    return (rank[positive].sum() - ones * (ones + 1) / 2) / (ones * zeros)


def precision_area(positive, scores):
    """Sum over thresholds of (gain in recall) * precision; tied scores are one threshold."""
    if positive.all() or not positive.any() or np.isnan(scores).any():
        return np.nan
    order = np.argsort(-scores)
    last = np.append(np.diff(scores[order]) != 0, True)                     # the last of each run of ties
    found, taken = np.cumsum(positive[order])[last], np.flatnonzero(last) + 1
    return (np.diff(found, prepend=0) * found / taken).sum() / positive.sum()


def auc(labels, scores):
    """Area under the ROC curve. Two classes: scores (N,) or (N, 2), the higher the more class 1. More: scores (N, K),
    one class against the rest, mean over the classes for which it is defined: nan for one that is absent or alone, and
    where a score is nan."""
    return mean_defined(one_vs_rest(pair_order, labels, scores))


def average_precision(labels, scores):
    """Area under the precision-recall curve as a sum of steps, not trapezoids; shapes, mean and nan as in `auc`.
    Chance: the class's share."""
    return mean_defined(one_vs_rest(precision_area, labels, scores))


# ---- masks

def overlap(prediction, target, classes):
    """Pixels of each class (classes,): in both masks, in the prediction, in the target. Other values (255: unknown)
    belong to no class."""
    prediction, target = array(prediction).ravel(), array(target).ravel()
    return [np.array([np.count_nonzero(mask == c) for c in range(classes)])
            for mask in (target[prediction == target], prediction, target)]


def dice_of(both, predicted, true):
    """2 |both| / (|predicted| + |true|) of counts of any shape, as `overlap` gives them or summed over a patient's
    slices. nan where the class is in neither mask; 0 where it is in one only."""
    return ratio(2 * np.asarray(both), np.add(predicted, true))


def iou_of(both, predicted, true):
    """|both| / |either|; nan and 0 as in `dice_of`."""
    return ratio(both, np.add(predicted, true) - both)


def dice(prediction, target, classes):
    """(classes,) Dice over all pixels handed in: one slice, or a patient's slices stacked."""
    return dice_of(*overlap(prediction, target, classes))


def iou(prediction, target, classes):
    """(classes,) as `dice`."""
    return iou_of(*overlap(prediction, target, classes))


# ---- features

def unit_rows(features):
    features = array(features).astype(np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def singular_values(features):
    """Descending; all nan for features that are not finite (a run that diverged), where numpy would raise."""
    features = array(features).astype(np.float64)
    if not np.isfinite(features).all():
        return np.full(min(features.shape), np.nan)
    return np.linalg.svd(features, compute_uv=False)


def eigenvalues(features):
    """Eigenvalues of the covariance (n - 1) of the rows, descending: min(N, D) of them, the others are 0."""
    features = array(features).astype(np.float64)
    return singular_values(features - features.mean(0)) ** 2 / max(len(features) - 1, 1)


def spectrum(features):
    """Singular values of the covariance of the L2-normalised rows, descending. A covariance is symmetric and positive:
    they are its eigenvalues. Collapsed directions are those at about 0."""
    return eigenvalues(unit_rows(features))


def rank_me(features):
    """exp of the entropy of the singular values' shares: 1 where only one direction is used, min(N, D) where all are
    used alike. It is never more: of 256 images RankMe is at most 256, however wide the features."""
    values = singular_values(features)
    if not values.sum() > 0:
        return float("nan")
    share = values / values.sum() + 1e-7
    return float(np.exp(-(share * np.log(share)).sum()))


def alpha_req(features, first=11, last=100):
    """Exponent of the decay of the eigenvalues, value ~ rank^-alpha, by least squares of the logarithms over ranks
    first..last with weights 1/rank. Near 1 is said to be healthy, larger collapse-prone. nan with fewer than two
    eigenvalues above round-off in that range."""
    values = eigenvalues(features)
    rank = np.arange(1, len(values) + 1)
    used = (rank >= first) & (rank <= last) & (values > values[:1] * 1e-14)
    if used.sum() < 2:
        return float("nan")
    x, y, weight = -np.log(rank[used]), np.log(values[used]), 1 / rank[used]
    x_mean, y_mean = np.average(x, weights=weight), np.average(y, weights=weight)
    return float((weight * (x - x_mean) * (y - y_mean)).sum() / (weight * (x - x_mean) ** 2).sum())


def spread(embedding):
    """Standard deviation of the L2-normalised embedding, mean over dimensions, times sqrt(D): about 1 is healthy,
    about 0 is collapse."""
    return float(unit_rows(embedding).std(0).mean() * np.sqrt(array(embedding).shape[1]))


# ---- intervals

def draws(function, groups, repeats=1000, seed=0):
    """(repeats, ...) values of function(rows), a number or an array of numbers, when whole groups (patients) are drawn
    with replacement: images of one patient are not independent. groups (N,): patient of each row; np.arange(N) if every
    row is its own. For a difference of two models let the function return the difference: both then see the same
    patients. One group says nothing about others: all values are nan."""
    groups = np.unique(array(groups), return_inverse=True)[1].ravel()
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    random = np.random.default_rng(seed)
    values = np.array([function(np.concatenate([members[g] for g in random.integers(len(members), size=len(members))]))
                       for _ in range(repeats)], float)                     # (repeats, ...)
    return values if len(members) > 1 else np.full_like(values, np.nan)


def ends(values):
    """95 % percentile interval (low, high) of draws (repeats, ...), each of the draws' own shape. Draws that are nan do
    not count."""
    columns = [column[~np.isnan(column)] for column in values.reshape(len(values), -1).T]
    pairs = np.array([np.percentile(column, [2.5, 97.5]) if len(column) else [np.nan, np.nan] for column in columns])
    return tuple(pairs[:, end].reshape(values.shape[1:])[()] for end in (0, 1))


def t_quantile(freedom):
    """97.5 % quantile of Student's t: a table, then the series in 1/freedom (Abramowitz and Stegun 26.7.5)."""
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    z = 1.959964
    return (z + (z ** 3 + z) / (4 * freedom) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * freedom ** 2)
            + (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / (384 * freedom ** 3))


def mean_interval(values):
    """(mean, half width of its 95 % t interval) over seeds; nan values are left out, and the half width is nan for
    fewer than two."""
    values = np.asarray(values, float)
    values = values[~np.isnan(values)]
    half = t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return mean_defined(values), float(half)
