"""Finished fits on disk: an evaluation that was stopped goes on with what is there."""

import hashlib
import json
import zlib
from dataclasses import asdict, replace

import numpy as np

from .. import files
from ..errors import UserError
from .readouts import fingerprint
from .study import Cell, file_name
from .tasks import Record

ARRAYS = ("answers", "spectrum")
EXAMPLES = ("rows", "predictions", "dice")


def digest(study):
    """What has to be the same for a fit to be the same."""
    found, dataset = hashlib.sha256(), study.dataset
    settings = {key: value for key, value in asdict(study.settings).items() if key not in ("device", "seeds")}
    found.update(json.dumps([settings, dataset.images.shape], default=str).encode())
    for array in (dataset.labels, dataset.splits, study.groups):
        found.update(b"-" if array is None else np.ascontiguousarray(array).tobytes())
    for array in (dataset.images, dataset.masks):                           # many bytes: a quick sum, part by part
        parts = range(0, 0 if array is None else len(array), 1024)
        found.update(str([zlib.crc32(np.ascontiguousarray(array[i:i + 1024])) for i in parts]).encode())
    for model in study.models:
        weights = model.features.numpy().tobytes() if model.features is not None else b""
        found.update(f"{model.name} {model.network and fingerprint(model.network)}".encode() + weights)
    return found.hexdigest()


def open_folder(study):
    """Makes the folder; refuses one that holds fits of another evaluation."""
    folder, asked = study.out / "fits", study.out / "asked.json"
    folder.mkdir(parents=True, exist_ok=True)
    now = {"digest": digest(study)}
    if asked.exists() and content(asked) != now:
        raise UserError(f"--out {study.out}: holds fits of another evaluation (other settings, images or weights); "
                        "choose another folder")
    files.write_json(asked, now)


def was_stopped(folder):
    """Whether the results in this folder are those of an evaluation that Ctrl-C ended."""
    return content(folder / "results.json").get("stopped") is True


def content(path):
    """The dict in a JSON file; of a missing or damaged one an empty one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def path_of(study, cell, model, seed):
    parts = [model.name, *(part for part in cell if part is not None), f"seed{seed}"]
    return study.out / "fits" / f"{file_name('-'.join(map(str, parts)))}.npz"


def save(record, path):
    facts = {key: value for key, value in vars(record).items() if key not in (*ARRAYS, "examples", "scored", "cell")}
    arrays = {key: getattr(record, key) for key in ARRAYS if getattr(record, key) is not None}
    arrays |= {f"example_{key}": record.examples[key] for key in EXAMPLES} if record.examples else {}
    with files.whole(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, facts=json.dumps({**facts, "cell": record.cell}, default=float), **arrays)


def load(path):
    """The record, without its scores."""
    try:
        with np.load(path, allow_pickle=False) as found:
            record = Record(**json.loads(str(found["facts"])))
            arrays = {key: found[key] for key in ARRAYS if key in found.files}
            if "example_rows" in found.files:
                arrays["examples"] = {key: found[f"example_{key}"] for key in EXAMPLES}
    except Exception as error:                                              # of damaged bytes anything may be raised
        raise UserError(f"{path}: damaged ({type(error).__name__}); remove it, and this fit is done again") from None
    curve = record.curve and [tuple(point) for point in record.curve]
    return replace(record, cell=Cell(*record.cell), curve=curve, **arrays)
