"""Draw what the main model and its sub-models see: masked cells, crops, dropped paths and activations.

    python tools/visualize_augsub.py                                          # three families, every augmentation
    python tools/visualize_augsub.py --model vit_small_patch16_224 --augsub masking --ratio 0.25 0.5 0.75
    python tools/visualize_augsub.py --model vit_small_patch16_224 --augsub masking '{name: masking, strategy: grid}'
    python tools/visualize_augsub.py --model convnext_tiny --augsub random_crop+masking drop_path --images my_folder
    python tools/visualize_augsub.py --config configs/digits_swin.yaml model.drop_path_rate=0.1

Everything drawn was noted in a real forward of the sub-model. Weights are random: they change nothing of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from engine.command_line import as_path, main_of, parse_with_overrides, tool_parser
from engine.config_file import load_config, parse_config, reported
from engine.errors import InputError, input_errors
from engine.text import expanded
from engine.typed_yaml import read_value

FAMILIES = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18")
OUTPUT = "runs/what_the_sub_model_sees.png"
AUGMENTATIONS = ("masking", "random_crop", "random_crop+masking", "drop_path", "dropout")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", help="the model and the sub-models of a configuration")
    what.add_argument(
        "--model", type=expanded, metavar="NAME", help="any timm model (default: one each of three families)"
    )
    parser.add_argument(
        "--augsub", nargs="+", metavar="NAME", help="sub-models; + composes names, {} is as in a configuration"
    )
    parser.add_argument("--ratio", nargs="+", type=float, metavar="R", help="one or more for each (default 0.5)")
    parser.add_argument(
        "--images", nargs="+", type=as_path, default=[], metavar="PATH", help="files or folders (default: a flower)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument("--output", type=as_path, help=f"PNG file to write (default {OUTPUT})")
    return parse_with_overrides(parser, arguments, "of the configuration, for example data.image_size=64")


def described(words: str) -> list[dict[str, Any]]:
    """What to compose: names with + between them, or one augmentation as a configuration has it."""
    if not words.startswith("{"):
        return [{"name": name} for name in words.split("+")]
    with reported(f"--augsub {words}"):
        return [read_value(words, dict[str, Any])]


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    arguments.output = arguments.output or Path(OUTPUT)
    if arguments.output.suffix != ".png":
        raise InputError(f"--output {arguments.output}: the name must end in .png")
    if arguments.config and arguments.ratio and not arguments.augsub:
        raise InputError("--ratio: belongs to --augsub; the sub-models of a configuration have their own")
    configs = [load_config(arguments.config, arguments.overrides)] if arguments.config else []
    # here: these bring torch and timm, for which a typo need not wait
    import augsub
    from engine.data.source import IMAGENET
    from engine.defaults import complete
    from engine.evaluation.run import MODELS_OWN
    from engine.loss import build_sub_models
    from tools.analysis import data_source
    from tools.seen_figure import chosen, draw, rows_of

    files = chosen(arguments.images)
    names = () if arguments.config else [arguments.model] if arguments.model else FAMILIES
    configs += [
        parse_config("", "--model", [*MODELS_OWN, f"model.name={name}", *arguments.overrides]) for name in names
    ]
    configs = [complete(config) for config in configs]
    with input_errors("--augsub"):
        sub_models = [
            augsub.build([{"ratio": ratio, **member} for member in described(words)])
            for words, ratio in product(arguments.augsub or AUGMENTATIONS, arguments.ratio or [0.5])
        ]
    if arguments.config:
        (config,) = configs
        rows = rows_of(config, data_source(config), files)
        if not arguments.augsub:
            sub_models = [sub_model.augmentation for sub_model in build_sub_models(config)]
        if not sub_models:
            raise InputError(f"{arguments.config}: augsub.sub_models is empty; --augsub says what to draw")
    else:
        rows = [row for config in configs for row in rows_of(config, IMAGENET, files)]
    may_lack = not arguments.config and not (arguments.model and arguments.augsub)
    draw(rows, sub_models, arguments.seed, may_lack, arguments.output)
    print(arguments.output)


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
