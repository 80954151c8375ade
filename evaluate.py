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
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from medssl.common import cli, data, encoders, files, loop
from medssl.common.errors import UserError
from medssl.common.evaluation import fits, readouts, report, subsets
from medssl.common.evaluation.fits import CHOSEN, TARGET, TASKS, TRAINED, Condition, Model, Study

STRENGTHS = [f"S{i}" for i in range(7)]


def main(argv=None):
    args = parse(argv)
    device = loop.processes(args.device)[2]
    models = [describe(path, args) for path in args.runs]
    study = open_study(args, models, device)
    tasks = choose_tasks(study)
    study.out = choose_folder(args, study) if tasks else None
    for kind in sorted({TARGET[task] for task in tasks if task in TARGET}):
        study.targets[kind] = subsets.find_target(study.dataset, study.groups, kind, study.note)
    cells = [(task, condition) for task in tasks for condition in conditions(args, task)]
    say_what(study, tasks, cells)
    if args.export:
        export(study, args.export)
    if args.features:
        save_features(study, args.features)

    if not tasks:
        return
    study.out.mkdir(parents=True, exist_ok=True)                            # fails now rather than after an hour
    records, stopped = [], False
    try:
        with tqdm(total=len(cells) * len(study.models) * args.seeds, unit="fit", delay=0.5, dynamic_ncols=True) as bar:
            for seed, model in itertools.product(range(args.seeds), study.models):
                for task, condition in cells:
                    bar.set_postfix_str(f"{model.name}, {task}, seed {seed}", refresh=False)
                    records.append(fits.run(study, task, model, condition, seed))
                    bar.update()
                study.features.pop(None, None)                              # key None: a random encoder's, which serve for one seed only
    except KeyboardInterrupt:
        stopped = True
        print("stopped: what was done so far is written")
    if records:
        report.write(study, records, cells, TASKS)
    if stopped:
        raise KeyboardInterrupt


# ---- the command line

def parse(argv):
    parser = cli.Parser(prog="evaluate.py", description=__doc__.split("\n")[0], epilog="; ".join(f"{k}: {v}" for k, v in TASKS.items()))
    add = parser.add_argument
    add("runs", nargs="*", help="folders of runs, or files of weights (ours, torchvision's, timm's); none: the random encoder alone")
    add("--data", help="default: the first run's; 'phantoms' is built in")
    add("--label", help="column of split.csv (default: the first run's)")
    add("--size", type=cli.positive, help="side of the images (default: the first run's)")
    add("--channels", type=int, choices=(1, 3), help="default: the first run's, else as the images are")
    add("--encoder", choices=encoders.ENCODERS, help="of the weight files, where their keys leave it open, and of the random row without any run")
    add("--stem", choices=encoders.STEMS, help="likewise")
    add("--task", nargs="*", choices=TASKS, help="default: knn linear with labels, segment with masks, collapse always")
    add("--labels", nargs="+", type=amount, default=["1.0"], help="shares of the training images (whole patients), or numbers of images such as 7n")
    add("--imbalance", nargs="+", type=one_or_more, default=[None], help="1: all classes cut to the size of the rarest; 10: and of that one a tenth is kept")
    add("--resample", action="store_true", help="draw every class equally often (linear: weigh it; knn: no effect)")
    add("--augment", nargs="+", choices=STRENGTHS, default=["S1"], help="strength under finetune, segment and unet")
    add("--freeze", type=cli.not_negative, default=0, help="epochs with the encoder frozen before finetune and unet release it")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=cli.positive_number, default=10, help="an epoch has as many steps with few labels as with all")
    length.add_argument("--steps", type=cli.positive)
    add("--batch", type=cli.positive, default=64)
    add("--lr", type=cli.positive_number, default=1e-3, help="AdamW's")
    add("--head-lr", type=cli.positive_number, help="the head's (default: 10 times --lr; --lr for a decoder that was transferred)")
    add("--loss", choices=readouts.LOSSES, help="balanced: class weights; dice (and cross-entropy; default) and jaccard: masks")
    add("--transfer", choices=("encoder", "encoder+decoder"), default="encoder", help="what unet takes from a run that had a decoder")
    add("--seeds", type=cli.positive, default=3, help="of subsets, heads, order and the random encoder")
    add("--out", metavar="DIR", help="default: results/NAME, numbered")
    add("--export", metavar="FILE", help="the one encoder, with torchvision's key names; and FILE-rgb for 3-channel programs")
    add("--features", metavar="FILE.npz", help="pooled features of all images, with labels, patients and splits")
    add("--device", default="auto")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="while training heads and encoders")
    add("--cache", metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.export and len(args.runs) != 1:
        parser.error("--export takes exactly one run or file of weights")
    for flag, path in (("--export", args.export), ("--features", args.features)):
        if path and not Path(path).absolute().parent.is_dir():
            parser.error(f"{flag} {path}: there is no folder {Path(path).parent}")
    return args


def one_or_more(text):
    if not 1 <= cli.not_negative(text):
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
            raise UserError(f"--task {task}: {dataset.name} has no {TARGET[task]}; it can be looked at with {', '.join(able)}")
    if args.imbalance != [None] and not any(TARGET.get(task) == "labels" for task in args.task):
        raise UserError(f"--imbalance thins a class of the labels; --task {' '.join(args.task)} does not use them")
    if args.loss in ("dice", "jaccard") and not {"segment", "unet"} & set(args.task):
        raise UserError(f"--loss {args.loss} is for masks; --task {' '.join(args.task)} takes ce or balanced")
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
        raise UserError(f"--out {out}: holds results already; choose another")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    return out


# ---- encoders

def describe(path, args):
    """The row that a run's folder or a file of weights stands for."""
    path = Path(path)
    file, folder = (path / "encoder.pt", path) if path.is_dir() else (path, path.parent)
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: holds no encoder.pt: neither a run nor a file of weights")
    state = files.load_torch(file)
    step = re.fullmatch(r"encoder-(\d+)", file.stem)
    name = folder.resolve().name if file.stem.startswith("encoder") else file.stem
    name += f"@{step[1]}" if step else ""
    if not (folder / "config.json").is_file():
        return Model(name, *guess(state, args, file), file)
    try:
        config = json.loads((folder / "config.json").read_text())
        _ = [config["arguments"][key] for key in ("data", "label")] + [config["data"][key] for key in ("channels", "size")]
        return Model(name, config["encoder"]["name"], config["encoder"]["stem"], file, config, int(step[1]) if step else None)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'config.json'}: damaged; leave it away and the file is taken as bare weights") from None


def guess(state, args, file):
    """The encoder that keys and shapes fit. The stem "nopool" has the keys of "default": it has to be named."""
    for name in [args.encoder] if args.encoder else encoders.ENCODERS:
        for stem in [args.stem] if args.stem else ("default", "small"):
            try:
                with torch.device("meta"):                                  # shapes without numbers
                    encoders.fitting(state, encoders.build(name, 1, stem))
                return name, stem
            except ValueError as error:
                why = str(error).removeprefix("the state dict: ")
    if args.encoder:
        raise UserError(f"{file}: {why}")
    raise UserError(f"{file}: its keys and shapes are those of none of {', '.join(encoders.ENCODERS)}")


def load_encoder(model, dataset, device):
    """The network with its weights, for images with as many channels as the set has; mean and deviation as the file's neighbour says."""
    beside, channels = model.file.with_suffix(".json"), dataset.images.shape[1]
    try:
        about = json.loads(beside.read_text()) if beside.is_file() else {}
        values = [[float(v) for v in about.get(key) or getattr(dataset, key)] for key in ("mean", "std")]
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{beside}: damaged; it should hold the lists mean and std") from None
    values = [v if len(v) == channels else [sum(v) / len(v)] * channels for v in values]
    network = encoders.build(model.encoder, channels, model.stem, *values)
    encoders.load(model.file, network)
    if not all(v.isfinite().all() for v in network.state_dict().values()):
        raise UserError(f"{model.file}: holds weights that are not finite")
    return network.to(device, memory_format=torch.channels_last)


def open_study(args, models, device):
    """The images, and all encoders on them. One set of images for all rows: at the size, the channels and the column of the first run unless
    flags say otherwise; an encoder made for other channels gets its first layer summed or spread."""
    run = next((model for model in models if model.config), None)
    made = run.config["data"] | run.config["arguments"] if run else {"data": None, "label": "label"}
    path = args.data or made["data"]
    if path is None:
        raise UserError("--data FOLDER: no run says which images to look at" if models else "name a run, a file of weights, or --data FOLDER")
    label = args.label or (made["label"] if made["data"] in (path, str(Path(path).resolve())) else "label")
    size, channels = args.size or (run and run.config["data"]["size"]), args.channels or (run and run.config["data"]["channels"])
    dataset = data.load(path, size, channels, label, args.cache)
    study = Study(args, dataset, device, line_up(models, args, dataset), np.arange(len(dataset)) if dataset.groups is None else dataset.groups)
    if dataset.splits is None:
        study.dataset = dataset = data.split(dataset)
        study.note(f"{dataset.name} has no splits: patients are dealt to train, val and test (70, 10, 20 %) from seed 0; an encoder that was "
                   "pretrained on this set was trained on the images that are scored, though without labels")
    if dataset.groups is None:
        study.note(f"{dataset.name} has no patient numbers: every image counts as a patient of its own, and intervals may be too short")
    shape = dataset.images.shape[1:]
    if run and (args.size, args.channels) == (None, None):
        study.note(f"images are loaded as {' x '.join(map(str, shape))}, as {run.name} saw them")
    for model in models:
        model.network = load_encoder(model, dataset, device)
        seen = model.config["data"] if model.config else {"channels": shape[0], "size": shape[1]}
        if (seen["channels"], seen["size"]) != shape[:2]:
            study.note(f"{model.name} was trained on {seen['channels']} x {seen['size']} x {seen['size']} images and is scored on "
                       f"{' x '.join(map(str, shape))} ones" + ", its first layer summed or spread over the channels" * (seen["channels"] != shape[0]))
    return study


def line_up(models, args, dataset):
    """All rows: a random one for each kind of network, then the encoders, those of one run by their step, each with a name of its own."""
    stem = args.stem or ("small" if dataset.images.shape[2] < 40 else "default")
    kinds = list(dict.fromkeys((m.encoder, m.stem) for m in models)) or [(args.encoder or ("tiny" if args.data == "phantoms" else "resnet18"), stem)]
    names = ["random"] if len(kinds) == 1 else [f"random {' '.join(kind)}" for kind in kinds]
    runs = [model.name.split("@")[0] for model in models]
    models = sorted(models, key=lambda m: (runs.index(m.name.split("@")[0]), m.step or math.inf))
    lined = [Model(name, *kind) for name, kind in zip(names, kinds)] + models
    for number, model in enumerate(lined):                                  # runs/a and old/a
        if model.name in [earlier.name for earlier in lined[:number]]:
            model.name += f" ({number})"
    return lined


# ---- in words

def say_what(study, tasks, cells):
    """What is about to be done, task by task, with numbers of images and patients."""
    args, dataset = study.args, study.dataset
    print(f"{dataset.name}: images {' x '.join(map(str, dataset.images.shape[1:]))}; {len(study.models)} encoders on {study.device}, seeds: {args.seeds}")
    told = set()
    for task in tasks:
        if task == "collapse":
            print(f"collapse: {TASKS[task]}; {len(study.watched())} images")
            continue
        target = study.targets[TARGET[task]]
        chosen = f"{CHOSEN[task]} chosen on validation: {count(study, target.rows['val'])}; " if task in CHOSEN else "nothing is chosen; "
        per_epoch, steps, frozen = fits.schedule(args, task, target)
        length = f" for {steps} steps of {args.batch} ({steps / per_epoch:.3g} epochs)" * (task in TRAINED)
        first = f", in the first {frozen} the encoder is frozen" * (task in ("finetune", "unet") and frozen > 0)
        print(f"{task}: {TASKS[task]}{length}{first}; {chosen}scored once on test: {count(study, target.rows['test'])}")
        for condition in dict.fromkeys(c for t, c in cells if t == task and (TARGET[t], c[:2]) not in told):
            told.add((TARGET[task], condition[:2]))
            condition = condition._replace(augment=None)
            each = [target.training(study.groups, condition.labels, condition.imbalance, seed) for seed in range(args.seeds)]
            print(f"    {report.describe(condition)}: training on {count(study, each[0])}" + (" (first seed)" if args.seeds > 1 else ""))
            lost = [c for i, c in enumerate(target.classes) if TARGET[task] == "labels" and any(i not in target.values[rows] for rows in each)]
            if lost:
                study.note(f"{report.describe(condition)}: in some seeds no training image of {', '.join(lost[:4])}"
                           f"{f' and {len(lost) - 4} more classes' if len(lost) > 4 else ''}; scored with what is there")


def count(study, rows):
    patients = len(np.unique(study.groups[rows]))
    return f"{len(rows)} images of {patients} patients" if study.dataset.groups is not None else f"{len(rows)} images"


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
    arrays = {}
    for model in study.models:
        arrays[f"features_{report.plain(model.name)}"] = fits.features_of(study, model, 0, everything=True)[0].numpy()
        study.features.pop(None, None)
    arrays |= {"patients": study.groups, "splits": dataset.splits}
    arrays |= {"labels": dataset.labels, "classes": np.array(dataset.classes)} if dataset.labels is not None else {}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    print(f"{path}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}")


if __name__ == "__main__":
    cli.run(main)
