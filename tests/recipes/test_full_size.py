"""Every recipe builds its full-size model, loader, optimiser and schedule and makes a real step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_STEP = (
    "data.workers=1", "model.pretrained=false", "model.checkpoint=null", "train.max_iters=1",
    "train.global_batch=2",  # mixing needs pairs
    "checkpoint.background=false",  # a copy of ViT-H with its optimiser is 8 GB
)  # fmt: skip


@pytest.mark.slow
def test_step_at_full_size(recipe, image_folder, tmp_path):
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config", recipe.path, *ONE_STEP]
    command += [f"data.root={image_folder}", f"output_dir={tmp_path}/run"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        checkpoint.unlink()  # up to 10 GB each
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["iterations"], summary["images"]) == (1, 9)
    assert 0 < summary["main_loss"] < 10 and 0 < summary["sub_loss"] < 10
    published = f"published, top-1   MaskSub {recipe.config.published.masksub} %, baseline"
    assert published in finished.stdout or recipe.config.published.masksub is None
