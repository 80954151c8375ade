"""From files to one array: every picture is read, made square, and written into a folder of the cache.

The cache holds, for each set, size and number of channels,
    images.npy      (N, C, H, W) uint8 or uint16
    masks.npy       (N, H, W) uint8 class, 255 all over where an image has no mask
    rows.npz        hashes (N,) of the pixels before fitting, shapes (N, 2) before fitting, moments (N, 2, C)
Its name holds a digest of every file's size and time of change, so that a changed file is decoded anew. It is written
aside and moved into place: two processes may both decode, none reads half a cache. Labels, splits and groups are read
each time, as editing them should cost nothing. Memory-mapped, a set may be larger than the memory.

Images become squares: the longer side is scaled to `size`, the shorter one padded with black (class 0 in masks). Masks
take the same way, with the nearest pixel's value.
"""

import hashlib
import io
import itertools
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ..errors import UserError
from .dataset import LEARNT_FROM, Dataset, by, moments, numbered, pooled, refuse_leaks
from .sources import existing, header, naming, rows_of, stack_of

SAMPLE = 16                                                                 # images that size, channels, type rest on
LARGEST = 1024                                                              # side of images of which nobody gave a size
CHUNK = 2 ** 20                                                             # pixels that a thread decodes in one go
NO_MASK = 255
GRAY = np.array([0.299, 0.587, 0.114], np.float32)


def open_source(source, size=None, channels=None, cache=None):
    """The Dataset of a Source."""
    if channels not in (None, 1, 3):
        raise UserError(f"channels={channels}: an image has 1 or 3")
    for note in source.notes:
        print(f"{source.name}: {note}")
    refuse_leaks(source, source.groups, "group {}")
    folder = cached(source, size or common_size(source), channels or natural_channels(source), channels, cache)
    with naming(folder):
        images = np.load(folder / "images.npy", mmap_mode="r")              # (N, C, H, W)
        masks = np.load(folder / "masks.npy", mmap_mode="r") if source.masks else None          # (N, H, W)
        rows = dict(np.load(folder / "rows.npz", allow_pickle=False))
        mask_classes = tuple(json.loads((folder / "info.json").read_text()))
    refuse_leaks(source, rows["hashes"].tolist(), "the same image",
                 f"; `python -m medssl.common.data {source.path} --to FOLDER --dedupe` keeps one of them")
    labels, classes = numbered(source.labels) if source.labels else (None, mask_classes)
    groups = source.groups and numbered([own or f"\0{row}" for row, own in enumerate(source.groups)])[0]
    dataset = Dataset(source.name, images, labels, classes, masks, groups, source.splits and np.array(source.splits),
                      names=source.files and source.names)
    learnt, sums = dataset.rows(*LEARNT_FROM), rows["moments"].astype(np.float64)
    dataset.mean, dataset.std = pooled(sums[learnt] if len(learnt) else sums)
    return dataset


# ---- a few images tell what the set is like

def sample(source):
    """Shapes (rows, columns[, 3]) and types of a few evenly spread images; what cannot be read is left to decoding."""
    if source.sample is None:
        source.sample = []
        if source.kind == "npz":
            with naming(source.path), zipfile.ZipFile(source.path) as archive:
                shape, dtype = header(archive, "train_images")
            source.sample.append((shape[1:], np.dtype(np.uint8) if dtype.kind == "b" else dtype))
        elif source.kind == "npy":
            stack = stack_of(source.path)
            source.sample.append((stack.shape[1:], stack.dtype))
        else:
            for row in sorted(set(np.linspace(0, len(source.names) - 1, SAMPLE).astype(int).tolist())):
                try:
                    image = picture(read(source.files[row]), source.names[row])
                except (UserError, OSError):
                    continue
                source.sample.append((image.shape, image.dtype))
    return source.sample


def shapes(source, most=SAMPLE):
    return [shape for shape, _ in sample(source)[:most]]


def natural_channels(source):
    return max((3 if len(shape) == 3 and shape[2] == 3 else 1 for shape in shapes(source)), default=1)


def common_size(source):
    """The side where all are equal squares, else the median of the longer sides to a multiple of 32."""
    sides = np.array([shape[:2] for shape in shapes(source)] or [(32, 32)])                 # (sample, 2)
    same = sides.min() == sides.max()
    return min(LARGEST, int(sides.min() if same else max(32, 32 * round(np.median(sides.max(1)) / 32))))


# ---- one picture

def read(path, indices=False):
    """The array in a file: (rows, columns) or (rows, columns, 3). 8 bits are uint8, 16 bits uint16; gray stays gray,
    palettes become colours (or stay indices, of a mask), alpha is dropped, 1 bit becomes 0 and 255, EXIF's turn is
    applied."""
    with naming(path):
        existing(path)
        if str(path).lower().endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with open(path, "rb") as file:
            image = Image.open(io.BytesIO(file.read()), formats=("PNG", "JPEG", "TIFF", "BMP"))
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("holds several pages: save each as a picture, or all as one .npy")
        image.load()                                                        # refuses a file that ends early
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("1", "LA", "La"):
            image = image.convert("L")
        elif image.mode in ("P", "PA") and not indices:
            image = image.convert("RGBA").convert("RGB")                    # palettes may hold transparency
        elif image.mode not in ("L", "P", "I", "F", "RGB") and not image.mode.startswith("I;16"):
            image = image.convert("RGB")                                    # RGBA, CMYK, YCbCr, LAB
        array = np.asarray(image)
        return array.astype(np.uint16) if image.mode.startswith("I") else array     # how older Pillows open 16-bit PNG


def picture(image, name, dtype=None):
    """The image if it is one: (rows, columns) or (rows, columns, 3) of 8 or 16 bits, like the others of its set."""
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3) or not image.size:
        raise UserError(f"{name}: an array of shape {image.shape}, not one image")
    image = image.astype(np.uint8) * 255 if image.dtype == bool else image
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name}: {image.dtype} pixels have no fixed range; `--to FOLDER --window LO HI` gives one")
    if dtype is not None and image.dtype != dtype:
        raise UserError(f"{name}: {image.dtype} pixels, where others have {dtype}: two scales in one set")
    return image


def mask_of(path, image, name):
    """The class indices (rows, columns) uint8 in a mask's file."""
    mask = read(path, indices=True)
    if mask.ndim == 3 and mask.shape[2] == 3 and (mask[..., :1] == mask).all():
        mask = mask[..., 0]                                                 # gray saved as colour
    if mask.shape != image.shape[:2]:
        raise UserError(f"mask {path} is {by(mask.shape)}, but its image {name} is {by(image.shape[:2])}")
    if mask.min() < 0 or mask.max() > 255 or (mask.dtype.kind == "f" and (mask % 1 != 0).any()):
        raise UserError(f"mask {path} holds values from {mask.min()} to {mask.max()}, not class indices")
    return mask.astype(np.uint8)


def pixel_hash(image):
    """64 bits that equal images share; 0 for an image of one single value, which is nobody's copy."""
    if image.min() == image.max():
        return 0
    pixels = np.ascontiguousarray(image)
    return int.from_bytes(hashlib.sha1(pixels, usedforsecurity=False).digest()[:8], "big")     # sha1: often the fastest


def fitted(image, size, method=Image.BILINEAR):
    """A square (size, size[, 3]) of an image or mask (rows, columns[, 3])."""
    rows, columns = image.shape[:2]
    if rows == columns == size:
        return image
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
    layers = [image[..., c] for c in range(3)] if image.ndim == 3 else [image]              # 16 bits: only as floats
    layers = [np.asarray(Image.fromarray(np.ascontiguousarray(layer, np.float32)).resize((columns, rows), method))
              for layer in layers]
    return np.rint(np.stack(layers, -1)).astype(image.dtype).reshape(rows, columns, *image.shape[2:])


def planes(image, channels):
    """(rows, columns[, 3]) -> (channels, rows, columns)"""
    if image.ndim == 3:
        return image.transpose(2, 0, 1) if channels == 3 else np.rint(image @ GRAY).astype(image.dtype)[None]
    return image[None].repeat(channels, axis=0)


# ---- the whole set

def cached(source, size, channels, wanted, cache):
    """The folder with the decoded set; `wanted` is what the user said of the channels."""
    root = Path(cache or os.environ.get("MEDSSL_CACHE") or "~/.cache/medssl").expanduser()
    root.mkdir(parents=True, exist_ok=True)
    stem = f"{source.name}-{digest(['3', source.path, str(size), str(channels), str(bool(source.masks))])}"
    folder = root / f"{stem}-{digest(stamps(source))}"
    if not folder.is_dir():
        for old in root.glob(f"{stem}-*"):                                  # from before a file changed
            if not old.name.endswith(".part"):
                shutil.rmtree(old, ignore_errors=True)
        part = root / f"{folder.name}.{os.getpid()}.part"
        part.mkdir()
        try:
            decode(source, part, size, channels, wanted)
            if not folder.is_dir():                                         # another process was faster
                os.rename(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def digest(lines):
    return hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def stamps(source):
    lines, missing = [], []
    for file in source.files + [mask for mask in source.masks or [] if mask] if source.files else [source.path]:
        try:
            state = os.stat(file)
            lines.append(f"{file} {state.st_size} {state.st_mtime_ns}")
        except OSError:
            missing.append(f"{file}: no such file")
    refuse_files(source, missing)
    return lines


def refuse_files(source, problems):
    """Error that lists what is wrong with some of a source's images."""
    if problems:
        listed = "; ".join(problems[:10]) + ("; ..." if len(problems) > 10 else "")
        raise UserError(f"{source.path}: {len(problems)} of {len(source.names)} images cannot be used: {listed}. "
                        f"`python -m medssl.common.data {source.path} --to FOLDER --skip-unreadable` leaves them out")


def decode(source, folder, size, channels, wanted):
    """Writes images.npy, masks.npy, rows.npz and info.json."""
    count, dtype = len(source.names), next((kind for _, kind in sample(source)), np.dtype(np.uint8))
    bytes_needed = count * size ** 2 * (channels * dtype.itemsize + bool(source.masks))
    if bytes_needed > shutil.disk_usage(folder).free:
        raise UserError(f"{folder.parent}: {bytes_needed / 1e9:.1f} GB of decoded images do not fit here; see --cache")
    open_new = np.lib.format.open_memmap
    images = open_new(folder / "images.npy", "w+", dtype, (count, channels, size, size))
    masks = open_new(folder / "masks.npy", "w+", np.uint8, (count, size, size)) if source.masks else None
    hashes, sides = np.zeros(count, np.uint64), np.zeros((count, 2), np.int32)
    sums, values = np.zeros((count, 2, channels), np.float32), np.zeros((count if source.masks else 0, 256), bool)

    def finish(rows, pictures):
        """Of some rows: their pixels into the arrays. Returns what is wrong with them."""
        problems = []
        for row, item in zip(rows, pictures):
            try:
                name = source.names[row]
                image = picture(read(item) if isinstance(item, str) else item, name, dtype)
                if image.ndim == 3 and channels == 1 and not wanted:
                    raise UserError(f"{name}: in colour, others are gray: choose --channels 1 or 3")
                images[row] = planes(fitted(image, size), channels)
                hashes[row], sides[row] = pixel_hash(image), image.shape[:2]
                if masks is not None:
                    masks[row] = NO_MASK
                if masks is not None and source.masks[row]:
                    mask = mask_of(source.masks[row], image, name)
                    values[row, np.unique(mask)] = True
                    masks[row] = fitted(mask, size, Image.NEAREST)
            except (UserError, OSError, MemoryError) as error:
                problems.append(str(error) or f"{source.names[row]}: needs more memory than there is")
        sums[rows] = moments(images[rows[0]:rows[-1] + 1])
        return problems

    refuse_files(source, in_threads(source, finish, max(1, CHUNK // (size ** 2 * channels))))
    np.savez(folder / "rows.npz", hashes=hashes, shapes=sides, moments=sums)
    classes = mask_classes(source, masks, values) if source.masks else ()
    (folder / "info.json").write_text(json.dumps(classes))
    images.flush()
    square, oblong = (sides[:, 0] == sides[:, 1]) & (sides[:, 0] != size), sides[:, 0] != sides[:, 1]
    if square.any():
        print(f"{source.name}: {square.sum()} of {count} images are of another size: scaled to {size} x {size}")
    if oblong.any():
        print(f"{source.name}: {oblong.sum()} of {count} images are not square: scaled by their longer side and padded "
              "with black")


def in_threads(source, finish, step):
    """Calls finish(rows, pictures) for some rows at a time in a few threads, as Pillow and numpy let others run, and
    gathers what it returns."""
    problems, waiting, items = [], [], iter(source.files or rows_of(source))
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool, naming(source.path), \
            tqdm(total=len(source.names), desc=f"decoding {source.name}", unit=" files", leave=False) as bar:
        for start in range(0, len(source.names), step):
            rows = range(start, min(start + step, len(source.names)))
            waiting.append(pool.submit(finish, rows, list(itertools.islice(items, len(rows)))))
            while len(waiting) > workers:                                   # so many chunks are in memory at a time
                problems += waiting.pop(0).result()
                bar.update(step)
        for job in waiting:
            problems += job.result()
    return problems


def mask_classes(source, masks, values):
    """Names of the mask classes; 0 and 255 become 0 and 1. values (N, 256): which ones each mask holds."""
    present = np.flatnonzero(values.any(0))
    if set(present) <= {0, 255} and 255 in present:
        for row in np.flatnonzero(values.any(1)):
            masks[row] //= 255
        print(f"{source.name}: masks hold 0 and 255: read as classes 0 and 1")
        return "0", "1"
    if list(present) != list(range(len(present))):
        listed = " ".join(map(str, present[:20]))
        raise UserError(f"{source.path}: masks hold the values {listed}; class indices run 0, 1, 2, ... without a gap "
                        "(0 = background): renumber them")
    return tuple(map(str, present.tolist()))
