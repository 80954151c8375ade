"""A set of images in memory, or memory-mapped, with labels, masks, patients and splits."""

from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError

BLOCK = 2 ** 20                                                             # pixels that become floats in one go
FAR = 0.1                                                                   # between shares asked for and dealt
LEARNT_FROM = ("train", "unlabeled")


@dataclass
class Dataset:
    name: str
    images: np.ndarray                                                     # (N, C, H, W) uint8, uint16; maybe np.memmap
    labels: np.ndarray | None = None                                        # (N,) int64 class index, -1 = no label
    classes: tuple[str, ...] = ()                                          # by index; without labels those of the masks
    masks: np.ndarray | None = None                                       # (N, H, W) uint8 class; all 255 = has no mask
    groups: np.ndarray | None = None                                        # (N,) int64 patient number
    splits: np.ndarray | None = None                                        # (N,) str: train, val, test, unlabeled
    mean: tuple = (0.0,)                                            # per channel, scaled to [0, 1], of rows learnt from
    std: tuple = (1.0,)
    names: list | None = None                  # of the files below the set's folder, where images are files

    def __len__(self):
        return len(self.images)

    def rows(self, *names):
        """Row numbers of these splits; every row where the set has no splits."""
        return np.arange(len(self)) if self.splits is None else np.flatnonzero(np.isin(self.splits, names))


def numbered(values):
    """Index of each value among the sorted distinct ones (numbers by size, -1 for the empty string), and those."""
    distinct = sorted(set(values) - {""})
    if all(value.isdecimal() for value in distinct):
        distinct.sort(key=int)
    index = {value: number for number, value in enumerate(distinct)} | {"": -1}
    return np.array([index[value] for value in values], dtype=np.int64), tuple(distinct)


def refuse_leaks(source, keys, what, hint=""):
    """Error when rows of two splits share a key ("" or 0 = no key). Train and unlabeled count as one: both are learnt
    from. An .npz is a published set that can only be taken as it is: there it is a warning."""
    if not keys or not source.splits:
        return
    first, leaks = {}, []
    for row, (key, split) in enumerate(zip(keys, source.splits)):
        other = source.splits[first.setdefault(key, row)]
        if key and other != split and not {other, split} <= set(LEARNT_FROM):
            leaks.append((first[key], row))
    if leaks:
        (a, b), more = leaks[0], f", and {len(leaks) - 1} more" if len(leaks) > 1 else ""
        line = (f"{source.path}: {what.format(keys[a])} stands in two splits: {source.names[a]} ({source.splits[a]}) "
                f"and {source.names[b]} ({source.splits[b]}){more}{hint}")
        if source.kind != "npz":
            raise UserError(line)
        print(f"warning: {line}")


def split(dataset, fractions=(0.7, 0.1, 0.2), seed=0):
    """The data set with new splits train, val, test. Groups stay whole; they are dealt in random order, large ones
    first, each to the split that is emptiest of the group's classes."""
    fractions = check_fractions(fractions)                                  # (3,)
    splits = new_splits(dataset, np.arange(len(dataset)), fractions, seed)
    return replace(dataset, splits=splits, **mean_and_std(dataset, splits, fractions))


def new_splits(dataset, rows, fractions, seed, large_first=True):
    """The new split of each of these rows."""
    labels = np.zeros(len(rows), int) if dataset.labels is None else dataset.labels[rows] + 1   # no label: a class, too
    groups = rows if dataset.groups is None else dataset.groups[rows]
    group = np.unique(groups, return_inverse=True)[1]
    counts = np.zeros((group.max() + 1, labels.max() + 1))                  # (groups, classes)
    np.add.at(counts, (group, labels), 1)
    side = dealt(counts, fractions, seed, large_first)                      # (groups,)
    if large_first and missed(side, counts, fractions) > FAR:               # as with classes of one group each
        plain = dealt(counts.sum(1, keepdims=True), fractions, seed)
        side = min(side, plain, key=lambda each: missed(each, counts, fractions))
    if missed(side, counts, fractions) > FAR:
        got = " ".join(f"{share:.2f}" for share in shares(side, counts))
        what = "images" if dataset.groups is None else "groups (patients)"
        asked = " ".join(f"{share:g}" for share in fractions)
        print(f"{dataset.name}: split {asked} was asked for, {got} is as near as {len(counts)} {what} come")
    return np.array(["train", "val", "test"])[side][group]


def mean_and_std(dataset, splits, fractions):
    """Mean and deviation of the images that are learnt from."""
    learnt = np.flatnonzero(np.isin(splits, LEARNT_FROM)) if fractions[0] else np.arange(len(dataset))
    parts = np.array_split(learnt, len(learnt) // 32 + 1)
    mean, std = pooled(np.concatenate([moments(dataset.images[part]) for part in parts]))
    return {"mean": mean, "std": std}


def deal(dataset, seed):
    """The data set with its patients dealt anew, 0.7 0.1 0.2, from a seed: for cross-validation. They are taken in
    random order, as otherwise the large ones would lie in the same split each time. Groups without any row outside
    "unlabeled" stay there."""
    fractions = check_fractions((0.7, 0.1, 0.2))
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    rows = np.flatnonzero(np.isin(groups, groups[dataset.rows("train", "val", "test")]))
    splits = np.full(len(dataset), "unlabeled")
    if len(rows):
        splits[rows] = new_splits(dataset, rows, fractions, seed, large_first=False)
    return replace(dataset, splits=splits, **mean_and_std(dataset, splits, fractions))


def shares(side, counts):
    """How much of all images train, val and test got: (3,)."""
    return np.bincount(side, counts.sum(1), minlength=3) / counts.sum()


def missed(side, counts, fractions):
    return abs(shares(side, counts) - fractions).max()


def dealt(counts, fractions, seed, large_first=True):
    """Number of the split of each group, from its number of images in each class (groups, classes)."""
    share = counts / counts.sum(0).clip(1)                                  # so that rare classes weigh as much
    order = np.random.default_rng(seed).permutation(len(counts))
    if large_first:
        order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    allowed = np.flatnonzero(fractions)
    full = np.zeros((len(allowed), counts.shape[1]))                        # how full each split is of each class
    side = np.empty(len(counts), int)
    for g in order:
        step = share[g] / fractions[allowed, None]                          # (splits, classes)
        best = ((full + step / 2) @ share[g]).argmin()
        full[best] += step[best]
        side[g] = allowed[best]
    for empty in set(allowed) - set(side):                                  # few groups: the fullest gives its smallest
        giver = np.bincount(side).argmax()
        if (side == giver).sum() > 1:
            side[min(np.flatnonzero(side == giver), key=lambda g: counts[g].sum())] = empty
    return side


def check_fractions(fractions):
    fractions = np.array(fractions, dtype=float)
    if fractions.shape != (3,) or (fractions < 0).any() or not abs(fractions.sum() - 1) <= 1e-6:     # a nan, too
        raise UserError(f"split {' '.join(map(str, fractions))}: give shares of train, val and test that add up to 1")
    return fractions


def by(shape):
    """A shape in words."""
    return " x ".join(map(str, shape))


def unit(images):
    """Whole numbers as float32 in [0, 1]: the largest that the type can hold becomes 1."""
    return images / np.float32(np.iinfo(images.dtype).max)


def moments(images):
    """Mean and mean square of each channel of images (N, C, H, W) scaled to [0, 1]: (N, 2, C)."""
    flat, top = images.reshape(*images.shape[:2], -1), float(np.iinfo(images.dtype).max)        # (N, C, H W)
    sums = np.zeros((2, *images.shape[:2]), np.float32)
    for start in range(0, flat.shape[2], BLOCK):                            # as floats, a large image takes four times
        x = flat[..., start:start + BLOCK].astype(np.float32)
        share = x.shape[2] / flat.shape[2]
        sums += share * x.mean(2), share * np.square(x, out=x).mean(2)
    return np.stack([sums[0] / top, sums[1] / top ** 2], axis=1)


def pooled(moments):
    """Mean and standard deviation per channel from the moments of images (N, 2, C). A constant channel gets std 1."""
    mean, square = moments.mean(0)
    std = np.sqrt((square - mean ** 2).clip(0))
    return tuple(map(float, mean)), tuple(float(s) if s > 1e-4 else 1.0 for s in std)
