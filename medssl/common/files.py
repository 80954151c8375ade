"""Writing files whole or not at all, reading tensors without running anything, and a run's log."""

import json
import math
import os
import pickle
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch

from .errors import UserError


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
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: refused, it is damaged or holds more than tensors and plain values ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a state dict")
    return content


class Log:
    """log.jsonl, one line per logging step, cut back to the checkpoint when a run is resumed; path None writes nothing."""

    def __init__(self, path, start):
        self.path, self.step, self.time = path, start, time.perf_counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            old = self.path.read_text().splitlines() if start and self.path.exists() else []
            kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= start]
            with whole(self.path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def rate(self, step, batch):
        now = time.perf_counter()
        images, seconds = (step - self.step) * batch, now - self.time
        self.step, self.time = step, now
        return images / seconds

    def write(self, record):
        if self.path:
            line = {k: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for k, v in record.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
