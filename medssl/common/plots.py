"""Charts and picture sheets with Pillow alone.

Pictures   sheet, views_sheet, restored_sheet, overlays           rows of images (N, C, H, W) with values in [0, 1]
Charts     curves, panels, spectrum_chart, bars, confusion_picture

Everything is drawn on a `Canvas` at twice its size and reduced at the end, which smooths edges. Colours are those of
Okabe and Ito, told apart with every kind of colour vision; from the eighth series on, lines are dashed and points
square. What is not finite (or not positive on a log axis) is a gap in a line and n/a in a bar chart. A file appears
whole or not at all.
"""
import functools
import math
import textwrap
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import whole
from .metrics import array

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0))
YELLOW, INK, GREY, PALE = (240, 228, 66), (40, 40, 40), (110, 110, 110), (228, 228, 228)
DASHES, LEVEL_DASHES = (None, (7, 4), (2, 3)), ((3, 4), (10, 4), (1, 3))    # of series; of levels: on, off
SCALE, SMALL, LARGE, GAP, EDGE = 2, 13, 17, 6, 14                           # drawing scale, sizes of text, spaces


# ---- paper and pen

@functools.cache
def font(size):
    return ImageFont.load_default(size=size)


def plain(text):
    """Pillow's own font has ASCII and a few signs: accents are dropped, other letters become '?'."""
    letters = (letter for letter in unicodedata.normalize("NFKD", str(text)) if not unicodedata.combining(letter))
    return "".join(letter if letter.isascii() or letter in "±·°" else "?" for letter in letters)


def width_of(text, size=SMALL):
    return max(font(size).getlength(line) for line in plain(text).split("\n"))


def height_of(text, size=SMALL):
    return round(1.25 * size) * (text.count("\n") + 1)


@functools.cache
def wrap(text, width, size=SMALL, most=None):
    """The text broken into lines none of which is wider than `width`; more than `most` lines end in dots."""
    text = plain(text)
    letters = math.ceil(1.2 * len(text) * min(1, width / max(width_of(text, size), 1)))
    for letters in range(max(letters, 3), 2, -1):
        lines = "\n".join(textwrap.wrap(text, letters, max_lines=most, placeholder="..."))
        if width_of(lines, size) <= width:
            break
    return lines


class Canvas:
    """White paper; lengths are pixels of the finished picture."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (round(width) * SCALE, round(height) * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image, "RGBA")                      # a colour's fourth number: opacity

    def text(self, x, y, text, size=SMALL, colour=INK, anchor="la"):
        """Lines of text; anchor: l, m, r (left, middle, right) and a, m, d (top, middle, bottom)."""
        text, step = plain(text), height_of("", size)
        y += step / 2 - {"a": 0, "m": 0.5, "d": 1}[anchor[1]] * height_of(text, size)
        for number, line in enumerate(text.split("\n")):
            self.draw.text((x * SCALE, (y + step * number) * SCALE), line, colour, font(size * SCALE), anchor[0] + "m")

    def upright_text(self, x, y, text, size=SMALL):
        """Text that runs upwards from y, its lines around x."""
        strip = Canvas(width_of(text, size) + 2, height_of(text, size))
        strip.text(0, 0, text, size)
        turned = strip.image.transpose(Image.ROTATE_90)
        self.image.paste(turned, (round(x * SCALE) - turned.width // 2, round(y * SCALE) - turned.height))

    def line(self, points, colour, width=2, dash=None):
        points = np.asarray(points, float)                                  # (n, 2)
        pieces = [points]
        if dash is not None:
            along = np.concatenate([[0], np.hypot(*np.diff(points, axis=0).T).cumsum()])
            steps = np.arange(0, along[-1], 0.5)
            points = np.stack([np.interp(steps, along, axis) for axis in points.T], 1)
            pieces = [points[run] for run in runs(steps % sum(dash) <= dash[0])]
        for piece in pieces:
            self.draw.line([tuple(point) for point in piece * SCALE], colour, round(width * SCALE), joint="curve")

    def area(self, points, colour):
        self.draw.polygon([tuple(point) for point in np.asarray(points, float) * SCALE], fill=colour)

    def box(self, x0, y0, x1, y1, colour):
        self.area([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def dot(self, x, y, colour, square=False, radius=3.5):
        shape = self.draw.rectangle if square else self.draw.ellipse
        shape([(v + side * radius) * SCALE for side in (-1, 1) for v in (x, y)], fill=colour)

    def paste(self, picture, x, y):
        enlarged = picture.resize([side * SCALE for side in picture.size], Image.NEAREST)
        self.image.paste(enlarged, (round(x) * SCALE, round(y) * SCALE))

    def save(self, path):
        with whole(path) as temporary:
            self.image.reduce(SCALE).save(temporary, format="PNG")


def runs(good):
    """Indices of each stretch of True."""
    places = np.flatnonzero(good)
    return [run for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(run)]


def style(number):
    """Colour, dash and squareness of points of series `number`."""
    return COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % 3], number // len(COLOURS) % 2 == 1


def swatch(colour):
    return lambda canvas, x, y: canvas.box(x, y - 5, x + 26, y + 5, colour)


def series_key(number, dotted):
    def key(canvas, x, y):
        draw_series(canvas, number, np.array([(x, y), (x + 13, y), (x + 26, y)]), [1] if dotted else [])
    return key


def draw_series(canvas, number, points, dotted):
    """A line through the points (n, 2), broken where they are not finite; points by themselves and the `dotted` ones
    get a dot."""
    colour, dash, square = style(number)
    for run in runs(np.isfinite(points).all(1)):
        if len(run) > 1:
            canvas.line(points[run], colour, 2, dash)
        for place in run if len(run) == 1 else np.intersect1d(run, dotted):
            canvas.dot(*points[place], colour, square)


def draw_level(canvas, number, points):
    canvas.line(points, GREY, 1.5, LEVEL_DASHES[number % 3])


def level_keys(levels):
    def key(number, canvas, x, y):
        draw_level(canvas, number, [(x, y), (x + 26, y)])
    return [(name, functools.partial(key, number)) for number, name in enumerate(levels)]


def legend(canvas, x, y, entries, width, size=SMALL, most=3):
    """Entries (name, key) below each other; key(canvas, x, y) draws what stands for the name. Returns the height used;
    canvas None: measures only."""
    used = 0
    for name, key in entries:
        text = wrap(name, width - 34, size, most)
        if canvas:
            key(canvas, x, y + used + height_of("", size) / 2)
            canvas.text(x + 34, y + used, text, size)
        used += height_of(text, size) + 4
    return used


def legend_width(entries, most):
    return min(most, 36 + max(width_of(name) for name, _ in entries)) if entries else 0


# ---- pictures

def mask_colour(number):
    return (*COLOURS[:5], YELLOW, COLOURS[5])[(number - 1) % 7]


def as_picture(values, least=96, most=320):
    """(C, H, W) in [0, 1] -> picture, enlarged by a whole number to at least `least` pixels or reduced to `most`; the
    first channel unless there are 3."""
    values = np.nan_to_num(array(values).astype(np.float32)).clip(0, 1)
    values = values if len(values) == 3 else np.repeat(values[:1], 3, 0)    # (3, H, W)
    picture = Image.fromarray((values.transpose(1, 2, 0) * 255).round().astype(np.uint8))
    side = max(picture.size)
    factor = math.ceil(least / side) if side <= most else most / side
    size = [max(1, round(length * factor)) for length in picture.size]
    return picture.resize(size, Image.BOX if side > most else Image.NEAREST)


def as_mask(values, picture):
    """(H, W) class numbers at the picture's size; 255, unknown, is shown as background."""
    values = array(values).astype(np.uint8)
    values[values == 255] = 0
    return np.array(Image.fromarray(values).resize(picture.size, Image.NEAREST))


def outline(mask, thick=1):
    """(H, W) bool: pixels of a class within `thick` of another one."""
    edge = np.zeros(mask.shape, bool)
    for apart in range(1, thick + 1):
        for lines, marks in ((mask, edge), (mask.T, edge.T)):
            differs = lines[apart:] != lines[:-apart]
            marks[apart:] |= differs
            marks[:-apart] |= differs
    return edge & (mask > 0)


def painted(picture, mask):
    """The picture with each class tinted and outlined in a colour of its own."""
    pixels, edge = np.array(picture), outline(mask)
    for number in np.unique(mask[mask > 0]):
        here = mask == number
        pixels[here] = 0.7 * pixels[here] + 0.3 * np.array(mask_colour(number))
        pixels[here & edge] = mask_colour(number)
    return Image.fromarray(pixels)


def sheet(rows, path, titles=None, masks=None, columns=None, colours=None, least=96):
    """Rows of pictures. rows: (title, pictures (N, C, H, W)) each; titles: a text under each picture of the first row;
    masks: per row None or (N, H, W) class numbers to lay over; columns: longer rows go on below (a contact sheet);
    colours: legend {name: colour}."""
    lines = []                                                              # (row title, pictures, their titles) each
    for number, (title, pictures) in enumerate(rows):
        shown = [as_picture(picture, least) for picture in pictures]
        if masks is not None and masks[number] is not None:
            shown = [painted(picture, as_mask(mask, picture)) for picture, mask in zip(shown, masks[number])]
        texts = [] if titles is None or number else [wrap(text, picture.width) for text, picture in zip(titles, shown)]
        step = columns or max(len(shown), 1)
        for start in range(0, len(shown), step):
            part = slice(start, start + step)
            lines.append((wrap("" if start else title, 120), shown[part], texts[part]))
    lines = lines or [("no pictures", [], [])]
    side = max(width_of(title) for title, _, _ in lines)
    left = GAP + (side + GAP if side else 0)
    column = GAP + max([picture.width for _, shown, _ in lines for picture in shown], default=0)
    width = max(left + column * max(len(shown) for _, shown, _ in lines), 200)
    heights = [max([height_of(title)] + [picture.height for picture in shown]) + GAP
               + max(map(height_of, texts), default=0) for title, shown, texts in lines]
    entries = [(name, swatch(colour)) for name, colour in (colours or {}).items()]
    canvas, y = Canvas(width, GAP + sum(heights) + legend(None, 0, 0, entries, width - left)), GAP
    for (title, shown, texts), height in zip(lines, heights):
        canvas.text(GAP, y, title)
        for number, picture in enumerate(shown):
            canvas.paste(picture, left + number * column, y)
        for number, (text, picture) in enumerate(zip(texts, shown)):
            canvas.text(left + number * column + picture.width / 2, y + picture.height, text, anchor="ma")
        y += height
    legend(canvas, left, y, entries, width - left)
    canvas.save(path)


def sort_views(views, count):
    """Of a method's view tensors: pictures (floating 4-D; 5-D holds several per image), masks (bool (B, 1, h, w)),
    numbers (integer 1-D). The rest is not for the eye."""
    pictures, masks, numbers = [], [], []
    for view in (array(view[:count]) for view in views):
        if view.dtype.kind == "f" and view.ndim == 4:
            pictures.append(view)
        elif view.dtype.kind == "f" and view.ndim == 5:
            pictures += list(view.swapaxes(0, 1))
        elif view.dtype.kind == "b" and view.ndim == 4 and view.shape[1] == 1:
            masks.append(view)
        elif view.dtype.kind in "iu" and view.ndim == 1:
            numbers.append(view)
    return pictures, masks, numbers


def greyed(pictures, mask):
    """(B, C, H, W) with grey in the cells where the mask (B, 1, h, w) is False."""
    down, right = (np.arange(size) * cells // size for size, cells in zip(pictures.shape[2:], mask.shape[2:]))
    return np.where(mask[:, :, down][..., right], pictures, 0.5)


def views_sheet(views, path, count=8):
    """What a method sees: its pictures, the first of them with hidden cells greyed. Under one or two pictures with a
    single number stands that number, the answer that is asked for; several are bookkeeping such as orders and patients."""
    pictures, masks, numbers = sort_views(views, count)
    rows = [(f"view {number}", picture) for number, picture in enumerate(pictures, 1)]
    rows += [("visible", greyed(pictures[0], mask)) for mask in masks if pictures]
    sheet(rows, path, titles=list(map(str, numbers[0])) if len(numbers) == 1 and len(pictures) < 3 else None)


def restored_sheet(images, views, restored, path, count=8):
    """The image, what the network was given (the first view, hidden cells greyed) and what it made of it."""
    pictures, masks, _ = sort_views(views, count)
    given = functools.reduce(greyed, masks, pictures[0])
    sheet([("image", images[:count]), ("input", given), ("restored", restored[:count])], path)


def overlays(images, targets, predictions, titles, path):
    """Images (N, C, H, W) and below them the outlines of the true and the predicted masks (N, H, W); where both agree
    both are seen."""
    colours, drawn = {"truth": COLOURS[4], "prediction": COLOURS[5]}, []
    for image, target, prediction in zip(images, targets, predictions):
        picture = as_picture(image, least=256)
        pixels = np.array(picture)
        pixels[outline(as_mask(target, picture), thick=3)] = colours["truth"]
        pixels[outline(as_mask(prediction, picture), thick=2)] = colours["prediction"]
        drawn.append(pixels.transpose(2, 0, 1) / 255)                       # (3, H, W)
    sheet([("image", images), ("outlines", drawn)], path, titles=titles, colours=colours, least=256)


# ---- charts

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


def draw_chart(canvas, left, top, width, height, series, title="", x_label="", y_label="", log_x=False, log_y=False,
               bands=None, horizontal=None, markers=None):
    """One line chart into this rectangle; words as in `curves`. Returns place(x, y), the pixel of a value."""
    series = {name: [array(values).astype(float) for values in pair] for name, pair in series.items()}
    bands = {name: [array(end).astype(float) for end in ends] for name, ends in (bands or {}).items()}
    levels = list((horizontal or {}).values())
    dotted = [np.isfinite(ys).sum() <= 30 if markers is None else markers for _, ys in series.values()]
    entries = [(name, series_key(number, dotted[number])) for number, name in enumerate(series) if name]
    entries += level_keys(horizontal or {})
    side = legend_width(entries, 0.3 * width)

    title, y_label = wrap(title, width, LARGE), wrap(y_label, width)
    y_top = top + (height_of(title, LARGE) + 4 if title else 0) + (height_of(y_label) + 4 if y_label else 0) + 8
    y_bottom = top + height - height_of("") * (2 if x_label else 1) - 8
    small = [(size, most) for most in (3, 2, 1) for size in range(SMALL, 8, -1)]          # of the legend, until it fits
    small = next((way for way in small if legend(None, 0, 0, entries, side, *way) < top + height - y_top), small[-1])
    x_low, x_high = span([xs for xs, _ in series.values()], log_x)
    y_low, y_high = span([ys for _, ys in series.values()] + [end for ends in bands.values() for end in ends]
                         + [levels], log_y)
    y_ticks = ticks(y_low, y_high, max(2, int((y_bottom - y_top) / 45)), log_y)
    y_texts = tick_texts(y_ticks, log_y)
    x_left = left + max(map(width_of, y_texts), default=0) + 10
    x_right = left + width - (side + 18 if entries else 10)
    x_ticks = ticks(x_low, x_high, max(2, int((x_right - x_left) / 75)), log_x)

    def share(values, low, high, log):
        """Where a value lies between the ends of its axis, 0 to 1; nan for what the axis cannot show."""
        values = np.asarray(values, float)
        if log:
            values, low, high = np.log10(np.where(values > 0, values, np.nan)), np.log10(low), np.log10(high)
        return np.where(np.isfinite(values), (values - low) / (high - low), np.nan)

    def place(x, y):
        x = x_left + (x_right - x_left) * share(x, x_low, x_high, log_x)
        y = y_bottom - (y_bottom - y_top) * share(y, y_low, y_high, log_y)
        return np.stack(np.broadcast_arrays(x, y), -1)                      # (..., 2)

    canvas.text(left, top, title, LARGE)
    canvas.text(left, y_top - 10, y_label, colour=GREY, anchor="ld")
    for value, text in zip(y_ticks, y_texts):
        canvas.line(place([x_low, x_high], value), PALE, 1)
        canvas.text(x_left - 6, place(x_low, value)[1], text, anchor="rm")
    free = left
    for value, text in zip(x_ticks, tick_texts(x_ticks, log_x)):
        x, half = place(value, y_low)[0], width_of(text) / 2
        canvas.line([(x, y_bottom), (x, y_bottom + 4)], INK, 1)
        if x - half > free:                                                 # else it would touch the one before
            canvas.text(x, y_bottom + 6, text, anchor="ma")
            free = x + half + 6
    canvas.line([(x_left, y_top), (x_left, y_bottom), (x_right, y_bottom)], INK, 1)
    canvas.text((x_left + x_right) / 2, y_bottom + 6 + height_of(""), x_label, colour=GREY, anchor="ma")

    for number, (name, (xs, _)) in enumerate(series.items()):
        if name in bands:
            low, high = bands[name]
            low = np.where(low > 0, low, y_low) if log_y else low
            ends, colour = np.stack([place(xs, low), place(xs, high)]), style(number)[0]                    # (2, n, 2)
            for run in runs(np.isfinite(ends).all((0, 2))):
                if len(run) > 1:
                    canvas.area(np.concatenate([ends[0, run], ends[1, run[::-1]]]), colour + (45,))
                else:
                    canvas.line(ends[:, run[0]], colour + (110,), 3)
    for number, level in enumerate(levels):
        if np.isfinite(place(x_low, level)).all():
            draw_level(canvas, number, place([x_low, x_high], level))
    for number, (xs, ys) in enumerate(series.values()):
        draw_series(canvas, number, place(xs, ys), range(len(xs)) if dotted[number] else [])
    if not any(np.isfinite(place(xs, ys)).all(1).any() for xs, ys in series.values()):
        canvas.text((x_left + x_right) / 2, (y_top + y_bottom) / 2, "no values", LARGE, GREY, "mm")
    legend(canvas, left + width - side, y_top, entries, side, *small)
    return place


def panels(charts, path, columns=3, size=(640, 420)):
    """Several line charts in one picture. charts: dicts of `series` and any words of `curves`. Returns each one's
    place(x, y)."""
    columns = max(1, min(columns, len(charts)))
    canvas = Canvas(columns * size[0], max(1, math.ceil(len(charts) / columns)) * size[1])
    places = [draw_chart(canvas, number % columns * size[0] + EDGE, number // columns * size[1] + EDGE,
                         size[0] - 2 * EDGE, size[1] - 2 * EDGE, **chart) for number, chart in enumerate(charts)]
    canvas.save(path)
    return places


def curves(series, path, title="", x_label="", y_label="", **words):
    """A line chart. series: {name: (xs, ys)}; words: bands {name: (low, high)}, horizontal {name: y} (chance levels),
    log_x, log_y, and markers (points on the lines; without the word, up to 30 values have them). Returns place(x, y),
    the pixel of a value."""
    return panels([dict(words, series=series, title=title, x_label=x_label, y_label=y_label)], path, size=(900, 540))[0]


def spectrum_chart(spectra, path, title="Singular values of the covariance of the normalised features"):
    """{name: singular values} on a logarithmic axis against their rank; what is below 1e-10 of the largest is
    round-off and drawn there."""
    spectra = {name: np.sort(array(values).astype(float))[::-1] for name, values in spectra.items()}
    floor = 1e-10 * max((np.nanmax(values, initial=0) for values in spectra.values()), default=0)
    series = {name: (np.arange(1, len(values) + 1), np.maximum(values, floor)) for name, values in spectra.items()}
    return curves(series, path, title, "rank", "singular value (log scale)", log_y=True, markers=False)


def bars(groups, series, path, title="", label="", intervals=None, levels=None):
    """Lying bars in groups. series: {name: a value per group}; intervals: {name: (low ends, high ends)}; levels:
    {name: value}, dashed; label: what the values are. Bars begin at 0; nan is written n/a."""
    series = {name: array(values).astype(float) for name, values in series.items()}
    intervals = {name: np.array(ends, float) for name, ends in (intervals or {}).items()}      # (2, groups) each
    levels, width, thick = levels or {}, 900, 18
    title, names = wrap(title, width - 2 * EDGE, LARGE), [wrap(group, 230) for group in groups]
    colours = [*COLOURS, *(tuple((255 + c) // 2 for c in colour) for colour in COLOURS)] * (1 + len(series) // 14)
    digits = ".3f" if 0.01 <= np.nanmax(np.abs([0, *np.ravel(list(series.values()))])) < 1000 else ".2e"
    entries = [(name, swatch(colour)) for name, colour in zip(series, colours) if name]
    entries += level_keys(levels)
    side = legend_width(entries, 220)
    heights = [max(thick * len(series), height_of(name)) + 14 for name in names]
    top = EDGE + height_of(title, LARGE) + 8
    bottom = top + max(sum(heights), legend(None, 0, 0, entries, side), 40)
    left, right = EDGE + max(map(width_of, names), default=0) + 12, width - EDGE - side - 65
    low, high = span([*series.values(), *intervals.values(), list(levels.values()), [0]])
    canvas = Canvas(width, bottom + 2 * height_of("") + EDGE + 6)

    def place(value):
        return left + (right - left) * (value - low) / (high - low)

    canvas.text(EDGE, EDGE, title, LARGE)
    values = ticks(low, high, max(2, int((right - left) / 75)))
    for value, text in zip(values, tick_texts(values)):
        canvas.line([(place(value), top), (place(value), bottom)], PALE, 1)
        canvas.text(place(value), bottom + 4, text, anchor="ma")
    canvas.text((left + right) / 2, bottom + 4 + height_of(""), label, colour=GREY, anchor="ma")
    y, texts = top, []
    for group, (name, height) in enumerate(zip(names, heights)):
        canvas.text(left - 8, y + height / 2, name, anchor="rm")
        for number, (key, values) in enumerate(series.items()):
            middle, value = y + height / 2 + thick * (number + 0.5 - len(series) / 2), values[group]
            tip = place(value) if np.isfinite(value) else place(0)
            canvas.box(min(place(0), tip), middle - 7, max(place(0), tip), middle + 7, colours[number])
            ends = place(intervals[key][:, group]) if key in intervals else np.array([np.nan, np.nan])
            if np.isfinite(ends).all():
                canvas.line([(ends[0], middle), (ends[1], middle)], INK, 1.5)
                for x in ends:
                    canvas.line([(x, middle - 4), (x, middle + 4)], INK, 1.5)
            text = short(f"{value:{digits}}") if np.isfinite(value) else "n/a"
            texts.append((np.nanmax([place(0), tip, *ends]) + 6, middle, text))
        y += height
    for number, level in enumerate(levels.values()):
        draw_level(canvas, number, [(place(level), top), (place(level), bottom)])
    for x, middle, text in texts:                                           # on white: a level may run through them
        canvas.box(x - 1, middle - 7, x + width_of(text) + 1, middle + 7, (255, 255, 255))
        canvas.text(x, middle, text, anchor="lm")
    canvas.line([(place(0), top), (place(0), bottom)], INK, 1)
    legend(canvas, width - EDGE - side, top, entries, side)
    canvas.save(path)


def confusion_picture(matrix, classes, path, title="Confusion matrix"):
    """Counts with rows the truth and columns the predictions; the darker, the larger the share of its row."""
    matrix = array(matrix).astype(float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    cell = 64 if len(classes) <= 12 else 42
    rows, heads = [wrap(name, 200) for name in classes], [wrap(name, 160) for name in classes]
    left, head = EDGE + max(map(width_of, rows), default=0) + 10, max(map(width_of, heads), default=0)
    upright = head > cell - 4
    top = EDGE + height_of(title, LARGE) + height_of("") + 16 + (head if upright else height_of(""))
    width = max(left + cell * len(classes), EDGE + width_of(title, LARGE), 220) + EDGE
    canvas = Canvas(width, top + cell * len(classes) + EDGE)
    canvas.text(EDGE, EDGE, title, LARGE)
    canvas.text(EDGE, EDGE + height_of(title, LARGE), "rows: truth, columns: prediction", colour=GREY)
    for row, name in enumerate(rows):
        canvas.text(left - 8, top + cell * (row + 0.5), name, anchor="rm")
        if upright:
            canvas.upright_text(left + cell * (row + 0.5), top - 6, heads[row])
        else:
            canvas.text(left + cell * (row + 0.5), top - 4, heads[row], anchor="md")
        for column in range(len(classes)):
            share, x, y = shares[row, column], left + cell * column, top + cell * row
            canvas.box(x, y, x + cell - 1, y + cell - 1, tuple(round(245 + (c - 245) * share) for c in COLOURS[0]))
            text, colour = f"{matrix[row, column]:.6g}\n{100 * share:.0f} %", (255, 255, 255) if share > 0.6 else INK
            canvas.text(x + cell / 2, y + cell / 2, text, SMALL if cell > 50 else 11, colour, "mm")
    canvas.save(path)
