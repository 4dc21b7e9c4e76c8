"""Every example ends with its accuracies, after one epoch; as a command, and learning: slow."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import digits
import pytest
import timm
import timm_task
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
EVERY = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "digits.py")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def accuracies(printed: str) -> list[float]:
    return [float(figure) for figure in re.findall(r": ([\d.]+) % of the held-out (?:digits|pixels)", printed)]


@pytest.mark.parametrize("name", EVERY)
def test_an_example_ends_with_its_accuracies(name, monkeypatch, capsys):
    example = importlib.import_module(name.removesuffix(".py"))
    monkeypatch.setattr(example, "EPOCHS", 1)
    example.main()
    assert accuracies(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_an_example_is_a_command_and_learns(name):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=EXAMPLES.parent, env=ONE_THREAD
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert min(accuracies(done.stdout), default=0) > 85, done.stdout


@pytest.mark.slow
def test_timms_task_compiles_keeps_an_average_and_saves(tmp_path):
    torch.manual_seed(0)
    model = digits.small_vit()
    settings = {"average": True, "compiled": True, "folder": str(tmp_path)}
    timm_task.train(model, digits.masksub(), digits.DIGITS.train, epochs=8, **settings)
    assert digits.accuracy(model.eval()) > 60
    saved, averaged = digits.small_vit(), digits.small_vit()
    timm.models.load_checkpoint(saved, str(tmp_path / "last.pth.tar"), use_ema=False)
    timm.models.load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
    assert digits.accuracy(saved.eval()) == pytest.approx(digits.accuracy(model))
    assert digits.accuracy(averaged.eval()) > 40
