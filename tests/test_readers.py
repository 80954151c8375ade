"""Files of every kind, written here byte by byte, come back with their values; broken and lying ones are refused."""
import gzip
import io
import json
import pathlib
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from medssl.common.data import readers

FORMATS = pathlib.Path(__file__).parents[2] / "shared/data/formats"         # more files, where they are at hand
GREY = (np.arange(6 * 5).reshape(6, 5) * 8).astype(np.uint8)
GREY16 = GREY.astype(np.uint16) * 250 + 7
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=2)
VOLUME = (np.arange(4 * 3 * 2).reshape(4, 3, 2) * 31 - 300).astype(np.int16)                 # (x, y, z)


# Makers of files

def nifti(array=VOLUME, order="<", version=1, slope=0.0, intercept=0.0, dims=None, magic=None, code=None):
    code = code or {"uint8": 2, "int16": 4, "int32": 8, "float32": 16, "uint16": 512}[array.dtype.name]
    dims = [array.ndim, *(dims or array.shape)]
    dims += [1] * (8 - len(dims))
    sizes = [1, 1.5, 2, 5, 1, 1, 1, 1]
    head = bytearray(352 if version == 1 else 544)
    if version == 1:
        for at, what, values in ((0, "i", [348]), (40, "8h", dims), (70, "2h", [code, 8 * array.itemsize]),
                                 (76, "8f", sizes), (108, "3f", [352, slope, intercept]),
                                 (344, "4s", [magic or b"n+1\0"])):
            struct.pack_into(order + what, head, at, *values)
    else:
        for at, what, values in ((0, "i", [540]), (4, "8s", [b"n+2\0\r\n\x1a\n"]), (16, "8q", dims), (104, "8d", sizes),
                                 (12, "2h", [code, 8 * array.itemsize]), (168, "q2d", [544, slope, intercept])):
            struct.pack_into(order + what, head, at, *values)
    return bytes(head) + array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")


def meta(data_file="LOCAL", **fields):
    fields = {"ObjectType": "Image", "NDims": 3, "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
              "DimSize": "4 3 2", "ElementSpacing": "1.5 2 5", "ElementType": "MET_SHORT",
              **fields, "ElementDataFile": data_file}
    return "".join(f"{key} = {value}\n" for key, value in fields.items()).encode()


def tiff(array, sample_format):
    """A little-endian TIFF of one strip, for the types that Pillow does not write."""
    tags = [(256, array.shape[1]), (257, array.shape[0]), (258, 8 * array.itemsize), (259, 1), (262, 1), (273, 8),
            (277, 1), (278, array.shape[0]), (279, array.nbytes), (339, sample_format)]
    body = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + array.nbytes)
    return head + array.tobytes() + struct.pack("<H", len(tags)) + body + bytes(4)


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


def refused(path, *words, name=None):
    """One line, the path first, within a second and a few MB."""
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(ValueError) as caught:
        readers.read(path)
    seconds, memory = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{name or path}: ") and "\n" not in line
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
        holds(write(tmp_path / "a.tif", tiff(array, sample_format)), array)
    assert np.array_equal(readers.read(write(tmp_path / "b.tif", tiff(VOLUME[..., 0].copy(), 2))), VOLUME[..., 0])


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


# Arrays

def test_npy_is_mapped_and_never_unpickled(tmp_path):
    holds(write(tmp_path / "a.npy", npy(GREY16[None])), GREY16[None])
    assert isinstance(readers.read(tmp_path / "a.npy"), np.memmap)
    refused(write(tmp_path / "b.npy", npy(GREY16)[:-1]), "declares")
    refused(write(tmp_path / "c.npy", npy_header((10 ** 6, 10 ** 6))), "declares")
    refused(write(tmp_path / "d.npy", npy(np.array([1, "a"], object))), "never unpickled")


def test_npz_joins_the_parts(tmp_path):
    parts = {f"{name}_{what}": array for name, count in (("test", 1), ("train", 3), ("val", 2)) for what, array in
             (("images", np.full((count, 6, 5), count, np.uint8)), ("labels", np.full((count, 1), count, np.uint8)))}
    np.savez_compressed(tmp_path / "a.npz", **parts)
    holds(tmp_path / "a.npz", np.repeat(np.array([3, 3, 3, 2, 2, 1], np.uint8), 30).reshape(6, 6, 5))
    both = readers.read_npz(tmp_path / "a.npz")
    assert both["labels"].tolist() == [3, 3, 3, 2, 2, 1]
    assert both["splits"].tolist() == ["train"] * 3 + ["val"] * 2 + ["test"]
    np.savez(tmp_path / "b.npz", train_images=np.stack([COLOUR] * 2))       # colour, no labels, no val and test
    holds(tmp_path / "b.npz", np.stack([COLOUR] * 2))
    assert readers.read_npz(tmp_path / "b.npz")["labels"] is None


def test_npz_that_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", pictures=GREY)
    refused(tmp_path / "a.npz", "no train_images", "pictures")
    np.savez(tmp_path / "b.npz", train_images=np.array([GREY, None], object))
    refused(tmp_path / "b.npz", "never unpickled")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("train_images.npy", npy_header((10 ** 6, 10 ** 6)) + bytes(99))
    refused(tmp_path / "c.npz", "declares")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("train_images.npy", npy_header((10 ** 4, 10 ** 4)) + bytes(99))
    data = bytearray((tmp_path / "d.npz").read_bytes())                     # now the archive's directory lies as well
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, len(npy_header((10 ** 4, 10 ** 4))) + 8 * 10 ** 8)
    refused(write(tmp_path / "d.npz", data), "declares")


# Volumes

def test_nifti(tmp_path):
    expected = VOLUME.astype(np.float64)
    for order in "<>":
        for version in (1, 2):
            data = nifti(order=order, version=version)
            holds(write(tmp_path / "a.nii", data), expected)
            holds(write(tmp_path / "a.nii.gz", gzip.compress(data)), expected)
            assert readers.spacing(tmp_path / "a.nii.gz") == (1.5, 2, 5)
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
    assert readers.spacing(tmp_path / "a.mhd") == (5, 2, 1.5)


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


def test_dicom_series_is_sorted_by_position(tmp_path):
    for number, z in enumerate((5.0, 0.0, 2.5)):
        dicom(tmp_path / f"{number}.dcm", GREY + np.uint8(number), SeriesInstanceUID="1.2", InstanceNumber=number,
              ImagePositionPatient=[0, 0, z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    holds(tmp_path, np.stack([GREY + 1.0, GREY + 2.0, GREY + 0.0]))
    dicom(tmp_path / "3.dcm", GREY, SeriesInstanceUID="1.3")
    refused(tmp_path, "several")


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
    refused(write(tmp_path / "lying.png", png(9000, 9000, bytes(1000))), "declares")
    refused(write(tmp_path / "evil.pt", pickle.dumps(Run())), ".pt cannot be read")
    refused(write(tmp_path / "evil.npy", pickle.dumps(Run())))
    refused(write(tmp_path / "evil.npz", pickle.dumps(Run())))
    assert not pathlib.Path("PWNED").exists()
    refused("gone.png", "No such file")                                     # a relative path is named as it was given


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
    write(tmp_path / "outside.raw", raw)
    (tmp_path / "in").mkdir()
    for place in ("../outside.raw", tmp_path / "outside.raw"):
        refused(write(tmp_path / "in" / "a.mhd", meta(place)), "elsewhere")
    refused(write(tmp_path / "in" / "b.mhd", meta("gone.raw")), "gone.raw is missing")


# The same with files of other makers, where they are at hand

@pytest.mark.skipif(not FORMATS.is_dir(), reason="needs the folder of sample files")
def test_every_sample_file():
    for name, expected in json.loads((FORMATS / "manifest.json").read_text()).items():
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
        if "zooms" in expected:
            assert np.allclose(readers.spacing(FORMATS / name), expected["zooms"]), name
        if "labels" in expected:
            assert readers.read_npz(FORMATS / name)["labels"].tolist() == expected["labels"]
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
