"""What training costs, beside what it must cost by arithmetic.

    python tools/benchmark.py --quick                                   # all parts, minutes on two cores
    python tools/benchmark.py --device cuda --amp bf16 --compile --parts steps --models vit_base_patch16_224:224:256
    python tools/pages/performance_page.py runs/benchmark.json            # docs/performance.md from one or more files

Contenders of one table are measured in turns; ratios are medians over pairs of rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import timm
import torch

from engine import atomic
from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import InputError, input_errors, writing_errors
from engine.json_text import to_json
from models.build import image_settings
from tools.benchmarking.costs import Setting
from tools.benchmarking.data import measure_data
from tools.benchmarking.figures import PARTS, Figure, table
from tools.benchmarking.memory import measure_memory
from tools.benchmarking.optimizer import measure_equality, measure_optimizer
from tools.benchmarking.processes import measure_processes
from tools.benchmarking.steps import NAMES, Timing, measure_steps

QUICK = ("vit_small_patch16_224:128:8", "swin_tiny_patch4_window7_224:224:2", "resnet50:128:4")
LEAST_IMAGES = 16  # of a step whose memory is measured
WHOLE_CPU = ("vit_base_patch16_224:224:4", "swin_tiny_patch4_window7_224:224:4", "resnet50:224:4")
WHOLE_GPU = ("vit_base_patch16_224:224:128", "swin_tiny_patch4_window7_224:224:128", "resnet50:224:128")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    parser.add_argument("--models", nargs="+", metavar="NAME:SIZE:BATCH", help="timm models, pixels, images per step")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision of forwards")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of images and convolutions")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of the steps: {', '.join(NAMES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--rounds", type=int, help="of each table (default 10, 5 with --quick)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the loaders")
    parser.add_argument("--json", type=as_path, default=Path("runs/benchmark.json"), help="file to write")
    return parser.parse_args()


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """What is trained; the arguments of NAME:SIZE:BATCH are checked."""
    usual = QUICK if arguments.quick else WHOLE_GPU if arguments.device == "cuda" else WHOLE_CPU
    settings = []
    for text in arguments.models or usual:
        name, *sizes = text.split(":")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise InputError(f"--models {text}: allowed is NAME:SIZE:BATCH, for example resnet50:224:64")
        with input_errors(f"--models {text}"):
            image_settings(name)
        settings.append(Setting(name, *map(int, sizes), arguments.amp, arguments.compile, arguments.channels_last))
    return settings


def with_more_images(setting: Setting) -> Setting:
    """With so many images that activations outweigh gradients, as they do in a training on GPUs."""
    return replace(setting, batch=max(setting.batch, LEAST_IMAGES))


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on, and with."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measure(arguments: argparse.Namespace) -> list[Figure]:
    """All parts, each printed when it is done."""
    settings, device = settings_of(arguments), torch.device(arguments.device)
    rounds = (5 if arguments.quick else 10) if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: allowed is 1 or more")
    timing = Timing(device, rounds, warm_up=3 if arguments.compile else 1, repeats=10 if device.type == "cuda" else 1)
    plain = Timing(device, rounds, warm_up=1, repeats=timing.repeats)
    small = "vit_tiny_patch16_224"
    jobs: dict[str, list[Callable[[], list[Figure]]]] = {
        "steps": [lambda setting=setting: measure_steps(setting, timing, arguments.only) for setting in settings],
        "memory": [lambda setting=setting: measure_memory(with_more_images(setting), device) for setting in settings],
        "optimizer": [
            lambda: measure_optimizer("vit_base_patch16_224", plain),
            lambda: measure_equality(small if arguments.quick else "vit_base_patch16_224", device),
        ],
        "data": [lambda: measure_data(192 if arguments.quick else 1024, 64, arguments.workers, plain)],
        "processes": [measure_processes],
    }
    figures: list[Figure] = []
    for part in arguments.parts:
        for job in jobs[part]:
            found = job()
            print(f"\n{table(found)}", flush=True)
            figures += found
    return figures


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, save."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device")
    facts = machine(torch.device(arguments.device))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    figures = measure(arguments)
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    content = {"machine": facts, "command": command, "figures": [asdict(figure) for figure in figures]}
    with writing_errors(arguments.json):
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(arguments.json, to_json(content, indent=1))
    print(f"\n{arguments.json}")


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    arguments = parse_arguments()
    return exit_code(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
