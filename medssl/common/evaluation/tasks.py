"""What an encoder can be asked: the table of tasks, and one fit of each.

What is learned from comes from the training rows, every choice is made on validation rows, and the test rows are
answered once, at the end. To add a task: a function from a Fit to a Record, and a line in TASKS; where its answers are
of a kind that scores.py does not know, an Answers too.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .. import augment, encoders, files, loop, metrics, unet
from ..errors import UserError
from ..features import knn
from . import keep, readouts, scores
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
    notes: list = field(default_factory=list)

    @property
    def args(self):
        return self.study.args

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
    answers: np.ndarray | None = None           # of the test images, as the task's Answers say
    measures: dict = field(default_factory=dict)                            # scores that the task took itself
    train_images: int | None = None
    train_patients: int | None = None
    frozen: str | None = None                   # hash of the encoder, the same before and after
    validation: float | None = None             # the score by which l2, or rate and epoch, were chosen
    l2: float | None = None
    lr: float | None = None
    curve: list | None = None                   # [(epoch, validation score)]
    notes: list = field(default_factory=list)   # lines for the reader
    spectrum: np.ndarray | None = None
    examples: np.ndarray | None = None          # the best, the median and the worst of the test images by Dice, (3,)
    masks: np.ndarray | None = None             # and what was said of them, (3, H, W)
    scored: scores.Scored | None = None


def record_of(study, cell, model, seed):
    """One fit and its record; read, where it is on disk already."""
    path = study.out and study.path_of(cell, model, seed)
    if path and path.is_file():
        words = keep.load_fit(path)
        record = Record(**words | {"cell": Cell(*words["cell"])})
    else:
        record = do(study, cell, model, seed)
        if path:
            keep.save_fit(record, path)
    for line in record.notes:
        study.note(line)
    task, target = TASKS[cell.task], study.targets.get(TASKS[cell.task].target)
    record.scored = task.answers.score(record.answers, target) if target else scores.Scored(dict(record.measures))
    return record


def do(study, cell, model, seed):
    fit = Fit(study, cell, model, seed)
    if TASKS[cell.task].target:
        fit.target = study.targets[TASKS[cell.task].target]
        fit.rows = training_rows(study, cell, seed)
    return replace(TASKS[cell.task].run(fit), notes=fit.notes)


def applies(cell, model):
    """Whether the task can be asked of the model, and is worth asking: where all of the network is trained, BatchNorm's
    statistics at the start make no difference, so that one random model is enough."""
    task = TASKS[cell.task]
    if not model.encoder:
        return task.needs == "features" and cell.stage is None
    if model.unlearned:                                                     # joined to what the network says
        return task.needs == "features" and task.target == "labels"
    return task.frozen or not model.normalised


def check_answers(study, name):
    """Scores blank answers, so that a task whose answers can't be scored fails before the first fit."""
    task, target = TASKS[name], study.targets.get(TASKS[name].target)
    if target:
        scored = task.answers.score(task.answers.blank(target), target)
        values = scored.again(np.arange(len(scored.units))) if scored.heads else []
        unknown = {task.columns[0], *scored.heads} - set(scored.scores)
        if unknown or len(values) != len(scored.heads):
            raise ValueError(f"task {name}: its answers are scored by {', '.join(scored.scores)}, without "
                             f"{', '.join(sorted(unknown)) or 'drawing all heads'}")


def training_rows(study, cell, seed):
    """The images that a cell learns from."""
    imbalance = cell.imbalance and Imbalance(cell.imbalance, max(study.args.imbalance))
    return study.targets[TASKS[cell.task].target].training(cell.labels, imbalance, seed)


def answered(fit, predict, **facts):
    """The record of a fit that learned: predict(rows) is asked for the test rows, once."""
    task, test = TASKS[fit.cell.task], fit.target.rows["test"]
    answers = predict(test)
    if task.target == "masks":
        masks, answers = answers, scores.pixel_counts(answers, fit.values[test], fit.classes)       # (N, 3, K)
        order = np.argsort(dice := scores.slice_dice(answers))[:np.isfinite(dice).sum()]            # nan comes last
        if len(order) and fit.seed == fit.study.seeds[0]:
            chosen = order[[-1, len(order) // 2, 0]]
            facts |= {"examples": chosen, "masks": masks[chosen]}
    if answers.shape != (wanted := task.answers.blank(fit.target).shape):
        raise ValueError(f"task {fit.cell.task} answers {task.answers.words}: {wanted}, not {answers.shape}")
    return Record(fit.model.name, fit.cell, fit.seed, answers, train_images=len(fit.rows),
                  train_patients=len(np.unique(fit.study.groups[fit.rows])), **facts)


# ---- frozen features

def by_neighbours(fit):
    features, frozen = fit.study.features(fit.model, fit.seed, fit.cell.stage)
    smallest = min(np.unique(fit.values[fit.rows], return_counts=True)[1])
    k = min(fit.args.neighbours, 2 * smallest - 1)                          # else the smallest class could never win
    if k < fit.args.neighbours:
        fit.notes.append(f"knn: {k} neighbours, as the smallest class has {smallest} training images in some cells")

    def predict(asked):
        shares = knn(features[fit.rows], fit.values[fit.rows], features[asked], k)
        return np.pad(shares, ((0, 0), (0, fit.classes - shares.shape[1])))             # classes never seen: 0
    return answered(fit, predict, frozen=frozen)


def by_linear_probe(fit):
    features, frozen = fit.study.features(fit.model, fit.seed, fit.cell.stage)
    weights = fit.class_weights(fit.args.loss == "balanced" or fit.args.resample)
    predict, chosen = readouts.linear_probe(features, fit.values, fit.rows, fit.target.rows["val"], fit.classes,
                                            weights)
    return answered(fit, predict, frozen=frozen, **chosen)


def directions(fit):
    """How many directions the features of test images use; nothing is learned."""
    features, frozen = fit.study.features(fit.model, fit.seed)
    features = features[fit.study.watched()]
    measures = {name: getattr(metrics, name)(features) for name in DIRECTIONS}
    return Record(fit.model.name, fit.cell, fit.seed, measures=measures, frozen=frozen,
                  spectrum=metrics.spectrum(features))


# ---- read-outs that the loop trains

def by_classifier(fit):
    weights = fit.class_weights(fit.args.loss == "balanced")
    return trained(fit, lambda network, views: readouts.Classifier(network, views, fit.classes, weights))


def by_grader(fit):
    return trained(fit, lambda network, views: readouts.Grader(network, views, fit.classes))


def by_linear_segmenter(fit):
    loss = fit.args.loss or "dice"
    weights = fit.class_weights(loss == "balanced")

    def build(network, views):
        head = readouts.LinearHead(network.widths, network.strides, fit.classes)
        return readouts.Segmenter(network, views, head, fit.classes, loss, weights)
    return trained(fit, build)


def by_unet(fit):
    """Beside Dice, cross-entropy weighs classes by the root of balanced weights, and the last layer prefers none. With
    every pixel alike, a network that knows nothing yet is told twenty times as loudly to leave a class of 2 % alone as
    to find it; once its shares are near 0 both gradients are, and it stays unseen. A linear head on features that stay
    gains nothing from it."""
    loss = fit.args.loss or "dice"
    weights = fit.class_weights(True).sqrt() if loss == "dice" else fit.class_weights(loss == "balanced")

    def build(network, views):
        head = decoder_for(fit, network)
        torch.nn.init.zeros_(head.out.bias)
        return readouts.Segmenter(network, views, head, fit.classes, loss, weights)
    return trained(fit, build)


def trained(fit, build):
    """The record of a read-out at the rate and after the epoch that are best on validation. build(network, views):
    what is trained; the same first head on every encoder of a seed."""
    best = None
    for lr in fit.args.lr:
        network = fit.model.fresh(fit.study, fit.seed)
        torch.manual_seed(fit.seed)
        method = build(network, augment.build(fit.cell.augment, fit.study.dataset.images.shape[2]))
        facts = train_at(fit, method, lr)
        if best is None or facts["validation"] > best[0]["validation"]:
            best = facts, method
    facts, method = best
    if "frozen" not in facts:
        keep_encoder(fit.study.out / f"{file_name(fit.model.name)}-{fit.cell.task}", method.encoder)
    return answered(fit, lambda rows: readouts.answers(method, fit.study.dataset.images, rows, fit.study.device),
                    **facts)


def train_at(fit, method, lr):
    """Trains at one rate; returns the facts of it. The weights that are best on validation remain."""
    study, args, target, val = fit.study, fit.args, fit.target, fit.target.rows["val"]
    before = readouts.fingerprint(method.encoder)

    def validate(_):
        answers = readouts.answers(method, study.dataset.images, val, study.device)
        if TASKS[fit.cell.task].target == "masks":
            counts = scores.pixel_counts(answers, fit.values[val], fit.classes)
            return scores.mask_scores(counts, target.classes, study.groups[val]).scores["dice"]
        return metrics.balanced_accuracy(fit.values[val], answers.argmax(1))

    per_epoch, steps, frozen = schedule(args, fit.cell.task, target)
    config = loop.Config(steps=steps, batch=args.batch, optimizer=args.optimizer, lr=lr, weight_decay=args.weight_decay,
                         warmup=steps // 10, clip=5.0, amp=args.amp, seed=fit.seed, device=args.device)
    drawn = 1 / np.bincount(target.strata[fit.rows])[target.strata[fit.rows]] if args.resample else None
    look = min(per_epoch, max(1, steps // 10))
    training = readouts.Training(config, look, frozen, drawn, head_lr(args, fit.cell.task, lr) / lr)
    curve = readouts.tune(method, study.dataset, fit.rows, validate, training)
    facts = {"validation": max(score for _, score in curve[1:]), "lr": lr,
             "curve": [(step / per_epoch, score) for step, score in curve]}
    return facts | ({"frozen": unchanged(before, method.encoder)} if frozen == steps else {})


def head_lr(args, task, lr):
    """New heads have far to go; a decoder that was transferred has not."""
    return args.head_lr or lr * (1 if task == "unet" and args.transfer == "encoder+decoder" else 10)


def schedule(args, task, target):
    """Steps per epoch (as with all labels, however few there are), steps, and how many with the encoder frozen."""
    per_epoch = max(1, len(target.rows["train"]) // args.batch)
    steps = args.steps or max(1, round(args.epochs * per_epoch))
    if TASKS[task].frozen:
        return per_epoch, steps, steps
    frozen = round(args.freeze * per_epoch)
    if frozen >= steps:
        raise UserError(f"--freeze {args.freeze:g}: {frozen} steps with the encoder frozen leave none of the {steps} "
                        "to train it")
    return per_epoch, steps, frozen


def keep_encoder(folder, network):
    """The trained encoder of the first seed and the first cell of the series, for train.py --init."""
    if not (folder / "encoder.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoders.save(network, folder / "encoder.pt")


def decoder_for(fit, network):
    """A U-Net decoder; with --transfer encoder+decoder it starts with the weights of the run's own, but for the last
    layer."""
    fresh = unet.Decoder(network.widths, network.strides, fit.classes)
    if fit.args.transfer == "encoder" or fit.model.random:
        return fresh
    checkpoint = fit.model.file.parent / "checkpoint.pt"
    state = files.load_torch(checkpoint)["method"] if checkpoint.is_file() else {}
    state = {key.removeprefix("decoder."): value for key, value in state.items()
             if key.startswith("decoder.") and not key.startswith("decoder.out.")}
    for decoder in (fresh, unet.Decoder(network.widths, network.strides, fit.classes, skips=False)):
        own = {key: value.shape for key, value in decoder.state_dict().items() if not key.startswith("out.")}
        if own == {key: value.shape for key, value in state.items()}:
            decoder.load_state_dict(state, strict=False)
            return decoder
    fit.notes.append(f"{fit.model.name} left no U-Net decoder of this shape: its decoder starts random")
    return fresh


# ---- the table

@dataclass(frozen=True)
class Task:
    title: str                                  # in tables and charts
    words: str                                  # what is done
    run: Callable[[Fit], Record]
    columns: tuple                              # scores of its table; the first is charted
    needs: str                                  # features (of any program) or a network
    frozen: bool                                # whether the encoder stays as it is
    target: str | None = None                   # labels, masks; None: nothing is learned, the record holds measures
    answers: scores.Answers | None = None       # what it says of each test image, and how that is scored
    chance: Callable[[Target], float] | None = None                         # the first column's value of a guess
    chosen: str | None = None                   # what is chosen on validation
    trains: bool = False                        # by the loop: there is augmentation, and a curve
    staged: bool = False                        # whether it can be asked of one stage's map
    default: bool = False                       # done where --task is not given and the set allows it


CLASSES = tuple(scores.CLASS_SCORES)
MASKS = (*scores.MASK_SCORES, *(name + scores.SLICE for name in scores.MASK_SCORES))
SPEED = {"epochs_to_95": "epochs to 95 %", "epochs_to_95_of_random": "to 95 % of random"}
DIRECTIONS = {"rank_me": "RankMe", "alpha_req": "alpha-ReQ", "spread": "spread"}
WORDS = scores.WORDS | SPEED | DIRECTIONS                                   # the heads of columns
LABELS = {"target": "labels", "answers": scores.SHARES, "chance": scores.even_chance}
OF_MASKS = {"target": "masks", "answers": scores.PIXELS}
TRAINED = {"needs": "network", "chosen": "epoch", "trains": True}

TASKS = {
    "knn": Task(
        "kNN", "vote of the nearest training images by cosine", by_neighbours, CLASSES,
        needs="features", frozen=True, staged=True, default=True, **LABELS),
    "linear": Task(
        "linear probe", "logistic regression on standardised features", by_linear_probe, CLASSES,
        needs="features", frozen=True, chosen="L2", staged=True, default=True, **LABELS),
    "finetune": Task(
        "fine-tuning", "one linear layer on the encoder, all of it trained", by_classifier, (*CLASSES, *SPEED),
        frozen=False, **LABELS, **TRAINED),
    "grade": Task(
        "grades", "one output on the encoder, all of it trained by squared error; the nearest grade is the answer",
        by_grader, (*CLASSES, *SPEED), frozen=False, **LABELS, **TRAINED),
    "segment": Task(
        "linear segmentation", "one 1x1 convolution on the encoder's maps", by_linear_segmenter, (*MASKS, *SPEED),
        frozen=True, default=True, **OF_MASKS, **TRAINED),
    "unet": Task(
        "U-Net", "U-Net decoder on the encoder, all of it trained", by_unet, (*MASKS, *SPEED),
        frozen=False, **OF_MASKS, **TRAINED),
    "collapse": Task(
        "collapse (RankMe is at most the number of images, and of features)",
        "how many directions the features of test images use; no labels", directions, tuple(DIRECTIONS),
        needs="features", frozen=True, default=True),
}
