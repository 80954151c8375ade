"""Files of every kind, written here byte by byte, come back with their values; broken and lying ones are refused."""
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import struct
import sys
import time
import tokenize
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from medssl.common.data import readers, volumes

FORMATS = pathlib.Path(__file__).parents[2] / "shared/data/formats"         # more files, where they are at hand
GREY = (np.arange(6 * 5).reshape(6, 5) * 8).astype(np.uint8)
GREY16 = GREY.astype(np.uint16) * 250 + 7
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
VOLUME = (np.arange(4 * 3 * 2).reshape(4, 3, 2) * 31 - 300).astype(np.int16)                 # (x, y, z)


# Makers of files

def nifti(array=VOLUME, order="<", version=1, slope=0.0, intercept=0.0, dims=None, magic=None, code=None, affine=None,
          quaternion=None, sign=1.0):
    code = code or {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "uint16": 512}[array.dtype.name]
    dims = [array.ndim, *(dims or array.shape)]
    dims += [1] * (8 - len(dims))
    sizes = [sign, 1.5, 2, 5, 1, 1, 1, 1]
    codes = [quaternion is not None, affine is not None]
    turn, rows = quaternion or (0, 0, 0), np.eye(3, 4) if affine is None else np.c_[affine, [7, 8, 9]]
    head = bytearray(352 if version == 1 else 544)
    if version == 1:
        for at, what, values in ((0, "i", [348]), (40, "8h", dims), (70, "2h", [code, 8 * array.itemsize]),
                                 (76, "8f", sizes), (108, "3f", [352, slope, intercept]),
                                 (252, "2h", codes), (256, "3f", turn), (280, "12f", rows.ravel()),
                                 (344, "4s", [magic or b"n+1\0"])):
            struct.pack_into(order + what, head, at, *values)
    else:
        for at, what, values in ((0, "i", [540]), (4, "8s", [b"n+2\0\r\n\x1a\n"]), (16, "8q", dims), (104, "8d", sizes),
                                 (12, "2h", [code, 8 * array.itemsize]), (168, "q2d", [544, slope, intercept]),
                                 (344, "2i", codes), (352, "3d", turn), (400, "12d", rows.ravel())):
            struct.pack_into(order + what, head, at, *values)
    return bytes(head) + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")


def meta(data_file="LOCAL", **fields):
    fields = {"ObjectType": "Image", "NDims": 3, "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
              "DimSize": "4 3 2", "ElementSpacing": "1.5 2 5", "ElementType": "MET_SHORT",
              **fields, "ElementDataFile": data_file}
    return "".join(f"{key} = {value}\n" for key, value in fields.items()).encode()


def tiff(strips, shape, bits, sample_format=1, photometric=1, planar=1, samples=1, packed=False):
    """A little-endian TIFF, for the kinds that Pillow does not write. `strips`: one, or one for each plane."""
    strips = [zlib.compress(strip) if packed else strip for strip in strips]
    starts = np.cumsum([8] + [len(strip) for strip in strips])
    more, body, end = b"", b"", int(starts[-1])
    for tag, values in ((256, shape[1:2]), (257, shape[:1]), (258, [bits] * samples), (259, [8 if packed else 1]),
                        (262, [photometric]), (273, starts[:-1]), (277, [samples]), (278, shape[:1]),
                        (279, [len(strip) for strip in strips]), (284, [planar]), (339, [sample_format] * samples)):
        data = struct.pack(f"<{len(values)}I", *values)
        if len(data) > 4:                                                   # it stands elsewhere
            data, more = struct.pack("<I", end + len(more)), more + data
        body += struct.pack("<HHI", tag, 4, len(values)) + data
    head = b"II*\0" + struct.pack("<I", end + len(more))
    return head + b"".join(strips) + more + struct.pack("<H", 11) + body + bytes(4)


def png(width, height, pixels):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b""))


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npy_header(shape):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def write(path, data):
    path.write_bytes(data)
    return path


def holds(path, expected):
    array = readers.read(path)
    assert array.dtype == expected.dtype and array.shape == expected.shape
    assert np.array_equal(array, expected)


def refused(path, *words, read=readers.read):
    """One line, the path first, within a second and a few MB."""
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        read(path)
    seconds, memory = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert all(word in line for word in words), line
    assert seconds < 1 and memory < 8e6


# Pictures

def test_pictures_keep_shape_type_and_values(tmp_path):
    for array, name in ((GREY, "a.png"), (GREY, "a.bmp"), (GREY, "a.TIF"), (GREY16, "b.png"), (GREY16, "b.tif"),
                        (COLOUR, "c.png"), (COLOUR, "c.bmp"), (COLOUR, "c.tiff"),
                        (GREY.astype(np.float32) / 9 - 3, "d.tif")):
        Image.fromarray(array).save(tmp_path / name)
        holds(tmp_path / name, array)


def test_tiff_integers_keep_their_sign(tmp_path):
    for array, sample_format in ((GREY.astype(">u2").astype("<u4") * 2 ** 26, 1), (VOLUME[..., 0].astype(np.int32), 2),
                                 (GREY.view(np.int8), 2)):
        data = tiff([array.tobytes()], array.shape, 8 * array.itemsize, sample_format)
        holds(write(tmp_path / "a.tif", data), array)
    data = tiff([VOLUME[..., 0].tobytes()], (4, 3), 16, 2)
    assert np.array_equal(readers.read(write(tmp_path / "b.tif", data)), VOLUME[..., 0])


@pytest.mark.parametrize("packed", [False, True])
def test_tiff_whose_small_values_are_white_is_inverted(tmp_path, packed):
    nibbles = (GREY >> 4)[:, :4]
    for array, bits, sample_format, expected in (
            (GREY, 8, 1, 255 - GREY), (GREY16, 16, 1, 65535 - GREY16),
            (GREY.astype(np.float32), 32, 3, -GREY.astype(np.float32)),
            (nibbles[:, ::2] << 4 | nibbles[:, 1::2], 4, 1, (15 - nibbles) * 17),
            (np.packbits(GREY > 99, axis=1), 1, 1, np.where(GREY > 99, 0, 255).astype(np.uint8))):
        data = tiff([array.tobytes()], expected.shape, bits, sample_format, photometric=0, packed=packed)
        holds(write(tmp_path / "a.tif", data), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_tiff_in_planes_is_read_right_or_refused(tmp_path, packed):
    planes = [COLOUR[..., channel].tobytes() for channel in range(3)]
    data = tiff(planes, GREY.shape, 8, photometric=2, planar=2, samples=3, packed=packed)
    holds(write(tmp_path / "a.tif", data), COLOUR)
    deep = [np.uint16(COLOUR[..., channel]).tobytes() for channel in range(3)]
    for strips, bits, photometric in ((deep, 16, 2), (planes + planes[:1], 8, 2), (planes + planes[:1], 8, 5)):
        data = tiff(strips, GREY.shape, bits, photometric=photometric, planar=2, samples=len(strips), packed=packed)
        refused(write(tmp_path / "b.tif", data), "PlanarConfiguration")


def test_palette_alpha_one_bit_and_cmyk(tmp_path):
    colours = Image.fromarray(COLOUR).quantize(256)
    colours.save(tmp_path / "palette.png", transparency=bytes([9] * 256))
    holds(tmp_path / "palette.png", np.asarray(colours.convert("RGB")))
    Image.fromarray(np.dstack([COLOUR, GREY])).save(tmp_path / "rgba.png")
    holds(tmp_path / "rgba.png", COLOUR)
    Image.fromarray(np.dstack([GREY, 255 - GREY])).save(tmp_path / "la.png")
    holds(tmp_path / "la.png", GREY)
    Image.fromarray(GREY > 99).save(tmp_path / "bit.png")
    holds(tmp_path / "bit.png", np.where(GREY > 99, 255, 0).astype(np.uint8))
    Image.fromarray(COLOUR).convert("CMYK").save(tmp_path / "cmyk.tif")
    holds(tmp_path / "cmyk.tif", COLOUR)


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                                        # to be turned clockwise by 90 degrees
    for name in ("a.png", "a.tif"):
        Image.fromarray(GREY16).save(tmp_path / name, exif=exif)
        holds(tmp_path / name, np.rot90(GREY16, -1))
    Image.fromarray(np.kron(GREY, np.ones((16, 16), np.uint8))).save(tmp_path / "a.jpg", exif=exif, quality=100)
    picture = readers.read(tmp_path / "a.jpg")
    assert picture.shape == (80, 96) and np.abs(picture[8::16, 8::16].astype(int) - np.rot90(GREY, -1)).max() <= 2


def test_pages_are_a_stack(tmp_path):
    pages = [Image.fromarray(GREY16 + page) for page in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    holds(tmp_path / "a.tif", np.stack([GREY16, GREY16 + 1, GREY16 + 2]))
    pages[0].save(tmp_path / "turned.tif", save_all=True, append_images=pages[1:], tiffinfo={274: 6})
    assert np.array_equal(readers.read(tmp_path / "turned.tif")[2], np.rot90(GREY16 + 2, -1))
    pages[0].save(tmp_path / "b.tif", save_all=True, append_images=[Image.fromarray(GREY16[1:])])
    refused(tmp_path / "b.tif", "another size")
    Image.fromarray(GREY).save(tmp_path / "c.tif", save_all=True, append_images=[Image.fromarray(COLOUR)])
    refused(tmp_path / "c.tif", "other channels")


# Arrays

def test_npy_is_mapped_and_never_unpickled(tmp_path):
    holds(write(tmp_path / "a.npy", npy(GREY16[None])), GREY16[None])
    assert isinstance(readers.read(tmp_path / "a.npy"), np.memmap)
    refused(write(tmp_path / "b.npy", npy(GREY16)[:-1]), "declares")
    refused(write(tmp_path / "c.npy", npy_header((10 ** 6, 10 ** 6))), "declares")
    refused(write(tmp_path / "d.npy", npy(np.array([1, "a"], object))), "never unpickled")


def test_npz_header_says_shape_and_type_without_unpacking(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", train_images=np.zeros((3, 6, 5), np.uint8), labels=np.ones((3, 1), ">i4"))
    np.savez(tmp_path / "b.npz", train_images=GREY16[None])
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert readers.npz_header(archive, "train_images") == ((3, 6, 5), np.uint8)
        assert readers.npz_header(archive, "labels") == ((3, 1), np.dtype(">i4"))
    with zipfile.ZipFile(tmp_path / "b.npz") as archive:
        assert readers.npz_header(archive, "train_images") == ((1, 6, 5), np.uint16)
    refused(tmp_path / "a.npz", "load")                                     # `read` gives one array, and there are two


def test_npz_members_that_are_refused(tmp_path):
    def member_refused(name, *words, key="train_images"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            refused(f"{tmp_path / name}: {key}", *words, read=lambda path: readers.npz_header(archive, key))

    def directory(name, at, size):
        """The archive's directory lies as well: the unpacked size of the only member."""
        data = bytearray((tmp_path / name).read_bytes())
        struct.pack_into("<I", data, data.index(b"PK\1\2") + at, size)
        write(tmp_path / name, data)

    np.savez(tmp_path / "a.npz", train_images=np.array([GREY, None], object))
    member_refused("a.npz", "never unpickled")
    member_refused("a.npz", "not in the archive", key="val_images")
    for name, shape in (("b.npz", (10 ** 6, 10 ** 6)), ("c.npz", (10 ** 4, 10 ** 4)), ("e.npz", (-1, 5))):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("train_images.npy", npy_header(shape) + bytes(99))
        member_refused(name, "declares")
    directory("c.npz", 24, len(npy_header((10 ** 4, 10 ** 4))) + 8 * 10 ** 8)
    member_refused("c.npz", "packed bytes")
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train_images.npy", npy_header((4, 4)) + bytes(4_000_000))
    member_refused("d.npz", "declares")
    directory("d.npz", 24, len(npy_header((4, 4))) + 8 * 16)                # 4 MB more would be unpacked
    member_refused("d.npz", "packed into")


# Volumes

def test_nifti(tmp_path):
    expected = VOLUME.astype(np.float64)
    for order in "<>":
        for version in (1, 2):
            data = nifti(order=order, version=version)
            holds(write(tmp_path / "a.nii", data), expected)
            holds(write(tmp_path / "a.nii.gz", gzip.compress(data)), expected)
            data = nifti(order=order, version=version, slope=0.5, intercept=-10)
            holds(write(tmp_path / "b.nii", data), expected * 0.5 - 10)
    holds(write(tmp_path / "c.nii", nifti(slope=float("nan"))), expected)   # seen in the wild: stands for "not scaled"
    four = np.stack([VOLUME, VOLUME + 1], axis=3).astype(np.float32)
    holds(write(tmp_path / "d.nii", nifti(four)), four.astype(np.float64))
    volume = readers.read_volume(tmp_path / "d.nii")                        # (t, z, rows, columns)
    assert np.array_equal(volume[1, 0], expected[:, :, 0].T + 1)
    assert readers.suffix("p.1.NII.GZ") == ".nii.gz" and readers.suffix("nii.gz.png") == ".png"


def test_metaimage(tmp_path):
    expected = VOLUME.transpose().copy()                                    # (z, y, x)
    raw = expected.tobytes()
    holds(write(tmp_path / "a.mha", meta() + raw), expected)
    holds(write(tmp_path / "b.mha", meta(CompressedData="True") + zlib.compress(raw)), expected)
    holds(write(tmp_path / "c.mha", meta(BinaryDataByteOrderMSB="True") + expected.astype(">i2").tobytes()), expected)
    write(tmp_path / "a.raw", b"skip" + raw)
    holds(write(tmp_path / "a.mhd", meta("a.raw", HeaderSize=4)), expected)
    holds(write(tmp_path / "b.mhd", meta("a.raw", HeaderSize=-1)), expected)
    write(tmp_path / "a.zraw", zlib.compress(raw))
    holds(write(tmp_path / "c.mhd", meta("a.zraw", CompressedData="True")), expected)
    colours = np.arange(72, dtype=np.uint8).reshape(2, 3, 4, 3)
    header = meta(ElementType="MET_UCHAR", ElementNumberOfChannels=3)
    holds(write(tmp_path / "d.mha", header + colours.tobytes()), colours)


# How a volume lies. S: to the head, P: to the back, L: to the patient's left; the three letters stand for x, y, z

RAS = np.eye(3)                                                             # NIfTI's own coordinates
LPS = np.diag([-1, -1, 1])
PSR = np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])                          # x to the back, y to the head, z to R
TURNED = {"RAS": VOLUME.transpose(2, 1, 0)[:, ::-1, ::-1], "LPS": VOLUME.transpose(2, 1, 0),
          "PSR": VOLUME.transpose(1, 0, 2)[:, :, ::-1]}


def about(axis, degrees):
    turn, (i, j), a = np.eye(3), [k for k in range(3) if k != axis], np.deg2rad(degrees)
    turn[[i, i, j, j], [i, j, i, j]] = np.cos(a), -np.sin(a), np.sin(a), np.cos(a)
    return turn


@pytest.mark.parametrize("version", [1, 2])
def test_nifti_is_turned_by_its_affine(tmp_path, version):
    for order in "<>":
        for code, affine in ("RAS", RAS), ("LPS", LPS), ("PSR", PSR):
            for oblique in np.eye(3), about(2, 20) @ about(0, 30), about(1, -40):
                data = nifti(order=order, version=version, affine=oblique @ affine @ np.diag([1.5, 2, 5]))
                path = write(tmp_path / "a.nii.gz", gzip.compress(data, 1))
                assert readers.orientation(path) == code
                assert np.array_equal(readers.read_volume(path), TURNED[code])
                assert np.array_equal(readers.read(path), VOLUME)           # the file's own axes
        for code, quaternion, sign in (("RAS", (0, 0, 0), 1.0), ("RAI", (0, 0, 0), -1.0), ("LPS", (0, 0, 1), 1.0),
                                       ("ASR", (0.5, 0.5, 0.5), 1.0), ("ASL", (0.5, 0.5, 0.5), -1.0)):
            data = nifti(order=order, version=version, quaternion=quaternion, sign=sign)
            assert readers.orientation(write(tmp_path / "b.nii", data)) == code
    data = nifti(version=version, affine=PSR, quaternion=(0, 0, 0))         # two that differ: the sform counts
    assert readers.orientation(write(tmp_path / "c.nii", data)) == "PSR"
    for affine in RAS * 0, RAS[[0, 0, 2]], RAS + np.nan, RAS + np.inf:      # no affine: the qform counts
        data = nifti(version=version, affine=affine, quaternion=(0, 0, 1))
        assert readers.orientation(write(tmp_path / "c.nii", data)) == "LPS"
        assert readers.orientation(write(tmp_path / "d.nii", nifti(version=version, affine=affine))) is None
    assert np.array_equal(readers.read_volume(write(tmp_path / "d.nii", nifti(version=version))), VOLUME.transpose())


def test_sheared_axes_are_named_as_nibabel_names_them():
    """nibabel 5's aff2axcodes says so; the nearest letter of each axis as it stands would be another."""
    assert volumes.letters(np.array([[-2, -5, -4], [6, -9, -3], [-5, -5, 3]])) == "ILA"


def test_every_order_and_direction_of_axes():
    """All 48, tilted by some degrees: voxel by voxel, each lands where its place in the patient says."""
    axes = {"R": (-1, 0, 0), "L": (1, 0, 0), "A": (0, -1, 0), "P": (0, 1, 0), "I": (0, 0, -1), "S": (0, 0, 1)}
    tilt = about(0, 15) @ about(1, 20) @ about(2, 25)
    for code in ("".join(letters) for order in itertools.permutations(("LR", "PA", "SI"))
                 for letters in itertools.product(*order)):
        directions = np.array([axes[letter] for letter in code])            # row i: axis i
        assert volumes.letters(directions @ tilt.T * [[3], [1], [2]]) == code
        places = {voxel: np.array(voxel) @ directions for voxel in np.ndindex(4, 3, 2)}
        lowest, volume = np.min(list(places.values()), axis=0), np.empty((2, 3, 4, 3), int)
        for (x, y, z), place in places.items():
            volume[z, y, x] = (place - lowest)[::-1]                        # how far to S, P and L
        turned = volumes.turned(volume, code, 0)
        assert all(np.array_equal(turned[place], place) for place in np.ndindex(turned.shape[:3]))


def test_of_four_dimensions_space_is_turned(tmp_path):
    four = np.stack([VOLUME, VOLUME + 1], axis=3)
    write(tmp_path / "a.nii", nifti(four, affine=PSR))
    assert np.array_equal(readers.read_volume(tmp_path / "a.nii"), np.stack([TURNED["PSR"], TURNED["PSR"] + 1]))
    write(tmp_path / "b.nii", nifti(VOLUME[..., 0], affine=PSR))            # a picture, not a volume
    assert np.array_equal(readers.read_volume(tmp_path / "b.nii"), VOLUME[..., 0].T)


def test_metaimage_is_turned_by_its_matrix(tmp_path):
    raw = VOLUME.transpose().tobytes()
    psr = "0 1 0 0 0 1 -1 0 0"                                              # x to the back, y to the head, z to R
    for code, fields in (("LPS", {"TransformMatrix": "1 0 0 0 1 0 0 0 1"}), ("PSR", {"TransformMatrix": psr}),
                         ("PSR", {"Orientation": psr}), ("PSR", {"AnatomicalOrientation": "AIL"}),
                         ("LPS", {"AnatomicalOrientation": "RAI"}),
                         ("RAS", {"TransformMatrix": "-1 0 .1 0 -1 0 .1 0 1"}),
                         ("PSR", {"TransformMatrix": psr, "AnatomicalOrientation": "RAI"})):
        path = write(tmp_path / "a.mha", meta(**fields) + raw)
        assert readers.orientation(path) == code
        assert np.array_equal(readers.read_volume(path), TURNED[code])
    for fields in ({}, {"AnatomicalOrientation": "???"}, {"AnatomicalOrientation": "RLA"}):
        path = write(tmp_path / "b.mha", meta(**fields) + raw)
        assert readers.orientation(path) is None and np.array_equal(readers.read_volume(path), VOLUME.transpose())
    colours = np.arange(72, dtype=np.uint8).reshape(2, 3, 4, 3)             # (z, y, x, channels)
    header = meta(ElementType="MET_UCHAR", ElementNumberOfChannels=3, TransformMatrix=psr)
    path = write(tmp_path / "d.mha", header + colours.tobytes())
    assert np.array_equal(readers.read_volume(path), colours.transpose(1, 2, 0, 3)[:, :, ::-1])
    refused(write(tmp_path / "e.mha", meta(TransformMatrix="1 0 0") + raw), "reshape", read=readers.read_volume)


def test_a_mask_is_turned_as_its_image(tmp_path):
    image, plain = write(tmp_path / "image.nii", nifti(affine=RAS)), write(tmp_path / "plain.nii", nifti())
    stated = write(tmp_path / "stated.nii.gz", gzip.compress(nifti(affine=about(0, 5) @ RAS)))
    np.save(tmp_path / "mask.npy", VOLUME.transpose())
    for mask in image, plain, stated, tmp_path / "mask.npy":
        assert np.array_equal(readers.read_mask(mask, image), TURNED["RAS"])
        assert np.array_equal(readers.read_mask(mask, plain), VOLUME.transpose())           # the image stays as stored
    other = write(tmp_path / "other.nii", nifti(affine=LPS))
    refused(other, "LPS", "RAS", read=lambda mask: readers.read_mask(mask, image))


def test_of_a_palette_mask_the_indices_count(tmp_path):
    mask = Image.fromarray(GREY % 3)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "a.png")
    assert np.array_equal(readers.read_mask(tmp_path / "a.png", tmp_path / "image.png"), GREY % 3)
    assert readers.read(tmp_path / "a.png").shape == (6, 5, 3)              # for a picture the colours count
    Image.fromarray(GREY).save(tmp_path / "b.png")
    assert np.array_equal(readers.read_mask(tmp_path / "b.png", tmp_path / "image.png"), GREY)
    data = (tmp_path / "a.png").read_bytes()
    refused(write(tmp_path / "c.png", data[:-20]), "ends early", read=lambda mask: readers.read_mask(mask, ""))


# DICOM

def dicom(path, array, **fields):
    pydicom = pytest.importorskip("pydicom")
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = array.shape[:2]
    file.SamplesPerPixel, file.PixelRepresentation, file.PlanarConfiguration = (3 if array.ndim == 3 else 1), 0, 0
    file.BitsAllocated = file.BitsStored = 8 * array.itemsize
    file.HighBit = file.BitsStored - 1
    file.PhotometricInterpretation = "MONOCHROME2" if array.ndim == 2 else "RGB"
    file.PixelData = array.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    file.save_as(path, enforce_file_format=True)
    return path


def test_dicom(tmp_path):
    path = dicom(tmp_path / "a.dcm", GREY16, RescaleSlope=2, RescaleIntercept=-1024)
    holds(path, GREY16 * 2.0 - 1024)
    assert not readers.small_is_bright(path)
    path = dicom(tmp_path / "b.dcm", GREY16, PhotometricInterpretation="MONOCHROME1")
    holds(path, GREY16.astype(np.float64))
    assert readers.small_is_bright(path)
    holds(dicom(tmp_path / "c.dcm", COLOUR), COLOUR)
    refused(dicom(tmp_path / "d.dcm", GREY, Rows=60000, Columns=60000), "declares")
    refused(write(tmp_path / "e.dcm", b"text" * 99), "DICM")


def test_dicom_without_an_ending(tmp_path):
    for name in ("IM000001", "1.2.840.7"):                                  # as on a CD, as a server writes it
        path = dicom(tmp_path / name, GREY16, PhotometricInterpretation="MONOCHROME1")
        assert readers.is_dicom(path) and readers.small_is_bright(path)
        holds(path, GREY16.astype(np.float64))
        assert np.array_equal(readers.read_volume(path), GREY16)
        assert readers.open_dicom(path).Rows == 6
    index = write(tmp_path / "DICOMDIR", bytes(128) + b"DICM\2\0\2\0UI\x14\x001.2.840.10008.1.3.10" + bytes(99))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "text", b"DICM" * 31)
    (tmp_path / "series").mkdir()
    dicom(tmp_path / "series/1", GREY16, PhotometricInterpretation="MONOCHROME1")
    assert readers.small_is_bright(tmp_path / "series")
    for other in index, tmp_path / "text", write(tmp_path / "none", b""), tmp_path / "folder", "gone":
        assert not readers.is_dicom(other)
    refused(index, "cannot be read")
    refused(tmp_path / "text", "cannot be read")


def test_dicom_head_says_patient_and_series_but_shows_none(tmp_path):
    path = dicom(tmp_path / "a", GREY, PatientID=" 4711 ", SeriesInstanceUID="1.2.9", PatientName="Doe")
    head = readers.dicom_head(path)
    assert (head.patient, head.series, head.picture) == ("4711", "1.2.9", True)
    assert "4711" not in repr(head) and "1.2.9" not in repr(head)
    head = readers.dicom_head(dicom(tmp_path / "b.dcm", np.concatenate([GREY, GREY]), Rows=6, NumberOfFrames=2))
    assert (head.patient, head.series, head.picture) == ("", "", False)


def test_dicom_that_needs_a_decoder_names_it(tmp_path):
    data = pytest.importorskip("pydicom.data")
    from pydicom.pixels import get_decoder
    for name in ("MR_small_jpeg_ls_lossless.dcm", "SC_rgb_jpeg_gdcm.dcm", "JPEG-lossy.dcm"):
        path = data.get_testdata_file(name, download=False)
        if "pylibjpeg" in str(get_decoder(readers.open_dicom(path).file_meta.TransferSyntaxUID).missing_dependencies):
            refused(path, "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg", "medssl[dicom]")


def test_dicom_series_is_sorted_by_position(tmp_path):
    for number, z in enumerate((5.0, 0.0, 2.5)):
        dicom(tmp_path / f"{number}.dcm", GREY + np.uint8(number), SeriesInstanceUID="1.2", InstanceNumber=number,
              ImagePositionPatient=[0, 0, z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    holds(tmp_path, np.stack([GREY + 1.0, GREY + 2.0, GREY + 0.0]))
    dicom(tmp_path / "3.dcm", GREY, SeriesInstanceUID="1.3")
    refused(tmp_path, "several")


def test_dicom_series_is_turned(tmp_path):
    for number, x in enumerate((5.0, 0.0, 2.5)):                            # sagittal: rows to the back, columns down
        dicom(tmp_path / f"IM{number}", GREY + np.uint8(number), SeriesInstanceUID="1.2",
              ImagePositionPatient=[x, 0, 0], ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    stored = np.stack([GREY + 0.0, GREY + 2.0, GREY + 1.0])                 # from left to right
    assert np.array_equal(readers.read(tmp_path), stored) and readers.orientation(tmp_path) == "PIR"
    assert np.array_equal(readers.read_volume(tmp_path), stored.transpose(1, 2, 0)[::-1, :, ::-1])
    dicom(tmp_path / "IM3", GREY, SeriesInstanceUID="1.2", ImagePositionPatient=[0, 0, 0],
          ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    refused(tmp_path, "not parallel")
    dicom(tmp_path / "IM3", GREY, SeriesInstanceUID="1.2")                  # one does not say: as the numbers run
    assert readers.orientation(tmp_path) is None and readers.read_volume(tmp_path).shape == (4, 6, 5)


def test_dicom_without_pydicom_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(write(tmp_path / "a.dcm", b"x"), 'pip install "pydicom>=3"')


# What must be refused

class Run:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('PWNED').touch()",)


def test_broken_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in ("a.png", "a.jpg", "a.bmp", "a.tif"):
        Image.fromarray(np.kron(COLOUR, np.ones((9, 9, 1), np.uint8))).save(save)
        data = (tmp_path / save).read_bytes()
        for part in (0.3, 0.8):
            refused(write(tmp_path / f"cut{part}{save}", data[:int(len(data) * part)]))
    refused(write(tmp_path / "empty.png", b""), "0 bytes")
    refused(write(tmp_path / "text.png", b"notes\n" * 99), "not a PNG")
    refused(write(tmp_path / "bomb.png", png(60000, 60000, bytes(1000))), "pixels")
    refused(write(tmp_path / "lying.png", png(8000, 8000, bytes(1000))), "declares")
    refused(write(tmp_path / "short.png", png(20, 20, bytes(400))), "truncated")
    refused(write(tmp_path / "evil.pt", pickle.dumps(Run())), ".pt cannot be read")
    refused(write(tmp_path / "evil.npy", pickle.dumps(Run())))
    refused(write(tmp_path / "evil.npz", pickle.dumps(Run())))
    assert not pathlib.Path("PWNED").exists()
    refused("gone.png", "No such file")                                     # a relative path is named as it was given


def test_pictures_with_a_wrong_end_are_refused(tmp_path):
    """Pillow takes many of these, with other pixels than were saved."""
    picture = np.cumsum(np.random.default_rng(0).integers(-3, 4, (300, 300)), 1).astype(np.uint8)
    for name, most in ("a.png", 0.999), ("a.jpg", 0.99):
        Image.fromarray(picture).save(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for part in np.linspace(0.5, most, 10):
            kept = data[:int(len(data) * part)]
            refused(write(tmp_path / f"cut-{name}", kept))
            refused(write(tmp_path / f"zeros-{name}", kept + bytes(len(data) - len(kept))))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[len(data) // 2] ^= 4
    refused(write(tmp_path / "bit.png", data), "checksum")
    Image.fromarray(picture).save(tmp_path / "b.png")
    holds(write(tmp_path / "more.png", (tmp_path / "b.png").read_bytes() + bytes(99)), picture)     # that does no harm
    exif = Image.Exif()                                                     # a thumbnail, with an end of its own
    exif[0x9286] = (tmp_path / "a.jpg").read_bytes()[:2000] + b"\xff\xd9"
    Image.fromarray(picture).save(tmp_path / "b.jpg", exif=exif)
    data = (tmp_path / "b.jpg").read_bytes()
    refused(write(tmp_path / "thumb.jpg", data[:-512] + bytes(512)), "without an end")
    more = data + bytes(99) + b"\xff\xda"                                  # as phones append films
    assert readers.read(write(tmp_path / "more.jpg", more)).shape == picture.shape


def test_large_pictures(tmp_path):
    refused(write(tmp_path / "a.png", png(13000, 13000, bytes(10 ** 7))), "13000 x 13000", "tiles")
    Image.new("L", (4200, 4200)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    assert readers.read(tmp_path / "a.jpg").shape == (4200, 4200)           # an honest one
    frame = data.index(b"\xff\xc0")
    for rows, columns in ((65000, 65000), (8000, 8000)):
        lying = data[:frame + 5] + struct.pack(">HH", rows, columns) + data[frame + 9:2000] + b"\xff\xd9"
        refused(write(tmp_path / "b.jpg", lying), "declares")
    Image.fromarray(COLOUR).save(tmp_path / "c.jpg", progressive=True)
    data = (tmp_path / "c.jpg").read_bytes()
    last = data.rindex(b"\xff\xda")
    refused(write(tmp_path / "d.jpg", data[:last] + data[last:-2] * 100 + data[-2:]), "scans")


def test_a_large_picture_is_never_copied_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "STRIP", 2 ** 16)
    picture = np.random.default_rng(0).integers(0, 256, (50, 50, 4), np.uint8).repeat(20, 0).repeat(20, 1)
    Image.fromarray(picture).save(tmp_path / "a.png", compress_level=1)
    tracemalloc.start()
    array = readers.read(tmp_path / "a.png")
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(array, picture[..., :3]) and memory < 1.5 * array.nbytes


def test_lying_volumes_are_refused(tmp_path):
    refused(write(tmp_path / "a.nii", nifti(magic=b"oops")), "not a NIfTI")
    refused(write(tmp_path / "b.nii", nifti(dims=(20000, 20000, 10))), "declares")
    refused(write(tmp_path / "c.nii", nifti(dims=(0, 3, 2))), "dimensions")
    refused(write(tmp_path / "d.nii", nifti(code=128)), "type 128")
    refused(write(tmp_path / "a.nii.gz", gzip.compress(nifti(dims=(20000, 20000, 10)))), "declares")
    refused(write(tmp_path / "a.nii.gz", gzip.compress(nifti()[:-2])), "ends early")
    packed = gzip.compress(nifti())
    refused(write(tmp_path / "b.nii.gz", packed[:-12]))
    refused(write(tmp_path / "c.nii.gz", packed[:-8] + bytes(8)), "CRC")
    refused(write(tmp_path / "d.nii.gz", gzip.compress(nifti() + bytes(20_000_000), 1)), "more than")
    raw = VOLUME.tobytes()
    refused(write(tmp_path / "a.mha", meta(DimSize="40000 40000 100") + raw), "declares")
    header = meta(DimSize="40000 40000 100", CompressedData="True")
    refused(write(tmp_path / "b.mha", header + zlib.compress(raw)), "declares")
    refused(write(tmp_path / "c.mha", meta(CompressedData="True") + zlib.compress(bytes(20_000_000), 1)), "more than")
    refused(write(tmp_path / "d.mha", meta(DimSize="-4 3 2") + raw), "DimSize")
    refused(write(tmp_path / "e.mha", b"\n" * 99), "not a MetaImage")
    refused(write(tmp_path / "f.mha", meta(CompressedData="True") + zlib.compress(raw)[:-4]), "checksum")
    shape = 2000, 2000, 300                                                 # true, but 10 GB as numbers
    packed = gzip.compress(nifti(np.zeros((999_999, 1, 1), np.uint8), dims=shape), 1) + bytes([1]) * 1_200_000
    refused(write(tmp_path / "e.nii.gz", packed), "at most")
    refused(write(tmp_path / "f.nii.gz", gzip.compress(nifti()) + bytes(4_000_000)), "zeros")
    write(tmp_path / "outside.raw", raw)
    (tmp_path / "in").mkdir()
    for place in ("../outside.raw", tmp_path / "outside.raw"):
        refused(write(tmp_path / "in" / "a.mhd", meta(place)), "elsewhere")
    refused(write(tmp_path / "in" / "b.mhd", meta("gone.raw")), "gone.raw is missing")


def test_what_other_programs_have_to_convert(tmp_path):
    for kind, way in ((".nrrd", "SimpleITK"), (".nhdr", "SimpleITK"), (".mgz", "mri_convert"), (".mgh", "mri_convert"),
                      (".hdr", "fslchfiletype"), (".img", "fslchfiletype"), (".gif", "PNG"), (".h5", "h5py"),
                      (".hdf5", "h5py"), (".npz", "load")):
        refused(write(tmp_path / f"a{kind}", b"NRRD"), kind, way)
        assert kind in readers.refusal(kind) and way in readers.refusal(kind)
    refused(write(tmp_path / "a.xyz", b"x"), ".xyz cannot be read; what can be: .png")


EVERY_WAY_IN = (readers.read, readers.read_volume, lambda path: readers.read_mask(path, path), readers.open_dicom,
                readers.small_is_bright, readers.dicom_head, readers.orientation)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    for name in ("a.png", "a.npy", "a.nii.gz", "a.mha", "a.dcm", "a"):
        os.mkfifo(tmp_path / name)                                          # whoever opened it would wait for ever
        assert not readers.is_dicom(tmp_path / name)
        for ask in EVERY_WAY_IN[:4] + (readers.dicom_head,):
            refused(tmp_path / name, "pipe", read=ask)
    refused(tmp_path / "a.nii.gz", "pipe", read=readers.orientation)
    refused(tmp_path / "a.dcm", "pipe", read=readers.small_is_bright)
    refused(os.devnull, "device")
    write(tmp_path / "a.mhd", meta("a.npy"))
    refused(tmp_path / "a.mhd", "missing")


def test_whatever_a_decoder_raises_becomes_one_line(tmp_path, monkeypatch):
    pytest.importorskip("pydicom")
    Image.fromarray(GREY).save(tmp_path / "a.png")
    write(tmp_path / "a.nii", nifti())
    dicom(tmp_path / "a.dcm", GREY, SeriesInstanceUID="1.2")

    wrong = []

    def fails(*arguments, **words):
        raise wrong[0]
    for place, name in ((Image, "open"), (volumes, "nifti_header"), (sys.modules["pydicom"], "dcmread")):
        monkeypatch.setattr(place, name, fails)
    for error in (MemoryError(), RecursionError("too deep"), struct.error("short"), tokenize.TokenError("EOF", (1, 0)),
                  SyntaxError("broken"), EOFError(), AttributeError("x"), KeyError(7), zlib.error("y"), OSError("z")):
        wrong[:] = [error]
        for ask in EVERY_WAY_IN[:-1]:
            refused(tmp_path / "a.dcm", read=ask)
        for ask in EVERY_WAY_IN[:3]:
            refused(tmp_path / "a.png", read=ask)
            refused(tmp_path / "a.nii", read=ask)
        refused(tmp_path / "a.nii", read=readers.orientation)
        refused(tmp_path / "a.dcm", read=lambda path: readers.read_series(path.parent))
    wrong[:] = [KeyboardInterrupt()]
    for path in tmp_path.iterdir():
        with pytest.raises(KeyboardInterrupt):
            readers.read(path)


def test_headers_of_arrays_that_do_not_parse(tmp_path):
    data = npy(GREY)
    for old, new in ((b"'shape': (6, 5), }", b"'shape': (6, 5), ("), (b"|u1", b"|q9"), (b"(6, 5)", b"(6,-5)"),
                     (b"(6, 5)", b"(0, 5)"), (b"(6, 5)", b"('a',)"), (b"NUMPY", b"NUMPX")):
        refused(write(tmp_path / "a.npy", data.replace(old, new)))
    np.savez(tmp_path / "a.npz", GREY)
    refused(write(tmp_path / "b.npy", (tmp_path / "a.npz").read_bytes()))   # an archive that is called an array


# The same with files of other makers, where they are at hand

@pytest.mark.skipif(not FORMATS.is_dir(), reason="needs the folder of sample files")
def test_every_sample_file():
    for name, expected in json.loads((FORMATS / "manifest.json").read_text()).items():
        if name.endswith(".npz"):                                           # not one array: sources.py opens it
            continue
        if name.endswith(".dcm") or name == "series":
            pytest.importorskip("pydicom")
        array = readers.read(FORMATS / name)
        assert list(array.shape) == expected["shape"], name
        if "dtype" in expected:
            near = 2 if name.endswith(".jpg") else 1e-4                     # JPEG is lossy
            found = {"min": array.min(), "max": array.max(), "mean": array.mean()}
            found["value"] = array[tuple(expected["index"])]
            assert array.dtype == expected["dtype"], name
            assert all(abs(float(found[key]) - expected[key]) <= near for key in found), name
        if name == "series":
            assert np.array_equal(array, np.stack([readers.read(FORMATS / f"series/slice{i}.dcm") for i in (1, 2, 0)]))


@pytest.mark.skipif(not FORMATS.is_dir(), reason="needs the folder of sample files")
def test_every_bad_sample_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = [path for path in sorted((FORMATS / "bad").iterdir()) if path.is_file() and path.suffix != ".md"]
    assert len(bad) >= 14
    for path in bad:
        refused(path)
    assert not list(tmp_path.iterdir()) and not (FORMATS / "bad/PWNED").exists()
