"""What a model is worth on held-out images, each counted exactly once whatever the number of processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import augsub
from engine.data.images import IGNORED
from engine.data.source import DataSource
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.evaluation.multi_label import MultiLabelMetrics
from engine.precision import Precision, begin_step
from engine.seeding import derive_seed, seed_all

Loader = Iterable[tuple[Tensor, Tensor]]
WEIGHTS = {"": "trained", "ema_": "averaged"}  # by the prefix of their results
MOST_CONFUSED = 25  # pairs of classes that are listed and drawn
QUANTILES, DRAWS = np.array([0.025, 0.975]), 2000  # of an interval of 95 %; and how often a mean over classes is drawn
BINS = 15  # of confidence, of equal width; bin i holds (i / 15, (i + 1) / 15], as in Guo et al., arXiv 1706.04599


class Metrics:
    """Sums over images from which figures follow: they add up over batches, processes and data sets.

    Attributes:
        totals: images, those of them with a logit that is NaN or infinite, top-1, top-5, cross-entropy.
        by_class: (2, K) images of each class, and right ones.
        calibration: (3, BINS) images, confidence (the largest softmax probability) and right ones, by confidence.
        confusion: [true, predicted], (K, K) images.
        outcomes: true and predicted class of each image in the data set's order, (2, N), once they are reduced.

    Args:
        source: the images, to know calibration and confusion of their K classes too; None: accuracy and cross-entropy
            alone.
        num_classes: K, to know the accuracy of each class; with a source it is that of the source.
    """

    def __init__(self, device: torch.device, source: DataSource | None = None, num_classes: int = 0) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        num_classes = num_classes if source is None else len(source.class_names)
        self.totals, self.by_class = zeros(5), zeros(2, num_classes)
        self._sums = [self.totals, self.by_class]
        self._candidates, self._accepted = None, None
        self._is_detailed = source is not None
        if source is not None:
            self._candidates = None if source.candidates is None else torch.tensor(source.candidates, device=device)
            self._accepted = None if source.accepted is None else source.accepted.to(device)
            self.calibration, self.confusion = zeros(3, BINS), zeros(num_classes, num_classes)
            self.outcomes, self._own_outcomes = np.zeros((2, 0), np.int64), []
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
        if self.by_class.numel():
            self.by_class.index_add_(1, labels.clamp(min=0), torch.stack([counted, right[:, 0]]).double())
        if self._is_detailed:
            confidence, predicted = logits.softmax(dim=1).max(dim=1)
            bins = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
            sums = torch.stack([torch.ones_like(confidence), confidence, predicted == labels]).double()
            self.calibration.index_add_(1, bins, sums * counted)
            cells = labels.clamp(min=0) * self.confusion.shape[1] + predicted
            self.confusion.view(-1).index_add_(0, cells, counted.double())
            self._own_outcomes.append(torch.stack([labels, predicted]))

    def reduce(self, process: Process) -> None:
        """Add up what all processes have counted. They must call it together, once, at the end."""
        for sums in self._sums:
            process.sum(sums)
        if self._is_detailed:  # a process has every world_size-th image
            shares = process.gather(torch.cat(self._own_outcomes, dim=1).cpu().numpy())
            self.outcomes = np.stack(shares, axis=-1).reshape(2, -1)

    def add(self, other: Metrics) -> None:
        """Take over what was counted on other images."""
        for own, others in zip(self._sums, other._sums, strict=True):
            own += others
        if self._is_detailed:
            self.outcomes = np.concatenate([self.outcomes, other.outcomes], axis=1)

    def figures(self) -> dict[str, float]:
        """`top1` and `top5` in percent, mean cross-entropy `eval_loss`, number of `images`.

        With K known also `balanced_accuracy`, the mean over the classes of which there are images; with a source `ece`.

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
        if self.by_class.numel():
            images, right = self.by_class[:, self.by_class[0] > 0]
            figures["balanced_accuracy"] = float(100 * (right / images).mean())
        return {**figures, "ece": self.calibration_error} if self._is_detailed else figures

    @property
    def calibration_error(self) -> float:
        """Expected calibration error in percent: the mean gap between confidence and accuracy, bins by their images."""
        images, confidence, correct = self.calibration
        return float(100 * (correct - confidence).abs().sum() / images.sum())

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of each accuracy in percent, the interval of 95 % that a bootstrap over the images gives.

        The mean over classes, each with as many images as it has, is drawn.
        """
        images, _, *right = self.totals[:4].tolist()
        found = {name: accuracy_interval(hits, images) for name, hits in zip(("top1", "top5"), right, strict=True)}
        counts, hits = self.confusion.sum(dim=1).cpu().numpy(), self.confusion.diag().cpu().numpy()
        counts, hits = counts[counts > 0].astype(int), hits[counts > 0]
        drawn = np.random.default_rng(0).binomial(counts, hits / counts, (DRAWS, len(counts))) / counts
        found["balanced_accuracy"] = tuple(100 * np.quantile(drawn.mean(axis=1), QUANTILES))
        return {name: (float(low), float(high)) for name, (low, high) in found.items()}

    def of_classes(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Of each class its `images`, and `top1` in percent, None without images."""
        counts, hits = self.confusion.sum(dim=1).tolist(), self.confusion.diag().tolist()
        return [
            {"class": name, "images": int(count), "top1": round(100 * hit / count, 3) if count else None}
            for name, count, hit in zip(names, counts, hits, strict=True)
        ]

    def details(self, names: Sequence[str]) -> dict[str, Any]:
        """What results.json has beside the figures."""
        calibration = zip(("images", "confidence_sum", "correct"), self.calibration.tolist(), strict=True)
        confused = [
            {"true": names[true], "predicted": names[predicted], "images": images}
            for true, predicted, images in self.most_confused(MOST_CONFUSED)
        ]
        return {"intervals": self.intervals(), "calibration": dict(calibration), "most_confused": confused}

    def most_confused(self, number: int) -> list[tuple[int, int, int]]:
        """Pairs (true, predicted, images) of different classes, most images first; those without images left out."""
        mistakes = self.confusion - self.confusion.diag().diag()
        images, cells = mistakes.flatten().sort(descending=True, stable=True)
        pairs = zip(images[:number].tolist(), cells[:number].tolist(), strict=True)
        return [(*divmod(cell, len(mistakes)), int(count)) for count, cell in pairs if count]


def accuracy_interval(hits: float, images: float) -> tuple[float, float]:
    """Of an accuracy in percent, the interval of 95 % that a bootstrap over the images gives.

    The mean of zeros and ones that are drawn again is binomial, which needs no drawing.
    """
    from scipy.stats import binom  # here: a run without evaluation does not need it

    low, high = 100 / images * binom.ppf(QUANTILES, images, hits / images)
    return float(low), float(high)


def metrics_for(source: DataSource, device: torch.device, is_detailed: bool = True) -> Metrics | MultiLabelMetrics:
    """What counts the images of a source.

    Args:
        is_detailed: whether calibration and confusion are wanted too.
    """
    if source.has_several_labels:
        return MultiLabelMetrics(device)
    return Metrics(device, source) if is_detailed else Metrics(device, num_classes=source.num_classes)


def _best_label(logits: Tensor, accepted: Tensor, labels: Tensor) -> Tensor:
    """Of several right classes (B, M) the one that the model ranks highest: any of them is right."""
    scores = logits.gather(1, accepted.clamp(min=0)).masked_fill(accepted == IGNORED, -torch.inf)
    best = accepted.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
    return torch.where(labels == IGNORED, IGNORED, best)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    precision: Precision,
    process: Process,
    name: str = "the model",
    metrics: Metrics | MultiLabelMetrics | None = None,
    augmentation: augsub.SubModelAugmentation | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """The figures of the metrics on all images. All processes call it together.

    Args:
        model: without distributed wrapper; its training mode is restored.
        loader: of this process's share of the images; those labelled IGNORED are not counted.
        name: of the model, for a message.
        metrics: where images are counted, new ones; None: accuracy and cross-entropy are.
        augmentation: of the sub-model that is evaluated in place of the model, which is patched. What it draws
            follows from `seed`, the process and the number of the batch: the same command gives the same figures,
            another `evaluation.batch` or number of processes other draws.

    Raises:
        InputError: there are no images.
        RunError: a logit is NaN or infinite: no figure says anything of such a model.
    """
    was_training, metrics = model.training, metrics or Metrics(process.device)
    model.eval()
    for number, (images, labels) in enumerate(loader):
        begin_step()
        if augmentation is not None:
            seed_all(derive_seed(seed, process.rank, number))
        with precision.autocast():
            logits = model(images) if augmentation is None else model(images, augsub=augmentation)
        metrics.update(logits.float(), labels)
    model.train(was_training)
    metrics.reduce(process)
    images, spoilt = map(int, metrics.totals[:2].tolist())
    if spoilt:
        raise RunError(f"evaluation: logits of {name} are NaN or infinite for {spoilt} of {images} images")
    return metrics.figures()


@dataclass(frozen=True)
class Result:
    """What a model with some weights, or a sub-model of it, is worth on held-out images.

    Attributes:
        prefix: "" or, of averaged weights, "ema_".
        metrics: on all images.
        parts: figures on each source of the images, by name.
        augmentation: of the sub-model; None: the main model.
        probes: top-1 in percent of classifiers on its features, by their names.
        speed: of its forwards, by the names of `measure_speed`; nothing if nobody asked.
        reference: errors in percent by corruption, to which those of this model are related; none of other images.
        clean: figures on clean images of the same classes; nothing if nobody asked.
        examples: pictures (n, 3, H, W) uint8 by their titles: images of confused classes, what the sub-model sees.
    """

    prefix: str
    metrics: Metrics | MultiLabelMetrics
    parts: dict[str, dict[str, float]]
    augmentation: augsub.SubModelAugmentation | None = None
    probes: dict[str, float] = field(default_factory=dict)
    speed: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    clean: Mapping[str, float] = field(default_factory=dict)
    examples: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> str:
        """Which they are."""
        return WEIGHTS[self.prefix]

    @property
    def sub_model(self) -> tuple[str, float | None]:
        """Name and ratio of the sub-model; of several augmentations all that they are, and None."""
        members = self.augmentation.members
        return (members[0].name, members[0].ratio) if len(members) == 1 else (str(self.augmentation), None)

    @property
    def corruption_errors(self) -> dict[str, float]:
        """Top-1 error in percent by corruption, mean over severities."""
        errors: dict[str, list[float]] = {}
        for place, figures in self.parts.items():
            errors.setdefault(place.partition("/")[0], []).append(100 - figures["top1"])
        return {name: sum(of_one) / len(of_one) for name, of_one in errors.items()}

    @property
    def mean_corruption_error(self) -> float:
        """Top-1 error in percent, mean over all corruptions and severities."""
        return sum(self.corruption_errors.values()) / len(self.corruption_errors)

    @property
    def mce(self) -> float | None:
        """The same in percent of the reference's errors, mean over corruptions; None without a reference."""
        if not self.reference:
            return None
        relative = [100 * error / self.reference[name] for name, error in self.corruption_errors.items()]
        return sum(relative) / len(relative)
