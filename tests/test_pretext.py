"""Relative, Jigsaw, Rubik and Together: labels tell what was done to the image, and undoing it restores the image."""

import math

import pytest
import torch
import torch.nn.functional as F

from medssl.jigsaw import Jigsaw, cut, permutation_set, shuffle, unshuffle
from medssl.relative import Relative, neighbour
from medssl.rotation import Rotation, rotate
from medssl.rubik import Rubik, turn_over
from medssl.simclr import SimCLR
from medssl.spark import SparK
from medssl.together import Together
from tests.common import Flip, batch, tiny_encoder


def plain(images):
    return images


def ramp(count, size):
    """Every pixel holds its own row and column (count, 2, size, size)."""
    line = torch.arange(float(size))
    return torch.stack(torch.meshgrid(line, line, indexing="ij")).repeat(count, 1, 1, 1)


def paste(tiles, grid):
    """Tiles (B, T, C, h, w) side by side: (B, C, grid h, grid w)."""
    return torch.cat([torch.cat([*row.unbind(1)], 3) for row in tiles.split(grid, 1)], 2)


def assert_uniform(labels, classes):
    """Every class occurs, and chi-square is at most five standard deviations above its mean."""
    counts = torch.bincount(labels.flatten(), minlength=classes).double()
    expected = counts.sum() / classes
    chi = ((counts - expected) ** 2 / expected).sum().item()
    assert len(counts) == classes and counts.min() > 0
    assert chi < classes - 1 + 5 * math.sqrt(2 * (classes - 1))


# ---- labels ----------------------------------------------------------------------------------------------------------

def test_undoing_the_label_restores_the_image():
    torch.manual_seed(0)
    images, whole = torch.rand(16, 2, 18, 18), {"gap": 0, "jitter": 0, "width": 8, "hidden": 8}
    turned, turns = Rotation(tiny_encoder(), plain).views(images)
    assert torch.equal(rotate(turned, -turns), images) and not torch.equal(turned, images)

    centre, other, position = Relative(tiny_encoder(), plain, **whole).views(images)
    tiles = F.unfold(images, 6, stride=6).view(16, 2, 6, 6, 9).movedim(4, 1)                    # (16, 9, 2, 6, 6)
    assert torch.equal(centre, tiles[:, 4])
    assert torch.equal(other, tiles[torch.arange(16), position + (position > 3)])

    for grid in (2, 3):
        jigsaw = Jigsaw(tiny_encoder(), plain, grid=grid, **whole)
        tiles, which = jigsaw.views(images)
        assert torch.equal(paste(unshuffle(tiles, jigsaw.orders[which]), grid), images)
        assert not torch.equal(paste(tiles, grid), images)

    rubik = Rubik(tiny_encoder(), plain, **whole)
    tiles, which, turning, masked = rubik.views(images)
    assert not masked.any()
    assert torch.equal(paste(unshuffle(turn_over(tiles, turning), rubik.orders[which]), 3), images)
    assert not torch.equal(paste(unshuffle(tiles, rubik.orders[which]), 3), images)


def test_which_way_things_go():
    order = torch.tensor([[2, 0, 3, 1], [1, 2, 3, 0]])
    tiles = torch.arange(4.0).view(1, 4, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    assert torch.equal(shuffle(tiles, order).flatten(1).long(), order)      # tile order[t] comes to place t
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    turned = rotate(image.expand(2, 1, 2, 2), torch.tensor([1, 2]))[:, 0]   # counter-clockwise
    assert turned.tolist() == [[[2, 4], [1, 3]], [[4, 3], [2, 1]]]
    _, across, down = turn_over(image.expand(1, 3, 1, 2, 2), torch.tensor([[0, 1, 2]]))[0, :, 0]
    assert across.tolist() == [[2, 1], [4, 3]] and down.tolist() == [[3, 4], [1, 2]]


def test_labels_are_uniform():
    torch.manual_seed(0)
    images = torch.zeros(4000, 1, 9, 9)
    assert_uniform(Rotation(tiny_encoder(), plain).views(images)[1], 4)
    assert_uniform(Relative(tiny_encoder(), plain, gap=0, jitter=0, width=8, hidden=8).views(images)[2], 8)
    assert_uniform(Jigsaw(tiny_encoder(), plain, width=8, hidden=8).views(images)[1], 100)
    _, which, turning, masked = Rubik(tiny_encoder(), plain, mask=True).views(images)
    assert_uniform(which, 100)
    assert_uniform(turning, 3)
    assert_uniform(masked, 2)


def test_mask_label_tells_which_tiles_lost_half_their_pixels():
    torch.manual_seed(0)
    tiles, _, _, masked = Rubik(tiny_encoder(), plain, mask=True).views(torch.full((20, 3, 60, 60), 0.7))
    share = (tiles > 0).float().mean((2, 3, 4))                             # (B, T) of pixels that are left
    assert (share[masked == 0] == 1).all()
    assert 0.3 < share[masked == 1].min() and share[masked == 1].max() < 0.7
    assert torch.equal(tiles > 0, (tiles[:, :, :1] > 0).expand_as(tiles))   # a pixel goes in all its channels


# ---- permutations ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tiles, mean", [(8, 7.0), (9, 8.0)])
def test_permutations_are_far_apart(tiles, mean):
    orders = permutation_set(tiles, 100, seed=0)
    assert orders.shape == (100, tiles) and (orders.sort(1)[0] == torch.arange(tiles)).all()
    distance = (orders[:, None] != orders).sum(2)[~torch.eye(100, dtype=torch.bool)]
    assert distance.min() >= 5 and distance.double().mean() >= mean
    assert torch.equal(orders, permutation_set(tiles, 100, seed=0))


def test_there_are_no_more_permutations_than_the_factorial():
    orders = permutation_set(4, 100, seed=0)
    assert len(orders) == len(orders.unique(dim=0)) == 24
    jigsaw = Jigsaw(tiny_encoder(), plain, grid=2, width=8, hidden=8)
    out = jigsaw(*jigsaw.views(batch(4)))
    assert jigsaw.head[-1].out_features == 24 and out["chance"] == pytest.approx(math.log(24))


def test_greedy_choice_equals_a_naive_one():
    def key(order):
        distances = [sum(a != b for a, b in zip(order, other)) for other in chosen]
        return min(distances), sum(distances)
    first, *rest = sorted(permutation_set(4, 24, seed=0).tolist())
    chosen = [first]
    while len(chosen) < 12:
        chosen.append(rest.pop(rest.index(max(rest, key=key))))             # the first of the best, as in argmax
    assert permutation_set(4, 12, seed=0).tolist() == chosen


# ---- gap and jitter --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, gap, jitter", [(96, 0.2, 0.1), (64, 0.025, 0.025), (47, 0.15, 0.0), (60, 0.0, 0.1)])
def test_neighbouring_tiles_keep_the_gap(size, gap, jitter):
    torch.manual_seed(0)
    tiles = cut(ramp(300, size), torch.arange(9).expand(300, -1), 3, gap, jitter).unflatten(1, (3, 3))
    # tiles (B, 3, 3, 2, h, w)
    rows = tiles[:, 1:, :, 0, 0, 0] - tiles[:, :-1, :, 0, -1, 0]        # from the last row of a tile to the first below
    columns = tiles[:, :, 1:, 1, 0, 0] - tiles[:, :, :-1, 1, 0, -1]
    between = torch.cat([rows, columns.transpose(1, 2)]) - 1                # pixels left out in between
    cell = size // 3
    space, play = math.ceil(gap * cell), math.ceil(jitter * cell)
    assert tiles.shape[-2:] == (cell - space - play,) * 2
    assert between.min() == space and between.max() == space + 2 * play     # all of the jitter is used, none of the gap
    assert (tiles[..., 1:, :] - tiles[..., :-1, :])[:, :, :, 0].eq(1).all()           # rows of a tile follow each other
    assert tiles.min() >= 0 and tiles.max() < size


def test_relative_leaves_the_gap_and_moves_the_patches():
    torch.manual_seed(0)
    position = torch.arange(8).repeat(50)
    centre, other = neighbour(ramp(400, 60), position, gap=0.2, jitter=0.1)         # cells of 20: 4 and 2 pixels
    apart = (other[:, :, 0, 0] - centre[:, :, 0, 0]).abs() - centre.shape[2]        # (B, 2) pixels in between
    assert apart.amax(1).min() == 4 and apart.amax(1).max() == 8
    assert len(centre[:, :, 0, 0].unique(dim=0)) == 9       # 3 x 3 places


# ---- losses and heads ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method, words, head, widths", [
    (Rubik, {"mask": True, "deep_heads": True}, "tile_heads.mask", [576, 1024, 1024, 9]),
    (Relative, {"width": 64, "hidden": 1024, "depth": 1}, "head", [128, 1024, 8]),
    (Jigsaw, {"width": 64, "hidden": 1024, "depth": 2}, "head", [576, 1024, 1024, 100])])
def test_head_depths_of_the_study_in_3d(method, words, head, widths):
    layers = method(tiny_encoder(), plain, **words).get_submodule(head)
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == widths


@pytest.mark.parametrize("mask", [False, True])
def test_rubik_losses_and_answers(mask):
    """Heads that answer everything rightly have no loss; heads that say the base rates have the loss called chance."""
    torch.manual_seed(0)
    rubik = Rubik(tiny_encoder(), plain, mask=mask).eval()
    views = rubik.views(torch.rand(400, 1, 9, 9))
    which, turning = views[1:3]
    terms = ["order", "horizontal", "vertical"] + ["mask"] * mask
    out = rubik(*views)
    assert torch.isclose(out["loss"], sum(out[term] for term in terms) * (1 if mask else 0.5))

    def answered(order, **tiles):
        rubik.order_head.forward = lambda z: order
        for name in rubik.tile_heads:
            rubik.tile_heads[name].forward = lambda z, a=tiles[name]: a
        return rubik(*views)
    out = answered(F.one_hot(which, 100) * 100.0, horizontal=200.0 * (turning == 1) - 100,
                   vertical=200.0 * (turning == 2) - 100, mask=200.0 * views[-1] - 100)
    assert out["loss"] < 1e-6 and all(out[f"{term}_accuracy"] == 1 for term in terms)
    third = torch.full((400, 9), 1 / 3).logit()
    out = answered(torch.zeros(400, 100), horizontal=third, vertical=third, mask=torch.zeros(400, 9))
    assert out["loss"].item() == pytest.approx(out["chance"], abs=0.02)


@pytest.mark.parametrize("method", [Relative, Jigsaw, Rubik])
def test_the_loss_looks_at_every_tile(method):
    torch.manual_seed(0)
    model = method(tiny_encoder(), plain, width=8, hidden=32).eval()
    views = model.views(batch(4))
    pictures = [view.requires_grad_() for view in (views[:2] if method is Relative else views[:1])]
    model(*views)["loss"].backward()
    slopes = torch.stack([p.grad for p in pictures], 1) if method is Relative else pictures[0].grad   # (B, T, C, h, w)
    slopes = slopes.flatten(2).norm(dim=2)                                  # (B, T)
    assert slopes.min() > 0.01 * slopes.max() > 0                           # .03 to .5 of it, from seed to seed


@pytest.mark.parametrize("method", [Relative, Jigsaw, Rubik])
def test_each_image_is_judged_by_its_own_tiles(method):
    torch.manual_seed(0)
    model = method(tiny_encoder(), plain, width=8, hidden=32).eval().double()
    views = model.views(batch(4).double() * torch.linspace(0.1, 8, 4).view(-1, 1, 1, 1))        # unlike each other
    alone = [model(*(view[i:i + 1] for view in views))["loss"] for i in range(4)]
    torch.testing.assert_close(model(*views)["loss"], sum(alone) / 4)


# ---- together --------------------------------------------------------------------------------------------------------

def together(weights=None, **builders):
    """Rotation, and other parts on the same encoder."""
    torch.manual_seed(0)
    encoder = tiny_encoder()
    parts = {name: build(encoder) for name, build in builders.items()}
    return Together(encoder, plain, {"rotation": Rotation(encoder, plain), **parts}, weights)


def simclr(encoder):
    return SimCLR(encoder, Flip())


def test_together_is_the_sum_of_its_parts():
    both, images = together({"simclr": 0.25}, simclr=simclr), batch(6)
    torch.manual_seed(1)
    out = both(*both.views(images))
    torch.manual_seed(1)
    one, two = (part(*part.views(images)) for part in both.parts.values())
    torch.testing.assert_close(out["loss"], one["loss"] + 0.25 * two["loss"])
    assert out["chance"] == pytest.approx(math.log(4) + 0.25 * math.log(11))
    torch.testing.assert_close(out["rotation.accuracy"], one["accuracy"])
    torch.testing.assert_close(out["embedding"], two["embedding"])
    assert "restored" not in out
    gradients = [torch.autograd.grad(loss, both.encoder.conv1.weight)[0]
                 for loss in (out["loss"], one["loss"] + 0.25 * two["loss"])]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


class Teller(torch.nn.Module):
    """A part that wants patients and labels, has no chance level, and notes what reaches its after_step."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.heard = encoder, None

    def views(self, images, groups, labels):
        return images, groups, labels

    def forward(self, images, groups, labels):
        return {"loss": self.encoder(images).mean(), "groups": groups, "labels": labels, "restored": images}

    def after_step(self, outs, progress):
        self.heard = outs, progress


def test_parts_get_their_targets_and_their_own_outputs():
    both = together(teller=Teller)
    labels, groups = torch.arange(4), torch.arange(4) + 10
    outs = [both(*both.views(batch(4, seed=seed), labels=labels, groups=groups)) for seed in (0, 1)]
    assert "chance" not in outs[0] and torch.equal(outs[0]["restored"], batch(4))
    both.after_step(outs, 0.5)
    heard, progress = both.parts["teller"].heard
    assert progress == 0.5 and len(heard) == 2 and set(heard[0]) == {"loss", "groups", "labels", "restored"}
    assert torch.equal(heard[0]["groups"], groups) and torch.equal(heard[0]["labels"], labels)
    assert torch.equal(heard[1]["restored"], batch(4, seed=1)) and heard[1]["loss"] is outs[1]["teller.loss"]


def test_spark_leaves_the_other_parts_alone():
    both = together(spark=lambda encoder: SparK(encoder, plain, width=32))
    views = both.views(batch(6))
    alone = both.parts["rotation"](*views[0])["loss"]
    for _ in range(2):                                                      # the second time, rotation follows SparK
        out = both(*views)
        torch.testing.assert_close(out["rotation.loss"], alone)             # nothing is hidden from rotation
    assert torch.equal(out["restored"], out["spark.restored"])
    out["loss"].backward()  # both went through the same BatchNorm layers


def test_a_part_on_another_encoder_is_refused():
    with pytest.raises(ValueError, match="simclr: built on another encoder"):
        together(simclr=lambda encoder: simclr(tiny_encoder()))


@pytest.mark.parametrize("method", [Relative, Jigsaw, Rubik])
@pytest.mark.parametrize("gap, jitter", [(0.6, 0.5), (0.0, 1.0), (-0.1, 0.3), (0.3, -0.1)])
def test_a_gap_that_leaves_nothing_is_refused(method, gap, jitter):
    with pytest.raises(ValueError, match=f"gap={gap} and jitter={jitter}"):
        method(tiny_encoder(), plain, gap=gap, jitter=jitter)
