"""Every layout opens at every size, DICOM keeps patients together, and what lies or hangs is refused in a line."""
import io
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from medssl.common import data
from medssl.common.data import decode, phantoms, prepare, readers, stacks
from medssl.common.data.layouts import find
from medssl.common.errors import UserError
from tests.test_data import own_cache, pixels, refused, save, save_volume, table  # noqa: F401


def said(capsys, *words):
    """What the command line prints."""
    prepare.main(list(map(str, words)))
    return capsys.readouterr().out


# ---- layouts, sizes, channels

def class_folders(folder):
    for n in range(4):
        save(folder / f"set/{'ab'[n % 2]}/{n}.png", pixels(n))
    return folder / "set"


def images_and_masks(folder):
    for n in range(4):
        save(folder / f"set/images/{n}.png", pixels(n))
        save(folder / f"set/masks/{n}.png", pixels(n) // 128)
    return folder / "set"


def with_table(folder):
    for n in range(4):
        save(folder / f"set/{n}.png", pixels(n))
    table(folder / "set", "file,label,split,group\n0.png,a,train,1\n1.png,b,train,1\n2.png,a,val,2\n3.png,b,test,3\n")
    return folder / "set"


def npz(folder):
    images, labels = pixels(0, 4, 1024).reshape(4, 32, 32), np.array([[0], [1], [0], [1]])
    np.savez(folder / "set.npz", train_images=images[:2], train_labels=labels[:2], test_images=images[2:],
             test_labels=labels[2:])
    return folder / "set.npz"


def npy(folder):
    np.save(folder / "set.npy", pixels(0, 4, 1024).reshape(4, 32, 32))
    return folder / "set.npy"


def prepared(folder, make=class_folders):
    prepare.main([str(make(folder)), "--to", str(folder / "ready"), "--split", "0.5", "0.25", "0.25"])
    return folder / "ready"


def prepared_with_masks(folder):
    return prepared(folder, images_and_masks)


LAYOUTS = class_folders, images_and_masks, with_table, npz, npy, prepared, prepared_with_masks


@pytest.mark.parametrize("layout", LAYOUTS, ids=[layout.__name__ for layout in LAYOUTS])
def test_every_layout_opens_at_every_size(tmp_path, layout):
    path = layout(tmp_path)
    first = data.load(path)
    assert first.images.shape == (4, 1, 32, 32)
    for size, channels in (16, None), (48, None), (None, 3), (16, 3):
        dataset = data.load(path, size=size, channels=channels)
        assert dataset.images.shape == (4, channels or 1, size or 32, size or 32)
        for name in "labels", "groups", "splits":
            np.testing.assert_array_equal(getattr(dataset, name), getattr(first, name))
        assert (dataset.masks is None) == (first.masks is None) and dataset.classes == first.classes
        assert first.masks is None or set(np.unique(dataset.masks)) == {0, 1}


# ---- the built-in set at the command line

def test_phantoms_at_the_command_line(tmp_path, capsys, monkeypatch):
    make = phantoms.make
    monkeypatch.setattr(phantoms, "make", lambda size, seed: make(40, size, seed))
    monkeypatch.chdir(tmp_path)
    text = said(capsys, "phantoms", "--size", 32, "--channels", 3, "--seed", 5)
    assert "40 images of 32 x 32, colour" in text and "class cyst" in text and not any(tmp_path.iterdir())
    text = said(capsys, "phantoms", "--size", 32, "--seed", 5, "--to", "ready")
    assert "prepared into ready" in text
    ready, made = data.load(tmp_path / "ready"), make(40, 32, 5)
    np.testing.assert_array_equal(ready.images, made.images)
    np.testing.assert_array_equal(ready.masks, made.masks)
    assert [ready.classes[label] for label in ready.labels] == [made.classes[label] for label in made.labels]
    assert ready.splits.tolist() == made.splits.tolist() and ready.groups.tolist() == made.groups.tolist()
    monkeypatch.setattr(phantoms, "make", lambda *_: pytest.fail("drew the phantoms"))
    for words, wrong in (["--split 0.5 0 0.5", "have splits already"], ["--group-by p", "--group-by"]):
        with pytest.raises(UserError, match=wrong):
            prepare.main(["phantoms", "--to", "other", *words.split()])
    for flag, value in ("--seed", "-1"), ("--seed", str(2**63)), ("--size", "99999"):
        with pytest.raises(SystemExit):
            prepare.main(["phantoms", "--to", "other", flag, value])
        assert flag in capsys.readouterr().err
    monkeypatch.setattr(phantoms, "make", lambda size, seed: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(UserError, match="memory"):
        data.load("phantoms", size=30000)


# ---- labels that would be lost

def test_several_labels_are_said(tmp_path, capsys):
    images, labels = pixels(0, 4, 1024).reshape(4, 32, 32), np.eye(4, 14, dtype=np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=labels)
    assert data.load(tmp_path / "set.npz").labels is None
    assert "14 labels per image" in capsys.readouterr().out
    assert "14 labels per image" in said(capsys, tmp_path / "set.npz", "--to", tmp_path / "ready")


def test_a_table_with_several_labels_says_so(tmp_path, capsys):
    for n in range(3):
        save(tmp_path / f"set/{n}.png", pixels(n))
    table(tmp_path / "set", "file,label\n0.png,mass|nodule\n1.png,nodule\n2.png,\n")
    assert data.load(tmp_path / "set").labels is None
    assert "up to 2 labels per image: none of them" in capsys.readouterr().out
    table(tmp_path / "set", "file,mass,nodule\n0.png,1,1\n1.png,0,1\n2.png,0,0\n")
    assert data.load(tmp_path / "set").labels is None
    assert "--label learns from one of mass, nodule" in capsys.readouterr().out
    assert data.load(tmp_path / "set", label="nodule").classes == ("0", "1") and not capsys.readouterr().out
    table(tmp_path / "set", "file,split,group\n0.png,train,1\n1.png,train,2\n2.png,test,3\n")
    data.load(tmp_path / "set")
    assert not capsys.readouterr().out


def test_one_class_folder_is_said(tmp_path, capsys):
    for n in range(3):
        save(tmp_path / f"set/normal/{n}.png", pixels(n))
        save(tmp_path / f"flat/{n}.png", pixels(n))
    assert data.load(tmp_path / "set").labels is None and "only one class" in capsys.readouterr().out
    data.load(tmp_path / "flat")
    assert "only one" not in capsys.readouterr().out


def test_what_medmnist_saves_keeps_splits_and_labels(tmp_path, capsys):
    for name in "train0_3", "train1_10", "val0_3", "test0_0":
        save(tmp_path / f"set/pathmnist/{name}.png", pixels(sum(name.encode())))
    save(tmp_path / "set/pathmnist_train_montage.jpg", pixels(7, 64, 64))
    save(tmp_path / "several/train0_0_1_1.png", pixels(1))
    dataset = data.load(tmp_path / "set")
    assert dataset.splits.tolist() == ["test", "train", "train", "val"] and dataset.images.shape[2] == 32
    assert [dataset.classes[label] for label in dataset.labels] == ["0", "3", "10", "3"]
    assert data.load(tmp_path / "several").labels is None and "3 labels per image" in capsys.readouterr().out


def test_no_image_left_names_the_window(tmp_path):
    save_volume(tmp_path / "set/1.mha", np.full((3, 32, 32), 50, np.int16))
    with pytest.raises(UserError, match="no image is left; 3 slices without content.*--window"):
        prepare.main([str(tmp_path / "set"), "--to", str(tmp_path / "ready"), "--window", "100", "200"])


def test_slices_of_a_volume_stay_together_whatever_the_groups_say(tmp_path, capsys):
    for n in range(4):
        save_volume(tmp_path / f"set/{n}.mha", np.stack([pixels(10 * n + z) for z in range(3)]))
    table(tmp_path / "set", "file,group\n0.mha,A\n1.mha,A\n2.mha,\n3.mha,\n")              # two have no patient
    said(capsys, tmp_path / "set", "--to", tmp_path / "ready", "--split", 0.5, 0.25, 0.25)
    groups = data.load(tmp_path / "ready").groups.reshape(4, 3)
    assert (groups == groups[:, :1]).all() and len(np.unique(groups)) == 3
    (tmp_path / "set/split.csv").unlink()
    with pytest.raises(UserError, match="--group-by parent: does not match 4 of 4 names, first 0.mha"):
        find(tmp_path / "set", group_by="parent", volumes=True)


def test_looking_at_volumes_lists_what_cannot_be_used(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n in range(3):
        save_volume(tmp_path / f"set/{n}.mha", np.stack([pixels(n)] * 2))
    (tmp_path / "set/0.mha").write_bytes(b"ObjectType = Image")
    with pytest.raises(UserError, match="1 of 3 images cannot be used: .*0.mha: is not a .* --skip-unreadable"):
        said(capsys, tmp_path / "set")
    assert "2.mha: 2 x 32 x 32" in capsys.readouterr().out


def test_what_is_made_of_a_set_does_not_become_a_part_of_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(class_folders(tmp_path))
    said(capsys, ".", "--sheet", "contact_sheet.png")
    assert (tmp_path / "set/contact_sheet.png").exists() and data.load(".").classes == ("a", "b")
    with pytest.raises(UserError, match="--to ready: lies inside the set"):
        said(capsys, ".", "--to", "ready")


@pytest.mark.parametrize("name", ["x.mgz", "x.nrrd", "X.HDR"])
def test_foreign_files_are_told_how_to_be_converted_alone_and_in_folders(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    for path in tmp_path / name, tmp_path:
        refused([name, "NIfTI"], path)


# ---- DICOM

def save_dicom(path, array, patient="", series="1.2.3", z=0):
    """The smallest DICOM file: 16 bits, not packed."""
    dicom = pytest.importorskip("pydicom")
    file = dicom.Dataset()
    file.file_meta = dicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = dicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = dicom.uid.generate_uid()
    file.PatientID, file.SeriesInstanceUID = patient, series
    file.Rows, file.Columns = array.shape
    file.SamplesPerPixel, file.PixelRepresentation, file.PhotometricInterpretation = 1, 0, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelData = 15, array.astype(np.uint16).tobytes()
    file.ImagePositionPatient, file.ImageOrientationPatient = [0, 0, z], [1, 0, 0, 0, 1, 0]
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)


def test_dicom_patients_stay_together_and_unnamed(tmp_path, capsys):
    """Two folders for each patient, several files in each, one series to a file."""
    for n in range(12):
        save_dicom(tmp_path / f"cd/visit{n // 2}/{n}.dcm", pixels(n), f"DOE^{n // 2 % 3}", f"1.2.{n}")
    source = find(tmp_path / "cd", volumes=True)
    assert source.groups == [f"patient {n // 2 % 3 + 1}" for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)]
    text = said(capsys, tmp_path / "cd", "--to", tmp_path / "ready", "--split", 0.4, 0.3, 0.3)
    assert "a group is the PatientID" in text and "DOE" not in text
    dataset = data.load(tmp_path / "ready")
    assert len(np.unique(dataset.groups)) == 3
    assert all(len(set(dataset.splits[dataset.groups == group])) == 1 for group in range(3))
    for file in (tmp_path / "ready").iterdir():
        assert b"DOE" not in file.read_bytes()
    assert find(tmp_path / "cd", group_by=r"visit(\d)", volumes=True).groups[::2] == list("012345")
    said(capsys, tmp_path / "cd", "--to", tmp_path / "other", "--group-by", r"visit(\d)")
    assert len(np.unique(data.load(tmp_path / "other").groups)) == 6


def test_dicom_patients_in_two_splits_are_refused(tmp_path):
    for n, split in enumerate(("train", "train", "test")):
        save_dicom(tmp_path / f"set/{split}/{n}.dcm", pixels(n), f"P{n % 2}", f"1.2.{n}")
    with pytest.raises(UserError, match="group patient . stands in two splits") as error:
        prepare.main([str(tmp_path / "set"), "--to", str(tmp_path / "ready")])
    assert "P0" not in str(error.value)


def test_dicom_pictures_in_class_folders_have_classes(tmp_path, capsys):
    for n in range(8):
        save_dicom(tmp_path / f"xray/{('NORMAL', 'SICK')[n % 2]}/{n}.dcm", pixels(n), f"P{n}", f"1.2.{n}")
    refused(["holds DICOM files", "--to"], tmp_path / "xray")
    said(capsys, tmp_path / "xray", "--to", tmp_path / "ready", "--split", 0.5, 0, 0.5)
    dataset = data.load(tmp_path / "ready")
    assert dataset.classes == ("NORMAL", "SICK") and len(np.unique(dataset.groups)) == 8
    assert set(dataset.labels[dataset.rows("train")]) == set(dataset.labels[dataset.rows("test")]) == {0, 1}


def test_dicom_without_an_ending_and_without_patients(tmp_path, capsys):
    """As on a CD: two series of three slices; an index and a text lie beside them."""
    for n in range(6):
        save_dicom(tmp_path / f"cd/S{n // 3}/IM{n:06d}", pixels(n), series=f"1.2.{n // 3}", z=n)
    (tmp_path / "cd/DICOMDIR").write_bytes(bytes(128) + b"DICM" + readers.dicom.CD_INDEX)
    (tmp_path / "cd/README").write_text("This CD starts by itself.")
    source = find(tmp_path / "cd", volumes=True)
    assert source.names == ["S0", "S1"] and len(set(source.groups)) == 2
    text = said(capsys, tmp_path / "cd", "--to", tmp_path / "ready")
    assert "6 images" in text and "no PatientID" in text
    assert data.load(tmp_path / "ready").groups.tolist() == [0, 0, 0, 1, 1, 1]


# ---- what lies, hangs, or takes too much

def test_folders_with_links_to_themselves_end(tmp_path):
    save(tmp_path / "set/a/1.png", pixels(0))
    save(tmp_path / "set/b/2.png", pixels(1))
    os.symlink(tmp_path / "set", tmp_path / "set/a/again")
    os.symlink(tmp_path / "set", tmp_path / "set/b/again")
    os.symlink(tmp_path / "set/b", tmp_path / "set/c")
    assert find(tmp_path / "set").names == ["a/1.png", "b/2.png"]


def test_pipes_are_refused(tmp_path):
    for name in "1.npy", "1.npz", "split.csv", "set/1.png":
        (tmp_path / "set").mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)
        refused([name.split("/")[-1], "pipe"], tmp_path / name.split("/1")[0])
    save(tmp_path / "pair/images/1.png", pixels(0))
    (tmp_path / "pair/masks").mkdir()
    os.mkfifo(tmp_path / "pair/masks/1.png")
    refused(["masks/1.png", "pipe"], tmp_path / "pair")


def test_broken_files_are_named(tmp_path):
    save(tmp_path / "pair/images/1.png", pixels(0))
    (tmp_path / "pair/masks").mkdir()
    palette = Image.fromarray(pixels(1) // 128)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    stream = io.BytesIO()
    palette.save(stream, "png")
    (tmp_path / "pair/masks/1.png").write_bytes(stream.getvalue().replace(b"IDAT", b"ID\0T"))
    refused(["masks/1.png"], tmp_path / "pair")
    np.save(tmp_path / "bad.npy", pixels(0))
    whole = (tmp_path / "bad.npy").read_bytes()
    (tmp_path / "bad.npy").write_bytes(whole.replace(b"{'descr'", b"{'''des("))
    refused(["bad.npy"], tmp_path / "bad.npy")
    with zipfile.ZipFile(tmp_path / "zip.npy", "w") as archive:
        archive.writestr("a.npy", whole)
    refused(["zip.npy"], tmp_path / "zip.npy")
    (tmp_path / "text.npz").write_text("text")
    refused(["text.npz"], tmp_path / "text.npz")
    stack, labels = pixels(0, 4, 1024).reshape(4, 32, 32), np.zeros((4, 1), np.uint8)
    for other in labels[:3], np.zeros((4, 2), np.uint8), np.uint8(3):
        np.savez(tmp_path / "odd.npz", train_images=stack, train_labels=labels, val_images=stack, val_labels=other)
        refused(["odd.npz", "val_labels"], tmp_path / "odd.npz")


@pytest.mark.parametrize("name, text", [("table.csv", ""), ("info.json", "{"), ("info.json", "[]"), ("images.npy", ""),
                                        ("masks.npy", "no"), ("rows.npz", "no"), ("table.csv", "split,label,group\n")])
def test_a_damaged_prepared_folder_is_named(tmp_path, name, text):
    path = prepared_with_masks(tmp_path)
    (path / name).write_text(text)
    refused([str(path)], path)


def bomb(path, sizes):
    """An archive of zeros, packed tightly; sizes: {key: (shape in the header, bytes)}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, (shape, count) in sizes.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                for _ in range(0, count, 2 ** 20):
                    file.write(bytes(min(count, 2 ** 20)))


def test_npz_bombs_are_refused_by_their_headers(tmp_path, monkeypatch):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("unpacked labels"))
    images = {"train_images": ((64, 8, 8), 4096)}
    for labels, word in (((64, 2 ** 16), 2 ** 22), "more room"), (((256,), 2 ** 22), "bytes"):
        bomb(tmp_path / "set.npz", images | {"train_labels": labels})
        refused(["set.npz", "train_labels", word], tmp_path / "set.npz")
    bomb(tmp_path / "set.npz", {"train_images": ((64, 8, 8), 2 ** 22), "train_labels": ((64,), 64)})
    refused(["set.npz", "train_images"], tmp_path / "set.npz")
    monkeypatch.setattr(stacks, "MANY", 1000)
    many = 2 ** 14
    bomb(tmp_path / "set.npz", {"train_images": ((many, 4, 4), many * 16), "train_labels": ((many,), many)})
    refused(["set.npz", "too many"], tmp_path / "set.npz")


def test_the_automatic_size_stops(tmp_path, capsys):
    save(tmp_path / "set/1.png", pixels(0, 3000, 2))
    dataset = data.load(tmp_path / "set")
    assert dataset.images.shape[2] == decode.LARGEST == 1024
    assert "--size 3008" in capsys.readouterr().out
    assert data.load(tmp_path / "set", size=1500).images.shape[2] == 1500
    refused(["size=40000"], tmp_path / "set", size=40000)


def test_lack_of_memory_is_a_line_and_a_mistake_is_not(tmp_path, monkeypatch):
    save(tmp_path / "set/1.png", pixels(0))
    save(tmp_path / "set/2.png", pixels(1))

    def fail(error):
        def fitted(*_):
            raise error
        monkeypatch.setattr(decode.pixels, "fitted", fitted)
    fail(MemoryError())
    refused(["2 of 2", "1.png", "memory"], tmp_path / "set")
    fail(ValueError("a mistake in the program"))
    with pytest.raises(ValueError) as error:
        data.load(tmp_path / "set")
    assert not isinstance(error.value, UserError)
    monkeypatch.setattr(decode, "write", lambda *_: (_ for _ in ()).throw(MemoryError()))
    refused(["memory", "--size"], tmp_path / "set")


# ---- patients

def test_folders_below_images_with_masks_are_patients(tmp_path):
    for n in range(6):
        save(tmp_path / f"set/images/P{n // 2}/{n}.png", pixels(n))
        save(tmp_path / f"set/masks/P{n // 2}/{n}.png", pixels(n) // 128)
    dataset = data.load(tmp_path / "set")
    assert dataset.labels is None and dataset.groups.tolist() == [0, 0, 1, 1, 2, 2] and dataset.classes == ("0", "1")


def test_a_split_comes_near_the_shares_asked_for(capsys):
    images = np.zeros((40, 1, 2, 2), np.uint8)
    each = data.Dataset("set", images, labels=np.arange(40), groups=np.arange(40))      # every patient a class
    counts = [len(data.split(each).rows(name)) for name in ("train", "val", "test")]
    assert counts == [28, 4, 8] and not capsys.readouterr().out
    few = data.split(data.Dataset("set", images, groups=np.arange(40) // 20))
    assert "0.7 0.1 0.2 was asked for" in capsys.readouterr().out and len(few.rows("train")) == 20


def test_dealing_anew_keeps_patients_whole_and_the_unlabeled_apart():
    splits = np.array(["train", "val", "test", "unlabeled"]).repeat(10)
    old = data.Dataset("set", np.zeros((40, 1, 2, 2), np.uint8), groups=np.arange(40) // 2, splits=splits)
    first, second = data.deal(old, 0), data.deal(old, 1)
    assert (first.splits[30:] == "unlabeled").all() and (first.splits[:30] != "unlabeled").all()
    assert (first.splits[::2] == first.splits[1::2]).all() and (first.splits != second.splits).any()
    assert set(first.splits[:30]) == {"train", "val", "test"}


def test_what_is_no_path_is_refused_in_a_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path, words in (("~nosuchuser/x", "not a path"), (tmp_path / "loop", "symbolic links"),
                        (os.fsdecode(b"/tmp/\xff"), "no UTF-8")):
        with pytest.raises(UserError, match=words):
            find(path)


def test_gray_asked_for_or_not_is_decoded_once(tmp_path):
    folder = class_folders(tmp_path)
    first = data.load(folder, 16, cache=tmp_path / "once")
    again = data.load(find(folder), 16, 1, cache=tmp_path / "once")
    assert again.images.filename == first.images.filename and len(list((tmp_path / "once").iterdir())) == 1


def test_labels_without_images_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", train_images=np.stack([pixels(n) for n in range(4)]),
             train_labels=np.arange(4)[:, None], test_labels=np.arange(4)[:, None])
    with pytest.raises(UserError, match="test_labels without images"):
        find(tmp_path / "set.npz")


def test_names_that_look_like_patients_are_pointed_out(tmp_path, capsys):
    for n in range(12):
        save(tmp_path / f"set/{'ab'[n % 2]}/P{n // 3:03}_{n:02}.png", pixels(n))
    assert r"`--group-by 'P\d+'` makes 4 groups" in said(capsys, tmp_path / "set")
    assert len(set(data.load(tmp_path / "set", group_by=r"P\d+").groups.tolist())) == 4
    assert data.patient_hint(["a/1.png", "b/2.png"]) == data.patient_hint(["P1_1.png", "P2_1.png"]) == ""
