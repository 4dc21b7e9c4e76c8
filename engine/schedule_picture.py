"""The learning rate of a run before it runs, drawn over its epochs."""

from __future__ import annotations

from pathlib import Path

from matplotlib import pyplot as plt

from engine.figure import BLUE, ORANGE, VERMILION, save
from engine.schedule import WarmupCosine

POINTS = 2000  # more than the picture has columns


def draw_schedule(
    schedule: WarmupCosine, steps_per_epoch: int, stop: float | None, full_rate: float, title: str, path: Path
) -> None:
    """Draw all steps of a schedule.

    Args:
        steps_per_epoch: 1 where a step of the schedule is an epoch.
        stop: epoch at which the run ends before its schedule does.
        full_rate: largest `lr_scale` of a parameter group, whose learning rate is shown.
    """
    steps = [*range(0, schedule.total, max(1, schedule.total // POINTS)), schedule.total]
    epochs = [step / steps_per_epoch for step in steps]
    rates = [full_rate * schedule(min(step, schedule.total - 1)) for step in steps]
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    if schedule.warmup:
        axes.axvspan(0, (schedule.lag + schedule.warmup) / steps_per_epoch, color=ORANGE, alpha=0.2, label="warmup")
    axes.plot(
        epochs, rates, color=BLUE, label="learning rate", drawstyle="steps-post" if steps_per_epoch == 1 else None
    )
    if stop is not None:
        axes.axvline(stop, color=VERMILION, linestyle="--", label=f"train.max_iters, epoch {stop:.4g}")
    axes.set(title=title, xlabel="epoch", ylabel="learning rate", xlim=(0, schedule.total / steps_per_epoch))
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(figure, path)
