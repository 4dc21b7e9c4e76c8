"""tools/predict.py: probabilities against timm alone, whatever the model comes as and the images are named by."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pytest
import timm
import torch
from PIL import Image
from pyarrow import parquet
from timm.data import create_transform
from timm.models.vision_transformer import checkpoint_filter_fn

import tools.train_net
from engine.checkpoint import load
from engine.distributed import Process
from tools import eval_net, export, predict
from tools.predicting import Predictions, load_predictor

SETTINGS = ("--config", "finetune_folder", "model.name=test_vit", "model.pretrained=false", "data.image_size=32",
            "data.workers=0", "train.epochs=2", "train.global_batch=8")  # fmt: skip
NAMES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of a few steps on tiny images of cats, dogs and foxes, and the images."""
    import numpy as np

    folder, rng = tmp_path_factory.mktemp("predict"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for brightness, name in enumerate(NAMES, start=1):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 85 * brightness, (40, 60, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    run = (f"data.root={folder}/images", f"output_dir={folder}/run")
    assert tools.train_net.main([*SETTINGS, *run]) == 0
    return folder


def expected(folder: Path, path: str, flips: bool = False, size: int = 32) -> torch.Tensor:
    """Probabilities by timm's model and transform alone."""
    weights = load(folder / "run" / "checkpoints" / "best.pt")["model"]
    model = timm.create_model("test_vit", num_classes=3, img_size=size).eval()
    model.load_state_dict(checkpoint_filter_fn(weights, model))  # positions are resized
    own = model.pretrained_cfg
    transform = create_transform(
        (3, size, size), mean=own["mean"], std=own["std"], crop_pct=own["crop_pct"], interpolation=own["interpolation"]
    )
    image = transform(Image.open(path).convert("RGB"))[None]
    with torch.no_grad():
        found = model(image).softmax(1)[0]
        return (found + model(image.flip(-1)).softmax(1)[0]) / 2 if flips else found


def rows_of(file: Path) -> list[dict]:
    if file.suffix == ".parquet":
        return parquet.read_table(file).to_pylist()
    text = file.read_text().splitlines()
    return list(csv.DictReader(text)) if file.suffix == ".csv" else [json.loads(line) for line in text]


def assert_right(folder: Path, rows: list[dict], top_k: int, flips: bool = False, names=NAMES) -> None:
    for row in rows:
        values, classes = expected(folder, row["path"], flips).topk(top_k)
        assert [row[f"class_{rank}"] for rank in range(1, top_k + 1)] == [names[label] for label in classes]
        found = [float(row[f"probability_{rank}"]) for rank in range(1, top_k + 1)]
        torch.testing.assert_close(torch.tensor(found), values, atol=2e-4, rtol=0)
        assert len(row) == 2 + 2 * top_k


@pytest.mark.parametrize(
    ("suffix", "flips"),
    [("csv", False), *(pytest.param(*of, marks=pytest.mark.slow) for of in (("jsonl", True), ("parquet", False)))],
)
def test_a_run_on_a_folder_gives_timms_probabilities_and_goes_on_where_it_was(call, trained, tmp_path, suffix, flips):
    output, images = tmp_path / f"out.{suffix}", tmp_path / "images"
    shutil.copytree(trained / "images" / "val", images)
    command = (trained / "run", images, "--top-k", 2, "--output", output, "data.workers=0", *["--flips"] * flips)
    code, printed, error = call(predict, *command)
    assert code == 0 and f"9 images in {output}" in printed, error
    rows = rows_of(output)
    assert [row["path"] for row in rows] == [str(images / name / f"{n}.png") for name in NAMES for n in range(3)]
    assert_right(trained, rows, 2, flips)
    if suffix == "csv":
        first = f"{images}/cat/0.png,"
        output.write_text(output.read_text().replace(f"{first}{rows[0]['class_1']}", f"{first}was here"))
        shutil.copy(images / "dog" / "0.png", images / "dog" / "10.png")
        assert call(predict, *command)[0] == 0
        again = rows_of(output)
        assert again[0]["class_1"] == "was here" and again[-1]["path"] == str(images / "dog" / "10.png")
        assert again[1:-1] == rows[1:]
        code, _, error = call(predict, *command[:3], 3, *command[4:])
        assert code == 2 and f"--output {output}: has 2 classes of each image, not 3" in error


def test_what_was_interrupted_goes_on_even_after_half_a_line(call, trained, tmp_path):
    images, output = trained / "images" / "val", tmp_path / "out.jsonl"
    done = {"path": str(images / "cat" / "1.png"), "class_1": "was here", "probability_1": 1.0}
    (tmp_path / ".out.jsonl.part-3-77.jsonl").write_text(f'{json.dumps(done)}\n{{"path": "/half')
    assert call(predict, trained / "run", images, "--top-k", 1, "--output", output, "data.workers=0")[0] == 0
    rows = {row["path"]: row for row in rows_of(output)}
    assert len(rows) == 9 and rows[done["path"]] == done and [*tmp_path.iterdir()] == [output]


def test_a_table_and_single_files_are_images_too_and_without_output_a_table_is_printed(call, trained, tmp_path):
    images = trained / "images" / "val"
    (images / "list.csv").write_text("number,path\n1,cat/0.png\n2,fox/2.png\n")
    parquet.write_table(pyarrow.table({"path": ["dog/1.png"]}), images / "list.parquet")
    places = (images / "list.csv", images / "list.parquet", images / "cat" / "0.png")
    code, printed, error = call(predict, trained / "run", *places, "data.workers=0")
    assert code == 0, error
    lines = [line.split() for line in printed.splitlines() if "images" in line]
    assert [Path(line[0]).parent.name for line in lines] == ["cat", "fox", "dog"]
    best = expected(trained, str(images / "fox" / "2.png"))
    assert lines[1][1:3] == [NAMES[best.argmax()], f"{best.max():.3f}"]


def test_images_of_another_size(call, trained, tmp_path):
    image, output = trained / "images" / "val" / "cat" / "0.png", tmp_path / "out.csv"
    code, _, error = call(predict, trained / "run", image, "data.image_size=64", "--output", output, "data.workers=0")
    assert code == 0, error
    best = expected(trained, str(image), size=64)
    assert float(rows_of(output)[0]["probability_1"]) == pytest.approx(best.max().item(), abs=2e-4)
    assert abs(best - expected(trained, str(image))).max() > 1e-3


def test_predictions_of_another_model_are_not_taken_for_this_ones(call, trained, tmp_path):
    """A run that was trained on keeps its name: its weights are what counts."""
    checkpoint, images, output = tmp_path / "best.pt", trained / "images" / "val", tmp_path / "out.csv"
    shutil.copy(trained / "run" / "checkpoints" / "best.pt", checkpoint)
    options = (checkpoint, images, "--output", output, "data.workers=0")
    assert call(predict, *options)[0] == 0
    assert call(predict, *options)[1] == f"9 images in {output}, all of them were there\n"
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["head.bias"] += 1
    torch.save(state, checkpoint)
    before = output.read_bytes()
    code, _, error = call(predict, *options)
    assert (
        code == 2 and f"--output {output}: has predictions of {checkpoint}" in error and output.read_bytes() == before
    )


def test_the_checksum_is_of_the_weights_wherever_they_come_from(trained, tmp_path):
    checkpoint = trained / "run" / "checkpoints" / "best.pt"
    for target in ("a", "a.safetensors"):
        export.main([str(checkpoint), str(tmp_path / target)])
    other = load(checkpoint)
    other["model"]["head.bias"] += 1
    torch.save(other, tmp_path / "other.pt")
    export.main([str(tmp_path / "other.pt"), str(tmp_path / "b")])
    names = [load_predictor(str(tmp_path / what), None, []).name.split()[-1] for what in ("a", "b", "other.pt")]
    assert len({*names}) == 3
    same = [load_predictor(str(what), None, []).name for what in (checkpoint, trained / "run")]
    assert same[0] == same[1] and names[-1] not in same[0]


@pytest.mark.parametrize(
    "setting",
    ["--flips", *(pytest.param(s, marks=pytest.mark.slow) for s in ("data.image_size=64", "transform.eval_crop=0.5"))],
)
def test_predictions_of_other_settings_are_not_taken_for_these(call, trained, tmp_path, setting):
    output = tmp_path / "out.csv"
    options = (trained / "run", trained / "images" / "val" / "cat", "--output", output, "data.workers=0")
    assert call(predict, *options)[0] == 0
    before = output.read_bytes()
    code, _, error = call(predict, *options, setting)
    assert code == 2 and "differ with weights, image size, transform and --flips" in error
    assert output.read_bytes() == before and [*tmp_path.iterdir()] == [output]


@pytest.mark.parametrize("suffix", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_name_that_is_not_utf_8_has_one_row(call, trained, tmp_path, suffix):
    output, image = tmp_path / f"out.{suffix}", os.fsencode(tmp_path) + b"/caf\xe9.png"
    shutil.copy(os.fsencode(trained) + b"/images/val/cat/0.png", image)
    options = (trained / "run", tmp_path, "--output", output, "data.workers=0")
    assert call(predict, *options)[0] == 0
    assert call(predict, *options)[1] == f"1 images in {output}, all of them were there\n"
    assert [row["path"] for row in rows_of(output)] == [f"{tmp_path}/caf\\xe9.png"]


def test_rows_of_an_earlier_version_stay(call, trained, tmp_path):
    """Which had no column of the model; the table that names the images is of capitals."""
    images, output = trained / "images" / "val" / "cat", tmp_path / "out.csv"
    output.write_text("path,class_1,probability_1\nold.png,cat,1.0\n")
    (images / "LIST.CSV").write_text("path\n0.png\n")
    options = ("--top-k", 1, "--output", output, "data.workers=0")
    for _ in range(2):
        code, printed, error = call(predict, trained / "run", images / "LIST.CSV", *options)
        assert code == 0, error
    (images / "LIST.CSV").unlink()
    assert printed == f"1 images in {output}, all of them were there\n"
    assert [(row["path"], bool(row["model"])) for row in rows_of(output)] == [
        ("old.png", False), (str(images / "0.png"), True)
    ]  # fmt: skip


def test_a_grey_model_of_timm_is_built_as_one(call, trained, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, in_chans=1, img_size=32).eval()
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    image, output = trained / "images" / "val" / "cat" / "0.png", tmp_path / "out.csv"
    options = ("--model", "test_vit", "data.in_chans=1", "data.image_size=32", "data.workers=0", "--output", output)
    code, _, error = call(predict, tmp_path / "grey.pth", image, *options)
    assert code == 0 and len(rows_of(output)) == 1, error


def test_two_commands_with_one_output_keep_the_rows_of_both(tmp_path):
    output = tmp_path / "out [1].csv"  # a name that is a pattern too
    commands = [Predictions(output, 1, [f"{name}.png"], "model 1234") for name in "ab"]
    for command, (path,) in zip(commands, (command.paths for command in commands), strict=True):
        row = {"path": path, "class_1": "cat", "probability_1": 1.0, "model": "model 1234"}
        command.add([row], Process(int(path == "b.png"), 1, torch.device("cpu")))
    assert [command.finish() for command in commands] == [f"1 images in {output}"] * 2
    assert [row["path"] for row in rows_of(output)] == ["a.png", "b.png"] and [*tmp_path.iterdir()] == [output]


@pytest.mark.parametrize("kind", ["model.safetensors", "folder", pytest.param("model.onnx", marks=pytest.mark.slow)])
def test_exported_models_predict_alike(call, trained, tmp_path, kind):
    target = tmp_path / kind
    assert call(export, trained / "run" / "checkpoints" / "best.pt", target)[0] == 0
    what = f"local-dir:{target}" if kind == "folder" else target  # each knows its model, its images and its classes
    output = tmp_path / "out.csv"
    options = ("--output", output, "--top-k", 3, "data.workers=0")
    code, _, error = call(predict, what, trained / "images" / "val", *options)
    assert code == 0, error
    assert_right(trained, rows_of(output), 3)


def test_bad_input_ends_in_one_line(call, trained, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(trained / "images" / "val", images)
    (images / "cat" / "1.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.csv").write_text("file\na.png\n")
    (tmp_path / "broken.onnx").write_text("nothing")
    run = trained / "run"
    cases = {
        (run, "nowhere"): "nowhere: no such file or folder",
        (run, tmp_path / "empty"): f"{tmp_path}/empty: no image there",
        (run, tmp_path / "list.csv"): "list.csv: has no column path, but file",
        (run, images, "--top-k", "0"): "--top-k 0: allowed is 1 or more",
        (run, images, "--output", "out.txt"): "--output out.txt: the name must end in .csv, .jsonl, .parquet",
        (run, trained / "images", "--output", tmp_path / "no" / "out.csv"): "cannot be written",
        ("runs/nowhere", images): "runs/nowhere: no such file or folder",
        (tmp_path / "broken.onnx", images): "broken.onnx: ",
        (run, images, "data.workers=0"): "data.bad_files = 0: ",
    }
    for arguments, message in cases.items():
        code, _, error = call(predict, *arguments, "data.workers=0")
        assert code == 2 and message in error and error.count("\n") == 1, (arguments, error)
    code, printed, _ = call(predict, run, images, "data.workers=0", "data.bad_files=1", "--output", tmp_path / "o.csv")
    assert code == 0 and f"8 images in {tmp_path}/o.csv, 1 could not be read" in printed


@pytest.mark.slow
def test_two_processes_share_the_images(command, torchrun, trained, tmp_path):
    output = tmp_path / "out.csv"
    images = trained / "images" / "train"
    done = command(*torchrun, "tools/predict.py", trained / "run", images, "--output", output, "data.workers=0")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = rows_of(output)
    assert [row["path"] for row in rows] == [str(images / name / f"{n}.png") for name in NAMES for n in range(8)]
    assert_right(trained, rows, 3)
    assert [*tmp_path.iterdir()] == [output]
    printed = command(*torchrun, "tools/predict.py", trained / "run", images, "data.workers=0")
    lines = [line.split() for line in printed.stdout.splitlines() if line.startswith(str(images))]
    assert [(line[0], line[1]) for line in lines] == [(row["path"], row["class_1"]) for row in rows]


def test_images_in_shards_are_predicted_as_the_files_are(trained, tmp_path, capsys, monkeypatch):
    import tarfile

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = sorted((trained / "images" / "val").rglob("*.png"))
    for number in range(2):  # without labels
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for place, file in enumerate(files[number::2]):
                tar.add(file, f"{place}.png")
    run = str(trained / "run")
    assert predict.main([run, str(tmp_path / "*.tar"), "--output", str(tmp_path / "of_shards.csv")]) == 0
    assert predict.main([run, str(trained / "images" / "val"), "--output", str(tmp_path / "of_files.csv")]) == 0
    of_shards = {row.pop("path"): row for row in rows_of(tmp_path / "of_shards.csv")}
    of_files = {row.pop("path"): row for row in rows_of(tmp_path / "of_files.csv")}
    for number in range(2):
        for place, file in enumerate(files[number::2]):
            assert of_shards[f"{tmp_path}/{number}.tar: image {place}"] == of_files[str(file)]
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert predict.main([run, str(tmp_path / "cut.tar"), "--output", str(tmp_path / "of_cut.csv")]) == 2
    assert "cut.tar cannot be read: the tar file ends early or is damaged after" in capsys.readouterr().err
    assert predict.main([run, str(tmp_path / "0.tar"), str(files[0])]) == 2
    assert "shards go by themselves" in capsys.readouterr().err
    assert predict.main([run, str(tmp_path / "none-*.tar")]) == 2
    assert "none-*.tar: matches nothing" in capsys.readouterr().err


def test_an_exported_model_of_several_labels_and_other_sizes_predicts_as_its_run(call, trained, tmp_path):
    run = (
        *SETTINGS,
        f"data.root={trained}/images",
        f"output_dir={tmp_path}/run",
        "model.kwargs={depth: 2}",
        "train.epochs=2",
    )
    assert tools.train_net.main([*run, "loss.name=bce", "loss.smoothing=0", "evaluation.metric=map"]) == 0
    file, folder = tmp_path / "model.safetensors", tmp_path / "as on a hub"
    for target in (file, folder):
        assert call(export, tmp_path / "run" / "checkpoints" / "best.pt", target)[0] == 0
    for what, output in ((file, "file.csv"), (tmp_path / "run", "run.csv"), (folder, "folder.csv")):
        assert call(predict, what, trained / "images" / "val", "--output", tmp_path / output, "data.workers=0")[0] == 0
    found = [rows_of(tmp_path / f"{name}.csv") for name in ("file", "run")]
    assert [row.pop("model").split()[0] for row in (*found[0][:1], *found[1][:1])] == [
        str(file), str(tmp_path / "run" / "checkpoints" / "best.pt")
    ]  # fmt: skip
    assert [{**row, "model": ""} for row in found[0]] == [{**row, "model": ""} for row in found[1]]
    of_folder = rows_of(tmp_path / "folder.csv")
    for row, other in zip(of_folder, found[1], strict=True):
        for rank in (1, 2, 3):
            name = f"probability_{rank}"
            assert float(row[name]) == pytest.approx(float(other[name]), abs=2e-6)
    figures = []
    for what in (file, tmp_path / "run"):
        place = tmp_path / f"evaluation of {what.name}"
        options = ("--output", place, f"data.root={trained}/images", "data.workers=0")
        code, _, error = call(eval_net, what, *options)
        assert code == 0, error
        (result,) = json.loads((place / "results.json").read_text())["results"]
        figures.append({name: result[name] for name in ("map", "f1_macro", "eval_loss", "images")})
    assert figures[0] == figures[1]
    sums = [sum(float(row[f"probability_{rank}"]) for rank in (1, 2, 3)) for row in rows_of(tmp_path / "file.csv")]
    assert max(abs(total - 1) for total in sums) > 0.05  # each class is a question of its own
