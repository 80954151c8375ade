"""SwAV: sort the images into clusters that are all equally full, and guess one view's cluster from another view.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments", NeurIPS 2020.

The idea. Views of one image should belong to the same cluster. If the network chose the clusters freely it would put
everything into one; so the assignment, the code, is worked out under the rule that every cluster gets the same share of
the batch. Two large crops provide codes; small crops, cheap to encode, only have to guess them.

The algorithm.
  z = g(f(x)) / |g(f(x))|,   s = cos(z, c_k)               encoder f, projector g, prototypes c_1..c_K of length 1 (1)
  q = codes of the two large crops from s by Sinkhorn's algorithm: exp(s / epsilon), then in turn columns and rows
      scaled to equal sums: every prototype the same share of the batch, every image one unit to hand out          (2)
  loss = mean over large crops a and crops v != a of the cross-entropy of q_a and softmax(s_v / temperature)       (3)
  after each step the prototypes are scaled back to length 1; in the first `freeze` steps they do not move         (4)
Prototypes are the centres of the clusters and are trained like weights; the smaller epsilon, the nearer a code comes to
one cluster alone. A network that knows nothing scores ln K. A loss that stays there has not started: freeze longer, or
take fewer prototypes. A (micro-)batch that is small beside K cannot be shared out among them: use the queue.

Shapes. images (B, C, H, W) -> V = 2 + n crops, 2 large, n small -> scores (V, B, K), codes (2, B, K) -> one number.

Differences. Study: the work that RECIPE follows.
- Sinkhorn. Here: on logarithms; the same numbers, without overflow or underflow.
- Frozen prototypes. Released code, by default, and here: 313 steps. Study: 313 of 800 epochs, since its code compares
  the epoch with that number.
- Queue. Released code: off for 15 epochs, and until it is full. Study: none. Here: with `queue_size` the newest
  embeddings of the large crops join the batch in Eq. 2 as soon as the queue is full.
- BatchNorm. Released code and here: the large crops of a process share statistics, the small ones share theirs, and the
  projector sees all crops at once.
- LARS. Study: biases and norms are scaled by it and decay, too. Here: not, unless with `--options decay_all=True`.

Settings of the works that use it, as words of train.py:
  Wolf et al. 2023, small CT sets (RECIPE)
    --set prototypes=500 dim=128 hidden=2048 temperature=0.1 epsilon=0.05 iterations=3 crops=6 queue_size=0
    --optimizer lars --options momentum=0.9 trust=0.001 --lr 0.3 --weight-decay 1e-6
    --batch 128 --epochs 800 --warmup 10 --views multicrop
  the same as it was run there, with decay and LARS for all parameters
    --options decay_all=True
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Wolf et al. 2023, the released settings
    "optimizer": "lars",
    "options": {"momentum": 0.9, "trust": 0.001},
    "lr": 0.3,                   # per 256: 0.15 at batch 128
    "weight_decay": 1e-6,
    "batch": 128,
    "epochs": 800,
    "warmup": 10,
    "views": "multicrop",        # 90 to 100 % of the area, colour, blur; no flips, no rotation
    "views_small": "multicrop_small",                                       # 10 to 33 % of the area
    "size": 224,                 # small crops: 96
}

SMALL = {                        # 300 steps on phantoms, kNN on validation patients
    "prototypes": 20,            # with 100, frozen for 40 steps, the loss was still ln 100 after 300
    "freeze": 0,                 # a guess, tried only together with the number above
    "epsilon": 0.03,             # .355, with 0.05 .333 (one seed, 2 small crops)
    "crops": 0,                  # .517, with 2 small crops, of 27 pixels at 64, .416 (three seeds)
}


class SwAV(nn.Module):
    """Guess the cluster of one crop from another crop; `small` makes the small crops, without it there are none."""

    def __init__(self, encoder, augment, small=None, crops=6, hidden=2048, dim=128, prototypes=500, temperature=0.1,
                 epsilon=0.05, iterations=3, freeze=313, queue_size=0):
        super().__init__()
        self.encoder, self.augment, self.small, self.crops = encoder, augment, small, crops
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.freeze, self.queue_size = freeze, queue_size
        self.projector = mlp(encoder.dim, hidden, dim)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, dim), dim=1))            # (K, D)
        self.register_buffer("first", self.prototypes.detach().clone())     # (K, D)  where they stay while frozen
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("queue", torch.zeros(2, queue_size, dim))      # (2, Q, D)
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))   # rows that ever entered the queue

    @torch.no_grad()
    def views(self, images):
        large = self.augment(images), self.augment(images)                  # 2 x (B, C, h, w)
        return large if self.small is None else large + tuple(self.small(images) for _ in range(self.crops))

    def forward(self, *crops):
        sizes = [group for group in (crops[:2], crops[2:]) if group]
        y = torch.cat([self.encoder(torch.cat(group)) for group in sizes])  # (V * B, encoder.dim)
        z = F.normalize(*at_least_float32(self.projector(y)), dim=1)        # (V * B, D)
        z = torch.stack(z.chunk(len(crops)), dim=1)                         # (B, V, D): all_ranks joins the first axis
        z_all = all_ranks(z).transpose(0, 1)                                # (V, ranks * B, D)
        with torch.autocast(z.device.type, enabled=False):
            scores = z_all @ self.frozen_at_first(self.prototypes).T        # (V, ranks * B, K)  Eq. 1
            codes = [self.codes(scores[view].detach(), self.queue[view]) for view in range(2)]      # 2 x (ranks * B, K)
            codes = torch.stack(codes)
        loss = swapped_loss(scores, codes, self.temperature)                # Eq. 3
        return {"loss": loss, "chance": math.log(len(self.prototypes)), "large": z_all[:2].detach(),
                "embedding": z[:, 0].detach()}

    def frozen_at_first(self, prototypes):
        """The same values, with a gradient of zero in the first steps: zero and not none, so that optimisers and
        processes carry on as usual. A hook on the parameter would do it too, but be lost in a copy of the method."""
        still = prototypes.detach()
        return still + (self.steps >= self.freeze) * (prototypes - still)   # (K, D)

    @torch.no_grad()
    def codes(self, scores, queue):
        """Codes of one large crop, scores (B, K), shared out over the batch and, once it is full, the queue (Q, D)."""
        codes = sinkhorn(scores, self.epsilon, self.iterations)             # (B, K)  Eq. 2
        if not self.queue_size:
            return codes
        together = torch.cat([scores, queue @ self.prototypes.T])           # (B + Q, K)
        together = sinkhorn(together, self.epsilon, self.iterations)[:len(scores)]                  # (B, K)
        return torch.where(self.queued >= self.queue_size, together, codes)

    @torch.no_grad()
    def after_step(self, outs, progress):
        # Eq. 4; `first` undoes weight decay, which moves the prototypes even where their gradient is zero
        moved = F.normalize(self.prototypes, dim=1)                         # (K, D)
        self.prototypes.copy_(torch.where(self.steps < self.freeze, self.first, moved))
        self.steps += 1
        if self.queue_size:
            rows = torch.cat([out["large"] for out in outs], dim=1)         # (2, rows, D), alike on all processes
            place = torch.arange(rows.shape[1], device=rows.device)[-self.queue_size:]              # no place twice
            self.queue[:, (self.queued + place) % self.queue_size] = rows[:, place]
            self.queued += rows.shape[1]


@torch.no_grad()
def sinkhorn(scores, epsilon, iterations):
    """Eq. 2: scores (B, K) -> codes (B, K) whose rows sum to 1 and whose columns sum to nearly B / K. No gradient."""
    codes = at_least_float32(scores)[0] / epsilon                           # (B, K) logarithms up to the end
    for _ in range(iterations):
        codes = codes - codes.logsumexp(0, keepdim=True)
        codes = codes - codes.logsumexp(1, keepdim=True)
    return codes.exp()


def swapped_loss(scores, codes, temperature):
    """Eq. 3: scores (V, B, K) of all crops, the two large ones first; codes (2, B, K), taken as constants."""
    scores, codes = at_least_float32(scores, codes)
    guesses = (scores / temperature).log_softmax(2)                         # (V, B, K)
    pairs = [(code, crop) for code in range(2) for crop in range(len(scores)) if crop != code]
    return torch.stack([-(codes[code] * guesses[crop]).sum(1).mean() for code, crop in pairs]).mean()


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
