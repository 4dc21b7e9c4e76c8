"""tools/eval_net.py against evaluations written with timm alone; where its results go; what it refuses."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from timm.data import ImageNetInfo, create_dataset, create_loader, resolve_data_config
from torch.nn import functional as F

import augsub
from engine import defaults
from engine.checkpoint import load
from engine.config_file import load_config
from engine.data.source import build_digits
from engine.distributed import Process
from engine.evaluation.run import LONGEST, folder_for
from models.complexity import count_forward
from tools import compare_runs, eval_net
from tools.exporting import export

ROOT = Path(__file__).parents[2]
EVAL_NET = ROOT / "tools" / "eval_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
SHORT = ("ema.enabled=true", "ema.decay=0.9", "data.workers=0", "evaluation.batch=800", "model.kwargs.depth=1")
COUNTS = {"ant": 6, "bee": 9, "cat": 5, "dog": 7, "elk": 8, "fox": 4}  # 39 images in 6 classes


@pytest.fixture
def call_tool(call):
    """Call the tool."""
    return partial(call, eval_net)


@pytest.fixture
def evaluate(call_tool):
    """Call the tool, which must succeed; returns what it printed."""

    def evaluated(*arguments: object) -> str:
        code, output, error = call_tool(*arguments)
        assert code == 0, error
        return output

    return evaluated


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
def trained(tmp_path_factory) -> Path:
    """A short digits run with averaged weights, whose last checkpoint is its best one."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    config = load_config(DIGITS, [*SHORT, "train.max_iters=40", "train.epochs=10", f"output_dir={folder}"])
    defaults.train(config, Process(0, 1, torch.device("cpu")), resume=False)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "run")


def saved_weights(name: str, folder: Path) -> Path:
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=len(COUNTS))
    with torch.no_grad():  # a new head says nearly the same of all images
        for parameter in model.get_classifier().parameters():
            parameter.normal_()
    torch.save(model.state_dict(), folder / f"{name}.pth")
    return folder / f"{name}.pth"


def with_timm_alone(name: str, weights: Path, root: Path) -> dict[str, float]:
    model = timm.create_model(name, num_classes=len(COUNTS), checkpoint_path=str(weights)).eval()
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
        "predictions": [
            (true, predicted) for true, predicted in zip(labels.tolist(), ranks[:, 0].tolist(), strict=True)
        ],
    }


def make_fewer(images: Path, root: Path) -> None:
    for name in ("ant", "bee"):
        shutil.copytree(images / "val" / name, root / "val" / name)


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["test_resnet", pytest.param("test_vit in two processes", marks=pytest.mark.slow)])
def test_the_figures_are_those_of_timm_alone(evaluate, command, torchrun, images, tmp_path, name):
    """39 images: neither the batch of 7 nor the two processes divide them."""
    name, *in_two_processes = name.split(" ", 1)
    weights, folder = saved_weights(name, tmp_path), tmp_path / "results"
    arguments = [weights, "--model", name, f"data.root={images}", "data.workers=0", "evaluation.batch=7"]
    if in_two_processes:
        finished = command(*torchrun, EVAL_NET, *arguments, "--output", folder)
        assert finished.returncode == 0, finished.stderr
        assert finished.stdout.count("cross_entropy") == 1  # one process reports
    else:
        evaluate(*arguments, "--output", folder)
    (found,), expected = results(folder), with_timm_alone(name, weights, images)
    assert 0 < expected["top1"] < 100 and expected["images"] == found["images"] == 39
    assert [found["top1"], found["top5"]] == pytest.approx([expected["top1"], expected["top5"]])
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    assert [(row["class"], int(row["images"])) for row in rows(folder / "classes.csv")] == list(COUNTS.items())
    names, found = [*COUNTS], rows(folder / "predictions.csv")
    assert [(row["true"], row["predicted"]) for row in found] == [
        (names[true], names[predicted]) for true, predicted in expected["predictions"]
    ]
    assert [row["image"] for row in found] == [*map(str, range(39))]
    (row,) = rows(folder / "results.csv")
    timms = ["model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation"]
    assert list(row)[:9] == timms and float(row["top1"]) == pytest.approx(expected["top1"], abs=5e-4)


def test_a_run_is_evaluated_as_it_was_in_training(evaluate, train_net, run):
    folder = run / "evaluation" / "best"
    output = evaluate(run)
    assert str(folder) in output and "averaged" in output
    trained, averaged = results(folder)
    _, printed, _ = train_net(
        "--config", DIGITS, *SHORT, "--eval-only", f"evaluation.checkpoint={run}/checkpoints/best.pt"
    )
    expected = json.loads(printed[printed.index("{") :])
    assert expected.keys() == {prefix + name for prefix in ("", "ema_") for name in FIGURES}
    summary = json.loads((run / "summary.json").read_text())
    for name in FIGURES:
        assert expected[name] == pytest.approx(summary[name])
        assert trained[name] == pytest.approx(expected[name])
        assert averaged[name] == pytest.approx(expected[f"ema_{name}"])
    for one, weights in ((trained, "trained"), (averaged, "averaged")):
        classes = [row for row in rows(folder / "classes.csv") if row["weights"] == weights]
        hits = sum(int(row["images"]) * float(row["top1"]) for row in classes)
        assert hits / sum(int(row["images"]) for row in classes) == pytest.approx(one["top1"], abs=1e-3)
        assert sum(one["calibration"]["images"]) == 797
    for picture in ("confusion.png", "calibration.png", "ema_confusion.png", "ema_calibration.png"):
        with Image.open(folder / picture) as opened:
            assert min(opened.size) > 500


FIGURES = ("top1", "top5", "eval_loss", "images", "balanced_accuracy")


@pytest.mark.slow
def test_features_are_judged_as_scikit_learn_judges_them(evaluate, call_tool, run, images, tmp_path):
    """Of trained and averaged weights."""
    printed = evaluate(run, "--features", "knn,linear")
    folder = run / "evaluation" / "best_features=knn,linear"
    state, source = load(run / "checkpoints" / "best.pt"), build_digits(8)
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 1, "num_heads": 4}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **size).eval()
    for found, weights in zip(results(folder), (state["model"], state["hooks"]["ema"]["model"]), strict=True):
        model.load_state_dict(weights)
        with torch.no_grad():
            (known, answers), (asked, right) = (
                (model.forward_features(values)[:, 0].numpy(), labels.numpy())
                for values, labels in (source.train.tensors, source.held_out.tensors)
            )
        knn = KNeighborsClassifier(20, metric="cosine").fit(known, answers).score(asked, right)
        scaler = StandardScaler().fit(known)
        linear = LogisticRegression(max_iter=1000).fit(scaler.transform(known), answers)
        expected = 100 * np.array([knn, linear.score(scaler.transform(asked), right)])
        assert (found["knn_top1"], found["linear_top1"]) == pytest.approx(tuple(expected), abs=0.3)  # two images
    assert "knn_top1" in printed and rows(folder / "results.csv")[0]["linear_top1"]
    code, _, error = call_tool(run, "--features", "knn", "--variant", "corrupted")
    assert code == 2 and "--features: not with --variant corrupted, which has no training images" in error
    code, _, error = call_tool(run, "--features", "knn,lin")
    assert code == 2 and error == "error: --features knn,lin: allowed are knn, linear\n"


@pytest.mark.slow
def test_features_of_training_photographs_are_those_of_an_evaluation(evaluate, images, tmp_path):
    shutil.copytree(images / "val", images / "train")
    model = ("--model", "test_resnet", f"data.root={images}", "data.workers=0", "--output", tmp_path / "same")
    evaluate(saved_weights("test_resnet", tmp_path), *model, "--features", "linear")
    assert results(tmp_path / "same")[0]["linear_top1"] == 100  # each held-out image is a training image
    shutil.rmtree(images / "train")


def test_a_split_that_is_asked_for_is_evaluated_after_training_with_a_share(
    evaluate, train_net, image_folder, tmp_path
):
    data = ("data.dataset=folder", f"data.root={image_folder}", "data.validation_share=0.5", "data.workers=0")
    run = ("--config", DIGITS, *data, "model.kwargs.depth=1", "train.max_iters=1", "train.global_batch=4")
    assert train_net(*run, f"output_dir={tmp_path}/run")[0] == 0
    held_out = {}
    for split in ("", "data.eval_split=val"):
        evaluate(tmp_path / "run", *filter(None, [split]), "--output", tmp_path / f"found{split}")
        held_out[split] = json.loads((tmp_path / f"found{split}" / "results.json").read_text())["results"][0]["images"]
    found = [len([*(image_folder / split).rglob("*.jpg")]) for split in ("train", "val")]
    assert [*held_out.values()] == [found[0] // 2, found[1]]


def test_ratio_zero_is_the_main_model(evaluate, trained, tmp_path):
    evaluate(trained, "--ratios", "0.75,0", "--output", tmp_path / "first")
    first = results(tmp_path / "first")[0]
    by_ratio = {sub["ratio"]: sub["figures"] for sub in first["sub_models"]}
    assert by_ratio[0.0] == {name: first[name] for name in by_ratio[0.0]}
    assert by_ratio[0.75]["top1"] < by_ratio[0.0]["top1"] and (tmp_path / "first" / "ratios.png").exists()
    found = [row for row in rows(tmp_path / "first" / "sub_models.csv") if row["weights"] == "trained"]
    assert [(row["sub_model"], row["ratio"]) for row in found] == [("masking", "0.75"), ("masking", "0.0")]
    in_short = "augsub.sub_models=[{augmentations: [masking]}]"
    evaluate(trained, "--ratios", "0.75,0", in_short, "--output", tmp_path / "short")
    assert results(tmp_path / "short") == results(tmp_path / "first")
    evaluate(trained, "--sub-model", "--augsub", "drop_path", "--output", tmp_path / "other")
    (sub,) = results(tmp_path / "other")[0]["sub_models"]
    assert (sub["name"], sub["ratio"]) == ("drop_path", 0.5) and sub["figures"]["eval_loss"] != first["eval_loss"]


def test_forwards_are_timed_and_counted(evaluate, trained, tmp_path):
    printed = evaluate(trained, "--ratios", "0.25,0.5,0.75", "--speed", "--output", tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        main = next(csv.DictReader(file))
    with (tmp_path / "sub_models.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["weights"] == "trained"]
    model = augsub.patch(
        timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=10,
            in_chans=1,
            img_size=8,
            patch_size=2,
            embed_dim=64,
            depth=1,
            num_heads=4,
        )
    )
    for row, augmentation in zip(
        [main, *rows], [None, *(augsub.build("masking", ratio=float(row["ratio"])) for row in rows)], strict=True
    ):
        counted = count_forward(model.eval(), (1, 1, 8, 8), augmentation)
        assert float(row["infer_gmacs"]) == pytest.approx(counted.flops / 1e9, rel=1e-4)
        rate, milliseconds = float(row["infer_samples_per_sec"]), float(row["infer_step_time"])
        assert row["infer_batch_size"] == "32" and rate == pytest.approx(32 / milliseconds * 1e3, rel=0.01)
        assert 0 < float(row["infer_latency"]) < milliseconds
    budget = printed.partition("best for a budget")[2].split("\n\n")[0]
    within = [row for row in rows if float(row["infer_gmacs"]) <= 0.5 * float(main["infer_gmacs"])]
    best = max(within, key=lambda row: float(row["top1"]))
    assert re.search(rf"50 % +masking +{float(best['ratio']):g} +{float(best['top1']):g}", budget)
    assert Image.open(tmp_path / "elastic.png").size[0] > 800


@pytest.mark.slow
def test_exported_weights_and_another_image_size(evaluate, trained, tmp_path):
    weights = tmp_path / "digits.safetensors"
    export(trained / "checkpoints" / "last.pt", weights, ema=False)
    model = [
        "--model", "vit_tiny_patch16_224", "data.dataset=digits", "data.image_size=8", "evaluation.batch=800",
        "model.kwargs={patch_size: 2, embed_dim: 64, depth: 1, num_heads: 4}",
    ]  # fmt: skip
    evaluate(weights, *model, "--output", tmp_path / "plain")
    evaluate(trained / "checkpoints" / "last.pt", "--output", tmp_path / "ours")
    (plain,), (ours, _) = results(tmp_path / "plain"), results(tmp_path / "ours")
    assert plain == ours
    evaluate(trained, "data.image_size=12", "--output", tmp_path / "larger")  # positions are resized
    assert rows(tmp_path / "larger" / "results.csv")[0]["img_size"] == "12"


def test_a_pretrained_model_by_its_name(evaluate, call_tool, images, tmp_path):
    source = timm.create_model("test_resnet", num_classes=len(COUNTS))
    timm.models.save_for_hf(source, tmp_path / "hub", model_config={"num_classes": len(COUNTS)})
    name = f"local-dir:{tmp_path / 'hub'}"
    output = evaluate(name, f"data.root={images}", "--output", tmp_path / "results", "data.workers=0")
    assert "timm's pretrained weights" in output and results(tmp_path / "results")[0]["images"] == 39
    make_fewer(images, tmp_path / "fewer")
    code, _, error = call_tool(name, f"data.root={tmp_path}/fewer", "--output", tmp_path / "no")
    assert code == 2 and f"{name} is pretrained for 6 classes, the data have 2" in error
    assert not (tmp_path / "no").exists()


def test_a_checkpoint_does_not_say_which_code_runs(evaluate, trained, tmp_path, monkeypatch):
    state = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    state["config"] = state["config"].replace("plugins: []", "plugins: [intruder]")
    torch.save(state, tmp_path / "last.pt")
    (tmp_path / "intruder.py").write_text("open('sentinel', 'w')")
    monkeypatch.chdir(tmp_path)
    evaluate("last.pt", "--output", "results")
    assert "intruder" in state["config"] and not (tmp_path / "sentinel").exists()
    evaluate("last.pt", "--output", "results", "plugins=[intruder]")  # the user may
    assert (tmp_path / "sentinel").exists()


@pytest.mark.slow
def test_a_variant_is_compared_with_clean_images_of_its_classes(evaluate, tmp_path):
    """A model that answers one class whatever it sees is as right as that class is frequent."""
    info = ImageNetInfo()
    synsets = [info.index_to_label_name(number) for number in range(1000)]
    own = (files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()
    model = timm.create_model("test_vit")
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias[[synsets.index(own[7]), synsets.index("n01440764")]] = torch.tensor([1.0, 2.0])  # not in a
    assert "n01440764" not in own
    torch.save(model.state_dict(), tmp_path / "model.pth")
    Image.new("RGB", (32, 32), "red").save(tmp_path / "0.png")
    for folder, names in (("a", own), ("imagenet/val", synsets)):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            for number in range(3 if folder != "a" and name == own[7] else 1):
                os.link(tmp_path / "0.png", tmp_path / folder / name / f"{number}.png")
    size = ("data.image_size=32", "data.workers=0", f"data.root={tmp_path / 'a'}")
    variant = ("--variant", "a", "--clean", str(tmp_path / "imagenet"))
    results = tmp_path / "results"
    output = evaluate(tmp_path / "model.pth", "--model", "test_vit", *variant, "--output", results, *size)
    (result,) = json.loads((results / "results.json").read_text())["results"]
    assert result["top1"] == pytest.approx(100 / 200) and result["clean"]["top1"] == pytest.approx(300 / 202)
    (row,) = csv.DictReader((results / "results.csv").open())
    assert float(row["difference"]) == pytest.approx(100 / 200 - 300 / 202, abs=2e-3)
    assert "difference" in output


FILE = ("test_vit.pth", "--model", "test_vit")
REFUSED = {
    ("test_vit.pth",): "test_vit.pth holds no configuration: say which model these weights are of, --model NAME",
    ("test_vit.pth", "--model", "resnet18"): "test_vit.pth is of another model",
    (*FILE, "data.root=fewer"): "test_vit.pth is for 6 classes, the data have 2",
    (*FILE, "--variant", "w2"): "--variant w2: allowed is real, v2, a, r, sketch",
    (*FILE, "--variant", "v2"): "an image must lie directly in a class folder of",
    ("nothing.pth",): "nothing.pth: no such file or folder",
    ("nothing.pth", "--model", "test_vit"): "nothing.pth: no such file or folder",
    (".",): "neither a checkpoint nor the folder of a run that has one",
    ("RUN", "--ratios", "0,1"): "augsub.sub_models: masking: ratio = 1.0, allowed is a number in [0, 1)",
    ("RUN", "--ratios", "0;0.5"): "--ratios 0;0.5: could not convert string to float",
    ("RUN", "--augsub", "masking", "--ratios", "0.99"): "8 x 8 pixels do not fit: ",
    ("RUN", "--augsub", "maskin"): "--augsub maskin: unknown augmentation 'maskin', did you mean 'masking'?",
    ("RUN", "--sub-model", "augsub.sub_models=[]"): "--sub-model: the configuration has none",
    ("RUN", "--clean", "."): "--clean: goes with --variant v2, a, r, sketch, objectnet, not with plain evaluation",
    ("RUN", "--variant", "a"): "--variant a: is read from folders, not from data.dataset = digits",
    ("RUN", "--output", "test_vit.pth/results"): "--output test_vit.pth/results cannot be written: ",
}


def test_bad_input_ends_in_one_line(call_tool, images, trained, tmp_path, monkeypatch):
    saved_weights("test_vit", tmp_path)
    make_fewer(images, tmp_path / "fewer")
    monkeypatch.chdir(tmp_path)
    for arguments, message in REFUSED.items():
        data = [] if arguments[0] == "RUN" or "data.root=fewer" in arguments else [f"data.root={images}"]
        code, _, error = call_tool(*(trained if word == "RUN" else word for word in arguments), *data)
        assert code == 2 and message in error, (arguments, error)
        assert error.startswith("error: ") and error.count("\n") == 1


def test_another_evaluation_goes_to_another_folder(evaluate, run):
    kept: dict[Path, bytes] = {}
    for name, arguments in {
        "best": [],
        "best_data.image_size=12": ["data.image_size=12"],
        "best_speed": ["--speed"],
        "best_augsub=masking_ratios=0,0.5": ["--augsub", "masking", "--ratios", "0,0.5"],
    }.items():
        folder = run / "evaluation" / name
        assert evaluate(run, *arguments).endswith(f"results in {folder}\n")
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept |= {path: path.read_bytes() for path in folder.iterdir()}
    (folder / "notes.txt").touch()  # the user's; the same folder again holds one evaluation
    evaluate(run / "checkpoints" / "last.pt", "--output", folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in kept if path.parent.name == "best"} | {
        "notes.txt"
    }


def test_files_that_are_no_evaluations_stay(call_tool, run, tmp_path):
    (tmp_path / "predictions.csv").write_text("mine")
    code, _, error = call_tool(run, "--output", tmp_path)
    assert code == 2 and f"--output {tmp_path}: has predictions.csv and no results.json of an evaluation" in error
    assert (tmp_path / "predictions.csv").read_text() == "mine"


def folder_of(*asked: str) -> Path:
    return folder_for("runs/X", Path("runs/X/checkpoints/best.pt"), asked)


def test_the_name_of_the_folder_tells_what_was_asked_for():
    assert folder_of() == Path("runs/X/evaluation/best")
    assert folder_of("data.eval_split=test").name == "best_data.eval_split=test"
    assert folder_of("b=2", "a=1") == folder_of("a=1", "b=2")
    assert folder_of("data.root=/a/b").name == "best_data.root=%2Fa%2Fb"
    assert folder_for("a", None, []) == Path("runs/evaluation/a")
    assert len({folder_for(name, Path(name), []) for name in ("a/model.pt", "b/model.pt", "../a/model.pt")}) == 3
    others = [f"data.root=/data/{'x' * 300}/{end}" for end in ("one", "two")]
    others += ["data.root=画", "data.root=图", "model.kwargs={a: 1}", "model.kwargs={a; 1}"]
    names = [folder_of(other).name for other in others]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) <= LONGEST + 9 and "/" not in name for name in names)


def test_it_is_said_which_checkpoint_is_reported(evaluate, call, train_net, trained, run, caplog, tmp_path):
    """The best one here, the last one by compare_runs.py; where both are one there is nothing to say."""
    said = f"{run}: this is its best checkpoint; summary.json and compare_runs.py report the last one"
    with caplog.at_level(logging.INFO):
        evaluate(trained, "--output", tmp_path / "results")
        assert "best checkpoint" not in caplog.text
        arguments = ["--config", DIGITS, *SHORT, "train.epochs=10", "train.max_iters=42", f"output_dir={run}"]
        assert train_net(*arguments, "--resume", "optimizer.lr=1e-1")[0] == 0  # it gets worse
        evaluate(run)
        assert said in caplog.text
    best, last = (json.loads((run / "summary.json").read_text())[name] for name in ("best_value", "top1"))
    assert best > last and results(run / "evaluation" / "best")[0]["top1"] == pytest.approx(best, abs=0.13)
    evaluate(run / "checkpoints" / "last.pt")
    assert results(run / "evaluation" / "last")[0]["top1"] == pytest.approx(last, abs=0.13)
    other = shutil.copytree(run, run.with_name("other"))
    config = (run / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("main_weight: 0.5", "main_weight: 0.6"))
    summary = json.loads((other / "summary.json").read_text())  # of a run whose last loss overflowed
    (other / "summary.json").write_text(json.dumps({**summary, "main_loss": None}))
    code, printed, error = call(compare_runs, run, other)
    assert code == 0, error
    assert f"**{last:.2f}**" in printed and "of the runs' last checkpoints, not of their best ones" in printed


def test_neither_tool_gives_figures_of_nan(call_tool, train_net, trained, tmp_path):
    state = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    state["hooks"]["ema"]["model"]["head.bias"][3] = torch.nan
    torch.save(state, tmp_path / "spoilt.pt")
    for code, output, error in (
        train_net("--config", DIGITS, *SHORT, "--eval-only", f"evaluation.checkpoint={tmp_path}/spoilt.pt"),
        call_tool(tmp_path / "spoilt.pt", "--output", tmp_path / "results"),
    ):
        message = "error: evaluation: logits of the averaged weights are NaN or infinite for 797 of 797 images\n"
        assert (code, error) == (2, message) and "{" not in output
    assert not list((tmp_path / "results").iterdir())
