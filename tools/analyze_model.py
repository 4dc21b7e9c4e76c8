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
from engine.text import expanded, markdown_table, to_json

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


def print_support(wildcard: str, as_json: bool) -> None:
    """Where augmentations act in the timm models of these names."""
    import timm

    import augsub
    from models.build import build_on_meta

    names = timm.list_models(wildcard)
    if not names:
        raise InputError(f"--list-support: timm has no model {wildcard!r}")
    support = {name: augsub.supports(build_on_meta(name)) for name in names}
    if as_json:
        print(to_json(support, indent=2))
        return
    augmentations = augsub.list_augmentations()
    rows = [
        [name, *(sites.get(augmentation, "-") for augmentation in augmentations)] for name, sites in support.items()
    ]
    print(markdown_table(["model", *augmentations], rows))


def print_costs(arguments: argparse.Namespace) -> None:
    """What all configurations cost, one of them, or a model by name."""
    configs = sorted(CONFIGS.glob("*.yaml")) if arguments.all_configs else []
    config = load_config(arguments.config, arguments.overrides) if arguments.config is not None else None
    # here: these bring torch and timm, for which a typo need not wait
    from tools.analysis import analyze_configured, analyze_named, comparison_table, literature_table, model_tables

    if arguments.all_configs:
        costs = {path.stem: analyze_configured(load_config(path)) for path in configs}
        if arguments.json:
            print(to_json({name: complexity.as_dict() for name, complexity in costs.items()}, indent=2))
        else:
            print(f"{comparison_table(costs)}\n\n{literature_table()}")
        return
    if config is not None:
        complexity = analyze_configured(config)
    else:
        augmentation = AUGSUB if arguments.augsub is None else arguments.augsub
        complexity = analyze_named(arguments.model, augmentation, RATIO if arguments.ratio is None else arguments.ratio)
    if arguments.json:
        print(to_json(complexity.as_dict(), indent=2))
    else:
        print(model_tables(arguments.config or arguments.model, complexity, arguments.depth))


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.overrides and arguments.config is None:
        raise InputError(f"{arguments.overrides[0]}: key=value belongs to --config")
    if arguments.model is None and (arguments.augsub, arguments.ratio) != (None, None):
        raise InputError("--augsub, --ratio: belong to --model; a configuration has augsub.sub_models")
    if arguments.list_support is not None:
        print_support(arguments.list_support, arguments.json)
    else:
        print_costs(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for an error."""
    return exit_code(partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
