"""The evaluation of weights by a command: which ones, on which images, of which sub-models, and where results go."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import augsub
from engine.checkpoint import load, load_metadata
from engine.config import MODELS_TRANSFORM, UNTRANSFORMED, Config
from engine.config_file import parse_config
from engine.data.datasets import build_held_out_source
from engine.data.imagenet_family import Benchmark, open_variant, synsets
from engine.data.loaders import BadFiles, build_held_out
from engine.data.rules import check_classes
from engine.data.source import DataSource
from engine.defaults import build_precision, check_pretrained_classes, complete, create_configured_model, log_left_out
from engine.distributed import Process
from engine.errors import InputError, input_errors, writing_errors
from engine.evaluation import WEIGHTS, Description, Metrics, Result, measure
from engine.run_folder import CHECKPOINTS, RunFolder
from engine.sharded_checkpoint import PLAIN
from models.build import check_image_shape
from models.weights import load_weights

LOGGER = logging.getLogger("engine")
WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")
# overrides that change no figure of a model
NO_EFFECT = ("plugins", "data.workers", "data.bad_files", "data.allow_mismatch", "evaluation.*", "distributed.*")
LONGEST = 120  # characters of a folder's name
# a model that no configuration of ours describes sees images as timm says
MODELS_OWN = ("data.image_size=null", *(f"transform.{key}=null" for key in MODELS_TRANSFORM))


def find_target(what: str, model_name: str | None, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """What a command line means: a model and how its images are read; its weights, None if they are timm's pretrained.

    A checkpoint brings its own configuration, without what a file must not say: which code runs (`plugins`), and that
    other data are meant (`data.allow_mismatch`).

    Args:
        what: a run's folder, a checkpoint, a file of weights, or the name of a timm model.
        model_name: the timm model of a file of weights that holds no configuration.
        overrides: `key=value` for the configuration.

    Raises:
        InputError: nothing of that name, a run without checkpoint, or weights of which the model is unknown.
    """
    path = Path(what)
    if model_name is not None:
        if not path.exists():
            raise InputError(f"{what}: no such file of weights for --model {model_name}")
        config = parse_config("", f"--model {model_name}", [*MODELS_OWN, *overrides])
        config.model.name = model_name
        return config, path
    if path.is_dir() and not (path / PLAIN).exists():
        path = _checkpoint_of(RunFolder(path))
    if path.exists():
        text = load_metadata(path).get("config")
        if text is None:
            raise InputError(f"{path} holds no configuration: say which model these weights are of, --model NAME")
        own = ["plugins=[]", "data.allow_mismatch=false"]
        return parse_config(text, f"the configuration in {path}", [*own, *overrides]), path
    if path.suffix in WEIGHT_FILES or ("/" in what and ":" not in what):
        raise InputError(f"{what}: no such file or folder; a model of a hub is named hf-hub:USER/MODEL")
    config = parse_config("", what, [*MODELS_OWN, *overrides])
    config.model.name = what
    return config, None


def _checkpoint_of(run: RunFolder) -> Path:
    """The best checkpoint of a run, or the last one if none is called the best yet."""
    if not run.checkpoints.is_dir():
        raise InputError(f"{run.path}: neither the folder of a run nor a checkpoint")
    checkpoint = next((path for path in (run.best, run.last) if path.exists()), None)
    is_live = run.writer()
    if checkpoint is None:
        raise InputError(f"{run.path}: the run has no checkpoint{' yet, it is in progress' if is_live else ''}")
    if is_live:
        LOGGER.info("%s: the run is in progress; this is its %s checkpoint so far", run.path, checkpoint.stem)
    elif run.last.exists() and not checkpoint.samefile(run.last):
        LOGGER.info("%s: this is its best checkpoint; summary.json and compare_runs.py report the last one", run.path)
    return checkpoint


def folder_for(what: str, checkpoint: Path | None, asked: Sequence[str]) -> Path:
    """Where results go if nobody says otherwise, inside the run of a checkpoint: none replace those of others.

    Args:
        asked: whatever a command asks for beside the plain evaluation; `key=value` that changes no result is left out.
    """
    folder, name = Path("runs", "evaluation"), _as_name(what if checkpoint is None else str(checkpoint))
    if checkpoint is not None and checkpoint.parent.name == CHECKPOINTS:
        folder, name = checkpoint.parent.parent / "evaluation", checkpoint.stem
    changing = [word for word in asked if not any(fnmatch(word.partition("=")[0], key) for key in NO_EFFECT)]
    return folder / _as_name("_".join([name, *sorted(changing)]))


def _as_name(text: str) -> str:
    """A text as the name of a folder; one that is too long, or has characters that no name should, gets a number."""
    name = re.sub(r"[^\w.,=+-]+", "_", text.strip("./"), flags=re.ASCII)
    if len(name) <= LONGEST and set(text) - set(name) <= {"/", ":"}:
        return name
    return f"{name[:LONGEST]}_{zlib.crc32(os.fsencode(text)):08x}"


def sub_models(config: Config, name: str | None, ratios: Sequence[float]) -> list[augsub.SubModelAugmentation]:
    """Each sub-model of the configuration, or the one that `name` names; at each of `ratios` if there are any.

    Raises:
        InputError: no sub-model, an unknown one, or ratios for one of several augmentations.
    """
    specs = [sub.augmentations for sub in config.augsub.sub_models]
    if name is not None:
        specs = [[{"name": name, "ratio": 0.5}]]
    if not specs:
        raise InputError(
            "--sub-model: the configuration has none, augsub.sub_models = []; choose one with --augsub NAME"
        )
    with input_errors("augsub.sub_models" if name is None else f"--augsub {name}"):
        if not ratios:
            return [augsub.build(spec) for spec in specs]
        return [augsub.build(_at_ratio(spec, ratio)) for spec in specs for ratio in ratios]


def _at_ratio(spec: Sequence[Any], ratio: float) -> list[dict[str, Any]]:
    if len(spec) != 1:
        raise InputError(f"--ratios: {spec} is not one augmentation; choose one with --augsub NAME")
    (member,) = spec
    return [{**({"name": member} if isinstance(member, str) else member), "ratio": ratio}]


def evaluate_only(config: Config, process: Process) -> dict[str, float]:
    """Evaluate `evaluation.checkpoint`, else the run's last checkpoint, else what the run would start from.

    Returns:
        Figures of the weights, and with prefix "ema_" of their average, if the file has one.
    """
    last = RunFolder(config.output_dir).last
    file = config.evaluation.checkpoint or (last if last.exists() else config.model.checkpoint)
    if file is None and not config.model.pretrained:
        raise InputError(
            f"nothing to evaluate: {last} does not exist; set evaluation.checkpoint, model.pretrained=true "
            "or output_dir"
        )
    _, results = evaluate_weights(complete(config), file, process, is_detailed=False)
    return {result.prefix + name: value for result in results for name, value in result.metrics.figures().items()}


def evaluate_weights(
    config: Config,
    file: str | Path | None,
    process: Process,
    variant: str | None = None,
    augmentations: Sequence[augsub.SubModelAugmentation] = (),
    output: Path | None = None,
    is_detailed: bool = True,
) -> tuple[Description, list[Result]]:
    """Evaluate the weights in a file, and their average if there is one. All processes must call it together.

    Args:
        config: a complete configuration.
        file: a checkpoint or any file of weights; None: timm's pretrained ones.
        variant: one of ImageNet's relatives in place of the configuration's held-out images.
        augmentations: of sub-models that are evaluated too.
        output: a folder that is made before hours are spent.
        is_detailed: calibration and confusion too.

    Raises:
        InputError: weights that are not complete, or of other classes; images that do not fit the model.
        RunError: a logit is NaN or infinite; `output` cannot be made.
    """
    benchmark = Benchmark({"": build_held_out_source(config)}) if variant is None else open_variant(variant, config)
    for source in benchmark.sources.values():
        log_left_out(source)
    bad_files = BadFiles(config.data.bad_files, logs=process.is_main)
    loaders = {name: build_held_out(config, source, process, bad_files) for name, source in benchmark.sources.items()}
    precision, source, results = build_precision(config, process), benchmark.source, []
    num_classes = len(source.class_names) if is_detailed else None
    metrics = partial(Metrics, process.device, num_classes, benchmark.candidates, benchmark.accepted)
    class_names = source.class_names if variant is None else synsets()
    for prefix, model in models_to_evaluate(config, source, process, file, class_names):
        with input_errors("sub-models"):
            check_image_shape(model, source.image_shape(config.data.image_size), augmentations)
        if process.is_main and output is not None:
            with writing_errors(f"--output {output}"):
                output.mkdir(parents=True, exist_ok=True)
        found = []
        for augmentation in (None, *augmentations):
            name = f"the {WEIGHTS[prefix]} weights"
            name = name if augmentation is None else f"the sub-model {augmentation} of {name}"
            measured = measure(model, loaders, metrics, precision, process, name, augmentation, config.seed)
            found.append(Result(prefix, augmentation, *measured))
        results.append(replace(found[0], sub_models=found[1:]))
    bad_files.unite(process)
    return _describe(config, file, variant, source, model), results


def _describe(
    config: Config, file: str | Path | None, variant: str | None, source: DataSource, model: nn.Module
) -> Description:
    is_transformed = config.data.dataset not in UNTRANSFORMED
    data = config.data.root or config.data.dataset
    split = f" ({config.data.eval_split})" if is_transformed else ""
    return Description(
        model=config.model.name,
        source=str(file or "timm's pretrained weights"),
        data=f"{data}{split}" if variant is None else f"ImageNet ({variant}), {data}",
        image_size=config.data.image_size,
        crop=config.transform.eval_crop if is_transformed else None,
        interpolation=config.transform.eval_interpolation if is_transformed else None,
        parameters=sum(tensor.numel() for name, tensor in model.named_parameters() if name != "mask_token"),
        class_names=source.class_names,
    )


def models_to_evaluate(
    config: Config, source: DataSource, process: Process, file: str | Path | None, class_names: Sequence[str]
) -> Iterator[tuple[str, nn.Module]]:
    """The patched model with the weights in a file, and with their average if there is one: pairs (prefix, model).

    Args:
        class_names: what the model's outputs stand for, by number, as far as the data know.
        file: a checkpoint or any file of weights, which must be complete; None: timm's pretrained ones.

    Yields:
        The prefix of the results of these weights, "" or "ema_", and the model, each time the same object.

    Raises:
        InputError: weights that are not complete, or of other classes.
    """
    model = augsub.patch(create_configured_model(config, source, pretrained=file is None))
    with input_errors(f"data.image_size with model.name = {config.model.name}"):
        check_image_shape(model, source.image_shape(config.data.image_size))
    model.to(process.device)
    if file is None:
        own_classes = model.pretrained_cfg.get("num_classes", source.num_classes)
        if own_classes != source.num_classes:
            raise InputError(
                f"evaluation: {config.model.name} is pretrained for {own_classes} classes, "
                f"the data have {source.num_classes}"
            )
        check_pretrained_classes(config, class_names, model)
        yield "", model
        return
    LOGGER.info("evaluating %s", file)
    content = load(Path(file))
    check_classes(config, class_names, content.get("class_names"), f"evaluation: checkpoint {file}")
    hooks = content.get("hooks")
    averaged = hooks.get("ema") if isinstance(hooks, Mapping) else None
    for prefix, weights in (("", content), ("ema_", averaged)):
        if weights is not None:
            with input_errors("evaluation"):
                load_weights(model, weights, file, complete=True)
            yield prefix, model
