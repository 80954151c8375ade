"""The built-in data set: reproducible, split by patient, and hard in the way it claims to be."""
import numpy as np
import pytest

from medssl.common.data import phantoms


@pytest.fixture(scope="module")
def small():
    return phantoms.make(count=400, size=32)


def test_shapes_and_types(small):
    assert small.images.shape == (400, 1, 32, 32) and small.images.dtype == np.uint8
    assert small.masks.shape == (400, 32, 32) and small.masks.dtype == np.uint8
    assert small.labels.dtype == small.groups.dtype == np.int64 and small.splits.dtype.kind == "U"
    assert small.classes == phantoms.CLASSES and set(np.unique(small.masks)) == set(range(len(phantoms.ORGANS)))
    seen = small.images[small.rows("train")] / 255
    assert small.mean[0] == pytest.approx(seen.mean(), abs=1e-4) and small.std[0] == pytest.approx(seen.std(), abs=1e-4)


def test_the_seed_decides_every_bit():
    first, second, other = (phantoms.make(count=30, size=32, seed=seed) for seed in (5, 5, 6))
    assert np.array_equal(first.images, second.images) and np.array_equal(first.masks, second.masks)
    assert np.array_equal(first.labels, second.labels) and np.array_equal(first.splits, second.splits)
    assert not np.array_equal(first.images, other.images)


def test_splits_keep_patients_together_and_hold_every_class(small):
    assert np.bincount(small.groups).min() >= 8 and np.bincount(small.groups).max() <= 10
    assert all(len(set(small.splits[small.groups == patient])) == 1 for patient in np.unique(small.groups))
    for split, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        assert set(small.labels[small.rows(split)]) == {0, 1, 2, 3}
        assert len(np.unique(small.groups[small.rows(split)])) / 44 == pytest.approx(share, abs=0.1)


def test_classes_are_imbalanced_as_stated():
    kinds, splits = phantoms._deal(222, np.random.default_rng(0))
    assert np.allclose(np.bincount(kinds) / 222, np.array((3, 8, 4, 2)) / 17, atol=0.02)
    assert (np.bincount(kinds[splits == "test"]) >= 5).all()


def test_sizes_draw_the_same_patients():
    coarse, fine = phantoms.make(count=18, size=48), phantoms.make(count=18, size=96)
    assert np.array_equal(coarse.labels, fine.labels)
    halved = fine.images.reshape(18, 48, 2, 48, 2).mean((2, 4))
    assert np.corrcoef(halved.ravel(), coarse.images.ravel())[0, 1] > 0.95
    assert (fine.masks[:, ::2, ::2] == coarse.masks).mean() > 0.97


def test_neighbouring_slices_resemble_each_other_more_than_other_patients(small):
    pictures = small.images[:, 0].reshape(400, -1).astype(np.float64)
    near = np.abs(pictures[1:] - pictures[:-1]).mean(1)
    same = small.groups[1:] == small.groups[:-1]
    assert near[same].mean() < 0.6 * near[~same].mean()


def test_lesions_change_the_labelled_slices_only_and_texture_more_than_brightness():
    kinds, _ = phantoms._deal(17, np.random.default_rng(0))
    for patient in range(17):
        scene = phantoms._Scene(9, 64, np.random.default_rng((0, patient)))
        scene.draw_anatomy()
        before = scene.hu.copy()
        labels = scene.draw_lesions(kinds[patient])
        change = scene.hu - before
        touched = np.abs(change) > 20
        assert (touched.any((1, 2)) == (labels > 0)).all() and set(labels) <= {0, kinds[patient]}
        if kinds[patient]:
            assert (labels > 0).sum() >= 4
            assert 150 < touched[labels > 0].sum((1, 2)).mean() < 1200        # of 4096 pixels
            assert np.abs(change[labels > 0].mean()) < 50                   # of the whole picture: windows differ more


def test_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="size from 32 up"):
        phantoms.make(count=10, size=16)
