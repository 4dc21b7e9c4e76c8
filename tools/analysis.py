"""What a model and its sub-models cost, as tables; which augmentations models offer."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping

import timm
import torch
from omegaconf import OmegaConf
from tabulate import tabulate
from torch import nn

import augsub
from engine.config import Config
from engine.config_file import CONFIGS, load_config, parse_config
from engine.data.source import IMAGENET, DataSource
from engine.defaults import complete, create_configured_model, import_plugins, open_source
from engine.errors import InputError, input_errors
from engine.loss import build_objective, build_teacher
from engine.text import markdown_table, text_table, to_json
from models.build import build_on_meta
from models.complexity import GIGA, MEGA, Complexity, analyze, analyze_objective, count_with_torch, figure

AUGSUB, RATIO = "masking", 0.5  # of --model
COMPARED = (augsub.build("masking", ratio=0.5), augsub.build("random_crop", ratio=0.5))
PUBLISHED = {  # (parameters in millions, multiply-adds in billions) for 224 x 224 pixels and 1000 classes
    "ViT-S/16": ("vit_small_patch16_224", 22.0, 4.6),  # DeiT-III, arXiv 2204.07118, as ViT-B, -L and -H
    "ViT-B/16": ("vit_base_patch16_224", 86.6, 17.5),
    "ViT-L/16": ("vit_large_patch16_224", 304.4, 61.6),
    "ViT-H/14": ("vit_huge_patch14_224", 632.1, 167.4),
    "Swin-T": ("swin_tiny_patch4_window7_224", 28.3, 4.5),  # Swin, arXiv 2103.14030, as Swin-S and -B
    "Swin-S": ("swin_small_patch4_window7_224", 49.6, 8.7),
    "Swin-B": ("swin_base_patch4_window7_224", 87.9, 15.4),
    "ResNet-50": ("resnet50", 25.6, 4.1),  # torchvision's table of weights, as ResNet-101 and -152
    "ResNet-101": ("resnet101", 44.5, 7.9),
    "ResNet-152": ("resnet152", 60.2, 11.6),
}


def analyze_configured(config: Config, source: DataSource | None = None) -> Complexity:
    """The model and the sub-models of a configuration; no data and no weights are needed.

    Args:
        source: the data of a configuration that is complete; None: those it names, or images like ImageNet's.
    """
    if source is None:
        config = complete(config)
        source = data_source(config)
    with torch.device("meta"):
        model = create_configured_model(config, source)
        teacher = build_teacher(config, source, has_weights=False)
    objective, shape = build_objective(config, nn.CrossEntropyLoss()), source.image_shape(config.data.image_size)
    with input_errors(f"augsub.sub_models with model.name = {config.model.name}"):
        return analyze_objective(model, shape, objective, config.train.epochs, config.train.skip_dropped_paths, teacher)


def data_source(config: Config) -> DataSource:
    """The configuration's data, or images like ImageNet's where it is not there."""
    try:
        return open_source(config)
    except InputError as error:
        say_once(f"{error}; taken to have {IMAGENET.num_classes} classes")
        return IMAGENET


@functools.cache
def say_once(text: str) -> None:
    """Tell the user, whatever asks how often."""
    print(text, file=sys.stderr)


def model_table(title: str, complexity: Complexity) -> str:
    """One model: its figures, and what the FLOPs leave out."""
    activations = ("activations", f"{figure(complexity.main.activations, MEGA)} M")
    uncounted = ", ".join(f"{name} ({calls})" for name, calls in complexity.uncounted.items())
    return (
        f"{title}, one image\n{text_table([*complexity.cost_rows(), activations])}\n\n"
        f"not counted in the FLOPs (number of calls): {uncounted or 'nothing'}"
    )


def comparison_table(models: Mapping[str, Complexity]) -> str:
    """One line per model, by title."""
    header = ["", "parameters, M", "main, GFLOPs", "sub-models", "subs, GFLOPs", "training cost", "activations, M"]
    rows = []
    for title, complexity in models.items():
        subs = ", ".join(complexity.names) or "none"
        forwards = figure(complexity.main.flops, GIGA), subs, figure(complexity.sub_flops, GIGA)
        activations = figure(complexity.main.activations, MEGA)
        rows.append([title, figure(complexity.params, MEGA), *forwards, f"{complexity.training_cost:.3f}", activations])
    return _table(header, rows)


def literature_table() -> str:
    """Well-known models beside their published figures, torch's own count, and the cost of their sub-models."""
    rows = []
    for title, (name, mega_params, giga_flops) in PUBLISHED.items():
        model = build_on_meta(name, num_classes=1000)  # timm's ViT-H/14 has no classifier by default
        complexity = analyze(model, (3, 224, 224), COMPARED)
        flops = complexity.main.flops
        rows.append([
            title,
            figure(complexity.params, MEGA),
            f"{mega_params:.1f}",
            figure(flops, GIGA),
            f"{giga_flops:.1f}",
            figure(count_with_torch(model, (3, 224, 224)), GIGA),
            *(f"{sub.flops / flops:.3f}" for sub in complexity.subs),
        ])  # fmt: skip
    subs = [f"{augmentation}, of main" for augmentation in COMPARED]
    return _table(["", "parameters, M", "published", "GFLOPs", "published", "by torch", *subs], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True, colalign=align)


def print_analysis(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    plugins = [word for word in arguments.overrides if word.startswith("plugins=")]
    others = [word for word in arguments.overrides if word not in plugins]
    if others and not (arguments.config or arguments.model):
        raise InputError(f"{others[0]}: key=value belongs to --config or --model")
    import_plugins(parse_config("", "plugins", plugins).plugins)
    if arguments.model is None and (arguments.augsub, arguments.ratio) != (None, None):
        raise InputError("--augsub, --ratio: belong to --model; a configuration has augsub.sub_models")
    if arguments.list_support is not None:
        names, augmentations = timm.list_models(arguments.list_support), augsub.list_augmentations()
        if not names:
            raise InputError(f"--list-support: timm has no model {arguments.list_support!r}")
        figures = {name: augsub.supports(build_on_meta(name)) for name in names}
        rows = [[name, *(sites.get(each, "-") for each in augmentations)] for name, sites in figures.items()]
        text = markdown_table(["model", *augmentations], rows)
    elif arguments.all_configs:
        costs = {path.stem: analyze_configured(load_config(path)) for path in sorted(CONFIGS.glob("*.yaml"))}
        figures = {name: complexity.as_dict() for name, complexity in costs.items()}
        text = "" if arguments.json else f"{comparison_table(costs)}\n\n{literature_table()}"
    else:
        if arguments.config is not None:
            complexity = analyze_configured(load_config(arguments.config, arguments.overrides))
        else:
            name, ratio = arguments.augsub or AUGSUB, RATIO if arguments.ratio is None else arguments.ratio
            with input_errors("--model"):
                model = build_on_meta(arguments.model)
            with input_errors(f"--augsub {name} --ratio {ratio} for {arguments.model}"):
                augmentation = augsub.build(
                    {"name": name, "ratio": ratio, **OmegaConf.to_object(OmegaConf.from_dotlist(others))}
                )
                complexity = analyze(model, model.pretrained_cfg["input_size"], [augmentation])
        figures = complexity.as_dict()
        text = model_table(arguments.config or arguments.model, complexity)
    print(to_json(figures, indent=2) if arguments.json else text)
