"""What makes the tests quick on two cores."""

import gc
import os
from concurrent.futures import ProcessPoolExecutor

# On networks this small a second thread costs as much as it gives, and beside other work the two wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.two_process import processes, quiet                              # noqa: E402

MANY = 100                         # fewer tests than this run one after the other: somebody is looking for an error


def pytest_configure(config):
    config.addinivalue_line("markers", "beside: the test needs no fixture and may run in a second process, beside the others")


def pytest_collection_finish(session):
    """Starts the process that child processes fork from, which imports what they need meanwhile, and the tests that run beside the others."""
    context = processes()
    gc.collect()
    gc.freeze()                                                             # modules are no garbage: they need not be searched for it again
    if len(session.items) >= MANY and not session.config.option.collectonly:
        session.pool = ProcessPoolExecutor(1, context, initializer=quiet)
        for item in session.items:
            if item.get_closest_marker("beside"):
                item.beside = session.pool.submit(item.function, **(item.callspec.params if hasattr(item, "callspec") else {}))


def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "beside"):
        pyfuncitem.beside.result()
        return True


def pytest_sessionfinish(session):
    if hasattr(session, "pool"):
        session.pool.shutdown(cancel_futures=True)
