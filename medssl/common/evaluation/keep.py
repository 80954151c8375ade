"""Finished fits on disk, by which an evaluation that was stopped goes on; and features for, and of, other programs."""

import json
from dataclasses import fields

import numpy as np
import torch

from .. import files
from ..errors import UserError

ARRAYS = "answers", "spectrum", "examples", "masks"
NO_MATTER = "seeds", "device", "out", "cache", "export", "features", "all_columns"      # to what a single fit is


# ---- fits

def open_folder(study):
    """Makes the folder; refuses one that holds fits of another evaluation."""
    folder, asked = study.out / "fits", study.out / "asked.json"
    folder.mkdir(parents=True, exist_ok=True)
    for part in folder.glob(".*.part"):                                     # of a process that was killed
        part.unlink()
    settings = {name: value for name, value in vars(study.args).items() if name not in NO_MATTER}
    now = json.loads(json.dumps({"settings": settings, "models": [model.name for model in study.models],
                                 "images": study.dataset.images.shape}))
    if asked.exists() and content(asked) != now:
        raise UserError(f"--out {study.out}: holds fits of another evaluation (other settings, images or models); "
                        "choose another folder")
    files.write_json(asked, now)


def was_stopped(folder):
    """Whether the results in this folder are those of an evaluation that Ctrl-C ended."""
    return content(folder / "results.json").get("stopped") is True


def content(path):
    """The dict in a JSON file; of a missing or damaged one an empty one."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def save_fit(record, path):
    facts = {f.name: getattr(record, f.name) for f in fields(record) if f.name not in (*ARRAYS, "scored")}
    arrays = {key: getattr(record, key) for key in ARRAYS if getattr(record, key) is not None}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, facts=json.dumps(facts, default=float), **arrays)


def load_fit(path):
    """The fields of a record but its scores."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            words = json.loads(str(archive["facts"])) | {key: archive[key] for key in ARRAYS if key in archive.files}
        return words | {"curve": words["curve"] and [tuple(point) for point in words["curve"]]}
    except Exception as error:                                              # of damaged bytes anything may be raised
        raise UserError(f"{path}: damaged ({type(error).__name__}); remove it, and this fit is done again") from None


# ---- features

def read_features(path, dataset, note):
    """Features (N, D) of another program in the order of the data set: the array `features` of an .npz file, one row
    per image. `files` says which image each row is, by its path below the set's folder; else row i is image i."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            features = np.asarray(archive["features"])
            names = np.asarray(archive["files"]).astype(str).tolist() if "files" in archive.files else None
    except Exception as error:                                              # of damaged bytes anything may be raised
        raise UserError(f"{path}: cannot be read ({error}); write one with np.savez(path, features=..., files=...)"
                        ) from None
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not np.isfinite(features).all():
        raise UserError(f"{path}: features must be a table (images, numbers) of finite numbers, not {features.dtype} "
                        f"{features.shape}")
    wanted = list(map(str, dataset.names or range(len(dataset)))) if names else list(range(len(dataset)))
    place = {name: row for row, name in enumerate(names or range(len(features)))}
    missing = [str(name) for name in wanted if name not in place]
    if missing or len(features) != len(names or wanted):
        raise UserError(f"{path}: {len(features)} rows of features for {len(names or wanted)} images, "
                        f"{dataset.name} has {len(dataset)}; {len(missing)} of them have none, first "
                        f"{', '.join(missing[:3]) or 'none'}")
    if len(place) > len(wanted):
        note(f"{path.name}: {len(place) - len(wanted)} rows of features belong to no image of {dataset.name}")
    return torch.from_numpy(features[[place[name] for name in wanted]].astype(np.float32))


def write_features(path, features, dataset):
    """What `read_features` reads, with what else is known of the images."""
    arrays = {"features": features, "files": dataset.names and np.array(dataset.names),
              "patients": dataset.groups, "splits": dataset.splits, "labels": dataset.labels,
              "classes": None if dataset.labels is None else np.array(dataset.classes)}
    arrays = {key: value for key, value in arrays.items() if value is not None}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    return f"{path}: {', '.join(f'{key} {value.shape}' for key, value in arrays.items())}"
