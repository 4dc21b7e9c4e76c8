"""Evaluate a run, a checkpoint, a file of weights or any pretrained timm model on held-out images.

    python tools/eval_net.py runs/digits_vit                                # its best checkpoint on its own data
    python tools/eval_net.py runs/digits_vit/checkpoints/last.pt --ratios 0,0.25,0.5,0.75
    python tools/eval_net.py model.safetensors --model vit_small_patch16_224 data.root=images
    python tools/eval_net.py resnet50 --variant v2 data.root=imagenetv2-matched-frequency-format-val
    torchrun --nproc_per_node=8 tools/eval_net.py runs/swin_b data.image_size=256 transform.eval_crop=1

Prints accuracy, cross-entropy and expected calibration error, of averaged weights too, and writes them with accuracy
by class, a picture of the confused classes and a reliability diagram to a folder. engine/data/imagenet_family.py says
how the folder of a variant must look.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from engine.command_line import (
    as_path,
    exit_code,
    launched_processes,
    launched_rank,
    leave,
    located,
    log_to_terminal,
    tool_parser,
)
from engine.config import UNTRANSFORMED
from engine.data import BadFiles, DataSource, build_held_out, build_held_out_source, worker_deaths
from engine.data.imagenet_family import VARIANT_SETTINGS, VARIANTS, Benchmark, open_variant, synsets
from engine.defaults import build_precision, complete, log_left_out
from engine.distributed import Process, process_group
from engine.errors import input_errors, memory_errors, writing_errors
from engine.evaluation.measurement import measure_benchmark
from engine.evaluation.report import write
from engine.evaluation.results import WEIGHTS, Evaluated, Setting, SubModelFigures
from engine.evaluation.subject import Subject, find_subject, folder_for
from engine.evaluation.tables import printed
from engine.evaluation.views import SubModelView
from engine.run_model import models_to_evaluate
from models.build import check_image_shape
from tools.eval_sub_models import NamedSubModel, parse_ratios, sub_models


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "what", type=located, metavar="WHAT", help="folder of a run, checkpoint, file of weights, or timm model"
    )
    parser.add_argument(
        "--model", type=located, metavar="NAME", help="timm model of a file of weights that has no configuration"
    )
    parser.add_argument("--variant", metavar="NAME", help=f"ImageNet's relatives: {', '.join(VARIANTS)}")
    parser.add_argument(
        "--output", type=as_path, metavar="FOLDER", help="default: a folder of evaluation/ in the run or in runs/"
    )
    parser.add_argument("--sub-model", action="store_true", help="evaluate the configuration's sub-models too")
    parser.add_argument("--augsub", metavar="NAME", help="this sub-model instead, at ratio 0.5")
    parser.add_argument("--ratios", metavar="R,R,…", help="sub-models at these ratios, for example 0,0.25,0.5,0.75")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return parser.parse_intermixed_args()


def evaluate_subject(
    subject: Subject, variant: str | None, subs: list[NamedSubModel], output: Path, process: Process
) -> tuple[Setting, list[Evaluated]]:
    """Results of all weights of a subject. All processes must call it together."""
    config = subject.config
    benchmark = Benchmark({"": build_held_out_source(config)}) if variant is None else open_variant(variant, config)
    for source in benchmark.sources.values():
        log_left_out(source)
    bad_files = BadFiles(config.data.bad_files, logs=process.is_main)
    loaders = {name: build_held_out(config, source, process, bad_files) for name, source in benchmark.sources.items()}
    precision, source, evaluated = build_precision(config, process), benchmark.source, []
    class_names = source.class_names if variant is None else synsets()
    for prefix, model in models_to_evaluate(config, source, process, subject.checkpoint, class_names):
        with input_errors("sub-models"):  # before an hour is spent on the main model
            image_shape = source.image_shape(config.data.image_size)
            check_image_shape(model, image_shape, [sub.augmentation for sub in subs])
        if process.is_main:
            with writing_errors(f"--output {output}"):
                output.mkdir(parents=True, exist_ok=True)
        name = f"the {WEIGHTS[prefix]} weights"
        one = Evaluated(prefix, measure_benchmark(model, benchmark, loaders, precision, process, name))
        for sub in subs:
            view = SubModelView(model, sub.augmentation, config.seed, process)
            sub_name = f"the sub-model {sub.augmentation} of {name}"
            figures = measure_benchmark(view, benchmark, loaders, precision, process, sub_name).whole.figures()
            one.sub_models.append(SubModelFigures(sub.name, sub.ratio, figures))
        evaluated.append(one)
    bad_files.unite(process)
    return setting_of(subject, variant, source, model), evaluated


def setting_of(subject: Subject, variant: str | None, source: DataSource, model: nn.Module) -> Setting:
    """What was evaluated, for the reports."""
    config = subject.config
    is_transformed = config.data.dataset not in UNTRANSFORMED
    data = config.data.root or config.data.dataset
    split = f" ({config.data.eval_split})" if is_transformed else ""
    return Setting(
        model=config.model.name,
        source=str(subject.checkpoint or "timm's pretrained weights"),
        data=f"{data}{split}" if variant is None else f"ImageNet ({variant}), {data}",
        image_size=config.data.image_size,
        crop=config.transform.eval_crop if is_transformed else None,
        interpolation=config.transform.eval_interpolation if is_transformed else None,
        parameters=sum(tensor.numel() for name, tensor in model.named_parameters() if name != "mask_token"),
        class_names=source.class_names,
    )


def asked_for(arguments: argparse.Namespace) -> list[str]:
    """What the command line asks for beside the plain evaluation of the subject."""
    options = [
        f"{name}={getattr(arguments, name)}" for name in ("variant", "augsub", "ratios") if getattr(arguments, name)
    ]
    return [*options, *(["sub-model"] if arguments.sub_model else []), *arguments.overrides]


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if launched_rank() == 0:
        log_to_terminal()
    overrides = [*VARIANT_SETTINGS.get(arguments.variant, ()), *arguments.overrides]
    subject = find_subject(arguments.what, arguments.model, overrides)
    subject = replace(subject, config=complete(subject.config))
    config, ratios = subject.config, parse_ratios(arguments.ratios)
    wanted = arguments.sub_model or arguments.augsub is not None or ratios
    subs = sub_models(config, arguments.augsub, ratios) if wanted else []
    output = arguments.output or folder_for(subject, asked_for(arguments))
    with (
        process_group(config.distributed.timeout_minutes) as process,
        worker_deaths(config.data.workers),
        memory_errors("lower evaluation.batch, the images at once in a process"),
    ):
        setting, evaluated = evaluate_subject(subject, arguments.variant, subs, output, process)
        if process.is_main:
            print(printed(setting, evaluated))
            write(output, setting, evaluated)
            print(f"\nresults in {output}")


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    return exit_code(partial(run, parse_arguments()))


if __name__ == "__main__":
    leave(main(), launched_processes())
