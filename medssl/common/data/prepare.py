"""Looking at a set of images, and preparing one: the command line.

    python -m medssl.common.data PATH               says what is there; --sheet FILE.png draws some of it
    python -m medssl.common.data PATH --to FOLDER --window -160 240 --dedupe --split 0.7 0.1 0.2

Preparing turns volumes into slices and 16-bit or floating values into 8 bits, which everything here can train on.
FOLDER then holds images.npy (N, C, H, W), masks.npy (N, H, W) where there are masks, table.csv (split, label and group
number of each image; no file name, no patient's name), rows.npz (hash, original shape and moments of each image),
info.json (how it was made) and contact_sheet.png. It appears whole or not at all.

Grey values     --window LO HI maps LO..HI to 0..255 (Hounsfield units for CT). Without it, what is not 8 bits wide is
                scaled from its 0.5th to its 99.5th percentile (--percentiles), over the whole volume, so that its
                slices stay comparable. DICOM files whose small values are bright (MONOCHROME1) are inverted.
Slices          along --axis of (z, rows, columns); of a fourth dimension the first entry is taken. A slice without
                content is dropped: fewer than 1 % of its pixels above a tenth of full scale, and nothing in its mask.
Groups          what --group-by finds or a table gives, else DICOM's patient, else the volume.
--dedupe        drops images whose pixels another one has already (kept: test, then val, then train), and within a
                group each image whose 64-bit difference hash is within 6 bits of one kept before. Without groups only
                exact copies are dropped: two patients may look alike.
"""
import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np

from .. import cli
from ..errors import UserError
from . import cache, decode, load, phantoms, pixels, sources, stacks
from . import dataset as sets
from .copies import NEAR
from .layouts import find
from .look import draw, report, report_volumes
from .sources import SHEET


def main(arguments=None):
    parser = cli.Parser(prog="python -m medssl.common.data",
                        description="Says what a set of images holds; with --to, prepares it for training.")
    flag = parser.add_argument
    flag("path", type=cli.filled, help="folder, split.csv, .npz, .npy, a volume, or phantoms")
    flag("--to", type=cli.filled, metavar="FOLDER", help="prepare the set into this new folder")
    flag("--size", type=cli.side,
         help="side of the images (default: the common one, or the median to a multiple of 32)")
    flag("--channels", type=int, choices=(1, 3), help="gray or colour (default: as the files are)")
    flag("--fit", choices=tuple(pixels.FITTING), default="pad", help="how images become square (default: pad)")
    flag("--label", type=cli.filled, default="label", help="column of split.csv")
    flag("--group-by", type=cli.filled, metavar="REGEX",
         help="patient: first bracket, or whole match, in the file name; or: parent")
    flag("--cache", type=cli.filled, metavar="DIR",
         help="for decoded images (default: $MEDSSL_CACHE or ~/.cache/medssl)")
    flag("--seed", type=cli.whole, default=0, help="of --split, and of the phantoms")
    flag("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey values mapped to 0..255")
    flag("--percentiles", type=float, nargs=2, metavar=("LO", "HI"), help="the same by percentiles (default 0.5 99.5)")
    flag("--axis", type=int, choices=(0, 1, 2), default=0, help="of (z, rows, columns), that volumes are cut across")
    flag("--dedupe", action="store_true", help="drop exact copies, and near copies within a group")
    flag("--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="deal the groups: 0.7 0.1 0.2")
    flag("--sheet", type=cli.filled, metavar="FILE.png", help="draw some of the images, with their masks, here")
    flag("--skip-unreadable", action="store_true", help="go on without the files that cannot be read")
    words = parser.parse_args(arguments)
    if words.to and words.sheet:
        raise UserError("--sheet is for looking; with --to, the sheet lies in the new folder")
    if words.to:
        prepare(words)
        return
    for name in ("window", "percentiles", "split", "dedupe", "skip_unreadable", "axis"):
        if getattr(words, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} does something only when preparing: add --to FOLDER")
    look(words)


def look(words):
    """Prints what a set holds, and draws its contact sheet where one is asked for."""
    sheet = Path(words.sheet) if words.sheet else None
    if sheet and (sheet.is_symlink() or sheet.exists() or sheet.suffix.lower() != ".png"
                  or not sheet.parent.is_dir()):
        raise UserError(f"--sheet {sheet}: name a new .png file in a folder that exists")
    if words.path == "phantoms":
        check_phantoms(words)
        dataset = phantoms.opened(words.size, words.channels, words.seed)
        report(dataset, None, sources.BUILT_IN, None, ["a group is a patient"])
    else:
        source = find(words.path, words.label, words.group_by, volumes=True)
        if source.volumes:
            report_volumes(source, words.sheet)
            return
        dataset, rows = cache.load_rows(source, words.size, words.channels, words.cache, words.fit)
        notes = [f"a group is {source.grouping}"] if source.grouping else []
        if (rows["shapes"][:, 0] != rows["shapes"][:, 1]).any():
            notes.append(f"those that are not square are {pixels.FITTING[words.fit]}")
        report(dataset, rows, source.kind, source.names, notes)
    if words.sheet:
        draw(dataset, words.sheet)
        print(f"contact sheet:           {words.sheet}")


# ---- preparing

def prepare(words):
    folder = Path(words.to).expanduser()
    if words.path == "phantoms":
        check_phantoms(words)
        source = stacks.from_dataset(phantoms.opened(words.size, None, words.seed))
    else:
        source = find(words.path, words.label, words.group_by, volumes=True)
    check(words, source, folder)
    for note in source.notes:
        print(f"{source.name}: {note}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        notes = write(source, part, words)
        draw(load(part), part / SHEET)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    made = find(folder)
    if source.grouping or source.volumes:
        notes = [f"a group is {source.grouping or 'the volume'}", *notes]
    report(*cache.load_rows(made), f"prepared into {folder}", made.names, notes)
    print(f"contact sheet:           {folder / SHEET}")


def check_phantoms(words):
    """Before they are drawn, which takes a while."""
    if words.label != "label" or words.group_by:
        raise UserError("--label and --group-by are for sets of files; the phantoms come with both")
    if words.split:
        raise UserError("--split: the phantoms have splits already")


def check(words, source, folder):
    for name in ("window", "percentiles"):
        pair = getattr(words, name)
        if pair and not -np.inf < pair[0] < pair[1] < np.inf:
            raise UserError(f"--{name} {pair[0]:g} {pair[1]:g}: the first must be the smaller, and both finite")
    if words.window and words.percentiles:
        raise UserError("--window and --percentiles: choose one")
    if words.percentiles and not 0 <= words.percentiles[0] < words.percentiles[1] <= 100:
        raise UserError(f"--percentiles {words.percentiles[0]:g} {words.percentiles[1]:g}: between 0 and 100")
    if words.split and source.splits:
        raise UserError(f"--split: {source.path} has splits already")
    if words.split:
        sets.check_fractions(words.split)
    beside = sources.BUILT_IN, sources.PREPARED, "split.csv", "images and masks"            # other folders do not count
    if source.kind not in beside and Path(source.path).resolve() in folder.resolve().parents:
        raise UserError(f"--to {folder}: lies inside the set and would become a part of it; name a folder elsewhere")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: exists and is not empty; name a new folder")


def write(source, part, words):
    """images.npy, masks.npy, rows.npz, table.csv and info.json; returns notes on what was done."""
    wanted = decode.Wanted(words.size, words.channels, words.fit, True, words.window, words.percentiles, words.axis,
                           words.dedupe, words.skip_unreadable)
    made = decode.decode(source, part, wanted)
    notes = notes_on(made.count)
    if not made.rows:
        hint = "; another --window, or none, may show something" if made.count["empty"] else ""
        raise UserError(f"{source.path}: no image is left; {'; '.join(notes)}{hint}")
    notes += made.notes
    write_table(source, part, made, words)
    info = {name: getattr(words, name) for name in ("label", "fit", "window", "percentiles", "axis", "split", "seed")}
    info |= {"count": len(made.rows), "size": made.size, "channels": made.channels, "mask_classes": made.mask_classes}
    info["notes"] = notes
    (part / "info.json").write_text(json.dumps(info, indent=1) + "\n")
    return notes


def write_table(source, part, made, words):
    """table.csv: split, label and group number of each image that was made."""
    names, labels, splits = ([column[row] for row in made.rows] if column else None
                             for column in (source.names, source.labels, source.splits))
    groups = made.groups if any(made.groups) else None
    numbers = sets.numbered([group or f"\0{row}" for row, group in enumerate(groups)])[0] if groups else None
    if words.split:
        stack = np.load(part / "images.npy", mmap_mode="r")                 # (N, C, H, W)
        dataset = sets.Dataset("", stack, sets.numbered(labels)[0] if labels else None, groups=numbers)
        splits = sets.split(dataset, words.split, words.seed).splits.tolist()
    result = sources.Source(source.path, "preparation", names, [], None, labels, groups, splits)
    sets.refuse_leaks(result, groups, "group {}")
    sets.refuse_leaks(result, made.hashes, *sets.SAME_IMAGE)
    empty = [""] * len(names)
    with open(part / "table.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["split", "label", "group"])
        table.writerows(zip(splits or empty, labels or empty, empty if numbers is None else numbers, strict=True))


def notes_on(count):
    texts = {"unreadable": "{} unreadable files left out",
             "fourth": "{} volumes have a fourth dimension: its first entry was taken",
             "hounsfield": "{} volumes go below -500, as CT does: consider --window -160 240 (soft tissue)",
             "empty": "{} slices without content dropped (fewer than 1 % of pixels above a tenth of full scale)",
             "copies": "{} exact copies dropped",
             "near": f"{{}} near copies dropped (within {NEAR} of 64 bits of a kept image of the group)"}
    return [text.format(count[what]) for what, text in texts.items() if count[what]]
