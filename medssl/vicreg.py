"""VICReg: views should agree, while every dimension keeps its spread and no two say the same.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022.

The idea. Other methods avoid collapse (one embedding for all images) by pushing images apart or by treating the two
views differently; here it is forbidden outright: a term punishes dimensions of the embedding that vary too little over
the batch, another punishes dimensions that vary together.

The algorithm.
  z = g(f(x))                                              encoder f, projector g; g is thrown away afterwards     (1)
  invariance = mean of (z1 - z2)^2 over images and dimensions                                                      (2)
  variance   = mean over dimensions of max(0, 1 - sqrt(var + 0.0001)), mean of both views                          (3)
  covariance = sum over ordered pairs of different dimensions of cov^2, divided by D, sum of both views            (4)
  loss = 25 invariance + 25 variance + 1 covariance                                                                (5)
A network that gives one embedding to all images scores 25 * 0.99, returned as chance; its covariance term is exactly 0,
which is the sign of collapse to look for.

Shapes. images (B, C, H, W) -> two views (B, C, h, w) -> embeddings (B, D) -> three numbers and their weighted sum.

Differences. Study: the work that RECIPE follows.
- Variance. Paper and study: sum of the two views, which is `variance_weight=50` here. Released code and here: their
  mean.
- Covariance. Everywhere: sum of the two views. Released code and here: divided by B - 1, as variances are.
- Projector. Paper: two hidden layers of 8192. Study and here: one of 4096.

Settings of the works that use it, as words of train.py:
  Chattopadhyay et al. 2023, small medical sets (RECIPE and a summed variance); there the rate stays constant
    --set hidden=4096 dim=4096 invariance_weight=25 variance_weight=50 covariance_weight=1
    --optimizer sgd --options momentum=0 --lr 0.04 --weight-decay 0 --batch 64 --epochs 250 --views lowresource
"""

import torch
import torch.distributed as dist
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

SMALL = {                        # 300 steps on phantoms, kNN on validation patients, one seed
    "hidden": 512,               # .512 with both, with 2048 .473, with 128 .517
    "dim": 512,
}


class VICReg(nn.Module):
    """Agreement of two views under a floor for variance and a penalty on covariance."""

    def __init__(self, encoder, augment, hidden=4096, dim=4096,
                 invariance_weight=25.0, variance_weight=25.0, covariance_weight=1.0):
        super().__init__()
        self.encoder, self.augment = encoder, augment
        self.weights = (invariance_weight, variance_weight, covariance_weight)
        self.projector = mlp(encoder.dim, hidden, dim)

    @torch.no_grad()
    def views(self, images):
        return self.augment(images), self.augment(images)                   # 2 x (B, C, h, w)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                               # (B, D)  Eq. 1
        z2 = self.projector(self.encoder(x2))                               # (B, D)
        terms = vicreg_terms(all_ranks(z1), all_ranks(z2))                  # of (ranks * B, D)
        loss = sum(weight * term for weight, term in zip(self.weights, terms))                      # Eq. 5
        return {"loss": loss, **dict(zip(("invariance", "variance", "covariance"), terms)),
                "chance": 0.99 * self.weights[1], "embedding": z1.detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def vicreg_terms(z1, z2):
    """Eqs. 2 to 4 for z1, z2 (B, D), B > 1, row i of both from image i: (invariance, variance, covariance)."""
    z1, z2 = at_least_float32(z1, z2)
    invariance = F.mse_loss(z1, z2)                                         # Eq. 2
    variance = covariance = 0
    for z in (z1, z2):
        z = z - z.mean(0)
        with torch.autocast(z.device.type, enabled=False):
            cov = z.T @ z / (len(z) - 1)                                    # (D, D)
        variance = variance + F.relu(1 - (cov.diagonal() + 1e-4).sqrt()).mean() / 2                 # Eq. 3
        same = torch.eye(len(cov), dtype=torch.bool, device=z.device)
        covariance = covariance + cov.masked_fill(same, 0).square().sum() / len(cov)                # Eq. 4
    return invariance, variance, covariance


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
