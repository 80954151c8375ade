"""Relative position: cut two patches from one image and let the network say where the second lies, seen from the first.

Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction", ICCV 2015.

The idea. To say that this patch lies above that one, it helps to know that this is a lung's tip and that its base.
There is a cheaper way: the line that leaves one patch enters the next. So a gap is left between patches, and each is
moved a little at random; edges then no longer meet, and what is in the patches has to answer.

The algorithm. The image is a 3x3 grid of cells; a patch is a random crop of its cell.
  y ~ uniform{0, ..., 7}                                   one of the centre's neighbours, row by row                (1)
  z = g(f(patch)) for the centre and for neighbour y       encoder f, branch g, shared by both patches               (2)
  loss = cross-entropy(h([z_centre, z_neighbour]), y)      head h; g and h are thrown away afterwards                (3)
A network that knows nothing scores ln 8.

Shapes. images (B, C, H, W) -> centres and neighbours (B, C, h, w), positions (B,) -> one number.

Differences. Study: the work that RECIPE follows.
- Neighbours. Study in 3D: 26. Paper, study in 2D, and here: eight.
- Pooling. Study's 3D code: maximum. Its supplement, its 2D code, and here: mean.
- Patches. Study in 2D: 114 of a cell's 120 pixels. Here: gap and jitter share out the other six, as shares of a cell,
  so that they mean the same at every image size; a share above nought is at least one pixel.
- Jitter. Study's 2D code: the grid moves as a whole, by 0 to 11 pixels, and the gap is always 3. Paper and here: each
  patch moves by itself.
- Heads. Study in 3D: a branch of 64 numbers, one hidden layer of 1024. Study in 2D, and here: a branch of 2048, two
  hidden layers of 2048.
- Colour. Paper: chromatic aberration, which gives the place in a photograph away, is removed. Here: it is not.
- Epochs. Study's 2D code: up to 100,000, a tenth of the rate from 150 on. Here: those of its rotation, and a cosine.
- BatchNorm. Here: all patches of a batch pass the encoder together and share statistics.

Settings of the works that use it, as words of train.py:
  Zhang et al. 2023, released code in 2D (RECIPE)
    --set width=2048 hidden=2048 depth=2 gap=0.025 jitter=0.025 --optimizer adam --lr 1e-3 --weight-decay 1e-6
    --batch 32 --size 360
  the same in 3D
    --set width=64 hidden=1024 depth=1 --batch 16
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,        # of every Adam of the released code
    "batch": 32,
    "epochs": 1000,              # rotation's; in 3D with a tenth of the rate from epoch 250 on, here with a cosine
    "warmup": 0,
    "views": "plain",
    "size": 360,                 # three cells of 120; the study crops the central 720 pixels and halves them
}

SMALL = {
    "views": "mild",             # phantoms, 300 steps, one seed: validation kNN .424, with "plain" .308
    "gap": 0.2,                  # presets.md: on noise, where nothing but edges can help, accuracy .394 without gap and
    "jitter": 0.1,               # jitter, .134 with these (chance .125)
    "width": 64,                 # a guess: the study's heads in 3D; RECIPE's have 13 M weights, the tiny encoder 0.7 M
    "hidden": 1024,
    "depth": 1,
}


class Relative(nn.Module):
    """Where does the second patch lie?"""

    def __init__(self, encoder, augment, gap=0.025, jitter=0.025, width=2048, hidden=2048, depth=2):
        super().__init__()
        if min(gap, jitter) < 0 or gap + jitter >= 1:
            raise ValueError(f"gap={gap} and jitter={jitter}: shares of a cell, which must leave some of it")
        self.encoder, self.augment, self.gap, self.jitter = encoder, augment, gap, jitter
        self.branch = nn.Sequential(nn.Linear(encoder.dim, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width))
        self.head = mlp(2 * width, *[hidden] * depth, 8, norm=False)

    @torch.no_grad()
    def views(self, images):
        position = torch.randint(8, (len(images),), device=images.device)   # (B,)  Eq. 1
        return *neighbour(self.augment(images), position, self.gap, self.jitter), position

    def forward(self, centre, other, position):
        z = self.branch(self.encoder(torch.cat([centre, other])))           # (2B, width)  Eq. 2
        logits, = at_least_float32(self.head(torch.cat(z.chunk(2), 1)))     # (B, 8)
        loss = F.cross_entropy(logits, position)                            # Eq. 3
        accuracy = (logits.argmax(1) == position).float().mean()
        return {"loss": loss, "chance": math.log(8), "accuracy": accuracy}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def neighbour(images, position, gap=0.0, jitter=0.0):
    """The centre of a 3x3 grid and, of the eight cells around it, number position[i], row by row: 2 x (B, C, h, w)."""
    cells = torch.stack([torch.full_like(position, 4), position + (position > 3)], 1)  # (B, 2)  the centre is cell 4
    return cut(images, cells, 3, gap, jitter).unbind(1)


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
