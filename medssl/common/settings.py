"""The settings of a run: all that decides what it computes, settled once, printed, stored, and resumed from.

Flags win; what they leave open comes from the preset or the RECIPE of the (first) method. Methods are handed in as
classes, so that nothing here knows one by name.
"""

import inspect
import platform
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from . import augment, cli, encoders, feed, files, loop, optim, presets, unet
from .errors import UserError

FILLED = "encoder", "augment", "decoder", "small", "channels", "size", "mean", "parts", "weights"   # not with --set
FLAGS = ("encoder", "size", "batch", "optimizer", "lr", "weight_decay", "clip", "steps", "epochs", "warmup")
AS_GIVEN = ("channels", "accum", "init", "seed", "device", "amp", "compile", "sync_bn", "save_every", "keep_every",
            "log_every", "cache")

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
        same = {each.name for each in fields(loop.Config)} & {each.name for each in fields(self)} - {"lr"}
        return loop.Config(lr=self.lr * scale, out=str(out), resume=resume,
                           **{name: getattr(self, name) for name in same})


def stored(folder, device, methods):
    """The settings of the run that is gone on with; the device may be another one now."""
    if not (Path(folder) / "checkpoint.pt").is_file():
        raise UserError(f"--resume --out {folder}: there is no checkpoint.pt")
    config = files.read_config(folder)
    if "plan" in config:
        raise UserError(f"--resume --out {folder}: made by an earlier version, whose runs are not gone on with here; "
                        f"evaluate.py reads it, and --init {folder} starts a new run from its weights")
    try:
        settings = Settings(**config["arguments"])
        settings.parts = {name: Part(**part) for name, part in settings.parts.items()}
        check(settings, config["data"], methods)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{Path(folder) / 'config.json'}: damaged ({error}); a run is gone on with from its "
                        "checkpoint.pt and config.json") from None
    settings.device = settings.device if device == "auto" else device
    return settings


def check(settings, data, methods):
    """What config.json says may have been edited, or mangled: an error of any kind, if a run cannot go on with it."""
    for record in (settings, *settings.parts.values()):
        files.check_kinds(record)
    named = {"encoder": encoders.ENCODERS, "stem": encoders.STEMS, "optimizer": optim.OPTIMIZERS, "amp": loop.AMP}
    for word, names in named.items():
        cli.one_of(getattr(settings, word), names, word)
    if list(settings.parts) != names_of(settings.method, methods):
        raise ValueError(f"parts are {', '.join(settings.parts)}, the method is {settings.method}")
    for name, part in settings.parts.items():
        cli.check_settings(part.words, inspect.signature(methods[name]), FILLED, name)
        for views in filter(None, (part.views, part.views_small)):
            cli.one_of(views, augment.VIEWS, "views")
    for word in ("size", "batch", "accum", "steps", "save_every", "log_every"):
        if not 1 <= getattr(settings, word) <= cli.MUCH:
            raise ValueError(f"{word} is {getattr(settings, word)}")
    if not (settings.lr > 0 and {"images", "channels"} <= data.keys()):
        raise ValueError("lr is not above 0, or data says nothing of the images")


def names_of(asked, methods):
    """The methods in a word such as rotation+simclr."""
    names = asked.split("+")
    for name in names:
        cli.one_of(name, [each for each in methods if each != "together"], "method")
    if len(set(names)) < len(names):
        raise UserError(f"{asked}: no part may stand twice")
    return names


def settle(args, methods, names, found):
    """The Settings from the flags, and how many operations an image costs in a forward pass. methods: name -> class."""
    classes = [methods[name] for name in names]
    plan = presets.small(classes, found) if args.preset == "small" else presets.paper(classes[0])
    given = {flag: getattr(args, flag) for flag in FLAGS if getattr(args, flag) is not None}
    own = cli.read_settings(args.options, "--options")
    if given.get("optimizer", plan["optimizer"]) == plan["optimizer"]:      # keywords belong to their optimiser
        own = plan.get("options", {}) | own
    if "weight_decay" in given:
        plan.pop("weight_decay_end", None)
    plan |= given
    check_optimizer(plan["optimizer"], own)
    seen = replace(found, channels=min(found.channels, args.channels or 3))
    settled = ("encoder", "size", "batch", "optimizer", "lr", "weight_decay", "weight_decay_end", "clip")
    settings = Settings(
        method=args.method, data=args.data if args.data == "phantoms" else str(Path(args.data).resolve()),
        label=args.label, preset=args.preset, steps=0, warmup=0, options=own,
        stem=args.stem or ("small" if plan["size"] < 40 else plan.get("stem", "default")),
        parts=parts_of(methods, names, args.set, args.views, seen if args.preset == "small" else None),
        **{name: plan.get(name) for name in settled}, **{name: getattr(args, name) for name in AS_GIVEN})
    cost = rehearse(methods, settings, args.channels or found.channels)
    settings.steps, settings.warmup = presets.length(plan, given, found, cost)
    return settings, cost


def check_optimizer(name, options):
    """The words of --options, held against the optimiser's own, and decay_all, which optim.build takes for all."""
    reserved = {"params", "lr", "weight_decay", "foreach", "fused", "maximize", "capturable", "differentiable"}
    words = set(inspect.signature(optim.OPTIMIZERS[name]).parameters) - reserved | {"decay_all"}
    for word in options:
        cli.one_of(word, words, f"option of {name}")
    try:
        optim.build(name, optim.parameter_groups(torch.nn.Linear(1, 1), 0.0), 1e-3, options)
    except (ValueError, TypeError) as error:
        raise UserError(f"--options of {name}: {error}") from None


def sources(methods, settings):
    """The files of the run's methods."""
    return [sys.modules[methods[name].__module__].__file__ for name in (*settings.parts, "together")]


def rehearse(methods, settings, channels, count=4):
    """The method is made and sees a few random images, for two reasons: what does not fit is told before the set is
    decoded, and a forward pass's operations per image are counted."""
    encoder = encoders.build(settings.encoder, channels, settings.stem)
    if settings.init:
        encoders.load(settings.init, encoder)
    with cli.told(f"{settings.method} (--set)", *sources(methods, settings)):
        method = build(methods, settings.parts, encoder, channels, settings.size)
    pictures, numbers = torch.rand(count, channels, settings.size, settings.size), np.arange(count)
    masks = np.zeros((count, settings.size, settings.size), np.uint8)
    some = SimpleNamespace(labels=0 * numbers, groups=numbers, masks=masks)
    with cli.told(settings.method, *sources(methods, settings)):
        views = feed.make_views(method, pictures, some, numbers)
    with FlopCounterMode(display=False) as counter:
        method(*views)
    return counter.get_total_flops() / count


def parts_of(methods, names, pairs=(), views=None, found=None):
    """{name: its Part} from the RECIPEs and the pairs of --set; with `found`, as the preset "small" wants it."""
    given, parts = cli.read_settings(pairs), {}
    for name in names:
        prefix = f"{name}." if len(names) > 1 else ""
        own = {key.removeprefix(prefix): given.pop(key) for key in list(given) if key.startswith(prefix)}
        weight = own.pop("weight", 1.0) if prefix else 1.0
        if not cli.is_kind(weight, (int, float)) or weight <= 0:
            raise UserError(f"--set {name}.weight={weight}: the weight of a loss is a number above 0")
        parts[name] = part_of(methods[name], name, own, views, found)
        parts[name].weight = weight
    if given:
        raise UserError(f"--set {next(iter(given))}: with several methods write PART.NAME=VALUE, the parts are "
                        + ", ".join(names))
    return parts


def part_of(cls, name, own, views, found):
    """The Part of one method: `own` words from --set, then those of the preset, then the constructor's defaults."""
    recipe, signature = presets.recipe_of(cls), inspect.signature(cls)
    decoder = {key.removeprefix("decoder."): own.pop(key) for key in list(own) if key.startswith("decoder.")}
    cli.check_settings(own, signature, FILLED, name)
    if "decoder" in signature.parameters:
        cli.check_settings(decoder, inspect.signature(unet.Decoder), ("widths", "strides", "channels"), "decoder")
    elif decoder:
        raise UserError(f"--set decoder.{next(iter(decoder))}: {name} has no decoder")
    part = Part(recipe["views"], recipe.get("views_small") if "small" in signature.parameters else None)
    if found:
        preset = presets.small_of(cls)
        fitting = presets.IN_COLOUR if found.channels == 3 else {}
        part.views = preset.get("views") or fitting.get(part.views, part.views)
        words = set(signature.parameters) - set(presets.RESERVED)
        part.words = {key: value for key, value in preset.items() if key in words}
        queue = queue_size(cls, part)
        if queue > presets.QUEUE * found.images:
            part.words["queue_size"] = max(1, int(presets.QUEUE * found.images))
    part.words, part.decoder, part.views = part.words | own, decoder, views or part.views
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
        if "decoder" in wanted:
            words["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels, **part.decoder)
        built[name] = cls(encoder, augment.build(part.views, size), **words)
    if len(built) == 1:
        return built[next(iter(built))]
    return methods["together"](encoder, None, built, {name: part.weight for name, part in parts.items()})


def changed(methods, settings):
    """What is otherwise than in the RECIPE of the (first) method and in the constructors, in words."""
    names = list(settings.parts)
    paper = {"stem": "default", **presets.paper(methods[names[0]])}
    for key in ("encoder", "stem", "size", "batch", "optimizer", "lr", "weight_decay"):
        if getattr(settings, key) != paper[key]:
            yield f"{key.replace('_', ' ')} {getattr(settings, key)} instead of {paper[key]}"
    for name, part in settings.parts.items():
        prefix = f"{name}." if len(names) > 1 else ""
        recipe, words = presets.recipe_of(methods[name]), inspect.signature(methods[name]).parameters
        if part.views != recipe["views"]:
            yield f"{prefix}views {part.views} instead of {recipe['views']}"
        yield from (f"{prefix}{key} {value} instead of {words[key].default}" for key, value in part.words.items()
                    if value != words[key].default)


def check_data(folder, dataset):
    """A run goes on with the images that it began with."""
    before = files.read_config(folder)["data"]
    for what, now in (("images", len(dataset.images)), ("channels", dataset.images.shape[1])):
        if before[what] != now:
            raise UserError(f"--resume --out {folder}: the run began with {before[what]} {what}, the set now has {now}")


def write_config(folder, settings, dataset):
    """config.json: the settings, and what was found. The data set by name and shape, no file names, no patients."""
    count, channels, size = dataset.images.shape[:3]
    files.write_json(Path(folder) / "config.json", {
        "arguments": asdict(settings),
        "encoder": {"name": settings.encoder, "channels": channels, "stem": settings.stem, "mean": list(dataset.mean),
                    "std": list(dataset.std)},
        "data": {"name": dataset.name, "images": count, "channels": channels, "size": size,
                 "classes": list(dataset.classes)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}})
