"""Where records go: the table that grows, the time that is left, what TensorBoard is told."""

from __future__ import annotations

import csv
import html
import importlib.util
import json
import logging
import math
import re
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import figure
from engine.config import Config, ModelConfig
from engine.config_file import leaves, to_yaml
from engine.errors import RunError
from engine.html_report import picture_line, write_report
from engine.run_folder import RunFolder
from engine.text import to_json
from engine.writers import CSVWriter, JSONLinesWriter, LogWriter, TensorBoardWriter, open_writers, read_lines


def record(iteration: int, **values: float) -> dict[str, float]:
    return {"iteration": iteration, "epoch": iteration / 10, "lr": 0.1, **values}


def write_all(writers, *records):
    for values in records:
        for writer in writers:
            writer.write(values)
    for writer in writers:
        writer.close()


@pytest.fixture
def paths(tmp_path):
    return tmp_path / "metrics.jsonl", tmp_path / "metrics.csv"


def open_both(paths, iteration):
    lines, table = paths
    return [JSONLinesWriter(lines, iteration), CSVWriter(table, lines)]


def test_a_resumed_run_writes_what_a_whole_one_does(paths, tmp_path):
    """Killed in the middle of a line, or resumed from an older checkpoint; new columns come late."""
    records = [record(10, loss=3.0), record(20, loss=2.0, top1=50.0), record(30, loss=1.0), record(40, ema_top1=1.0)]
    whole = (tmp_path / "whole.jsonl", tmp_path / "whole.csv")
    write_all(open_both(whole, 0), *records)
    assert read_lines(whole[0]) == records
    with open(whole[1], newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == records
    for last in (1, 2, 4):
        write_all(open_both(paths, 10 * (last - 1)), *records[last - 1 : last + 1])
        for path, half in zip(paths, ('{"iteration": 40, "ep', "40,4.0,"), strict=True):
            with open(path, "a") as file:
                file.write(half)
    write_all(open_both(paths, 40))
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole]


def test_a_table_that_cannot_be_written_is_one_line(paths):
    writers = open_both(paths, 0)
    paths[1].unlink()
    paths[1].mkdir()
    with pytest.raises(RunError, match=r"metrics\.csv cannot be written: .*continue with --resume"):
        write_all(writers, record(10))


def test_the_time_left_is_that_of_the_average_step(monkeypatch, caplog):
    clock = iter([1000.0, 1030.0, 1180.0])  # a resumed run opens its log, then writes two records
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    writer = LogWriter(iteration=100, max_iterations=7420)
    measured = {"images_per_second": 12.0, "memory": 345.6, "loss": 1.0}
    with caplog.at_level(logging.INFO, "engine"):
        writer.write(record(110, **measured))  # 3 s per step
        writer.write(record(120, **measured))  # 9 s per step: a pause between two steps counts
    assert [line.rsplit("  ", 2)[1:] for line in caplog.messages] == [
        ["346 MiB", "6:05:30 left"],
        ["346 MiB", "18:15:00 left"],
    ]


def test_tensorboard_has_curves_and_the_configuration(tmp_path):
    config = Config(model=ModelConfig(name="vit"))
    write_all([TensorBoardWriter(config, tmp_path, 0)], record(10, loss=3.0), record(20, loss=2.0))
    # what a run that was killed after 20 had written is hidden by the one that goes on from 10, in a later second
    time.sleep(1.1)
    write_all([TensorBoardWriter(config, tmp_path, 10)], record(20, loss=1.5))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 3.0), (20, 1.5)]
    assert events.Tags()["scalars"] == ["lr", "loss"]
    (text, _) = events.Tensors("config/text_summary")
    assert text.tensor_proto.string_val == [f"```yaml\n{to_yaml(config)}```".encode()]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(key.encode() in start for key, value in leaves(config).items() if value is not None) and b"vit" in start


def test_a_report_shows_every_picture_whatever_its_name(tmp_path):
    names = ["salt & pepper", '12" pizza', "x<y>", "tick`s`", " a)b (c", "two\nlines", "[1] *2* 50 %25", "naïve/ä"]
    pictures = {name: torch.zeros(1, 3, 4, 4, dtype=torch.uint8) for name in names}
    write_report(tmp_path / "report.html", "\n\n".join(["# Page", *map(picture_line, names)]), pictures)
    page = (tmp_path / "report.html").read_text()
    captions = [html.unescape(text) for text in re.findall("<figcaption>(.*?)</figcaption>", page)]
    assert captions == [" ".join(name.split()) for name in names] and page.count("data:image/png") == len(names)


def test_a_run_without_tensorboard_says_so_and_goes_on(tmp_path, monkeypatch, caplog):
    with_it = [type(writer) for writer in open_writers(Config(), RunFolder(tmp_path), 0, 10)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    without = [type(writer) for writer in open_writers(Config(), RunFolder(tmp_path), 0, 10)]
    assert with_it == [*without, TensorBoardWriter]
    assert "tensorboard is not installed" in caplog.text


def test_json_has_null_for_what_is_not_finite(tmp_path):
    """Other languages' readers refuse a whole file with NaN in it. Under fp16 a step that overflows is left out."""
    finite = {"top1": 100 / 3, "names": ["é", 'a"b'], "list": (1, 2), 3: 4, "f": None, "g": True, "e": "NaN"}
    assert to_json(finite) == json.dumps(finite)
    for number in (math.nan, math.inf, -math.inf):
        content = {"a": number, "b": [1, (number, 2.5)], "c": {"d": number}}
        assert json.loads(to_json(content, indent=2)) == {"a": None, "b": [1, [None, 2.5]], "c": {"d": None}}
    path = tmp_path / "metrics.jsonl"
    write_all([JSONLinesWriter(path, 0)], record(1, main_loss=math.inf), record(2, main_loss=2.0))
    first, second = read_lines(path)
    assert math.isnan(first["main_loss"]) and second["main_loss"] == 2.0
    JSONLinesWriter(path, 1).close()  # as a resumed run does: the line is of an iteration still
    assert len(read_lines(path)) == 1
    figure.save(figure.draw_curves([first, second], "overflow"), tmp_path / "curves.png")


@pytest.mark.parametrize("factor", [1, 1.3, 30])
def test_losses_are_marked_by_plain_numbers(factor):
    """Also where they stay within a power of ten: formulas would need a matplotlib that reads $ in any name as one."""
    records = [{"epoch": float(epoch), "main_loss": 2.3 / factor**epoch} for epoch in range(4)]
    drawn = figure.draw_curves(records, "run")
    drawn.draw_without_rendering()
    labels = [label.get_text() for label in drawn.axes[0].get_yticklabels(which="both") if label.get_text()]
    assert labels and all(float(label.replace("\N{MINUS SIGN}", "-")) > 0 for label in labels)
