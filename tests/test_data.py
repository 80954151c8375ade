"""Opening sets of images and writing them: layouts, what is refused, the cache, splits, volumes."""

import csv
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medssl.common import data
from medssl.common.data import decode, look, volumes
from medssl.common.errors import UserError


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
    with pytest.raises(UserError) as error:
        data.load(path, **options)
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line
    return line


# ---- layouts

LAYOUTS = {     # name: (files, labels, groups, splits, masks); a file in masks/ holds 0 and 1
    "flat": (["1", ".hidden", "2"], None, None, None, False),
    "classes": (["b/1", "a/1", "b/2"], ["a", "b", "b"], None, None, False),
    "one folder": (["a/1", "a/2"], None, None, None, False),
    "deep": (["p1/s1/1", "p2/s1/1", "p2/s1/2"], None, [0, 1, 1], None, False),
    "split folders": (["train/x/1", "test/y/2", "unlabelled/x/3"], ["y", "x", "x"], None,
                      ["test", "train", "unlabeled"], False),
    "masks": (["images/1", "images/2", "masks/1"], None, None, None, True),
    "masks of patients": (["images/P1/1", "images/P1/2", "images/P2/1", "masks/P1/1", "masks/P1/2", "masks/P2/1"],
                          None, [0, 0, 1], None, True),
    "labels of patients": (["images/a/1", "images/b/1", "labels/a/1", "labels/b/1"], None, [0, 1], None, True),
    "images alone": (["images/a/1", "images/b/1"], ["a", "b"], None, None, False),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, tmp_path):
    files, labels, groups, splits, masks = LAYOUTS[name]
    for n, file in enumerate(files):
        mask = file.startswith(("masks", "labels"))
        save(tmp_path / f"set/{file}.png", pixels(n) // (128 if mask else 1))
    dataset = data.load(tmp_path / "set")
    assert (dataset.labels is None) == (labels is None) and (dataset.groups is None) == (groups is None)
    if labels:
        assert [dataset.classes[label] for label in dataset.labels] == labels
    assert groups is None or dataset.groups.tolist() == groups
    assert (None if dataset.splits is None else dataset.splits.tolist()) == splits
    assert (dataset.masks is not None) == masks and (not masks or dataset.classes == ("0", "1"))
    shown = sorted(file for file in files if not file.startswith((".", "masks", "labels")))
    expected = [np.asarray(Image.open(tmp_path / f"set/{file}.png")) for file in shown]
    np.testing.assert_array_equal(dataset.images[:, 0], expected)
    wanted = np.stack(expected)[[split != "test" for split in splits]] if splits else np.stack(expected)
    np.testing.assert_allclose([*dataset.mean, *dataset.std], [(wanted / 255).mean(), (wanted / 255).std()], rtol=1e-5)


def test_groups_from_names(tmp_path):
    for n in range(12):
        save(tmp_path / f"set/{'ab'[n % 2]}/P{n // 3:03}_{n:02}.png", pixels(n))
    assert data.load(tmp_path / "set", group_by=r"P\d+").groups.tolist() == sorted([0, 1, 2, 3] * 3)[::2] + sorted(
        [0, 1, 2, 3] * 3)[1::2]
    by_folder = data.load(tmp_path / "set", group_by="parent")              # the folders are patients, not classes
    assert by_folder.labels is None and by_folder.groups.tolist() == [0] * 6 + [1] * 6
    assert data.load(tmp_path / "set", group_by=r"_\d(\d)").groups.max() == 9
    refused(["12 of 12", "a/P000_00.png"], tmp_path / "set", group_by="patient")
    refused(["not a regular expression"], tmp_path / "set", group_by="(")
    names = [f"P{n // 3:03}_{n:02}.png" for n in range(12)]
    assert r"`--group-by 'P\d+'` makes 4 groups" in look.patient_hint(names)
    assert look.patient_hint(["a/1.png", "b/2.png"]) == look.patient_hint(["P1_1.png", "P2_1.png"]) == ""


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
    for saved in (np.savez, np.savez_compressed):
        saved(tmp_path / "set.npz", train_images=stack[:3], train_labels=np.array([[1], [0], [1]]),
              test_images=stack[3:], test_labels=np.array([[0], [0]]))
        dataset = data.load(tmp_path / "set.npz")
        np.testing.assert_array_equal(dataset.images[:, 0], stack)
        assert dataset.labels.tolist() == [1, 0, 1, 0, 0] and dataset.splits.tolist() == ["train"] * 3 + ["test"] * 2
    colour = pixels(0, 40, 20, 3).reshape(2, 20, 20, 3)
    for name, array in (("last", colour), ("first", np.moveaxis(colour, 3, 1))):
        np.save(tmp_path / f"{name}.npy", array)
        np.testing.assert_array_equal(data.load(tmp_path / f"{name}.npy").images, np.moveaxis(colour, 3, 1))


@pytest.mark.parametrize(("mode", "made"), [
    ("L", lambda x: x), ("I;16", lambda x: x.astype(np.uint16) * 7), ("RGB", lambda x: np.stack([x, 255 - x, x], 2)),
    ("LA", lambda x: x), ("RGBA", lambda x: np.stack([x, 255 - x, x], 2)), ("1", lambda x: (x > 127) * np.uint8(255)),
    ("P", lambda x: np.stack([255 - x] * 3, 2)), ("turned", lambda x: np.rot90(x))])
def test_modes_of_pictures(mode, made, tmp_path):
    x, path = pixels(3, 32, 32), tmp_path / "set/1.png"
    right, path2 = made(x), path
    path.parent.mkdir()
    if mode == "LA":
        Image.merge("LA", [Image.fromarray(x), Image.new("L", (32, 32), 99)]).save(path)
    elif mode == "RGBA":
        Image.fromarray(np.dstack([right, x])).save(path)
    elif mode == "1":
        Image.fromarray(x > 127).save(path)
    elif mode == "P":
        palette = Image.fromarray(x)
        palette.putpalette([255 - i for i in range(256) for _ in range(3)])
        palette.save(path)
    elif mode == "turned":
        exif = Image.Exif()
        exif[274] = 8                                                       # turn it left when it is shown
        path2 = path.with_suffix(".png")
        Image.fromarray(x).save(path2, exif=exif)
    else:
        Image.fromarray(right).save(path)
    dataset = data.load(tmp_path / "set")
    assert dataset.images.dtype == right.dtype
    np.testing.assert_array_equal(dataset.images[0], right[None] if right.ndim == 2 else np.moveaxis(right, 2, 0))
    gray = data.load(tmp_path / "set", channels=1).images
    assert gray.shape == (1, 1, 32, 32) and data.load(tmp_path / "set", channels=3).images.shape == (1, 3, 32, 32)
    if right.ndim == 3:
        np.testing.assert_allclose(gray[0, 0], right @ [0.299, 0.587, 0.114], atol=0.51)


# ---- becoming square

def test_masks_take_the_images_way(tmp_path):
    mask = np.zeros((40, 80), np.uint8)
    mask[11:29, 21:49] = 2
    save(tmp_path / "images/1.png", mask * 100)
    mask[34:38, 52:56] = 1
    save(tmp_path / "masks/1.png", mask)
    dataset = data.load(tmp_path, size=32)
    disagree = (dataset.images[0, 0] > 100) != (dataset.masks[0] == 2)
    assert disagree.mean() < 0.04 and (dataset.masks == 1).any()
    assert not (dataset.masks[0, :21] == 1).any()                           # no class 1 between 0 and 2
    assert data.load(tmp_path).images.shape[2:] == (64, 64)                 # 80 is 2.5 times 32, which rounds to even
    padded = data.load(tmp_path, size=80).images[0, 0]
    np.testing.assert_array_equal(padded[20:60], mask // 2 * 200)
    assert padded[:20].max() == padded[60:].max() == 0
    deep = pixels(5, 32, 32, dtype=np.uint16)
    save(tmp_path / "deep/1.png", deep)
    halved = data.load(tmp_path / "deep", size=16).images
    assert halved.dtype == np.uint16 and halved.max() > 40_000              # not clipped to 8 bits
    assert abs(halved.mean() - deep.mean()) < 1500


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
    assert not list((tmp_path / "cache").glob("*.part"))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-200])


BAD = {     # name: how it is made, words
    "cut.png": (lambda p: [save(p, pixels(0)), cut_short(p)], "cut.png"),
    "cut.jpg": (lambda p: [save(p, pixels(0)), cut_short(p)], "truncated"),
    "empty.png": (lambda p: p.touch(), "empty.png"),
    "bomb.png": (lambda p: Image.new("1", (20_000, 20_000)).save(p), "bomb"),
    "pages.tif": (lambda p: Image.fromarray(pixels(0)).save(p, save_all=True, append_images=[Image.new("L", (9, 9))]),
                  "several pages"),
    "evil.npy": (lambda p: np.save(p, np.array([os.system], object)), "objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_a_line_with_their_path(name, tmp_path):
    save(tmp_path / "set/0.png", pixels(0))
    make, words = BAD[name]
    make(tmp_path / "set" / name)
    refused([name, words], tmp_path / "set")


def test_bad_archives(tmp_path):
    images, labels = np.stack([pixels(n) for n in range(4)]), np.arange(4)[:, None]
    whole = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    for name, changes, words in (("no images", {"test_images": None}, "test_images"), ("wrong count", {
            "test_labels": labels[:3]}, "holds 4 images"), ("no labels", {"train_labels": None}, "train_labels"),
            ("evil", {"train_images": np.array([os.system] * 4, object)}, "object"),
            ("evil labels", {"train_labels": np.array([os.system] * 4, object)}, "allow_pickle")):
        arrays = {key: value for key, value in (whole | changes).items() if value is not None}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        refused([f"{name}.npz", words], tmp_path / f"{name}.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wrong count.npz").read_bytes()[:500])
    refused(["cut.npz"], tmp_path / "cut.npz")


def test_what_is_no_path_is_refused_in_a_line(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for path, words in (("~nosuchuser/x", "home"), (tmp_path / "loop", "symbolic links"), (tmp_path / "pipe", "pipe"),
                        (os.fsdecode(b"/tmp/\xff"), "no UTF-8"), (tmp_path / "nothing", "no such file")):
        refused([words], path)
    (tmp_path / "set/round").mkdir(parents=True)
    (tmp_path / "set/round/again").symlink_to(tmp_path / "set")             # is visited once
    save(tmp_path / "set/1.png", pixels(0))
    assert len(data.load(tmp_path / "set")) == 1
    os.mkfifo(tmp_path / "set/2.png")
    refused(["2.png", "pipe"], tmp_path / "set")


# ---- the cache

def test_the_cache_follows_the_files(tmp_path):
    for n in range(3):
        save(tmp_path / f"set/{n}.bmp", pixels(n))
    first = data.load(tmp_path / "set", 16)
    again = data.load(data.find(tmp_path / "set"), 16, 1)                   # gray asked for or not: decoded once
    assert again.images.filename == first.images.filename and len(list((tmp_path / "cache").iterdir())) == 1
    changed = save(tmp_path / "set/1.bmp", 255 - pixels(1))                  # as many bytes as before
    os.utime(tmp_path / "set/1.bmp", (1, 1))
    dataset = data.load(tmp_path / "set", 32)
    np.testing.assert_array_equal(dataset.images[1, 0], changed)
    before = np.array(first.images[1])
    assert (data.load(tmp_path / "set", 16).images[1] != before).any()
    assert len(list((tmp_path / "cache").iterdir())) == 2                   # what was decoded before is gone


def test_an_interrupted_decoder_leaves_nothing(tmp_path, monkeypatch):
    save(tmp_path / "set/0.png", pixels(0))
    monkeypatch.setattr(decode, "planes", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        data.load(tmp_path / "set")
    assert not list((tmp_path / "cache").iterdir())


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


def test_dealing_anew_tests_large_patients_too():
    groups = np.repeat(np.arange(20), np.arange(20, 0, -1))
    old = data.Dataset("set", np.zeros((len(groups), 1, 1, 1), np.uint8), groups=groups)
    tested = np.mean([np.isin(np.arange(20), groups[data.deal(old, seed).splits == "test"]) for seed in range(100)], 0)
    assert 0.02 < tested.min() and tested.max() < 0.7


def test_the_moments_are_those_of_the_training_images(tmp_path):
    images = np.stack([pixels(n, dtype=np.uint16) for n in range(10)])[:, None]
    dealt = data.split(data.Dataset("set", images, groups=np.arange(10)))
    right = images[dealt.splits == "train"] / 65535
    np.testing.assert_allclose([*dealt.mean, *dealt.std], [right.mean(), right.std()], rtol=1e-4)


# ---- writing a set

def run(tmp_path, *words):
    look.main([str(tmp_path / "set"), *map(str, words)])


def written(tmp_path, *words):
    """The lines of split.csv, and the set."""
    run(tmp_path, "--to", tmp_path / "new", *words)
    with open(tmp_path / "new/split.csv", newline="") as file:
        return list(csv.DictReader(file)), data.load(tmp_path / "new")


def test_pictures_are_written_with_groups_and_splits(tmp_path, capsys):
    for n in range(24):
        save(tmp_path / f"set/{'ab'[n % 2]}/P{n // 2:02}_{n:02}.png", pixels(n, dtype=np.uint16))
    rows, dataset = written(tmp_path, "--group-by", r"P\d+", "--split", 0.5, 0.25, 0.25)
    assert len(rows) == 24 and dataset.images.dtype == np.uint16 and dataset.classes == ("a", "b")
    assert all(len(set(dataset.splits[dataset.groups == g])) == 1 for g in range(12))
    assert {name: (dataset.splits == name).sum() for name in ("train", "val", "test")} == {
        "train": 12, "val": 6, "test": 6}
    old = data.load(tmp_path / "set")
    np.testing.assert_array_equal(dataset.images, old.images)
    assert "patients (groups)" in capsys.readouterr().out
    with pytest.raises(UserError, match="not an empty folder"):
        run(tmp_path, "--to", tmp_path / "new")
    with pytest.raises(UserError, match="inside the set"):
        run(tmp_path, "--to", tmp_path / "set/new")
    run(tmp_path, "--sheet", tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file() and "one patient may be on both sides" in capsys.readouterr().out
    for words in (["--sheet", tmp_path / "s.png"], ["--dedupe"], ["--window", 1, 2]):
        with pytest.raises(SystemExit):
            run(tmp_path, *words)


def test_copies_are_dropped_and_the_test_one_is_kept(tmp_path):
    for n in range(3):
        save(tmp_path / f"set/{n}.png", pixels(n))
    save(tmp_path / "set/copy.png", pixels(0))
    near = pixels(1)
    near[0, 0] ^= 1
    save(tmp_path / "set/near.png", near)
    table(tmp_path / "set", "file,split,group\n0.png,train,p0\n1.png,train,p1\n2.png,train,p2\ncopy.png,test,p3\n"
                            "near.png,train,p1\nother.png,train,p5\n")
    near = pixels(2)
    near[0, 0] ^= 1
    save(tmp_path / "set/other.png", near)                                  # of another patient: it stays
    rows, _ = written(tmp_path, "--dedupe")
    assert sorted(row["file"] for row in rows) == [f"images/{name}.png" for name in ("1", "2", "copy", "other")]


def test_what_cannot_be_read_is_skipped_if_asked(tmp_path, capsys):
    save(tmp_path / "set/0.png", pixels(0))
    (tmp_path / "set/1.png").write_bytes(b"no")
    with pytest.raises(UserError, match="1 of 2"):
        run(tmp_path, "--to", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))
    assert len(written(tmp_path, "--skip-unreadable")[0]) == 1 and "1 unreadable" in capsys.readouterr().out


# ---- volumes

def nifti(path, array, affine=None, slope=1.0):
    """array (x, y, z)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head, kind = bytearray(352), {"int16": (4, 16), "uint8": (2, 8)}[array.dtype.name]
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, array.ndim, *array.shape, *[1] * (7 - array.ndim))
    struct.pack_into("<2h", head, 70, *kind)
    struct.pack_into("<8f", head, 76, 1, *[1] * 7)
    struct.pack_into("<3f", head, 108, 352, slope, 0)
    if affine is not None:
        struct.pack_into("<2h", head, 252, 0, 1)
        struct.pack_into("<12f", head, 280, *np.asarray(affine, float).ravel())
    head[344:348] = b"n+1\0"
    path.write_bytes(bytes(head) + array.tobytes(order="F"))


@pytest.fixture
def sitk():
    return pytest.importorskip("SimpleITK")


AXES = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


@pytest.mark.parametrize("code", ["RAS", "LPS", "PIR", "ASL"])
def test_volumes_are_turned_to_one_orientation(code, tmp_path, sitk):
    """The corner at the patient's right, front and feet is bright in every file, whichever way its axes run."""
    body = np.zeros((12, 14, 16), np.int16)                             # (right to left, front to back, feet to head)
    body[2:10, 2:12, 2:14] = 100
    body[2:5, 2:5, :] = 1000
    axes, affine = [AXES[letter] for letter in code], np.zeros((3, 4))
    stored = np.transpose(body, [axis for axis, _ in axes])
    for place, (axis, sign) in enumerate(axes):
        affine[axis, place] = sign
        grows = -1 if axis < 2 else 1                                       # body runs to the left, the back, the head
        stored = stored if sign == grows else np.flip(stored, place)
    nifti(tmp_path / "set/scan.nii", np.ascontiguousarray(stored), affine)
    rows, dataset = written(tmp_path, "--window", 0, 1000)
    bright = dataset.images[len(rows) // 2, 0] > 200
    y, x = np.nonzero(bright)
    size = bright.shape[0]
    assert bright.any() and y.mean() < size / 2 and x.mean() < size / 2     # front is up, right is on the left
    assert set(row["group"] for row in rows) == {"g0000"}


def test_volumes_become_slices_with_masks(tmp_path, sitk):
    for n in range(3):
        values = np.full((40, 32, 12), -1000, np.int16)
        values[5:35, 4:28, 3:] = np.random.default_rng(n).integers(-100, 200, (30, 24, 9))
        mask = np.zeros(values.shape, np.uint8)
        mask[10:20, 10:20, 6] = 1
        values[10:20, 10:20, 6] = 240
        mask[1:3, 1:3, 0] = 1                                               # in a slice of air
        nifti(tmp_path / f"set/images/p{n}.nii", values, np.eye(3, 4))
        nifti(tmp_path / f"set/labels/p{n}.nii", mask)                      # a header that says nothing
    refused(["p0.nii", "--to"], tmp_path / "set")
    rows, dataset = written(tmp_path, "--window", -160, 240, "--split", 0.34, 0.33, 0.33)
    assert len(rows) == 30 and len(set(row["group"] for row in rows)) == 3  # two slices of each hold nothing but air
    assert sorted(set(dataset.splits)) == ["test", "train", "val"] and dataset.classes == ("0", "1")
    marked = [i for i, mask in enumerate(dataset.masks) if (mask == 1).any()]
    assert len(marked) == 6
    image, mask = max(((dataset.images[i, 0], dataset.masks[i]) for i in marked), key=lambda pair: (pair[1] == 1).sum())
    assert image[mask == 1].mean() > 220                                    # the mask lies where its image is bright
    rest = image[(image > 0) & (image < 240)]
    assert abs(rest.mean() - (50 + 160) / 400 * 255) < 20
    nifti(tmp_path / "set/labels/p0.nii", mask[:-1])
    with pytest.raises(UserError, match="p0.nii"):
        run(tmp_path, "--to", tmp_path / "other")


def test_damaged_volumes_are_refused(tmp_path, sitk):
    nifti(tmp_path / "set/scan.nii", np.zeros((20, 20, 20), np.int16))
    whole = (tmp_path / "set/scan.nii").read_bytes()
    for content in (whole[:-4000], b"", b"no volume"):
        (tmp_path / "set/scan.nii").write_bytes(content)
        with pytest.raises(UserError, match="scan.nii"):
            run(tmp_path, "--to", tmp_path / "new")


def test_other_formats_and_patients_of_dicom(tmp_path, sitk):
    (tmp_path / "set").mkdir()
    for n, name in enumerate(("a.nrrd", "b.mha")):
        image = sitk.GetImageFromArray(np.random.default_rng(n).integers(0, 99, (4, 20, 20)).astype(np.int16))
        sitk.WriteImage(image, str(tmp_path / "set" / name))
    for n in range(4):                                                      # two pictures of each of two patients
        image = sitk.GetImageFromArray(pixels(n)[None])
        for tag, value in (("0010|0020", f"SMITH{n // 2}"), ("0020|000e", f"1.2.3.{n}"), ("0028|0004", "MONOCHROME2")):
            image.SetMetaData(tag, value)
        sitk.WriteImage(image, str(tmp_path / f"set/x{n}.dcm"))
    rows, dataset = written(tmp_path)
    groups = [row["group"] for row in rows if "x" in Path(row["file"]).name]
    assert len(rows) == 12 and groups[0] == groups[1] != groups[2] == groups[3]
    assert b"SMITH" not in b"".join(path.read_bytes() for path in (tmp_path / "new").rglob("*.*"))


def test_without_simpleitk_the_extra_is_named(tmp_path, monkeypatch):
    nifti(tmp_path / "set/scan.nii", np.zeros((4, 4, 4), np.int16))
    monkeypatch.setattr(volumes, "sitk", None)
    with pytest.raises(UserError, match=r"medssl\[volumes\]"):
        run(tmp_path)
