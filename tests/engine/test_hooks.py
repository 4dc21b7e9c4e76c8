"""Hooks, each by itself around a loop of a few steps."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

import tools.train_net
from engine.checkpoint import CheckpointStore, load
from engine.config import Config, LogConfig, ScheduleConfig, TrainConfig
from engine.data.source import DataSource
from engine.distributed import Process
from engine.errors import NonFiniteLossError, Preempted
from engine.evaluation.metrics import evaluate
from engine.hooks import HOOK_REGISTRY, build_own_hooks
from engine.hooks.reporting import Evaluation, Report, SubModelPictures, WriteRecords, mean_losses
from engine.hooks.saving import Checkpoint, Preemption
from engine.hooks.training import (
    ExponentialMovingAverage,
    FrozenStatistics,
    LearningRateSchedule,
    NaNGuard,
    Plateau,
)
from engine.optim import Schedule
from engine.precision import Precision
from engine.run_folder import RunFolder
from engine.train_loop import HookBase, TrainerBase
from engine.trainer import RunningMeans

CPU = torch.device("cpu")
ALONE = Process(rank=0, world_size=1, device=CPU)
LABELS = torch.arange(3).repeat(4)
IMAGES = nn.functional.one_hot(LABELS).float()  # a linear model tells them apart by the sign of its weight


class Loop(TrainerBase):
    """Adds `steps[i]` to the diagonal of a linear model's weight, 0 at first, at step i, whose loss is `losses[i]`."""

    def __init__(self, steps: list[float], losses: list[float] | None = None, amp: str = "off", scale=65536.0) -> None:
        super().__init__(max_iterations=len(steps))
        self.steps, self.losses = steps, losses or [1.0] * len(steps)
        self.bare_model = nn.Linear(3, 3, bias=False)
        nn.init.zeros_(self.bare_model.weight)
        self.process, self.precision = ALONE, Precision(amp, CPU, loss_scale=scale)
        self.data = SimpleNamespace(held_out=[(IMAGES, LABELS)], source=DataSource(None, None, 10, 3))
        self.results: dict[str, float] = {}

    @property
    def epoch(self) -> float:
        return self.iteration / 2

    @torch.no_grad()
    def run_step(self):
        self.results = {}
        self.bare_model.weight.diagonal().add_(self.steps[self.iteration])
        self.last_loss = torch.tensor(self.losses[self.iteration])

    def state_dict(self):
        return {"iteration": self.iteration, "model": self.bare_model.state_dict()}


def train(loop: Loop, *hooks: HookBase) -> None:
    loop.register_hooks(hooks)
    loop.train()


def test_the_average_is_exponential_and_is_saved_or_starts_with_the_weights():
    loop = Loop([1.0, 2.0, 3.0])
    ema = ModelEmaV3(loop.bare_model, decay=0.75)
    hook = ExponentialMovingAverage(ema)
    train(loop, hook)
    expected = 1.0  # it starts with the weights after the first step
    for weight in (3.0, 6.0):
        expected = 0.75 * expected + 0.25 * weight
    torch.testing.assert_close(ema.module.weight, expected * torch.eye(3))
    state = deepcopy(hook.state_dict())
    hook.start_late()
    assert torch.equal(ema.module.weight, loop.bare_model.weight)
    hook.load_state_dict(state)
    torch.testing.assert_close(ema.module.weight, expected * torch.eye(3))


TWICE = """
from engine.hooks import HOOK_REGISTRY
from engine.train_loop import HookBase


@HOOK_REGISTRY.register()
class Twice(HookBase):
    state_name = "twice"

    def __init__(self, step):
        self.step = step
"""


def test_two_hooks_with_one_name_for_their_state_are_refused(call, tmp_path, monkeypatch):
    (tmp_path / "twice.py").write_text(TWICE)
    monkeypatch.syspath_prepend(tmp_path)
    run = ("--config", "digits_vit", "train.max_iters=1", "plugins=[twice]", f"output_dir={tmp_path}/run")
    code, _, error = call(tools.train_net, *run, "hooks=[{name: Twice, step: 1}, {name: Twice, step: 2}]")
    assert code == 2 and error.startswith("error: hooks: two have the state_name 'twice'") and error.count("\n") == 1


def test_frozen_statistics_stay_through_training():
    frozen, free = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    hook, model = FrozenStatistics([frozen]), nn.Sequential(frozen, free)
    for _ in range(2):
        model.train()  # as after an evaluation
        hook.before_step()
        model(torch.randn(8, 3))
    assert frozen.num_batches_tracked == 0 and free.num_batches_tracked == 2


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize(("period", "noticed"), [(1, 2), (3, 3)])
def test_a_loss_that_is_not_finite_is_named_when_the_device_is_asked(loss, period, noticed):
    loop = Loop([1.0] * 5, [1.0, loss, 1.0, loss, 1.0])
    with pytest.raises(NonFiniteLossError, match=r"the loss is not finite at iteration 2; .*--resume"):
        train(loop, NaNGuard(period))
    assert loop.iteration == noticed


def test_ruined_weights_and_a_collapsed_scale_are_noticed():
    loop, guard = Loop([1.0, float("nan")]), NaNGuard(period=10)
    train(loop, guard)
    guard.check()
    with pytest.raises(NonFiniteLossError, match="a parameter is not finite after iteration 2"):
        guard.check_weights()
    train(Loop([1.0], [float("inf")], amp="fp16"), NaNGuard(period=1))  # one overflow is no error
    with pytest.raises(NonFiniteLossError, match=r"loss scale fell to 0\.5 at iteration 1"):
        train(Loop([1.0], amp="fp16", scale=0.5), NaNGuard(period=1))


def test_an_evaluation_at_its_period_and_at_the_end_and_the_best_of_them():
    class Watch(HookBase):
        def after_step(self):
            seen.append((self.trainer.results.get("top1"), evaluation.is_new_best))

    seen: list = []
    loop = Loop([-1.0, 0.0, 3.0, 0.0, 0.0, 0.0, -4.0])  # the weight is -1, -1, 2, 2, 2, 2, -2
    average = deepcopy(loop.bare_model)
    evaluation = Evaluation(period=2, length=7, metric="top1", average=average)
    train(loop, evaluation, Watch())
    unseen = (None, False)  # 100 % again is no new best
    assert seen == [unseen, (0.0, True), unseen, (100.0, True), unseen, (100.0, False), (0.0, False)]
    assert evaluation.best == {"iteration": 4, "epoch": 2.0, "value": 100.0}
    expected = evaluate(loop.bare_model, loop.data.held_out, loop.precision, ALONE)
    assert evaluation.latest.items() >= expected.items() and evaluation.latest["images"] == 12
    assert (
        evaluation.latest["ema_eval_loss"] == evaluate(average, [(IMAGES, LABELS)], loop.precision, ALONE)["eval_loss"]
    )
    resumed = Evaluation(period=2, length=7, metric="top1")
    resumed.load_state_dict(evaluation.state_dict())
    assert (resumed.best, resumed.best_in_time, resumed.latest) == (*[evaluation.best] * 2, evaluation.latest)
    for spoilt in ({"best": {"value": 1.0}, "latest": {}}, {"best": {}, "latest": {"top1": None}}):
        with pytest.raises(ValueError, match=r"is more than numbers|is not complete"):
            resumed.load_state_dict(spoilt)


@pytest.mark.parametrize("stop", [1, 3])
def test_a_run_that_was_stopped_between_its_evaluations_waits_as_one_that_was_not(stop):
    """The weight is -1 or 3, then 1, 3 or 9, 2, -1, 1: what a stop finds is the best, which is not waited for."""
    steps = [3.0 if stop == 1 else -1.0, -2.0 if stop == 1 else 2.0, 8.0, -7.0, -3.0, 2.0]
    whole, stopped, resumed = (Evaluation(period=2, length=6, metric="eval_loss") for _ in range(3))
    train(Loop(steps), whole)
    before, after = Loop(steps[:stop]), Loop(steps)
    train(before, stopped)
    assert stopped.best["iteration"] == stop and stopped.best_in_time.get("iteration", 0) == stop - 1
    resumed.load_state_dict(deepcopy(stopped.state_dict()))
    after.iteration = before.iteration
    after.bare_model.load_state_dict(before.bare_model.state_dict())
    train(after, resumed)
    assert resumed.best_in_time == whole.best_in_time == whole.best and resumed.latest == whole.latest
    assert resumed.best == stopped.best  # better than all that came in time
    assert resumed.without_better == whole.without_better > 0


def test_records_have_the_means_of_equal_windows_and_what_hooks_found(tmp_path):
    class Found(HookBase):
        def after_step(self):
            if self.trainer.iteration == 5:
                self.trainer.results["distance"] = 0.5

    class Watch(HookBase):
        def after_step(self):
            if writing.latest is not None and writing.latest["iteration"] == self.trainer.iteration:
                seen.append(writing.latest)
            elif self.trainer.results:
                between.append(self.trainer.results["distance"])

    class Measured(Loop):
        def run_step(self):
            super().run_step()
            self.means.add({"loss": self.last_loss})

    seen: list[dict] = []
    between: list[float] = []
    loop = Measured([0.0] * 7, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
    loop.means = RunningMeans(ALONE)
    loop.optimizer = SimpleNamespace(param_groups=[{"lr": 0.1}, {"lr": 0.4}, {"lr": 0.2}])
    config = Config(log=LogConfig(period=3), train=TrainConfig(global_batch=16))
    writing = WriteRecords(config, RunFolder(tmp_path), config.log.period)
    loop.process = Process(rank=1, world_size=1, device=CPU)  # one without writers
    train(loop, Found(), writing, Watch())
    assert [(record["iteration"], record["epoch"], record["loss"]) for record in seen] == [
        (3, 1.5, 2.0),
        (6, 3.0, 5.0),
        (7, 3.5, 8.0),
    ]
    assert between == [0.5] and not any("distance" in record for record in seen)
    assert mean_losses(seen, iterations=4) == {"loss": pytest.approx((3 * 5.0 + 8.0) / 4)}
    assert mean_losses(seen, iterations=1) == {"loss": 8.0} and mean_losses([], 1) == {}
    assert all(record["lr"] == 0.4 and record["images_per_second"] > 0 for record in seen)


class Judged(Evaluation):
    """Finds what it is told, in turn."""

    def _evaluate(self, model, prefix):
        return {self.metric: self.values[self.trainer.iteration // self.period - 1]}


def judged(values, **options) -> Judged:
    hook = Judged(period=2, length=10, **{"metric": "top1", **options})
    hook.values = values
    return hook


def test_a_run_that_gets_no_better_ends_and_stays_ended():
    values = [50.0, 60.0, 60.0, 55.0, 90.0]
    evaluation = judged(values, patience=2)
    loop = Loop([0.0] * 10)
    train(loop, evaluation)
    assert loop.iteration == 8 and evaluation.best["iteration"] == 4
    again = judged(values, patience=2)
    again.load_state_dict(evaluation.state_dict())
    resumed = Loop([0.0] * 10)
    resumed.iteration = 8
    train(resumed, again)
    assert resumed.iteration == 8
    longer = judged(values, patience=3)  # with more of it the run goes on
    longer.load_state_dict(evaluation.state_dict())
    resumed = Loop([0.0] * 10)
    resumed.iteration = 8
    train(resumed, longer)
    assert resumed.iteration == 10 and longer.best["value"] == 90.0


def test_evaluations_are_counted_whatever_their_period_was():
    first = judged([50.0] * 5, patience=4)
    train(Loop([0.0] * 4), first)
    assert first.without_better == 1
    often = judged([50.0] * 10, patience=4)
    often.period = 1
    often.load_state_dict(first.state_dict())
    resumed = Loop([0.0] * 10)
    resumed.iteration = 4
    train(resumed, often)
    assert resumed.iteration == 7


def test_the_lowest_loss_is_the_best():
    evaluation = judged([3.0, 1.0, 2.0], metric="eval_loss")
    train(Loop([0.0] * 6), evaluation)
    assert evaluation.best["value"] == 1.0 and evaluation.best["iteration"] == 4


def test_on_a_plateau_the_learning_rate_falls_again_and_again():
    values = [50.0, 40.0, 40.0, 40.0, 40.0, 60.0, 10.0, 10.0]
    evaluation = judged(values)
    evaluation.length = 17
    learning_rate = LearningRateSchedule(
        Schedule(1.0, 1.0, 0.0, total=100, warmup=0, config=ScheduleConfig(name="plateau")), per_epoch=False
    )
    plateau = Plateau(learning_rate, evaluation, patience=2, decay_rate=0.5)

    class Watch(HookBase):
        def after_step(self):
            rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    loop = Loop([0.0] * 17)
    loop.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "lr_scale": 1.0}])
    evaluation.values = [*values, 10.0]
    train(loop, learning_rate, evaluation, plateau, Watch())
    assert rates == [1.0] * 6 + [0.5] * 4 + [0.25] * 6 + [0.125]
    other = Plateau(LearningRateSchedule(learning_rate.schedule, False), evaluation, 2, 0.5)
    other.load_state_dict(plateau.state_dict())
    assert other.learning_rate.factor == learning_rate.factor == 0.125


def test_a_plateau_ends_at_the_lowest_rate_and_begins_after_the_warmup():
    schedule = Schedule(1.0, 0.0, 0.2, total=12, warmup=4, cooldown=2, config=ScheduleConfig(name="plateau"))
    evaluation = judged([50.0] * 7)
    learning_rate = LearningRateSchedule(schedule, per_epoch=False)
    rates: list[float] = []

    class Watch(HookBase):
        def after_step(self):
            rates.append(self.trainer.optimizer.param_groups[0]["lr"])

    loop = Loop([0.0] * 12)
    loop.optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "lr_scale": 1.0}])
    train(loop, learning_rate, evaluation, Plateau(learning_rate, evaluation, patience=1, decay_rate=0.5), Watch())
    assert rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4:] == [0.5, 0.5, 0.25, 0.25, 0.2, 0.2, 0.2, 0.2]


def test_a_resumed_report_counts_on_and_keeps_where_the_run_started(tmp_path):
    report = Report(
        Config(), RunFolder(tmp_path), Evaluation(period=1, length=1, metric="top1"), SubModelPictures(Config(), None)
    )
    assert 0 <= report.state_dict()["seconds"] < 60
    report.load_state_dict({"seconds": 1000.0, "facts": [["started from", "mae.pth"]]})
    assert 1000 <= report.state_dict()["seconds"] < 1060
    assert report.state_dict()["facts"] == [["started from", "mae.pth"]]


def saving_hooks(folder: RunFolder, period: int, minutes: float | None = None, guard_period: int = 1) -> tuple:
    folder.checkpoints.mkdir(parents=True)
    evaluation, guard = Evaluation(period=4, length=5, metric="top1"), NaNGuard(guard_period)
    store = CheckpointStore(folder, ALONE, keep=5)
    return guard, evaluation, Checkpoint(store, evaluation, guard, {"model_name": "m"}, period, minutes)


def test_checkpoints_at_their_period_at_a_best_and_at_the_end(tmp_path):
    folder = RunFolder(tmp_path / "run")
    train(Loop([1.0, 0.0, 0.0, 0.0, -3.0]), *saving_hooks(folder, period=3))
    assert [path.name for path in folder.list_numbered()] == ["iter_3.pt"]
    saved = {path: load(path) for path in (folder.last, folder.previous, folder.best)}
    assert [content["iteration"] for content in saved.values()] == [5, 4, 4]
    assert saved[folder.last]["model_name"] == "m"
    assert torch.equal(saved[folder.best]["model"]["weight"], torch.eye(3))


@pytest.mark.parametrize(("minutes", "saved"), [(0.0, [1, 2, 3, 4, 5]), (60.0, [4, 5]), (None, [4, 5])])
def test_checkpoints_by_the_clock(tmp_path, minutes, saved):
    """At 4 there is a first, so a best, evaluation; 5 is the end."""

    class Watch(HookBase):
        def after_step(self):
            if folder.last.exists():
                seen.append(load(folder.last)["iteration"])

    seen: list[int] = []
    folder = RunFolder(tmp_path / "run")
    train(Loop([0.0] * 5), *saving_hooks(folder, period=100, minutes=minutes), Watch())
    assert seen == saved and not folder.list_numbered()


def test_the_clock_asks_once_for_each_save(tmp_path, monkeypatch):
    """The answer of several processes comes a step later, when the clock must not have asked again."""

    class Late(Loop):
        def run_step(self):
            super().run_step()
            now[0] = 40.0 * (self.iteration + 1)

    asked, now, saved = [False], [0.0], []
    late = SimpleNamespace(ask=lambda wanted: asked.append(wanted) or asked[-2], finish=lambda: None)
    monkeypatch.setattr("engine.hooks.saving.Agreement", lambda process: late)
    monkeypatch.setattr("engine.hooks.saving.time.monotonic", lambda: now[0])
    *others, checkpoint = saving_hooks(RunFolder(tmp_path / "run"), period=100, minutes=1.0)
    monkeypatch.setattr(checkpoint.store, "save", lambda state, *names: saved.append(state["iteration"]))
    others[1].period = others[1].length = 100
    train(Late([0.0] * 7), *others, checkpoint)
    assert saved == [3, 6, 7]


@pytest.mark.parametrize(("weight", "loss"), [(float("nan"), 1.0), (1.0, float("nan"))])
def test_nothing_is_saved_after_a_loss_or_a_weight_that_is_not_finite(tmp_path, weight, loss):
    folder = RunFolder(tmp_path / "run")
    loop = Loop([1.0, weight, 1.0], [1.0, loss, 1.0])
    with pytest.raises(NonFiniteLossError, match=r"is not finite (at|after) iteration 2"):
        train(loop, *saving_hooks(folder, period=1, guard_period=10))
    assert load(folder.last)["iteration"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_signal_ends_the_run_after_a_save(tmp_path, number, steps):
    """After the last step there is nothing to stop."""

    class Signalled(Loop):
        def run_step(self):
            super().run_step()
            if self.iteration == 1:
                os.kill(os.getpid(), number)

    folder, before = RunFolder(tmp_path / "run"), signal.getsignal(number)
    hooks, stop = saving_hooks(folder, period=100), f"stopped by {number.name} after iteration 2; the state is saved"
    with pytest.raises(Preempted, match=stop) if steps > 2 else nullcontext():
        train(Signalled([1.0] * steps), *hooks, Preemption(hooks[-1]))
    assert load(folder.last)["iteration"] == 2 and signal.getsignal(number) == before


def test_own_hooks_are_made_by_name(monkeypatch):
    class Own(HookBase):
        def __init__(self, period: int = 1) -> None:
            self.period = period

    monkeypatch.setattr(HOOK_REGISTRY, "_obj_map", {"Own": Own, "dict": dict})
    (hook,) = build_own_hooks([{"name": "Own", "period": 3}])
    assert isinstance(hook, Own) and hook.period == 3
    for description, message in (
        ("Own", "allowed is a mapping"),
        ({"period": 3}, "allowed is a mapping"),
        ({"name": "Owm"}, r"unknown hook 'Owm', did you mean 'Own'\?; known: Own, dict"),
        ({"name": "Own", "perod": 3}, "unexpected keyword"),
        ({"name": "dict"}, "is no subclass of engine"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            build_own_hooks([description])
