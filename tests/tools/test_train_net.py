"""tools/train_net.py: what a run prints, leaves behind, and goes on from; in this process where that is enough."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.checkpoint import load
from engine.data.source import build_digits

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
BEFORE = ROOT / "tests" / "data" / "run_before_23"
SHORT = ("--config", DIGITS, "model.kwargs.depth=2", "log.period=4", "evaluation.period=1")
# every kind of state that a resumed run must find again
EVERY_STATE = (
    "train.global_batch=40", "train.accumulation=2", "mixup.mixup_alpha=0.8", "ema.enabled=true", "ema.decay=0.9",
    "model.drop_path_rate=0.1", "train.clip_norm=1.0",
)  # fmt: skip


def records(folder: Path, file: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def without_machine(records: list[dict]) -> list[dict]:
    of_the_machine = ("images_per_second", "memory")
    return [{key: value for key, value in record.items() if key not in of_the_machine} for record in records]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def printed_json(output: str) -> dict:
    return json.loads(output[output.index("{") :])


def test_a_run_ends_with_a_table_and_everything_in_its_folder(command, tmp_path):
    result = command(sys.executable, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=40")
    assert result.returncode == 0, result.stderr
    for line in ("main loss", "sub loss", "held-out top-1", "of 797 images", "held-out top-5", "time", str(tmp_path)):
        assert line in result.stdout
    assert result.stderr == "" and "\r" not in result.stdout  # no bar where there is no terminal
    assert len(re.findall(r"iteration \d+  main_loss .* images/s  \d+ MiB  \d\d:\d\d left\n", result.stdout)) == 2
    folder = tmp_path / "run"
    end = summary(folder)
    assert {"top1", "top5", "main_loss", "sub_loss", "iterations", "seconds"} <= end.keys()
    assert end["iterations"] == 40 and end["images"] == 797 and records(folder)[-1]["top1"] == end["top1"]
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG" and list(folder.glob("events.out.tfevents.*"))
    assert "iteration 40" in (folder / "log.txt").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_iters"] == 40
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert "cls_token" in state["model"] and state["iteration"] == 40
    first, *_, last = records(folder)
    assert last["main_loss"] < first["main_loss"] and last["sub_loss"] < first["sub_loss"]
    names = {path.name for path in (folder / "checkpoints").iterdir()}
    assert names == {"last.pt", "previous.pt", "best.pt", "iter_40.pt"}


def test_the_baseline_has_no_sub_model(train_net, tmp_path):
    run = ("augsub.sub_models=[]", f"output_dir={tmp_path}/run", "train.max_iters=2", "log.period=1")
    assert train_net("--config", DIGITS, *run)[0] == 0
    assert "no sub-model: plain training" in (tmp_path / "run" / "log.txt").read_text()
    assert all("sub_loss" not in record for record in records(tmp_path / "run"))


def test_tensorboard_shows_once_what_the_sub_models_see(train_net, tmp_path):
    for iterations in (2, 3):
        run = ("--config", DIGITS, f"output_dir={tmp_path}/run", f"train.max_iters={iterations}", "--resume")
        assert train_net(*run)[0] == 0
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    pictures = {
        title: [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(title)]
        for title in events.Tags()["images"]
    }
    (main,), (sub,) = pictures.pop("main model"), pictures.pop("sub-model 0, masking 0.5")
    assert not pictures
    digits = build_digits(8).held_out.tensors[0][::100, 0].numpy()
    low, high = digits.min(axis=(1, 2), keepdims=True), digits.max(axis=(1, 2), keepdims=True)
    assert np.array_equal(main[..., 0], np.concatenate((255 * (digits - low) / (high - low)).round(), axis=1))
    torch.manual_seed(0)
    is_kept = (torch.rand(8, 16).argsort(dim=1).argsort(dim=1) < 8).view(8, 4, 4).numpy()
    is_kept = np.concatenate(is_kept.repeat(2, axis=1).repeat(2, axis=2), axis=1)  # patches of 2 x 2 pixels
    assert np.array_equal(sub[is_kept], main[is_kept])
    assert (sub[~is_kept] == (0.15 * main[~is_kept] + 0.85 * 255).round()).all()


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package, which wants an account or writes a database: notes what it is asked; may refuse."""
    calls, run = [], SimpleNamespace()
    run.log = lambda values, step: calls.append(("log", {"iteration": step, **values}))
    run.finish = lambda exit_code: calls.append(("finish", exit_code))

    def init(**arguments):
        if package.refusal:
            raise package.Error(package.refusal)
        calls.append(("init", arguments))
        return run

    package = SimpleNamespace(init=init, Error=type("Error", (Exception,), {}), refusal=None)
    package.calls = lambda name: [value for call, value in calls if call == name]
    monkeypatch.setitem(sys.modules, "wandb", package)
    return package


def test_reports_and_a_stop_change_no_bit_of_the_training(train_net, tmp_path, wandb):
    """A run with every kind of state: in one go, and stopped and resumed with everything on that is written."""
    run = (*SHORT, *EVERY_STATE)
    assert train_net(*run, f"output_dir={tmp_path}/plain", "train.max_iters=30")[0] == 0
    for stop in (18, 30):
        everything = ("train.profile=true", "log.csv=true", "log.wandb=digits", f"train.max_iters={stop}")
        assert train_net(*run, "--resume", f"output_dir={tmp_path}/all", *everything)[0] == 0
    plain, full = (load(tmp_path / name / "checkpoints" / "last.pt") for name in ("plain", "all"))
    for part in ("model", "ema"):
        one, other = (state["model"] if part == "model" else state["hooks"]["ema"]["model"] for state in (plain, full))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    states = [state["optimizer"]["state"] for state in (plain, full)]
    assert all(torch.equal(states[0][i][name], states[1][i][name]) for i in states[0] for name in states[0][i])

    written, expected = records(tmp_path / "all"), {line["iteration"]: line for line in records(tmp_path / "plain")}
    iterations = [record["iteration"] for record in written]
    assert iterations == [4, 8, 12, 16, 18, 20, 24, 25, 28, 30]  # none is missing or twice
    of_the_same_steps = [record for record in written if record["iteration"] not in (18, 20)]
    assert without_machine(of_the_same_steps) == without_machine([expected[r["iteration"]] for r in of_the_same_steps])
    with open(tmp_path / "all" / "metrics.csv", newline="") as file:
        table = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert table == written

    first, second = wandb.calls("init")
    assert (first["project"], first["name"], first["config"]["train.max_iters"]) == ("digits", "all", 18)
    assert second["id"] == first["id"] and second["resume"] == "allow"
    assert wandb.calls("log") == written and wandb.calls("finish") == [0, 0]


def test_wandb_that_is_missing_or_refuses_is_one_line(train_net, tmp_path, monkeypatch, wandb):
    """The same command goes later; a run that fails is marked so."""
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=2", "log.wandb=digits")
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "wandb", None)
        code, _, error = train_net(*run)
    assert code == 2 and "log.wandb = digits: the package cannot be imported" in error and "pip install wandb" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    wandb.refusal = "No API key configured.\nUse `wandb login` to log in."
    code, _, error = train_net(*run)
    assert code == 2 and error.count("\n") == 1
    assert "W&B does not begin: No API key configured. Use `wandb login`" in error
    wandb.refusal = None
    assert train_net(*run)[0] == 0 and len(wandb.calls("init")) == len(wandb.calls("log")) == 1
    assert train_net(*run[:-3], f"output_dir={tmp_path}/ruined", "log.wandb=digits", "optimizer.lr=1e30")[0] == 2
    assert wandb.calls("finish") == [0, 1]


def test_a_run_of_the_version_before_goes_on_to_the_same_end(train_net, tmp_path):
    """See tests/data/run_before_23/README.md."""
    shutil.copytree(BEFORE, tmp_path / "run")
    run = ("--config", BEFORE / "run.yaml", f"output_dir={tmp_path}/run", "train.max_iters=40", "--resume")
    code, _, error = train_net(*run)
    assert code == 0, error
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    averages = {f"ema.{name}": tensor for name, tensor in state["hooks"]["ema"]["model"].items()}
    expected = load_file(BEFORE / "expected_weights.safetensors")
    torch.testing.assert_close({**state["model"], **averages}, expected, rtol=1e-4, atol=3e-6)  # another machine's sums
    lines, before = records(tmp_path / "run"), records(BEFORE, "expected_metrics.jsonl")
    assert [line["iteration"] for line in lines] == [line["iteration"] for line in before]
    for line, expected_line in zip(without_machine(lines), without_machine(before), strict=True):
        known = {name: value for name, value in line.items() if "balanced_accuracy" not in name}  # is new since then
        assert known == pytest.approx(expected_line, rel=1e-3, abs=0.3)  # two images of 797 on the edge


def test_rare_classes_are_weighted_drawn_and_judged_alike_after_a_stop(train_net, tmp_path, image_folder):
    for number in range(2, 8):
        (image_folder / "train" / "fox" / f"{number}.jpg").unlink()  # two of eight stay
    run = ("--config", "finetune_folder", "model.name=test_vit", "model.pretrained=false", "data.image_size=32",
           f"data.root={image_folder}", "data.workers=0", "train.epochs=3", "train.global_batch=6",
           "loss.class_weights=balanced", "data.sampling=sqrt", "evaluation.metric=balanced_accuracy")  # fmt: skip
    assert train_net(*run, f"output_dir={tmp_path}/whole")[0] == 0
    for stop in (4, 9):
        code, _, error = train_net(*run, "--resume", f"output_dir={tmp_path}/parts", f"train.max_iters={stop}")
        assert code == 0 and "mean over classes" in error, error
    whole, parts = (load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    end = summary(tmp_path / "whole")
    assert end["best_value"] >= end["balanced_accuracy"]
    assert end["best_value"] in [line.get("balanced_accuracy") for line in records(tmp_path / "whole")]
    code, _, error = train_net(*run, f"output_dir={tmp_path}/x", "loss.class_weights={foxx: 2}")
    assert code == 2 and error == "error: loss.class_weights: foxx is none of the classes, did you mean 'fox'?\n"


def test_weights_and_their_average_are_evaluated_alone_as_in_the_run(train_net, tmp_path):
    """The average is switched on for a run that goes on: it starts with its weights."""
    run, averaging = ("--config", DIGITS, f"output_dir={tmp_path}/run"), ("ema.enabled=true", "ema.decay=0.9")
    assert train_net(*run, "train.max_iters=60")[0] == 0
    assert train_net(*run, "--resume", "train.max_iters=61", *averaging)[0] == 0
    end = summary(tmp_path / "run")
    assert end["ema_top1"] == pytest.approx(end["top1"], abs=5)
    code, output, _ = train_net(*run, "--eval-only", *averaging)
    results = printed_json(output)
    assert code == 0 and results["images"] == 797
    assert {name: results[name] for name in ("top1", "top5", "ema_top1")} == {
        name: end[name] for name in ("top1", "top5", "ema_top1")
    }
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    for key in ("evaluation.checkpoint", "model.checkpoint"):
        again = train_net("--config", DIGITS, "--eval-only", f"{key}={last}", f"output_dir={tmp_path}/no")[1]
        assert printed_json(again) == results


def test_two_processes_train_and_count_every_image_once(command, torchrun, train_net, tmp_path):
    """A Swin: its main model does not use the mask token."""
    config = ROOT / "configs" / "digits_swin.yaml"
    result = command(*torchrun, TRAIN_NET, "--config", config, f"output_dir={tmp_path}/run", "train.max_iters=20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out top-1") == 1  # one process reports
    end = summary(tmp_path / "run")
    alone = printed_json(train_net("--config", config, "--eval-only", f"output_dir={tmp_path}/run")[1])
    assert alone["images"] == end["images"] == 797
    assert alone["top1"] == pytest.approx(end["top1"], abs=0.13)  # one image of 797 on the edge


def test_precisions_and_layouts_change_rounding_alone(train_net, tmp_path):
    losses = {}
    for setting in ("amp=off", "amp=bf16", "amp=fp16", "channels_last=true"):
        run = (f"output_dir={tmp_path}/{setting}", "train.max_iters=5", f"train.{setting}", "log.period=5")
        assert train_net("--config", "digits_resnet", *run)[0] == 0
        losses[setting] = records(tmp_path / setting)[-1]["main_loss"]
    usual = losses.pop("amp=off")
    if not torch.cuda.is_available():
        assert losses.pop("amp=fp16") == usual
        assert "on this CPU the run uses float32" in (tmp_path / "amp=fp16" / "log.txt").read_text()
    for loss in losses.values():
        assert loss == pytest.approx(usual, rel=0.02) and loss != usual  # or the setting would not be in use


@pytest.mark.parametrize(
    "model",
    [
        ("swin_b", "swin_tiny_patch4_window7_224", "model.kwargs={depths: [1, 1, 1, 1]}",
         "augsub.sub_models=[{augmentations: [{name: masking, ratio: 0.5, cell: 16}]}]"),
        ("resnet50", "resnet18"),
        ("deit3_b_400e", "deit3_small_patch16_224", "model.kwargs={init_values: 1.0e-4, depth: 2}"),
    ],
    ids=["swin", "resnet", "vit"],
)  # fmt: skip
def test_an_image_folder_trains_with_the_imagenet_recipes(train_net, image_folder, tmp_path, model):
    """The recipes' transforms, mixing, losses and optimisers, on smaller models and images."""
    recipe, name, *settings = model
    code, _, error = train_net(
        "--config", recipe, f"model.name={name}", "data.image_size=64", f"data.root={image_folder}",
        f"output_dir={tmp_path}/run", "data.workers=2", "train.global_batch=8", "train.max_iters=2", "train.epochs=30",
        *settings,
    )  # fmt: skip
    assert code == 0, error
    assert summary(tmp_path / "run")["images"] == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "mode"),
    [(None, "true"), (None, "reduce-overhead"), ("ddp", "true"), ("fsdp2", "true")],
)
def test_compiled_training_is_the_same_training(command, torchrun, tmp_path, strategy, mode):
    """With a lower precision, checkpointing and an average, which all take part in what is compiled."""
    launcher = [sys.executable] if strategy is None else torchrun
    options = ["train.max_iters=40", "train.amp=bf16", "train.grad_checkpointing=true"]
    options += ["ema.enabled=true", "ema.decay=0.9", *([f"distributed.strategy={strategy}"] if strategy else [])]
    for compile in ("false", mode):
        finished = command(
            *launcher, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/{compile}", *options,
            f"train.compile={compile}", timeout=900,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
    # compiled kernels draw other random masks, so the comparison is of learning, not of bits
    eager, compiled = (summary(tmp_path / compile) for compile in ("false", mode))
    assert compiled["main_loss"] == pytest.approx(eager["main_loss"], rel=0.1)
    assert compiled["ema_top1"] == pytest.approx(eager["ema_top1"], abs=5)


def test_statistics_of_frozen_layers_stay(train_net, tmp_path):
    """Over steps, sub-models and an evaluation, which puts the whole model back into training mode."""
    both = ", ".join(f"{{augmentations: [{{name: {name}, ratio: 0.5}}]}}" for name in ("masking", "random_crop"))
    run = (f"augsub.sub_models=[{both}]", "data.image_size=64", "train.global_batch=300", "train.max_iters=4")
    frozen = "model.frozen=[layer1,bn1]"
    assert train_net("--config", "digits_resnet", f"output_dir={tmp_path}/run", *run, frozen)[0] == 0
    for name, value in load(tmp_path / "run" / "checkpoints" / "last.pt")["model"].items():
        if "running_" in name:
            initial = torch.full_like(value, float(name.endswith("var")))
            assert torch.equal(value, initial) == name.startswith(("layer1.", "bn1.")), name


@pytest.mark.slow
def test_a_profile_is_a_trace_of_five_steps_and_a_table(train_net, tmp_path):
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=12", "train.profile=true")
    assert train_net(*run)[0] == 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert len({event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}) == 5
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" and event.get("ph") == "X" for event in events) >= 5
    log = (tmp_path / "run" / "log.txt").read_text()
    assert f"5 steps profiled, trace in {tmp_path / 'run' / 'trace.json'}" in log and "aten::addmm" in log
    assert train_net(*run[:-2], "train.max_iters=15", "train.profile=true", "--resume")[0] == 0
    said = "nothing was recorded, that takes 10 steps in one go and the run had 3 left"
    assert said in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
def test_the_bar_says_how_far_how_long_how_fast_and_how_good(tmp_path):
    """On a terminal that does not tell its size."""
    main, end = pty.openpty()
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=60", "log.period=10")
    process = subprocess.Popen(
        [sys.executable, TRAIN_NET, *map(str, run)], stdin=end, stdout=end, stderr=end, close_fds=True,
        env={**os.environ, "COLUMNS": "", "LINES": ""},
    )  # fmt: skip
    os.close(end)
    output = b""
    while select.select([main], [], [], 120)[0]:
        try:
            output += os.read(main, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
    assert process.wait(timeout=60) == 0
    os.close(main)
    shown = output.decode()
    bars = [line for line in re.split(r"[\r\n]+", shown) if re.match(r" *\d+/60 \|", line)]
    assert bars and max(map(len, bars)) < 80
    full = re.compile(r"(\d+)/60 \|.+\| \d\d:\d\d left, loss ([\d.]+), lr ([\d.e-]+), (\d+) images/s, (\d+) MiB")
    found = [match for match in map(full.search, bars) if match]
    by_loss = {f"{record['loss']:.3f}": record for record in records(tmp_path / "run")}
    assert found
    for match in found:
        record = by_loss[match[2]]  # of a record, not of the step itself
        assert record["iteration"] <= int(match[1]) + 1
        assert (match[4], match[5]) == (f"{record['images_per_second']:.0f}", f"{record['memory']:.0f}")
    assert len(re.findall(r"iteration \d+  main_loss .* MiB  \d\d:\d\d left", shown)) == 6


def test_a_run_is_not_extended_to_fewer_steps_than_it_has_had(train_net, tmp_path):
    run = ("--config", DIGITS, "model.kwargs.depth=1", f"output_dir={tmp_path}/run")
    assert train_net(*run, "train.epochs=2", "schedule.warmup_epochs=0", "evaluation.period=2")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, _, error = train_net(
        "--resume", tmp_path / "run", "train.extend=true", "train.epochs=3", "train.global_batch=200"
    )
    assert code == 2 and "has had 40 iterations, with these train.epochs and train.global_batch the run would" in error
    assert error.count("\n") == 1 and before == {path: path.read_bytes() for path in before}
    assert train_net("--resume", tmp_path / "run", "train.max_iters=20")[0] == 0  # it is at its end


def test_the_printed_config_runs_the_same_run(train_net, tmp_path):
    code, output, _ = train_net("--config", DIGITS, "--print-config", "seed=4")
    assert code == 0 and yaml.safe_load(output)["seed"] == 4
    for resume in (["--resume"], ["--resume", "auto"], ["--resume=auto"]):
        assert train_net("--config", DIGITS, *resume, "seed=4", "--print-config")[1] == output
    code, _, error = train_net("--config", DIGITS, "--resume", "never", "--print-config")
    assert code == 2 and "--resume never: has its own configuration" in error
    code, _, error = train_net("--resume", tmp_path / "nowhere")
    assert code == 2 and "is not the folder of a run, it has no config.yaml" in error
    assert "--config NAME is missing" in train_net("train.epochs=3")[2]
    (tmp_path / "printed.yaml").write_text(output)
    assert train_net("--config", tmp_path / "printed.yaml", "--print-config")[1] == output


def test_help_fits_into_a_terminal(train_net, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        train_net("--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(word in text for word in ("--dry-run", "the run:", "instead of training:", "engine/config.py"))
    assert re.findall(r"^  (\d+) ", text.partition("exit codes:")[2], re.MULTILINE) == ["0", "2", "75", "130"]
    examples = textwrap.dedent(text.partition("examples:\n")[2].partition("\n\n")[0])
    assert all((ROOT / "configs" / f"{name}.yaml").exists() for name in re.findall(r"--config (\w+)", examples))


def test_images_need_not_be_squares(train_net, image_folder, tmp_path):
    run = ("--config", "finetune_folder", "model.name=test_vit", "model.pretrained=false", f"data.root={image_folder}",
           "data.image_size=[32,48]", "data.workers=0", "train.epochs=4", "train.global_batch=8")  # fmt: skip
    short = f"output_dir={tmp_path}/short"
    assert train_net(*run, f"output_dir={tmp_path}/whole")[0] == 0
    assert train_net(*run, short, "train.max_iters=5")[0] == 0
    assert train_net(*run, short, "--resume", "train.max_iters=null")[0] == 0
    assert "resumed" in (tmp_path / "short" / "log.txt").read_text()
    whole, resumed = (load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in ("whole", "short"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    code, _, error = train_net(*run, f"output_dir={tmp_path}/x", "data.image_size=[32,48,3]")
    assert code == 2 and "data.image_size = [32, 48, 3]: allowed is a number of pixels, or two of them" in error
    code, _, error = train_net(*run, f"output_dir={tmp_path}/y", "data.image_size=[32,40]")
    assert code == 2 and "32 x 40 pixels do not fit: Input width (40) should be divisible by patch size (16)" in error
