"""The benchmark as its command line asks for it: settings, the machine, all parts; and what was saved, as Markdown."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import asdict, replace
from itertools import groupby, product
from pathlib import Path

import timm
import torch

from engine import atomic
from engine.errors import InputError, input_errors, writing_errors
from engine.text import to_json
from tools.benchmarking.loading import measure_loading
from tools.benchmarking.measurements import PARTS, Measurement, Setting, table
from tools.benchmarking.memory import measure_memory
from tools.benchmarking.steps import measure_steps

QUICK = ("vit_small_patch16_224:128:8", "swin_tiny_patch4_window7_224:224:2", "resnet50:128:4")
LEAST_IMAGES = 16  # of a step whose memory is measured
WHOLE_CPU = ("vit_base_patch16_224:224:4", "swin_tiny_patch4_window7_224:224:4", "resnet50:224:4")
WHOLE_GPU = ("vit_base_patch16_224:224:128", "swin_tiny_patch4_window7_224:224:128", "resnet50:224:128")


def settings_of(arguments: argparse.Namespace) -> list[Setting]:
    """What is trained; the arguments of NAME:SIZE:BATCH are checked."""
    settings, device = [], torch.device(arguments.device)
    usual = QUICK if arguments.quick else WHOLE_GPU if arguments.device == "cuda" else WHOLE_CPU
    for text in arguments.models or usual:
        name, *sizes = text.split(":")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) for size in sizes):
            raise InputError(f"--models {text}: allowed is NAME:SIZE:BATCH, for example resnet50:224:64")
        switches = arguments.amp, arguments.compile, arguments.channels_last
        settings.append(Setting(name, *map(int, sizes), device, *switches))
    return settings


def machine(device: torch.device) -> dict[str, str]:
    """What was measured on, and with."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = processor[1].strip() if processor else platform.processor()
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else name,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def measure(arguments: argparse.Namespace, device: torch.device) -> list[Measurement]:
    """All parts, each printed when it is done."""
    rounds = (5 if arguments.quick else 10) if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        raise InputError(f"--rounds {rounds}: allowed is 1 or more")
    measurements: list[Measurement] = []

    def note(found: list[Measurement]) -> None:
        print(f"\n{table(found)}", flush=True)
        measurements.extend(found)

    settings = settings_of(arguments)
    for part, setting in product(arguments.parts, settings):
        with input_errors(str(setting)):
            if part == "steps":
                note(measure_steps(setting, rounds, arguments.only))
            elif part == "memory":  # with so many images that activations outweigh gradients, as on GPUs
                note(measure_memory(replace(setting, batch=max(setting.batch, LEAST_IMAGES))))
    if "data" in arguments.parts:
        note(measure_loading(192 if arguments.quick else 1024, 64, arguments.workers, rounds, device))
    return measurements


def show(file: Path) -> None:
    """Print a file that the benchmark wrote, as Markdown."""
    content = json.loads(file.read_text())
    facts, measurements = content["machine"], [Measurement(**line) for line in content["lines"]]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "timm", "python"))
    print(f"## {facts['device']}\n\n{facts['cores']} CPU cores, {versions}; `{content['command']}`\n")
    for part, lines in groupby(measurements, key=lambda line: line.part):
        tables = [table(list(of_case), "github") for _, of_case in groupby(lines, key=lambda line: line.case)]
        print("\n\n".join([f"### {PARTS[part]}", *tables]) + "\n")


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, save; or show what was saved."""
    if arguments.show:
        for file in arguments.show:
            show(file)
        return
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device")
    facts = machine(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    lines = [asdict(line) for line in measure(arguments, device)]
    content = {"machine": facts, "command": shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]]), "lines": lines}
    with writing_errors(arguments.json):
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(arguments.json, to_json(content, indent=1))
    print(f"\n{arguments.json}")
