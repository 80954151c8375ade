"""Four methods learn in seconds; each has a number to reach that it does not reach untrained.

`python tools/learning.py` has the others.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from medssl import METHODS
from medssl.common.data import phantoms
from tests.common import tiny_encoder
from tools import learning

CASES = {                          # method: (steps, rate, words, what is measured, sign, level)
    "rotation": (20, 0.01, [], "accuracy", ">", 0.7),
    "simclr": (40, 0.02, ["temperature=0.1"], "ranked", ">", 0.63),
    # ln 20 = 3.0 by chance; the loss itself rises at first
    "medmoco": (24, 0.03, ["queue_size=64", "momentum=0.9"], "local", "<", 2.8),
    "spark": (14, 0.03, ["width=32"], "textured", "<", 0.85),
}


def test_every_method_has_a_number_to_reach():
    for name in set(METHODS) - {"together"}:
        assert name in learning.LEVELS, f"tools/learning.py: LEVELS has no entry for {name}: {learning.WANTED}"


@functools.cache
def pictures():
    return phantoms.make(250, 32)


@pytest.mark.parametrize("name", CASES)
def test_learns(name):
    steps, rate, words, what, sign, level = CASES[name]
    def value(steps):
        torch.manual_seed(0)
        encoder = tiny_encoder(1, "nopool" if name == "spark" else "default")
        trained = learning.trained(name, steps, words, pictures(), 32, encoder=encoder, lr=rate)
        return learning.measure(what, *trained, pictures())

    untrained, trained = value(1), value(steps)
    print(name, untrained, trained)
    assert trained > level > untrained if sign == ">" else trained < level < untrained


def test_rotation_finds_nothing_in_noise():
    """Blurred noise has no right way up: what is learnt on phantoms is no trace that the turning leaves in pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (250, 32, 32), np.uint8)
    blurred = np.stack([np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(2))) for picture in noise])
    dataset = replace(pictures(), images=blurred[:, None])
    _, record = learning.trained("rotation", 40, [], dataset, 32, encoder=tiny_encoder(), lr=0.01)
    assert record["accuracy"] < 0.45
