"""A set of images, opened as one array.

    dataset = load("phantoms")          the built-in set
    dataset = load(path, size=96)       a folder, split.csv, .npz or .npy: see sources.py
    source = find(path)                 the same before a pixel is decoded; shapes(source) looks at a few images
"""

from . import phantoms
from .dataset import LEARNT_FROM, Dataset, deal, split, unit
from .decode import open_source, shapes
from .sources import Source, find

__all__ = ["LEARNT_FROM", "Dataset", "deal", "find", "load", "shapes", "split", "unit"]


def load(path, size=None, channels=None, label="label", cache=None, group_by=None):
    """The data set at `path` (or of the Source that `find` made of it), or the built-in "phantoms", always the same
    patients. `label` names the column of split.csv; `group_by` is a regular expression whose first bracket (or whole
    match) in the relative path is the patient, or "parent" for the folder that a file lies in."""
    if isinstance(path, Source):
        return open_source(path, size, channels, cache)
    if str(path) == "phantoms":
        return phantoms.opened(size, channels)
    return open_source(find(path, label, group_by), size, channels, cache)
