"""A set opened through the cache: decoded once, then opened as memory maps, so that it may be larger than the memory.

The name of a set's folder in the cache holds a digest of the path, the options and every file's size and time of
change: when one of them changes, the set is decoded anew. Labels, splits and groups are not cached but read each time,
as editing them should cost nothing.
"""
import hashlib
import json
import os
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from . import readers
from .dataset import LEARNT_FROM, SAME_IMAGE, Dataset, numbered, pooled, refuse_leaks
from .decode import Wanted, decode
from .pixels import FITTING, MOST
from .sources import ARRAYS, PREPARED, complain

VERSION = "2"                                                               # counts up when files are decoded otherwise
STALE = 30                                                                  # seconds without a sign of life from a lock


def load_rows(source, size=None, channels=None, cache=None, fit="pad"):
    """Dataset and what is known of each row: hashes (N,), shapes (N, 2) before fitting, moments (N, 2, C)."""
    if fit not in FITTING:
        raise UserError(f"fit={fit}: choose pad, crop or squash")
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: an image has 1 or 3")
    if size is not None and not 1 <= size <= MOST:
        raise UserError(f"size={size}: images have from 1 to {MOST} pixels a side")
    for note in source.notes:
        print(f"{source.name}: {note}")
    refuse_leaks(source, source.groups, "group {}")
    folder = Path(source.path)
    if source.kind != PREPARED or not as_asked(folder, size, channels):
        folder = cached(source, Wanted(size, channels, fit), cache)
    with readers.naming(folder):
        images = np.load(folder / "images.npy", mmap_mode="r")              # (N, C, H, W)
        masks = np.load(folder / "masks.npy", mmap_mode="r") if source.masks else None          # (N, H, W)
        with np.load(folder / "rows.npz", allow_pickle=False) as stored:
            rows = {key: stored[key] for key in ("hashes", "shapes", "moments")}
        mask_classes = tuple(json.loads((folder / "info.json").read_text())["mask_classes"])
    labels, classes = numbered(source.labels) if source.labels else (None, mask_classes)
    groups = None
    if source.groups:
        groups = numbered([group or f"\0{row}" for row, group in enumerate(source.groups)])[0]
    refuse_leaks(source, rows["hashes"].tolist(), *SAME_IMAGE)
    splits = np.array(source.splits) if source.splits else None
    names = None if source.kind in ARRAYS else source.names
    dataset = Dataset(source.name, images, labels, classes, masks, groups, splits, names=names)
    learnt, sums = dataset.rows(*LEARNT_FROM), rows["moments"].astype(np.float64)
    dataset.mean, dataset.std = pooled(sums[learnt] if len(learnt) else sums)
    return dataset, rows


def as_asked(folder, size, channels):
    """Whether a prepared folder's images have this size and these channels (None: any) already."""
    shape = np.load(folder / "images.npy", mmap_mode="r").shape             # (N, C, H, W)
    return channels in (None, shape[1]) and size in (None, shape[2])


def cached(source, wanted, cache):
    """Folder with the decoded set. The first process to come decodes, the others wait for it."""
    root = Path(cache or os.environ.get("MEDSSL_CACHE") or "~/.cache/medssl").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    stem, folder = target(source, wanted, root)
    if folder.is_dir():
        return folder
    own = replace(wanted, channels=None)
    if wanted.channels and (plain := target(source, own, root)[1]).is_dir() \
            and as_asked(plain, None, wanted.channels):                     # decoded with these channels already
        return plain
    with lock(root / f"{stem}.lock"):
        if folder.is_dir():                                                 # another process was faster
            return folder
        for old in root.glob(f"{stem}-*"):                                  # from before a file changed, or half built
            shutil.rmtree(old, ignore_errors=True)
        part = root / f"{stem}-{os.getpid()}.part"
        part.mkdir()
        try:
            build(source, part, wanted)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def target(source, wanted, root):
    """What the names of all folders of a set so decoded start with, and the folder of its files as they are now."""
    asked = (wanted.size, wanted.channels, wanted.fit, bool(source.masks))
    stem = f"{source.name}-{digest([VERSION, os.path.abspath(source.path), *map(str, asked)])}"
    return stem, root / f"{stem}-{digest(stamps(source))}"


def build(source, folder, wanted):
    """Decodes a set into this folder, and says what became of its images."""
    made = decode(source, folder, wanted)
    size, count, notes = made.size, len(made.rows), made.notes
    square = sum(rows == columns != size for rows, columns in made.shapes)
    oblong = sum(rows != columns for rows, columns in made.shapes)
    told = [f"{square} of {count} images are of another size: scaled to {size} x {size}"] * (square > 0)
    told += [f"{oblong} of {count} images are not square: {FITTING[wanted.fit]}"] * (oblong > 0)
    notes = told + notes
    for line in notes:
        print(f"{source.name}: {line}")
    (folder / "info.json").write_text(json.dumps({"mask_classes": made.mask_classes, "notes": notes}))


def digest(lines):
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def stamps(source):
    lines, missing = [], []
    for file in source.files:
        try:
            stat = os.stat(file)
            lines.append(f"{file} {stat.st_size} {stat.st_mtime_ns}")
        except OSError:
            missing.append(f"{file}: no such file")
    complain(source, missing)
    return lines


@contextmanager
def lock(path):
    """One process at a time. The owner touches the file while it lives, so that a lock left behind is recognised."""
    seen, since = None, time.monotonic()
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            if seen is None:
                print(f"waiting for another process, or {STALE} s if it died (lock file {path})")
        try:
            stamp = os.stat(path).st_mtime_ns
        except FileNotFoundError:
            continue
        if stamp != seen:
            seen, since = stamp, time.monotonic()
        elif time.monotonic() - since > STALE:
            path.unlink(missing_ok=True)
        time.sleep(0.2)
    done = threading.Event()

    def touch():
        while not done.wait(STALE / 10):
            with suppress(FileNotFoundError):
                os.utime(path)
    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
