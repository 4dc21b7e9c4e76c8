"""configs/finetune_folder.yaml: any timm model on a folder of images, with weights from a file, a folder or nowhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
FINETUNE = ROOT / "configs" / "finetune_folder.yaml"
SHORT = ("train.epochs=3", "schedule.warmup_epochs=1", "data.workers=0")


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Weights of timm's hub are not to be had, wherever the tests run."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty_cache"))


@pytest.mark.slow
def test_one_command_ends_with_a_table(command, image_folder, tmp_path):
    arguments = ("--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run", *SHORT)
    finished = command(sys.executable, TRAIN_NET, *arguments, "model.name=test_vit")
    assert finished.returncode == 0, finished.stderr
    assert "WARNING: the model starts at random, model.pretrained is only if_available" in finished.stdout
    assert "held-out top-1" in finished.stdout and "of 9 images" in finished.stdout
    assert "started from     random weights" in finished.stdout
    saved = (tmp_path / "run" / "config.yaml").read_text()
    assert "image_size: 160" in saved and "pretrained: false" in saved  # the model's own size, and what came of it


def test_a_resumed_run_still_says_that_it_began_with_weights(train_net, image_folder, tmp_path):
    model = timm.create_model("test_vit")
    save_for_hf(model, tmp_path / "weights", model_config={"license": "mit"})
    run = ["--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run", *SHORT, "--resume"]
    run += [f"model.name=local-dir:{tmp_path}/weights", "train.max_iters=1"]
    assert train_net(*run)[0] == 0
    code, printed, error = train_net(*run, "train.max_iters=2")
    assert code == 0, error
    assert "pretrained: true" in (tmp_path / "run" / "config.yaml").read_text() and "model.pretrained" not in printed


def test_a_model_of_a_hub_that_cannot_be_reached_is_refused(train_net, image_folder, tmp_path):
    run = ["--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run"]
    code, _, error = train_net(*run, "model.name=hf-hub:nobody/nothing")
    assert code == 2 and error.startswith("error: model.name: timm cannot build hf-hub:nobody/nothing")
    assert error.count("\n") == 1
    code, _, error = train_net(*run, "model.name=nobody/nothing")
    assert code == 2 and "Use 'hf-hub:nobody/nothing'" in error


def test_weights_that_must_be_there_stop_the_run(train_net, image_folder, tmp_path):
    run = ["--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run", "model.name=test_vit"]
    code, _, error = train_net(*run, "model.pretrained=true")
    assert code == 2 and error.splitlines()[-1].startswith("error: model: timm cannot build test_vit with ")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_for_other_classes_gets_a_new_head_and_is_needed_once(train_net, image_folder, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model("test_vit", num_classes=7)
    torch.save(source.state_dict(), tmp_path / "seven.pt")
    run = [
        "--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run", "model.name=test_vit",
        f"model.checkpoint={tmp_path}/seven.pt", "optimizer.lr=1e-9", *SHORT,
    ]  # fmt: skip
    code, _, error = train_net(*run, "--eval-only", f"evaluation.checkpoint={tmp_path}/seven.pt")  # no head of its own
    assert code == 2 and f"checkpoint {tmp_path}/seven.pt is for 7 classes, the data have 3" in error
    code, _, error = train_net(*run, "train.max_iters=3")
    assert code == 0, error
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "the head is new, the checkpoint's is for other classes: head.bias, head.weight" in log
    trained = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    assert trained["head.weight"].shape[0] == 3
    torch.testing.assert_close(trained["blocks.0.attn.qkv.weight"], source.state_dict()["blocks.0.attn.qkv.weight"])

    (tmp_path / "seven.pt").unlink()
    code, _, error = train_net(*run, "train.max_iters=6", "--resume")
    assert code == 0, error
    code, output, _ = train_net(*run, "--eval-only")  # the run itself, not what it started from
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert json.loads(output[output.index("{") :])["eval_loss"] == pytest.approx(summary["eval_loss"], rel=1e-5)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "resumed" in log and log.count(f"started from     {tmp_path}/seven.pt") == 2


def test_a_local_folder_in_the_hubs_layout_whose_weights_are_needed_once(train_net, image_folder, tmp_path):
    source = timm.create_model("test_resnet", num_classes=3)
    folder = tmp_path / "hub"
    timm.models.save_for_hf(source, folder, model_config={"num_classes": 3})
    run = (
        "--config", FINETUNE, f"data.root={image_folder}", f"output_dir={tmp_path}/run",
        f"model.name=local-dir:{folder}", "model.pretrained=true", "optimizer.lr=1e-9", *SHORT, "--resume",
        "augsub.sub_models=[{augmentations: [{name: masking, ratio: 0.5, cell: 16}]}]",
    )  # fmt: skip
    for iterations in (2, 4):
        code, _, error = train_net(*run, f"train.max_iters={iterations}")
        assert code == 0, error
        for weights in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
            weights.unlink()
    trained = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["model"]
    torch.testing.assert_close(trained["fc.weight"], source.state_dict()["fc.weight"])
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images"] == 9
