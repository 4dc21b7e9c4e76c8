"""The evaluation of weights by a command: which ones, on which images, of which sub-models, and where results go."""

from __future__ import annotations

import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor

import augsub
from engine.announcement import log_left_out
from engine.checkpoint import class_names_in, load, load_metadata
from engine.config import MODELS_TRANSFORM, UNTRANSFORMED, Config, has_several_labels
from engine.config_file import parse_config
from engine.data.corruptions import corrupted
from engine.data.imagenet_family import CORRUPTED, CORRUPTIONS, VARIANTS, clean_images, open_variant, synsets
from engine.data.loaders import BadFiles, Batches
from engine.data.source import DataSource, build_source, check_classes, check_pretrained_classes
from engine.defaults import build_precision, complete, create_configured_model
from engine.distributed import Process
from engine.errors import InputError, input_errors, writing_errors
from engine.evaluation.examples import SHOWN, draw_mistakes, draw_seen
from engine.evaluation.features import probe
from engine.evaluation.metrics import WEIGHTS, Metrics, Result, evaluate, metrics_for
from engine.evaluation.multi_label import MultiLabelMetrics
from engine.evaluation.speed import measure_speed
from engine.precision import compile_forward
from engine.run_folder import CHECKPOINTS, RunFolder
from engine.sharded_checkpoint import PLAIN
from engine.text import LOCAL_MODEL
from models.build import check_image_shape
from models.weights import load_weights

LOGGER = logging.getLogger("engine")
WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".bin", ".ckpt", ".tar")
LONGEST = 120  # characters of a folder's name
# a model that no configuration of ours describes sees images as timm says
MODELS_OWN = ("data.image_size=null", *(f"transform.{key}=null" for key in MODELS_TRANSFORM))


def find_target(what: str, model_name: str | None, overrides: Sequence[str]) -> tuple[Config, Path | None]:
    """What a command line means: a model and how its images are read; its weights, None if they are timm's pretrained.

    A checkpoint brings its own configuration.

    Args:
        what: a run's folder, a checkpoint, a file of weights, a folder as on a hub, or the name of a timm model.
        model_name: the timm model of a file of weights that holds no configuration.
        overrides: `key=value` for the configuration.

    Raises:
        InputError: nothing of that name, a run without checkpoint, or weights of which the model is unknown.
    """
    if model_name is None and Path(what, "config.json").is_file():
        what = f"{LOCAL_MODEL}{what}"
    path = Path(what) if model_name is not None else checkpoint_of(Path(what))
    if model_name is None and path.exists():
        text = load_metadata(path).get("config")
        if text is None:
            raise InputError(f"{path} holds no configuration: say which model these weights are of, --model NAME")
        return saved_config(path, text, overrides), path
    is_file = model_name is not None or path.suffix in WEIGHT_FILES or ("/" in what and ":" not in what)
    if path.suffix == ".onnx":
        raise InputError(f"{what}: a program, not weights; predict.py takes it")
    if is_file and not path.exists():
        raise InputError(f"{what}: no such file or folder; a model of a hub is named hf-hub:USER/MODEL")
    config = parse_config("", model_name or what, [*MODELS_OWN, *overrides])
    config.model.name = model_name or what
    return config, path if is_file else None


def saved_config(file: Path, text: str, overrides: Sequence[str]) -> Config:
    """The configuration in a checkpoint, without what a file must not say.

    That is which code runs (`plugins`), of which a warning tells, and that other data are meant
    (`data.allow_mismatch`).
    """
    config = parse_config(text, f"the configuration in {file}", ["plugins=[]", "data.allow_mismatch=false", *overrides])
    if missing := [name for name in parse_config(text, str(file)).plugins if name not in config.plugins]:
        _warn_of_plugins(file, ",".join(missing))
    return config


@cache  # once, whoever looks into the file
def _warn_of_plugins(file: Path, names: str) -> None:
    LOGGER.warning(
        "WARNING: %s: its run had plugins=[%s], which a file cannot ask for: add that where it needs them", file, names
    )


def checkpoint_of(path: Path) -> Path:
    """The best checkpoint of a run's folder, or the last one if none is called the best yet; anything else is itself.

    Raises:
        InputError: a folder that is none of a run, or has no checkpoint.
    """
    if not path.is_dir() or (path / PLAIN).exists():
        return path
    run = RunFolder(path)
    checkpoint = next((path for path in (run.best, run.last) if path.exists()), None)
    if checkpoint is None:
        raise InputError(f"{path}: neither a checkpoint nor the folder of a run that has one")
    if run.last.exists() and not checkpoint.samefile(run.last):
        LOGGER.info("%s: this is its best checkpoint; summary.json and compare_runs.py report the last one", path)
    return checkpoint


def folder_for(what: str, checkpoint: Path | None, asked: Sequence[str]) -> Path:
    """Where results go if nobody says otherwise, inside the run of a checkpoint: none replace those of others.

    Args:
        asked: whatever a command asks for beside the plain evaluation.
    """
    folder, name = Path("runs", "evaluation"), (what if checkpoint is None else str(checkpoint)).removeprefix("./")
    if checkpoint is not None and checkpoint.parent.name == CHECKPOINTS:
        folder, name = checkpoint.parent.parent / "evaluation", checkpoint.stem
    name = quote(os.fsencode("_".join([name, *sorted(asked)])), safe="=,+:[]{}")
    return folder / (name if len(name) <= LONGEST else f"{name[:LONGEST]}_{zlib.crc32(name.encode()):08x}")


def sub_models(config: Config, name: str | None, ratios: Sequence[float]) -> list[augsub.SubModelAugmentation]:
    """Each sub-model of the configuration, or the one that `name` names; at each of `ratios` if there are any.

    Raises:
        InputError: no sub-model, an unknown one, or ratios for one of several augmentations.
    """
    specs: list[Sequence[Any]] = [sub.augmentations for sub in config.augsub.sub_models]
    if name is not None:
        specs = [[{"name": name, "ratio": 0.5}]]
    if not specs:
        raise InputError("--sub-model: the configuration has none; choose one with --augsub NAME")
    if ratios:
        if any(len(members) != 1 for members in specs):
            raise InputError("--ratios: a sub-model of several augmentations has none; choose one with --augsub NAME")
        named = [{"name": member} if isinstance(member, str) else member for (member,) in specs]
        specs = [[{**member, "ratio": ratio}] for member in named for ratio in ratios]
    with input_errors("augsub.sub_models" if name is None else f"--augsub {name}"):
        return [augsub.build(members) for members in specs]


def evaluate_only(config: Config, process: Process) -> dict[str, float]:
    """Evaluate `evaluation.checkpoint`, else the run's last checkpoint, else what the run would start from.

    Returns:
        Figures of the weights, and with prefix "ema_" of their average, if the file has one.
    """
    last = RunFolder(config.output_dir).last
    file = config.evaluation.checkpoint or (last if last.exists() else config.model.checkpoint)
    if file is None and not config.model.pretrained:
        ways = "evaluation.checkpoint, model.pretrained=true or output_dir"
        raise InputError(f"nothing to evaluate: {last} does not exist; set {ways}")
    _, results = evaluate_weights(complete(config), file, process, Asked())
    figures = {result.prefix + name: value for result in results for name, value in result.metrics.figures().items()}
    return {name: value for name, value in figures.items() if not name.endswith("ece")}


@dataclass(frozen=True)
class Asked:
    """What an evaluation is to find out.

    Attributes:
        variant: one of ImageNet's relatives, or corruptions of them, in place of the configuration's held-out images.
        clean: folder of ImageNet's validation images, to compare a variant with.
        augmentations: of sub-models that are evaluated too.
        probes: classifiers that are fitted to the features, for which the training images are needed.
        speed: whether forwards are timed too.
        compile: the model, by torch.compile.
        output: a folder that is made before hours are spent.
    """

    variant: str | None = None
    clean: str | None = None
    augmentations: Sequence[augsub.SubModelAugmentation] = ()
    probes: Sequence[str] = ()
    speed: bool = False
    compile: bool = False
    output: Path | None = None


def evaluate_weights(
    config: Config, file: str | Path | None, process: Process, asked: Asked
) -> tuple[dict[str, Any], list[Result]]:
    """Evaluate the weights in a file, and their average if there is one. All processes must call it together.

    Args:
        config: a complete configuration.
        file: a checkpoint or any file of weights; None: timm's pretrained ones.

    Returns:
        What was evaluated and how, and for all weights the result of the model and of its sub-models.

    Raises:
        InputError: weights that are not complete, or of other classes; images that do not fit the model.
        RunError: a logit is NaN or infinite; the output cannot be made.
    """
    _check_asked(config, asked)
    evaluation, results = _Evaluation(config, asked, process, file), []
    for prefix in evaluation.loaded(file):
        _make(asked.output, process)
        results += [evaluation.result(prefix, augmentation) for augmentation in (None, *asked.augmentations)]
    evaluation.bad_files.unite(process)
    return {"source": str(file or "timm's pretrained weights"), **evaluation.described()}, results


class _Evaluation:
    """One model on the images of an evaluation: it loads weights, and finds out what is asked of them."""

    def __init__(self, config: Config, asked: Asked, process: Process, file: str | Path | None) -> None:
        self.config, self.asked, self.process = config, asked, process
        self.known = None if file is None else class_names_in(file)  # the classes of the weights
        sources = held_out_sources(config, asked.variant, bool(asked.probes), known_classes=len(self.known or ()))
        for source in sources.values():
            log_left_out(source)
        self.source = source  # its images aside all are alike
        self.iteration: int | None = None  # after which the weights were saved, if their file says so
        self.bad_files = BadFiles(config.data.bad_files, logs=process.is_main)
        self.loaders = {name: self._loader(source) for name, source in sources.items()}
        self.clean = None if asked.clean is None else clean_images(asked.variant, source, asked.clean, config)
        self.model = augsub.patch(create_configured_model(config, source, pretrained=file is None))
        self.shape = source.image_shape(config.data.image_size)
        with input_errors(f"data.image_size with model.name = {config.model.name}"):
            check_image_shape(self.model, self.shape, asked.augmentations)
        self.model.to(process.device)
        compile_forward(self.model, asked.compile)
        self.precision = build_precision(config, process)

    def _loader(self, source: DataSource) -> Batches:
        return Batches(self.config, source, self.process, self.bad_files)

    def loaded(self, file: str | Path | None) -> Iterator[str]:
        """Load the weights in a file, then their average if there is one: yields the prefix of their results.

        Raises:
            InputError: weights that are not complete, or of other classes.
        """
        config, model, num_classes = self.config, self.model, self.source.num_classes
        class_names = synsets() if self.asked.variant in VARIANTS else self.source.class_names
        if file is None:
            own_classes = model.pretrained_cfg.get("num_classes", num_classes)
            if own_classes != num_classes:
                has = f"pretrained for {own_classes} classes, the data have {num_classes}"
                raise InputError(f"evaluation: {config.model.name} is {has}")
            check_pretrained_classes(config, class_names, model, f"model.name = {config.model.name}")
            yield ""
            return
        LOGGER.info("evaluating %s", file)
        content = load(Path(file))
        self.iteration = content.get("iteration")
        check_classes(config, class_names, self.known, f"evaluation: checkpoint {file}")
        hooks = content.get("hooks")
        averaged = hooks.get("ema") if isinstance(hooks, Mapping) else None
        for prefix, weights in (("", content), ("ema_", averaged)):
            if weights is not None:
                with input_errors("evaluation"):
                    load_weights(model, weights, file, complete=True)
                yield prefix

    def result(self, prefix: str, augmentation: augsub.SubModelAugmentation | None) -> Result:
        """What the loaded weights are worth, of the sub-model where there is an augmentation."""
        asked, config, is_main_model = self.asked, self.config, augmentation is None
        what = f"{'' if is_main_model else f'the sub-model {augmentation} of '}the {WEIGHTS[prefix]} weights"
        whole, parts = self._on_all(what, augmentation)
        probes, speed, on_clean = {}, {}, {}
        if self.clean is not None and is_main_model:
            counted, loader = metrics_for(self.clean, self.process.device), self._loader(self.clean)
            on_clean = evaluate(self.model, loader, self.precision, self.process, f"{what} on clean images", counted)
        if asked.probes and is_main_model:
            where = (self.model, config, self.source, self.process, self.precision, self.bad_files)
            probes = probe(asked.probes, *where)
        if asked.speed:
            batch = config.evaluation.batch
            speed = measure_speed(self.model.eval(), self.shape, batch, self.precision, self.process, augmentation)
        reference = CORRUPTIONS if asked.variant == "c" else {}
        result = Result(prefix, whole, parts, augmentation, probes, speed, reference, on_clean)
        return replace(result, examples=self._examples(result) if self.process.is_main else {})

    def _on_all(
        self, what: str, augmentation: augsub.SubModelAugmentation | None
    ) -> tuple[Metrics | MultiLabelMetrics, dict[str, dict[str, float]]]:
        """The metrics over all sets of images, and the figures of each."""
        whole, parts = metrics_for(self.source, self.process.device), {}
        for name, loader in self.loaders.items():
            part, place = metrics_for(self.source, self.process.device), f"{what}{name and f' on {name}'}"
            parts[name] = evaluate(
                self.model, loader, self.precision, self.process, place, part, augmentation, self.config.seed
            )
            whole.add(part)
        return whole, parts

    def _examples(self, result: Result) -> dict[str, Tensor]:
        """Pictures for the report: of the main model its mistakes, of a sub-model what it sees."""
        loader, augmentation = next(iter(self.loaders.values())), result.augmentation
        if augmentation is not None:
            if result.prefix:
                return {}
            titles = {"what the main model sees": None, f"what the sub-model {augmentation} sees": augmentation}
            return draw_seen(self.model, loader.examples(SHOWN), titles, self.config, self.asked.compile)
        if len(self.loaders) > 1 or not isinstance(result.metrics, Metrics):
            return {}
        which = f" by the {result.weights} weights" if result.prefix else ""
        mistakes = draw_mistakes(result.metrics, loader, self.source.class_names, self.config)
        return {title + which: images for title, images in mistakes.items()}

    def described(self) -> dict[str, Any]:
        """The model, and its images and how they are read."""
        config, variant = self.config, self.asked.variant
        is_transformed = config.data.dataset not in UNTRANSFORMED
        split = config.data.train_split if config.data.validation_share else config.data.eval_split
        data = f"{config.data.root or config.data.dataset}" + (f" ({split})" if is_transformed else "")
        named = self.model.named_parameters()
        return {
            "iteration": self.iteration,
            "model": config.model.name,
            "data": f"ImageNet ({variant}), {config.data.root}"
            if variant in VARIANTS
            else ", ".join(filter(None, (data, variant))),
            "image_size": config.data.image_size,
            "crop": config.transform.eval_crop if is_transformed else None,  # None: images are used as they are
            "interpolation": config.transform.eval_interpolation if is_transformed else None,
            "parameters": sum(tensor.numel() for name, tensor in named if name != "mask_token"),
            "class_names": self.source.class_names,
        }


def _make(output: Path | None, process: Process) -> None:
    """Make the folder of the results."""
    if process.is_main and output is not None:
        with writing_errors(f"--output {output}"):
            output.mkdir(parents=True, exist_ok=True)


def _check_asked(config: Config, asked: Asked) -> None:
    """Raise InputError for what does not go together."""
    if has_several_labels(config) and (asked.probes or asked.variant is not None):
        raise InputError("--variant, --features: are for images with one label, which evaluation.metric denies")
    if asked.probes and asked.variant is not None:
        raise InputError(f"--features: not with --variant {asked.variant}, which has no training images")


def held_out_sources(
    config: Config, variant: str | None, with_training: bool = False, known_classes: int = 0
) -> dict[str, DataSource]:
    """The images of an evaluation by name, "" if there is one set of them; the rest as of `build_source`."""
    if variant is None:
        return {"": build_source(config, with_training, known_classes)}
    return corrupted(config, known_classes) if variant == CORRUPTED else open_variant(variant, config)
