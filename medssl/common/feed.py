"""What the loop is fed with: which images come at which step, read ahead, and turned into views.

Order and randomness are functions of (seed, step, part) alone: any step can be computed again.
"""

import functools
import inspect
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch


def make_views(method, pictures, dataset, rows):
    """method.views with the targets that its signature asks for: labels, masks or groups of these rows, None where the
    set has none."""
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
    """The global batch of a step: row numbers from shuffled passes over the set. A tail smaller than a batch is left
    out of its pass; a batch larger than the set runs through several passes."""
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
    weights = torch.frombuffer(bytearray(weights), dtype=torch.float64)
    return torch.multinomial(weights, count, True, generator=generator).numpy()


def batch(images, rows, device):
    """Rows of a uint8 or uint16 array as float32 in [0, 1] on the device."""
    return to_float(torch.from_numpy(np.ascontiguousarray(images[rows])).to(device), images.dtype)


def to_float(pictures, dtype):
    return pictures.float() / np.iinfo(dtype).max


def batches(images, parts, device):
    """For each array of row numbers in `parts`: the row numbers and their pictures, float32 in [0, 1] on the device.

    The set stays on the GPU where it fills at most a quarter of its free memory; else one thread reads the next part
    while the caller works with this one. Close the generator, or run it to its end, and the thread ends with it."""
    if device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        yield from resident(images, parts, device)
        return
    reader, now = ThreadPoolExecutor(1), None
    try:
        for index in itertools.chain(parts, [None]):
            then = None if index is None else (index, reader.submit(read_rows, images, index, device))
            if now:
                yield now[0], to_float(now[1].result().to(device, non_blocking=True), images.dtype)
            now = then
    finally:
        reader.shutdown(cancel_futures=True)


def resident(images, parts, device):
    """`batches` from a copy of the whole set on the device."""
    kind = torch.int16 if images.dtype == np.uint16 else torch.uint8
    source = torch.from_numpy(np.ascontiguousarray(images)).view(kind).to(device)
    for index in parts:
        pictures = source[torch.from_numpy(index).to(device)]
        if images.dtype == np.uint16:
            pictures = pictures.int() & 0xFFFF                      # torch indexes int16 but not uint16
        yield index, to_float(pictures, images.dtype)


def read_rows(images, rows, device):
    """The rows as a tensor of the set's own type, from where they travel fast."""
    order = np.argsort(rows)                                        # ascending reads, for the sake of disks
    pictures = np.empty((len(rows), *images.shape[1:]), images.dtype)
    pictures[order] = images[rows[order]]
    return torch.from_numpy(pictures).pin_memory() if device.type == "cuda" else torch.from_numpy(pictures)
