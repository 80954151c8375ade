"""SimSiam: one view predicts the other, with no negatives, no momentum twin and no queue.

Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021.

The idea. Two views of one image should have the same embedding. Asked for just that, a network answers with one
embedding for everything. Two small things prevent it: a predictor on one side, and no gradient on the other
(stop-gradient).

The algorithm.
  z = g(f(x)),   p = h(z)                                  encoder f, projector g, predictor h                     (1)
  D(p, z) = -cos(p, stopgrad(z))                                                                                   (2)
  loss = D(p1, z2) / 2 + D(p2, z1) / 2                                                                             (3)
There is no chance level: the loss runs from 1 to -1, and -1 is reached by the best network and by the useless one. What
collapse looks like: the loss is soon near -1, and the spread of the normalised embedding (standard deviation over
images, mean over dimensions, times sqrt(D), so that about 1 is healthy) falls towards 0.

Shapes. images (B, C, H, W) -> two views (B, C, h, w) -> embeddings and predictions (B, D) -> one number.

Differences. Study: the work that RECIPE follows.
- Predictor. Paper: a hidden layer of a quarter of the width. Study: its code has no predictor. Here: a quarter (128 of
  512), with SMALL a half (128 of 256); `predictor=False` leaves it out and shows the collapse.
- Projector. Paper: three layers of 2048, BatchNorm on the output too. Study and here: 2048-512, BatchNorm on the hidden
  layer only.
- Rate of the predictor. Paper: constant while the rest decays. Here: it decays as well.

Settings of the works that use it, as words of train.py:
  Chattopadhyay et al. 2023, small medical sets (RECIPE without predictor); there the rate stays constant
    --set predictor=False hidden=2048 dim=512
    --optimizer sgd --options momentum=0 --lr 0.04 --weight-decay 0 --batch 64 --epochs 250 --views lowresource
"""

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Chattopadhyay et al. 2023, the released settings
    "optimizer": "sgd",
    "options": {"momentum": 0.0},
    "lr": 0.04,                  # per 256: 0.01 at batch 64; there it stays constant, here a cosine
    "weight_decay": 0.0,
    "batch": 64,
    "epochs": 250,               # the default; the study's example has 200
    "warmup": 0,
    "views": "lowresource",      # crops of 0.2 to 1 of the area (released: 0.08 to 0.1), flip, colour, blur, solarise
    "size": 224,
}

SMALL = {                        # kNN .388, both 2048 .435, 128 and 64 .410 (300 steps, phantoms, 3 seeds): no order
    "hidden": 512,
    "dim": 256,
}


class SimSiam(nn.Module):
    """Each view's prediction should point where the other view's embedding points."""

    def __init__(self, encoder, augment, hidden=2048, dim=512, bottleneck=128, predictor=True):
        super().__init__()
        self.encoder, self.augment = encoder, augment
        self.projector = mlp(encoder.dim, hidden, dim)
        self.predictor = mlp(dim, bottleneck, dim) if predictor else nn.Identity()

    @torch.no_grad()
    def views(self, images):
        return self.augment(images), self.augment(images)                   # 2 x (B, C, h, w)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                               # (B, D)  Eq. 1
        z2 = self.projector(self.encoder(x2))                               # (B, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)                     # (B, D)
        loss = (negative_cosine(p1, z2.detach()) + negative_cosine(p2, z1.detach())) / 2            # Eq. 3
        return {"loss": loss, "embedding": z1.detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def negative_cosine(p, z):
    """Eq. 2, mean over the rows of p, z (B, D), which are normalised here. The caller stops the gradient of z."""
    p, z = at_least_float32(p, z)
    return -F.cosine_similarity(p, z, dim=1).mean()


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
