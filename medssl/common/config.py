"""What a run is like where no flag says it.

`--preset paper` is the RECIPE of the (first) method as it stands. `--preset small`, the default, is for up to some tens
of thousands of images on two CPU cores or one small GPU: a small network, AdamW, size and length by the set. What a
method needs there stands beside its RECIPE as SMALL.

The namespace of the command line goes one way: `complete` fills what no flag said, the loop takes it as `training`
makes it, config.json keeps it, and --resume reads it from there. Methods are handed in as {name: class}.
"""

import argparse
import ast
import inspect
import math
import platform
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from . import augment, cli, data, files, loop, optim, unet
from .errors import UserError

BASE = {"encoder": "tiny", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "batch": 64, "warmup": 2}
SIDES = 64, 96                      # the images' own side rounded to a multiple of 32, but from .. to so many pixels
PASSES = 200                        # over the images, but
LEAST, MOST = 500, 2000             # so many steps: on cells, 5190 images, validation kNN stands still before the last
QUEUE = 1 / 4                       # of the images is what a queue holds at most
IN_COLOUR = {"ct": "histology", "slices": "histology"}              # views made for gray slices -> for colour images
NO_WORDS = ("views", "steps", "stem", "lr", "batch")                # in a method's SMALL; the rest are its words
FILLED = "encoder", "augment", "decoder", "small", "channels", "size", "mean", "parts", "weights"   # not with --set
NOT_KEPT = "resume", "out", "set", "views", "epochs"                # of the flags, in config.json
KINDS = {bool: bool, int: int, float: (int, float), str: (str, type(None))}  # kind of a default -> what may replace it


@dataclass
class Found:
    """What a set holds, as far as a few of its images show it."""
    images: int                     # to learn from
    side: int                       # pixels
    channels: int
    fixed_length: bool = False      # the preset's least number of steps is the length


@dataclass
class Part:
    """One method of a run: its views, and the words of its constructor and of its decoder's."""
    views: str
    views_small: str | None = None
    words: dict = field(default_factory=dict)
    decoder: dict = field(default_factory=dict)
    weight: float = 1.0             # of its loss, beside other parts
    asked: dict = field(default_factory=dict)       # the words that --set gave
    queue_cut: int | None = None    # the queue's size before it was cut


# ---- completing the command line

def look(args):
    """The Source of the images (the word phantoms for the built-in ones), and what it holds."""
    if args.data == "phantoms":
        return "phantoms", Found(1180, 64, 1, fixed_length=True)            # drawn at any size
    source = data.find(args.data, args.label)
    splits = source.splits or ["train"] * len(source.names)
    learnt_from = sum(split in data.LEARNT_FROM for split in splits)
    if args.deal is not None:                                               # 70 % of all but the unlabelled ones
        unlabeled = sum(split == "unlabeled" for split in splits)
        learnt_from = unlabeled + round(0.7 * (len(splits) - unlabeled))
    shapes = [shape for shape in data.shapes(source) if len(shape) > 1] or [(SIDES[0], SIDES[0])]
    channels = max(3 if len(shape) == 3 else 1 for shape in shapes)
    return source, Found(learnt_from, int(np.median([max(shape[:2]) for shape in shapes])), channels)


def complete(args, methods, found):
    """Fills in what no flag said. Afterwards warmup is counted in steps, and options is a dict."""
    names = names_of(args.method, methods)
    classes = [methods[name] for name in names]
    plan = small(classes, found) if args.preset == "small" else {"encoder": "resnet18", **recipe_of(classes[0])}
    options = read_settings(args.options, "--options")
    if args.optimizer in (None, plan["optimizer"]):                         # keywords belong to their optimiser
        options = plan.get("options", {}) | options
    given = {name for name in ("steps", "epochs", "warmup") if getattr(args, name) is not None}
    for name in ("encoder", "size", "batch", "optimizer", "lr", "weight_decay", "weight_decay_end", "clip", "warmup"):
        if getattr(args, name) is None:
            setattr(args, name, plan.get(name))
    if args.stem is None:
        args.stem = "small" if args.size < 40 else plan.get("stem", "default")
    if args.data != "phantoms":
        args.data = str(Path(args.data).resolve())
    args.options = options
    check_optimizer(args.optimizer, options)
    found.channels = min(found.channels, args.channels or 3)
    args.parts = parts_of(methods, names, args.set, args.views, found if args.preset == "small" else None)
    args.steps, args.warmup = length(args, plan, given, found)


def recipe_of(cls):
    return sys.modules[cls.__module__].RECIPE


def small_of(cls):
    return sys.modules[cls.__module__].SMALL


def small(classes, found):
    """What stands in the place of the (first) method's RECIPE."""
    plan = BASE | {"size": min(max(SIDES[0], 32 * round(found.side / 32)), SIDES[1]), "least": LEAST}
    while plan["batch"] > max(2, found.images):
        plan["batch"] //= 2
    own = [small_of(cls) for cls in classes]
    plan |= {key: own[0][key] for key in ("lr", "batch") if key in own[0]}
    plan["least"] = own[0].get("steps", LEAST)
    stems = [each["stem"] for each in own if "stem" in each]
    return plan | ({"stem": stems[0]} if stems else {})


def length(args, plan, given, found):
    """Steps of the run and of its warm-up. A short run keeps the share of a long one's warm-up, a tenth at most."""
    per_epoch = max(1, found.images // args.batch)
    if "steps" in given:
        steps = args.steps
    elif "epochs" in given or "least" not in plan:
        steps = max(1, round((args.epochs or plan["epochs"]) * per_epoch))
    else:
        steps = plan["least"] if found.fixed_length else max(plan["least"], min(MOST, PASSES * per_epoch))
    warmup = round(args.warmup * per_epoch)
    if "warmup" in given and warmup > steps:
        raise UserError(f"--warmup {args.warmup:g}: so many epochs are {warmup} steps, more than the run's {steps}")
    return steps, warmup if "warmup" in given else min(warmup, steps // 10)


def check_optimizer(name, options):
    """The words of --options, held against the optimiser's own, and decay_all, which optim.build takes for all."""
    reserved = {"params", "lr", "weight_decay", "foreach", "fused", "maximize", "capturable", "differentiable"}
    for word in options:
        cli.one_of(word, set(inspect.signature(optim.OPTIMIZERS[name]).parameters) - reserved | {"decay_all"},
                   f"option of {name}")
    tried = torch.nn.Linear(1, 1)
    try:                                                                    # some say no at the first step only
        optimizer = optim.build(name, optim.parameter_groups(tried, 0.0), 1e-3, options)
        tried(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"--options of {name}, {options}: {error}") from None


# ---- the methods of a run

def names_of(method, methods):
    """The methods in a word such as rotation+simclr."""
    names = method.split("+")
    for name in names:
        cli.one_of(name, [each for each in methods if each != "together"], "method")
    if len(set(names)) < len(names):
        raise UserError(f"{method}: no part may stand twice")
    return names


def read_settings(pairs, flag="--set"):
    """--set name=value ... as a dict; values are Python numbers, True, False, None, or else words."""
    settings = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"{flag} {pair}: write name=value")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            settings[name] = value
        if isinstance(settings[name], float) and not math.isfinite(settings[name]):
            raise UserError(f"{flag} {pair}: not a finite number")
    return settings


def check_settings(settings, signature, reserved, what):
    """Every name must be a word of the constructor, every value of the kind of its default."""
    words = {name: each.default for name, each in signature.parameters.items() if name not in reserved}
    for name, value in settings.items():
        default = words[cli.one_of(name, words, f"setting of {what}")]
        kind = KINDS.get(type(default))
        if kind and not is_kind(value, kind):
            raise UserError(f"--set {name}={str(value)[:40]}: {what} takes {type(default).__name__} values there, for "
                            f"example {default}")


def is_kind(value, kind):
    """isinstance, but True and False are no numbers."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def parts_of(methods, names, pairs=(), views=None, found=None):
    """{name: its Part} from the RECIPEs and the pairs of --set; with `found`, as the preset "small" wants it."""
    given, parts = read_settings(pairs), {}
    for name in names:
        prefix = f"{name}." if len(names) > 1 else ""
        own = {key.removeprefix(prefix): given.pop(key) for key in list(given) if key.startswith(prefix)}
        weight = own.pop("weight", 1.0) if prefix else 1.0
        if not is_kind(weight, (int, float)) or weight <= 0:
            raise UserError(f"--set {name}.weight={weight}: the weight of a loss is a number above 0")
        parts[name] = part_of(methods[name], name, own, found)
        parts[name].views, parts[name].weight = views or parts[name].views, weight
    if given:
        raise UserError(f"--set {next(iter(given))}: with several methods write PART.NAME=VALUE, the parts are "
                        + ", ".join(names))
    return parts


def part_of(cls, name, own, found):
    """The Part of one method: `own` words from --set, then those of the preset, then the constructor's defaults."""
    recipe, wanted = recipe_of(cls), inspect.signature(cls)
    decoder = {key.removeprefix("decoder."): own.pop(key) for key in list(own) if key.startswith("decoder.")}
    check_settings(own, wanted, FILLED, name)
    if decoder and "decoder" not in wanted.parameters:
        raise UserError(f"--set decoder.{next(iter(decoder))}: {name} has no decoder")
    check_settings(decoder, inspect.signature(unet.Decoder), ("widths", "strides", "channels"), "decoder")
    part = Part(recipe["views"], recipe.get("views_small") if "small" in wanted.parameters else None,
                decoder=recipe.get("decoder", {}) | decoder)
    if found:
        preset = small_of(cls)
        fitting = IN_COLOUR if found.channels == 3 else {}
        part.views = preset.get("views") or fitting.get(part.views, part.views)
        part.words = {key: value for key, value in preset.items() if key not in NO_WORDS}
        queue, most = queue_size(cls, part), max(1, int(QUEUE * found.images))
        if queue > most:
            part.words["queue_size"], part.queue_cut = most, queue
    if "queue_size" in own:
        part.queue_cut = None
    part.words, part.asked = part.words | own, own | {f"decoder.{key}": value for key, value in decoder.items()}
    return part


def queue_size(cls, part):
    """How many embeddings the part's queue will hold; 0 where it has none."""
    default = inspect.signature(cls).parameters.get("queue_size")
    return part.words.get("queue_size", default.default) if default else 0


def build(methods, parts, encoder, channels, size):
    """The method, or several joined by Together; each gets its own views and the words that its signature asks for."""
    built = {}
    for name, part in parts.items():
        cls, words = methods[name], dict(part.words)
        wanted = inspect.signature(cls).parameters
        given = {"channels": channels, "size": size, "mean": encoder.mean}
        words |= {key: value for key, value in given.items() if key in wanted}
        if part.views_small:                                                # 96 beside 224 pixels
            words["small"] = augment.build(part.views_small, max(16, round(size * 96 / 224)))
        try:
            if "decoder" in wanted:
                words["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels, **part.decoder)
            built[name] = cls(encoder, augment.build(part.views, size), **words)
        except (ValueError, TypeError, ArithmeticError, MemoryError, RuntimeError) as error:
            if not part.asked and not isinstance(error, ValueError):
                raise                                                       # nobody asked for it: the code is wrong
            words = " ".join(f"{key}={value}" for key, value in part.asked.items())
            raise UserError(f"{name}{words and f' (--set {words})'}: {str(error).splitlines()[0]}") from error
    if len(built) == 1:
        return built[next(iter(built))]
    return methods["together"](encoder, None, built, {name: part.weight for name, part in parts.items()})


def changes(args, methods):
    """What is otherwise than in the RECIPE of the (first) method and in the constructors, in words."""
    names = list(args.parts)
    paper = {"stem": "default", "encoder": "resnet18", **recipe_of(methods[names[0]])}
    for key in ("encoder", "stem", "size", "batch", "optimizer", "lr", "weight_decay"):
        if getattr(args, key) != paper[key]:
            yield f"{key.replace('_', ' ')} {getattr(args, key)} ({paper[key]})"
    for name, part in args.parts.items():
        prefix = f"{name}." if len(names) > 1 else ""
        words = inspect.signature(methods[name]).parameters
        if part.views != recipe_of(methods[name])["views"]:
            yield f"{prefix}views {part.views} ({recipe_of(methods[name])['views']})"
        yield from (f"{prefix}{key} {value} ({words[key].default})" for key, value in part.words.items()
                    if value != words[key].default)


# ---- what the loop takes, and config.json

def training(args):
    """The loop's Config; the rate per 256 images becomes the rate that is applied."""
    scale = args.batch / 256 if args.optimizer in optim.SCALED else 1.0
    same = {each.name: getattr(args, each.name) for each in fields(loop.Config)}
    return loop.Config(**same | {"lr": args.lr * scale})


def write(args, dataset):
    """config.json: the namespace, and what the set is like. No file names, no patients."""
    count, channels, size = dataset.images.shape[:3]
    kept = {key: value for key, value in vars(args).items() if key not in NOT_KEPT}
    kept["parts"] = {name: asdict(part) for name, part in args.parts.items()}
    files.write_json(Path(args.out) / "config.json", {
        "arguments": kept,
        "encoder": {"name": args.encoder, "channels": channels, "stem": args.stem, "mean": list(dataset.mean),
                    "std": list(dataset.std)},
        "data": {"name": dataset.name, "images": count, "channels": channels, "size": size,
                 "classes": list(dataset.classes)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}})


def read(folder, device):
    """The namespace of the run that goes on; the device may be another one now."""
    if not (Path(folder) / "checkpoint.pt").is_file():
        raise UserError(f"--resume --out {folder}: there is no checkpoint.pt")
    content = files.read_config(folder)
    try:
        args = argparse.Namespace(**content["arguments"], out=folder, resume=True)
        if "deal" not in args:
            raise UserError(f"--resume --out {folder}: made by an earlier version, whose runs do not go on here; "
                            f"--init {folder} starts a new run from its weights")
        args.parts = {name: Part(**part) for name, part in args.parts.items()}
        training(args), content["data"]["images"], content["data"]["channels"]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{Path(folder) / 'config.json'}: damaged ({error}); a run goes on from its checkpoint.pt and "
                        "config.json") from None
    args.device = args.device if device == "auto" else device
    return args


def check_data(folder, dataset):
    """A run goes on with the images that it began with."""
    before = files.read_config(folder)["data"]
    for what, now in (("images", len(dataset.images)), ("channels", dataset.images.shape[1])):
        if before[what] != now:
            raise UserError(f"--resume --out {folder}: the run began with {before[what]} {what}, the set now has {now}")
