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

from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import feed
from ..errors import UserError
from ..sheets import sort_views
from .answers import draw_bars, draw_patches, draw_puzzle, draw_restored
from .embeddings import draw_clusters, draw_keys, draw_pairs, draw_places
from .frames import draw_views, stack

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
    look, pictures = scene.looks[0], len([view for view in scene.views if view.ndim == 4 and view.is_floating_point()])
    tiles, answers = any(view.ndim == 5 for view in scene.views), "head" in look.said and len(scene.numbers) == 1
    kinds = ((draw_restored, "restored" in look.outs), (draw_puzzle, tiles and hasattr(look.method, "orders")),
             (draw_places, "local_projector" in look.said), (draw_clusters, hasattr(look.method, "prototypes")),
             (draw_keys, {"keys", "embedding"} <= look.outs.keys()), (draw_patches, answers and pictures == 2),
             (draw_bars, answers and pictures == 1), (draw_pairs, "projector" in look.said and pictures > 1))
    return next((draw for draw, fits in kinds if fits), draw_views)
