"""What one file's array goes through on its way into the set: slices, 8 bits, a square, planes. No file is opened here.

Images become squares of `size` pixels. fit="pad" scales the longer side to `size` and adds black (class 0 in masks) to
the shorter one, "crop" cuts out the central square first, "squash" ignores the aspect. Masks take the same way, with
the nearest pixel's value.
"""
import hashlib

import numpy as np
from PIL import Image

from ..errors import UserError

MOST = 2 ** 15                                                              # pixels a side
WHOLE = 2 ** 22                                                             # values of a picture resized in one go
FITTING = {"pad": "scaled by their longer side and padded with black", "crop": "central square cut out and scaled",
           "squash": "squashed to a square"}


def by(shape):
    return " x ".join(map(str, shape))


def unit(images):
    """Whole numbers as float32 in [0, 1]: the largest that the type can hold becomes 1."""
    return images / np.float32(np.iinfo(images.dtype).max)


# ---- what a file held

def single(image, name, dtype=None):
    """The image if it is one: (rows, columns) or (rows, columns, 3) of 8 or 16 bits, like the others of its set."""
    if image.ndim != 2 and (image.ndim != 3 or image.shape[2] != 3):
        raise UserError(f"{name}: a stack or volume of shape {image.shape}, not one image: prepare it first (--to)")
    image = image.astype(np.uint8) * 255 if image.dtype == bool else image
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"{name}: {image.dtype} pixels have no fixed range: prepare them first (--to, --window)")
    if dtype is not None and image.dtype != dtype:
        raise UserError(f"{name}: {image.dtype} pixels, where others have {dtype}: two scales in one set")
    return image


def slices(array, name, axis):
    """(slices, rows, columns[, 3]) of whatever an image's or mask's file held."""
    if array.ndim == 2 or array.ndim == 3 and array.shape[2] == 3:
        return array[None]
    if array.ndim == 4 and name.lower().endswith((".nii", ".nii.gz")):
        array = array[0]                                                    # first time or channel: (z, rows, columns)
    if array.ndim != 3 and array.shape[3:] != (3,):
        raise UserError(f"{name}: shape {array.shape} is neither an image nor a volume")
    return np.moveaxis(array, axis, 0)


def class_indices(mask, image, mask_name, name):
    """The mask as (rows, columns) uint8, or None."""
    if mask is None:
        return None
    if mask.ndim == 3 and image.ndim >= 2 and mask.shape[2] == 3 and (mask[..., :1] == mask).all():
        mask = mask[..., 0]                                                 # gray saved as colour
    if mask.shape != image.shape[:2]:
        raise UserError(f"mask {mask_name} is {by(mask.shape)}, but its image {name} is {by(image.shape[:2])}")
    if mask.min() < 0 or mask.max() > 255 or (mask.dtype.kind == "f" and (mask % 1 != 0).any()):
        raise UserError(f"mask {mask_name} holds values from {mask.min()} to {mask.max()}, not class indices")
    return mask.astype(np.uint8)


# ---- grey values

def grey_range(stack, window, percentiles):
    """What becomes 0 and 255; (None, None) for 8 bits that stay as they are."""
    if window:
        return window
    if stack.dtype in (np.uint8, bool) and not percentiles:
        return None, None
    some = stack.ravel()[::max(1, stack.size // 10 ** 6)]                   # a million values tell as much as all
    return np.nanpercentile(some, percentiles or (0.5, 99.5)).tolist()


def eight_bits(layer, low, high):
    if low is None:
        return np.ascontiguousarray(layer * np.uint8(255) if layer.dtype == bool else layer)
    scaled = (np.nan_to_num(layer.astype(np.float32), nan=low) - low) * (255 / (high - low or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def gray(image):
    """Luminance of a colour image, in its own type."""
    return np.rint(image @ np.array([0.299, 0.587, 0.114], np.float32)).astype(image.dtype)     # (rows, columns)


def pixel_hash(image):
    """64 bits that equal images share; 0 for an image of one single value, which is nobody's copy."""
    if (image[0] == image[0, 0]).all() and all((row == image[0]).all() for row in image):
        return 0
    pixels = np.ascontiguousarray(image)
    return int.from_bytes(hashlib.sha1(pixels, usedforsecurity=False).digest()[:8], "big")     # sha1: often the fastest


# ---- the square

def common_size(shapes):
    """The side where all are equal squares, else the median of the longer sides to a multiple of 32."""
    sides = np.array([shape[:2] for shape in shapes])                       # (sample, 2)
    return int(sides.min() if sides.min() == sides.max() else max(32, 32 * round(np.median(sides.max(1)) / 32)))


def fitted(image, size, fit, method=Image.BILINEAR):
    """A square (size, size[, 3]) of an image or mask (rows, columns[, 3])."""
    rows, columns = image.shape[:2]
    if rows == columns == size:
        return image
    if fit == "squash":
        return resized(image, size, size, method)
    if fit == "crop":
        side = min(rows, columns)
        top, left = (rows - side) // 2, (columns - side) // 2
        return resized(image[top:top + side, left:left + side], size, size, method)
    rows, columns = (max(1, round(n * size / max(rows, columns))) for n in (rows, columns))
    square = np.zeros((size, size, *image.shape[2:]), image.dtype)
    top, left = (size - rows) // 2, (size - columns) // 2
    square[top:top + rows, left:left + columns] = resized(image, rows, columns, method)
    return square


def resized(image, rows, columns, method):
    if image.shape[:2] == (rows, columns):
        return image
    if image.dtype == np.uint8 and image.size <= WHOLE:
        return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((columns, rows), method))
    layers = [image[..., c] for c in range(3)] if image.ndim == 3 else [image]      # Pillow would make 4 bytes of 3
    kind = np.uint8 if image.dtype == np.uint8 else np.float32                      # 16 bits: only as floats
    layers = [np.asarray(Image.fromarray(np.ascontiguousarray(layer, kind)).resize((columns, rows), method))
              for layer in layers]
    return np.rint(np.stack(layers, -1)).astype(image.dtype).reshape(rows, columns, *image.shape[2:])


def planes(image, channels):
    """(rows, columns[, 3]) -> (channels, rows, columns)"""
    if image.ndim == 3:
        return image.transpose(2, 0, 1) if channels == 3 else gray(image)[None]
    return image[None].repeat(channels, axis=0) if channels > 1 else image[None]
