"""The decoder half of a U-Net: from an encoder's maps back to the size of the image.

Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", MICCAI 2015, with ResNet maps as
the left half. Each stage enlarges by two (nearest), puts the encoder's map of that size beside it (the skip connection)
and runs two 3x3 convolutions. With skips=False only the coarsest map is used, so that everything has to pass the
bottleneck. The last stages, which have no skip, halve the width, but leave at least two maps for each channel of the
answer: from 8 maps for 7 classes a small class was often never told apart.

- Skips. U-Nets on ResNets in other libraries also join the stem's map, of half the image's side. Here the first skip is
  the encoder's finest map, of a quarter: what is a few pixels wide is lost. The stem `nopool` has finer maps.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Decoder(nn.Module):
    """decoder(maps) -> (B, channels, H, W), raw. `widths` and `strides` are the encoder's, fine to coarse; H and W are
    the finest map's times its stride. With zero_start the first answer is 0 everywhere, whatever the maps: a method
    that adds the mean of the images begins with an even picture of it, and not with a random one. The encoder then has
    no gradient in the very first step."""

    def __init__(self, widths, strides, channels, skips=True, zero_start=False):
        super().__init__()
        self.skips = skips
        steps, below = [], widths[-1]
        for width in reversed(widths[:-1]):
            steps.append(Stage(below, width if skips else 0, width))
            below = width
        self.stages = nn.ModuleList(steps)
        self.last = nn.ModuleList()                                         # from the finest map's size to the image's
        for _ in range(strides[0].bit_length() - 1):
            width = max(8, 2 * channels, below // 2)
            self.last.append(Stage(below, 0, width))
            below = width
        self.out = nn.Conv2d(below, channels, 1)
        if zero_start:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, maps):
        x = maps[-1]                                                        # (B, widths[-1], H / strides[-1], ...)
        for stage, skip in zip(self.stages, reversed(maps[:-1]), strict=True):
            x = stage(x, skip.shape[2:], skip if self.skips else None)      # (B, widths[i], H / strides[i], ...)
        for stage in self.last:
            x = stage(x, (2 * x.shape[2], 2 * x.shape[3]))
        return self.out(x)                                                  # (B, channels, H, W)


class Stage(nn.Module):
    """Enlarge, join, convolve twice."""

    def __init__(self, below, skip, width):
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(below + skip, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))

    def forward(self, x, size, skip=None):
        x = F.interpolate(x, size=size, mode="nearest")
        return self.convs(x if skip is None else torch.cat([x, skip], 1))
