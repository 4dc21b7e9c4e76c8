from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError, TCPStore

from engine.distributed import ADDRESS, fresh_store

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
MINUTE = timedelta(minutes=1)


@pytest.fixture
def agent():
    """A store that has outlived the process whose address it keeps."""
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    dead = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    store.set(ADDRESS, str(dead.port))
    return store


def test_a_dead_process_is_not_met(agent):
    with ThreadPoolExecutor() as pool:
        client = TCPStore(HOST, agent.port, is_master=False)
        waiting = pool.submit(fresh_store, client, HOST, 1, MINUTE)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=3)  # the stale address refuses, or nobody would have to wait
        main = fresh_store(agent, HOST, 0, MINUTE)
        other = waiting.result(timeout=60)
    main.set("key", "value")
    assert other.get("key") == b"value" and other.timeout == MINUTE


def test_without_a_main_process_it_ends(agent):
    with pytest.raises(DistNetworkError):
        fresh_store(agent, HOST, 1, timedelta(seconds=1))


def test_every_start_of_torchrun_begins_anew(tmp_path):
    """Each process leaves its mark in the store of its start; the second start must not find those of the first."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os
        import torch.distributed as dist
        from engine.distributed import process_group

        with process_group(timeout_minutes=1) as process:
            store = dist.distributed_c10d._get_default_store()
            assert store.add("starts", 1) <= 2, "marks of an earlier start"
            process.barrier()
            if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and process.rank == 1:
                os._exit(1)
            process.barrier()
            everyone = process.gather(process.rank)
            if process.is_main:
                print("all are here", everyone)
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert "all are here [0, 1]" in done.stdout
