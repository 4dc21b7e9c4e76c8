"""Where records go: the table that grows, the time that is left, what TensorBoard is told."""

from __future__ import annotations

import csv
import logging
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from engine import figure
from engine.config import Config, ModelConfig
from engine.config_file import leaves, to_yaml
from engine.errors import RunError
from engine.writers import CSVWriter, JSONLinesWriter, LogWriter, TensorBoardWriter, read_lines


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


def test_the_table_gets_new_columns_and_a_resumed_run_repeats_no_row(paths):
    lines, table = paths
    write_all(open_both(paths, 0), record(10, loss=3.0), record(20, loss=2.0, top1=50.0), record(30, loss=1.0))
    with open(table, "a") as file:
        file.write("40,4.0,")  # cut off by a kill
    write_all(open_both(paths, 20), record(30, loss=1.5), record(40, loss=1.25, ema_top1=60.0))
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["iteration", "epoch", "lr", "loss", "top1", "ema_top1"]
    read = [{name: float(value) for name, value in row.items() if value} for row in rows]
    assert read == read_lines(lines)
    assert [row["iteration"] for row in rows] == ["10", "20", "30", "40"]


def test_a_resumed_table_is_that_of_a_whole_run(paths, tmp_path):
    records = [record(10, loss=3.0), record(20, loss=2.0, top1=50.0), record(30, loss=1.0), record(40, ema_top1=1.0)]
    whole = (tmp_path / "whole.jsonl", tmp_path / "whole.csv")
    write_all(open_both(whole, 0), *records)
    for last in (1, 2, 4):
        write_all(open_both(paths, 10 * (last - 1)), *records[last - 1 : last + 1])
        assert [line["iteration"] for line in read_lines(paths[0])] == sorted(
            {line["iteration"] for line in read_lines(paths[0])}
        )
    assert paths[1].read_bytes() == whole[1].read_bytes()


def test_resumed_metrics_have_no_line_twice_and_survive_a_half_written_one(paths):
    lines, _ = paths
    write_all([JSONLinesWriter(lines, 0)], *(record(iteration, loss=1.0) for iteration in (10, 20, 30)))
    before = lines.read_bytes()
    with open(lines, "a") as file:
        file.write('{"iteration": 40, "ep')
    write_all([JSONLinesWriter(lines, 20)], record(30, loss=1.0))
    assert lines.read_bytes() == before


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


@pytest.mark.parametrize("factor", [1, 1.3, 30])
def test_losses_are_marked_by_plain_numbers(factor, tmp_path, monkeypatch):
    """Also where they stay within a power of ten: formulas would need a matplotlib that reads $ in any name as one."""
    drawn, save = [], figure.save
    monkeypatch.setattr(figure, "save", lambda drawing, path: (drawn.append(drawing), save(drawing, path)))
    records = [{"epoch": float(epoch), "main_loss": 2.3 / factor**epoch} for epoch in range(4)]
    figure.draw_curves(records, "run", tmp_path / "curves.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels(which="both") if label.get_text()]
    assert labels and all(float(label.replace("\N{MINUS SIGN}", "-")) > 0 for label in labels)
