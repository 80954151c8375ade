"""What portraits are drawn on: a headed sheet, rows of tiles with words beside them, blocks side by side."""

import re

from ..pen import COLOURS, EDGE, GAP, GREY, INK, LARGE, PALE, SCALE, SMALL, Canvas, height_of, wrap
from ..sheets import as_picture

BLUE, ORANGE = COLOURS[:2]
WIDTH, LEFT = 880, 124                      # pixels: of a portrait, and of the words beside its rows
ROOM = WIDTH - 2 * EDGE                     # between its margins, for one block or two
BLOCK = (ROOM - 24) // 2


def paper(scene, words, height, note, width=WIDTH):
    """A Canvas headed by what the method says of itself, `words` below it and the note at its foot; and the y from
    where on `height` pixels are free."""
    cls = type(scene.looks[0].method)
    told = re.split(r"[.;] |$", (cls.__doc__ or "").splitlines()[0].rstrip("."))[0]             # its first sentence
    room = width - 2 * EDGE
    head = wrap_lines(f"{cls.__name__}: {told}", room, LARGE)
    words, note = wrap_lines(words, room), wrap_lines(note, room)
    top = EDGE + height_of(head, LARGE) + 2
    y = top + height_of(words) + 2 * GAP
    canvas = Canvas(width, y + height + height_of(note) + EDGE)
    canvas.text(EDGE, EDGE, head, LARGE)
    canvas.text(EDGE, top, words)
    canvas.text(EDGE, y + height, note, colour=GREY)
    return canvas, y


def rows_of(scene, words, rows, note):
    """A picture with rows (words beside it, its height or None, tiles); tile(canvas, x, y, side) draws one. A row is as
    high as its tiles, which are square, if nothing else is said."""
    step = (ROOM - LEFT) // max(len(tiles) for *_, tiles in rows)
    side = fitting(step - GAP, scene.seen.shape[3])
    rows = [(wrap_lines(label, LEFT - GAP), height or side, tiles) for label, height, tiles in rows]
    heights = [max(height, height_of(label)) + 2 * GAP for label, height, _ in rows]
    canvas, y = paper(scene, words, sum(heights), note)
    for (label, _, tiles), height in zip(rows, heights):
        canvas.text(EDGE, y, label)
        for number, draw in enumerate(tiles):
            draw(canvas, EDGE + LEFT + number * step, y, side)
        y += height
    return canvas


def fitting(side, pixels):
    """The largest side up to this one at which all pixels of a picture are drawn alike."""
    return side if SCALE * side < pixels else SCALE * side // pixels * pixels // SCALE


def blocks_of(scene, words, headings, block, note):
    """A picture with a block for each network, one or two side by side; block = (height, draw), and
    draw(canvas, x, y, number) draws it."""
    height, draw = block
    texts = [wrap_lines(heading, BLOCK) for heading in headings]
    above = max(map(height_of, texts)) + GAP
    canvas, y = paper(scene, words, above + height, note, WIDTH if len(headings) > 1 else BLOCK + 2 * EDGE)
    for number, text in enumerate(texts):
        x = EDGE + number * (BLOCK + 24)
        canvas.text(x, y, text)
        draw(canvas, x, y + above, number)
    return canvas


def wrap_lines(text, width, size=SMALL):
    return "\n".join(wrap(line, width, size) for line in text.split("\n"))


def native(values):
    """(C, H, W) in [0, 1] as a picture of its own size."""
    return as_picture(values, 1, 4096)


def shown(values):
    """A tile with this picture, its edge drawn: its background may be white, too."""
    def draw(canvas, x, y, side):
        canvas.paste(native(values), x, y, side)
        canvas.frame(x, y, x + side, y + side, PALE, 1)
    return draw


def right(look, mask):
    """The heading with how often the answer was right."""
    return f"{look.heading}\nright: {int(mask.sum())} of {mask.numel()}"


def stack(canvases):
    """One below the other."""
    together = Canvas(WIDTH, sum(canvas.image.height for canvas in canvases) / 2)
    y = 0
    for canvas in canvases:
        together.image.paste(canvas.image, (0, y))
        y += canvas.image.height
    return together


def coloured_cell(canvas, box, value, text, size=12):
    """A square (x, y, side) that is the bluer, the nearer `value` is to 1, and the more orange, the nearer to -1."""
    (x, y, side), strength = box, min(abs(value), 1)
    full = BLUE if value >= 0 else ORANGE
    canvas.box(x, y, x + side - 1, y + side - 1, tuple(round(255 + (c - 255) * strength) for c in full))
    canvas.text(x + side / 2, y + side / 2, text, size, (255, 255, 255) if strength > 0.55 else INK, "mm")


def draw_views(scene):
    rows = [(f"view {number}", None, list(map(shown, view[:6]))) for number, view in enumerate(scene.pictures, 1)]
    return rows_of(scene, "What goes in.", rows, "")
