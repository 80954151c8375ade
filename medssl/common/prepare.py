"""Looking at a set of images, and preparing one: the command line of data.py.

    python -m medssl.common.data PATH                                       says what is there, draws contact_sheet.png
    python -m medssl.common.data PATH --to FOLDER --window -160 240 --dedupe --split 0.7 0.1 0.2

Preparing turns volumes into slices and 16-bit or floating values into 8 bits, which the rest of the book can train on. FOLDER then holds
images.npy (N, C, H, W), masks.npy (N, H, W) where there are masks, table.csv (split, label and group number of each image; no file name, no patient's
name), rows.npz (hash, original shape and moments of each image), info.json (how it was made) and contact_sheet.png. It appears whole or not at all.

Grey values   --window LO HI maps LO..HI to 0..255 (Hounsfield units for CT); otherwise what is not 8 bits wide is scaled from its 0.5th to its 99.5th
              percentile (--percentiles), over the whole volume, so that slices of one volume stay comparable. DICOM files whose small values are
              bright (MONOCHROME1) are inverted.
Slices        along --axis of (z, rows, columns); of a fourth dimension the first entry is taken. The volume is the group unless a group is given.
              A slice without content is dropped: fewer than 1 % of its pixels above a tenth of full scale, and nothing in its mask.
--dedupe      drops images whose pixels another one has already (kept: test, then val, then train), and within a group every image whose 64-bit
              difference hash is within 6 bits of one kept before. Without groups only exact copies are dropped: two patients may look alike.
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

from medssl.common import cli, data, readers, sources

NEAR = 6                                                                    # differing bits of 64
BITS = np.array([number.bit_count() for number in range(256)], np.uint8)
SHOWN = 48                                                                  # images on the contact sheet
LOOKED_AT = 4000                                                            # images that the histogram and the search for near copies use


def main(arguments=None):
    parser = cli.Parser(prog="python -m medssl.common.data", description="Says what a set of images holds; with --to, prepares it for training.")
    flag = parser.add_argument
    flag("path", help="folder, split.csv, .npz, .npy, a volume, or phantoms")
    flag("--to", metavar="FOLDER", help="prepare the set into this new folder")
    flag("--size", type=int, help="side of the square images (default: the common size, or the median longer side to a multiple of 32)")
    flag("--channels", type=int, choices=(1, 3), help="gray or colour (default: as the files are)")
    flag("--fit", choices=tuple(data.FITTING), default="pad", help="how images become square (default: pad)")
    flag("--label", default="label", help="column of split.csv")
    flag("--group-by", metavar="REGEX", help="patient from the relative file name: the first bracket or the whole match; or the word parent")
    flag("--cache", metavar="DIR", help="where decoded images are kept (default: $MEDSSL_CACHE or ~/.cache/medssl)")
    flag("--seed", type=int, default=0, help="of --split, and of the phantoms")
    flag("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey values mapped to 0..255")
    flag("--percentiles", type=float, nargs=2, metavar=("LO", "HI"), help="the same, as percentiles of each volume or image (default 0.5 99.5)")
    flag("--axis", type=int, choices=(0, 1, 2), default=0, help="volumes are cut across this axis of (z, rows, columns)")
    flag("--dedupe", action="store_true", help="drop exact copies, and near copies within a group")
    flag("--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="deal groups to splits, for example 0.7 0.1 0.2")
    flag("--skip-unreadable", action="store_true", help="go on without the files that cannot be read")
    words = parser.parse_args(arguments)
    if words.to and words.path == "phantoms":
        raise ValueError("phantoms: built in, and ready as they are; leave --to out")
    if words.to:
        prepare(words)
        return
    for name in ("window", "percentiles", "split", "dedupe", "skip_unreadable", "axis"):
        if getattr(words, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')} does something only when preparing: add --to FOLDER")
    if words.path == "phantoms":
        dataset = data.load("phantoms", words.size, words.channels, seed=words.seed)
        report(dataset, None, "built in", None, [])
        draw(dataset, "contact_sheet.png")
        return
    source = sources.find(words.path, words.label, words.group_by, volumes=True)
    if source.volumes:
        report_volumes(source, "contact_sheet.png")
    else:
        dataset, rows = data.load_rows(source, words.size, words.channels, words.cache, words.fit)
        notes = [f"images of another shape are {data.FITTING[words.fit]}"] if (rows["shapes"] != dataset.images.shape[2]).any() else []
        report(dataset, rows, source.kind, source.names, notes)
        draw(dataset, "contact_sheet.png")
    print("contact sheet:           contact_sheet.png")


# ---- preparing -----------------------------------------------------------------------------------------------------------------------------------

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
    source = sources.find(words.path, words.label, words.group_by, volumes=True)
    check(words, source)
    folder = Path(words.to).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--to {folder}: exists and is not empty; name a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        notes = write(source, part, words)
        shutil.rmtree(part / sources.UNPACKED, ignore_errors=True)
        draw(data.load(part), part / "contact_sheet.png")
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    made = sources.find(folder)
    report(*data.load_rows(made), f"prepared into {folder}", made.names, notes)
    print(f"contact sheet:           {folder / 'contact_sheet.png'}")


def check(words, source):
    for name in ("window", "percentiles"):
        pair = getattr(words, name)
        if pair and not pair[0] < pair[1]:
            raise ValueError(f"--{name} {pair[0]:g} {pair[1]:g}: the first must be the smaller")
    if words.window and words.percentiles:
        raise ValueError("--window and --percentiles: choose one")
    if words.percentiles and not 0 <= words.percentiles[0] < words.percentiles[1] <= 100:
        raise ValueError(f"--percentiles {words.percentiles[0]:g} {words.percentiles[1]:g}: between 0 and 100")
    if words.split and source.splits:
        raise ValueError(f"--split: {source.path} has splits already")
    if words.split:
        data.check_fractions(words.split)


def write(source, part, words):
    """images.npy, masks.npy, table.csv, rows.npz and info.json; returns notes on what was done."""
    files = [""] * len(source.names) if source.kind in sources.ARRAYS else source.files
    first = {"test": 0, "val": 1}                                           # of two copies the one that is never learnt from stays
    order = sorted(range(len(source.names)), key=lambda row: first.get(source.splits[row], 2)) if source.splits and words.dedupe else range(len(source.names))
    count, unreadable = Counter(), []
    kept, exact, near = [], set(), {}                                       # what is kept of each image; hashes; hashes of each group
    values = np.zeros(256, np.int64)
    with ThreadPoolExecutor(data.workers()) as pool, open(part / "images.npy", "wb") as images, open(part / "masks.npy", "wb") as masks:
        read, read_mask = source.open(part)
        size, channels = words.size, words.channels
        if not (size and channels):
            size, channels = plan(source, read, words, files, pool)

        def work(row):
            try:
                return pieces(read(row), read_mask(row) if source.masks else None, files[row], source, row, size, channels, words)
            except (ValueError, OSError) as error:
                return str(error)
        images.write(bytes(128))                                            # the header follows when the number of images is known
        masks.write(bytes(128))
        step = data.workers() * (1 if source.volumes else 64)                 # so many are in memory at a time
        for start in tqdm(range(0, len(order), step), desc=f"preparing {source.name}", leave=False):
            for row, done in zip(order[start:start + step], pool.map(work, order[start:start + step])):
                if isinstance(done, str):
                    unreadable.append(done)
                    continue
                finished, about = done
                count.update(about)
                group = source.groups[row] if source.groups else source.names[row] if about["slices"] > 1 else ""
                for piece in finished:
                    if words.dedupe and piece.hash and piece.hash in exact:
                        count["copies"] += 1
                    elif words.dedupe and group and is_near(piece.near, near.setdefault(group, [])):
                        count["near"] += 1
                    else:
                        exact.add(piece.hash)
                        near.setdefault(group, []).append(piece.near) if words.dedupe and group else None
                        images.write(piece.image)
                        masks.write(np.full((size, size), sources.NO_MASK, np.uint8) if piece.mask is None else piece.mask)
                        values += piece.values
                        kept.append((row, group, piece.hash, piece.shape, data.moments(piece.image[None])[0], piece.mask is not None))
        if not words.skip_unreadable:
            data.complain(source, unreadable)
        for line in unreadable[:10]:
            print(f"left out: {line}")                                      # said here only: what is prepared holds no file names
        count["unreadable"] = len(unreadable)
        if not kept:
            raise ValueError(f"{source.path}: no image is left; {'; '.join(notes_on(count))}")
        for file, shape in (images, (len(kept), channels, size, size)), (masks, (len(kept), size, size)):
            file.seek(0)
            file.write(npy_header(shape))
    notes = notes_on(count)
    numbers = [row for row, *_ in kept]
    pick = lambda values: [values[row] for row in numbers] if values else None                          # noqa: E731
    groups = [k[1] for k in kept]
    made = sources.Source(source.path, "preparation", pick(source.names), [], None, pick(source.labels), groups if any(groups) else None, pick(source.splits))
    rows = {"hashes": np.array([k[2] for k in kept], np.uint64), "shapes": np.array([k[3] for k in kept], np.int32), "moments": np.array([k[4] for k in kept])}
    np.savez(part / "rows.npz", **rows)
    mask_classes = ()
    if source.masks:
        stack = np.load(part / "masks.npy", mmap_mode="r+")
        mask_classes, mapped = data.settle_masks(source.path, stack, [k[5] for k in kept], values)
        stack.flush()
        notes += mapped
    else:
        (part / "masks.npy").unlink()
    labels = data.numbered(made.labels)[0] if made.labels else None
    persons = data.numbered([group or f"\0{row}" for row, group in enumerate(made.groups)])[0] if made.groups else None
    if words.split:
        stack = np.load(part / "images.npy", mmap_mode="r")
        made.splits = data.split(data.Dataset("", stack, labels, groups=persons), words.split, words.seed).splits.tolist()
    data.refuse_leaks(made, made.groups, "group {}")
    data.refuse_leaks(made, rows["hashes"].tolist(), *data.SAME_IMAGE)
    with open(part / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["split", "label", "group"])
        for row in range(len(kept)):
            table.writerow([made.splits[row] if made.splits else "", made.labels[row] if made.labels else "", "" if persons is None else persons[row]])
    info = {"label": words.label, "mask_classes": mask_classes, "count": len(kept), "size": size, "channels": channels, "fit": words.fit,
            "window": words.window, "percentiles": words.percentiles, "axis": words.axis, "seed": words.seed, "split": words.split, "notes": notes}
    (part / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    return notes


def notes_on(count):
    texts = {"unreadable": "{} unreadable files left out",
             "fourth": "{} volumes have a fourth dimension: its first entry was taken",
             "hounsfield": "{} volumes go below -500, as CT does: consider --window -160 240 (soft tissue) or -1000 400 (lung)",
             "empty": "{} slices without content dropped (fewer than 1 % of pixels above a tenth of full scale, and nothing in the mask)",
             "copies": "{} exact copies dropped",
             "near": f"{{}} near copies dropped (within {NEAR} of 64 bits of a kept image of the group)"}
    return [text.format(count[what]) for what, text in texts.items() if count[what]]


def plan(source, read, words, files, pool):
    """Size and channels from a sample: every volume takes a while to read, so few of them."""
    def look(row):
        try:
            return slices(read(row), files[row], words.axis)[0].shape
        except (ValueError, OSError):
            return None
    sample = sorted(set(np.linspace(0, len(source.names) - 1, 4 if source.volumes else data.SAMPLE).astype(int)))
    shapes = [shape for shape in pool.map(look, sample) if shape] or [(32, 32)]
    return words.size or data.common_size(shapes), words.channels or max(3 if len(shape) == 3 else 1 for shape in shapes)


def slices(array, file, axis):
    """(slices, rows, columns[, 3]) of whatever a file held."""
    if array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3:
        return array[None]
    if array.ndim == 4 and readers.suffix(file) in (".nii", ".nii.gz"):
        array = array[0]                                                    # first time or channel: (z, rows, columns)
    if array.ndim != 3 and array.shape[3:] != (3,):
        raise ValueError(f"{file}: shape {array.shape} is neither an image nor a volume")
    return np.moveaxis(array, axis, 0)


def pieces(array, mask, file, source, row, size, channels, words):
    """The finished images of one file, and what there is to say about it."""
    stack = slices(array, file, words.axis)                                 # (slices, rows, columns[, 3])
    count = Counter(slices=len(stack), fourth=array.ndim == 4 and stack.ndim == 3)
    masks = [None] * len(stack)
    if mask is not None:
        if mask.shape[:array.ndim] != array.shape[:mask.ndim]:
            raise ValueError(f"mask {source.masks[row]} is {' x '.join(map(str, mask.shape))}, but its image {source.names[row]} is "
                             f"{' x '.join(map(str, array.shape))}")
        masks = slices(mask, source.masks[row], words.axis)
    low, high = grey_range(stack, words)
    count["hounsfield"] = not words.window and stack.dtype.kind in "if" and float(stack.min()) < -500
    inverted = readers.small_is_bright(file) if readers.suffix(file) in readers.DICOM else False
    done = []
    for layer, mask in zip(stack, masks):
        image = eight_bits(layer, low, high)
        image = 255 - image if inverted else image
        mask = data.class_indices(mask, image, source, row)
        if len(stack) > 1 and (image > 25).mean() < 0.01 and (mask is None or not mask.any()):
            count["empty"] += 1
            continue
        values = np.zeros(256, np.int64) if mask is None else np.bincount(mask.ravel(), minlength=256)
        mask = None if mask is None else np.ascontiguousarray(data.fitted(mask, size, words.fit, Image.NEAREST))
        square = np.ascontiguousarray(data.planes(data.fitted(image, size, words.fit), channels))
        done.append(Piece(square, mask, data.pixel_hash(image), difference_hash(image), image.shape[:2], values))
    return done, count


def grey_range(stack, words):
    """What becomes 0 and 255; (None, None) for 8 bits that stay as they are."""
    if words.window:
        return words.window
    if stack.dtype in (np.uint8, bool) and not words.percentiles:
        return None, None
    some = stack.ravel()[::max(1, stack.size // 10 ** 6)]
    return np.nanpercentile(some, words.percentiles or (0.5, 99.5)).tolist()


def eight_bits(layer, low, high):
    if low is None:
        return np.ascontiguousarray(layer) * np.uint8(255) if layer.dtype == bool else np.ascontiguousarray(layer)
    scaled = (np.nan_to_num(layer.astype(np.float32), nan=low) - low) * (255 / (high - low or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def difference_hash(image):
    """64 bits: whether each cell of an 8 x 8 grid is darker than its right neighbour. Survives scaling and small changes of brightness."""
    gray = data.gray(image) if image.ndim == 3 else image
    if gray.dtype != np.uint8:
        gray = (gray >> 8).astype(np.uint8)
    grid = np.asarray(Image.fromarray(gray).resize((9, 8), Image.BILINEAR))
    return np.packbits(grid[:, 1:] > grid[:, :-1]).view(np.uint64)[0]


def is_near(hash, others):
    if not others:
        return False
    return BITS[(np.array(others, np.uint64) ^ hash).view(np.uint8)].reshape(-1, 8).sum(1).min() <= NEAR


def npy_header(shape):
    """The first 128 bytes of a .npy file of uint8."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": shape})
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


# ---- looking -------------------------------------------------------------------------------------------------------------------------------------

def report(dataset, rows, kind, names, notes):
    """Prints what a set holds."""
    count, channels, size, _ = dataset.images.shape
    print(f"{dataset.name}: {kind}; {count} images of {size} x {size}, {'colour' if channels == 3 else 'gray'}, {dataset.images.dtype.itemsize * 8} bits")
    for note in notes:
        print(f"  {note}")
    if rows is not None:
        shapes = rows["shapes"]
        low, high = shapes.min(0), shapes.max(0)
        print("sizes (rows x columns):  " + (f"all {low[0]} x {low[1]}" if (low == high).all() else
              f"{low[0]} to {high[0]} x {low[1]} to {high[1]}, {len(np.unique(shapes, axis=0))} different"))
    print("mean and std:            " + ", ".join(f"{m:.4f} {s:.4f}" for m, s in zip(dataset.mean, dataset.std)))
    splits = [name for name in ("train", "val", "test", "unlabeled") if dataset.splits is not None and (dataset.splits == name).any()] or ["all"]
    members = [dataset.rows(name) if dataset.splits is not None else np.arange(count) for name in splits]
    table = [["", *splits], ["images", *map(len, members)]]
    if dataset.groups is None:
        print("patients:                unknown (no group column, no --group-by): a split may tear one apart")
    else:
        table.append(["patients (groups)", *(len(np.unique(dataset.groups[part])) for part in members)])
    if dataset.labels is not None:
        for number, name in [*enumerate(dataset.classes)][:60] + [(-1, "no label")]:
            if number >= 0 or (dataset.labels == number).any():
                table.append([f"class {name}" if number >= 0 else name, *((dataset.labels[part] == number).sum() for part in members)])
        if len(dataset.classes) > max(60, count / 10):
            print(f"classes:                 {len(dataset.classes)}, so many that they may be patients: then --group-by parent")
    some = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)
    if dataset.masks is not None:
        masked = np.array([mask.min() < sources.NO_MASK for mask in dataset.masks])
        table.append(["with a mask", *(masked[part].sum() for part in members)])
        totals = sum(np.bincount(dataset.masks[row].ravel(), minlength=256) for row in some if masked[row])
        classes = np.flatnonzero(totals)
        print("mask classes:            " + ", ".join(f"{number} on {totals[number] / totals.sum():.2%} of the pixels" for number in classes))
    print_table(table)
    histogram([dataset.images[row] for row in some[::max(1, len(some) // 500)]])
    if rows is not None:
        copies(dataset, rows["hashes"], names, some)


def print_table(table):
    widths = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  " + str(line[0]).ljust(widths[0]) + "".join(str(cell).rjust(width + 2) for cell, width in zip(line[1:], widths[1:])))


def histogram(images):
    """Grey values of some images, sixteen steps of the full scale."""
    top = np.iinfo(images[0].dtype).max + 1
    counts = sum(np.histogram(image, 16, (0, top))[0] for image in images)
    print(f"grey values of {len(images)} images:")
    for step, share in enumerate(counts / counts.sum()):
        print(f"  {step * top // 16:6d} {'#' * round(60 * share / (counts.max() / counts.sum())):60s} {share:6.1%}")


def copies(dataset, hashes, names, some):
    first, repeated = {}, []
    for row, hash in enumerate(hashes.tolist()):
        if hash and first.setdefault(hash, row) != row:
            repeated.append((first[hash], row))
    print(f"exact copies:            {len(repeated)}" + "".join(f"; {names[a]} = {names[b]}" for a, b in repeated[:3]))
    if dataset.labels is not None:
        torn = sum(dataset.labels[a] != dataset.labels[b] for a, b in repeated)
        print(f"  of them with another class: {torn}") if torn else None
    near, kept = 0, {}
    for row in some:
        image = dataset.images[row]                                         # (C, H, W)
        hash = difference_hash(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
        others = kept.setdefault(0 if dataset.groups is None else dataset.groups[row], [])
        if is_near(hash, others):
            near += 1
        else:
            others.append(hash)
    print(f"near copies:             {near} of {len(some)} looked at (within {NEAR} of 64 bits of an earlier image"
          f"{' of the group' if dataset.groups is not None else ''}); --to FOLDER --dedupe drops {'them' if dataset.groups is not None else 'exact copies only'}")


def draw(dataset, sheet):
    """The contact sheet: images evenly over the classes, masks laid over them."""
    from medssl.common import plots
    order = np.arange(len(dataset)) if dataset.labels is None else np.argsort(dataset.labels, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(len(order), SHOWN)).astype(int)]            # evenly over the classes
    titles = None if dataset.labels is None else [dataset.classes[label] if label >= 0 else "no label" for label in dataset.labels[rows]]
    images = dataset.images[rows] / np.float32(np.iinfo(dataset.images.dtype).max)
    masks = None if dataset.masks is None else [dataset.masks[rows]]
    plots.sheet([("", images)], sheet, titles=titles, masks=masks, columns=8)


def report_volumes(source, sheet):
    """What raw volumes hold; the sheet shows the middle slice of some, each scaled by its percentiles."""
    from medssl.common import plots
    print(f"{source.name}: {source.kind}; {len(source.names)} files, among them volumes: prepare them with --to FOLDER")
    some = sorted(set(np.linspace(0, len(source.names) - 1, 24).astype(int)))
    read, read_mask = source.open(None)
    pictures, masks = [], []
    for row in some:
        array, mask = read(row), read_mask(row) if source.masks else None
        layers = slices(array, source.files[row], 0)
        low, high = np.nanpercentile(layers, (0.5, 99.5))
        print(f"  {source.names[row]}: {' x '.join(map(str, array.shape))}, values {np.nanmin(array):g} to {np.nanmax(array):g}"
              + (f", mask {' x '.join(map(str, mask.shape))} of {len(np.unique(mask))} classes" if mask is not None else ""))
        image = data.fitted(eight_bits(layers[len(layers) // 2], low, high), 192, "pad")
        pictures.append(data.planes(image, 3) / np.float32(255))
        if mask is not None:
            layers = slices(mask, source.masks[row], 0)
            mask = data.fitted(layers[len(layers) // 2].astype(np.uint8), 192, "pad", Image.NEAREST)
        masks.append(np.full((192, 192), sources.NO_MASK, np.uint8) if mask is None else mask)
    plots.sheet([("", np.stack(pictures))], sheet, masks=[np.stack(masks)] if source.masks else None, columns=6)
