"""Looking at a set of images, and preparing one: the command line of data.py.

    python -m medssl.common.data PATH               says what is there and draws contact_sheet.png
    python -m medssl.common.data PATH --to FOLDER --window -160 240 --dedupe --split 0.7 0.1 0.2

Preparing turns volumes into slices and 16-bit or floating values into 8 bits, which everything here can train on.
FOLDER then holds images.npy (N, C, H, W), masks.npy (N, H, W) where there are masks, table.csv (split, label and group
number of each image; no file name, no patient's name), rows.npz (hash, original shape and moments of each image),
info.json (how it was made) and contact_sheet.png. It appears whole or not at all.

Grey values     --window LO HI maps LO..HI to 0..255 (Hounsfield units for CT). Without it, what is not 8 bits wide is
                scaled from its 0.5th to its 99.5th percentile (--percentiles), over the whole volume, so that its
                slices stay comparable. DICOM files whose small values are bright (MONOCHROME1) are inverted.
Slices          along --axis of (z, rows, columns); of a fourth dimension the first entry is taken. The volume is the
                group unless one is given. A slice without content is dropped: fewer than 1 % of its pixels above a
                tenth of full scale, and nothing in its mask.
--dedupe        drops images whose pixels another one has already (kept: test, then val, then train), and within a
                group each image whose 64-bit difference hash is within 6 bits of one kept before. Without groups only
                exact copies are dropped: two patients may look alike.
"""
import csv
import json
import os
import shutil
import struct
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .. import cli, sheets
from ..errors import UserError
from . import dataset as sets
from . import decode, load, readers, sources

NEAR = 6                                                                    # differing bits of 64
BITS = np.array([bin(number).count("1") for number in range(256)], np.uint8)
HEADER = 128                                                                # bytes before the pixels in a .npy
SHOWN = 48                                                                  # images on the contact sheet
LOOKED_AT = 4000                                                            # images searched for near copies
SHEET = "contact_sheet.png"


def main(arguments=None):
    parser = cli.Parser(prog="python -m medssl.common.data",
                        description="Says what a set of images holds; with --to, prepares it for training.")
    flag = parser.add_argument
    flag("path", help="folder, split.csv, .npz, .npy, a volume, or phantoms")
    flag("--to", metavar="FOLDER", help="prepare the set into this new folder")
    flag("--size", type=int, help="side of the images (default: the common one, or the median to a multiple of 32)")
    flag("--channels", type=int, choices=(1, 3), help="gray or colour (default: as the files are)")
    flag("--fit", choices=tuple(decode.FITTING), default="pad", help="how images become square (default: pad)")
    flag("--label", default="label", help="column of split.csv")
    flag("--group-by", metavar="REGEX", help="patient: first bracket, or whole match, in the file name; or: parent")
    flag("--cache", metavar="DIR", help="for decoded images (default: $MEDSSL_CACHE or ~/.cache/medssl)")
    flag("--seed", type=int, default=0, help="of --split, and of the phantoms")
    flag("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey values mapped to 0..255")
    flag("--percentiles", type=float, nargs=2, metavar=("LO", "HI"), help="the same by percentiles (default 0.5 99.5)")
    flag("--axis", type=int, choices=(0, 1, 2), default=0, help="of (z, rows, columns), that volumes are cut across")
    flag("--dedupe", action="store_true", help="drop exact copies, and near copies within a group")
    flag("--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="deal the groups: 0.7 0.1 0.2")
    flag("--skip-unreadable", action="store_true", help="go on without the files that cannot be read")
    words = parser.parse_args(arguments)
    if words.to:
        prepare(words)
        return
    for name in ("window", "percentiles", "split", "dedupe", "skip_unreadable", "axis"):
        if getattr(words, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} does something only when preparing: add --to FOLDER")
    look(words)


def look(words):
    """Prints what a set holds, and draws its contact sheet here."""
    if words.path == "phantoms":
        dataset = load("phantoms", words.size, words.channels, seed=words.seed)
        report(dataset, None, "built in", None, [])
        draw(dataset, SHEET)
    else:
        source = sources.find(words.path, words.label, words.group_by, volumes=True)
        if source.volumes:
            report_volumes(source, SHEET)
        else:
            dataset, rows = decode.load_rows(source, words.size, words.channels, words.cache, words.fit)
            uneven = (rows["shapes"] != dataset.images.shape[2]).any()
            notes = [f"those of another shape are {decode.FITTING[words.fit]}"] if uneven else []
            report(dataset, rows, source.kind, source.names, notes)
            draw(dataset, SHEET)
    print(f"contact sheet:           {SHEET}")


# ---- preparing

@dataclass
class Piece:
    """One finished image."""
    image: np.ndarray                                                       # (C, size, size) uint8
    mask: np.ndarray | None                                                 # (size, size) uint8
    hash: int                                                               # of its pixels before fitting
    near: np.uint64                                                         # difference hash
    shape: tuple                                                            # before fitting
    values: np.ndarray                                                      # (256,) how often its mask holds each value


def prepare(words):
    folder = Path(words.to).expanduser()
    source = sources.find(words.path, words.label, words.group_by, volumes=True)
    check(words, source, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        notes = write(source, part, words)
        shutil.rmtree(part / sources.UNPACKED, ignore_errors=True)
        draw(load(part), part / SHEET)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    made = sources.find(folder)
    report(*decode.load_rows(made), f"prepared into {folder}", made.names, notes)
    print(f"contact sheet:           {folder / SHEET}")


def check(words, source, folder):
    for name in ("window", "percentiles"):
        pair = getattr(words, name)
        if pair and not pair[0] < pair[1]:
            raise UserError(f"--{name} {pair[0]:g} {pair[1]:g}: the first must be the smaller")
    if words.window and words.percentiles:
        raise UserError("--window and --percentiles: choose one")
    if words.percentiles and not 0 <= words.percentiles[0] < words.percentiles[1] <= 100:
        raise UserError(f"--percentiles {words.percentiles[0]:g} {words.percentiles[1]:g}: between 0 and 100")
    if words.size is not None and words.size < 1:
        raise UserError(f"--size {words.size}: images need at least one pixel")
    if words.split and source.splits:
        raise UserError(f"--split: {source.path} has splits already")
    if words.split:
        sets.check_fractions(words.split)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: exists and is not empty; name a new folder")


def write(source, part, words):
    """images.npy, masks.npy, rows.npz, table.csv and info.json; returns notes on what was done."""
    count, kept, values = Counter(), [], np.zeros(256, np.int64)
    with ThreadPoolExecutor(decode.workers()) as pool:
        read, read_mask = source.open(part)
        size, channels = plan(source, read, words, pool)
        stream = finished(source, read, read_mask, size, channels, words, pool, count)
        if words.dedupe:
            stream = without_copies(stream, count)
        no_mask = np.full((size, size), sources.NO_MASK, np.uint8)
        with open(part / "images.npy", "wb") as images, open(part / "masks.npy", "wb") as masks:
            images.write(bytes(HEADER))                                     # filled in when their number is known
            masks.write(bytes(HEADER))
            for row, group, piece in stream:
                images.write(piece.image)
                masks.write(no_mask if piece.mask is None else piece.mask)
                values += piece.values
                sums = sets.moments(piece.image[None])[0]                   # (2, C)
                kept.append((row, group, piece.hash, piece.shape, sums, piece.mask is not None))
            for file, shape in (images, (len(kept), channels, size, size)), (masks, (len(kept), size, size)):
                file.seek(0)
                file.write(npy_header(shape))
    notes = notes_on(count)
    if not kept:
        raise UserError(f"{source.path}: no image is left; {'; '.join(notes)}")
    numbers, groups, hashes, shapes, sums, masked = zip(*kept)
    np.savez(part / "rows.npz", hashes=np.array(hashes, np.uint64), shapes=np.array(shapes, np.int32), moments=sums)
    mask_classes, note = (), []
    if source.masks:
        stack = np.load(part / "masks.npy", mmap_mode="r+")
        mask_classes, note = decode.settle_masks(source.path, stack, masked, values)
        stack.flush()
    else:
        (part / "masks.npy").unlink()

    names, labels, splits = ([column[row] for row in numbers] if column else None
                             for column in (source.names, source.labels, source.splits))
    made = sources.Source(source.path, "preparation", names, [], None, labels, groups if any(groups) else None, splits)
    group_numbers = sets.numbered([group or f"\0{row}" for row, group in enumerate(groups)])[0] if any(groups) else None
    if words.split:
        stack = np.load(part / "images.npy", mmap_mode="r")
        dataset = sets.Dataset("", stack, sets.numbered(labels)[0] if labels else None, groups=group_numbers)
        made.splits = sets.split(dataset, words.split, words.seed).splits.tolist()
    sets.refuse_leaks(made, made.groups, "group {}")
    sets.refuse_leaks(made, hashes, *sets.SAME_IMAGE)
    empty = [""] * len(kept)
    with open(part / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["split", "label", "group"])
        table.writerows(zip(made.splits or empty, labels or empty, empty if group_numbers is None else group_numbers))
    info = {name: getattr(words, name) for name in ("label", "fit", "window", "percentiles", "axis", "split", "seed")}
    info |= {"count": len(kept), "size": size, "channels": channels, "mask_classes": mask_classes}
    info["notes"] = notes + note
    (part / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    return notes + note


def plan(source, read, words, pool):
    """Size and channels from a sample: every volume takes a while to read, so few of them."""
    def look(row):
        try:
            return slices(read(row), source, row, words.axis)[0].shape
        except (ValueError, OSError):
            return None                                                     # will be listed with all others that fail
    if words.size and words.channels:
        return words.size, words.channels
    sample = sorted(set(np.linspace(0, len(source.names) - 1, 4 if source.volumes else decode.SAMPLE).astype(int)))
    shapes = [shape for shape in pool.map(look, sample) if shape] or [(32, 32)]
    return words.size or decode.common_size(shapes), words.channels or max(3 if len(s) == 3 else 1 for s in shapes)


def finished(source, read, read_mask, size, channels, words, pool, count):
    """Yields (row of the source, group, Piece); counts what was dropped."""
    def work(row):
        try:
            return pieces(read(row), read_mask(row), source, row, size, channels, words)
        except (ValueError, OSError) as error:
            return str(error)
    order, unreadable = list(range(len(source.names))), []
    if source.splits and words.dedupe:                                      # the copy nobody learns from comes first
        order.sort(key=lambda row: {"test": 0, "val": 1}.get(source.splits[row], 2))
    step = decode.workers() * (1 if source.volumes else 64)                   # so many are in memory at a time
    for start in tqdm(range(0, len(order), step), desc=f"preparing {source.name}", leave=False):
        for row, done in zip(order[start:start + step], pool.map(work, order[start:start + step])):
            if isinstance(done, str):
                unreadable.append(done)
                continue
            count.update(done[1])
            several = done[1]["slices"] > 1                                 # a volume is a group
            group = source.groups[row] if source.groups else source.names[row] if several else ""
            yield from ((row, group, piece) for piece in done[0])
    if not words.skip_unreadable:
        decode.complain(source, unreadable)
    for line in unreadable[:10]:
        print(f"left out: {line}")                                          # but not in info.json: no names there
    count["unreadable"] = len(unreadable)


def without_copies(stream, count):
    exact, near = set(), {}                                                 # hashes; difference hashes of each group
    for row, group, piece in stream:
        others = near.setdefault(group, [])
        if piece.hash and piece.hash in exact:
            count["copies"] += 1
        elif group and is_near(piece.near, others):
            count["near"] += 1
        else:
            exact.add(piece.hash)
            others.append(piece.near)
            yield row, group, piece


def notes_on(count):
    texts = {"unreadable": "{} unreadable files left out",
             "fourth": "{} volumes have a fourth dimension: its first entry was taken",
             "hounsfield": "{} volumes go below -500, as CT does: consider --window -160 240 (soft tissue)",
             "empty": "{} slices without content dropped (fewer than 1 % of pixels above a tenth of full scale)",
             "copies": "{} exact copies dropped",
             "near": f"{{}} near copies dropped (within {NEAR} of 64 bits of a kept image of the group)"}
    return [text.format(count[what]) for what, text in texts.items() if count[what]]


def slices(array, source, row, axis):
    """(slices, rows, columns[, 3]) of whatever an image's or mask's file held."""
    if array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3:
        return array[None]
    if array.ndim == 4 and source.names[row].lower().endswith((".nii", ".nii.gz")):
        array = array[0]                                                    # first time or channel: (z, rows, columns)
    if array.ndim != 3 and array.shape[3:] != (3,):
        raise UserError(f"{source.names[row]}: shape {array.shape} is neither an image nor a volume")
    return np.moveaxis(array, axis, 0)


def pieces(array, mask, source, row, size, channels, words):
    """The finished images of one file, and what there is to say about it."""
    stack = slices(array, source, row, words.axis)                          # (slices, rows, columns[, 3])
    masks = [None] * len(stack)
    if mask is not None:
        masks = slices(mask, source, row, words.axis)
        if masks.shape[:3] != stack.shape[:3]:
            raise UserError(f"mask {source.masks[row]} is {decode.by(mask.shape)}, but its image {source.names[row]} is "
                             f"{decode.by(array.shape)}")
    count = Counter(slices=len(stack), fourth=array.ndim == 4 and stack.ndim == 3)
    count["hounsfield"] = not words.window and stack.dtype.kind in "if" and bool(stack.min() < -500)
    low, high = grey_range(stack, words)
    inverted = source.kind not in sources.ARRAYS and readers.small_is_bright(source.files[row])
    done = []
    for layer, mask in zip(stack, masks):
        image = eight_bits(layer, low, high)
        image = 255 - image if inverted else image
        mask = decode.class_indices(mask, image, source, row)
        if len(stack) > 1 and (image > 25).mean() < 0.01 and (mask is None or not mask.any()):
            count["empty"] += 1
            continue
        values = np.zeros(256, np.int64) if mask is None else np.bincount(mask.ravel(), minlength=256)
        if mask is not None:
            mask = np.ascontiguousarray(decode.fitted(mask, size, words.fit, Image.NEAREST))
        square = np.ascontiguousarray(decode.planes(decode.fitted(image, size, words.fit), channels))
        done.append(Piece(square, mask, decode.pixel_hash(image), difference_hash(image), image.shape[:2], values))
    return done, count


def grey_range(stack, words):
    """What becomes 0 and 255; (None, None) for 8 bits that stay as they are."""
    if words.window:
        return words.window
    if stack.dtype in (np.uint8, bool) and not words.percentiles:
        return None, None
    some = stack.ravel()[::max(1, stack.size // 10 ** 6)]                   # a million values tell as much as all
    return np.nanpercentile(some, words.percentiles or (0.5, 99.5)).tolist()


def eight_bits(layer, low, high):
    if low is None:
        return np.ascontiguousarray(layer * np.uint8(255) if layer.dtype == bool else layer)
    scaled = (np.nan_to_num(layer.astype(np.float32), nan=low) - low) * (255 / (high - low or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def difference_hash(image):
    """64 bits: whether each cell of an 8 x 8 grid is darker than its right neighbour."""
    gray = decode.gray(image) if image.ndim == 3 else image
    gray = (gray >> 8).astype(np.uint8) if gray.dtype == np.uint16 else gray
    grid = np.asarray(Image.fromarray(gray).resize((9, 8), Image.BILINEAR))
    return np.packbits(grid[:, 1:] > grid[:, :-1]).view(np.uint64)[0]


def is_near(hash, others):
    if not others:
        return False
    return BITS[(np.array(others, np.uint64) ^ hash).view(np.uint8)].reshape(-1, 8).sum(1).min() <= NEAR


def npy_header(shape):
    """The first bytes of a .npy file of uint8: magic, version, length of the text, text."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEADER - 10) + text.ljust(HEADER - 11).encode() + b"\n"


# ---- looking

def report(dataset, rows, kind, names, notes):
    """Prints what a set holds."""
    count, channels, size, _ = dataset.images.shape
    print(f"{dataset.name}: {kind}; {count} images of {size} x {size}, {'colour' if channels == 3 else 'gray'}, "
          f"{dataset.images.dtype.itemsize * 8} bits")
    for note in notes:
        print(f"  {note}")
    if rows is not None:
        low, high = rows["shapes"].min(0), rows["shapes"].max(0)
        print("sizes (rows x columns):  " + (f"all {low[0]} x {low[1]}" if (low == high).all() else
              f"{low[0]} to {high[0]} x {low[1]} to {high[1]}, {len(np.unique(rows['shapes'], axis=0))} different"))
    print("mean and std:            " + ", ".join(f"{m:.4f} {s:.4f}" for m, s in zip(dataset.mean, dataset.std)))
    if dataset.groups is None:
        print("patients:                unknown (no group column, no --group-by): a split may tear one apart")
    if len(dataset.classes) > max(60, count / 10):
        print(f"classes:                 {len(dataset.classes)}: if these are patients, --group-by parent")
    some = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)
    masked = None
    if dataset.masks is not None:
        masked = np.array([mask.min() < sources.NO_MASK for mask in dataset.masks])
        totals = sum(np.bincount(dataset.masks[row].ravel(), minlength=256) for row in some if masked[row])
        shares = [f"{value} on {totals[value] / totals.sum():.2%} of the pixels" for value in np.flatnonzero(totals)]
        print("mask classes:            " + ", ".join(shares))
    print_table(counts(dataset, masked))
    print_histogram([dataset.images[row] for row in some[::max(1, len(some) // 500)]])
    if rows is not None:
        report_copies(dataset, rows["hashes"], names, some)


def counts(dataset, masked):
    """Lines of a table: images, groups, classes and masks in each split."""
    splits, parts = ["all"], [np.arange(len(dataset))]
    if dataset.splits is not None:
        splits = [name for name in ("train", "val", "test", "unlabeled") if len(dataset.rows(name))]
        parts = [dataset.rows(name) for name in splits]
    table = [["", *splits], ["images", *map(len, parts)]]
    if dataset.groups is not None:
        table.append(["patients (groups)", *(len(np.unique(dataset.groups[part])) for part in parts)])
    if dataset.labels is not None:
        for number, name in [*enumerate(dataset.classes)][:60]:
            table.append([f"class {name}", *((dataset.labels[part] == number).sum() for part in parts)])
        if (dataset.labels < 0).any():
            table.append(["no label", *((dataset.labels[part] < 0).sum() for part in parts)])
    if masked is not None:
        table.append(["with a mask", *(masked[part].sum() for part in parts)])
    return table


def print_table(table):
    first, *others = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for name, *cells in table:
        print("  " + name.ljust(first) + "".join(str(cell).rjust(width + 2) for cell, width in zip(cells, others)))


def print_histogram(images):
    """Grey values of some images, sixteen steps of the full scale."""
    top = np.iinfo(images[0].dtype).max + 1
    shares = sum(np.histogram(image, 16, (0, top))[0] for image in images) / sum(image.size for image in images)
    print(f"grey values of {len(images)} images:")
    for step, share in enumerate(shares):
        print(f"  {step * top // 16:6d} {'#' * round(60 * share / shares.max()):60s} {share:6.1%}")


def report_copies(dataset, hashes, names, some):
    first, repeated = {}, []
    for row, hash in enumerate(hashes.tolist()):
        if hash and first.setdefault(hash, row) != row:
            repeated.append((first[hash], row))
    torn = 0 if dataset.labels is None else sum(dataset.labels[a] != dataset.labels[b] for a, b in repeated)
    print(f"exact copies:            {len(repeated)}" + (f", {torn} of them with another class" if torn else "")
          + "".join(f"; {names[a]} = {names[b]}" for a, b in repeated[:3]))
    near, kept = 0, {}
    for row in some:
        image = dataset.images[row].transpose(1, 2, 0)                      # (H, W, C)
        hash = difference_hash(image if image.shape[2] == 3 else image[..., 0])
        others = kept.setdefault(0 if dataset.groups is None else dataset.groups[row], [])
        if is_near(hash, others):
            near += 1
        else:
            others.append(hash)
    where, dropped = (" of the group", "both") if dataset.groups is not None else ("", "the exact ones only: no groups")
    print(f"near copies:             {near} of {len(some)} looked at (within {NEAR} of 64 bits of an earlier "
          f"image{where}); --to FOLDER --dedupe drops {dropped}")


def draw(dataset, path):
    """The contact sheet: images evenly over the classes, masks laid over them."""
    order = np.arange(len(dataset)) if dataset.labels is None else np.argsort(dataset.labels, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(len(order), SHOWN)).astype(int)]
    titles = None
    if dataset.labels is not None:
        titles = [dataset.classes[label] if label >= 0 else "no label" for label in dataset.labels[rows]]
    images = dataset.images[rows] / np.float32(np.iinfo(dataset.images.dtype).max)
    masks = [] if dataset.masks is None else [dataset.masks[rows]]
    sheets.sheet([("", images, *masks)], path, titles=titles, columns=8)


def report_volumes(source, path, size=192):
    """What raw volumes hold; the sheet shows the middle slice of some, each scaled by its percentiles."""
    print(f"{source.name}: {source.kind}; {len(source.names)} files with volumes: prepare them with --to FOLDER")
    read, read_mask = source.open(None)
    pictures, masks = [], []
    for row in sorted(set(np.linspace(0, len(source.names) - 1, 24).astype(int))):
        array, mask = read(row), read_mask(row)
        layers = slices(array, source, row, 0)
        middle, (low, high) = len(layers) // 2, np.nanpercentile(layers, (0.5, 99.5))
        print(f"  {source.names[row]}: {decode.by(array.shape)}, values {np.nanmin(array):g} to {np.nanmax(array):g}"
              + (f", mask {decode.by(mask.shape)} of {len(np.unique(mask))} classes" if mask is not None else ""))
        pictures.append(decode.planes(decode.fitted(eight_bits(layers[middle], low, high), size, "pad"), 3) / 255)
        masks.append(np.full((size, size), sources.NO_MASK, np.uint8))
        if mask is not None and mask.shape == array.shape:
            layer = slices(mask, source, row, 0)[middle].astype(np.uint8)
            masks[-1] = decode.fitted(layer, size, "pad", Image.NEAREST)
    sheets.sheet([("", np.stack(pictures), *([np.stack(masks)] if source.masks else []))], path, columns=6)
