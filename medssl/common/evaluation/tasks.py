"""What an encoder can be asked: the table of tasks, and one fit of each.

What is learned from comes from the training rows, every choice is made on validation rows, and the test rows are
answered once, at the end. To add a task: a function from a Fit to a Record, and a line in TASKS.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from .. import augment, encoders, files, loop, metrics, unet
from ..errors import UserError
from ..features import knn
from . import readouts, scores
from .study import Cell, Model, Study, file_name, unchanged
from .subsets import Target


@dataclass
class Fit:
    """What a task is asked to do; target and rows are None for a task without labels."""
    study: Study
    cell: Cell
    model: Model
    seed: int
    target: Target | None = None
    rows: np.ndarray | None = None              # to learn from

    def class_weights(self, wanted):
        """By which all classes weigh alike; None: every image or pixel weighs alike."""
        if not wanted:
            return None
        counts = np.bincount(self.target.values[self.rows].ravel(), minlength=len(self.target.classes))
        return readouts.balanced_weights(counts)


@dataclass
class Record:
    """What came out of one fit: the answers to the test images, their scores, and the fit's own facts."""
    model: str
    cell: Cell
    seed: int
    scored: scores.Scored
    train_images: int | None = None
    train_patients: int | None = None
    frozen: str | None = None                   # hash of the encoder, the same before and after
    validation: float | None = None             # the score by which l2 or the epoch was chosen
    l2: float | None = None
    curve: list | None = None                   # [(epoch, validation score)]
    confusion: np.ndarray | None = None         # (K, K) rows: truth
    spectrum: np.ndarray | None = None
    examples: dict | None = None                # best, median and worst test image: rows, predictions, dice

    def facts(self):
        """The plain fields, as results.json has them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("cell", "scored", "examples")}
        return {**own, **self.cell._asdict(), "scores": self.scored.scores}


def run(study, cell, model, seed):
    """One fit and its record."""
    task, fit = TASKS[cell.task], Fit(study, cell, model, seed)
    if task.target:
        fit.target = study.targets[task.target]
        fit.rows = fit.target.training(study.groups, cell.labels, cell.imbalance, seed)
    return task.run(fit)


def answered(fit, predict, **facts):
    """The record of a fit that learned: predict(rows) is asked for the test rows, once."""
    study, target, test = fit.study, fit.target, fit.target.rows["test"]
    answers, truth, groups = predict(test), target.values[test], study.groups[test]
    if TASKS[fit.cell.task].target == "masks":
        counts = scores.pixel_counts(answers, truth, len(target.classes))
        scored = scores.mask_scores(counts, target.classes, groups)
        facts["examples"] = examples(scores.slice_dice(counts), test, answers) if fit.seed == 0 else None
    else:
        scored = scores.class_scores(truth, answers, target.classes, groups)
        facts["confusion"] = metrics.confusion(truth, answers.argmax(1), len(target.classes))
    return Record(fit.model.name, fit.cell, fit.seed, scored, len(fit.rows), len(np.unique(study.groups[fit.rows])), **facts)


def examples(each, rows, answers):
    """The best, the median and the worst test image by Dice; None where no image has one."""
    order = [i for i in np.argsort(each) if np.isfinite(each[i])]
    if not order:
        return None
    chosen = [order[-1], order[len(order) // 2], order[0]]
    return {"rows": rows[chosen], "predictions": answers[chosen], "dice": each[chosen]}


# ---- frozen features

def by_neighbours(fit):
    features, frozen = fit.study.features(fit.model, fit.seed)
    values, classes = fit.target.values, len(fit.target.classes)

    def predict(asked):
        shares = knn(features[fit.rows], values[fit.rows], features[asked])
        return np.pad(shares, ((0, 0), (0, classes - shares.shape[1])))     # classes never seen: 0
    return answered(fit, predict, frozen=frozen)


def by_linear_probe(fit):
    features, frozen = fit.study.features(fit.model, fit.seed)
    settings, target = fit.study.settings, fit.target
    weights = fit.class_weights(settings.loss == "balanced" or settings.resample)
    predict, chosen = readouts.linear_probe(features, target.values, fit.rows, target.rows["val"], len(target.classes), weights)
    return answered(fit, predict, frozen=frozen, **chosen)


def directions(fit):
    """How many directions the features of test images use; nothing is learned."""
    features, frozen = fit.study.features(fit.model, fit.seed)
    features = features[fit.study.watched()]
    measured = {name: getattr(metrics, name)(features) for name in DIRECTIONS}
    return Record(fit.model.name, fit.cell, fit.seed, scores.Scored(measured), frozen=frozen,
                  spectrum=metrics.spectrum(features))


# ---- read-outs that the loop trains

def by_classifier(fit):
    network, views = start(fit)
    weights = fit.class_weights(fit.study.settings.loss == "balanced")
    return trained(fit, readouts.Classifier(network, views, len(fit.target.classes), weights))


def by_linear_segmenter(fit):
    network, views = start(fit)
    head = readouts.LinearHead(network.widths, network.strides, len(fit.target.classes))
    return trained(fit, segmenter(fit, network, views, head))


def by_unet(fit):
    network, views = start(fit)
    return trained(fit, segmenter(fit, network, views, decoder_for(fit, network)))


def start(fit):
    """The encoder and the views of a read-out; the same first head on every encoder of a seed."""
    network = fit.model.fresh(fit.study, fit.seed)
    torch.manual_seed(fit.seed)
    return network, augment.build(fit.cell.augment, fit.study.dataset.images.shape[2])


def segmenter(fit, network, views, head):
    loss = fit.study.settings.loss or "dice"
    return readouts.Segmenter(network, views, head, len(fit.target.classes), loss, fit.class_weights(loss == "balanced"))


def trained(fit, method):
    """The record of a read-out after the epoch that is best on validation."""
    study, settings, target, val = fit.study, fit.study.settings, fit.target, fit.target.rows["val"]
    before = readouts.fingerprint(method.encoder)

    def predict(asked):
        return readouts.answers(method, study.dataset.images, asked, study.device)

    def validate(_):
        if TASKS[fit.cell.task].target == "masks":
            counts = scores.pixel_counts(predict(val), target.values[val], len(target.classes))
            return scores.mask_scores(counts, target.classes, study.groups[val]).scores["dice"]
        return metrics.balanced_accuracy(target.values[val], predict(val).argmax(1))

    per_epoch, steps, frozen = schedule(settings, fit.cell.task, target)
    transferred = fit.cell.task == "unet" and settings.transfer == "encoder+decoder"
    head_lr = settings.head_lr or settings.lr * (1 if transferred else 10)  # new heads have far to go
    config = loop.Config(steps=steps, batch=settings.batch, optimizer="adamw", lr=settings.lr, weight_decay=0.01,
                         warmup=steps // 10, clip=5.0, amp=settings.amp, seed=fit.seed, device=settings.device)
    drawn = 1 / np.bincount(target.strata[fit.rows])[target.strata[fit.rows]] if settings.resample else None
    training = readouts.Training(config, min(per_epoch, max(1, steps // 10)), frozen, drawn, head_lr / settings.lr)
    curve = readouts.tune(method, study.dataset, fit.rows, validate, training)
    facts = {"validation": max(score for _, score in curve[1:]), "curve": [(step / per_epoch, score) for step, score in curve]}
    if frozen == steps:
        facts["frozen"] = unchanged(before, method.encoder)
    else:
        keep_encoder(study.out / f"{file_name(fit.model.name)}-{fit.cell.task}", method.encoder)
    return answered(fit, predict, **facts)


def schedule(settings, task, target):
    """Steps per epoch (as with all labels, however few there are), steps, and how many with the encoder frozen."""
    per_epoch = max(1, len(target.rows["train"]) // settings.batch)
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    if TASKS[task].needs == "frozen":
        return per_epoch, steps, steps
    frozen = round(settings.freeze * per_epoch)
    if frozen >= steps:
        raise UserError(f"--freeze {settings.freeze:g}: {frozen} steps with the encoder frozen leave none of the {steps} to train it")
    return per_epoch, steps, frozen


def keep_encoder(folder, network):
    """The trained encoder of the first seed and the first cell of the series, for train.py --init."""
    if not (folder / "encoder.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoders.save(network, folder / "encoder.pt")


def decoder_for(fit, network):
    """A U-Net decoder; with --transfer encoder+decoder it starts with the weights of the run's own, but for the last
    layer."""
    classes, folder = len(fit.target.classes), fit.model.file and fit.model.file.parent
    fresh = unet.Decoder(network.widths, network.strides, classes)
    if fit.study.settings.transfer == "encoder" or not folder:
        return fresh
    checkpoint = folder / "checkpoint.pt"
    state = files.load_torch(checkpoint)["method"] if checkpoint.is_file() else {}
    state = {key.removeprefix("decoder."): value for key, value in state.items()
             if key.startswith("decoder.") and not key.startswith("decoder.out.")}
    for decoder in (fresh, unet.Decoder(network.widths, network.strides, classes, skips=False)):
        own = {key: value.shape for key, value in decoder.state_dict().items() if not key.startswith("out.")}
        if own == {key: value.shape for key, value in state.items()}:
            decoder.load_state_dict(state, strict=False)
            return decoder
    fit.study.note(f"{fit.model.name} left no U-Net decoder of this shape: its decoder starts random")
    return fresh


# ---- the table

@dataclass(frozen=True)
class Task:
    words: str                                  # what is done
    run: Callable[[Fit], Record]
    needs: str                                  # features, frozen (a network that stays as it is) or network
    columns: tuple                              # scores of its table; the first is charted
    target: str | None = None                   # labels, masks
    chosen: str | None = None                   # what is chosen on validation

    @property
    def trains(self):
        """Whether the loop trains something: there is augmentation then, and a curve."""
        return self.needs != "features"


FROZEN = "encoder frozen, in evaluation mode"
CLASSES, MASKS = tuple(scores.CLASS_SCORES), (*scores.MASK_SCORES, *(name + scores.SLICE for name in scores.MASK_SCORES))
SPEED = {"epochs_to_95": "epochs to 95 %", "epochs_to_95_of_random": "to 95 % of random"}
DIRECTIONS = {"rank_me": "RankMe", "alpha_req": "alpha-ReQ", "participation_ratio": "participation",
              "mean_correlation": "correlation", "spread": "spread"}
WORDS = scores.WORDS | SPEED | DIRECTIONS       # the head of each column

TASKS = {
    "knn": Task(f"{FROZEN}; the 20 nearest training images by cosine vote", by_neighbours, "features", CLASSES, "labels"),
    "linear": Task(f"{FROZEN}; logistic regression on its standardised features", by_linear_probe, "features", CLASSES,
                   "labels", "L2"),
    "finetune": Task("one linear layer on the encoder, all of it trained", by_classifier, "network", (*CLASSES, *SPEED),
                     "labels", "epoch"),
    "segment": Task(f"{FROZEN}; one 1x1 convolution on its four maps", by_linear_segmenter, "frozen", (*MASKS, *SPEED),
                    "masks", "epoch"),
    "unet": Task("U-Net decoder on the encoder, all of it trained", by_unet, "network", (*MASKS, *SPEED), "masks", "epoch"),
    "collapse": Task(f"{FROZEN}; no labels are used", directions, "features", tuple(DIRECTIONS)),
}
