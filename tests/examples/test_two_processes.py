"""Other trainers' DDP reduces each gradient once per step, whatever the number of sub-models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_processes.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(SCRIPT)]


@pytest.mark.parametrize(
    "loop",
    [
        "lightning_module vit manual",  # branch by branch
        *(
            pytest.param(slow, marks=pytest.mark.slow)  # of the first one buffers are copied by DDP
            for slow in ("timm_task resnet", "timm_task vit", "accelerate_loop vit", "lightning_module vit")
        ),
    ],
)
def test_one_reduction_per_step(loop):
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*LAUNCH, *loop.split()], capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["reduced"] == [found["parameters"]] * 3
    assert found["apart"] == 0.0
