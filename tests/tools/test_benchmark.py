"""The benchmark runs, its measurements fit each other, and it shows what it wrote."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from tools import benchmark
from tools.benchmark import table
from tools.benchmarking.loading import measure_loading, measure_runs
from tools.benchmarking.steps import compared, configuration, in_turns

TABLES = Path(__file__).parents[2] / "docs" / "performance_tables.py"
TINY = ["--models", "resnet10t:64:2", "--rounds", "2"]
SKIPPED = ["our trainer, paths skipped", "masking 0.5, paths skipped"]
SOME = ["--only", "bare loop", "timm task", "our trainer", "masking 0.5", "random_crop 0.5", *SKIPPED]
DEPTH = ["model.drop_path_rate=0.5", "model.drop_path_shape=uniform"]


@pytest.mark.slow
def test_steps_and_memory_stand_beside_their_limits(call, capsys, tmp_path):
    file = tmp_path / "folder" / "results.json"
    code, printed, _ = call(benchmark, "--parts", "steps", "memory", *TINY, *SOME, *DEPTH, "--json", file)
    lines = {(line["part"], line["name"]): line for line in json.loads(file.read_text())["lines"]}
    trainer, masked, cropped = (lines["steps", name] for name in ("our trainer", "masking 0.5", "random_crop 0.5"))
    assert code == 0 and (trainer["against"], trainer["limit"]) == ("bare loop", 1.0)
    assert (masked["against"], masked["limit"]) == ("our trainer", 2.0)  # pixels that are masked are computed
    skipped, both = (lines["steps", name] for name in SKIPPED)
    assert (skipped["against"], both["against"]) == ("our trainer", "timm task")
    assert 0.5 < skipped["limit"] < 0.8 and both["limit"] == pytest.approx(2 * skipped["limit"])
    assert 1.2 < cropped["limit"] < 1.6 and all(line["value"] > 0 for line in lines.values())
    plain, with_masking = lines["memory", "our trainer"], lines["memory", "masking 0.5"]
    assert with_masking["ratio"] == pytest.approx(with_masking["value"] / plain["value"])
    assert 10 < plain["value"] < 1000 and 1 < with_masking["limit"] < 1.5  # 20 MB of gradients
    assert all(name in printed for _, name in lines)
    runpy.run_path(str(TABLES))["show"]([file])
    shown = capsys.readouterr().out
    asked = [line.removeprefix("### ") for line in shown.splitlines() if line.startswith("### ")]
    assert sorted(asked) == [f"{what}?" for what in (
        "How much memory does it need", "What do skipped paths save", "What does a sub-model cost",
        "What does the trainer cost",
    )]  # fmt: skip
    assert all(f"| {line['name']}" in shown for line in lines.values()) and shown.rstrip().endswith("`")


def test_loading_is_measured_against_timms_and_ways_to_hold_images_against_each_other():
    pairs = list(measure_loading(images=16, batch=8, workers=1, rounds=1, device=torch.device("cpu"), photographs=None))
    assert [ours["name"] for _, ours in pairs] == ["our loader", "data.draft_decoding", "shards", "shards"]
    for reference, ours in pairs:
        assert reference["value"] > 0 and ours["against"] == reference["name"] and ours["ratio"] > 0


def test_whole_runs_are_measured_beside_timms_loop():
    (lines,) = measure_runs([configuration("resnet10t:64:4")], 9, 1, 2, torch.device("cpu"), None)
    assert [line["name"] for line in lines] == ["timm's loop", "our run"]
    assert lines[1]["against"] == "timm's loop" and lines[1]["ratio"] > 0 and "9 JPEGs, 1 workers" in lines[1]["case"]


def test_every_round_has_every_contender_and_begins_with_another():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = in_turns(steps, rounds=3, warm_up=1, repeats=2)
    rounds = [order[start : start + 6 : 2] for start in range(0, len(order), 6)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_of_pairs():
    loop, trainer = compared("steps", "case", "ms", {"bare loop": [1, 2, 10], "our trainer": [2, 3, 40]}).values()
    assert (loop["value"], loop["ratio"], loop["low"], loop["high"]) == (2, None, None, None)
    assert (trainer["value"], trainer["ratio"], trainer["low"], trainer["high"]) == (3, 2, 1.75, 3)
    printed = table([loop, trainer | {"limit": 1.9}])
    assert "2.000 [1.750, 3.000]  bare loop  1.900" in printed and printed.count("case") == 2  # header, and once


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--models", "vit_tyny_patch16_224:96:2"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--models", "resnet50:0:4"], "--models resnet50:0:4: allowed is NAME:SIZE:BATCH"),
        (["--device", "cuda"], "--device cuda: torch sees no such device"),
        (["--rounds", "0"], "--rounds 0: allowed is 1 or more"),
        (["--parts", "steps", *TINY, "--only", "masking 0.5, windows left out"], "resnet10t allows bare loop, timm"),
        (["--parts", "steps", "--models", "vit_tiny_patch16_224:8:2"], "8 x 8 pixels do not fit"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, error):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, said = call(benchmark, *arguments, "--json", tmp_path / "results.json")
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and error in said
    assert not (tmp_path / "results.json").exists()
