"""Where the processes of one start of a run meet.

torchrun's agent keeps one store over all restarts. What the dead processes wrote there, addresses above all, is still
in it when the next ones look for each other (pytorch#135712), and its count of restarts differs between nodes. So the
processes of each start meet in a store of their own, which the main process opens.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta

from torch.distributed import DistNetworkError, Store, TCPStore

ADDRESS = "augsub/port"  # of the main process's store, in the agent's
PATIENCE = timedelta(seconds=2)  # for one attempt to connect, which a dead process's port refuses
PAUSE = 0.1  # seconds between attempts


def is_restartable() -> bool:
    """Whether an agent started this process that may start it again."""
    shares_its_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return shares_its_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def fresh_store(agent: Store, host: str, rank: int, timeout: timedelta) -> Store:
    """The store of this start.

    Args:
        agent: lasts over all starts.
        host: of the main process.

    Raises:
        DistNetworkError: the main process did not open one within `timeout`.
    """
    if rank == 0:
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        agent.set(ADDRESS, str(store.port))
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store = TCPStore(host, int(agent.get(ADDRESS)), is_master=False, timeout=PATIENCE)
            store.set_timeout(timeout)
            return store
        except DistNetworkError:
            if time.monotonic() > deadline:
                raise
            time.sleep(PAUSE)
