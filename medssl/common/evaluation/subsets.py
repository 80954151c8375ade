"""Which images a read-out may learn from, is chosen on, and is scored on.

Subsets of the training images are nested (7 images are among the 10 %), by patient (whole patients come one after the other) and stratified; they
are functions of the seed. Validation and test images are never touched by them.
"""

from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError


@dataclass
class Target:
    """What is to be told, and the rows that may be learned from, chosen on, and scored."""
    values: np.ndarray                                                      # labels (N,) or masks (N, H, W)
    classes: tuple
    strata: np.ndarray                                                      # (N,) what subsets keep the shares of
    rows: dict                                                              # train, val, test
    orders: dict = field(default_factory=dict)                              # of the training rows, by seed and ratio

    @property
    def rare(self):
        """The class with the fewest training images."""
        counts = np.bincount(self.strata[self.rows["train"]])
        return int(np.where(counts > 0, counts, counts.sum() + 1).argmin())

    def training(self, groups, amount, ratio, seed):
        """The images that may be learned from: the rare class thinned if there is a ratio, and of those a share or number."""
        if (seed, ratio) not in self.orders:
            rows = self.rows["train"]
            if ratio:
                rows = self.training(groups, "1.0", None, seed)
                rows = thinned(rows, self.strata[rows], self.rare, ratio)
            self.orders[seed, ratio] = in_order(rows, groups[rows], self.strata[rows], seed)
        order = self.orders[seed, ratio]
        return prefix(order, groups[order], amount)


def find_target(dataset, groups, kind, note):
    """Labels or masks, with the rows that have one. Sets without a validation split give 15 % of their training patients for it."""
    values = getattr(dataset, kind)
    if kind == "labels":
        usable, strata, classes = values >= 0, values, dataset.classes
    else:
        held = np.array([np.bincount(mask.ravel(), minlength=256)[:255] > 0 for mask in values])             # (N, 255)
        usable, often = held.any(1), held.sum(0)
        strata = np.where(held, often, len(held) + 1).argmin(1)             # the rarest class in the picture
        classes = dataset.classes if dataset.labels is None else tuple(map(str, range(np.flatnonzero(often)[-1] + 1 if usable.any() else 0)))
    rows = {name: dataset.rows(name)[usable[dataset.rows(name)]] for name in ("train", "val", "test")}
    for name in ("train", "test"):
        if not len(rows[name]):
            raise UserError(f"{dataset.name}: no image of the {name} split has a {kind[:-1]}")
    if not len(rows["val"]):
        order = in_order(rows["train"], groups[rows["train"]], strata[rows["train"]], 0)
        rows["val"] = prefix(order, groups[order], "0.15")
        rows["train"] = np.setdiff1d(rows["train"], rows["val"])
        note(f"{dataset.name} has no validation split with {kind}: {len(rows['val'])} training images are kept for it")
    seen = {name: set(np.flatnonzero(held[own].any(0)) if kind == "masks" else values[own]) for name, own in rows.items()}
    if len(seen["train"]) < 2:
        raise UserError(f"{dataset.name}: the training {kind} hold only one class ({classes[min(seen['train'])]}): there is nothing to tell apart")
    for name in ("train", "test"):
        absent = [c for i, c in enumerate(classes) if i not in seen[name]]
        if absent:
            effect = "never predicted, and scored 0 where it occurs" if name == "train" else "left out of the means"
            note(f"no image of the {name} split holds class {', '.join(absent)}: {effect}")
    if len(np.unique(groups[rows["test"]])) < 20:
        note(f"the test split has {len(np.unique(groups[rows['test']]))} patients with {kind}: fewer than 20 give too short intervals")
    return Target(values, classes, strata, rows)


def in_order(rows, groups, strata, seed, tries=16):
    """The rows patient by patient, in an order whose every prefix holds the strata (classes) in about their shares of the whole: of the next
    `tries` patients of a shuffled list, the one that brings the shares nearest comes first. So subsets are nested, by patient and stratified."""
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
    """The first rows of an order: "0.25" the whole patients that come nearest to this share of the images, "7n" seven images, and with them the
    patients begun. groups: the patient of each row in this order."""
    if amount.endswith("n"):
        if int(amount[:-1]) > len(order):
            raise UserError(f"--labels {amount}: there are {len(order)} labelled training images")
        return order[:int(amount[:-1])]
    ends = np.append(np.flatnonzero(groups[1:] != groups[:-1]) + 1, len(order))
    return order[:ends[np.abs(ends - float(amount) * len(order)).argmin()]]


def thinned(order, labels, rare, ratio):
    """The first rows of each class: as many of every class as there are of the rare one, and of that one 1 / ratio as many. labels: of these rows."""
    most = (labels == rare).sum()
    place = np.empty(len(order), int)                                       # how many of its class came before
    for c in np.unique(labels):
        place[labels == c] = np.arange((labels == c).sum())
    return order[place < np.where(labels == rare, max(1, round(most / ratio)), most)]
