"""Sites: the places of one model where augmentations act.

A site knows how to hand its tensor to an augmentation as a view, or which modules it consists of.
It holds modules, never parameters, so that it stays true when a model is moved, copied or sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

from torch import Tensor, nn

from augsub.augmentation import Images, StemFeatures, SubModelAugmentation, Tokens
from augsub.residual_branches import ResidualBranch, rate_name

ImageSize = tuple[int, int]
Layout = Literal["NLC", "NHWC", "NCHW"]
ForeignModule: TypeAlias = Any  # a module of timm or another project: which attributes it has, its family knows
Assignment = tuple[ForeignModule, str, Any]  # this module's attribute has this value
AugmentationOrClass = SubModelAugmentation | type[SubModelAugmentation]

View = TypeVar("View", Images, Tokens, StemFeatures)


def augmented(view: View, augmentations: Sequence[SubModelAugmentation], site: str) -> View:
    """The view after the augmentations' method for that site, in order."""
    for augmentation in augmentations:
        view = getattr(augmentation, site)(view)
    return view


class Site:
    """A place of one model where augmentations act."""

    def places(self) -> Sequence[nn.Module]:
        """The modules of the model on which the site relies."""
        return ()

    def serves(self, augmentation: AugmentationOrClass) -> bool:
        """Whether the augmentation can act here in this model."""
        return True

    def check(self, augmentation: SubModelAugmentation) -> None:
        """Raise ValueError if the augmentation acts here, but not with its arguments."""

    def state(self, augmentations: Sequence[SubModelAugmentation], batch: int) -> Iterable[Assignment]:
        """Attributes that modules have during the sub-forward of so many images."""
        return ()


@dataclass
class ImageSite(Site):
    """The model's input.

    Attributes:
        stride: the model's total stride in pixels.
        resizable: whether the model takes images of another size than the main model's.
    """

    stride: int
    resizable: bool

    def serves(self, augmentation: AugmentationOrClass) -> bool:
        return self.resizable or not augmentation.resizes_images

    def apply(self, augmentations: Sequence[SubModelAugmentation], images: Tensor) -> Tensor:
        return augmented(Images(images, self.stride), augmentations, "image").values


class HookedSite(Site):
    """The output of `module`, changed by a forward hook, and if need be that of a later module, `end`."""

    module: nn.Module
    end: nn.Module | None = None

    def places(self) -> Sequence[nn.Module]:
        return [module for module in (self.module, self.end) if module is not None]

    def apply(self, augmentations: Sequence[SubModelAugmentation], output: Any, image_size: ImageSize) -> Any:
        """The output of `module` in the sub-forward."""
        raise NotImplementedError

    def leave(self, augmentations: Sequence[SubModelAugmentation], output: Any, image_size: ImageSize) -> Any:
        """The output of `end` in the sub-forward."""
        raise NotImplementedError


@dataclass
class TokenSite(HookedSite):
    """Output (B, P + N, D) of `module`, the last one before the blocks.

    Families whose module returns more than the tokens override `pack`, and `unpack` if the tokens are not first.

    Attributes:
        module: its output is the token sequence.
        patch_embed: tells the grid of patches of an image.
        num_prefix_tokens: P, class and register tokens in front, which always stay.
    """

    module: nn.Module
    patch_embed: ForeignModule
    num_prefix_tokens: int

    def apply(self, augmentations: Sequence[SubModelAugmentation], output: Any, image_size: ImageSize) -> Any:
        tokens = self.unpack(output)
        num_patches = tokens.shape[1] - self.num_prefix_tokens
        grid = self.grid(image_size, num_patches)
        all_present = grid is not None and grid[0] * grid[1] == num_patches  # false after timm's own patch dropout
        view = Tokens(tokens, self.num_prefix_tokens, grid if all_present else None)
        return self.pack(augmented(view, augmentations, "tokens"), output)

    def unpack(self, output: Any) -> Tensor:
        """The tokens in the module's output."""
        tokens: Tensor = output[0] if isinstance(output, tuple) else output
        return tokens

    def pack(self, tokens: Tokens, output: Any) -> Any:
        """The module's output with these tokens instead."""
        return tokens.values

    def grid(self, image_size: ImageSize, num_patches: int) -> tuple[int, int] | None:
        """(rows, columns) of the `num_patches` patches of an image of `image_size`, (H, W)."""
        if hasattr(self.patch_embed, "dynamic_feat_size"):  # timm's, which may pad
            grid: tuple[int, int] = self.patch_embed.dynamic_feat_size(image_size)
            return grid
        rows, columns = self.patch_embed.patch_size
        return image_size[0] // rows, image_size[1] // columns


@dataclass
class StemSite(HookedSite):
    """Output of `module`, the stem; `owner` has the parameter `mask_token`."""

    module: nn.Module
    owner: ForeignModule
    layout: Layout

    def apply(self, augmentations: Sequence[SubModelAugmentation], output: Any, image_size: ImageSize) -> Any:
        features = output[0] if isinstance(output, tuple) else output
        view = StemFeatures(self._channels_last(features, image_size), self.owner.mask_token, image_size)
        view = augmented(view, augmentations, "stem")
        changed = view.values.permute(0, 3, 1, 2) if self.layout == "NCHW" else view.values.reshape(features.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def _channels_last(self, features: Tensor, image_size: ImageSize) -> Tensor:
        """As (B, H', W', D); a sequence has the image's aspect ratio."""
        if self.layout == "NCHW":
            return features.permute(0, 2, 3, 1)
        if self.layout == "NHWC":
            return features
        rows = round((features.shape[1] * image_size[0] / image_size[1]) ** 0.5)
        as_map: Tensor = features.unflatten(1, (rows, features.shape[1] // rows))
        return as_map


@dataclass
class ModuleSite(Site):
    """Modules whose attributes an augmentation sets during the sub-forward."""

    modules: Sequence[nn.Module]

    def places(self) -> Sequence[nn.Module]:
        return self.modules

    def state(self, augmentations: Sequence[SubModelAugmentation], batch: int) -> Iterable[Assignment]:
        for augmentation in augmentations:
            for module in self.modules:
                for attribute, value in augmentation.module_state(module).items():
                    yield module, attribute, value


@dataclass
class DropPathSite(ModuleSite):
    """Stochastic-depth modules.

    Attributes:
        branches: the residual branches that belong to them.
        uncut: names of those whose branch cannot be computed apart from the model's other images.
    """

    branches: Sequence[ResidualBranch]
    uncut: Sequence[str]

    def check(self, augmentation: SubModelAugmentation) -> None:
        if augmentation.skips_paths:
            self.check_cut(str(augmentation))

    def check_cut(self, wanted: str) -> None:
        """Raise ValueError if a branch cannot be cut out."""
        if self.uncut:
            raise ValueError(
                f"{wanted}: the branches of {len(self.uncut)} of {len(self.modules)} drop paths cannot be computed "
                f"apart from the other images, the first is {self.uncut[0]}; what is dropped must be computed here"
            )

    def state(self, augmentations: Sequence[SubModelAugmentation], batch: int) -> Iterable[Assignment]:
        for augmentation in augmentations:
            if augmentation.skips_paths:
                yield from self.skipping(batch, augmentation.ratio)
            else:
                yield from super().state([augmentation], batch)

    def skipping(self, batch: int, rate: float | None = None) -> Iterator[Assignment]:
        """The state that skips what is dropped at a rate; None: at their own rates, where they are in training."""
        for branch in self.branches:
            own = getattr(branch.drop_path, rate_name(branch.drop_path)) if branch.drop_path.training else 0.0
            yield from branch.skipping(own if rate is None else rate, batch)
