"""A set of images, opened as one array.

    dataset = load("phantoms")          the built-in set
    dataset = load(path, size=96)       a folder, split.csv, .npz, .npy or prepared folder, see sources.py
"""

import contextlib
import tempfile
import zipfile
from dataclasses import replace

import numpy as np

from . import phantoms, readers
from .cache import load_rows
from .dataset import LEARNT_FROM, Dataset, split
from .layouts import find
from .sources import Source

__all__ = ["LEARNT_FROM", "Dataset", "deal", "find", "load", "shapes", "split"]


def shapes(source, most=16):
    """Shapes of a few images. What cannot be read is left to decoding, which lists all of it."""
    shapes = []
    with contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile):
        if source.kind == "npz":                                            # says it in its head, without unpacking
            with zipfile.ZipFile(source.path) as archive:
                return [readers.npz_header(archive, "train_images")[0][1:]]
        with tempfile.TemporaryDirectory() as folder:
            read = source.open(folder)[0]
            for row in sorted(set(np.linspace(0, len(source.names) - 1, most).astype(int).tolist())):
                with contextlib.suppress(ValueError, OSError):
                    shapes.append(np.shape(read(row)))
    return shapes


def deal(dataset, seed):
    """New splits for cross-validation: the patients of which any image is labelled are dealt anew from this seed; what
    is wholly unlabeled stays so."""
    dataset = replace(dataset, splits=np.full(len(dataset), "train")) if dataset.splits is None else dataset
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    dealt = np.isin(groups, groups[dataset.splits != "unlabeled"])
    splits = np.full(len(dataset), "unlabeled")
    part = split(replace(dataset, **{key: getattr(dataset, key)[dealt] for key in ("images", "labels", "masks")
                                     if getattr(dataset, key) is not None}, groups=groups[dealt]), seed=seed)
    splits[dealt] = part.splits
    return replace(dataset, splits=splits, mean=part.mean, std=part.std)


def load(path, size=None, channels=None, label="label", cache=None, fit="pad", group_by=None):
    """The data set at `path`, or the built-in "phantoms", always the same patients. `label` names the column of
    split.csv; `group_by` is a regular expression whose first bracket (or whole match) in the relative path is the
    patient, or "parent" for the folder that a file lies in."""
    if str(path) == "phantoms":
        return phantoms.opened(size, channels)
    return load_rows(path if isinstance(path, Source) else find(path, label, group_by), size, channels, cache, fit)[0]
