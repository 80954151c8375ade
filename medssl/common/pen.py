"""Paper and pen: text, lines and legends, drawn with Pillow alone.

Everything is drawn on a `Canvas` at twice its size and reduced at the end, which smooths edges. Colours are those of
Okabe and Ito, told apart with every kind of colour vision; from the eighth series on, lines are dashed and points
square. A file appears whole or not at all.
"""
import functools
import math
import textwrap
import unicodedata

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .files import whole

COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (0, 0, 0))
YELLOW, INK, GREY, PALE = (240, 228, 66), (40, 40, 40), (110, 110, 110), (228, 228, 228)
DASHES, LEVEL_DASHES = (None, (7, 4), (2, 3)), ((3, 4), (10, 4), (1, 3))    # of series; of levels: on, off
SCALE, SMALL, LARGE, GAP, EDGE = 2, 13, 17, 6, 14                           # drawing scale, sizes of text, spaces


@functools.cache
def font(size):
    return ImageFont.load_default(size=size)


def plain(text):
    """Pillow's own font has ASCII and a few signs: accents are dropped, other letters become '?'."""
    letters = unicodedata.normalize("NFKD", str(text))
    return "".join(c if c.isascii() or c in "±·°" else "?" for c in letters if not unicodedata.combining(c))


def width_of(text, size=SMALL):
    return max(font(size).getlength(line) for line in plain(text).split("\n"))


def height_of(text, size=SMALL):
    return round(1.25 * size) * (text.count("\n") + 1)


@functools.cache
def wrap(text, width, size=SMALL, most=None):
    """The text broken into lines none of which is wider than `width`; more than `most` lines end in dots."""
    text = plain(text)
    most_letters = math.ceil(1.2 * len(text) * min(1, width / max(width_of(text, size), 1)))
    for letters in range(max(most_letters, 3), 2, -1):
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

    def frame(self, x0, y0, x1, y1, colour, width=2):
        """The edge of a box."""
        self.line([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)], colour, width)

    def paste(self, picture, x, y, width=None):
        """With its corner at (x, y); as wide as it is, or enlarged or reduced to `width`."""
        factor = SCALE * (width or picture.width) / picture.width
        size = [max(1, round(side * factor)) for side in picture.size]
        picture = picture.resize(size, Image.NEAREST if factor >= 1 else Image.BOX)
        self.image.paste(picture, (round(x) * SCALE, round(y) * SCALE))

    def save(self, path):
        with whole(path) as temporary:
            self.image.reduce(SCALE).save(temporary, format="PNG", compress_level=2)        # a fifth larger than at 6,
                                                                                            # in half the time


def few_colours(path, greys=40, colours=160):
    """The same picture in so many greys and colours: a third of the bytes, for pages that are kept."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
    pixels = np.asarray(picture).reshape(-1, 3)                             # (n, 3)
    bright = pixels[np.ptp(pixels, axis=1) > 8]                             # those that are no greys
    palette = np.repeat(np.linspace(0, 255, greys).round().astype(int), 3).tolist()
    if len(bright):
        palette += Image.fromarray(bright[None]).quantize(colours).getpalette()[:3 * colours]
    sample = Image.new("P", (1, 1))
    sample.putpalette(palette)
    with whole(path) as temporary:
        picture.quantize(palette=sample, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)


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


def legend(canvas, corner, entries, width, size=SMALL, most=3):
    """Entries (name, key) below each other; key(canvas, x, y) draws what stands for the name. Returns the height used;
    canvas None: measures only."""
    (x, y), used = corner, 0
    for name, key in entries:
        text = wrap(name, width - 34, size, most)
        if canvas:
            key(canvas, x, y + used + height_of("", size) / 2)
            canvas.text(x + 34, y + used, text, size)
        used += height_of(text, size) + 4
    return used


def legend_width(entries, most):
    return min(most, 36 + max(width_of(name) for name, _ in entries)) if entries else 0
