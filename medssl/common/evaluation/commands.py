"""Commands of Python, so many at a time: what is done already is left out, what was stopped goes on, and what a failed
one would have left is not waited for."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import UserError

try:
    import fcntl
except ImportError:                                                         # on Windows
    fcntl = None

ROOT = Path(__file__).parents[3]                # of the checkout: train.py and evaluate.py lie there
PAUSE = 0.05                                    # seconds between two looks at what runs


@contextmanager
def held(out):
    """The folder, for one study at a time: also for commands that outlived a study that was killed, since they keep
    the file open."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--out {out}: another study, or a command of one that was killed, still works there; "
                                "wait until it has ended") from None
        try:
            yield lock
        finally:
            if new and os.listdir(out) == [".lock"]:                        # a start that failed leaves nothing
                shutil.rmtree(out)


@dataclass
class Command:
    """Words for Python, and how to see that they are done. steps: of a run of train.py."""
    name: str
    words: list
    leaves: Path
    steps: int | None = None
    after: tuple = ()
    seconds: float = 0                          # about

    def done(self):
        if self.steps is None:
            results = self.leaves / "results.json"
            stopped = results.is_file() and json.loads(results.read_text()).get("stopped")
            return results.is_file() and not stopped or (self.leaves / "info.json").is_file()
        log = files.read_log(self.leaves / "log.jsonl")
        if not log or log[-1]["step"] < self.steps or not (self.leaves / "checkpoint.pt").is_file():
            return False
        return files.load_torch(self.leaves / "checkpoint.pt")["step"] >= self.steps    # the log is written before it

    def now(self):
        """The words, of a run that was stopped those that go on with it."""
        if self.steps is not None and (self.leaves / "checkpoint.pt").is_file():
            return ["train.py", "--resume", "--out", str(self.leaves)]
        return self.words


class Work:
    """Does commands, so many at a time, each after those that it needs."""

    def __init__(self, out, jobs, lock=None):
        self.out, self.jobs, self.lock, self.failed = out, jobs, lock, []
        self.waiting, self.running = [], {}

    def do(self, commands):
        commands = list(commands)
        self.waiting = [command for command in commands if not command.done()]
        if len(self.waiting) < len(commands):
            print(f"{len(commands) - len(self.waiting)} of {len(commands)} are done already{self.left()}", flush=True)
        with stopping():
            try:
                while self.waiting or self.running:
                    self.begin()
                    self.collect()
                    time.sleep(PAUSE)
            except KeyboardInterrupt:
                stop([process for _, process, _ in self.running.values()])
                print(f"stopped; the same command with --out {self.out} goes on")
                raise

    def begin(self):
        """Starts what can start, and leaves out what can't any more."""
        for command in list(self.waiting):
            lacking = set(command.after) & set(self.failed)
            if lacking:
                print(f"{command.name}: left out, as {', '.join(sorted(lacking))} failed")
                self.failed.append(command.name)
                self.waiting.remove(command)
        open_names = {command.name for command in self.waiting} | set(self.running)
        ready = [command for command in self.waiting if not open_names & set(command.after)]
        for command in ready[:self.jobs - len(self.running)]:
            self.waiting.remove(command)
            print("+ python " + shlex.join(command.now()), flush=True)
            process = start(command.now(), self.log(command), self.lock)
            self.running[command.name] = command, process, time.time()

    def collect(self):
        """What has ended."""
        for command, process, since in list(self.running.values()):
            if process.poll() is not None:
                del self.running[command.name]
                self.end(command, process.returncode, since)

    def log(self, command):
        return self.out / "logs" / f"{command.name}.log"

    def end(self, command, status, since):
        """Says how a command ended, and about how much is left."""
        if status or not command.done():
            said = self.log(command).read_text(errors="replace").split("\n") if self.log(command).is_file() else []
            last = next((line.split("\r")[-1] for line in reversed(said) if line.strip()), "")
            print(f"{command.name}: FAILED with status {status}: {last}", flush=True)
            self.failed.append(command.name)
            return
        print(f"{command.name}: {time.time() - since:.0f} s{self.left()}", flush=True)

    def left(self):
        seconds = sum(command.seconds for command in self.waiting)
        return f"; {len(self.waiting)} wait, about {minutes(seconds / 60 / self.jobs)}" if seconds else ""


def start(words, log, lock):
    """A command in a session of its own, so that Ctrl-C reaches it only once, from here."""
    log.parent.mkdir(parents=True, exist_ok=True)
    script = words if words[0] == "-m" else [str(ROOT / words[0]), *words[1:]]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    with open(log, "a") as file:
        return subprocess.Popen([sys.executable, *script], stdout=file, stderr=subprocess.STDOUT,
                                stdin=subprocess.DEVNULL, env=os.environ | threads | {"PYTHONPATH": path},
                                start_new_session=True, pass_fds=[lock.fileno()] if lock and fcntl else ())


def stop(processes):
    """train.py ends its step, saves, and leaves."""
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()


@contextmanager
def stopping():
    """SIGTERM stops a study as Ctrl-C does."""
    def interrupt(*_):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def minutes(number):
    if number < 1.5:
        return "a minute"
    return f"{number:.0f} minutes" if number < 100 else f"{number / 60:.1f} hours"
