"""What the README says is tried: its Python runs as it stands, its commands and links exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import augsub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", code_blocks("python"), ids=["loop", "compose", "supports", "own_augmentation"])
def test_the_python_runs_as_it_stands(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_loop_is_short():
    loop = code_blocks("python")[0]
    lines = [line for line in loop.splitlines() if line.strip()]
    assert "objective.backward" in loop and len(lines) < 15


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """As the README says it, on two micro-batches; a ratio of 0 draws nothing."""
    (spelling,) = re.findall(r"\*\*Accumulation\*\*.*?backward=(lambda loss: [^`]*)\)`", README)
    torch.manual_seed(0)
    model = augsub.patch(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12, num_classes=5))
    objective = augsub.SubModelObjective(torch.nn.CrossEntropyLoss(), [augsub.SubModel("masking", ratio=0.0)])
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    objective.prepare(model)
    objective.backward(model, images, labels)
    whole = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    backward = eval(spelling, {"n": 2})
    objective.backward(model, images[:4], labels[:4], backward=backward, sync=False)
    objective.backward(model, images[4:], labels[4:], backward=backward)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_the_plugin_command_trains_with_the_plugin_file(tmp_path):
    code = code_blocks("python")[3]
    name = re.match(r"# (\w+)\.py\n", code).group(1)
    (tmp_path / f"{name}.py").write_text(code)
    (command,) = [block for block in code_blocks("bash") if "plugins=" in block]
    command = (
        command.strip()
        .replace("python tools", f"{sys.executable} {ROOT}/tools")
        .replace("configs/", f"{ROOT}/configs/")
    )
    result = subprocess.run(f"{command} train.max_iters=10", shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "runs" / "token_noise" / "summary.json").exists()


def test_links_and_configs_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    configs = re.findall(r"`(\w+\.yaml)`", README)
    assert {"digits_vit.yaml", "swin_b.yaml"} <= set(configs)
    paths = [*links, *(f"configs/{config}" for config in configs if config != "config.yaml")]
    assert [path for path in paths if not os.path.exists(ROOT / path)] == []


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_quoted_run_is_that_of_the_documentation():
    (quoted,) = code_blocks("console")
    assert "held-out top-1" in quoted and quoted in (ROOT / "docs" / "first_run.md").read_text()


def test_the_quoted_accuracies_are_those_of_the_study():
    study = (ROOT / "docs" / "study_families.md").read_text()
    measured = {tuple(cells(line)[:2]): cells(line) for line in study.partition("## What can")[0].splitlines()}
    quoted = [cells(line) for line in README.splitlines() if line.startswith("| digits_")]
    assert len(quoted) == 6
    for model, training, accuracy, difference, cost in quoted:
        row = measured[model, training]
        assert [accuracy, difference, cost] == [row[3], row[4], row[8]]


def test_every_config_is_listed():
    text = README + (ROOT / "docs" / "recipes.md").read_text()
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in text] == []


def test_the_quoted_speeds_are_those_of_the_benchmark():
    section = README.partition("On an NVIDIA H200")[2].partition("## What it does")[0]
    measured = (ROOT / "docs" / "performance.md").read_text()
    quoted = re.findall(r"\b1\.\d{3}\b|\d+ images/s|(?<=step )\d+", section)
    assert len(quoted) == 14
    assert [figure for figure in quoted if figure not in measured] == []
