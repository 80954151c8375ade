"""Portraits show what is asked and answered: a network that is right looks right, and one that is wrong does not."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from medssl import METHODS
from medssl.common import config, data, pictures
from medssl.common.errors import UserError
from tests.common import batch, tiny_encoder

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("portraits", ROOT / "docs" / "portraits.py")
portraits = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(portraits)
ROWS = np.arange(18)


def dataset(count=18):
    images = (batch(count).numpy() * 255).astype(np.uint8)
    return data.Dataset("some", images, groups=np.arange(count) // 3, splits=np.array(["val"] * count))


def method(name):
    torch.manual_seed(0)
    parts = config.parts_of(METHODS, name.split("+"), ["queue_size=32"] if name in ("moco", "medmoco") else ())
    return config.build(METHODS, parts, tiny_encoder(stem="nopool" if name == "spark" else "default"), 1, 64)


def scene(name):
    """What is drawn of a method: the images seen, the views, and a look."""
    own = method(name)
    seen, views = portraits.views_of(own, dataset(), ROWS)
    return seen, views, portraits.Look("random network", own, views, portraits.DRAWN[name][1:])


def count_hooks(method):
    return sum(len(part._forward_hooks) for part in method.modules())


def orange(image):
    """How much of the picture is orange."""
    return float((np.abs(np.array(image).astype(int) - pictures.COLOURS[1]) < 12).all(2).mean())


@pytest.mark.parametrize("name", [name for name in METHODS if name != "together"])
def test_every_method_is_drawn(name):
    own = method(name)
    augment, draw, hooks = own.augment, portraits.DRAWN[name][0], count_hooks(own)              # each has its line
    one, two = (portraits.portrait(networks, name, dataset(), ROWS) for networks in ({"a": own}, {"a": own, "b": own}))
    assert two.width == portraits.WIDTH and np.array(two).std() > 10
    assert two.size != one.size or draw in (portraits.draw_pairs, portraits.draw_places)        # in these side by side
    assert own.augment is augment and count_hooks(own) == hooks             # nothing is left in it


def test_parts_of_a_sum_are_drawn_below_each_other():
    first, second, both = (portraits.portrait({"a": method(each)}, each, dataset(), ROWS)
                           for each in ("rotation", "dcl", "rotation+dcl"))
    assert both.height == first.height + second.height


def test_a_method_without_a_line_shows_its_views():
    class Plain(torch.nn.Module):
        """Says nothing."""
        augment = staticmethod(lambda images: images)

        def views(self, images):
            return (self.augment(images),)

        def forward(self, images):
            return {"loss": images.mean()}
    assert np.array(portraits.portrait({"random network": Plain()}, "plain", dataset(), ROWS)).std() > 10


@pytest.mark.parametrize("name", ["rotation", "relative", "jigsaw", "rubik"])
def test_right_answers_are_counted_and_wrong_tiles_framed(name, monkeypatch):
    seen, views, look = scene(name)
    truth, counted, amounts = views[2 if name == "relative" else 1], [], {}
    answers = [torch.nn.functional.one_hot(truth, look.said[0].shape[1]) * 20.0]
    if name == "rubik":
        answers += [(views[2] == way) * 2.0 - 1 for way in (1, 2)]
    monkeypatch.setattr(portraits.Look, "heading", lambda look, right: counted.append(int(right.sum())) or "")
    for what, said in (("right", answers), ("wrong", [each.roll(1, 1) for each in answers])):
        look.said = said
        amounts[what] = orange(portraits.DRAWN[name][0](seen, views, [look]))
    assert counted[0] == 18 * (9 if name in ("jigsaw", "rubik") else 1) and counted[1] < counted[0] / 2
    if name in ("jigsaw", "rubik"):                                         # in the others orange marks a patch
        assert amounts["right"] == 0 < amounts["wrong"]


def test_a_right_puzzle_is_the_image_again(monkeypatch):
    seen, views, look = scene("rubik")
    tiles, which, turning, *_ = views
    look.said = [torch.nn.functional.one_hot(which, 100).float(), *((turning == way) * 2.0 - 1 for way in (1, 2))]
    lattice, drawn = portraits.lattice, []
    monkeypatch.setattr(portraits, "lattice", lambda tiles, *wrong: drawn.append(tiles) or lattice(tiles, *wrong))
    portraits.draw_puzzle(seen, views, [look])
    puzzle, back = drawn[0], drawn[len(drawn) // 2]
    assert puzzle.equal(tiles[0]) and not back.equal(puzzle)
    for place, tile in enumerate(back):                                     # each tile is a piece of its own cell
        row, column = portraits.locate(seen[0], tile)
        assert (row // 21, column // 21) == divmod(place, 3)
        assert seen[0][:, row:row + tile.shape[1], column:column + tile.shape[2]].equal(tile)


@pytest.mark.parametrize("name", ["simclr", "vicreg", "lejepa", "byol", "moco"])
def test_partners_are_rows_of_the_same_image(name):
    """Where view 2 of an image is view 1 of the next one, that one is found, whatever the weights."""
    own = method(name)
    own.augment = lambda images: images
    if name == "byol":
        own.predictor = torch.nn.Identity()
    _, views = portraits.views_of(own, dataset(), ROWS)
    views = [views[0], views[0].roll(1, 0), *views[2:]]
    if name == "moco":
        own.bn_chunks = 1
    matrix = portraits.cosines(portraits.Look("", own, views, portraits.DRAWN[name][1:]), 18)
    assert (portraits.places(matrix.roll(-1, 1)) == 1).all()
    assert portraits.places(torch.tensor([[3.0, 1, 2], [3, 1, 2], [0, 5, 3]])).tolist() == [1, 3, 2]


def test_regions_bars_and_rows():
    seen, views, look = scene("medmoco")
    assert [said.shape[:2] for said in look.said] == [views[-1].shape] * 2  # (B, R)
    points = torch.tensor([[0.0, 0], [0.1, 0], [1, 0], [0.5, 0]])
    assert portraits.spread_out(points, torch.tensor([1, 1, 1, 0]).bool(), 2) == [0, 2]         # the farthest valid one
    bars = np.array(portraits.bars(torch.tensor([0.5, 0.25, 0.25, 0.0]), 1)).astype(int)[:138]  # above the numbers
    blue, grey = ((np.abs(bars - np.array(colour)) < 6).all(2).sum(0).max()
                  for colour in (portraits.BLUE, portraits.GREY))
    assert blue / grey == pytest.approx(0.5, abs=0.08)
    some = dataset()
    assert sorted(some.groups[portraits.some_rows(some, 6)]) == list(range(6))                  # of each patient one
    with pytest.raises(UserError, match="two images"):
        portraits.some_rows(dataset(1))


def test_a_picture_of_a_run(tmp_path):
    for number, picture in enumerate(batch(12)):
        Image.fromarray((picture[0].numpy() * 255).astype(np.uint8)).save(tmp_path / f"{number}.png")
    run = tmp_path / "run"
    train.main(["--method", "rotation", "--data", str(tmp_path), "--steps", "2", "--log-every", "2", "--out", str(run)])
    portraits.main(["rotation", "--run", str(run), "--out", str(tmp_path / "p.png")])
    assert Image.open(tmp_path / "p.png").width == portraits.WIDTH // 2
    _, networks = portraits.networks_of(run, "rotation")
    before, after = (list(network.parameters()) for network in networks.values())
    assert list(networks) == ["random network", "after 2 steps"] and not before[0].equal(after[0])
    with pytest.raises(UserError, match="it trained rotation, not simclr"):
        portraits.main(["simclr", "--run", str(run)])
