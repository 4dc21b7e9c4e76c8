"""What helps every day: nothing of it changes the training, and all of it works without a terminal or a network."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TRAIN_NET = ROOT / "tools" / "train_net.py"
DIGITS = ROOT / "configs" / "digits_vit.yaml"
SHORT = ("--config", DIGITS, "model.kwargs.depth=2", "log.period=4", "evaluation.period=1")
# The real package wants an account, or writes a database of its own; this one writes down what it is asked
FAKE_WANDB = """
import json, os

class Error(Exception):
    pass

def note(call, **arguments):
    with open(os.environ["WANDB_CALLS"], "a") as file:
        file.write(json.dumps([call, arguments]) + "\\n")

class Run:
    def log(self, values, step):
        note("log", values=values, step=step)

    def finish(self, exit_code):
        note("finish", exit_code=exit_code)

def init(**arguments):
    if "WANDB_REFUSES" in os.environ:
        raise Error("No API key configured.\\nUse `wandb login` to log in.")
    note("init", **arguments)
    return Run()
"""


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """A package of that name on the path; gives what it was called with so far."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("WANDB_CALLS", str(tmp_path / "calls"))
    yield lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    sys.modules.pop("wandb", None)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def table(folder: Path) -> list[dict]:
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_the_training_has_the_same_bits_with_everything_on(train_net, tmp_path, wandb_calls):
    """Also stopped and resumed: no record is missing or twice, wherever records go."""
    assert train_net(*SHORT, f"output_dir={tmp_path}/plain", "train.max_iters=30")[0] == 0
    everything = ("train.profile=true", "log.csv=true", "log.wandb=digits")
    for stop in (18, 30):
        run = (*SHORT, "--resume", f"output_dir={tmp_path}/all", f"train.max_iters={stop}")
        assert train_net(*run, *everything)[0] == 0
    plain, full = (torch.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("plain", "all"))
    assert plain["model"].keys() == full["model"].keys()
    assert all(torch.equal(plain["model"][name], full["model"][name]) for name in plain["model"])
    state, other = plain["optimizer"]["state"], full["optimizer"]["state"]
    assert all(torch.equal(state[i][name], other[i][name]) for i in state for name in state[i])

    written = records(tmp_path / "all")
    assert [record["iteration"] for record in written] == [4, 8, 12, 16, 18, 20, 24, 28, 30]
    shared = {record["iteration"]: record for record in records(tmp_path / "plain")}
    for record in written:
        if record["iteration"] in (4, 8, 12, 16, 24, 28, 30):  # of the same steps in both
            of_the_machine = {"images_per_second", "memory"}
            assert {k: v for k, v in record.items() if k not in of_the_machine} == {
                k: v for k, v in shared[record["iteration"]].items() if k not in of_the_machine
            }
    assert table(tmp_path / "all") == written

    first, second = [arguments for call, arguments in wandb_calls() if call == "init"]
    assert (first["project"], first["name"], first["config"]["train.max_iters"]) == ("digits", "all", 18)
    assert second["id"] == first["id"] and second["resume"] == "allow"
    logged = [arguments for call, arguments in wandb_calls() if call == "log"]
    assert [{"iteration": call["step"], **call["values"]} for call in logged] == written
    assert [arguments for call, arguments in wandb_calls() if call == "finish"] == 2 * [{"exit_code": 0}]


def test_wandb_that_is_missing_or_refuses_is_one_line_and_the_same_command_goes_later(
    train_net, tmp_path, monkeypatch, request
):
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=2", "log.wandb=digits")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed, where it is
    code, _, error = train_net(*run)
    assert code == 2 and "log.wandb = digits: the package cannot be imported" in error and "pip install wandb" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()
    monkeypatch.delitem(sys.modules, "wandb")
    calls = request.getfixturevalue("wandb_calls")
    monkeypatch.setenv("WANDB_REFUSES", "1")
    code, _, error = train_net(*run)
    assert code == 2 and "W&B does not begin: No API key configured. Use `wandb login`" in error
    assert error.count("\n") == 1
    monkeypatch.delenv("WANDB_REFUSES")
    assert train_net(*run)[0] == 0
    assert [call for call, _ in calls()] == ["init", "log", "finish"]


def test_a_run_that_fails_is_marked_so(train_net, tmp_path, wandb_calls):
    code, _, error = train_net(*SHORT, f"output_dir={tmp_path}/run", "log.wandb=digits", "optimizer.lr=1e30")
    assert code == 2 and "not finite" in error
    assert wandb_calls()[-1] == ["finish", {"exit_code": 1}]


def test_a_profile_is_a_trace_of_five_steps_and_a_table(train_net, tmp_path):
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=12", "train.profile=true")
    assert train_net(*run)[0] == 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert len(steps) == 5
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" and event.get("ph") == "X" for event in events) >= 5
    log = (tmp_path / "run" / "log.txt").read_text()
    table = log.partition("5 steps profiled, trace in ")[2].splitlines()
    assert table[0] == str(tmp_path / "run" / "trace.json")
    header, rows = re.split(r" {2,}", table[2].strip()), [line.split() for line in table[4:19]]
    shares = [float(re.sub("%", "", row[1])) for row in rows if row[1].endswith("%")]
    assert header[:2] == ["Name", "Self CPU %"] and shares == sorted(shares, reverse=True) and shares[0] > 0
    assert any("mm" in row[0] for row in rows)


def test_a_run_too_short_for_a_profile_says_so(train_net, tmp_path):
    run = (*SHORT, f"output_dir={tmp_path}/run", "train.profile=true")
    assert train_net(*run, "train.max_iters=9")[0] == 0
    said = "nothing was recorded, that takes 10 steps in one go and the run had {} left"
    assert said.format(9) in (tmp_path / "run" / "log.txt").read_text()
    assert train_net(*run, "--resume", "train.max_iters=12")[0] == 0
    assert said.format(3) in (tmp_path / "run" / "log.txt").read_text()
    assert not (tmp_path / "run" / "trace.json").exists()


def in_a_terminal(*arguments: object) -> str:
    """What a run shows on a terminal that does not tell its size."""
    main, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, TRAIN_NET, *map(str, arguments)], stdin=end, stdout=end, stderr=end, close_fds=True,
        env={**os.environ, "COLUMNS": "", "LINES": ""},
    )  # fmt: skip
    os.close(end)
    shown = b""
    while select.select([main], [], [], 120)[0]:
        try:
            piece = os.read(main, 65536)
        except OSError:  # Linux says so that the other end is closed
            break
        shown += piece
    assert process.wait(timeout=60) == 0
    os.close(main)
    return shown.decode()


def test_the_bar_says_how_far_how_long_how_fast_and_how_good(tmp_path):
    shown = in_a_terminal(*SHORT, f"output_dir={tmp_path}/run", "train.max_iters=60", "log.period=10")
    bars = [line for line in re.split(r"[\r\n]+", shown) if re.match(r" *\d+/60 \|", line)]
    assert bars and max(map(len, bars)) < 80
    full = re.compile(r"(\d+)/60 \|.+\| \d\d:\d\d left, loss ([\d.]+), lr ([\d.e-]+), (\d+) images/s, (\d+) MiB")
    found = [match for match in map(full.search, bars) if match]
    assert found
    by_loss = {f"{record['loss']:.3f}": record for record in records(tmp_path / "run")}
    for match in found:
        record = by_loss[match.group(2)]  # of a record, not of the step itself
        assert record["iteration"] <= int(match.group(1)) + 1
        assert match.group(4) == f"{record['images_per_second']:.0f}"
        assert match.group(5) == f"{record['memory']:.0f}"
    assert len(re.findall(r"iteration \d+  main_loss .* MiB  \d\d:\d\d left", shown)) == 6


def test_help_fits_into_a_terminal(train_net, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        train_net("--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for word in ("--dry-run", "the run:", "instead of training:", "examples:", "exit codes:", "engine/config.py"):
        assert word in text
    codes = text.partition("exit codes:")[2]
    assert re.findall(r"^  (\d+) ", codes, re.MULTILINE) == ["0", "2", "75", "130"]
    examples = textwrap.dedent(text.partition("examples:\n")[2].partition("\n\n")[0])
    assert all((ROOT / "configs" / f"{name}.yaml").exists() for name in re.findall(r"--config (\w+)", examples))
