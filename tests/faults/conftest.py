"""Real runs in processes of their own, and what they leave behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load
from engine.checkpoint_file import split_tensors

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_vit.yaml"
# Every kind of state that a resumed run must find again, in a run of seconds: 12 iterations are an epoch
EVERYTHING_ON = (
    "model.kwargs.depth=2", "model.drop_path_rate=0.2", "train.max_iters=34", "train.global_batch=80",
    "train.accumulation=2", "train.clip_norm=1.0", "mixup.mixup_alpha=0.8", "ema.enabled=true", "ema.decay=0.9",
    "evaluation.period=1", "checkpoint.period=4", "log.period=7", "log.csv=true",
)  # fmt: skip


@dataclass
class Ended:
    """What a process of a run ended with."""

    code: int
    out: str
    err: str


@dataclass
class Running:
    """A process of a run."""

    pid: int
    out: Path
    err: Path


class RunServer:
    """Starts runs, see run_server.py."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("run_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def start(
        self,
        *arguments: Any,
        environment: dict[str, str] | None = None,
        kill: dict | None = None,
        memory: int | None = None,
    ) -> Running:
        """Start tools/train_net.py; `memory` limits the bytes that it may address."""
        self._count += 1
        out, err = (self.folder / f"{self._count}.{stream}" for stream in ("out", "err"))
        pid = self._ask(
            arguments=[*map(str, arguments)],
            environment=environment or {},
            kill=kill,
            memory=memory,
            out=str(out),
            err=str(err),
            folder=str(self.folder),
        )
        return Running(pid, out, err)

    def wait(self, run: Running, timeout: float = 120) -> Ended:
        """How it ended; a run that does not end fails the test."""
        deadline = time.monotonic() + timeout
        while (code := self._ask(wait=run.pid)) is None:
            if time.monotonic() > deadline:
                os.kill(run.pid, signal.SIGKILL)
                pytest.fail(f"hangs after {timeout} s: {run.out.read_text()[-1000:]} {run.err.read_text()[-1000:]}")
            time.sleep(0.02)
        return Ended(code, run.out.read_text(), run.err.read_text())

    def run(self, *arguments: Any, **settings: Any) -> Ended:
        """Start and wait."""
        return self.wait(self.start(*arguments, **settings))

    def start_processes(
        self,
        count: int,
        *arguments: Any,
        environment: dict[str, str] | None = None,
        kill: dict | None = None,
        victim: int = 0,
    ) -> list[Running]:
        """The processes of one run, as a launcher starts them; `kill` goes to one of them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        return [
            self.start(
                *arguments,
                environment={**shared, **(environment or {}), "RANK": str(rank), "LOCAL_RANK": str(rank)},
                kill=kill if rank == victim else None,
            )
            for rank in range(count)
        ]

    def run_processes(self, count: int, *arguments: Any, **settings: Any) -> list[Ended]:
        """Start them and wait for all."""
        return [self.wait(process) for process in self.start_processes(count, *arguments, **settings)]

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def _ask(self, **order: Any) -> Any:
        self._server.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._server.stdout.readline())


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> RunServer:
    """Starts runs of tools/train_net.py in milliseconds."""
    server = RunServer(tmp_path_factory.mktemp("runs"))
    yield server
    server.close()


@pytest.fixture
def digits() -> tuple[Any, ...]:
    """Arguments of the short digits run with everything on."""
    return ("--config", DIGITS, *EVERYTHING_ON)


def outcome(folder: Path) -> tuple[dict, dict, list[dict], list[dict], dict]:
    """All that a run ends with, without what clocks and names say."""
    state = load(folder / "checkpoints" / "last.pt")
    del state["config"], state["hooks"]["report"]
    tensors, plain = split_tensors(state)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for record in (*records, *rows):
        del record["images_per_second"], record["memory"]
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"]
    return tensors, plain, records, rows, summary


@pytest.fixture
def assert_same_end():
    """Compares two finished runs bit by bit: weights, averages, optimiser, schedule, metrics, summary."""

    def compare(one: Path, other: Path) -> None:
        (tensors, *rest), (other_tensors, *other_rest) = outcome(one), outcome(other)
        assert tensors.keys() == other_tensors.keys()
        differing = [path for path in tensors if not torch.equal(tensors[path], other_tensors[path])]
        assert not differing, differing[:3]
        assert rest == other_rest

    return compare
