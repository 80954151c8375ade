"""What a path holds, before any pixel is decoded: one table with a row an image.

    folder          images at any depth; one folder per class; images/ beside masks/ (or labels/);
                    train/, val/, test/ above any of these
    split.csv       in the folder: columns file, label, split, group, ...; a label is a class, a mask's path, or empty
    set.npz         MedMNIST: train_images, train_labels, val_images, ...
    stack.npy       (N, rows, columns), (N, rows, columns, 3) or (N, channels, rows, columns)

How a plain folder is read: pictures exactly one folder deep belong to the class that the folder is named after.
Pictures that lie deeper, or in folders below images/ beside masks/, have no label, and the folder they lie in is their
group. A group is whatever must not be torn apart by a split: a patient, a smear, a volume. A mask belongs to the image
of the same name.
"""

import csv
import io
import os
import re
import stat
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
VOLUMES = (".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr", ".dcm", ".dicom")
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test", "unlabeled": "unlabeled", "unlabelled": "unlabeled"}
COLUMNS = ("file", "label", "mask", "split", "group")                       # of a table
SEVERAL = "{} labels per image: none of them can be the class, so they are left out (no labels)"


@dataclass
class Source:
    """What stands at a path. Every list has one entry per image."""
    path: str
    kind: str                                                               # in words
    names: list                                                             # what messages call each image
    files: list | None = None                                               # None: rows of arrays
    labels: list | None = None                                              # class names, "" = none
    masks: list | None = None                                               # paths, "" = none
    splits: list | None = None
    groups: list | None = None                                              # "" = a group of its own
    grouping: str = ""                                                      # what a group is, in words
    notes: tuple | list = ()                                                # to be said whenever the set is opened
    sample: list | None = None                                              # shapes and types, see decode.sample

    @property
    def name(self):
        return re.sub(r"[^\w-]", "_", Path(self.path).name.split(".")[0]) or "set"


def find(path, label="label", group_by=None, volumes=False):
    """The Source behind a path. Volumes are refused unless asked for: they have to be cut into slices first."""
    path = existing(path)
    if path.is_dir() and (path / "split.csv").is_file():
        source = from_csv(path / "split.csv", label)
    elif path.is_dir():
        source = from_folder(path)
    elif path.suffix == ".csv":
        source = from_csv(path, label)
    elif path.suffix == ".npz":
        source = from_npz(path)
    elif path.suffix == ".npy":
        source = from_npy(path)
    elif is_volume(path.name, path):
        source = Source(str(path), "one volume", [path.name], [str(path)])
    else:
        raise UserError(f"{path}: a set is a folder, split.csv, .npz or .npy, not a single {path.suffix or 'unnamed'} "
                        "file")
    if label != "label" and source.kind != "split.csv":
        raise UserError(f"{path}: --label {label} picks a column of a split.csv, and there is none")
    solid = next((name for name, file in zip(source.names, source.files or ()) if is_volume(name, file)), None)
    if solid and not volumes:
        raise UserError(f"{path}: holds volumes or DICOM files ({solid}, ...): cut them into slices first with `python "
                        f"-m medssl.common.data {path} --to FOLDER`, then open FOLDER")
    if group_by:
        group(source, group_by)
    return source


def existing(path):
    """The path in full, or why it cannot be one."""
    try:
        str(path).encode()
        path = Path(os.path.abspath(Path(path).expanduser()))
        mode = path.stat().st_mode
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is no UTF-8; rename it") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder (the built-in set is called phantoms)") from None
    except (RuntimeError, ValueError, OSError) as error:                    # ~nosuchuser; a zero byte; a link to itself
        raise UserError(f"{path!s}: {error}") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path}: neither a file nor a folder, but a pipe, socket or device")
    return path


@contextmanager
def naming(path):
    """What goes wrong inside becomes one line with the path; decoders raise anything, from SyntaxError on."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise UserError(f"{path}: cannot be read: {reason}") from error


def is_volume(name, file):
    """Whether this has to be cut into slices first. DICOM files are also known by their first bytes."""
    if name.lower().endswith(VOLUMES):
        return True
    if name.lower().endswith((*PICTURES, ".npy")) or "." in os.path.basename(name) or not os.path.isfile(file):
        return False
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def group(source, pattern):
    """Sets the group of each image, from its name."""
    if not source.files:
        raise UserError(f"{source.path}: --group-by looks at file names, and a {source.kind} has none")
    try:
        matches = [re.search(".*(?=/)" if pattern == "parent" else pattern, name) for name in source.names]
    except re.error as error:
        raise UserError(f"--group-by {pattern}: not a regular expression ({error})") from None
    groups = [match and match.group(bool(match.re.groups)) for match in matches]
    missed = [name for name, own in zip(source.names, groups) if not own]
    if missed:
        raise UserError(f"--group-by {pattern}: does not match {len(missed)} of {len(groups)} names, first {missed[0]}")
    source.groups, source.grouping = groups, "what --group-by finds in the file names"
    if pattern == "parent" and source.kind == "class folders":
        source.kind, source.labels = "one folder per group", None           # the folders are patients then, not classes


# ---- tables

def from_csv(path, label):
    rows, columns = table(path)
    if label not in columns and label != "label":
        raise UserError(f"{path}: no column {label}; there are {', '.join(columns)}")

    def column(name):
        return [row[name].strip() for row in rows] if name in columns else None

    splits, chosen = column("split"), column(label)
    for number, value in enumerate(splits or [], 2):
        if value.lower() not in SPLITS:
            raise UserError(f"{path}: line {number}: split `{value}` is none of train, val, test, unlabeled")
    labels, masks, notes, inside = None, None, [], os.path.dirname(path)
    for values in column("mask"), column("label"), chosen:                  # --label does not take the masks away
        paths = [value.lower().endswith((*PICTURES, ".npy", *VOLUMES)) for value in values or [] if value]
        if any(paths) and not all(paths):
            raise UserError(f"{path}: a label column holds both classes and paths of masks ({values[0]}, ...)")
        masks = values if any(paths) else masks
        labels = chosen if paths and not any(paths) and values == chosen else labels
    most = max((len(re.split("[|;]", label)) for label in labels or []), default=1)
    if most > 1:
        labels, notes = None, [SEVERAL.format(f"up to {most}")]
    elif not labels and not masks and (others := [name for name in columns if name not in COLUMNS]):
        notes = [f"no column `label`: --label learns from one of {', '.join(others)}"]
    groups = column("group")
    return Source(str(inside if path.name == "split.csv" else path), "split.csv", column("file"),
                  [os.path.join(inside, name) for name in column("file")], labels,
                  masks and [mask and os.path.join(inside, mask) for mask in masks],
                  splits and [SPLITS[value.lower()] for value in splits], groups if any(groups or []) else None,
                  "what the column `group` says", notes)


def table(path):
    """The lines of a table as dicts, and its columns."""
    with naming(path), open(path, newline="", encoding="utf-8-sig") as file:
        text = file.read()
        if "\0" in text:                                                    # older Pythons have other words for it
            raise ValueError("a zero byte")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="", strict=True)
        rows, columns = list(reader), reader.fieldnames or []
    if "file" not in columns:
        raise UserError(f"{path}: no column `file` among {', '.join(columns)} (the delimiter is a comma)")
    if not rows:
        raise UserError(f"{path}: no rows")
    for number, row in enumerate(rows, 2):
        if None in row:
            raise UserError(f"{path}: line {number} has more fields than the header; quote a name that holds a comma")
    return rows, columns


# ---- folders

def from_folder(path):
    names = image_names(path)
    if not names:
        raise UserError(f"{path}: no images found ({' '.join((*PICTURES, '.npy', *VOLUMES))})")
    parts, splits, masks = [name.split("/") for name in names], None, None
    if all(len(part) > 1 and part[0].lower() in SPLITS for part in parts):
        splits = [SPLITS[part[0].lower()] for part in parts]
        parts = [part[1:] for part in parts]
    tops = {part[0] for part in parts if len(part) > 1}
    if "images" in tops and tops & {"masks", "labels"}:
        rows, masks = paired(path, names, parts, splits)
        names, parts, splits = [[values[row] for row in rows] if values else None for values in (names, parts, splits)]
    if all(part[0] == "images" for part in parts):
        parts = [part[1:] for part in parts]
    parents = ["/".join(part[:-1]) for part in parts]
    source = Source(str(path), "images and masks" if masks else "folder of images", names,
                    [os.path.join(path, name) for name in names], masks=masks, splits=splits)
    several = len(set(parents)) > 1
    if not masks and all(len(part) == 2 for part in parts) and not any(map(is_volume, names, source.files)):
        if several:
            source.kind, source.labels = "class folders", parents
        else:
            source.notes = [f"only one folder ({parents[0]}), so only one class: no labels"]
    if several and not source.labels and (masks or not splits):             # beside masks, folders are patients
        source.groups, source.grouping = parents, "the folder"
    return source


def paired(path, names, parts, splits):
    """The rows of the images in images/, and the mask of each in masks/ or labels/, "" = none."""
    stems = [(splits and splits[row], *part[1:-1], re.sub(r"(\.nii)?\.\w+$", "", part[-1]))
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
        below = os.path.relpath(folder, path).replace(os.sep, "/")
        names += [name if below == "." else f"{below}/{name}" for name in sorted(files) if not name.startswith(".")
                  and (name.lower().endswith((*PICTURES, ".npy")) or is_volume(name, os.path.join(folder, name)))]
    for name in names:
        existing(os.path.join(path, name))                                  # no pipe, and a name that can be printed
    return names


# ---- arrays

def from_npz(path):
    """A MedMNIST file. Its images are unpacked when they are decoded."""
    with naming(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        parts = [part for part in ("train", "val", "test") if f"{part}_images" in keys or f"{part}_labels" in keys]
        wanted = [f"{part}_{what}" for part in parts or ["train"] for what in ("images", "labels")]
        lacking = [key for key in wanted if key not in keys]
        if lacking or parts[0] != "train":
            raise UserError(f"{path}: not a whole MedMNIST file: no {', '.join(lacking) or 'train_images'}, but "
                            f"{', '.join(keys)}")
        columns = [labels_of(archive, f"{part}_labels") for part in parts]
        sizes = [header(archive, f"{part}_images")[0][0] for part in parts]
    for part, column, size in zip(parts, columns, sizes):
        if len(column) != size or column.shape[1:] != columns[0].shape[1:]:
            raise UserError(f"{path}: {part}_images holds {size} images, {part}_labels is {column.shape}")
    labels = np.concatenate(columns).reshape(sum(sizes), -1)                # (N, labels per image)
    several = labels.shape[1] > 1
    names = [f"{part}_images[{row}]" for part, size in zip(parts, sizes) for row in range(size)]
    return Source(str(path), "npz", names, labels=None if several else list(map(str, labels[:, 0].tolist())),
                  splits=np.repeat(parts, sizes).tolist(),
                  notes=[SEVERAL.format(labels.shape[1])] if several else [])


def header(archive, name):
    """Shape and type of an array in an archive, without unpacking it."""
    with archive.open(f"{name}.npy") as stream:
        shape, _, dtype = read_header(stream)
    if dtype.hasobject or not shape:
        raise UserError(f"{archive.filename}: {name} is {dtype} {shape}, not a stack of images")
    return shape, dtype


def read_header(stream):
    version = np.lib.format.read_magic(stream)
    return (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(stream)


def labels_of(archive, name):
    """A whole array of an archive."""
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def rows_of(source):
    """The images of an .npz or .npy one after the other, each (rows, columns[, 3]): an .npz is unpacked on the way."""
    if source.kind == "npy":
        yield from stack_of(source.path)
        return
    with zipfile.ZipFile(source.path) as archive:
        for part in dict.fromkeys(source.splits):
            with archive.open(f"{part}_images.npy") as stream:
                shape, by_column, dtype = read_header(stream)
                if by_column:
                    raise ValueError(f"{part}_images is stored column by column; save it with numpy.savez once more")
                for _ in range(shape[0]):
                    data = stream.read(int(np.prod(shape[1:])) * dtype.itemsize)
                    yield standing(np.frombuffer(data, dtype).reshape(1, *shape[1:]), source.path)[0]


def stack_of(path):
    with naming(path):
        return standing(np.load(path, mmap_mode="r", allow_pickle=False), path)


def standing(stack, path):
    """An array as (N, rows, columns[, 3])."""
    if stack.ndim == 4 and stack.shape[1] in (1, 3) and stack.shape[3] not in (1, 3):
        stack = np.moveaxis(stack, 1, 3)                                    # (N, rows, columns, C)
    if stack.ndim == 4 and stack.shape[3] == 1:
        stack = stack[..., 0]                                               # (N, rows, columns)
    if stack.ndim not in (3, 4):
        raise UserError(f"{path}: shape {stack.shape} is not a stack of images (N, rows, columns[, 3])")
    return stack


def from_npy(path):
    return Source(str(path), "npy", [f"{path.name}[{row}]" for row in range(len(stack_of(path)))])
