"""Running the sub-model of one patched model: hooks at its sites and module state, always restored."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from augsub.augmentation import SubModelAugmentation
from augsub.families import Family
from augsub.families.base import drop_path_places
from augsub.registry import AUGSUB_REGISTRY, list_augmentations
from augsub.sites import Assignment, AugmentationOrClass, DropPathSite, HookedSite, ImageSite

NOT_RUN = (0, 0)  # the image size before a sub-forward
PATCH_AGAIN = "which does not know it: augsub.unpatch the model and patch it again"


class SubForward:
    """State of one patched model: its sites, and what is active during a sub-forward.

    A deep copy of the model copies this object with it and keeps nothing of the original.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.model_name = type(model).__name__
        self._inserted: list[Assignment] = []  # what the model had in the places of missing modules
        for parent, name, module in list(family.missing_modules(model)):
            self._inserted.append((parent, name, getattr(parent, name)))
            setattr(parent, name, module.train(parent.training))
        self.sites = family.sites(model)
        names = {module: name for name, module in model.named_modules()}
        self._places = {site: [(names[place], place) for place in self.sites[site].places()] for site in self.sites}
        self._lock = threading.RLock()
        self._family = family
        self.active: dict[str, list[SubModelAugmentation]] = {}
        self.image_size = NOT_RUN
        self._held: list[Assignment] = []
        self._hooks = [
            module.register_forward_hook(partial(self._at_site, name, change))
            for name, site in self.sites.items()
            if isinstance(site, HookedSite)
            for module, change in ((site.module, site.apply), (site.end, site.leave))
            if module is not None
        ]
        if "drop_path" in self.sites:
            self._hooks += [hook for branch in self._drop_paths.branches for hook in branch.hook()]
        self._skips_dropped_paths = False
        self.updates_batch_norm = True

    def _at_site(
        self, site: str, change: Callable[..., Any], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Forward hook: what the augmentations active at a site make of a module's output."""
        augmentations = self.active.get(site)
        return change(augmentations, output, self.image_size) if augmentations else None

    @property
    def _drop_paths(self) -> DropPathSite:
        return cast(DropPathSite, self.sites["drop_path"])

    def skip_dropped_paths(self) -> None:
        """Let the model's own stochastic depth skip what it drops; ValueError if that cannot be done."""
        if "drop_path" not in self.sites:
            raise ValueError(f"skip_dropped_paths: {self.model_name} has no stochastic depth")
        self._drop_paths.check_cut("skip_dropped_paths")
        self._skips_dropped_paths = True

    def keep_batch_norm(self) -> None:
        """Let the main model alone update BatchNorm's running statistics; ValueError if there are none."""
        if not list(self._batch_norms()):
            raise ValueError(
                f"update_batch_norm: {self.model_name} has no BatchNorm, whose statistics False would keep"
            )
        self.updates_batch_norm = False

    def _batch_norms(self) -> Iterator[nn.Module]:
        """Those that keep running statistics, as they are now: synchronised ones may have come in their places."""
        norms = (module for module in self.model.modules() if isinstance(module, _BatchNorm))
        return (norm for norm in norms if norm.track_running_stats)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock(), active={})  # a copy is in no forward

    def main(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        with self._turn():
            self._refuse_inside()
            self.release()
            images = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            state = self._own_skipping(len(images)) if images is not None else []
            return self._forward({}, state, forward, *args, **kwargs)

    def run(
        self,
        augmentation: SubModelAugmentation,
        forward: Callable[..., Any],
        images: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward under `augmentation`."""
        with self._turn():
            if not isinstance(images, Tensor) or images.ndim != 4:
                found = getattr(images, "shape", type(images).__name__)
                raise TypeError(f"the sub-model takes images (B, C, H, W) as its first argument, not {found}")
            self._refuse_inside()
            self.release()
            plan = self.plan(augmentation)
            augmented = cast(ImageSite, self.sites["image"]).apply(plan.get("image", ()), images)
            self.image_size = (int(augmented.shape[-2]), int(augmented.shape[-1]))  # tensors while torch.jit traces
            is_resized = augmented.shape[-2:] != images.shape[-2:]
            state = list(self._family.resized_state(self.model, self.image_size)) if is_resized else []
            state += self._own_skipping(len(images)) if "drop_path" not in plan else []
            for name, members in plan.items():
                state += self.sites[name].state(members, len(images))
            if not self.updates_batch_norm:
                state += [(norm, "track_running_stats", False) for norm in self._batch_norms()]
            return self._forward(plan, state, forward, augmented, *args, **kwargs)

    def _refuse_inside(self) -> None:
        """Raise ValueError in a sub-forward, which a forward inside of it would end."""
        if self.active:
            raise ValueError(
                f"{self.model_name} was called inside of its own sub-forward, by an augmentation or a hook: "
                "call it before, or a copy of it"
            )

    def _own_skipping(self, batch: int) -> list[Assignment]:
        """What lets the model's own stochastic depth skip what it drops, if it shall."""
        return [*self._drop_paths.skipping(batch)] if self._skips_dropped_paths else []

    def _forward(
        self,
        plan: dict[str, list[SubModelAugmentation]],
        state: list[Assignment],
        forward: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        try:
            self.active = plan
            self._hold(state)
            logits = forward(*args, **kwargs)
        finally:
            self.active = {}
            self.release()
        self._replay_in_backward(logits, state)
        return logits

    def _turn(self) -> AbstractContextManager[Any]:
        """One thread at a time is in the model; what was compiled keeps nothing on it."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def plan(self, augmentation: SubModelAugmentation) -> dict[str, list[SubModelAugmentation]]:
        """Which members act at which site: each at the first of its sites that the model has.

        Raises:
            ValueError: if a member has no site in this model, or a module of its site was replaced.
        """
        plan: dict[str, list[SubModelAugmentation]] = {}
        for member in augmentation.members:
            site = self.site_of(member)
            if site is None:
                fixed = " (images of its built size only)" if member.resizes_images and "image" in member.sites else ""
                raise ValueError(
                    f"{member.name or type(member).__name__} has no site in {self.model_name}: it acts at "
                    f"{' or '.join(member.sites)}; {self.model_name} has {', '.join(self.sites)}{fixed} and offers "
                    f"{', '.join(self.support())}"
                )
            self._check_places(site)
            self.sites[site].check(member)
            plan.setdefault(site, []).append(member)
        return plan

    def site_of(self, augmentation: AugmentationOrClass) -> str | None:
        """Name of the first site of the augmentation that serves it in this model, None if there is none."""
        for name in augmentation.sites:
            if name in self.sites and self.sites[name].serves(augmentation):
                return name
        return None

    def support(self) -> dict[str, str]:
        """Registered augmentations that have a site in this model, with the site's name."""
        self.check_complete()
        found = {name: self.site_of(AUGSUB_REGISTRY.get(name)) for name in list_augmentations()}
        return {name: site for name, site in found.items() if site is not None}

    def check_complete(self) -> None:
        """Raise ValueError if sites are gone, or there are others than when the model was patched."""
        for site in self.sites:
            self._check_places(site)
        known = {place for places in self._places.values() for _, place in places}
        now = {place for site in self._family.sites(self.model).values() for place in site.places()}
        now |= {block for block, _, occupant in drop_path_places(self.model) if not isinstance(occupant, DropPath)}
        added = [name for name, module in self.model.named_modules() if module in now - known]
        if added:
            raise ValueError(f"{self.model_name}.{added[0]} was added after augsub.patch, {PATCH_AGAIN}")

    def _check_places(self, site: str) -> None:
        """Raise ValueError if a module of the site is no longer where it was when the model was patched."""
        for name, place in self._places[site]:
            try:
                found = operator.attrgetter(name)(self.model)
            except AttributeError:
                found = None
            if found is not place:
                raise ValueError(f"{self.model_name}.{name} was replaced after augsub.patch, {PATCH_AGAIN}")

    def remove(self) -> None:
        """Take the hooks, the inserted modules and what a backward that failed has left set out of the model."""
        self.release()
        for hook in self._hooks:
            hook.remove()
        for parent, name, own in self._inserted:
            if own is None:
                delattr(parent, name)  # None becomes a plain attribute again, not an empty submodule
            setattr(parent, name, own if own is None else own.train(parent.training))

    def _hold(self, state: Iterable[Assignment]) -> None:
        for module, attribute, value in state:
            self._held.append((module, attribute, getattr(module, attribute)))
            setattr(module, attribute, value)

    def release(self) -> None:
        """Give back the state that a forward or a backward has set."""
        while self._held:
            module, attribute, own_value = self._held.pop()
            setattr(module, attribute, own_value)

    def _replay_in_backward(self, logits: Any, state: list[Assignment]) -> None:
        """With gradient checkpointing, anybody's, blocks run again in backward: they must find the same state.

        Autograd runs the later of two forwards first, so each branch's own logits say when it starts.
        """
        if torch.compiler.is_compiling():
            return

        def replay(gradient: Tensor) -> None:
            self.release()
            self._hold(state)
            Variable._execution_engine.queue_callback(self.release)

        for leaf in tree_leaves(logits):
            output = getattr(leaf, "logits", leaf)  # of a class of somebody's own
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(replay)
