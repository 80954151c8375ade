"""What makes the tests quick on two cores."""

import gc
import os

# On networks this small a second thread costs as much as it gives, and beside other work the two wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

from tests.two_process import helper

MANY = 100                         # fewer tests than this run one after the other: somebody is looking for an error


def pytest_configure(config):
    config.addinivalue_line("markers", "beside: the test needs no fixture and may run beside the others, in a second "
                            "process")


def pytest_collection_finish(session):
    """Forks the second process, and the one that forks others, while this one has computed nothing yet: afterwards
    torch may have threads, which a fork leaves behind."""
    gc.collect()
    gc.freeze()                                                             # modules are no garbage: not searched again
    if session.config.option.collectonly:
        return
    session.helpers = []
    if any(hasattr(item.module, "run_processes") for item in session.items if hasattr(item, "module")):
        session.helpers.append(helper("forks"))
    if len(session.items) >= MANY:
        session.helpers.append(helper("beside"))
        for item in session.items:
            if item.get_closest_marker("beside"):
                words = item.callspec.params if hasattr(item, "callspec") else {}
                item.beside = session.helpers[-1].submit(item.function, **words)


def pytest_pyfunc_call(pyfuncitem):
    if hasattr(pyfuncitem, "beside"):
        pyfuncitem.beside.result()
        return True


def pytest_sessionfinish(session):
    for pool in getattr(session, "helpers", []):
        pool.shutdown(cancel_futures=True)
