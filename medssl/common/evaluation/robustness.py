"""Test images as another scanner or another day might have made them: four changes at three strengths each."""

import math

import torch

from ..augment import gaussian_blur, resample

STRENGTHS = (1, 2, 3)


def darker(x, strength):
    """Grey values times 0.8, 0.6, 0.4."""
    return x * (1 - 0.2 * strength)


def noisier(x, strength):
    """Gaussian noise with a deviation of 0.03, 0.06, 0.12; always the same for an image's place in the batch."""
    generator = torch.Generator().manual_seed(strength)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    return (x + 0.015 * 2 ** strength * noise).clamp(0, 1)


def blurrier(x, strength):
    """Gaussian blur of 1, 2, 4 pixels of a picture of 128 pixels, and as much less of a smaller one."""
    sigma = 2.0 ** (strength - 1) * x.shape[3] / 128
    return gaussian_blur(x, torch.full((len(x),), sigma, device=x.device))


def turned(x, strength):
    """About the centre by 5, 10, 20 degrees; black outside."""
    angle = math.radians(5 * 2 ** (strength - 1))
    cos, sin = math.cos(angle), math.sin(angle)
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device).repeat(len(x), 1, 1)         # (B, 2, 3)
    return resample(x, theta, x.shape[3])


CHANGES = {change.__name__: change for change in (darker, noisier, blurrier, turned)}
VARIANTS = [(name, strength) for name in CHANGES for strength in STRENGTHS]
