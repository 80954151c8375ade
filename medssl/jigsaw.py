"""Jigsaw: cut the image into tiles, shuffle them, and let the network say in which order they lie.

Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles", ECCV 2016.

The idea. Who puts a puzzle together has to know the parts and how they lie to each other. Of the 9! orders of nine
tiles, 100 are enough, if they differ in many places: the network names one of them. Tiles whose edges meet can be
joined by their edges alone, so every tile is a random crop of its cell.

The algorithm. The image is a grid x grid lattice of T cells; a tile is a random crop of its cell.
  o_1, ..., o_K: orders of T tiles, fixed beforehand; o_k maximises min over j < k of d(o_j, o_k)                   (1)
  d: in how many places two orders differ (Hamming distance)
  y ~ uniform{1, ..., K};   tile t of the puzzle is tile o_y[t] of the image                                        (2)
  z_t = g(f(tile t))                                       encoder f, branch g, shared by all tiles                  (3)
  loss = cross-entropy(h([z_1, ..., z_T]), y)              head h; g and h are thrown away afterwards                (4)
A network that knows nothing scores ln K.

Shapes. images (B, C, H, W) -> tiles (B, T, C, h, w) and order numbers (B,) -> one number.

Differences. Study: the work that RECIPE follows.
- Orders. Study: a list that maximises the sum of distances; some differ in two places only. Here: Eq. 1, from 5,000
  orders drawn from a seed (of 2x2 tiles these are all 24); those of nine tiles differ in six places or more.
- Gap. Study: what the jitter happens to leave. Here: it can be set. Both are shares of a cell, so that they mean the
  same at every image size; a share above nought is at least one pixel.
- Tiles. Paper: each is standardised by itself. Here: they are not.
- Schedule. Study: a tenth of the rate from epoch 200 on. Here: a cosine.
- BatchNorm. Here: all tiles of a batch pass the encoder together and share statistics, so these cannot tell the order.

Settings of the works that use it, as words of train.py:
  Zhang et al. 2023, released code in 2D, 3x3 tiles (RECIPE)
    --set width=512 hidden=4096 depth=1 permutations=100 gap=0 jitter=0.05
    --optimizer adam --lr 1e-3 --weight-decay 1e-6 --batch 48 --epochs 1000 --size 360
  the same in 3D, 2x2x2 cubes, jitter 10 of 138 voxels
    --set grid=2 width=64 hidden=1024 depth=2 permutations=100 gap=0 jitter=0.0724 --batch 8
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,        # of every Adam of the released code
    "batch": 48,                 # 2D; 8 in 3D
    "epochs": 1000,              # there with a tenth of the rate from epoch 200 on, here with a cosine
    "warmup": 0,
    "views": "plain",
    "size": 360,                 # three cells of 120, tiles of 114
}

SMALL = {
    "views": "mild",             # phantoms, 300 steps, one seed: validation kNN .340, with "plain" .292
    "gap": 0.2,                  # presets.md: on noise, where nothing but edges can help, accuracy .947 without gap and
    "jitter": 0.1,               # jitter, .192 with these (20 orders, chance .05)
    "width": 64,                 # a guess: the study's heads in 3D; RECIPE's have 19 M weights, the tiny encoder 0.7 M
    "hidden": 1024,
    "depth": 2,
}


class Jigsaw(nn.Module):
    """In which of K orders do the tiles lie?"""

    def __init__(self, encoder, augment, grid=3, permutations=100, gap=0.0, jitter=0.05, width=512, hidden=4096,
                 depth=1, seed=0):
        super().__init__()
        if min(gap, jitter) < 0 or gap + jitter >= 1:
            raise ValueError(f"gap={gap} and jitter={jitter}: shares of a cell, which must leave some of it")
        self.encoder, self.augment, self.grid, self.gap, self.jitter = encoder, augment, grid, gap, jitter
        self.register_buffer("orders", permutation_set(grid ** 2, permutations, seed))      # (K, T)  Eq. 1
        self.branch = nn.Sequential(nn.Linear(encoder.dim, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width))
        self.head = mlp(grid ** 2 * width, *[hidden] * depth, len(self.orders), norm=False)

    @torch.no_grad()
    def views(self, images):
        cells = torch.arange(self.grid ** 2, device=images.device).expand(len(images), -1)  # (B, T)
        tiles = cut(self.augment(images), cells, self.grid, self.gap, self.jitter)          # (B, T, C, h, w)
        which = torch.randint(len(self.orders), (len(images),), device=images.device)       # (B,)
        return shuffle(tiles, self.orders[which]), which                    # Eq. 2

    def forward(self, tiles, which):
        z = self.branch(self.encoder(tiles.flatten(0, 1)))                  # (B * T, width)  Eq. 3
        logits, = at_least_float32(self.head(z.reshape(len(tiles), -1)))    # (B, K)
        loss = F.cross_entropy(logits, which)                               # Eq. 4
        accuracy = (logits.argmax(1) == which).float().mean()
        return {"loss": loss, "chance": math.log(len(self.orders)), "accuracy": accuracy}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def shuffle(tiles, order):
    """Tile t of puzzle i becomes tile order[i, t]: tiles (B, T, ...), order (B, T)."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], order]             # (B, T, ...)


def unshuffle(tiles, order):
    """The way back: unshuffle(shuffle(x, order), order) is x."""
    return shuffle(tiles, order.argsort(1))


def permutation_set(tiles, count, seed):
    """`count` distinct orders of the tiles (at most as many as there are), (K, T). The distance of two orders is the
    number of places in which they differ (Hamming distance). Each one chosen is the candidate whose smallest distance
    to those chosen before is largest; among equals, the one with the largest mean."""
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.rand(5_000, tiles, generator=generator).argsort(1).unique(dim=0)    # (N, T)
    smallest, total, chosen = torch.full((len(candidates),), tiles), 0, [0]
    while len(chosen) < min(count, len(candidates)):
        distance = (candidates != candidates[chosen[-1]]).sum(1)            # (N,)
        smallest, total = torch.minimum(smallest, distance), total + distance
        chosen.append(int((smallest * tiles * count + total).argmax()))     # total < tiles * count: it only breaks ties
    return candidates[chosen]


def cut(images, cells, grid, gap, jitter):
    """Tiles (B, T, C, h, w): of image i the cells[i], (B, T), of a grid x grid lattice, row by row. Each tile moves at
    random by up to `jitter` in its cell, at least `gap` away from the next; both are shares of a cell's side."""
    axes = []
    for length, index in ((images.shape[2], cells // grid), (images.shape[3], cells % grid)):
        cell = length // grid
        space, play = math.ceil(gap * cell), math.ceil(jitter * cell)
        start = index * cell + torch.randint(play + 1, index.shape, device=images.device)  # (B, T)
        axes.append(start[..., None] + torch.arange(cell - space - play, device=images.device))         # (B, T, h) or w
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    return images[image, :, axes[0][..., None], axes[1][:, :, None]].movedim(-1, 2)         # (B, T, C, h, w)


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
