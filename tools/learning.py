"""Does every method learn? A short training of each on the built-in images, with a number to reach.

    python tools/learning.py [METHOD ...]        one to two minutes for all on two CPU cores

What a broken method would also reach is no number to reach: where the loss says little (MoCo's rises while its queue
fills, BYOL's and SimSiam's may fall because everything collapses) it is how well the second view of an unseen image is
found among other images.
"""

import functools
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from medssl import METHODS
from medssl.common import config, encoders, feed, loop, metrics
from medssl.common.data import phantoms

SIZE, BATCH = 64, 32
WANTED = "steps, words of its constructor, what is measured, whether it has to be above or below, the level"
# method: what WANTED says
LEVELS = {                         # the longest first
    "pcrl": (70, ["queue_size=512", "momentum=0.99"], "contrast / chance", "<", 0.98),
    "spark": (30, ["width=64"], "textured", "<", 0.9),
    "simclr": (90, ["temperature=0.2"], "ranked", ">", 0.75),
    "dcl": (150, ["temperature=0.2"], "ranked", ">", 0.61),
    "simsiam": (70, ["hidden=512", "dim=256"], "loss without collapse", "<", -0.4),
    "byol": (120, ["momentum=0.9"], "ranked", ">", 0.65),
    "vicreg": (150, ["dim=256", "hidden=256"], "ranked", ">", 0.65),
    "lejepa": (150, ["hidden=256", "dim=64", "crops=0"], "ranked", ">", 0.65),
    "swav": (130, ["prototypes=20", "freeze=0", "crops=2", "epsilon=0.03"], "loss / chance", "<", 0.97),
    "moco": (150, ["queue_size=512", "momentum=0.99", "temperature=0.2"], "accuracy", ">", 0.1),
    "medmoco": (110, ["queue_size=512", "momentum=0.99"], "local", "<", 2.85),
    "rotation": (50, [], "accuracy", ">", 0.9),
    "relative": (100, ["width=64", "hidden=1024", "depth=1"], "accuracy", ">", 0.8),
    "jigsaw": (60, ["permutations=20", "width=64", "hidden=1024", "depth=2"], "accuracy", ">", 0.8),
    "autoencoder": (30, [], "loss / chance", "<", 0.6),
    "genesis": (30, [], "loss / chance", "<", 0.7),
    "rubik": (60, ["permutations=20"], "order_accuracy", ">", 0.8),
    "rotation+simclr": (50, [], "rotation.accuracy", ">", 0.8),
}

RATES = {"swav": 1e-3, "pcrl": 6e-3}             # where 3e-3 is too fast or too slow


def trained(name, steps, words, dataset, size=SIZE, encoder=None, lr=None):
    """A method after `steps` steps, and its last records, averaged."""
    torch.manual_seed(0)
    if encoder is None:                             # stride 32 leaves SparK four cells at 64 pixels, 16 leaves sixteen
        encoder = encoders.build("tiny", 1, "nopool" if name == "spark" else "default", dataset.mean, dataset.std)
    method = config.build(METHODS, config.parts_of(METHODS, name.split("+"), words), encoder, 1, size)
    settings = loop.Config(steps=steps, batch=BATCH, lr=lr or RATES.get(name, 3e-3), optimizer="adamw",
                           weight_decay=0.01, warmup=10, device="cpu", log_every=10)
    records = [r for r in loop.fit(method, dataset, settings, dataset.rows("train")) if isinstance(r["loss"], float)]
    last = records[-4:]
    return method, {key: sum(r[key] for r in last) / len(last) for key in last[0] if key != "step"}


@torch.no_grad()
def ranked(method, dataset, count=128):
    """Two views of unseen images: of the other images, what share is less similar to the first view than its own second
    view is? A half by chance, and by a collapsed network; the untrained network's figure is the one to beat."""
    images = feed.batch(dataset.images, dataset.rows("test", "val")[::2][:count], "cpu")
    method.eval()
    torch.manual_seed(0)
    first, second = (F.normalize(method.encoder(method.augment(images)), dim=1) for _ in range(2))
    similarity = (first - first.mean(0)) @ (second - second.mean(0)).T                                     # (N, N)
    return (similarity < similarity.diagonal()[:, None]).float().mean().item()


@torch.no_grad()
def without_collapse(method, dataset, loss):
    """The loss, or 0 where the embeddings have run together and so agree for no good reason."""
    torch.manual_seed(0)
    out = method.train()(*method.views(feed.batch(dataset.images, dataset.rows("val")[:64], "cpu")))
    return loss if metrics.spread(out["embedding"].numpy()) > 0.3 else 0.0


def measure(what, method, record, dataset):
    if what == "ranked":
        return ranked(method, dataset)
    if what == "loss without collapse":
        return without_collapse(method, dataset, record["loss"])
    above, _, below = what.partition(" / ")
    return record[above] / record[below] if below else record[above]


@functools.cache
def pictures():
    return phantoms.make(1000, SIZE)


def passes(name):
    """(whether the method reached its level, a line that says so, with the figure of a single step to compare)"""
    steps, words, what, sign, level = LEVELS[name]
    start = time.perf_counter()
    first = measure(what, *trained(name, 1, words, pictures()), pictures())
    method, record = trained(name, steps, words, pictures())
    value = measure(what, method, record, pictures())
    good = value > level if sign == ">" else value < level
    return good, (f"{'ok    ' if good else 'FAILED'} {name:16} {what} {value:.3f}, has to be {sign} {level}; "
                  f"{first:.3f} after one step ({steps} steps, {time.perf_counter() - start:.0f} s)")


def stop(*_):
    """Ends the workers, too."""
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def main():
    names = sys.argv[1:] or list(LEVELS)
    unknown = [name for name in names if name not in LEVELS]
    if unknown:
        sys.exit(f"tools/learning.py: LEVELS has no entry for {', '.join(unknown)}: {WANTED}")
    failed = 0
    signal.signal(signal.SIGTERM, stop)
    # Two trainings side by side, one thread each: networks as small as these gain little from a second thread.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for good, line in pool.map(passes, names):
            failed += not good
            print(line, flush=True)
    print(f"{len(names) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
