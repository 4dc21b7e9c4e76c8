"""Where in a checkpoint the weights of a model are: in which mapping, behind the names of which wrappers."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor

LOGGER = logging.getLogger("models")
Weights = dict[str, Tensor]

# What torch.compile, activation checkpointing and FSDP put into names, at any depth
INNER_WRAPPERS = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
WRAPPERS = ("module.", "model.", "timm_model.", "net.")  # of DDP, Lightning, Hugging Face Transformers and others
AVERAGE = re.compile(r"(?<![a-z])(ema|averaged?|swa|shadow|teacher|momentum)(?![a-z])")  # in the name of a place
DEPTH = 2  # of mappings around a state dict


@dataclass(frozen=True)
class Place:
    """Tensors whose names begin alike.

    Attributes:
        name: keys of the mappings around them and the beginning of their names, "state_dict.model.".
        weights: by the rest of their names.
        beside: names of all other tensors in the same mapping.
        found: how many of them have a name of the model's.
    """

    name: str
    weights: Weights
    beside: tuple[str, ...]
    found: int

    @property
    def is_average(self) -> bool:
        """Whether its name says that these are not the weights that were trained, but follow them."""
        return AVERAGE.search(self.name) is not None


def find_weights(content: Any, own: Set[str], source: object) -> Place:
    """The place that has most of the model's tensors; of several the trained ones before their average.

    In a file of another layout, whose names are not the model's, it is the largest state dict.

    Args:
        content: what the file holds.
        own: the model's names.
        source: the file, for messages.

    Raises:
        ValueError: there are no tensors by name.
    """
    places = [place for path, weights in _state_dicts(content, "", DEPTH) for place in _places(path, weights, own)]
    if not places:
        raise ValueError(f"checkpoint {source} holds no state dict")
    whole = [place for place in places if place.found > len(own) / 2]
    best = max(
        whole or places,
        key=lambda place: (place.found if whole else len(place.weights), not place.is_average, -len(place.name)),
    )
    if best.is_average:
        LOGGER.warning("%s: holds no trained weights, only their average, '%s'", source, best.name.rstrip("."))
    elif others := [place.name.rstrip(".") for place in whole if place is not best]:
        LOGGER.info("%s: these are '%s', not '%s'", source, best.name.rstrip("."), "', '".join(others))
    return best


def _state_dicts(content: Any, path: str, depth: int) -> Iterator[tuple[str, Weights]]:
    """Tensors by name in a mapping and in those inside of it, with the keys that lead there."""
    if not isinstance(content, Mapping):
        return
    weights = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if weights:
        yield path, {INNER_WRAPPERS.sub("", name): weight for name, weight in weights.items()}
    for key, value in content.items() if depth else ():
        yield from _state_dicts(value, f"{path}{key}.", depth - 1)


def _places(path: str, weights: Weights, own: Set[str]) -> Iterator[Place]:
    """Behind every beginning that leaves most of the model's names, and behind the wrappers that most names share."""
    starts = ((name, end) for name in weights for end in (0, *(dot.end() for dot in re.finditer(r"\.", name))))
    found = Counter(name[:end] for name, end in starts if name[end:] in own)
    whole = (prefix for prefix, count in found.items() if count > len(own) / 2)
    for prefix in dict.fromkeys((_shared_wrappers(weights), *whole)):
        yield Place(
            name=path + prefix,
            weights={name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)},
            beside=tuple(name for name in weights if not name.startswith(prefix)),
            found=found[prefix],
        )


def _shared_wrappers(names: Weights) -> str:
    prefix = ""
    while wrapper := next((w for w in WRAPPERS if sum(n.startswith(prefix + w) for n in names) > len(names) / 2), ""):
        prefix += wrapper
    return prefix
