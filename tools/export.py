"""Give the model of a run to others: one plain timm file, a folder in the hub's layout, or ONNX.

    python tools/export.py runs/digits_vit model.safetensors                        # its best weights; or .pth, .pt
    python tools/export.py runs/digits_vit/checkpoints/best.pt my_model             # a folder
    python tools/export.py runs/digits_vit/checkpoints/last.pt model.onnx --ema

Prints how to load it. The folder holds safetensors, config.json and a model card, as timm's models on the Hugging Face
hub do; timm loads it from the disk or, uploaded, from there. ONNX needs `pip install 'augsub[onnx]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.command_line import as_path, main_of, parse_with_overrides, tool_parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    kinds = "*.safetensors, *.pt, *.pth, *.onnx, or a new folder"
    choice = "the averaged weights, or not (default: those by which the run chose its best checkpoint)"
    parser.add_argument("checkpoint", type=as_path, help="a run, or a checkpoint of one: last.pt, best.pt, iter_<n>.pt")
    parser.add_argument("target", type=as_path, help=f"what to write: {kinds}")
    parser.add_argument("--ema", action=argparse.BooleanOptionalAction, help=choice)
    return parse_with_overrides(parser, arguments, "plugins=[MODULE]: that register the run's model")


def run(arguments: argparse.Namespace) -> None:
    """Write it, and say how to load it."""
    from tools.exporting import export  # here: --help needs no torch

    print(export(**vars(arguments)))


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
