"""A timm model by name, patched for sub-model augmentation and checked on the image size; the blocks it repeats."""

from __future__ import annotations

import inspect
import logging
import socket
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar
from urllib.parse import urlparse

import huggingface_hub.constants
import timm
import torch
from timm.layers import to_2tuple
from timm.models import parse_model_name
from torch import Tensor, nn
from torch.func import functional_call

import augsub
from augsub.named_registry import did_you_mean
from models import first_line

LOGGER = logging.getLogger("models")
T = TypeVar("T")
TIMM_KEYS = {  # of a transform, by their names in a configuration
    "mean": "mean",
    "std": "std",
    "eval_crop": "crop_pct",
    "eval_crop_mode": "crop_mode",
    "eval_interpolation": "interpolation",
}


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    image_size: int | Sequence[int] | None = None,
    pretrained: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """A timm model.

    Args:
        name: any timm model name, with or without a pretrained tag, "hf-hub:USER/MODEL" or "local-dir:FOLDER".
        num_classes: outputs of the head, which is new if the pretrained one differs; None: timm's.
        in_chans: channels of the images.
        image_size: pixels, passed on to models that are built for one size; None: timm's.
        pretrained: load timm's weights for that name.
        kwargs: anything else `timm.create_model` takes.

    Raises:
        ValueError: unknown name (the nearest one is named), an argument the model does not take,
            or pretrained weights that cannot be had.
    """
    source, _ = parse_model_name(name)
    if source is None and not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{did_you_mean(name, timm.list_models())}")
    given = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "img_size": tuple(image_size) if isinstance(image_size, list) else image_size,
    }
    arguments = {key: value for key, value in given.items() if value is not None} | kwargs
    try:
        with warnings.catch_warnings(), _hub_or_its_cache(pretrained or source == "hf-hub"):
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # of a file that is refused
            return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:  # what is wrong with an argument shows wherever the model's code uses it
        if isinstance(error, TypeError) and image_size is not None and "img_size" in str(error):  # it takes any size
            return create_model(name, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained, **kwargs)
        what = f"timm cannot build {name} with {arguments}{' and its pretrained weights' if pretrained else ''}"
        raise ValueError(f"{what}: {first_line(error)}") from error


def build_on_meta(name: str, **arguments: Any) -> nn.Module:
    """What `create_model` makes, with its structure and no memory for weights."""
    with torch.device("meta"):
        return create_model(name, **arguments)


def image_settings(name: str) -> tuple[int | None, dict[str, Any]]:
    """How timm evaluates a model; nothing of its weights is read.

    Returns:
        The side of its square images in pixels, None if it is not listed. And of mean and std per channel, share of the
        resized image that the centre crop keeps, and interpolation those that are listed, by their keys' names in a
        configuration.

    Raises:
        ValueError: unknown name, or one of a hub that cannot be reached.
    """
    own = getattr(build_on_meta(name), "pretrained_cfg", {})
    listed = {key: own[timms] for key, timms in TIMM_KEYS.items() if timms in own}
    transform = {key: list(value) if isinstance(value, tuple) else value for key, value in listed.items()}
    return own["input_size"][-1] if "input_size" in own else None, transform


def takes_image_size(model: nn.Module) -> bool:
    """Whether a timm model is built for one size, so that `timm.create_model` must be told it (`img_size`)."""
    return any("img_size" in inspect.signature(base.__init__).parameters for base in type(model).__mro__)


@contextmanager
def _hub_or_its_cache(is_needed: bool) -> Iterator[None]:
    """Where the hub has no address, its client looks in its cache alone, and does not try for most of a minute."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    if is_needed and not urllib.request.getproxies():
        try:
            socket.getaddrinfo(urlparse(huggingface_hub.constants.ENDPOINT).hostname, None)
        except OSError:
            huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before


def check_image_shape(
    model: nn.Module,
    image_shape: tuple[int, int, int],
    augmentations: Sequence[augsub.SubModelAugmentation] = (),
    batch: int = 2,
) -> None:
    """Run main model and sub-models once without computing, to see whether sizes fit.

    Args:
        model: a patched model.
        image_shape: (C, H, W).
        augmentations: one for each sub-model.
        batch: images at once.

    Raises:
        ValueError: with the model's or the augmentation's own reason.
    """
    size = " x ".join(map(str, image_shape[1:]))
    for augmentation in (None, *augmentations):
        arguments = {"augsub": augmentation}
        try:
            with _unsynchronised(model):
                logits = without_data(lambda call: call(model, (batch, *image_shape), arguments))  # noqa: B023
        except Exception as error:  # as above: the model's own code
            raise ValueError(f"{size} pixels do not fit: {first_line(error)}") from error
        if getattr(logits, "ndim", None) != 2:
            found = getattr(logits, "shape", type(logits).__name__)
            raise ValueError(f"the model is no classifier: its output is {found}, no logits (B, K)")
    embedding = getattr(model, "patch_embed", None)
    patch_size = to_2tuple(getattr(embedding, "patch_size", 1))
    rest = [side % patch for side, patch in zip(image_shape[1:], patch_size, strict=True)]
    if any(rest):
        is_padded = getattr(embedding, "dynamic_img_pad", False)
        LOGGER.warning(
            "%s pixels are no multiple of the patch size %s: %s",
            size,
            patch_size,
            "the rest is padded" if is_padded else "{} rows and {} columns at the edges are not seen".format(*rest),
        )


def without_data(look: Callable[[Callable[..., Any]], T]) -> T:
    """What a look at a forward finds. No values are computed (meta tensors), unless shapes depend on them.

    Args:
        look: gets what makes a forward of (model, shape of images, further arguments); may be called twice, the second
            time for a forward of random images on the CPU.
    """
    try:
        return look(partial(_forward, is_computed=False))
    except (RuntimeError, TypeError) as error:
        if "meta tensor" not in str(error).lower():
            raise
        with torch.random.fork_rng(devices=[]):
            return look(partial(_forward, is_computed=True))


def _forward(
    model: nn.Module, shape: Sequence[int], arguments: Mapping[str, Any] = MappingProxyType({}), *, is_computed: bool
) -> Any:
    """A forward of copies of a model's parameters and buffers, which are random where it has no values itself."""

    def like(tensor: Tensor) -> Tensor:
        if is_computed and tensor.is_meta:
            return torch.rand(tensor.shape).to(tensor.dtype)
        return tensor.detach().to("cpu" if is_computed else "meta", copy=True)

    weights = {name: like(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    images = torch.rand(*shape) if is_computed else torch.empty(*shape, device="meta")
    return functional_call(model, weights, (images,), dict(arguments))


@contextmanager
def _unsynchronised(model: nn.Module) -> Iterator[None]:
    """BatchNorm over several processes runs on GPUs alone, and has the images of all of them: it is left out."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.SyncBatchNorm) and layer.training]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True


def innermost_blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of the model's lists of modules that are composed and hold no such entries themselves.

    Transformer blocks of a ViT, blocks of all stages of a Swin Transformer, bottlenecks of a ResNet: what is sharded,
    or computed again in backward, as a whole.
    """
    blocks = {
        id(entry): entry
        for container in model.modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for entry in container
        if not isinstance(entry, (nn.Sequential, nn.ModuleList)) and any(entry.children())
    }
    return [block for block in blocks.values() if not any(id(part) in blocks for part in list(block.modules())[1:])]


def checkpoint_gradients(model: nn.Module) -> None:
    """Keep only the inputs of the blocks for backward, as timm does it.

    Raises:
        ValueError: the model has no such mode.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError("this model cannot checkpoint gradients") from error
