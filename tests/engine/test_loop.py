"""The loop, schedule, precision, criterion, metrics and checkpoints: each by itself."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from engine.config import LossConfig, OptimizerConfig
from engine.distributed import Process
from engine.errors import InputError
from engine.evaluation import evaluate
from engine.loss import build_criterion
from engine.metrics import RunningMeans
from engine.optim import build_optimizer
from engine.precision import Precision
from engine.train_loop import HookBase, TrainerBase
from engine.writers import JSONLinesWriter, read_lines

CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, device=CPU)


class Recorder(HookBase):
    def __init__(self, name: str, calls: list) -> None:
        self.name, self.calls = name, calls

    def before_train(self):
        self.calls.append((self.name, "before_train", self.trainer.iteration))

    def before_step(self):
        self.calls.append((self.name, "before_step", self.trainer.iteration))

    def after_step(self):
        self.calls.append((self.name, "after_step", self.trainer.iteration))

    def after_train(self):
        self.calls.append((self.name, "after_train", self.trainer.iteration))

    def close(self):
        self.calls.append((self.name, "close", self.trainer.iteration))


def test_hooks_run_in_list_order_around_every_step():
    calls = []

    class TwoSteps(TrainerBase):
        def run_step(self):
            calls.append(("", "run_step", self.iteration))

    trainer = TwoSteps(max_iterations=2)
    trainer.register_hooks([Recorder("a", calls), Recorder("b", calls)])
    trainer.train()
    step = ["before_step", "run_step", "after_step"]
    expected = [("before_train", 0)]
    for iteration in range(2):
        expected += [(point, iteration + (point == "after_step")) for point in step]
    expected += [("after_train", 2), ("close", 2)]
    assert calls == [
        (name, point, iteration)
        for point, iteration in expected
        for name in ([""] if point == "run_step" else ["a", "b"])
    ]


def test_after_an_error_hooks_are_closed_but_not_told_that_training_ended():
    calls = []

    class Failing(TrainerBase):
        def run_step(self):
            raise RuntimeError("fault")

    trainer = Failing(max_iterations=1)
    trainer.register_hooks([Recorder("a", calls)])
    with pytest.raises(RuntimeError, match="fault"):
        trainer.train()
    assert [point for _, point, _ in calls] == ["before_train", "before_step", "close"]


def test_an_unknown_optimiser_is_met_with_the_nearest():
    with pytest.raises(InputError, match="did you mean adamw"):
        build_optimizer(OptimizerConfig(name="admw"), [{"params": nn.Linear(2, 2).parameters()}])


def test_fp16_scales_gradients_and_leaves_an_overflowing_step_out():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision("fp16", CPU)
    precision.backward(model(torch.ones(1, 1)).sum())
    assert model.weight.grad.item() == 65536
    precision.step(optimizer)
    assert model.weight.item() == pytest.approx(0.0)
    precision.backward(model(torch.full((1, 1), float("inf"))).sum())
    precision.step(optimizer)
    assert model.weight.item() == pytest.approx(0.0)
    assert precision.scaler.get_scale() == 32768
    resumed = Precision("fp16", CPU)
    resumed.load_state_dict(precision.state_dict())
    assert resumed.scaler.get_scale() == 32768


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_clipping_limits_the_unscaled_norm(amp):
    model = nn.Linear(4, 1, bias=False)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    precision = Precision(amp, CPU, clip_norm=0.5)
    with precision.autocast():
        loss = 0.25 * model(torch.full((1, 4), 2.0)).float().sum()  # a gradient of norm 1, small enough for fp16
        precision.backward(loss)  # as the objective does it: inside the forward's context
    precision.step(optimizer)
    assert (model.weight - before).norm().item() == pytest.approx(0.5, rel=1e-3)
    assert model.weight.grad is None


def test_smoothed_cross_entropy_without_mixup():
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    smoothed = build_criterion(LossConfig(smoothing=0.1), soft_labels=False)(logits, labels)
    torch.testing.assert_close(smoothed, nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    plain = build_criterion(LossConfig(), soft_labels=False)(logits, labels)
    torch.testing.assert_close(plain, nn.functional.cross_entropy(logits, labels))


def test_running_means_are_means_since_the_last_read():
    means = RunningMeans(ALONE)
    for value in (1.0, 2.0, 6.0):
        means.add({"loss": torch.tensor(value), "half": torch.tensor(value / 2)})
    copied = RunningMeans(ALONE)
    copied.load_state_dict(means.state_dict())
    assert means.read() == copied.read() == {"loss": 3.0, "half": 1.5}
    assert means.read() == {}


def test_evaluation_counts_every_image_once_and_restores_the_mode():
    torch.manual_seed(0)
    images, labels = torch.randn(23, 4), torch.randint(7, (23,))
    model = nn.Sequential(nn.Linear(4, 7), nn.Dropout(0.9)).train()
    batches = list(zip(images.split(5), labels.split(5), strict=True))
    result = evaluate(model, batches, Precision("off", CPU), ALONE)
    logits = model[0](images)
    rank = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert result["images"] == 23
    assert result["top1"] == pytest.approx(100 * (rank < 1).float().mean().item())
    assert result["top5"] == pytest.approx(100 * (rank < 5).float().mean().item())
    assert result["eval_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert model.training
    two_classes = evaluate(nn.Linear(4, 2), [(images, labels % 2)], Precision("off", CPU), ALONE)
    assert two_classes["top5"] == 100


def test_resumed_metrics_have_no_line_twice_and_survive_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = JSONLinesWriter(path, iteration=0)
    for iteration in (10, 20, 30):
        first.write({"iteration": iteration, "epoch": 1.0})
    first.close()
    with open(path, "a") as file:
        file.write('{"iteration": 40, "ep')
    resumed = JSONLinesWriter(path, iteration=20)
    resumed.write({"iteration": 30, "epoch": 2.0})
    resumed.close()
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [10, 20, 30]
    assert read_lines(path)[-1]["epoch"] == 2.0
