"""Bad input, ruined losses, interruptions: one clear line, and nothing saved is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from engine.errors import InputError
from engine.writers import read_lines

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run"]
    assert train_net(*run, "train.max_iters=20")[0] == 0
    code, _, error = train_net(*run, "--resume", "train.max_iters=60", "optimizer.lr=1e30")
    assert code == 2
    assert error.startswith("error: the loss is not finite at iteration 2") and error.count("\n") == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["iteration"] == 20
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert state["iteration"] == 20
    assert all(value.isfinite().all() for value in state["model"].values())


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(train_net, tmp_path):
    run = ["--config", str(DIGITS), f"output_dir={tmp_path}/run"]
    process = subprocess.Popen(
        [sys.executable, TRAIN_NET, *run],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted: --resume continues from the last checkpoint\n"
    done = torch.load(last, weights_only=True)["iteration"]
    assert done < 1200
    assert train_net(*run, "--resume", f"train.max_iters={done + 20}")[0] == 0
    iterations = [record["iteration"] for record in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert iterations == sorted(set(iterations)) and iterations[-1] == done + 20


BAD_INPUT = {
    "typo in a key": (["train.epohcs=3"], "Did you mean: 'epochs'"),
    "data folder missing": (["data.dataset=folder", "data.root=/nowhere"], "data.root = /nowhere: no such folder"),
    "unknown model": (["model.name=vit_tiny_patch16_242"], "did you mean 'vit_tiny_patch16_224'"),
    "unknown model argument": (["model.kwargs.dpeth=3"], "unexpected keyword argument 'dpeth'"),
    "unknown augmentation": (["augsub.sub_models=[{augmentations: [maskin]}]"], "did you mean 'masking'"),
    "ratio out of range": (
        ["augsub.sub_models=[{augmentations: [{name: masking, ratio: 1.5}]}]"],
        "augsub.sub_models: masking: ratio = 1.5",
    ),
    "no augmentation": (["augsub.sub_models=[{weight: 0.5}]"], "at least one is needed"),
    "no site": (
        [
            "model.name=resnet18",
            "model.kwargs={}",
            "augsub.sub_models=[{augmentations: [{name: dropout, ratio: 0.1}]}]",
        ],
        "dropout has no site in ResNet",
    ),
    "image size": (["data.image_size=1"], "1 x 1 pixels do not fit"),
    "image size of another model": (
        ["model.name=inception_v3", "model.kwargs={}", "data.image_size=16", "augsub.sub_models=[]"],
        "16 x 16 pixels do not fit",
    ),
    "mask cell": (
        ["model.name=resnet18", "model.kwargs={}", "data.image_size=16"],
        "cell = 32 px is larger than the image",
    ),
    "batch": (["train.global_batch=1001"], "more than the 1000 training images"),
    "argument that is a key of its own": (["model.kwargs={num_classes: 3}"], "model.kwargs.num_classes: comes from"),
    "no mapping": (["model.checkpoint=LIST"], "holds a list, no tensors by name"),
    "optimiser": (["optimizer.name=admw"], "did you mean adamw"),
    "optimiser argument": (["optimizer.kwargs={momentun: 0.9}"], "momentun"),
    "plugin": (["plugins=[no_such_module]"], "plugins: no_such_module cannot be imported"),
    "checkpoint missing": (["model.checkpoint=/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_line(train_net, tmp_path, case):
    overrides, message = BAD_INPUT[case]
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    overrides = [override.replace("LIST", str(tmp_path / "list.pt")) for override in overrides]
    code, _, error = train_net("--config", DIGITS, f"output_dir={tmp_path}/run", *overrides)
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_missing_config_is_one_clear_line(train_net):
    code, _, error = train_net("--config", ROOT / "configs" / "digit_vit.yaml")
    assert code == 2 and "did you mean" in error and "digits_vit.yaml" in error


def test_the_traceback_can_be_asked_for(train_net, tmp_path):
    with pytest.raises(InputError):
        train_net("--config", DIGITS, "--traceback", "train.epohcs=3")


def test_a_finished_run_is_not_overwritten(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run", "train.max_iters=5"]
    assert train_net(*run)[0] == 0
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    code, _, error = train_net(*run)
    assert code == 2 and "holds a run already: continue it with --resume" in error
    assert (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes() == before


def test_weights_that_code_or_an_accident_spoiled_are_refused(train_net, tmp_path):
    whole = timm.create_model("test_vit")
    torch.save(whole, tmp_path / "module.pt")  # the pickled model, not its state dict
    torch.save(whole.state_dict(), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:-1000])
    run = ["--config", DIGITS, f"output_dir={tmp_path}/r"]
    for name, message in {"module.pt": "save its state_dict() alone", "cut.pt": "is damaged or no checkpoint"}.items():
        code, _, error = train_net(*run, f"model.checkpoint={tmp_path}/{name}")
        assert code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_number_of_processes_that_does_not_divide_the_batch_is_refused(command, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
    finished = command(*launch, TRAIN_NET, "--config", DIGITS, f"output_dir={tmp_path}/run")
    assert finished.returncode != 0
    assert "train.global_batch = 50: does not divide into 3 processes" in finished.stderr
    assert "use 2 or 5 processes" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused_and_kept(train_net, tmp_path):
    run = ["--config", DIGITS, f"output_dir={tmp_path}/run"]
    assert train_net(*run, "train.max_iters=5")[0] == 0
    before = (tmp_path / "run" / "checkpoints" / "last.pt").read_bytes()
    for overrides in (["model.kwargs.embed_dim=32"], ["model.kwargs.depth=3"]):
        code, _, error = train_net(*run, "--resume", *overrides)
        assert code == 2 and "--resume: model.kwargs = {" in error and error.count("\n") == 1, error
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    code, _, error = train_net(
        "--config", ROOT / "configs" / "digits_resnet.yaml", f"model.checkpoint={last}", f"output_dir={tmp_path}/other"
    )
    assert code == 2 and "is of another model: it fills 0 of" in error and error.count("\n") == 1
    assert last.read_bytes() == before
