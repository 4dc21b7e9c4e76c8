"""Running tools/train_net.py: in this process for speed, or as the command a user types."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import tools.train_net

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"


@pytest.fixture
def train_net(call):
    """Call tools/train_net.py."""
    return partial(call, tools.train_net)


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
