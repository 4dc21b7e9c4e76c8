"""Running tools/train_net.py: in this process for speed, or as the command a user types."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"


@pytest.fixture
def train_net(monkeypatch, capsys):
    """Call main() with arguments; returns (exit code, standard output, standard error). No worker may be left."""
    spec = importlib.util.spec_from_file_location("train_net", TRAIN_NET)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
        code = module.main()
        assert not multiprocessing.active_children()
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture
def command():
    """Run a command line in a process of its own."""

    def run(*arguments: object, cwd: Path = ROOT, timeout: int = 300) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=timeout, env={**os.environ}
        )

    return run


@pytest.fixture
def torchrun():
    """The launcher of two processes on this machine."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
