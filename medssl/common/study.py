"""One fit of an evaluation: one encoder, one read-out, one choice of training images, one seed.

What is learned from comes from the training rows, every choice is made on validation rows, and the test rows are scored once, at the end.
"""

import copy
import itertools
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from . import augment, data, encoders, files, loop, metrics, readouts, report, unet

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
    targets: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)                               # one line each, said once
    features: dict = field(default_factory=dict)

    def note(self, line):
        if line not in self.notes:
            self.notes.append(line)
            tqdm.write(f"note: {line}")


def watched(study):
    """Up to 1000 test images for the spectrum; every image where there is no test split."""
    rows = study.dataset.rows("test")
    return np.random.default_rng(0).permutation(rows if len(rows) else np.arange(len(study.dataset)))[:1000]


def features_of(study, model, seed):
    """Features (N, D) of all images, and the encoder's hash after that equals the hash before."""
    key = model.name if model.file else None
    if key not in study.features:
        network = model.fresh(study, seed)
        before = readouts.fingerprint(network)
        features = readouts.extract(network, study.dataset.images, np.arange(len(study.dataset)), study.device)
        study.features[key] = features, unchanged(before, network)
    return study.features[key]


def unchanged(before, network):
    if readouts.fingerprint(network) != before:
        raise RuntimeError("the frozen encoder has changed: this is a mistake in the program, and its scores are worth nothing")
    return before


def run_cell(study, task, model, condition, seed, out):
    """One fit: learns from training rows, chooses on validation rows, and then scores the test rows once."""
    record = {"model": model.name, "task": task, **condition._asdict(), "seed": seed}
    if task == "collapse":
        features, record["frozen"] = features_of(study, model, seed)
        features = features[watched(study)]
        record["scores"] = {"rank_me": metrics.rank_me(features), "alpha_req": metrics.alpha_req(features), "spread": metrics.spread(features),
                            "participation_ratio": metrics.participation_ratio(features), "mean_correlation": metrics.mean_correlation(features)}
        return record | {"spectrum": metrics.spectrum(features)}
    target = study.targets[TARGET[task]]
    rows, test = target.training(study.groups, condition.labels, condition.imbalance, seed), target.rows["test"]
    record |= {"train_images": len(rows), "train_patients": len(np.unique(study.groups[rows]))}
    solve = {"knn": by_neighbours, "linear": by_line}.get(task, by_training)
    predict, facts = solve(study, task, model, condition, seed, target, rows, out)
    answers, truth, groups = predict(test), target.values[test], study.groups[test]                          # the test split, once
    if TARGET[task] == "masks":
        record["scores"], record["again"], record["units"], single = readouts.mask_scores(answers, truth, target.classes, groups)
        if seed == 0:
            record["overlay"] = report.overlay(study, test, truth, answers, single)
    else:
        record["scores"], record["again"], record["units"] = readouts.class_scores(truth, answers, target.classes, groups)
        record["confusion"] = metrics.confusion(truth, answers.argmax(1), len(target.classes))
    return record | facts


def by_neighbours(study, task, model, condition, seed, target, rows, out):
    features, frozen = features_of(study, model, seed)

    def predict(asked):
        shares = readouts.knn(features[rows], target.values[rows], features[asked])
        return np.pad(shares, ((0, 0), (0, len(target.classes) - shares.shape[1])))                          # classes never seen: 0
    return predict, {"frozen": frozen}


def by_line(study, task, model, condition, seed, target, rows, out):
    features, frozen = features_of(study, model, seed)
    predict, chosen = readouts.linear_probe(features, target.values, rows, target.rows["val"], len(target.classes),
                                            class_weights(study, task, target, rows, study.args.resample))
    return predict, chosen | {"frozen": frozen}


def class_weights(study, task, target, rows, resample=False):
    if study.args.loss != "balanced" and not resample:
        return None
    values = target.values[rows].ravel()
    return readouts.balanced_weights(np.bincount(values, minlength=len(target.classes)))


def by_training(study, task, model, condition, seed, target, rows, out):
    """finetune, segment and unet: a head, the loop, the epoch that is best on validation."""
    args, dataset, val = study.args, study.dataset, target.rows["val"]
    network, classes = model.fresh(study, seed), len(target.classes)
    before = readouts.fingerprint(network) if task == "segment" else None
    torch.manual_seed(seed)                                                 # the same first head on every encoder
    views, masks = augment.build(condition.augment, dataset.images.shape[2]), TARGET[task] == "masks"
    loss = args.loss or ("dice" if masks else "ce")
    weights = class_weights(study, task, target, rows)
    if masks:
        head = readouts.LinearHead(network.widths, network.strides, classes) if task == "segment" else build_decoder(study, model, network, classes)
        method = readouts.Segmenter(network, views, head, classes, loss, weights)
    else:
        method = readouts.Classifier(network, views, classes, loss if loss in ("ce", "balanced") else "ce", weights)

    def answers(asked):
        return readouts.answers(method, dataset.images, asked, study.device)

    def validate(_):
        if masks:
            return readouts.mask_scores(answers(val), target.values[val], target.classes, study.groups[val])[0]["dice"]
        return metrics.balanced_accuracy(target.values[val], answers(val).argmax(1))

    per_epoch = max(1, len(target.rows["train"]) // args.batch)             # as with all labels, however few there are
    steps = args.steps or max(1, round(args.epochs * per_epoch))
    frozen = steps if task == "segment" else min(steps, round(args.freeze * per_epoch))
    head_lr = args.head_lr or args.lr * (1 if task == "unet" else 10)
    config = loop.Config(steps=steps, batch=args.batch, optimizer="adamw", lr=args.lr, weight_decay=0.01, warmup=steps // 10, clip=5.0,
                         amp=args.amp, seed=seed, device=args.device)
    drawn = 1 / np.bincount(target.strata[rows])[target.strata[rows]] if args.resample else None
    curve = readouts.tune(method, dataset, rows, validate, config, min(per_epoch, max(1, steps // 10)), frozen, drawn,
                          head_lr / args.lr)
    if task != "segment" and seed == 0 and condition == conditions(args, task)[0]:
        folder = out / f"{report.plain(model.name)}-{task}"
        folder.mkdir(parents=True, exist_ok=True)
        encoders.save(network, folder / "encoder.pt")
    facts = {"frozen": unchanged(before, network)} if task == "segment" else {}
    return answers, facts | {"validation": max(score for _, score in curve[1:]), "curve": [(step / per_epoch, score) for step, score in curve]}


def build_decoder(study, model, network, classes):
    """A U-Net decoder, with --transfer encoder+decoder with the weights of the run's own but for its last layer."""
    fresh = unet.Decoder(network.widths, network.strides, classes)
    checkpoint = model.file and model.file.parent / "checkpoint.pt"
    if study.args.transfer == "encoder" or not model.file:
        return fresh
    state = files.load_torch(checkpoint)["method"] if checkpoint.is_file() else {}
    state = {key.removeprefix("decoder."): value for key, value in state.items() if key.startswith("decoder.") and not key.startswith("decoder.out.")}
    for decoder in (fresh, unet.Decoder(network.widths, network.strides, classes, skips=False)):
        own = {key: value.shape for key, value in decoder.state_dict().items() if not key.startswith("out.")}
        if own == {key: value.shape for key, value in state.items()}:
            decoder.load_state_dict(state, strict=False)
            return decoder
    study.note(f"{model.name} left no U-Net decoder of this shape: its decoder starts random")
    return fresh


