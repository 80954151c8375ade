"""BYOL: an online network predicts what a slowly following copy of itself says about the other view.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020.

The idea. As in SimSiam, two views of one image should agree and nothing is pushed apart. The goal of the prediction
comes from a target network whose weights are a running mean of the online network's: steadier than the online network,
always a little behind, so that there is something to catch up with.

The algorithm.
  online:  z = g(f(x)),  p = h(z)           target:  z' = g'(f'(x)), no gradient, BatchNorm in training mode       (1)
           encoder f, projector g, predictor h; a prime marks the target network
  d(p, z') = 2 - 2 cos(p, z'),      loss = mean d(p1, z'2) + mean d(p2, z'1)                                       (2)
  target <- m target + (1 - m) online                      after each step, parameters only                        (3)
  m = m_1 - (m_1 - m_0) (1 + cos(pi t)) / 2                t: share of the run that is done; from m_0 to m_1 = 1   (4)
There is no chance level: the loss runs from 8 to 0, and 0 is reached by the best network and by the useless one. What
collapse looks like: the loss is soon near 0, and the spread of the normalised embedding (standard deviation over
images, mean over dimensions, times sqrt(D), so that about 1 is healthy) falls towards 0.

Shapes. images (B, C, H, W) -> two views (B, C, h, w) -> predictions and targets (B, D) -> one number.

Differences. Study: the work that RECIPE follows.
- Momentum. Paper and here: from 0.996 along a cosine to 1. Study: 0.996 throughout; here that is `momentum_end=0.996`.
- Loss. Paper and here: Eq. 2. Study: the same without the constant 4.
- Heads. Study and here: smaller than the paper's.
- Target. Here: both its networks begin as copies of the online ones. Study: its projector is drawn afresh.
- What is kept. Study: the online encoder was better on two of three tasks, the target's on the third. Here: `export`
  chooses.

Settings of the works that use it, as words of train.py:
  Zhang et al. 2023, ten pretext tasks (RECIPE and a constant momentum); the released code's rate is 1e-4
    --set momentum=0.996 momentum_end=0.996 hidden=512 predictor_hidden=512 dim=256
    --optimizer sgd --lr 2e-3 --weight-decay 1e-4 --batch 128 --epochs 600
  Kalapos and Gyires-Toth 2022, 2D segmentation, from random weights; from ImageNet's: 25 epochs, and the target is kept
    --set momentum=0.99 hidden=4096 predictor_hidden=8192 --optimizer lars --options trust=0.02 trust_clip=True --lr 1.0
    --weight-decay 1e-5 --batch 128 --epochs 400 --warmup 10 --views mri
  Wolf et al. 2023, small CT sets; there the rate's cosine is as long as 100 epochs
    --set momentum=0.996 hidden=4096 predictor_hidden=4096 --optimizer adam --lr 1e-3
    --weight-decay 1.5e-6 --batch 64 --epochs 78 --warmup 10 --views slices
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, their settings for 2D images
    "optimizer": "sgd",          # momentum 0.9; it and the decay are the released code's
    "lr": 2e-3,                  # per 256: the supplement's 1e-3 at the 2D batch of 128; the released code says 1e-4
    "weight_decay": 1e-4,
    "batch": 128,
    "epochs": 600,
    "warmup": 0,                 # cosine without warm-up
    "views": "ct",               # crops, flips, scale, rotation, blur; on its fundus photographs (the 2D set): "fundus"
    "size": 224,
}

SMALL = {                        # 300 steps on phantoms, three seeds, kNN on validation patients
    "momentum": 0.99,            # .439; with 0.9 .373, with 0.996 .429 (presets.md)
}


class BYOL(nn.Module):
    """Predict the slow copy's embedding of the other view."""

    def __init__(self, encoder, augment, hidden=512, predictor_hidden=512, dim=256, momentum=0.996, momentum_end=1.0,
                 export="online"):
        super().__init__()
        if export not in ("online", "target"):
            raise ValueError(f"byol: export is {export!r}, choose online or target")
        self.encoder, self.augment, self.export = encoder, augment, export
        self.momentum, self.momentum_end = momentum, momentum_end
        self.projector = mlp(encoder.dim, hidden, dim)
        self.predictor = mlp(dim, predictor_hidden, dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_projector = copy.deepcopy(self.projector).requires_grad_(False)

    @property
    def exported(self):
        return self.encoder if self.export == "online" else self.target_encoder

    @torch.no_grad()
    def views(self, images):
        return self.augment(images), self.augment(images)                   # 2 x (B, C, h, w)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                               # (B, D)  Eq. 1
        z2 = self.projector(self.encoder(x2))                               # (B, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)                     # (B, D)
        with torch.no_grad():
            target1 = self.target_projector(self.target_encoder(x1))        # (B, D)
            target2 = self.target_projector(self.target_encoder(x2))        # (B, D)
        loss = cosine_distance(p1, target2) + cosine_distance(p2, target1)  # Eq. 2
        return {"loss": loss, "embedding": z1.detach()}

    @torch.no_grad()
    def after_step(self, outs, progress):
        momentum = momentum_at(self.momentum, progress, self.momentum_end)                     # Eq. 4
        ema_update(self.target_encoder, self.encoder, momentum)             # Eq. 3
        ema_update(self.target_projector, self.projector, momentum)


def cosine_distance(p, z):
    """Mean of 2 - 2 cos over the rows of p, z (B, D), which are normalised here. The caller stops the gradient of z."""
    p, z = at_least_float32(p, z)
    return (2 - 2 * F.cosine_similarity(p, z, dim=1)).mean()


def momentum_at(start, progress, end=1.0):
    """Eq. 4: from start to exactly `end`; with 1 the target stands still there."""
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


@torch.no_grad()
def ema_update(slow, fast, momentum):
    """slow <- momentum slow + (1 - momentum) fast, parameters only: each network keeps its own BatchNorm statistics."""
    for old, new in zip(slow.parameters(), fast.parameters()):
        old.lerp_(new, 1 - momentum)
