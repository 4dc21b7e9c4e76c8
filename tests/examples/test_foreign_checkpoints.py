"""What other trainers saved is evaluated by tools/eval_net.py, and its accuracy is the one they had."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning.pytorch
import pytest
import timm_task
import torch
import transformers_trainer
from digits import DIGITS, accuracy, masksub, small_vit
from lightning_module import Classifier, batches
from torch.utils.data import Subset

import augsub
from tools import eval_net

ONE_EPOCH = Subset(DIGITS.train, range(500))


def saved_by_timm(folder: Path) -> tuple[Path, float]:
    model = small_vit()
    timm_task.train(model, masksub(), ONE_EPOCH, epochs=2, average=True, folder=str(folder))
    return folder / "last.pth.tar", accuracy(model.eval())


def saved_by_lightning(folder: Path) -> tuple[Path, float]:
    module = Classifier(augsub.patch(small_vit()), masksub())
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = lightning.pytorch.Trainer(max_epochs=2, accelerator="cpu", logger=False, **quiet)
    trainer.fit(module, batches(ONE_EPOCH))
    trainer.save_checkpoint(folder / "lightning.ckpt")
    return folder / "lightning.ckpt", accuracy(module.model.eval())


def saved_by_transformers(folder: Path) -> tuple[Path, float]:
    model = transformers_trainer.timm_in_transformers()
    augsub.patch(model.base_model)
    transformers_trainer.train(model, masksub(), ONE_EPOCH, epochs=2, use_cpu=True)
    model.save_pretrained(folder)
    return folder / "model.safetensors", accuracy(lambda images: model.eval()(images).logits)


@pytest.mark.parametrize(
    "save",
    [
        saved_by_timm,
        *(pytest.param(other, marks=pytest.mark.slow) for other in (saved_by_lightning, saved_by_transformers)),
    ],
)
def test_another_trainers_file(save, tmp_path, call):
    torch.manual_seed(0)
    file, expected = save(tmp_path)
    model = ("--model", "vit_tiny_patch16_224", "model.kwargs={patch_size: 2, embed_dim: 64, depth: 4, num_heads: 4}")
    sub_models = ("--augsub", "masking", "--ratios", "0,0.5", "--output", tmp_path / "results")
    code, _, error = call(eval_net, file, *model, *sub_models, "data.dataset=digits", "data.image_size=8")
    assert code == 0, error
    (row, *_) = csv.DictReader((tmp_path / "results" / "results.csv").open())
    assert float(row["top1"]) == pytest.approx(expected, abs=1e-3)
