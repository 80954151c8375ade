"""PCRL: contrast two views, mix them, and restore both and the mixture, turned as a control vector says.

Zhou et al., "Preservational Learning Improves Self-supervised Medical Image Models by Reconstructing Diverse Contexts",
ICCV 2021.

The idea. Contrast keeps what two views share and may drop the rest, such as fine texture. So the same features must
also restore the picture; and for there to be more than one picture to restore, a control vector tells the decoder by
which flips and quarter turns the result shall differ from the view. A mixture of both views' features has to restore
the mixture of both pictures.

The algorithm.
  a, b = two crops of the image; with probability 0.9 both get noise, in boxes (0.2 of these) or around them:
  x1, x2                                                                                                           (1)
  R: a flip left-right and up-down, each or not, then one of four quarter turns; c = its code, 2 + 4 bits;
  R, R', R'' and c, c', c'' for the three pictures of Eq. 7                                                        (2)
  F = maps of the encoder f(x1), F' = maps of its slow copy f'(x2), M = alpha F + (1 - alpha) F' at every level,
  alpha = max(u, 1 - u), u uniform in [0, 1]                                                                       (3)
  q, p = normalised g(pooled coarsest map of F, of M); k = normalised g'(the same of F'): projector g, slow copy g' (4)
  contrast = mean of -log [ exp(q.k / T) / (exp(q.k / T) + sum over queue rows n of exp(q.n / T)) ],
  contrast_mix: the same with p, as a constant, in place of k                                                      (5)
  restored = m + d(maps), after the coarsest map's channels were multiplied by sigmoid(e(c)):
  decoder d, small network e (`control`), mean m of the images                                                     (6)
  restoration, _key, _mix = mean squares of restored from F and c, F' and c', M and c''
  minus R(a), R'(b), R''(alpha a + (1 - alpha) b)                                                                  (7)
  loss = (contrast + contrast_mix) / 2 + (restoration + restoration_key + restoration_mix) / 3                     (8)
  f' <- momentum f' + (1 - momentum) f, likewise g'; k and p replace the queue's oldest rows    after the step     (9)
Keys are encoded in shuffled order, in chunks with BatchNorm statistics of their own, as in MoCo. "chance" is Eq. 8 for
a network that knows nothing: ln(K + 1), K the queue's length, and for each restoration the error of painting every
picture evenly, in its mean. "accuracy" is low: mixtures in the queue come from the trained networks, as q does, and lie
nearer to q than its own key.

Shapes. images (B, C, H, W) -> views x1, x2 and the three targets (B, C, h, h), codes (B, 3, 6), alpha (B,), order (B,)
-> maps (B, widths[i], h / strides[i], ...) -> unit q, k, p (B, D) and three pictures (B, C, h, h) -> one number.
"restored" is the first picture with R undone, so that it lies over x1.

Differences. Study: the work that RECIPE follows.
- Mixture. Study: the weights of features and of images are two draws, so that its target is not the mixture of what was
  mixed. Here: one alpha for both.
- Contrast. Study: noise-contrastive estimation (each key is judged to be the partner or noise). Here: MoCo's softmax.
- Queue. Study: it takes k before the second contrast, which so meets its own k among the negatives. Here: k and p enter
  together, after the step.
- Shuffled keys. Study: on its one GPU they have no effect. Here: chunks, so that they have one.
- Projector. Study: its supplement has a hidden layer of 512, its code one of 128. Here: 512; the other is `hidden=128`.
- Blur. Study: on the views alone, with probability 0.4. Here: a part of the augmentation, so targets have it too.
- Start. Study: the first picture is random, with a deviation of 0.8 about black. Here: the mean of the images, m, since
  the last layer of the decoder starts at nought (RECIPE).
- Networks. Here: encoder and decoder are handed in; only the coarsest map is multiplied, so with skip connections the
  finer ones reach the decoder unturned.
- Taken over from the study's code. R for each picture, a linear decoder, one draw for both views of whether and how
  they are painted, and a mixture that passes the trained projector, has no gradient and enters the queue.
"""

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "sgd",          # momentum 0.9
    "lr": 8e-3,                  # per 256: 1e-3 at batch 32
    "weight_decay": 1e-4,
    "batch": 32,
    "epochs": 240,
    "warmup": 0,                 # cosine without warm-up
    "decoder": {"zero_start": True},        # so that the first picture is the mean of the images
    "views": "ct",               # crops, flips, scale, rotation, blur; on its fundus photographs (the 2D set): "fundus"
    "size": 224,
}

SMALL = {
    "queue_size": 256,           # a guess: validation kNN was .498 with both and .482 with 1024 and 0.99, on one seed
    "momentum": 0.9,             # of phantoms, 300 steps; three seeds of one setting lie further apart
}


class PCRL(nn.Module):
    """Contrast and mixture of two views, and restoration under a control vector. mean: of the images, a number for each
    channel. paint: the probability of noise."""

    def __init__(self, encoder, augment, decoder, mean, hidden=512, dim=128, queue_size=16384, temperature=0.2,
                 momentum=0.999, bn_chunks=8, paint=0.9):
        super().__init__()
        self.encoder, self.augment, self.decoder = encoder, augment, decoder
        self.register_buffer("level", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))           # m (C, 1, 1)
        self.temperature, self.momentum, self.bn_chunks, self.paint = temperature, momentum, bn_chunks, paint
        self.projector = mlp(encoder.dim, hidden, dim, norm=False)
        self.control = mlp(6, 256, encoder.dim, norm=False)
        self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))                 # (K, D)
        self.register_buffer("pointer", torch.tensor(0))                                                # the oldest row

    @torch.no_grad()
    def views(self, images):
        a, b, count, device = self.augment(images), self.augment(images), len(images), images.device
        painted, inside = (torch.rand(count, 1, 1, 1, device=device) < share for share in (self.paint, 0.2))
        x1, x2 = (torch.where(painted, torch.where(inside, in_paint(x), out_paint(x)), x) for x in (a, b))  # Eq. 1
        flips, turns = torch.rand(count, 3, 2, device=device) < 0.5, torch.randint(4, (count, 3), device=device)
        codes = torch.cat([flips, F.one_hot(turns, 4)], 2).to(images.dtype)                     # (B, 3, 6)  Eq. 2
        alpha = torch.rand(count, device=device)
        alpha = torch.maximum(alpha, 1 - alpha)                             # (B,)  Eq. 3
        share = alpha.view(-1, 1, 1, 1)
        pictures = a, b, share * a + (1 - share) * b                        # 3 x (B, C, h, h)
        order = torch.randperm(count, device=device)                        # (B,)  in which keys are encoded
        return x1, x2, *(transform(x, code) for x, code in zip(pictures, codes.unbind(1))), codes, alpha, order

    def forward(self, x1, x2, *others):
        *targets, codes, alpha, order = others
        share = alpha.view(-1, 1, 1, 1)
        maps, key_maps = self.encoder.features(x1), self.encode_keys(x2, order)
        mixed_maps = [share * new + (1 - share) * old for new, old in zip(maps, key_maps)]      # M of Eq. 3
        q = unit(self.projector(maps[-1].mean((2, 3))))                     # (B, D)  Eq. 4
        with torch.no_grad():
            k = unit(self.key_projector(key_maps[-1].mean((2, 3))))         # (B, D)
            p = unit(self.projector(mixed_maps[-1].mean((2, 3))))           # (B, D)
        restored = [self.restore(levels, code)[:, :, :x1.shape[2], :x1.shape[3]]                # 3 x (B, C, h, h)
                    for levels, code in zip((maps, key_maps, mixed_maps), codes.unbind(1))]
        contrasts = [info_nce(q, key, self.queue, self.temperature) for key in (k, p)]          # Eq. 5
        errors = [F.mse_loss(picture, target) for picture, target in zip(restored, targets)]    # Eq. 7
        chance = math.log(1 + len(self.queue)) + sum(grey_error(target) for target in targets) / 3
        return {"loss": sum(contrasts) / 2 + sum(errors) / 3, "chance": chance,                 # Eq. 8
                "accuracy": own_key_first(q, k, self.queue), "contrast": contrasts[0], "contrast_mix": contrasts[1],
                "restoration": errors[0], "restoration_key": errors[1], "restoration_mix": errors[2],
                "keys": k, "mixed": p, "embedding": q.detach(),
                "restored": undo(restored[0].detach().clamp(0, 1), codes[:, 0])}

    def restore(self, maps, code):
        """Eq. 6: the picture that code (B, 6) asks for, at least as large as the views."""
        gate = self.control(code).sigmoid()[:, :, None, None]               # (B, widths[-1], 1, 1)
        raw, = at_least_float32(self.decoder([*maps[:-1], maps[-1] * gate]))
        return self.level + raw                                             # (B, C, H, W)

    @torch.no_grad()
    def encode_keys(self, x, order):
        """Maps of the slow network, each chunk of the shuffled images with its own BatchNorm statistics."""
        chunks = [self.key_encoder.features(x[rows]) for rows in split_order(order, self.bn_chunks)]
        return [torch.cat(maps)[order.argsort()] for maps in zip(*chunks)]  # in the order of the images again

    @torch.no_grad()
    def after_step(self, outs, progress):
        ema_update(self.key_encoder, self.encoder, self.momentum)           # Eq. 9
        ema_update(self.key_projector, self.projector, self.momentum)
        for out in outs:
            keys = torch.cat([all_ranks(out["keys"]), all_ranks(out["mixed"])])
            rows = queue_rows(self.pointer, len(keys), len(self.queue))
            self.queue[rows] = keys[-len(rows):].to(self.queue.dtype)
            self.pointer.copy_((self.pointer + len(keys)) % len(self.queue))


def transform(images, code):
    """Eq. 2: flipped left-right (bit 0), up-down (bit 1), then turned counter-clockwise (bits 2 to 5, one is 1)."""
    return rotate(flip(images, code), code[:, 2:].argmax(1))


def undo(images, code):
    """transform's inverse: turned back, then flipped."""
    return flip(rotate(images, -code[:, 2:].argmax(1)), code)


def flip(images, code):
    """Image i left-right where code[i, 0] is 1, and up-down where code[i, 1] is."""
    for bit, dim in ((0, 3), (1, 2)):
        images = torch.where(code[:, bit].view(-1, 1, 1, 1) > 0, images.flip(dim), images)
    return images


def rotate(images, turns):
    """Image i of (B, C, S, S) turned counter-clockwise by turns[i] * 90 degrees. rotate(rotate(x, t), -t) is x."""
    four = torch.stack([images.rot90(k, (2, 3)) for k in range(4)])         # (4, B, C, S, S)
    return four[turns % 4, torch.arange(len(images), device=images.device)]  # (B, C, S, S)


def in_paint(images):
    """Uniform noise in at most five boxes, with sides of 1/6 to 1/3 of the image's; one image in 20 has none."""
    return torch.where(boxes(images, 1 / 6, 1 / 3, sure=0), torch.rand_like(images), images)


def out_paint(images):
    """Uniform noise everywhere but in one to five boxes, with sides of 3/7 to 4/7 of the image's."""
    return torch.where(boxes(images, 3 / 7, 4 / 7, sure=1), images, torch.rand_like(images))


def boxes(images, low, high, sure):
    """The union of at most five random boxes, (B, 1, H, W) bool. Their sides are `low` to `high` of the image's, 3/64
    of which stays free at each border. The first `sure` are always there, each further one with probability 0.95 if
    the one before it is."""
    there = torch.rand(len(images), 5, 1, 1, device=images.device) < 0.95
    there[:, :sure] = True
    inside = there.cumprod(1).bool()                                        # (B, 5, 1, 1)
    for length, shape in ((images.shape[2], (-1, 1)), (images.shape[3], (1, -1))):
        draw, where = torch.rand(2, len(images), 5, 1, 1, device=images.device)
        least, most, border = int(low * length), int(high * length), round(3 / 64 * length)
        side = least + (draw * (most - least + 1)).floor()                  # (B, 5, 1, 1)
        start = border + (where * (length - 2 * border - side + 1)).floor()
        place = torch.arange(length, device=images.device).view(shape)
        inside = inside & (place >= start) & (place < start + side)         # (B, 5, H, W) after the second side
    return inside.any(1, keepdim=True)                                      # (B, 1, H, W)


def grey_error(images):
    """The mean squared error of painting each channel of each image evenly, in its mean."""
    return images.var((2, 3), correction=0).mean()


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
def own_key_first(q, k, queue):
    """How often the own key is the most similar one."""
    s = similarities(q, k, queue)                                           # (B, 1 + K)
    return (s[:, 0] > s[:, 1:].amax(1)).float().mean()


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
