"""Opening and preparing sets of images: what is found and refused, what the cache does, how volumes become slices."""
import os
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl.common import data
from medssl.common.data import cache, copies, decode, prepare, readers
from medssl.common.data import dataset as sets
from medssl.common.data.layouts import find

SHARED = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSSL_CACHE", str(tmp_path / "cache"))


def pixels(seed, rows=32, columns=32, channels=1, dtype=np.uint8):
    shape = (rows, columns) if channels == 1 else (rows, columns, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def table(folder, text):
    (folder / "split.csv").write_text(text)


def refused(words, path, **options):
    """The error line of load, which must hold all these words."""
    with pytest.raises(ValueError) as error:
        data.load(path, **options)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


# ---- what is found

def test_class_folders_and_pixels(tmp_path):
    names = ["b/0", "b/1", "b/2", "a/0", "a/1", "a/2"]
    kept = {name: save(tmp_path / f"set/{name}.png", pixels(n)) for n, name in enumerate(names)}
    dataset = data.load(tmp_path / "set")
    assert dataset.classes == ("a", "b") and dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.groups is dataset.splits is dataset.masks is None
    expected = np.stack([kept[name] for name in sorted(kept)])[:, None]
    assert isinstance(dataset.images, np.memmap) and dataset.images.dtype == np.uint8
    np.testing.assert_array_equal(dataset.images, expected)
    wanted = [(expected / 255).mean(), (expected / 255).std()]
    np.testing.assert_allclose([*dataset.mean, *dataset.std], wanted, rtol=1e-5)
    by_folder = data.load(tmp_path / "set", group_by="parent")              # the folders are patients, not classes
    assert by_folder.labels is None and by_folder.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.load(tmp_path / "set", group_by=r"[ab]/(\d)").groups.tolist() == [0, 1, 2, 0, 1, 2]
    refused(["6 of 6", "a/0.png"], tmp_path / "set", group_by="patient")


def test_other_folders(tmp_path):
    names = "flat/1", "flat/.hidden", "deep/p1/s1/1", "deep/p2/s1/1", "parts/train/x/1", "parts/test/y/2"
    for n, name in enumerate(names):
        save(tmp_path / f"{name}.png", pixels(n))
    flat, deep, parts = (data.load(tmp_path / name) for name in ("flat", "deep", "parts"))
    assert len(flat) == 1 and flat.labels is flat.groups is None and flat.rows("train").tolist() == [0]
    assert deep.labels is None and deep.groups.tolist() == [0, 1]
    assert parts.splits.tolist() == ["test", "train"] and parts.labels.tolist() == [1, 0]
    assert parts.rows("train").tolist() == [1] and parts.rows("train", "test").tolist() == [0, 1]


@pytest.mark.parametrize("channels, dtype", [(1, np.uint8), (3, np.uint8), (1, np.uint16)])
def test_channels_and_bits_stay(tmp_path, channels, dtype):
    image = save(tmp_path / "set/1.png", pixels(0, channels=channels, dtype=dtype))
    dataset = data.load(tmp_path / "set")
    assert dataset.images.dtype == dtype and dataset.images.shape == (1, channels, 32, 32)
    np.testing.assert_array_equal(dataset.images[0], image[None] if channels == 1 else image.transpose(2, 0, 1))
    smaller = data.load(tmp_path / "set", size=16)
    assert smaller.images.dtype == dtype and abs(smaller.images.mean() / image.mean() - 1) < 0.05
    other = data.load(tmp_path / "set", channels=4 - channels)
    assert other.images.shape[1] == 4 - channels and other.images.dtype == dtype
    luminance = image if channels == 1 else np.rint(image @ np.array([0.299, 0.587, 0.114]))
    np.testing.assert_allclose(other.images[0], np.broadcast_to(luminance, other.images[0].shape), atol=1)


def test_split_csv(tmp_path):
    for n in range(4):
        save(tmp_path / f"{n}.png", pixels(n))
    save(tmp_path / "m0.png", pixels(9) // 128)
    table(tmp_path, "file,label,split,group,stain,number\n0.png,m0.png,train,p1,pink,10\n1.png,,unlabeled,,pink,9\n"
                    "2.png,,val,p2,,9\n3.png,,test,p3,blue,\n")
    dataset = data.load(tmp_path)
    assert dataset.classes == ("0", "1") and dataset.labels is None
    assert dataset.splits.tolist() == ["train", "unlabeled", "val", "test"]
    assert (dataset.masks[0] < 2).all() and (dataset.masks[1:] == 255).all() and len(set(dataset.groups)) == 4
    np.testing.assert_allclose(dataset.mean, (dataset.images[:2] / 255).mean(), rtol=1e-5)      # of what is learnt from
    stain = data.load(tmp_path / "split.csv", label="stain")
    assert stain.classes == ("blue", "pink") and stain.labels.tolist() == [1, 1, -1, 0] and stain.masks is not None
    assert data.load(tmp_path, label="number").classes == ("9", "10")
    refused(["no column age", "stain"], tmp_path, label="age")


def test_arrays(tmp_path):
    stack = pixels(0, 5, 400).reshape(5, 20, 20)
    np.save(tmp_path / "stack.npy", stack.astype(np.uint16) * 7)
    dataset = data.load(tmp_path / "stack.npy")
    assert dataset.images.dtype == np.uint16
    np.testing.assert_array_equal(dataset.images[:, 0], stack.astype(np.uint16) * 7)
    np.savez(tmp_path / "set.npz", train_images=stack[:3], train_labels=np.array([[1], [0], [1]]),
             test_images=stack[3:], test_labels=np.array([[0], [0]]))
    dataset = data.load(tmp_path / "set.npz")
    np.testing.assert_array_equal(dataset.images[:, 0], stack)
    assert dataset.labels.tolist() == [1, 0, 1, 0, 0] and dataset.splits.tolist() == ["train"] * 3 + ["test"] * 2
    stored = next((tmp_path / "cache").glob("set-*"))
    assert sorted(file.name for file in stored.iterdir()) == ["images.npy", "info.json", "rows.npz"]


def test_phantoms(monkeypatch):
    phantoms = pytest.importorskip("medssl.common.data.phantoms")
    made = []

    def make(size, seed):
        made.append((size, seed))
        return data.Dataset("phantoms", np.zeros((2, 1, size, size), np.uint8))
    monkeypatch.setattr(phantoms, "make", make)
    assert data.load("phantoms", size=48, channels=3).images.shape == (2, 3, 48, 48) and made == [(48, 0)]


# ---- becoming square

def test_masks_take_the_images_way(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[11:29, 21:49] = 2
    save(tmp_path / "images/1.png", mask * 100)
    mask[34:38, 52:56] = 1
    save(tmp_path / "masks/1.png", mask)
    for fit in ("pad", "crop", "squash"):
        dataset = data.load(tmp_path, size=32, fit=fit)
        disagree = (dataset.images[0, 0] > 100) != (dataset.masks[0] == 2)
        assert disagree.mean() < 0.04 and (dataset.masks == 1).any(), fit
        assert not (dataset.masks[0, :21] == 1).any(), fit                  # no class 1 between 0 and 2
        assert dataset.images[0, 0, :8].max() < 100 and dataset.images[0, 0, 16].max() > 190, fit
    assert data.load(tmp_path).images.shape[2:] == (64, 64)                 # 80 is 2.5 times 32, which rounds to even
    padded = data.load(tmp_path, size=80).images[0, 0]
    np.testing.assert_array_equal(padded[20:60], mask // 2 * 200)
    assert padded[:20].max() == padded[60:].max() == 0


def test_what_became_of_other_sizes_is_told(tmp_path, capsys):
    """Only images that are not square get bars."""
    for i, (rows, columns) in enumerate([(32, 32), (16, 16), (48, 48), (32, 24)]):
        save(tmp_path / f"set/{i}.png", pixels(i, rows, columns))
    data.load(tmp_path / "set", size=32)
    assert capsys.readouterr().out.splitlines() == [
        "set: 2 of 4 images are of another size: scaled to 32 x 32",
        "set: 1 of 4 images are not square: scaled by their longer side and padded with black"]


def test_masks_of_0_and_255(tmp_path, capsys):
    mask = pixels(1) // 128
    save(tmp_path / "images/1.png", pixels(0))
    save(tmp_path / "images/2.png", pixels(2))
    save(tmp_path / "masks/1.png", mask * 255)
    dataset = data.load(tmp_path)
    np.testing.assert_array_equal(dataset.masks[0], mask)
    assert (dataset.masks[1] == 255).all() and "0 and 255" in capsys.readouterr().out
    prepare.main([str(tmp_path), "--to", str(tmp_path / "ready")])
    np.testing.assert_array_equal(data.load(tmp_path / "ready").masks, dataset.masks)
    shutil.rmtree(tmp_path / "ready")
    palette = Image.fromarray(mask)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    palette.save(tmp_path / "masks/1.png")                                  # indices, not colours
    np.testing.assert_array_equal(data.load(tmp_path).masks[0], mask)


# ---- what is refused

def test_refused_tables(tmp_path):
    for n in range(3):
        save(tmp_path / f"{n}.png", pixels(n))
    save(tmp_path / "copy.png", pixels(0))
    table(tmp_path, "file,label,split,group\n0.png,a,train,p1\n1.png,b,test,p1\n")
    refused(["p1", "0.png (train)", "1.png (test)"], tmp_path)
    table(tmp_path, "file,label,split\n0.png,a,train\n2.png,b,train\ncopy.png,a,val\n")
    refused(["same image", "0.png (train)", "copy.png (val)"], tmp_path)
    table(tmp_path, "file,label,split,group\n0.png,a,train,p1\n1.png,,unlabeled,p1\ncopy.png,,unlabeled,\n")
    assert len(data.load(tmp_path)) == 3                                    # both are learnt from: no leak
    table(tmp_path, "file,label,split\n0.png,a,train\ngone.png,b,test\n")
    refused(["1 of 2", "gone.png"], tmp_path)
    table(tmp_path, "file,label,split\n0.png,a,training\n1.png,b,holdout\n")
    refused(["line 3", "holdout"], tmp_path)
    table(tmp_path, "file,label\n0.png,a,b\n")
    refused(["line 2"], tmp_path)
    table(tmp_path, "name;label\n0.png;a\n")
    refused(["no column `file`", "comma"], tmp_path)
    table(tmp_path, "file,label\n0\0.png,a\n")
    refused(["split.csv", "zero byte"], tmp_path)


def test_refused_images(tmp_path):
    for n in range(20):
        save(tmp_path / f"set/{n:02d}.png", pixels(n))
        if n % 5:
            (tmp_path / f"set/{n:02d}.png").write_bytes(b"not a picture")
    line = refused(["16 of 20", "01.png", "--skip-unreadable"], tmp_path / "set")
    assert "13.png" not in line and line.count("set/") == 10                # ten are listed
    save(tmp_path / "pair/images/1.png", pixels(0))
    save(tmp_path / "pair/masks/1.png", pixels(0, 20, 20) // 128)
    refused(["20 x 20", "32 x 32", "masks/1.png", "images/1.png"], tmp_path / "pair")
    save(tmp_path / "pair/masks/1.png", pixels(0) // 128 * 3)
    refused(["values 0 3", "renumber"], tmp_path / "pair")
    save(tmp_path / "pair/masks/2.png", pixels(0))
    refused(["masks/2.png", "no image"], tmp_path / "pair")
    save(tmp_path / "mixed/1.png", pixels(0))
    save(tmp_path / "mixed/2.png", pixels(1, dtype=np.uint16))
    refused(["2.png", "uint16"], tmp_path / "mixed")
    np.save(tmp_path / "mixed/2.npy", np.zeros((32, 32), np.float32))
    refused(["2.npy", "--window"], tmp_path / "mixed")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans/1.nii.gz").touch()
    refused(["1.nii.gz", "--to"], tmp_path / "scans")
    refused(["no images"], tmp_path / "cache")
    np.savez(tmp_path / "evil.npz", train_images=np.array([os.system], object), train_labels=np.zeros(1))
    refused(["evil.npz", "train_images", "object"], tmp_path / "evil.npz")
    assert not list((tmp_path / "cache").glob("*.part")) and not list((tmp_path / "cache").glob("*.lock"))


# ---- the cache

def test_cache_follows_the_files(tmp_path, monkeypatch):
    for n in range(3):
        save(tmp_path / f"set/{n}.png", pixels(n))
    builds, build = [], cache.build
    monkeypatch.setattr(cache, "build", lambda *words: builds.append(1) or build(*words))
    first = data.load(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    data.load("set", label="label")
    assert len(builds) == 1
    data.load("set", size=16)
    assert len(builds) == 2
    save(tmp_path / "set/1.png", pixels(7))
    changed = data.load("set")
    assert len(builds) == 3 and (changed.images[1] == pixels(7)).all() and (first.images[1] == pixels(1)).all()
    os.utime(tmp_path / "set/2.png", (1, 1))
    data.load("set")
    (tmp_path / "set/2.png").unlink()
    assert len(data.load("set")) == 2 and len(builds) == 5
    data.load("set", cache=tmp_path / "elsewhere")
    assert len(builds) == 6 and (tmp_path / "elsewhere").is_dir()
    assert len(list((tmp_path / "cache").iterdir())) == 2             # sizes 32 and 16: what is out of date was removed


def test_one_builds_the_others_wait(tmp_path, monkeypatch):
    save(tmp_path / "set/1.png", pixels(0))
    builds, build = [], cache.build
    monkeypatch.setattr(cache, "build", lambda *words: (builds.append(1), time.sleep(0.3), build(*words)))
    threads = [threading.Thread(target=data.load, args=(tmp_path / "set",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_lock_left_behind_is_broken(tmp_path, monkeypatch):
    save(tmp_path / "set/1.png", pixels(0))
    data.load(tmp_path / "set")
    stem = next((tmp_path / "cache").iterdir()).name.rsplit("-", 1)[0]
    os.utime(tmp_path / "set/1.png", (1, 1))
    (tmp_path / f"cache/{stem}.lock").touch()
    (tmp_path / f"cache/{stem}-123.part").mkdir()
    monkeypatch.setattr(cache, "STALE", 0.3)
    assert len(data.load(tmp_path / "set")) == 1 and len(list((tmp_path / "cache").iterdir())) == 1


# ---- splits

def test_split_keeps_groups_and_shares():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(150), rng.integers(1, 9, 150))
    labels = (rng.random(150) < 0.15).astype(int)[groups] + 2 * (rng.random(len(groups)) < 0.05)
    dataset = data.Dataset("", np.zeros((len(groups), 1, 2, 2), np.uint8), np.minimum(labels, 2), groups=groups)
    dealt = data.split(dataset, seed=1)
    assert all(len(set(dealt.splits[groups == g])) == 1 for g in range(150)) and dataset.splits is None
    for name, share in (("train", 0.7), ("val", 0.1), ("test", 0.2)):
        for number in range(3):
            part = (dealt.splits[dataset.labels == number] == name).mean()
            assert abs(part - share) < 0.06, (name, number, part)
    assert (data.split(dataset, seed=1).splits == dealt.splits).all()
    assert (data.split(dataset, seed=2).splits != dealt.splits).any()
    few = data.Dataset("", np.zeros((30, 1, 2, 2), np.uint8), groups=np.repeat(np.arange(3), 10))
    assert set(data.split(few).splits) == {"train", "val", "test"}
    assert set(data.split(few, (0.6, 0, 0.4)).splits) == {"train", "test"}
    with pytest.raises(ValueError, match="add up to 1"):
        data.split(few, (0.7, 0.2, 0.2))


# ---- preparing

def save_volume(path, array):
    """MetaImage: a few lines of text, then the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"int16": "MET_SHORT", "uint8": "MET_UCHAR"}[array.dtype.name]
    head = (f"ObjectType = Image\nNDims = 3\nDimSize = {' '.join(map(str, array.shape[::-1]))}\n"
            f"ElementType = {kind}\nElementDataFile = LOCAL\n")
    path.write_bytes(head.encode() + array.tobytes())


def scans(folder):
    """Four scans of two patients: 12 slices of 32 x 40, the first three are air."""
    made = {}
    for n in range(4):
        values = np.full((12, 32, 40), -1000, np.int16)
        values[3:, 4:28, 5:35] = np.random.default_rng(n).integers(-100, 200, (9, 24, 30))
        mask = np.zeros(values.shape, np.uint8)
        mask[6, 10:20, 10:20] = 1
        save_volume(folder / f"images/patient{n // 2}_scan{n}.mha", values)
        save_volume(folder / f"masks/patient{n // 2}_scan{n}.mha", mask)
        made[n] = values, mask
    return made


def test_volumes_become_slices(tmp_path, capsys):
    made = scans(tmp_path / "scans")
    prepare.main([str(tmp_path / "scans"), "--to", str(tmp_path / "ready"), "--window", "-160", "240", "--size", "40",
                  "--group-by", "patient(.)", "--split", "0.5", "0", "0.5"])
    said = capsys.readouterr().out
    assert "12 slices without content dropped" in said and "36 images of 40 x 40" in said
    dataset = data.load(tmp_path / "ready")
    assert dataset.images.shape == (36, 1, 40, 40) and isinstance(dataset.images, np.memmap) and dataset.name == "ready"
    assert dataset.groups.tolist() == [0] * 18 + [1] * 18 and set(dataset.splits[:18]) != set(dataset.splits[18:])
    values, mask = made[0]
    expected = np.rint((values[3].clip(-160, 240) + 160.0) * 255 / 400)
    np.testing.assert_array_equal(dataset.images[0, 0, 4:36], expected)
    assert dataset.images[0, 0, :4].max() == 0
    np.testing.assert_array_equal(dataset.masks[3, 4:36], mask[6])
    assert dataset.masks.sum() == 4 * mask.sum()
    text = "".join((tmp_path / "ready" / name).read_text() for name in ("table.csv", "info.json"))
    assert "patient" not in text and "scan" not in text and str(tmp_path) not in text
    assert Image.open(tmp_path / "ready/contact_sheet.png").size[0] > 300
    assert data.load(tmp_path / "ready", size=16, channels=3).images.shape == (36, 3, 16, 16)
    sideways = [str(tmp_path / "scans"), "--to", str(tmp_path / "side"), "--axis", "2", "--window", "-160", "240"]
    prepare.main(sideways)
    assert data.load(tmp_path / "side").groups.max() == 3                   # without --group-by each volume is a group
    assert np.load(tmp_path / "side/rows.npz")["shapes"][0].tolist() == [12, 32]


def test_dedupe(tmp_path):
    for n in range(2):
        values = np.random.default_rng(n).integers(-1000, 1000, (1, 32, 32)).repeat(4, 0).astype(np.int16)
        values[2] += np.random.default_rng(9).integers(-9, 9, (32, 32)).astype(np.int16)            # nearly the same
        values[3] = values[3, ::-1]                                         # another picture
        save_volume(tmp_path / f"scans/{n}.mha", values)
    save_volume(tmp_path / "scans/2.mha", values[:1])                      # a slice of scan 1 again, as another patient
    prepare.main([str(tmp_path / "scans"), "--to", str(tmp_path / "ready"), "--dedupe", "--window", "-1000", "1000"])
    assert data.load(tmp_path / "ready").groups.tolist() == [0, 0, 1, 1]
    hashes = np.random.default_rng(0).integers(0, 2 ** 63, 50).astype(np.uint64)
    for hash in hashes:
        distance = min(bin(int(hash) ^ int(other)).count("1") for other in hashes[:20])
        assert copies.is_near(hash, list(hashes[:20])) == (distance <= copies.NEAR)
    seen = copies.Copies()
    kinds = [seen.kind(*each) for each in ((1, hashes[0], "a"), (2, hashes[0], "b"), (3, hashes[0], "a"),
                                           (2, hashes[1], "c"), (4, hashes[0], ""), (5, hashes[0], ""))]
    assert kinds == [None, None, "near", "copies", None, None]              # other patients may look alike
    some = np.uint64(2 ** 40 + 5)
    assert copies.is_near(some, [some ^ np.uint64(63)]) and not copies.is_near(some, [some ^ np.uint64(127)])
    image = pixels(3)
    image[:16, :16] //= 2
    assert bin(int(copies.difference_hash(image)) ^ int(copies.difference_hash(image // 2 + 20))).count("1") <= 6


def test_copies_in_two_splits_keep_the_test_one(tmp_path):
    for n in range(3):
        save(tmp_path / f"set/{n}.png", pixels(n % 2))
    table(tmp_path / "set", "file,label,split\n0.png,a,train\n1.png,b,train\n2.png,a,test\n")
    words = [str(tmp_path / "set"), "--to", str(tmp_path / "ready")]
    with pytest.raises(ValueError, match="same image.*0.png.*2.png"):
        prepare.main(words)
    assert not (tmp_path / "ready").exists() and not list(tmp_path.glob(".ready*"))
    prepare.main([*words, "--dedupe"])
    dataset = data.load(tmp_path / "ready")
    assert sorted(zip(dataset.splits, dataset.labels, strict=True)) == [("test", 0), ("train", 1)]
    assert dataset.classes == ("a", "b")


def test_preparing_refuses_and_skips(tmp_path, capsys, monkeypatch):
    save(tmp_path / "set/a/1.png", pixels(0, dtype=np.uint16))
    save(tmp_path / "set/b/2.png", pixels(1, dtype=np.uint16))
    (tmp_path / "set/b/3.png").write_bytes(b"")
    words = [str(tmp_path / "set"), "--to", str(tmp_path / "ready")]
    with pytest.raises(ValueError, match="1 of 3.*3.png"):
        prepare.main(words)
    assert not list(tmp_path.glob("*ready*"))
    prepare.main([*words, "--skip-unreadable"])
    assert "1 unreadable" in capsys.readouterr().out
    dataset = data.load(tmp_path / "ready")
    assert dataset.labels.tolist() == [0, 1] and dataset.images.dtype == np.uint8        # percentiles made 8 bits of 16
    low, high = np.percentile(pixels(0, dtype=np.uint16), (0.5, 99.5))
    expected = (pixels(0, dtype=np.uint16).clip(low, high) - low) * 255 / (high - low)
    np.testing.assert_allclose(dataset.images[0, 0], expected, atol=0.51)
    new = [*words[:2], str(tmp_path / "new")]
    for wrong, word in ((words, "not empty"), ([*new, "--window", "3", "1"], "smaller"),
                        ([*new, "--window", "0", "inf"], "finite"), ([*new, "--split", "nan", "0", "1"], "add up"),
                        ([words[0], "--dedupe"], "--to"), ([str(tmp_path / "gone")], "no such")):
        with pytest.raises(ValueError, match=word):
            prepare.main(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set/b/3.png").unlink()
    prepare.main([words[0]])
    said = capsys.readouterr().out
    assert "class b" in said and "16 bits" in said and "near copies" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "ready", "set"]


# ---- real files

@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sets are not here")
def test_shared_sets():
    sizes = {"rbc_chula": 8870, "cxr_pneumonia": 5190, "hc18_fetal_head": 1333, "nuclei_dsb2018": 664}
    for name, count in sizes.items():
        source = find(SHARED / name)
        assert len(source.names) == count and bool(source.masks) == (name[0] in "hn")
        assert source.groups and source.splits and len(source.groups) == len(source.splits) == count
    bad = SHARED / "formats/bad"
    refused(["p1", "a.png", "b.png"], bad / "patient_leak")
    refused(["a.png", "c.png", "same image"], bad / "same_image_twice")
    refused(["gone.png"], bad / "missing_file")
    refused(["masks/a.png", "images/a.png"], bad / "mask_size")
    assert data.load(bad / "mask_255").masks.max() == 1
    for name in ("pickled.npz", "no_train_images.npz", "truncated.npy", "text.png", "evil.pt"):
        refused([name], bad / name)
    assert data.load(SHARED / "formats/medmnist_gray.npz").splits.tolist().count("train") == 20
    assert (data.load(SHARED / "formats/stack8.npy").images[:, 0] == readers.read(SHARED / "formats/stack8.npy")).all()


def test_moments_of_16_bits_are_shares_of_the_full_scale(tmp_path):
    image = save(tmp_path / "set/1.png", pixels(0, dtype=np.uint16))
    dataset = data.load(tmp_path / "set")
    wanted = [(image / 65535).mean(), (image / 65535).std()]
    np.testing.assert_allclose([*dataset.mean, *dataset.std], wanted, rtol=1e-4)


def test_a_large_picture_is_copied_once_at_most(tmp_path, monkeypatch):
    """Of the decoder's way behind the file: fitting, hash, moments. What Pillow takes is not counted."""
    for module, name in (decode, "CHUNK"), (sets, "BLOCK"), (decode.pixels, "WHOLE"):
        monkeypatch.setattr(module, name, 2 ** 14)
    monkeypatch.setattr(decode, "BUFFER", 2 ** 10)
    picture = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    (tmp_path / "set").mkdir()
    np.save(tmp_path / "set/1.npy", picture)                                # memory-mapped, so not counted either
    for size, most in (1000, 1.6), (60, 0.7):                               # planes; or a channel, then two of its rows
        data.load(tmp_path / "set", size=size, cache=tmp_path / "warm")
        tracemalloc.start()
        dataset = data.load(tmp_path / "set", size=size, cache=tmp_path / "cache")
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert memory < most * picture.nbytes
        by_channel = [Image.fromarray(picture[..., c]).resize((size, size), Image.BILINEAR) for c in range(3)]
        assert np.array_equal(dataset.images[0], np.stack(by_channel))
    monkeypatch.undo()
    whole = np.asarray(Image.fromarray(picture).resize((60, 60), Image.BILINEAR))
    assert np.array_equal(dataset.images[0], whole.transpose(2, 0, 1))      # as the channels together
    assert np.allclose(dataset.mean, (dataset.images[0] / 255.).mean((1, 2)), atol=1e-6)


def test_split_takes_the_moments_of_its_training_images():
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4)).astype(np.uint8)
    dealt = data.split(data.Dataset("", images))
    train = images[dealt.rows("train")] / 255
    np.testing.assert_allclose([*dealt.mean, *dealt.std], [train.mean(), train.std()], rtol=1e-5)


def test_a_volume_is_scaled_as_a_whole_and_keeps_masked_slices(tmp_path):
    values = np.stack([pixels(n).astype(np.int16) + 300 * n for n in range(3)] + [np.zeros((32, 32), np.int16)] * 2)
    mask = np.zeros(values.shape, np.uint8)
    mask[3, 4:9, 4:9] = 1                                                   # black, but somebody marked it
    save_volume(tmp_path / "scans/images/1.mha", values)
    save_volume(tmp_path / "scans/masks/1.mha", mask)
    prepare.main([str(tmp_path / "scans"), "--to", str(tmp_path / "ready")])
    dataset = data.load(tmp_path / "ready")
    low, high = np.percentile(values, (0.5, 99.5))
    expected = (values[:4].clip(low, high) - low) * 255 / (high - low)
    np.testing.assert_allclose(dataset.images[:, 0], expected, atol=0.51)
    assert dataset.masks.sum() == mask.sum()


def test_preparing_inverts_where_small_is_bright(tmp_path, monkeypatch):
    image = save(tmp_path / "set/1.png", pixels(0))
    monkeypatch.setattr(readers, "small_is_bright", lambda path: True)      # a DICOM file of kind MONOCHROME1
    prepare.main([str(tmp_path / "set"), "--to", str(tmp_path / "ready")])
    np.testing.assert_array_equal(data.load(tmp_path / "ready").images[0, 0], 255 - image)


@pytest.mark.parametrize("words", [[], ["--to", "ready"]])
def test_an_interrupted_decoder_leaves_nothing(tmp_path, monkeypatch, words):
    for n in range(4):
        save(tmp_path / f"set/{n}.png", pixels(n))
    read, seen = readers.read, []

    def stop(path):
        seen.append(path)
        if len(seen) > 6:                                                   # four to choose a size, two of the images
            raise KeyboardInterrupt
        return read(path)
    monkeypatch.setattr(readers, "read", stop)
    monkeypatch.setattr(decode, "CHUNK", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        prepare.main([str(tmp_path / "set"), *words])
    assert not list((tmp_path / "cache").glob("*")) and not list(tmp_path.glob("*ready*"))
