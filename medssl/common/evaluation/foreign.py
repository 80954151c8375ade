"""Features that another program made, as a row of the tables: an .npz file with

    features (N, D)     one row per image, and
    files (N,)          the images' paths below the set's folder, or
    rows (N,)           their row numbers, or neither: row i is image i

Labels, patients and splits in it are not read: all models are scored on the same ones, those of the data set.
"""

import numpy as np
import torch

from .. import files
from ..data import readers
from ..errors import UserError


def read(path):
    """The arrays of the file that are of use; nothing in it is executed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with readers.naming(path), np.load(path, allow_pickle=False) as archive:
        found = {key: archive[key] for key in ("features", "files", "rows") if key in archive.files}
        listed = ", ".join(archive.files)
    if "features" not in found:
        raise UserError(f"{path}: holds no array named features, but {listed}; write one with "
                        "np.savez(path, features=..., files=...)")
    features = found["features"]
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not np.isfinite(features).all():
        raise UserError(f"{path}: features must be a table (images, numbers) of finite numbers, not {features.dtype} "
                        f"{features.shape}")
    for key in found.keys() - {"features"}:
        if found[key].shape != features.shape[:1] or found[key].dtype.kind not in {"rows": "iu", "files": "US"}[key]:
            raise UserError(f"{path}: {key} must name each of the {len(features)} rows of features, not "
                            f"{found[key].dtype} {found[key].shape}")
    return found


def line_up(found, dataset, path, note):
    """The features in the order of the data set, (N, D)."""
    features, count = found["features"], len(dataset)
    if "files" in found and "rows" not in found and dataset.names is None:
        raise UserError(f"{path}: names files, and {dataset.name} has no file names: give rows, their row numbers")
    if "files" in found and dataset.names is not None:
        place = {str(name): row for row, name in enumerate(found["files"])}
        wanted = [str(name) for name in dataset.names]
    elif "rows" in found:
        place, wanted = {int(number): row for row, number in enumerate(found["rows"])}, list(range(count))
    else:
        place, wanted = {row: row for row in range(len(features))}, list(range(count))
    missing = [name for name in wanted if name not in place]
    if missing or ("files" not in found and "rows" not in found and len(features) != count):
        first = ", ".join(map(str, missing[:3])) or "none"
        raise UserError(f"{path}: {len(features)} rows of features, {dataset.name} has {count} images; {len(missing)} "
                        f"of them have none, first {first}")
    if len(place) > count:
        note(f"{path.name}: {len(place) - count} rows of features belong to no image of {dataset.name}")
    return torch.from_numpy(np.ascontiguousarray(features[[place[name] for name in wanted]], dtype=np.float32))


def write(path, features, dataset):
    """What `read` reads, with what else is known of the images."""
    arrays = {"features": features, "rows": np.arange(len(dataset)), "files": dataset.names and np.array(dataset.names),
              "patients": dataset.groups, "splits": dataset.splits, "labels": dataset.labels}
    if dataset.labels is not None:
        arrays["classes"] = np.array(dataset.classes)
    arrays = {key: value for key, value in arrays.items() if value is not None}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    return f"{path}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}"
