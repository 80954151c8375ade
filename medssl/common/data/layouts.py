"""What a path holds: `find` tells the layouts apart, sources.py and stacks.py read them.

    folder or split.csv         see sources.py
    .npz .npy prepared folder   see stacks.py
"""
import contextlib
import os
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import readers
from .sources import ARRAYS, PREPARED, from_csv, from_files, from_folder, is_solid
from .stacks import from_npy, from_npz, from_prepared


def find(path, label="label", group_by=None, volumes=False):
    """The Source behind a path. Volumes are refused unless asked for: they have to be cut into slices first."""
    try:
        str(path).encode()
        path = Path(os.path.abspath(Path(path).expanduser()))
        path.stat()
    except UnicodeEncodeError:
        raise UserError(f"{str(path)!a}: the name is no UTF-8; rename it") from None
    except (RuntimeError, ValueError) as error:                             # ~nosuchuser; a zero byte
        raise UserError(f"{path!s}: not a path ({error})") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder (the built-in set is called phantoms)") from None
    except OSError as error:                                                # a link to itself, a folder of others
        raise UserError(f"{path}: {error.strerror}") from None
    source = layout(path, label)
    if label != "label" and source.kind not in ("split.csv", PREPARED):
        raise UserError(f"{path}: label={label} picks a column of a split.csv, and there is none")
    if source.volumes and not volumes:
        more = ", ..." if len(source.volumes) > 1 else ""
        what = "DICOM files" if readers.kind_of(source.volumes[0]) in readers.DICOM else "volumes"
        raise UserError(f"{path}: holds {what} ({source.volumes[0]}{more}): cut them into slices first with "
                        f"`python -m medssl.common.data {path} --to FOLDER`, then open FOLDER")
    if group_by:
        source.groups, source.grouping = grouped(source, group_by), "what --group-by finds in the file names"
        if group_by == "parent" and source.kind == "class folders":
            source.kind, source.labels = "one folder per group", None       # the folders are patients then, not classes
    return source


def shapes(source, most=16):
    """Shapes (rows, columns[, 3]) of a few evenly spread images. What cannot be read is left to decoding, which lists
    all of it."""
    some = []
    with contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile):
        if source.kind == "npz":                                            # says it in its head, without unpacking
            with zipfile.ZipFile(source.path) as archive:
                return [readers.npz_header(archive, "train_images")[0][1:]]
        with tempfile.TemporaryDirectory() as folder:
            read = source.open(folder)[0]
            for row in sorted(set(np.linspace(0, len(source.names) - 1, most).astype(int).tolist())):
                with contextlib.suppress(ValueError, OSError):
                    some.append(np.shape(read(row)))
    return some


def layout(path, label):
    """The Source that the kind of path calls for."""
    kind = readers.suffix(path.name)
    if path.is_dir() and (path / "images.npy").is_file() and (path / "info.json").is_file():
        return from_prepared(path, label)
    if path.is_dir() and (path / "split.csv").is_file():
        return from_csv(path / "split.csv", label)
    if path.is_dir():
        return from_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: neither a file nor a folder, but a pipe, socket or device")
    if kind == ".csv":
        return from_csv(path, label)
    if kind == ".npz":
        return from_npz(path)
    if kind == ".npy":
        return from_npy(path)
    if is_solid(str(path)):
        return from_files(path, "one volume", [path.name], [str(path)])
    way = readers.way_out(kind)
    raise UserError(f"{path}: {kind} {way}" if way else
                    f"{path}: a set is a folder, split.csv, .npz or .npy, not a single {kind or 'unnamed'} file")


def patient_hint(names):
    """A line about names such as P012_03.png that look like several files of one patient, or ""."""
    found = [re.match(r"([A-Za-z]*)\d+(?=[_-])", os.path.basename(name)) for name in names or []]
    if not found or not all(found) or len({match[1] for match in found}) > 1:
        return ""
    pattern = f"{found[0][1]}\\d+"
    groups = [match[0] for match in found]
    if not 1 < len(set(groups)) <= len(groups) / 2 or [re.search(pattern, name)[0] for name in names] != groups:
        return ""
    return f"files that look like one patient: `--group-by '{pattern}'` makes {len(set(groups))} groups"


def grouped(source, pattern):
    """The group of each image, from its name."""
    if source.kind in ARRAYS:
        raise UserError(f"{source.path}: --group-by looks at file names, and a {source.kind} has none")
    try:
        found = [re.search(".*(?=/)" if pattern == "parent" else pattern, name) for name in source.names]
    except re.error as error:
        raise UserError(f"--group-by {pattern}: not a regular expression ({error})") from None
    groups = [match and match.group(bool(match.re.groups)) for match in found]
    missed = [name for name, group in zip(source.names, groups, strict=True) if not group]
    if missed:
        raise UserError(f"--group-by {pattern}: does not match {len(missed)} of {len(found)} names, first {missed[0]}")
    return groups
