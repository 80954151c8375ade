"""Rotation: turn the image by a multiple of 90 degrees and let the network say by how much.

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018.

The idea. To say which way is up, one has to know what is in the picture: where the spine lies, on which side the liver
is. The label costs nothing, since we turned the image ourselves.

The algorithm.
  y ~ uniform{0, 1, 2, 3},   x' = image turned by y * 90 degrees, counter-clockwise                                (1)
  loss = cross-entropy(h(f(x')), y)                        encoder f, head h; h is thrown away afterwards           (2)
A network that knows nothing scores ln 4.

Shapes. images (B, C, H, W), H = W -> turned images (B, C, h, w) and turns (B,) -> one number.

Differences. Study: the work that RECIPE follows.
- Turns. Paper: all four of each image in one batch. Study and here: one an image, at random.
- Classes. Study in 3D: ten (identity, and three turns about each axis). Study in 2D, and here: four.
- Head. Study: a hidden layer of 1024 by its supplement, of 2048 in its 2D code. Here: 1024.
- Augmentation. Study's 2D code: one crop of 0.85 to 1.15 of the image, sides in a ratio of 0.8 to 1.2, with probability
  0.5; then twice a jitter of brightness 0.2 and contrast 0.2, each with probability 0.5. Here: none. An augmentation of
  your own must not rotate: a random angle on top would blur the label.
- Schedule. Study: a tenth of the rate from epoch 250 on, and it stops early. Here: a cosine.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 1e-6,
    "batch": 16,                 # 2D; 2 in 3D
    "epochs": 1000,              # at most, the study stops early; its rate drops tenfold at epoch 250, here a cosine
    "warmup": 0,
    "views": "plain",            # on its fundus photographs (the 2D set): "fundus_mild"
    "size": 512,
}

SMALL = {}                       # as in RECIPE: accuracy 1.00 after 300 steps on phantoms (presets.md)


class Rotation(nn.Module):
    """Which of four ways was the image turned?"""

    def __init__(self, encoder, augment, hidden=1024):
        super().__init__()
        self.encoder, self.augment = encoder, augment
        self.head = mlp(encoder.dim, hidden, 4, norm=False)                 # pooled feature, 1024, 4 classes

    @torch.no_grad()
    def views(self, images):
        turns = torch.randint(4, (len(images),), device=images.device)      # (B,)
        return rotate(self.augment(images), turns), turns                   # Eq. 1

    def forward(self, x, turns):
        logits, = at_least_float32(self.head(self.encoder(x)))              # (B, 4)
        loss = F.cross_entropy(logits, turns)                               # Eq. 2
        accuracy = (logits.argmax(1) == turns).float().mean()
        return {"loss": loss, "chance": math.log(4), "accuracy": accuracy}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def rotate(images, turns):
    """Image i of (B, C, S, S) turned counter-clockwise by turns[i] * 90 degrees. rotate(rotate(x, t), -t) is x."""
    four = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])         # (4, B, C, S, S)
    return four[turns % 4, torch.arange(len(images), device=images.device)]  # (B, C, S, S)


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
