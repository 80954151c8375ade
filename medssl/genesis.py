"""Models Genesis: distort the image in four ways and let the network restore it.

Zhou et al., "Models Genesis", Medical Image Analysis 2021 (first at MICCAI 2019).

The idea. An autoencoder may copy. Here copying is wrong: grey values are mapped by a random curve, pixels are shuffled
within small blocks, and boxes, or all but some boxes, are noise. To undo this, the network has to know which tissue has
which grey value, what its texture and borders look like, and what lies beside what.

The algorithm.
  target = flipped image                                   x starts as its copy; (2) to (4) change x alone         (1)
  with probability 0.5: pixels of x change places within random blocks (`local_shuffle`)                           (2)
  with probability 0.9: grey values of x go through a random Bezier curve (`bezier_map`)                           (3)
  with probability 0.9: x through `in_paint` (noise in boxes) or, in 0.8 of these, `out_paint` (noise around them) (4)
  y = sigmoid(c + d(f(x)))               encoder f, all its maps; decoder d; sigmoid(c) = the mean of the images   (5)
  loss = mean over pixels of (y - target)^2                                                                        (6)
"identity" is the loss of handing back the distorted image: a network that has learnt anything stays below it. "chance"
is the loss of painting all images of the batch alike and evenly, in the mean of each channel. To know an image's own
mean is more than nothing here, because the curve hides it.

Shapes. images (B, C, H, W) -> distorted and target (B, C, h, w) -> maps (B, widths[i], h / strides[i], w / strides[i])
-> picture y (B, C, h, w) -> one number. A decoder's output that is larger than the image is cut to its size.

Differences. Study: the work that RECIPE follows.
- Draws. Here: every image has its own curve, blocks and boxes, drawn for the whole batch at once. Curve and shuffle
  treat all channels of an image alike, noise is drawn for each.
- Shuffle. Released code, and study in 3D: 10,000 random blocks, one after the other; study's 2D code: 500, in the first
  channel only, which leave .26 to .28 of the pixels in place. Here: one cut into rectangles with sides drawn like the
  blocks', so that a value comes from as far away, but none is lost or doubled.
- Boxes. Here: they keep their distance to the border in proportion (3 pixels of 64).
- Schedule. Study: half the rate every 40 epochs by its code, when the loss stands still by its supplement. Here: a
  cosine.
- Start. Study: the first picture is gray, about a half. Here: about the mean of the images. From a half, dark images
  take hundreds of steps to get as dark as they are.
- Networks. Study: a plain U-Net with or without skip connections. Here: encoder and decoder are handed in.
"""

import torch
import torch.nn.functional as F
from torch import nn

RECIPE = {                       # Zhang et al. 2023, the released settings for 2D images
    "optimizer": "sgd",          # momentum 0.9
    "lr": 32.0,                  # per 256: 1.0 at batch 8; sigmoid and mean square make very small gradients
    "weight_decay": 0.0,
    "batch": 8,                  # 2D; 6 in 3D
    "epochs": 240,               # ours: the study stops early, with a patience of 50
    "warmup": 0,
    "views": "flips",
    "size": 512,
}

SMALL = {}                       # as in RECIPE: error .018 after 300 steps on phantoms, an even one .053 (presets.md)


class Genesis(nn.Module):
    """Undo distortions. mean: of the images, a number for each channel, where the pictures start. shuffle, intensity,
    paint: probabilities of the distortions; in_share: the share of in-painting in paint."""

    def __init__(self, encoder, augment, decoder, mean, shuffle=0.5, intensity=0.9, paint=0.9, in_share=0.2):
        super().__init__()
        self.encoder, self.augment, self.decoder = encoder, augment, decoder
        self.register_buffer("level", level_of(mean))                       # c (C, 1, 1)
        self.shuffle, self.intensity, self.paint, self.in_share = shuffle, intensity, paint, in_share

    @torch.no_grad()
    def views(self, images):
        target = self.augment(images)                                       # (B, C, h, w)  Eq. 1
        x = sometimes(self.shuffle, local_shuffle(target), target)          # Eq. 2
        x = sometimes(self.intensity, bezier_map(x), x)                     # Eq. 3
        painted = sometimes(self.in_share, in_paint(x), out_paint(x))
        return sometimes(self.paint, painted, x), target                    # Eq. 4

    def forward(self, distorted, target):
        raw = self.decoder(self.encoder.features(distorted))                # (B, C, H, W), H and W at least h and w
        restored = picture(raw, self.level, target)                         # (B, C, h, w)  Eq. 5
        return {"loss": F.mse_loss(restored, target), "chance": even_error(target),         # Eq. 6
                "identity": F.mse_loss(distorted, target), "restored": restored.detach()}

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def bezier_map(images):
    """Eq. 3. Grey values in [0, 1] through curves with two random control points; half of them rise, half fall."""
    controls = torch.rand(len(images), 2, 2, device=images.device, dtype=images.dtype)      # (B, 2 points, x and y)
    return curve_map(images, controls, torch.rand(len(images), device=images.device) < 0.5)


def curve_map(images, controls, falling):
    """Through the cubic Bezier curve from (0, 0) past the controls (B, 2, 2) to (1, 1). In the unit square both x
    and y rise along it; where `falling` (B,), y runs from 1 back to 0 and inverts the contrast."""
    t = torch.linspace(0, 1, 1000, device=images.device, dtype=images.dtype)
    basis = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t ** 2 * (1 - t), t ** 3], 1)          # (T, 4)
    ends = torch.zeros_like(controls[:, :1]), torch.ones_like(controls[:, :1])
    x, y = (basis @ torch.cat([ends[0], controls, ends[1]], 1)).unbind(2)   # (B, T) each
    x, y = x.contiguous(), torch.where(falling[:, None], y.flip(1), y)
    right = torch.searchsorted(x, t.repeat(len(x), 1)).clamp(1, len(t) - 1)
    x0, x1, y0, y1 = x.gather(1, right - 1), x.gather(1, right), y.gather(1, right - 1), y.gather(1, right)
    table = torch.lerp(y0, y1, ((t - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1))         # (B, T)  y at even x
    place = images.flatten(1) * (len(t) - 1)                                # (B, C H W)  where in the table
    left = place.long().clamp(0, len(t) - 2)
    return torch.lerp(table.gather(1, left), table.gather(1, left + 1), place - left).clamp(0, 1).view_as(images)


def local_shuffle(images):
    """Eq. 2. Pixels change places within their block; blocks have sides of 1 to a tenth of the image's."""
    rows, columns = random_bands(images, 2), random_bands(images, 3)        # (B, H), (B, W)
    block = rows[:, :, None] * (columns.amax() + 1) + columns[:, None]      # (B, H, W)
    return shuffle_blocks(images, block)


def random_bands(images, dim):
    """Cuts this side of each image into bands of random widths: (B, L), the number of the band at each position."""
    count, length, device = len(images), images.shape[dim], images.device
    widths = torch.randint(1, max(1, length // 10) + 1, (count, length), device=device)
    positions = torch.arange(length, device=device).repeat(count, 1)
    return torch.searchsorted(widths.cumsum(1), positions, right=True)      # (B, L)


def shuffle_blocks(images, block):
    """A random permutation of the pixels of each block. block (B, H, W): equal numbers, same block; whole numbers."""
    block = block.flatten(1)                                                # (B, H W)
    places = block.argsort(dim=1, stable=True)                              # the places of block 0, then block 1, ...
    drawn = (block * 2 ** 20 + torch.randint_like(block, 2 ** 20)).argsort(1)   # the same, each block in random order
    source = torch.empty_like(places).scatter(1, places, drawn)             # where each place takes its pixel from
    return images.flatten(2).gather(2, source[:, None].expand(-1, images.shape[1], -1)).view_as(images)


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


def sometimes(probability, changed, original):
    """Each image of (B, C, H, W) changed with this probability, else as it was."""
    chosen = torch.rand(len(original), 1, 1, 1, device=original.device) < probability
    return torch.where(chosen, changed, original)


def level_of(mean):
    """What a picture filled with `mean`, a number for each channel, is before the sigmoid: (C, 1, 1)."""
    return torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).clamp(0.01, 0.99).logit()


def picture(raw, level, image):
    """A decoder's raw output as a picture in [0, 1], cut to the size of `image` (B, C, H, W)."""
    raw, = at_least_float32(raw[:, :, :image.shape[2], :image.shape[3]])
    return (raw + level).sigmoid()                                          # (B, C, H, W)


def even_error(images):
    """The mean squared error of painting all images alike and evenly, each channel in its mean."""
    return images.var((0, 2, 3), correction=0).mean()


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
