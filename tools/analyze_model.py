"""Parameters, FLOPs and training cost of a model and its sub-models; which augmentations models offer.

    python tools/analyze_model.py --config configs/digits_swin.yaml
    python tools/analyze_model.py --model vit_base_patch16_224 --augsub masking --ratio 0.5
    python tools/analyze_model.py --model vit_base_patch16_224 --augsub drop_path mode=skip
    python tools/analyze_model.py --all-configs          # one line per config, ten models beside the literature
    python tools/analyze_model.py --list-support 'vit_*'

One FLOP is one multiply-add; all figures are for the forward of one image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from engine.command_line import main_of, parse_with_overrides, tool_parser
from engine.text import expanded


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="the model and the sub-models of a configuration")
    what.add_argument("--model", type=expanded, metavar="NAME", help="any timm model, as timm builds it")
    what.add_argument("--all-configs", action="store_true", help="every file in configs/, and the literature")
    what.add_argument("--list-support", metavar="WILDCARD", help="timm models by name, for example 'vit_*'")
    parser.add_argument("--augsub", metavar="NAME", help="sub-model of --model (default masking)")
    parser.add_argument("--ratio", type=float, help="its ratio (default 0.5)")
    parser.add_argument("--json", action="store_true", help="plain numbers instead of tables")
    meaning = "plugins=[MODULE]; of --config, model.name=resnet50; of --augsub, mode=skip"
    return parse_with_overrides(parser, arguments, meaning)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    from tools.analysis import print_analysis  # here: --help needs no torch

    print_analysis(arguments)


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
