"""MedMoCo: whitening equals trusted codes, regions show the same anatomy in both views, parts can be switched off."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from medssl import medmoco
from medssl.medmoco import MedMoCo, iternorm, matched_regions, pool_regions, region_nce, zca
from medssl.moco import MoCo
from tests.common import Flip, batch, tiny_encoder

GOLDEN = np.load(Path(__file__).parent / "golden" / "zca.npz")
GOLDEN = {name: torch.from_numpy(value) for name, value in GOLDEN.items()}


def method(**words):
    torch.manual_seed(0)
    return MedMoCo(tiny_encoder(), Flip(), **{"dim": 16, "queue_size": 24, **words})


@pytest.mark.parametrize("name, case", [("zca", "one"), ("zca", "grouped"), ("iternorm", "one"),
                                        ("iternorm", "grouped"), ("iternorm", "map")])
def test_whitening_equals_golden(name, case):
    """Of maps every place is a row."""
    x, c, expected, gradient = (GOLDEN[f"{case}_{word}"].double() for word in ("x", "c", f"{name}_y", f"{name}_grad"))
    if case == "map":
        x, c, expected, gradient = (maps.movedim(1, 3).flatten(0, 2) for maps in (x, c, expected, gradient))
    eps, groups, steps = (GOLDEN[f"{case}_{word}"].item() for word in ("eps", "groups", "steps"))
    y = zca(x.requires_grad_(), eps, groups) if name == "zca" else iternorm(x.requires_grad_(), steps, eps, groups)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(torch.autograd.grad(y, x, c)[0], gradient, rtol=0, atol=1e-8)


def test_zca_gradient_with_repeated_eigenvalues():
    axes = torch.eye(3, dtype=torch.float64)
    equal = torch.cat([axes, -axes])                                                    # covariance I / 3
    flat = torch.zeros(5, 3, dtype=torch.float64)                                       # covariance 0
    assert torch.autograd.gradcheck(lambda x: zca(x, 1e-3, 1), equal.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: zca(x, 1.0, 1), flat.requires_grad_())
    twice = torch.randn(40, 8)
    twice[:, 1] = twice[:, 0]                                                           # float32, one feature twice
    for x in (torch.ones(4, 6).requires_grad_(), twice.requires_grad_()):
        assert torch.autograd.grad((zca(x, 1e-5, 2) ** 3).sum(), x)[0].isfinite().all()


def test_half_precision_features_are_uncorrelated_within_groups():
    torch.manual_seed(0)
    x = torch.randn(64, 12) @ torch.randn(12, 12) + 3
    with torch.autocast("cpu", torch.bfloat16):
        y = zca(x.bfloat16(), 1e-5, 3)
    torch.testing.assert_close((y.T @ y / 64)[:4, :4], torch.eye(4), rtol=0, atol=1e-3)         # in float32


def test_groups_fit_the_rows():
    assert [medmoco.fitting_groups(128, rows) for rows in (1, 3, 8, 16, 17, 64, 300)] == [128, 128, 32, 16, 16, 4, 1]
    assert medmoco.fitting_groups(96, 16) == 12 and medmoco.fitting_groups(7, 10) == 7


def test_region_nce_equals_loops():
    torch.manual_seed(0)
    u, v = (F.normalize(torch.randn(5, 6, 8, dtype=torch.float64), dim=2) for _ in range(2))
    valid = torch.rand(5, 6) < 0.6
    valid[1], valid[2], valid[3, :] = False, True, torch.arange(6) == 4                 # none, all, a single one

    def loops(valid):
        terms, chance = [], []
        for n in range(5):
            for i in range(6):
                if valid[n, i]:
                    row = [math.exp(u[n, i] @ v[n, j] / 0.2) for j in range(6) if valid[n, j]]
                    terms.append(-math.log(math.exp(u[n, i] @ v[n, i] / 0.2) / sum(row)))
                    chance.append(math.log(len(row)))
        return sum(terms) / len(terms), sum(chance) / len(chance)

    everywhere = torch.ones_like(valid)
    assert region_nce(u, v, 0.2).item() == pytest.approx(loops(everywhere)[0], abs=1e-10)
    assert region_nce(u, v, 0.2, valid).item() == pytest.approx(loops(valid)[0], abs=1e-10)
    blind = region_nce(torch.zeros_like(u), v, 0.2, valid)                              # chance: all regions look alike
    assert blind.item() == pytest.approx(loops(valid)[1], abs=1e-6)
    u.requires_grad_()
    region_nce(u, v, 0.2, valid).backward()
    assert torch.equal(u.grad.abs().sum(2) > 0, valid & (valid.sum(1) > 1)[:, None])
    nothing = region_nce(u, v, 0.2, torch.zeros_like(valid))
    assert abs(nothing) < 1e-12 and torch.autograd.grad(nothing, u)[0].isfinite().all()


def affine_views(images, seed):
    """Crops anywhere, flips, any rotation, per image; black outside the image."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return torch.rand(len(images), generator=generator) * (high - low) + low
    angle, scale = uniform(-math.pi, math.pi), uniform(0.6, 1.2)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    x, y = uniform(-0.4, 0.4), uniform(-0.4, 0.4)
    theta = torch.stack([torch.stack([scale * angle.cos() * flip, -scale * angle.sin(), x], 1),
                         torch.stack([scale * angle.sin() * flip, scale * angle.cos(), y], 1)], 1)       # (B, 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, images.shape, align_corners=False), align_corners=False), theta


def test_matched_regions_show_the_same_anatomy():
    """A marker is painted into each image; in both views the same regions see it, and see it alike."""
    torch.manual_seed(0)
    axis = (torch.arange(96) + 0.5) / 48 - 1
    centre = 1.2 * torch.rand(48, 2, 1, 1) - 0.6
    squared = (axis.view(1, 1, -1) - centre[:, 0]) ** 2 + (axis.view(1, -1, 1) - centre[:, 1]) ** 2
    images = torch.exp(-squared / 0.02)[:, None]                                        # (48, 1, 96, 96)
    (x1, theta1), (x2, theta2) = affine_views(images, 1), affine_views(images, 2)
    points1, points2, valid = matched_regions(theta1, theta2, 8, 20)
    seen1, seen2 = (pool_regions(x, points, 1, (96, 96))[..., 0]                        # (48, 20)
                    for x, points in ((x1, points1), (x2, points2)))
    torch.testing.assert_close(seen1[valid], seen2[valid], rtol=0, atol=0.01)
    assert ((seen1 * valid).amax(1) > 0.4).sum() > 12 and 0.5 < valid.float().mean() < 0.99
    assert (seen1 - seen2)[~valid].abs().max() > 0.1                               # the others are left out with reason

    theta1, theta2 = theta1[:, None], theta2[:, None]                                   # (48, 1, 2, 3)
    in_image = points1 @ theta1[..., :2].mT + theta1[..., None, :, 2]                   # every point, to rounding
    torch.testing.assert_close(points2 @ theta2[..., :2].mT + theta2[..., None, :, 2], in_image, rtol=0, atol=1e-5)
    edge = torch.cat([in_image, points1, points2], 3).abs().amax((2, 3))                # (48, 20)
    assert (edge[valid] < 1 + 1e-5).all() and (edge[~valid] > 1 - 1e-5).all()
    cells = points1.mean(2).mul(100).round()                                            # centres are 25 apart
    assert all(len(cells[n].unique(dim=0)) == 20 for n in range(48))                    # no region twice


def test_views_without_overlap_leave_no_region():
    corner = torch.tensor([[[0.3, 0, -0.6], [0, 0.3, -0.6]]])
    other = torch.tensor([[[0.3, 0, 0.6], [0, 0.3, 0.6]]])
    assert not matched_regions(corner, other, 8, 20)[2].any()
    points1, points2, valid = matched_regions(corner, corner, 8, 20)
    assert valid.all() and torch.allclose(points1, points2, atol=1e-5)


def test_regions_are_the_mean_of_their_points():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    corners = torch.tensor([[-0.75, -0.75], [0.75, -0.75], [0.25, 0.75], [0.25, -0.75]]).view(1, 4, 1, 2)
    expected = torch.tensor([0.0, 3, 14, 2])                                            # cells 0, 3, 14, 2
    torch.testing.assert_close(pool_regions(maps, corners, 1, (4, 4)).flatten(), expected)
    pairs = corners.view(1, 2, 2, 2)                                                    # two points a region
    torch.testing.assert_close(pool_regions(maps, pairs, 1, (4, 4)).flatten(), torch.tensor([1.5, 8]))
    maps, points = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 3, 2, 2).double() * 2.2 - 1.1
    sampled = F.grid_sample(maps, points, padding_mode="border", align_corners=False).mean(3).mT
    torch.testing.assert_close(pool_regions(maps, points, 1, (5, 7)), sampled)


def test_a_cell_looks_where_padded_strides_put_it():
    """Three convolutions of stride 2 that pass on their centre: cell i of the map holds pixel 8 i. On a picture of its
    own coordinates the pooled values are the coordinates of the points, in a view and in its mirror image."""
    net = torch.nn.Sequential(*[torch.nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False) for _ in range(3)])
    for layer in net:
        layer.weight.data.zero_()
        layer.weight.data[[0, 1], [0, 1], 1, 1] = 1
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    picture = torch.stack([x, y])[None]
    points = torch.rand(1, 40, 1, 2) * 1.6 - 0.9                            # within the outermost cells
    where = (points[:, :, 0] + 1) * 32 - 0.5
    with torch.no_grad():
        torch.testing.assert_close(pool_regions(net(picture), points, 8, (64, 64)), where)
        mirrored = pool_regions(net(picture.flip(3)), points * torch.tensor([-1.0, 1.0]), 8, (64, 64))
    inside = where[..., 0] > 7                              # the mirror image's last cell is 7 pixels from its edge
    torch.testing.assert_close(mirrored[inside], where[inside])


def test_regions_are_read_from_a_map_as_fine_as_the_grid():
    """Twenty regions are chosen from 8 x 8 cells: stride 8 at 64 pixels, 16 at 128, 32 at 256 or an unknown size."""
    encoder = tiny_encoder()
    for size, stage in ((32, 0), (64, 1), (128, 2), (256, 3), (None, 3)):
        assert MedMoCo(encoder, Flip(), queue_size=8, size=size).local_projector[0].in_features == encoder.widths[stage]
    assert method().side == 8


def test_each_part_can_be_switched_off():
    """Without both it is MoCo, down to the gradient; without one the other's term stays as it is."""
    images, words = batch(19), {"temperature": 0.2, "bn_chunks": 2}
    plain = MoCo(tiny_encoder(), Flip(), dim=16, queue_size=24, **words)
    bare = method(decorrelation=None, local_weight=0.0, **words)
    state = bare.state_dict()
    plain.load_state_dict({name: state[name.replace("key_encoder", "slow.0").replace("key_projector", "slow.1")]
                           for name in plain.state_dict()})
    for step in range(2):                                                           # the second meets the new queue
        torch.manual_seed(step)
        views, results = bare.views(images), []
        for model, seen in ((plain, views[:3]), (bare, views)):
            out = model(*seen)
            model.zero_grad()
            out["loss"].backward()
            model.after_step([{key: torch.as_tensor(value).detach() for key, value in out.items()}], 1.0)
            results.append([out["loss"], torch.as_tensor(out["chance"]), out["accuracy"],
                            model.encoder.conv1.weight.grad, model.queue])
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)

    outs = {}
    for decorrelation in ("zca", None):
        for weight in (0.5, 0.0):
            torch.manual_seed(1)
            model = method(decorrelation=decorrelation, local_weight=weight)
            out = outs[decorrelation, weight] = model(*model.views(images))
            torch.testing.assert_close(out["loss"], out["global"] + weight * out["local"])
            assert float(out["chance"]) == pytest.approx(math.log(25) + weight * math.log(20), abs=1e-5)
    torch.testing.assert_close(outs["zca", 0.5]["local"], outs[None, 0.5]["local"])     # regions are not whitened
    assert abs(outs["zca", 0.5]["global"] - outs[None, 0.5]["global"]) > 1e-3
    assert method().encoder.state_dict().keys() == tiny_encoder().state_dict().keys()   # what is exported stays plain


def test_the_words_of_decorrelation():
    x = torch.randn(40, 8) @ torch.randn(8, 8)
    for word, expected in (("zca", zca(x, medmoco.EPS, 2)), ("iternorm", iternorm(x, 5, medmoco.EPS, 2)), (None, x)):
        torch.testing.assert_close(method(decorrelation=word).whiten(x, 2), expected)


def test_keys_are_whitened_in_their_chunk():
    """A disturbed image changes, through whitening, the keys of its own chunk only. Embeddings have length one."""
    model, x, order = method(bn_chunks=2).eval(), batch(17), torch.randperm(17)         # eval: no BatchNorm statistics
    view = torch.eye(2, 3).repeat(17, 1, 1)
    points, _, valid = matched_regions(view, view, 8, 20)
    chunks = medmoco.split_order(order, 2)
    disturbed = x.clone()
    disturbed[chunks[0][:1]] = x[chunks[0][:1]].flip(3)
    with torch.no_grad():
        for nets in (model.nets(), model.slow):
            for rows in model.embed(nets, x, points, 16):
                torch.testing.assert_close(rows.norm(dim=-1), torch.ones(rows.shape[:-1]))
        before, after = (model(x, x2, order, points, points, valid)["keys"] for x2 in (x, disturbed))
        expected = [model.embed(model.slow, x[rows], points[rows], 16)[0] for rows in chunks]
    moved = (before - after).abs().amax(1)
    assert (moved[chunks[0]] > 1e-5).all() and (moved[chunks[1]] < 1e-6).all()
    for rows, keys in zip(chunks, expected):
        torch.testing.assert_close(before[rows], keys)                                  # in the order of the images


def test_slow_networks_follow():
    model = method(momentum=0.9)
    fast = [p for net in (model.encoder, model.projector, model.local_projector) for p in net.parameters()]
    for p in fast:
        p.data.add_(torch.rand_like(p) + 0.1)
    expected = [0.9 * old + 0.1 * new.detach() for old, new in zip(model.slow.parameters(), fast, strict=True)]
    model.after_step([], 1.0)
    torch.testing.assert_close([*model.slow.parameters()], expected)


def test_the_local_term_compares_the_same_anatomy():
    """Over views with any geometry: by hand, from the map that was chosen, on the regions that both views show; and the
    encoder learns from it."""
    model, images, seeds = method(bn_chunks=2, size=64).eval(), batch(17), iter((1, 2))
    model.augment = lambda images, geometry: affine_views(images, next(seeds))
    views = x1, x2, _, points1, points2, valid = model.views(images)

    def places(x, points):
        pooled = pool_regions(model.encoder.features(x)[1], points, 8, (64, 64))            # (17, 20, widths[1])
        return F.normalize(model.local_projector(pooled), dim=2)
    u, v = places(x1, points1), places(x2, points2)
    local = model(*views)["local"]
    assert 0.2 < valid.float().mean() < 0.99
    torch.testing.assert_close(local, region_nce(u, v, 0.2, valid))
    assert torch.autograd.grad(local, model.encoder.conv1.weight)[0].abs().max() > 1e-6
