"""What are an encoder's features worth? One command, one table, and always a row for the same network with random weights.

    python evaluate.py runs/a                                             the run's own images: kNN, linear probe, linear segmentation, spectrum
    python evaluate.py runs/a runs/b imagenet.pth --labels 1.0 0.1 7n     several encoders, with fewer and fewer labels
    python evaluate.py runs/a --task finetune --freeze 10 --epochs 50     train all of it; leaves an encoder.pt that train.py --init takes
    python evaluate.py runs/a/encoder-*.pt --task knn                     one run at several steps of its pretraining
    python evaluate.py runs/a --export encoder.pt --features out.npz      for other programs

Every choice (L2, epoch) is made on the validation split; the test split is scored once. Intervals are 95 %, by patient.
"""

import copy
import itertools
import json
import math
import os
import re
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from medssl.common import augment, cli, data, encoders, feed, files, loop, metrics, readouts, report, unet

FROZEN = "encoder frozen, in evaluation mode"
TASKS = {
    "knn": f"{FROZEN}; the 20 nearest training images by cosine vote; nothing is chosen",
    "linear": f"{FROZEN}; logistic regression on standardised features; L2 chosen on validation",
    "finetune": "one linear layer on the encoder, all of it trained; epoch chosen on validation",
    "segment": f"{FROZEN}; one 1x1 convolution on its four maps; epoch chosen on validation",
    "unet": "U-Net decoder on the encoder, all of it trained; epoch chosen on validation",
    "collapse": f"{FROZEN}; no labels used, nothing chosen",
}
TARGET = {"knn": "labels", "linear": "labels", "finetune": "labels", "segment": "masks", "unet": "masks"}
TRAINED = ("finetune", "segment", "unet")                                   # by the loop
STRENGTHS = [f"S{i}" for i in range(7)]

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
class Target:
    """What is to be told, and the rows that may be learned from, chosen on, and scored."""
    values: np.ndarray                                                      # labels (N,) or masks (N, H, W)
    classes: tuple
    strata: np.ndarray                                                      # (N,) what subsets keep the shares of
    rows: dict                                                              # train, val, test
    orders: dict = field(default_factory=dict)                              # by seed, of the training rows

    @property
    def rare(self):
        """The class with the fewest training images."""
        counts = np.bincount(self.strata[self.rows["train"]])
        return int(np.where(counts > 0, counts, counts.sum() + 1).argmin())


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


def main(argv=None):
    args = parse(argv)
    device = loop.processes(args.device)[2]
    models = [describe(path, args) for path in args.runs]
    study = open_study(args, models, device)
    tasks = choose_tasks(study)
    out = choose_folder(args, study) if tasks else None
    for kind in sorted({TARGET[task] for task in tasks if task in TARGET}):
        study.targets[kind] = find_target(study, kind)
    cells = [(task, condition) for task in tasks for condition in conditions(args, task)]
    say_what(study, tasks, cells)
    if args.export:
        export(study, args.export)
    if args.features:
        save_features(study, args.features)

    records, stopped = [], False
    try:
        with tqdm(total=len(cells) * len(study.models) * args.seeds, unit="fit", delay=0.5, dynamic_ncols=True) as bar:
            for seed, model in itertools.product(range(args.seeds), study.models):
                for task, condition in cells:
                    bar.set_postfix_str(f"{model.name}, {task}, seed {seed}", refresh=False)
                    records.append(run_cell(study, task, model, condition, seed, out))
                    bar.update()
                study.features.pop(None, None)                              # a random encoder's serve for one seed only
    except KeyboardInterrupt:
        stopped = True
        print("stopped: what was done so far is written")
    if records:
        report.write(study, records, cells, TASKS, out)
    if stopped:
        raise KeyboardInterrupt


# ---- the command line

def parse(argv):
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n")[0], epilog="; ".join(f"{k}: {v}" for k, v in TASKS.items()))
    add = parser.add_argument
    add("runs", nargs="*", help="folders of runs, or files of weights (ours, torchvision's, timm's); none: the random encoder alone")
    add("--data", help="default: the first run's; 'phantoms' is built in")
    add("--label", help="column of split.csv (default: the first run's)")
    add("--size", type=positive, help="side of the images (default: the first run's)")
    add("--channels", type=int, choices=(1, 3), help="default: the first run's, else as the images are")
    add("--encoder", choices=encoders.ENCODERS, help="of the weight files, where their keys leave it open, and of the random row without any run")
    add("--stem", choices=encoders.STEMS, help="likewise")
    add("--task", nargs="*", choices=TASKS, help="default: knn linear with labels, segment with masks, collapse always")
    add("--labels", nargs="+", type=amount, default=["1.0"], help="shares of the training images (whole patients), or numbers of images such as 7n")
    add("--imbalance", nargs="+", type=positive_number, default=[None], help="1: all classes cut to the rarest one's size; 10: and of that one a tenth is kept")
    add("--resample", action="store_true", help="draw every class equally often (linear: weigh it; knn: no effect)")
    add("--augment", nargs="+", choices=STRENGTHS, default=["S1"], help="strength under finetune, segment and unet")
    add("--freeze", type=not_negative, default=0, help="epochs with the encoder frozen before finetune and unet release it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive_number, default=20, help="of finetune, segment and unet; an epoch has as many steps with few labels as with all")
    length.add_argument("--steps", type=positive)
    add("--batch", type=positive, default=64)
    add("--lr", type=positive_number, default=1e-3, help="AdamW's")
    add("--head-lr", type=positive_number, default=1.0, help="the head's, as a multiple of --lr")
    add("--loss", choices=readouts.LOSSES, help="balanced: cross-entropy with class weights; dice (with cross-entropy; default) and jaccard: masks only")
    add("--transfer", choices=("encoder", "encoder+decoder"), default="encoder", help="what unet takes from a run that had a decoder")
    add("--seeds", type=positive, default=3, help="of subsets, heads, order and the random encoder")
    add("--out", metavar="DIR", help="default: results/NAME, numbered")
    add("--export", metavar="FILE", help="the one encoder, with torchvision's key names; and FILE-rgb for 3-channel programs")
    add("--features", metavar="FILE.npz", help="pooled features of all images, with labels, patients and splits")
    add("--device", default="auto")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="while training heads and encoders")
    add("--cache", metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.freeze and not args.steps and args.freeze >= args.epochs:
        parser.error(f"--freeze {args.freeze:g} leaves no epoch of --epochs {args.epochs:g} to train the encoder")
    if args.export and len(args.runs) != 1:
        parser.error("--export takes exactly one run or file of weights")
    return args


def positive(text):
    if int(text) < 1:
        raise ValueError
    return int(text)


def not_negative(text):
    if not 0 <= float(text) < math.inf:
        raise ValueError
    return float(text)


def positive_number(text):
    if not not_negative(text):
        raise ValueError
    return float(text)


def amount(text):
    if not (re.fullmatch(r"[1-9]\d*n", text) or 0 < float(text) <= 1):
        raise ValueError
    return text


def choose_tasks(study):
    """--task, or what the set allows; nothing when only an export is asked for."""
    args, dataset = study.args, study.dataset
    if args.task is None:
        if dataset.labels is None and dataset.masks is None:
            study.note(f"{dataset.name} has neither labels nor masks: only collapse can be looked at")
        tasks = [] if args.export or args.features else ["collapse"]
        return ["knn", "linear"] * (dataset.labels is not None) * len(tasks) + ["segment"] * (dataset.masks is not None) * len(tasks) + tasks
    for task in args.task:
        if task in TARGET and getattr(dataset, TARGET[task]) is None:
            able = [t for t in TASKS if t not in TARGET or getattr(dataset, TARGET[t]) is not None]
            raise ValueError(f"--task {task}: {dataset.name} has no {TARGET[task]}; it can be looked at with {', '.join(able)}")
    if args.loss in ("dice", "jaccard") and not {"segment", "unet"} & set(args.task):
        raise ValueError(f"--loss {args.loss} is for masks; --task {' '.join(args.task)} takes ce or balanced")
    return list(dict.fromkeys(args.task))


def conditions(args, task):
    """The cells of the series for one task. The frozen features have no augmentation, and masks no rare class to thin."""
    if task == "collapse":
        return [Condition(None, None, None)]
    imbalance = args.imbalance if TARGET[task] == "labels" else [None]
    return [Condition(*each) for each in itertools.product(args.labels, imbalance, args.augment if task in TRAINED else [None])]


def choose_folder(args, study):
    """--out, or the first free results/NAME. Old results are never written over; the folder is made when there are results."""
    stem = f"results/{study.models[-1].name if args.runs else 'random'}-{study.dataset.name}"
    out = Path(args.out) if args.out else next(p for p in (Path(stem if i == 1 else f"{stem}-{i}") for i in range(1, 10_000)) if not p.exists())
    if (out / "results.json").exists():
        raise ValueError(f"--out {out}: holds results already; choose another")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"--out {out}: {there} is not a folder that can be written to")
    return out


# ---- encoders

def describe(path, args):
    """The row that a run's folder or a file of weights stands for."""
    path = Path(path)
    file, folder = (path / "encoder.pt", path) if path.is_dir() else (path, path.parent)
    if path.is_dir() and not file.is_file():
        raise ValueError(f"{path}: holds no encoder.pt: neither a run nor a file of weights")
    state = files.load_torch(file)
    step = re.fullmatch(r"encoder-(\d+)", file.stem)
    name = folder.resolve().name if file.stem.startswith("encoder") else file.stem
    name += f"@{step[1]}" if step else ""
    if not (folder / "config.json").is_file():
        return Model(name, *guess(state, args, file), file)
    try:
        config = json.loads((folder / "config.json").read_text())
        return Model(name, config["encoder"]["name"], config["encoder"]["stem"], file, config, int(step[1]) if step else None)
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{folder / 'config.json'}: damaged; leave it away and the file is taken as bare weights") from None


def guess(state, args, file):
    """The encoder that keys and shapes fit. The stem "nopool" has the keys of "default": it has to be named."""
    for name in [args.encoder] if args.encoder else encoders.ENCODERS:
        for stem in [args.stem] if args.stem else ("default", "small"):
            try:
                encoders.load(dict(state), encoders.build(name, 1, stem))
                return name, stem
            except ValueError as error:
                why = str(error).removeprefix("the state dict: ")
    if args.encoder:
        raise ValueError(f"{file}: {why}")
    raise ValueError(f"{file}: its keys and shapes are those of none of {', '.join(encoders.ENCODERS)}")


def load_encoder(model, dataset, device):
    """The network with its weights, for images with as many channels as the set has; mean and deviation as the file's neighbour says."""
    beside, channels = model.file.with_suffix(".json"), dataset.images.shape[1]
    about = json.loads(beside.read_text()) if beside.is_file() else {}
    values = [about.get(key) or getattr(dataset, key) for key in ("mean", "std")]
    values = [v if len(v) == channels else [sum(v) / len(v)] * channels for v in values]
    network = encoders.build(model.encoder, channels, model.stem, *values)
    encoders.load(model.file, network)
    if not all(v.isfinite().all() for v in network.state_dict().values()):
        raise ValueError(f"{model.file}: holds weights that are not finite")
    return network.to(device, memory_format=torch.channels_last)


def open_study(args, models, device):
    """The images, all encoders on them, and first of all the random ones. One set of images for all rows: at the size, the channels and the
    column of the first run unless flags say otherwise; an encoder made for other channels gets its first layer summed or spread."""
    run = next((model for model in models if model.config), None)
    made = run.config["data"] | run.config["arguments"] if run else {"data": None, "label": "label", "channels": None, "seed": 0}
    path = args.data or made["data"]
    if path is None:
        raise ValueError("--data FOLDER: no run says which images to look at" if models else "name a run, a file of weights, or --data FOLDER")
    own = path == made["data"]
    channels = args.channels or (run and run.config["data"]["channels"])
    size = args.size or (run and run.config["data"]["size"])
    dataset = data.load(path, size, channels, args.label or (made["label"] if own else "label"), args.cache, made["seed"])
    channels, size = dataset.images.shape[1], dataset.images.shape[2]
    stem = args.stem or ("small" if size < 40 else "default")
    kinds = list(dict.fromkeys((m.encoder, m.stem) for m in models)) or [(args.encoder or ("tiny" if path == "phantoms" else "resnet18"), stem)]
    names = ["random"] if len(kinds) == 1 else [f"random {' '.join(kind)}" for kind in kinds]
    for model, more in itertools.combinations(models, 2):                   # runs/a and old/a
        more.name += f" ({models.index(more) + 1})" * (model.name == more.name)
    study = Study(args, dataset, device, [Model(name, *kind) for name, kind in zip(names, kinds)] + models,
                  np.arange(len(dataset)) if dataset.groups is None else dataset.groups)
    if run and (args.size, args.channels) == (None, None):
        study.note(f"images are loaded as {channels} x {size} x {size}, as {run.name} saw them")
    for model in models:
        model.network = load_encoder(model, dataset, device)
        seen = model.config["data"] if model.config else {"channels": channels, "size": size}
        if (seen["channels"], seen["size"]) != (channels, size):
            study.note(f"{model.name} was trained on {seen['channels']} x {seen['size']} x {seen['size']} images and is scored on "
                       f"{channels} x {size} x {size} ones" + (", its first layer summed or spread over the channels" if seen["channels"] != channels else ""))
    if dataset.splits is None:
        study.dataset = data.split(dataset)
        study.note(f"{dataset.name} has no splits: patients are dealt to train, val and test (70, 10, 20 %) from seed 0; an encoder that was "
                   "pretrained on this set has seen the images that are scored")
    if dataset.groups is None:
        study.note(f"{dataset.name} has no patient numbers: every image counts as a patient of its own, and intervals may be too short")
    return study


# ---- rows

def find_target(study, kind):
    """Labels or masks, with the rows that have one. Sets without a validation split give 15 % of their training patients for it."""
    dataset, values = study.dataset, getattr(study.dataset, kind)
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
            raise ValueError(f"{dataset.name}: no image of the {name} split has a {kind[:-1]}")
    if not len(rows["val"]):
        order = readouts.in_order(rows["train"], study.groups[rows["train"]], strata[rows["train"]], 0)
        rows["val"] = readouts.beginning(order, study.groups[order], "0.15")
        rows["train"] = np.setdiff1d(rows["train"], rows["val"])
        study.note(f"{dataset.name} has no validation split with {kind}: {len(rows['val'])} training images are kept for it")
    seen = {name: set(np.flatnonzero(held[rows[name]].any(0)) if kind == "masks" else values[rows[name]]) for name in rows}
    if len(seen["train"]) < 2:
        raise ValueError(f"{dataset.name}: the training {kind} hold only one class ({classes[min(seen['train'])]}): there is nothing to tell apart")
    for name in ("train", "test"):
        absent = [c for i, c in enumerate(classes) if i not in seen[name]]
        if absent:
            effect = "never predicted, and scored 0 where it occurs" if name == "train" else "left out of the means"
            study.note(f"no image of the {name} split holds class {', '.join(absent)}: {effect}")
    if len(np.unique(study.groups[rows["test"]])) < 20:
        study.note(f"the test split has {len(np.unique(study.groups[rows['test']]))} patients with {kind}: fewer than 20 give too short intervals")
    return Target(values, classes, strata, rows)


def training_rows(study, target, condition, seed):
    """The images that may be learned from in this cell."""
    if seed not in target.orders:
        rows = target.rows["train"]
        target.orders[seed] = readouts.in_order(rows, study.groups[rows], target.strata[rows], seed)
    rows = readouts.beginning(target.orders[seed], study.groups[target.orders[seed]], condition.labels)
    return readouts.thinned(rows, target.strata[rows], target.rare, condition.imbalance) if condition.imbalance else rows


def say_what(study, tasks, cells):
    """What is about to be done, task by task, with numbers of images and patients."""
    args, dataset = study.args, study.dataset
    print(f"{dataset.name}: images {' x '.join(map(str, dataset.images.shape[1:]))}; {len(study.models)} encoders on {study.device}, {args.seeds} seeds")
    for task in tasks:
        if task == "collapse":
            print(f"collapse: {TASKS[task]}; {len(watched(study))} images")
            continue
        target = study.targets[TARGET[task]]
        chosen = "" if task == "knn" else f"chosen on validation: {count(study, target.rows['val'])}; "
        print(f"{task}: {TASKS[task]}{f', after {args.freeze:g} epochs with the encoder frozen' if args.freeze and task in ('finetune', 'unet') else ''}; "
              f"{chosen}scored once on test: {count(study, target.rows['test'])}")
        for condition in dict.fromkeys(c for t, c in cells if t == task):
            each = [training_rows(study, target, condition, seed) for seed in range(args.seeds)]
            print(f"  {report.describe(condition)}: learns from {count(study, each[0])}" + (" (first seed)" if args.seeds > 1 else ""))
            lost = [c for i, c in enumerate(target.classes) if TARGET[task] == "labels" and any(i not in target.values[rows] for rows in each)]
            if lost:
                study.note(f"{report.describe(condition)}: some seeds have no training image of {', '.join(lost)}; scored with what is there")


def count(study, rows):
    patients = len(np.unique(study.groups[rows]))
    return f"{len(rows)} images of {patients} patients" if study.dataset.groups is not None else f"{len(rows)} images"


def watched(study):
    """Up to 1000 test images for the spectrum; every image where there is no test split."""
    rows = study.dataset.rows("test")
    return np.random.default_rng(0).permutation(rows if len(rows) else np.arange(len(study.dataset)))[:1000]


# ---- one cell of the table

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
    rows, test = training_rows(study, target, condition, seed), target.rows["test"]
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
    config = loop.Config(steps=steps, batch=args.batch, optimizer="adamw", lr=args.lr, weight_decay=0.01, warmup=steps // 10, clip=5.0,
                         amp=args.amp, seed=seed, device=args.device)
    drawn = 1 / np.bincount(target.strata[rows])[target.strata[rows]] if args.resample else None
    curve = readouts.tune(method, dataset, rows, validate, config, min(per_epoch, max(1, steps // 10)), frozen, drawn, args.head_lr)
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


# ---- for other programs

def export(study, path):
    """The encoder as it is, and beside it one whose first layer takes 3 channels (a gray image repeated gives the same features)."""
    network, path = copy.deepcopy(study.models[-1].network).cpu(), Path(path)
    encoders.save(network, path)
    written = [str(path)]
    if network.conv1.in_channels == 1:
        network.conv1.weight.data = network.conv1.weight.data.repeat(1, 3, 1, 1) / 3                         # (O, 3, k, k)
        network.mean, network.std = network.mean * 3, network.std * 3
        written.append(str(path.with_name(f"{path.stem}-rgb{path.suffix}")))
        encoders.save(network, written[-1])
    print(f"exported {' and '.join(written)}: torchvision's key names (conv1.weight, bn1.*, layer1.0.conv1.weight, ..., no fc), also timm's and those of "
          "segmentation libraries; load_state_dict(..., strict=False) into a network with an fc; the .json has the mean and deviation to standardise with")


def save_features(study, path):
    dataset = study.dataset
    arrays = {f"features_{report.plain(model.name)}": features_of(study, model, 0)[0].numpy() for model in study.models}
    study.features.pop(None, None)
    arrays |= {"patients": study.groups, "splits": dataset.splits.astype(str)}
    arrays |= {"labels": dataset.labels, "classes": np.array(dataset.classes)} if dataset.labels is not None else {}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"{path}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}")


if __name__ == "__main__":
    cli.run(main)
