"""The benchmark runs, its figures fit each other, and its page is written from them."""

from __future__ import annotations

import json

import pytest
import torch

from tools import benchmark
from tools.benchmarking.data import measure_data
from tools.benchmarking.figures import Figure, in_turns, ratio_of, table
from tools.benchmarking.optimizer import measure_equality
from tools.benchmarking.processes import measure_processes
from tools.benchmarking.steps import Timing
from tools.pages import performance_page
from tools.pages.performance_page import NO_GPU

CPU = torch.device("cpu")
TINY = ["--models", "resnet10t:64:2", "--rounds", "2"]


def test_steps_and_memory_stand_beside_their_limits(call, tmp_path):
    file, page = tmp_path / "folder" / "results.json", tmp_path / "page.md"
    code, printed, errors = call(benchmark, "--parts", "steps", "memory", *TINY, "--json", file)
    assert code == 0, errors
    figures = {(figure["part"], figure["name"]): figure for figure in json.loads(file.read_text())["figures"]}
    trainer, masked, cropped = (figures["steps", name] for name in ("our trainer", "masking 0.5", "random_crop 0.5"))
    assert (trainer["against"], trainer["limit"], trainer["target"]) == ("bare loop", 1.0, 1.02)
    assert (masked["against"], masked["limit"]) == ("our trainer", 2.0)  # pixels that are masked are computed
    assert 1.2 < cropped["limit"] < 1.6 and cropped["target"] == pytest.approx(1.05 * cropped["limit"])
    assert all(figure["value"] > 0 for figure in figures.values())
    plain, with_masking = figures["memory", "our trainer"], figures["memory", "masking 0.5"]
    assert with_masking["ratio"] == pytest.approx(with_masking["value"] / plain["value"])
    assert all(name in printed for _, name in figures)

    assert call(performance_page, file, file, "--output", page)[0] == 0
    text = page.read_text()
    assert text.count("| masking 0.5") == 4 and NO_GPU in text and "$machines" not in text
    content = json.loads(file.read_text())
    content["machine"]["device"] = "NVIDIA H200"
    file.write_text(json.dumps(content))
    assert call(performance_page, file, "--output", page)[0] == 0
    assert NO_GPU not in page.read_text()


def test_the_other_parts():
    usual, ours = measure_processes()[1:]
    assert (usual.ratio, ours.ratio) == (2.0, 1.0) and ours.verdict == "met (≤ 1)"
    (difference,) = measure_equality("resnet10t", CPU)
    assert 0 <= difference.value < 1e-6 and difference.note.endswith("met")
    reference, loader = measure_data(images=16, batch=8, workers=1, timing=Timing(CPU, rounds=2, warm_up=0, repeats=1))
    assert reference.value > 0 and loader.against == reference.name and loader.at_least


def test_every_round_has_every_contender_and_begins_with_another():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = in_turns(steps, rounds=3, warm_up=1, device=CPU, repeats=2)
    rounds = [order[start : start + 6 : 2] for start in range(0, len(order), 6)]
    assert rounds == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_of_pairs_and_verdicts_of_their_median():
    assert ratio_of([2, 3, 40], [1, 2, 10]) == {"ratio": 2, "low": 1.75, "high": 3}
    slow = Figure("steps", "case", "name", 1.0, "ms", **ratio_of([2, 3, 40], [1, 2, 10]), target=1.9)
    assert slow.verdict == "missed (≤ 1.9)"
    fast = Figure("steps", "case", "name", 1.0, "ms", ratio=2.0, low=2.0, high=2.0, target=2.0, at_least=True)
    assert fast.verdict == "met (≥ 2)"
    assert "missed (≤ 1.9)" in table([slow, fast]) and table([slow, fast]).count("case") == 2  # the header's, and once


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--models", "vit_tyny_patch16_224:96:2"], "did you mean 'vit_tiny_patch16_224'?"),
        (["--models", "resnet50"], "--models resnet50: allowed is NAME:SIZE:BATCH"),
        (["--models", "resnet50:0:4"], "--models resnet50:0:4: allowed is NAME:SIZE:BATCH"),
        (["--device", "cuda"], "--device cuda: torch sees no such device"),
        (["--rounds", "0"], "--rounds 0: allowed is 1 or more"),
        (["--parts", "steps", *TINY, "--only", "masking 0.5, windows left out"], "resnet10t allows bare loop, timm"),
        (["--parts", "memory", "--models", "vit_tiny_patch16_224:8:2"], "vit_tiny_patch16_224, 8 px, batch 16, fp32"),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, error):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, errors = call(benchmark, *arguments, "--json", tmp_path / "results.json")
    assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and error in errors
    assert not (tmp_path / "results.json").exists()


def test_a_page_needs_files_of_the_benchmark(call, tmp_path):
    (tmp_path / "foreign.json").write_text('{"top1": 80}')
    (tmp_path / "broken.json").write_text("{")
    for name in ("none.json", "foreign.json", "broken.json"):
        code, _, errors = call(performance_page, tmp_path / name, "--output", tmp_path / "page.md")
        assert code == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and name in errors
    assert not (tmp_path / "page.md").exists()
