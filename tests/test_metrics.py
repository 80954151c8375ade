"""Metrics against trusted implementations (golden), naive counting and cases with a known answer."""
from pathlib import Path

import numpy as np
import pytest
import torch

from medssl.common import metrics

GOLD = dict(np.load(Path(__file__).parent / "golden" / "metrics.npz"))


def close(value, golden):
    np.testing.assert_allclose(value, GOLD[golden], rtol=1e-8, atol=1e-10)


def random(seed=0):
    return np.random.default_rng(seed)


def test_two_classes():
    labels, scores = GOLD["binary_labels"], GOLD["binary_scores"]
    for form in (scores, np.stack([1 - scores, scores], 1), torch.tensor(scores)[:, None]):
        close(metrics.auc(torch.tensor(labels), form), "binary_auc")
        close(metrics.average_precision(labels, form), "binary_average_precision")


def test_many_classes():
    labels, scores, predictions = GOLD["multi_labels"], GOLD["multi_scores"], GOLD["multi_predictions"]
    close(metrics.auc(labels, scores), "multi_auc_ovr_macro")
    close(metrics.one_vs_rest(metrics.pair_order, labels, scores), "multi_auc_per_class")
    close(metrics.average_precision(labels, scores), "multi_average_precision_macro")
    close(metrics.accuracy(labels, predictions), "multi_accuracy")
    close(metrics.confusion(labels, predictions, 4), "multi_confusion")
    for case, guess in (("multi", predictions), ("never", GOLD["never_predictions"])):
        close(metrics.balanced_accuracy(labels, guess), f"{case}_balanced_accuracy")
        close(metrics.macro_f1(labels, guess), f"{case}_macro_f1")
        close(metrics.quadratic_kappa(labels, guess), f"{case}_quadratic_kappa")


def test_auc_is_pair_counting():
    labels, scores = random(1).integers(0, 2, 60), random(2).integers(0, 6, 60) / 5
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    assert metrics.auc(labels, scores) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert metrics.auc(labels, np.zeros(60)) == pytest.approx(0.5)
    assert metrics.average_precision(labels, np.zeros(60)) == pytest.approx(labels.mean())
    assert [metrics.auc(labels, labels), metrics.average_precision(labels, labels)] == pytest.approx([1, 1])


def test_absent_classes_are_left_out():
    labels, scores = GOLD["multi_labels"], GOLD["multi_scores"]
    keep = labels != 2
    for score, function in ((metrics.pair_order, metrics.auc), (metrics.precision_area, metrics.average_precision)):
        each = metrics.one_vs_rest(score, labels[keep], scores[keep])
        assert np.isnan(each).tolist() == [False, False, True, False]
        assert function(labels[keep], scores[keep]) == pytest.approx(each[[0, 1, 3]].mean())
        assert np.isnan(function(np.ones(5), np.arange(5)))                 # a class alone
        assert np.isnan(function(np.array([0, 1]), np.array([0.1, np.nan])))
    assert np.array_equal(metrics.recalls([0, 0, 2], [0, 1, 2], 4), [0.5, np.nan, 1, np.nan], equal_nan=True)
    assert metrics.balanced_accuracy([0, 0, 2], [0, 1, 2]) == pytest.approx(0.75)
    assert np.isnan(metrics.quadratic_kappa([1, 1], [1, 1])) and np.isnan(metrics.accuracy([], []))
    assert metrics.quadratic_kappa([0, 3, 0], [0, 3, 3]) == pytest.approx(0.4)          # unused grades keep their place
    assert metrics.confusion([0, 2], [1, 1]).tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0]]
    with pytest.raises(ValueError, match="from 0 to 1"):
        metrics.confusion([0, 1], [0, 2], 2)
    with pytest.raises(ValueError, match="3 labels and 2 predictions"):
        metrics.confusion([0, 1, 1], [0, 1])


@pytest.mark.parametrize("case", ["present", "absent", "spurious"])
def test_masks(case):
    target, prediction = GOLD[f"mask_{case}_target"], GOLD[f"mask_{case}_prediction"]
    both, predicted, true = metrics.overlap(prediction, target, 3)
    close(both, f"mask_{case}_intersection")
    close(predicted, f"mask_{case}_prediction_count")
    close(true, f"mask_{case}_target_count")
    defined = GOLD[f"mask_{case}_defined"]
    for function, name in ((metrics.dice, "dice"), (metrics.iou, "iou")):
        value = function(torch.tensor(prediction), target.astype(np.uint8), 3)
        np.testing.assert_allclose(value, np.where(defined, GOLD[f"mask_{case}_{name}"], np.nan), rtol=1e-8)
    unknown = np.where(np.arange(target.size).reshape(target.shape) % 3 == 0, 255, target)
    assert metrics.overlap(prediction, unknown, 3)[2].sum() == (unknown != 255).sum()


def test_dice_and_iou_of_counts():
    """Counts of any shape, here (3 slices, 4 classes) and their sums, against sets of pixels."""
    target, prediction = random(3).integers(0, 3, (3, 6, 5)), random(4).integers(0, 3, (3, 6, 5))
    target[0][target[0] == 1] = prediction[0][prediction[0] == 1] = 0       # class 1 is in neither mask of slice 0
    target[1][target[1] == 2] = 0                                           # class 2 is in one mask only; 3 is nowhere

    def naive(slices, c):
        mine, true = ({(i, y, x) for i in slices for y in range(6) for x in range(5) if masks[i, y, x] == c}
                      for masks in (prediction, target))
        both, either = len(mine & true), len(mine | true)
        return (2 * both / (len(mine) + len(true)), both / either) if either else (np.nan, np.nan)

    counts = np.array([metrics.overlap(p, t, 4) for p, t in zip(prediction, target, strict=True)])          # (3, 3, 4)
    each = np.array([[naive([i], c) for c in range(4)] for i in range(3)])                                  # (3, 4, 2)
    whole = np.array([naive(range(3), c) for c in range(4)])                                                # (4, 2)
    assert np.isnan(each[0, 1]).all() and (each[1, 2] == 0).all() and np.isnan(each[:, 3]).all()
    for i, (of, function) in enumerate(((metrics.dice_of, metrics.dice), (metrics.iou_of, metrics.iou))):
        np.testing.assert_allclose(of(*counts.swapaxes(0, 1)), each[..., i], rtol=1e-12)
        np.testing.assert_allclose(of(*counts.sum(0)), whole[:, i], rtol=1e-12)
        np.testing.assert_allclose(function(prediction, target, 4), whole[:, i], rtol=1e-12)


def test_features():
    features = torch.tensor(GOLD["features"])
    close(metrics.rank_me(features), "rank_me")
    close(metrics.rank_me(features - features.double().mean(0)), "rank_me_centred")
    close(metrics.eigenvalues(features), "eigenvalues")
    close(metrics.spectrum(features), "spectrum_normalised")
    close(metrics.alpha_req(features), "alpha_req")
    close(metrics.rank_me(np.diag(GOLD["example_singular_values"])), "example_rank_me")
    noise = random().standard_normal((200, 120))
    axes = np.linalg.qr(noise - noise.mean(0))[0]                           # centred orthonormal columns
    close(metrics.alpha_req(axes * np.sqrt(199 * GOLD["example_eigenvalues"])), "example_alpha")


def test_collapse_is_seen():
    healthy = random().standard_normal((256, 64))
    point = np.ones((256, 64)) + 1e-6 * healthy
    line = np.outer(healthy[:, 0], np.ones(64))
    assert metrics.spread(healthy) == pytest.approx(1, abs=0.02) and metrics.spread(point) < 1e-4
    assert metrics.rank_me(healthy) > 55 and metrics.rank_me(line) == pytest.approx(1, abs=0.01)
    assert metrics.rank_me(np.eye(12, 30)) == pytest.approx(12, abs=1e-3)   # N rows, more features: N at most
    assert metrics.spectrum(line)[1] < 1e-12 and np.isnan(metrics.alpha_req(line))
    broken = np.full((8, 4), np.nan)
    for function in (metrics.rank_me, metrics.alpha_req, metrics.spread, metrics.spectrum):
        assert np.isnan(function(broken)).all()
    assert metrics.array(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)).dtype == np.float32


def interval(*words, **more):
    return metrics.ends(metrics.draws(*words, **more))


def test_bootstrap_covers():
    patients, hits = np.repeat(np.arange(40), 5), {"patients": 0, "images": 0}          # a patient's images are alike
    for trial in range(60):
        values = np.repeat(random(trial).standard_normal(40), 5)
        for name, groups in (("patients", patients), ("images", np.arange(200))):
            low, high = interval(lambda rows, values=values: values[rows].mean(), groups, 80, trial)
            hits[name] += bool(low < 0 < high)
    assert 50 <= hits["patients"] <= 59 and hits["images"] < 42


def test_bootstrap_groups():
    groups, values = np.array([7, 3, 7, 3, 9]), np.array([1.0, 2, 3, 4, 5])
    seen = []
    low, high = interval(lambda rows: seen.append(sorted(rows)) or [values[rows].mean(), np.nan], groups, 50)
    assert low.shape == high.shape == (2,) and low[0] < high[0] and np.isnan([low[1], high[1]]).all()
    assert all(rows.count(0) == rows.count(2) and rows.count(1) == rows.count(3) for rows in seen)
    assert interval(lambda rows: values[rows].mean(), groups, 50) == (low[0], high[0])                # seeded
    assert np.isnan(interval(lambda rows: 1.0, np.zeros(5), 10)).all()


def test_draws_and_their_ends():
    """Against a loop over patients and rows; the interval is that of the bootstrap to the last digit."""
    groups, values = random(0).integers(0, 7, 30), random(1).standard_normal(30)

    def function(rows):
        return [values[rows].mean(), np.nan if 0 in rows else values[rows].max()]

    found, generator = metrics.draws(function, groups, 60, seed=5), random(5)
    assert found.shape == (60, 2)
    for draw in found:
        rows = [row for patient in generator.integers(7, size=7) for row in range(30) if groups[row] == patient]
        np.testing.assert_array_equal(draw, function(np.array(rows)))
    low, high = metrics.ends(found)
    for column in range(2):
        kept = sorted(found[~np.isnan(found[:, column]), column])
        assert 0 < len(kept) <= 60
        for end, share in ((low, 0.025), (high, 0.975)):
            place = share * (len(kept) - 1)                                 # between two draws: in proportion
            left, right = kept[int(place)], kept[min(int(place) + 1, len(kept) - 1)]
            assert end[column] == pytest.approx(left + (place - int(place)) * (right - left), rel=1e-12)
    assert np.array_equal((low, high), interval(function, groups, 60, seed=5))
    assert metrics.draws(lambda rows: 1.0, np.zeros(5), 10).shape == (10,) and metrics.ends(np.ones(9)) == (1.0, 1.0)
    assert np.isnan(metrics.draws(lambda rows: 1, np.zeros(5), 10)).all()
    share = (metrics.draws(lambda rows: values[rows].mean(), groups, 400) <= 0).mean()     # that a gain is not positive
    assert 0.05 < share < 0.95


def test_mean_interval():
    mean, half = metrics.mean_interval([0.80, 0.84, 0.82, np.nan])
    assert mean == pytest.approx(0.82) and half == pytest.approx(4.303 * 0.02 / np.sqrt(3))
    assert metrics.t_quantile(11) == pytest.approx(2.20099, abs=2e-4)
    assert metrics.t_quantile(60) == pytest.approx(2.0003, abs=1e-4)
    assert metrics.mean_interval([0.5])[0] == 0.5 and np.isnan(metrics.mean_interval([0.5])[1])
    assert np.isnan(metrics.mean_interval([])).all()
