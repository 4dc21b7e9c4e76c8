"""Losses that are not finite, folders that vanish, commands that changed, clocks that go backwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load, load_metadata
from engine.checkpoint_file import split_tensors
from tests.faults.conftest import assert_same_end, outcome

PLUGIN = '''
import os
import torch
import augsub


@augsub.register("poison")
class Poison(augsub.SubModelAugmentation):
    """From the n-th forward on, tokens that are not finite."""

    sites = ("tokens",)
    forwards = 0

    def tokens(self, tokens):
        Poison.forwards += torch.is_grad_enabled()  # not those that only look at shapes or draw pictures
        if Poison.forwards >= int(os.environ["POISON_AT"]) and os.environ.get("RANK", "0") == os.environ["POISON_RANK"]:
            tokens.values = tokens.values * float(os.environ["POISON"])
        return tokens
'''
POISONED = ("plugins=[poison]", "augsub.sub_models=[{augmentations: [{name: poison, ratio: 0.1}]}]")


@pytest.fixture
def poison(server):
    """A plugin in the folder where the runs are started."""
    (server.folder / "poison.py").write_text(PLUGIN)
    return lambda at, rank=0, value="nan": {"POISON_AT": str(at), "POISON_RANK": str(rank), "POISON": value}


@pytest.mark.faults(
    fault="a loss is NaN or infinite at iteration k, in a single process or in one of two",
    promise="one line that names the iteration, exit code 2; no process saves anything of it, though its own loss was "
    "finite, and the last checkpoint goes on",
)
@pytest.mark.parametrize("iteration", [1, 6, 12])  # at the first step, between two, and where an epoch ends
@pytest.mark.parametrize(
    ("value", "processes", "strategy"), [("nan", 1, "ddp"), ("inf", 1, "ddp"), ("nan", 2, "ddp"), ("nan", 2, "fsdp2")]
)
def test_a_loss_that_is_not_finite(server, digits, tmp_path, poison, iteration, value, processes, strategy):
    run = [*digits, *POISONED, f"distributed.strategy={strategy}", "checkpoint.period=1", f"output_dir={tmp_path}/run"]
    poisoned = poison(2 * iteration, rank=processes - 1, value=value)  # two forwards make a step
    ended = server.run(*run, processes=processes, environment=poisoned)
    message = f"error: the loss is not finite at iteration {iteration};"
    assert all(end.code == 2 and end.err.count("\n") == 1 and message in end.err for end in ended), ended
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert last.exists() == (iteration > 1)
    if last.exists():
        assert load_metadata(last)["iteration"] == iteration - 1
        assert all(tensor.isfinite().all() for tensor in split_tensors(load(last))[0].values())
        server.succeed(*run, "--resume", processes=processes, environment=poison(10_000))


@pytest.mark.faults(
    fault="the data folder is gone when the run is resumed",
    promise="one line that names it, exit code 2; with the folder back, or data.root elsewhere, the run goes on",
)
def test_a_missing_data_folder(server, image_folder, tmp_path):
    config = Path(__file__).parents[2] / "configs" / "finetune_folder.yaml"
    run = ["--config", config, "model.pretrained=false", "model.name=test_vit", "data.image_size=null",
           "train.epochs=4", "schedule.warmup_epochs=1", "data.workers=0", f"output_dir={tmp_path}/run"]  # fmt: skip
    server.succeed(*run, f"data.root={image_folder}", "train.max_iters=2")
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    before = last.read_bytes()
    image_folder.rename(tmp_path / "moved")
    error = server.refused(*run, f"data.root={image_folder}", "--resume")
    assert error == f"error: data.root = {image_folder}: no such folder\n" and last.read_bytes() == before
    out = server.succeed(*run, f"data.root={tmp_path}/moved", "--resume")
    assert "resumed" in out and "changed: data.root" in out


REFUSED = {
    "seed=1": "seed = 1, the run has 0",
    "model.drop_path_rate=0.3": "model.drop_path_rate = 0.3, the run has 0.2",
    "model.kwargs.depth=3": "model.kwargs = {",
    "data.dataset=synthetic": "data.dataset = synthetic, the run has digits",
    "augsub.main_weight=0.7": "augsub.main_weight = 0.7, the run has 0.5",
    "augsub.sub_models=[]": "augsub.sub_models = []",
    "train.epochs=70": "train.epochs = 70, the run has 60",
    "train.global_batch=40": "train.global_batch = 40, the run has 80",
    "optimizer.weight_decay=0.1": "optimizer.weight_decay = 0.1, the run has 0.05",
    "mixup.mixup_alpha=0.1": "mixup.mixup_alpha = 0.1, the run has 0.8",
    "schedule.min_lr=0.0": "schedule.min_lr = 0.0, the run has 1e-05",
}


@pytest.mark.faults(
    fault="the command changed when the run is resumed",
    promise="what may change is listed and logged; anything else is refused in one line, and nothing is touched",
)
def test_a_changed_command(server, digits, tmp_path):
    run = [*digits, f"output_dir={tmp_path}/run"]
    server.succeed(*run, "train.max_iters=8")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for change, message in REFUSED.items():
        error = server.refused(*run, "--resume", change)
        remedy = "train.extend=true" if change.startswith(("train.", "schedule.")) else "start it from these weights"
        assert error.startswith(f"error: --resume: {message}") and remedy in error
    assert files == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    allowed = ["data.workers=1", "log.period=3", "optimizer.lr=1e-4", "evaluation.batch=100", "checkpoint.keep=1"]
    out = server.succeed(*run, "--resume", *allowed)
    for line in ("data.workers: 0 -> 1", "log.period: 7 -> 3", "optimizer.lr: 0.002 -> 0.0001"):
        assert f"changed: {line}\n" in out


@pytest.mark.faults(
    fault="a run is to be longer than it was begun, and is killed on its way",
    promise="with train.extend=true it goes on with all of its state, bit-identical to one that was so long from its "
    "start where the curve of the learning rate is the same",
)
def test_an_extended_run(server, digits, finished, tmp_path):
    run = [
        *digits,
        "train.max_iters=null",
        "train.global_batch=200",
        "schedule.name=constant",
        "schedule.warmup_epochs=0",
    ]
    long, short = [*run, "train.epochs=6"], [*run, "train.epochs=4", f"output_dir={tmp_path}/run"]
    server.succeed(*short)
    refused = server.refused(*short, "--resume", "train.epochs=6")
    assert "train.epochs = 6, the run has 4: train.extend=true goes on so, with all of the run's state" in refused
    folder = f"{tmp_path}/run"
    kill = {"function": "Trainer.run_step", "entry": 7, "delay": 0.0}
    assert server.run("--resume", folder, "train.extend=true", "train.epochs=6", kill=kill)[0].code != 0
    out = server.succeed("--resume", folder, "train.extend=true", "train.epochs=6")
    assert "resumed" in out
    tensors, *rest = outcome(tmp_path / "run")
    others, *_ = outcome(finished(*long))
    assert not [path for path in tensors if not torch.equal(tensors[path], others[path])]
    assert rest[-1]["epochs"] == 6.0


OTHER_WAYS = {
    "LoRA": ("model.lora={rank: 2, targets: [qkv, fc1]}",),
    "head alone": ("model.frozen=[all_but_head]", "evaluation.metric=eval_loss"),
    "patience": ("train.max_iters=null", "train.epochs=6", "optimizer.lr=1e-9", "evaluation.patience=2"),
    "plateau": ("schedule.name=plateau", "schedule.patience=1", "optimizer.lr=1e-9"),
}


@pytest.mark.faults(
    fault="SIGKILL in a run with adapters, a frozen body, an early end, or a learning rate that falls on a plateau",
    promise="the resumed run ends bit-identical to one that was never killed",
)
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_a_killed_run_of_another_kind(server, digits, finished, tmp_path, way):
    run = [*digits, *OTHER_WAYS[way]]
    for entry in (9, 30):
        name = f"output_dir={tmp_path}/{entry}"
        killed = server.run(*run, name, kill={"function": "Trainer.run_step", "entry": entry, "delay": 0.0})
        assert killed[0].code != 0
        server.succeed(*run, name, "--resume")
        assert_same_end(finished(*run), tmp_path / str(entry))


@pytest.mark.faults(
    fault="two runs in one folder",
    promise="the second one ends with one line that names the first, exit code 2; the first one ends undisturbed",
)
@pytest.mark.parametrize("arguments", [(), ("--resume",)], ids=["new", "resume"])
def test_two_runs_in_one_folder(server, digits, finished, tmp_path, arguments):
    first = server.start(*digits, f"output_dir={tmp_path}/run")
    while not (tmp_path / "run" / "checkpoints" / "last.pt").exists():
        os.sched_yield()
    taken = f"another run is writing into it (process {first.pid} on " if arguments else "holds a run already"
    assert taken in server.refused(*digits, f"output_dir={tmp_path}/run", *arguments)
    assert server.wait(first).code == 0
    assert_same_end(finished(*digits), tmp_path / "run")


BACKWARDS = """
import time
from tests.faults.conftest import assert_same_end, outcome

real, start = time.time, time.time()
time.time = lambda: 2 * start - real()  # a second back for each second on
"""


@pytest.mark.faults(
    fault="the clock goes backwards, and files have times in the future",
    promise="the run and what a resumed one finds do not change by a bit",
)
def test_a_clock_that_goes_backwards(server, digits, finished, tmp_path):
    (server.folder / "backwards.py").write_text(BACKWARDS)
    run = [*digits, "plugins=[backwards]", "checkpoint.every_minutes=1000", f"output_dir={tmp_path}/run"]
    kill = {"function": "Trainer.run_step", "entry": 20, "delay": 0.0}
    assert server.run(*run, kill=kill)[0].code != 0
    for age, path in enumerate(sorted((tmp_path / "run" / "checkpoints").iterdir())):
        os.utime(path, (4e9 - age, 4e9 - age))
    assert "last.pt after" in server.succeed(*run, "--resume")
    assert_same_end(finished(*digits), tmp_path / "run")
