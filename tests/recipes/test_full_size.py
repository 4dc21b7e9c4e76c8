"""Every recipe builds its full-size model, loader, optimiser and schedule and makes a real step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def jpeg_folder(tmp_path_factory) -> Path:
    """Real JPEG files in three classes."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 4), ("val", 1)):
        for name in ("cat", "dog", "fox"):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (240, 300, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.JPEG")
    return root


@pytest.mark.slow
def test_step_at_full_size(recipe, jpeg_folder, tmp_path):
    images_at_once = 2  # mixing needs pairs
    finished = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "train_net.py",
            "--config",
            recipe.path,
            f"data.root={jpeg_folder}",
            f"output_dir={tmp_path}/run",
            "data.workers=1",
            "model.pretrained=false",
            "model.checkpoint=null",
            f"train.global_batch={images_at_once}",
            "train.max_iters=1",
            "checkpoint.background=false",  # a copy of ViT-H with its optimiser is 8 GB
        ],
        capture_output=True,
        text=True,
        timeout=1500,
    )
    (tmp_path / "run" / "checkpoints" / "last.pt").unlink(missing_ok=True)  # up to 10 GB each
    for numbered in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        numbered.unlink()
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["iterations"] == 1 and summary["images"] == 3
    assert 0 < summary["main_loss"] < 10 and 0 < summary["sub_loss"] < 10
    published = f"published, top-1   MaskSub {recipe.config.published.masksub} %, baseline"
    assert published in finished.stdout or recipe.config.published.masksub is None
