"""Portraits show what is asked and answered: a network that is right looks right, and one that is wrong does not."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from medssl import METHODS
from medssl import __main__ as shown
from medssl.common import data, pen, portraits, settings
from medssl.common.errors import UserError
from medssl.common.portraits import answers, embeddings, frames
from tests.common import batch, tiny_encoder

KINDS = {"restored": ("autoencoder", "genesis", "spark", "pcrl"), "puzzle": ("jigsaw", "rubik"), "places": ("medmoco",),
         "clusters": ("swav",), "keys": ("moco",), "patches": ("relative",), "bars": ("rotation",),
         "pairs": ("simclr", "dcl", "vicreg", "lejepa", "simsiam", "byol")}
ORANGE = np.array(pen.COLOURS[1])


def dataset(count=18):
    images = (batch(count).numpy() * 255).astype(np.uint8)
    return data.Dataset("some", images, groups=np.arange(count) // 3, splits=np.array(["val"] * count))


def method(name):
    torch.manual_seed(0)
    found = settings.presets.Found(40, 64, 1)
    return settings.build(METHODS, settings.parts_of(METHODS, name.split("+"), found=found),
                          tiny_encoder(stem="nopool" if name == "spark" else "default"), 1, 64)


def scene(own):
    """What is to be drawn of this method."""
    own, seen = method(own) if isinstance(own, str) else own, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portraits, "kind_of", lambda scene: seen.append(scene) or (lambda scene: None))
        portraits.portrait({"random network": own}, dataset(), np.arange(18))
    return seen[0]


def orange(canvas):
    """How much of the picture is orange."""
    return float((np.abs(np.array(canvas.image).astype(int) - ORANGE) < 12).all(2).mean())


@pytest.mark.parametrize("kind, name", [(kind, name) for kind, names in KINDS.items() for name in names])
def test_every_method_has_its_kind_of_picture(kind, name):
    own = scene(name)
    assert portraits.kind_of(own) is getattr(portraits, f"draw_{kind}")
    own.looks.append(dataclasses.replace(own.looks[0], name="the same"))
    one, two = (portraits.kind_of(each)(each) for each in (dataclasses.replace(own, looks=own.looks[:1]), own))
    assert two.image.width == 2 * frames.WIDTH and two.image.size != one.image.size
    assert np.array(two.image).std() > 10


def test_kinds_are_all_methods():
    assert {name for names in KINDS.values() for name in names} == set(METHODS) - {"together"}


def test_parts_of_a_sum_are_drawn_below_each_other():
    networks = [{"random network": method(name)} for name in ("rotation", "dcl", "rotation+dcl")]
    first, second, both = (portraits.portrait(each, dataset(), np.arange(18)).image for each in networks)
    assert both.height == first.height + second.height


def test_nothing_is_left_in_the_method():
    own = method("rotation")
    augmentation = own.augment
    portraits.portrait({"random network": own}, dataset(), np.arange(18))
    assert own.augment is augmentation and not any(part._forward_hooks for part in own.modules())


def test_a_foreign_method_without_answers_shows_its_views():
    class Plain(torch.nn.Module):
        """Says nothing."""
        def __init__(self):
            super().__init__()
            self.augment = lambda images: images

        def views(self, images):
            return (self.augment(images),)

        def forward(self, images):
            return {"loss": images.mean()}
    canvas = portraits.portrait({"random network": Plain()}, dataset(), np.arange(18))
    assert np.array(canvas.image).std() > 10


@pytest.mark.parametrize("name, part", [("jigsaw", "head"), ("rubik", "order_head"), ("relative", "head")])
def test_the_right_answer_is_counted_and_wrong_tiles_are_framed(name, part):
    own = scene(name)
    look, truth = own.looks[0], torch.from_numpy(own.numbers[0])
    right = torch.nn.functional.one_hot(truth, look.said[part].shape[1]) * 20.0
    if name == "rubik":
        turning = next(view for view in own.views if view.ndim == 2)
        for number, way in enumerate(("horizontal", "vertical"), 1):
            look.said[f"tile_heads.{way}"] = (turning == number) * 2.0 - 1
    headings, draw = [], portraits.kind_of(own)
    amounts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "right", lambda look, mask: headings.append(int(mask.sum())) or "")
        for what, said in (("right", right), ("wrong", right.roll(1, 1))):
            look.said[part] = said
            amounts[what] = orange(draw(own))
    assert headings[0] == (18 * (9 if name != "relative" else 1)) and headings[1] < headings[0] / 2
    if name != "relative":                                                  # there orange marks the patch
        assert amounts["right"] == 0 < amounts["wrong"]


def test_a_right_puzzle_is_the_image_again():
    own = scene("rubik")
    look, tiles = own.looks[0], next(view for view in own.views if view.ndim == 5)
    truth, turning = torch.from_numpy(own.numbers[0]), next(view for view in own.views if view.ndim == 2)
    look.said["order_head"] = torch.nn.functional.one_hot(truth, 100).float()
    for number, way in enumerate(("horizontal", "vertical"), 1):
        look.said[f"tile_heads.{way}"] = (turning == number) * 2.0 - 1
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "lattice", lambda tiles, wrong: drawn.append(tiles) or (lambda *_: None))
        answers.draw_puzzle(own)
    puzzle, back = drawn[0], drawn[len(drawn) // 2]
    assert puzzle.equal(tiles[0]) and not back.equal(puzzle)
    for place, tile in enumerate(back):                                     # each tile is a piece of its own cell
        row, column = answers.locate(own.seen[0], tile)
        assert (row // 21, column // 21) == divmod(place, 3)
        top, left = slice(row, row + tile.shape[1]), slice(column, column + tile.shape[2])
        assert own.seen[0][:, top, left].equal(tile)


def test_bars_are_as_high_as_their_shares():
    canvas = pen.Canvas(120, 100)
    answers.bars(torch.tensor([0.5, 0.25, 0.25, 0.0]), 1)(canvas, 0, 0, 120)
    picture = np.array(canvas.image).astype(int)
    blue = (np.abs(picture - np.array(pen.COLOURS[0])) < 12).all(2)[:147]  # above the numbers
    grey = (np.abs(picture - 190) < 6).all(2)[:147]
    assert blue.sum(0).max() / grey.sum(0).max() == pytest.approx(0.5, abs=0.08)


def test_shuffled_batches_are_put_straight():
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))
    labels, pictures = torch.arange(18) % 3, torch.rand(18, 1, 4, 4)
    views = portraits.in_order((pictures, order, labels))
    assert views[0] is pictures and views[1].equal(torch.arange(18)) and views[2] is labels


@pytest.mark.parametrize("name", ["simclr", "vicreg", "lejepa", "byol"])
def test_partners_are_rows_of_the_same_image(name):
    """Of two equal views every partner is found, whatever the weights."""
    own = method(name)
    own.augment = lambda images: images
    if name == "byol":
        own.predictor = torch.nn.Identity()
    shown = scene(own)
    rows, columns, _ = embeddings.pair_of(shown, shown.looks[0])
    assert (embeddings.places(rows @ columns.T) == 1).all()


def test_places_count_from_one():
    assert embeddings.places(torch.tensor([[3.0, 1, 2], [3, 1, 2], [0, 5, 3]])).tolist() == [1, 3, 2]


def test_points_of_a_region_are_those_of_the_method():
    own = scene("medmoco")
    points, valid = [view for view in own.views if view.ndim == 3], own.views[-1]
    regions = own.looks[0].said["local_projector"].shape[1]
    assert points[0].shape == (18, 9 * regions, 2) and own.looks[0].said["key_local_projector"].shape[:2] == valid.shape
    chosen = embeddings.spread_out(torch.tensor([[0.0, 0], [0.1, 0], [1, 0], [0.5, 0]]), torch.tensor([1, 1, 1, 0]), 2)
    assert chosen == [0, 2]                                                 # the farthest that is valid


def test_at_first_one_image_of_each_patient():
    some = dataset()
    rows = portraits.some_rows(some, 6)
    assert sorted(some.groups[rows]) == list(range(6))
    with pytest.raises(UserError, match="two images"):
        portraits.some_rows(dataset(1))


def test_pixels_are_drawn_alike():
    assert frames.fitting(139, 64) == 128 and frames.fitting(40, 224) == 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for number, picture in enumerate(batch(12)):
        Image.fromarray((picture[0].numpy() * 255).astype(np.uint8)).save(path / f"{number}.png")
    return path


def test_a_picture_of_a_set_and_of_a_run(folder, tmp_path, capsys):
    shown.main(["rotation", "--data", str(folder), "--out", str(tmp_path / "before.png")])
    said = capsys.readouterr().out
    assert "Gidaris et al." in said and "train one with" in said and (tmp_path / "before.png").is_file()
    run = tmp_path / "run"
    train.main(["--method", "rotation", "--data", str(folder), "--steps", "2", "--log-every", "2", "--out", str(run)])
    shown.main(["rotation", "--run", str(run), "--out", str(tmp_path / "after.png")])
    before, after = (Image.open(tmp_path / f"{name}.png") for name in ("before", "after"))
    assert after.height > before.height                                     # a row for the trained network
    with pytest.raises(UserError, match="it trained rotation, not simclr"):
        shown.main(["simclr", "--run", str(run)])
    (run / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint.pt"):
        shown.main(["rotation", "--run", str(run)])


def test_the_run_and_its_start_are_told_apart(folder, tmp_path):
    run = tmp_path / "run"
    train.main(["--method", "dcl", "--data", str(folder), "--steps", "2", "--log-every", "2", "--out", str(run)])
    _, networks = shown.trained(shown.parse(["dcl", "--run", str(run)]))
    before, after = (list(network.parameters()) for network in networks.values())
    assert list(networks) == ["random network", "after 2 steps"] and not before[0].equal(after[0])
    saved = torch.load(run / "checkpoint.pt", weights_only=True)["method"]
    assert all(value.equal(saved[key]) for key, value in networks["after 2 steps"].state_dict().items())


@pytest.mark.parametrize("words, line", [
    (["rotaton"], "did you mean rotation"), (["rotation+nothing"], "unknown method"),
    (["dcl", "--out", "/nowhere/x.png"], "there is no folder /nowhere"),
    (["dcl", "--run", "nowhere"], "no checkpoint"), (["dcl", "--out", "x.xyz"], "ends in .png"),
    (["dcl+dcl"], "no part may stand twice")])
def test_errors_are_one_line(words, line):
    with pytest.raises(UserError, match=line):
        shown.main(words)


def test_without_a_method_they_are_listed(capsys):
    shown.main([])
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        shown.main(["--data", "nowhere"])
    assert "name a method" in capsys.readouterr().err
    assert all(f"  {name} " in said for name in METHODS if name != "together") and "python -m medssl METHOD" in said


def test_few_colours_keep_greys_grey_and_colours_told_apart(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "p.png"
    pixels = np.repeat(rng.integers(0, 256, (64, 64, 1)), 3, 2).astype(np.uint8)
    for row, colour in enumerate(pen.COLOURS[:6]):
        pixels[row] = colour
    Image.fromarray(pixels).save(path)
    before = path.stat().st_size
    pen.few_colours(path)
    after = np.array(Image.open(path).convert("RGB")).astype(int)
    assert path.stat().st_size < before and np.abs(after - pixels).max() <= 8
    assert np.ptp(after[6:], axis=2).max() == 0 and len(np.unique(after[6:])) <= 40


def test_a_picture_is_pasted_in_any_width():
    canvas = pen.Canvas(40, 40)
    canvas.paste(Image.new("RGB", (10, 20), (255, 0, 0)), 4, 6, 5)
    rows, columns = np.nonzero(np.array(canvas.image)[:, :, 1] == 0)
    assert (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1) == (8, 18, 12, 32)


def test_every_package_is_installed():
    root = Path(__file__).parents[1]
    listed = re.search(r"^packages = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.S | re.M)[1]
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "medssl").rglob("__init__.py")}
    assert set(re.findall(r'"([\w.]+)"', listed)) == found
