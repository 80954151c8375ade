"""A set of images, opened as one array.

    dataset = load("phantoms")          the built-in set
    dataset = load(path, size=96)       a folder, split.csv, .npz, .npy or prepared folder, see sources.py
    source = find(path)                 the same before a pixel is decoded; shapes(source) looks at a few images
"""

from . import phantoms
from .cache import load_rows
from .dataset import LEARNT_FROM, Dataset, deal, split
from .layouts import find, patient_hint, shapes
from .pixels import unit
from .sources import Source

__all__ = ["LEARNT_FROM", "Dataset", "deal", "find", "load", "patient_hint", "shapes", "split", "unit"]


def load(path, size=None, channels=None, label="label", cache=None, group_by=None, fit="pad"):
    """The data set at `path` (or the Source that `find` made of it), or the built-in "phantoms", always the same
    patients. `label` names the column of split.csv; `group_by` is a regular expression whose first bracket (or whole
    match) in the relative path is the patient, or "parent" for the folder that a file lies in."""
    if isinstance(path, Source):
        return load_rows(path, size, channels, cache, fit)[0]
    if str(path) == "phantoms":
        return phantoms.opened(size, channels)
    return load_rows(find(path, label, group_by), size, channels, cache, fit)[0]
