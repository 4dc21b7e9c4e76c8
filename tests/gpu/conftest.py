"""What only a GPU can show: `make test-gpu`. With `--device cpu` all of it runs on a machine without one."""

from __future__ import annotations

import os
import sys

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config) -> None:
    """Without the device there is nothing to run: one line, and a good end."""
    if config.getoption("device") == "cuda" and not torch.cuda.is_available() and config.getoption("-m") == "gpu":
        pytest.exit("no CUDA device here, nothing to test; --device cpu runs the same lines without one", returncode=0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say what failed at once: the time for all of it may be over before the end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(
            f"\nFAILED {report.nodeid} after {report.duration:.0f} s\n{report.longreprtext}",
            file=sys.stderr,
            flush=True,
        )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where everything runs."""
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def amp(device) -> str:
    """A precision that the device has by itself."""
    return "fp16" if device.type == "cuda" else "bf16"


@pytest.fixture
def report(capsys):
    """Print a figure for whoever watches, whatever pytest captures, also in one of its worker processes."""

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", file=sys.stderr, flush=True)

    return say
