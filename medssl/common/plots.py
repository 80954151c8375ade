"""Charts: curves and panels of them, bars, a spectrum, a confusion matrix.

What is not finite (or not positive on a log axis) is a gap in a line and n/a in a bar chart.
"""
import math
from dataclasses import dataclass

import numpy as np

from . import pen
from .metrics import array


def span(parts, log=False):
    """Range (low, high) that holds all finite values of several arrays, with a margin that does not cross zero."""
    values = np.concatenate([np.ravel(part) for part in parts] + [[]]).astype(float)
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return (1, 10) if log else (0, 1)
    values = np.log10(values) if log else values
    low, high = values.min(), values.max()
    margin = 0.05 * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high)):                       # constant but for round-off
        margin = 0.3 if log else 0.1 * abs(low) or 1
    if log:
        return 10 ** (low - margin), 10 ** (high + margin)
    return (0 if low >= 0 > low - margin else low - margin), (0 if low < high <= 0 < high + margin else high + margin)


def ticks(low, high, count, log=False):
    """At most about `count` round values from low to high."""
    if log:
        decades = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            values = [factor * decade for decade in decades for factor in factors if low <= factor * decade <= high]
            if 3 <= len(values) <= count:
                return values
        if len(values) > count:
            return values[::math.ceil(len(values) / count)]
    step = 10.0 ** math.floor(math.log10((high - low) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step * count >= (high - low) * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def tick_texts(values, log=False):
    """The values with as many digits as tell them apart."""
    biggest = max(map(abs, values), default=0)
    step = min((after - before for before, after in zip(values, values[1:])), default=biggest)
    digits = -math.floor(math.log10(step) + 1e-9) if step > 0 else 0
    if log:
        texts = [f"{value:.6g}" for value in values]
    elif 1e-3 <= biggest < 1e6 or biggest == 0:
        texts = [f"{value:.{max(digits, 0)}f}" for value in values]
    else:
        texts = [f"{value:.{max(math.floor(math.log10(biggest)) + digits, 0)}e}" if value else "0" for value in values]
    return [short(text) for text in texts]


def short(text):
    return text.replace("e-0", "e-").replace("e+0", "e")


@dataclass
class Chart:
    """A line chart. series: {name: (xs, ys)}; bands: {name: (low, high)}; horizontal: {name: y}, dashed levels such as
    chance; markers: points on the lines (None: on those of up to 30 values)."""
    series: dict
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    bands: dict | None = None
    horizontal: dict | None = None
    markers: bool | None = None

    def __post_init__(self):
        self.series = {name: [array(values).astype(float) for values in pair] for name, pair in self.series.items()}
        self.bands = {name: [array(end).astype(float) for end in ends] for name, ends in (self.bands or {}).items()}
        self.horizontal = self.horizontal or {}
        self.dotted = [np.isfinite(ys).sum() <= 30 if self.markers is None else self.markers
                       for _, ys in self.series.values()]


class Axis:
    """One axis: which values it holds, and where a value lies between two pixels."""

    def __init__(self, parts, log, pixels, gap):
        self.log, (self.low, self.high), self.pixels = log, span(parts, log), pixels
        self.ticks = ticks(self.low, self.high, max(2, int(abs(pixels[1] - pixels[0]) / gap)), log)
        self.texts = tick_texts(self.ticks, log)

    def __call__(self, values):
        """Pixels; nan for what the axis cannot show."""
        values, low, high = np.asarray(values, float), self.low, self.high
        if self.log:
            values, low, high = np.log10(np.where(values > 0, values, np.nan)), np.log10(low), np.log10(high)
        share = np.where(np.isfinite(values), (values - low) / (high - low), np.nan)
        return self.pixels[0] + (self.pixels[1] - self.pixels[0]) * share


def draw_chart(canvas, box, chart):
    """Into the rectangle (left, top, width, height). Returns place(x, y), the pixel of a value."""
    left, top, width, height = box
    entries = [(name, pen.series_key(number, chart.dotted[number])) for number, name in enumerate(chart.series) if name]
    entries += pen.level_keys(chart.horizontal)
    side = pen.legend_width(entries, 0.3 * width)
    title, y_label = pen.wrap(chart.title, width, pen.LARGE), pen.wrap(chart.y_label, width)
    heads = [(title, pen.LARGE), (y_label, pen.SMALL)]
    y_top = top + sum(pen.height_of(text, size) + 4 for text, size in heads if text) + 8
    y_bottom = top + height - pen.height_of("") * (2 if chart.x_label else 1) - 8
    ways = [(size, most) for most in (3, 2, 1) for size in range(pen.SMALL, 8, -1)]       # of the legend, until it fits
    room = top + height - y_top
    way = next((way for way in ways if pen.legend(None, (0, 0), entries, side, *way) < room), ways[-1])
    ends = [end for band in chart.bands.values() for end in band]
    values = [ys for _, ys in chart.series.values()] + ends + [list(chart.horizontal.values())]
    y = Axis(values, chart.log_y, (y_bottom, y_top), 45)
    x_left = left + max(map(pen.width_of, y.texts), default=0) + 10
    x_right = left + width - (side + 18 if entries else 10)
    x = Axis([xs for xs, _ in chart.series.values()], chart.log_x, (x_left, x_right), 75)

    def place(at_x, at_y):
        return np.stack(np.broadcast_arrays(x(at_x), y(at_y)), -1)          # (..., 2)

    canvas.text(left, top, title, pen.LARGE)
    canvas.text(left, y_top - 10, y_label, colour=pen.GREY, anchor="ld")
    draw_axes(canvas, x, y, left)
    canvas.text((x_left + x_right) / 2, y_bottom + 6 + pen.height_of(""), chart.x_label, colour=pen.GREY, anchor="ma")
    draw_values(canvas, chart, place, x, y)
    pen.legend(canvas, (left + width - side, y_top), entries, side, *way)
    return place


def draw_axes(canvas, x, y, left):
    """Lines, ticks and their texts."""
    (x_left, x_right), (y_bottom, y_top) = x.pixels, y.pixels
    for value, text in zip(y.ticks, y.texts):
        canvas.line([(x_left, y(value)), (x_right, y(value))], pen.PALE, 1)
        canvas.text(x_left - 6, y(value), text, anchor="rm")
    free = left
    for value, text in zip(x.ticks, x.texts):
        at, half = x(value), pen.width_of(text) / 2
        canvas.line([(at, y_bottom), (at, y_bottom + 4)], pen.INK, 1)
        if at - half > free:                                                # else it would touch the one before
            canvas.text(at, y_bottom + 6, text, anchor="ma")
            free = at + half + 6
    canvas.line([(x_left, y_top), (x_left, y_bottom), (x_right, y_bottom)], pen.INK, 1)


def draw_values(canvas, chart, place, x, y):
    """Bands, levels, lines and points."""
    for number, (name, (xs, _)) in enumerate(chart.series.items()):
        if name in chart.bands:
            draw_band(canvas, number, place, xs, chart.bands[name], y.low if chart.log_y else -math.inf)
    for number, level in enumerate(chart.horizontal.values()):
        if np.isfinite(y(level)):
            pen.draw_level(canvas, number, place([x.low, x.high], level))
    for number, (xs, ys) in enumerate(chart.series.values()):
        pen.draw_series(canvas, number, place(xs, ys), range(len(xs)) if chart.dotted[number] else [])
    if not any(np.isfinite(place(xs, ys)).all(1).any() for xs, ys in chart.series.values()):
        canvas.text(sum(x.pixels) / 2, sum(y.pixels) / 2, "no values", pen.LARGE, pen.GREY, "mm")


def draw_band(canvas, number, place, xs, band, floor):
    """Between the low and the high ends; what lies below the floor of a log axis begins there."""
    low, high = band
    low = np.where(low > 0, low, floor) if floor > -math.inf else low
    ends, colour = np.stack([place(xs, low), place(xs, high)]), pen.style(number)[0]    # (2, n, 2)
    for run in pen.runs(np.isfinite(ends).all((0, 2))):
        if len(run) > 1:
            canvas.area(np.concatenate([ends[0, run], ends[1, run[::-1]]]), colour + (45,))
        else:
            canvas.line(ends[:, run[0]], colour + (110,), 3)


def panels(charts, path, columns=3, size=(640, 420)):
    """Several charts in one picture. charts: Charts, or dicts of their fields. Returns each one's place(x, y)."""
    columns = max(1, min(columns, len(charts)))
    canvas = pen.Canvas(columns * size[0], max(1, math.ceil(len(charts) / columns)) * size[1])
    places = []
    for number, chart in enumerate(charts):
        corner = number % columns * size[0] + pen.EDGE, number // columns * size[1] + pen.EDGE
        chart = Chart(**chart) if isinstance(chart, dict) else chart
        places.append(draw_chart(canvas, (*corner, size[0] - 2 * pen.EDGE, size[1] - 2 * pen.EDGE), chart))
    canvas.save(path)
    return places


def curves(series, path, title="", x_label="", y_label="", **words):
    """One line chart; words: further fields of Chart. Returns place(x, y), the pixel of a value."""
    return panels([Chart(series, title, x_label, y_label, **words)], path, size=(900, 540))[0]


def spectrum_chart(spectra, path, title="Singular values of the covariance of the normalised features"):
    """{name: singular values} on a logarithmic axis against their rank; what is below 1e-10 of the largest is
    round-off and drawn there."""
    spectra = {name: np.sort(array(values).astype(float))[::-1] for name, values in spectra.items()}
    floor = 1e-10 * max((np.nanmax(values, initial=0) for values in spectra.values()), default=0)
    series = {name: (np.arange(1, len(values) + 1), np.maximum(values, floor)) for name, values in spectra.items()}
    return curves(series, path, title, "rank", "singular value (log scale)", log_y=True, markers=False)


@dataclass
class Bars:
    """Lying bars in groups. series: {name: a value per group}; intervals: {name: (low ends, high ends)}; levels:
    {name: value}, dashed; label: what the values are. Bars begin at 0; nan is written n/a."""
    groups: list
    series: dict
    title: str = ""
    label: str = ""
    intervals: dict | None = None
    levels: dict | None = None

    def __post_init__(self):
        self.series = {name: array(values).astype(float) for name, values in self.series.items()}
        self.intervals = {name: np.array(ends, float) for name, ends in (self.intervals or {}).items()} # (2, groups)
        self.levels = self.levels or {}


def bars(chart, path):
    width, thick, series = 900, 18, chart.series
    title = pen.wrap(chart.title, width - 2 * pen.EDGE, pen.LARGE)
    names = [pen.wrap(group, 230) for group in chart.groups]
    pale = [tuple((255 + c) // 2 for c in colour) for colour in pen.COLOURS]
    colours = [*pen.COLOURS, *pale] * (1 + len(series) // 14)
    entries = [(name, pen.swatch(colour)) for name, colour in zip(series, colours) if name]
    entries += pen.level_keys(chart.levels)
    side = pen.legend_width(entries, 220)
    heights = [max(thick * len(series), pen.height_of(name)) + 14 for name in names]
    top = pen.EDGE + pen.height_of(title, pen.LARGE) + 8
    bottom = top + max(sum(heights), pen.legend(None, (0, 0), entries, side), 40)
    left, right = pen.EDGE + max(map(pen.width_of, names), default=0) + 12, width - pen.EDGE - side - 65
    canvas = pen.Canvas(width, bottom + 2 * pen.height_of("") + pen.EDGE + 6)
    x = Axis([*series.values(), *chart.intervals.values(), list(chart.levels.values()), [0]], False, (left, right), 75)

    canvas.text(pen.EDGE, pen.EDGE, title, pen.LARGE)
    for value, text in zip(x.ticks, x.texts):
        canvas.line([(x(value), top), (x(value), bottom)], pen.PALE, 1)
        canvas.text(x(value), bottom + 4, text, anchor="ma")
    canvas.text((left + right) / 2, bottom + 4 + pen.height_of(""), chart.label, colour=pen.GREY, anchor="ma")
    y, middles = top, []
    for name, height in zip(names, heights):
        canvas.text(left - 8, y + height / 2, name, anchor="rm")
        middles.append(y + height / 2 + thick * (np.arange(len(series)) + 0.5 - len(series) / 2))           # (series,)
        y += height
    texts = draw_bars(canvas, chart, x, middles, colours)
    for number, level in enumerate(chart.levels.values()):
        pen.draw_level(canvas, number, [(x(level), top), (x(level), bottom)])
    for at, middle, text in texts:                                          # on white: a level may run through them
        canvas.box(at - 1, middle - 7, at + pen.width_of(text) + 1, middle + 7, (255, 255, 255))
        canvas.text(at, middle, text, anchor="lm")
    canvas.line([(x(0), top), (x(0), bottom)], pen.INK, 1)
    pen.legend(canvas, (width - pen.EDGE - side, top), entries, side)
    canvas.save(path)


def draw_bars(canvas, chart, x, middles, colours):
    """Returns (x, y, text) of the numbers that belong behind the bars."""
    digits = ".3f" if 0.01 <= np.nanmax(np.abs([0, *np.ravel(list(chart.series.values()))])) < 1000 else ".2e"
    texts = []
    for group, places in enumerate(middles):
        for (name, values), middle, colour in zip(chart.series.items(), places, colours):
            value = values[group]
            tip = x(value) if np.isfinite(value) else x(0)
            canvas.box(min(x(0), tip), middle - 7, max(x(0), tip), middle + 7, colour)
            ends = x(chart.intervals[name][:, group]) if name in chart.intervals else np.array([np.nan, np.nan])
            if np.isfinite(ends).all():
                canvas.line([(ends[0], middle), (ends[1], middle)], pen.INK, 1.5)
                for end in ends:
                    canvas.line([(end, middle - 4), (end, middle + 4)], pen.INK, 1.5)
            text = short(f"{value:{digits}}") if np.isfinite(value) else "n/a"
            texts.append((np.nanmax([x(0), tip, *ends]) + 6, middle, text))
    return texts


def confusion_picture(matrix, classes, path, title="Confusion matrix"):
    """Counts with rows the truth and columns the predictions; the darker, the larger the share of its row."""
    matrix = array(matrix).astype(float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    cell = 64 if len(classes) <= 12 else 42
    rows, heads = ([pen.wrap(name, width) for name in classes] for width in (200, 160))
    left = pen.EDGE + max(map(pen.width_of, rows), default=0) + 10
    head = max(map(pen.width_of, heads), default=0)
    upright = head > cell - 4
    top = pen.EDGE + pen.height_of(title, pen.LARGE) + pen.height_of("") + 16 + (head if upright else pen.height_of(""))
    width = max(left + cell * len(classes), pen.EDGE + pen.width_of(title, pen.LARGE), 220) + pen.EDGE
    canvas = pen.Canvas(width, top + cell * len(classes) + pen.EDGE)
    canvas.text(pen.EDGE, pen.EDGE, title, pen.LARGE)
    below = pen.EDGE + pen.height_of(title, pen.LARGE)
    canvas.text(pen.EDGE, below, "rows: truth, columns: prediction", colour=pen.GREY)
    for row, name in enumerate(rows):
        canvas.text(left - 8, top + cell * (row + 0.5), name, anchor="rm")
        if upright:
            canvas.upright_text(left + cell * (row + 0.5), top - 6, heads[row])
        else:
            canvas.text(left + cell * (row + 0.5), top - 4, heads[row], anchor="md")
        for column in range(len(classes)):
            share, x, y = shares[row, column], left + cell * column, top + cell * row
            canvas.box(x, y, x + cell - 1, y + cell - 1, tuple(round(245 + (c - 245) * share) for c in pen.COLOURS[0]))
            text = f"{matrix[row, column]:.6g}\n{100 * share:.0f} %"
            colour = (255, 255, 255) if share > 0.6 else pen.INK
            canvas.text(x + cell / 2, y + cell / 2, text, pen.SMALL if cell > 50 else 11, colour, "mm")
    canvas.save(path)
