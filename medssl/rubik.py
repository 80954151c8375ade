"""Rubik: a jigsaw whose tiles are also turned over, and (RKB+) some of them masked; the network says all of it.

Zhuang et al., "Self-supervised Feature Learning for 3D Medical Images by Playing a Rubik's Cube", MICCAI 2019. Masked
tiles: Zhu et al., "Rubik's Cube+: A Self-supervised Feature Learning Framework for 3D Medical Image Analysis", Medical
Image Analysis 2020.

The idea. A harder puzzle: the order of the tiles, which of them were turned over, and which of them lost half their
pixels. Order is about anatomy, turning about each part's own shape, masking about texture. One branch has to serve all.

The algorithm. Tiles, orders and branch as in a jigsaw; K orders, T tiles.
  y ~ uniform{1, ..., K};   tile t of the puzzle is tile o_y[t] of the image                                        (1)
  r_t ~ uniform{none, left-right, up-down}: how tile t is turned over;
  a_t = 1 if left-right, else 0;   b_t = 1 if up-down, else 0                                                       (2)
  m_t ~ Bernoulli(1/2): the pixels of tile t are multiplied by a Bernoulli(1/2) mask            with `mask=True`    (3)
  z_t = g(f(tile t)),   z = [z_1, ..., z_T]                encoder f, branch g, shared by all tiles                  (4)
  RKB   loss = (CE(h_order(z), y) + BCE(h_a(z), a) + BCE(h_b(z), b)) / 2                                            (5)
  RKB+  loss = CE(h_order(z), y) + BCE(h_a(z), a) + BCE(h_b(z), b) + BCE(h_m(z), m)                                 (6)
CE: cross-entropy; BCE: the same of two classes, mean over tiles. A network that knows nothing scores ln K in order,
0.64 in either turning (the entropy of one in three), ln 2 in masking. Its accuracy is 1 / K in order, 1/2 in masking,
but 2/3 in turning, where "not turned over this way" is right for two tiles in three.

Shapes. images (B, C, H, W) -> tiles (B, T, C, h, w), order numbers (B,), turnings (B, T) in {0, 1, 2}, masked (B, T)
-> one number.

Differences. Study: the work that RECIPE follows.
- Turning. Study in 3D: half turns, which flip two axes; its "vertical" flips both axes of a slice, which in 2D is a
  half turn. Here: one axis, so tiles are mirrored.
- Tiles. Study: eight cubes. Here: nine tiles, or four with `grid=2`.
- Heads. Study: turning heads as deep as the order head did not converge. Here: they are shallow; `deep_heads=True`
  builds those.
- Orders, gap and jitter. Here: as in our jigsaw.
- Schedule. Study: a tenth of the rate from epoch 250 on. Here: a cosine.
- BatchNorm. Here: all tiles of a batch pass the encoder together and share statistics.

Settings of the works that use it, as words of train.py:
  Zhang et al. 2023, RKB in 3D, 2x2x2 cubes
    --set grid=2 width=64 hidden=1024 permutations=100 mask=False --optimizer adam --lr 1e-3 --weight-decay 1e-6
    --batch 8 --epochs 1000
  the same, RKB+
    --set grid=2 width=64 hidden=1024 permutations=100 mask=True
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings; size and batch are its 2D jigsaw's
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,        # of every Adam of the released code
    "batch": 48,                 # 8 in 3D
    "epochs": 1000,              # there with a tenth of the rate from epoch 250 on, here with a cosine
    "warmup": 0,
    "views": "plain",
    "size": 360,
}

SMALL = {
    "views": "mild",             # phantoms, 300 steps, one seed: validation kNN .370, with "plain" .312
}

TURNED = math.log(3) - 2 / 3 * math.log(2)                                  # the entropy of one in three
CHANCE = {"horizontal": TURNED, "vertical": TURNED, "mask": math.log(2)}


class Rubik(nn.Module):
    """Order, turning and (with `mask`) masking of tiles."""

    def __init__(self, encoder, augment, grid=3, permutations=100, mask=False, deep_heads=False, gap=0.0, jitter=0.05,
                 width=64, hidden=1024, seed=0):
        super().__init__()
        if min(gap, jitter) < 0 or gap + jitter >= 1:
            raise ValueError(f"gap={gap} and jitter={jitter}: shares of a cell, which must leave some of it")
        self.encoder, self.augment, self.grid, self.gap, self.jitter = encoder, augment, grid, gap, jitter
        self.register_buffer("orders", permutation_set(grid ** 2, permutations, seed))      # (K, T)
        self.branch = nn.Sequential(nn.Linear(encoder.dim, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width))
        tiles, depth = grid ** 2, 2 if deep_heads else 1
        self.order_head = mlp(tiles * width, hidden, hidden, len(self.orders), norm=False)
        self.tile_heads = nn.ModuleDict({name: mlp(tiles * width, *[hidden] * depth, tiles, norm=False)
                                         for name in ("horizontal", "vertical", "mask")[:3 if mask else 2]})
        self.masked, self.share = (0.5, 1.0) if mask else (0.0, 0.5)        # of tiles; of the sum in Eq. 6 and 5

    @torch.no_grad()
    def views(self, images):
        B, T, device = len(images), self.grid ** 2, images.device
        cells = torch.arange(T, device=device).expand(B, -1)                # (B, T)
        tiles = cut(self.augment(images), cells, self.grid, self.gap, self.jitter)          # (B, T, C, h, w)
        which = torch.randint(len(self.orders), (B,), device=device)        # (B,)
        turning = torch.randint(3, (B, T), device=device)                   # (B, T)
        tiles = turn_over(shuffle(tiles, self.orders[which]), turning)      # Eq. 1, 2
        masked = torch.rand(B, T, device=device) < self.masked              # (B, T)
        kept = torch.rand_like(tiles[:, :, :1]) < 0.5                       # (B, T, 1, h, w)  one mask for all channels
        return tiles * (kept | ~masked[:, :, None, None, None]), which, turning, masked.long()                 # Eq. 3

    def forward(self, tiles, which, turning, masked):
        z = self.branch(self.encoder(tiles.flatten(0, 1)))                  # (B * T, width)
        z = z.reshape(len(tiles), -1)                                       # (B, T * width)  Eq. 4
        logits, = at_least_float32(self.order_head(z))                      # (B, K)
        terms = {"order": F.cross_entropy(logits, which)}
        accuracies = {"order_accuracy": (logits.argmax(1) == which).float().mean()}
        answers = {"horizontal": turning == 1, "vertical": turning == 2, "mask": masked == 1}           # (B, T) each
        for name, head in self.tile_heads.items():
            logits, = at_least_float32(head(z))                             # (B, T)
            terms[name] = F.binary_cross_entropy_with_logits(logits, answers[name].to(logits.dtype))
            accuracies[f"{name}_accuracy"] = ((logits > 0) == answers[name]).float().mean()
        chance = math.log(len(self.orders)) + sum(CHANCE[name] for name in self.tile_heads)
        return {"loss": self.share * sum(terms.values()), "chance": self.share * chance,                # Eq. 5, 6
                **terms, **accuracies}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def turn_over(tiles, turning):
    """Tile t of puzzle i as it is (0), mirrored left-right (1) or up-down (2); (B, T, C, h, w). Its own inverse."""
    turning = turning[:, :, None, None, None]                               # (B, T, 1, 1, 1)
    return torch.where(turning == 1, tiles.flip(4), torch.where(turning == 2, tiles.flip(3), tiles))


def shuffle(tiles, order):
    """Tile t of puzzle i becomes tile order[i, t]: tiles (B, T, ...), order (B, T)."""
    return tiles[torch.arange(len(tiles), device=tiles.device)[:, None], order]             # (B, T, ...)


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
