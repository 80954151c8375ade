"""Pretrain an encoder on medical images without labels.

    python train.py                                                     built-in images, two minutes on two CPU cores
    python train.py --method simclr --data FOLDER                       yours: minutes, a small network
    python train.py --method spark --data FOLDER --preset paper --amp bf16 --set mask_ratio=0.75
    python train.py --method rotation+simclr --data FOLDER              several methods at once
    torchrun --nproc_per_node 8 train.py --method moco --data FOLDER --out runs/NAME
    python train.py --resume --out runs/NAME                            go on where a run was stopped

Leaves in the run's folder: config.json, log.jsonl, checkpoint.pt, encoder.pt and pictures. `--set` changes any
argument of the method's constructor.
"""

import contextlib
import copy
import math
import shlex
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from medssl import METHODS
from medssl.common import augment, cli, data, encoders, files, loop, optim, presets
from medssl.common import settings as settled
from medssl.common.errors import UserError
from medssl.common.monitor import Monitor

try:
    import resource
except ImportError:                                                         # on Windows
    resource = None

RUN = "checkpoint.pt"                                                       # what makes a folder a run


def main(argv=None):
    args = parse(argv)
    settings, cost = (settled.stored(args.out, args.device, METHODS), None) if args.resume else begin(args)
    rank, world, device = loop.processes(settings.device)
    say = print if rank == 0 else lambda *_, **__: None
    loop.parts_of(settings.batch, settings.accum, world)                    # or the line that says why not
    out = Path(args.out) if args.resume else choose_folder(args, world)
    say(headline(settings, cost))
    dataset = data.load(settings.data, settings.size, settings.channels, settings.label, settings.cache)
    rows = dataset.rows("train", "unlabeled")
    if not len(rows):
        raise UserError(f"{settings.data}: no image to learn from, none is of the split train or unlabeled")
    method, first = assemble(settings, dataset, say)
    say(f"{len(rows)} images {'x'.join(map(str, dataset.images.shape[1:]))} of {dataset.name}, "
        f"{sum(p.numel() for p in first.parameters()) / 1e6:.1f} M weights in {settings.encoder}, on {device}")
    for note in notes(method, settings, len(rows)):
        say(f"note: {note}")
    if args.resume:
        settled.check_data(out, dataset)
    config = settings.training(out, args.resume)
    with files.begun(out, RUN) if rank == 0 else contextlib.nullcontext():  # all flags were found right
        if rank == 0 and not args.resume:
            settled.write_config(out, settings, dataset)
        method.to(device, memory_format=torch.channels_last)
        monitor = Monitor(first.to(device), dataset, rows, device, config, draws=rank == 0)
        if rank == 0 and not args.resume:
            with cli.told(settings.method, *settled.sources(METHODS, settings)):
                monitor.draw_views(method)
            say(f"what the method sees: {out / 'views.png'}")
        done, seconds = train(method, monitor, dataset, rows, config)
    if rank == 0:
        report(monitor, config, done, seconds)


def begin(args):
    """The settings of a new run, and how many operations an image costs in a forward pass."""
    names = settled.names_of(args.method, METHODS)
    return settled.settle(args, METHODS, names, presets.look(args.data, args.label))


def choose_folder(args, world):
    """Where the run is to leave what it leaves."""
    stem = f"runs/{args.method}-{Path(args.data).stem or 'data'}"
    out = files.free_folder(args.out, stem, RUN, "--resume goes on with that run, another --out starts afresh")
    if world > 1 and not args.out:
        raise UserError(f"with several processes say where to: --out {out}")
    return out


def assemble(settings, dataset, say):
    """The method, and the encoder before training. What --init brings is in it before slow copies are made of it."""
    channels = dataset.images.shape[1]
    torch.manual_seed(settings.seed)                                        # the same first weights in every process
    encoder = encoders.build(settings.encoder, channels, settings.stem, dataset.mean, dataset.std)
    encoder.size = settings.size                                            # stands in encoder.json
    if settings.init:
        matched, total = encoders.load(settings.init, encoder, lambda line: say(f"note: {line}"))
        say(f"starting from {settings.init}: {matched} of {total} tensors matched")
    first = copy.deepcopy(encoder)
    with cli.told(settings.method, *settled.sources(METHODS, settings)):    # of a resumed run nobody has asked yet
        return settled.build(METHODS, settings.parts, encoder, channels, settings.size), first


def headline(settings, cost):
    """Which preset, how long, and what is otherwise than in the paper."""
    name = next(iter(settings.parts))
    minutes = None if cost is None else presets.seconds(settings.steps, settings.batch, cost) / 60
    time = "" if minutes is None else f", {spoken(minutes)} on two CPU cores"
    changes = ", ".join(settled.changed(METHODS, settings))
    changes = f"otherwise than the RECIPE of {name}: {changes}" if changes else f"the RECIPE of {name} as it stands"
    return f"preset {settings.preset}: {settings.steps} steps of {settings.method}{time}; {changes}"


def spoken(minutes):
    """A length of time, roughly."""
    if minutes < 1.5:
        return "a minute" if minutes >= 0.5 else "less than a minute"
    if minutes < 90:
        return f"{minutes:.0f} minutes"
    return f"{minutes / 60:.0f} hours" if minutes < 48 * 60 else f"{minutes / 60 / 24:.0f} days"


def notes(method, settings, count):
    """What the user should know before it starts."""
    if settings.batch > count:
        yield (f"a batch of {settings.batch} is larger than the set ({count} images): it holds copies, which "
               f"contrastive methods take for other images; --batch {1 << count.bit_length() - 1} avoids it")
    for name, part in getattr(method, "parts", {settings.method: method}).items():
        if hasattr(part, "when_together") and len(settings.parts) > 1:
            yield f"{name} beside others: {part.when_together}"
        queue = settled.queue_size(METHODS[name], settings.parts[name])
        word = "queue_size" if len(settings.parts) == 1 else f"{name}.queue_size"
        if queue > count:
            yield (f"the queue of {name} holds {queue} embeddings, more than there are images ({count}): images will "
                   f"meet old embeddings of their own as negatives; --set {word}={max(1, count // 2)} avoids it")


def train(method, monitor, dataset, rows, config):
    """The loop with its bar, its looks and its curves. Returns the last step that was done and the seconds it took."""
    started, step, history, logged = time.perf_counter(), None, None, 0
    silent = {} if monitor.out else {"disable": True}                       # left out, TQDM_DISABLE decides
    with tqdm(total=config.steps, unit="step", dynamic_ncols=True, delay=0.5, **silent) as bar:
        for record in loop.fit(method, dataset, config, rows):
            step = record["step"]
            if history is None:                                             # of a resumed run, now that it was cut back
                history = files.read_log(Path(config.out) / "log.jsonl")
            bar.update(step - bar.n)
            if not isinstance(record["loss"], float):
                continue
            if monitor.due(step):
                record.update(monitor.look(method))
            history.append(files.rounded(record))
            if monitor.due(step) and monitor.out:
                monitor.draw_curves(history)
            bar.set_postfix(monitor.summary(record), refresh=False)
            logged += 1
            if logged == 2 and monitor.out:                                 # the first rate still holds the start
                minutes = (config.steps - step) * config.batch / record["images_per_s"] / 60
                bar.write(f"at this pace {spoken(minutes)} to go; {memory(monitor.device):.1f} GiB of memory in use")
    return step, time.perf_counter() - started


def memory(device):
    """Peak memory in GiB: the GPU's where there is one, else the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    unit = 2**30 if sys.platform == "darwin" else 2**20                     # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def parse(argv):
    methods = ", ".join(name for name in METHODS if name != "together")
    parser = cli.Parser(prog="train.py", description=__doc__.split("\n")[0], epilog=f"methods: {methods}; a+b trains "
                        "several together, with optimiser, batch and size of the first")
    add = parser.add_argument
    add("--method", default="medmoco", help="which one, or several joined by + (default medmoco)")
    add("--data", type=cli.filled, default="phantoms", help="folder or file of images (default: phantoms, built in)")
    add("--label", type=cli.filled, default="label", help="column of split.csv that holds the label")
    add("--preset", choices=("small", "paper"), default="small",
        help="what holds where no flag says it: small (default) is for minutes on two CPU cores, paper is the RECIPE")
    add("--encoder", choices=encoders.ENCODERS, help="default: the preset's, as for all that is not given")
    add("--stem", choices=encoders.STEMS,
        help="first layers: default (total stride 32), nopool (16), small (8; below 40 pixels)")
    add("--size", type=cli.side, help="side of the images in pixels (small: as they are, but 64 to 96)")
    add("--channels", type=int, choices=(1, 3), help="default: as the images are")
    add("--batch", type=cli.positive, help="images per step, over all processes and micro-batches")
    add("--accum", type=cli.positive, default=1, help="micro-batches per step")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=cli.positive, help="optimiser steps")
    length.add_argument("--epochs", type=cli.positive_number, help="passes over the images")
    add("--warmup", type=cli.not_negative, metavar="EPOCHS", help="passes over which the rate rises from 0")
    add("--optimizer", choices=optim.OPTIMIZERS)
    add("--options", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="further words of the optimiser, such as momentum=0.9")
    add("--lr", type=cli.positive_number,
        help="per 256 images with sgd, lars and lamb; as it stands with adam and adamw")
    add("--weight-decay", type=cli.not_negative, help="of weights; biases and norms never decay")
    add("--views", choices=augment.VIEWS, help="views of common/augment.py, by name")
    add("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
        help="an argument of the method's constructor, see medssl/METHOD.py; PART.NAME=VALUE with several parts")
    add("--init", type=cli.filled, metavar="FILE",
        help="start from a run, or from weights: ours, torchvision's, timm's, or within what MoCo, SwAV, DINO, SparK, "
        "solo-learn, lightly and others save")
    add("--out", type=cli.filled, metavar="DIR", help="default: runs/METHOD-DATA, numbered")
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--save-every", type=cli.positive, default=500, help="steps between checkpoints")
    add("--keep-every", type=cli.positive, help="also keep encoder-STEP.pt every so many steps")
    add("--log-every", type=cli.positive, default=10, help="steps between lines of log.jsonl")
    add("--seed", type=cli.whole, default=0, help="of weights, order and views")
    add("--device", type=cli.device, default="auto",
        help="cpu, cuda, cuda:1, ..., mps (default: cuda if there is one, else cpu)")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler on CPUs")
    add("--sync-bn", action="store_true", help="one BatchNorm over all processes")
    add("--clip", type=cli.positive_number, help="largest global gradient norm")
    add("--cache", type=cli.filled, metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.resume:
        check_resume(parser, args)
    return args


def check_resume(parser, args):
    """A run is gone on with as it was begun, perhaps on another device."""
    given = [name for name, value in vars(args).items()
             if value != parser.get_default(name) and name not in ("resume", "out", "device")]
    if {"steps", "epochs"} & set(given):
        parser.error("--resume goes on to the length that was set at the start; to train longer, start a new run "
                     f"from this one: --init {args.out}")
    if given or not args.out:
        leave = f"; leave out --{given[0].replace('_', '-')}" if given else ""
        parser.error(f"--resume needs --out and takes the rest from its config.json{leave}")


def report(monitor, config, done, seconds):
    """In words what came out, and the command that comes next."""
    out, latest = shlex.quote(config.out), monitor.latest
    if done is None:
        print(f"nothing was left to do; to train longer, start a new run from this one: --init {out}")
    else:
        print(f"{done} of {config.steps} steps in {seconds / 60:.1f} minutes")
    if latest.get("spread", 1) < 0.1:
        print(f"COLLAPSED: the embedding's spread is {latest['spread']:.3f} (about 1 is healthy, 0 means that all "
              "images look the same to the network)")
    if monitor.unscored:
        print(f"no kNN on validation images: {monitor.unscored}")
    elif "knn" in latest:
        scores = {"trained": latest["knn"]} | monitor.start | {"by chance": monitor.chance()}
        listed = "; ".join(f"{score:.3f} {name}" for name, score in scores.items())
        print(f"kNN on validation images, balanced accuracy: {listed}")
    pictures = ", ".join(path.name for path in sorted(Path(config.out).glob("*.png")))
    print(f"in {out}: encoder.pt, checkpoint.pt, log.jsonl, config.json; pictures {pictures}")
    stopped = done is not None and done < config.steps
    print(f"next: python train.py --resume --out {out}" if stopped else f"next: python evaluate.py {out}")


if __name__ == "__main__":
    cli.run(main)
