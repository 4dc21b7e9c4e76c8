"""No file of JSON has NaN in it: other languages' readers refuse the whole file."""

from __future__ import annotations

import json
import math

from engine.figure import draw_curves
from engine.text import to_json, with_nan
from engine.writers import CSVWriter, JSONLinesWriter, read_lines


def test_null_stands_for_what_is_not_finite_wherever_it_is():
    finite = {"top1": 100 / 3, "names": ["é", 'a"b'], "list": (1, 2), 3: 4, "f": None, "g": True, "e": "NaN"}
    assert to_json(finite) == json.dumps(finite)
    for number in (math.nan, math.inf, -math.inf):
        content = {"a": number, "b": [1, (number, 2.5)], "c": {"d": number}}
        for indent in (None, 2):
            assert json.loads(to_json(content, indent)) == {"a": None, "b": [1, [None, 2.5]], "c": {"d": None}}
    assert with_nan({"x": 1.5, "y": 2}) == {"x": 1.5, "y": 2} and math.isnan(with_nan({"x": None})["x"])


def test_a_record_of_an_overflow_is_read_back_and_drawn(tmp_path):
    """With fp16 a step whose loss overflows is left out and the run goes on: the mean over its period is infinite."""
    path = tmp_path / "metrics.jsonl"
    writer = JSONLinesWriter(path, 0)
    writer.write({"iteration": 1, "epoch": 0.5, "main_loss": math.inf, "sub_loss": math.nan, "top1": 10.0})
    writer.write(finite := {"iteration": 2, "epoch": 1.0, "main_loss": 2.0, "sub_loss": 1.0, "top1": 20.0})
    writer.close()
    assert [json.loads(line)["main_loss"] for line in path.read_text().splitlines()] == [None, 2.0]
    first, second = read_lines(path)
    assert math.isnan(first["main_loss"]) and math.isnan(first["sub_loss"]) and first["top1"] == 10.0
    assert second == finite
    JSONLinesWriter(path, 1).close()  # as a resumed run does: the line is of an iteration still
    assert len(read_lines(path)) == 1
    CSVWriter(tmp_path / "metrics.csv", path)
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1] == "1,0.5,nan,nan,10.0"
    draw_curves(read_lines(path), "overflow", tmp_path / "curves.png")
