"""A model whose logits are NaN is said to be one, and gets no figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from engine import defaults
from engine.config_file import load_config
from engine.distributed import Process
from tools import eval_net
from tools.comparison.finished_runs import read_run

DIGITS = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"
SETTINGS = ("ema.enabled=true", "train.max_iters=2", "data.workers=0", "model.kwargs.depth=1")
PLUGIN = '''
from engine.hooks import HOOK_REGISTRY
from engine.train_loop import HookBase


@HOOK_REGISTRY.register()
class Ruin(HookBase):
    """Spoils the average of the weights, whatever the loss is."""

    def before_train(self):
        average = next(hook for hook in self.trainer.hooks if hook.state_name == "ema")
        average.state_dict()["model"]["head.bias"].fill_(float("nan"))
'''


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two iterations, with averaged weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = load_config(DIGITS, [*SETTINGS, f"output_dir={folder}"])
    defaults.train(config, Process(0, 1, torch.device("cpu")), resume=False)
    return folder


def spoilt(trained: Path, target: Path, *keys: str) -> Path:
    """The run's checkpoint with one weight of a state dict that is NaN."""
    state = weights = torch.load(trained / "checkpoints" / "last.pt", weights_only=True)
    for key in keys:
        weights = weights[key]
    weights["head.bias"][3] = torch.nan
    torch.save(state, target)
    return target


def assert_refused(ended: tuple[int, str, str], message: str) -> None:
    assert ended[0] == 2 and ended[2] == f"error: evaluation: logits of {message}\n"


@pytest.mark.parametrize(("keys", "whose"), [(["model"], "trained"), (["hooks", "ema", "model"], "averaged")])
def test_neither_tool_gives_figures_of_nan(train_net, call, trained, tmp_path, keys, whose):
    file = spoilt(trained, tmp_path / "spoilt.pt", *keys)
    message = f"the {whose} weights are NaN or infinite for 797 of 797 images"
    ended = train_net("--config", DIGITS, *SETTINGS, "--eval-only", f"evaluation.checkpoint={file}")
    assert_refused(ended, message)
    assert ended[1] == "" or "{" not in ended[1]
    assert_refused(call(eval_net, file, "--output", tmp_path / "results", "data.workers=0"), message)
    assert not list((tmp_path / "results").iterdir())


def test_a_sub_model_whose_logits_are_nan(call, trained, tmp_path, monkeypatch):
    """Its main model's are not."""
    (tmp_path / "nothing.py").write_text(
        'import augsub\n\n\n@augsub.register("nothing")\nclass Nothing(augsub.SubModelAugmentation):\n'
        '    """All tokens become NaN."""\n\n    sites = ("tokens",)\n\n    def tokens(self, tokens):\n'
        '        tokens.values = tokens.values * float("nan")\n        return tokens\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    ended = call(eval_net, trained, "plugins=[nothing]", "--augsub", "nothing", "--output", tmp_path / "results")
    assert_refused(ended, "the sub-model nothing 0.5 of the trained weights are NaN or infinite for 797 of 797 images")


def test_a_training_run_stops_at_an_evaluation_that_says_nothing(train_net, tmp_path, monkeypatch):
    (tmp_path / "ruin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    ended = train_net(
        "--config", DIGITS, *SETTINGS, "plugins=[ruin]", "hooks=[{name: Ruin}]", f"output_dir={tmp_path}/run"
    )
    assert_refused(ended, "the averaged weights after iteration 2 are NaN or infinite for 797 of 797 images")
    assert not (tmp_path / "run" / "checkpoints" / "last.pt").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_is_compared_though_a_loss_of_it_overflowed(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "main_loss": None}))
    run = read_run(folder)
    assert run.value("top1") == summary["top1"] and run.value("main_loss") != run.value("main_loss")
