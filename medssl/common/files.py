"""Writing files whole or not at all, reading tensors without running anything, and a run's log."""

import itertools
import json
import math
import os
import re
import shlex
import stat
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch

from .errors import Full, UserError


def check_target(path, flag=""):
    """A file may be written at `path`: nothing is there, or a regular file. A link leads to somewhere else, and a pipe
    or device is no file."""
    path = Path(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path}: {error}".strip()) from None
    if not stat.S_ISREG(mode):
        kind = "link" if stat.S_ISLNK(mode) else "folder" if stat.S_ISDIR(mode) else "pipe or device"
        raise UserError(f"{flag} {path}: is a {kind}, not a file; choose another name".strip())
    return path


@contextmanager
def whole(path):
    """Yields a temporary path beside `path` and renames it at the end: a reader sees the old file or the new one, never
    half of one, also after a power cut."""
    path = check_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Full(f"{path}: could not be written ({error}); is the disk full? What stood there before is kept"
                   ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sweep(folder):
    """Takes away what a killed process left half-written in this folder."""
    for path in Path(folder).glob(".*.part"):
        path.unlink(missing_ok=True)


def free_folder(out, stem, holds, hint="choose another"):
    """`out`, or the first of the names stem, stem-2, ... that is not taken. Refused where the file `holds` is there
    already, and where nothing can be written. Nothing is made yet."""
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    out = Path(out) if out else next(path for path in map(Path, names) if not path.exists())
    if (out / holds).exists():
        raise UserError(f"--out {out}: holds {holds} already; {hint}")
    there = next(path for path in (out, *out.absolute().parents) if os.path.lexists(path))
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f"--out {out}: {there} is not a folder that can be written to")
    return out


@contextmanager
def new_folder(folder, holds):
    """Makes the folder. Where the work inside fails before the file `holds` is in it, what it wrote there is taken away
    again: a start that failed leaves nothing."""
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
        try:
            torch.save(content, temporary)
        except RuntimeError as error:                                       # torch's word for a write that failed
            raise OSError(str(error).splitlines()[0]) from None


STRIP = ("python -c 'import sys, torch; T = torch.Tensor; d = torch.load(sys.argv[1], \"cpu\", weights_only=False); "
         "torch.save({{k: v for k, v in d.items() if isinstance(v, T) or isinstance(v, dict) and all(isinstance(t, T) "
         "for t in v.values())}}, sys.argv[2])' {} weights.pth")


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
        if "Unsupported" in str(error):                                     # torch's word for an object of a class
            what = re.search(r"GLOBAL ([\w.]+)|$", str(error))[1] or "an object"
            raise UserError(f"{path}: refused, it holds {what} beside its tensors, and to open that can run any "
                            "command; if you trust the file, keep its tensors alone: "
                            + STRIP.format(shlex.quote(str(path)))) from None
        raise UserError(f"{path}: refused, it is damaged or holds more than tensors and plain values "
                        f"({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a state dict")
    return content


def read_config(folder):
    """What is in a run's config.json."""
    path = Path(folder) / "config.json"
    try:
        content = json.loads(path.read_text())
        return content | {key: content[key] for key in ("arguments", "encoder", "data")}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path}: missing or damaged; without it the weights are taken as bare ones") from None


def read_run(folder):
    """What a run's folder says of its images, and of the network in its encoder.pt."""
    content = read_config(folder)
    try:
        told = {name: content["arguments"][name] for name in ("data", "label", "channels")}
        return SimpleNamespace(**told, size=content["data"]["size"], deal=content["arguments"].get("deal"),
                               encoder=content["encoder"]["name"], stem=content["encoder"]["stem"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{Path(folder) / 'config.json'}: damaged; without it the weights are taken as bare ones"
                        ) from None


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
        """Images a second since the last call."""
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
