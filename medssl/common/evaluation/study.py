"""What is compared, and on what: the settings, the models (the rows of every table), the images.

A model is a network with its weights, a network with random ones, a file of features that another program made, or
the images themselves, made tiny.
`rows` always means row numbers of the data set.
"""

import copy
import math
import re
from collections import namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .. import data, encoders, files
from ..errors import UserError
from ..features import extract, set_statistics, thumbnails
from . import foreign
from .readouts import fingerprint

THUMBNAILS = "thumbnails"                       # in the place of a file: the images themselves, a few pixels wide

# One entry of the series that are run; None where a task has no such choice.
Cell = namedtuple("Cell", "task labels imbalance augment stage", defaults=[None] * 4)


@dataclass(frozen=True)
class Settings:
    """How the models are compared. The flags of these names say in `evaluate.py --help` what each is."""
    labels: tuple = ("1.0",)
    imbalance: tuple = (None,)
    imbalance_varies: str = "others"
    augment: tuple = ("S1",)
    stage: tuple = (None,)
    resample: bool = False
    freeze: float = 0
    epochs: float = 10
    steps: int | None = None
    batch: int = 64
    optimizer: str = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.01
    loss: str | None = None
    neighbours: int = 20
    transfer: str = "encoder"
    statistics: str = "kept"
    per: str = "image"
    patient_label: str | None = None
    seeds: int = 3
    device: str = "auto"
    amp: str = "off"


@dataclass
class Model:
    """One row of the tables."""
    name: str
    encoder: str | None                         # None: features of another program, or thumbnails
    stem: str | None
    file: Path | None = None                    # or the word THUMBNAILS; None: random weights
    run: files.Run | None = None                # that the file lies in
    step: int | None = None                     # of its pretraining, where the file's name says so
    network: torch.nn.Module | None = None
    features: torch.Tensor | None = None        # (N, D), where there is no encoder
    normalised: bool = False                    # random weights, but BatchNorm's statistics of the training images

    @property
    def random(self):
        return self.file is None

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
    settings: Settings
    dataset: data.Dataset
    device: torch.device
    models: list
    groups: np.ndarray                          # (N,) patient of each image
    out: Path | None = None                     # folder of the results
    targets: dict = field(default_factory=dict)                             # "labels", "masks": Target
    patients: object = None                     # scores.Patients of the test labels, with --per patient
    notes: list = field(default_factory=list)                               # one line each, said once
    kept: dict = field(default_factory=dict)    # features and hash, by model and stage

    def note(self, line):
        if line not in self.notes:
            self.notes.append(line)
            tqdm.write(f"note: {line}")

    def bases_of(self, name):
        """The random models of the same network; features of another program are held against the first kind."""
        own, random = next(m for m in self.models if m.name == name), [m for m in self.models if m.random]
        kind = (own.encoder, own.stem) if own.encoder else (random[0].encoder, random[0].stem)
        return [m.name for m in random if (m.encoder, m.stem) == kind]

    def learnt_from(self):
        """Rows of the training images, labelled or not."""
        rows = self.dataset.rows("train", "unlabeled")
        return rows if len(rows) else np.arange(len(self.dataset))

    def watched(self):
        """Up to 1000 test images for the spectrum; of all images where there is no test split."""
        rows = self.dataset.rows("test")
        rows = rows if len(rows) else np.arange(len(self.dataset))
        return np.random.default_rng(0).permutation(rows)[:1000]

    def features(self, model, seed, stage=None):
        """Features (N, D) of all images that read-outs ask for, and the encoder's hash, which extraction must not
        change. stage: of that stage's map, pooled, from 1."""
        if model.features is not None:
            return model.features, None
        if (model.name, stage) not in self.kept:
            network = model.fresh(self, seed)
            before = fingerprint(network)
            asked = [self.watched(), *(self.targets["labels"].rows.values() if "labels" in self.targets else [])]
            rows = np.unique(np.concatenate(asked))
            ask = None if stage is None else lambda x: network.features(x)[stage - 1].mean((2, 3))          # (B, width)
            found = extract(network, self.dataset.images, rows, self.device, ask)
            features = torch.zeros(len(self.dataset), found.shape[1])
            features[rows] = found                                          # (N, D)
            self.kept[model.name, stage] = features, unchanged(before, network)
        return self.kept[model.name, stage]

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

@dataclass(frozen=True)
class Where:
    """Which images to look at, and what to take a file for that does not say so. None: as the first run has it."""
    data: str | None = None
    label: str | None = None
    size: int | None = None
    channels: int | None = None
    encoder: str | None = None
    stem: str | None = None
    cache: str | None = None


def open_study(paths, where, settings, device):
    """The images, and all models on them. One set of images for all rows: at the size, the channels and the column of
    the first run unless told otherwise; an encoder made for other channels gets its first layer summed or spread."""
    models = [describe(path, where) for path in paths]
    first = next((model for model in models if model.run), None)
    dataset = open_images(where, models, first and first.run)
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    study = Study(settings, dataset, device, line_up(models, where, dataset), groups)
    if dataset.splits is None:
        study.dataset = dataset = data.split(dataset)
        study.note(f"{dataset.name} has no splits: patients are dealt to train, val and test (70, 10, 20 %) from seed "
                   "0; an encoder that was pretrained on this set was trained on the images that are scored, though "
                   "without labels")
    if dataset.groups is None:
        study.note(f"{dataset.name} has no patient numbers: every image counts as a patient of its own, and intervals "
                   "may be too short")
    if first and (where.size, where.channels) == (None, None):
        study.note(f"images are loaded as {by(dataset.images.shape[1:])}, as {first.name} saw them")
    for model in models:
        if model.encoder:
            model.network = open_network(model, study)
        elif model.features is None:
            model.features = thumbnails(dataset)
        else:
            model.features = foreign.line_up(model.features, dataset, model.file, study.note)
    return study


def by(shape):
    return " x ".join(map(str, shape))


def open_images(where, models, run):
    path = where.data or (run and run.data)
    if path is None:
        raise UserError("--data FOLDER: no run says which images to look at" if models
                        else "name a run, a file of weights, or --data FOLDER")
    own = run and run.data in (path, str(Path(path).resolve()))
    return data.load(path, where.size or (run and run.size), where.channels or (run and run.channels),
                     where.label or (run.label if own else "label"), where.cache)


def describe(path, where):
    """The model that a run's folder, a file of weights or of features, or the word THUMBNAILS stands for."""
    named, path = path, Path(path)
    if named == THUMBNAILS and not path.exists():
        return Model(THUMBNAILS, None, None, path)
    if path.suffix == ".npz":
        return Model(path.stem, None, None, path, features=foreign.read(path))
    file, folder = (path / "encoder.pt", path) if path.is_dir() else (path, path.parent)
    if path.is_dir() and not file.is_file():
        raise UserError(f"{path}: holds no encoder.pt: neither a run nor a file of weights")
    state = files.load_torch(file)
    step, of_a_run = re.fullmatch(r"encoder-(\d+)", file.stem), (folder / "config.json").is_file()
    by_folder = file.stem.startswith("encoder") or of_a_run and file.stem == "checkpoint"
    name = (folder.resolve().name if by_folder else file.stem) + (f"@{step[1]}" if step else "")
    if not of_a_run:
        return Model(name, *guess(state, where, file), file)
    run = files.read_run(folder)
    check_kind(folder / "config.json", run.encoder, run.stem)
    return Model(name, run.encoder, run.stem, file, run, int(step[1]) if step else None)


def guess(state, where, file):
    """The encoder and the stem that are asked for, that the file's neighbour names, or that keys and shapes fit."""
    known = encoders.about(file)
    name, stem = where.encoder or known.get("name"), where.stem or known.get("stem")
    check_kind(file.with_suffix(".json"), name, stem)
    if not (name and stem):
        try:
            kind = encoders.kind_of(state)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        name, stem = name or kind[0], stem or kind[1]
    return name, stem


def check_kind(file, name, stem):
    """Whether there is such an encoder and such a stem; None is left open."""
    for value, choices in ((name, encoders.ENCODERS), (stem, encoders.STEMS)):
        if value and value not in tuple(choices):
            raise UserError(f"{file}: says {value}, which is none of {', '.join(choices)}; put it right or remove it")


def open_network(model, study):
    """The model's network, with a note where it meets other images than it was trained on."""
    shape, seen = study.dataset.images.shape[1:], None
    if model.run:
        seen = model.run.channels, model.run.size
    if seen and seen != shape[:2]:
        spread = ", its first layer summed or spread over the channels" * (seen[0] != shape[0])
        study.note(f"{model.name} was trained on {by((*seen, seen[1]))} images and is scored on {by(shape)} ones"
                   + spread)
    network = load_network(model, study)
    if study.settings.statistics == "data":
        set_statistics(network, study.dataset.images, study.learnt_from(), study.device)
    return network


def load_network(model, study):
    """The network with its weights, for images with as many channels as the set has; mean and deviation as the file's
    neighbour says."""
    dataset, known = study.dataset, encoders.about(model.file)
    channels = dataset.images.shape[1]
    try:
        values = [[float(v) for v in known.get(key) or getattr(dataset, key)] for key in ("mean", "std")]
    except (ValueError, TypeError):
        raise UserError(f"{model.file.with_suffix('.json')}: damaged; it should hold the lists mean and std") from None
    values = [v if len(v) == channels else [sum(v) / len(v)] * channels for v in values]
    network = encoders.build(model.encoder, channels, model.stem, *values)
    network.size = known.get("size")                                        # for --export
    encoders.load(model.file, network, study.note)
    if not all(v.isfinite().all() for v in network.state_dict().values()):
        raise UserError(f"{model.file}: holds weights that are not finite")
    return network.to(study.device, memory_format=torch.channels_last)


def line_up(models, where, dataset):
    """All models: two random ones for each kind of network, then the given ones, those of one run by their step, each
    with a name of its own."""
    stem = where.stem or ("small" if dataset.images.shape[2] < 40 else "default")
    kinds = list(dict.fromkeys((m.encoder, m.stem) for m in models if m.encoder))
    kinds = kinds or [(where.encoder or ("tiny" if where.data == "phantoms" else "resnet18"), stem)]
    names = ["random"] if len(kinds) == 1 else [f"random {' '.join(kind)}" for kind in kinds]
    runs = [model.name.split("@")[0] for model in models]
    models = sorted(models, key=lambda m: (runs.index(m.name.split("@")[0]), m.step or math.inf))
    lined = [Model(name + ", normalised" * normalised, *kind, normalised=normalised)
             for name, kind in zip(names, kinds) for normalised in (False, True)] + models
    for number, model in enumerate(lined):                                  # runs/a and old/a
        if model.name in [earlier.name for earlier in lined[:number]]:
            model.name += f" ({number})"
    return lined
