"""The plan of a run: right numbers, nothing trained, nothing written into the run's folder."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import timm
from PIL import Image

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_vit.yaml"


def plan(output: str) -> dict[str, str]:
    rows = re.findall(r"^  (\S.*?|  \S.*?)   +(\S.*)$", output, re.MULTILINE)
    return {name.strip(): value for name, value in rows}


def test_the_numbers_of_a_plan(train_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ("train.accumulation=5", "train.max_iters=300", "ema.enabled=true")
    code, output, _ = train_net("--config", "digits_vit", "--dry-run", *settings)
    rows = plan(output)
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
    parameters = dict(timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **size).named_parameters())
    is_decayed = {name: p.ndim > 1 and name not in ("pos_embed", "cls_token") for name, p in parameters.items()}
    for title, decay in {"weight decay 0.05": True, "no weight decay": False}.items():
        counts = [p.numel() for name, p in parameters.items() if is_decayed[name] == decay]
        assert rows[title] == f"{len(counts)} tensors, {sum(counts):,} parameters"
    assert code == 0 and rows["length"] == "15 epochs, of 60 scheduled, 300 iterations"
    assert rows["images per iteration"] == "50 = 10 x 5 accumulated x 1 process"
    assert (rows["training images"], rows["held-out images"]) == ("1,000 of 1 x 8 x 8", "797")
    sizes = {name: re.search(r"([\d.]+) (MB|GB)", text) for name, text in rows.items()}
    sizes = {name: float(size[1]) * {"MB": 1e6, "GB": 1e9}[size[2]] for name, size in sizes.items() if size}
    weights = 4 * sum(p.numel() for p in parameters.values())
    copies = {"weights": 1, "gradients": 1, "optimiser states": 2, "moving average": 1}
    assert {name: sizes[name] / weights for name in copies} == pytest.approx(copies, rel=0.01)
    assert sizes["memory per process"] == pytest.approx(5 * weights + sizes["activations"], rel=0.01)
    sub = re.match(r"[\d.]+ GFLOPs, ([\d.]+) of main", rows["sub-model masking 0.5"]).group(1)
    assert rows["training cost"].startswith(f"{1 + float(sub):.3f}")
    assert rows["learning rate, drawn"] == "runs/plan_digits_vit.png"
    assert [path.name for path in Path("runs").iterdir()] == ["plan_digits_vit.png"]
    assert Path("runs/plan_digits_vit.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plan_of_a_resumed_run_leaves_its_folder_alone(train_net, tmp_path):
    run = ("--config", DIGITS, f"output_dir={tmp_path}/run")
    assert train_net(*run, "train.max_iters=5")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, error = train_net(*run, "--dry-run")
    assert code == 2 and "holds a run already" in error  # as the run itself would end
    code, output, _ = train_net(*run, "--dry-run", "--resume", "train.max_iters=9")
    assert code == 0 and plan(output)["changed"] == "train.max_iters: 5 -> 9"
    assert f"{tmp_path}/run/checkpoints/last.pt after 5 iterations" in output
    code, _, error = train_net(*run, "--dry-run", "--resume", "seed=1")
    assert code == 2 and "--resume: seed = 1, the run has 0" in error
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


SWIN = ("--config", "swin_t", "--dry-run", "model.kwargs={depths: [1, 1, 1, 1]}")


def test_the_time_of_a_run_is_that_of_its_slower_part(train_net, tmp_path):
    settings = ("train.global_batch=8", "train.accumulation=2", "train.epochs=3000", "data.workers=1")
    root = tmp_path / "images"
    for split, name in product(("train", "val"), ("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for number in range(4):
            Image.effect_noise((1000, 1000), 50).convert("RGB").save(root / split / name / f"{number}.jpg")
    model = ("model.name=resnet10t", "model.pretrained=false", "data.image_size=64", f"output_dir={tmp_path}/run")
    code, output, error = train_net("--config", "finetune_folder", "--dry-run", f"data.root={root}", *settings, *model)
    assert code == 0, error
    rows = plan(output)
    computing = re.match(r"([\d.,]+) images/s on cpu, (\d+) ms per step, .* with 4 of 4 images", rows["computing"])
    loading = re.match(r"([\d.]+) images/s by 1 workers of ([\d.]+) images/s each", rows["loading"])
    assert float(loading[1]) == float(loading[2])
    assert float(computing[1]) == pytest.approx(8 / (float(computing[2]) / 1000), rel=0.05)
    is_limit = float(loading[1]) < float(computing[1])
    assert ("the limit" in rows["loading"]) == is_limit
    slower = 3000 * 8 / min(float(loading[1]), float(computing[1]))  # seconds
    units = {"h": 3600, "min": 60, "s": 1}
    told = sum(int(count) * units[unit] for count, unit in re.findall(r"(\d+) (h|min|s)\b", rows["time"]))
    assert told == pytest.approx(slower, rel=0.05)


@pytest.mark.slow
def test_without_its_data_a_recipe_is_planned_for_imagenet(train_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, _ = train_net(*SWIN)
    assert code == 0
    rows = plan(output)
    assert rows["data"] == "not there, counted as ImageNet-1k: data.root = imagenet: no such folder"
    assert rows["training images"] == "1,281,167 of 3 x 224 x 224" and rows["classes"] == "1000"
    assert rows["length"] == "300 epochs, 375,300 iterations" and rows["iterations per epoch"] == "1,251"
    assert "loading" not in rows and rows["computing"].endswith(" of 128 images at once")
    assert output.endswith("WARNING: data.root = imagenet: no such folder: the run itself would end here\n")


@pytest.mark.slow
def test_processes_plan_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "tools" / "train_net.py"]
    done = subprocess.run([*command, *SWIN], capture_output=True, text=True, timeout=300)
    rows = plan(done.stdout)
    assert done.returncode == 0, done.stderr
    assert rows["images per iteration"] == "1024 = 128 x 4 accumulated x 2 processes" and rows["time"]
    assert done.stdout.count("the run itself would end here") == 1


def test_a_wrong_folder_is_told_and_nothing_is_planned(train_net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command, message in {
        (*SWIN, "data.root=imagenett"): "data.root = imagenett: no such folder",
        (*SWIN, "data.root=null"): "data.root is not set",
        (*SWIN, "data.dataset=wds/a"): "data.dataset = wds/a: allowed is folder",
        ("--config", "finetune_folder", "--dry-run", "model.pretrained=false"): "data.root is not set",
    }.items():
        code, output, error = train_net(*command)
        assert (code, output) == (2, "") and error.startswith(f"error: {message}"), command
        assert "ImageNet" not in error and error.count("\n") == 1
    Path("imagenet").mkdir()  # there, and not what it should be
    code, output, error = train_net(*SWIN)
    assert (code, output) == (2, "") and error.startswith("error: data.root = imagenet: no folder for the split ")
    assert [path.name for path in tmp_path.iterdir()] == ["imagenet"]


def test_what_learns_slower_or_not_at_all_and_what_cannot_be_counted_is_in_the_plan(train_net, tmp_path):
    settings = ("optimizer.layer_decay=0.5", "model.frozen=[patch_embed]", "optimizer.name=adamp")
    code, output, _ = train_net("--config", DIGITS, "--dry-run", f"output_dir={tmp_path}/run", *settings)
    rows = plan(output)
    assert code == 0 and rows["frozen"] == "2 tensors, 320 parameters"  # 64 x 1 x 2 x 2 and 64
    assert rows["learning rate"] == "0.0312 to 1 of the schedule's, by layer"  # 0.5 ** 5
    assert rows["optimiser states"].startswith("not counted: adamp cannot step without values")
