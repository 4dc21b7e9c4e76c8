from __future__ import annotations

import io
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine.data.digits import build_digits

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
# every kind of state that a resumed run must find again
EVERYTHING_ON = (
    "train.global_batch=40",
    "train.accumulation=2",
    "mixup.mixup_alpha=0.8",
    "ema.enabled=true",
    "ema.decay=0.9",
    "model.drop_path_rate=0.1",
    "train.clip_norm=1.0",
    "log.period=7",
)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(records: list[dict]) -> list[dict]:
    of_the_machine = ("images_per_second", "memory")
    return [{key: value for key, value in record.items() if key not in of_the_machine} for record in records]


def tensorboard_images(folder: Path) -> dict[str, list[np.ndarray]]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        title: [np.asarray(Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(title)]
        for title in events.Tags()["images"]
    }


def test_tensorboard_shows_once_what_the_sub_models_see(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=2", "--resume"]
    assert train_net(*run)[0] == 0 and train_net(*run[:-2], "train.max_iters=3", "--resume")[0] == 0
    pictures = tensorboard_images(tmp_path / "run")
    (main,), (sub,) = pictures.pop("main model"), pictures.pop("sub-model 0, masking 0.5")
    assert not pictures
    digits = build_digits(8).held_out.tensors[0][::100, 0].numpy()
    low, high = digits.min(axis=(1, 2), keepdims=True), digits.max(axis=(1, 2), keepdims=True)
    stretched = (255 * (digits - low) / (high - low)).round()
    assert np.array_equal(main[..., 0], np.concatenate(stretched, axis=1))
    torch.manual_seed(0)
    is_kept = (torch.rand(8, 16).argsort(dim=1).argsort(dim=1) < 8).view(8, 4, 4).numpy()
    is_kept = np.concatenate(is_kept.repeat(2, axis=1).repeat(2, axis=2), axis=1)  # patches of 2 x 2 pixels
    assert np.array_equal(sub[is_kept], main[is_kept])
    assert (sub[~is_kept] == (0.15 * main[~is_kept] + 0.85 * 255).round()).all()


def test_a_run_ends_with_a_table_and_everything_in_its_folder(command, tmp_path):
    result = command(sys.executable, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=40")
    assert result.returncode == 0, result.stderr
    for line in ("main loss", "sub loss", "held-out top-1", "of 797 images", "held-out top-5", "time", str(tmp_path)):
        assert line in result.stdout
    assert result.stderr == "" and "\r" not in result.stdout  # no bar where there is no terminal
    assert len(re.findall(r"iteration \d+  main_loss .* images/s  \d+ MiB  \d\d:\d\d left\n", result.stdout)) == 2
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"top1", "top5", "main_loss", "sub_loss", "iterations", "seconds"} <= summary.keys()
    assert summary["iterations"] == 40 and summary["images"] == 797
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list(folder.glob("events.out.tfevents.*"))
    assert "iteration 40" in (folder / "log.txt").read_text()
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["max_iters"] == 40
    assert metrics(folder)[-1]["top1"] == summary["top1"]
    state = torch.load(folder / "checkpoints" / "last.pt", weights_only=True)
    assert "cls_token" in state["model"] and state["iteration"] == 40
    assert {"last.pt", "previous.pt", "best.pt", "iter_40.pt"} == {
        path.name for path in (folder / "checkpoints").iterdir()
    }


def test_the_baseline_has_no_sub_model(train_net, tmp_path):
    code, _output, _ = train_net(
        "--config", DIGITS, "augsub.sub_models=[]", f"output_dir={tmp_path}/run", "train.max_iters=20"
    )
    assert code == 0
    assert "no sub-model: plain training" in (tmp_path / "run" / "log.txt").read_text()
    assert all("sub_loss" not in record for record in metrics(tmp_path / "run"))


def test_training_learns(train_net, tmp_path):
    train_net("--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=200")
    records = metrics(tmp_path / "run")
    assert records[-1]["main_loss"] < 0.7 * records[0]["main_loss"]
    assert records[-1]["sub_loss"] < records[0]["sub_loss"]
    assert records[-1]["top1"] > 50


def test_a_resumed_run_ends_with_the_same_bits(train_net, tmp_path):
    for name, stops in {"whole": [45], "resumed": [23, 45]}.items():
        for iterations in stops:
            assert train_net(
                "--config", DIGITS, "--resume", f"output_dir={tmp_path}/{name}", f"train.max_iters={iterations}",
                "evaluation.period=1", *EVERYTHING_ON
            )[0] == 0  # fmt: skip
    states = [
        torch.load(tmp_path / name / "checkpoints" / "last.pt", weights_only=True) for name in ("whole", "resumed")
    ]
    for kind in (("model",), ("hooks", "ema", "model")):
        whole, resumed = states
        for key in kind:
            whole, resumed = whole[key], resumed[key]
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    iterations = [record["iteration"] for record in metrics(tmp_path / "resumed")]
    assert iterations == sorted(set(iterations))
    assert (
        without_time(metrics(tmp_path / "resumed"))[-1]["top1"] == without_time(metrics(tmp_path / "whole"))[-1]["top1"]
    )
    assert "resumed" in (tmp_path / "resumed" / "log.txt").read_text()


def test_evaluation_alone_gives_the_result_of_the_run(train_net, tmp_path):
    train_net("--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=60")
    expected = json.loads((tmp_path / "run" / "summary.json").read_text())
    code, output, _ = train_net("--config", DIGITS, "--eval-only", f"output_dir={tmp_path}/run")
    assert code == 0
    results = json.loads(output[output.index("{") :])
    assert {name: results[name] for name in ("top1", "top5", "images")} == {
        name: expected[name] for name in ("top1", "top5", "images")
    }
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    for key in ("evaluation.checkpoint", "model.checkpoint"):
        _, again, _ = train_net("--config", DIGITS, "--eval-only", f"{key}={last}", f"output_dir={tmp_path}/no")
        assert json.loads(again[again.index("{") :]) == results


def test_the_average_of_the_weights_is_evaluated_too_and_starts_with_a_resumed_run(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run"]
    assert train_net(*run, "train.max_iters=60")[0] == 0
    averaging = ["ema.enabled=true", "ema.decay=0.9"]
    assert train_net(*run, "--resume", "train.max_iters=61", *averaging)[0] == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ema_top1"] == pytest.approx(summary["top1"], abs=5)  # an average of trained weights from the start
    _, output, _ = train_net(*run, "--eval-only", *averaging)
    results = json.loads(output[output.index("{") :])
    assert results["ema_top1"] == summary["ema_top1"] and results["top1"] == summary["top1"]


def test_processes_that_do_not_share_the_run_folder_do_not_resume(command, torchrun, train_net, tmp_path):
    assert train_net("--config", DIGITS, f"output_dir={tmp_path}/rank0", "train.max_iters=5")[0] == 0
    script = tmp_path / "node.sh"  # each process has a folder of its own, as nodes without a shared disk
    train = f"{sys.executable} {TRAIN_NET} --config {DIGITS} --resume train.max_iters=10"
    script.write_text(f"exec {train} output_dir={tmp_path}/rank$RANK")
    finished = command(*torchrun, "--no-python", "bash", script)
    assert finished.returncode != 0
    assert "last.pt exists for 1 of 2 processes only: all must share output_dir" in finished.stderr
    assert not (tmp_path / "rank1").exists()


@pytest.mark.parametrize("model", ["vit", "swin"])
def test_two_processes_train_and_count_every_image_once(command, torchrun, train_net, tmp_path, model):
    config = ROOT / "configs" / f"digits_{model}.yaml"
    result = command(*torchrun, TRAIN_NET, "--config", config, f"output_dir={tmp_path}/run", "train.max_iters=40")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("held-out top-1") == 1  # one process reports
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == 797
    _, output, _ = train_net("--config", config, "--eval-only", f"output_dir={tmp_path}/run")
    alone = json.loads(output[output.index("{") :])
    assert alone["top1"] == pytest.approx(summary["top1"], abs=0.13)  # one image of 797 on the edge
    assert alone["images"] == 797


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(train_net, tmp_path, amp):
    code, _, _ = train_net("--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=20", f"train.amp={amp}")
    assert code == 0
    assert metrics(tmp_path / "run")[-1]["main_loss"] < 2.4
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("on this CPU the run uses float32" in log) == (amp == "fp16" and not torch.cuda.is_available())


def test_a_plugin_file_brings_a_new_augmentation(command, tmp_path):
    (tmp_path / "my_augmentations.py").write_text(
        textwrap.dedent("""
        import torch
        import augsub

        @augsub.register("token_noise")
        class TokenNoise(augsub.SubModelAugmentation):
            sites = ("tokens",)

            def tokens(self, tokens):
                tokens.values = tokens.values + self.ratio * torch.randn_like(tokens.values)
                return tokens
        """)
    )
    arguments = [
        "plugins=[my_augmentations]",
        "augsub.sub_models=[{weight: 0.5, augmentations: [{name: token_noise, ratio: 0.3}]}]",
        "train.max_iters=20",
    ]
    result = command(sys.executable, TRAIN_NET, "--config", DIGITS, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "sub_loss" in metrics(tmp_path / "runs" / "digits_vit")[-1]


@pytest.mark.parametrize(
    "model",
    [
        ["--config", ROOT / "configs/swin_b.yaml", "model.name=swin_tiny_patch4_window7_224", "data.image_size=64",
         "augsub.sub_models=[{augmentations: [{name: masking, ratio: 0.5, cell: 16}]}]"],
        ["--config", ROOT / "configs/resnet50.yaml", "model.name=resnet18", "data.image_size=64"],
        ["--config", ROOT / "configs/deit3_b_400e.yaml", "model.name=deit3_small_patch16_224", "data.image_size=64",
         "model.kwargs={init_values: 1.0e-4, depth: 2}"],
    ],
    ids=["swin", "resnet", "vit"],
)  # fmt: skip
def test_an_image_folder_trains_with_the_imagenet_recipes(train_net, image_folder, tmp_path, model):
    """The recipes' transforms, mixing, losses and optimisers, on smaller models and images."""
    code, _, error = train_net(
        *model, f"data.root={image_folder}", f"output_dir={tmp_path}/run", "data.workers=2", "train.global_batch=8",
        "train.max_iters=2", "train.epochs=30",
    )  # fmt: skip
    assert code == 0, error
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 9


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, "ddp", "fsdp2"], ids=["one process", "DDP", "FSDP2"])
def test_compiled_training_is_the_same_training(command, torchrun, tmp_path, strategy):
    """With a lower precision, checkpointing and an average, which all take part in what is compiled."""
    launcher = [sys.executable] if strategy is None else torchrun
    options = ["train.max_iters=40", "train.amp=bf16", "train.grad_checkpointing=true"]
    options += ["ema.enabled=true", "ema.decay=0.9"]
    options += [f"distributed.strategy={strategy}"] if strategy else []
    for compile in ("false", "true"):
        finished = command(
            *launcher, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/{compile}", *options,
            f"train.compile={compile}", timeout=900,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
    eager, compiled = metrics(tmp_path / "false"), metrics(tmp_path / "true")
    # compiled kernels draw other random masks, so the comparison is of learning, not of bits
    assert compiled[-1]["main_loss"] == pytest.approx(eager[-1]["main_loss"], rel=0.1)
    ends = [json.loads((tmp_path / compile / "summary.json").read_text()) for compile in ("false", "true")]
    assert ends[1]["ema_top1"] == pytest.approx(ends[0]["ema_top1"], abs=5)


def test_channels_last_changes_rounding_alone(train_net, tmp_path):
    config = DIGITS.with_name("digits_resnet.yaml")
    for layout in ("false", "true"):
        assert train_net(
            "--config", config, f"output_dir={tmp_path}/{layout}", "train.max_iters=20", f"train.channels_last={layout}"
        )[0] == 0  # fmt: skip
    usual, channels_last = metrics(tmp_path / "false"), metrics(tmp_path / "true")
    assert channels_last[-1]["main_loss"] == pytest.approx(usual[-1]["main_loss"], rel=1e-3)
    assert channels_last[-1]["main_loss"] != usual[-1]["main_loss"]  # or the layout would not be in use


def test_the_printed_config_runs_the_same_run(train_net, tmp_path):
    code, output, _ = train_net("--config", DIGITS, "--print-config", "seed=4")
    assert code == 0
    printed = yaml.safe_load(output)
    assert printed["seed"] == 4 and printed["augsub"]["sub_models"][0]["augmentations"][0]["name"] == "masking"
    (tmp_path / "printed.yaml").write_text(output)
    assert train_net("--config", tmp_path / "printed.yaml", "--print-config")[1] == output


def test_an_override_may_follow_resume_with_or_without_auto(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run"]
    for iterations, resume in enumerate((["--resume"], ["--resume", "auto"], ["--resume=auto"]), start=2):
        assert train_net(*run, *resume, f"train.max_iters={iterations}")[0] == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 4
    with pytest.raises(SystemExit):
        train_net(*run, "--resume", "never")
