"""What training costs, beside what it must cost by arithmetic.

    python tools/benchmark.py --quick                                   # all parts, minutes on two cores
    python tools/benchmark.py --device cuda --parts steps --models vit_base_patch16_224:224:256 train.amp=bf16

Contenders of one table are measured in turns; ratios are medians over pairs of rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from engine import atomic
from engine.command_line import AtLeast, as_path, main_of, parse_with_overrides, tool_parser
from engine.errors import InputError, input_errors, writing_errors
from engine.text import to_json

if TYPE_CHECKING:
    import torch

PARTS = {"steps": "training steps", "memory": "peak memory", "data": "loading alone", "runs": "whole runs"}
HEADERS = ["", "median", "ratio [quartiles]", "to", "limit"]
QUICK = ("vit_small_patch16_224:128:8", "swin_tiny_patch4_window7_224:224:2", "resnet50:128:4")
WHOLE = ("vit_base_patch16_224:224", "swin_tiny_patch4_window7_224:224", "resnet50:224")
BATCH = {"cpu": 4, "cuda": 128}  # of these


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    parser.add_argument("--models", nargs="+", metavar="NAME:SIZE:BATCH", help="timm models, pixels, images per step")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the steps: 'bare loop', 'masking 0.5' …")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument(
        "--rounds", type=int, action=AtLeast, const=1, help="of each table (default 10, 5 with --quick)"
    )
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the loaders")
    parser.add_argument("--images", type=as_path, metavar="FOLDER", help="train/<class> to load instead of made ones")
    parser.add_argument("--json", type=as_path, default=Path("runs/benchmark.json"), help="file to write")
    meaning = "of all models' configuration: train.amp=bf16, train.compile=true, plugins=[MODULE] …"
    return parse_with_overrides(parser, arguments, meaning)


def measure(arguments: argparse.Namespace, device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """The lines of one case after the other."""
    from tools.benchmarking.loading import measure_loading, measure_runs
    from tools.benchmarking.memory import measure_memory
    from tools.benchmarking.steps import configuration, measure_steps

    rounds = (5 if arguments.quick else 10) if arguments.rounds is None else arguments.rounds
    usual = QUICK if arguments.quick else [f"{model}:{BATCH[arguments.device]}" for model in WHOLE]
    configs = {text: configuration(text, arguments.overrides) for text in arguments.models or usual}
    for part, (text, config) in product(arguments.parts, configs.items()):
        with input_errors(f"--models {text}"):
            if part == "steps":
                yield measure_steps(config, device, rounds, arguments.only)
            elif part == "memory":
                yield measure_memory(config, device, arguments.only)
    if "runs" in arguments.parts:
        yield from measure_runs([*configs.values()], 512, arguments.workers, rounds, device, arguments.images)
    if "data" in arguments.parts:
        images = 192 if arguments.quick else 1024
        yield from measure_loading(images, 64, arguments.workers, rounds, device, arguments.images)


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """The lines of one case."""
    rows = [["" if number else line["case"], *cells(line), line["note"]] for number, line in enumerate(lines)]
    return tabulate(rows, headers=["case", *HEADERS, ""], tablefmt="simple", disable_numparse=True)


def cells(line: Mapping[str, Any]) -> list[str]:
    """What HEADERS say."""
    ratio = "" if line["ratio"] is None else f"{line['ratio']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
    limit = "" if line["limit"] is None else f"{line['limit']:.3f}"
    number = f"{line['value']:,.0f}" if line["value"] >= 1000 else f"{line['value']:.4g}"
    value = ", ".join(filter(None, (f"{number} {line['unit']}", line["note"].partition(",")[0])))
    return [line["name"], value, ratio, line["against"], limit]


def run(arguments: argparse.Namespace) -> None:
    """Measure, print, save."""
    import torch  # here: --help does without

    from tools.machine import machine

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device")
    about = machine(arguments.device == "cuda")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    command, lines = shlex.join(["python", "tools/benchmark.py", *sys.argv[1:]]), []
    for of_case in measure(arguments, torch.device(arguments.device)):
        print(f"\n{table(of_case)}", flush=True)
        lines += of_case
        content = to_json({"machine": about, "command": command, "lines": lines}, indent=1)
        with writing_errors(arguments.json):  # after every case: whatever ends the rest, these are there
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(arguments.json, content)
    print(f"\n{arguments.json}")


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
