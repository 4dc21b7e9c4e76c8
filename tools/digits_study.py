"""Baseline against MaskSub on the held-out digits, over seeds: prints and draws the results in the README.

    python tools/digits_study.py --picture docs/digits_study.png    # three models x two ways x five seeds
    python tools/digits_study.py --models vit --seeds 0 1

Every run is a `tools/train_net.py` of its own. Finished runs are not repeated, interrupted ones continue.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from engine.run_folder import RunFolder
from engine.writers import read_lines

ROOT = Path(__file__).parent.parent
OVERRIDES = {"baseline": ["augsub.sub_models=[]"], "MaskSub": []}
COLOURS = {"baseline": "#0072B2", "MaskSub": "#D55E00"}  # Okabe and Ito
Runs = dict[tuple[str, str, int], RunFolder]  # by model, way of training and seed


def run(output: Path, model: str, way: str, seed: int) -> RunFolder:
    """The folder of one run, trained now unless it is finished."""
    folder = RunFolder(output / f"{model}_{way.lower()}_seed{seed}")
    if not folder.summary.exists():
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
        command += ["--config", str(ROOT / "configs" / f"digits_{model}.yaml")]
        command += [f"seed={seed}", f"output_dir={folder.path}", *OVERRIDES[way]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{folder.path}: {finished.stderr.strip()}")
    print(f"{model} {way} seed {seed}: {top1(folder):.2f} %", file=sys.stderr, flush=True)
    return folder


def top1(folder: RunFolder) -> float:
    """Held-out top-1 of a finished run, percent."""
    return json.loads(folder.summary.read_text())["top1"]


def table(models: list[str], seeds: list[int], runs: Runs) -> str:
    """Markdown: a row per model and way, a column per seed, mean and standard deviation last."""
    columns = ["model", "training", *(f"seed {seed}" for seed in seeds), "mean ± std"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for model, way in product(models, OVERRIDES):
        values = [top1(runs[model, way, seed]) for seed in seeds]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells = [f"digits_{model}", way, *(f"{value:.2f}" for value in values)]
        lines.append(f"| {' | '.join(cells)} | **{statistics.mean(values):.2f}**{deviation} |")
    return "\n".join(lines)


def draw(models: list[str], seeds: list[int], runs: Runs, path: Path) -> None:
    """Held-out accuracy over epochs, one panel per model: mean over seeds, and the range between the extremes."""
    figure, panels = plt.subplots(1, len(models), figsize=(4 * len(models), 3.6), layout="constrained", squeeze=False)
    for model, axes in zip(models, panels[0], strict=True):
        for way in OVERRIDES:
            _draw_way(axes, way, [runs[model, way, seed] for seed in seeds])
        axes.set(
            title=f"digits_{model}",
            xlabel="epoch",
            ylim=(84, 100),
            xlim=(0, 71),
            xticks=range(0, 61, 10),
            yticks=range(84, 101, 4),
        )
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out top-1 accuracy (%)")
    panels[0][0].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_way(axes: Axes, way: str, folders: list[RunFolder]) -> None:
    evaluated = [[record for record in read_lines(folder.metrics) if "top1" in record] for folder in folders]
    epochs = [record["epoch"] for record in evaluated[0]]
    accuracy = np.array([[record["top1"] for record in records] for records in evaluated])
    axes.plot(epochs, accuracy.mean(0), color=COLOURS[way], label=way, marker="o", markersize=3)
    axes.fill_between(epochs, accuracy.min(0), accuracy.max(0), color=COLOURS[way], alpha=0.15, linewidth=0)
    last = accuracy[:, -1].mean()
    offset = (6, 2 if way == "MaskSub" else -9)
    axes.annotate(f"{last:.2f}", (epochs[-1], last), offset, textcoords="offset points", color=COLOURS[way])


def main() -> None:
    """Run what is missing, two runs at a time by default; print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit", "swin", "resnet"], choices=["vit", "swin", "resnet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/digits_study"))
    parser.add_argument("--picture", type=Path, help="draw accuracy over epochs into this file")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default 2)")
    arguments = parser.parse_args()
    keys = list(product(arguments.models, OVERRIDES, arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        folders = pool.map(lambda key: run(arguments.output, *key), keys)
        runs = dict(zip(keys, folders, strict=True))
    print(table(arguments.models, arguments.seeds, runs))
    if arguments.picture:
        draw(arguments.models, arguments.seeds, runs, arguments.picture)


if __name__ == "__main__":
    main()
