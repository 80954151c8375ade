"""The settings of a run: all that decides what it computes, settled once, printed, kept in config.json and resumed from.

Flags win; what they leave open comes from the preset or the RECIPE of the (first) method. Methods are handed in as classes, so
that nothing here knows one by name.
"""

import inspect
import platform
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import augment, cli, files, loop, optim, unet
from .data.dataset import LEARNT_FROM
from .data.sources import find
from .errors import UserError

FILLED = ("encoder", "augment", "decoder", "small", "channels", "size", "parts", "weights")     # words that are filled in here, not with --set
FLAGS = ("encoder", "stem", "size", "batch", "optimizer", "lr", "weight_decay", "clip", "steps", "epochs")     # win over preset and RECIPE
AS_GIVEN = ("channels", "accum", "init", "seed", "device", "amp", "compile", "sync_bn", "save_every", "keep_every", "log_every", "cache")
PHANTOMS = 1180                                                             # images to learn from in the built-in set
# On the built-in set these stand in for a method's RECIPE: small, and about two minutes on two CPU cores.
PHANTOM_PRESET = {"encoder": "tiny", "size": 64, "batch": 64, "steps": 1000, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "warmup": 2}
PHANTOM_WORDS = {"queue_size": 128, "momentum": 0.9, "width": 64, "prototypes": 20, "freeze": 0, "crops": 2, "epsilon": 0.03}


@dataclass
class Part:
    """One method of a run: its views, and the words of its constructor and of its decoder's."""
    views: str
    views_small: str | None = None
    words: dict = field(default_factory=dict)
    decoder: dict = field(default_factory=dict)
    weight: float = 1.0                             # of its loss, beside other parts


@dataclass
class Settings:
    """`lr` is as given: per 256 images for some optimisers; warmup and the three `_every` are counted in steps."""
    method: str
    data: str
    label: str
    preset: str
    encoder: str
    stem: str
    size: int
    channels: int | None                            # None: as the images are
    batch: int
    accum: int
    steps: int
    warmup: int
    optimizer: str
    options: dict
    lr: float
    weight_decay: float
    weight_decay_end: float | None
    clip: float | None
    parts: dict                                     # name -> Part
    init: str | None
    seed: int
    device: str
    amp: str
    compile: bool
    sync_bn: bool
    save_every: int
    keep_every: int | None
    log_every: int
    cache: str | None

    def training(self, out, resume):
        """What the loop is told; the rate per 256 images becomes the rate that is applied."""
        scale = self.batch / 256 if self.optimizer in optim.SCALED else 1.0
        same = ("steps", "batch", "optimizer", "options", "weight_decay", "weight_decay_end", "warmup", "accum", "clip", "amp", "compile",
                "sync_bn", "seed", "device", "save_every", "keep_every", "log_every")
        return loop.Config(lr=self.lr * scale, out=str(out), resume=resume, **{name: getattr(self, name) for name in same})


def stored(folder, device):
    """The settings of the run that is gone on with; the device may be another one now."""
    if not (Path(folder) / "checkpoint.pt").is_file():
        raise UserError(f"--resume --out {folder}: there is no checkpoint.pt")
    config = files.read_config(folder)
    if "plan" in config:
        raise UserError(f"--resume --out {folder}: made by an earlier version, whose runs are not gone on with here; evaluate.py reads it, and "
                        f"--init {folder} starts a new run from its weights")
    try:
        settings = Settings(**config["arguments"])
        settings.parts = {name: Part(**part) for name, part in settings.parts.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{Path(folder) / 'config.json'}: damaged; a run is gone on with from its checkpoint.pt and config.json") from None
    settings.device = settings.device if device == "auto" else device
    return settings


def look(path, label):
    """How many images there are to learn from, before any of them is decoded."""
    if path == "phantoms":
        return PHANTOMS
    source = find(path, label)
    return len(source.names) if source.splits is None else sum(split in LEARNT_FROM for split in source.splits)


def settle(args, methods, names, count):
    """The Settings from the flags. methods: name -> class; count: images to learn from."""
    plan = defaults(args, methods[names[0]])
    given = {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag) is not None}
    if given.get("optimizer", plan["optimizer"]) != plan["optimizer"]:
        plan.pop("options", None)                                           # the recipe's keywords belong to its optimiser
    if "epochs" in given:
        plan.pop("steps", None)
    if "weight_decay" in given:
        plan.pop("weight_decay_end", None)
    plan |= given
    per_epoch = max(1, count // plan["batch"])
    steps = plan.get("steps") or max(1, round(plan["epochs"] * per_epoch))
    return Settings(
        method=args.method, data=args.data if args.data == "phantoms" else str(Path(args.data).resolve()), label=args.label,
        preset=plan["preset"], encoder=plan["encoder"], stem=plan.get("stem") or ("small" if plan["size"] < 40 else "default"),
        size=plan["size"], batch=plan["batch"], steps=steps,
        warmup=min(round(plan["warmup"] * per_epoch), steps // 10),         # a short run keeps the recipe's share of a long one
        optimizer=plan["optimizer"], options=plan.get("options", {}), lr=plan["lr"], weight_decay=plan["weight_decay"],
        weight_decay_end=plan.get("weight_decay_end"), clip=plan.get("clip"),
        parts=parts_of(methods, names, args.set, args.views, PHANTOM_WORDS if args.data == "phantoms" else {}),
        **{name: getattr(args, name) for name in AS_GIVEN})


def defaults(args, cls):
    """What the flags leave open."""
    if args.data == "phantoms":
        return {"preset": "the preset for phantoms", **PHANTOM_PRESET}
    return {"preset": f"the RECIPE of {args.method.split('+')[0]}", "encoder": "resnet18", **recipe_of(cls)}


def recipe_of(cls):
    return sys.modules[cls.__module__].RECIPE


def parts_of(methods, names, pairs=(), views=None, words=None):
    """{name: its Part} from the RECIPEs, these `words` (where a constructor has them) and the pairs of --set."""
    given, parts = cli.read_settings(pairs), {}
    for name in names:
        prefix = f"{name}." if len(names) > 1 else ""
        own = {key.removeprefix(prefix): given.pop(key) for key in list(given) if key.startswith(prefix)}
        parts[name] = part_of(methods[name], name, own, views, words or {}, alone=not prefix)
    if given:
        raise UserError(f"--set {next(iter(given))}: with several methods write PART.NAME=VALUE, the parts are {', '.join(names)}")
    return parts


def part_of(cls, name, own, views, words, alone):
    """The Part of one method, from its RECIPE, general words, and its own."""
    recipe, signature = recipe_of(cls), inspect.signature(cls)
    weight = 1.0 if alone else own.pop("weight", 1.0)
    decoder = {key.removeprefix("decoder."): own.pop(key) for key in list(own) if key.startswith("decoder.")}
    cli.check_settings(own, signature, FILLED, name)
    if "decoder" in signature.parameters:
        cli.check_settings(decoder, inspect.signature(unet.Decoder), ("widths", "strides", "channels"), "decoder")
    elif decoder:
        raise UserError(f"--set decoder.{next(iter(decoder))}: {name} has no decoder")
    words = {key: value for key, value in words.items() if key in signature.parameters} | own
    small = recipe.get("views_small") if "small" in signature.parameters else None
    return Part(views or recipe["views"], small, words, decoder, weight)


def queue_size(cls, part):
    """How many embeddings the part's queue will hold; 0 where it has none."""
    default = inspect.signature(cls).parameters.get("queue_size")
    return part.words.get("queue_size", default.default) if default else 0


def build(methods, parts, encoder, channels, size):
    """The method, or several joined by Together; each gets its own views and the arguments that its signature asks for."""
    built = {}
    for name, part in parts.items():
        cls, words = methods[name], dict(part.words)
        wanted = inspect.signature(cls).parameters
        words |= {key: value for key, value in {"channels": channels, "size": size}.items() if key in wanted}
        if part.views_small:                                                # 96 beside 224 pixels
            words["small"] = augment.build(part.views_small, max(16, round(size * 96 / 224)))
        if "decoder" in wanted:
            words["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels, **part.decoder)
        built[name] = cls(encoder, augment.build(part.views, size), **words)
    if len(built) == 1:
        return built[next(iter(built))]
    return methods["together"](encoder, None, built, {name: part.weight for name, part in parts.items()})


def write_config(folder, settings, dataset):
    """config.json: the settings, and what was found. The data set by name and shape, no file names, no patients."""
    files.write_json(Path(folder) / "config.json", {
        "arguments": asdict(settings),
        "encoder": {"name": settings.encoder, "channels": dataset.images.shape[1], "stem": settings.stem, "mean": list(dataset.mean),
                    "std": list(dataset.std)},
        "data": {"name": dataset.name, "images": len(dataset.images), "channels": dataset.images.shape[1], "size": dataset.images.shape[2],
                 "classes": list(dataset.classes)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}})
