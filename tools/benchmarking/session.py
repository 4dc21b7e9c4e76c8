"""The benchmark as its command line asks for it: settings, the machine, all parts; and what was saved, as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import timm
import torch

from engine import atomic
from engine.errors import InputError, input_errors, writing_errors
from engine.text import to_json
from models.build import image_settings
from tools.benchmarking.loading import measure_loading
from tools.benchmarking.measurements import PARTS, Measurement, table
from tools.benchmarking.memory import measure_memory
from tools.benchmarking.steps import Setting, Timing, measure_steps

QUICK = ("vit_small_patch16_224:128:8", "swin_tiny_patch4_window7_224:224:2", "resnet50:128:4")
LEAST_IMAGES = 16  # of a step whose memory is measured
WHOLE_CPU = ("vit_base_patch16_224:224:4", "swin_tiny_patch4_window7_224:224:4", "resnet50:224:4")
WHOLE_GPU = ("vit_base_patch16_224:224:128", "swin_tiny_patch4_window7_224:224:128", "resnet50:224:128")


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


def measure(arguments: argparse.Namespace) -> list[Measurement]:
    """All parts, each printed when it is done."""
    settings, device = settings_of(arguments), torch.device(arguments.device)
    rounds = (5 if arguments.quick else 10) if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: allowed is 1 or more")
    timing = Timing(device, rounds, warm_up=3 if arguments.compile else 1, repeats=10 if device.type == "cuda" else 1)
    jobs: dict[str, list[Callable[[], list[Measurement]]]] = {
        "steps": [partial(measure_steps, setting, timing, arguments.only) for setting in settings],
        "memory": [partial(measure_memory, with_more_images(setting), device) for setting in settings],
        "data": [partial(measure_loading, 192 if arguments.quick else 1024, 64, arguments.workers, timing)],
    }
    measurements: list[Measurement] = []
    for part in arguments.parts:
        for job in jobs[part]:
            found = job()
            print(f"\n{table(found)}", flush=True)
            measurements += found
    return measurements


def show(file: Path) -> None:
    """Print a file that the benchmark wrote, as Markdown.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_text())
        facts, command = dict(content["machine"]), str(content["command"])
        measurements = [Measurement(**line) for line in content["lines"]]
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file}: is not a file of tools/benchmark.py: {type(error).__name__}: {error}") from error
    versions = ", ".join(f"{name} {facts.get(name, '?')}" for name in ("torch", "timm", "python"))
    print(f"## {facts.get('device', 'unknown')}\n\n{facts.get('cores', '?')} CPU cores, {versions}; `{command}`\n")
    for part, title in PARTS.items():
        lines = [line for line in measurements if line.part == part]
        tables = [table(list(of_case), "github") for _, of_case in groupby(lines, key=lambda line: line.case)]
        if tables:
            print("\n\n".join([f"### {title}", *tables]) + "\n")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, save; or show what was saved."""
    if arguments.show:
        for file in arguments.show:
            show(file)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device")
    facts = machine(torch.device(arguments.device))
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    measurements = measure(arguments)
    command = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]])
    content = {"machine": facts, "command": command, "lines": [asdict(line) for line in measurements]}
    with writing_errors(arguments.json):
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(arguments.json, to_json(content, indent=1))
    print(f"\n{arguments.json}")
