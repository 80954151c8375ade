"""NIfTI and MetaImage: their headers, their values, and how a volume lies in the patient.

readers.py decides what to open and names the file in every error.
"""
import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

VALUES = 2 ** 30                                                            # at most: 1024 x 1024 x 1024
BLOCK = 2 ** 20                                                             # bytes read at a time


def believable(declared, packed):
    """Deflate makes at most 1032 bytes of one, so a file that promises more is lying."""
    if declared > 1100 * packed + 2 ** 16:
        raise ValueError(f"declares {declared} bytes, more than its {packed} packed bytes can hold")


def affordable(shape):
    if math.prod(shape) > VALUES:
        raise ValueError(f"holds {' x '.join(map(str, shape))} values; at most {VALUES} are read: cut it up first")


def filled(stream, shape, dtype):
    """The next values of a stream, straight into their array."""
    array = np.empty(shape, dtype)
    space, done = memoryview(array.reshape(-1).view(np.uint8)), 0
    while done < len(space):
        got = stream.readinto(space[done:done + BLOCK])
        if not got:
            raise ValueError(f"ends early: {done} of {len(space)} bytes of voxels")
        done += got
    return array


def opened(path):
    if not str(path).lower().endswith(".gz"):
        return open(path, "rb")
    with open(path, "rb") as stream:
        if stream.seek(0, os.SEEK_END) > 2 ** 16:                           # the gzip module skips zeros one by one
            stream.seek(-4096, os.SEEK_END)
            if not any(stream.read()):
                raise ValueError("ends in zeros: copied in part, or overwritten")
    return gzip.open(path, "rb")


# How a volume lies: a letter each for where the axes x, y and z of its file run to, Left or Right, Anterior or
# Posterior, Superior or Inferior

WANTED = ("SI", "PA", "LR")                                                 # of a turned volume (z, y, x): S, P, L


def stated(path):
    """The three letters in a file's header, or None."""
    with opened(path) as stream:
        if str(path).lower().endswith((".mhd", ".mha")):
            return meta_letters(meta_header(stream))
        return nifti_letters(nifti_header(stream))


def letters(directions):
    """The letters closest to three directions (3, 3): row i is axis i, in coordinates that run to L, P and S. Of axes
    that are not at right angles the nearest ones that are; the surest takes its letter first, as nibabel does it."""
    lengths = np.linalg.norm(directions, axis=1, keepdims=True)             # (3, 1)
    if not (np.isfinite(lengths).all() and lengths.all()):
        return None
    units = directions / lengths                                            # (3, 3)
    if abs(np.linalg.det(units)) < 1e-3:                                    # two axes in one direction
        return None
    left, _, right = np.linalg.svd(units)
    square = left @ right                                                   # (3, 3), a turn, perhaps with a mirror
    code, free = [""] * 3, np.ones(3)
    for axis in np.argsort(-np.abs(square).max(1), kind="stable"):
        to = (np.abs(square[axis]) * free).argmax()
        code[axis], free[to] = "LPS"[to] if square[axis, to] > 0 else "RAI"[to], 0
    return "".join(code)


def turned(volume, code, first):
    """A view of a volume whose axes `first` and following are z, y and x, such that these run to S, P and L."""
    axes = [next(axis for axis in range(3) if code[axis] in pair) for pair in WANTED]
    volume = np.moveaxis(volume, [first + 2 - axis for axis in axes], range(first, first + 3))
    flips = [slice(None, None, 1 if code[axis] in "SPL" else -1) for axis in axes]
    return volume[(slice(None),) * first + tuple(flips)]


# NIfTI: field -> (where in the header, what), for the two versions; the header's first number is its own length

NIFTI = {348: {"magic": (344, "4s"), "dims": (40, "8h"), "type": (70, "h"), "sign": (76, "f"), "offset": (108, "f"),
               "slope": (112, "f"), "intercept": (116, "f"), "codes": (252, "2h"), "turn": (256, "3f"),
               "affine": (280, "12f")},
         540: {"magic": (4, "4s"), "dims": (16, "8q"), "type": (12, "h"), "sign": (104, "d"), "offset": (168, "q"),
               "slope": (176, "d"), "intercept": (184, "d"), "codes": (344, "2i"), "turn": (352, "3d"),
               "affine": (400, "12d")}}
NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def nifti_header(stream):
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
    return found | {"shape": tuple(dims[:axes]), "dtype": np.dtype(order + NIFTI_TYPES[found["type"][0]]),
                    "offset": max(int(found["offset"][0]), length + 4),
                    "slope": found["slope"][0], "intercept": found["intercept"][0]}


def nifti_letters(head):
    """By the sform (an affine), else by the qform (a rotation as a quaternion): each where its code is above 0."""
    if len(head["shape"]) < 3:
        return None
    qform, sform = head["codes"]
    affine = np.reshape(head["affine"], (3, 4))[:, :3]                      # column i: axis i, to R, A and S
    result = letters(affine.T * (-1, -1, 1)) if sform > 0 else None
    if result is None and qform > 0:
        b, c, d = head["turn"]
        a = math.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        affine = np.array([[a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
                           [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
                           [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c]])
        affine[:, 2] *= -1 if head["sign"][0] < 0 else 1
        result = letters(affine.T * (-1, -1, 1))
    return result


def nifti(path, size):
    packed = str(path).lower().endswith(".gz")
    with opened(path) as stream:
        head = nifti_header(stream)
        total = head["offset"] + math.prod(head["shape"]) * head["dtype"].itemsize
        if packed:
            believable(total, size)
        elif total > size:
            raise ValueError(f"declares {head['shape']} voxels, {total} bytes, but has {size}")
        affordable(head["shape"])
        stream.seek(head["offset"])
        values = filled(stream, head["shape"][::-1], head["dtype"])         # x runs fastest: (..., z, y, x)
        if packed and len(stream.read(4097)) > 4096:                        # a little padding is common; more is a bomb
            raise ValueError(f"unpacks to more than the {total} bytes that its header declares")
    values = values.astype(np.float64, copy=False)
    if head["slope"] and math.isfinite(head["slope"]) and math.isfinite(head["intercept"]):     # slope 0: not scaled
        values *= head["slope"]
        values += head["intercept"]
    return values.transpose()                                               # (x, y, z[, t])


# MetaImage: lines "Key = value"; the last one, ElementDataFile, is LOCAL (data follow) or names a file beside this one

META_TYPES = {"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4",
              "MET_UINT": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}


def meta_header(stream):
    fields = {"BinaryData": "True", "ElementNumberOfChannels": "1", "HeaderSize": "0"}
    while "ElementDataFile" not in fields:
        key, equals, value = stream.readline(10_000).decode("latin-1").partition("=")
        if not equals or len(fields) > 1000:
            raise ValueError("is not a MetaImage header (no line ElementDataFile = ...)")
        fields[key.strip()] = value.strip()
    shape = tuple(int(n) for n in fields.get("DimSize", "0").split())
    shape = (int(fields["ElementNumberOfChannels"]),) * (fields["ElementNumberOfChannels"] != "1") + shape
    if not shape or min(shape) < 1 or fields.get("ElementType") not in META_TYPES \
            or fields["BinaryData"].lower() != "true":
        raise ValueError(f"needs a positive DimSize, binary data and an ElementType of {' '.join(META_TYPES)}")
    order = ">" if "true" in (fields.get(f"{f}ByteOrderMSB", "").lower() for f in ("BinaryData", "Element")) else "<"
    return fields | {"shape": shape[::-1], "dtype": np.dtype(order + META_TYPES[fields["ElementType"]])}


def meta_letters(fields):
    """Three numbers an axis, to L, P and S; or three letters of where the axes come *from*."""
    if len(fields["DimSize"].split()) != 3:
        return None
    for name in ("TransformMatrix", "Orientation", "Rotation"):             # three names that mean the same
        if name in fields:
            return letters(np.array(fields[name].split(), float).reshape(3, 3))
    code = fields.get("AnatomicalOrientation", "").upper().translate(str.maketrans("LRAPSI", "RLPAIS"))
    return code if len(code) == 3 and all(len(set(code) & set(pair)) == 1 for pair in WANTED) else None


def metaimage(path, size):
    with open(path, "rb") as stream:
        head = meta_header(stream)
        skip = stream.tell()
    name, file = head["ElementDataFile"], Path(path)
    if name.upper() != "LOCAL":
        file, skip = file.parent / name, int(head["HeaderSize"])
        if Path(name).name != name or not file.is_file():                   # a pipe is no file either
            raise ValueError(f"its data file {name} " + ("is missing" if Path(name).name == name else "lies elsewhere"))
    count = math.prod(head["shape"]) * head["dtype"].itemsize
    size = size if file == Path(path) else file.stat().st_size
    packed = head.get("CompressedData", "").lower() == "true"
    skip = size - count if skip < 0 else skip                               # HeaderSize -1: the data end the file
    if packed:
        believable(count, size - skip)
    elif skip < 0 or skip + count > size:
        raise ValueError(f"declares {head['shape']} voxels, {count} bytes, but {file.name} has {size - max(skip, 0)}")
    affordable(head["shape"])
    with open(file, "rb") as stream:
        stream.seek(skip)
        if not packed:
            values = filled(stream, head["shape"], head["dtype"])
        else:
            values = unpacked(stream.read(), count, file.name)
            values = np.frombuffer(values, head["dtype"]).reshape(head["shape"])            # (z, y, x[, channels])
    return values.astype(head["dtype"].newbyteorder("="), copy=False)


def unpacked(data, count, name):
    """zlib or gzip; the checksum stands at the end, so that has to be reached."""
    unpacker = zlib.decompressobj(47)
    values = unpacker.decompress(data, count + 1)
    if len(values) != count:
        raise ValueError(f"{name} holds {'less' if len(values) < count else 'more'} than the {count} bytes declared")
    if not unpacker.eof:
        raise ValueError(f"{name} ends early: its checksum is missing")
    return values
