"""What goes wrong in other people's loops, each with one line that says what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import augsub
from augsub.integrations.lightning import SubModelMixin

HALF = augsub.SubModel("masking", ratio=0.5)
PATCH_FIRST = r"is not patched: call augsub.patch on the model first, before DistributedDataParallel, torch.compile"


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def in_transformers(model: nn.Module) -> nn.Module:
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**size, num_labels=10))


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel, torch.compile, Module, in_transformers])
def test_a_model_that_was_not_patched(wrap, one_process, make_model, images, labels):
    model = wrap(make_model("vit"))
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF])
    for use in (lambda: objective(model, images, labels), lambda: objective.backward(model, images, labels)):
        with pytest.raises(ValueError, match=PATCH_FIRST) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_preparing_comes_before_wrapping(one_process, make_model):
    model = DistributedDataParallel(augsub.patch(make_model("vit")))
    with pytest.raises(ValueError, match=r"call objective\.prepare before wrapping it"):
        augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF]).prepare(model)


def test_patching_a_wrapper(one_process, make_model):
    for wrap in (DistributedDataParallel, torch.compile, Module):
        with pytest.raises(ValueError, match="is a wrapper: patch the model itself, before wrapping it"):
            augsub.patch(wrap(make_model("vit")))
    with pytest.raises(ValueError, match="ViTForImageClassification has a head around its model: patch its base_model"):
        augsub.patch(in_transformers(make_model("vit")))


class TwoOptimisers(SubModelMixin, Module):
    automatic_optimization = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(augsub.patch(model))
        self.objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [HALF])

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.1, 0.01)]


def test_branch_by_branch_lightning_steps_one_optimiser(tmp_path, make_model, images, labels):
    module = TwoOptimisers(make_model("vit"))
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has 2 optimisers, SubModelMixin steps one: call self\.objective"):
        trainer.fit(module, DataLoader(list(zip(images, labels, strict=True)), batch_size=4))


@pytest.mark.parametrize(
    ("criterion", "targets", "message"),
    [
        (
            LabelSmoothingCrossEntropy(),
            "soft",
            r"LabelSmoothingCrossEntropy cannot take targets \(4, 10\), torch.float32",
        ),
        (nn.NLLLoss(), "soft", r"NLLLoss cannot take targets \(4, 10\).*soft targets .* need .*SoftTargetCrossEntropy"),
        (SoftTargetCrossEntropy(), "labels", r"SoftTargetCrossEntropy cannot take targets \(4,\).*labels \(B,\) need"),
        (nn.CrossEntropyLoss(), "too large", r"CrossEntropyLoss cannot take .*out of bounds"),
        (
            nn.CrossEntropyLoss(reduction="none"),
            "labels",
            r"loss of shape \(4,\), needed is a scalar: reduction='mean'",
        ),
        (BinaryCrossEntropy(reduction="none"), "soft", r"loss of shape \(4, 10\), needed is a scalar"),
    ],
)
def test_a_criterion_that_does_not_fit(criterion, targets, message, make_model, images, labels):
    given = {"labels": labels, "soft": torch.full((4, 10), 0.1), "too large": labels + 10}[targets]
    model = augsub.patch(make_model("vit"))
    form = "softmax" if isinstance(criterion, nn.NLLLoss) else None
    with pytest.raises(ValueError, match=message) as caught:
        augsub.SubModelObjective(criterion, [HALF], targets=form)(model, images, given)
    assert "\n" not in str(caught.value)


def test_labels_are_not_broadcast_where_batch_and_classes_agree(make_model):
    model = augsub.patch(make_model("vit"))
    with pytest.raises(ValueError, match="it would broadcast them"):
        augsub.SubModelObjective(SoftTargetCrossEntropy(), [HALF])(model, torch.randn(10, 3, 32, 32), torch.arange(10))


IMPORTS = """
import sys, timm
before = set(sys.modules)
import augsub
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} & set(sys.argv)))
for module, missing in ("transformers", "transformers"), ("timm", "timm.task"):
    sys.modules[missing] = None
    try:
        __import__(f"augsub.integrations.{module}")
    except ImportError as error:
        print(error)
"""


def test_augsub_imports_no_optional_package_and_a_missing_one_is_named_with_its_remedy():
    optional = ("lightning", "accelerate", "transformers", "omegaconf", "matplotlib", "sklearn", "tensorboard", "onnx")
    done = subprocess.run([sys.executable, "-c", IMPORTS, *optional], capture_output=True, text=True, check=True)
    imported, transformers, timm_task = done.stdout.splitlines()
    assert imported == "[]"
    assert "pip install 'augsub[transformers]'" in transformers and "pip install 'timm>=1.0.24'" in timm_task
