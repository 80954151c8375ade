"""SimCLR: two views of one image should have similar embeddings, views of different images should not.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.

The idea. Distort every image of the batch twice. What the two views share is what survived the distortion: shape,
tissue, anatomy. A network that can pick a view's partner (its positive) among the views of all other images (its
negatives) has to encode just that.

The algorithm.
  z = g(f(x))                                              encoder f, projector g; g is thrown away afterwards     (1)
  s(i, j) = cos(z_i, z_j) / temperature                    over the 2B views of the batch                          (2)
  loss = mean over i of  -log [ exp s(i, p(i)) / sum over j != i of exp s(i, j) ],   p(i): the other view of i      (3)
The lower the temperature, the more the loss looks at the most similar negatives alone. A network that knows nothing
scores ln(2B - 1): every other view is equally likely.

Shapes. images (B, C, H, W) -> two views (B, C, h, w) -> embeddings (B, D) -> one number.

Differences. Study: the work that RECIPE follows.
- Loss. Paper and here: the same (its Eq. 1).
- Projector. Released code: BatchNorm on its hidden layer. Study: none. Here: none; `norm=True` puts it there.
- BatchNorm. Released code: statistics of both views on all devices. Here: of one view in one process.

Settings of the works that use it, as words of train.py:
  Zhang et al. 2023, ten pretext tasks (RECIPE); the supplement's rate is 1e-3
    --set temperature=0.07 hidden=512 dim=256 --optimizer sgd --lr 0.05 --weight-decay 1e-4 --batch 256 --epochs 500
  Chattopadhyay et al. 2023, small medical sets; there the rate stays constant
    --set temperature=0.5 hidden=512 dim=128 norm=True
    --optimizer sgd --options momentum=0 --lr 0.04 --weight-decay 0 --batch 64 --epochs 250 --views lowresource
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "sgd",          # momentum 0.9
    "lr": 0.05,                  # per 256; the supplement says 1e-3, the released code 0.05
    "weight_decay": 1e-4,
    "batch": 256,
    "epochs": 500,
    "warmup": 0,                 # cosine without warm-up
    "views": "ct",               # crops, flips, scale, rotation, blur; on its fundus photographs (the 2D set): "fundus"
    "size": 128,
}

SMALL = {                        # 300 steps on phantoms, kNN on validation patients, one seed
    "views": "contrastive",      # .479, with "slices" .416
    "temperature": 0.2,          # as MoCo v2; with 0.1 .495, with 0.5 .489: no difference, by one seed
}


class SimCLR(nn.Module):
    """Contrast of two views with all other views of the batch."""

    def __init__(self, encoder, augment, hidden=512, dim=256, temperature=0.07, norm=False):
        super().__init__()
        self.encoder, self.augment, self.temperature = encoder, augment, temperature
        self.projector = mlp(encoder.dim, hidden, dim, norm=norm)

    @torch.no_grad()
    def views(self, images):
        return self.augment(images), self.augment(images)                   # 2 x (B, C, h, w)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                               # (B, D)  Eq. 1
        z2 = self.projector(self.encoder(x2))                               # (B, D)
        z1_all, z2_all = all_ranks(z1), all_ranks(z2)                       # (ranks * B, D)
        loss = nt_xent(z1_all, z2_all, self.temperature)                    # Eq. 3
        return {"loss": loss, "chance": math.log(2 * len(z1_all) - 1), "embedding": z1.detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def nt_xent(z1, z2, temperature):
    """Eq. 3, the normalised temperature-scaled cross-entropy, for z1, z2 (B, D), row i of both from image i. Rows are
    normalised here; the mean is over all 2B views."""
    z = torch.cat(at_least_float32(z1, z2))                                 # (2B, D)
    with torch.autocast(z.device.type, enabled=False):
        z = F.normalize(z, dim=1)
        similarity = z @ z.T / temperature                                  # (2B, 2B)  Eq. 2
    similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z1))           # (2B,)  i -> i + B, and back
    return F.cross_entropy(similarity, partner)


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def all_ranks(x):
    """Rows of every process in rank order. Only the process's own rows carry a gradient, multiplied by the number of
    processes (x - x.detach() is 0, its gradient is not): DistributedDataParallel averages, so the sum is restored."""
    if not (dist.is_available() and dist.is_initialized()):
        return x
    rows = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, x.detach().contiguous())
    rows[dist.get_rank()] = x + (len(rows) - 1) * (x - x.detach())
    return torch.cat(rows)                                                  # (ranks * B, ...)
