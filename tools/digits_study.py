"""Baseline against MaskSub on the held-out digits, over seeds: prints the table of the README.

    python tools/digits_study.py                        # three models x two ways x five seeds
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

ROOT = Path(__file__).parent.parent
OVERRIDES = {"baseline": ["augsub.sub_models=[]"], "MaskSub": []}


def run(output: Path, model: str, way: str, seed: int, threads: int) -> float:
    """Held-out top-1 (%) of one run, trained now unless it is finished."""
    folder = output / f"{model}_{way.lower()}_seed{seed}"
    summary = folder / "summary.json"
    if not summary.exists():
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume"]
        command += ["--config", str(ROOT / "configs" / f"digits_{model}.yaml")]
        command += [f"seed={seed}", f"output_dir={folder}", *OVERRIDES[way]]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise SystemExit(f"{folder}: {finished.stderr.strip()}")
    top1 = json.loads(summary.read_text())["top1"]
    print(f"{model} {way} seed {seed}: {top1:.2f} %", file=sys.stderr, flush=True)
    return top1


def table(models: list[str], seeds: list[int], top1: dict[tuple[str, str, int], float]) -> str:
    """Markdown: a row per model and way, a column per seed, mean and standard deviation last."""
    columns = ["model", "training", *(f"seed {seed}" for seed in seeds), "mean ± std"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for model, way in product(models, OVERRIDES):
        values = [top1[model, way, seed] for seed in seeds]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        cells = [f"digits_{model}", way, *(f"{value:.2f}" for value in values)]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(values):.2f}{deviation} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, two runs at a time by default, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit", "swin", "resnet"], choices=["vit", "swin", "resnet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/digits_study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each (default 2)")
    arguments = parser.parse_args()
    runs = list(product(arguments.models, OVERRIDES, arguments.seeds))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = pool.map(lambda key: run(arguments.output, *key, threads=1), runs)
        top1 = dict(zip(runs, results, strict=True))
    print(table(arguments.models, arguments.seeds, top1))


if __name__ == "__main__":
    main()
