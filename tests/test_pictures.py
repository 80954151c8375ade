"""Charts and sheets: what was asked for is where it must be, and odd input leaves a file instead of a traceback."""

import numpy as np
import pytest
import torch
from PIL import Image

from medssl.common import pictures
from medssl.common.evaluation import figures

BLUE, ORANGE = pictures.COLOURS[:2]


def pixels(path):
    return np.array(Image.open(path).convert("RGB")).astype(int)


def coloured(picture, colour, tolerance=12):
    return (np.abs(picture - np.array(colour)) <= tolerance).all(-1)


def near(picture, spot, colour):
    """Is there, within two pixels of (x, y) at twice the size, a pixel of this colour?"""
    x, y = np.round(np.array(spot) / 2).astype(int)
    return coloured(picture[y - 2:y + 3, x - 2:x + 3], colour).any()


@pytest.mark.parametrize("log", [False, True])
def test_points_gaps_bands_and_levels_are_where_they_must_be(tmp_path, log):
    xs, ys = np.array([1, 10, 50, 100.0]), np.array([1, np.nan, 5, 20.0])
    place = pictures.curves({"a": (xs, ys), "b": ([1, 100], [2, 2])}, tmp_path / "c.png", "title", "step", "loss",
                            log_x=log, bands={"b": ([0, 0], [4, 4])}, horizontal={"chance": 10, "none": np.nan})
    picture = pixels(tmp_path / "c.png")
    assert picture.shape == (540, 900, 3)
    assert all(near(picture, place(x, y), BLUE) for x, y in zip(xs, ys) if np.isfinite(y))
    assert near(picture, place(20, 2), ORANGE) and not near(picture, place(20, 6), ORANGE)
    tint = [picture[tuple(np.round(place(20, y)[::-1] / 2).astype(int))].min() for y in (3.4, 4.6)]
    assert tint[0] < 230 < tint[1]                                          # a band up to 4
    low, high = place(1, 1), place(100, 20)
    share = 0.5 if log else 9 / 99
    assert place(10, 5)[0] == pytest.approx(low[0] + share * (high[0] - low[0])) and low[1] > high[1]
    x, y = np.round(place(1, 1) / 2).astype(int)
    assert not coloured(picture[y - 8:y + 9, x + 8:x + 30], BLUE).any()     # the line is broken after the first point
    level = picture[round(place(1, 10)[1] / 2), int(low[0] / 2):int(high[0] / 2)]
    assert 0.2 < (level.max(-1) < 200).mean() < 0.8                         # dashed


@pytest.mark.parametrize("low, high, log, ticks", [
    (0, 2000, False, [0, 500, 1000, 1500, 2000]), (0.93, 0.95, False, [0.93, 0.935, 0.94, 0.945, 0.95]),
    (0.01, 1, True, [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1]), (5, 5, False, [4.6, 4.8, 5, 5.2, 5.4])])
def test_ticks_are_round(low, high, log, ticks):
    place, found = pictures.axis([[low, high, np.nan]], 0, 600, 75, log)
    assert found == pytest.approx(ticks) and 0 < place(low) <= place(high) < 600
    assert len(pictures.axis([[1e-12, 1]], 0, 600, 75, True)[1]) <= 8


def test_odd_charts_are_drawn(tmp_path):
    out, long = tmp_path / "c.png", "a name that is far too long for a legend " * 2
    odd = [([], []), ([1], [np.nan]), ([5], [0.9]), ([1, 2], [3, 3]), ([1, 2], [0, 0]),
           (torch.arange(3), torch.tensor([1e-6, -1e-6, np.inf]))]
    twelve = {f"{i} {long}": ([0, 1], [i, -i]) for i in range(12)}
    for number, series in enumerate([{}, *({"a": pair} for pair in odd * 2), twelve]):
        pictures.curves(series, out, long, "x", "y", log_x=number > len(odd), horizontal={"chance": 0.5})
        assert pixels(out).shape == (540, 900, 3)
    assert len(pictures.panels([pictures.Chart({"loss": ([1, 2], [2, 1])})] * 3, out, columns=2, size=(300, 200))) == 3
    assert pixels(out).shape == (400, 600, 3)
    pictures.spectrum_chart({}, out)
    place = pictures.spectrum_chart({"start": np.array([1, 0.5, 0.25]), "end": [0.1, 0, 1.0], "bad": [np.nan] * 3}, out)
    for spot, colour in (((2, np.log10(0.5)), BLUE), ((2, -1), ORANGE), ((3, -10), ORANGE)):
        assert near(pixels(out), place(*spot), colour)


def test_bars_are_dots_with_intervals(tmp_path):
    out, series = tmp_path / "b.png", {"a": [0.25, 0.5], "b": [-0.25, np.nan]}
    place = pictures.bars(pictures.Bars(["one", "two"], series, "title", "accuracy",
                                        {"a": ([0.2, np.nan], [0.7, np.nan])}, {"chance": 0.8}), out)
    picture, (y, below) = pixels(out), (-0.175, 0.175)                      # two series around the middle of a row
    assert near(picture, place(0.5, 1 + y), BLUE) and near(picture, place(-0.25, below), ORANGE)
    assert [bool(near(picture, place(x, y), BLUE)) for x in (0.15, 0.22, 0.5, 0.68, 0.75)] == [False, True, True, True,
                                                                                               False]
    assert place(0, 0)[1] < place(0, 1)[1]                                  # the first group above
    for groups, series in (([], {}), (["a"], {"s": [np.nan]}), (["g" * 200], {"s": [1e-6]}), (["a", "b"], {})):
        pictures.bars(pictures.Bars(groups, series), out)
        assert pixels(out).shape[1] == 900


def test_confusion_picture(tmp_path):
    out = tmp_path / "m.png"
    pictures.confusion_picture([[9, 1], [0, 0]], ["healthy", "a lesion with a long name that goes on"], out)
    shades = [245 + (np.array(BLUE) - 245) * share for share in (0.9, 0.1)]
    dark, pale = (np.argwhere(coloured(pixels(out), shade, 2)).mean(0) for shade in shades)
    assert dark[1] < pale[1] and dark[0] == pytest.approx(pale[0], abs=8)   # one row, the larger share at the left
    pictures.confusion_picture(np.eye(20) * 12345, [f"class {i}" for i in range(20)], out)


def test_sheets(tmp_path):
    out, red, mask = tmp_path / "s.png", torch.zeros(2, 3, 32, 32), np.zeros((2, 32, 32), np.uint8)
    red[:, 0], mask[0, 8:24, 8:24], mask[1] = 1, 2, 255                     # 255: no mask, stays as it is
    pictures.sheet([("images", red, mask)], out, ["one", "two"])
    assert coloured(pixels(out), (255, 0, 0), 0).sum() == 2 * 96 ** 2 - 48 ** 2          # enlarged three times
    assert coloured(pixels(out), 0.6 * np.array([255, 0, 0]) + 0.4 * np.array(ORANGE), 1).sum() == 48 ** 2
    pictures.sheet([("", torch.full((5, 1, 96, 96), 0.5))], out, columns=2)
    grey = coloured(pixels(out), (128, 128, 128), 0)
    assert grey.sum() == 5 * 96 ** 2 and grey.any(1).sum() == 3 * 96 and grey.any(0).sum() == 2 * 96
    odd = {"large": torch.full((1, 2, 700, 350), 2.0), "nan": np.full((1, 1, 4, 6), np.nan), "half": red.bfloat16()}
    for rows in (list(odd.items()), [], [("none", np.zeros((0, 1, 8, 8)))]):
        pictures.sheet(rows, out)
        assert pixels(out).shape[0] < 700
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]          # no temporary file is left


def test_views_and_restored(tmp_path):
    out, colours = tmp_path / "v.png", np.eye(3)
    shown = [torch.tensor(colour[None, :, None, None]).expand(10, 3, 96, 96) for colour in colours]
    mask, ignored = torch.zeros(10, 1, 3, 3, dtype=torch.bool), (torch.zeros(10, 2, 3), torch.zeros(10, 5).long())
    mask[:, :, 1, 1] = True

    def count():
        return [coloured(pixels(out), 255 * colour, 0).sum() / 96 ** 2 for colour in colours]
    pictures.views_sheet((shown[0], shown[1], mask, torch.arange(10), *ignored), out)
    assert count() == pytest.approx([8 + 8 / 9, 8, 0])                      # one cell of nine is seen
    pictures.views_sheet((torch.stack(shown, 1),), out)
    assert count() == [8, 8, 8]
    pictures.views_sheet(ignored, out)
    pictures.restored_sheet(shown[0], (shown[1], mask), shown[2], out)
    assert count() == pytest.approx([8, 8 / 9, 8])
    rows = [np.flatnonzero(coloured(pixels(out), 255 * colour, 0).any(1)).mean() for colour in colours]
    assert rows == sorted(rows)


def test_overlays(tmp_path):
    """A square of class 1 that is predicted as class 2, elsewhere: each class has one colour, in both rows."""
    out, target, prediction = tmp_path / "o.png", np.zeros((1, 64, 64), int), np.zeros((1, 64, 64), int)
    target[0, 10:30, 10:30], prediction[0, 40:60, 40:60] = 1, 2
    pictures.overlays(torch.zeros(1, 1, 64, 64), {"truth": target, "prediction": torch.tensor(prediction)},
                      ("none", "a", "b"), ["worst: Dice 0"], out)
    truth, guess = (np.argwhere(coloured(pixels(out), 0.4 * np.array(colour), 1)) for colour in (BLUE, ORANGE))
    assert len(truth) == len(guess) == 80 ** 2 and guess.mean(0)[1] - truth.mean(0)[1] == pytest.approx(120, abs=1)
    assert guess.mean(0)[0] > truth.mean(0)[0] + 256


def test_a_band_says_over_what():
    assert "over 3 read-outs" in figures.band_words(3) and "interval by patient" in figures.band_words(1)
