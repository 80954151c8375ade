"""MoCo v2: contrast with a long queue of past embeddings, made by a slow copy of the network.

He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020; Chen et al., "Improved
Baselines with Momentum Contrastive Learning", arXiv 2020.

The idea. Contrast needs many negatives, and SimCLR needs a large batch to have them. MoCo remembers the embeddings of
past batches in a queue. For old and new ones to be comparable, they are made by a key network that follows the trained
one slowly: an average over about 1 / (1 - momentum) steps.

The algorithm.
  q = normalised g(f(x1)),   k = normalised g'(f'(x2))     encoder f, projector g; f', g' their slow copies         (1)
  loss = mean of -log [ exp(q.k / T) / (exp(q.k / T) + sum over queue rows n of exp(q.n / T)) ],   T: temperature   (2)
  f' <- m f' + (1 - m) f,   likewise g'                    m: momentum; after the optimiser's step, parameters only (3)
  the keys replace the oldest rows of the queue            after the loss, so that no q meets its own k there       (4)
  keys are encoded in shuffled order in several chunks     "split BatchNorm": each chunk has its own statistics     (5)
(5) is needed because BatchNorm leaves a fingerprint of the batch in each of its embeddings: q and k, made of the same
batch of images, would share it, the rows of the queue would not, and the network could match fingerprints instead of
anatomy. (3) and (4) wait for the end of the step, so that the slow copies take in the updated weights, the backward
pass finds the queue as the loss saw it, and all micro-batches of a step meet the same queue. A network that knows
nothing scores ln(K + 1), K the length of the queue. The first steps score far less, because the queue starts with noise
that is easy to tell from keys; the loss *rises* for K / batch steps while keys replace it. K / batch is also the age of
the oldest key in steps. Two rules of thumb: keep it below 1 / (1 - m), and K below the number N of images, since each
image meets about K / N of its own old keys as negatives.

Shapes. images (B, C, H, W) -> two views (B, C, h, w), an order (B,) -> unit q, k (B, D) -> one number.

Differences. Study: the work that RECIPE follows.
- Split BatchNorm, Eq. 5. Released code: keys are shuffled across processes, and one process is refused. Study: one GPU
  without it. Here: each process splits its own batch of keys, and its queries share one set of statistics.
- Head. Study: the published command leaves out its hidden layer, which its notes on loading imply. Here: it is in.
- Slow copy. Released code: updated at the start of the next forward. Here: at the end of the step.
- Queue. Released code: the batch has to divide K. Here: it wraps around.
- Patients. Everywhere: other slices of an image's patient are negatives like all others.
- Decay. Released code and study: of biases and norms, too. Here: not, unless with `--options decay_all=True`.

Settings of the works that use it, as words of train.py:
  Wolf et al. 2023, small CT sets (RECIPE)
    --set queue_size=65536 momentum=0.999 temperature=0.07 dim=128 --optimizer sgd --lr 0.03 --weight-decay 1e-4
    --batch 128 --epochs 800 --views slices
  the same as it was run there, on one GPU and with decay of all parameters
    --set bn_chunks=1 --options decay_all=True
  MoCo v2, on ImageNet; 200 epochs or 800
    --set queue_size=65536 momentum=0.999 temperature=0.2 dim=128 --optimizer sgd --lr 0.03 --weight-decay 1e-4
    --batch 256 --epochs 200 --views contrastive
  MoCo's demo on CIFAR-10
    --set queue_size=4096 momentum=0.99 temperature=0.1 --optimizer sgd --lr 0.03 --weight-decay 5e-4 --batch 512
    --encoder resnet18 --stem small
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Wolf et al. 2023, the released code and its commands
    "optimizer": "sgd",          # momentum 0.9
    "lr": 0.03,                  # per 256: 0.015 at batch 128
    "weight_decay": 1e-4,
    "batch": 128,
    "epochs": 800,
    "warmup": 0,                 # cosine without warm-up
    "views": "slices",           # any rotation, crops, brightness and contrast, blur, flips, noise
    "size": 224,
}

SMALL = {
    "steps": 2000,               # after 800: .481 ± .138
    "views": "contrastive",
    "queue_size": 128,           # 512 rows on 1,180 images: two in five meet an old key of their own
    "momentum": 0.99,            # with 0.9 and temperature 0.1: .582 ± .135
    "temperature": 0.2,          # a guess: on the one seed where it was varied, with 0.1, nothing changed
    "bn_chunks": 1,              # likewise, with up to 8
}


class MoCo(nn.Module):
    """Contrast of a view with the slow network's view of the same image, against a queue of other images."""

    def __init__(self, encoder, augment, dim=128, queue_size=65536, temperature=0.07, momentum=0.999, bn_chunks=8):
        super().__init__()
        self.encoder, self.augment = encoder, augment
        self.temperature, self.momentum, self.bn_chunks = temperature, momentum, bn_chunks
        self.projector = mlp(encoder.dim, encoder.dim, dim, norm=False)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))  # (K, D)
        self.register_buffer("pointer", torch.tensor(0))                                 # the oldest row

    @torch.no_grad()
    def views(self, images):
        order = torch.randperm(len(images), device=images.device)           # (B,)  in which keys are encoded
        return self.augment(images), self.augment(images), order

    def forward(self, x1, x2, order):
        q = unit(self.projector(self.encoder(x1)))                          # (B, D)  Eq. 1
        k = self.encode_keys(x2, order)                                     # (B, D)
        loss = info_nce(q, k, self.queue, self.temperature)                 # Eq. 2
        own, others = similarities(q.detach(), k, self.queue).split([1, len(self.queue)], 1)        # (B, 1), (B, K)
        return {"loss": loss, "chance": math.log(1 + len(self.queue)), "keys": k, "embedding": q.detach(),
                "accuracy": (own > others).all(1).float().mean()}

    @torch.no_grad()
    def encode_keys(self, x, order):
        """Eq. 5: unit embeddings by the slow network, each chunk of the shuffled images with statistics of its own."""
        keys = [unit(self.key_projector(self.key_encoder(x[rows]))) for rows in split_order(order, self.bn_chunks)]
        return torch.cat(keys)[order.argsort()]                             # (B, D)  in the order of the images again

    @torch.no_grad()
    def after_step(self, outs, progress):
        ema_update(self.key_encoder, self.encoder, self.momentum)           # Eq. 3
        ema_update(self.key_projector, self.projector, self.momentum)
        for out in outs:
            keys = all_ranks(out["keys"])[-len(self.queue):]                # (ranks * B, D), or as many as it holds
            rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys.to(self.queue.dtype)                    # Eq. 4
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


def info_nce(q, k, queue, temperature, skip=None):
    """Cross-entropy of finding each q's own key, column 0, among it and the queue. Rows q, k (B, D) and queue (K, D)
    are of length one already; queue rows in skip (B, K) are not counted."""
    logits = similarities(q, k, queue, skip) / temperature                  # (B, 1 + K)
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


def similarities(q, k, queue, skip=None):
    """Inner products of each q with its own key, then with every row of the queue; -inf where skipped."""
    q, k, queue = at_least_float32(q, k, queue)
    with torch.autocast(q.device.type, enabled=False):
        negatives = q @ queue.T                                             # (B, K)
    if skip is not None:
        negatives = negatives.masked_fill(skip, -math.inf)
    return torch.cat([(q * k).sum(1, keepdim=True), negatives], 1)          # (B, 1 + K)


def split_order(order, bn_chunks):
    """The shuffled row numbers in chunks of eight or more, each for BatchNorm statistics of its own. Below 16 rows it
    is one chunk, and nothing is protected."""
    return order.tensor_split(max(1, min(bn_chunks, len(order) // 8)))


def unit(x):
    """Rows of length one, in float32 at least."""
    return F.normalize(*at_least_float32(x), dim=-1)


def mlp(*widths, norm=True):
    """Linear layers of these widths, with (BatchNorm and) ReLU between them."""
    layers = []
    for fan_in, fan_out in zip(widths, widths[1:]):
        layers += [nn.Linear(fan_in, fan_out)] + [nn.BatchNorm1d(fan_out)] * norm + [nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-2 if norm else -1])                      # the last layer stays linear


@torch.no_grad()
def ema_update(slow, fast, momentum):
    """slow <- momentum slow + (1 - momentum) fast, parameters only: each network keeps its own BatchNorm statistics."""
    for old, new in zip(slow.parameters(), fast.parameters()):
        old.lerp_(new, 1 - momentum)


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
