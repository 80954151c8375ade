"""What the loop is fed with: which images come at which step, read ahead, and turned into views.

Order and randomness are functions of (seed, step, part) alone: any step can be computed again.
"""

import functools
import inspect
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def make_views(method, pictures, dataset, rows):
    """method.views with the targets that its signature asks for: labels, masks or groups of these rows, None where the set has none."""
    targets = {}
    for name in list(inspect.signature(method.views).parameters)[1:]:
        whole = getattr(dataset, name)
        targets[name] = None if whole is None else torch.from_numpy(whole[rows]).to(pictures.device, non_blocking=True)
    with torch.no_grad():
        return method.views(pictures, **targets)


def mix(*numbers):
    """One well-spread seed from several numbers."""
    h = 0
    for n in numbers:
        h = (h ^ (n + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        h ^= h >> 31
    return h % 2**63


def batch_order(count, batch, step, seed, weights=None):
    """The global batch of a step: row numbers from shuffled passes over the set. A tail smaller than a batch is left out of its pass;
    a batch larger than the set runs through several passes."""
    if batch > count:
        first, length = divmod(step * batch, count)
        passes = [shuffled(count, seed, first + i, weights) for i in range((length + batch - 1) // count + 1)]
        return np.concatenate(passes)[length:length + batch]
    epoch, i = divmod(step, count // batch)
    return shuffled(count, seed, epoch, weights)[i * batch:(i + 1) * batch]


def shuffled(count, seed, epoch, weights):
    return _shuffled(count, seed, epoch, None if weights is None else np.asarray(weights, dtype=np.float64).tobytes())


@functools.lru_cache(maxsize=4)
def _shuffled(count, seed, epoch, weights):
    """One pass: a permutation, or with weights as many draws with replacement."""
    generator = torch.Generator().manual_seed(mix(seed, epoch, -1))
    if weights is None:
        return torch.randperm(count, generator=generator).numpy()
    return torch.multinomial(torch.frombuffer(bytearray(weights), dtype=torch.float64), count, True, generator=generator).numpy()


def batch(images, rows, device):
    """Rows of a uint8 or uint16 array as float32 in [0, 1] on the device."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images[rows])).to(device), images.dtype)


def to_float(pictures, dtype):
    return pictures.float() / np.iinfo(dtype).max


class Images:
    """The data set's images by rows: on the GPU where they fill at most a quarter of its free memory, else read ahead by one thread."""

    def __init__(self, images, device):
        self.source, self.device, self.dtype = images, device, images.dtype
        self.resident = device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4
        if self.resident:
            self.source = torch.from_numpy(np.ascontiguousarray(images)).view(torch.int16 if self.dtype == np.uint16 else torch.uint8).to(device)
        self.reader = ThreadPoolExecutor(1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.reader.shutdown(cancel_futures=True)

    def ask(self, rows):
        self.coming = rows if self.resident else self.reader.submit(self.read, rows)

    def read(self, rows):
        order = np.argsort(rows)                                    # ascending reads, for the sake of disks
        pictures = np.empty((len(rows), *self.source.shape[1:]), self.dtype)
        pictures[order] = self.source[rows[order]]
        return torch.from_numpy(pictures).pin_memory() if self.device.type == "cuda" else torch.from_numpy(pictures)

    def take(self):
        if not self.resident:
            return to_float(self.coming.result().to(self.device, non_blocking=True), self.dtype)
        pictures = self.source[torch.from_numpy(self.coming).to(self.device)]
        if self.dtype == np.uint16:
            pictures = pictures.int() & 0xFFFF                      # torch indexes int16 but not uint16
        return to_float(pictures, self.dtype)
