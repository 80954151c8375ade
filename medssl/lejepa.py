"""LeJEPA: views should agree, and the embeddings should look normally distributed from every direction.

Balestriero and LeCun, "LeJEPA: Provable and Scalable Self-Supervised Learning Without the Heuristics", 2025
(arXiv 2511.08544).

The idea. One embedding for all images is perfect agreement. VICReg forbids it by the spread of every dimension and the
covariance of every pair; here the whole distribution is prescribed: the standard normal. A cloud of points is normal if
its shadow in every direction is, and a shadow is a row of numbers, for which there is a classical test. So each step
draws some directions and adds up how far the shadows are from normal. There is no slow copy, no queue, no predictor,
no stopped gradient, and one number weighs the two terms.

The algorithm.
  z_v = g(f(x_v))                                          encoder f, projector g, views v = 1, ..., V              (1)
  invariance = mean of (z_v - mean over v of z_v)^2 over views, images and dimensions                               (2)
  T = N integral of |mean over images of exp(i t p) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt                             (3)
      for the N numbers p = z_v . a, a direction a of length 1: Epps and Pulley's test of the characteristic function
      against the standard normal's; the integral is twice that from 0 to t_max, by trapezoids between the knots
  sigreg = mean of T over views and directions                                                                      (4)
  loss = w sigreg + (1 - w) invariance                     w = sigreg_weight                                        (5)
A network that gives one embedding to all images scores at least 0.402 w N (embedding 0), which is returned as chance.

Shapes. images (B, C, H, W) -> V = 2 + n crops, 2 large, n small, and directions (D, K) -> z (V, B, D) -> two numbers.

Differences. The paper's body was not at hand. Released code: the authors' repository.
- Centre of Eq. 2. Paper: mean of the large crops. Released code (its minimal example) and here: mean of all.
- Views. Released code: any number of one kind, or 2 large and 6 small crops. Here: 2 large and `crops` small ones.
- Crops. Released code: 0.3 to 1 of the area, small ones 0.05 to 0.3, all flipped and solarised. Here: 0.2 to 1 and 0.1
  to 0.33, the small ones neither flipped nor solarised.
- Directions. Released code: drawn at every step. Here: the same, in `views`; the first process's serve all.
- Several processes. Released code: means of cos(t p) and sin(t p) are averaged. Here: embeddings are gathered, for the
  same T.
- BatchNorm. Released code: the examples train vision transformers. Here: the large crops of a process share statistics,
  the small ones share theirs, and the projector sees all crops at once.
- Rate. Released code: warm-up from a hundredth of it, cosine to a thousandth. Here: from 0 and to 0.
"""

import torch
import torch.distributed as dist
from torch import nn

RECIPE = {                       # the authors' repository: the settings it recommends to start with
    "optimizer": "adamw",
    "lr": 5e-4,
    "weight_decay": 5e-4,        # for ResNets; 5e-2 for vision transformers
    "batch": 128,                # ours: neither batch nor epochs were found
    "epochs": 200,
    "warmup": 1,                 # from the minimal example
    "views": "lowresource",      # see Differences
    "views_small": "multicrop_small",
    "size": 224,                 # small crops: 98 there, 96 here
}

SMALL = {                        # 300 steps on phantoms, 64 pixels, batch 64, AdamW at 1e-3; kNN on validation patients
    "views": "contrastive",      # .503 ± .021 over three seeds, with "lowresource" .478 ± .057: no difference
    "crops": 0,                  # .528, with 2 small crops .453 (one seed, "lowresource")
    "hidden": 512,               # forward and backward of 256 rows take 8 ms of one core, with 2048 they take 99
    "dim": 64,                   # .527, with 16 .518, with 256 .501 (one seed, "contrastive")
}


class LeJEPA(nn.Module):
    """Agreement of all crops under a normal distribution; `small` makes the small crops, without it there are none."""

    def __init__(self, encoder, augment, small=None, crops=6, hidden=2048, dim=128, sigreg_weight=0.05,
                 directions=256, t_max=3.0, knots=17):
        super().__init__()
        self.encoder, self.augment, self.small, self.crops = encoder, augment, small, crops
        self.sigreg_weight, self.shape, self.t_max, self.knots = sigreg_weight, (dim, directions), t_max, knots
        self.projector = mlp(encoder.dim, hidden, hidden, dim)
        self.collapsed = sigreg(torch.zeros(1, 1, 1), torch.ones(1, 1), t_max, knots).item()        # T / N at z = 0

    @torch.no_grad()
    def views(self, images):
        large = self.augment(images), self.augment(images)                  # 2 x (B, C, h, w)
        small = () if self.small is None else tuple(self.small(images) for _ in range(self.crops))
        directions = torch.randn(self.shape, device=images.device)          # (D, K)
        return *large, *small, directions / directions.norm(dim=0)          # (D, K)

    def forward(self, *views):
        *crops, directions = views
        sizes = [group for group in (crops[:2], crops[2:]) if group]
        y = torch.cat([self.encoder(torch.cat(group)) for group in sizes])  # (V * B, encoder.dim)
        z = at_least_float32(self.projector(y))[0]                          # (V * B, D)  Eq. 1
        z = torch.stack(z.chunk(len(crops)), dim=1)                         # (B, V, D): all_ranks joins the first axis
        z_all = all_ranks(z).transpose(0, 1)                                # (V, ranks * B, D)
        directions = all_ranks(directions)[:len(directions)]                # (D, K) of the first process
        invariance = (z_all - z_all.mean(0)).square().mean()                # Eq. 2
        normality = sigreg(z_all, directions, self.t_max, self.knots)       # Eq. 4
        loss = self.sigreg_weight * normality + (1 - self.sigreg_weight) * invariance               # Eq. 5
        return {"loss": loss, "invariance": invariance, "sigreg": normality,
                "chance": self.sigreg_weight * self.collapsed * z_all.shape[1], "embedding": z[:, 0].detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def sigreg(z, directions, t_max, knots):
    """Eqs. 3 and 4 for z (V, N, D), views by images, and directions (D, K), columns of length 1."""
    z, directions = at_least_float32(z, directions)
    t = torch.linspace(0, t_max, knots, dtype=z.dtype, device=z.device)
    normal = torch.exp(-t ** 2 / 2)                                         # (knots,) its characteristic function
    with torch.autocast(z.device.type, enabled=False):
        angles = (z @ directions).unsqueeze(-1) * t                         # (V, N, K, knots)
    real, imaginary = angles.cos().mean(1), angles.sin().mean(1)            # (V, K, knots)
    heights = ((real - normal) ** 2 + imaginary ** 2) * normal              # (V, K, knots)
    integrals = 2 * torch.trapezoid(heights, t)                             # (V, K) twice, for t and -t
    return z.shape[1] * integrals.mean()                                    # Eqs. 3 and 4


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
