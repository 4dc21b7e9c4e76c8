"""What a training step sends between GPUs and keeps in each of them, by arithmetic.

    python tools/scaling.py                                     # ViT-H/14 on 64 GPUs, configs/deit3_h_400e.yaml
    python tools/scaling.py --config configs/swin_b.yaml --processes 8 train.accumulation=2
    python tools/scaling.py --model vit_large_patch16_224       # with one sub-model and AdamW

Collectives and sizes are those of torch's DistributedDataParallel and FSDP2 as `engine/distributed.py` sets them up; a
test counts them in two real processes. Activations are not counted. The model is built without weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.command_line import AtLeast, main_of, parse_with_overrides, tool_parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", default="deit3_h_400e", help="default deit3_h_400e")
    what.add_argument("--model", metavar="NAME", help="any timm model, with one sub-model and AdamW")
    parser.add_argument(
        "--processes", type=int, action=AtLeast, const=2, default=64, metavar="N", help="GPUs (default 64)"
    )
    return parse_with_overrides(parser, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    from tools.step_costs import print_costs  # here: --help needs no torch

    print_costs(arguments.config, arguments.model, arguments.processes, arguments.overrides)


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
