"""Four methods learn in seconds; each has a number to reach that it does not reach untrained (`python tests/learning.py` has the others)."""

import pytest

from medssl.common import phantoms
from tests import learning
from tests.common import tiny_encoder

CASES = {                          # method: (steps, words, what is measured, sign, level)
    "rotation": (50, [], "accuracy", ">", 0.8),
    "simclr": (60, ["temperature=0.2"], "loss / chance", "<", 0.8),
    "medmoco": (60, ["queue_size=64", "momentum=0.9"], "accuracy", ">", 0.1),
    "spark": (60, ["width=32"], "textured", "<", 0.85),
}


@pytest.fixture(scope="module")
def images():
    return phantoms.make(300, 48)


@pytest.mark.parametrize("name", CASES)
def test_learns(name, images):
    steps, words, what, sign, level = CASES[name]
    encoder = tiny_encoder(1, "nopool" if name == "spark" else "default")
    untrained = learning.measure(what, *learning.trained(name, 1, words, images, 48, encoder=encoder), images)
    trained = learning.measure(what, *learning.trained(name, steps, words, images, 48, encoder=encoder), images)
    print(name, untrained, trained)
    if sign == ">":
        assert trained > level > untrained
    else:
        assert trained < level < untrained
