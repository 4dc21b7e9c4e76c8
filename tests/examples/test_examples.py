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

import augsub

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


TRAIN_SCRIPT = """
import argparse
import timm, torch
from timm import utils
from timm.task import ClassificationTask

parser = argparse.ArgumentParser()
parser.add_argument('--kd-model-name', default=None)


def _parse_args():
    return parser.parse_args()


def main():
    args = _parse_args()
    args.rank = 0
    torch.manual_seed(0)
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, depth=2, num_classes=5)
    device, model_dtype, train_loss_fn = torch.device('cpu'), None, torch.nn.CrossEntropyLoss()
    if args.kd_model_name is not None:
        if True:
            pass
        else:
            raise ValueError(f"Unknown distillation type: {args.kd_distill_type}")
    else:
        # Standard classification task
        task = ClassificationTask(
            model=model,
            criterion=train_loss_fn,
            device=device,
            dtype=model_dtype,
            verbose=utils.is_primary(args),
        )
    torch.manual_seed(1)
    print(float(task(torch.randn(4, 3, 32, 32), torch.arange(4))['loss']))


if __name__ == '__main__':
    main()
"""


@pytest.mark.slow
def test_the_patch_of_timms_script_adds_the_sub_model_and_changes_nothing_else(tmp_path):
    (tmp_path / "train.py").write_text(TRAIN_SCRIPT)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "apply", EXAMPLES / "timm_train.patch"], cwd=tmp_path, check=True)
    losses = [
        float(subprocess.check_output([sys.executable, "train.py", *options], cwd=tmp_path, env=ONE_THREAD))
        for options in ((), ("--augsub", "masking", "--augsub-ratio", "0.25"))
    ]
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5)
    augsub.patch(model)
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 32)
    logits = model(images)
    main = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    teacher = logits.detach().softmax(dim=1)
    sub = -(teacher * model(images, augsub="masking", augsub_ratio=0.25).log_softmax(dim=1)).sum(dim=1).mean()
    assert losses == pytest.approx([float(main), float(main + sub) / 2], rel=1e-6)
