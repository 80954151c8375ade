"""Read-outs against brute force and cases done by hand: kNN, the linear probe, losses, freezing, selection, and the
rows that may be learned from."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import evaluate
from medssl.common import augment, loop, metrics
from medssl.common.data import Dataset
from medssl.common.errors import UserError
from medssl.common.evaluation import readouts, scores, subsets, tasks
from medssl.common.evaluation.study import Model, Study
from medssl.common.features import extract, knn, set_statistics
from tests.common import batch, tiny_encoder


def pictures(count=24, seed=0):
    """Gray pictures of two classes, dark and bright, with the bright half as mask."""
    labels = np.arange(count) % 2
    images = (batch(count, 1, 32, seed).numpy() * 100 + 120 * labels[:, None, None, None]).astype(np.uint8)
    masks = np.zeros((count, 32, 32), np.uint8)
    masks[:, :, 16:] = 1
    images[:, 0, :, 16:] //= 2
    return Dataset("pictures", images, labels.astype(np.int64), ("dark", "bright"), masks)


def config(**words):
    return loop.Config(**{"steps": 4, "batch": 8, "lr": 1e-2, "optimizer": "adamw", "device": "cpu", **words})


# ---- frozen features

def test_knn_is_brute_force():
    generator = torch.Generator().manual_seed(0)
    known, asked = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (30, 7))
    labels = torch.randint(4, (30,), generator=generator).numpy()
    shares = knn(known, labels, asked, k=9, temperature=0.2)
    for row, share in zip(asked, shares):
        similar = sorted(((torch.dot(row, x) / row.norm() / x.norm()).item(), c) for x, c in zip(known, labels))[-9:]
        votes = [sum(math.exp(s / 0.2) for s, c in similar if c == kind) for kind in range(4)]
        np.testing.assert_allclose(share, np.array(votes) / sum(votes), rtol=1e-10)
    assert knn(known[:3], labels[:3], asked).sum(1) == pytest.approx(1)                             # fewer than k


def test_logistic_regression_by_hand():
    """Two points at -1 and 1: the weight difference d solves l2 d = 2 sigmoid(-d); and every solution has no gradient
    left."""
    x, y = torch.tensor([[-1.0], [1.0]], dtype=torch.float64), torch.tensor([0, 1])
    weights = readouts.logistic(x, y, 2, 0.3)
    gap = (weights[0, 1] - weights[0, 0]).item()
    assert 0.3 * gap == pytest.approx(2 / (1 + math.exp(gap)), abs=1e-4) and weights[1].abs().max() < 1e-4
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.randint(3, (40,), generator=generator)
    weights = readouts.logistic(x, y, 3, 0.05)
    wrong = (readouts.affine(x, weights).softmax(1) - nn.functional.one_hot(y, 3)) / 40
    torch.testing.assert_close(x.T @ wrong + 0.05 * weights[:-1], torch.zeros(3, 3, dtype=torch.float64), atol=1e-5,
                               rtol=0)
    assert wrong.sum(0).abs().max() < 1e-5
    # a weight is a repetition
    doubled = readouts.logistic(torch.cat([x, x[y == 2]]), torch.cat([y, y[y == 2]]), 3, 0.05)
    weighted = readouts.logistic(x, y, 3, 0.05, torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    torch.testing.assert_close(weighted, doubled, atol=1e-4, rtol=0)


def test_linear_probe_chooses_on_validation(monkeypatch):
    """One feature tells the classes, 40 are noise that 40 training images can be learnt by heart with: a weak penalty
    overfits."""
    labels, train, val, test = np.arange(1040) % 2, np.arange(40), np.arange(40, 540), np.arange(540, 1040)
    features = torch.randn(1040, 41, generator=torch.Generator().manual_seed(0))
    features[:, 0] += 2.0 * torch.tensor(labels)
    features = torch.cat([features, torch.full((1040, 1), 7.0)], 1)         # a constant feature does no harm
    predict, chosen = readouts.linear_probe(features, labels, train, val, 2)
    assert metrics.balanced_accuracy(labels[val], predict(val).argmax(1)) == pytest.approx(chosen["validation"])
    found = []
    for l2 in readouts.L2_GRID:
        monkeypatch.setattr(readouts, "L2_GRID", (l2,))
        weakest, alone = readouts.linear_probe(features, labels, train, val, 2)
        found.append(alone["validation"])
    assert found[-1] + 0.005 < chosen["validation"] == pytest.approx(max(found), abs=0.005)
    ours, theirs = (metrics.balanced_accuracy(labels[test], each(test).argmax(1)) for each in (predict, weakest))
    assert ours > theirs


def test_extraction_changes_nothing():
    encoder, data = tiny_encoder().train(), pictures()
    before = readouts.fingerprint(encoder)
    features = extract(encoder, data.images, np.arange(24), torch.device("cpu"), size=10)
    assert encoder.training and readouts.fingerprint(encoder) == before and features.shape == (24, encoder.dim)
    whole = extract(encoder, data.images, np.arange(24), torch.device("cpu"))
    # in evaluation mode the batch does not matter
    torch.testing.assert_close(features, whole)
    encoder.bn1.running_mean += 1e-3
    assert readouts.fingerprint(encoder) != before


# ---- losses

def test_losses_by_hand():
    """Two pixels, three classes, class 2 absent: shares (0.8, 0.1, 0.1) for truth 0 and (0.3, 0.6, 0.1) for truth 1."""
    shares = torch.tensor([[[0.8, 0.3], [0.1, 0.6], [0.1, 0.1]]], dtype=torch.float64)
    targets, weights = torch.tensor([[0, 1]]), torch.tensor([1.0, 3.0, 9.0]).double()
    dice = (2 * 0.8 / (1.1 + 1) + 2 * 0.6 / (0.7 + 1)) / 2
    entropy, weighted = -(math.log(0.8) + math.log(0.6)) / 2, -(math.log(0.8) + 3 * math.log(0.6)) / 4
    for name, words, expected in (("dice", [], 1 - dice + entropy), ("dice", [weights], 1 - dice + weighted),
                                  ("ce", [], entropy), ("balanced", [weights], weighted)):
        assert readouts.LOSSES[name](shares.log(), targets, *words).item() == pytest.approx(expected)
    # 30 * 2/3 = 10 * 2
    assert readouts.balanced_weights([30, 10, 0]).tolist() == pytest.approx([40 / 60, 2, 0])


def test_grades_by_hand():
    """Square distance to the grade; the nearest grade is the answer, so thresholds lie at .5, 1.5, ..."""
    encoder = nn.Identity()
    encoder.dim = 1
    method = readouts.Grader(encoder, None, 4)
    assert method.head.bias.item() == 1.5
    method.head.weight.data.fill_(1)
    method.head.bias.data.zero_()
    outputs = torch.tensor([[-3.0], [0.4], [0.6], [1.4], [2.6], [7.0]])
    assert method.answer(outputs).argmax(1).tolist() == [0, 0, 1, 1, 3, 3]
    assert method(outputs[1:3], torch.tensor([2, 0]))["loss"].item() == pytest.approx((1.6 ** 2 + 0.6 ** 2) / 2)


def test_masks_take_the_way_of_the_images():
    images = (torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    method = readouts.Segmenter(tiny_encoder(), augment.build("S2", 16), nn.Identity(), 2)
    torch.manual_seed(3)
    x, y = method.views(images, images[:, 0].byte())
    # quarter turns only: exact
    assert torch.equal((x[:, 0] > 0.5).long(), y) and not torch.equal(x, images)


def test_a_decoder_larger_than_the_image_is_cut():
    """Cell i looks at pixel i * stride, so that what stands beyond the image goes; what is smaller is enlarged."""
    encoder, x = nn.Identity(), torch.zeros(1, 1, 10, 10)
    encoder.features = lambda x: maps
    method = readouts.Segmenter(encoder, None, nn.Identity(), 2)
    maps = torch.arange(12.0).expand(1, 2, 12, 12)                          # each column its number
    torch.testing.assert_close(method.logits(x), maps[..., :10, :10])
    maps = torch.tensor([[[[0.0, 10.0]] * 2] * 2])                          # (1, 2, 2, 2)
    enlarged = method.logits(x)
    assert enlarged.shape == (1, 2, 10, 10) and enlarged[0, 0, 0, 4].item() == pytest.approx(4)


# ---- training

def tune(method, score, settings, **words):
    """On all pictures."""
    return readouts.tune(method, pictures(), np.arange(24), score, readouts.Training(settings, **words))


def segmenter(encoder, views, *words):
    return readouts.Segmenter(encoder, views, readouts.LinearHead(encoder.widths, encoder.strides, 2), 2, *words)


def test_a_frozen_encoder_stays_as_it_is():
    encoder, views, modes = tiny_encoder(), augment.build("S1", 32), []
    encoder.register_forward_hook(lambda module, *_: modes.append(module.bn1.training))
    for method in (readouts.Classifier(encoder, views, 2), segmenter(encoder, views)):
        before, head = readouts.fingerprint(encoder), readouts.fingerprint(method.head)
        tune(method, lambda m: 0.0, config(), look=2, frozen_steps=4)
        assert readouts.fingerprint(encoder) == before and readouts.fingerprint(method.head) != head
        assert not any(p.requires_grad for p in encoder.parameters()) and not any(m.training for m in encoder.modules())
    assert modes and not any(modes)
    readouts.release(encoder)
    assert encoder.train().bn1.training and all(p.requires_grad for p in encoder.parameters())


def test_freeze_then_release_is_two_fits(monkeypatch):
    fits, original = [], loop.fit

    def fit(method, dataset, part, rows, weights, groups):
        assert weights is drawn
        fits.append((part.steps, part.seed, method.encoder.conv1.weight.requires_grad,
                     {group["lr_scale"] for group in groups}))
        return original(method, dataset, part, rows, weights, groups)
    monkeypatch.setattr(loop, "fit", fit)
    method = readouts.Classifier(tiny_encoder(), augment.build("S1", 32), 2)
    before, drawn = readouts.fingerprint(method.encoder), np.linspace(1, 2, 24)
    curve = tune(method, lambda m: 0.0, config(steps=5, seed=7), look=2, frozen_steps=2, weights=drawn, head_rate=10.0)
    assert [step for step, _ in curve] == [0, 2, 4, 5]
    assert fits == [(2, 14, False, {10.0}), (3, 15, True, {1.0, 10.0})]
    assert readouts.fingerprint(method.encoder) == before                   # the best score came while all was frozen


def test_the_best_weights_on_validation_remain():
    found, states = [0.9, 0.2, 0.7, 0.7, 0.1], []
    method = readouts.Classifier(tiny_encoder(), augment.build("S0", 32), 2)
    curve = tune(method, lambda method: states.append(readouts.fingerprint(method)) or found[len(states) - 1],
                 config(), look=1)
    assert curve == [*enumerate(found)] and len(set(states)) == 5
    # the first of the best; not the untrained, which is no result
    assert readouts.fingerprint(method) == states[2]
    assert scores.steps_to(curve[1:], 0.7) == 2 and math.isnan(scores.steps_to(curve, 1.0))


def test_an_interrupted_fit_is_not_a_result(monkeypatch):
    original = loop.fit
    monkeypatch.setattr(loop, "fit", lambda *args: (record for _, record in zip(range(2), original(*args))))
    with pytest.raises(KeyboardInterrupt):
        tune(readouts.Classifier(tiny_encoder(), augment.build("S0", 32), 2), lambda m: 0.0, config(), look=1)


# ---- scores

def test_mask_scores_by_hand():
    """Patient 0: two slices, class 1 found to a half in the first and absent in the second; patient 1: class 1 missed,
    class 2 invented."""
    masks, predictions = np.zeros((2, 3, 2, 2), np.uint8)
    masks[0], predictions[0] = [[1, 1], [0, 0]], [[1, 0], [0, 0]]
    predictions[1] = [[0, 0], [0, 1]]
    masks[2], predictions[2] = [[1, 0], [0, 0]], [[0, 0], [2, 2]]
    counts = scores.pixel_counts(predictions, masks, 3)
    scored, single = scores.mask_scores(counts, ("0", "1", "2"), np.array([5, 5, 9])), scores.slice_dice(counts)
    found, again = scored.scores, scored.again
    assert found["dice 1"] == pytest.approx((2 * 1 / (2 + 2) + 0) / 2) and found["dice 2"] == 0
    assert found["dice_per_slice 1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["iou 1"] == pytest.approx((1 / 3) / 2)
    assert found["dice"] == pytest.approx((0.25 + 0) / 2)                  # background is not in the mean
    assert scored.units.tolist() == [0, 1] and again(np.arange(2)) == pytest.approx([found["dice"], found["iou"]])
    # class 2 is nowhere: left out
    assert single[2] == 0 and np.isnan(scores.slice_dice(counts[:, :, :1])).all()
    assert again(np.array([0, 0])) == pytest.approx([0.5, 1 / 3])


# ---- rows

def test_subsets_are_nested_stratified_and_by_patient():
    generator = np.random.default_rng(0)
    groups = generator.integers(60, size=600)
    labels = np.where(generator.random(60) < 0.8, 0, 1)[groups]             # a patient has one class
    rows = np.arange(1000, 1600)
    order = subsets.in_order(rows, groups, labels, seed=3)
    assert sorted(order) == rows.tolist()
    parts = [subsets.prefix(order, groups[order - 1000], amount) - 1000
             for amount in ("7n", "0.1", "0.25", "0.5", "1.0")]
    assert len(parts[0]) == 7 and len(parts[-1]) == 600
    assert all(set(small) < set(large) for small, large in zip(parts, parts[1:]))
    for share, part in zip((0.1, 0.25, 0.5), parts[1:]):
        assert abs(len(part) - 600 * share) <= 8                            # half a patient
        assert set(np.flatnonzero(np.isin(groups, groups[part]))) == set(part)
        assert abs(labels[part].mean() - labels.mean()) < 0.1

    with pytest.raises(ValueError, match="--labels 601n"):
        subsets.prefix(order, groups[order - 1000], "601n")


def test_the_rare_class_is_made_rarer():
    """The others vary and the rare class stays, along a series that goes up to 1 : 10."""
    labels = np.repeat([0, 1, 2], [300, 200, 100])
    target = subsets.Target(labels, tuple("abc"), labels, np.arange(600) // 3, {"train": np.arange(600)})
    drawn = [target.training("1.0", ratio and subsets.Imbalance(ratio, 10), 0) for ratio in (1, 2, 10, None)]
    assert all(set(a) < set(b) for a, b in zip(drawn, drawn[1:]))
    counts = [np.bincount(labels[rows]).tolist() for rows in drawn]
    assert counts == [[20, 20, 20], [40, 40, 20], [200, 200, 20], [300, 200, 100]]
    few = target.training("0.2", subsets.Imbalance(10, 10), 0)
    assert set(target.training("0.2", None, 0)) != set(target.training("0.2", None, 1))
    assert set(few) < set(drawn[2]) and abs(len(few) - 84) <= 3
    with pytest.raises(UserError, match="--imbalance 300"):
        target.training("1.0", subsets.Imbalance(1, 300), 0)


def test_class_weights_reach_the_losses():
    weights, images, labels = torch.tensor([1.0, 5.0]), batch(6, 1, 32), torch.tensor([0, 1, 1, 0, 0, 0])
    masks = torch.zeros(6, 32, 32).long()
    masks[:, :, 16:] = 1
    for method, truth in ((readouts.Classifier(tiny_encoder(), None, 2, weights), labels),
                          (segmenter(tiny_encoder(), None, "ce", weights), masks)):
        method.eval()
        torch.testing.assert_close(method(images, truth)["loss"],
                                   F.cross_entropy(method.logits(images), truth, weights))


def test_validation_patients_taken_from_training_are_not_learned_from():
    groups, splits = np.arange(80) // 4, np.repeat(["train", "test"], [60, 20])
    data = Dataset("", np.zeros((80, 1, 2, 2), np.uint8), np.arange(80) % 2, ("a", "b"), groups=groups, splits=splits)
    rows = subsets.find_target(data, groups, "labels", lambda line: None).rows
    assert len(rows["val"]) == 8 and sorted([*rows["train"], *rows["val"]]) == list(range(60))
    assert not set(groups[rows["train"]]) & set(groups[rows["val"]])


def test_statistics_are_those_of_the_images():
    """After the pass each BatchNorm's input has mean 0 and variance 1 where the images are one batch; weights and modes
    stay."""
    encoder, data = tiny_encoder().eval(), pictures()
    weights = copy.deepcopy(encoder)
    set_statistics(encoder, data.images, np.arange(24), torch.device("cpu"))
    x = torch.from_numpy(data.images).float() / 255
    first = encoder.conv1((x - encoder.shift) / encoder.scale)
    torch.testing.assert_close(encoder.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.bn1.running_var, first.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, weights.parameters(), encoder.parameters()))
    assert not encoder.training and encoder.bn1.momentum == 0.1
    set_statistics(encoder, 255 - data.images, np.arange(24), torch.device("cpu"))          # leave nothing behind
    set_statistics(encoder, data.images, np.arange(24), torch.device("cpu"), size=8)        # of all three batches
    torch.testing.assert_close(encoder.bn1.running_mean, first.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


# ---- scores by patient, and what a difference is worth

def test_scores_by_patient_by_hand():
    """Three patients: two of class 0 (one is right in the mean although one of its images is wrong), one of class 1."""
    labels, groups = np.array([0, 0, 0, 1, 1]), np.array([7, 7, 9, 4, 4])
    shares = np.array([[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.6, 0.4], [0.1, 0.9]])
    own, pooled = scores.by_patient(labels, shares, ("a", "b"), groups)
    assert own.tolist() == [1, 0, 0]                                                                        # 4, 7, 9
    np.testing.assert_allclose(pooled[:, 1], [0.65, 0.35, 0.7])
    for per_patient, expected, units in ((False, (1 / 3 + 1 / 2) / 2, groups), (True, (1 / 2 + 1) / 2, range(3))):
        target = subsets.Target(labels, ("a", "b"), labels, groups, {"test": np.arange(5)}, per_patient)
        scored = scores.SHARES.score(shares, target)
        assert scored.scores["balanced_accuracy"] == pytest.approx(expected)
        assert scored.units.tolist() == list(units) and scored.heads == ("balanced_accuracy", "auc")
        assert scored.again(np.arange(len(units))).tolist() == pytest.approx([scored.scores[h] for h in scored.heads])
    assert scored.scores["auc"] == pytest.approx(1 / 2)                     # above 7, below 9
    with pytest.raises(UserError, match="patient 7 has images of class a and of class b; .* as 2 have"):
        scores.by_patient(np.array([0, 1, 0, 1, 0]), shares, ("a", "b"), groups)


def test_what_a_gain_is_worth():
    drawn = np.random.default_rng(0).normal(0.02, 0.02, 1000)
    found = scores.gain([0.03, 0.02, -0.01], drawn, 50)
    assert found.mean == pytest.approx(0.04 / 3) and found.seeds == 3 and not found.settled
    assert scores.gain([0.1, 0.1, 0.1], np.full(10, 0.1) + np.arange(10) / 1e4, 50).settled
    assert not scores.gain([0.1, 0.1], np.full(10, np.nan), 1).settled


def simulate(effect, repeats, seeds=3, patients=40):
    """Share of comparisons that are called settled: the gain of each patient and of each seed varies about the
    effect."""
    generator, settled = np.random.default_rng(0), 0
    for _ in range(repeats):
        # (patients, seeds)
        by_patient = generator.normal(effect, 0.2, patients)[:, None] + generator.normal(0, 0.02, seeds)
        picks = generator.integers(patients, size=(200, patients))
        settled += scores.gain(by_patient.mean(0), by_patient.mean(1)[picks].mean(1), patients).settled
    return settled / repeats


def test_settled_is_seldom_wrong_and_often_found():
    """No effect: at most 5 % of 1,000 comparisons. An effect of four standard errors: most of them."""
    assert simulate(0.0, 1000) <= 0.05
    assert simulate(4 * math.sqrt(0.2 ** 2 / 40 + 0.02 ** 2 / 3), 300) > 0.8


def test_neighbours_are_so_few_that_a_small_class_can_win(monkeypatch):
    labels = np.array([0] * 30 + [1] * 3 + [0, 1])
    rows = {"train": np.arange(33), "val": np.arange(0), "test": np.arange(33, 35)}
    target = subsets.Target(labels, ("a", "b"), labels, np.arange(35), rows)
    asked, note = [], "knn: 5 neighbours, as the smallest class has 3 training images in some cells"
    monkeypatch.setattr(tasks, "knn", lambda *words: asked.append(words[3]) or knn(*words))
    for neighbours, notes in ((20, [note]), (4, [])):
        args = evaluate.parse(["--neighbours", str(neighbours)])
        study = Study(args, None, torch.device("cpu"), [], np.arange(35), targets={"labels": target},
                      kept={("random", None): (torch.ones(35, 3), "")})
        tasks.record_of(study, tasks.Cell("knn", "1.0"), Model("random", "tiny", "default"), 0)
        assert study.notes == notes
    assert asked == [5, 4]


def test_a_small_class_is_not_drowned(monkeypatch):
    """A network that knows nothing, and a class on 2 % of the pixels: what its own pixels say for it, as a share of
    what all others say against it, is twice what it is with all pixels alike."""
    masks = np.zeros((4, 32, 32), np.uint8)
    masks[:, :5, :4] = 1
    target = subsets.Target(masks, ("0", "1"), np.zeros(4, int), np.arange(4), {"train": np.arange(4)})
    study = Study(evaluate.parse([]), None, None, [], None)
    monkeypatch.setattr(tasks, "trained", lambda fit, build: build(tiny_encoder(), None))
    method = tasks.by_unet(tasks.Fit(study, tasks.Cell("unet"), Model("random"), 0, target, np.arange(4)))
    truth = torch.from_numpy(masks).long()

    def share(weights):
        logits = torch.zeros(4, 2, 32, 32, requires_grad=True)
        method.loss(logits, truth, weights).backward()
        return (-logits.grad[:, 1][truth == 1].sum() / logits.grad[:, 1][truth == 0].sum()).item()
    assert share(method.class_weights) > 2 * share(None)
