"""What the loop costs on top of the network: images per second of both, side by side.

    python tools/benchmark.py --method simclr --encoder resnet18 --size 96 --batch 64
    python tools/benchmark.py --memory          does memory grow with the number of images held in a file?

`network`: forward and backward of the method on fixed random views, without views, optimiser, data or logging. `loop`:
train.py's whole loop on random images. Both are timed in turns, several times, and the medians are compared, since
machines are noisy.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from medssl import METHODS
from medssl.common import config, encoders, feed, loop


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--method", choices=METHODS, default="simclr")
    parser.add_argument("--encoder", choices=encoders.ENCODERS, default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="steps in each timed piece")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=loop.AMP, default="off")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--most", type=int, default=10**6, help="steps with --memory; default: one pass")
    args = parser.parse_args()
    memory(args) if args.memory else speed(args)


def build(args):
    torch.manual_seed(0)
    encoder = encoders.build(args.encoder, args.channels)
    parts = config.parts_of(METHODS, [args.method], found=config.Found(16384, args.size, args.channels))
    return config.build(METHODS, parts, encoder, args.channels, args.size)


def pictures(count, args):
    images = np.random.default_rng(0).integers(0, 256, (count, args.channels, args.size, args.size), np.uint8)
    return SimpleNamespace(name="random", images=images, labels=None, masks=None, groups=None)


def speed(args):
    method, dataset = build(args), pictures(4 * args.batch, args)
    device = loop.processes(args.device)[2]
    total = (args.steps + 2) * args.rounds
    settings = loop.Config(steps=total, batch=args.batch, lr=1e-3, device=args.device, amp=args.amp,
                           compile=args.compile, log_every=10**6)
    running = loop.fit(method, dataset, settings)
    next(running)                                                           # moves the method to the device, warms up
    dtype = loop.AMP[args.amp]
    step = torch.compile(method) if args.compile else method
    images = feed.batch(dataset.images, np.arange(args.batch), device)
    with torch.no_grad():
        fixed = method.views(torch.rand_like(images))

    def network():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = step(*fixed)["loss"]
        loss.backward()
        for p in method.parameters():
            p.grad = None

    def views():
        with torch.no_grad():
            method.views(images)

    pieces = {"network": network, "loop": lambda: next(running), "views": views}
    rates = {name: [] for name in pieces}
    network()
    for _ in range(args.rounds):
        for name, piece in pieces.items():
            wait(device)
            start = time.perf_counter()
            for _ in range(args.steps):
                piece()
            wait(device)
            rates[name].append(args.steps * args.batch / (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in rates.items()}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else status("VmHWM") / 2**20
    print(f"{args.method}, {args.encoder}, {args.channels}x{args.size}x{args.size}, batch {args.batch}, "
          f"amp {args.amp}, {device}, {torch.get_num_threads()} threads")
    print(f"network {median['network']:.1f} images/s, loop {median['loop']:.1f} images/s, "
          f"ratio {median['loop'] / median['network']:.3f}; views alone {median['views']:.0f} images/s; "
          f"peak memory {peak:.2f} GiB")
    print("rounds: " + "; ".join(f"{name} " + " ".join(f"{v:.1f}" for v in values) for name, values in rates.items()))


def memory(args):
    """Anonymous memory of the process while it trains from a file of 2,000 and of 20,000 images."""
    for count in (2000, 20000):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "images.npy"
            images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 1, args.size, args.size))
            generator = np.random.default_rng(0)
            for i in range(0, count, 500):
                images[i:i + 500] = generator.integers(0, 256, (500, 1, args.size, args.size), np.uint8)
            del images
            dataset = SimpleNamespace(name="file", images=np.load(path, mmap_mode="r"), labels=None, masks=None,
                                      groups=None)
            args.encoder = "tiny"
            settings = loop.Config(steps=min(args.most, count // args.batch), batch=args.batch, lr=1e-3, device="cpu",
                                   log_every=10**6)
            for _ in loop.fit(build(args), dataset, settings):
                pass
            print(f"{count} images ({count * args.size ** 2 / 2**20:.0f} MiB): "
                  f"RssAnon {status('RssAnon') / 1024:.0f} MiB, RssFile {status('RssFile') / 1024:.0f} MiB")
            del dataset


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def status(field):
    """A line of /proc/self/status in KiB."""
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])


if __name__ == "__main__":
    main()
