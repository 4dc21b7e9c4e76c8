"""Everything that is measured of a model on a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from engine.data.imagenet_family import Benchmark
from engine.distributed import Process
from engine.evaluation.loop import Loader, measure
from engine.evaluation.meters import AcceptedLabels, Accuracy, Calibration, Confusion
from engine.evaluation.views import AmongClasses
from engine.precision import Precision


class Measurement:
    """Accuracy, calibration and confusion of one model on the same images."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.accuracy = Accuracy(device)
        self.calibration = Calibration(device)
        self.confusion = Confusion(num_classes, device)
        self.meters = (self.accuracy, self.calibration, self.confusion)

    def add(self, other: Measurement) -> None:
        """Take over what was counted on other images."""
        for own, others in zip(self.meters, other.meters, strict=True):
            own.totals += others.totals

    def figures(self) -> dict[str, float]:
        """`top1`, `top5` and `ece` in percent, mean cross-entropy `eval_loss`, number of `images`."""
        return {**self.accuracy.result(), "ece": self.calibration.error}


@dataclass
class Outcome:
    """What a model does on a benchmark.

    Attributes:
        whole: on all of its images.
        parts: figures on each of its sources, by name.
    """

    whole: Measurement
    parts: dict[str, dict[str, float]]


def measure_benchmark(
    model: nn.Module,
    benchmark: Benchmark,
    loaders: Mapping[str, Loader],
    precision: Precision,
    process: Process,
    model_name: str = "the model",
) -> Outcome:
    """Go through all images of a benchmark. All processes must call it together.

    Args:
        model: of all classes, without distributed wrapper.
        loaders: this process's share of each of the benchmark's sources.
        model_name: for a message.

    Raises:
        InputError: a source without images.
        RunError: a logit is NaN or infinite.
    """
    num_classes = len(benchmark.source.class_names)
    view = model if benchmark.candidates is None else AmongClasses(model, benchmark.candidates)
    outcome = Outcome(Measurement(num_classes, process.device), {})
    for name, loader in loaders.items():
        part = Measurement(num_classes, process.device)
        meters = list(part.meters)
        if benchmark.accepted is not None:
            meters = [AcceptedLabels(benchmark.accepted.to(process.device), meters)]
        measure(view, loader, precision, process, meters, f"{model_name} on {name}" if name else model_name)
        outcome.parts[name] = part.figures()
        outcome.whole.add(part)
    return outcome
