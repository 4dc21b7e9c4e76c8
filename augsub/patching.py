"""Make a timm model take `augsub=` in its forward, and undo it.

`patch` swaps the class of the instance for a generated subclass: nothing else of the model changes,
so copies, pickles, state dicts, compilation and sharding see an ordinary module.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeIs

from augsub.families import family_of
from augsub.registry import AugmentationSpec, build
from augsub.sub_forward import SubForward

Model = TypeVar("Model", bound=nn.Module)
MASK_TOKEN_STD = 0.02  # as timm initialises every other token
WRAPPERS = {
    "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine",
    "LightningModule", "PeftModel", "BaseTuner",
}  # fmt: skip
NO_REPLICAS = "DataParallel computes in copies of the model, which have no sub-model: use DistributedDataParallel"

if TYPE_CHECKING:
    _Base = nn.Module  # of the generated classes, which have the model's own class as their other base
else:
    _Base = object


class PatchedModel(_Base):
    """What `patch` adds to a model's class."""

    _augsub: SubForward

    def forward(
        self,
        *args: Any,
        augsub: AugmentationSpec | None = None,
        augsub_ratio: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Main model, or the sub-model under the augmentation `augsub`.

        Args:
            *args: images (B, C, H, W) first, passed on to the model's own forward; images may have its name for them.
            augsub: whatever `augsub.build` takes; None is the main model.
            augsub_ratio: the augmentation's ratio if `augsub` is a name.
            **kwargs: passed on too.

        Returns:
            What the model's own forward returns: logits (B, K).

        Raises:
            TypeError: if `augsub` is no description of an augmentation.
            ValueError: if the augmentation, or the images for it, do not fit this model, or this is a
                copy of it in DataParallel.
        """
        if augsub is None:
            if augsub_ratio is not None:
                raise ValueError(f"augsub_ratio = {augsub_ratio} was given without augsub")
            return self._augsub.main(super().forward, *args, **kwargs)
        if getattr(self, "_is_replica", False):  # so DataParallel marks its copies
            raise ValueError(NO_REPLICAS)
        augmentation = build(augsub, ratio=augsub_ratio)
        if not args:
            name = _name_of_images(_original_class(self))  # type: ignore[arg-type]  # a class is hashable
            args = (kwargs.pop(name, None),)
        logits = self._augsub.run(augmentation, super().forward, *args, **kwargs)
        return self._with_mask_token(logits) if isinstance(logits, Tensor) else logits

    def train(self, mode: bool = True) -> Any:
        """The model's own. What a backward that failed has left set is given back first: it would undo the mode."""
        self._augsub.release()
        return super().train(mode)

    def _with_mask_token(self, logits: Tensor) -> Tensor:
        """The same logits, with a gradient for the mask token, of zero if this sub-model did not mask.

        DDP reduces in the backward of the last sub-model and waits there for every parameter, also for
        one that only a sub-model before it has used.
        """
        token = getattr(self, "mask_token", None)
        return logits if token is None or not token.requires_grad else logits + 0 * token.sum()

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the model's own and the mask token."""
        own = getattr(super(), "no_weight_decay", set)
        return {*own(), "mask_token"}

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        # The generated class cannot be imported by name: pickle and deepcopy make it anew. What `compile` made is of
        # this very model: torch's own state leaves it out.
        state: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]
        return _new_patched, (_original_class(self),), state


def patch(model: Model, skip_dropped_paths: bool = False, update_batch_norm: bool = True) -> Model:
    """Let `model` take `augsub=` and `augsub_ratio=` in its forward, in place.

    The main model stays bit-identical and no random number is drawn from the global generator.
    Models that mask by replacing stem features get a parameter `mask_token` (1, 1, D). Threads may share
    the model: its forwards wait for each other. With drop_path or dropout in a sub-model, no thread should call the
    model while another one is in its backward.

    Args:
        model: of timm, or any other.
        skip_dropped_paths: in training, the model's own stochastic depth computes no branch that it drops: each
            residual branch of rate r has exactly int(B * (1 - r)) of B images, at least one, in place of a binomial
            number (DINOv2, arXiv 2304.07193, section 5). The main model is then that of other random numbers.
        update_batch_norm: in training, sub-models' forwards update the running statistics of BatchNorm too, as the
            paper's do. False: the main model's alone. The weights learn the same; the main model is evaluated by other
            statistics.

    Raises:
        TypeError: if `model` is no module.
        ValueError: if the model is patched already, is a wrapper (DDP, compiled) around the model to
            patch, or has a `mask_token` of its own; the branches of its stochastic depth cannot be skipped; or there
            is no BatchNorm to leave alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"only a model (torch.nn.Module) can be patched, not {model!r}")
    if is_patched(model):
        raise ValueError(f"{_original_class(model).__name__} is patched already; augsub.unpatch undoes it")
    if WRAPPERS.intersection(base.__name__ for base in type(model).__mro__) or hasattr(model, "_orig_mod"):
        raise ValueError(f"{type(model).__name__} is a wrapper: patch the model itself, before wrapping it")
    if getattr(model, "base_model", model) is not model and hasattr(type(model), "base_model_prefix"):  # Transformers
        raise ValueError(f"{type(model).__name__} has a head around its model: patch its base_model instead")
    family = family_of(model)
    width = family.mask_token_width(model)
    if width is not None:
        if hasattr(model, "mask_token"):
            raise ValueError(f"{type(model).__name__} has a mask_token of its own, which patch would overwrite")
        like = next(model.parameters())
        with torch.random.fork_rng(devices=[]):  # the user's random numbers stay what they were without patch
            token = nn.init.trunc_normal_(torch.empty(1, 1, width), std=MASK_TOKEN_STD)
        model.mask_token = nn.Parameter(token.to(like.device, like.dtype))
    cast(PatchedModel, model)._augsub = SubForward(model, family)
    model.__class__ = _patched_class(type(model))  # type: ignore[arg-type, assignment]
    try:
        if skip_dropped_paths:
            cast(PatchedModel, model)._augsub.skip_dropped_paths()
        if not update_batch_norm:
            cast(PatchedModel, model)._augsub.keep_batch_norm()
    except ValueError:
        unpatch(model)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Give back the plain timm model, in place: class, forward, module tree and state-dict keys.

    Raises:
        ValueError: if the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(f"{type(model).__name__} is not patched; augsub.patch does it")
    model._augsub.remove()
    del model._augsub
    model.__class__ = _original_class(model)  # type: ignore[assignment]
    if family_of(model).mask_token_width(model) is not None:
        del model.mask_token
    return model


def is_patched(model: nn.Module) -> TypeIs[PatchedModel]:
    """Whether the model takes `augsub=` in its forward."""
    return isinstance(model, PatchedModel)


def find_patched(model: nn.Module) -> PatchedModel:
    """The patched model: `model` itself or, if it is a wrapper, the one inside.

    Raises:
        ValueError: if there is none, or it is inside of DataParallel.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(NO_REPLICAS)
    for module in model.modules():
        if is_patched(module):
            return module
    raise ValueError(
        f"{type(model).__name__} is not patched: call augsub.patch on the model first, "
        "before DistributedDataParallel, torch.compile or any other wrapper"
    )


def supports(model: nn.Module) -> dict[str, str]:
    """Which registered augmentations the model offers.

    Args:
        model: a timm model or any other, patched or not; it stays as it is.

    Returns:
        For each augmentation that acts in this model, the site where it does, by its name in
        :class:`SubModelAugmentation`.

    Raises:
        TypeError: as `patch`.
        ValueError: as `patch`.
    """
    if is_patched(model):
        return model._augsub.support()
    patch(model)
    support = supports(model)
    unpatch(model)
    return support


@functools.cache
def _name_of_images(original: type[nn.Module]) -> str:
    """What a model's own forward calls its first argument."""
    _, images, *_ = inspect.signature(original.forward).parameters
    return images


@functools.cache
def _patched_class(original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Patched{original.__name__}", (PatchedModel, original), {"__doc__": original.__doc__})


def _original_class(model: nn.Module) -> type[nn.Module]:
    """The class that the model had before `patch`."""
    mro = type(model).__mro__
    return mro[mro.index(PatchedModel) + 1]


def _new_patched(original: type[nn.Module]) -> nn.Module:
    patched = _patched_class(original)  # type: ignore[arg-type]  # a class is hashable, whatever its instances are
    return patched.__new__(patched)
