"""What an encoder can be asked: the table of tasks, and one fit of each.

What is learned from comes from the training rows, every choice is made on validation rows, and the test rows are
answered once, at the end. To add a task: a function from a Fit to a Record, and a line in TASKS.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import augment, encoders, files, loop, metrics, unet
from ..errors import UserError
from ..features import extract, knn
from . import readouts, robustness, scores
from .study import Cell, Model, Study, file_name, unchanged
from .subsets import Imbalance, Target


@dataclass
class Fit:
    """What a task is asked to do; target and rows are None for a task without labels."""
    study: Study
    cell: Cell
    model: Model
    seed: int
    target: Target | None = None
    rows: np.ndarray | None = None              # to learn from

    @property
    def values(self):
        return self.target.values

    @property
    def classes(self):
        return len(self.target.classes)

    def class_weights(self, wanted):
        """By which all classes weigh alike; None: every image or pixel weighs alike."""
        if not wanted:
            return None
        return readouts.balanced_weights(np.bincount(self.values[self.rows].ravel(), minlength=self.classes))


@dataclass
class Record:
    """What came out of one fit: the answers to the test images, and the fit's own facts. Everything can be written to a
    file and read again; the scores follow from it."""
    model: str
    cell: Cell
    seed: int
    answers: np.ndarray | None = None           # of the test images, as scores.py wants them
    measures: dict = field(default_factory=dict)                            # scores that the task took itself
    train_images: int | None = None
    train_patients: int | None = None
    frozen: str | None = None                   # hash of the encoder, the same before and after
    validation: float | None = None             # the score by which l2 or the epoch was chosen
    l2: float | None = None
    curve: list | None = None                   # [(epoch, validation score)]
    spectrum: np.ndarray | None = None
    examples: dict | None = None                # best, median and worst test image: rows, predictions, dice
    scored: scores.Scored | None = None


def run(study, cell, model, seed):
    """One fit and its record."""
    fit = Fit(study, cell, model, seed)
    if TASKS[cell.task].target:
        fit.target = study.targets[TASKS[cell.task].target]
        fit.rows = training_rows(study, cell, seed)
    return TASKS[cell.task].run(fit)


def applies(cell, model):
    """Whether the task can be asked of the model, and is worth asking: where all of the network is trained, BatchNorm's
    statistics at the start make no difference, so that one random model is enough."""
    task = TASKS[cell.task]
    if model.features is not None:
        return task.needs == "features" and cell.stage is None
    return task.frozen or not model.normalised


def training_rows(study, cell, seed):
    """The images that a cell learns from."""
    settings, target = study.settings, study.targets[TASKS[cell.task].target]
    imbalance = cell.imbalance and Imbalance(cell.imbalance, max(settings.imbalance), settings.imbalance_varies)
    return target.training(study.groups, cell.labels, imbalance, seed)


def answered(fit, predict, **facts):
    """The record of a fit that learned: predict(rows) is asked for the test rows, once."""
    test, study = fit.target.rows["test"], fit.study
    answers = predict(test)
    if TASKS[fit.cell.task].target == "masks":
        counts = scores.pixel_counts(answers, fit.values[test], fit.classes)
        facts["examples"] = examples(scores.slice_dice(counts), test, answers) if fit.seed == 0 else None
        answers = counts
    return Record(fit.model.name, fit.cell, fit.seed, answers, train_images=len(fit.rows),
                  train_patients=len(np.unique(study.groups[fit.rows])), **facts)


def examples(each, rows, answers):
    """The best, the median and the worst test image by Dice; None where no image has one."""
    order = [i for i in np.argsort(each) if np.isfinite(each[i])]
    if not order:
        return None
    chosen = [order[-1], order[len(order) // 2], order[0]]
    return {"rows": rows[chosen], "predictions": answers[chosen], "dice": each[chosen]}


# ---- from a record to its scores

def score(record, study):
    """Fills in record.scored."""
    record.scored = TASKS[record.cell.task].score(record, study)
    return record


def score_classes(record, study):
    target = study.targets["labels"]
    test = target.rows["test"]
    return scores.class_scores(target.values[test], record.answers, target.classes, study.groups[test], study.patients)


def score_masks(record, study):
    target = study.targets["masks"]
    return scores.mask_scores(record.answers, target.classes, study.groups[target.rows["test"]])


def score_measures(record, study):
    return scores.Scored(dict(record.measures))


def score_robustness(record, study):
    """answers (1 + variants, N, K): class shares of the test images as they are, then changed."""
    target = study.targets["labels"]
    labels, groups = target.values[target.rows["test"]], study.groups[target.rows["test"]]
    predictions = record.answers.argmax(2)                                  # (1 + variants, N)

    def again(rows):
        each = np.array([metrics.balanced_accuracy(labels[rows], answer[rows]) for answer in predictions])
        return np.array([each[0], each[0] - each[1:].mean()])
    each = [metrics.balanced_accuracy(labels, answer) for answer in predictions]
    own = {f"{name} {strength}": value for (name, strength), value in zip(robustness.VARIANTS, each[1:])}
    drops = {f"drop, {name}": each[0] - np.mean([own[f"{name} {s}"] for s in robustness.STRENGTHS])
             for name in robustness.CHANGES}
    return scores.Scored({"balanced_accuracy": each[0], "drop": each[0] - np.mean(each[1:])} | drops | own,
                         ("balanced_accuracy", "drop"), again, groups)


# ---- frozen features

def by_neighbours(fit):
    features, frozen = fit.study.features(fit.model, fit.seed, fit.cell.stage)
    smallest = min(np.unique(fit.values[fit.rows], return_counts=True)[1])
    k = min(fit.study.settings.neighbours, 2 * smallest - 1)                # else the smallest class could never win
    if k < fit.study.settings.neighbours:
        fit.study.note(f"knn: {k} neighbours, as the smallest class has {smallest} training images in some cells")

    def predict(asked):
        shares = knn(features[fit.rows], fit.values[fit.rows], features[asked], k)
        return np.pad(shares, ((0, 0), (0, fit.classes - shares.shape[1])))             # classes never seen: 0
    return answered(fit, predict, frozen=frozen)


def by_linear_probe(fit):
    features, frozen = fit.study.features(fit.model, fit.seed, fit.cell.stage)
    predict, chosen = probe(fit, features)
    return answered(fit, predict, frozen=frozen, **chosen)


def probe(fit, features):
    settings = fit.study.settings
    weights = fit.class_weights(settings.loss == "balanced" or settings.resample)
    return readouts.linear_probe(features, fit.values, fit.rows, fit.target.rows["val"], fit.classes, weights)


def under_changes(fit):
    """The linear probe of the images as they are, asked about the test images as they are and changed."""
    study, test = fit.study, fit.target.rows["test"]
    features, frozen = study.features(fit.model, fit.seed)
    predict, chosen = probe(fit, features)
    network, shares = fit.model.fresh(study, fit.seed), [predict(test)]
    for name, strength in robustness.VARIANTS:
        changed = features.clone()
        changed[test] = extract(network, study.dataset.images, test, study.device,
                                lambda x, n=name, s=strength: network(robustness.CHANGES[n](x, s)))
        shares.append(predict(test, changed))
    record = answered(fit, lambda rows: shares[0], frozen=unchanged(frozen, network), **chosen)
    record.answers = np.stack(shares)                                       # (1 + variants, N, K)
    return record


def directions(fit):
    """How many directions the features of test images use; nothing is learned."""
    features, frozen = fit.study.features(fit.model, fit.seed)
    features = features[fit.study.watched()]
    measures = {name: getattr(metrics, name)(features) for name in DIRECTIONS}
    return Record(fit.model.name, fit.cell, fit.seed, measures=measures, frozen=frozen,
                  spectrum=metrics.spectrum(features))


# ---- read-outs that the loop trains

def by_classifier(fit):
    network, views = start(fit)
    weights = fit.class_weights(fit.study.settings.loss == "balanced")
    return trained(fit, readouts.Classifier(network, views, fit.classes, weights))


def by_grader(fit):
    network, views = start(fit)
    return trained(fit, readouts.Grader(network, views, fit.classes))


def by_linear_segmenter(fit):
    network, views = start(fit)
    head, loss = readouts.LinearHead(network.widths, network.strides, fit.classes), fit.study.settings.loss or "dice"
    weights = fit.class_weights(loss == "balanced")
    return trained(fit, readouts.Segmenter(network, views, head, fit.classes, loss, weights))


def by_unet(fit):
    """Beside Dice, cross-entropy weighs classes by the root of balanced weights, and the last layer prefers none. With
    every pixel alike, a network that knows nothing yet is told twenty times as loudly to leave a class of 2 % alone as
    to find it; once its shares are near 0 both gradients are, and it stays unseen. A linear head on features that stay
    gains nothing from it."""
    network, views = start(fit)
    head, loss = decoder_for(fit, network), fit.study.settings.loss or "dice"
    torch.nn.init.zeros_(head.out.bias)
    weights = fit.class_weights(True).sqrt() if loss == "dice" else fit.class_weights(loss == "balanced")
    return trained(fit, readouts.Segmenter(network, views, head, fit.classes, loss, weights))


def start(fit):
    """The encoder and the views of a read-out; the same first head on every encoder of a seed."""
    network = fit.model.fresh(fit.study, fit.seed)
    torch.manual_seed(fit.seed)
    return network, augment.build(fit.cell.augment, fit.study.dataset.images.shape[2])


def trained(fit, method):
    """The record of a read-out after the epoch that is best on validation."""
    study, settings, target, val = fit.study, fit.study.settings, fit.target, fit.target.rows["val"]
    before = readouts.fingerprint(method.encoder)

    def predict(asked):
        return readouts.answers(method, study.dataset.images, asked, study.device)

    def validate(_):
        if TASKS[fit.cell.task].target == "masks":
            counts = scores.pixel_counts(predict(val), fit.values[val], fit.classes)
            return scores.mask_scores(counts, target.classes, study.groups[val]).scores["dice"]
        return metrics.balanced_accuracy(fit.values[val], predict(val).argmax(1))

    per_epoch, steps, frozen = schedule(settings, fit.cell.task, target)
    config = loop.Config(steps=steps, batch=settings.batch, optimizer=settings.optimizer, lr=settings.lr,
                         weight_decay=settings.weight_decay, warmup=steps // 10, clip=5.0, amp=settings.amp,
                         seed=fit.seed, device=settings.device)
    drawn = 1 / np.bincount(target.strata[fit.rows])[target.strata[fit.rows]] if settings.resample else None
    look = min(per_epoch, max(1, steps // 10))
    training = readouts.Training(config, look, frozen, drawn, head_lr(settings, fit.cell.task) / settings.lr)
    curve = readouts.tune(method, study.dataset, fit.rows, validate, training)
    facts = {"validation": max(score for _, score in curve[1:]),
             "curve": [(step / per_epoch, score) for step, score in curve]}
    if frozen == steps:
        facts["frozen"] = unchanged(before, method.encoder)
    else:
        keep_encoder(study.out / f"{file_name(fit.model.name)}-{fit.cell.task}", method.encoder)
    return answered(fit, predict, **facts)


def head_lr(settings, task):
    """New heads have far to go; a decoder that was transferred has not."""
    transferred = task == "unet" and settings.transfer == "encoder+decoder"
    return settings.head_lr or settings.lr * (1 if transferred else 10)


def schedule(settings, task, target):
    """Steps per epoch (as with all labels, however few there are), steps, and how many with the encoder frozen."""
    per_epoch = max(1, len(target.rows["train"]) // settings.batch)
    steps = settings.steps or max(1, round(settings.epochs * per_epoch))
    if TASKS[task].frozen:
        return per_epoch, steps, steps
    frozen = round(settings.freeze * per_epoch)
    if frozen >= steps:
        raise UserError(f"--freeze {settings.freeze:g}: {frozen} steps with the encoder frozen leave none of the "
                        f"{steps} to train it")
    return per_epoch, steps, frozen


def keep_encoder(folder, network):
    """The trained encoder of the first seed and the first cell of the series, for train.py --init."""
    if not (folder / "encoder.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoders.save(network, folder / "encoder.pt")


def decoder_for(fit, network):
    """A U-Net decoder; with --transfer encoder+decoder it starts with the weights of the run's own, but for the last
    layer."""
    folder = None if fit.model.random else fit.model.file.parent
    fresh = unet.Decoder(network.widths, network.strides, fit.classes, zero_start=False)
    if fit.study.settings.transfer == "encoder" or not folder:
        return fresh
    checkpoint = folder / "checkpoint.pt"
    state = files.load_torch(checkpoint)["method"] if checkpoint.is_file() else {}
    state = {key.removeprefix("decoder."): value for key, value in state.items()
             if key.startswith("decoder.") and not key.startswith("decoder.out.")}
    for decoder in (fresh, unet.Decoder(network.widths, network.strides, fit.classes, False, zero_start=False)):
        own = {key: value.shape for key, value in decoder.state_dict().items() if not key.startswith("out.")}
        if own == {key: value.shape for key, value in state.items()}:
            decoder.load_state_dict(state, strict=False)
            return decoder
    fit.study.note(f"{fit.model.name} left no U-Net decoder of this shape: its decoder starts random")
    return fresh


# ---- the table

@dataclass(frozen=True)
class Task:
    title: str                                  # in tables and charts
    words: str                                  # what is done
    run: Callable[[Fit], Record]
    score: Callable[[Record, Study], scores.Scored]
    columns: tuple                              # scores of its table; the first is charted
    needs: str                                  # features (of any program) or a network
    frozen: bool                                # whether the encoder stays as it is
    target: str | None = None                   # labels, masks
    chosen: str | None = None                   # what is chosen on validation
    trains: bool = False                        # by the loop: there is augmentation, and a curve
    staged: bool = False                        # whether it can be asked of one stage's map


CLASSES = (*scores.CLASS_SCORES, *(name + scores.PATIENT for name in scores.BY_PATIENT))
MASKS = (*scores.MASK_SCORES, *(name + scores.SLICE for name in scores.MASK_SCORES))
SPEED = {"epochs_to_95": "epochs to 95 %", "epochs_to_95_of_random": "to 95 % of random"}
DIRECTIONS = {"rank_me": "RankMe", "alpha_req": "alpha-ReQ", "spread": "spread"}
DROPS = ("drop", "balanced_accuracy", *(f"drop, {name}" for name in robustness.CHANGES))
WORDS = scores.WORDS | SPEED | DIRECTIONS | {"drop": "mean drop"}           # the heads of columns

TASKS = {
    "knn": Task(
        "kNN", "vote of the nearest training images by cosine", by_neighbours, score_classes, CLASSES,
        needs="features", frozen=True, target="labels", staged=True),
    "linear": Task(
        "linear probe", "logistic regression on standardised features", by_linear_probe, score_classes, CLASSES,
        needs="features", frozen=True, target="labels", chosen="L2", staged=True),
    "finetune": Task(
        "fine-tuning", "one linear layer on the encoder, all of it trained", by_classifier, score_classes,
        (*CLASSES, *SPEED), needs="network", frozen=False, target="labels", chosen="epoch", trains=True),
    "grade": Task(
        "grades", "one output on the encoder, all of it trained by squared error; the nearest grade is the answer",
        by_grader, score_classes, (*CLASSES, *SPEED), needs="network", frozen=False, target="labels", chosen="epoch",
        trains=True),
    "segment": Task(
        "linear segmentation", "one 1x1 convolution on the encoder's maps", by_linear_segmenter, score_masks,
        (*MASKS, *SPEED), needs="network", frozen=True, target="masks", chosen="epoch", trains=True),
    "unet": Task(
        "U-Net", "U-Net decoder on the encoder, all of it trained", by_unet, score_masks, (*MASKS, *SPEED),
        needs="network", frozen=False, target="masks", chosen="epoch", trains=True),
    "collapse": Task(
        "collapse", "how many directions the features of test images use; no labels", directions, score_measures,
        tuple(DIRECTIONS), needs="features", frozen=True),
    "robustness": Task(
        "robustness", "the linear probe, asked about darker, noisier, blurrier and turned test images", under_changes,
        score_robustness, DROPS, needs="network", frozen=True, target="labels", chosen="L2"),
}
