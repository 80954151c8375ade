"""Portraits: what goes into a method, what is asked, and what networks answer, in one picture.

One forward pass of each network is overheard: what its heads and projectors say is noted. Views, answers and outputs
decide what is drawn; no method is known by its name. A method of your own that names its parts likewise has its
picture, too.

    what there is                                       what is drawn
    "restored" among the outputs                        images, the input, what was restored
    tiles (B, T, C, h, w) and a table of orders         the puzzle, and put together as the network says
    a local projector, and points in both views         matched places as dots
    prototypes and a projector                          images of some clusters
    "keys" among the outputs                            queries and the keys that are nearest to them
    a head, two pictures, a number                      two patches of an image, and where the second is said to lie
    a head, a picture, a number                         pictures with a bar for each answer
    a projector, two pictures                           similarities of two views of some images
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from . import feed
from .errors import UserError
from .pen import COLOURS, EDGE, GAP, GREY, INK, LARGE, SCALE, SMALL, Canvas, height_of, wrap
from .sheets import as_picture, greyed, sort_views

BLUE, ORANGE = COLOURS[:2]
WIDTH, LEFT = 880, 124                      # pixels: of a portrait, and of the words beside its rows
ROOM = WIDTH - 2 * EDGE                     # between its margins, for one block or two
BLOCK = (ROOM - 24) // 2
COUNT = 96                                  # images that are asked about
PARTS = ("head", "order_head", "tile_heads.horizontal", "tile_heads.vertical", "projector", "predictor",
         "target_projector", "local_projector", "key_local_projector")      # what is overheard


@dataclass
class Look:
    """One network and what it made of the views."""
    name: str
    method: torch.nn.Module
    outs: dict
    said: dict                                                              # part -> all that it said, (rows, D)

    @property
    def heading(self):
        """Its name, and its loss beside that of a network that knows nothing."""
        chance = f"\nchance {float(self.outs['chance']):.3g}" if "chance" in self.outs else ""
        return f"{self.name}\nloss {float(self.outs['loss']):.3g}{chance}"

    @property
    def line(self):
        return self.heading.replace("\n", ", ")


@dataclass
class Scene:
    """What all networks were shown."""
    views: tuple
    seen: torch.Tensor                                                      # (B, C, h, w) the first view, still whole
    looks: list

    def __post_init__(self):
        self.pictures, self.masks, self.numbers = sort_views(self.views, None)


class Remembered:
    """An augmentation whose first views are kept: of these, methods make their puzzles."""

    def __init__(self, augment):
        self.augment, self.first = augment, None

    def __call__(self, images, **words):
        views = self.augment(images, **words)
        if self.first is None:
            self.first = views[0] if isinstance(views, tuple) else views
        return views


def portrait(networks, dataset, rows):
    """The Canvas for networks {name: method}, the same method with other weights, on these rows of the set."""
    first = next(iter(networks.values()))
    if hasattr(first, "parts"):                                             # several methods on one encoder
        return stack([portrait({name: method.parts[part] for name, method in networks.items()}, dataset, rows)
                      for part in first.parts])
    images, nobody = feed.batch(dataset.images, rows, "cpu"), replace(dataset, groups=None)
    first.augment = Remembered(first.augment)
    torch.manual_seed(0)
    views = in_order(feed.make_views(first, images, nobody, rows))
    looks = [Look(name, method, *overhear(method, views)) for name, method in networks.items()]
    scene, first.augment = Scene(views, first.augment.first, looks), first.augment.augment
    return kind_of(scene)(scene)


def some_rows(dataset, count=COUNT):
    """Images of the validation split, else of those learnt from; at first one of each patient."""
    rows = next((rows for rows in (dataset.rows("val"), dataset.rows("train", "unlabeled")) if len(rows) > 1), [])
    if len(rows) < 2:
        raise UserError(f"{dataset.name}: a picture takes two images at least")
    rows = np.random.default_rng(0).permutation(rows)
    if dataset.groups is not None:
        met, before = {}, []                                                # how many of its patient came before
        for group in dataset.groups[rows]:
            before.append(met.get(group, 0))
            met[group] = before[-1] + 1
        rows = rows[np.argsort(before, kind="stable")]
    return rows[:count]


def in_order(views):
    """The views with shuffled orders of the batch put straight, so that all that is said comes in the images' order."""
    return tuple(view.sort().values if is_order(view) else view for view in views)


def is_order(view):
    return view.ndim == 1 and not view.is_floating_point() and view.sort().values.equal(torch.arange(len(view)))


@torch.no_grad()
def overhear(method, views):
    """The outputs of one pass as in training, and what the parts of the method said."""
    said = {}

    def note(name):
        return lambda part, given, answer: said.setdefault(name, []).append(answer.float())
    hooks = [part.register_forward_hook(note(name)) for name, part in method.named_modules() if name in PARTS]
    try:
        outs = method.train()(*views)
    finally:
        for hook in hooks:
            hook.remove()
    return outs, {name: torch.cat(answers) for name, answers in said.items()}


def kind_of(scene):
    """Which picture the views and answers allow."""
    look, pictures = scene.looks[0], [view for view in scene.views if view.ndim == 4 and view.is_floating_point()]
    tiles = any(view.ndim == 5 for view in scene.views)
    kinds = ((draw_restored, "restored" in look.outs), (draw_puzzle, tiles and hasattr(look.method, "orders")),
             (draw_places, "local_projector" in look.said), (draw_clusters, hasattr(look.method, "prototypes")),
             (draw_keys, "keys" in look.outs), (draw_patches, "head" in look.said and len(pictures) == 2),
             (draw_bars, "head" in look.said and len(pictures) == 1),
             (draw_pairs, "projector" in look.said and len(pictures) > 1))
    return next((draw for draw, fits in kinds if fits), draw_views)


# ---- paper, and rows of tiles: the frame of most pictures

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
    return lambda canvas, x, y, side: canvas.paste(native(values), x, y, side)


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


def draw_views(scene):
    rows = [(f"view {number}", None, list(map(shown, view[:6]))) for number, view in enumerate(scene.pictures, 1)]
    return rows_of(scene, "What goes in.", rows, "")


# ---- restoring

def draw_restored(scene, count=6):
    given = scene.pictures[0]
    for mask in scene.masks:
        given = greyed(given, mask)
    rows = [("image", scene.seen), ("what goes in", given)]
    rows += [(look.heading, look.outs["restored"]) for look in scene.looks]
    return rows_of(scene, "Asked: what did the image look like?" + " Grey cells are hidden." * bool(scene.masks),
                   [(label, None, list(map(shown, pictures[:count]))) for label, pictures in rows],
                   "Rows of a network: what it paints.")


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
        step, height, foot = side / len(shares), 68, 88
        canvas.line([(x, y + foot - height / len(shares) - 14), (x + side - GAP, y + foot - height / len(shares) - 14)],
                    GREY, 1, (2, 3))
        for number, share in enumerate(shares.tolist()):
            at, top = x + number * step, y + foot - 14 - max(share * height, 1)
            canvas.box(at + 3, top, at + step - 3, y + foot - 14, BLUE if number == true else (190, 190, 190))
            canvas.text(at + step / 2, y + foot - 12, str(number), 12, BLUE if number == true else GREY, "ma")
        canvas.line([(x, y + foot - 14), (x + side - GAP, y + foot - 14)], INK, 1)
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


def coloured_cell(canvas, box, value, text, size=12):
    """A square (x, y, side) that is the bluer, the nearer `value` is to 1, and the more orange, the nearer to -1."""
    (x, y, side), strength = box, min(abs(value), 1)
    full = BLUE if value >= 0 else ORANGE
    canvas.box(x, y, x + side - 1, y + side - 1, tuple(round(255 + (c - 255) * strength) for c in full))
    canvas.text(x + side / 2, y + side / 2, text, size, (255, 255, 255) if strength > 0.55 else INK, "mm")


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


# ---- embeddings

def pair_of(scene, look):
    """Unit rows (B, D) of view 1 and of what they are held against, and what both are, in words."""
    count = len(scene.views[0])
    ours, theirs = "predictor" in look.said, "target_projector" in look.said
    rows = look.said["predictor" if ours else "projector"].reshape(-1, count, look.said["projector"].shape[1])[0]
    wanted = look.said["target_projector" if theirs else "projector"]
    columns = wanted.reshape(-1, count, wanted.shape[1])[1]                 # (V, B, D): those of view 2
    names = ("predictions from view 1" if ours else "embeddings of view 1",
             "the slow copy's embeddings of view 2" if theirs else "embeddings of view 2")
    return F.normalize(rows, dim=1), F.normalize(columns, dim=1), names


def draw_pairs(scene, count=10):
    """A matrix of cosines for each network, with the views beside and above."""
    matrices, headings = [], []
    for look in scene.looks:
        rows, columns, names = pair_of(scene, look)
        matrices.append(rows @ columns.T)                                   # (B, B)
        headings.append(look.line + own_first(matrices[-1], "partner"))
    count = min(count, len(rows))
    cell = (BLOCK - 2) // (count + 1)

    def draw(canvas, x, y, number):
        draw_matrix(canvas, (x, y), cell, matrices[number][:count, :count], scene.pictures[:2])
    return blocks_of(scene, f"Asked: do two views of an image agree? Rows: {names[0]}. Columns: {names[1]}.", headings,
                     (cell * (count + 1) + 2 * GAP, draw), "Numbers: cosines. Blue: alike. White: nothing in common. "
                     "Orange: opposite. Framed: two views of the same image.")


def places(similarity):
    """The place of each row's own column in (B, B), 1 if it is the largest."""
    return 1 + (similarity > similarity.diagonal()[:, None]).sum(1)         # (B,)


def own_first(similarity, what):
    """How often a row's own column is the largest, and which place it has, in words."""
    place = places(similarity)
    return (f"\nown {what} is nearest: {int((place == 1).sum())} of {len(place)} images; its median place: "
            f"{int(place.median())}")


def draw_matrix(canvas, corner, cell, matrix, pictures):
    """Cosines (n, n) under and beside the pictures that they belong to; the diagonal is framed."""
    x, y = corner
    for number, (first, second) in enumerate(zip(*(view[:len(matrix)] for view in pictures))):
        canvas.paste(native(first), x, y + (number + 1) * cell, cell - 2)
        canvas.paste(native(second), x + (number + 1) * cell + 2, y, cell - 2)
    for row, values in enumerate(matrix.tolist()):
        for column, value in enumerate(values):
            at = x + (column + 1) * cell + 2, y + (row + 1) * cell, cell
            coloured_cell(canvas, at, value, f"{value:.1f}".replace("-0.0", "0.0").replace("0.", "."), 11)
    for number in range(1, len(matrix) + 1):
        left, top = x + number * cell + 2, y + number * cell
        canvas.frame(left, top, left + cell - 1, top + cell - 1, INK, 2)


def draw_keys(scene, count=4, near=3):
    """Queries, their own keys, and the keys of this batch that are nearest to them."""
    queries, keys = scene.pictures[:2]
    side, headings, found = fitting((BLOCK - 40) // (near + 2) - 6, keys.shape[3]), [], []
    for look in scene.looks:
        found.append(look.outs["embedding"].float() @ look.outs["keys"].float().T)              # (B, B)
        headings.append(look.line + own_first(found[-1], "key") + "\nquery, own key, and the nearest keys:")
    step = side + height_of("") + GAP

    def draw(canvas, x, y, number):
        nearest = found[number].topk(min(near, len(keys)), 1).indices       # (B, near)
        for row, close in enumerate(nearest[:count].tolist()):
            canvas.paste(native(queries[row]), x, y + row * step, side)
            for column, key in enumerate([row, *close], 1):
                left, top = x + column * (side + 6) + 16 * (column > 1), y + row * step
                canvas.paste(native(keys[key]), left, top, side)
                text = f"{found[number][row, key]:.2f}" + f", no. {places(found[number])[row]}" * (column == 1)
                canvas.text(left + side / 2, top + side, text, 12, anchor="ma")
                if key == row:
                    canvas.frame(left + 2, top + 2, left + side - 2, top + side - 2, BLUE, 4)
    return blocks_of(scene, f"Asked: which of {len(keys)} keys comes from the same image as the query?", headings,
                     (count * step, draw), "Numbers: cosine with the query. Framed: the query's own key; no.: its "
                     "place among all keys. The queue holds embeddings and no pictures: the keys of one batch stand in "
                     "for it.")


def draw_clusters(scene, count=5, most=5):
    """For each network some prototypes, a row each, and the images that are nearest to them."""
    pictures, side, label, headings, blocks = scene.pictures[0], 64, 60, [], []
    for look in scene.looks:
        embedding = F.normalize(look.said["projector"][:len(pictures)], dim=1)      # (B, D) of the first crop
        scores = embedding @ look.method.prototypes.T                       # (B, K)
        own, sizes = scores.argmax(1), scores.argmax(1).bincount(minlength=scores.shape[1])
        headings.append(f"{look.line}\n{int((sizes > 0).sum())} of {len(sizes)} prototypes have images")
        blocks.append([(k, [row for row in scores[:, k].argsort(descending=True).tolist() if own[row] == k])
                       for k in sizes.argsort(descending=True, stable=True)[:count].tolist()])

    def draw(canvas, x, y, number):
        for row, (prototype, members) in enumerate(blocks[number]):
            top = y + row * (side + GAP)
            canvas.text(x, top + side / 2, f"no. {prototype}\nhas {len(members)}", 12, anchor="lm")
            for column, member in enumerate(members[:most]):
                canvas.paste(native(pictures[member]), x + label + column * (side + 8), top, side)
    return blocks_of(scene, "Asked: to which cluster does an image belong? A row for each of the fullest clusters, "
                     "with the images nearest to its prototype.", headings, (count * (side + GAP), draw),
                     f"To the left: the prototype's number, and how many of the {len(pictures)} images are nearest to "
                     f"it; up to {most} of them are shown.")


# ---- places

def draw_places(scene, count=5, most=6):
    """Dots on places of view 1, where they lie in view 2, and where networks take them to lie."""
    points = [view.unflatten(1, (-1, 9)).mean(2) for view in scene.views if view.ndim == 3]     # 2 x (B, R, 2)
    valid = next(view for view in scene.views if view.ndim == 2 and view.dtype == torch.bool)   # (B, R)
    best = valid.sum(1).clamp(max=most).argsort(descending=True, stable=True)[:count].tolist()
    chosen = {image: spread_out(points[0][image], valid[image], most) for image in best}
    first, second = scene.pictures[:2]
    rows = [(label, None, [dotted(view[image], [(at[image, r],) for r in chosen[image]]) for image in best])
            for label, view, at in (("view 1: where some regions lie", first, points[0]),
                                    ("view 2: where the same regions lie", second, points[1]))]
    for look in scene.looks:
        ours, theirs = (F.normalize(look.said[part], dim=-1) for part in ("local_projector", "key_local_projector"))
        similarity = (ours @ theirs.mT).masked_fill(~valid[:, None], -2)    # (B, R, R)
        answer = similarity.argmax(2)                                       # (B, R)
        tiles = [dotted(second[image], [(points[1][image, answer[image, r]], points[1][image, r])
                                        for r in chosen[image]]) for image in best]
        rows.append((right(look, (answer == torch.arange(valid.shape[1]))[valid]) + " regions", None, tiles))
    return rows_of(scene, "Asked: which region of view 2 is each region of view 1? Same number, same region.", rows,
                   "Rows of a network: a dot where it takes the region to lie; a line leads to where it does lie.")


def spread_out(points, valid, most):
    """Numbers of up to `most` valid points (R, 2), each far from those before."""
    left = torch.nonzero(valid).flatten().tolist()
    chosen = left[:1]
    while len(chosen) < min(most, len(left)):
        chosen.append(max((r for r in left if r not in chosen),
                          key=lambda r: float((points[chosen] - points[r]).norm(dim=1).min())))
    return chosen


def dotted(picture, places):
    """places: (where the dot lies[, where it should]) each, -1 to 1 across the picture."""
    def draw(canvas, x, y, side):
        canvas.paste(native(picture), x, y, side)
        ends = [[(x + float(p[0] + 1) * side / 2, y + float(p[1] + 1) * side / 2) for p in place] for place in places]
        for number, line in enumerate(ends):
            if len(line) > 1:
                canvas.line(line, COLOURS[number % 6], 2)
        for number, ((at_x, at_y), *_) in enumerate(ends):
            at_x += 12 * sum(line[0] == (at_x, at_y) for line in ends[:number])             # beside those before it
            canvas.dot(at_x, at_y, (255, 255, 255), radius=9)
            canvas.dot(at_x, at_y, COLOURS[number % 6], radius=7.5)
            canvas.text(at_x, at_y, str(number + 1), 10, (255, 255, 255), "mm")
    return draw
