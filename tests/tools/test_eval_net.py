"""tools/eval_net.py against evaluations written with timm alone, and as users run it."""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch.nn import functional as F

from engine.run_folder import RunFolder
from tools import eval_net
from tools.exporting import export

ROOT = Path(__file__).parents[2]
EVAL_NET = ROOT / "tools" / "eval_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
ARCHITECTURES = ("test_vit", "swin_tiny_patch4_window7_224", "test_resnet")
SMALL = {"swin_tiny_patch4_window7_224": {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}}
COUNTS = {"ant": 6, "bee": 9, "cat": 5, "dog": 7, "elk": 8, "fox": 4}  # 39 images in 6 classes


@pytest.fixture
def evaluate(call):
    """Call the tool."""
    return partial(call, eval_net)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """JPEG files of many shapes."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for brightness, (name, count) in enumerate(COUNTS.items(), start=1):
        (root / "val" / name).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 42 * brightness, (180 + 9 * index, 260 - 7 * index, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{index}.jpg")
    return root


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A short digits run with averaged weights."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config", DIGITS, f"output_dir={folder}"]
    command += ["train.max_iters=40", "train.epochs=10", "ema.enabled=true", "ema.decay=0.9", "data.workers=0"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def saved_weights(name: str, folder: Path) -> Path:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=len(COUNTS), **SMALL.get(name, {}))
    with torch.no_grad():  # a new head says nearly the same of all images
        for parameter in model.get_classifier().parameters():
            parameter.normal_()
    torch.save(model.state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def with_timm_alone(name: str, weights: Path, root: Path) -> dict[str, float]:
    model = timm.create_model(name, num_classes=len(COUNTS), checkpoint_path=str(weights), **SMALL.get(name, {})).eval()
    data = resolve_data_config({}, model=model)
    loader = create_loader(
        create_dataset("", root=str(root), split="validation"), data["input_size"], batch_size=8, use_prefetcher=False,
        interpolation=data["interpolation"], mean=data["mean"], std=data["std"], crop_pct=data["crop_pct"],
        num_workers=0, device=torch.device("cpu"),
    )  # fmt: skip
    with torch.no_grad():
        pairs = [(model(images), labels) for images, labels in loader]
    logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
    ranks = logits.argsort(dim=1, descending=True)
    return {
        "top1": 100 * (ranks[:, 0] == labels).double().mean().item(),
        "top5": 100 * (ranks[:, :5] == labels[:, None]).any(dim=1).double().mean().item(),
        "eval_loss": F.cross_entropy(logits, labels).item(),
        "images": len(labels),
    }


def make_fewer(images: Path, root: Path) -> None:
    for name in ("ant", "bee"):
        shutil.copytree(images / "val" / name, root / "val" / name)


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def arguments_for(name: str, weights: Path, images: Path) -> list[object]:
    kwargs = json.dumps(SMALL[name]).replace('"', "") if name in SMALL else "{}"
    return [
        weights, "--model", name, f"model.kwargs={kwargs}", f"data.root={images}", "data.workers=0",
        "evaluation.batch=7",
    ]  # fmt: skip


def assert_as_timm(folder: Path, expected: dict[str, float]) -> None:
    (found,) = results(folder)
    assert 0 < expected["top1"] < 100 and expected["images"] == found["images"] == 39
    for figure in ("top1", "top5"):
        assert found[figure] == pytest.approx(expected[figure])
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert [(row["class"], int(row["images"])) for row in rows(folder / "classes.csv")] == list(COUNTS.items())
    (row,) = rows(folder / "results.csv")
    assert list(row)[:9] == [
        "model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation"
    ]  # fmt: skip
    assert float(row["top1"]) == pytest.approx(expected["top1"], abs=5e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_figures_are_those_of_timm_alone(evaluate, images, tmp_path, name):
    weights = saved_weights(name, tmp_path)
    code, _, error = evaluate(*arguments_for(name, weights, images), "--output", tmp_path / "results")
    assert code == 0, error
    assert_as_timm(tmp_path / "results", with_timm_alone(name, weights, images))


@pytest.mark.parametrize(
    "name", [name if name == "test_vit" else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_two_processes_count_every_image_once(command, torchrun, images, tmp_path, name):
    """39 images: neither the batch of 7 nor the two processes divide them."""
    weights = saved_weights(name, tmp_path)
    finished = command(*torchrun, EVAL_NET, *arguments_for(name, weights, images), "--output", tmp_path / "results")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("top-1") == 1  # one process reports
    assert_as_timm(tmp_path / "results", with_timm_alone(name, weights, images))


def test_a_run_is_evaluated_as_it_was_in_training(evaluate, train_net, run_folder):
    code, output, error = evaluate(run_folder)
    assert code == 0, error
    folder = run_folder / "evaluation" / "best"
    assert str(folder) in output and "averaged" in output
    trained, averaged = results(folder)
    _, printed, _ = train_net(
        "--config", DIGITS, "--eval-only", f"evaluation.checkpoint={run_folder}/checkpoints/best.pt"
    )
    expected = json.loads(printed[printed.index("{") :])
    for name in ("top1", "top5", "eval_loss", "images"):
        assert trained[name] == pytest.approx(expected[name]) and averaged[name] == pytest.approx(
            expected[f"ema_{name}"]
        )
    for one, weights in ((trained, "trained"), (averaged, "averaged")):
        classes = [row for row in rows(folder / "classes.csv") if row["weights"] == weights]
        hits = sum(int(row["images"]) * float(row["top1"]) for row in classes)
        assert hits / sum(int(row["images"]) for row in classes) == pytest.approx(one["top1"], abs=1e-3)
        assert sum(one["calibration"]["images"]) == 797
    for picture in ("confusion.png", "calibration.png", "ema_confusion.png", "ema_calibration.png"):
        with Image.open(folder / picture) as opened:
            assert min(opened.size) > 500


def test_ratio_zero_is_the_main_model(evaluate, run_folder, tmp_path):
    assert evaluate(run_folder, "--ratios", "0.75,0,0.25", "--output", tmp_path / "first")[0] == 0
    trained = results(tmp_path / "first")[0]
    by_ratio = {sub["ratio"]: sub["figures"] for sub in trained["sub_models"]}
    assert by_ratio[0.0] == {name: trained[name] for name in by_ratio[0.0]}
    assert by_ratio[0.75]["top1"] < by_ratio[0.0]["top1"]
    assert (tmp_path / "first" / "ratios.png").exists()
    found = rows(tmp_path / "first" / "sub_models.csv")
    assert [(row["sub_model"], row["ratio"]) for row in found if row["weights"] == "trained"] == [
        ("masking", "0.75"), ("masking", "0.0"), ("masking", "0.25")
    ]  # fmt: skip
    in_short = "augsub.sub_models=[{augmentations: [masking]}]"
    assert evaluate(run_folder, "--ratios", "0.75,0,0.25", in_short, "--output", tmp_path / "short")[0] == 0
    assert results(tmp_path / "short") == results(tmp_path / "first")
    assert evaluate(run_folder, "--sub-model", "--augsub", "drop_path", "--output", tmp_path / "other")[0] == 0
    (sub,) = results(tmp_path / "other")[0]["sub_models"]
    assert (sub["name"], sub["ratio"]) == ("drop_path", 0.5) and sub["figures"]["eval_loss"] != trained["eval_loss"]


def test_exported_weights_and_another_image_size(evaluate, run_folder, tmp_path):
    weights = tmp_path / "digits.safetensors"
    export(run_folder / "checkpoints" / "last.pt", weights, ema=False)
    model = [
        "--model", "vit_tiny_patch16_224", "data.dataset=digits", "data.image_size=8",
        "model.kwargs={patch_size: 2, embed_dim: 64, depth: 4, num_heads: 4}",
    ]  # fmt: skip
    assert evaluate(weights, *model, "--output", tmp_path / "plain")[0] == 0
    assert evaluate(run_folder / "checkpoints" / "last.pt", "--output", tmp_path / "ours")[0] == 0
    assert results(tmp_path / "plain")[0] == results(tmp_path / "ours")[0]
    assert evaluate(run_folder, "data.image_size=12", "--output", tmp_path / "larger")[0] == 0  # positions are resized
    assert rows(tmp_path / "larger" / "results.csv")[0]["img_size"] == "12"


@pytest.mark.slow
def test_a_sharded_checkpoint_of_a_run(evaluate, command, torchrun, tmp_path):
    finished = command(
        *torchrun, ROOT / "tools" / "train_net.py", "--config", DIGITS, f"output_dir={tmp_path}/run",
        "train.max_iters=4", "distributed.strategy=fsdp2",
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for what in ("run", "run/checkpoints/last.pt"):
        code, _, error = evaluate(tmp_path / what, "--output", tmp_path / "results")
        assert code == 0, error
        assert results(tmp_path / "results")[0]["top1"] == pytest.approx(summary["top1"], abs=0.13)


def test_a_pretrained_model_by_its_name(evaluate, images, tmp_path):
    source = timm.create_model("test_resnet", num_classes=len(COUNTS))
    timm.models.save_for_hf(source, tmp_path / "hub", model_config={"num_classes": len(COUNTS)})
    name = f"local-dir:{tmp_path / 'hub'}"
    code, output, error = evaluate(name, f"data.root={images}", "--output", tmp_path / "results", "data.workers=0")
    assert code == 0, error
    assert "timm's pretrained weights" in output and results(tmp_path / "results")[0]["images"] == 39
    make_fewer(images, tmp_path / "fewer")
    code, _, error = evaluate(name, f"data.root={tmp_path}/fewer", "--output", tmp_path / "no")
    assert code == 2 and f"{name} is pretrained for 6 classes, the data have 2" in error
    assert not (tmp_path / "no").exists()


def test_a_run_in_progress_is_evaluated_and_said_to_be_in_progress(evaluate, run_folder, tmp_path, caplog):
    live = tmp_path / "live"
    shutil.copytree(run_folder / "checkpoints", live / "checkpoints")
    hold = (
        "import sys; from engine.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]).opened('', is_resumed=True):\n"
        "    print(flush=True), input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold, live], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as run:
        run.stdout.readline()
        with caplog.at_level(logging.INFO):
            assert evaluate(live)[0] == 0
        assert f"{live}: the run is in progress; this is its best checkpoint so far" in caplog.text
        for checkpoint in (live / "checkpoints").iterdir():
            checkpoint.unlink()
        assert evaluate(live)[2] == f"error: {live}: the run has no checkpoint yet, it is in progress\n"
        run.communicate(b"\n")
    assert not RunFolder(live).writer()
    assert evaluate(live)[2] == f"error: {live}: the run has no checkpoint\n"


def test_a_checkpoint_does_not_say_which_code_runs(evaluate, run_folder, tmp_path, monkeypatch):
    state = torch.load(run_folder / "checkpoints" / "last.pt", weights_only=True)
    state["config"] = state["config"].replace("plugins: []", "plugins: [intruder]")
    torch.save(state, tmp_path / "last.pt")
    (tmp_path / "intruder.py").write_text("open('sentinel', 'w')")
    monkeypatch.chdir(tmp_path)
    assert evaluate("last.pt", "--output", "results")[0] == 0
    assert "intruder" in state["config"] and not (tmp_path / "sentinel").exists()
    assert evaluate("last.pt", "--output", "results", "plugins=[intruder]")[0] == 0  # the user may
    assert (tmp_path / "sentinel").exists()


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("test_vit.pth", [], "test_vit.pth holds no configuration: say which model these weights are of, --model NAME"),
        ("test_vit.pth", ["--model", "test_vut"], "timm has no model 'test_vut', did you mean 'test_vit'?"),
        ("test_vit.pth", ["--model", "resnet18"], "test_vit.pth is of another model"),
        ("test_vit.pth", ["--model", "test_vit", "data.root=FEWER"], "test_vit.pth is for 6 classes, the data have 2"),
        ("test_vit.pth", ["--model", "test_vit", "data.eval_split=holdout"], "no folder for the split holdout"),
        ("test_vit.pth", ["--model", "test_vit", "data.dataset=foo"], "data.dataset = foo: allowed is folder, digits"),
        ("test_vit.pth", ["--model", "test_vit", "--variant", "w2"], "--variant w2: allowed is real, v2, a, r, sketch"),
        ("test_vit.pth", ["--model", "test_vit", "--variant", "v2"], "--variant v2 has 1000 class folders: 1000 are"),
        ("nothing.pth", [], "nothing.pth: no such file or folder"),
        ("nothing.pth", ["--model", "test_vit"], "nothing.pth: no such file of weights"),
        (".", [], "neither the folder of a run nor a checkpoint"),
        ("RUN", ["--ratios", "0,1"], "--ratios 0,1: 1 is not in [0, 1)"),
        ("RUN", ["--ratios", "0;0.5"], "--ratios 0;0.5: allowed are numbers in [0, 1)"),
        ("RUN", ["--augsub", "masking", "--ratios", "0.99"], "sub-models: 8 x 8 pixels do not fit: "),
        ("RUN", ["--augsub", "maskin"], "--augsub maskin: unknown augmentation 'maskin', did you mean 'masking'?"),
        ("RUN", ["--sub-model", "augsub.sub_models=[]"], "--sub-model: the configuration has none"),
        ("RUN", ["--variant", "a"], "--variant a: is read from folders, not from data.dataset = digits"),
        ("RUN", ["data.sise=3"], "override 'data.sise=3'"),
        ("RUN", ["--output", "test_vit.pth/results"], "--output test_vit.pth/results cannot be written: "),
    ],
)
def test_bad_input_ends_in_one_line(evaluate, images, run_folder, tmp_path, monkeypatch, what, options, message):
    saved_weights("test_vit", tmp_path)
    make_fewer(images, tmp_path / "fewer")
    monkeypatch.chdir(tmp_path)
    options = [option.replace("FEWER", str(tmp_path / "fewer")) for option in options]
    data = [] if what == "RUN" or any("data.root" in option for option in options) else [f"data.root={images}"]
    code, _, error = evaluate(run_folder if what == "RUN" else what, *options, *data)
    assert code == 2
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
