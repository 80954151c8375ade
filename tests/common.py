"""Small networks and batches that the tests share."""

from pathlib import Path

import numpy as np
import torch

from medssl.common import encoders

TINY = encoders.BasicBlock, (1, 1, 1, 1), 8


def tiny_encoder(channels=1, stem="default", width=8, stages=4):
    """One block a stage: a real ResNet, only narrow and shallow."""
    return encoders.ResNet(encoders.BasicBlock, (1,) * stages, width, channels, stem)


def batch(count=8, channels=1, size=64, seed=0):
    """Smooth random pictures in [0, 1]: noise at an eighth of the size, enlarged."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, size // 8, size // 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


class Flip:
    """The smallest augmentation that keeps to the contract: flips and brightness of each image."""

    def __call__(self, images, geometry=False):
        flip = torch.rand(len(images), device=images.device) < 0.5
        views = torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)
        views = (views * torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(0.7, 1.1)).clamp(0, 1)
        if not geometry:
            return views
        theta = torch.eye(2, 3, device=images.device).repeat(len(images), 1, 1)                 # (B, 2, 3)
        theta[:, 0, 0] = torch.where(flip, -1.0, 1.0)
        return views, theta


def golden(name):
    """Inputs and results of trusted implementations: tests/golden/NAME.npz."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        return dict(file)
