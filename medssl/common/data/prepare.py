"""`--to FOLDER`: writes a set of pictures, masks and a split.csv, a layout that opens without a flag and that any
viewer shows. Volumes are cut into slices (volumes.py), copies left out, patients dealt to splits."""

import csv
import os
import re
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from . import decode, volumes
from .dataset import Dataset, check_fractions, new_splits, numbered, refuse_leaks
from .sources import Source, is_volume

NEAR = 6                                                                    # differing bits of 64
BITS = np.array([bin(number).count("1") for number in range(256)], np.uint8)


def write_set(source, folder, args):
    """The set as `args` want it, whole or not at all. Returns notes on what was done."""
    folder = Path(folder).expanduser()
    check_flags(source, folder, args)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        rows, notes = write_pictures(source, part, args)
        write_table(source, part, rows, args)
        if folder.is_dir():
            folder.rmdir()                                                  # it is empty
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return notes


def check_flags(source, folder, args):
    for name, (low, high) in (("window", (-np.inf, np.inf)), ("percentiles", (0, 100))):
        pair = getattr(args, name)
        if pair and not (low <= pair[0] < pair[1] <= high and np.isfinite(pair).all()):
            raise UserError(f"--{name} {pair[0]:g} {pair[1]:g}: the first must be the smaller, from {low} to {high}")
    if args.window and args.percentiles:
        raise UserError("--window and --percentiles: choose one")
    if args.split and source.splits:
        raise UserError(f"--split: {source.path} has splits already")
    if args.split:
        check_fractions(args.split)
    if Path(source.path).resolve() in folder.resolve().parents:
        raise UserError(f"--to {folder}: lies inside the set and would become a part of it; name a folder elsewhere")
    if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: exists and is not an empty folder; name a new one")


def pieces(source, args):
    """For each file or volume: its row, and PatientID and slices as volumes.slices gives them, or the error."""
    if source.files is None:
        for row, image in enumerate(decode.rows_of(source)):
            yield row, lambda image=image: ("", [(None, visible(image, args), None)])
        return
    solid = {file: row for row, (name, file) in enumerate(zip(source.names, source.files)) if is_volume(name, file)}
    for row, file in enumerate(source.files):
        if file not in solid:
            yield row, lambda row=row: ("", [(None, *pair(source, row, args))])
    if solid:
        volumes.needed()
    for files in volumes.units(list(solid)) if solid else ():
        row = solid[files[0]]
        mask = source.masks and source.masks[row]
        yield row, lambda files=files, mask=mask: volumes.slices(files, mask, args.window, args.percentiles, args.axis)


def visible(image, args):
    """The pixels as 8 or 16 bits."""
    if args.window or args.percentiles or image.dtype not in (np.uint8, np.uint16):
        return volumes.eight_bits(image, volumes.grey_range(image, args.window, args.percentiles))
    return image


def pair(source, row, args):
    """A picture and its mask, or None."""
    image, mask = decode.read(source.files[row]), source.masks and source.masks[row]
    return visible(image, args), decode.mask_of(mask, image, source.names[row]) if mask else None


def write_pictures(source, part, args):
    """images/ and masks/; returns [(row of the source, file, mask's file, group)] and notes."""
    rows, problems, dropped = [], [], {"copies": 0, "near copies": 0}
    exact, near = set(), {}
    work = sorted(pieces(source, args), key=lambda piece: place_in_line(source, piece[0], args))
    for row, produce in tqdm(work, desc=f"writing {source.name}", unit=" files", leave=False):
        try:
            patient, layers = produce()
        except (UserError, OSError) as error:
            problems.append(str(error))
            continue
        group = source.groups[row] if source.groups and not patient else ""
        if patient:
            group = f"patient {patient}"                                    # split.csv keeps a number
        elif not group and len(layers) > 1:
            group = source.names[row]                                       # the slices of a volume stay together
        for number, image, mask in layers:
            kind = copy_of(image, group, exact, near) if args.dedupe else None
            if kind:
                dropped[kind] += 1
                continue
            stem = re.sub(r"(\.nii)?\.\w+$", "", source.names[row]) if source.files else f"{row:06d}"
            stem = re.sub(r"[^\w./-]", "_", stem).removeprefix("images/") 
            stem += f"-{number:03d}" if len(layers) > 1 else ""
            rows.append((row, write_png(image, part, "images", stem, args), mask is not None and
                         write_png(mask, part, "masks", stem, args, Image.NEAREST), group))
    if not args.skip_unreadable:
        decode.refuse_files(source, problems)
    if not rows:
        raise UserError(f"{source.path}: no image is left; another --window, or none, may show something")
    notes = [f"{len(problems)} unreadable files left out: {'; '.join(problems[:10])}"] * bool(problems)
    return rows, notes + [f"{count} {kind} dropped" for kind, count in dropped.items() if count]


def place_in_line(source, row, args):
    """Of copies, the first is kept: a test image, which nobody learns from, before a training image."""
    first = {"test": 0, "val": 1}.get(source.splits[row], 2) if args.dedupe and source.splits else 0
    return first, row


def copy_of(image, group, exact, near):
    """Whether an image before it was the same, or within a group nearly the same: two patients may look alike."""
    pixels, bits, others = decode.pixel_hash(image), difference_hash(image), near.setdefault(group, [])
    if pixels and pixels in exact:
        return "copies"
    differing = BITS[(np.array(others, np.uint64) ^ bits).view(np.uint8)].reshape(-1, 8).sum(1)
    if group and others and differing.min() <= NEAR:
        return "near copies"
    exact.add(pixels)
    others.append(bits)
    return None


def difference_hash(image):
    """64 bits: whether each cell of an 8 x 8 grid is darker than its right neighbour."""
    image = decode.planes(image, 1)[0]
    image = (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image.astype(np.uint8)
    grid = np.asarray(Image.fromarray(image).resize((9, 8), Image.BILINEAR))
    return np.packbits(grid[:, 1:] > grid[:, :-1]).view(np.uint64)[0]


def write_png(image, part, kind, stem, args, method=Image.BILINEAR):
    """One PNG; returns its path below the new folder."""
    if args.size:
        image = decode.fitted(image, args.size, method)
    if kind == "images" and args.channels:
        image = decode.planes(image, args.channels).transpose(1, 2, 0).squeeze()
    path = part / kind / f"{stem}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        raise UserError(f"two images would be called {kind}/{stem}.png: rename one")
    Image.fromarray(np.ascontiguousarray(image.astype(np.uint8) if kind == "masks" else image)).save(path)
    return path.relative_to(part).as_posix()


def write_table(source, part, rows, args):
    """split.csv: file, label, mask, split and group of each picture."""
    def column(values):
        return [values[row] for row, *_ in rows] if values else None
    labels, splits = column(source.labels), column(source.splits)
    groups = [group for *_, group in rows] if any(group for *_, group in rows) else None
    if args.split:
        one = numbered([group or f"\0{row}" for row, group in enumerate(groups)])[0] if groups else None
        dataset = Dataset(source.name, rows, numbered(labels)[0] if labels else None, groups=one)
        splits = new_splits(dataset, np.arange(len(rows)), check_fractions(args.split), args.seed).tolist()
    made = Source(source.path, "table", [file for _, file, *_ in rows], groups=groups, splits=splits)
    refuse_leaks(made, groups, "group {}")
    numbers = {group: f"g{number:04d}" for number, group in enumerate(sorted(set(groups or ())))}
    columns = {"file": [file for _, file, *_ in rows], "label": labels, "mask": [mask or "" for _, _, mask, _ in rows],
               "split": splits, "group": groups and [numbers[group] if group else "" for group in groups]}
    columns = {name: values for name, values in columns.items() if values and any(values)}
    with open(part / "split.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values())])
