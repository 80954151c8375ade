"""What makes the tests quick: two processes share them, where they are many."""

import gc
import importlib
import os
import signal
import sys
import traceback

gc.set_threshold(200_000)           # garbage is looked for far more seldom than by default
# On networks this small a second thread costs as much as it gives, and beside other work the two wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

from tests.two_process import CONTEXT, HELPERS, helper

# torch.manual_seed also seeds devices that are not there, and formats the whole stack for each: a millisecond a call.
if not torch.cuda.is_available():
    torch.manual_seed = torch.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))

MANY = 24                          # fewer tests than this run one after the other
LONG = "test_evaluate.py", "test_contract.py", "test_loop.py", "test_learning.py"  # of the others, the larger ones
DONE = "done"


def pytest_collection_finish(session):
    gc.collect()
    gc.freeze()                                                             # modules are no garbage: not searched again


def pytest_runtestloop(session):
    """A fork of this process, with all modules already there, takes every other file from the same list."""
    if session.config.option.collectonly or session.testsfailed or len(session.items) < MANY or not forks():
        start_helper(session.items)
        return None                                                         # pytest's own loop
    session.config._tmp_path_factory.getbasetemp()                          # one folder for both
    importlib.import_module("torch._dynamo")            # optimisers import it: once, here, and not in every process
    rooms, taken = files_of(session.items), CONTEXT.Value("i", 0)
    reports, sender = CONTEXT.Pipe(duplex=False)
    second = CONTEXT.Process(target=work_for, args=(session, rooms, taken, sender))
    second.start()
    sender.close()
    reports.recv()                                                          # it has its own output and its helper
    start_helper(session.items)
    try:
        more = True                                                         # reports of the second process will come
        for _ in work(session, rooms, taken):
            while more and reports.poll():
                more = pass_on(session, reports)
        while more:
            more = pass_on(session, reports)
    except BaseException:
        second.terminate()
        raise
    finally:
        second.join()
    return True


def forks():
    return CONTEXT.get_start_method() == "fork"


def start_helper(items):
    """Forks the process that forks others while this one has computed nothing yet: afterwards torch may have threads,
    which a fork leaves behind."""
    if any(hasattr(getattr(item, "module", None), "run_processes") for item in items):
        helper("forks")


def files_of(items):
    """[[the items of a file], ...], what takes long first: so the two processes end at nearly the same time."""
    rooms = {}
    for item in items:
        rooms.setdefault(item.path, []).append(item)
    return [rooms[path] for path in sorted(rooms, key=lambda path: (path.name not in LONG, -path.stat().st_size))]


def work(session, rooms, taken):
    """Runs the files that nobody has taken yet; yields after each test."""
    while True:
        with taken.get_lock():
            mine, taken.value = taken.value, taken.value + 1
        if mine >= len(rooms):
            return
        for item, following in zip(rooms[mine], [*rooms[mine][1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.shouldfail or session.shouldstop:
                raise session.Failed(session.shouldfail or session.shouldstop)
            yield


# ---- from the second process to the first

class Sender:
    """In the place of the second process's terminal."""

    def __init__(self, config, connection):
        self.config, self.connection = config, connection

    def pytest_runtest_logreport(self, report):
        self.connection.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))


def work_for(session, rooms, taken, connection):
    """What the second process does."""
    plugins = session.config.pluginmanager
    plugins.unregister(name="terminalreporter")
    plugins.register(Sender(session.config, connection))
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()                                         # its files are the first process's
    capture.start_global_capturing()
    start_helper(session.items)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))                   # so that its helper ends with it
    try:
        connection.send("ready")
        for _ in work(session, rooms, taken):
            pass
    except session.Failed:
        pass                                                                # the first process has the report
    except Exception:
        connection.send(f"the second process stopped: {traceback.format_exc()}")
    finally:
        connection.send(DONE)
        for executor in HELPERS.values():
            executor.shutdown()


def pass_on(session, reports):
    """One report, to the terminal; False where none will follow."""
    data = reports.recv()
    if isinstance(data, str):
        if data != DONE:
            raise RuntimeError(data)
        return False
    report = session.config.hook.pytest_report_from_serializable(config=session.config, data=data)
    session.config.hook.pytest_runtest_logreport(report=report)
    return True
