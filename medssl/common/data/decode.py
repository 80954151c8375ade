"""The decoder: from the files of a source to images.npy, masks.npy and rows.npz in a folder.

Both the cache (cache.py) and `--to` (prepare.py) use it; a Wanted says what becomes of the files. A pool of threads
turns chunks of rows into finished pieces; one thread appends them, in order, to files whose headers are filled in at
the end, because nobody knows before how many slices are kept.

images.npy      (N, C, H, W) uint8 or uint16
masks.npy       (N, H, W) uint8 class, 255 all over where an image has no mask; only where the source has masks
rows.npz        hashes (N,) of the pixels before fitting, shapes (N, 2) before fitting, moments (N, 2, C)
"""
import os
import shutil
import struct
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from . import pixels, readers
from .copies import Copies, difference_hash
from .dataset import moments
from .sources import ARRAYS, NO_MASK, UNPACKED, complain

SAMPLE = 64                                                             # images that size, channels, type are chosen by
SAMPLED_VOLUMES = 4                                                         # every volume takes a while to read
LARGEST = 1024                                                              # side of images of which nobody gave a size
CHUNK = 2 ** 20                                                             # pixels that a thread decodes in one go
BUFFER = 2 ** 20                                                            # bytes that are written in one go
HEADER = 128                                                                # bytes before the pixels in a .npy
BLANK = 25                                                                  # up to this grey value nothing is seen


def workers():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Wanted:
    """How files become arrays. As it stands: one image of 8 or 16 bits a file, whose grey values are kept."""
    size: int | None = None                                                 # None: what pixels.common_size says
    channels: int | None = None                                             # None: as the files are
    fit: str = "pad"                                                        # how images become square, see pixels.py
    prepare: bool = False                                                   # volumes become slices, grey values 8 bits
    window: tuple | None = None                                             # grey values that become 0 and 255
    percentiles: tuple | None = None                                        # the same by their shares
    axis: int = 0                                                           # of (z, rows, columns), to cut across
    dedupe: bool = False                                                    # leave copies out, see copies.py
    skip: bool = False                                                      # go on without what cannot be read


@dataclass
class Piece:
    """One finished image."""
    row: int                                                                # of the source
    group: str
    image: np.ndarray                                                       # (C, size, size)
    mask: np.ndarray | None                                                 # (size, size) uint8
    values: np.ndarray                                                      # (256,) how often its mask holds each value
    hash: int                                                               # of its pixels before fitting
    near: np.uint64 | None                                                  # difference hash, where copies are sought
    shape: tuple                                                            # before fitting
    moments: np.ndarray | None = None                                       # (2, C), known when its chunk is complete


@dataclass
class Decoded:
    """What was written: of each image the row of the source it came from, and so on."""
    rows: list
    groups: list
    hashes: list
    shapes: list
    size: int
    channels: int
    mask_classes: tuple
    count: Counter                                                          # what was dropped, and what was noticed
    notes: list                                                             # on the size and the masks


def decode(source, folder, wanted):
    """Writes images.npy, masks.npy and rows.npz of a source into this folder."""
    pool = ThreadPoolExecutor(workers())                                    # Pillow and numpy let other threads run
    try:
        work = Work(source, folder, wanted, pool)
        work.check_room(folder)
        kept, values = write(work, folder, pool)
    except MemoryError:
        raise UserError(f"{source.path}: needs more memory than there is; a smaller --size needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(folder / UNPACKED, ignore_errors=True)
    rows, groups, hashes, shapes, sums, masked = zip(*kept, strict=True) if kept else [()] * 6
    np.savez(folder / "rows.npz", hashes=np.array(hashes, np.uint64), shapes=np.array(shapes, np.int32), moments=sums)
    mask_classes, notes = settle_masks(source, folder / "masks.npy", masked, values) if source.masks else ((), [])
    notes = work.notes + notes
    return Decoded(rows, groups, hashes, shapes, work.size, work.channels, mask_classes, work.count, notes)


def write(work, folder, pool):
    """Appends the pieces to images.npy and masks.npy. Returns what is known of each, and the values in all masks."""
    kept, values, square = [], np.zeros(256, np.int64), (work.size, work.size)
    no_mask = np.full(square, NO_MASK, np.uint8)
    with Growing(folder / "images.npy", work.dtype, (work.channels, *square)) as images, \
            Growing(folder / "masks.npy", np.uint8, square) as masks:
        for piece in work.pieces(pool):
            images.append(piece.image)
            if work.source.masks:
                masks.append(no_mask if piece.mask is None else piece.mask)
            values += piece.values
            kept.append((piece.row, piece.group, piece.hash, piece.shape, piece.moments, piece.mask is not None))
    if not work.source.masks:
        (folder / "masks.npy").unlink()
    return kept, values


class Growing:
    """A .npy file to which arrays of one shape are appended."""

    def __init__(self, path, dtype, shape):
        self.file, self.dtype, self.shape, self.count = open(path, "wb", BUFFER), np.dtype(dtype), shape, 0
        self.file.write(bytes(HEADER))                                      # filled in when their number is known

    def append(self, array):
        self.file.write(np.ascontiguousarray(array))
        self.count += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """The header: magic, version, length of the text, text."""
        text = repr({"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, *self.shape)})
        with self.file:
            self.file.seek(0)
            self.file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10))
            self.file.write(text.ljust(HEADER - 11).encode() + b"\n")


class Work:
    """The rows of a source as finished pieces, the same for every one: size, channels and type are settled first."""

    def __init__(self, source, folder, wanted, pool):
        self.source, self.wanted, self.count, self.notes = source, wanted, Counter(), []
        self.read, self.read_mask = source.open(folder)
        self.size, self.channels, self.dtype = self.settled(pool)

    def settled(self, pool):
        """Size, channels and type, from a sample of the images."""
        wanted = self.wanted
        if wanted.prepare and wanted.size and wanted.channels:
            return wanted.size, wanted.channels, np.dtype(np.uint8)
        last, sampled = len(self.source.names) - 1, SAMPLED_VOLUMES if self.source.volumes else SAMPLE
        sample = sorted(set(np.linspace(0, last, sampled).astype(int)))
        seen = [look for look in pool.map(self.look, sample) if look] or [((32, 32), np.dtype(np.uint8))]
        shapes = [shape for shape, _ in seen]
        common = pixels.common_size(shapes)
        if common > LARGEST and not wanted.size:
            self.notes = [f"{LARGEST} x {LARGEST} instead of {common} x {common}: ask for --size {common} to keep that"]
        return (wanted.size or min(common, LARGEST),
                wanted.channels or max(3 if len(shape) == 3 else 1 for shape in shapes),
                np.dtype(np.uint8) if wanted.prepare else seen[0][1])

    def look(self, row):
        """Shape and type of a file's first image; None if it cannot be read: decoding lists it with all others."""
        try:
            image, name = self.read(row), self.source.names[row]
            if self.wanted.prepare:
                image = pixels.slices(image, name, self.wanted.axis)[0]     # (rows, columns[, 3])
            else:
                image = pixels.single(image, name)
            return (image.shape, image.dtype) if image.size else None
        except (UserError, OSError, MemoryError):
            return None

    def check_room(self, folder):
        count = 0 if self.wanted.prepare else len(self.source.names)        # nobody knows the number of slices yet
        needed = count * self.size ** 2 * (self.channels * self.dtype.itemsize + bool(self.source.masks))
        if needed > shutil.disk_usage(folder).free:
            raise UserError(f"{folder.parent}: {needed / 1e9:.1f} GB of decoded images do not fit here; see --cache")

    def pieces(self, pool):
        """Yields the pieces in order, and counts what is left out."""
        copies, unreadable = Copies(), []
        for done, problems, noticed in self.chunks(pool):
            unreadable += problems
            self.count.update(noticed)
            for piece in done:
                kind = copies.kind(piece.hash, piece.near, piece.group) if self.wanted.dedupe else None
                self.count[kind] += 1
                if kind is None:
                    yield piece
        if not self.wanted.skip:
            complain(self.source, unreadable)
        for line in unreadable[:10]:
            print(f"left out: {line}")                                      # said but not stored: it is a name
        self.count["unreadable"] = len(unreadable)

    def chunks(self, pool):
        """Yields (pieces, problems, noticed) of some rows at a time; the threads are a few chunks ahead."""
        order, splits = list(range(len(self.source.names))), self.source.splits
        if splits and self.wanted.dedupe:                                   # the copy nobody learns from comes first
            order.sort(key=lambda row: {"test": 0, "val": 1}.get(splits[row], 2))
        step = 1 if self.source.volumes else max(1, CHUNK // (self.size ** 2 * self.channels))
        starts, waiting, ahead = deque(range(0, len(order), step)), deque(), workers() + 1
        word = "preparing" if self.wanted.prepare else "decoding"
        with tqdm(total=len(order), desc=f"{word} {self.source.name}", unit=" files", leave=False) as bar:
            while starts or waiting:
                while starts and len(waiting) < ahead:                      # so many chunks are in memory at a time
                    start = starts.popleft()
                    waiting.append(pool.submit(self.chunk, order[start:start + step]))
                yield waiting.popleft().result()
                bar.update(min(step, len(order) - bar.n))

    def chunk(self, rows):
        done, problems, noticed = [], [], Counter()
        for row in rows:
            try:
                done += self.layers(row, noticed) if self.wanted.prepare else [self.single(row)]
            except (UserError, OSError) as error:
                problems.append(str(error))
            except MemoryError:
                problems.append(f"{self.source.names[row]}: needs more memory than there is")
        step = max(1, CHUNK // (self.size ** 2 * self.channels))            # one by one would take longer
        for some in (done[start:start + step] for start in range(0, len(done), step)):
            stack = np.stack([piece.image for piece in some]) if some[1:] else some[0].image[None]     # (N, C, H, W)
            for piece, sums in zip(some, moments(stack), strict=True):
                piece.moments = sums
        return done, problems, noticed

    def single(self, row):
        """The one image of a file."""
        name = self.source.names[row]
        image = pixels.single(self.read(row), name, self.dtype)
        if image.ndim == 3 and self.channels == 1 and not self.wanted.channels:
            raise UserError(f"{name}: in colour, others are gray: choose --channels 1 or 3")
        return self.finished(row, self.group(row), image, self.class_indices(row, self.read_mask(row), image))

    def layers(self, row, noticed):
        """The images of a file of any kind: an image, or a volume cut into slices."""
        source, wanted, name = self.source, self.wanted, self.source.names[row]
        array, mask = self.read(row), self.read_mask(row)
        stack = pixels.slices(array, name, wanted.axis)                     # (slices, rows, columns[, 3])
        masks = [None] * len(stack) if mask is None else pixels.slices(mask, name, wanted.axis)
        if mask is not None and masks.shape[:3] != stack.shape[:3]:
            raise UserError(f"mask {source.masks[row]} is {pixels.by(mask.shape)}, but its image {name} is "
                            f"{pixels.by(array.shape)}")
        low, high = pixels.grey_range(stack, wanted.window, wanted.percentiles)
        inverted = source.kind not in ARRAYS and readers.small_is_bright(source.files[row])
        group, done, empty = self.group(row, len(stack) > 1), [], 0
        for layer, mask in zip(stack, masks, strict=True):
            image = pixels.eight_bits(layer, low, high)
            image = 255 - image if inverted else image
            mask = self.class_indices(row, mask, image)
            if len(stack) > 1 and (image > BLANK).mean() < 0.01 and (mask is None or not mask.any()):
                empty += 1
            else:
                done.append(self.finished(row, group, image, mask))
        noticed.update(empty=empty, fourth=array.ndim == 4 and stack.ndim == 3,
                       hounsfield=not wanted.window and stack.dtype.kind in "if" and bool(stack.min() < -500))
        return done

    def group(self, row, several=False):
        """The slices of a volume stay together, also where others have a group and it has none."""
        own = self.source.groups[row] if self.source.groups else ""
        return own or (self.source.names[row] if several else "")

    def class_indices(self, row, mask, image):
        source = self.source
        return None if mask is None else pixels.class_indices(mask, image, source.masks[row], source.names[row])

    def finished(self, row, group, image, mask):
        wanted, size, values = self.wanted, self.size, np.zeros(256, np.int64)
        square = np.ascontiguousarray(pixels.planes(pixels.fitted(image, size, wanted.fit), self.channels))
        if mask is not None:
            values = np.bincount(mask.ravel(), minlength=256)
            mask = np.ascontiguousarray(pixels.fitted(mask, size, wanted.fit, Image.NEAREST))
        near = difference_hash(image) if wanted.dedupe else None
        return Piece(row, group, square, mask, values, pixels.pixel_hash(image), near, image.shape[:2])


def settle_masks(source, path, masked, values):
    """Names of the mask classes, and a note if 0 and 255 became 0 and 1. `values` counts each value's pixels."""
    found = np.flatnonzero(values)
    if set(found) <= {0, 255} and 255 in found:
        masks = np.load(path, mmap_mode="r+")                               # (N, H, W)
        for row in np.flatnonzero(masked):
            masks[row] //= 255
        masks.flush()
        return ("0", "1"), ["masks hold 0 and 255: read as classes 0 and 1"]
    if list(found) != list(range(len(found))):
        values = " ".join(map(str, found[:20]))
        raise UserError(f"{source.path}: masks hold the values {values}; class indices run 0, 1, 2, ... without a gap "
                        "(0 = background): renumber them")
    return tuple(map(str, found)), []
