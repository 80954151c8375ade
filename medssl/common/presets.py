"""What a run is like where no flag says it.

`--preset paper` is the method's RECIPE as it stands. `--preset small`, the default, is for up to some tens of
thousands of images on two CPU cores or one small GPU, for minutes: a small network, AdamW, size and length by the set.
What a method needs there stands beside its RECIPE as SMALL: words of its constructor, and the keys named in RESERVED.
"""

import contextlib
import sys
import tempfile
import zipfile
from dataclasses import dataclass

import numpy as np

from .data import find, readers
from .data.dataset import LEARNT_FROM
from .errors import UserError

BASE = {"encoder": "tiny", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "batch": 64, "warmup": 2}
SIDES = 64, 96              # the images' own side rounded to a multiple of 32, but from .. to so many pixels
PASSES = 200                # over the images; but
LEAST = 500                 # at least so many steps, on phantoms just these, unless SMALL says another number; and
MINUTES = 8                 # no more steps than fit into so many minutes (RESULTS: kNN stands still by then), if
PACE = 35e9                 # two CPU cores do so many operations a second (measured: 26 with pcrl to 52 with byol)
QUEUE = 1 / 4               # of the images is what a queue holds at most
IN_COLOUR = {"ct": "histology", "slices": "histology"}              # views made for gray slices -> for colour images
RESERVED = ("views", "steps", "stem", "lr", "batch")                # in a method's SMALL; the rest are its words


@dataclass
class Found:
    """What a set holds, as far as it can be seen from a few of its images."""
    images: int                                     # to learn from
    side: int                                       # pixels
    channels: int


PHANTOMS = Found(1180, 64, 1)                       # the built-in set can be drawn at any size


def look(path, label):
    """What there is to learn from, before the set is decoded."""
    if path == "phantoms":
        return PHANTOMS
    source = find(path, label)
    count = len(source.names) if source.splits is None else sum(split in LEARNT_FROM for split in source.splits)
    shapes = [shape for shape in some_shapes(source) if len(shape) > 1] or [(SIDES[0], SIDES[0])]
    channels = max(3 if len(shape) == 3 else 1 for shape in shapes)
    return Found(count, int(np.median([max(shape[:2]) for shape in shapes])), channels)


def some_shapes(source, most=16):
    """Shapes of a few images. What cannot be read is left to decoding, which lists all of it."""
    shapes = []
    with contextlib.suppress(ValueError, OSError, KeyError, zipfile.BadZipFile):
        if source.kind == "npz":                                            # says it in its head, without unpacking
            with zipfile.ZipFile(source.path) as archive:
                return [readers.npz_header(archive, "train_images")[0][1:]]
        with tempfile.TemporaryDirectory() as folder:
            read = source.open(folder)[0]
            for row in sorted(set(np.linspace(0, len(source.names) - 1, most).astype(int).tolist())):
                with contextlib.suppress(ValueError, OSError):
                    shapes.append(np.shape(read(row)))
    return shapes


def paper(cls):
    """The RECIPE, and the network that most of the works use."""
    return {"encoder": "resnet18", **recipe_of(cls)}


def small(classes, found):
    """What stands in the place of the (first) method's RECIPE."""
    plan = BASE | {"size": min(max(SIDES[0], 32 * round(found.side / 32)), SIDES[1]), "least": LEAST}
    while plan["batch"] > max(2, found.images):
        plan["batch"] //= 2
    own = [small_of(cls) for cls in classes]
    plan |= {key: value for key, value in own[0].items() if key in ("lr", "batch")}
    plan |= {"least": own[0]["steps"]} if "steps" in own[0] else {}
    stems = [each["stem"] for each in own if "stem" in each]
    return plan | ({"stem": stems[0]} if stems else {})


def length(plan, given, found, cost):
    """Steps of the run and of its warm-up. A short run keeps the share of a long one's warm-up, a tenth at most."""
    per_epoch = max(1, found.images // plan["batch"])
    if "steps" in given:
        steps = given["steps"]
    elif "epochs" in given or "least" not in plan:
        steps = max(1, round(plan["epochs"] * per_epoch))
    elif found is PHANTOMS:
        steps = plan["least"]
    else:
        affordable = int(MINUTES * 60 / seconds(1, plan["batch"], cost))
        steps = max(1, min(affordable, max(plan["least"], PASSES * per_epoch)))
    warmup = round(plan["warmup"] * per_epoch)
    if "warmup" in given and warmup > steps:
        raise UserError(f"--warmup {plan['warmup']:g}: so many epochs are {warmup} steps, more than the run's {steps}")
    return steps, warmup if "warmup" in given else min(warmup, steps // 10)


def seconds(steps, batch, cost):
    """How long so many steps take on two CPU cores, roughly: backward costs twice what forward does."""
    return 3 * cost * steps * batch / PACE


def recipe_of(cls):
    return sys.modules[cls.__module__].RECIPE


def small_of(cls):
    return sys.modules[cls.__module__].SMALL
