from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIB = 1024**3


def test_a_process_does_not_count_what_its_parent_needed():
    parent = f"""
import subprocess, sys
large = bytes([1]) * {2 * GIB}
child = "import torch; from engine.metrics import peak_memory; print(peak_memory(torch.device('cpu')))"
subprocess.run([sys.executable, "-c", child], check=True, close_fds=False)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 0 < float(done.stdout) < 1.5 * 1024
