"""Parameters, FLOPs and training cost of a model and its sub-models; which augmentations models offer.

    python tools/analyze_model.py --config configs/digits_swin.yaml
    python tools/analyze_model.py --model vit_base_patch16_224 --augsub masking --ratio 0.5
    python tools/analyze_model.py --all-configs          # one line per config, ten models beside the literature
    python tools/analyze_model.py --list-support 'vit_*'

One FLOP is one multiply-add; all figures are for the forward of one image.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from engine.command_line import exit_code, tool_parser
from engine.config_file import CONFIGS, load_config
from engine.errors import InputError
from engine.text import expanded, to_json

AUGSUB, RATIO = "masking", 0.5  # of --model


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="the model and the sub-models of a configuration")
    what.add_argument("--model", type=expanded, metavar="NAME", help="any timm model, as timm builds it")
    what.add_argument("--all-configs", action="store_true", help="every file in configs/, and the literature")
    what.add_argument("--list-support", metavar="WILDCARD", help="timm models by name, for example 'vit_*'")
    parser.add_argument("--augsub", metavar="NAME", help=f"sub-model of --model (default {AUGSUB})")
    parser.add_argument("--ratio", type=float, help=f"its ratio (default {RATIO})")
    parser.add_argument("--depth", type=int, default=1, help="levels of the table of modules (default 1)")
    parser.add_argument("--json", action="store_true", help="plain numbers instead of tables")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of --config, for example model.name=resnet50"
    )
    return parser.parse_intermixed_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.overrides and arguments.config is None:
        raise InputError(f"{arguments.overrides[0]}: key=value belongs to --config")
    if arguments.model is None and (arguments.augsub, arguments.ratio) != (None, None):
        raise InputError("--augsub, --ratio: belong to --model; a configuration has augsub.sub_models")
    config = load_config(arguments.config, arguments.overrides) if arguments.config is not None else None
    # here: it brings torch and timm, for which a typo need not wait
    from tools import analysis

    if arguments.list_support is not None:
        figures = analysis.find_support(arguments.list_support)
        text = analysis.support_table(figures)
    elif arguments.all_configs:
        costs = {path.stem: analysis.analyze_configured(load_config(path)) for path in sorted(CONFIGS.glob("*.yaml"))}
        figures = {name: complexity.as_dict() for name, complexity in costs.items()}
        text = "" if arguments.json else f"{analysis.comparison_table(costs)}\n\n{analysis.literature_table()}"
    else:
        if config is not None:
            complexity = analysis.analyze_configured(config)
        else:
            ratio = RATIO if arguments.ratio is None else arguments.ratio
            complexity = analysis.analyze_named(arguments.model, arguments.augsub or AUGSUB, ratio)
        figures = complexity.as_dict()
        text = analysis.model_tables(arguments.config or arguments.model, complexity, arguments.depth)
    print(to_json(figures, indent=2) if arguments.json else text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for an error."""
    return exit_code(partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
