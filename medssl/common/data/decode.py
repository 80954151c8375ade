"""From the files of a set to one array.

Every image is decoded once, by several threads, into a folder of the cache: images.npy (opened as a memory map, so
that the set may be larger than the memory), masks.npy, and rows.npz with a hash, the original shape and the moments
of the intensities of each image. The name of that folder holds a digest of the path, the options and every file's
size and time of change: when one of them changes, the set is decoded anew. Labels, splits and groups are not cached
but read each time, as editing them should cost nothing.

One channel stays one channel and 16 bits stay 16 bits. Images become squares of `size` pixels: the common size where
all are equal and square, else the median longer side rounded to a multiple of 32. fit="pad" (default) scales the
longer side to `size` and adds black (class 0 in masks) to the shorter one, "crop" cuts out the central square first,
"squash" ignores the aspect. Masks take the same way, with the nearest pixel's value.
"""
import hashlib
import json
import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from .dataset import LEARNT_FROM, SAME_IMAGE, Dataset, moments, numbered, pooled, refuse_leaks
from .sources import ARRAYS, NO_MASK, PREPARED, UNPACKED

SAMPLE = 64                                                             # images that size, channels, type are chosen by
CHUNK = 2 ** 20                                                             # pixels that a thread decodes in one go
STALE = 30                                                                  # seconds without a sign of life from a lock


def load_rows(source, size=None, channels=None, cache=None, fit="pad"):
    """Dataset and what is known of each row: hashes (N,), shapes (N, 2) before fitting, moments (N, 2, C)."""
    if fit not in ("pad", "crop", "squash"):
        raise UserError(f"fit={fit}: choose pad, crop or squash")
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: an image has 1 or 3")
    if size is not None and size < 1:
        raise UserError(f"size={size}: images need at least one pixel")
    refuse_leaks(source, source.groups, "group {}")
    folder = Path(source.path)
    if source.kind != PREPARED or not as_asked(folder, size, channels):
        folder = cached(source, size, channels, fit, cache)
    images = np.load(folder / "images.npy", mmap_mode="r")                  # (N, C, H, W)
    masks = np.load(folder / "masks.npy", mmap_mode="r") if source.masks else None              # (N, H, W)
    with np.load(folder / "rows.npz", allow_pickle=False) as stored:
        rows = {key: stored[key] for key in stored.files}

    labels, classes = numbered(source.labels) if source.labels else (None, ())
    if labels is None and source.masks:
        classes = tuple(json.loads((folder / "info.json").read_text())["mask_classes"])
    groups = None
    if source.groups:
        groups = numbered([group or f"\0{row}" for row, group in enumerate(source.groups)])[0]
    refuse_leaks(source, rows["hashes"].tolist(), *SAME_IMAGE)
    splits = np.array(source.splits) if source.splits else None
    dataset = Dataset(source.name, images, labels, classes, masks, groups, splits)
    dataset.names = None if source.kind in ARRAYS else source.names
    learnt = dataset.rows(*LEARNT_FROM)
    dataset.mean, dataset.std = pooled(rows["moments"][learnt] if len(learnt) else rows["moments"])
    return dataset, rows


def as_asked(folder, size, channels):
    """Whether a prepared folder's images have this size and these channels (None: any) already."""
    shape = np.load(folder / "images.npy", mmap_mode="r").shape             # (N, C, H, W)
    return channels in (None, shape[1]) and size in (None, shape[2])




# ---- decoding

def cached(source, size, channels, fit, cache):
    """Folder with the decoded set. The first process to come decodes, the others wait for it."""
    root = Path(cache or os.environ.get("MEDSSL_CACHE") or "~/.cache/medssl").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    asked = digest(["1", os.path.abspath(source.path), str(size), str(channels), fit, str(bool(source.masks))])
    stem = f"{source.name}-{asked}"
    folder = root / f"{stem}-{digest(stamps(source))}"
    if folder.is_dir():
        return folder
    with lock(root / f"{stem}.lock"):
        if folder.is_dir():                                                 # another process was faster
            return folder
        for old in root.glob(f"{stem}-*"):                                  # from before a file changed, or half built
            shutil.rmtree(old, ignore_errors=True)
        part = root / f"{stem}-{os.getpid()}.part"
        part.mkdir()
        try:
            build(source, part, size, channels, fit)
            shutil.rmtree(part / UNPACKED, ignore_errors=True)
            os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


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


def complain(source, problems):
    if problems:
        listed = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise UserError(f"{source.path}: {len(problems)} of {len(source.names)} images cannot be used: {listed}. "
                         f"`python -m medssl.common.data {source.path} --to FOLDER --skip-unreadable` leaves them out")


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


def workers():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build(source, folder, size, channels, fit):
    """Decodes every image of a source into images.npy, masks.npy, rows.npz and info.json in this folder."""
    pool = ThreadPoolExecutor(workers())                                    # Pillow and numpy let other threads run
    try:
        read, read_mask = source.open(folder)
        count, asked = len(source.names), channels
        size, channels, dtype = plan(source, read, size, channels, pool)
        needed = count * size * size * (channels * dtype.itemsize + bool(source.masks))
        if needed > shutil.disk_usage(folder).free:
            raise UserError(f"{folder.parent}: {needed / 1e9:.1f} GB of decoded images do not fit here; see --cache")
        images = np.lib.format.open_memmap(folder / "images.npy", "w+", dtype, (count, channels, size, size))
        masks = None
        if source.masks:
            masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, (count, size, size))
        hashes, shapes = np.zeros(count, np.uint64), np.zeros((count, 2), np.int32)
        sums, masked = np.zeros((count, 2, channels)), np.zeros(count, bool)
        chunk = max(1, CHUNK // (size * size * channels))

        def decode(first):
            """One chunk; returns what is wrong with its images, and how often its masks hold each value."""
            wrong, values, rows = [], np.zeros(256, np.int64), range(first, min(first + chunk, count))
            for row in rows:
                try:
                    image = pixels(read(row), source.names[row], dtype)
                    if image.ndim == 3 and channels == 1 and not asked:
                        raise UserError(f"{source.names[row]}: in colour, others are gray: choose --channels 1 or 3")
                    images[row] = planes(fitted(image, size, fit), channels)
                    hashes[row], shapes[row] = pixel_hash(image), image.shape[:2]
                    mask = class_indices(read_mask(row), image, source, row)
                    if mask is not None:
                        masks[row], masked[row] = fitted(mask, size, fit, Image.NEAREST), True
                        values += np.bincount(mask.ravel(), minlength=256)
                    elif source.masks:
                        masks[row] = NO_MASK
                except (ValueError, OSError) as error:
                    wrong.append(str(error))
            sums[rows.start:rows.stop] = moments(images[rows.start:rows.stop])
            return wrong, values

        problems, values, starts = [], np.zeros(256, np.int64), range(0, count, chunk)
        with tqdm(total=count, desc=f"decoding {source.name}", unit=" images", leave=False) as bar:
            for first, (wrong, seen) in zip(starts, pool.map(decode, starts)):
                problems, values = problems + wrong, values + seen
                bar.update(min(chunk, count - first))
    finally:
        pool.shutdown(cancel_futures=True)
    complain(source, problems)
    other = int((shapes != size).any(1).sum())
    notes = [f"{other} of {count} images are not {size} x {size}: {FITTING[fit]}"] if other else []
    mask_classes, note = settle_masks(source.path, masks, masked, values) if source.masks else ((), [])
    for line in notes + note:
        print(f"{source.name}: {line}")
    np.savez(folder / "rows.npz", hashes=hashes, shapes=shapes, moments=sums)
    (folder / "info.json").write_text(json.dumps({"mask_classes": mask_classes, "notes": notes + note}))


FITTING = {"pad": "scaled by their longer side and padded with black", "crop": "central square cut out and scaled",
           "squash": "squashed to a square"}


def plan(source, read, size, channels, pool):
    """Size, channels and type, from a sample of the images."""
    def look(row):
        try:
            return pixels(read(row), source.names[row])
        except (ValueError, OSError):
            return np.zeros((0, 0), np.uint8)                              # decoding lists it with all others that fail
    sample = sorted(set(np.linspace(0, len(source.names) - 1, SAMPLE).astype(int)))
    seen = [image for image in pool.map(look, sample) if image.size] or [np.zeros((32, 32), np.uint8)]
    size = size or common_size([image.shape for image in seen])
    return size, channels or max(3 if image.ndim == 3 else 1 for image in seen), seen[0].dtype


def common_size(shapes):
    sides = np.array([shape[:2] for shape in shapes])                       # (sample, 2)
    return int(sides.min() if sides.min() == sides.max() else max(32, 32 * round(np.median(sides.max(1)) / 32)))


def pixels(image, name, dtype=None):
    """The image if it is one: (rows, columns) or (rows, columns, 3) of 8 or 16 bits, like the others of its set."""
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise UserError(f"{name}: a stack or volume of shape {image.shape}, not one image: prepare it first (--to)")
    image = image.astype(np.uint8) * 255 if image.dtype == bool else image
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name}: {image.dtype} pixels have no fixed range: prepare them first (--to, --window)")
    if dtype is not None and image.dtype != dtype:
        raise UserError(f"{name}: {image.dtype} pixels, where others have {dtype}: two scales in one set")
    return image


def class_indices(mask, image, source, row):
    """The mask as (rows, columns) uint8, or None."""
    if mask is None:
        return None
    if mask.ndim == 3 and image.ndim >= 2 and mask.shape[2] == 3 and (mask[..., :1] == mask).all():
        mask = mask[..., 0]                                                 # gray saved as colour
    if mask.shape != image.shape[:2]:
        raise UserError(f"mask {source.masks[row]} is {by(mask.shape)}, but its image {source.names[row]} is "
                         f"{by(image.shape[:2])}")
    if mask.min() < 0 or mask.max() > 255 or (mask.dtype.kind == "f" and (mask % 1 != 0).any()):
        raise UserError(f"mask {source.masks[row]} holds values from {mask.min()} to {mask.max()}, not class indices")
    return mask.astype(np.uint8)


def by(shape):
    return " x ".join(map(str, shape))


def settle_masks(path, masks, masked, values):
    """Names of the mask classes, and a note if 0 and 255 became 0 and 1. `values` counts each value's pixels."""
    found = np.flatnonzero(values)
    if set(found) <= {0, 255} and 255 in found:
        for row in np.flatnonzero(masked):
            masks[row] //= 255
        return ("0", "1"), ["masks hold 0 and 255: read as classes 0 and 1"]
    if list(found) != list(range(len(found))):
        raise UserError(f"{path}: masks hold the values {' '.join(map(str, found[:20]))}; class indices run 0, 1, 2, "
                         "... without a gap (0 = background): renumber them")
    return tuple(map(str, found)), []


def fitted(image, size, fit, method=Image.BILINEAR):
    """A square (size, size[, 3]) of an image or mask (rows, columns[, 3])."""
    rows, columns = image.shape[:2]
    if rows == columns == size:
        return image
    if fit == "squash":
        return resized(image, size, size, method)
    if fit == "crop":
        side = min(rows, columns)
        top, left = (rows - side) // 2, (columns - side) // 2
        return resized(image[top:top + side, left:left + side], size, size, method)
    rows, columns = (max(1, round(n * size / max(rows, columns))) for n in (rows, columns))
    square = np.zeros((size, size, *image.shape[2:]), image.dtype)
    top, left = (size - rows) // 2, (size - columns) // 2
    square[top:top + rows, left:left + columns] = resized(image, rows, columns, method)
    return square


def resized(image, rows, columns, method):
    if image.shape[:2] == (rows, columns):
        return image
    if image.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((columns, rows), method))
    layers = [image[..., c] for c in range(3)] if image.ndim == 3 else [image]                 # 16 bits: only as floats
    layers = [np.asarray(Image.fromarray(layer.astype(np.float32)).resize((columns, rows), method)) for layer in layers]
    return np.rint(np.stack(layers, -1)).astype(image.dtype).reshape(rows, columns, *image.shape[2:])


def planes(image, channels):
    """(rows, columns[, 3]) -> (channels, rows, columns)"""
    if image.ndim == 3:
        return image.transpose(2, 0, 1) if channels == 3 else gray(image)[None]
    return image[None].repeat(channels, axis=0) if channels > 1 else image[None]


def gray(image):
    """Luminance of a colour image, in its own type."""
    return np.rint(image @ np.array([0.299, 0.587, 0.114], np.float32)).astype(image.dtype)     # (rows, columns)


def pixel_hash(image):
    """64 bits that equal images share; 0 for an image of one single value, which is nobody's copy."""
    pixels = image.tobytes()
    if pixels == image[:1, :1].tobytes() * (image.shape[0] * image.shape[1]):
        return 0
    return int.from_bytes(hashlib.sha1(pixels, usedforsecurity=False).digest()[:8], "big")     # sha1: often the fastest
