"""What a model is worth on held-out images, each counted exactly once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from augsub.augmentation import SubModelAugmentation
from engine.data import IGNORED
from engine.data.imagenet_family import Benchmark
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.precision import Precision
from engine.seeding import derive_seed, seed_all

Loader = Iterable[tuple[Tensor, Tensor]]
WEIGHTS = {"": "trained", "ema_": "averaged"}  # by the prefix of their results
BINS = 15  # of confidence, of equal width; bin i holds (i / 15, (i + 1) / 15], as in Guo et al., arXiv 1706.04599


class Metrics:
    """Sums over images from which figures follow: they add up over batches, processes and data sets.

    Attributes:
        totals: images, those of them with a logit that is NaN or infinite, top-1, top-5, cross-entropy.
        calibration: (3, BINS) images, confidence (the largest softmax probability) and right ones, by confidence.
        confusion: [true, predicted], (K, K) images.

    Args:
        num_classes: K, to know calibration and confusion too; None: accuracy and cross-entropy alone.
        candidates: numbers of the model's classes among which it chooses, in the order of the labels; None: all.
        accepted: (N, M) right classes of each of N images, filled up with IGNORED, of which labels are rows.
    """

    def __init__(
        self,
        device: torch.device,
        num_classes: int | None = None,
        candidates: Sequence[int] | None = None,
        accepted: Tensor | None = None,
    ) -> None:
        self._candidates = None if candidates is None else torch.tensor(candidates, device=device)
        self._accepted = None if accepted is None else accepted.to(device)
        self._is_detailed = num_classes is not None
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.totals = zeros(5)
        self._sums = [self.totals]
        if num_classes is not None:
            self.calibration, self.confusion = zeros(3, BINS), zeros(num_classes, num_classes)
            self._sums += [self.calibration, self.confusion]

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch, without waiting for the device.

        Args:
            logits: (B, K) in float32.
            labels: (B,), of which IGNORED are not counted.
        """
        if self._candidates is not None:
            logits = logits[:, self._candidates]
        if self._accepted is not None:
            labels = _best_label(logits, self._accepted[labels.clamp(min=0)], labels)
        counted = labels != IGNORED
        spoilt = counted & ~logits.isfinite().all(dim=1)
        right = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # no class is called IGNORED
        loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
        self.totals += torch.stack([counted.sum(), spoilt.sum(), right[:, 0].sum(), right.sum(), loss])
        if self._is_detailed:
            confidence, predicted = logits.softmax(dim=1).max(dim=1)
            bins = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
            sums = torch.stack([torch.ones_like(confidence), confidence, predicted == labels]).double()
            self.calibration.index_add_(1, bins, sums * counted)
            cells = labels.clamp(min=0) * self.confusion.shape[1] + predicted
            self.confusion.view(-1).index_add_(0, cells, counted.double())

    def reduce(self, process: Process) -> None:
        """Add up what all processes have counted. They must call it together, once, at the end."""
        for sums in self._sums:
            process.sum(sums)

    def add(self, other: Metrics) -> None:
        """Take over what was counted on other images."""
        for own, others in zip(self._sums, other._sums, strict=True):
            own += others

    def refuse_non_finite(self, name: str) -> None:
        """Raise RunError if a logit was NaN or infinite: no figure says anything of such a model, here `name`."""
        images, spoilt = map(int, self.totals[:2].tolist())
        if spoilt:
            raise RunError(f"evaluation: logits of {name} are NaN or infinite for {spoilt} of {images} images")

    def figures(self) -> dict[str, float]:
        """`top1` and `top5` in percent, mean cross-entropy `eval_loss`, number of `images`; with K known also `ece`.

        Raises:
            InputError: there are no images.
        """
        images, _, top1, top5, loss = self.totals.tolist()
        if not images:
            raise InputError("evaluation: none of the held-out images can be read")
        figures = {
            "top1": 100 * top1 / images,
            "top5": 100 * top5 / images,
            "eval_loss": loss / images,
            "images": int(images),
        }
        return {**figures, "ece": self.calibration_error} if self._is_detailed else figures

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: the mean gap between confidence and accuracy, bins by their images."""
        images, confidence, correct = self.calibration
        return float(100 * (correct - confidence).abs().sum() / images.sum())

    def most_confused(self, number: int) -> list[tuple[int, int, int]]:
        """Pairs (true, predicted, images) of different classes, most images first; those without images left out."""
        mistakes = self.confusion - self.confusion.diag().diag()
        images, cells = mistakes.flatten().sort(descending=True, stable=True)
        pairs = zip(images[:number].tolist(), cells[:number].tolist(), strict=True)
        return [(*divmod(cell, len(mistakes)), int(count)) for count, cell in pairs if count]


def _best_label(logits: Tensor, accepted: Tensor, labels: Tensor) -> Tensor:
    """Of several right classes (B, M) the one that the model ranks highest: any of them is right."""
    scores = logits.gather(1, accepted.clamp(min=0)).masked_fill(accepted == IGNORED, -torch.inf)
    best = accepted.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(labels == IGNORED, IGNORED, best)


def evaluate(
    model: nn.Module, loader: Loader, precision: Precision, process: Process, name: str = "the model"
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy, and the number of images.

    Args:
        model: without distributed wrapper; its training mode is restored.
        loader: this process's share of the images; those labelled IGNORED are not counted.
        name: of the model, for a message.

    Raises:
        InputError: no image is left to count.
        RunError: a logit is NaN or infinite.
    """
    metrics = Metrics(process.device)
    measure(model, loader, precision, process, metrics, name)
    return metrics.figures()


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    process: Process,
    metrics: Metrics,
    name: str = "the model",
    forward: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Feed new metrics with all images of all processes, as `evaluate`.

    Args:
        forward: logits of images, where they are not those of the model itself.
    """
    was_training = model.training
    model.eval()
    for images, labels in loader:
        with precision.autocast():
            logits = (forward or model)(images)
        metrics.update(logits.float(), labels)
    model.train(was_training)
    metrics.reduce(process)
    metrics.refuse_non_finite(name)


def sub_model_forward(
    model: nn.Module, augmentation: SubModelAugmentation, seed: int, process: Process
) -> Callable[[Tensor], Tensor]:
    """The forward of a patched model's sub-model, for one pass over the images.

    What it draws follows from the seed, the process and the number of the batch: the same command gives the same
    figures, another `evaluation.batch` or number of processes other draws.
    """
    batches = count()

    def forward(images: Tensor) -> Tensor:
        seed_all(derive_seed(seed, process.rank, next(batches)))
        return model(images, augsub=augmentation)

    return forward


@dataclass(frozen=True)
class SubModelResult:
    """Figures of one sub-model; `ratio` is None for one of several augmentations."""

    name: str
    ratio: float | None
    figures: dict[str, float]


@dataclass
class Result:
    """What one set of weights is worth on a benchmark.

    Attributes:
        prefix: "" or, of averaged weights, "ema_".
        metrics: on all images.
        parts: figures on each of the benchmark's sources, by name.
        sub_models: on all images.
    """

    prefix: str
    metrics: Metrics
    parts: dict[str, dict[str, float]]
    sub_models: list[SubModelResult] = field(default_factory=list)

    @property
    def weights(self) -> str:
        """Which they are."""
        return WEIGHTS[self.prefix]

    @property
    def mean_corruption_error(self) -> float:
        """Top-1 error in percent, mean over all corruptions and severities; not divided by AlexNet's as the mCE is."""
        return sum(100 - figures["top1"] for figures in self.parts.values()) / len(self.parts)


@dataclass(frozen=True)
class Description:
    """What was evaluated, and how.

    Attributes:
        model: timm's name.
        source: checkpoint, or whose weights they are.
        data: the images in a few words.
        image_size: pixels, square.
        crop: share of the resized image's side that the centre crop keeps; None: images are used as they are.
        interpolation: of the resizing, or None.
        parameters: of the main model.
        class_names: by label.
    """

    model: str
    source: str
    data: str
    image_size: int
    crop: float | None
    interpolation: str | None
    parameters: int
    class_names: Sequence[str]


def measure_benchmark(
    model: nn.Module,
    benchmark: Benchmark,
    loaders: Mapping[str, Loader],
    precision: Precision,
    process: Process,
    name: str = "the model",
    forward: Callable[[Tensor], Tensor] | None = None,
    is_detailed: bool = True,
) -> tuple[Metrics, dict[str, dict[str, float]]]:
    """Go through all images of a benchmark: metrics of all, figures of each source. All processes call it together.

    Args:
        model: of all classes, without distributed wrapper.
        loaders: this process's share of each of the benchmark's sources.
        name: of the model, for a message.
        forward: logits of images, where they are not those of the model itself.
        is_detailed: calibration and confusion too.

    Raises:
        InputError: a source without images.
        RunError: a logit is NaN or infinite.
    """
    num_classes = len(benchmark.source.class_names) if is_detailed else None
    whole, parts = Metrics(process.device, num_classes), {}
    for source, loader in loaders.items():
        part = Metrics(process.device, num_classes, benchmark.candidates, benchmark.accepted)
        measure(model, loader, precision, process, part, f"{name} on {source}" if source else name, forward)
        parts[source] = part.figures()
        whole.add(part)
    return whole, parts
