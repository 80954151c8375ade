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
import shlex
import time
from pathlib import Path

import torch
from tqdm import tqdm

from medssl import METHODS
from medssl.common import augment, cli, config, data, encoders, files, loop, optim
from medssl.common.errors import UserError
from medssl.common.monitor import Monitor

RUN = "checkpoint.pt"                                                       # what makes a folder a run


def main(argv=None):
    args = parse(argv)
    if args.resume:
        args = config.read(args.out, args.device)
    source, found = config.look(args)
    if not args.resume:
        config.complete(args, METHODS, found)
    rank, world, device = loop.processes(args.device)
    say = print if rank == 0 else lambda *_: None
    loop.count_parts(args.batch, args.accum, world)                         # or the line that says why not
    if not args.resume:
        args.out = run_folder(args, world)
    headline(args, say)
    dataset = data.load(source, args.size, args.channels, args.label, args.cache)
    if args.deal is not None:
        dataset = data.deal(dataset, args.deal)
        say(f"the patients are dealt anew to train, val and test from seed {args.deal}; evaluate.py deals them alike")
    rows = dataset.rows(*data.LEARNT_FROM)
    if not len(rows):
        raise UserError(f"{args.data}: no image to learn from, none is of the split train or unlabeled")
    method, first = build_method(args, dataset, say)
    say(f"{len(rows)} images {'x'.join(map(str, dataset.images.shape[1:]))} of {dataset.name}, "
        f"{sum(p.numel() for p in first.parameters()) / 1e6:.1f} M weights in {args.encoder}, on {device}")
    for note in notes(args, len(rows)):
        say(f"note: {note}")
    if args.resume:
        config.check_data(args.out, dataset)
    out = Path(args.out)
    with files.new_folder(out, RUN) if rank == 0 else contextlib.nullcontext():     # all flags were found right
        if rank == 0 and not args.resume:
            config.write(args, dataset)
        method.to(device, memory_format=torch.channels_last)
        monitor = Monitor(first.to(device), dataset, rows, device, config.training(args), draws=rank == 0)
        if rank == 0 and not args.resume:
            monitor.draw_views(method)
            say(f"what the method sees: {out / 'views.png'}")
        done, seconds = train(method, monitor, dataset, rows, config.training(args))
    if rank == 0:
        last_words(monitor, args, done, seconds)


def run_folder(args, world):
    """Where the run is to leave what it leaves."""
    stem = f"runs/{args.method}-{Path(args.data).stem or 'data'}"
    out = files.free_folder(args.out, stem, RUN, "--resume goes on with that run, another --out starts afresh")
    if world > 1 and not args.out:
        raise UserError(f"with several processes say where to: --out {out}")
    return str(out)


def headline(args, say):
    """Which preset, how long, and what is otherwise than in the paper."""
    changes = ", ".join(config.changes(args, METHODS)) or "nothing"
    say(f"{args.steps} steps of {args.method} with {args.batch} images each, preset {args.preset}")
    say(f"otherwise than in its RECIPE (in brackets): {changes}")
    for name, part in args.parts.items():
        if part.queue_cut:
            say(f"the queue of {name} was cut from {part.queue_cut} to {part.words['queue_size']}, a quarter of the "
                "images: else images meet old embeddings of their own as negatives")


def build_method(args, dataset, say):
    """The method, and the encoder before training. What --init brings is in it before slow copies are made of it."""
    channels = dataset.images.shape[1]
    torch.manual_seed(args.seed)                                            # the same first weights in every process
    encoder = encoders.build(args.encoder, channels, args.stem, dataset.mean, dataset.std)
    encoder.size = args.size                                                # stands in encoder.json
    if args.init:
        matched, total = encoders.load(args.init, encoder, lambda line: say(f"note: {line}"))
        say(f"starting from {args.init}: {matched} of {total} tensors matched")
    first = copy.deepcopy(encoder)
    return config.build(METHODS, args.parts, encoder, channels, args.size), first


def notes(args, count):
    """What the user should know before it starts."""
    if args.batch > count:
        yield (f"a batch of {args.batch} is larger than the set ({count} images): it holds copies, which contrastive "
               f"methods take for other images; --batch {1 << count.bit_length() - 1} avoids it")
    for name, part in args.parts.items():
        queue = config.queue_size(METHODS[name], part)
        word = "queue_size" if len(args.parts) == 1 else f"{name}.queue_size"
        if queue > count:
            yield (f"the queue of {name} holds {queue} embeddings, more than there are images ({count}): images will "
                   f"meet old embeddings of their own as negatives; --set {word}={max(1, count // 2)} avoids it")


def train(method, monitor, dataset, rows, settings):
    """The loop with its bar, its looks and its curves. Returns the last step that was done and the seconds it took."""
    started, step, history, logged = time.perf_counter(), None, None, 0
    silent = {} if monitor.out else {"disable": True}                       # left out, TQDM_DISABLE decides
    with tqdm(total=settings.steps, unit="step", dynamic_ncols=True, delay=0.5, **silent) as bar:
        for record in loop.fit(method, dataset, settings, rows):
            step = record["step"]
            if history is None:                                             # of a resumed run, now that it was cut back
                history = files.read_log(Path(settings.out) / "log.jsonl")
            bar.update(step - bar.n)
            if not isinstance(record["loss"], float):
                continue
            if monitor.due(step):
                record.update(monitor.look(method, step))
            history.append(files.rounded(record))
            if monitor.due(step) and monitor.out:
                monitor.draw_curves(history)
            bar.set_postfix(monitor.summary(record), refresh=False)
            logged += 1
            if logged == 2 and monitor.out:                                 # the first rate still holds the start
                minutes = (settings.steps - step) * settings.batch / record["images_per_s"] / 60
                bar.write(f"at this pace {spoken(minutes)} to go")
    return step, time.perf_counter() - started


def spoken(minutes):
    """A length of time, roughly."""
    if minutes < 1.5:
        return "a minute" if minutes >= 0.5 else "less than a minute"
    return f"{minutes:.0f} minutes" if minutes < 90 else f"{minutes / 60:.0f} hours"


def parse(argv):
    methods = ", ".join(name for name in METHODS if name != "together")
    parser = cli.Parser(prog="train.py", description=__doc__.split("\n")[0], epilog=f"methods: {methods}; a+b trains "
                        "several together, with optimiser, batch and size of the first")
    add = parser.add_argument
    add("--method", default="medmoco", help="which one, or several joined by + (default medmoco)")
    add("--data", type=cli.filled, default="phantoms", help="folder or file of images (default: phantoms, built in)")
    add("--label", type=cli.filled, default="label", help="column of split.csv that holds the label")
    add("--deal", type=cli.whole, metavar="SEED", help="deal the patients anew, from this seed: for cross-validation")
    add("--preset", choices=("small", "paper"), default="small", help="small (default): minutes on two CPU cores")
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
    add("--weight-decay-end", type=cli.not_negative, help="where a cosine takes it (default: the preset's)")
    add("--clip", type=cli.positive_number, help="largest global gradient norm")
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
    add("--device", default="auto", help="cpu, cuda, cuda:1, ..., mps (default: cuda if there is one, else cpu)")
    add("--amp", choices=loop.AMP, default="off", help="mixed precision")
    add("--compile", action="store_true", help="torch.compile; needs a C++ compiler on CPUs")
    add("--sync-bn", action="store_true", help="one BatchNorm over all processes")
    add("--cache", type=cli.filled, metavar="DIR", help="where decoded images are kept")
    args = parser.parse_args(argv)
    if args.resume:
        check_resume(parser, args)
    return args


def check_resume(parser, args):
    """A run goes on as it was started, perhaps on another device."""
    given = [name for name, value in vars(args).items()
             if value != parser.get_default(name) and name not in ("resume", "out", "device")]
    if {"steps", "epochs"} & set(given):
        parser.error("--resume goes on to the length that was set at the start; to train longer, start a new run "
                     f"from this one: --init {args.out}")
    if given or not args.out:
        leave = f"; leave out --{given[0].replace('_', '-')}" if given else ""
        parser.error(f"--resume needs --out and takes the rest from its config.json{leave}")


def last_words(monitor, args, done, seconds):
    """In words what came out, and the command that comes next."""
    out, latest = shlex.quote(args.out), monitor.latest
    if done is None:
        print(f"nothing was left to do; to train longer, start a new run from this one: --init {out}")
    else:
        print(f"{done} of {args.steps} steps in {seconds / 60:.1f} minutes")
    if latest.get("spread", 1) < 0.1:
        print(f"COLLAPSED: the embedding's spread is {latest['spread']:.3f} (about 1 is healthy, 0 means that all "
              "images look the same to the network)")
    if monitor.unscored:
        print(f"no kNN on validation images: {monitor.unscored}")
    elif "knn" in latest:
        scores = {"trained": latest["knn"]} | monitor.start | {"by chance": monitor.chance()}
        listed = "; ".join(f"{score:.3f} {name}" for name, score in scores.items())
        print(f"kNN on validation images, balanced accuracy: {listed}")
    pictures = ", ".join(path.name for path in sorted(Path(args.out).glob("*.png")))
    print(f"in {out}: encoder.pt, checkpoint.pt, log.jsonl, config.json; pictures {pictures}")
    if done is not None and done < args.steps:
        print(f"next: python train.py --resume --out {out}")
        return
    if monitor.fell():
        harm(monitor, args)
    print(f"next: python evaluate.py {out}")


def harm(monitor, args):
    """What to try where training made the features worse."""
    run, best = f"python train.py --data {shlex.quote(args.data)}", max(monitor.looks, key=monitor.looks.get)
    print(f"LESS THAN BEFORE: of {len(monitor.val)} validation images the trained features tell the classes worse than "
          "those of the untrained network. What the method takes for the same may be what tells your classes apart "
          "(see views.png), or the run is too long for the set (see curves.png). Try, before you use them:")
    if best < args.steps:
        print(f"  {run} --method {args.method} --steps {best}        the best look, with {monitor.looks[best]:.3f}")
    print(f"  {run} --method {args.method} --views mild")
    print(f"  {run} --method {'simclr' if args.method != 'simclr' else 'rotation'}")


if __name__ == "__main__":
    cli.run(main)
