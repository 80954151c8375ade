"""Autoencoder: squeeze the image through the encoder and let a decoder paint it again.

Hinton and Salakhutdinov, "Reducing the Dimensionality of Data with Neural Networks", Science 2006; the settings are
those of Zhang et al. 2023.

The idea. The oldest pretext task. What comes out of the bottleneck has to hold all that the decoder needs, so the
encoder must find what images of this kind have in common. Nothing forces it to understand, though: it may just as well
copy, and with skip connections it does, since the finest map passes the bottleneck by. The task is here as the baseline
of the restoring methods; `skips=False` of the decoder is its sensible form.

The algorithm.
  y = sigmoid(c + d(f(x)))               encoder f, all its maps; decoder d; sigmoid(c) = the mean of the images    (1)
  loss = mean over pixels of (y - x)^2                                                                              (2)
"chance" is the loss of painting each image evenly, in the mean of each of its channels. Copying scores 0.

Shapes. images (B, C, H, W) -> flipped images x (B, C, h, w) -> maps (B, widths[i], h / strides[i], w / strides[i]) ->
picture y (B, C, h, w) -> one number. A decoder's output that is larger than the image (h no multiple of the stride) is
cut to its size.

Differences. Study: the work that RECIPE follows.
- Start. Study: the first picture is gray, about a half. Here: about the mean of the images. From a half, dark images
  take hundreds of steps to get as dark as they are.
- Networks. Study: a plain U-Net with max pooling, with or without skip connections. Here: encoder and decoder are
  handed in.
- Flips. Study in 3D: up to three draws of an axis, each with probability 0.4. Its 2D code: one flip, with 0.4. Here:
  left-right and up-down, each with 0.2.
- Schedule. Study: half the rate every 40 epochs by its code, when the loss stands still by its supplement. Here: a
  cosine.
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

SMALL = {}                       # as in RECIPE: error .008 after 300 steps on phantoms, an even one .053 (presets.md)


class Autoencoder(nn.Module):
    """Paint the image again. mean: of the images, a number for each channel, where the pictures start."""

    def __init__(self, encoder, augment, decoder, mean):
        super().__init__()
        self.encoder, self.augment, self.decoder = encoder, augment, decoder
        self.register_buffer("level", level_of(mean))                       # c (C, 1, 1)

    @torch.no_grad()
    def views(self, images):
        return (self.augment(images),)                                      # (B, C, h, w)

    def forward(self, x):
        restored = picture(self.decoder(self.encoder.features(x)), self.level, x)           # (B, C, h, w)  Eq. 1
        return {"loss": F.mse_loss(restored, x), "chance": grey_error(x), "restored": restored.detach()}    # Eq. 2

    def after_step(self, outs, progress):
        pass                                                                # nothing is remembered between steps


def level_of(mean):
    """What a picture filled with `mean`, a number for each channel, is before the sigmoid: (C, 1, 1)."""
    return torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1).clamp(0.01, 0.99).logit()


def picture(raw, level, image):
    """A decoder's raw output as a picture in [0, 1], cut to the size of `image` (B, C, H, W)."""
    raw, = at_least_float32(raw[:, :, :image.shape[2], :image.shape[3]])
    return (raw + level).sigmoid()                                          # (B, C, H, W)


def grey_error(images):
    """The mean squared error of painting each channel of each image evenly, in its mean."""
    return images.var((2, 3), correction=0).mean()


def at_least_float32(*tensors):
    """Half-precision tensors raised to float32; float64 stays, so that tests can be exact."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]
