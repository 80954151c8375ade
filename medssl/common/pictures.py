"""Pictures, drawn with Pillow alone: line charts, dots with intervals, a confusion matrix, sheets of images.

Charts are drawn at twice their size and reduced at the end, which smooths edges: lengths are of the large picture. The
colours are those of Okabe and Ito, told apart with every kind of colour vision. A file appears whole or not at all.
"""

import functools
import math
import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import whole
from .metrics import array

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0))
SHADES = [*COLOURS, *(tuple((255 + c) // 2 for c in colour) for colour in COLOURS)]              # of lines
INK, GREY, PALE = (40, 40, 40), (110, 110, 110), (228, 228, 228)
SMALL, LARGE, EDGE = 26, 34, 28                                             # two sizes of text; the margin
font = functools.cache(lambda size: ImageFont.load_default(size=size))


def paper(width, height):
    """A white image, and the pen that draws on it; a colour's fourth number is its opacity."""
    image = Image.new("RGB", (round(width), round(height)), "white")
    return image, ImageDraw.Draw(image, "RGBA")


def write(pen, at, text, colour=INK, anchor="la", size=SMALL):
    """Lines of text; anchor: l, m, r (left, middle, right) and a, m, d (top, middle, bottom)."""
    pen.text(at, text, colour, font(size), anchor, size // 4, {"l": "left", "m": "center", "r": "right"}[anchor[0]])


def wrap(text, width, size=SMALL):
    """The text in lines of about this width."""
    return textwrap.fill(str(text), max(3, int(width / size / 0.5)))       # letters are half as wide as high


def height_of(text, size=SMALL):
    return round(1.25 * size) * (text.count("\n") + 1)


def width_of(text, size=SMALL):
    return max(font(size).getlength(line) for line in text.split("\n"))


def save(image, path, **words):
    with whole(path) as temporary:
        image.save(temporary, format="PNG", **words)


# ---- charts

@dataclass
class Chart:
    """A line chart. series: {name: (xs, ys)}; bands: {name: (low, high)}; horizontal: {name: y}, dashed levels such as
    chance. What is not finite is a gap; lines of up to 30 values have dots."""
    series: dict
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    bands: dict | None = None
    horizontal: dict | None = None


@dataclass
class Bars:
    """Rows of dots with intervals. series: {name: a value per group}; intervals: {name: (low ends, high ends)};
    levels: {name: value}, dashed; label: what the values are. What is not finite is left out."""
    groups: list
    series: dict
    title: str = ""
    label: str = ""
    intervals: dict | None = None
    levels: dict | None = None


def axis(parts, start, end, gap, log=False):
    """place(values) in pixels from start to end, and some round values, at least `gap` pixels apart."""
    change = np.log10 if log else np.asarray
    values = change(np.concatenate([np.ravel(part) for part in parts] + [[]]).astype(float))
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.array([0.0, 1.0])
    margin = 0.05 * np.ptp(values) or 0.1 * abs(values[0]) or 1             # all may be the same
    low, high, count = values.min() - margin, values.max() + margin, max(2, abs(end - start) // gap)
    if log:
        ticks = [factor * 10.0 ** n for n in range(math.floor(low), math.ceil(high)) for factor in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
        ticks = ticks[::math.ceil(len(ticks) / count) or 1]
    else:
        step = 10.0 ** math.floor(math.log10((high - low) / count))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step * count >= (high - low) * (1 - 1e-9))
        ticks = [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda values: start + (end - start) * (change(values) - low) / (high - low), ticks


def draw_line(pen, points, colour, dash=0, dots=False):
    """Through points (n, 2), broken where one is not finite. A point by itself is a dot in any case."""
    points = np.asarray(points, float)
    for run in np.split(points, np.flatnonzero(~np.isfinite(points).all(1))):
        run = run[np.isfinite(run).all(1)]
        if dash and len(run) > 1:
            stops = np.linspace(run[0], run[-1], 2 * round(np.hypot(*(run[-1] - run[0])) / dash / 2))
            for start, end in zip(stops[::2], stops[1::2]):
                pen.line([*start, *end], colour, 3)
        elif len(run) > 1:
            pen.line([tuple(point) for point in run], colour, 4, "curve")
        for x, y in run if dots or len(run) == 1 else []:
            pen.ellipse([x - 7, y - 7, x + 7, y + 7], colour)


@np.errstate(divide="ignore", invalid="ignore")
def plot(pen, box, lines, chart, rows=None):
    """lines {name: (xs, ys, words for draw_line)} into the rectangle (left, top, width, height), with the chart's texts
    and bands. rows: names of 0, 1, ... from above, for the y axis. Returns place(x, y), the pixel of a value."""
    left, top, width, height = box
    side = 0.3 * width if len(lines) > 1 else 0                             # for the legend
    title = wrap(chart.title, width, LARGE)
    upper, lower = top + height_of(title, LARGE) + 60, top + height - 90
    bands = [np.asarray(end, float) for ends in (chart.bands or {}).values() for end in ends]
    ends = (upper, lower) if rows else (lower, upper)
    y, ticks = axis([ys for _, ys, _ in lines.values()] + bands, *ends, 90)
    y_texts = dict(enumerate(rows)) if rows else {tick: f"{tick:.6g}" for tick in ticks}
    x_left, x_right = left + max([0, *map(width_of, y_texts.values())]) + 20, left + width - side - 40
    x, ticks = axis([xs for xs, *_ in lines.values()], x_left, x_right, 150, chart.log_x)

    def place(at_x, at_y):
        return np.stack(np.broadcast_arrays(x(at_x), y(at_y)), -1)          # (..., 2)
    write(pen, (left, top), title, size=LARGE)
    write(pen, (left, upper - 20), chart.y_label, GREY, "ld")
    write(pen, ((x_left + x_right) / 2, lower + 50), chart.x_label, GREY, "ma")
    for value, text in y_texts.items():
        pen.line([x_left, y(value), x_right, y(value)], PALE, 2)
        write(pen, (x_left - 12, y(value)), text, anchor="rm")
    for value in ticks:
        pen.line([x(value), lower, x(value), lower + 8], INK, 2)
        write(pen, (x(value), lower + 12), f"{value:.6g}", anchor="ma")
    pen.line([x_left, upper, x_left, lower, x_right, lower], INK, 2)
    for name, (low, high) in (chart.bands or {}).items():
        xs, _, words = lines[name]
        around = np.concatenate([place(xs, low), place(xs, high)[::-1]])
        pen.polygon([tuple(point) for point in around[np.isfinite(around).all(1)]], (*words["colour"], 45))
    for name, (xs, ys, words) in lines.items():
        draw_line(pen, place(xs, ys), **words)
        if side:
            text, at = wrap(name, side - 68), left + width - side
            draw_line(pen, [(at, upper + 16), (at + 52, upper + 16)], **words)
            write(pen, (at + 68, upper), text)
            upper += height_of(text) + 8
    return place


def level(number, xs, ys):
    """A dashed line of two points, for `plot`."""
    return np.array(xs, float), np.array(ys, float), {"colour": GREY, "dash": (8, 14, 4)[number % 3]}


def draw_chart(pen, box, chart):
    lines = {}
    for number, (name, (xs, ys)) in enumerate(chart.series.items()):
        xs, ys = array(xs).astype(float), array(ys).astype(float)
        lines[name] = xs, ys, {"colour": SHADES[number % 14], "dots": np.isfinite(ys).sum() <= 30}
    xs = np.concatenate([xs for xs, *_ in lines.values()] + [[]])
    ends = [xs.min(), xs.max()] if len(xs) else [0, 1]
    lines |= {name: level(n, ends, [y, y]) for n, (name, y) in enumerate((chart.horizontal or {}).items())}
    return plot(pen, box, lines, chart)


def panels(charts, path, columns=3, size=(640, 420)):
    """Several Charts in one picture. Returns each one's place(x, y)."""
    columns, (width, height) = max(1, min(columns, len(charts))), (2 * length for length in size)
    image, pen = paper(columns * width, max(1, math.ceil(len(charts) / columns)) * height)
    places = [draw_chart(pen, (n % columns * width + EDGE, n // columns * height + EDGE, width - 2 * EDGE,
                               height - 2 * EDGE), chart) for n, chart in enumerate(charts)]
    save(image.reduce(2), path)
    return places


def curves(series, path, title="", x_label="", y_label="", **words):
    """One line chart; words: further fields of Chart."""
    return panels([Chart(series, title, x_label, y_label, **words)], path, size=(900, 540))[0]


def spectrum_chart(spectra, path, title="Singular values of the covariance of the normalised features"):
    """{name: singular values}: powers of ten against the rank; below 1e-10 of the largest is round-off, drawn there."""
    spectra = {name: np.sort(array(values).astype(float))[::-1] for name, values in spectra.items()}
    floor = 1e-10 * max((np.nanmax(values, initial=0) for values in spectra.values()), default=0) or 1e-10
    series = {name: (np.arange(1, len(values) + 1), np.log10(np.maximum(values, floor)))
              for name, values in spectra.items()}
    return curves(series, path, title, "rank", "singular value, power of ten")


def bars(chart, path):
    count, lines, nan = len(chart.groups), {}, np.full(len(chart.groups), np.nan)
    for number, (name, values) in enumerate(chart.series.items()):
        ys = np.arange(count) + 0.7 * ((number + 0.5) / len(chart.series) - 0.5)                # around 0, 1, ...
        low, high = (chart.intervals or {}).get(name, (nan, nan))
        xs = np.array([low, high, nan, values, nan], float).T               # (count, 5): a line, a gap, a dot, a gap
        lines[name] = xs.ravel(), ys.repeat(5), {"colour": SHADES[number % 14]}
    lines |= {name: level(n, [x, x], [-0.5, count - 0.5]) for n, (name, x) in enumerate((chart.levels or {}).items())}
    height = 280 + count * (36 * len(chart.series) + 30)
    image, pen = paper(1800, height)
    place = plot(pen, (EDGE, EDGE, 1800 - 2 * EDGE, height - 2 * EDGE), lines, Chart({}, chart.title, chart.label),
                 [wrap(name, 460) for name in chart.groups])
    save(image.reduce(2), path)
    return place


def confusion_picture(matrix, classes, path, title="Confusion matrix", cell=160):
    """Counts with rows the truth and columns the predictions; the darker, the larger the share of its row."""
    names, top, left = [wrap(name, cell, 22) for name in classes], 220, EDGE + cell + 12
    image, pen = paper(max(1000, left + cell * len(classes) + EDGE), top + cell * len(classes) + EDGE)
    write(pen, (EDGE, EDGE), title, size=LARGE)
    write(pen, (EDGE, 80), "rows: truth, columns: prediction", GREY)
    for row, counts in enumerate(array(matrix).astype(float)):
        write(pen, (left - 12, top + cell * (row + 0.5)), names[row], INK, "rm", 22)
        write(pen, (left + cell * (row + 0.5), top - 12), names[row], INK, "md", 22)
        for column, count in enumerate(counts):
            x, y, share = left + cell * column, top + cell * row, count / max(counts.sum(), 1)
            colour = tuple(round(245 + (c - 245) * share) for c in COLOURS[0])
            pen.rectangle([x, y, x + cell - 3, y + cell - 3], colour)
            write(pen, (x + cell / 2, y + cell / 2), f"{count:.6g}\n{100 * share:.0f} %",
                  "white" if share > 0.6 else INK, "mm")
    save(image.reduce(2), path)


# ---- sheets of images

def as_picture(values, least=96, most=320):
    """(C, H, W) in [0, 1] -> picture, enlarged by a whole number to at least `least` pixels or reduced to `most`; the
    first channel unless there are 3."""
    values = np.nan_to_num(array(values).astype(np.float32)).clip(0, 1)
    values = values if len(values) == 3 else np.repeat(values[:1], 3, 0)    # (3, H, W)
    picture = Image.fromarray((values.transpose(1, 2, 0) * 255).round().astype(np.uint8))
    picture.thumbnail((most, most), Image.BOX)                              # in place, and never larger
    factor = math.ceil(least / max(picture.size))
    return picture.resize([factor * length for length in picture.size], Image.NEAREST)


def tinted(picture, mask):
    """The picture with each class of the mask (H, W) in a colour of its own; 0 and 255, unknown, are left alone."""
    mask = np.array(Image.fromarray(array(mask).astype(np.uint8)).resize(picture.size, Image.NEAREST))
    pixels = np.array(picture)
    for number in set(np.unique(mask).tolist()) - {0, 255}:
        here = mask == number
        pixels[here] = 0.6 * pixels[here] + 0.4 * np.array(COLOURS[(number - 1) % 6])
    return Image.fromarray(pixels)


def sheet(rows, path, titles=(), columns=None, colours=None, least=96):
    """Rows of pictures. rows: (title, pictures (N, C, H, W)[, masks (N, H, W)]) each; titles: a text over each picture
    of the first row; columns: longer rows go on below (a contact sheet); colours: {name: colour}, told at the foot."""
    lines, small, gap = [], SMALL // 2, 6                                   # not drawn at twice its size
    for title, pictures, *masks in rows:
        shown = [as_picture(picture, least) for picture in pictures]
        for layer in masks:
            shown = [tinted(picture, mask) for picture, mask in zip(shown, layer)]
        step = columns or max(len(shown), 1)
        lines += [("" if start else title, shown[start:start + step]) for start in range(0, len(shown), step)]
    wide = gap + max([96, *(picture.width for _, shown in lines for picture in shown)])
    heights = [gap + bool(title) * height_of(title, small) + max(picture.height for picture in shown)
               for title, shown in lines]
    titles = [wrap(title, wide, small) for title in titles]
    y = gap + max([0, *(height_of(title, small) for title in titles)])
    image, pen = paper(gap + wide * max([2, *(len(shown) for _, shown in lines)]),
                       y + sum(heights) + len(colours or {}) * height_of("", small) + gap)
    for number, text in enumerate(titles):
        write(pen, (gap / 2 + wide * (number + 0.5), gap / 2), text, INK, "ma", small)
    for (title, shown), height in zip(lines, heights):
        write(pen, (gap, y), title, size=small)
        for number, picture in enumerate(shown):
            image.paste(picture, (gap + number * wide, y + height - gap - picture.height))
        y += height
    for name, colour in (colours or {}).items():
        write(pen, (gap, y), name, colour, size=small)
        y += height_of("", small)
    save(image, path)


def sort_views(views, count=None):
    """Of a method's view tensors: pictures (floating 4-D; 5-D holds several per image), masks (bool (B, 1, h, w)),
    numbers (integer 1-D). The rest is not for the eye."""
    views = [array(view[:count]) for view in views]
    pictures = [part for view in views if view.dtype.kind == "f" and view.ndim in (4, 5)
                for part in ([view] if view.ndim == 4 else view.swapaxes(0, 1))]
    masks = [view for view in views if view.dtype.kind == "b" and view.ndim == 4 and view.shape[1] == 1]
    return pictures, masks, [view for view in views if view.dtype.kind in "iu" and view.ndim == 1]


def greyed(pictures, mask):
    """(B, C, H, W) with grey in the cells where the mask (B, 1, h, w) is False."""
    down, right = (np.arange(size) * cells // size for size, cells in zip(pictures.shape[2:], mask.shape[2:]))
    return np.where(mask[:, :, down][..., right], pictures, 0.5)


def views_sheet(views, path, count=8):
    """What a method sees: its pictures, the first of them with hidden cells greyed. Over one or two pictures with a
    single number stands that number, the answer that is asked for; several are bookkeeping such as orders."""
    pictures, masks, numbers = sort_views(views, count)
    rows = [(f"view {number}", picture) for number, picture in enumerate(pictures, 1)]
    rows += [("visible", greyed(pictures[0], mask)) for mask in masks if pictures]
    sheet(rows, path, numbers[0] if len(numbers) == 1 and len(pictures) < 3 else ())


def restored_sheet(images, views, restored, path, count=8):
    """The image, what the network was given (the first view, hidden cells greyed) and what it made of it."""
    pictures, masks, _ = sort_views(views, count)
    given = functools.reduce(greyed, masks, pictures[0])
    sheet([("image", images[:count]), ("input", given), ("restored", restored[:count])], path)


def overlays(images, masks, classes, titles, path):
    """Images (N, C, H, W), and below them each of the masks {name: (N, H, W)}, every class in a colour of its own: a
    class that is taken for another one is seen."""
    rows = [("image", images)] + [(name, images, mask) for name, mask in masks.items()]
    there = np.unique(np.concatenate([np.ravel(array(mask)) for mask in masks.values()]))
    colours = {f"class {classes[n]}": COLOURS[(n - 1) % 6] for n in there if 0 < n < len(classes)}
    sheet(rows, path, titles, colours=colours, least=256)
