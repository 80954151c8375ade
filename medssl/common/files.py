"""Writing files whole or not at all, reading tensors without running anything, and a run's log."""

import itertools
import json
import math
import os
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .errors import UserError


@contextmanager
def whole(path):
    """Yields a temporary path beside `path` and renames it at the end: a reader sees the old file or the new one, never
    half of one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder):
    """Takes away what a killed process left half-written in this folder."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


def free_folder(out, stem, holds, hint="choose another"):
    """`out`, or the first of the names stem, stem-2, ... that is not taken. Refused where the file `holds` is there
    already, and where nothing can be written. Nothing is made yet: see `begun`."""
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    out = Path(out) if out else next(path for path in map(Path, names) if not path.exists())
    if (out / holds).exists():
        raise UserError(f"--out {out}: holds {holds} already; {hint}")
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    return out


@contextmanager
def begun(folder, holds):
    """The folder is there. Where the work inside fails before the file `holds` is in it, what it wrote there is taken
    away again: a start that failed leaves nothing."""
    folder = Path(folder)
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.iterdir())
    try:
        yield
    except BaseException:
        if not (folder / holds).exists():
            for path in set(folder.iterdir()) - before:
                path.unlink()
            if new:
                folder.rmdir()
        raise


def write_json(path, content):
    with whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def save_torch(path, content):
    with whole(path) as temporary:
        torch.save(content, temporary)


def load_torch(path):
    """Tensors and plain containers only. A pickle can run any command when it is opened, so it is refused."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if zipfile.is_zipfile(path):                                        # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("wrong checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                              # of damaged bytes it may raise anything
        raise UserError(f"{path}: refused, it is damaged or holds more than tensors and plain values "
                        f"({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a state dict")
    return content


@dataclass
class Run:
    """What a run's folder says of itself: its images, and the network in its encoder.pt."""
    data: str
    label: str
    size: int
    channels: int | None                        # as --channels asked for it
    encoder: str
    stem: str
    deal: int | None


def read_run(folder):
    """The Run of a folder made by this version or the one before it, from its config.json."""
    config = read_config(folder)
    try:
        run = Run(**{name: config["arguments"][name] for name in ("data", "label")},
                  **{name: config["arguments"].get(name) for name in ("channels", "deal")}, size=config["data"]["size"],
                  encoder=config["encoder"]["name"], stem=config["encoder"]["stem"])
        check_kinds(run)
        return run
    except (KeyError, TypeError):
        path = Path(folder) / "config.json"
        raise UserError(f"{path}: damaged; leave it away and the weights are taken as bare ones") from None


def check_kinds(record):
    """Every field of a dataclass must hold what its annotation says; whole numbers do for others."""
    for each in fields(record):
        value, kind = getattr(record, each.name), each.type
        kind = kind | int if isinstance(0.5, kind) else kind
        if not isinstance(value, kind) or isinstance(value, bool) and not isinstance(True, each.type):
            raise TypeError(f"{each.name} is {value!r}")


def read_config(folder):
    try:
        return json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        raise UserError(f"{Path(folder) / 'config.json'}: missing or damaged") from None


class Log:
    """log.jsonl, a line per logging step, cut back to the checkpoint by a resumed run; path None writes nothing."""

    def __init__(self, path, start):
        self.path, self.step, self.time = path, start, time.perf_counter()
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.path.parent)
            kept = [record for record in read_log(self.path) if record["step"] <= start]
            with whole(self.path) as temporary:
                temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))

    def rate(self, step, batch):
        now = time.perf_counter()
        images, seconds = (step - self.step) * batch, now - self.time
        self.step, self.time = step, now
        return images / seconds

    def write(self, record):
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(rounded(record)) + "\n")


def rounded(record):
    """As it stands in the log: six places."""
    return {k: round(v, 6) if isinstance(v, float) and math.isfinite(v) else v for k, v in record.items()}


def read_log(path):
    """The records of a log.jsonl, as far as they are whole: a power cut may leave half a line, or zeros."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]
