"""One fit of an evaluation: one encoder, one read-out, one choice of training images, one seed.

What is learned from comes from the training rows, every choice is made on validation rows, and the test rows are scored once, at the end.
"""

import copy
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import augment, data, encoders, files, loop, metrics, unet
from ..errors import UserError
from ..features import extract, knn
from . import readouts, report
from .subsets import Target

FROZEN = "encoder frozen, in evaluation mode"
TASKS = {
    "knn": f"{FROZEN}; the 20 nearest training images by cosine vote",
    "linear": f"{FROZEN}; logistic regression on its standardised features",
    "finetune": "one linear layer on the encoder, all of it trained",
    "segment": f"{FROZEN}; one 1x1 convolution on its four maps",
    "unet": "U-Net decoder on the encoder, all of it trained",
    "collapse": f"{FROZEN}; no labels are used",
}
TARGET = {"knn": "labels", "linear": "labels", "finetune": "labels", "segment": "masks", "unet": "masks"}
TRAINED = ("finetune", "segment", "unet")                                   # by the loop
CHOSEN = {"linear": "L2", **dict.fromkeys(TRAINED, "epoch")}
Condition = namedtuple("Condition", "labels imbalance augment")             # one cell of the series; None where a task has no such choice


@dataclass
class Model:
    """One row of the table. file None: random weights."""
    name: str
    encoder: str
    stem: str
    file: Path | None = None
    config: dict | None = None                                              # of the run that the file lies in
    step: int | None = None                                                 # of its pretraining, where the file's name says so
    network: torch.nn.Module | None = None

    def fresh(self, study, seed):
        """The encoder as it is before a read-out; a random one is drawn anew from every seed."""
        if self.file:
            return copy.deepcopy(self.network)
        torch.manual_seed(seed)
        dataset = study.dataset
        network = encoders.build(self.encoder, dataset.images.shape[1], self.stem, dataset.mean, dataset.std)
        return network.to(study.device, memory_format=torch.channels_last)


@dataclass
class Study:
    args: object
    dataset: data.Dataset
    device: torch.device
    models: list
    groups: np.ndarray                                                      # (N,) patient of each image
    out: Path | None = None                                                 # folder of the results
    targets: dict = field(default_factory=dict)                             # "labels", "masks": Target
    notes: list = field(default_factory=list)                               # one line each, said once
    features: dict = field(default_factory=dict)                            # by encoder

    def note(self, line):
        if line not in self.notes:
            self.notes.append(line)
            tqdm.write(f"note: {line}")

    def watched(self):
        """Up to 1000 test images for the spectrum; of all images where there is no test split."""
        rows = self.dataset.rows("test")
        return np.random.default_rng(0).permutation(rows if len(rows) else np.arange(len(self.dataset)))[:1000]


@dataclass
class Fit:
    """What a read-out is asked to do."""
    study: Study
    task: str
    model: Model
    condition: Condition
    seed: int
    target: Target
    rows: np.ndarray                                                        # to learn from

    def class_weights(self, wanted):
        """By which all classes weigh alike; None: every image or pixel weighs alike."""
        if not wanted:
            return None
        return readouts.balanced_weights(np.bincount(self.target.values[self.rows].ravel(), minlength=len(self.target.classes)))


def run(study, task, model, condition, seed):
    """One fit and its record: learns from training rows, chooses on validation rows, and then scores the test rows once."""
    record = {"model": model.name, "task": task, **condition._asdict(), "seed": seed}
    if task == "collapse":
        features, record["frozen"] = features_of(study, model, seed)
        features = features[study.watched()]
        record["scores"] = {"rank_me": metrics.rank_me(features), "alpha_req": metrics.alpha_req(features), "spread": metrics.spread(features),
                            "participation_ratio": metrics.participation_ratio(features), "mean_correlation": metrics.mean_correlation(features)}
        return record | {"spectrum": metrics.spectrum(features)}
    target = study.targets[TARGET[task]]
    fit = Fit(study, task, model, condition, seed, target, target.training(study.groups, condition.labels, condition.imbalance, seed))
    predict, facts = {"knn": by_neighbours, "linear": by_linear_probe}.get(task, by_training)(fit)
    test = target.rows["test"]
    answers, truth, groups = predict(test), target.values[test], study.groups[test]                          # the test split, once
    record |= facts | {"train_images": len(fit.rows), "train_patients": len(np.unique(study.groups[fit.rows]))}
    if TARGET[task] == "masks":
        record["scores"], record["rescore"], record["units"], single = readouts.mask_scores(answers, truth, target.classes, groups)
        if seed == 0:
            record["overlay"] = report.overlay(study, test, truth, answers, single)
    else:
        record["scores"], record["rescore"], record["units"] = readouts.class_scores(truth, answers, target.classes, groups)
        record["confusion"] = metrics.confusion(truth, answers.argmax(1), len(target.classes))
    return record


def features_of(study, model, seed, everything=False):
    """Features (N, D) of all images that read-outs ask for (or of everything), and the encoder's hash, which extraction must not change."""
    key = model.name if model.file else None                                # a random one's are kept until the next is drawn
    if key not in study.features:
        network = model.fresh(study, seed)
        before = readouts.fingerprint(network)
        asked = [study.watched(), *(study.targets["labels"].rows.values() if "labels" in study.targets else [])]
        rows = np.arange(len(study.dataset)) if everything else np.unique(np.concatenate(asked))
        found = extract(network, study.dataset.images, rows, study.device)
        features = torch.zeros(len(study.dataset), found.shape[1])
        features[rows] = found                                              # (N, D)
        study.features[key] = features, unchanged(before, network)
    return study.features[key]


def unchanged(before, network):
    if readouts.fingerprint(network) != before:
        raise RuntimeError("the frozen encoder has changed: this is a mistake in the program, and its scores are worth nothing")
    return before


# ---- each returns the answers to any rows, as a function, and facts for the record

def by_neighbours(fit):
    features, frozen = features_of(fit.study, fit.model, fit.seed)
    values, classes = fit.target.values, len(fit.target.classes)

    def predict(asked):
        shares = knn(features[fit.rows], values[fit.rows], features[asked])
        return np.pad(shares, ((0, 0), (0, classes - shares.shape[1])))     # classes never seen: 0
    return predict, {"frozen": frozen}


def by_linear_probe(fit):
    features, frozen = features_of(fit.study, fit.model, fit.seed)
    args = fit.study.args
    predict, chosen = readouts.linear_probe(features, fit.target.values, fit.rows, fit.target.rows["val"], len(fit.target.classes),
                                            fit.class_weights(args.loss == "balanced" or args.resample))
    return predict, chosen | {"frozen": frozen}


def by_training(fit):
    """finetune, segment and unet: a head, the loop, the epoch that is best on validation."""
    study, args, target, val = fit.study, fit.study.args, fit.target, fit.target.rows["val"]
    dataset, masks, classes = study.dataset, TARGET[fit.task] == "masks", len(target.classes)
    network = fit.model.fresh(study, fit.seed)
    before = readouts.fingerprint(network)
    torch.manual_seed(fit.seed)                                             # the same first head on every encoder
    views, weights = augment.build(fit.condition.augment, dataset.images.shape[2]), fit.class_weights(args.loss == "balanced")
    if masks:
        head = readouts.LinearHead(network.widths, network.strides, classes) if fit.task == "segment" else decoder_for(fit, network)
        method = readouts.Segmenter(network, views, head, classes, args.loss or "dice", weights)
    else:
        method = readouts.Classifier(network, views, classes, weights)

    def predict(asked):
        return readouts.answers(method, dataset.images, asked, study.device)

    def validate(_):
        if masks:
            return readouts.mask_scores(predict(val), target.values[val], target.classes, study.groups[val])[0]["dice"]
        return metrics.balanced_accuracy(target.values[val], predict(val).argmax(1))

    per_epoch, steps, frozen = schedule(args, fit.task, target)
    head_lr = args.head_lr or args.lr * (1 if fit.task == "unet" and args.transfer == "encoder+decoder" else 10)    # new heads have far to go
    config = loop.Config(steps=steps, batch=args.batch, optimizer="adamw", lr=args.lr, weight_decay=0.01, warmup=steps // 10, clip=5.0,
                         amp=args.amp, seed=fit.seed, device=args.device)
    drawn = 1 / np.bincount(target.strata[fit.rows])[target.strata[fit.rows]] if args.resample else None
    curve = readouts.tune(method, dataset, fit.rows, validate, config, min(per_epoch, max(1, steps // 10)), frozen, drawn, head_lr / args.lr)
    facts = {"validation": max(score for _, score in curve[1:]), "curve": [(step / per_epoch, score) for step, score in curve]}
    if fit.task == "segment":
        return predict, facts | {"frozen": unchanged(before, network)}
    keep_encoder(study.out / f"{report.plain(fit.model.name)}-{fit.task}", network)
    return predict, facts


def schedule(args, task, target):
    """Steps per epoch (as with all labels, however few there are), steps, and how many of them with the encoder frozen."""
    per_epoch = max(1, len(target.rows["train"]) // args.batch)
    steps = args.steps or max(1, round(args.epochs * per_epoch))
    frozen = steps if task == "segment" else round(args.freeze * per_epoch)
    if task in ("finetune", "unet") and frozen >= steps:
        raise UserError(f"--freeze {args.freeze:g}: {frozen} steps with the encoder frozen leave none of the {steps} to train it")
    return per_epoch, steps, frozen


def keep_encoder(folder, network):
    """The trained encoder of the first seed and the first condition of the series, for train.py --init."""
    if not (folder / "encoder.pt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoders.save(network, folder / "encoder.pt")


def decoder_for(fit, network):
    """A U-Net decoder; with --transfer encoder+decoder it starts with the weights of the run's own, but for the last layer."""
    classes, folder = len(fit.target.classes), fit.model.file and fit.model.file.parent
    fresh = unet.Decoder(network.widths, network.strides, classes)
    if fit.study.args.transfer == "encoder" or not folder:
        return fresh
    state = files.load_torch(folder / "checkpoint.pt")["method"] if (folder / "checkpoint.pt").is_file() else {}
    state = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.") and not key.startswith("decoder.out.")}
    for decoder in (fresh, unet.Decoder(network.widths, network.strides, classes, skips=False)):
        own = {key: value.shape for key, value in decoder.state_dict().items() if not key.startswith("out.")}
        if own == {key: value.shape for key, value in state.items()}:
            decoder.load_state_dict(state, strict=False)
            return decoder
    fit.study.note(f"{fit.model.name} left no U-Net decoder of this shape: its decoder starts random")
    return fresh
