"""SparK: hide most of the image and let a convolutional network, which never sees the hidden part, paint it in again.

Tian et al., "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", ICLR 2023.

The idea. To paint a missing piece of an image one has to know what belongs there. Plain zeros do not hide a piece from
a convolution, though: its window reaches in from the border, layer by layer, and BatchNorm counts the zeros as tissue.
So after every layer the hidden sites (places of a map) are set to zero again, and every statistic is taken over visible
sites only. That is what a sparse convolution computes, which skips hidden sites; here, as in the released code,
ordinary layers do it, and no time is saved. A cell, hidden or shown whole, covers one place of the coarsest map or a
block of them, so that one mask fits every finer scale exactly.

The algorithm.
  active: round((1 - mask_ratio) n) of the n cells of each image, drawn at random; the others are hidden          (1)
  S_i = map i of the encoder on the visible cells, exactly zero elsewhere                                         (2)
  D_i = projection_i(norm_i(S_i) at visible sites; at hidden ones token_i, a learned vector, the same everywhere);
      the coarsest projection is the identity where its widths match                                            (3)
  y_i = up_i(y_(i+1) + D_i),   y = head(y_0)               coarse to fine, from y = 0 up to the size of the image  (4)
  target = (x - mean) / sqrt(variance + eps)               of each cell on its own, over its pixels and channels  (5)
  loss = mean over the hidden cells of the mean of (y - target)^2                                                 (6)
"chance" is the loss of a network that paints zeros. "textured" is Eq. 6 over those cells whose variance exceeds eps.

Shapes. images (B, C, H, W), H and W multiples of the cell, which is the encoder's total stride or a multiple of it ->
the view, and active (B, 1, h, w) bool, True = visible -> maps (B, widths[i], H / strides[i], W / strides[i]) -> picture
(B, C, H, W) -> one number. Besides `strides` and `widths` the encoder needs `features(x)` -> maps, fine to coarse, and
has to be made of Conv2d, BatchNorm2d, pooling and activations that leave zero alone.

Differences.
- Mask. Released code: a global variable, and the encoder's layers are rebuilt. Here: layers look at a mask that is
  handed to them, and without one they are what they were; nothing is indexed, so shapes are static.
- eps. Released code: 1e-6 on standardised pixels; for images with a deviation of 0.19 that is 3.6e-8 on [0, 1], where
  `eps=1e-6` is 27 times as much. Here: 1e-4 on pixels in [0, 1], the variance of noise of 2.5 grey levels in 255.
  Background is then nearly free: with less than the rounding error of 8 bits its noise would weigh as much as anatomy.
- Channels. Released code: three. Here: any number.
- BatchNorm. Released code: shared between GPUs. Here: every process has its own statistics. Beside other methods they
  mix masked and whole images; fine-tuning estimates them anew.
- Dropped blocks. Released code: whole blocks at random, for ResNet-50 at a rate of 0.05. Here: none.
- Schedule. Released code: the rate starts at 0.005 and ends at 0.001 of the highest. Here: it starts and ends at 0.
- Checkpointing. Here: the mask is gone when forward returns, so activations cannot be recomputed in the backward pass.

Settings of the works that use it, as words of train.py:
  Wolf et al. 2023, small CT sets (RECIPE); ResNet-50, all else is the paper's
    --set mask_ratio=0.6 width=768 --batch 32 --epochs 1600 --warmup 40 --clip 5 --views mild
  the paper, on ImageNet; ResNet-50, optimiser as in RECIPE
    --set mask_ratio=0.6 width=768 eps=3.6e-8 --batch 4096 --epochs 1600 --warmup 40 --clip 5 --views mild
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Wolf et al. 2023: the paper's released settings at another batch size
    "optimizer": "lamb",
    "options": {"betas": (0.9, 0.95)},
    "lr": 2e-4,                  # per 256
    "weight_decay": 0.04,
    "weight_decay_end": 0.2,
    "clip": 5.0,
    "batch": 32,
    "epochs": 1600,
    "warmup": 40,                # epochs
    "views": "mild",             # crops of 0.67 to 1 of the area, and left-right flips
    "size": 224,
}

SMALL = {                        # guesses, on phantoms of 64 pixels
    "stem": "nopool",            # sixteen cells, where the default stem leaves four, two of them hidden
    "width": 64,                 # as good as 128 in the same minutes, on one seed (textured .418 and .459)
}


class SparK(nn.Module):
    """Masked image modelling for convolutional networks."""

    def __init__(self, encoder, augment, channels=1, size=None, mask_ratio=0.6, width=768, cell=None, eps=1e-4):
        super().__init__()
        strides = list(encoder.strides)
        self.encoder, self.augment, self.mask_ratio, self.eps = encoder, augment, mask_ratio, eps
        self.cell = cell or strides[-1]
        if size and (size % self.cell or self.visible((size // self.cell) ** 2) < 2):
            raise ValueError(f"size {size}: has to be a multiple of the cell, {self.cell} pixels, with at least two "
                             "visible cells; --stem nopool makes smaller cells")
        self.tokens, self.norms = nn.ParameterList(), nn.ModuleList()
        self.projections, self.ups = nn.ModuleList(), nn.ModuleList()
        for stride, finer, fan_in in reversed(list(zip(strides, [1] + strides, encoder.widths))):
            self.tokens.append(nn.Parameter(nn.init.trunc_normal_(torch.empty(fan_in), std=0.02, a=-0.02, b=0.02)))
            self.norms.append(nn.BatchNorm2d(fan_in))
            kernel = 1 if stride == strides[-1] else 3
            same = kernel == 1 and fan_in == width
            self.projections.append(nn.Identity() if same else nn.Conv2d(fan_in, width, kernel, padding=kernel // 2))
            doublings = (stride // finer).bit_length() - 1                  # from this map's size to the next one's
            self.ups.append(nn.Sequential(*[up_block(width >> i) for i in range(doublings)]))
            width >>= doublings
        self.head = nn.Conv2d(width, channels, 1)
        for layer in [*self.ups.modules(), self.head]:                      # projections keep torch's default start
            if isinstance(layer, nn.Conv2d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.ConvTranspose2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
        mean = torch.as_tensor(getattr(encoder, "mean", (0.0,)), dtype=torch.float32)
        self.register_buffer("fill", mean.view(1, -1, 1, 1), persistent=False)          # zero once it is standardised
        self.mask = Mask()
        make_sparse(encoder, self.mask)
        make_sparse(self.norms, self.mask)

    @torch.no_grad()
    def views(self, images):
        if any(isinstance(layer, nn.SyncBatchNorm) for layer in self.encoder.modules()):
            raise ValueError("SparK's BatchNorm cannot be shared between processes; leave out --sync-bn")
        x = self.augment(images)
        h, w = x.shape[2] // self.cell, x.shape[3] // self.cell
        rank = torch.rand(len(x), h * w, device=x.device).argsort(1).argsort(1)         # (B, n)
        return x, (rank < self.visible(h * w)).view(-1, 1, h, w)            # (B, 1, h, w)

    def visible(self, cells):
        """How many of an image's cells are shown: 20 of 49 at 224 pixels."""
        return round((1 - self.mask_ratio) * cells)                         # Eq. 1

    def forward(self, x, active):
        self.mask.active = active
        try:
            maps = self.encoder.features(torch.where(self.mask.at(x), x, self.fill))    # Eq. 2
            y = 0
            for f, token, norm, project, up in zip(maps[::-1], self.tokens, self.norms, self.projections, self.ups):
                dense = torch.where(self.mask.at(f), norm(f), token.to(f.dtype).view(1, -1, 1, 1))
                y = up(y + project(dense))                                  # Eqs. 3 and 4
        finally:
            self.mask.active = None
        prediction = self.head(y)                                           # (B, C, H, W)  y of Eqs. 4 and 6
        loss = partial(masked_patch_loss, cell=self.cell, eps=self.eps)
        with torch.no_grad():
            flat = F.pixel_unshuffle(x, self.cell).var(1, keepdim=True) <= self.eps     # (B, 1, h, w)
            textured = loss(prediction, x, active | flat)
            restored = restore(prediction, x, active, self.cell, self.eps)
        return {"loss": loss(prediction, x, active), "chance": loss(torch.zeros_like(x), x, active),
                "textured": textured, "restored": restored}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


class Mask:
    """Carries `active` (B, 1, h, w), True = visible, from SparK.forward to the layers; None at all other times."""

    def __init__(self):
        self.active = None

    def at(self, x):
        """The mask at the resolution of x (B, C, H, W)."""
        (h, w), (H, W) = self.active.shape[2:], x.shape[2:]
        return self.active.repeat_interleave(H // h, 2).repeat_interleave(W // w, 3)    # (B, 1, H, W)


def make_sparse(module, mask):
    """Make the layers of `module` blind to hidden sites whenever mask.active is set. Layers, names and weights stay."""
    for name, layer in module.named_modules():
        if type(layer) is nn.BatchNorm2d:
            layer.forward = partial(visible_batch_norm, layer, layer.forward, mask)
        elif isinstance(layer, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
            layer.register_forward_hook(partial(hide, mask))
        elif isinstance(layer, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)):
            raise ValueError(f"{name} is a {type(layer).__name__} and would see hidden pixels; SparK needs BatchNorm2d")


def hide(mask, layer, inputs, output):
    """Forward hook: zero at hidden sites, so that the next layer's window finds nothing there."""
    return None if mask.active is None else output * mask.at(output)


def visible_batch_norm(layer, plain, mask, x):
    """What BatchNorm1d computes on the rows of visible sites, zero elsewhere. `plain` is the layer's own forward."""
    if mask.active is None:
        return plain(x)
    visible, (y,) = mask.at(x), at_least_float32(x)
    if layer.training or layer.running_mean is None:
        count = visible.sum()
        mean = (y * visible).sum((0, 2, 3), keepdim=True) / count           # (1, C, 1, 1)
        centred = (y - mean) * visible                                      # (B, C, H, W)
        variance = centred.square().sum((0, 2, 3), keepdim=True) / count    # (1, C, 1, 1)
        if layer.training and layer.track_running_stats:
            with torch.no_grad():       # .data: autograd may hold these buffers for another forward of this step
                layer.num_batches_tracked.add_(1)
                rate = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
                unbiased = variance * count / (count - 1)
                layer.running_mean.data.add_(rate * (mean.flatten() - layer.running_mean))
                layer.running_var.data.add_(rate * (unbiased.flatten() - layer.running_var))
    else:
        centred = (y - layer.running_mean.view(1, -1, 1, 1)) * visible
        variance = layer.running_var.view(1, -1, 1, 1)
    scale = (variance + layer.eps).rsqrt()                                  # (1, C, 1, 1)
    if not layer.affine:
        return (centred * scale).to(x.dtype)
    scale, shift = scale * layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1) * visible
    return torch.addcmul(shift, centred, scale).to(x.dtype)                 # (B, C, H, W), shift + centred * scale


def up_block(width):
    """Twice the size, half the width."""
    return nn.Sequential(
        nn.ConvTranspose2d(width, width, 4, stride=2, padding=1),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True),
        nn.Conv2d(width, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2))


def masked_patch_loss(prediction, image, active, cell, eps, normalise_prediction=False):
    """Eqs. 5 and 6. prediction, image (B, C, H, W); active (B, 1, h, w) bool, True = visible, which does not count."""
    p, target = (F.pixel_unshuffle(x, cell) for x in at_least_float32(prediction, image))   # (B, C cell^2, h, w)
    target = normalise(target, eps)
    if normalise_prediction:
        p = normalise(p, eps)
    error = (p - target).square().mean(1, keepdim=True)                     # (B, 1, h, w)
    return (error * ~active).sum() / (~active).sum().clamp(min=1)


def normalise(cells, eps):
    """Each column of (B, N, h, w), the N values of one cell, to mean 0 and variance 1; flat ones go to 0."""
    variance, mean = torch.var_mean(cells, 1, keepdim=True)                 # (B, 1, h, w)
    return (cells - mean) / (variance + eps).sqrt()


def restore(prediction, image, active, cell, eps):
    """The picture: visible cells from the image, hidden ones painted, with the true mean and contrast of each cell."""
    p, x = (F.pixel_unshuffle(x, cell) for x in at_least_float32(prediction, image))        # (B, C cell^2, h, w)
    variance, mean = torch.var_mean(x, 1, keepdim=True)                     # (B, 1, h, w)
    painted = p * (variance + eps).sqrt() + mean
    return F.pixel_shuffle(torch.where(active, x, painted), cell).clamp(0, 1)               # (B, C, H, W)


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
