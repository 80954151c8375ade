"""Volumes and DICOM files, read with SimpleITK: slices of 8 bits.

All volumes are turned to (z, rows, columns): z from the feet to the head, rows from front to back, columns from the
patient's right to the left, which so is on the right of the picture. Axes are exchanged and flipped, no value is
interpolated. Slices across axis 0 are axial, across 1 coronal, across 2 sagittal. A mask is turned as its image. Of a
fourth dimension the first entry is taken. A DICOM patient is its PatientID, of which only a number is kept.
"""

import math
import os
from contextlib import contextmanager

import numpy as np

from ..errors import UserError
from .sources import existing, naming

try:
    import SimpleITK as sitk  # the extra [volumes]
except ImportError:
    sitk = None

PERCENTILES = 0.5, 99.5                                                     # become 0 and 255
BLANK = 25                                                                  # up to this grey value nothing is seen


def needed():
    if sitk is None:
        raise UserError('volumes and DICOM files are read with SimpleITK: pip install "medssl[volumes]"')
    sitk.ProcessObject.SetGlobalWarningDisplay(False)


def is_dicom(path):
    return not str(path).lower().endswith((".nii", ".nii.gz", ".mhd", ".mha", ".nrrd", ".nhdr"))


def units(files):
    """The volumes that these files make: lists of files, which are several where DICOM slices form a series."""
    folders, found = {}, []
    for file in files:
        if is_dicom(file):
            folders.setdefault(os.path.dirname(file), set()).add(file)
        else:
            found.append([file])
    for folder, inside in folders.items():
        for series in sitk.ImageSeriesReader.GetGDCMSeriesIDs(folder):
            names = [name for name in sitk.ImageSeriesReader.GetGDCMSeriesFileNames(folder, series) if name in inside]
            inside -= set(names)
            found += [names] if names else []
        found += [[file] for file in sorted(inside)]                        # will be told as unreadable
    return sorted(found)


def read_volume(files):
    """(image, PatientID or "", whether small values are bright)"""
    for file in files:
        existing(file)
    with naming(files[0]), plain_words():
        reader = sitk.ImageFileReader()
        reader.SetFileName(files[0])
        reader.ReadImageInformation()
        tags = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
        check_length(files[0], math.prod(reader.GetSize()) * int(tags.get("bitpix", 0)) // 8)
        image = sitk.ReadImage(files if len(files) > 1 else files[0])
        return image, tags.get("0010|0020", ""), tags.get("0028|0004") == "MONOCHROME1"


def check_length(path, least):
    """A NIfTI file that ends early would be filled with what lies in the memory. A gzip's last bytes tell its size."""
    size = os.path.getsize(path)
    if path.endswith(".gz"):
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            size = int.from_bytes(file.read(), "little")
    if not least <= size <= max(2 * least, least + 2**20) and least and size < 2**32:
        raise ValueError(f"declares {least} bytes of values and holds {size}: damaged")


@contextmanager
def plain_words():
    """Of what SimpleITK says, the end."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(str(error).rsplit("ERROR:", 1)[-1]) from None


def turned(image):
    """(z, rows, columns[, 3]) of an image."""
    if image.GetDimension() == 4:
        image = image[..., 0]
    array = sitk.GetArrayFromImage(image)
    if image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 1 and min(image.GetSize()) > 1:
        array = sitk.GetArrayFromImage(sitk.DICOMOrient(image, "LPS"))
    return array if image.GetDimension() == 3 else array[None]


def mask_stack(path, image):
    """The mask of an image, turned as it: a mask's own header often says nothing."""
    mask = read_volume([path])[0]
    with naming(path):
        if mask.GetDimension() == 4:
            mask = mask[..., 0]
        if image.GetDimension() == 4:
            image = image[..., 0]
        plain = np.eye(mask.GetDimension()).ravel()
        if mask.GetSize() != image.GetSize():
            raise ValueError(f"is {mask.GetSize()}, but its image is {image.GetSize()}")
        if not (np.allclose(mask.GetDirection(), image.GetDirection(), atol=1e-3)
                or np.allclose(mask.GetDirection(), plain, atol=1e-3)):
            raise ValueError("its axes run otherwise than those of its image: save it with its image's header")
        mask.CopyInformation(image)
        return turned(mask)


def grey_range(stack, window, percentiles):
    """What becomes 0 and 255; None for 8 bits that stay as they are."""
    if window:
        return window
    if stack.dtype in (np.uint8, bool) and not percentiles:
        return None
    some = stack.ravel()[::max(1, stack.size // 10 ** 6)]                   # a million values tell as much as all
    return np.nanpercentile(some, percentiles or PERCENTILES).tolist()


def eight_bits(layer, ends):
    if ends is None:
        return np.ascontiguousarray(layer * np.uint8(255) if layer.dtype == bool else layer)
    low, high = ends
    scaled = (np.nan_to_num(layer.astype(np.float32), nan=low) - low) * (255 / (high - low or 1))
    return np.rint(scaled.clip(0, 255)).astype(np.uint8)


def slices(files, mask_path, window, percentiles, axis):
    """Of one volume: its PatientID, and [(number, image (rows, columns[, 3]), mask or None)] of the slices that show
    something: at least 1 % of the pixels above a tenth of full scale, or anything in the mask."""
    image, patient, inverted = read_volume(files)
    stack = np.moveaxis(turned(image), axis, 0)                             # (slices, rows, columns[, 3])
    masks = [None] * len(stack) if not mask_path else np.moveaxis(mask_stack(mask_path, image), axis, 0)
    if len(stack) > 1 and not window:                                       # of volumes the range is never known
        percentiles = percentiles or PERCENTILES
    ends, shown = grey_range(stack, window, percentiles), []
    for number, (layer, mask) in enumerate(zip(stack, masks)):
        layer = eight_bits(layer, ends)
        if len(stack) == 1 or (layer > BLANK).mean() >= 0.01 or (mask is not None and mask.any()):
            shown.append((number, 255 - layer if inverted else layer, mask))
    return patient, shown
