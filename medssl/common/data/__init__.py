"""A set of images, opened as one array.

    dataset = load("phantoms")          the built-in set
    dataset = load(path, size=96)       a folder, split.csv, .npz, .npy or prepared folder, see sources.py
"""

from . import phantoms
from .cache import load_rows
from .dataset import Dataset, split
from .layouts import find

__all__ = ["Dataset", "load", "split"]


def load(path, size=None, channels=None, label="label", cache=None, fit="pad", group_by=None):
    """The data set at `path`, or the built-in "phantoms", always the same patients. `label` names the column of
    split.csv; `group_by` is a regular expression whose first bracket (or whole match) in the relative path is the
    patient, or "parent" for the folder that a file lies in."""
    if str(path) == "phantoms":
        return phantoms.opened(size, channels)
    return load_rows(find(path, label, group_by), size, channels, cache, fit)[0]
