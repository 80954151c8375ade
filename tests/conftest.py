"""What makes the tests quick: one thread each, since pytest-xdist shares them among processes."""

import gc
import os
from contextlib import suppress

os.environ["OMP_NUM_THREADS"] = "1"         # networks this small gain nothing from a second thread
gc.set_threshold(200_000)                   # garbage is looked for far more seldom than by default
with suppress(ImportError):                 # after Ctrl-C a process has so many seconds to end by itself
    from xdist.workermanage import NodeManager
    NodeManager.EXIT_TIMEOUT = 2
