"""Every example runs as a command, and learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERY = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "digits.py")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.mark.parametrize("name", EVERY)
def test_an_example_ends_with_its_accuracies(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=EXAMPLES.parent, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr[-2000:]
    accuracies = [float(figure) for figure in re.findall(r": ([\d.]+) % of the held-out digits", done.stdout)]
    assert accuracies and min(accuracies) > 85, done.stdout
