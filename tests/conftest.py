"""Tiny models of every family, with one batch for each."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import augsub
from augsub.families import FAMILIES

IMAGE_SIZE = 32
NUM_CLASSES = 10
VIT = {"img_size": IMAGE_SIZE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": NUM_CLASSES}


def tiny_vit(**kwargs) -> VisionTransformer:
    return VisionTransformer(**VIT, **kwargs)


def tiny_swin(**kwargs) -> SwinTransformer:
    return SwinTransformer(
        **{
            "img_size": IMAGE_SIZE,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_size": 4,
            "num_classes": NUM_CLASSES,
            "drop_path_rate": 0.0,
            **kwargs,
        }
    )


def tiny_resnet(**kwargs) -> ResNet:
    # zero_init_last would make every residual branch 0, and drop_path invisible
    return ResNet(
        BasicBlock, (1, 1, 1, 1), channels=(8, 16, 24, 32), num_classes=NUM_CLASSES, zero_init_last=False, **kwargs
    )


MODELS = {
    "vit": tiny_vit,
    "vit_drop": lambda: tiny_vit(drop_path_rate=0.2, proj_drop_rate=0.1, pos_drop_rate=0.1),
    "vit_avgpool_no_class_token": lambda: tiny_vit(class_token=False, global_pool="avg", fc_norm=True),
    "vit_registers": lambda: tiny_vit(reg_tokens=4, no_embed_class=True),
    "vit_attention_pool": lambda: tiny_vit(class_token=False, global_pool="map"),
    "vit_dynamic_size": lambda: tiny_vit(dynamic_img_size=True),
    "vit_patch_drop": lambda: tiny_vit(patch_drop_rate=0.25),
    "clip": lambda: tiny_vit(pre_norm=True, norm_layer=torch.nn.LayerNorm),
    "deit3": lambda: timm.create_model("deit3_small_patch16_224", drop_path_rate=0.1, **VIT),
    "deit_distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **VIT),
    "swin": tiny_swin,
    "swin_drop": lambda: tiny_swin(drop_path_rate=0.2, proj_drop_rate=0.1),
    "resnet": tiny_resnet,
    "resnet_drop": lambda: tiny_resnet(drop_path_rate=0.2),
}
ONE_PER_FAMILY = ("vit", "swin", "resnet")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where tests/gpu runs."""
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu")


@pytest.fixture(params=MODELS)
def any_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Each variant of each family, not patched."""
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.fixture(params=ONE_PER_FAMILY)
def patched_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One model of each family, patched."""
    torch.manual_seed(0)
    return augsub.patch(MODELS[request.param]())


@pytest.fixture
def make_model():
    """Makes a model of the table by its name."""
    return lambda name: MODELS[name]()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 3, 5, 9])


@pytest.fixture
def call(monkeypatch, capsys):
    """Call main() of a tool with arguments; returns (exit code, standard output, standard error).

    No loader worker may be left.
    """

    def run(tool: ModuleType, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [Path(tool.__file__).name, *map(str, arguments)])
        code = tool.main()
        assert not multiprocessing.active_children()
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


@pytest.fixture(autouse=True)
def _forget_what_tests_register():
    """Augmentations and families that a test registers are gone after it."""
    registry, families = augsub.AUGSUB_REGISTRY, dict(FAMILIES)
    classes = dict(registry._obj_map)
    yield
    registry._obj_map = classes
    FAMILIES.clear()
    FAMILIES.update(families)


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A tiny folder of real JPEG files in three classes."""
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 8), ("val", 3)):
        for brightness, name in enumerate(("cat", "dog", "fox"), start=1):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 85 * brightness, (60, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.jpg")
    return root


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> object:
    """What was captured goes from the processes of the tests to pytest's own as UTF-8, also names that are none."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8")) for title, text in report.sections
    ]
    return report
