"""What training costs, beside what it must cost by arithmetic.

    python tools/benchmark.py --quick                                   # all parts, minutes on two cores
    python tools/benchmark.py --device cuda --amp bf16 --compile --parts steps --models vit_base_patch16_224:224:256
    python tools/benchmark.py --show runs/benchmark.json                  # what it wrote, as Markdown

Contenders of one table are measured in turns; ratios are medians over pairs of rounds, with quartiles.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine.command_line import as_path, exit_code, tool_parser

PARTS = ("steps", "memory", "data")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small models and few rounds")
    parser.add_argument("--models", nargs="+", metavar="NAME:SIZE:BATCH", help="timm models, pixels, images per step")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="precision of forwards")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="memory layout of images and convolutions")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the steps: 'bare loop', 'masking 0.5' …")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--rounds", type=int, help="of each table (default 10, 5 with --quick)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="of the loaders")
    parser.add_argument("--json", type=as_path, default=Path("runs/benchmark.json"), help="file to write")
    parser.add_argument("--show", nargs="+", type=as_path, metavar="FILE", help="print such files as Markdown instead")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for an error."""
    parsed = parse_arguments(arguments)
    from tools.benchmarking.session import run  # here: --help needs no torch

    return exit_code(partial(run, parsed))


if __name__ == "__main__":
    sys.exit(main())
