"""Sets whose images are rows of arrays.

    set.npz         MedMNIST: train_images, train_labels, val_images, ...
    stack.npy       (N, rows, columns), (N, rows, columns, 3) or (N, channels, rows, columns)
    prepared        what `python -m medssl.common.data PATH --to prepared` wrote (see prepare.py)
    a Dataset       that is in memory already
"""
import csv
import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import readers
from .sources import BUILT_IN, NO_MASK, PREPARED, SEVERAL, UNPACKED, Source

MANY = 2 ** 20                                                              # images, each with some bytes of its own


def from_npz(path):
    with readers.naming(path), zipfile.ZipFile(path) as archive:
        parts, columns = believed(archive, readers.regular(path)), []
        for part in parts:
            with archive.open(f"{part}_labels.npy") as stream:
                columns.append(np.lib.format.read_array(stream, allow_pickle=False))
        labels = np.concatenate(columns).reshape(sum(map(len, columns)), -1)    # (N, labels per image)
    sizes = [len(column) for column in columns]
    names = [f"{part}_images[{row}]" for part, size in zip(parts, sizes, strict=True) for row in range(size)]
    several = labels.shape[1] > 1
    ends = np.cumsum(sizes)

    def open_npz(folder):
        stacks = [stacked(unpacked(path, f"{part}_images.npy", folder), f"{path}: {part}_images") for part in parts]

        def read(row):
            part = np.searchsorted(ends, row, side="right")
            return stacks[part][row - ends[part]]                           # counted from the end
        return read, lambda row: None
    return Source(str(path), "npz", names, [str(path)], open_npz, splits=np.repeat(parts, sizes).tolist(),
                  labels=None if several else list(map(str, labels[:, 0].tolist())),
                  notes=[SEVERAL.format(labels.shape[1])] if several else [])


def believed(archive, packed):
    """The splits in a MedMNIST file of so many bytes. Nothing is unpacked before the headers of all arrays agree."""
    keys = [name.removesuffix(".npy") for name in archive.namelist()]
    parts = [part for part in ("train", "val", "test") if f"{part}_images" in keys]
    if "train" not in parts or any(f"{part}_labels" not in keys for part in parts):
        raise ValueError(f"not a MedMNIST file: no train_images or no labels, but {', '.join(keys)}")
    lost = [f"{part}_labels" for part in ("val", "test") if part not in parts and f"{part}_labels" in keys]
    if lost:
        raise ValueError(f"{lost[0]} without images: the file is damaged, or not a MedMNIST file")
    images = [readers.npz_header(archive, f"{part}_images") for part in parts]
    labels = [readers.npz_header(archive, f"{part}_labels") for part in parts]
    for part, (shape, kind), (named, named_kind) in zip(parts, images, labels, strict=True):
        if shape[:1] != named[:1]:
            raise ValueError(f"not as many labels as images: {part}_images {shape}, {part}_labels {named}")
        if named[1:] != labels[0][0][1:]:
            raise ValueError(f"as many labels per image have to be everywhere: {part}_labels {named}, "
                             f"train_labels {labels[0][0]}")
        if math.prod(named) * named_kind.itemsize > max(MANY, math.prod(shape) * kind.itemsize):
            raise ValueError(f"{part}_labels {named} take more room than the images, so cannot be labels")
        if shape and shape[0] > max(MANY, packed // 4):
            raise ValueError(f"declares {shape[0]} images in {part}_images, too many for its {packed} bytes to be true")
    return parts


def unpacked(path, member, folder):
    """An array of an archive, memory-mapped. It is unpacked to disk in a stream, as it may exceed the memory."""
    with readers.naming(path), zipfile.ZipFile(path) as archive:
        size = archive.getinfo(member).file_size
        if size > shutil.disk_usage(folder).free:
            raise ValueError(f"unpacks to {size / 1e9:.1f} GB, which do not fit beside {folder}; see --cache")
        return np.load(archive.extract(member, Path(folder) / UNPACKED), mmap_mode="r", allow_pickle=False)


def stacked(array, called):
    """An array as (N, rows, columns[, 3])."""
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.shape[3] not in (1, 3):
        array = np.moveaxis(array, 1, 3)                                    # (N, rows, columns, C)
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]                                               # (N, rows, columns)
    if array.ndim not in (3, 4):
        raise UserError(f"{called}: shape {array.shape} is not a stack of images (N, rows, columns[, 3])")
    return array


def from_npy(path):
    stack = stacked(readers.read(path), path)
    names = [f"{path.name}[{row}]" for row in range(len(stack))]
    return Source(str(path), "npy", names, [str(path)], lambda folder: (stack.__getitem__, lambda row: None))


def from_prepared(path, label):
    with readers.naming(path / "table.csv"):
        readers.regular(path / "table.csv")
        with open(path / "table.csv", newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
        columns = {name: [row[name] for row in table] for name in ("label", "group", "split")}
    with readers.naming(path / "info.json"):
        prepared_with = json.loads((path / "info.json").read_text())["label"]
    if label not in ("label", prepared_with):
        raise UserError(f"{path}: prepared without the column {label}; prepare it again with --label {label}")
    images = stacked(readers.read(path / "images.npy"), path / "images.npy")
    masks = readers.read(path / "masks.npy") if (path / "masks.npy").exists() else None         # (N, H, W)
    if len(table) != len(images) or masks is not None and masks.shape != images.shape[:3]:
        raise UserError(f"{path}: table.csv, images.npy and masks.npy do not belong together; prepare it again")

    def read_mask(row):
        return masks[row] if masks is not None and masks[row].min() < NO_MASK else None
    return Source(str(path), PREPARED, [f"image {row}" for row in range(len(table))],
                  [str(path / "info.json"), str(path / "images.npy")],
                  lambda folder: (images.__getitem__, read_mask),
                  masks=None if masks is None else [str(path / "masks.npy")] * len(table),
                  **{f"{name}s": values for name, values in columns.items() if any(values)})


def from_dataset(dataset):
    """A labelled set in memory, so that it can be prepared as files are."""
    images = stacked(dataset.images, dataset.name)
    return Source(dataset.name, BUILT_IN, [f"image {row}" for row in range(len(dataset))], [],
                  lambda folder: (images.__getitem__, dataset.masks.__getitem__),
                  labels=[dataset.classes[label] for label in dataset.labels], groups=list(map(str, dataset.groups)),
                  splits=dataset.splits.tolist(), masks=["its mask"] * len(dataset), grouping="a patient")
