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

Differences. The study that RECIPE follows has 26 neighbours in 3D; in 2D, as there and in the original, there are
eight. Its released code pools by maximum, its supplement and we by the mean. Its 2D patches have 114 of a cell's 120
pixels; we share out the other six between gap and jitter. Both are given as shares of a cell, so that they mean the
same at every image size, and a share above nought is at least one pixel. All patches of a batch pass the encoder
together and share BatchNorm statistics. On small images the defaults leave only a pixel or two between patches; for a
wider gap take, say, `gap=0.2, jitter=0.1`. Accumulation of gradients (one optimiser step from several micro-batches)
equals a larger batch but for BatchNorm's statistics.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,        # rotation's, none is given
    "batch": 32,
    "epochs": 1000,              # also rotation's; there the rate drops tenfold at epoch 250, here a cosine
    "warmup": 0,
    "views": "plain",
    "size": 360,                 # three cells of 120; the study crops the central 720 pixels and halves them
}


class Relative(nn.Module):
    """Where does the second patch lie?"""

    def __init__(self, encoder, augment, gap=0.025, jitter=0.025, width=64, hidden=1024):
        super().__init__()
        self.encoder, self.augment, self.gap, self.jitter = encoder, augment, gap, jitter
        self.branch = nn.Sequential(nn.Linear(encoder.dim, width), nn.ReLU(inplace=True), nn.BatchNorm1d(width))
        self.head = mlp(2 * width, hidden, 8, norm=False)

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
        if min(gap, jitter) < 0 or space + play >= cell:
            raise ValueError(f"gap={gap} and jitter={jitter} leave nothing of a cell of {cell} pixels: use less")
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
