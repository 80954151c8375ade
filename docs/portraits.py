"""Portraits: what goes into a method, what is asked, and what networks answer, in one picture.

    python docs/portraits.py METHOD [--data FOLDER] [--run FOLDER] [--out FILE.png]
    python docs/portraits.py            all pictures of docs/methods.md

Without --run the method is trained for a few hundred steps first, into runs/methods/; a training that is there already
does not run again. DRAWN says how each method is drawn; one without a line there has its views drawn.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import train
from medssl import METHODS
from medssl.common import config, data, encoders, feed, files, pictures
from medssl.common.errors import UserError
from medssl.common.pictures import COLOURS, EDGE, GREY, INK, PALE, as_picture, height_of, paper, wrap, write

BLUE, ORANGE = COLOURS[:2]
WIDTH, LEFT, GAP, TILE = 1760, 250, 24, 256     # of the page, the words beside its rows, and tiles: at twice the size
COUNT = 96                                      # images that are asked about


# ---- what networks say

class Look:
    """One network, its outputs for the views, and what the named parts of it said: (rows, D) each, in their order."""

    @torch.no_grad()
    def __init__(self, name, method, views, parts):
        self.name, self.method = name, method
        said = {part: [] for part in parts}
        hooks = [method.get_submodule(part).register_forward_hook(
            lambda _, given, answer, part=part: said[part].append(answer.float())) for part in said]
        self.outs = method.train()(*views)
        for hook in hooks:
            hook.remove()
        self.said = [torch.cat(said[part]) for part in parts]

    def heading(self, right=None):
        """Name, loss, the loss of a network that knows nothing, and how often the answer is right (bool)."""
        words = f"{self.name}\nloss {float(self.outs['loss']):.3g}"
        words += f"\nchance {float(self.outs['chance']):.3g}" if "chance" in self.outs else ""
        return words if right is None else f"{words}\nright: {int(right.sum())} of {right.numel()}"


def portrait(networks, name, dataset, rows):
    """The picture of {name: method}, one method with several weights, for these rows of the set; at twice its size."""
    first = next(iter(networks.values()))
    if hasattr(first, "parts"):                                             # several methods on one encoder
        return below([portrait({key: method.parts[part] for key, method in networks.items()}, part, dataset, rows)
                      for part in first.parts])
    draw, *parts = DRAWN.get(name, (draw_views,))
    torch.manual_seed(0)
    seen, views = views_of(first, dataset, rows)
    return draw(seen, views, [Look(key, method, views, parts) for key, method in networks.items()])


def views_of(method, dataset, rows):
    """The augmented images of which the views are made (B, C, h, w), and the views."""
    kept, augment, groups = [], method.augment, None if dataset.groups is None else dataset.groups
    dataset.groups, method.augment = None, lambda images, **words: kept.append(augment(images, **words)) or kept[-1]
    views = feed.make_views(method, feed.batch(dataset.images, rows, "cpu"), dataset, rows)     # no patient numbers
    dataset.groups, method.augment = groups, augment
    views = [torch.arange(len(view)) if is_order(view) else view for view in views]     # all is said in this order
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0], views


def is_order(view):
    """Does this view shuffle the batch?"""
    return view.ndim == 1 and not view.is_floating_point() and view.sort().values.equal(torch.arange(len(view)))


def some_rows(dataset, count=COUNT):
    """Images of the validation split, else of those learnt from; at first one of each patient."""
    rows = next((rows for rows in (dataset.rows("val"), dataset.rows("train", "unlabeled")) if len(rows) > 1), [])
    if len(rows) < 2:
        raise UserError(f"{dataset.name}: a picture takes two images at least")
    rows = np.random.default_rng(0).permutation(rows)
    if dataset.groups is not None:
        groups = dataset.groups[rows]
        before = [(groups[:place] == group).sum() for place, group in enumerate(groups)]        # of the same patient
        rows = rows[np.argsort(before, kind="stable")]
    return rows[:count]


# ---- the page

def page(looks, question, rows, note="", left=LEFT):
    """Headed by what the method says of itself. rows: (words beside it, tiles)."""
    cls, room = type(looks[0].method), WIDTH - 2 * EDGE
    first = re.split(r"[.;] |$", (cls.__doc__ or "").splitlines()[0].rstrip("."))[0]            # its first sentence
    head = wrap(f"{cls.__name__}: {first}", room, pictures.LARGE)
    question, note = wrap(question, room), wrap(note, room)
    rows = [("\n".join(wrap(line, left - GAP) for line in words.split("\n")), tiles) for words, tiles in rows]
    heights = [GAP + max([height_of(words), *(tile.height for tile in tiles)]) for words, tiles in rows]
    y = EDGE + height_of(head, pictures.LARGE) + height_of(question) + GAP
    image, pen = paper(WIDTH, y + sum(heights) + height_of(note) + EDGE)
    write(pen, (EDGE, EDGE), head, size=pictures.LARGE)
    write(pen, (EDGE, EDGE + height_of(head, pictures.LARGE) + 4), question)
    for (words, tiles), height in zip(rows, heights):
        write(pen, (EDGE, y), words)
        for number, tile in enumerate(tiles):
            image.paste(tile, (EDGE + left + number * (tile.width + GAP), y))
        y += height
    write(pen, (EDGE, y), note, GREY)
    return image


def below(images):
    """One below the other."""
    image, _ = paper(max(each.width for each in images), sum(each.height for each in images))
    y = 0
    for each in images:
        image.paste(each, (0, y))
        y += each.height
    return image


def tile(values, side=TILE, frame=PALE, width=2):
    """(C, H, W) in [0, 1] as a framed picture of this width."""
    picture = as_picture(values, 1, 4096).resize((side, round(side * values.shape[1] / values.shape[2])), Image.NEAREST)
    ImageDraw.Draw(picture).rectangle([0, 0, side - 1, picture.height - 1], None, frame, width)
    return picture


def captioned(picture, *lines):
    """With words above it."""
    text = "\n".join(lines)
    image, pen = paper(picture.width, picture.height + height_of(text) + 8)
    write(pen, (0, 0), text)
    image.paste(picture, (0, height_of(text) + 8))
    return image


def shade(value):
    """White for 0, blue for 1, orange for -1; and a colour for words on it."""
    full, strength = BLUE if value >= 0 else ORANGE, min(abs(value), 1)
    return tuple(round(255 + (c - 255) * strength) for c in full), "white" if strength > 0.55 else INK


def draw_views(seen, views, looks):
    shown = pictures.sort_views(views)[0]
    rows = [(f"view {number}", list(map(tile, view[:5]))) for number, view in enumerate(shown, 1)]
    return page(looks, "What goes in.", rows)


# ---- restoring

def draw_restored(seen, views, looks, count=5):
    (given, *_), masks, _ = pictures.sort_views(views)
    for mask in masks:
        given = pictures.greyed(given, mask)
    rows = [("image", seen)] + [("what goes in", given)] * (not np.array_equal(seen, given))
    rows += [(look.heading(), look.outs["restored"]) for look in looks]
    return page(looks, "Asked: what did the image look like?" + " Grey cells are hidden." * bool(masks),
                [(words, list(map(tile, pictures[:count]))) for words, pictures in rows], "Rows of a network: what it "
                "paints." + " Hidden cells have their true mean and contrast, visible ones are copied." * bool(masks))


# ---- one of several answers

def draw_answers(seen, views, looks, count=5):
    """A picture, and a bar for each answer."""
    shown, truth = views
    rows = [("what goes in", list(map(tile, shown[:count])))]
    for look in looks:
        shares = look.said[0].softmax(1)                                    # (B, K)
        tiles = [bars(share, int(true)) for share, true in zip(shares[:count], truth)]
        rows.append((look.heading(shares.argmax(1) == truth), tiles))
    return page(looks, "Asked: which of the answers made this picture?", rows, f"Bars: how sure the network is of each "
                f"answer, 0 to {shares.shape[1] - 1}; together they make 1. Blue: the right answer. Line: chance.")


def bars(shares, true, high=140):
    image, pen = paper(TILE, high + 36)
    step = TILE / len(shares)
    for number, share in enumerate(shares.tolist()):
        left, colour = number * step, BLUE if number == true else GREY
        pen.rectangle([left + 6, high - max(share * high, 2), left + step - 6, high], colour)
        write(pen, (left + step / 2, high + 4), str(number), colour, "ma")
    pen.line([0, high - high / len(shares), TILE, high - high / len(shares)], INK, 2)
    return image


def draw_patches(seen, views, looks, count=5):
    """Two patches of an image, and the shares of the eight places where the second may lie."""
    centre, other, truth = views
    both = torch.cat([centre, torch.ones_like(centre)[..., :2], other], 3)  # (B, C, h, 2 w + 2) side by side
    rows = [("image", [marked(*each) for each in zip(seen[:count], centre, other)]),
            ("what goes in:\nblue, orange", list(map(tile, both[:count])))]
    for look in looks:
        shares = look.said[0].softmax(1)                                    # (B, 8)
        tiles = [around(share.tolist(), int(true)) for share, true in zip(shares[:count], truth)]
        rows.append((look.heading(shares.argmax(1) == truth), tiles))
    return page(looks, "Asked: on which of eight sides of the blue patch does the orange one lie?", rows, "Numbers: "
                "how sure the network is of each place around the blue patch, in per cent. Framed in orange: where the "
                "second patch lies.")


def marked(image, *patches):
    """The image (C, H, W) with frames where the patches (C, h, w) were cut out."""
    picture, scale = tile(image), TILE / image.shape[2]
    for patch, colour in zip(patches, (BLUE, ORANGE)):
        top, left = locate(image, patch)
        corners = left, top, left + patch.shape[2], top + patch.shape[1]
        ImageDraw.Draw(picture).rectangle([round(each * scale) for each in corners], None, colour, 6)
    return picture


def locate(image, patch):
    """Row and column of the piece of image (C, H, W) that is most like the patch (C, h, w)."""
    windows = image.unfold(1, patch.shape[1], 1).unfold(2, patch.shape[2], 1)       # (C, H - h + 1, W - w + 1, h, w)
    error = (windows - patch[:, None, None]).abs().sum((0, 3, 4))           # (H - h + 1, W - w + 1)
    return divmod(int(error.argmin()), error.shape[1])


def around(shares, true):
    """Shares of the eight places around a centre, row by row."""
    image, pen = paper(TILE, TILE)
    for place, share in enumerate([*shares[:4], None, *shares[4:]]):
        x, y, cell = place % 3 * TILE // 3, place // 3 * TILE // 3, TILE // 3
        colour, ink = shade(share or 0)
        frame = BLUE if share is None else ORANGE if place == true + (true > 3) else PALE
        pen.rectangle([x, y, x + cell - 3, y + cell - 3], colour, frame, 2 if frame == PALE else 6)
        write(pen, (x + cell / 2, y + cell / 2), "" if share is None else f"{100 * share:.0f}", ink, "mm")
    return image


# ---- puzzles

def draw_puzzle(seen, views, looks, count=5):
    """Tiles as they come, and where the network puts them; wrong ones are framed."""
    tiles, which, *more = views                                             # (B, T, C, h, w), (B,)
    orders = looks[0].method.orders
    truth, turning = orders[which], more[0] if more else torch.zeros_like(orders[which])        # (B, T) each
    rows = [("image", list(map(tile, seen[:count]))), ("what goes in", [lattice(each) for each in tiles[:count]])]
    for look in looks:
        order, turned = orders[look.said[0].argmax(1)], torch.zeros_like(turning)
        if len(look.said) > 1:                                              # 1: mirrored left-right, 2: up-down
            across, down = look.said[1:]                                    # (B, T)
            turned = torch.where(across >= down, 1, 2) * (torch.maximum(across, down) > 0)
        wrong = (order != truth) | (turned != turning)
        back = torch.where((turned == 1)[..., None, None, None], tiles.flip(4), tiles)
        back = torch.where((turned == 2)[..., None, None, None], tiles.flip(3), back)
        image, place = torch.arange(len(order))[:, None], order.argsort(1)
        rows.append((look.heading(~wrong) + " tiles",
                     [lattice(*each) for each in zip(back[image, place][:count], wrong[image, place])]))
    also = " Which are mirrored?" if more else ""
    return page(looks, f"Asked: in which of {len(orders)} orders do the tiles lie?{also}", rows,
                "Rows of a network: the tiles put back as it says. Framed in orange: tiles that it has wrong.")


def lattice(tiles, wrong=None):
    """tiles (T, C, h, w) row by row."""
    image, _ = paper(TILE, TILE)
    grid = round(len(tiles) ** 0.5)
    for number, values in enumerate(tiles):
        row, column = divmod(number, grid)
        frame = (ORANGE, 6) if wrong is not None and wrong[number] else (PALE, 2)
        image.paste(tile(values, TILE // grid - 6, *frame), (column * TILE // grid, row * TILE // grid))
    return image


# ---- two views

def cosines(look, count):
    """(B, B): view 1 as rows, and what it is held against as columns, of the two parts that were listened to."""
    rows, columns = (said.reshape(-1, count, said.shape[1]) for said in look.said)              # (V, B, D) each
    rows, columns = F.normalize(rows[0], dim=1), F.normalize(columns[-1 if len(columns) == 1 else 1], dim=1)
    return rows @ columns.T


def places(similarity):
    """The place of each row's own column in (B, B), 1 if it is the largest."""
    return 1 + (similarity > similarity.diagonal()[:, None]).sum(1)         # (B,)


def draw_pairs(seen, views, looks, count=10):
    """Cosines of two networks, with the views beside and above; of further networks a small matrix."""
    large, small = [], []
    for look in looks:
        matrix, lines = cosines(look, len(seen)), look.heading().split("\n")
        place = places(matrix)
        middle = f"median place {int(place.median())}"
        found = f"nearest: {int((place == 1).sum())} of {len(place)}"
        if len(large) < 2:
            words = ", ".join(lines), f"{found}; {middle}"
            large.append(captioned(lattice_of(matrix[:count, :count], views[:2]), *words))
        else:
            small.append(captioned(lattice_of(matrix[:count, :count], cell=24), lines[0], found, middle))
    return page(looks, "Asked: do two views of an image agree? Rows: view 1. Columns: view 2.",
                [("", large), ("", small)], "Numbers: cosines. Blue: alike. White: nothing in common. Orange: "
                "opposite. Framed: two views of the same image. Nearest: how often these have the largest cosine of "
                "all; place: where they stand among all.", 0)


def lattice_of(matrix, views=None, cell=74):
    """Cosines (n, n), framed on the diagonal; with the views, beside and above, and the numbers."""
    first = 1 if views else 0
    image, pen = paper(840 if views else cell * len(matrix) + 6, cell * (len(matrix) + first) + 6)
    for row, values in enumerate(matrix.tolist(), first):
        for column, value in enumerate(values, first):
            x, y, (colour, ink) = column * cell, row * cell, shade(value)
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], colour, *((INK, 4) if row == column else (PALE, 1)))
            text = f"{value:.1f}".replace("-0.0", "0.0").replace("0.", ".")
            write(pen, (x + cell / 2, y + cell / 2), text if views else "", ink, "mm", 24)
    for number, (one, two) in enumerate(zip(*(view[:len(matrix)] for view in views)) if views else (), 1):
        image.paste(tile(one, cell - 4), (0, number * cell))
        image.paste(tile(two, cell - 4), (number * cell, 0))
    return image


def draw_clusters(seen, views, looks, count=3, most=5):
    """For each network some prototypes, a row each, and the images that are nearest to them."""
    rows, shown = [], views[0]
    for look in looks:
        scores = F.normalize(look.said[0][:len(shown)], dim=1) @ look.method.prototypes.T       # (B, K)
        own = scores.argmax(1)
        sizes = own.bincount(minlength=scores.shape[1])
        for number, k in enumerate(sizes.argsort(descending=True, stable=True)[:count].tolist()):
            members = [row for row in scores[:, k].argsort(descending=True).tolist() if own[row] == k]
            words = f"{look.heading()}\n{int((sizes > 0).sum())} clusters in use\n" if number == 0 else ""
            rows.append((f"{words}no. {k} has {len(members)}", [tile(shown[row], 192) for row in members[:most]]))
    return page(looks, "Asked: to which cluster does an image belong? A row for each of the fullest clusters.", rows,
                f"The images nearest to its prototype, of {len(shown)}.")


# ---- regions

def draw_places(seen, views, looks, count=2, most=6):
    """A row for each image: regions of view 1, where they lie in view 2, and where networks take them to lie."""
    first, second, _, *points, valid = views                                # valid (B, R)
    points = [each.mean(2) for each in points]                              # 2 x (B, R, 2) middles of regions
    best = valid.sum(1).clamp(max=most).argsort(descending=True, stable=True)[:count].tolist()
    chosen = {image: spread_out(points[1][image], valid[image], most) for image in best}
    columns = [[captioned(dotted(view[image], at[image, chosen[image]]), words, "", "") for image in best]
               for words, view, at in (("view 1", first, points[0]), ("view 2: the truth", second, points[1]))]
    for look in looks:
        ours, theirs = (F.normalize(said, dim=-1) for said in look.said)    # (B, R, D)
        answer = (ours @ theirs.mT).masked_fill(~valid[:, None], -2).argmax(2)                  # (B, R)
        right = (answer == torch.arange(valid.shape[1]))[valid]
        words = f"view 2: {look.heading(right)}".split("\n")               # name, loss, chance, right
        columns.append([captioned(dotted(second[image], points[1][image, answer[image, chosen[image]]],
                                         points[1][image, chosen[image]]), words[0], ", ".join(words[1:3]), words[3])
                        for image in best])
    return page(looks, "Asked: which region of view 2 is each region of view 1? Same number, same region.",
                [("", row) for row in zip(*columns)], "View 2 of a network: a dot where it takes the region to lie; a "
                "line leads to where it does lie.", 0)


def spread_out(points, valid, most):
    """Numbers of up to `most` valid points (R, 2), each far from those before."""
    chosen = torch.nonzero(valid).flatten()[:1].tolist()
    while len(chosen) < min(most, int(valid.sum())):
        far = torch.cdist(points, points[chosen]).amin(1)                   # (R,)  0 for those chosen
        chosen.append(int(far.masked_fill(~valid, -1).argmax()))
    return chosen


def dotted(values, dots, goals=(), side=405):
    """Numbered dots, -1 to 1 across the picture, and lines to their goals."""
    picture = tile(values, side)
    pen, at = ImageDraw.Draw(picture), [[float(v + 1) * side / 2 for v in dot] for dot in dots]
    for number, goal in enumerate(goals):
        pen.line([*at[number], *(float(v + 1) * side / 2 for v in goal)], COLOURS[number % 6], 4)
    for number, (x, y) in enumerate(at):
        x += 24 * sum(other == [x, y] for other in at[:number])             # beside those before it
        pen.ellipse([x - 18, y - 18, x + 18, y + 18], COLOURS[number % 6], "white", 3)
        write(pen, (x, y), str(number + 1), "white", "mm", 22)
    return picture


# method: how it is drawn, and the parts of it that are listened to
DRAWN = {"rotation": (draw_answers, "head"), "relative": (draw_patches, "head"), "jigsaw": (draw_puzzle, "head"),
         "rubik": (draw_puzzle, "order_head", "tile_heads.horizontal", "tile_heads.vertical"),
         **dict.fromkeys(("autoencoder", "genesis", "spark", "pcrl"), (draw_restored,)),
         **dict.fromkeys(("simclr", "dcl", "vicreg", "lejepa"), (draw_pairs, "projector", "projector")),
         "simsiam": (draw_pairs, "predictor", "projector"), "byol": (draw_pairs, "predictor", "target_projector"),
         "moco": (draw_pairs, "projector", "key_projector"), "swav": (draw_clusters, "projector"),
         "medmoco": (draw_places, "local_projector", "slow.2")}
FAMILY = "simclr", "dcl", "moco", "vicreg", "lejepa", "simsiam", "byol"     # two views: one picture for all
STEPS = {"simclr": 500, "dcl": 800, "vicreg": 600, "simsiam": 600, "byol": 400, "moco": 500, "medmoco": 500,
         "rubik": 500, "genesis": 400}                                      # of the trainings for these pictures; else:
LENGTH = 300


# ---- runs

def trained(name, path="phantoms"):
    """The folder of a short training on this set."""
    steps = STEPS.get(name, LENGTH)
    run = ROOT / "runs" / "methods" / f"{name}-{steps}" / ("" if path == "phantoms" else Path(path).stem)
    if not (run / "checkpoint.pt").is_file():
        train.main(["--method", name, "--data", str(path), "--size", "64", "--steps", str(steps), "--device", "cpu",
                    "--log-every", str(steps // 2), "--out", str(run)])
    return run


def networks_of(folder, name, path=None):
    """The set that a run learnt from, or another one, and its method before and after training."""
    run, known = config.read(folder, "cpu"), files.read_config(folder)
    if run.method != name:
        raise UserError(f"--run {folder}: it trained {run.method}, not {name}")
    dataset = data.load(path or run.data, run.size, known["data"]["channels"], run.label)
    before, after = (built(run, known) for _ in range(2))
    state = files.load_torch(Path(folder) / "checkpoint.pt")
    after.load_state_dict(state["method"])
    return dataset, {"random network": before, f"after {state['step']} steps": after}


def built(run, known):
    """The method before training."""
    torch.manual_seed(run.seed)
    seen, channels = known["encoder"], known["data"]["channels"]
    encoder = encoders.build(run.encoder, channels, run.stem, tuple(seen["mean"]), tuple(seen["std"]))
    return config.build(METHODS, run.parts, encoder, channels, run.size)


def family():
    """Of one method before and after training, of the others after it: the same two views in all."""
    looks = []
    for name in FAMILY:
        dataset, networks = networks_of(trained(name), name)
        if not looks:
            torch.manual_seed(0)
            seen, views = views_of(networks["random network"], dataset, some_rows(dataset))
            looks.append(Look("random network", networks["random network"], views, DRAWN[name][1:]))
        network = [*networks.values()][1]
        more = views_of(network, dataset, some_rows(dataset))[1][2:]        # what it sees beside two pictures
        looks.append(Look(name, network, [*views[:2], *more], DRAWN[name][1:]))
    return draw_pairs(seen, views, looks)


def few_colours(path, colours):
    """The same picture in so many colours: a third of the bytes, for pages that are kept."""
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
    pictures.save(few, path, optimize=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method", nargs="?", help=f"a method, or several joined by +; family: {', '.join(FAMILY)} "
                        "in one picture; left out: all pictures of docs/methods.md")
    parser.add_argument("--data", help="folder of images (default: the run's own, phantoms)")
    parser.add_argument("--run", help="of train.py (default: a short training)")
    parser.add_argument("--out", type=Path, help="default: docs/methods/METHOD.png")
    args = parser.parse_args(argv)
    for name in [args.method] if args.method else ["family", *(n for n in DRAWN if n not in FAMILY), "rotation+simclr"]:
        path = args.out or ROOT / "docs" / "methods" / f"{name}.png"
        if name == "family":
            image = family()
        else:
            dataset, networks = networks_of(args.run or trained(name, args.data or "phantoms"), name, args.data)
            image = portrait(networks, name, dataset, some_rows(dataset))
        pictures.save(image.reduce(2), path)
        few_colours(path, 80)
        print(path)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
