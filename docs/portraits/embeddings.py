"""Portraits of methods that compare embeddings: of two views, of keys, of clusters, of places."""

import torch
import torch.nn.functional as F

from ..pen import COLOURS, GAP, INK, height_of
from .frames import BLOCK, BLUE, blocks_of, coloured_cell, fitting, native, right, rows_of


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
