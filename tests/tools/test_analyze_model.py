"""tools/analyze_model.py, called in this process."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import timm
from PIL import Image

import augsub
from tools import analyze_model

ROOT = Path(__file__).parents[2]


def test_figures_of_models_and_configurations(call):
    figures = json.loads(call(analyze_model, "--model", "vit_tiny_patch16_224", "--json")[1])
    assert list(figures) == ["params", "main_flops", "sub_flops", "training_cost", "activations"]
    assert figures["params"] == 5_717_416 and figures["main_flops"] == pytest.approx(1.26e9, rel=0.01)
    assert figures["training_cost"] == pytest.approx(1 + figures["sub_flops"] / figures["main_flops"])
    _, printed, _ = call(analyze_model, "--config", "configs/digits_vit.yaml", "model.kwargs.depth=2")
    assert "sub-model masking 0.5" in printed
    assert "not counted in the FLOPs (number of calls): add" in printed
    _, printed, said = call(analyze_model, "--config", "configs/resnet50.yaml", "data.root=nowhere", "--json")
    assert json.loads(printed)["params"] == 25_557_032
    assert said == "data.root = nowhere: no such folder; taken to have 1000 classes\n"


def test_the_size_beside_a_small_model_is_its_own(tmp_path, call):
    for split, label in product(("train", "test"), range(10)):
        (tmp_path / split / f"{label}").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / f"{label}" / "grey.png")
    data, checked = ("data.dataset=folder", f"data.root={tmp_path}"), 0
    for path in ROOT.glob("configs/cifar10_*.yaml"):
        for millions in re.findall(r"# (\d\.\d) M parameters", path.read_text()):
            _, printed, _ = call(analyze_model, "--config", path, *data, "--json")
            assert f"{json.loads(printed)['params'] / 1e6:.1f}" == millions, path
            checked += 1
    assert checked == 5


def test_support_of_a_wildcard(call):
    support = json.loads(call(analyze_model, "--list-support", "swin_*_patch4_window7_224", "--json")[1])
    assert list(support) == timm.list_models("swin_*_patch4_window7_224")
    assert support["swin_tiny_patch4_window7_224"] == augsub.supports(timm.create_model("swin_tiny_patch4_window7_224"))
    assert "| stem " in call(analyze_model, "--list-support", "swin_tiny_patch4_window7_224")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_tiny_patch16_22"], "timm has no model 'vit_tiny_patch16_22', did you mean"),
        (["--model", "resnet18", "--augsub", "dropout"], "dropout has no site in ResNet"),
        (["--model", "resnet18", "--ratio", "1.5"], "ratio = 1.5, allowed is a number in [0, 1)"),
        (["--model", "resnet18", "data.image_size=64"], "masking: got an unexpected keyword argument 'data'"),
        (["--config", "configs/digits_vit.yaml", "--ratio", "0.9"], "--augsub, --ratio: belong to --model"),
        (["--config", ""], "config file  does not exist"),
        (["--list-support", "no_such_*"], "timm has no model 'no_such_*'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, call):
    code, _, error = call(analyze_model, *arguments)
    assert code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.slow
def test_all_configs_and_the_literature(call):
    _, printed, _ = call(analyze_model, "--all-configs")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"| {path.stem} " in printed
    _, literature = printed.split("\n\n")
    assert literature.strip() in (ROOT / "docs" / "performance.md").read_text()
