"""Writing files whole or not at all, and reading tensors without running anything."""

import json
import os
import pickle
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch


@contextmanager
def whole(path):
    """Yields a temporary path beside `path` and renames it at the end: a reader sees the old file or the new one, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save_torch(path, content):
    with whole(path) as temporary:
        torch.save(content, temporary)


def load_torch(path):
    """Tensors and plain containers only. A pickle can run any command when it is opened, so nothing else is accepted."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: refused, it is damaged or holds more than tensors and plain values ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a state dict")
    return content
