"""Sheets of pictures: rows of images (N, C, H, W) with values in [0, 1], and what networks make of them."""
import functools
import math

import numpy as np
from PIL import Image

from .metrics import array
from .pen import COLOURS, GAP, YELLOW, Canvas, height_of, legend, swatch, width_of, wrap


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


def sheet(rows, path, titles=None, columns=None, colours=None, least=96):
    """Rows of pictures. rows: (title, pictures (N, C, H, W)[, masks (N, H, W)]) each; titles: a text
    under each picture of the first row; columns: longer rows go on below (a contact sheet); colours: a legend."""
    lines = []                                                              # (row title, pictures, their titles) each
    for number, (title, pictures, *masks) in enumerate(rows):
        shown = [as_picture(picture, least) for picture in pictures]
        for layer in masks:
            shown = [painted(picture, as_mask(mask, picture)) for picture, mask in zip(shown, layer)]
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
    canvas, y = Canvas(width, GAP + sum(heights) + legend(None, (0, 0), entries, width - left)), GAP
    for (title, shown, texts), height in zip(lines, heights):
        canvas.text(GAP, y, title)
        for number, picture in enumerate(shown):
            canvas.paste(picture, left + number * column, y)
        for number, (text, picture) in enumerate(zip(texts, shown)):
            canvas.text(left + number * column + picture.width / 2, y + picture.height, text, anchor="ma")
        y += height
    legend(canvas, (left, y), entries, width - left)
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
    single number stands that number, the answer that is asked for; several are bookkeeping such as orders."""
    pictures, masks, numbers = sort_views(views, count)
    rows = [(f"view {number}", picture) for number, picture in enumerate(pictures, 1)]
    rows += [("visible", greyed(pictures[0], mask)) for mask in masks if pictures]
    sheet(rows, path, titles=list(map(str, numbers[0])) if len(numbers) == 1 and len(pictures) < 3 else None)


def restored_sheet(images, views, restored, path, count=8):
    """The image, what the network was given (the first view, hidden cells greyed) and what it made of it."""
    pictures, masks, _ = sort_views(views, count)
    given = functools.reduce(greyed, masks, pictures[0])
    sheet([("image", images[:count]), ("input", given), ("restored", restored[:count])], path)


def overlays(images, masks, classes, titles, path):
    """Images (N, C, H, W), and below them each of the masks {name: (N, H, W)}, every class in a colour of its own: a
    class that is taken for another one is seen."""
    rows = [("image", images)] + [(name, images, mask) for name, mask in masks.items()]
    found = np.unique(np.concatenate([np.ravel(array(mask)) for mask in masks.values()]))
    colours = {f"class {classes[number]}": mask_colour(number) for number in found if 0 < number < len(classes)}
    sheet(rows, path, titles=titles, colours=colours, least=256)
