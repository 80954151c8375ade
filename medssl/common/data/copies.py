"""Which images are copies of others: exactly, by a hash of all pixels, or nearly, by a difference hash."""
import numpy as np
from PIL import Image

from .pixels import gray

NEAR = 6                                                                    # differing bits of 64
BITS = np.array([bin(number).count("1") for number in range(256)], np.uint8)


class Copies:
    """Tells of each image whether one before it was the same; within a group, whether one was nearly the same.
    Without a group only exact copies count: two patients may look alike."""

    def __init__(self):
        self.exact, self.near = set(), {}                                   # hashes; difference hashes of each group

    def kind(self, hash, near, group):
        """"copies", "near", or None for an image that is new."""
        others = self.near.setdefault(group, [])
        if hash and hash in self.exact:
            return "copies"
        if group and is_near(near, others):
            return "near"
        self.exact.add(hash)
        others.append(near)
        return None


def difference_hash(image):
    """64 bits: whether each cell of an 8 x 8 grid is darker than its right neighbour."""
    image = gray(image) if image.ndim == 3 else image
    image = (image >> 8).astype(np.uint8) if image.dtype == np.uint16 else image
    grid = np.asarray(Image.fromarray(image).resize((9, 8), Image.BILINEAR))
    return np.packbits(grid[:, 1:] > grid[:, :-1]).view(np.uint64)[0]


def is_near(hash, others):
    if not others:
        return False
    return BITS[(np.array(others, np.uint64) ^ hash).view(np.uint8)].reshape(-1, 8).sum(1).min() <= NEAR
