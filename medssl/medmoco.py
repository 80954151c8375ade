"""Med-MoCo: MoCo v2 and two remedies for the collapse of its features on medical images, whitening and local regions.

Hassanpour, Srivastav, Mutter, Padoy, "Overcoming Dimensional Collapse in Self-supervised Contrastive Learning for
Medical Image Segmentation", ISBI 2024.

The idea. CT slices look alike. MoCo (see moco.py, whose parts are repeated here), the authors find, tells them apart by
a few directions of its feature space and leaves the others unused: dimensional collapse. Remedy one: whiten the pooled
feature before the projector, that is, make its entries uncorrelated and of variance one, so that none can repeat
another. Remedy two: let the network also tell places within one image apart, which takes more than what distinguishes
whole images.

The algorithm. f encoder, g and h projectors; f', g', h' their slow copies, which make the keys; T temperature.
  q = normalised g(W f(x1)),   k = normalised g'(W' f'(x2))     f: mean of the last map, centred; W, W': whitening   (1)
  W = (S + eps I)^(-1/2)                                        S: covariance of the features over the batch; "ZCA"  (2)
  global = mean of -log [ exp(q.k / T) / (exp(q.k / T) + sum over queue rows n of exp(q.n / T)) ]                    (3)
  u_i = normalised h(mean of the map over region i of x1);   v_i: with h' in x2, the same piece of anatomy           (4)
  local = mean of -log [ exp(u_i.v_i / T) / sum over regions j of the same image of exp(u_i.v_j / T) ]               (5)
  loss = global + local_weight * local                                                                               (6)
  f' <- m f' + (1 - m) f, likewise g', h';   keys enter the queue   after the optimiser's step; m: momentum          (7)
Whitening needs more images than features, so it runs in groups of consecutive channels, no wider than half a key chunk:
keys are whitened in the chunks in which BatchNorm sees them, since whitening too leaves a fingerprint of the batch in
its embeddings ((5) in moco.py); queries over their whole batch, in the same groups. More chunks share less of it, but
whiten narrower groups (4 chunks of 16 images: groups of 8 channels; what is correlated between groups stays so).
Regions are cells of a grid over view 1, chosen at random among those that view 2 shows too; crop, flip and rotation are
one affine map, by which a region's sample points are carried into view 2. They are read from the coarsest map that has
as many cells as the grid (for 20 regions 8 x 8). A network that knows nothing scores ln(K + 1) + local_weight *
ln(regions), a little less where some regions find no partner; K: length of the queue. As in MoCo the loss rises while
the queue fills.

Shapes. images (B, C, H, W) -> two views (B, C, h, w), key order and patients (B,), 9 sample points of each region in
both views (B, R * 9, 2), which regions are valid (B, R) -> unit q, k (B, D) and u, v (B, R, D) -> one number.

Differences. The paper is known to us by its abstract and by the first author's later code, and these two disagree.
- Whitening. Abstract: the final feature map, by its eigenvectors. Released code: IterNorm (W approached by five Newton
  steps) in the place of the last BatchNorm of the last block, before the shortcut is added, so that what is pooled is
  not white; in one group of 2048 channels only directions with more than 4 % of the variance are reached. Here: the
  pooled feature, in groups, exactly (`decorrelation="zca"`) or by IterNorm ("iternorm"), by statistics of the batch
  alone; nothing of it stays in the encoder.
- Local term. Released code: without a gradient; squares of the input images, down the left edge of crops that do not
  match, all in one softmax with one target: it stays at ln 400. Here: (5), on matched regions of a feature map; their
  number, T and local_weight are the code's.
- Training. Released code: from ImageNet weights, at a rate that rises slowly. Here: from random ones, unless `--init`
  brings others, along a cosine.
- MoCo. Here: as in moco.py, with 4 key chunks where that has 8, so that whitening groups can be wider.
  `decorrelation=None` and `regions=0` take the remedies out; without both this is MoCo, at the temperature given here.
- Several processes. Here: keys enter everyone's queue; BatchNorm, whitening and regions stay each process's own.
- Accumulation of gradients (one optimiser step from several micro-batches). Here: it leaves the number of negatives as
  it is, but whitens each micro-batch by itself.

Measured: phantoms, tiny, 300 steps, 3 seeds: kNN .505 ± .051, linear .551 ± .070 (chance .25; RESULTS.md).
"""

import copy
import inspect
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
    "views": "contrastive",      # phantoms, 500 steps: validation kNN .548, with RECIPE's .469 (one seed each)
    "queue_size": 128,           # RESULTS, phantoms: 512 rows on 1,180 images, two in five meet an old key of their own
    "momentum": 0.9,             # with both, after 1,200 steps: kNN .664 ± .051
}

WHITENING_EPS = 1e-4             # bounds how much a nearly constant feature is magnified: 100 times


class MedMoCo(nn.Module):
    """MoCo v2 on whitened features, with a contrast of places beside the contrast of images."""

    def __init__(self, encoder, augment, dim=128, queue_size=65536, temperature=0.2, momentum=0.999, bn_chunks=4,
                 same_patient_negatives=True, decorrelation="zca", regions=20, local_weight=0.5, size=None):
        super().__init__()
        check(dim=(dim, 1, 10 ** 5), queue_size=(queue_size, 1, 10 ** 7), temperature=(temperature, 1e-3, 1e3),
              momentum=(momentum, 0.0, 1.0), bn_chunks=(bn_chunks, 1, 10 ** 6), regions=(regions, 0, 1000),
              local_weight=(local_weight, 0.0, 1e6))
        if decorrelation not in ("zca", "iternorm", None):
            raise ValueError(f"decorrelation={decorrelation}: choose zca, iternorm or None")
        if regions:
            needs_maps(encoder, "; or set regions=0")
        asked = inspect.signature(augment).parameters.values() if regions and augment else ()
        if asked and not any(word.name == "geometry" or word.kind is word.VAR_KEYWORD for word in asked):
            raise ValueError("the augmentation takes no geometry=True, so nobody knows where its views lie: let it "
                             "return views and theta (B, 2, 3), the map from view to image; or set regions=0")
        self.encoder, self.augment = encoder, augment
        self.temperature, self.momentum, self.bn_chunks = temperature, momentum, bn_chunks
        self.same_patient_negatives, self.decorrelation = same_patient_negatives, decorrelation
        self.regions, self.local_weight = regions, local_weight
        self.projector = mlp(encoder.dim, encoder.dim, dim, norm=False)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.local_projector = self.key_local_projector = None
        if regions:                                                         # on every region alike: a 1x1 convolution
            self.stage = region_stage(encoder.strides, size, regions)
            self.local_projector = mlp(encoder.widths[self.stage], encoder.widths[self.stage], dim, norm=False)
            self.key_local_projector = copy.deepcopy(self.local_projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))  # (K, D)
        self.register_buffer("queue_groups", torch.full((queue_size,), -1))              # (K,)  patients; -1: unknown
        self.register_buffer("pointer", torch.tensor(0))                                 # the oldest row

    @torch.no_grad()
    def views(self, images, groups=None):
        order = torch.randperm(len(images), device=images.device)           # (B,)  in which keys are encoded
        if groups is None:
            groups = torch.full_like(order, -1)                             # (B,)  no patient known
        if not self.regions:
            return self.augment(images), self.augment(images), order, groups
        (x1, theta1), (x2, theta2) = self.augment(images, geometry=True), self.augment(images, geometry=True)
        return x1, x2, order, groups, *matched_regions(theta1, theta2, self.regions)

    def forward(self, x1, x2, order, groups, points1=None, points2=None, valid=None):
        channel_groups = fitting_groups(self.encoder.dim, len(split_order(order, self.bn_chunks)[-1]))
        q, *u = self.embed(self.encoder, self.projector, self.local_projector, x1, points1, channel_groups)
        k, *v = self.embed_keys(x2, points2, order, channel_groups)         # (B, D), and (B, R, D) with regions
        skip = None if self.same_patient_negatives else same_patient(groups, self.queue_groups)     # (B, K)
        loss = info_nce(q, k, self.queue, self.temperature, skip)           # Eq. 3
        accuracy, chance = contrast_scores(q.detach(), k, self.queue, skip)
        outs = {"global": loss, "accuracy": accuracy, "keys": k, "groups": groups, "embedding": q.detach()}
        if self.regions:
            outs["local"] = region_nce(*u, *v, self.temperature, valid)     # Eq. 5
            loss = loss + self.local_weight * outs["local"]                 # Eq. 6
            chance = chance + self.local_weight * region_chance(valid)
        return {"loss": loss, "chance": chance, **outs}

    def embed(self, encoder, projector, local_projector, x, points, channel_groups):
        """Unit embeddings of images (B, D) and, if there are any, of their regions (B, R, D)."""
        if not self.regions:
            return [unit(projector(self.whiten(encoder(x), channel_groups)))]
        maps = encoder.features(x)
        whitened = self.whiten(maps[-1].mean((2, 3)), channel_groups)       # (B, encoder.dim)  Eq. 1
        places = pool_regions(maps[self.stage], points, self.regions, encoder.strides[self.stage], x.shape[2:])
        return [unit(projector(whitened)), unit(local_projector(places))]   # Eq. 1; (B, R, D), Eq. 4

    @torch.no_grad()
    def embed_keys(self, x, points, order, channel_groups):
        """The same by the slow network, each chunk of the shuffled images with statistics of its own."""
        nets = self.key_encoder, self.key_projector, self.key_local_projector
        parts = [self.embed(*nets, x[rows], points[rows] if self.regions else None, channel_groups)
                 for rows in split_order(order, self.bn_chunks)]
        return [torch.cat(part)[order.argsort()] for part in zip(*parts)]   # in the order of the images again

    def whiten(self, x, channel_groups):
        if self.decorrelation == "zca":
            return zca(x, WHITENING_EPS, channel_groups)
        if self.decorrelation == "iternorm":
            return iternorm(x, 5, WHITENING_EPS, channel_groups)
        return x

    @torch.no_grad()
    def after_step(self, outs, progress):
        ema_update(self.key_encoder, self.encoder, self.momentum)           # Eq. 7
        ema_update(self.key_projector, self.projector, self.momentum)
        if self.regions:
            ema_update(self.key_local_projector, self.local_projector, self.momentum)
        for out in outs:
            keys, groups = all_ranks(out["keys"]), all_ranks(out["groups"])
            rows = queue_rows(self.pointer, len(keys), len(self.queue))
            self.queue[rows] = keys[-len(rows):].to(self.queue.dtype)
            self.queue_groups[rows] = groups[-len(rows):]
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


# ---- decorrelation

class InverseRoot(torch.autograd.Function):
    """(S + eps I)^(-1/2) of symmetric matrices (..., d, d). Autograd through eigh divides by differences of
    eigenvalues, which fails where two are equal; in the closed form of this gradient the differences cancel."""

    @staticmethod
    def forward(ctx, covariance, eps):
        # eigh waits for the GPU, nothing else here does; it refuses nan, which still reaches the loss through x
        values, vectors = torch.linalg.eigh(covariance.nan_to_num())
        root = (values.clamp(min=0) + eps).sqrt()
        ctx.save_for_backward(root, vectors)
        return vectors / root[..., None, :] @ vectors.mT

    @staticmethod
    def backward(ctx, gradient):
        root, vectors = ctx.saved_tensors
        a, b = root[..., :, None], root[..., None, :]                       # (..., d, 1), (..., 1, d)
        inner = vectors.mT @ gradient @ vectors
        return vectors @ (-inner / (a * b * (a + b))) @ vectors.mT, None     # (1 / a - 1 / b) / (a^2 - b^2), shortened


def zca(x, eps, channel_groups):
    """Eq. 2. Rows (N, C) whitened in groups of consecutive channels; of all whitenings this one moves x the least."""
    return whitened_by(lambda covariance: InverseRoot.apply(covariance, eps), x, channel_groups)


def iternorm(x, steps, eps, channel_groups):
    """Rows (N, C), whitened by Newton steps towards the inverse root: the strong directions get there first."""
    def newton(covariance):
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        covariance = covariance + eps * eye
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]            # (g, 1, 1)
        root = eye
        for _ in range(steps):
            root = 1.5 * root - 0.5 * root @ root @ root @ (covariance / trace)
        return root / trace.sqrt()
    return whitened_by(newton, x, channel_groups)


def whitened_by(inverse_root, x, channel_groups):
    x, = at_least_float32(x)
    with torch.autocast(x.device.type, enabled=False):
        x = (x - x.mean(0)).unflatten(1, (channel_groups, -1)).transpose(0, 1)          # (g, N, d)
        covariance = x.mT @ x / x.shape[1]                                              # (g, d, d)
        return (x @ inverse_root(covariance)).transpose(0, 1).flatten(1)                # (N, C)


def fitting_groups(dim, rows):
    """The fewest groups of channels no wider than half the rows: the covariance of wider ones is mostly chance."""
    return next(groups for groups in range(1, dim + 1) if dim % groups == 0 and dim // groups <= max(1, rows // 2))


# ---- local regions

POINTS = 3                                                                  # a region is sampled at 3 x 3 points


def grid_side(regions):
    """Cells a side of the grid that regions are chosen from: three times as many as needed, since many fall outside."""
    return math.ceil(math.sqrt(3 * regions))


def region_stage(strides, size, regions):
    """Number of the coarsest map with at least as many cells as the grid; the last one where the size is unknown."""
    fit = [i for i, stride in enumerate(strides) if size is None or size // stride >= grid_side(regions)]
    return fit[-1] if fit else 0


def matched_regions(theta1, theta2, regions):
    """Cells of a grid over view 1, chosen at random among those that view 2 shows too and that lie inside the image.
    theta (B, 2, 3): view to image. Sample points in both views (B, R * 9, 2), -1 to 1 across a view; valid (B, R)."""
    side = grid_side(regions)
    centres = (torch.arange(side * POINTS, device=theta1.device) + 0.5) * 2 / (side * POINTS) - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")                  # (side * 3, side * 3) each
    # the points of one cell side by side: (side, side, 3, 3, 2), then (B, cells * 9, 2)
    in_view1 = torch.stack([x, y], 2).unflatten(0, (side, POINTS)).unflatten(2, (side, POINTS)).transpose(1, 2)
    in_view1 = in_view1.reshape(1, -1, 2).expand(len(theta1), -1, -1)
    in_image = in_view1 @ theta1[:, :, :2].mT + theta1[:, None, :, 2]       # inv_ex, unlike inv, waits for no GPU
    in_view2 = (in_image - theta2[:, None, :, 2]) @ torch.linalg.inv_ex(theta2[:, :, :2]).inverse.mT
    shown = ((in_image.abs() <= 1) & (in_view2.abs() <= 1)).unflatten(1, (side ** 2, -1)).all(3).all(2)     # (B, cells)
    chosen = (torch.rand(shown.shape, device=shown.device) + shown).topk(regions).indices                   # (B, R)
    rows = torch.arange(len(theta1), device=theta1.device)[:, None]
    points1, points2 = (p.unflatten(1, (side ** 2, -1))[rows, chosen].flatten(1, 2) for p in (in_view1, in_view2))
    return points1, points2, shown[rows, chosen]                            # 2 x (B, R * 9, 2), (B, R)


def pool_regions(maps, points, regions, stride=1, pixels=None):
    """Mean of maps (B, C, h, w) over the sample points of each region, interpolated between cells -> (B, R, C).
    As one matrix product this is faster than grid_sample, and on a GPU its gradient is reproducible. `pixels` (H, W) of
    the view and the maps' stride say where a cell looks; without them a cell is a pixel."""
    maps, = at_least_float32(maps)
    height, width = pixels or maps.shape[2:]
    points = points.unflatten(1, (regions, -1)).to(maps.dtype)              # (B, R, 9, 2)
    with torch.autocast(maps.device.type, enabled=False):
        along_x = cell_weights(points[..., 0], maps.shape[3], width, stride)                # (B, R, 9, w)
        along_y = cell_weights(points[..., 1], maps.shape[2], height, stride)               # (B, R, 9, h)
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


def region_chance(valid):
    """What a network that knows nothing scores: the mean over valid regions of ln(valid regions of the image)."""
    count = valid.sum(1).float()                                            # (N,)
    return (count * count.clamp(min=1).log()).sum() / count.sum().clamp(min=1)


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


@torch.no_grad()
def contrast_scores(q, k, queue, skip=None):
    """How often the own key is the most similar one; and the loss of a network that knows nothing."""
    s = similarities(q, k, queue, skip)                                     # (B, 1 + K)
    accuracy = (s[:, 0] > s[:, 1:].amax(1)).float().mean()
    return accuracy, s.isfinite().sum(1).log().mean()                       # ln(1 + negatives that count)


def same_patient(groups, queue_groups):
    """(B, K): does the queue's row come from the patient of the image? Never where the patient is unknown (-1)."""
    return (groups[:, None] == queue_groups) & (groups[:, None] >= 0)


def split_order(order, bn_chunks):
    """The shuffled row numbers in chunks of eight or more, each for BatchNorm statistics of its own. Below 16 rows it
    is one chunk, and nothing is protected."""
    return order.tensor_split(max(1, min(bn_chunks, len(order) // 8)))


def queue_rows(pointer, count, size):
    """Where the last `size` of `count` new keys go: from the pointer on, around the end."""
    return ((pointer + torch.arange(count, device=pointer.device)) % size)[-size:]


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


def check(**words):
    """word=(value, low, high): a ValueError in one line where a value is not from low to high, or not as whole."""
    for word, (value, low, high) in words.items():
        whole = isinstance(low, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or not low <= value <= high:
            raise ValueError(f"{word}={value}: has to be a {'whole ' * whole}number from {low} to {high}")


def needs_maps(encoder, or_else=""):
    """A ValueError in one line where the encoder does not say what its maps are."""
    missing = [f".{word}" for word in ("features", "widths", "strides") if not hasattr(encoder, word)]
    if missing:
        raise ValueError(f"the encoder has no {', '.join(missing)}, and this method looks at places: give the encoder "
                         ".features(x) -> maps (B, C, h, w), fine to coarse, .widths (C of each) and .strides (pixels "
                         f"between two cells of each){or_else}")


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
