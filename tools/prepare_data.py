"""Turn a folder or a table of images into shards with an index, or into smaller images.

    python tools/prepare_data.py images shards --samples-per-shard 1000     # train-00000.tar …, val-00000.tar …
    python tools/prepare_data.py labels.csv shards                          # of a table with path, labels, split
    python tools/prepare_data.py images small --resize 256                  # the same folders, shorter side 256
    python tools/prepare_data.py images shards --resize 256 --samples-per-shard 1000

A folder holds <split>/<class>/*.jpg. Images of a split are shuffled, always alike, before they go into shards; files
are copied as they are unless they are resized. Train on shards with data.dataset=wds data.root=shards.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

from engine.command_line import AtLeast, as_path, main_of, parse_with_overrides, tool_parser
from engine.config_file import parse_config
from engine.errors import InputError
from engine.text import to_json

DEFAULT_SAMPLES = 1000


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser, whole = tool_parser(__doc__), {"type": int, "action": AtLeast, "const": 1}
    parser.add_argument("source", type=as_path, metavar="SOURCE", help="a folder of splits, or a table")
    parser.add_argument("target", type=as_path, metavar="TARGET", help="a folder that does not exist, or is empty")
    parser.add_argument(
        "--samples-per-shard",
        **whole,
        metavar="N",
        help=f"write shards of so many images (default {DEFAULT_SAMPLES}; with --resize alone: no shards)",
    )
    parser.add_argument("--resize", **whole, metavar="PIXELS", help="of the shorter side of images that are larger")
    parser.add_argument("--quality", **whole, default=95, metavar="Q", help="of resized images, as JPEG (default 95)")
    parser.add_argument("--jobs", **whole, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    return parse_with_overrides(parser, arguments, "data.columns, data.label_separator …")


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.target.exists() and any(arguments.target.iterdir()):
        raise InputError(f"{arguments.target}: is not empty; remove it, or name another folder")
    # here: these bring torch and timm, for which a typo need not wait
    from tools.preparing import open_splits, resized, write_folder, write_shards

    source = arguments.source
    table = [f"data.table={to_json(str(source))}"] if source.is_file() else []
    data = parse_config("", str(source), [*table, *arguments.overrides]).data
    classes, splits, others = open_splits(source, data)
    resizing = None
    if arguments.resize is not None:
        resizing = partial(
            resized, side=arguments.resize, quality=arguments.quality, max_megapixels=data.max_megapixels
        )
    if arguments.samples_per_shard is None and resizing is not None:
        written = write_folder(splits, classes, arguments.target, resizing, arguments.jobs)
    else:
        samples = arguments.samples_per_shard or DEFAULT_SAMPLES
        written = write_shards(splits, classes, arguments.target, samples, resizing, arguments.jobs)
    print("\n".join([*written, *(f"left out: {other}" for other in others), f"in {arguments.target}"]))


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    raise SystemExit(main())
