"""Where eval_net.py puts its results: none replace others, and it says of which checkpoint they are."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from engine import defaults
from engine.config_file import load_config
from engine.distributed import Process
from engine.evaluation_run import LONGEST, Target, folder_for
from tools import compare_runs, eval_net

DIGITS = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"
SHORT = ("train.max_iters=3", "data.workers=0", "model.kwargs.depth=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of three iterations, evaluated at the last one."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    defaults.train(load_config(DIGITS, [*SHORT, f"output_dir={folder}"]), Process(0, 1, torch.device("cpu")), False)
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def evaluate(call):
    """Call the tool, which must succeed; returns what it printed."""

    def evaluated(*arguments: object) -> str:
        code, output, error = call(eval_net, *arguments)
        assert code == 0, error
        return output

    return evaluated


def test_another_evaluation_goes_to_another_folder(evaluate, run):
    asked = {
        "best": [],
        "best_data.image_size=12": ["data.image_size=12"],
        "best_augsub=masking_data.image_size=12_ratios=0,0.5": [
            "data.image_size=12", "--augsub", "masking", "--ratios", "0,0.5",
        ],
        "best_sub-model": ["--sub-model", "data.workers=0", "evaluation.batch=100"],
    }  # fmt: skip
    kept: dict[Path, bytes] = {}
    for name, arguments in asked.items():
        folder = run / "evaluation" / name
        assert evaluate(run, *arguments).endswith(f"results in {folder}\n")
        assert all(path.read_bytes() == content for path, content in kept.items())
        kept |= {path: path.read_bytes() for path in folder.iterdir()}
    assert {path.name for path in (run / "evaluation").iterdir()} == asked.keys()
    evaluate(run, "data.workers=0")  # which changes no result
    assert {path.name for path in (run / "evaluation").iterdir()} == asked.keys()


def folder_of(*asked: str) -> Path:
    return folder_for(Target(load_config(DIGITS), None, Path("runs/X/evaluation/best")), asked)


def test_the_name_of_the_folder_tells_what_was_asked_for():
    assert folder_of() == folder_of("data.workers=3", "plugins=[p]") == Path("runs/X/evaluation/best")
    assert folder_of("data.eval_split=test").name == "best_data.eval_split=test"
    assert folder_of("b=2", "a=1") == folder_of("a=1", "b=2")
    assert folder_of("data.root=/a/b").name == "best_data.root=_a_b"
    others = [f"data.root=/data/{'x' * 300}/{end}" for end in ("one", "two")]
    others += ["data.root=画", "data.root=图", "model.kwargs={a: 1}", "model.kwargs={a; 1}"]
    names = [folder_of(other).name for other in others]
    assert len(set(names)) == len(names)
    assert all(len(name.encode()) <= LONGEST + 9 and "/" not in name for name in names)


def test_weights_of_one_name_in_two_folders_have_results_of_their_own(evaluate, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(run / "checkpoints" / "last.pt", tmp_path / name / "model.pt")
        evaluate(f"{name}/model.pt")
    found = {json.loads(path.read_text())["source"] for path in tmp_path.glob("runs/evaluation/*/results.json")}
    assert found == {"a/model.pt", "b/model.pt"}


def test_a_folder_that_is_written_again_holds_one_evaluation(evaluate, run, tmp_path):
    output = ("--output", tmp_path / "results")
    evaluate(run, *output, "--augsub", "masking", "--ratios", "0,0.5")
    (tmp_path / "results" / "ema_confusion.png").touch()  # of a run with averaged weights
    (tmp_path / "results" / "notes.txt").touch()  # the user's
    evaluate(run, *output)
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"results.csv", "classes.csv", "results.json", "confusion.png", "calibration.png", "notes.txt"}


def test_it_is_said_which_checkpoint_is_reported(evaluate, call, train_net, trained, run, caplog, tmp_path):
    """The best one here, the last one by compare_runs.py; where both are one there is nothing to say."""
    said = f"{run}: this is its best checkpoint; summary.json and compare_runs.py report the last one"
    with caplog.at_level(logging.INFO):
        evaluate(trained, "--output", tmp_path / "results")
        assert "best checkpoint" not in caplog.text
        arguments = ["--config", DIGITS, *SHORT, "train.max_iters=5", f"output_dir={run}", "--resume"]
        assert train_net(*arguments, "optimizer.lr=1e-1")[0] == 0  # it gets worse
        best, last = (json.loads((run / "summary.json").read_text())[name] for name in ("best_value", "top1"))
        assert best > last
        evaluate(run)
        assert said in caplog.text
    (result,) = json.loads((run / "evaluation" / "best" / "results.json").read_text())["results"]
    assert result["top1"] == pytest.approx(best, abs=0.13)
    evaluate(run / "checkpoints" / "last.pt")
    (result,) = json.loads((run / "evaluation" / "last" / "results.json").read_text())["results"]
    assert result["top1"] == pytest.approx(last, abs=0.13)
    other = shutil.copytree(run, run.with_name("other"))
    config = (run / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("main_weight: 0.5", "main_weight: 0.6"))
    code, printed, error = call(compare_runs, run, other)
    assert code == 0, error
    assert f"**{last:.2f}**" in printed and "of the runs' last checkpoints, not of their best ones" in printed
