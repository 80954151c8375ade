"""Autoencoder, Genesis, PCRL and the U-Net decoder: what is distorted, what is left alone, and where gradients go."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl import METHODS, genesis
from medssl.autoencoder import Autoencoder, grey_error
from medssl.common import augment, config, unet
from medssl.genesis import Genesis, boxes, curve_map, even_error, in_paint, out_paint, shuffle_blocks
from medssl.pcrl import PCRL, transform, undo
from tests.common import batch, tiny_encoder
from tests.test_pretext import plain, ramp


def differs(a, b):
    """Which images of a and b (B, ...) are not the same: (B,) bool."""
    return (a != b).flatten(1).any(1)


def assert_share(hits, share):
    """The share of True among hits (N,) is this, within five standard deviations."""
    assert abs(hits.float().mean().item() - share) <= 5 * math.sqrt(share * (1 - share) / len(hits))


# ---- Genesis ---------------------------------------------------------------------------------------------------------

def test_genesis_leaves_the_target_alone_but_for_flips():
    torch.manual_seed(0)
    images = torch.rand(12, 2, 40, 40)
    original = images.clone()
    both = augment.Augment(40, flip=0.5, flip_vertical=0.5)
    distorted, target = Genesis(tiny_encoder(), both, None, 0.5).views(images)
    assert torch.equal(images, original)
    flips = torch.stack([images.flip(dims) for dims in ((), (2,), (3,), (2, 3))])
    which = ((target - flips).abs().amax((2, 3, 4)) < 1e-4).int()           # (4, 12)
    assert (which.sum(0) == 1).all() and (which.sum(1) > 0).all()
    assert distorted.shape == target.shape and distorted.min() >= 0 and distorted.max() <= 1

    nothing = Genesis(tiny_encoder(), plain, None, 0.5, shuffle=0, intensity=0, paint=0)
    assert all(torch.equal(view, images) for view in nothing.views(images))


def test_genesis_distorts_as_often_as_published():
    torch.manual_seed(1)
    images = torch.rand(800, 1, 20, 20) * 0.9 + 0.05
    shares = {"shuffle": 0.5, "intensity": 0.9, "paint": 0.9 * (0.8 + 0.2 * 0.95)}      # in-painting may draw no box
    for word, share in shares.items():
        others = dict.fromkeys(shares.keys() - {word}, 0)
        distorted, target = Genesis(tiny_encoder(), plain, None, 0.5, **others).views(images)
        assert torch.equal(target, images)
        assert_share(differs(distorted, target), share)
    assert_share(distorted[:, 0, 0, 0] != target[:, 0, 0, 0], 0.9 * 0.8)    # only out-painting reaches the corner


def test_genesis_distortions_follow_each_other(monkeypatch):
    for name, distort in (("local_shuffle", lambda x: x.flip(3)), ("bezier_map", lambda x: 1 - x),
                          ("in_paint", lambda x: x / 2), ("out_paint", lambda x: x / 2)):
        monkeypatch.setattr(genesis, name, distort)
    distorted, target = Genesis(tiny_encoder(), plain, None, 0.5, shuffle=1, intensity=1, paint=1).views(batch(4))
    assert torch.allclose(distorted, (1 - target.flip(3)) / 2) and torch.equal(target, batch(4))


def test_genesis_loss_and_what_it_is_compared_with():
    method = Genesis(tiny_encoder(), plain, unet.Decoder([8, 16, 32, 64], [4, 8, 16, 32], 1), 0.4).eval()
    distorted, target = batch(3), batch(3, seed=1)
    out = method(distorted, target)
    picture = (method.decoder(method.encoder.features(distorted)) + math.log(0.4 / 0.6)).sigmoid()
    assert torch.allclose(out["restored"], picture) and not out["restored"].requires_grad
    assert torch.allclose(out["loss"], (picture - target).square().mean())
    assert torch.allclose(out["identity"], (distorted - target).square().mean())
    assert torch.allclose(out["chance"], (target - target.mean()).square().mean())          # an image's mean is hidden
    alike = torch.rand(1, 3, 1, 1).expand(4, 3, 8, 8)                       # each channel its own grey
    assert even_error(alike) < 1e-12 < even_error(torch.cat([alike, 1 - alike]))


def test_any_curve_equals_a_plain_loop():
    torch.manual_seed(2)
    controls, falling = torch.rand(40, 2, 2, dtype=torch.float64), torch.arange(40) % 2 == 0
    controls[:4] = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)          # the most bent there is
    x = torch.linspace(0, 1, 1000, dtype=torch.float64).view(1, 1, 20, 50).repeat(40, 1, 1, 1)
    ours = curve_map(x, controls, falling)
    t = np.linspace(1, 0, 1000)                                             # from the far end, as published
    for (p1, p2), down, y, v in zip(controls.numpy(), falling, ours, x):
        cx, cy = (3 * t * (1 - t) ** 2 * p1[i] + 3 * t ** 2 * (1 - t) * p2[i] + t ** 3 for i in (0, 1))
        expected = np.interp(v.flatten().numpy(), np.sort(cx), cy if down else np.sort(cy))
        assert np.abs(y.flatten().numpy() - expected).max() < 1e-6


def test_half_of_the_curves_fall_and_each_image_has_its_own():
    torch.manual_seed(3)
    line = torch.linspace(0, 1, 64).view(1, 1, 8, 8).repeat(600, 3, 1, 1)
    y = genesis.bezier_map(line)
    flat = y[:, 0].flatten(1)                                               # (600, 64)
    assert_share(flat[:, 0] > flat[:, -1], 0.5)
    assert torch.equal(y[:, 0], y[:, 1]) and len(flat.unique(dim=0)) == 600


def test_shuffling_moves_pixels_within_blocks_only():
    torch.manual_seed(4)
    block = torch.arange(20).view(4, 5).repeat_interleave(3, 0).repeat_interleave(4, 1)     # (12, 20)  blocks of 3 x 4
    block = torch.stack([block, block.flip(1) * 7])
    images = torch.rand(2, 3, 12, 20)
    moved = shuffle_blocks(images, block)
    for before, after, blocks in zip(images, moved, block):
        for number in blocks.unique():
            inside = blocks == number
            a, b = before[:, inside], after[:, inside]                      # (3, pixels)
            order = (a[0][None] == b[0][:, None]).int().argmax(1)
            assert torch.equal(a[:, order], b) and not torch.equal(a, b)    # all channels alike
            assert order.sort().values.equal(torch.arange(len(order)))

    pairs = shuffle_blocks(torch.tensor([0.0, 1.0]).expand(2000, 1, 1, 2).contiguous(), torch.zeros(2000, 1, 2).long())
    assert_share(pairs[:, 0, 0, 0] == 1, 0.5)


def test_local_shuffle_moves_pixels_as_far_as_the_published_loop():
    """The last block over a pixel has width w with frequency w / (1 + ... + S); the value is from anywhere in it."""
    torch.manual_seed(5)
    images = ramp(300, 60)
    moved = genesis.local_shuffle(images)
    assert torch.equal(moved.flatten(2).sum(1).sort(1).values, images.flatten(2).sum(1).sort(1).values)
    assert differs(moved[1:], moved[:-1]).all()
    largest = 6
    widths = torch.arange(1, largest + 1)
    for axis in (0, 1):
        shift = (moved - images)[:, axis, 10:-10, 10:-10].abs()
        for k in range(largest):
            each = (1 if k == 0 else 2) * (widths - k).clamp(min=0) / widths ** 2
            expected = (each * widths / widths.sum()).sum().item()
            assert abs((shift == k).float().mean().item() - expected) < 0.015
    assert (moved - images).abs().max() == largest - 1


@pytest.mark.parametrize("paint,low,high", [(in_paint, 1 / 6, 1 / 3), (out_paint, 3 / 7, 4 / 7)])
def test_paint_is_noise_in_boxes_of_the_stated_sizes(paint, low, high):
    torch.manual_seed(7)
    images = torch.full((1500, 2, 42, 42), 5.0)
    painted = paint(images)
    noise = painted != 5
    assert (images == 5).all() and torch.equal(noise[:, 0], noise[:, 1])    # the same boxes in every channel
    values = painted[noise]
    assert values.min() >= 0 and values.max() <= 1
    assert abs(values.mean() - 0.5) < 0.01 and abs(values.var() - 1 / 12) < 0.01
    assert not torch.equal(painted[:, 0], painted[:, 1]) and differs(noise[1:], noise[:-1]).float().mean() > 0.99
    inside = (noise if paint is in_paint else ~noise)[:, 0]                 # (1500, 42, 42)  the boxes
    assert inside[:, 2:-2, 2:-2].sum() == inside.sum() and inside[:, 2].any() and inside[:, -3].any()
    assert_share(inside.flatten(1).any(1), 0.95 if paint is in_paint else 1)

    rows, columns = inside.any(2).sum(1), inside.any(1).sum(1)              # (1500,)
    single = (inside.sum((1, 2)) == rows * columns) & (rows > 0) & (rows * columns <= (high * 42) ** 2 + 1)
    sides = torch.cat([rows[single], columns[single]])                      # of one box, rarely of two side by side
    assert sides.min() == round(low * 42) and (sides > round(high * 42)).float().mean() < 0.03
    assert set(range(round(low * 42), round(high * 42) + 1)) <= set(sides.tolist())


def test_up_to_five_boxes():
    """Thin boxes hardly ever overlap: their number can be read from the area."""
    torch.manual_seed(8)
    images = torch.empty(1000, 1, 200, 40)
    for sure in (0, 1):
        expected = [0.0] * sure + [0.05 * 0.95 ** i for i in range(5 - sure)] + [0.95 ** (5 - sure)]
        area = boxes(images, 1 / 40, 1 / 40, sure).sum((1, 2, 3)) / 5       # sides 5 and 1
        share = torch.bincount(area.round().long(), minlength=6) / 1000
        assert len(share) == 6 and (share - torch.tensor(expected)).abs().max() < 0.05


# ---- the decoder, and the autoencoder --------------------------------------------------------------------------------

@pytest.mark.parametrize("stem,size", [("default", 64), ("default", 60), ("default", 33), ("nopool", 50),
                                       ("small", 30)])
@pytest.mark.parametrize("skips", [True, False])
def test_decoder_sizes(stem, size, skips):
    """What is larger than the image is cut at the far side: cell i looks at pixel i * stride."""
    encoder = tiny_encoder(2, stem)
    decoder = unet.Decoder(encoder.widths, encoder.strides, 2, skips=skips)
    full = math.ceil(size / encoder.strides[0]) * encoder.strides[0]
    images = batch(2, 2, 64)[..., :size, :size]
    raw = decoder(encoder.features(images))
    assert raw.shape == (2, 2, full, full)
    restored = Autoencoder(encoder, plain, decoder, (0.5, 0.5))(images)["restored"]
    torch.testing.assert_close(restored, raw[:, :, :size, :size].sigmoid())


@pytest.mark.parametrize("classes", [1, 7, 20])
def test_the_last_maps_are_enough_for_all_classes(classes):
    decoder = unet.Decoder([8, 16, 32, 64], [4, 8, 16, 32], classes)
    last = [stage.convs[0].out_channels for stage in decoder.last]
    assert len(last) == 2 and min(last) >= 2 * classes and decoder.out.in_channels == last[-1]


def test_autoencoder_restores_its_own_input():
    decoder = unet.Decoder([8, 16, 32, 64], [4, 8, 16, 32], 1)
    torch.manual_seed(0)
    method = Autoencoder(tiny_encoder(), augment.build("flips", 64), decoder, 0.4).eval()
    decoder.out.weight.data.mul_(1000)                                      # its picture is far from even
    x, = method.views(batch(4))
    out = method(x)
    assert torch.allclose(out["loss"], (out["restored"] - x).square().mean())
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "decoder", "level"}
    flat = torch.rand(4, 2, 1, 1).expand(4, 2, 8, 8)                        # each picture evenly, in a grey of its own
    assert grey_error(flat) < 1e-12 and torch.allclose(out["chance"], (x - x.mean((2, 3), True)).square().mean())


@pytest.mark.parametrize("kind", [Autoencoder, Genesis])
def test_the_first_picture_has_the_mean_of_the_images(kind):
    """Whatever it is: a decoder that says nothing paints it in every channel."""
    x = batch(2, 2)
    method = kind(tiny_encoder(2), plain, lambda maps: torch.zeros(2, 2, 64, 64), (0.1, 0.85))
    restored = method(*[x] * (1 + (kind is Genesis)))["restored"]
    assert torch.allclose(restored, torch.tensor([0.1, 0.85]).view(2, 1, 1).expand(2, 2, 64, 64))
    assert kind(tiny_encoder(), plain, None, (0.0,)).level.isfinite().all()


def test_the_first_pictures_of_pcrl_have_the_mean_of_the_images():
    """As train.py builds it."""
    encoder = tiny_encoder()
    encoder.mean = (0.4,)
    method = config.build(METHODS, config.parts_of(METHODS, ["pcrl"], ["queue_size=20"]), encoder, 1, 64)
    views = method.views(batch(4))
    out = method(*views)
    assert torch.allclose(out["restored"], torch.full_like(out["restored"], 0.4))
    for name, target in zip(("", "_key", "_mix"), views[2:5]):
        assert torch.allclose(out["restoration" + name], (target - 0.4).square().mean())


# ---- PCRL ------------------------------------------------------------------------------------------------------------

def pcrl_method(augment=plain, **words):
    torch.manual_seed(0)
    encoder = tiny_encoder()
    decoder = unet.Decoder(encoder.widths, encoder.strides, 1)
    return PCRL(encoder, augment, decoder, 0.4, **{"hidden": 32, "dim": 16, "queue_size": 20, **words})


def codes():
    """All sixteen control vectors (16, 6)."""
    number = torch.arange(16)
    return torch.cat([number[:, None] // torch.tensor([1, 2]) % 2, F.one_hot(number // 4, 4)], 1).float()


def test_control_vectors_say_what_was_done_and_can_be_undone():
    torch.manual_seed(0)
    images, code = torch.rand(16, 2, 9, 9), codes()
    moved = transform(images, code)
    assert torch.equal(undo(moved, code), images)
    for image, result, bits in zip(images, moved, code.int().tolist()):
        expected = image.flip([dim for dim, bit in ((2, bits[0]), (1, bits[1])) if bit])
        assert torch.equal(result, expected.rot90(bits[2:].index(1), (1, 2)))


def test_pcrl_views():
    torch.manual_seed(1)
    images = torch.rand(1200, 1, 12, 12)
    x1, x2, *targets, codes, alpha, order = pcrl_method().views(images)
    assert len(targets) == 3 and codes.shape == (1200, 3, 6)
    for target, code, other in zip(targets, codes.unbind(1), codes.roll(1, 1).unbind(1)):
        torch.testing.assert_close(undo(target, code), images)              # views and mixture are the image
        assert set(code.unique().tolist()) == {0.0, 1.0} and (code[:, 2:].sum(1) == 1).all()
        for bit, share in enumerate((0.5, 0.5, 0.25, 0.25, 0.25, 0.25)):
            assert_share(code[:, bit] > 0, share)
        assert_share((code == other).all(1), 1 / 16)                        # each picture is turned in its own way
    for x in (x1, x2):
        assert_share(differs(x, images), 0.9 * (0.8 + 0.2 * 0.95))          # in-painting may draw no box
    around = [x[:, 0, 0, 0] != images[:, 0, 0, 0] for x in (x1, x2)]        # only out-painting reaches the corner
    assert torch.equal(*around) and differs(x1, x2)[around[0]].all()        # one draw for both views, other noise
    assert_share(around[0], 0.9 * 0.8)
    assert alpha.min() >= 0.5 and alpha.max() <= 1 and abs(alpha.mean() - 0.75) < 0.03
    assert order.sort().values.equal(torch.arange(1200))


def test_pcrl_targets_are_its_views_before_painting_and_their_mixture():
    """By the alpha that mixes the features."""
    pictures = iter((batch(4), batch(4, seed=1)))
    x1, x2, *targets, codes, alpha, _ = pcrl_method(lambda images: next(pictures), paint=0).views(batch(4))
    a, b, mixture = (undo(x, code) for x, code in zip(targets, codes.unbind(1)))
    share = alpha.view(-1, 1, 1, 1)
    assert torch.equal(a, x1) and torch.equal(b, x2) and (x1 - x2).abs().max() > 0.1
    torch.testing.assert_close(mixture, share * a + (1 - share) * b)


def test_pcrl_terms_by_hand():
    method = pcrl_method().eval().double()                                  # one code moves a mean by little
    for p in (*method.key_encoder.parameters(), *method.key_projector.parameters()):
        p.mul_(1 + 0.5 * torch.rand_like(p))                                # no longer copies of the trained ones
    method.control[-1].weight.data.mul_(30)                                 # gates are far from a half
    x1, x2, *targets = (batch(4, seed=seed)[..., :62, :62].double() for seed in range(5))
    alpha = torch.tensor([0.5, 0.7, 0.9, 1.0]).double()
    some = torch.stack([codes()[[1, 6, 11, 12]], codes()[[3, 2, 7, 0]], codes()[[5, 9, 15, 4]]], 1).double()
    out = method(x1, x2, *targets, some, alpha, torch.tensor([2, 0, 3, 1]))
    share = alpha.view(-1, 1, 1, 1)
    new, old = method.encoder.features(x1), method.key_encoder.features(x2)
    mixed = [share * a + (1 - share) * b for a, b in zip(new, old)]
    pictures = []
    for name, maps, target, code in zip(("", "_key", "_mix"), (new, old, mixed), targets, some.unbind(1)):
        gate = torch.sigmoid(method.control(code))[:, :, None, None]
        pictures.append(method.level + method.decoder(maps[:-1] + [maps[-1] * gate])[..., :62, :62])  # no sigmoid
        torch.testing.assert_close(out["restoration" + name], (pictures[-1] - target).square().mean())
    pooled = [maps[-1].mean((2, 3)) for maps in (new, old, mixed)]
    q, k, m = (F.normalize(head(z), dim=1) for head, z in
               zip((method.projector, method.key_projector, method.projector), pooled))
    torch.testing.assert_close((out["keys"], out["mixed"]), (k, m))         # whatever the order they were encoded in
    assert not out["mixed"].requires_grad
    for name, key in (("contrast", k), ("contrast_mix", m)):
        logits = torch.cat([(q * key).sum(1, keepdim=True), q @ method.queue.T], 1) / 0.2
        torch.testing.assert_close(out[name], F.cross_entropy(logits, torch.zeros(4).long()))
    restorations = sum(out["restoration" + name] for name in ("", "_key", "_mix"))
    torch.testing.assert_close(out["loss"], (out["contrast"] + out["contrast_mix"]) / 2 + restorations / 3)
    greys = sum(t.var((2, 3), correction=0).mean() for t in targets) / 3
    torch.testing.assert_close(out["chance"], math.log(21) + greys)
    torch.testing.assert_close(transform(out["restored"], some[:, 0]), pictures[0].clamp(0, 1))


def test_where_the_gradients_of_the_terms_go():
    method = pcrl_method(augment.build("ct", 64))
    views = method.views(batch(6))
    reached = {"contrast": {"encoder", "projector"}, "contrast_mix": {"encoder", "projector"},
               "restoration": {"encoder", "decoder", "control"}, "restoration_key": {"decoder", "control"},
               "restoration_mix": {"encoder", "decoder", "control"}}
    for term, expected in reached.items():
        method.zero_grad()
        method(*views)[term].backward()
        assert {name.split(".")[0] for name, p in method.named_parameters()
                if p.grad is not None and p.grad.abs().max() > 1e-5} == expected, term


def test_pcrl_queue_and_slow_copy():
    method = pcrl_method(queue_size=14, momentum=0.9)
    method.pointer.fill_(7)
    before, queue = copy.deepcopy(method), method.queue.clone()
    out = method(*method.views(batch(5)))
    with torch.no_grad():
        for p in (*method.encoder.parameters(), *method.projector.parameters()):
            p.add_(1)
    method.after_step([out], 0.5)
    rolled = method.queue.roll(-7, 0)                                       # the keys, and then the mixtures
    assert torch.equal(rolled, torch.cat([out["keys"], out["mixed"], queue[3:7]])) and method.pointer == 3
    for name in ("key_encoder", "key_projector"):
        for new, old in zip(getattr(method, name).parameters(), getattr(before, name).parameters()):
            assert torch.allclose(new, old + 0.1, atol=1e-5)


def test_pcrl_key_chunks_have_their_own_statistics():
    method, x, order = pcrl_method(bn_chunks=2).train().double(), batch(17).double(), torch.randperm(17)
    chunk = order.tensor_split(2)[0]
    disturbed = x.clone()
    disturbed[chunk[:1]] = x[chunk[:1]].flip(3)
    moved = (method.encode_keys(x, order)[-1] - method.encode_keys(disturbed, order)[-1]).abs().amax((1, 2, 3)) > 1e-6
    assert sorted(moved.nonzero().flatten().tolist()) == sorted(chunk.tolist())
