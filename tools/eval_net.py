"""Evaluate a run, a checkpoint, a file of weights or any pretrained timm model on held-out images.

    python tools/eval_net.py runs/digits_vit                                # its best checkpoint on its own data
    python tools/eval_net.py runs/digits_vit/checkpoints/last.pt --ratios 0,0.25,0.5,0.75
    python tools/eval_net.py model.safetensors --model vit_small_patch16_224 data.root=images
    python tools/eval_net.py runs/mine --variant corrupted                  # accuracy and calibration by corruption
    python tools/eval_net.py runs/mine --ratios 0.25,0.5,0.75 --speed       # accuracy against computation and time
    python tools/eval_net.py runs/mine --features knn,linear                # how good its features are by themselves
    python tools/eval_net.py resnet50 --variant v2 data.root=imagenetv2-matched-frequency-format-val
    torchrun --nproc_per_node=8 tools/eval_net.py runs/swin_b data.image_size=256 transform.eval_crop=1

Prints accuracy, cross-entropy and expected calibration error, of averaged weights too, and writes them with accuracy
by class, a picture of the confused classes and a reliability diagram to a folder. engine/data/imagenet_family.py says
how the folder of a variant must look.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from engine.command_line import (
    as_path,
    launched_processes,
    launched_rank,
    leave,
    log_to_terminal,
    main_of,
    parse_with_overrides,
    tool_parser,
)
from engine.errors import input_errors, memory_errors
from engine.text import expanded


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "what", type=expanded, metavar="WHAT", help="folder of a run, checkpoint, file of weights, or timm model"
    )
    parser.add_argument(
        "--model", type=expanded, metavar="NAME", help="timm model of a file of weights that has no configuration"
    )
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help="ImageNet's relatives: real, v2, a, r, sketch, objectnet, c; or corrupted: noise, blur … over any images",
    )
    parser.add_argument("--clean", metavar="FOLDER", type=expanded, help="ImageNet's validation, to compare with")
    parser.add_argument(
        "--output", type=as_path, metavar="FOLDER", help="default: a folder of evaluation/ in the run or in runs/"
    )
    parser.add_argument("--sub-model", action="store_true", help="evaluate the configuration's sub-models too")
    parser.add_argument("--augsub", metavar="NAME", help="this sub-model instead, at ratio 0.5")
    parser.add_argument("--ratios", metavar="R,R,…", help="sub-models at these ratios, for example 0,0.25,0.5,0.75")
    parser.add_argument(
        "--speed", action="store_true", help="time forwards too: images/s, latency; count multiply-adds"
    )
    parser.add_argument("--compile", action="store_true", help="the model, by torch.compile")
    parser.add_argument("--features", metavar="P,P", help="classifiers on the features too: knn,linear")
    return parse_with_overrides(parser, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    with input_errors(f"--ratios {arguments.ratios}"):
        ratios = [float(word) for word in arguments.ratios.split(",")] if arguments.ratios else []
    # here: these bring torch and timm, for which a typo need not wait
    from engine.data.imagenet_family import VARIANT_SETTINGS
    from engine.data.loaders import worker_deaths
    from engine.defaults import complete
    from engine.distributed import process_group
    from engine.evaluation.features import chosen_probes
    from engine.evaluation.report import check_folder, tables, write
    from engine.evaluation.run import Asked, evaluate_weights, find_target, folder_for, sub_models

    if launched_rank() == 0:
        log_to_terminal()
    probes = chosen_probes(arguments.features)
    overrides = [*VARIANT_SETTINGS.get(arguments.variant, ()), *arguments.overrides]
    given = {override.partition("=")[0] for override in overrides}
    if "data.eval_split" in given and "data.validation_share" not in given:
        overrides.append("data.validation_share=0")  # which a run was trained with, and which would hide the split
    config, checkpoint = find_target(arguments.what, arguments.model, overrides)
    config = complete(config)
    wanted = arguments.sub_model or arguments.augsub is not None or ratios
    augmentations = sub_models(config, arguments.augsub, ratios) if wanted else []
    keys = ("variant", "clean", "model", "augsub", "ratios", "features")
    named = [f"{key}={vars(arguments)[key]}" for key in keys if vars(arguments)[key]]
    flags = {"sub-model": arguments.sub_model, "speed": arguments.speed, "compile": arguments.compile}
    named += [*(flag for flag, is_given in flags.items() if is_given), *arguments.overrides]
    output = arguments.output or folder_for(arguments.what, checkpoint, named)
    check_folder(output)
    with (
        process_group(config.distributed.timeout_minutes) as process,
        worker_deaths(config.data.workers),
        memory_errors("lower evaluation.batch, the images at once in a process"),
    ):
        asked = Asked(
            arguments.variant, arguments.clean, augmentations, probes, arguments.speed, arguments.compile, output
        )
        description, results = evaluate_weights(config, checkpoint, process, asked)
        if process.is_main:
            print(tables(description, results))
            write(output, description, results)
            print(f"\nresults in {output}")


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    leave(main(), launched_processes())
