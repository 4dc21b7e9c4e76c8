"""No file of JSON has NaN in it: other languages' readers refuse the whole file."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import pytest

from engine.figure import draw_curves
from engine.json_text import to_json, with_nan
from engine.writers import CSVWriter, JSONLinesWriter, read_lines

NUMBERS = (math.nan, math.inf, -math.inf)


def read_strictly(text: str) -> Any:
    """As the standard has it; Python's own reader takes NaN."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", NUMBERS)
def test_null_stands_for_what_is_not_finite_wherever_it_is(number):
    content = {"a": number, "b": [1, (number, 2.5)], "c": {"d": number, "e": "NaN", "f": None, "g": True, "h": 1e300}}
    expected = {"a": None, "b": [1, [None, 2.5]], "c": {"d": None, "e": "NaN", "f": None, "g": True, "h": 1e300}}
    assert read_strictly(to_json(content)) == expected
    assert read_strictly(to_json(content, indent=2)) == expected


def test_what_is_finite_is_written_as_before():
    content = {"top1": 100 / 3, "names": ["é", 'a"b'], "list": (1, 2), 3: 4}
    assert to_json(content) == json.dumps(content)
    assert with_nan(json.loads(to_json({"x": 1.5, "y": 2}))) == {"x": 1.5, "y": 2}


def test_a_record_of_an_overflow_is_read_back_and_drawn(tmp_path):
    """With fp16 a step whose loss overflows is left out and the run goes on: the mean over its period is infinite."""
    path = tmp_path / "metrics.jsonl"
    writer = JSONLinesWriter(path, 0)
    records = [
        {"iteration": 1, "epoch": 0.5, "main_loss": math.inf, "sub_loss": math.nan, "top1": 10.0},
        {"iteration": 2, "epoch": 1.0, "main_loss": 2.0, "sub_loss": 1.0, "top1": 20.0},
    ]
    for record in records:
        writer.write(record)
    writer.close()
    assert [read_strictly(line)["main_loss"] for line in path.read_text().splitlines()] == [None, 2.0]
    first, second = read_lines(path)
    assert math.isnan(first["main_loss"]) and math.isnan(first["sub_loss"]) and first["top1"] == 10.0
    assert second == records[1]
    JSONLinesWriter(path, 1).close()  # as a resumed run does: the line is of an iteration still
    assert len(read_lines(path)) == 1
    CSVWriter(tmp_path / "metrics.csv", path)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,0.5,nan,nan,10.0"
    draw_curves(read_lines(path), "overflow", tmp_path / "curves.png")
