"""Which images a read-out may learn from, is chosen on, and is scored on.

Subsets of the training images are nested (7 images are among the 10 %), by patient (whole patients come one after the
other) and stratified; they are functions of the seed. Validation and test images are never touched by them.
"""

from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError

# ratio: images of each other class for one of the rare class. The rare class has the same number of images along the
# whole series, so that what a ratio does is not mixed with what few rare images do: as many as `most`, the largest
# ratio of the series, allows.
Imbalance = namedtuple("Imbalance", "ratio most")


@dataclass
class Target:
    """What is asked about the images, and the rows that may be learned from, chosen on, and scored."""
    values: np.ndarray                          # labels (N,) or masks (N, H, W)
    classes: tuple
    strata: np.ndarray                          # (N,) what subsets keep the shares of
    groups: np.ndarray                          # (N,) patient of each image
    rows: dict                                  # train, val, test
    per_patient: bool = False                   # whether class shares are averaged over a patient's test images
    orders: dict = field(default_factory=dict)  # of the training rows, by seed and imbalance

    @property
    def test(self):
        """What is right for each test image."""
        return self.values[self.rows["test"]]

    @property
    def test_groups(self):
        return self.groups[self.rows["test"]]

    @property
    def rare(self):
        """The class with the fewest training images."""
        counts = np.bincount(self.strata[self.rows["train"]])
        return int(np.where(counts > 0, counts, counts.sum() + 1).argmin())

    def training(self, amount, imbalance, seed):
        """The images that may be learned from: thinned if there is an imbalance, and of those a share or number."""
        if (seed, imbalance) not in self.orders:
            rows = self.rows["train"]
            if imbalance:
                rows = self.training("1.0", None, seed)
                rows = thinned(rows, self.strata[rows], self.rare, imbalance)
            self.orders[seed, imbalance] = in_order(rows, self.groups[rows], self.strata[rows], seed)
        order = self.orders[seed, imbalance]
        return prefix(order, self.groups[order], amount)


def find_target(dataset, groups, kind, note):
    """Labels or masks, with the rows that have one. Of a set without a validation split 15 % of the training patients
    are taken for it."""
    values, name = getattr(dataset, kind), dataset.name
    usable, strata, classes, held = about_labels(dataset) if kind == "labels" else about_masks(dataset)
    rows = {split: dataset.rows(split)[usable[dataset.rows(split)]] for split in ("train", "val", "test")}
    patients = {split: len(np.unique(groups[own])) for split, own in rows.items()}
    if not patients["test"] or patients["train"] < (1 if patients["val"] else 2):
        there = ", ".join(f"{number} in {split}" for split, number in patients.items())
        raise UserError(f"{name}: patients with {kind}: {there}; needed is one in each split at least, or two in train "
                        "and one in test")
    if not len(rows["val"]):
        order = in_order(rows["train"], groups[rows["train"]], strata[rows["train"]], 0)
        rows["val"] = prefix(order, groups[order], "0.15")
        rows["train"] = np.setdiff1d(rows["train"], rows["val"])
        note(f"{name} has no validation split with {kind}: {len(rows['val'])} training images are kept for it")
    seen = {split: held(own) for split, own in rows.items()}                # the classes in each split
    if len(seen["train"]) < 2:
        raise UserError(f"{name}: the training {kind} hold only one class ({classes[min(seen['train'])]}): "
                        "there is nothing to tell apart")
    for split in ("train", "test"):
        absent = [c for i, c in enumerate(classes) if i not in seen[split]]
        if absent:
            effect = "never predicted, and scored 0 where it occurs" if split == "train" else "left out of the means"
            note(f"no image of the {split} split holds class {', '.join(absent)}: {effect}")
    if patients["test"] < 20:
        note(f"the test split has {patients['test']} patients with {kind}: fewer than 20 give too short intervals")
    return Target(values, classes, strata, groups, rows)


def about_labels(dataset):
    """Which images have one, their strata, the classes, and which classes some rows hold."""
    labels = dataset.labels
    return labels >= 0, labels, dataset.classes, lambda rows: set(labels[rows])


def about_masks(dataset):
    """The same; the stratum of an image is the rarest class in its mask."""
    held = np.array([np.bincount(mask.ravel(), minlength=256)[:255] > 0 for mask in dataset.masks])         # (N, 255)
    usable, often = held.any(1), held.sum(0)
    strata = np.where(held, often, len(held) + 1).argmin(1)
    last = np.flatnonzero(often)[-1] + 1 if usable.any() else 0
    classes = dataset.classes if dataset.labels is None else tuple(map(str, range(last)))
    return usable, strata, classes, lambda rows: set(np.flatnonzero(held[rows].any(0)))


def in_order(rows, groups, strata, seed, tries=16):
    """The rows patient by patient, in an order whose every prefix holds the strata (classes) in about their shares of
    the whole: of the next `tries` patients of a shuffled list, the one that brings the shares nearest comes first. So
    subsets are nested, by patient and stratified."""
    _, member = np.unique(groups, return_inverse=True)
    strata = np.unique(strata, return_inverse=True)[1]
    counts = np.zeros((member.max() + 1, strata.max() + 1))                 # (patients, strata)
    np.add.at(counts, (member, strata), 1)
    whole, total = counts.sum(0) / counts.sum(), np.zeros(counts.shape[1])
    left, chosen = list(np.random.default_rng(seed).permutation(len(counts))), []
    while left:
        after = total + counts[left[-tries:]]                               # (tries, strata)
        away = ((after / after.sum(1, keepdims=True) - whole) ** 2 / whole).sum(1)
        chosen.append(left.pop(len(left) - len(away) + int(away.argmin())))
        total += counts[chosen[-1]]
    if len(chosen) == len(rows):
        place = np.empty(len(chosen), int)
        place[member] = np.arange(len(rows))
        return rows[place[chosen]]
    members = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    return np.concatenate([in_order(rows[own], own, strata[own], seed, tries) for own in (members[g] for g in chosen)])


def prefix(order, groups, amount):
    """The first rows of an order: "0.25" the whole patients that come nearest to this share of the images, "7n" seven
    images, the last of them perhaps a part of a patient. groups: the patient of each row in this order."""
    if amount.endswith("n"):
        if int(amount[:-1]) > len(order):
            raise UserError(f"--labels {amount}: there are {len(order)} labelled training images")
        return order[:int(amount[:-1])]
    ends = np.append(np.flatnonzero(groups[1:] != groups[:-1]) + 1, len(order))
    return order[:ends[np.abs(ends - float(amount) * len(order)).argmin()]]


def thinned(order, labels, rare, imbalance):
    """The first rows of each class of an order. labels: of these rows."""
    counts = np.bincount(labels)
    others = min(count for c, count in enumerate(counts) if count and c != rare)
    few = min(counts[rare], int(others / imbalance.most))
    if not few:
        raise UserError(f"--imbalance {imbalance.most:g}: the smallest of the other classes has {others} training "
                        "images, too few for this ratio; take a smaller one")
    keep = np.full(len(counts), round(few * imbalance.ratio))
    keep[rare] = few
    place = np.empty(len(order), int)                                       # how many of its class came before
    for c in np.unique(labels):
        place[labels == c] = np.arange((labels == c).sum())
    return order[place < keep[labels]]
