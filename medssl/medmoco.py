"""Med-MoCo: MoCo v2 and two remedies for the collapse of its features on medical images, whitening and local regions.

Hassanpour, Srivastav, Mutter, Padoy, "Overcoming Dimensional Collapse in Self-supervised Contrastive Learning for
Medical Image Segmentation", ISBI 2024. We know it by its abstract and by code that its first author released ten months
later, and these disagree: this file is a reading of the work, not a copy. (The four other works that this package
follows are known by abstract, supplement and code.)

The idea. CT slices look alike. MoCo (see moco.py, whose parts are repeated here), the authors find, tells them apart by
a few directions of its feature space and leaves the others unused: dimensional collapse. Remedy one: whiten the pooled
feature before the projector, that is, make its entries uncorrelated and of variance one: none can repeat another.
Remedy two: let the network also tell places within one image apart, which takes more than to tell images apart.

The algorithm. f encoder, g and h projectors; f', g', h' their slow copies, which make the keys; T temperature.
  q = normalised g(W f(x1)),   k = normalised g'(W' f'(x2))     f: mean of the last map, centred; W, W': whitening   (1)
  W = (S + eps I)^(-1/2)                                        S: covariance of the features over the batch; "ZCA"  (2)
  global = mean of -log [ exp(q.k / T) / (exp(q.k / T) + sum over queue rows n of exp(q.n / T)) ]                    (3)
  u_i = normalised h(mean of the map over region i of x1);   v_i: with h' in x2, the same piece of anatomy           (4)
  local = mean of -log [ exp(u_i.v_i / T) / sum over regions j of the same image of exp(u_i.v_j / T) ]               (5)
  loss = global + local_weight * local                                                                               (6)
  f' <- m f' + (1 - m) f, likewise g', h';   keys enter the queue   after the optimiser's step; m: momentum          (7)
Keys are made in shuffled chunks of the batch, each with statistics and a whitening of its own, since both leave a
fingerprint of the batch in its embeddings (see moco.py). A network that knows nothing scores ln(K + 1) + local_weight *
ln(regions), K the length of the queue; a little less where some regions find no partner.

Shapes. images (B, C, H, W) -> two views (B, C, h, w), key order (B,), 9 sample points of each region in both views
(B, R, 9, 2), which regions are valid (B, R) -> unit q, k (B, D) and u, v (B, R, D) -> one number.

Differences.
- Whitening. Abstract: the final feature map, by its eigenvectors. Released code: IterNorm (W by five Newton steps) for
  the last BatchNorm of the last block, before the shortcut is added, so that what is pooled is not white; of 2048
  channels in one group it reaches directions with more than 4 % of the variance. Here: the pooled feature, in groups of
  channels, by the exact "zca" or by "iternorm"; nothing of it stays in the encoder.
- Local term. Released code: squares at the left edge of the input images, unmatched, in one softmax with one target: no
  gradient, it stays at ln 400. Here: (5); regions, T and local_weight are the code's.
- Training. Released code: from ImageNet weights, the rate rises slowly. Here: from random ones or `--init`, a cosine.
- MoCo. Here: as in moco.py, with 4 key chunks where that has 8, so that whitening groups can be wider.
- Without the remedies. Here: `decorrelation=None` takes out the first one, `local_weight=0` the second one.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # the released configuration
    "optimizer": "sgd",          # momentum 0.9
    "lr": 0.12,                  # per 256: 0.03 at batch 64, on one GPU (the configurations are for one or two)
    "weight_decay": 1e-6,
    "batch": 64,
    "epochs": 300,               # there with a rate that rises slowly, here with a cosine
    "warmup": 0,
    "views": "slices",           # as MoCo on CT; released: crops of 0.2 to 1, two random intensity or geometry changes
    "size": 336,
}

SMALL = {
    "views": "soft",             # validation patients of four sets, 500 steps, two deals each: RESULTS, "Does it harm?"
    "queue_size": 128,           # 512 rows on 1,180 images: two in five meet an old key of their own
    "momentum": 0.9,             # a guess
}

EPS = 1e-4                       # of Eq. 2: bounds how much a nearly constant feature is magnified, 100 times
POINTS = 3                       # a region is sampled at 3 x 3 points


class MedMoCo(nn.Module):
    """MoCo v2 on whitened features, with a contrast of places beside the contrast of images."""

    def __init__(self, encoder, augment, dim=128, queue_size=65536, temperature=0.2, momentum=0.999, bn_chunks=4,
                 decorrelation="zca", regions=20, local_weight=0.5, size=None):
        super().__init__()
        if decorrelation not in ("zca", "iternorm", None):
            raise ValueError(f"medmoco: decorrelation is {decorrelation!r}, choose zca, iternorm or None")
        self.encoder, self.augment, self.decorrelation = encoder, augment, decorrelation
        self.temperature, self.momentum, self.bn_chunks = temperature, momentum, bn_chunks
        self.regions, self.local_weight = regions, local_weight
        self.side = math.ceil(math.sqrt(3 * regions))                       # of a grid; many cells are in one view only
        fine = [i for i, stride in enumerate(encoder.strides) if size is None or size // stride >= self.side]
        self.stage = fine[-1] if fine else 0                                # the coarsest map as fine as the grid
        width = encoder.widths[self.stage]
        self.projector = mlp(encoder.dim, encoder.dim, dim, norm=False)
        self.local_projector = mlp(width, width, dim, norm=False)           # on every region alike
        self.slow = nn.ModuleList(copy.deepcopy(net).requires_grad_(False) for net in self.nets())
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))                 # (K, D)
        self.register_buffer("pointer", torch.tensor(0))                                                # the oldest row

    def nets(self):                                                         # f, g, h; f', g', h' are self.slow
        return self.encoder, self.projector, self.local_projector

    @torch.no_grad()
    def views(self, images):
        order = torch.randperm(len(images), device=images.device)           # (B,)  in which keys are encoded
        (x1, theta1), (x2, theta2) = self.augment(images, geometry=True), self.augment(images, geometry=True)
        return x1, x2, order, *matched_regions(theta1, theta2, self.side, self.regions)

    def forward(self, x1, x2, order, points1, points2, valid):
        chunks = split_order(order, self.bn_chunks)
        groups = fitting_groups(self.encoder.dim, len(chunks[-1]))
        q, u = self.embed(self.nets(), x1, points1, groups)                 # (B, D), (B, R, D)
        with torch.no_grad():                                               # statistics and whitening by chunk
            parts = [self.embed(self.slow, x2[rows], points2[rows], groups) for rows in chunks]
        k, v = (torch.cat(part)[order.argsort()] for part in zip(*parts))   # in the order of the images again
        over_images = info_nce(q, k, self.queue, self.temperature)          # Eq. 3
        over_places = region_nce(u, v, self.temperature, valid)             # Eq. 5
        own, others = similarities(q.detach(), k, self.queue).split([1, len(self.queue)], 1)        # (B, 1), (B, K)
        all_alike = region_nce(torch.zeros_like(u), v, 1, valid)            # ln(regions), where all are valid
        return {"loss": over_images + self.local_weight * over_places,      # Eq. 6
                "chance": math.log(1 + len(self.queue)) + self.local_weight * all_alike,
                "global": over_images, "local": over_places, "accuracy": (own > others).all(1).float().mean(),
                "keys": k, "embedding": q.detach()}

    def embed(self, nets, x, points, channel_groups):
        """Unit embeddings of images (B, D) and of their regions (B, R, D)."""
        encoder, projector, local_projector = nets
        maps = encoder.features(x)
        pooled = self.whiten(maps[-1].mean((2, 3)), channel_groups)         # (B, encoder.dim)
        places = pool_regions(maps[self.stage], points, encoder.strides[self.stage], x.shape[2:])
        return unit(projector(pooled)), unit(local_projector(places))       # Eqs. 1 and 4

    def whiten(self, x, channel_groups):
        if self.decorrelation == "zca":
            return zca(x, EPS, channel_groups)
        return iternorm(x, 5, EPS, channel_groups) if self.decorrelation == "iternorm" else x

    @torch.no_grad()
    def after_step(self, outs, progress):
        for slow, fast in zip(self.slow, self.nets()):
            ema_update(slow, fast, self.momentum)                           # Eq. 7
        for out in outs:
            keys = all_ranks(out["keys"])[-len(self.queue):]                # (ranks * B, D), or as many as it holds
            rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
            self.queue[rows] = keys.to(self.queue.dtype)
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


# ---- whitening

def zca(x, eps, channel_groups):
    """Eq. 2. Rows (N, C) whitened in groups of consecutive channels; of all whitenings this one moves x the least."""
    return whitened_by(lambda covariance: InverseRoot.apply(covariance, eps), x, channel_groups)


def iternorm(x, steps, eps, channel_groups):
    """The same by Newton steps towards the inverse root: the strong directions get there first."""
    def newton(covariance):
        root = eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = covariance + eps * eye
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]            # (g, 1, 1)
        for _ in range(steps):
            root = 1.5 * root - 0.5 * root @ root @ root @ (covariance / trace)         # (g, d, d)
        return root / trace.sqrt()
    return whitened_by(newton, x, channel_groups)


def whitened_by(inverse_root, x, channel_groups):
    x, = at_least_float32(x)
    with torch.autocast(x.device.type, enabled=False):
        x = (x - x.mean(0)).unflatten(1, (channel_groups, -1)).transpose(0, 1)          # (g, N, d)
        covariance = x.mT @ x / x.shape[1]                                              # (g, d, d)
        return (x @ inverse_root(covariance)).transpose(0, 1).flatten(1)                # (N, C)


class InverseRoot(torch.autograd.Function):
    """(S + eps I)^(-1/2) of symmetric matrices (..., d, d). Autograd through eigh divides by differences of
    eigenvalues, which fails where two are equal; in the closed form of this gradient the differences cancel."""

    @staticmethod
    def forward(ctx, covariance, eps):
        values, vectors = torch.linalg.eigh(covariance.nan_to_num())        # it refuses nan, and waits for a GPU
        root = (values.clamp(min=0) + eps).sqrt()
        ctx.save_for_backward(root, vectors)
        return vectors / root[..., None, :] @ vectors.mT

    @staticmethod
    def backward(ctx, gradient):
        root, vectors = ctx.saved_tensors
        a, b = root[..., :, None], root[..., None, :]                       # (..., d, 1), (..., 1, d)
        inner = vectors.mT @ gradient @ vectors
        return vectors @ (-inner / (a * b * (a + b))) @ vectors.mT, None     # (1 / a - 1 / b) / (a^2 - b^2), shortened


def fitting_groups(dim, rows):
    """The fewest groups of channels no wider than half the rows: the covariance of wider ones is mostly chance."""
    return next(groups for groups in range(1, dim + 1) if dim % groups == 0 and dim // groups <= max(1, rows // 2))


# ---- local regions

def matched_regions(theta1, theta2, side, regions):
    """Cells of a grid (side, side) over view 1, chosen at random among those that lie inside the image and in view 2.
    theta (B, 2, 3): view to image, crop, flip and rotation in one. 9 sample points of each cell in both views
    (B, R, 9, 2), -1 to 1 across a view; valid (B, R): whether view 2 shows it."""
    centres = (torch.arange(side * POINTS, device=theta1.device) + 0.5) * 2 / (side * POINTS) - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")                  # (side * 3, side * 3) each
    cells = torch.stack([x, y], 2).unflatten(0, (side, POINTS)).unflatten(2, (side, POINTS)).transpose(1, 2)
    in_view1 = cells.reshape(1, -1, 2).expand(len(theta1), -1, -1)          # (B, cells * 9, 2)
    in_image = in_view1 @ theta1[:, :, :2].mT + theta1[:, None, :, 2]       # inv_ex, unlike inv, waits for no GPU
    in_view2 = (in_image - theta2[:, None, :, 2]) @ torch.linalg.inv_ex(theta2[:, :, :2]).inverse.mT
    in_view1, in_image, in_view2 = (p.unflatten(1, (side ** 2, -1)) for p in (in_view1, in_image, in_view2))
    shown = ((in_image.abs() <= 1) & (in_view2.abs() <= 1)).all(3).all(2)   # (B, cells)
    chosen = (torch.rand(shown.shape, device=shown.device) + shown).topk(regions).indices               # (B, R)
    rows = torch.arange(len(theta1), device=theta1.device)[:, None]
    return in_view1[rows, chosen], in_view2[rows, chosen], shown[rows, chosen]


def pool_regions(maps, points, stride, pixels):
    """Mean of maps (B, C, h, w) over the points of each region (B, R, 9, 2), interpolated between cells -> (B, R, C).
    pixels: (H, W) of the view. Unlike grid_sample's, the gradient of a matrix product is reproducible on a GPU."""
    maps, = at_least_float32(maps)
    points = points.to(maps.dtype)
    with torch.autocast(maps.device.type, enabled=False):
        along_x = cell_weights(points[..., 0], maps.shape[3], pixels[1], stride)            # (B, R, 9, w)
        along_y = cell_weights(points[..., 1], maps.shape[2], pixels[0], stride)            # (B, R, 9, h)
        weights = along_y.mT @ along_x / points.shape[2]                    # (B, R, h, w)
        return weights.flatten(2) @ maps.flatten(2).mT                      # (B, R, C)


def cell_weights(position, cells, pixels, stride):
    """Shares of the two nearest of `cells` in a row at positions from -1 to 1 across the view: (...) -> (..., cells).
    With the padding of ResNets cell i looks at pixel i * stride, not at the middle of its square; half a stride would
    matter, since in a mirrored view it points the other way."""
    place = (((position + 1) * pixels / 2 - 0.5) / stride).clamp(0, cells - 1)
    return (1 - (place[..., None] - torch.arange(cells, device=position.device)).abs()).clamp(min=0)


def region_nce(u, v, temperature, valid=None):
    """Eq. 5. Unit u, v (N, R, D); region i of u belongs to region i of v, the others of its image are the negatives.
    Regions that are not valid (N, R) count neither way; the mean runs over those that are."""
    u, v = at_least_float32(u, v)
    with torch.autocast(u.device.type, enabled=False):
        similarity = u @ v.mT / temperature                                 # (N, R, R)
    valid = torch.ones_like(u[:, :, 0], dtype=torch.bool) if valid is None else valid
    own = torch.eye(u.shape[1], dtype=torch.bool, device=u.device)
    similarity = similarity.masked_fill(~valid[:, None] & ~own, -math.inf)  # its own stays, so that no row is empty
    log_share = similarity.log_softmax(2).diagonal(dim1=1, dim2=2)          # (N, R)
    return -(log_share * valid).sum() / valid.sum().clamp(min=1)


# ---- the same as in moco.py

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
