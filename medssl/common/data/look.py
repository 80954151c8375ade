"""What is in a set of images, and the command line that says it.

    python -m medssl.common.data PATH                       counts, sizes, grey values; --sheet FILE.png draws some
    python -m medssl.common.data PATH --to FOLDER --window -160 240 --dedupe --split 0.7 0.1 0.2
"""

import os
import re
from pathlib import Path

import numpy as np

from .. import cli, files
from ..pictures import sheet
from . import decode, phantoms, prepare, volumes
from .dataset import by, unit
from .sources import find, is_volume

SHOWN = 48                                                                  # images on the sheet


def main(arguments=None):
    parser = cli.Parser(prog="python -m medssl.common.data",
                        description="Says what a set of images holds; with --to, writes it as pictures.")
    add = parser.add_argument
    add("path", type=cli.filled, help="folder, split.csv, .npz, .npy, a volume, or phantoms")
    add("--label", type=cli.filled, default="label", help="column of split.csv")
    add("--group-by", type=cli.filled, metavar="REGEX",
        help="patient: first bracket, or whole match, in the file name; or: parent")
    add("--size", type=cli.side, help="side of the images")
    add("--channels", type=int, choices=(1, 3), help="gray or colour (default: as the files are)")
    add("--sheet", type=cli.filled, metavar="FILE.png", help="draw some of the images, with their masks, here")
    add("--cache", type=cli.filled, metavar="DIR", help="for decoded images (or $MEDSSL_CACHE, or ~/.cache/medssl)")
    add("--to", type=cli.filled, metavar="FOLDER", help="write the set into this new folder, as the flags below say")
    add("--window", type=float, nargs=2, metavar=("LO", "HI"), help="grey values that become 0 and 255")
    add("--percentiles", type=float, nargs=2, metavar=("LO", "HI"), help="the same by percentiles (volumes: 0.5 99.5)")
    add("--axis", type=int, choices=(0, 1, 2), default=0, help="of (z, rows, columns), that volumes are cut across")
    add("--dedupe", action="store_true", help="drop exact copies, and near copies within a group")
    add("--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"), help="deal the groups: 0.7 0.1 0.2")
    add("--skip-unreadable", action="store_true", help="leave out what cannot be read")
    add("--seed", type=cli.whole, default=0, help="of --split")
    args = parser.parse_args(arguments)
    for name in ("window", "percentiles", "axis", "dedupe", "split", "skip_unreadable"):
        if not args.to and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} does something only with --to FOLDER")
    if args.sheet and (os.path.lexists(args.sheet) or not args.sheet.endswith(".png")):
        parser.error(f"--sheet {args.sheet}: name a new file that ends in .png")
    if args.path == "phantoms":
        if args.to:
            parser.error("--to: the phantoms are built in, and open at any size")
        return print_counts(phantoms.opened(args.size, args.channels), "built in", args)
    source = find(args.path, args.label, args.group_by, volumes=True)
    if args.to:
        for note in prepare.write_set(source, args.to, args):
            print(note)
        source = find(args.to)
    elif any(map(is_volume, source.names, source.files or ())):
        return look_at_volumes(source)
    print_counts(decode.open_source(source, args.size, args.channels, args.cache), source.kind, args, source)


def look_at_volumes(source):
    volumes.needed()
    found = volumes.units([file for name, file in zip(source.names, source.files) if is_volume(name, file)])
    print(f"{source.path}: {len(found)} volumes; cut them into slices with --to FOLDER. The first of them:")
    for paths in found[:10]:
        array = volumes.turned(volumes.read_volume(paths)[0])
        print(f"  {os.path.relpath(paths[0], source.path)}: {by(array.shape)}, values {array.min():g} to "
              f"{array.max():g}")
        if array.dtype.kind in "if" and array.min() < -500:
            print("    below -500, as in CT: consider --window -160 240 (soft tissue)")


def print_counts(dataset, kind, args, source=None):
    """Prints what a set holds."""
    count, channels, size, _ = dataset.images.shape
    print(f"{dataset.name}: {kind}; {count} images of {size} x {size}, {'colour' if channels == 3 else 'gray'}, "
          f"{dataset.images.dtype.itemsize * 8} bits")
    print("mean and deviation: " + ", ".join(f"{m:.4f} {s:.4f}" for m, s in zip(dataset.mean, dataset.std)))
    if source and source.grouping and source.groups:
        print(f"a group is {source.grouping}")
    if dataset.groups is None:
        print("no patient numbers: dealt by image, one patient may be on both sides of a split")
        print(patient_hint(dataset.names) or "--group-by REGEX takes them from the file names")
    if len(dataset.classes) > max(60, count / 10):
        print(f"{len(dataset.classes)} classes: if these are patients, --group-by parent")
    table = counts(dataset)
    widths = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  " + "  ".join(str(cell).ljust(widths[0]) if i == 0 else str(cell).rjust(widths[i])
                               for i, cell in enumerate(line)))
    some = dataset.images[np.linspace(0, count - 1, min(count, 500)).astype(int)]
    shares = np.histogram(some, 10, (0, np.iinfo(some.dtype).max + 1))[0] / some.size
    print("grey values by tenths of the scale: " + " ".join(f"{share:.0%}" for share in shares))
    if args.sheet:
        draw_sheet(dataset, files.check_target(args.sheet, "--sheet"))
        print(f"some of the images: {args.sheet}")


def patient_hint(names):
    """A line about names such as P012_03.png that look like several files of one patient, or ""."""
    matches = [re.match(r"([A-Za-z]*)\d+(?=[_-])", os.path.basename(name)) for name in names or []]
    if not matches or not all(matches) or len({match[1] for match in matches}) > 1:
        return ""
    groups, pattern = {match[0] for match in matches}, f"{matches[0][1]}\\d+"
    if not 1 < len(groups) <= len(matches) / 2:
        return ""
    return f"files that look like one patient: `--group-by '{pattern}'` makes {len(groups)} groups"


def counts(dataset):
    """Lines of a table: images, groups, classes and masks in each split."""
    splits, parts = ["all"], [np.arange(len(dataset))]
    if dataset.splits is not None:
        splits = [name for name in ("train", "val", "test", "unlabeled") if len(dataset.rows(name))]
        parts = [dataset.rows(name) for name in splits]
    table = [["", *splits], ["images", *map(len, parts)]]
    if dataset.groups is not None:
        table.append(["patients (groups)", *(len(np.unique(dataset.groups[part])) for part in parts)])
    if dataset.labels is not None:
        table += [[f"class {name}", *((dataset.labels[part] == number).sum() for part in parts)]
                  for number, name in [*enumerate(dataset.classes)][:60]]
        table.append(["no label", *((dataset.labels[part] < 0).sum() for part in parts)])
    if dataset.masks is not None:
        masked = np.array([mask.min() < decode.NO_MASK for mask in dataset.masks])
        table.append(["with a mask", *(masked[part].sum() for part in parts)])
    return table


def draw_sheet(dataset, path):
    """Images evenly over the classes, masks laid over them."""
    order = np.arange(len(dataset)) if dataset.labels is None else np.argsort(dataset.labels, kind="stable")
    rows = order[np.linspace(0, len(order) - 1, min(len(order), SHOWN)).astype(int)]
    titles = () if dataset.labels is None else [(*dataset.classes, "no label")[label] for label in dataset.labels[rows]]
    masks = [] if dataset.masks is None else [dataset.masks[rows]]
    sheet([("", unit(dataset.images[rows]), *masks)], Path(path), titles, columns=8)
