"""What a path holds, before any pixel is decoded: the images' names, labels, masks, splits and groups.

    folder          images at any depth; one folder per class; images/ beside masks/ (or labels/);
                    train/, val/, test/ above any of these
    split.csv       in the folder: columns file, label, split, group, ...; a label is a class, a mask's path, or empty
    set.npz         MedMNIST: train_images, train_labels, val_images, ...
    stack.npy       (N, rows, columns), (N, rows, columns, 3) or (N, channels, rows, columns)
    prepared        what `python -m medssl.common.data PATH --to prepared` wrote (see prepare.py)

How a plain folder is read: pictures exactly one folder deep belong to the class that the folder is named after;
pictures that lie deeper, and volumes in folders, have no label, and the folder they lie in is their group. A group is
whatever must not be torn apart by a split: a patient, a smear, a volume. A mask belongs to the image of the same name
in images/.
"""
import csv
import json
import os
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import UserError
from . import readers

FLAT = readers.IMAGES + (".npy",)                                           # endings of pictures
SOLID = readers.VOLUMES + readers.DICOM                                     # of what has to be prepared first
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"}
PREPARED = "prepared folder"
ARRAYS = ("npz", "npy", PREPARED)                                           # sets whose images are rows, not files
NO_MASK = 255
UNPACKED = "unpacked"                                                       # folder that is deleted after decoding


@dataclass
class Source:
    """What was found. Every list has one entry per image."""
    path: str
    kind: str                                                               # in words
    names: list                                                             # what messages call each image
    files: list                                                             # every file whose change must be noticed
    open: Callable                                                          # open(folder) -> read(row), read_mask(row)
    labels: list | None = None                                              # class names, "" = none
    groups: list | None = None                                              # "" = a group of its own
    splits: list | None = None
    masks: list | None = None                                               # paths, "" = none
    volumes: tuple | list = ()                                              # names of volumes among the images

    @property
    def name(self):
        return re.sub(r"[^\w-]", "_", Path(self.path).name.split(".")[0]) or "set"


def find(path, label="label", group_by=None, volumes=False):
    """The Source behind a path. Volumes are refused unless asked for: they have to be cut into slices first."""
    path = Path(os.path.abspath(Path(path).expanduser()))
    kind = readers.suffix(path.name)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (the built-in set is called phantoms)")
    if path.is_dir() and (path / "images.npy").is_file() and (path / "info.json").is_file():
        source = from_prepared(path, label)
    elif path.is_dir() and (path / "split.csv").is_file():
        source = from_csv(path / "split.csv", label)
    elif path.is_dir():
        source = from_folder(path)
    elif kind == ".csv":
        source = from_csv(path, label)
    elif kind == ".npz":
        source = from_npz(path)
    elif kind == ".npy":
        source = from_npy(path)
    elif kind in SOLID:
        source = from_files(path, "one volume", [path.name], [str(path)])
    else:
        raise UserError(f"{path}: a set is a folder, split.csv, .npz or .npy, not a single {kind or 'unnamed'} file")
    if label != "label" and source.kind not in ("split.csv", PREPARED):
        raise UserError(f"{path}: label={label} picks a column of a split.csv, and there is none")
    if source.volumes and not volumes:
        more = ", ..." if len(source.volumes) > 1 else ""
        raise UserError(f"{path}: holds volumes ({source.volumes[0]}{more}): cut them into slices first with "
                         f"`python -m medssl.common.data {path} --to FOLDER`, then open FOLDER")
    if group_by:
        source.groups = grouped(source, group_by)
        if group_by == "parent" and source.kind == "class folders":
            source.kind, source.labels = "one folder per group", None       # the folders are patients then, not classes
    return source


def complain(source, problems):
    """Error that lists what is wrong with some of a source's images."""
    if problems:
        listed = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise UserError(f"{source.path}: {len(problems)} of {len(source.names)} images cannot be used: {listed}. "
                        f"`python -m medssl.common.data {source.path} --to FOLDER --skip-unreadable` leaves them out")


def is_solid(file):
    """Whether this is a volume: by its ending, or a folder of DICOM slices."""
    return file.lower().endswith(SOLID) or not file.lower().endswith(FLAT) and os.path.isdir(file)


def grouped(source, pattern):
    """The group of each image, from its name."""
    if source.kind in ARRAYS:
        raise UserError(f"{source.path}: --group-by looks at file names, and a {source.kind} has none")
    if pattern == "parent":
        return [os.path.dirname(name) for name in source.names]
    try:
        found = [re.search(pattern, name) for name in source.names]
    except re.error as error:
        raise UserError(f"--group-by {pattern}: not a regular expression ({error})") from None
    groups = [match and match.group(bool(match.re.groups)) for match in found]
    missed = [name for name, group in zip(source.names, groups, strict=True) if not group]
    if missed:
        raise UserError(f"--group-by {pattern}: does not match {len(missed)} of {len(found)} names, first {missed[0]}")
    return groups


def from_files(path, kind, names, files, masks=None, **lists):
    """A source of image files, and of mask files ("" = none)."""
    masks = masks if masks and any(masks) else None
    volumes = [name for name, file in zip(names, files, strict=True) if is_solid(file)]
    read = readers.read_volume if volumes else readers.read

    def open_files(folder):
        return lambda row: read(files[row]), lambda row: read_mask(masks[row]) if masks and masks[row] else None
    watched = files + [mask for mask in masks or [] if mask]
    return Source(str(path), kind, names, watched, open_files, masks=masks, volumes=volumes, **lists)


def read_mask(path):
    """Class indices. A palette is only how a mask is shown, so its indices are taken as they are."""
    if readers.suffix(path) == ".png":
        try:
            with Image.open(path) as picture:
                if picture.mode == "P":
                    return np.array(picture)
        except OSError:
            pass                                                            # the reader knows how to say what is wrong
    return readers.read_volume(path)


def from_csv(path, label):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, columns = list(reader), reader.fieldnames or []
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a table in UTF-8 with commas ({error})") from None
    if "file" not in columns:
        raise UserError(f"{path}: no column `file` among {', '.join(columns)} (the delimiter is a comma)")
    if label not in columns and label != "label":
        raise UserError(f"{path}: no column {label}; there are {', '.join(columns)}")
    if not rows:
        raise UserError(f"{path}: no rows")
    wide = next((number for number, row in enumerate(rows, 2) if None in row), None)
    if wide:
        raise UserError(f"{path}: line {wide} has more fields than the header; quote a name that holds a comma")

    def column(name):
        return [row[name].strip() for row in rows] if name in columns else None

    names, splits, chosen = column("file"), column("split"), column(label)
    for number, value in enumerate(splits or [], 2):
        if value.lower() not in SPLITS:
            raise UserError(f"{path}: line {number}: split `{value}` is none of train, val, test, unlabeled")
    labels, masks = None, None
    for values in column("mask"), column("label"), chosen:                  # `label=type` does not take the masks away
        paths = [readers.suffix(value) in FLAT + SOLID for value in values or [] if value]
        if any(paths) and not all(paths):
            raise UserError(f"{path}: a label column holds both classes and paths of masks ({values[0]}, ...)")
        masks = values if any(paths) else masks
        labels = chosen if paths and not any(paths) and values == chosen else labels
    inside = os.path.dirname(path)
    return from_files(inside if path.name == "split.csv" else path, "split.csv", names,
                      [os.path.join(inside, name) for name in names],
                      masks and [mask and os.path.join(inside, mask) for mask in masks],
                      labels=labels, groups=column("group"),
                      splits=splits and [SPLITS[value.lower()] for value in splits])


def from_folder(path):
    names = image_names(path)
    if not names:
        raise UserError(f"{path}: no images found ({' '.join(FLAT + SOLID)})")
    parts, splits, masks = [name.split("/") for name in names], None, None
    if all(len(part) > 1 and part[0].lower() in SPLITS for part in parts):
        splits = [SPLITS[part[0].lower()] for part in parts]
        parts = [part[1:] for part in parts]
    tops = {part[0] for part in parts if len(part) > 1}
    if "images" in tops and tops & {"masks", "labels"}:
        stems = [(splits and splits[row], *part[1:-1], part[-1].removesuffix(readers.suffix(part[-1])))
                 for row, part in enumerate(parts)]
        by_stem = {stems[row]: names[row] for row, part in enumerate(parts) if part[0] in ("masks", "labels")}
        rows = [row for row, part in enumerate(parts) if part[0] == "images"]
        masks = [by_stem.pop(stems[row], "") for row in rows]
        masks = [mask and os.path.join(path, mask) for mask in masks]
        if by_stem:
            raise UserError(f"{path}: {len(by_stem)} masks have no image of their name, first {min(by_stem.values())}")
        names, parts, splits = [[values[row] for row in rows] if values else None for values in (names, parts, splits)]
    if all(part[0] == "images" for part in parts):
        parts = [part[1:] for part in parts]
    parents = ["/".join(part[:-1]) for part in parts]
    kind, labels, groups = "images and masks" if masks else "folder of images", None, None
    pictures = all(name.lower().endswith(FLAT) for name in names)
    if len(set(parents)) > 1 and pictures and all(len(part) == 2 for part in parts):
        kind, labels = "class folders", parents
    elif len(set(parents)) > 1 and not splits:                              # who made the splits knew the patients
        groups = parents
    files = [os.path.join(path, name) for name in names]
    return from_files(path, kind, names, files, masks, labels=labels, groups=groups, splits=splits)


def image_names(path):
    """Relative paths of all pictures and volumes below a folder, in order."""
    names = []
    for folder, folders, files in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = sorted(name for name in files if not name.startswith(".") and name.lower().endswith(FLAT + SOLID))
        below = os.path.relpath(folder, path).replace(os.sep, "/")
        slices = [name for name in inside if name.lower().endswith(readers.DICOM)]
        if len(slices) == len(inside) > 1 and is_series(folder, slices):
            names.append(below)                                             # the folder is one volume
        else:
            names += inside if below == "." else [f"{below}/{name}" for name in inside]
    return names


def is_series(folder, names):
    """Whether DICOM files are slices of one volume (X-rays of many patients are not): the first two tell."""
    heads = []
    for path in (os.path.join(folder, name) for name in names[:2]):
        with readers.naming(path):
            heads.append(readers.open_dicom(path, stop_before_pixels=True).get("SeriesInstanceUID"))
    return heads[0] is not None and heads[0] == heads[1]


def from_npz(path):
    with readers.naming(path), np.load(path, allow_pickle=False) as archive:
        parts = [part for part in ("train", "val", "test") if f"{part}_images" in archive.files]
        if "train" not in parts or any(f"{part}_labels" not in archive.files for part in parts):
            raise UserError(f"not a MedMNIST file: no train_images or no labels, but {', '.join(archive.files)}")
        columns = [archive[f"{part}_labels"] for part in parts]
    names = [f"{part}_images[{row}]" for part, rows in zip(parts, columns, strict=True) for row in range(len(rows))]
    splits = [part for part, rows in zip(parts, columns, strict=True) for _ in rows]
    labels = np.concatenate(columns).reshape(len(names), -1)                # (N, labels per image)
    classes = list(map(str, labels[:, 0])) if labels.shape[1] == 1 else None    # of several labels none is the class
    ends = np.cumsum([len(rows) for rows in columns])

    def open_npz(folder):                                                   # unpacked to disk: may exceed the memory
        with readers.naming(path), zipfile.ZipFile(path) as members:
            unpacked = [members.extract(f"{part}_images.npy", Path(folder) / UNPACKED) for part in parts]
        stacks = [open_stack(file, f"{path}: {part}_images") for file, part in zip(unpacked, parts, strict=True)]
        if [len(stack) for stack in stacks] != [len(rows) for rows in columns]:
            raise UserError(f"{path}: not as many labels as images")

        def read(row):
            part = np.searchsorted(ends, row, side="right")
            return stacks[part][row - ends[part]]                           # counted from the end
        return read, lambda row: None
    return Source(str(path), "npz", names, [str(path)], open_npz, labels=classes, splits=splits)


def open_stack(path, called):
    """The images of a .npy as (N, rows, columns[, 3]), memory-mapped."""
    try:
        stack = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{called}: not a whole array of numbers ({str(error).splitlines()[0]})") from None
    if stack.ndim == 4 and stack.shape[1] in (1, 3) and stack.shape[3] not in (1, 3):
        stack = np.moveaxis(stack, 1, 3)                                    # (N, rows, columns, C)
    if stack.ndim == 4 and stack.shape[3] == 1:
        stack = stack[..., 0]                                               # (N, rows, columns)
    if stack.ndim not in (3, 4) or stack.size == 0:
        raise UserError(f"{called}: shape {stack.shape} is not a stack of images (N, rows, columns[, 3])")
    return stack


def from_npy(path):
    stack = open_stack(path, path)
    names = [f"{path.name}[{row}]" for row in range(len(stack))]
    return Source(str(path), "npy", names, [str(path)], lambda folder: (stack.__getitem__, lambda row: None))


def from_prepared(path, label):
    with open(path / "table.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    if label not in ("label", json.loads((path / "info.json").read_text())["label"]):
        raise UserError(f"{path}: prepared without the column {label}; prepare it again with --label {label}")
    columns = {name: [row[name] for row in table] for name in ("label", "group", "split")}
    masks = [str(path / "masks.npy")] * len(table) if (path / "masks.npy").is_file() else None

    def open_prepared(folder):
        images = open_stack(path / "images.npy", path)
        classes = np.load(path / "masks.npy", mmap_mode="r") if masks else None

        def read_mask(row):
            return classes[row] if classes[row].min() < NO_MASK else None
        return images.__getitem__, read_mask
    return Source(str(path), PREPARED, [f"image {row}" for row in range(len(table))],
                  [str(path / "info.json"), str(path / "images.npy")], open_prepared, masks=masks,
                  **{f"{name}s": values for name, values in columns.items() if any(values)})
