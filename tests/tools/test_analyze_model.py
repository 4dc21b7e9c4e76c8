"""tools/analyze_model.py as users run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm

import augsub
from tools import analyze_model

ROOT = Path(__file__).parents[2]


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools" / tool, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def analyze(*arguments: object) -> str:
    finished = run("analyze_model.py", *arguments)
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    return finished.stdout


def test_a_model_as_plain_numbers():
    figures = json.loads(analyze("--model", "vit_tiny_patch16_224", "--json"))
    assert list(figures) == ["params", "main_flops", "sub_flops", "training_cost", "activations"]
    assert figures["params"] == 5_717_416
    assert figures["main_flops"] == pytest.approx(1.26e9, rel=0.01)
    assert figures["training_cost"] == pytest.approx(1 + figures["sub_flops"] / figures["main_flops"])


def test_a_configuration_as_tables_with_overrides():
    printed = analyze("--config", "configs/digits_vit.yaml", "model.kwargs.depth=2", "--depth", 2)
    assert "sub-model masking 0.5" in printed
    assert "| blocks.1 " in printed and "blocks.2" not in printed and "blocks.1.attn" not in printed
    assert "not counted in the FLOPs (number of calls): add" in printed


def test_a_configuration_without_its_data_counts_the_classes_of_imagenet():
    finished = run("analyze_model.py", "--config", "configs/resnet50.yaml", "data.root=nowhere", "--json")
    assert json.loads(finished.stdout)["params"] == 25_557_032
    assert finished.stderr == "data.root = nowhere: no such folder; taken to have 1000 classes\n"


def test_support_of_a_wildcard():
    support = json.loads(analyze("--list-support", "swin_*_patch4_window7_224", "--json"))
    assert list(support) == timm.list_models("swin_*_patch4_window7_224")
    assert support["swin_tiny_patch4_window7_224"] == augsub.supports(timm.create_model("swin_tiny_patch4_window7_224"))
    assert "| stem " in analyze("--list-support", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "vit_tiny_patch16_22"], "timm has no model 'vit_tiny_patch16_22', did you mean"),
        (["--model", "resnet18", "--augsub", "dropout"], "dropout has no site in ResNet"),
        (["--model", "resnet18", "--augsub", "maskin"], "maskin"),
        (["--model", "vit_tiny_patch16_224", "--ratio", "0.999"], "leaves none of 196 cells"),
        (["--model", "resnet18", "--ratio", "1.5"], "ratio = 1.5, allowed is a number in [0, 1)"),
        (["--model", "resnet18", "data.image_size=64"], "data.image_size=64: key=value belongs to --config"),
        (["--config", "configs/digits_vit.yaml", "--ratio", "0.9"], "--augsub, --ratio: belong to --model"),
        (["--config", ""], "config file  does not exist"),
        (["--config", "configs/none.yaml"], "configs/none.yaml"),
        (["--config", "configs/digits_vit.yaml", "data.image_sise=64"], "Did you mean: 'image_size'?"),
        (["--list-support", "no_such_*"], "timm has no model 'no_such_*'"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", *arguments])
    assert analyze_model.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_error_is_the_exit_code_of_the_process():
    finished = run("analyze_model.py", "--model", "vit_tiny_patch16_22")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_all_configs_and_the_literature():
    printed = analyze("--all-configs")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"| {path.stem} " in printed
    _, literature = printed.split("\n\n")
    assert literature in (ROOT / "README.md").read_text()
