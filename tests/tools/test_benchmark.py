"""The benchmark runs, its measurements fit each other, and it shows what it wrote."""

from __future__ import annotations

import json

import pytest
import torch

import tools.benchmark
from tools.benchmarking.loading import measure_loading
from tools.benchmarking.measurements import Measurement, in_turns, ratio_of, table
from tools.benchmarking.steps import Timing

CPU = torch.device("cpu")
TINY = ["--models", "resnet10t:64:2", "--rounds", "2"]


def test_steps_and_memory_stand_beside_their_limits(tmp_path, capsys):
    file = tmp_path / "folder" / "results.json"
    assert tools.benchmark.main(["--parts", "steps", "memory", *TINY, "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    lines = {(line["part"], line["name"]): line for line in json.loads(file.read_text())["lines"]}
    trainer, masked, cropped = (lines["steps", name] for name in ("our trainer", "masking 0.5", "random_crop 0.5"))
    assert (trainer["against"], trainer["limit"]) == ("bare loop", 1.0)
    assert (masked["against"], masked["limit"]) == ("our trainer", 2.0)  # pixels that are masked are computed
    assert 1.2 < cropped["limit"] < 1.6 and all(line["value"] > 0 for line in lines.values())
    plain, with_masking = lines["memory", "our trainer"], lines["memory", "masking 0.5"]
    assert with_masking["ratio"] == pytest.approx(with_masking["value"] / plain["value"])
    assert all(name in printed for _, name in lines)

    assert tools.benchmark.main(["--show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("| masking 0.5") == 2 and "### Peak memory" in shown


def test_loading_is_measured_against_timms():
    timing = Timing(CPU, rounds=2, warm_up=0, repeats=1)
    reference, ours = measure_loading(images=16, batch=8, workers=1, timing=timing)
    assert reference.value > 0 and ours.against == reference.name and ours.ratio > 0


def test_every_round_has_every_contender_and_begins_with_another():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = in_turns(steps, rounds=3, warm_up=1, device=CPU, repeats=2)
    rounds = [order[start : start + 6 : 2] for start in range(0, len(order), 6)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_of_pairs():
    assert ratio_of([2, 3, 40], [1, 2, 10]) == {"ratio": 2, "low": 1.75, "high": 3}
    line = Measurement("steps", "case", "name", 1.0, "ms", **ratio_of([2, 3, 40], [1, 2, 10]), limit=1.9)
    assert "2.000 [1.750, 3.000]" in table([line, line]) and table([line, line]).count("case") == 2  # header, and once


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--models", "vit_tyny_patch16_224:96:2"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--models", "resnet50:0:4"], "--models resnet50:0:4: allowed is NAME:SIZE:BATCH"),
        (["--device", "cuda"], "--device cuda: torch sees no such device"),
        (["--rounds", "0"], "--rounds 0: allowed is 1 or more"),
        (["--parts", "steps", *TINY, "--only", "masking 0.5, windows left out"], "resnet10t allows bare loop, timm"),
        (["--parts", "memory", "--models", "vit_tiny_patch16_224:8:2"], "vit_tiny_patch16_224, 8 px, batch 16, fp32"),
        (["--show", "nothing.json"], "nothing.json: cannot be read"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, arguments, error):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    assert tools.benchmark.main([*arguments, "--json", str(tmp_path / "results.json")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and error in errors
    assert not (tmp_path / "results.json").exists()
