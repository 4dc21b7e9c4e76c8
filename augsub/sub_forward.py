"""Running the sub-model of one patched model: hooks at its sites and module state, always restored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils._pytree import tree_leaves

from augsub.augmentation import SubModelAugmentation
from augsub.families import Family
from augsub.families.base import drop_path_places
from augsub.registry import AUGSUB_REGISTRY
from augsub.sites import Assignment, AugmentationOrClass, HookedSite, ImageSite


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
        self._turns = Turns()
        self._family = family
        self.patch_embed: Any = getattr(model, "patch_embed", None)
        self.active: dict[str, list[SubModelAugmentation]] = {}
        self.image_size = (0, 0)
        self._held: list[Assignment] = []
        self._hooks = [
            module.register_forward_hook(_SiteHook(name, change, self))
            for name, site in self.sites.items()
            if isinstance(site, HookedSite)
            for module, change in ((site.module, site.apply), (site.end, site.leave))
            if module is not None
        ]

    def main(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own forward; threads may run it side by side."""
        with self._turn(alone=False):
            self._release()
            logits = forward(*args, **kwargs)
            self._replay_in_backward(logits, [])
            return logits

    def run(
        self,
        augmentation: SubModelAugmentation,
        forward: Callable[..., Any],
        images: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The model's own forward under `augmentation`; no other thread runs the model at that time."""
        with self._turn(alone=True):
            self._check_images(images)
            self._release()
            plan = self.plan(augmentation)
            augmented = cast(ImageSite, self.sites["image"]).apply(plan.get("image", ()), images)
            image_size = (int(augmented.shape[-2]), int(augmented.shape[-1]))  # tensors while torch.jit traces
            is_resized = augmented.shape[-2:] != images.shape[-2:]
            state = list(self._family.resized_state(self.model, image_size)) if is_resized else []
            state += [assignment for name, members in plan.items() for assignment in self.sites[name].state(members)]
            try:
                self.active = plan
                self.image_size = image_size
                self._hold(state)
                logits = forward(augmented, *args, **kwargs)
            finally:
                self.active = {}
                self._release()
            self._replay_in_backward(logits, state)
            return logits

    def _turn(self, alone: bool) -> AbstractContextManager[None]:
        # What was compiled keeps nothing on the model while it runs
        return nullcontext() if torch.compiler.is_compiling() else self._turns.take(alone)

    def _check_images(self, images: Any) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"the sub-model takes images as its first argument, not {type(images).__name__}")
        if images.ndim != 4:
            raise ValueError(f"the sub-model takes images (B, C, H, W), not a tensor of shape {tuple(images.shape)}")
        if not images.is_floating_point():
            raise TypeError(f"the sub-model takes normalized floating-point images, not {images.dtype}")
        size = (images.shape[-2], images.shape[-1])
        if getattr(self.patch_embed, "strict_img_size", False) and size != self.patch_embed.img_size:
            height, width = self.patch_embed.img_size
            raise ValueError(f"{self.model_name} takes images of {height} x {width} pixels, not {size[0]} x {size[1]}")

    def plan(self, augmentation: SubModelAugmentation) -> dict[str, list[SubModelAugmentation]]:
        """Which members act at which site: each at the first of its sites that the model has.

        Raises:
            ValueError: if a member has no site in this model, or a module of its site was replaced.
        """
        plan: dict[str, list[SubModelAugmentation]] = {}
        for member in augmentation.members:
            site = self.site_of(member)
            if site is None:
                raise ValueError(self._no_site(member))
            self._check_places(site)
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
        found = {name: self.site_of(augmentation) for name, augmentation in sorted(AUGSUB_REGISTRY)}
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
            raise ValueError(
                f"{self.model_name}.{added[0]} was added after augsub.patch, which does not know it: "
                "augsub.unpatch the model and patch it again"
            )

    def _check_places(self, site: str) -> None:
        """Raise ValueError if a module of the site is no longer where it was when the model was patched."""
        for name, place in self._places[site]:
            found: Any = self.model
            for attribute in name.split("."):
                found = getattr(found, attribute, None)
            if found is not place:
                raise ValueError(
                    f"{self.model_name}.{name} was replaced after augsub.patch, which knows the module that was there: "
                    "augsub.unpatch the model and patch it again"
                )

    def _no_site(self, member: SubModelAugmentation) -> str:
        fixed = member.resizes_images and "image" in member.sites
        return (
            f"{member.name or type(member).__name__} has no site in {self.model_name}: it acts at "
            f"{' or '.join(member.sites)}; {self.model_name} has {', '.join(self.sites)}"
            f"{' (images of its built size only)' if fixed else ''} and offers {', '.join(self.support())}"
        )

    def remove(self) -> None:
        """Take the hooks and the inserted modules out of the model."""
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

    def _release(self) -> None:
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
            self._release()
            self._hold(state)
            Variable._execution_engine.queue_callback(self._release)

        for output in tree_leaves(logits):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(replay)


class _SiteHook:
    """Forward hook that lets a site change a module's output by the augmentations active there."""

    def __init__(self, name: str, change: Callable[..., Any], sub_forward: SubForward) -> None:
        self.name = name
        self.change = change
        self.sub_forward = sub_forward

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        augmentations = self.sub_forward.active.get(self.name)
        return self.change(augmentations, output, self.sub_forward.image_size) if augmentations else None


class Turns:
    """Lets threads run a model's main forward side by side, and a sub-forward alone.

    A thread that is inside may call the model again. A copy, also a pickled one, begins anew.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # forwards under way, by thread
        self._alone: int | None = None  # the thread of a sub-forward
        self._waiting = 0  # sub-forwards: they go first, or many main forwards would keep them out

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        """The turn of a sub-forward, `alone`, or of a main forward."""
        me = threading.get_ident()
        with self._changed:
            self._waiting += alone
            try:
                self._changed.wait_for(lambda: self._may_enter(me, alone))
            finally:
                self._waiting -= alone
            self._inside[me] += 1
            self._alone = me if alone else self._alone
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._alone = None if self._alone == me else self._alone
                self._changed.notify_all()

    def _may_enter(self, me: int, alone: bool) -> bool:
        if alone:
            return not self._inside.keys() - {me}
        return me in self._inside or (self._alone is None and not self._waiting)

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()
