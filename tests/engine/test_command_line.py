from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.command_line import exit_code
from engine.errors import InputError, Preempted


def raising(error: BaseException):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("seed = x: a number"), 2, "error: seed = x: a number\n"),
        (InputError("data.root = a\nb: no such folder"), 2, "error: data.root = a b: no such folder\n"),
        (Preempted("stopped by SIGTERM"), 75, "stopped by SIGTERM; --resume goes on\n"),
        (KeyboardInterrupt(), 130, "interrupted: go on\n"),
        (KeyError("two\nlines"), 2, rf"error: KeyError: 'two\nlines' (unforeseen, in {__file__}, line 16)" + "\n"),
        (ValueError(), 2, f"error: ValueError: no reason given (unforeseen, in {__file__}, line 16)\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(capsys, monkeypatch, error, code, line):
    assert exit_code(raising(error), after_interrupt="go on") == code
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "3")
    exit_code(raising(error), after_interrupt="go on")
    assert capsys.readouterr().err == f"[rank 3] {line}"


def test_the_tools_own_result_is_the_code_and_a_traceback_can_be_asked_for():
    assert (exit_code(lambda: None), exit_code(lambda: 1)) == (0, 1)
    for error in (InputError("seed"), KeyError("key")):
        with pytest.raises(type(error)):
            exit_code(raising(error), traceback=True)


@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_reader_that_goes_away_is_no_error(buffering):
    tool = Path(__file__).parents[2] / "tools" / "train_net.py"
    command = f"{sys.executable} {tool} --config digits_vit --print-config | true; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": buffering}
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert found.stdout == "141\n" and "Error" not in found.stderr
