"""What is printed and drawn of a set: counts, sizes, grey values, copies, and the contact sheet."""
import numpy as np
from PIL import Image

from ..errors import UserError
from ..pictures import sheet
from . import pixels
from .copies import NEAR, difference_hash, is_near
from .layouts import patient_hint
from .sources import NO_MASK, complain

SHOWN = 48                                                                  # images on the contact sheet
LOOKED_AT = 4000                                                            # images searched for near copies


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
    channels = [f"{mean:.4f} {std:.4f}" for mean, std in zip(dataset.mean, dataset.std, strict=True)]
    print("mean and std:            " + ", ".join(channels))
    if dataset.groups is None:
        print("patients:                unknown (no group column, no --group-by)")
        print("                         dealt by image: one patient may be on both sides of a split")
        hint = patient_hint(names)
        if hint:
            print(f"                         {hint}")
    if len(dataset.classes) > max(60, count / 10):
        print(f"classes:                 {len(dataset.classes)}: if these are patients, --group-by parent")
    some = np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int)
    masked = None
    if dataset.masks is not None:
        masked = np.array([mask.min() < NO_MASK for mask in dataset.masks])
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
        cells = [str(cell).rjust(width + 2) for cell, width in zip(cells, others, strict=True)]
        print("  " + name.ljust(first) + "".join(cells))


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
    images = pixels.unit(dataset.images[rows])
    masks = [] if dataset.masks is None else [dataset.masks[rows]]
    sheet([("", images, *masks)], path, titles or (), columns=8)


def report_volumes(source, path, size=192):
    """What raw volumes hold; a sheet, if asked for, shows the middle slice of some, scaled by its percentiles."""
    print(f"{source.name}: {source.kind}; {len(source.names)} files with volumes: prepare them with --to FOLDER")
    for note in [*source.notes, f"a group is {source.grouping or 'the volume'}"]:
        print(f"  {note}")
    if source.groups:
        print(f"patients (groups):       {len(set(source.groups))}")
    read, read_mask = source.open(None)
    pictures, masks, problems = [], [], []
    for row in sorted(set(np.linspace(0, len(source.names) - 1, 24).astype(int))):
        try:
            array, mask = read(row), read_mask(row)
        except UserError as error:
            problems.append(str(error))
            continue
        layers = pixels.slices(array, source.names[row], 0)
        middle, (low, high) = len(layers) // 2, np.nanpercentile(layers, (0.5, 99.5))
        print(f"  {source.names[row]}: {pixels.by(array.shape)}, values {np.nanmin(array):g} to {np.nanmax(array):g}"
              + (f", mask {pixels.by(mask.shape)} of {len(np.unique(mask))} classes" if mask is not None else ""))
        picture = pixels.fitted(pixels.eight_bits(layers[middle], low, high), size, "pad")
        pictures.append(pixels.unit(pixels.planes(picture, 3)))                   # (3, size, size)
        masks.append(np.full((size, size), NO_MASK, np.uint8))
        if mask is not None and mask.shape == array.shape:
            layer = pixels.slices(mask, source.names[row], 0)[middle].astype(np.uint8)
            masks[-1] = pixels.fitted(layer, size, "pad", Image.NEAREST)
    complain(source, problems)
    layers = [np.stack(masks)] if source.masks else []
    if path:
        sheet([("", np.stack(pictures), *layers)], path, columns=6)
        print(f"contact sheet:           {path}")
