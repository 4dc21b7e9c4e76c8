"""Bad input to runs and plans: one line that names the place, the value and what is allowed; nothing is written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from engine.announcement import log_warnings
from engine.config import Config, EmaConfig
from engine.errors import InputError
from engine.writers import read_lines

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
RESNET = ("model.name=resnet18", "model.kwargs={}")


def augmented(augmentation: str) -> str:
    return f"augsub.sub_models=[{{augmentations: [{augmentation}]}}]"


BAD_INPUT = [
    (["train.epohcs=3"], "Did you mean: 'epochs'"),
    (["data.dataset=folder", "data.root=/nowhere"], "data.root = /nowhere: no such folder"),
    (["model.name=vit_tiny_patch16_242"], "did you mean 'vit_tiny_patch16_224'"),
    (["model.kwargs={dept: 3}"], "got an unexpected keyword argument 'dept'"),
    (["model.kwargs={num_classes: 3}"], "model.kwargs.num_classes: comes from"),
    (["model.kwargs={depth: null}"], "model.kwargs.depth = null: must have a value, or go"),
    (["model.kwargs={patch_size:4,depth:4}"], "model.kwargs.patch_size:4 = null: a space is missing after the colon"),
    (["model.kwargs={features_only: true, patch_size: 2}"], "the model is no classifier: its output is list"),
    (["model.frozen=[pos_embed,cls_token,patch_embed,blocks,norm,head]"], "model: frozen: nothing is left to learn"),
    (["model.checkpoint=LIST"], "holds a list, no tensors by name"),
    (["model.checkpoint=MODULE"], "save its state_dict() alone"),
    (["model.checkpoint=CUT"], "is damaged or no checkpoint"),
    (["model.checkpoint=/nowhere.pt"], "checkpoint /nowhere.pt does not exist"),
    ([augmented("maskin")], "did you mean 'masking'"),
    ([augmented("{name: masking, ratio: 1.5}")], "augsub.sub_models: masking: ratio = 1.5"),
    ([augmented("{name: masking, ratio:0.5}")], "ratio:0.5 = null: a space is missing"),
    (["augsub.sub_models=[{weight: 0.5}]"], "at least one is needed"),
    ([*RESNET, augmented("{name: dropout, ratio: 0.1}")], "dropout has no site in ResNet"),
    ([*RESNET, "data.image_size=16"], "cell = 32 px is larger than the image"),
    (["data.image_size=1"], "1 x 1 pixels do not fit"),
    (
        ["model.name=inception_v3", "model.kwargs={}", "data.image_size=16", "augsub.sub_models=[]"],
        "16 x 16 pixels do not",
    ),
    ([f"output_dir={'x' * 300}"], "File name too long"),
    (["train.global_batch=1001"], "more than the 1000 training images"),
    (["optimizer.name=admw"], "did you mean 'adamw'"),
    (["optimizer.name=adahessian"], "optimizer.name = adahessian: needs the gradient's own graph"),
    (["optimizer.kwargs={momentun: 0.9}"], "momentun"),
    (["plugins=[no_such_module]"], "plugins: no_such_module cannot be imported"),
]


@pytest.mark.parametrize("as_a_plan", [False, True], ids=["run", "plan"])
def test_a_run_and_its_plan_refuse_bad_input_in_one_line(train_net, tmp_path, as_a_plan):
    files = {name: tmp_path / f"{name}.pt" for name in ("LIST", "MODULE", "CUT")}
    model = timm.create_model("test_vit")
    torch.save([torch.zeros(1)], files["LIST"])
    torch.save(model, files["MODULE"])  # the pickled model, not its state dict
    torch.save(model.state_dict(), files["CUT"])
    files["CUT"].write_bytes(files["CUT"].read_bytes()[:-1000])
    for overrides, message in BAD_INPUT[:: 4 if as_a_plan else 1]:
        for name, file in files.items():
            overrides = [override.replace(name, str(file)) for override in overrides]
        plan = ("--dry-run",) if as_a_plan else ()
        code, output, error = train_net("--config", DIGITS, f"output_dir={tmp_path}/run", *plan, *overrides)
        assert code == 2 and output == "", overrides
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error, error
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_one_value_in_each_channel_of_batchnorm_is_foreseen(train_net, tmp_path):
    """A network of stride 32 leaves one position of 32 pixels: two images at once are needed, unless it is frozen."""

    def train(*overrides: str) -> tuple:
        folder = f"output_dir={tmp_path}/{len(list(tmp_path.iterdir()))}"
        return train_net("--config", "digits_resnet", folder, "train.max_iters=1", *overrides)

    code, _, error = train("train.global_batch=4", "train.accumulation=4")
    assert code == 2 and "train.global_batch = 4, one image at once: raise train.global_batch, or lower" in error
    assert "more than 1 value per channel" in error and list(tmp_path.iterdir()) == []
    assert train("train.global_batch=4", "train.accumulation=2")[0] == 0
    assert train("train.global_batch=1", "model.frozen=[conv1,bn1,layer1,layer2,layer3,layer4]")[0] == 0


@pytest.mark.parametrize(("steps", "advice"), [(36, 0.7), (1200, 0.992), (10_000, 0.999), (300_000, 0.99997)])
def test_an_average_that_a_short_run_does_not_fill_is_told(steps, advice, caplog):
    """The decay that is advised suits the run."""
    config, trainer = Config(ema=EmaConfig(enabled=True, decay=0.999999)), SimpleNamespace(max_iterations=steps)
    log_warnings(config, trainer)
    share = 100 * 0.999999**steps
    assert (
        f"after {steps} steps the average still consists of the initial weights to {share:.1f} %" in caplog.messages[-1]
    )
    assert caplog.messages[-1].endswith(f"or set ema.decay={advice}")
    caplog.clear()
    for settings in ({"decay": advice}, {"warmup": True}, {"enabled": False}):
        log_warnings(Config(ema=EmaConfig(**{"enabled": True, "decay": 0.999999, **settings})), trainer)
    assert not caplog.messages and advice**steps < 1e-3


@pytest.mark.parametrize(("images", "told"), [(1, "rate 0.2 drops 0 of"), (4, "rate 0.04 drops 0.25 of"), (64, "")])
def test_skipped_paths_of_few_images_are_told(images, told, caplog):
    config = Config()
    config.train.skip_dropped_paths = True
    model = timm.create_model("test_vit", drop_path_rate=0.2)  # rates 0.04 to 0.2
    data = SimpleNamespace(micro_batch=images)
    log_warnings(config, SimpleNamespace(max_iterations=100, bare_model=model, data=data))
    assert told in "".join(caplog.messages) and bool(caplog.messages) == bool(told)


def test_the_traceback_can_be_asked_for(train_net):
    with pytest.raises(InputError):
        train_net("--config", DIGITS, "--traceback", "train.epohcs=3")


def test_what_is_there_is_not_overwritten_and_not_mistaken(train_net, tmp_path):
    """A run that ends without a finite loss, another command, another model: the checkpoint stays."""
    run, last = ("--config", DIGITS, f"output_dir={tmp_path}/run"), tmp_path / "run" / "checkpoints" / "last.pt"
    assert train_net(*run, "train.max_iters=20")[0] == 0
    before = last.read_bytes()
    code, _, error = train_net(*run, "--resume", "train.max_iters=60", "optimizer.lr=1e30")
    assert code == 2 and error.startswith("error: the loss is not finite at iteration 2") and error.count("\n") == 1
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["iteration"] == 20
    for command, message in {
        (*run,): "holds a run already: continue it with --resume",
        (*run, "--resume", "model.kwargs.depth=3"): "--resume: model.kwargs = {",
        ("--resume", tmp_path / "run", "output_dir=x"): "run output_dir=x: a run goes on in its own folder",
        ("--config", "digits_resnet", f"model.checkpoint={last}", f"output_dir={tmp_path}/other"):
            "is of another model: it fills 0 of",
    }.items():  # fmt: skip
        code, _, error = train_net(*command)
        assert code == 2 and message in error and error.count("\n") == 1, error
    assert last.read_bytes() == before and not (tmp_path / "other").exists()


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
    assert done < 1200 and train_net(*run, "--resume", f"train.max_iters={done + 20}")[0] == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == sorted(set(iterations)) and iterations[-1] == done + 20
