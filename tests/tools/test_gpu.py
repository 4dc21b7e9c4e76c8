"""The command for a GPU does all it can without one, keeps what it has, and shows what was found."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import gpu
from tools.machine import machine

TOOL = Path(gpu.__file__)
TABLES = runpy.run_path(str(TOOL.parents[1] / "docs" / "performance_tables.py"))


@pytest.mark.slow
def test_every_script_runs_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, TOOL, "--device", "cpu", "--output", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert {part["name"]: part["ended"] for part in results["parts"]} == dict.fromkeys(gpu.PARTS["cpu"], "done")
    checks = TABLES["checks_of"](tmp_path / "checks.xml")
    assert len(checks) >= 13 and all(counts["failed"] == 0 for counts in checks.values())
    lines = {name: json.loads((tmp_path / f"{name}.json").read_text())["lines"] for name in ("steps", "loading")}
    found = {name: {line["name"]: line["ratio"] for line in of_part} for name, of_part in lines.items()}
    assert found["steps"]["masking 0.5"] > 0 and found["loading"]["our loader"] > 0
    assert results["device"] == machine(is_gpu=False)["device"] and results["torch"] == torch.__version__
    assert len(done.stdout.split("\n\n")[1].splitlines()) <= 10  # the summary


@pytest.fixture
def three_parts(monkeypatch):
    """One that takes too long, with a process of its own; one that fails; one that is well."""
    wait = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(987)'])"
    parts = {"late": (2, f'-c "{wait}"'), "wrong": (60, "-c 'print(1 / 0)'"), "well": (60, "-c 'print(42)'")}
    monkeypatch.setitem(gpu.PARTS, "cpu", parts)


def test_a_part_that_takes_too_long_ends_with_its_processes_and_the_others_go_on(call, tmp_path, three_parts):
    code, out, err = call(gpu, "--device", "cpu", "--output", tmp_path)
    assert (code, err) == (2, f"error: not done: late, wrong; what they printed is in {tmp_path}\n")
    assert "time.sleep(987)" not in subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout
    assert "ZeroDivisionError" in out and "42" in out
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert [part["ended"] for part in parts] == ["cut off after 2 s", "failed", "done"]


def test_no_part_begins_when_the_time_is_over(call, tmp_path, three_parts, monkeypatch):
    monkeypatch.setitem(gpu.WHOLE, "cpu", 0)
    assert call(gpu, "--device", "cpu", "--output", tmp_path, "--only", "well")[0] == 2
    (part,) = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert (part["name"], part["ended"]) == ("well", "left out")


def test_parts_that_are_run_later_stand_beside_the_earlier_ones(call, tmp_path, three_parts):
    for names in (("wrong", "well"), ("well",)):
        call(gpu, "--device", "cpu", "--output", tmp_path, "--only", *names)
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert {part["name"]: part["ended"] for part in parts} == {"wrong": "failed", "well": "done"}


def test_what_gpus_have_shown_is_counted_from_their_results(tmp_path):
    folder = tmp_path / "h100"
    folder.mkdir()
    (folder / "checks.xml").write_text(
        "<testsuites><testsuite><testcase name='test_a_stopped_run_goes_on[9]'/>"
        "<testcase name='test_a_stopped_run_goes_on[15]'><failure/></testcase></testsuite></testsuites>"
    )
    (folder / "results.json").write_text(json.dumps({"device": "H100", "date": "2026-11-28"}))
    lines = [{"part": "steps", "case": "resnet50"}, {"part": "steps", "case": "resnet50"}]
    for device in ("cuda", "cpu"):
        content = {"machine": {"device": f"a {device}"}, "command": f"… --device {device}", "lines": lines}
        (folder / f"{device}.json").write_text(json.dumps(content))
    shown = TABLES["shown_table"](tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    assert ["a stopped run goes on", "1 of 2 on H100, 2026-11-28"] in rows
    assert ["steps: resnet50", "a cuda"] in rows and ["a step never waits for the device", "no GPU yet"] in rows


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--device", "cuda"], "error: --device cuda: torch sees no such device; --device cpu runs the same"),
        (
            ["--device", "cpu", "--only", "stepps"],
            "error: --only stepps: allowed are checks, steps, skipping, captured, runs, loading\n",
        ),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, arguments, error):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is one")
    code, _, said = call(gpu, *arguments, "--output", tmp_path / "new")
    assert code == 2 and said.startswith(error) and said.count("\n") == 1 and not (tmp_path / "new").exists()
