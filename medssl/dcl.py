"""DCL: contrast without the coupling of the positive to the negatives, so that small batches learn too.

Yeh et al., "Decoupled Contrastive Learning", ECCV 2022.

The idea. In SimCLR's loss the positive pair (two views of one image) also stands in the denominator, beside the
negatives (views of other images). Once the pair is close, it shrinks the gradient of all negatives with it, the more so
the fewer negatives there are. Leave it out, and small batches lose less: in an independent re-implementation on
CIFAR-10 a batch of 32 came within one point of one of 256, where SimCLR's loss lay five points behind. DCLW goes
further and gives pairs that are still far apart more weight.

The algorithm.
  z = g(f(x))                                              encoder f, projector g; g is thrown away afterwards     (1)
  s(a, b) = cos(a, b) / temperature                                                                                (2)
  l_i = -w_i s(u_i, v_i) + log sum over j != i of [ exp s(u_i, u_j) + exp s(u_i, v_j) ]       u, v: the two views  (3)
  w_i = 1 (DCL)   or   2 - B softmax over i of [ cos(u_i, v_i) / sigma ], at most 2 and 1 on average (DCLW)         (4)
  loss = mean of l over the batch, with u, v = z1, z2 and with u, v = z2, z1
A network that knows nothing scores ln(2B - 2). The loss has no lower bound at 0: good embeddings score below it.

Shapes. images (B, C, H, W) -> two views (B, C, h, w) -> embeddings (B, D) -> one number.

Differences. Study: the work that RECIPE follows.
- Anchors. Paper and here: both views in turn. Study: the first view only.
- Weight. Study: always DCLW, with sigma 0.5. Here: DCL; `sigma=0.5` makes it DCLW.
- Gradient of the weight, Eq. 4. First public code, and study: it is let through. Here: the weight is held constant,
  which changes the gradient by a tenth and more.

Settings of the works that use it, as words of train.py:
  Chattopadhyay et al. 2023, small medical sets (RECIPE and sigma); there the rate stays constant
    --set temperature=0.1 sigma=0.5 hidden=512 dim=128
    --optimizer sgd --options momentum=0 --lr 0.04 --weight-decay 0 --batch 64 --epochs 250 --views lowresource
"""

import math

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

SMALL = {}                       # as in RECIPE: phantoms, 300 steps, kNN .511, with temperature 0.2 .500 (one seed)


class DCL(nn.Module):
    """Contrast of two views with all other views of the batch, the positive kept out of the denominator."""

    def __init__(self, encoder, augment, hidden=512, dim=128, temperature=0.1, sigma=None):
        super().__init__()
        self.encoder, self.augment, self.temperature, self.sigma = encoder, augment, temperature, sigma
        self.projector = mlp(encoder.dim, hidden, dim)

    @torch.no_grad()
    def views(self, images):
        return self.augment(images), self.augment(images)                   # 2 x (B, C, h, w)

    def forward(self, x1, x2):
        z1 = self.projector(self.encoder(x1))                               # (B, D)  Eq. 1
        z2 = self.projector(self.encoder(x2))                               # (B, D)
        z1_all, z2_all = all_ranks(z1), all_ranks(z2)                       # (ranks * B, D)
        loss = (decoupled_loss(z1_all, z2_all, self.temperature, self.sigma)
                + decoupled_loss(z2_all, z1_all, self.temperature, self.sigma)) / 2
        return {"loss": loss, "chance": math.log(2 * len(z1_all) - 2), "embedding": z1.detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def decoupled_loss(z1, z2, temperature, sigma=None):
    """Mean of Eq. 3 with anchors z1 (B, D) and partners z2 (B, D). Rows are normalised here; a sigma gives DCLW."""
    z1, z2 = at_least_float32(z1, z2)
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
        pairs = torch.stack([z1 @ z1.T, z1 @ z2.T], 1)                      # (B, 2, B) cosines
    positive = pairs[:, 1].diagonal()                                       # (B,)
    same_image = torch.eye(len(z1), dtype=torch.bool, device=z1.device).unsqueeze(1)                # (B, 1, B)
    negatives = (pairs / temperature).masked_fill(same_image, -math.inf).flatten(1).logsumexp(1)    # (B,)
    weight = 1 if sigma is None else 2 - len(z1) * (positive.detach() / sigma).softmax(0)           # (B,)  Eq. 4
    return (negatives - weight * positive / temperature).mean()


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
