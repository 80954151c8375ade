"""How fast and how large opening a folder is: `python tools/benchmark_data.py [COUNT]`
(50,000 images by default: some minutes and 2 GB of disk).

It makes gray 128 x 128 PNGs in a temporary folder, which it deletes again, and prints
    decoding    images a second of data.load with an empty cache, beside a plain loop over Pillow on as many threads:
                one image a task, and 32 images a task, which spares much of the threads' mutual waiting. (Small images
                are the hard case: the larger they are, the more Pillow itself weighs.)
    opening     seconds of data.load with a filled cache, in a new process
    memory      anonymous memory of a process that opened COUNT/10 and COUNT images, and its peak while decoding them
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from medssl.common import data

SIZE = 128
WORKERS = os.cpu_count() or 1


def make(folder, numbers):
    """Smooth shapes with noise: about 11 KB each."""
    for number in numbers:
        rng = np.random.default_rng(number)
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8))
        smooth = np.asarray(coarse.resize((SIZE, SIZE), Image.BICUBIC)).astype(int)
        noisy = (smooth + rng.integers(-6, 7, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number % 10}" / f"{number:06d}.png")


def plain_loop(files, chunk):
    """What anybody would write: threads, Pillow, one array."""
    images = np.empty((len(files), SIZE, SIZE), np.uint8)

    def open_some(first):
        for row in range(first, min(first + chunk, len(files))):
            with Image.open(files[row]) as picture:
                images[row] = picture
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(open_some, range(0, len(files), chunk)))


def anonymous():
    """MB of memory that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1e3


def child(folder, cache):
    """Opens the folder in this fresh process and says what it took."""
    before, peak, done = anonymous(), [0.0], threading.Event()

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    dataset = data.load(folder, cache=cache)
    seconds = time.perf_counter() - start
    done.set()
    grown = anonymous() - before
    print(json.dumps({"count": len(dataset), "seconds": seconds, "grown": grown, "peak": peak[0] - before}))


def opened(folder, cache):
    command = [sys.executable, __file__, "--child", folder, cache]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def timed(run, *words, **options):
    start = time.perf_counter()
    run(*words, **options)
    return time.perf_counter() - start


def main(count):
    root = Path(tempfile.mkdtemp(prefix="medssl-benchmark-"))
    try:
        few, many = root / "few", root / "many"
        for folder, number in (few, count // 10), (many, count):
            for label in range(10):
                (folder / str(label)).mkdir(parents=True)
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(make, [folder] * 16, [range(first, number, 16) for first in range(16)]))
        files = sorted(map(str, few.rglob("*.png")))
        speeds = []                                                         # in turn: other programs may interfere
        for repeat in range(5):
            seconds = [timed(data.load, few, cache=root / f"cache{repeat}"),
                       timed(plain_loop, files, 1), timed(plain_loop, files, 32)]
            speeds.append(len(files) / np.array(seconds))
        ours, single, chunked = np.median(speeds, 0)
        print(f"decoding   {ours:.0f} images/s; plain loop {single:.0f} ({ours / single:.2f} times), in chunks of 32 "
              f"{chunked:.0f} ({ours / chunked:.2f} times); {WORKERS} threads, medians of 5")
        for folder in few, many:
            first, second = opened(folder, root / "cache"), opened(folder, root / "cache")
            print(f"opening    {second['count']} images in {second['seconds']:.2f} s from the cache, "
                  f"{first['seconds']:.1f} s the first time")
            print(f"memory     +{second['grown']:.1f} MB anonymous from cache; first time +{first['grown']:.1f} MB, "
                  f"at most +{first['peak']:.1f} MB; the images are {second['count'] * SIZE * SIZE / 1e6:.0f} MB")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 50_000)
