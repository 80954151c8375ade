"""What a study is made of: the claims of the works, runs of train.py, evaluations of evaluate.py, and effects."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

CLAIMS = {
    1: "the rare class gains most, with little at both ends of the imbalance range",
    2: "pretrained starts lead early, the end differs little",
    3: "contrastive and predictive pretraining beat restoration for classification",
    4: "Rubik's rotation heads as deep as the order head fail",
    5: "gains shrink under resampling",
    6: "gains shrink under stronger augmentation",
    7: "BYOL's online and target encoder are alike",
    8: "no pretext wins everywhere",
    9: "in-domain pretraining beats random weights and comes near ImageNet",
    10: "kNN <= linear <= fine-tuned",
    11: "DCL suffers less from small batches than SimCLR",
    12: "generic, then domain pretraining converges several times faster",
    13: "under five domain epochs suffice",
    14: "gains lie in few labels, not at full labels",
    15: "SparK loses least when labels shrink",
    16: "removing near-duplicate slices helps contrastive methods",
    17: "MoCo v2 collapses on look-alike images",
    18: "decorrelation widens the spectrum",
    19: "local features help segmentation",
    20: "linear segmentation gains more than fine-tuning",
}


@dataclass(frozen=True)
class Run:
    """One pretraining: a row of the tables, from one seed."""
    row: str
    seed: int
    method: str
    words: str = ""                 # further flags of train.py
    data: str | None = None         # None: the study's
    init: str | None = None         # a run of this study, or a file
    share: float = 1.0              # of the time, or of the images, that other runs get
    kept: bool = False              # whether the encoder is kept after each epoch

    @property
    def name(self):
        return f"{self.row}-{self.seed}"


@dataclass(frozen=True)
class Evaluation:
    """One row's runs read out, beside random weights. part: tells apart several read-outs of the same runs."""
    runs: tuple
    tasks: tuple
    part: str = ""
    series: dict = field(default_factory=dict)                              # labels, imbalance, augment: their entries
    words: str = ""                                                         # further flags of evaluate.py
    data: str | None = None                                                 # None: the first run's
    files: tuple = ()                                                       # weights that are read out beside the runs

    @property
    def row(self):
        return self.runs[0].row

    @property
    def name(self):
        return f"{self.row}-{self.part}" if self.part else self.row


@dataclass
class Given:
    """What a study is asked to look at. labels, masks: whether the set has them."""
    data: str
    seeds: int
    labels: bool
    masks: bool
    size: int                       # pixels
    channels: int
    label: str = "label"            # column of the set's table
    ratios: tuple = ()              # of the imbalance series that the set's classes allow
    rare: str | None = None         # the class with the fewest training images
    images: dict = field(default_factory=dict)                              # their number by split
    per_epoch: int = 1              # steps of pretraining
    weights: str | None = None      # file of a network that was trained on other images
    known_as: str | None = None     # its row
    network: str = ""               # flags of train.py that build that file's network
    removed: str | None = None      # the set without near-duplicates

    @property
    def frozen(self):
        """Read-outs of frozen features, the first of which speaks for them in a verdict."""
        return ("linear", "knn") * self.labels + ("segment",) * self.masks

    @property
    def trained(self):
        return "finetune" if self.labels else "unet"

    @property
    def main(self):
        return self.frozen[0]

    def runs(self, row, method, words="", **more):
        """The pretrainings of a row, one for each seed."""
        return [Run(row, seed, method, words, **more) for seed in range(self.seeds)]

    def read(self, runs, tasks, words="", **more):
        """An evaluation for each row, so that several can be done at a time."""
        if "finetune" in tasks and "--resample" not in words and "imbalance" not in more.get("series", {}):
            words += " --loss balanced"
        for row in dict.fromkeys(run.row for run in runs):
            yield Evaluation(tuple(run for run in runs if run.row == row), tuple(tasks), words=words, **more)


@dataclass(frozen=True)
class Effect:
    """A number for each pretraining seed that is above `over` if the claim holds; with `within`, nearer to 0 than it.
    Without a claim it is only told."""
    words: str
    values: np.ndarray                                                      # (seeds,)
    claim: int | None = None
    over: float = 0.0
    within: float | None = None


# ---- ten pretext tasks


@dataclass(frozen=True)
class Protocol:
    commands: Callable              # Given -> Runs and Evaluations
    effects: Callable               # Found (findings.py) -> Effects
    claims: tuple
    alike: str = "images"           # what every run gets alike: images, or minutes
    needs: tuple = ()               # labels, masks, patients, other images than the phantoms; or --weights

    @property
    def line(self):
        return self.commands.__doc__
