"""The most probable classes of images, by a run, an exported model or any timm model.

    python tools/predict.py runs/mine photos --top-k 3 --output out.csv      # files and folders, at any depth
    python tools/predict.py vit_small_patch16_224.augreg_in1k cat.jpg        # printed
    python tools/predict.py model.onnx photos --output out.jsonl
    python tools/predict.py model.safetensors table.csv --model resnet50 --output out.parquet
    torchrun --nproc_per_node=8 tools/predict.py runs/mine 'shards/val-*.tar' --output out.csv

A table, .csv or .parquet, names images in its column `path`, relative to its own folder; shards are tar files or URLs
of such. What is in the output already, by its path, is not predicted again; what was interrupted goes on. Probabilities
are a softmax's, or of a run by binary cross-entropy a sigmoid's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.command_line import (
    AtLeast,
    as_path,
    launched_processes,
    launched_rank,
    leave,
    log_to_terminal,
    main_of,
    parse_with_overrides,
    tool_parser,
)
from engine.errors import InputError, memory_errors
from engine.text import expanded, readable_name

OUTPUTS = (".csv", ".jsonl", ".parquet")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "what", type=expanded, metavar="WHAT", help="run, checkpoint, file of weights, .onnx, timm model"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, tables, or shards")
    parser.add_argument("--model", type=expanded, metavar="NAME", help="timm model of a file of weights")
    parser.add_argument(
        "--top-k", type=int, action=AtLeast, const=1, default=5, metavar="K", help="classes of each image (default 5)"
    )
    parser.add_argument("--flips", action="store_true", help="the mean over each image and its mirror image")
    parser.add_argument("--output", type=as_path, metavar="FILE", help=".csv, .jsonl or .parquet (default: printed)")
    return parse_with_overrides(parser, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.output is not None and arguments.output.suffix not in OUTPUTS:
        raise InputError(f"--output {arguments.output}: the name must end in {', '.join(OUTPUTS)}")
    # here: these bring torch and timm, for which a typo need not wait
    from engine.data.loaders import worker_deaths
    from engine.distributed import process_group
    from tools.predicting import Predictions, load_predictor, open_images, predict

    if launched_rank() == 0:
        log_to_terminal()
    predictor = load_predictor(arguments.what, arguments.model, arguments.overrides, arguments.flips)
    images = open_images(arguments.images, predictor.config.data.patience)
    paths = [readable_name(images.name_of(number)) for number in range(len(images))]
    predictions = Predictions(arguments.output, min(arguments.top_k, len(predictor.class_names)), paths, predictor.name)
    config = predictor.config
    with (
        process_group(config.distributed.timeout_minutes) as process,
        worker_deaths(config.data.workers),
        memory_errors("lower evaluation.batch, the images at once in a process"),
    ):
        predict(predictor, images, predictions, process)
        predictions.gather(process)
        process.barrier()
        if process.is_main:
            print(predictions.finish())


main = main_of(parse_arguments, run, "the same command goes on")


if __name__ == "__main__":
    leave(main(), launched_processes())
