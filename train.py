"""Pretrain an encoder on medical images without labels.

    python train.py                                                     built-in images, two minutes on two CPU cores
    python train.py --method spark --data FOLDER --encoder resnet50 --size 224 --batch 256 --amp bf16 --set mask_ratio=0.75
    python train.py --method rotation+simclr --data FOLDER              several methods at once
    torchrun --nproc_per_node 8 train.py --method moco --data FOLDER    several GPUs
    python train.py --resume --out runs/NAME                            go on where a run was stopped

Leaves in the run's folder: config.json, log.jsonl, checkpoint.pt, encoder.pt and pictures. `--set` changes any argument of the method's constructor.
"""

import copy
import inspect
import json
import math
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from medssl import METHODS
from medssl.common import augment, cli, data, encoders, feed, features, files, loop, metrics, optim, plots, sheets, unet
from medssl.common.errors import UserError

# On the built-in set these stand in for a method's RECIPE: small, and about two minutes on two CPU cores.
PHANTOM_PRESET = {"encoder": "tiny", "size": 64, "batch": 64, "steps": 1000, "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01, "warmup": 2,
                  "settings": {"queue_size": 128, "momentum": 0.9, "width": 64, "prototypes": 20, "freeze": 0, "crops": 2, "epsilon": 0.03}}
FILLED = ("encoder", "augment", "decoder", "small", "channels", "size", "parts", "weights")     # arguments that are filled in here, not with --set


def main(argv=None):
    args = parse(argv)
    if args.resume:
        args = resumed(args)
    rank, world, device = loop.processes(args.device)
    say = print if rank == 0 else lambda *_, **__: None
    names = args.method.split("+")
    for name in names:
        cli.one_of(name, [n for n in METHODS if n != "together"], "method")
    if len(set(names)) < len(names):
        raise UserError(f"--method {args.method}: no part may stand twice")
    plan = settle(args, names[0])
    out = choose_folder(args, names, world)

    dataset = data.load(args.data, size=plan["size"], channels=args.channels, label=args.label, cache=args.cache)
    rows = dataset.rows("train", "unlabeled")
    config = configure(args, plan, len(rows), out, world)
    torch.manual_seed(args.seed)                                            # the same first weights in every process
    channels, size = dataset.images.shape[1], dataset.images.shape[2]
    plan["stem"] = plan["stem"] or ("small" if size < 40 else "default")
    encoder = encoders.build(plan["encoder"], channels, plan["stem"], dataset.mean, dataset.std)
    method = build(names, encoder, size, channels, plan, args)
    for name, part in getattr(method, "parts", {names[0]: method}).items():
        if hasattr(part, "when_together") and len(names) > 1:
            say(f"note on {name} beside others: {part.when_together}")
        if getattr(part, "queue", None) is not None and len(part.queue) > len(rows):
            say(f"note on {name}: its queue holds {len(part.queue)} embeddings, more than there are images ({len(rows)}): images will meet old "
                f"embeddings of their own as negatives; --set queue_size={max(1, len(rows) // 2)} would avoid it")
    if args.init:
        matched, total = encoders.load(args.init, encoder)
        say(f"starting from {args.init}: {matched} of {total} tensors matched")
        sync_copies(method, encoder)
    first = copy.deepcopy(encoder).to(device)                               # what the trained encoder has to beat
    say(f"{args.method} on {dataset.name}: {len(rows)} images {channels}x{size}x{size}, {plan['encoder']} "
        f"({sum(p.numel() for p in encoder.parameters()) / 1e6:.1f} M weights), {config.steps} steps of {config.batch} on {device}; "
        f"settings: {plan['source']}")
    if rank == 0 and not args.resume:                                       # nothing was written before all flags were found right
        out.mkdir(parents=True, exist_ok=True)
        write_config(out, args, plan, config, dataset)

    monitor = Monitor(method, first, dataset, rows, device, config)
    started = time.perf_counter()
    bar = tqdm(total=config.steps, initial=0, disable=rank > 0, unit="step", dynamic_ncols=True, delay=0.5)
    history = read_history(out) if args.resume else []
    try:
        for record in loop.fit(method, dataset, config, rows):
            bar.update(record["step"] - bar.n)
            if isinstance(record["loss"], float):
                if record["step"] in monitor.steps:
                    record.update(monitor.look(method))
                history.append(dict(record))
                bar.set_postfix(monitor.summary(record), refresh=False)
                if len(history) == 2 and rank == 0:                         # the first rate still holds the start
                    minutes = (config.steps - record["step"]) * config.batch / record["images_per_s"] / 60
                    bar.write(f"about {minutes:.1f} minutes to go; {memory(device):.1f} GiB of memory in use")
    finally:
        bar.close()
    seen = monitor.try_out(method)                                          # by every process: some losses gather all embeddings
    if rank == 0 and history:
        report(method, monitor, seen, history, out, dataset, config, time.perf_counter() - started, say)


def memory(device):
    """Peak memory in GiB: the GPU's where there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource                                                     # not on Windows
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def parse(argv):
    parser = cli.Parser(prog="train.py", description=__doc__.split("\n")[0], epilog=f"methods: {', '.join(n for n in METHODS if n != 'together')}; a+b trains several "
                        "together, with optimiser, batch and size of the first")
    add = parser.add_argument
    add("--method", default="medmoco", help="which one, or several joined by + (default medmoco)")
    add("--data", default="phantoms", help="folder or file of images; 'phantoms' is built in (default)")
    add("--label", default="label", help="column of split.csv that holds the label")
    add("--encoder", choices=encoders.ENCODERS, help="default: tiny on phantoms, else resnet18")
    add("--stem", choices=encoders.STEMS, help="first layers: default (total stride 32), nopool (16), small (8); default: small below 40 pixels")
    add("--size", type=cli.positive, help="side of the images in pixels (default: the recipe's)")
    add("--channels", type=int, choices=(1, 3), help="default: as the images are")
    add("--batch", type=cli.positive, help="images per step, over all processes and micro-batches")
    add("--accum", type=cli.positive, default=1, help="micro-batches per step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=cli.positive, help="optimiser steps")
    length.add_argument("--epochs", type=cli.positive_number, help="passes over the images (default: the RECIPE's)")
    add("--optimizer", choices=optim.OPTIMIZERS, help="default: the RECIPE's, as for all that is not given")
    add("--lr", type=cli.positive_number, help="per 256 images with sgd, lars and lamb; as it stands with adam and adamw")
    add("--weight-decay", type=float, help="of weights; biases and norms never decay")
    add("--views", choices=augment.RECIPES, help="augmentation recipe of common/augment.py (default: the method's RECIPE's)")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="an argument of the method's constructor, see medssl/METHOD.py; PART.NAME=VALUE with several parts")
    add("--init", metavar="FILE", help="start from an encoder.pt, a run's folder, or a torchvision or timm state dict")
    add("--out", metavar="DIR", help="default: runs/METHOD-DATA, numbered")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=cli.positive, default=500, help="steps between checkpoints")
    add("--keep-every", type=cli.positive, help="also keep encoder-STEP.pt every so many steps")
    add("--log-every", type=cli.positive, default=10, help="steps between lines of log.jsonl")
    add("--seed", type=int, default=0, help="of weights, order and views")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler on CPUs")
    add("--sync-bn", action="store_true", help="one BatchNorm over all processes")
    add("--clip", type=cli.positive_number, help="largest global gradient norm")
    add("--cache", metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.resume:
        given = [flag for flag, value in vars(args).items() if value != parser.get_default(flag) and flag not in ("resume", "out", "device")]
        if given or not args.out:
            parser.error("--resume needs --out and takes the rest from its config.json" + (f"; leave out --{given[0].replace('_', '-')}" if given else ""))
    return args


def resumed(args):
    """The arguments of the run that is gone on with."""
    folder = Path(args.out)
    if not (folder / "checkpoint.pt").is_file():
        raise UserError(f"--resume --out {args.out}: there is no checkpoint.pt")
    try:
        stored = json.loads((folder / "config.json").read_text())["arguments"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder / 'config.json'}: missing or damaged; a run is resumed from its checkpoint.pt and config.json") from None
    vars(args).update({k: v for k, v in stored.items() if k not in ("out", "resume") and not (k == "device" and args.device != "auto")})
    return args


def recipe_of(name):
    return sys.modules[METHODS[name].__module__].RECIPE


def settle(args, name):
    """What the flags leave open: from the preset on phantoms, else from the RECIPE of the (first) method."""
    recipe = recipe_of(name)
    if args.data == "phantoms":
        plan, source = dict(PHANTOM_PRESET), "the preset for phantoms"
    else:
        plan, source = {"encoder": "resnet18", "settings": {}, **recipe}, f"the RECIPE of {name}"
    if args.optimizer and args.optimizer != plan["optimizer"]:
        plan.pop("options", None)                                           # the recipe's keywords belong to its optimiser
    for flag in ("encoder", "stem", "size", "batch", "optimizer", "lr", "weight_decay", "clip", "steps", "epochs"):
        value = getattr(args, flag)
        plan[flag] = plan.get(flag) if value is None else value
    if args.epochs:
        plan["steps"] = None
    plan["source"] = source
    return plan


def configure(args, plan, count, out, world=1):
    """Epochs (also those of the warm-up) become steps, the rate per 256 images becomes the rate that is applied."""
    if plan["batch"] % (args.accum * world):
        raise UserError(f"--batch {plan['batch']} must divide by --accum {args.accum} x {world} processes")
    per_epoch = max(1, count // plan["batch"])
    steps = plan["steps"] or max(1, round(plan["epochs"] * per_epoch))
    warmup = min(round(plan["warmup"] * per_epoch), steps // 10)            # a short run keeps the recipe's share of a long one
    scale = plan["batch"] / 256 if plan["optimizer"] in optim.SCALED else 1.0
    return loop.Config(
        steps=steps, batch=plan["batch"], lr=plan["lr"] * scale, optimizer=plan["optimizer"], options=plan.get("options", {}),
        weight_decay=plan["weight_decay"], weight_decay_end=plan.get("weight_decay_end") if args.weight_decay is None else None,
        warmup=warmup, accum=args.accum, clip=plan["clip"], amp=args.amp, compile=args.compile, sync_bn=args.sync_bn,
        seed=args.seed, device=args.device, out=str(out), resume=args.resume, save_every=args.save_every, keep_every=args.keep_every,
        log_every=args.log_every)


def choose_folder(args, names, world):
    """--out, or the first free runs/METHOD-DATA; an old run is never written over. The folder itself is made later."""
    if args.out:
        out = Path(args.out)
        if not args.resume and (out / "checkpoint.pt").exists():
            raise UserError(f"--out {out}: holds a run already; --resume goes on with it, another --out starts afresh")
    else:
        stem = f"runs/{'+'.join(names)}-{Path(args.data).stem or 'data'}"
        out = next(p for p in (Path(stem if i == 1 else f"{stem}-{i}") for i in range(1, 10_000)) if not p.exists())
        if world > 1:
            raise UserError(f"with several processes say where to: --out {out}")
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    return out


def build(names, encoder, size, channels, plan, args):
    """The method, or several joined by Together; every part gets its own views and the arguments that its signature asks for."""
    settings = cli.read_settings(args.set)
    parts, weights = {}, {}
    for name in names:
        cls, recipe, own = METHODS[name], recipe_of(name), {}
        signature = inspect.signature(cls)
        for key in [k for k in settings if len(names) == 1 or k.startswith(f"{name}.")]:
            own[key if len(names) == 1 else key.removeprefix(f"{name}.")] = settings.pop(key)
        if "weight" in own and len(names) > 1:
            weights[name] = own.pop("weight")
        decoder = {k.removeprefix("decoder."): own.pop(k) for k in list(own) if k.startswith("decoder.")}
        cli.check_settings(own, signature, FILLED, name)
        words = {k: v for k, v in plan["settings"].items() if k in signature.parameters} | own
        view = args.views or recipe["views"]
        words |= {k: v for k, v in {"channels": channels, "size": size}.items() if k in signature.parameters}
        if "small" in signature.parameters and "views_small" in recipe:     # 96 beside 224 pixels
            words["small"] = augment.build(recipe["views_small"], max(16, round(size * 96 / 224)))
        if "decoder" in signature.parameters:
            cli.check_settings(decoder, inspect.signature(unet.Decoder), ("widths", "strides", "channels"), "decoder")
            words["decoder"] = unet.Decoder(encoder.widths, encoder.strides, channels, **decoder)
        elif decoder:
            raise UserError(f"--set decoder.{next(iter(decoder))}: {name} has no decoder")
        parts[name] = cls(encoder, augment.build(view, size), **words)
    if settings:
        raise UserError(f"--set {next(iter(settings))}: with several methods write PART.NAME=VALUE, the parts are {', '.join(names)}")
    return parts[names[0]] if len(names) == 1 else METHODS["together"](encoder, None, parts, weights)


def sync_copies(method, encoder):
    """Momentum encoders are copied at construction, before --init: give them the loaded weights too."""
    for module in method.modules():
        if module is not encoder and type(module) is type(encoder):
            module.load_state_dict(encoder.state_dict())


def write_config(out, args, plan, config, dataset):
    """Everything that ran, and enough for --resume; the data set by name and shape, no file names, no patients."""
    arguments = vars(args) | {"out": str(out)}
    if args.data != "phantoms":
        arguments["data"] = str(Path(args.data).resolve())
    files.write_json(out / "config.json", {
        "arguments": arguments, "plan": plan, "training": loop.asdict(config),
        "encoder": {"name": plan["encoder"], "channels": dataset.images.shape[1], "stem": plan["stem"], "mean": list(dataset.mean), "std": list(dataset.std)},
        "data": {"name": dataset.name, "images": len(dataset.images), "channels": dataset.images.shape[1], "size": dataset.images.shape[2],
                 "classes": list(dataset.classes)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}})


def read_history(out):
    path = out / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Monitor:
    """Eyes for collapse: now and then, on a fixed set of images, how many directions the features use and what a kNN makes of them."""

    def __init__(self, method, first, dataset, rows, device, config):
        every = max(1, config.steps // 10 // config.log_every) * config.log_every
        self.steps = {*range(every, config.steps, every), config.steps}
        self.dataset, self.device, self.latest = dataset, device, {}
        pick = np.random.default_rng(0).permutation
        self.fixed = pick(rows)[:256]
        labelled = [] if dataset.labels is None else rows[dataset.labels[rows] >= 0]
        val = [] if dataset.splits is None or dataset.labels is None else dataset.rows("val")
        self.train, self.val = pick(labelled)[:1500], [row for row in pick(val)[:500] if dataset.labels[row] >= 0]
        self.scored = len(self.val) > 0 and len(np.unique(dataset.labels[self.train])) > 1
        self.spectra = {"start": metrics.spectrum(self.features(first, self.fixed))}
        self.start = self.knn(first)

    def features(self, encoder, rows):
        return features.extract(encoder, self.dataset.images, rows, self.device)

    def knn(self, encoder):
        """Balanced accuracy on the validation patients."""
        if not self.scored:
            return None
        votes = features.knn(self.features(encoder, self.train), self.dataset.labels[self.train], self.features(encoder, self.val))
        return metrics.balanced_accuracy(self.dataset.labels[self.val], votes.argmax(1))

    @torch.no_grad()
    def look(self, method):
        encoder = getattr(method, "exported", method.encoder)
        seen = self.features(encoder, self.fixed)
        self.spectra["end"] = metrics.spectrum(seen)
        self.latest = {"rank_me": float(metrics.rank_me(seen))}
        if self.scored:
            self.latest["knn"] = float(self.knn(encoder))
        out = self.try_out(method)[1]
        if "embedding" in out:
            self.latest["spread"] = float(metrics.spread(out["embedding"].float().cpu().numpy()))
        return self.latest

    @torch.no_grad()
    def try_out(self, method):
        """Views and outputs of the method for the fixed images, always with the same randomness; nothing is learned from them."""
        torch.manual_seed(0)
        rows, nobody = self.fixed[:64], replace(self.dataset, groups=None)  # no patient numbers in pictures
        views = feed.make_views(method, feed.batch(self.dataset.images, rows, self.device), nobody, rows)
        training = method.training
        method.eval()
        out = method(*views)
        method.train(training)
        return views, out

    def summary(self, record):
        shown = {"loss": f"{record['loss']:.3f}"}
        if "chance" in record:
            shown["chance"] = f"{record['chance']:.3f}"
        shown["images/s"] = f"{record['images_per_s']:.0f}"
        return shown | {name: f"{self.latest[key]:.2f}" for key, name in (("rank_me", "RankMe"), ("knn", "kNN")) if key in self.latest}


def report(method, monitor, seen, history, out, dataset, config, seconds, say):
    """The pictures, and in words what came out."""
    images = feed.batch(dataset.images, monitor.fixed[:8], "cpu")
    views, outs = seen
    flat = tuple(tensor for view in views for tensor in (view if isinstance(view, tuple) else (view,)))
    sheets.views_sheet(tuple(tensor.cpu() for tensor in flat), out / "views.png")
    if "restored" in outs:
        pictures = [tensor.cpu() for tensor in flat if tensor.ndim == 4 and tensor.is_floating_point()]
        clean = {1: pictures[0], 2: pictures[-1]}.get(len(pictures), images)    # the view itself under a mask; (distorted, target); else the image
        sheets.restored_sheet(clean, tuple(tensor.cpu() for tensor in flat), outs["restored"].float().cpu(), out / "restored.png")
    draw_curves(history, out / "curves.png", monitor.start)
    plots.spectrum_chart(monitor.spectra, out / "spectrum.png")
    say(f"{history[-1]['step']} of {config.steps} steps in {seconds / 60:.1f} minutes")
    if monitor.latest.get("spread", 1) < 0.1:
        say(f"COLLAPSED: the embedding's spread is {monitor.latest['spread']:.3f} (about 1 is healthy, 0 means that all images look the same to the network)")
    if monitor.start is not None and "knn" in monitor.latest:
        say(f"kNN on validation images, balanced accuracy: {monitor.latest['knn']:.3f} trained, {monitor.start:.3f} before training, "
            f"{1 / len(np.unique(dataset.labels[monitor.val])):.3f} by chance")
    drawn = ", ".join(p.name for p in sorted(out.glob("*.png")))
    say(f"in {out}: encoder.pt, checkpoint.pt, log.jsonl, config.json; pictures {drawn}")
    say(f"next: python evaluate.py {out}")


def draw_curves(history, path, start):
    def series(*keys):
        found = {key: [(r["step"], r[key]) for r in history if key in r] for key in keys}
        return {key: tuple(zip(*points)) for key, points in found.items() if points}

    panels = [{"series": series("loss"), "title": "loss", "x_label": "step", "y_label": "loss",
               "horizontal": {"chance": history[-1]["chance"]} if "chance" in history[-1] else None}]
    for key, title, level in (("knn", "kNN on validation images", {"before training": start} if start is not None else None), ("rank_me", "RankMe of the features", None)):
        if series(key):
            panels.append({"series": series(key), "title": title, "x_label": "step", "y_label": "balanced accuracy" if key == "knn" else "effective directions",
                           "horizontal": level})
    plots.panels(panels, path)


if __name__ == "__main__":
    cli.run(main)
