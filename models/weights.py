"""Weights of a checkpoint in a model: where they lie in it, what was loaded, resized, left at its initial value."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

LOGGER = logging.getLogger("models")
LORA_A, LORA_B = ".lora_A.default.weight", ".lora_B.default.weight"  # as peft names an adapter's tensors
Weights = dict[str, Tensor]

MOST_MISSING = 0.1  # share of a model's tensors beside its head that a checkpoint of its architecture may lack
LISTED = 4  # names in a line
MAE_DECODER = re.compile(r"decoder_.+|mask_token")  # beside the encoder in checkpoints of MAE's pretraining
CLIP_TOWER = "visual."  # OpenAI's and open_clip's image tower; everything else belongs to the texts
CLIP_CLASS_TOKEN, CLIP_POSITIONS, CLIP_PROJECTION = (
    f"{CLIP_TOWER}{name}" for name in ("class_embedding", "positional_embedding", "proj")
)

# What torch.compile, activation checkpointing and FSDP put into names, at any depth
INNER_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
WRAPPERS = ("module.", "model.", "timm_model.", "net.")  # of DDP, Lightning, Hugging Face Transformers and others
AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?|swa|shadow|teacher|momentum)(?![a-z])")  # in the name of a place
DEPTH = 2  # of mappings around a state dict


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint's and a model's tensors.

    Attributes:
        loaded: names in the model of those taken over, resized ones included.
        resized: position tables and the like, with their shapes before and after.
        initial: names in the model of those that keep their initial values.
        other_classes: those of `initial` that belong to a head for another number of classes, with the checkpoint's
            shapes.
        pretraining: names in the checkpoint that a classifier has no use for: decoder, text tower, projection.
        unexpected: names in the checkpoint that are unknown to the model.
    """

    loaded: tuple[str, ...]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    initial: tuple[str, ...]
    other_classes: dict[str, tuple[int, ...]]
    pretraining: tuple[str, ...]
    unexpected: tuple[str, ...]

    def log(self, source: object) -> None:
        """A few readable lines."""
        total = len(self.loaded) + len(self.initial)
        LOGGER.info("%s: %d of the model's %d tensors loaded", source, len(self.loaded), total)
        if self.resized:
            sizes = [f"{name} {before} -> {after}" for name, (before, after) in self.resized.items()]
            LOGGER.info("  resized: %s", _some(sizes))
        if self.other_classes:
            LOGGER.warning("  the head is new, the checkpoint's is for other classes: %s", _some(self.other_classes))
        if rest := sorted(set(self.initial) - set(self.other_classes)):
            LOGGER.warning("  at their initial values: %s", _some(rest))
        if self.pretraining:
            LOGGER.info("  of pretraining only, left out: %s", _some(self.pretraining))
        if self.unexpected:
            LOGGER.warning("  unknown to the model, left out: %s", _some(self.unexpected))


def load_weights(
    model: nn.Module, content: Mapping[str, Any], source: object, antialias: bool = True, complete: bool = False
) -> LoadReport:
    """Load what fits of a checkpoint: ours, timm's, MAE's, CLIP's, DeiT's or Swin's.

    Position tables and window biases are resized to the model's by timm; a head for other classes
    stays as it is initialised.

    Args:
        model: a timm model, patched or not.
        content: what the file holds: a state dict, perhaps inside of mappings and wrappers, or beside other tensors.
        source: the file, for messages.
        antialias: of the resizing of position tables.
        complete: whether nothing of the model may stay at its initial value.

    Raises:
        ValueError: no state dict, one of another architecture, or one that is not complete.
    """
    own = model.state_dict()
    found, beside = _find(content, own.keys(), source)
    pretraining = _names_of_pretraining(found, model)
    needed = {name: weight for name, weight in found.items() if name not in pretraining}
    weights = _in_timms_layout(needed, model, antialias, source)

    head = head_tensors(model)
    misfits = {name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    fitting = {name: weight for name, weight in weights.items() if name in own and name not in misfits}
    unknown = sorted(weights.keys() - own.keys())
    before = needed | ({"pos_embed": needed[CLIP_POSITIONS]} if CLIP_POSITIONS in needed else {})
    report = LoadReport(
        loaded=tuple(fitting),
        resized={
            name: (tuple(before[name].shape), tuple(weight.shape))
            for name, weight in fitting.items()
            if name in before and before[name].numel() != weight.numel()
        },
        initial=tuple(name for name in own if name not in fitting and name != "mask_token"),
        other_classes={name: tuple(weights[name].shape) for name in sorted(misfits & head)},
        pretraining=tuple(sorted(pretraining)),
        unexpected=(*unknown, *beside),
    )
    missing = [name for name in report.initial if name not in head and not name.endswith("num_batches_tracked")]
    if max(len(missing) / len(own), len(unknown) / max(1, len(weights))) > MOST_MISSING:
        shapes = sorted(
            f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}" for name in misfits
        )
        raise ValueError(
            f"checkpoint {source} is of another model: it fills {len(fitting)} of {len(own)} tensors and has "
            f"{len(unknown)} unknown ones ({_some(shapes or unknown or missing)})"
        )
    if complete and report.other_classes:
        classes = next(iter(report.other_classes.values()))[0]
        raise ValueError(f"checkpoint {source} is for {classes} classes, the data have {model.num_classes}")
    if complete and report.initial:
        raise ValueError(
            f"checkpoint {source} leaves {len(report.initial)} tensors of the model as they are initialised, "
            f"{report.initial[0]} among them"
        )
    model.load_state_dict(fitting, strict=False)
    return report


def _names_of_pretraining(weights: Weights, model: nn.Module) -> set[str]:
    """Names that a classifier has no use for."""
    names = set()
    if any(name.startswith("decoder_") for name in weights):
        names |= {name for name in weights if MAE_DECODER.fullmatch(name)}
    if CLIP_CLASS_TOKEN in weights:
        names |= {name for name in weights if not name.startswith(CLIP_TOWER)} | {CLIP_PROJECTION}
    own = dict(model.named_parameters())
    if "fc_norm.weight" in own and "norm.weight" not in own and "fc_norm.weight" not in weights:
        names |= {"norm.weight", "norm.bias"}  # an encoder normalises its tokens, this model what it pooled
    return names & weights.keys()


def _in_timms_layout(weights: Weights, model: nn.Module, antialias: bool, source: object) -> Weights:
    """After timm's conversion of other layouts and sizes for this model's class, if it has one."""
    for model_class in type(model).__mro__:
        convert = getattr(sys.modules[model_class.__module__], "checkpoint_filter_fn", None)
        if convert is None or not model_class.__module__.startswith("timm.models."):
            continue
        options = {
            "model": model,
            "antialias": antialias,
            "adapt_layer_scale": True,
        }  # the last for DeiT-III's own files
        taken = inspect.signature(convert).parameters
        try:
            return convert(dict(weights), **{option: value for option, value in options.items() if option in taken})
        except Exception as error:  # whatever its code meets in weights of other shapes
            raise ValueError(f"checkpoint {source} is of another model: timm cannot convert it ({error!r})") from error
    return weights


def without_lora(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model, of one with adapters whose scale is 1; any other as it is.

    Raises:
        ValueError: an adapter of another kind than those of `models.lora`.
    """
    plain = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name in filter(lambda name: ".lora_" in name, weights):
        if not name.endswith((LORA_A, LORA_B)) or weights[name].ndim != 2:
            raise ValueError(
                f"{name} {tuple(weights[name].shape)}: only LoRA of linear layers, named 'default', can be merged; "
                "merge others where they were made, by peft's merge_and_unload"
            )
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + weights[layer + LORA_B] @ weights[name]
    return plain


def head_tensors(model: nn.Module) -> set[str]:
    """Names of the classifier's tensors in a timm model's state dict."""
    classifiers = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    return {f"{classifier}.{tensor}" for classifier in classifiers for tensor in ("weight", "bias")}


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


def _find(content: Any, own: Set[str], source: object) -> tuple[Weights, list[str]]:
    """A model's weights in a file, in float32, and the names of all other tensors in the same mapping.

    They are what has most of the model's names behind any beginning; of several the trained ones before their average.
    In a file of another layout, whose names are not the model's, it is the largest state dict.

    Args:
        content: what the file holds.
        own: the model's names.
        source: the file, for messages.

    Raises:
        ValueError: there are no tensors by name.
    """
    mappings = dict(_state_dicts(content, "", DEPTH))
    if not mappings:
        raise ValueError(f"checkpoint {source} holds no state dict")
    places = {
        (path, beginning): count
        for path, weights in mappings.items()
        for beginning, count in _beginnings(weights, own).items()
        if count > len(own) / 2
    }
    if not places:
        path = max(mappings, key=lambda path: len(mappings[path]))
        places = {(path, _shared_wrappers(mappings[path])): 0}
    names = {place: "".join(place).rstrip(".") for place in places}
    best = max(places, key=lambda place: (places[place], not AVERAGE.search(names[place]), -len(names[place])))
    if AVERAGE.search(names[best]):
        LOGGER.warning("%s: holds no trained weights, only their average, '%s'", source, names[best])
    elif len(places) > 1:
        others = "', '".join(name for place, name in names.items() if place != best)
        LOGGER.info("%s: these are '%s', not '%s'", source, names[best], others)
    weights, beginning = mappings[best[0]], best[1]
    inside = {
        name.removeprefix(beginning): weight.float() if weight.is_floating_point() else weight
        for name, weight in weights.items()
        if name.startswith(beginning)
    }
    return inside, [name for name in weights if not name.startswith(beginning)]


def _state_dicts(content: Any, path: str, depth: int) -> Iterator[tuple[str, Weights]]:
    """Tensors by name in a mapping and in those inside of it, with the keys that lead there."""
    if not isinstance(content, Mapping):
        return
    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if weights:
        if any(name.endswith(LORA_A) for name in weights):
            LOGGER.info("%sadapters are merged with a scale of 1: lora_alpha must have been their rank", path)
        yield path, without_lora({INNER_WRAPPERS.sub("", name): weight for name, weight in weights.items()})
    for key, value in content.items() if depth else ():
        yield from _state_dicts(value, f"{path}{key}.", depth - 1)


def _beginnings(names: Iterable[str], own: Set[str]) -> Counter[str]:
    """Beginnings of names behind which some of the model's stand, with how many."""
    ends = ((name, end) for name in names for end in (0, *(dot.end() for dot in re.finditer(r"\.", name))))
    return Counter(name[:end] for name, end in ends if name[end:] in own)


def _shared_wrappers(names: Weights) -> str:
    """The wrappers that most names begin with."""
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if sum(n.startswith(prefix + w) for n in names) > len(names) / 2), ""):
        prefix += wrapper
    return prefix
