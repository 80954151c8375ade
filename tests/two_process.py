"""Run a function in several processes that form a gloo group, and bring its results back."""

import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist

# Where child processes come from: a fork has all modules already; elsewhere than on Linux forks are not to be trusted.
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
HELPERS = {}


def helper(name):
    """A process of this name that works beside this one; it begins now, as a copy of what this one is now."""
    if name not in HELPERS:
        HELPERS[name] = ProcessPoolExecutor(1, CONTEXT, initializer=quiet)
        HELPERS[name].submit(os.getpid).result()
    return HELPERS[name]


def run_processes(function, count, tmp_path, *values):
    """[function(*values) of rank 0, of rank 1, ...]. The function is found by its name in its module and returns what
    torch.save can write."""
    folder = tmp_path / f"{function.__name__}-{len(list(tmp_path.iterdir()))}"          # a rendezvous serves one group
    folder.mkdir()
    helper("forks").submit(start, function, count, folder, values).result()
    return [torch.load(folder / f"result-{rank}", weights_only=True) for rank in range(count)]


def start(function, count, folder, values):
    """The processes, from their start to their end."""
    children = [CONTEXT.Process(target=child, args=(function, rank, count, folder, values)) for rank in range(count)]
    for process in children:
        process.start()
    for process in children:
        process.join(120)
    alive = [process for process in children if process.is_alive()]
    for process in alive:
        process.kill()
        process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
    if errors or alive or any(process.exitcode for process in children):
        codes = [process.exitcode for process in children]
        raise RuntimeError("\n".join(errors) or f"exit codes {codes}, {len(alive)} stopped after 120 s")


def quiet():
    """What a child process prints is nobody's: its errors come back in other ways. It ends with its parent, also where
    that is killed: else it would hold the pipes that pytest waits for."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    threading.Thread(target=leave_with, args=(os.getppid(),), daemon=True).start()


def leave_with(parent):
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def child(function, rank, count, folder, values):
    quiet()
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count,
                                timeout=timedelta(seconds=60))
        torch.save(function(*values), folder / f"result-{rank}")
        dist.destroy_process_group()
    except Exception:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
