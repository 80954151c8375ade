"""From a file on disk to a numpy array: pictures, arrays, volumes, DICOM.

    array = read("scan.nii.gz")

What comes back, by kind of file. Values and axes are the file's own: nothing is windowed, scaled to [0, 1] or clipped.

    PNG JPEG TIFF BMP   (rows, columns), colour (rows, columns, 3). 8 bits: uint8, 16 bits: uint16, float TIFF: float32.
                        Palettes become colours, alpha is dropped, 1 bit becomes 0 and 255, EXIF orientation is applied,
                        a TIFF whose small values are white is inverted. A TIFF of several pages is (pages, rows,
                        columns). Of 16 bits *with* colour or alpha, Pillow keeps the upper 8.
    .npy                the array as saved, memory-mapped
    .nii .nii.gz        (x, y, z[, t]) float64 as in the file, slope and intercept applied
    .mhd .mha           (z, y, x[, channels]) in the file's own type
    .dcm                (rows, columns) float64, slope and intercept applied; cine (frames, rows, columns); colour with
                        3 at the end. MONOCHROME1 keeps its values, small is bright there: `small_is_bright` tells.
                        Without a known ending, DICOM is recognised by its first bytes.
    a folder            the DICOM series in it, (z, rows, columns), sorted by position

`read_volume` also turns volumes, so that an axis means the same for all of them: (z, rows, columns), z from the feet to
the head, rows from front to back, columns from the patient's right to the left, which so is on the right of the picture
(radiological convention). Slices across axis 0 are axial, across 1 coronal, across 2 sagittal, both with the head at
the bottom. What the header says counts: NIfTI's sform, else its qform; MetaImage's TransformMatrix, else its
AnatomicalOrientation; ImageOrientationPatient of a DICOM series. Axes are exchanged and flipped to come closest to that
order (nibabel's as_closest_canonical does the same for an order of its own); no value is interpolated. A volume whose
header says nothing, or which has fewer than three axes, stays as it is stored. `read_mask` turns a mask as its image.

Files come from anywhere, so a header is believed only as far as the file's size bears it out: every reader compares the
two before it asks for memory. Nothing is unpickled. What cannot be read raises Unreadable: path and reason in one line.
"""
import contextlib
import io
import math
import os
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError
from . import dicom, volumes

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
NIFTI, META = (".nii", ".nii.gz"), (".mhd", ".mha")
VOLUMES = NIFTI + META
DICOM = (".dcm", ".dicom")
SUFFIXES = IMAGES + (".npy",) + VOLUMES + DICOM
FOREIGN = {(".npz",): "holds several arrays: medssl.common.data.load opens it as a set",
           (".nrrd", ".nhdr"): "cannot be read: save it as NIfTI (.nii.gz) with 3D Slicer or SimpleITK",
           (".mgz", ".mgh"): "cannot be read: convert it to NIfTI, mri_convert IN.mgz OUT.nii.gz (FreeSurfer)",
           (".hdr", ".img"): "cannot be read: convert it to NIfTI, fslchfiletype NIFTI_GZ IN.hdr OUT (FSL)",
           (".gif",): "cannot be read: save it as PNG, magick IN.gif OUT.png (ImageMagick)",
           (".h5", ".hdf5"): "cannot be read: save its array as .npy, numpy.save('OUT', h5py.File('IN.h5')['NAME'])"}
PIXELS = 2 ** 26                                                            # of a picture, at most
STRIP = 2 ** 20                                                             # pixels that are converted at a time
AT_ONCE = 2 ** 22                                                           # bytes of a picture's file read in one go
SMALLER = f"at most {PIXELS} (8192 x 8192) are read: shrink it or cut it into tiles first"


class Unreadable(UserError):
    """One line: the path as given and the reason."""


@contextlib.contextmanager
def naming(path):
    """What goes wrong inside becomes one Unreadable line; decoders raise anything from SyntaxError to MemoryError."""
    try:
        yield
    except Unreadable:
        raise
    except Exception as error:
        reason = " ".join((getattr(error, "strerror", None) or str(error) or type(error).__name__).split())
        own = isinstance(error, ValueError) or getattr(error, "strerror", None)
        raise Unreadable(f"{path}: {reason if own else 'cannot be decoded: ' + reason}") from error


def suffix(path):
    """The ending that tells the kind of file, in lower case; ".nii.gz" counts as one."""
    name = os.path.basename(path).lower()                                   # pathlib would take a quarter of the time
    return ".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1]


def kind_of(path):
    """As `suffix`, but ".dcm" for a DICOM file whose name has no known ending."""
    kind = suffix(path)
    return ".dcm" if kind not in SUFFIXES and is_dicom(path) else kind


def way_out(kind):
    """Why files with this ending cannot be read, and what to do: the end of a sentence. None of unknown endings."""
    return next((way for kinds, way in FOREIGN.items() if kind in kinds), None)


def refusal(kind):
    """As `way_out`, for any ending: a sentence's end that comes after the path."""
    way = way_out(kind) or "cannot be read; what can be: " + " ".join(SUFFIXES)
    return f"{kind or 'a file without an ending'} {way}"


def regular(path, state=None):
    """The size of a file. Whoever opens a pipe or a device waits for ever."""
    state = state or os.stat(path)
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("is not a file with contents, but a folder, pipe, socket or device")
    if state.st_size == 0:
        raise ValueError("is empty (0 bytes)")
    return state.st_size


def read(path):
    """The array in this file, or of the DICOM series in this folder; the table above gives shapes and types."""
    with naming(path):
        state = os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            return read_series(path)
        size, kind = regular(path, state), kind_of(path)
        if kind not in SUFFIXES:
            raise ValueError(refusal(kind))
        return READERS[kind](path, size)


def read_volume(path):
    """As `read`, but slices come first, (z, rows, columns) or (t, z, rows, columns), and lie as the text above says."""
    return _turned(_slices_first(path), path, orientation(path))


def read_mask(path, image):
    """The class indices of a mask, turned as `read_volume` turns its image: a mask's own header often says nothing, and
    one that says something else than its image's is refused. Of a palette picture, what counts are the indices."""
    with naming(path):
        array = _image(path, regular(path), indices=True) if suffix(path) in IMAGES else _slices_first(path)
        if array.ndim < 3:
            return array
        own, code = orientation(path), orientation(image)
        if own and code and own != code:
            raise ValueError(f"its axes run to {own}, those of its image to {code}: save it with its image's header")
        return _turned(array, path, code)


def _slices_first(path):
    return read(path).transpose() if suffix(path) in NIFTI else read(path)


def orientation(path):
    """Where the axes x, y and z of a volume's file run to, three letters as nibabel's aff2axcodes gives them ("RAS");
    "LPS" is what `read_volume` makes of all. None where the header does not say."""
    with naming(path):
        if os.path.isdir(path):
            directions = _series(path)[1]
            return None if directions is None else volumes.letters(directions)
        if suffix(path) in VOLUMES and regular(path):
            return volumes.stated(path)
        return None


def _turned(volume, path, code):
    """`path` tells which axes are z, y and x: the last three of a NIfTI, the first three of others."""
    if code is None or volume.ndim < 3:
        return volume
    return volumes.turned(volume, code, volume.ndim - 3 if suffix(path) in NIFTI else 0)


# Pictures

def _image(path, size, indices=False):
    """`indices`: of a palette picture its indices, not its colours."""
    pages = []
    with open(path, "rb") as stream:                                        # from a path Pillow misreads a turned TIFF
        if size <= AT_ONCE:
            stream = io.BytesIO(stream.read())
        start = stream.read(8)
        if start == b"\x89PNG\r\n\x1a\n":
            _check_png(stream, size)
        elif start[:2] == b"\xff\xd8":
            _check_jpeg(stream.read())
        stream.seek(0)
        try:
            image = Image.open(stream, formats=("PNG", "JPEG", "TIFF", "BMP"))              # reads the header only
        except UnidentifiedImageError:
            raise ValueError("is not a PNG, JPEG, TIFF or BMP picture (or not of a kind that Pillow reads)") from None
        except Image.DecompressionBombError:
            raise ValueError(f"declares very many pixels; {SMALLER}") from None
        first = image.size
        while image.format == "TIFF" or not pages:
            try:
                image.seek(len(pages))
            except EOFError:
                break
            if image.size != first:
                raise ValueError(f"page {len(pages)} is of another size than page 0, so the pages are not a stack")
            _check_size(image, len(pages) + 1, size)
            pages.append(_pixels(image, indices))
            if pages[-1].shape != pages[0].shape:                           # gray beside colour
                raise ValueError(f"page {len(pages) - 1} has other channels than page 0, so the pages are not a stack")
    if len(pages) == 1:
        return pages[0]
    stack = np.empty((len(pages), *pages[0].shape), np.result_type(*{page.dtype for page in pages}))
    for number in range(len(pages)):
        stack[number], pages[number] = pages[number], None                  # each page's memory is given back
    return stack


def _check_png(stream, size):
    """Pillow does not look at the checksums of pixels, nor for the end. The reading stands behind the signature."""
    at, kind = 8, b""
    while kind != b"IEND":
        head = stream.read(8)
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) < 8 or at + 12 + length > size:
            raise ValueError("is a PNG that ends early")
        body = stream.read(length + 4)
        if zlib.crc32(body[:-4], zlib.crc32(kind)) != int.from_bytes(body[-4:], "big"):
            raise ValueError(f"is a damaged PNG: a checksum is wrong (part {kind.decode('latin-1')!r} at byte {at})")
        if at == 8:
            columns, rows, depth, colour = struct.unpack_from(">IIBB", body)
            _check_pixels(rows, columns)
            volumes.believable(rows * columns * depth * (1, 1, 3, 1, 2, 1, 4)[colour] // 8, size)
        at += 12 + length


def _check_jpeg(data):
    """Of a JPEG only its last mark shows that it is whole; Pillow reads zeros in its place as pixels."""
    at = data.find(b"\xff", 2)
    while at >= 0 and data[at + 1:at + 2] != b"\xda":                       # to the first scan; thumbnails lie before
        known = data[at + 1:at + 2] not in (b"\xff", b"\0")                 # a part, whose length follows
        at = data.find(b"\xff", at + (2 + int.from_bytes(data[at + 2:at + 4], "big") if known else 1))
    end = data.find(b"\xff\xd9", at)
    if at < 0 or end < 0:
        raise ValueError("is a JPEG without an end: cut off or overwritten")
    if data.count(b"\xff\xda", at, end) > 100:                              # each takes as long as a whole picture
        raise ValueError("is a JPEG of more than 100 scans")


def _check_size(image, pages, size):
    """PNG packs as zlib does; JPEG needs 1 bit for 64 pixels; nothing else here packs tighter than 2200 to a byte."""
    columns, rows = image.size
    _check_pixels(rows, columns)
    volumes.affordable((pages, rows, columns))
    tight = {"JPEG": 520, "MPO": 520, "PNG": math.inf}.get(image.format, 2200)
    if pages * rows * columns > max(2 ** 24, tight * size):
        raise ValueError(f"declares {pages} x {rows} x {columns} pixels, too many for its size to be true")


def _check_pixels(rows, columns):
    if rows * columns > PIXELS:
        raise ValueError(f"declares {rows} x {columns} pixels; {SMALLER}")


def _pixels(image, indices):
    """One decoded picture or page as (rows, columns) or (rows, columns, 3)."""
    tags = getattr(image, "tag_v2", {})
    if tags.get(284) == 2 and tags.get(277, 1) > 1 and (tags.get(262), tags.get(258)) != (2, (8, 8, 8)):
        raise ValueError("is a TIFF with its channels in separate planes, which is read only for 8-bit RGB: save it "
                         "with PlanarConfiguration 1")
    image.load()                                                            # refuses a file that ends early
    known = " ".join(map(str, image.info)).lower()
    if image.format == "TIFF" or "exif" in known or "xmp" in known:         # asking every picture takes a while
        ImageOps.exif_transpose(image, in_place=True)
    steps = ()
    if image.mode in ("1", "LA", "La"):
        steps = ("L",)
    elif image.mode in ("P", "PA") and not (indices and image.mode == "P"):
        steps = ("RGBA", "RGB")                                             # RGBA first: palettes may hold transparency
    elif image.mode not in ("L", "P", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        steps = ("RGB",)                                                    # RGBA, CMYK, YCbCr, LAB
    array = _converted(image, steps)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if tags.get(262) == 0 and array.dtype != np.uint8:                      # small is white; Pillow inverts 8 bits only
        array = -array if array.dtype.kind == "f" else ~array
    if tags and image.mode in ("L", "I"):                                   # Pillow forgets a TIFF's sign bit
        return array.view(f"{'i' if tags.get(339, (1,))[0] == 2 else 'u'}{array.itemsize}")
    return array.astype(np.uint16) if image.mode == "I" else array          # how older Pillows open 16-bit PNG


def _converted(image, steps):
    """The array after some changes of mode, strip by strip: of a large picture, Pillow would make whole copies."""
    columns, rows = image.size
    high, array = max(1, STRIP // columns), None
    for top in range(0, rows, high):
        strip = image if high >= rows else image.crop((0, top, columns, min(top + high, rows)))
        for mode in steps:
            strip = strip.convert(mode)
        part = np.asarray(strip)                                            # (high, columns[, 3])
        if high >= rows:
            return part
        array = np.empty((rows, *part.shape[1:]), part.dtype) if array is None else array
        array[top:top + high] = part
    return array


# Arrays

def _npy(path, size):
    with open(path, "rb") as stream:
        shape, dtype, start = _declared(stream)
    length = start + math.prod(shape) * dtype.itemsize
    if length > size:
        raise ValueError(f"declares the shape {shape}, {length} bytes, but has {size}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _declared(stream):
    """What the header of a .npy promises: shape and type; and where its values start."""
    old = np.lib.format.read_magic(stream) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(stream)
    if dtype.kind not in "buif":
        raise ValueError(f"holds {dtype} values, not numbers; Python objects are never unpickled")
    if not all(0 < side < 2 ** 40 for side in shape):
        raise ValueError(f"declares the shape {shape}")
    return shape, dtype, stream.tell()


def npz_header(archive, key):
    """(shape, dtype) of one array in an open zipfile.ZipFile. What its header, the archive's directory and the packed
    size say must agree, so that unpacking costs no more than they say."""
    with naming(f"{archive.filename}: {key}"):
        if f"{key}.npy" not in archive.namelist():
            raise ValueError("is not in the archive")
        entry = archive.getinfo(f"{key}.npy")
        if entry.compress_size > 1.01 * entry.file_size + 1000:             # deflate never makes so much more of it
            raise ValueError(f"declares {entry.file_size} bytes, but is packed into {entry.compress_size}")
        with archive.open(entry) as stream:
            shape, dtype, start = _declared(stream)
        length = start + math.prod(shape) * dtype.itemsize
        if length != entry.file_size:
            raise ValueError(f"declares the shape {shape}, {length} bytes, but has {entry.file_size}")
        volumes.believable(length, entry.compress_size)
        return shape, dtype


# DICOM

def is_dicom(path):
    """By the first bytes. A DICOMDIR, the index of a CD, is DICOM too but holds no picture, and does not count."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as stream:
            start = stream.read(512)
    except (OSError, ValueError):
        return False
    return start[128:132] == b"DICM" and dicom.CD_INDEX not in start


def open_dicom(path, **words):
    """pydicom's data set: the fields of a DICOM file."""
    with naming(path):
        regular(path)
        return dicom.opened(path, **words)


def dicom_head(path):
    """Patient, series, and whether the file holds a single picture: see dicom.Head. Never to be printed."""
    with naming(path):
        regular(path)
        return dicom.head(path)


def small_is_bright(path):
    """True for DICOM files of kind MONOCHROME1 (many X-rays): to look like the others, they must be inverted."""
    with naming(path):
        if os.path.isdir(path):
            return small_is_bright(_slices(path)[0])
        if kind_of(path) not in DICOM:
            return False
        return open_dicom(path, stop_before_pixels=True).get("PhotometricInterpretation") == "MONOCHROME1"


def _dicom(path, size):
    return dicom.picture(dicom.opened(path), volumes.VALUES)


def _slices(folder):
    paths = sorted(path for path in Path(folder).iterdir() if kind_of(path) in DICOM)
    if not paths:
        raise ValueError("no DICOM files in this folder")
    return paths


def _series(folder):
    """Its DICOM files as they lie in space, and where the axes of the volume point: see dicom.in_order."""
    paths = _slices(folder)
    return dicom.in_order(paths, [open_dicom(path, stop_before_pixels=True) for path in paths])


def read_series(folder):
    """The DICOM slices of a folder as one volume (z, rows, columns), in the order in which they lie in space."""
    with naming(folder):
        pictures = [read(path) for path in _series(folder)[0]]
        if len({picture.shape for picture in pictures}) > 1:
            raise ValueError("DICOM slices of different sizes, not one volume")
        return np.stack(pictures)


READERS = {**dict.fromkeys(IMAGES, _image), ".npy": _npy, **dict.fromkeys(NIFTI, volumes.nifti),
           **dict.fromkeys(META, volumes.metaimage), **dict.fromkeys(DICOM, _dicom)}
