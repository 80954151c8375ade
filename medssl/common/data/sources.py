"""What a folder or table of files holds, before any pixel is decoded: the images' names, labels, masks, splits, groups.

    folder          images at any depth; one folder per class; images/ beside masks/ (or labels/);
                    train/, val/, test/ above any of these
    split.csv       in the folder: columns file, label, split, group, ...; a label is a class, a mask's path, or empty

How a plain folder is read: pictures exactly one folder deep belong to the class that the folder is named after;
pictures that lie deeper, and volumes in folders, have no label, and the folder they lie in is their group. A group is
whatever must not be torn apart by a split: a patient, a smear, a volume. A mask belongs to the image of the same name
in images/.

DICOM files are known by their ending or, without one, by their first bytes. A folder that holds nothing but several
slices of one series is one volume; any other DICOM file is a picture. Their groups are the patients that PatientID
tells apart; it names a person, so only a number is kept of it.
"""
import csv
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import readers

FLAT = readers.IMAGES + (".npy",)                                           # endings of pictures
SOLID = readers.VOLUMES + readers.DICOM                                     # of what has to be prepared first
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"}
SAVED = re.compile(r"(train|val|test)\d+_(\d+(?:_\d+)*)\.\w+")              # how medmnist's .save() names a picture
MONTAGE = "_montage.jpg"
SHEET = "contact_sheet.png"                                                 # drawn of a set, and none of its images
COLUMNS = ("file", "label", "mask", "split", "group")                       # of a table
SEPARATOR = re.compile(r"[|;]")                                             # between the labels of one image
SEVERAL = "{} labels per image: none of them can be the class, so they are left out (no labels)"
PREPARED = "prepared folder"
BUILT_IN = "built in"
ARRAYS = ("npz", "npy", PREPARED, BUILT_IN)                                 # sets whose images are rows, not files
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
    grouping: str = ""                                                      # what a group is, in words
    notes: tuple | list = ()                                                # to be said whenever the set is opened

    @property
    def name(self):
        return re.sub(r"[^\w-]", "_", Path(self.path).name.split(".")[0]) or "set"


def complain(source, problems):
    """Error that lists what is wrong with some of a source's images."""
    if problems:
        listed = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise UserError(f"{source.path}: {len(problems)} of {len(source.names)} images cannot be used: {listed}. "
                        f"`python -m medssl.common.data {source.path} --to FOLDER --skip-unreadable` leaves them out")


def is_solid(file):
    """Whether this has to be prepared first: a volume, a DICOM file, or a folder of DICOM slices."""
    if file.lower().endswith(FLAT):
        return False
    return readers.kind_of(file) in SOLID or os.path.isdir(file)


def from_files(path, kind, names, files, masks=None, **lists):
    """A source of image files, and of mask files ("" = none)."""
    masks = masks if masks and any(masks) else None
    volumes = [name for name, file in zip(names, files, strict=True) if is_solid(file)]
    read = readers.read_volume if volumes else readers.read

    def open_files(folder):
        def read_mask(row):
            return readers.read_mask(masks[row], files[row]) if masks and masks[row] else None
        return lambda row: read(files[row]), read_mask
    watched = files + [mask for mask in masks or [] if mask]
    return Source(str(path), kind, names, watched, open_files, masks=masks, volumes=volumes, **lists)


# ---- tables

def from_csv(path, label):
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            text = file.read()
        if "\0" in text:                                                    # no path may hold it
            raise csv.Error("it holds a zero byte")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
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
    labels, notes = one_each(labels, [name for name in columns if name not in COLUMNS])
    inside = os.path.dirname(path)
    files = [os.path.join(inside, name) for name in names]
    groups, grouping = column("group"), "what the column `group` says"
    if not groups or not any(groups):
        groups, grouping = patients(files)
    return from_files(inside if path.name == "split.csv" else path, "split.csv", names, files,
                      masks and [mask and os.path.join(inside, mask) for mask in masks],
                      labels=labels, groups=groups, grouping=grouping,
                      splits=splits and [SPLITS[value.lower()] for value in splits], notes=notes if not masks else ())


def one_each(labels, others):
    """The labels, unless some images have several of them, and notes on what is lost. others: columns that have no
    meaning here."""
    if not labels:
        return labels, [f"no column `label`: --label learns from one of {', '.join(others)}"] if others else ()
    several = max(labels, key=lambda label: len(SEPARATOR.split(label)))
    count = len(SEPARATOR.split(several))
    return (labels, ()) if count == 1 else (None, [SEVERAL.format(f"up to {count}") + f": {several}"])


# ---- folders

def from_folder(path):
    names, splits, masks = image_names(path), None, None
    if not names:
        foreign = next((file for file in sorted(Path(path).rglob("*")) if readers.way_out(readers.suffix(file))), None)
        raise UserError(f"{path}: no images found ({' '.join(FLAT + SOLID)})"
                        + (f"; {foreign.name}: {readers.way_out(readers.suffix(foreign))}" if foreign else ""))
    if saved_by_medmnist(names):
        return from_medmnist(path, names)
    parts = [name.split("/") for name in names]
    if all(len(part) > 1 and part[0].lower() in SPLITS for part in parts):
        splits = [SPLITS[part[0].lower()] for part in parts]
        parts = [part[1:] for part in parts]
    tops = {part[0] for part in parts if len(part) > 1}
    if "images" in tops and tops & {"masks", "labels"}:
        rows, masks = paired(path, names, parts, splits)
        names, parts, splits = [[values[row] for row in rows] if values else None for values in (names, parts, splits)]
    if all(part[0] == "images" for part in parts):
        parts = [part[1:] for part in parts]
    files = [os.path.join(path, name) for name in names]
    parents = ["/".join(part[:-1]) for part in parts]
    kind, labels, notes = "images and masks" if masks else "folder of images", None, []
    groups, grouping = patients(files)
    solid = any(is_solid(file) and not is_dicom(file) for file in files)
    if not masks and not solid and all(len(part) == 2 for part in parts):   # beside masks, folders are patients
        if len(set(parents)) > 1:
            kind, labels = "class folders", parents
        else:
            notes = [f"only one folder ({parents[0]}), so only one class: no labels"]
    if len(set(parents)) > 1 and not labels and not groups and (masks or not splits):
        groups, grouping = parents, "the folder"
    return from_files(path, kind, names, files, masks, labels=labels, groups=groups, splits=splits, grouping=grouping,
                      notes=notes)


def paired(path, names, parts, splits):
    """The rows of the images in images/, and the mask of each in masks/ or labels/, "" = none."""
    stems = [(splits and splits[row], *part[1:-1], part[-1].removesuffix(readers.suffix(part[-1])))
             for row, part in enumerate(parts)]
    by_stem = {stems[row]: names[row] for row, part in enumerate(parts) if part[0] in ("masks", "labels")}
    rows = [row for row, part in enumerate(parts) if part[0] == "images"]
    masks = [by_stem.pop(stems[row], "") for row in rows]
    if by_stem:
        raise UserError(f"{path}: {len(by_stem)} masks have no image of their name, first {min(by_stem.values())}")
    return rows, [mask and os.path.join(path, mask) for mask in masks]


def image_names(path):
    """Relative paths of all pictures and volumes below a folder, in order. A folder with several links to it, or one
    to itself, is visited once."""
    names, visited = [], set()
    for folder, folders, files in os.walk(path, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in visited:
            folders.clear()
            continue
        visited.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = sorted(name for name in files if not name.startswith(".") and is_image(os.path.join(folder, name)))
        below = os.path.relpath(folder, path).replace(os.sep, "/")
        if is_series([os.path.join(folder, name) for name in inside]):
            names.append(below)                                             # the folder is one volume
        else:
            names += inside if below == "." else [f"{below}/{name}" for name in inside]
    return names


def is_image(file):
    return os.path.basename(file) != SHEET and (file.lower().endswith(FLAT + SOLID) or is_dicom(file))


# ---- folders that medmnist's .save() wrote

def saved_by_medmnist(names):
    """Whether pictures in one folder are called {split}{number}_{label}[_{label}...].png; montages may lie beside."""
    names = [name for name in names if not name.endswith(MONTAGE)]
    return (bool(names) and len({os.path.dirname(name) for name in names}) == 1
            and all(SAVED.fullmatch(os.path.basename(name)) for name in names))


def from_medmnist(path, names):
    names = [name for name in names if not name.endswith(MONTAGE)]
    found = [SAVED.fullmatch(os.path.basename(name)).groups() for name in names]
    splits, labels = [split for split, _ in found], [label for _, label in found]
    several = labels[0].count("_") + 1
    return from_files(path, "pictures saved by medmnist", names, [os.path.join(path, name) for name in names],
                      labels=labels if several == 1 else None, splits=splits,
                      notes=[SEVERAL.format(several)] if several > 1 else [])


# ---- DICOM

def is_dicom(file):
    return readers.kind_of(file) in readers.DICOM


def is_series(files):
    """Whether DICOM files are slices of one volume (X-rays of many patients are not): two at the start and one at the
    end tell."""
    if len(files) < 2 or not all(map(is_dicom, files)):
        return False
    heads = [head(file) for file in (*files[:2], files[-1])]
    return all(head and head.picture and head.series for head in heads) and len({head.series for head in heads}) == 1


def head(file):
    """What a DICOM file, or the first of a folder of slices, says of itself; None if it says nothing. What is wrong
    with the file will be listed when it is decoded."""
    if os.path.isdir(file):
        inside = (os.path.join(file, name) for name in sorted(os.listdir(file)))
        file = next(filter(is_dicom, inside), file)
    try:
        return readers.dicom_head(file) if is_dicom(file) else None
    except UserError:
        return None


def patients(files):
    """The group of each file and what it is in words: of DICOM files the patient, or else the series, and "" of others.
    Only a number is kept, as a PatientID names a person. (None, "") if no file says anything."""
    numbers, groups = {}, []
    for file in files:
        told = None if file.lower().endswith(FLAT) else head(file)
        key = told and (("patient", told.patient) if told.patient else ("series", told.series) if told.series else None)
        groups.append(f"patient {numbers.setdefault(key, len(numbers) + 1)}" if key else "")
    if not numbers:
        return None, ""
    without = sum(kind == "series" for kind, _ in numbers)
    if without == len(numbers):
        return groups, "the DICOM series, as the files have no PatientID"
    return groups, "the PatientID of the DICOM files" + (f" ({without} series have none)" if without else "")
