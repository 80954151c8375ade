"""From a file on disk to a numpy array: pictures, arrays, volumes, DICOM.

    array = read("scan.nii.gz")

What comes back, by kind of file. The values are the file's own: nothing is windowed, scaled to [0, 1] or clipped.

    PNG JPEG TIFF BMP   (rows, columns), colour (rows, columns, 3). 8 bits: uint8, 16 bits: uint16, float TIFF: float32.
                        Palettes become colours, alpha is dropped, 1 bit becomes 0 and 255, EXIF orientation is applied;
                        a TIFF of several pages is (pages, rows, columns). Of 16 bits *with* colour or alpha, Pillow
                        keeps the upper 8.
    .npy                the array as saved, memory-mapped
    .npz (MedMNIST)     train, val, test one after the other: (N, rows, columns[, 3]); `read_npz` gives the labels too
    .nii .nii.gz        (x, y, z[, t]) float64 as in the file, slope and intercept applied
    .mhd .mha           (z, y, x[, channels]) in the file's own type
    .dcm                (rows, columns) float64, slope and intercept applied; cine (frames, rows, columns); colour with
                        3 at the end. MONOCHROME1 keeps its values, small is bright there: `small_is_bright` tells.
    a folder            the DICOM series in it, (z, rows, columns), sorted by position

NIfTI alone counts x first; `read_volume` turns it round, so that every volume is (z, rows, columns).

Files come from anywhere, so a header is believed only as far as the file's size bears it out: every reader compares the
two before it asks for memory. Nothing is unpickled. What cannot be read raises Unreadable: path and reason in one line.
"""
import contextlib
import gzip
import math
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
ARRAYS = (".npy", ".npz")
VOLUMES = (".nii", ".nii.gz", ".mhd", ".mha")
DICOM = (".dcm", ".dicom")
SUFFIXES = IMAGES + ARRAYS + VOLUMES + DICOM


class Unreadable(UserError):
    """One line: the path as given and the reason."""


@contextlib.contextmanager
def naming(path):
    """What goes wrong inside becomes one Unreadable line; decoders raise anything from SyntaxError to zlib.error."""
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


def read(path):
    """The array in this file, or of the DICOM series in this folder; the table above gives shapes and types."""
    with naming(path):
        kind, state = suffix(path), os.stat(path)
        if stat.S_ISDIR(state.st_mode):
            return read_series(path)
        if kind not in SUFFIXES:
            raise ValueError(f"{kind or 'a file without an ending'} cannot be read; what can be: {' '.join(SUFFIXES)}")
        if state.st_size == 0:
            raise ValueError("is empty (0 bytes)")
        if kind == ".npz":
            return read_npz(path)["images"]
        if kind in IMAGES:
            return _image(path)
        if kind in DICOM:
            return _dicom(path)
        return {".npy": _npy, ".nii": _nifti, ".nii.gz": _nifti, ".mhd": _metaimage, ".mha": _metaimage}[kind](path)


def read_volume(path):
    """As `read`, but slices always come first: (z, rows, columns) or (t, z, rows, columns)."""
    array = read(path)
    return array.transpose() if suffix(path) in (".nii", ".nii.gz") else array


def spacing(path):
    """Millimetres from voxel to voxel along each axis of `read(path)`, for NIfTI and MetaImage."""
    with naming(path), (gzip.open if suffix(path) == ".nii.gz" else open)(path, "rb") as stream:
        return (_meta_header if suffix(path) in (".mhd", ".mha") else _nifti_header)(stream)["spacing"]


def _believable(declared, packed):
    """Deflate makes at most 1032 bytes of one, so a file that promises more is lying."""
    if declared > 1100 * packed + 2 ** 16:
        raise ValueError(f"declares {declared} bytes, more than its {packed} packed bytes can hold")


# Pictures

def _image(path):
    with open(path, "rb") as stream:                                        # from a path Pillow misreads a turned TIFF
        try:
            image = Image.open(stream, formats=("PNG", "JPEG", "TIFF", "BMP"))              # reads the header only
        except UnidentifiedImageError:
            raise ValueError("is not a PNG, JPEG, TIFF or BMP picture (or not of a kind that Pillow reads)") from None
        pages, size = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1, image.size
        pixels = pages * size[0] * size[1]
        if pixels > 2 ** 24 and pixels > 2200 * os.path.getsize(path):      # no codec packs a picture so tight
            raise ValueError(f"declares {pages} x {size[1]} x {size[0]} pixels, too many for its size to be true")
        stack = []
        for page in range(pages):
            image.seek(page)
            if image.size != size:
                raise ValueError(f"page {page} is of another size than page 0, so the pages are not a stack")
            stack.append(_pixels(image))
        return np.stack(stack) if pages > 1 else stack[0]


def _pixels(image):
    """One decoded picture or page as (rows, columns) or (rows, columns, 3)."""
    image.load()                                                            # refuses a file that ends early
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("1", "LA", "La"):
        image = image.convert("L")
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA").convert("RGB")                        # RGBA first: palettes may hold transparency
    elif image.mode not in ("L", "I", "F", "RGB") and not image.mode.startswith("I;16"):
        image = image.convert("RGB")                                        # RGBA, CMYK, YCbCr, LAB
    array = np.asarray(image)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    tags = getattr(image, "tag_v2", None)
    if tags is not None and image.mode in ("L", "I"):                       # Pillow forgets a TIFF's sign bit
        return array.view(f"{'i' if tags.get(339, (1,))[0] == 2 else 'u'}{array.itemsize}")
    return array.astype(np.uint16) if image.mode == "I" else array          # how older Pillows open 16-bit PNG


# Arrays

def _npy(path):
    size = Path(path).stat().st_size
    with open(path, "rb") as stream:
        shape, length = _declared(stream)
    if length > size:
        raise ValueError(f"declares the shape {shape}, {length} bytes, but has {size}")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _declared(stream):
    """The shape and the length in bytes that the header of a .npy promises."""
    old = np.lib.format.read_magic(stream) == (1, 0)
    shape, _, dtype = (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(stream)
    if dtype.kind not in "buif":
        raise ValueError(f"holds {dtype} values, not numbers; Python objects are never unpickled")
    return shape, stream.tell() + math.prod(shape) * dtype.itemsize


def read_npz(path):
    """A MedMNIST file: {"images": (N, rows, columns[, 3]), "labels": (N,), or (N, L) for L yes-or-no findings, or None,
    "splits": (N,) "train", "val", "test"}."""
    with naming(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if "train_images" not in keys:
            raise ValueError(f"has no train_images, so is not a MedMNIST file; it holds {', '.join(keys) or 'nothing'}")
        parts = [part for part in ("train", "val", "test") if f"{part}_images" in keys]
        images = [_member(archive, f"{part}_images") for part in parts]
        if any(i.ndim != 3 and i.shape[3:] != (3,) for i in images):
            raise ValueError(f"train_images is {images[0].shape}, not (N, rows, columns) or (N, rows, columns, 3)")
        labels = None
        if "train_labels" in keys:
            labels = [_member(archive, f"{part}_labels") for part in parts]
            if [len(i) for i in images] != [len(i) for i in labels]:
                raise ValueError("has another number of labels than of images")
            labels = np.concatenate(labels)
            labels = labels.reshape(-1) if labels.shape[1:] == (1,) else labels             # (N, 1) -> (N,)
        splits = np.repeat(parts, [len(i) for i in images])
        return {"images": np.concatenate(images), "labels": labels, "splits": splits}


def _member(archive, key):
    """One array of a .npz. Its header, the archive's directory and the packed size must agree before it is unpacked."""
    entry = archive.getinfo(f"{key}.npy")
    with archive.open(entry) as stream:
        shape, length = _declared(stream)
        if length != entry.file_size:
            raise ValueError(f"{key} declares the shape {shape}, {length} bytes, but has {entry.file_size}")
        _believable(entry.file_size, entry.compress_size)
    with archive.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


# NIfTI: field -> (where in the header, what), for the two versions; the header's first number is its own length

NIFTI = {348: {"magic": (344, "4s"), "dims": (40, "8h"), "type": (70, "h"), "spacing": (76, "8f"), "offset": (108, "f"),
               "slope": (112, "f"), "intercept": (116, "f")},
         540: {"magic": (4, "4s"), "dims": (16, "8q"), "type": (12, "h"), "spacing": (104, "8d"), "offset": (168, "q"),
               "slope": (176, "d"), "intercept": (184, "d")}}
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def _nifti_header(stream):
    head = stream.read(540).ljust(540, b"\0")
    order = "<" if struct.unpack_from("<i", head)[0] in NIFTI else ">"
    length = struct.unpack_from(order + "i", head)[0]
    found = {name: struct.unpack_from(order + what, head, at) for name, (at, what) in NIFTI.get(length, {}).items()}
    if not found or found["magic"][0] not in (b"n+1\0", b"n+2\0"):
        raise ValueError("is not a NIfTI file in one piece (no n+1 or n+2 in its header)")
    axes, *dims = found["dims"]
    if not 1 <= axes <= 7 or min(dims[:axes]) < 1:
        raise ValueError(f"declares impossible dimensions {found['dims']}")
    if found["type"][0] not in NIFTI_TYPES:
        raise ValueError(f"holds values of type {found['type'][0]} (colour, complex or unknown), not grey numbers")
    return {"shape": tuple(dims[:axes]), "spacing": found["spacing"][1:axes + 1],
            "dtype": np.dtype(order + NIFTI_TYPES[found["type"][0]]),
            "offset": max(int(found["offset"][0]), length + 4),
            "slope": found["slope"][0], "intercept": found["intercept"][0]}


def _nifti(path):
    packed = suffix(path) == ".nii.gz"
    size = Path(path).stat().st_size
    with (gzip.open if packed else open)(path, "rb") as stream:
        head = _nifti_header(stream)
        count = math.prod(head["shape"]) * head["dtype"].itemsize
        total = head["offset"] + count
        if packed:
            _believable(total, size)
        elif total > size:
            raise ValueError(f"declares {head['shape']} voxels, {total} bytes, but has {size}")
        stream.seek(head["offset"])
        data = stream.read(count)
        if len(data) < count:
            raise ValueError(f"ends early: {len(data)} of {count} bytes of voxels")
        if packed and len(stream.read(4097)) > 4096:                        # a little padding is common; more is a bomb
            raise ValueError(f"unpacks to more than the {total} bytes that its header declares")
    array = np.frombuffer(data, head["dtype"]).astype(np.float64)
    if head["slope"] and math.isfinite(head["slope"]) and math.isfinite(head["intercept"]):     # slope 0: not scaled
        array *= head["slope"]
        array += head["intercept"]
    return array.reshape(head["shape"], order="F")                          # x runs fastest: (x, y, z[, t])


# MetaImage: lines "Key = value"; the last one, ElementDataFile, is LOCAL (data follow) or names a file beside this one

META_TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
              "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}


def _meta_header(stream):
    fields = {"BinaryData": "True", "ElementNumberOfChannels": "1", "HeaderSize": "0"}
    while "ElementDataFile" not in fields:
        key, equals, value = stream.readline(10_000).decode("latin-1").partition("=")
        if not equals or len(fields) > 1000:
            raise ValueError("is not a MetaImage header (no line ElementDataFile = ...)")
        fields[key.strip()] = value.strip()
    shape = tuple(int(n) for n in fields.get("DimSize", "0").split())
    shape = (int(fields["ElementNumberOfChannels"]),) * (fields["ElementNumberOfChannels"] != "1") + shape
    if min(shape) < 1 or fields.get("ElementType") not in META_TYPES or fields["BinaryData"].lower() != "true":
        raise ValueError(f"needs a positive DimSize, binary data and an ElementType of {' '.join(META_TYPES)}")
    steps = fields.get("ElementSpacing", "1 " * len(fields["DimSize"].split())).split()
    order = ">" if "true" in (fields.get(f"{f}ByteOrderMSB", "").lower() for f in ("BinaryData", "Element")) else "<"
    return fields | {"shape": shape[::-1], "spacing": tuple(float(s) for s in steps[::-1]),     # (z, y, x[, channels])
                     "dtype": np.dtype(order + META_TYPES[fields["ElementType"]])}


def _metaimage(path):
    with open(path, "rb") as stream:
        head = _meta_header(stream)
        skip = stream.tell()
    name, file = head["ElementDataFile"], Path(path)
    if name.upper() != "LOCAL":
        file, skip = file.parent / name, int(head["HeaderSize"])
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"its data file {name} " + ("is missing" if Path(name).name == name else "lies elsewhere"))
    count = math.prod(head["shape"]) * head["dtype"].itemsize
    size = file.stat().st_size
    packed = head.get("CompressedData", "").lower() == "true"
    skip = size - count if skip < 0 else skip                               # HeaderSize -1: the data end the file
    if packed:
        _believable(count, size - skip)
    elif skip < 0 or skip + count > size:
        raise ValueError(f"declares {head['shape']} voxels, {count} bytes, but {file.name} has {size - max(skip, 0)}")
    with open(file, "rb") as stream:
        stream.seek(skip)
        data = zlib.decompressobj(47).decompress(stream.read(), count + 1) if packed else stream.read(count)
    if len(data) != count:
        raise ValueError(f"{file.name} holds {'less' if len(data) < count else 'more'} than the {count} bytes declared")
    return np.frombuffer(data, head["dtype"]).astype(head["dtype"].newbyteorder("=")).reshape(head["shape"])


# DICOM

def open_dicom(path, **words):
    """pydicom's data set: the fields of a DICOM file."""
    try:
        import pydicom.pixels
    except ImportError:
        raise ValueError('DICOM needs pydicom 3: pip install "pydicom>=3"') from None
    return pydicom.dcmread(path, **words)


def small_is_bright(path):
    """True for DICOM files of kind MONOCHROME1 (many X-rays): to look like the others, they must be inverted."""
    with naming(path):
        header = open_dicom(path, stop_before_pixels=True) if suffix(path) in DICOM else {}
        return header.get("PhotometricInterpretation") == "MONOCHROME1"


def _dicom(path):
    file = open_dicom(path)
    if "PixelData" not in file:
        raise ValueError("is a DICOM file without a complete picture")
    if "SharedFunctionalGroupsSequence" in file:
        raise ValueError("is an enhanced multi-frame DICOM, scaled frame by frame; convert it to NIfTI (dcm2niix does)")
    values = int(file.get("NumberOfFrames") or 1) * file.Rows * file.Columns * file.SamplesPerPixel
    if values > max(2 ** 24, 2200 * len(file.PixelData)):
        raise ValueError(f"declares {values} values, too many for its size to be true")
    from pydicom import pixels
    array = pixels.pixel_array(file)                                        # colour comes back as RGB
    if file.PhotometricInterpretation == "PALETTE COLOR":
        return pixels.apply_color_lut(array, file)
    return array if file.SamplesPerPixel > 1 else pixels.apply_modality_lut(array, file).astype(np.float64)


def read_series(folder):
    """The DICOM slices of a folder as one volume (z, rows, columns), in the order in which they lie in space."""
    with naming(folder):
        slices = []
        for path in sorted(p for p in Path(folder).iterdir() if suffix(p) in DICOM):
            with naming(path):
                head = open_dicom(path, stop_before_pixels=True)
                place = number = float(head.get("InstanceNumber") or 0)
                if "ImagePositionPatient" in head and "ImageOrientationPatient" in head:
                    rows, columns = np.reshape(head.ImageOrientationPatient, (2, 3)).astype(float)
                    place = np.cross(rows, columns) @ np.array(head.ImagePositionPatient, float)
                slices.append((place, number, path, head.get("SeriesInstanceUID")))
        if not slices:
            raise ValueError(f"no DICOM files ({' '.join(DICOM)}) in this folder")
        if len({series for *_, series in slices}) > 1:
            raise ValueError("slices of several DICOM series; give each series a folder of its own")
        volume = [read(path) for _, _, path, _ in sorted(slices, key=lambda s: s[:2])]
        if len({picture.shape for picture in volume}) > 1:
            raise ValueError("DICOM slices of different sizes, not one volume")
        return np.stack(volume)
