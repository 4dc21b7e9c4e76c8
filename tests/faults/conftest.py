"""Real runs in processes of their own, and what they leave behind."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from engine.checkpoint import load
from engine.checkpoint_file import split_tensors

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_vit.yaml"
REFUSED = re.compile(r"error: [^\n]+\n")
# Every kind of state that a resumed run must find again, in a run of seconds: 12 iterations are an epoch
EVERYTHING_ON = (
    "model.kwargs.depth=2", "model.drop_path_rate=0.2", "train.max_iters=34", "train.global_batch=80",
    "train.accumulation=2", "train.clip_norm=1.0", "mixup.mixup_alpha=0.8", "ema.enabled=true", "ema.decay=0.9",
    "evaluation.period=1", "checkpoint.period=4", "log.period=7", "log.csv=true",
)  # fmt: skip


class Ended(NamedTuple):
    """What a process of a run ended with."""

    code: int
    out: str
    err: str


class Running(NamedTuple):
    """A process of a run."""

    pid: int
    out: Path
    err: Path


class RunServer:
    """Starts runs of tools/train_net.py, see run_server.py."""

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

    def ask(self, **order: Any) -> Any:
        """The server's answer to an order."""
        self._server.stdin.write(json.dumps(order) + "\n")
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: Any, environment: dict[str, str] | None = None, **order: Any) -> Running:
        """Start a process; `kill` as for run_server.py, `memory` limits the bytes that it may address."""
        self._count += 1
        out, err = (self.folder / f"{self._count}.{stream}" for stream in ("out", "err"))
        order |= {"out": str(out), "err": str(err), "folder": str(self.folder), "environment": environment or {}}
        return Running(self.ask(arguments=[*map(str, arguments)], **order), out, err)

    def start_processes(
        self,
        count: int,
        *arguments: Any,
        environment: dict[str, str] | None = None,
        kill: dict | None = None,
        victim: int = 0,
    ) -> list[Running]:
        """The processes of one run, as a launcher starts them; `kill` goes to one of them."""
        if count == 1:
            return [self.start(*arguments, environment=environment, kill=kill)]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
        shared |= environment or {}
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return [
            self.start(*arguments, environment={**shared, **own[rank]}, kill=kill if rank == victim else None)
            for rank in range(count)
        ]

    def wait(self, run: Running, timeout: float = 120) -> Ended:
        """How it ended; a run that does not end fails the test."""
        deadline = time.monotonic() + timeout
        while (code := self.ask(wait=run.pid)) is None:
            if time.monotonic() > deadline:
                os.kill(run.pid, signal.SIGKILL)
                pytest.fail(f"hangs after {timeout} s: {run.out.read_text()[-1000:]} {run.err.read_text()[-1000:]}")
            time.sleep(0.02)
        return Ended(code, run.out.read_text(), run.err.read_text())

    def run(self, *arguments: Any, processes: int = 1, **settings: Any) -> list[Ended]:
        """Start and wait for all processes."""
        return [self.wait(process) for process in self.start_processes(processes, *arguments, **settings)]

    def succeed(self, *arguments: Any, **settings: Any) -> str:
        """What a run prints that ends well."""
        ended = self.run(*arguments, **settings)
        assert not any(end.code for end in ended), (arguments, [end.err for end in ended])
        return ended[0].out

    def refused(self, *arguments: Any, **settings: Any) -> str:
        """The one line of a run that ends with it."""
        for ended in self.run(*arguments, **settings):
            assert ended.code == 2 and REFUSED.fullmatch(ended.err), (arguments, ended)
            assert "unforeseen" not in ended.err, (arguments, ended)
        return ended.err


def free_port() -> int:
    """A port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[RunServer]:
    """Starts runs in milliseconds."""
    server = RunServer(tmp_path_factory.mktemp("runs"))
    yield server
    server._server.stdin.close()
    server._server.wait(timeout=30)


@pytest.fixture(scope="session")
def finished(server, tmp_path_factory):
    """Gives the folder of a run with these arguments that nothing has stopped; each is trained once."""

    @functools.cache
    def folder_of(*arguments: Any, processes: int = 1) -> Path:
        folder = tmp_path_factory.mktemp("finished") / "run"
        server.succeed(*arguments, f"output_dir={folder}", processes=processes)
        return folder

    return folder_of


@pytest.fixture
def digits() -> tuple[Any, ...]:
    """Arguments of the short digits run with everything on."""
    return ("--config", DIGITS, *EVERYTHING_ON)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._sentinel}",)


def wait_for(text: str, file: Path, timeout: float = 120) -> None:
    """Until a run has logged something."""
    deadline = time.monotonic() + timeout
    while text not in (file.read_text() if file.exists() else ""):
        assert time.monotonic() < deadline, f"no {text!r} in {file}"
        time.sleep(0.02)


def outcome(folder: Path) -> tuple[dict, dict, list[dict], list[dict], dict]:
    """All that a run ends with, without what clocks and names say."""
    state = load(folder / "checkpoints" / "last.pt")
    del state["config"], state["hooks"]["report"]
    tensors, plain = split_tensors(state)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for record in (*records, *rows):
        record.pop("images_per_second", None)
        record.pop("memory", None)  # records of an evaluation alone have neither
    summary = json.loads((folder / "summary.json").read_text())
    del summary["seconds"]
    return tensors, plain, records, rows, summary


def assert_same_end(one: Path, other: Path) -> None:
    """Compare two finished runs bit by bit: weights, averages, optimiser, schedule, metrics, summary."""
    (tensors, *rest), (other_tensors, *other_rest) = outcome(one), outcome(other)
    assert tensors.keys() == other_tensors.keys()
    assert not [path for path in tensors if not torch.equal(tensors[path], other_tensors[path])]
    assert rest == other_rest
