"""A benchmark of several sets of images, and its files and tables."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from engine.data import DataSource
from engine.data.imagenet_family import Benchmark
from engine.distributed import Process
from engine.evaluation.measurement import measure_benchmark
from engine.evaluation.report import write
from engine.evaluation.results import Evaluated, Setting, mean_corruption_error
from engine.evaluation.tables import printed
from engine.precision import Precision

ALONE = Process(0, 1, torch.device("cpu"))
SEVERITIES = [f"{corruption}/{severity}" for corruption in ("snow", "fog") for severity in range(1, 6)]
CANDIDATES = [8, 1, 5, 3]  # the model has ten classes, labels are places in this list


@pytest.fixture
def benchmark() -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    sources = {}
    for size, name in enumerate(SEVERITIES, start=11):
        dataset = TensorDataset(torch.randn(size, 6, generator=generator), torch.arange(size) % len(CANDIDATES))
        sources[name] = DataSource(None, dataset, num_classes=10, in_chans=1, class_names=["a", "b", "c", "d"])
    return Benchmark(sources, CANDIDATES)


def test_sets_are_measured_apart_and_together(benchmark, tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(6, 10)
    loaders = {
        name: list(zip(*(tensor.split(4) for tensor in source.held_out.tensors), strict=True))
        for name, source in benchmark.sources.items()
    }
    outcome = measure_benchmark(model, benchmark, loaders, Precision("off", ALONE.device), ALONE)
    hits = {}
    for name, source in benchmark.sources.items():
        images, labels = source.held_out.tensors
        hits[name] = model(images)[:, CANDIDATES].argmax(dim=1) == labels
        assert outcome.parts[name]["top1"] == pytest.approx(100 * hits[name].double().mean().item())
        assert outcome.parts[name]["images"] == len(labels)
    errors = [100 - 100 * right.double().mean().item() for right in hits.values()]
    assert mean_corruption_error(outcome) == pytest.approx(sum(errors) / 10)
    assert outcome.whole.figures()["top1"] == pytest.approx(100 * torch.cat([*hits.values()]).double().mean().item())
    assert outcome.whole.confusion.totals.shape == (4, 4)

    setting = Setting("linear", "nowhere", "ImageNet (c)", 8, 1.0, "bicubic", 70, benchmark.source.class_names)
    evaluated = [Evaluated("", outcome)]
    snow, fog, mean = printed(setting, evaluated).splitlines()[-3:]
    assert snow.split() == ["snow", *(f"{error:.2f}" for error in errors[:5]), f"{sum(errors[:5]) / 5:.2f}"]
    assert fog.split()[-1] == f"{sum(errors[5:]) / 5:.2f}" and mean.split() == ["mean", f"{sum(errors) / 10:.2f}"]
    write(tmp_path, setting, evaluated)
    with (tmp_path / "corruptions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [f"{row['corruption']}/{row['severity']}" for row in rows] == SEVERITIES
    assert [float(row["top1_err"]) for row in rows] == pytest.approx(errors, abs=1e-3)
    (found,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert found["mean_corruption_error"] == pytest.approx(sum(errors) / 10)
    confused = sum(pair["images"] for pair in found["most_confused"])
    assert confused == sum(
        int((~right).sum()) for right in hits.values()
    )  # four classes have few pairs: all are listed
