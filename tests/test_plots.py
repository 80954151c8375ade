"""Charts and sheets: what was asked for is where it must be, and odd input leaves a file instead of a traceback."""
import numpy as np
import pytest
import torch
from PIL import Image

from medssl.common import pen, plots, sheets
from medssl.common.evaluation import figures

BLUE, ORANGE = pen.COLOURS[:2]


def pixels(path):
    return np.array(Image.open(path)).astype(int)


def coloured(picture, colour, tolerance=12):
    return (np.abs(picture - np.array(colour)) <= tolerance).all(-1)


def near(picture, spot, colour):
    """Is there, within two pixels of (x, y), a pixel of this colour?"""
    x, y = np.round(spot).astype(int)
    return coloured(picture[y - 2:y + 3, x - 2:x + 3], colour).any()


@pytest.mark.parametrize("log", [False, True])
def test_points_and_gaps_are_where_they_must_be(tmp_path, log):
    xs, ys = np.array([1, 10, 50, 100.0]), np.array([1, np.nan, 5, 20.0])
    place = plots.curves({"a": (xs, ys), "b": ([1, 100], [2, 2])}, tmp_path / "c.png", "title", "step", "loss (nats)",
                         log_x=log, log_y=log, horizontal={"chance": 10})
    picture = pixels(tmp_path / "c.png")
    assert picture.shape == (540, 900, 3)
    assert all(near(picture, place(x, y), BLUE) for x, y in zip(xs, ys) if np.isfinite(y))
    assert near(picture, place(75, np.sqrt(2) if log else 2) if not log else place(10, 2), ORANGE)
    low, high = place(1, 1), place(100, 20)
    share = np.log10(10) / 2 if log else 9 / 99
    assert place(10, 5)[0] == pytest.approx(low[0] + share * (high[0] - low[0])) and low[1] > high[1]
    assert np.isnan(place(0, 1)[0]) == log
    x, y = np.round(place(1, 1)).astype(int)
    assert not coloured(picture[y - 8:y + 9, x + 8:x + 30], BLUE).any()     # the line is broken after the first point
    level = picture[round(place(1, 10)[1]), int(low[0]):int(high[0])]
    assert 0.2 < (level.max(-1) < 200).mean() < 0.8                         # dashed


def test_bands_cover_their_interval(tmp_path):
    place = plots.curves({"a": ([0, 1, 2], [1, 2, 3.0])}, tmp_path / "c.png", bands={"a": ([0, 1, 2], [2, 3, 4])})
    picture = pixels(tmp_path / "c.png")

    def tinted(x, y):
        column, row = np.round(place(x, y)).astype(int)
        return picture[row, column].min() < 225

    assert tinted(1.5, 3.2) and tinted(1.5, 1.7) and tinted(0.5, 2.3) and not tinted(1.5, 3.8) and not tinted(1.5, 1.2)
    place = plots.curves({"a": ([0, 1], [1, 1])}, tmp_path / "c.png", bands={"a": ([-1, 0], [2, 2])}, log_y=True)
    picture = pixels(tmp_path / "c.png")
    assert tinted(0.5, 1.7) and tinted(0.5, 0.985)                          # on a log axis down to its end


def test_ticks():
    assert plots.tick_texts(plots.ticks(0, 2000, 8)) == ["0", "500", "1000", "1500", "2000"]
    assert plots.tick_texts(plots.ticks(0.93, 0.95, 5)) == ["0.930", "0.935", "0.940", "0.945", "0.950"]
    assert plots.tick_texts(plots.ticks(-1e-6, 1e-6, 4)) == ["-1.0e-6", "-5.0e-7", "0", "5.0e-7", "1.0e-6"]
    assert plots.tick_texts(plots.ticks(0.01, 1, 8, True), True) == ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"]
    assert len(plots.ticks(1e-12, 1, 6, True)) <= 7 and len(plots.ticks(40, 50, 6, True)) >= 3
    for low, high in ((0, 1), (-3.7, 1e5), (1e-6, 1.1e-6), (0.9999, 1), (-5, -4.99)):
        values = plots.ticks(low, high, 6)
        assert 3 <= len(values) <= 7 and low <= min(values) + 1e-12 and max(values) <= high + 1e-12
        assert len(set(plots.tick_texts(values))) == len(values)


def test_ranges():
    assert plots.span([[0, 10]]) == (0, 10.5) and plots.span([[-10, 0]]) == (-10.5, 0)
    assert plots.span([[4, 4]]) == (3.6, 4.4)
    assert plots.span([[0, 0]]) == (0, 1) and plots.span([]) == (0, 1) and plots.span([[np.nan, np.inf]]) == (0, 1)
    assert plots.span([[0, -1]], log=True) == (1, 10)
    low, high = plots.span([[0, 1, 100]], log=True)
    assert 0.7 < low < 1 and 100 < high < 140


def test_texts_fit():
    for text in ("a run with a long name", "runs/simclr-rbc_chula-56px-seed0/encoder.pt", "x" * 60, ""):
        lines = pen.wrap(text, 80)
        assert lines.replace("\n", "").replace(" ", "") == text.replace(" ", "") and pen.width_of(lines) <= 80
        assert pen.wrap(text, 80, 13, 2).count("\n") <= 1
    assert pen.plain("Läsion Δ ±1 °") == "Lasion ? ±1 °"


def test_odd_charts_are_drawn(tmp_path):
    out = tmp_path / "c.png"
    long = "a name that is far too long for a legend " * 2
    one = [([], []), ([1], [np.nan]), ([5], [0.9]), ([1, 2], [3, 3]), ([1, 2], [0, 0]),
           (torch.arange(3), torch.tensor([1e-6, -1e-6, np.inf]))]
    twelve = {f"{i} {long}": ([0, 1], [i, -i]) for i in range(12)}
    for number, series in enumerate([{}, *({"a": pair} for pair in one * 2), twelve]):
        place = plots.curves(series, out, long, "x", "y", log_y=number > len(one),
                             horizontal={"chance": 0.5, "none": np.nan})
        picture = pixels(out)
        assert picture.shape == (540, 900, 3) and (picture[:, -4:] == 255).all() and (picture[-4:] == 255).all()
        assert np.isfinite(place(1, 1)).all()
    chart = {"series": {"loss": ([1, 2], [2, 1])}, "title": "loss"}
    assert len(plots.panels([chart] * 3, out, columns=2, size=(300, 200))) == 3
    assert pixels(out).shape == (400, 600, 3)
    plots.panels([], out)
    plots.spectrum_chart({}, out)
    place = plots.spectrum_chart({"start": np.array([1, 0.5, 0.25]), "end": [0.1, 0, 1.0], "failed": [np.nan] * 3}, out)
    picture = pixels(out)
    for spot, colour in (((2, 0.5), BLUE), ((2, 0.1), ORANGE), ((3, 1e-10), ORANGE)):
        assert near(picture, place(*spot), colour)


def test_bars(tmp_path):
    out = tmp_path / "b.png"
    series, pictures = {"a": [0.25, 0.5], "b": [-0.25, np.nan]}, []
    for intervals in (None, {"a": ([0.2, np.nan], [0.7, np.nan])}):
        plots.bars(plots.Bars(["one", "two"], series, "title", "accuracy", intervals, {"chance": 0.8}), out)
        pictures.append(pixels(out)[:, :760])                               # without the legend
    lengths = np.unique(coloured(pictures[0], BLUE).sum(1))[1:]
    assert lengths[-1] == pytest.approx(2 * lengths[0], abs=3)
    positive, negative = (np.flatnonzero(coloured(pictures[0], colour).any(0)) for colour in (BLUE, ORANGE))
    assert negative.max() <= positive.min() + 1                             # from 0 to the left
    caps = np.flatnonzero((coloured(pictures[1], pen.INK) & ~coloured(pictures[0], pen.INK)).sum(0) >= 7)
    assert caps.max() - caps.min() == pytest.approx(lengths[-1], abs=3)     # 0.2 to 0.7 is as long as the bar of 0.5
    for groups, series in (([], {}), (["a"], {"": [np.nan]}), (["g" * 200], {"s": [1e-6]}), (["a", "b"], {})):
        plots.bars(plots.Bars(groups, series), out)
        assert pixels(out).shape[1] == 900


def test_confusion_picture(tmp_path):
    out = tmp_path / "m.png"
    plots.confusion_picture([[9, 1], [0, 0]], ["healthy", "a lesion with a long name that goes on"], out)
    picture = pixels(out)
    shades = [245 + (np.array(BLUE) - 245) * share for share in (0.9, 0.1)]
    dark, pale = (np.argwhere(coloured(picture, shade, 2)).mean(0) for shade in shades)
    assert dark[1] < pale[1] and dark[0] == pytest.approx(pale[0], abs=8)   # one row, the larger share at the left
    plots.confusion_picture(np.eye(20) * 12345, [f"class {i}" for i in range(20)], out)


def test_sheet(tmp_path):
    out = tmp_path / "s.png"
    red = torch.zeros(2, 3, 32, 32)
    red[:, 0] = 1
    mask = np.zeros((2, 32, 32), np.uint8)
    mask[0, 8:24, 8:24] = 2
    mask[1] = 255                                                           # no mask: stays as it is
    sheets.sheet([("images", red, mask)], out, titles=["one", "two"])
    picture = pixels(out)
    assert coloured(picture, (255, 0, 0), 0).sum() == 2 * 96 ** 2 - 48 ** 2              # enlarged three times
    outline = coloured(picture, sheets.mask_colour(2), 0)
    assert outline.sum() == 4 * 47 and outline[:, :picture.shape[1] // 2].any()
    sheets.sheet([("", torch.full((5, 1, 96, 96), 0.5))], out, columns=2)
    grey = coloured(pixels(out), (128, 128, 128), 0)
    assert grey.sum() == 5 * 96 ** 2 and grey.any(1).sum() == 3 * 96 and grey.any(0).sum() == 2 * 96
    odd = {"large": torch.full((1, 2, 700, 350), 2.0), "nan": np.full((1, 1, 4, 6), np.nan), "half": red.bfloat16()}
    sheets.sheet(list(odd.items()), out)
    assert pixels(out).shape[0] < 700
    sheets.sheet([], out)
    sheets.sheet([("none", np.zeros((0, 1, 8, 8)))], out)
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]          # no temporary file is left


def test_views_sheet(tmp_path):
    out, grey = tmp_path / "v.png", (128, 128, 128)
    first, second, third = (np.array(colour) / 255 for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    shown = [torch.tensor(colour[None, :, None, None]).expand(10, 3, 96, 96) for colour in (first, second, third)]
    mask = torch.zeros(10, 1, 3, 3, dtype=torch.bool)
    mask[:, :, 1, 1] = True

    def count(colour):
        return coloured(pixels(out), 255 * colour, 0).sum() / 96 ** 2

    ignored = torch.zeros(10, 2, 3), torch.zeros(10, 5, dtype=torch.long)
    sheets.views_sheet((shown[0], shown[1], mask, torch.arange(10), *ignored), out)
    assert count(first) == pytest.approx(8 + 8 / 9) and count(second) == 8                    # one cell of nine is seen
    sheets.views_sheet((torch.stack(shown, 1),), out)
    assert count(first) == count(second) == count(third) == 8
    sheets.views_sheet(ignored, out)
    sheets.restored_sheet(shown[0], (shown[1], mask), shown[2], out)
    assert count(first) == count(third) == 8 and count(second) == pytest.approx(8 / 9)
    rows = [np.flatnonzero(coloured(pixels(out), 255 * colour, 0).any(1)).mean() for colour in (first, second, third)]
    assert rows == sorted(rows) and coloured(pixels(out), grey, 0).sum() >= 8 * 8 * 32 ** 2


def test_overlays(tmp_path):
    """A square of class 1 that is predicted as class 2, elsewhere: each class has one colour, in both rows."""
    target, prediction = np.zeros((2, 1, 64, 64), int)
    target[0, 10:30, 10:30], prediction[0, 40:60, 40:60] = 1, 2
    masks = {"truth": target, "prediction": torch.tensor(prediction)}
    sheets.overlays(torch.zeros(1, 1, 64, 64), masks, ("none", "a", "b"), ["worst: Dice 0"], tmp_path / "o.png")
    picture = pixels(tmp_path / "o.png")[:-60]                              # without the legend
    truth, guess = (np.argwhere(coloured(picture, sheets.mask_colour(number), 0)) for number in (1, 2))
    assert len(truth) == len(guess) == 4 * 79                               # outlines of 80 x 80 pixels
    assert guess.mean(0)[1] - truth.mean(0)[1] == pytest.approx(120, abs=1)
    assert guess.mean(0)[0] > truth.mean(0)[0] + 256


def test_a_band_says_over_what():
    assert "over 3 read-outs" in figures.band_words(3) and "interval by patient" in figures.band_words(1)
