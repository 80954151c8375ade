"""Portraits of methods that are asked something: what was hidden, which turn, which place, which order."""

import torch

from ..pen import GREY, INK
from ..sheets import greyed
from .frames import BLUE, ORANGE, coloured_cell, native, right, rows_of, shown

# ---- restoring

def draw_restored(scene, count=6):
    given = scene.pictures[0]
    for mask in scene.masks:
        given = greyed(given, mask)
    rows = [("image", scene.seen), ("what goes in", given)]
    rows += [(look.heading, look.outs["restored"]) for look in scene.looks]
    return rows_of(scene, "Asked: what did the image look like?" + " Grey cells are hidden." * bool(scene.masks),
                   [(label, None, list(map(shown, pictures[:count]))) for label, pictures in rows],
                   "Rows of a network: what it paints."
                   + " Hidden cells have their true mean and contrast, visible ones are copied." * bool(scene.masks))


# ---- one of several answers

def draw_bars(scene, count=6):
    """A picture, and a bar for each answer."""
    truth = torch.from_numpy(scene.numbers[0])
    rows = [("what goes in", None, list(map(shown, scene.pictures[0][:count])))]
    for look in scene.looks:
        answers = look.said["head"]                                         # (B, K)
        tiles = [bars(share, int(true)) for share, true in zip(answers.softmax(1)[:count], truth)]
        rows.append((right(look, answers.argmax(1) == truth), 92, tiles))
    return rows_of(scene, "Asked: which of the answers made this picture?", rows,
                   f"Bars: how sure the network is of each answer, 0 to {answers.shape[1] - 1}; together they make 1. "
                   "Blue: the right answer. Dashed: where they would stand by chance.")


def bars(shares, true):
    """shares (K,) of the answers, as standing bars."""
    def draw(canvas, x, y, side):
        step, height, foot = side / len(shares), 68, y + 74
        chance = foot - height / len(shares)
        for number, share in enumerate(shares.tolist()):
            at, top = x + number * step, foot - max(share * height, 1)
            canvas.box(at + 3, top, at + step - 3, foot, BLUE if number == true else (190, 190, 190))
            canvas.text(at + step / 2, foot + 2, str(number), 12, BLUE if number == true else GREY, "ma")
        canvas.line([(x, chance), (x + side, chance)], GREY, 1, (2, 3))
        canvas.line([(x, foot), (x + side, foot)], INK, 1)
    return draw


def draw_patches(scene, count=5):
    """Two patches of an image, and the shares of the eight places where the second may lie."""
    truth, (centre, other) = torch.from_numpy(scene.numbers[0]), scene.pictures[:2]
    rows = [("image", None, [marked(*each) for each in zip(scene.seen[:count], centre, other)]),
            ("what goes in", 66, [two(*each) for each in zip(centre[:count], other)])]
    for look in scene.looks:
        answers = look.said["head"]                                         # (B, 8)
        tiles = [around(share, int(true)) for share, true in zip(answers.softmax(1)[:count], truth)]
        rows.append((right(look, answers.argmax(1) == truth), None, tiles))
    return rows_of(scene, "Asked: on which of eight sides of the blue patch does the orange one lie?", rows,
                   "Numbers: how sure the network is of each place around the blue patch, in per cent. Framed in "
                   "orange: where the second patch lies.")


def marked(image, *patches):
    def draw(canvas, x, y, side):
        canvas.paste(native(image), x, y, side)
        for patch, colour in zip(patches, (BLUE, ORANGE)):
            patch = torch.as_tensor(patch)
            scale, (top, left) = side / image.shape[2], locate(image, patch)
            canvas.frame(x + left * scale, y + top * scale, x + (left + patch.shape[2]) * scale,
                         y + (top + patch.shape[1]) * scale, colour, 3)
    return draw


def locate(image, patch):
    """Row and column of the piece of image (C, H, W) that is most like the patch (C, h, w)."""
    windows = image.unfold(1, patch.shape[1], 1).unfold(2, patch.shape[2], 1)       # (C, H - h + 1, W - w + 1, h, w)
    error = (windows - patch[:, None, None]).abs().sum((0, 3, 4))           # (H - h + 1, W - w + 1)
    return divmod(int(error.argmin()), error.shape[1])


def two(centre, other):
    def draw(canvas, x, y, side):
        for number, (patch, colour) in enumerate(((centre, BLUE), (other, ORANGE))):
            at = x + number * (60 + 10) + (side - 130) / 2
            canvas.paste(native(patch), at, y, 60)
            canvas.frame(at, y, at + 60, y + 60, colour, 3)
    return draw


def around(shares, true):
    """shares (8,) of the places around a centre, row by row."""
    def draw(canvas, x, y, side):
        cell = side / 3
        canvas.frame(x + cell + 1, y + cell + 1, x + 2 * cell - 1, y + 2 * cell - 1, BLUE, 2)
        for place, share in enumerate(shares.tolist()):
            row, column = divmod(place + (place > 3), 3)                    # the centre is no answer
            corner = x + column * cell, y + row * cell
            coloured_cell(canvas, (*corner, cell), share, f"{100 * share:.0f}")
        row, column = divmod(true + (true > 3), 3)
        canvas.frame(x + column * cell + 1, y + row * cell + 1, x + (column + 1) * cell - 1, y + (row + 1) * cell - 1,
                     ORANGE, 3)
    return draw


# ---- puzzles

def draw_puzzle(scene, count=5):
    """Tiles as they come, and where the network puts them; wrong ones are framed."""
    tiles = next(view for view in scene.views if view.ndim == 5)            # (B, T, C, h, w)
    turning = next((view for view in scene.views if view.ndim == 2 and not view.is_floating_point()), None)   # (B, T)
    orders, nothing = scene.looks[0].method.orders, torch.zeros(tiles.shape[:2], dtype=torch.bool)
    truth = orders[torch.from_numpy(scene.numbers[0])]                      # (B, T)
    rows = [("image", None, list(map(shown, scene.seen[:count]))),
            ("what goes in", None, [lattice(image, nothing[0]) for image in tiles[:count]])]
    for look in scene.looks:
        order, mirrored = said_of_puzzle(look, orders, tiles.shape[:2])     # (B, T), (B, T)
        wrong = (order != truth) if turning is None else (order != truth) | (mirrored != turning)
        back = torch.where((mirrored == 1)[..., None, None, None], tiles.flip(4), tiles)
        back = torch.where((mirrored == 2)[..., None, None, None], tiles.flip(3), back)
        image, place = torch.arange(len(order))[:, None], order.argsort(1)
        drawn = [lattice(*each) for each in zip(back[image, place][:count], wrong[image, place])]
        rows.append((right(look, ~wrong) + " tiles", None, drawn))
    also = " Which tiles are mirrored?" if turning is not None else ""
    return rows_of(scene, f"Asked: in which of {len(orders)} orders do the tiles lie?{also}", rows,
                   "Rows of a network: the tiles put back as it says. Framed in orange: tiles that it has wrong.")


def said_of_puzzle(look, orders, shape):
    """Where each tile is said to belong, and how it is said to be mirrored (0 not, 1 left-right, 2 up-down): (B, T)
    each."""
    answers = look.said.get("head", look.said.get("order_head"))            # (B, K)
    across, down = (look.said.get(f"tile_heads.{name}", torch.full(shape, -1.0)) for name in ("horizontal", "vertical"))
    mirrored = torch.where(across >= down, 1, 2) * (torch.maximum(across, down) > 0)
    return orders[answers.argmax(1)], mirrored


def lattice(tiles, wrong):
    """tiles (T, C, h, w) row by row."""
    def draw(canvas, x, y, side):
        grid = round(len(tiles) ** 0.5)
        step = side / grid
        for number, tile in enumerate(tiles):
            row, column = divmod(number, grid)
            at_x, at_y = round(x + column * step), round(y + row * step)
            canvas.paste(native(tile), at_x + 2, at_y + 2, round(step) - 4)
            if wrong[number]:
                canvas.frame(at_x + 2, at_y + 2, at_x + step - 2, at_y + step - 2, ORANGE, 3)
    return draw
