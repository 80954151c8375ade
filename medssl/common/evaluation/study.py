"""What is compared, and on what: the models (the rows of every table) and the images.

A model is a network with its weights, a network with random ones, a file of features that another program made, the
images themselves made tiny, or statistics of their grey values; and `runs/a+statistics` is one beside another.
`rows` always means row numbers of the data set.
"""

import argparse
import copy
import math
import os
import re
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import cli, data, encoders, files
from ..data.dataset import LEARNT_FROM, by
from ..errors import UserError
from ..features import extract, joined, set_statistics, statistics, thumbnails
from . import keep
from .readouts import fingerprint

# In the place of a file, or behind one and a plus: features that nothing has learned.
UNLEARNED = "thumbnails", "statistics"

# One entry of the series that are run; None where a task has no such choice.
Cell = namedtuple("Cell", "task labels imbalance augment stage", defaults=[None] * 4)


@dataclass
class Model:
    """One row of the tables."""
    name: str
    encoder: str | None = None                  # None: there is no network
    stem: str | None = None
    file: Path | None = None                    # None: random weights, or what nothing has learned
    run: object = None                          # files.read_run of the folder that the file lies in
    step: int | None = None                     # of its pretraining, where the file's name says so
    unlearned: str | None = None                # a name of UNLEARNED: its features, or those beside its own
    network: torch.nn.Module | None = None
    features: torch.Tensor | None = None        # (N, D), those that are not the network's
    normalised: bool = False                    # random weights, but BatchNorm's statistics of the training images

    @property
    def random(self):
        return self.file is None and not self.unlearned

    def fresh(self, study, seed):
        """The encoder as it is before a read-out; a random one is drawn anew from every seed."""
        if not self.random:
            return copy.deepcopy(self.network)
        torch.manual_seed(seed)
        dataset = study.dataset
        network = encoders.build(self.encoder, dataset.images.shape[1], self.stem, dataset.mean, dataset.std)
        network.to(study.device, memory_format=torch.channels_last)
        if self.normalised:
            set_statistics(network, dataset.images, study.learnt_from(), study.device)
        return network


@dataclass
class Study:
    args: argparse.Namespace                    # of evaluate.py: the settings of all that is compared
    dataset: data.Dataset
    device: torch.device
    models: list
    groups: np.ndarray                          # (N,) patient of each image
    out: Path | None = None                     # folder of the results
    targets: dict = field(default_factory=dict)                             # "labels", "masks": Target
    notes: list = field(default_factory=list)                               # one line each, said once
    kept: dict = field(default_factory=dict)    # features and hash, by model and stage

    @property
    def seeds(self):
        """Of subsets, heads, order and random networks. Each deal has others, so that an interval over deals holds what
        they draw, too."""
        first = 1000 * (self.args.deal or 0)
        return range(first, first + self.args.seeds)

    def note(self, line):
        if line not in self.notes:
            self.notes.append(line)
            tqdm.write(f"note: {line}")

    def bases_of(self, name):
        """The random models of the same network; features without a network are held against the first kind."""
        own, random = next(m for m in self.models if m.name == name), [m for m in self.models if m.random]
        kind = (own.encoder, own.stem) if own.encoder else (random[0].encoder, random[0].stem)
        return [m.name for m in random if (m.encoder, m.stem) == kind]

    def learnt_from(self):
        """Rows of the training images, labelled or not."""
        rows = self.dataset.rows(*LEARNT_FROM)
        return rows if len(rows) else np.arange(len(self.dataset))

    def watched(self):
        """Up to 1000 test images for the spectrum; of all images where there is no test split."""
        rows = self.dataset.rows("test")
        rows = rows if len(rows) else np.arange(len(self.dataset))
        return np.random.default_rng(0).permutation(rows)[:1000]

    def features(self, model, seed, stage=None):
        """Features (N, D) of all images that read-outs ask for, and the encoder's hash, which extraction must not
        change. stage: of that stage's map, pooled, from 1."""
        if not model.encoder:
            return model.features, None
        if (model.name, stage) not in self.kept:
            network = model.fresh(self, seed)
            before = fingerprint(network)
            asked = [self.watched(), *(self.targets["labels"].rows.values() if "labels" in self.targets else [])]
            rows = np.unique(np.concatenate(asked))
            ask = None if stage is None else lambda x: network.features(x)[stage - 1].mean((2, 3))          # (B, width)
            some = extract(network, self.dataset.images, rows, self.device, ask)
            own = torch.zeros(len(self.dataset), some.shape[1])
            own[rows] = some                                                # (N, D)
            if model.features is not None:
                own = joined([own, model.features], np.intersect1d(rows, self.learnt_from()))
            self.kept[model.name, stage] = own, unchanged(before, network)
        return self.kept[model.name, stage]

    def path_of(self, cell, model, seed):
        """Where a fit is kept."""
        parts = [model.name, *(part for part in cell if part is not None), f"seed{seed}"]
        return self.out / "fits" / f"{file_name('-'.join(map(str, parts)))}.npz"

    def forget_random(self):
        """Before the next seed: its random networks are others."""
        for model, stage in list(self.kept):
            if next(m for m in self.models if m.name == model).random:
                del self.kept[model, stage]


def unchanged(before, network):
    if fingerprint(network) != before:
        raise RuntimeError("the frozen encoder has changed: a mistake in the program, its scores are worth nothing")
    return before


def file_name(text):
    """A name that can be part of a file's."""
    return re.sub(r"[^\w.@+-]+", "_", text)


# ---- opening

def open_study(args, device):
    """The images, and all models on them. One set of images for all rows: at the size, the channels, the column and the
    splits of the first run unless the flags say otherwise."""
    models = [model_of(path, args) for path in args.runs]
    first = next((model for model in models if model.run), None)
    dataset = open_images(args, models, first and first.run)
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    study = Study(args, dataset, device, with_random(models, args, dataset), groups)
    deal_patients(study, [model for model in models if model.run and same_set(model.run, args)])
    if dataset.groups is None:
        study.note(f"{dataset.name} has no patient numbers: every image counts as a patient of its own, and intervals "
                   "may be too short")
    if first and (args.size, args.channels) == (None, None):
        study.note(f"images are loaded as {by(dataset.images.shape[1:])}, as {first.name} saw them")
    for model in models:
        if model.encoder:
            model.network = open_network(model, study)
        if model.encoder is None or model.unlearned:
            model.features = features_of(model, study)
    return study


def same_set(run, args):
    return os.path.realpath(run.data) == os.path.realpath(args.data)


def open_images(args, models, run):
    args.data = args.data or (run and run.data)
    if args.data is None:
        raise UserError("--data FOLDER: no run says which images to look at" if models
                        else "name a run, a file of weights, or --data FOLDER")
    label = args.label or (run.label if run and same_set(run, args) else "label")
    return data.load(args.data, args.size or (run and run.size), args.channels or (run and run.channels), label,
                     args.cache)


def deal_patients(study, runs):
    """Splits where the set has none, and others for cross-validation: as --deal says, or as the first of the runs on
    this set had them."""
    args, dataset, shares = study.args, study.dataset, "train, val and test (70, 10, 20 %)"
    if args.deal is None and runs:
        args.deal = runs[0].run.deal
    if args.deal is not None:
        study.dataset = data.deal(dataset, args.deal)
        study.note(f"the patients of {dataset.name} are dealt anew to {shares}, from seed {args.deal}")
    elif dataset.splits is None:
        study.dataset = data.split(dataset)
        study.note(f"{dataset.name} has no splits: patients are dealt to {shares} from seed 0; an encoder that was "
                   "pretrained on this set was trained on the images that are scored, though without labels")
    for model in (m for m in runs if m.run.deal != args.deal):
        study.note(f"{model.name} was pretrained with other splits (--deal {model.run.deal}): it has seen images that "
                   "are scored here, though without labels")


def features_of(model, study):
    """The features of a file, or those that nothing has learned; or both, side by side."""
    dataset, parts = study.dataset, []
    if model.encoder is None and model.file:
        parts.append(keep.read_features(model.file, dataset, study.note))
    if model.unlearned:
        parts.append(thumbnails(dataset) if model.unlearned == "thumbnails"
                     else statistics(dataset, study.learnt_from()))
    return parts[0] if len(parts) == 1 else joined(parts, study.learnt_from())


def model_of(named, args):
    """The model that a run's folder, a file of weights or of features, or a name of UNLEARNED stands for."""
    path, plus, unlearned = named.rpartition("+")
    if unlearned not in UNLEARNED or Path(named).exists():
        path, plus, unlearned = named, "", None
    elif not path:
        return Model(unlearned, unlearned=unlearned)
    path, more = Path(path), plus + (unlearned or "")
    if path.suffix == ".npz":
        return Model(path.stem + more, file=path, unlearned=unlearned)
    file, folder = (path / "encoder.pt", path) if path.is_dir() else (path, path.parent)
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: holds no encoder.pt: neither a run nor a file of weights")
    step, of_a_run = re.fullmatch(r"encoder-(\d+)", file.stem), (folder / "config.json").is_file()
    by_folder = file.stem.startswith("encoder") or of_a_run and file.stem == "checkpoint"
    name = (Path(os.path.realpath(folder)).name if by_folder else file.stem) + (f"@{step[1]}" if step else "")
    run = files.read_run(folder) if of_a_run else None
    encoder, stem = (run.encoder, run.stem) if run else network_of(file, args)
    for value, choices, what in ((encoder, encoders.ENCODERS, "encoder"), (stem, encoders.STEMS, "stem")):
        cli.one_of(value, choices, f"{what} in the .json of {path}")
    return Model(name + more, encoder, stem, file, run, int(step[1]) if step else None, unlearned)


def network_of(file, args):
    """The encoder and the stem that are asked for, that the file's neighbour names, or that its keys and shapes fit."""
    known = encoders.about(file)
    name, stem = args.encoder or known.get("name"), args.stem or known.get("stem")
    if name and stem:
        return name, stem
    state = files.load_torch(file)
    try:
        fitting = encoders.kind_of(state)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return name or fitting[0], stem or fitting[1]


def open_network(model, study):
    """The network with its weights, for images with as many channels as the set has; mean and deviation as the file's
    neighbour says. A note where it meets other images than it was trained on."""
    dataset, known = study.dataset, encoders.about(model.file)
    channels, *side = dataset.images.shape[1:]
    values = [list(known.get(key) or getattr(dataset, key)) for key in ("mean", "std")]
    if model.run and (len(values[0]), model.run.size) != (channels, side[0]):
        seen, spread = len(values[0]), ", its first layer summed or spread over the channels"
        study.note(f"{model.name} was trained on {by((seen, model.run.size, model.run.size))} images and is scored on "
                   f"{by((channels, *side))} ones{spread * (seen != channels)}")
    values = [v if len(v) == channels else [sum(v) / len(v)] * channels for v in values]
    network = encoders.build(model.encoder, channels, model.stem, *values)
    network.size = known.get("size")                                        # for --export
    encoders.load(model.file, network, study.note)
    if not all(v.isfinite().all() for v in network.state_dict().values()):
        raise UserError(f"{model.file}: holds weights that are not finite")
    return network.to(study.device, memory_format=torch.channels_last)


def with_random(models, args, dataset):
    """All models: two random ones for each kind of network, then the given ones, those of one run by their step, each
    with a name of its own."""
    stem = args.stem or ("small" if dataset.images.shape[2] < 40 else "default")
    kinds = list(dict.fromkeys((m.encoder, m.stem) for m in models if m.encoder))
    kinds = kinds or [(args.encoder or ("tiny" if args.data == "phantoms" else "resnet18"), stem)]
    names = ["random"] if len(kinds) == 1 else [f"random {' '.join(kind)}" for kind in kinds]
    runs = [model.name.split("@")[0] for model in models]
    models = sorted(models, key=lambda m: (runs.index(m.name.split("@")[0]), m.step or math.inf))
    rows = [Model(name + ", normalised" * normalised, *kind, normalised=normalised)
            for name, kind in zip(names, kinds) for normalised in (False, True)] + models
    for number, model in enumerate(rows):                                   # runs/a and old/a
        model.name = model.name.encode("utf-8", "replace").decode()         # a folder's name may be no UTF-8
        if model.name in [earlier.name for earlier in rows[:number]]:
            model.name += f" ({number})"
    return rows
