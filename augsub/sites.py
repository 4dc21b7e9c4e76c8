"""Sites: the places of one model where augmentations act.

A site knows how to hand its tensor to an augmentation as a view, or which modules it consists of.
It holds modules, never parameters, so that it stays true when a model is moved, copied or sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from augsub.augmentation import SubModelAugmentation
from augsub.views import Images, StemFeatures, Tokens

ImageSize = tuple[int, int]


@dataclass
class ImageSite:
    """The model's input. `stride` is the model's total stride in pixels."""

    stride: int

    def apply(self, augmentations: Sequence[SubModelAugmentation], images: Tensor) -> Tensor:
        view = Images(images, self.stride)
        for augmentation in augmentations:
            view = augmentation.image(view)
        return view.values


@dataclass
class TokenSite:
    """Output (B, P + N, D) of `module`, the last one before the blocks."""

    module: nn.Module
    patch_embed: nn.Module
    num_prefix_tokens: int

    def apply(self, augmentations: Sequence[SubModelAugmentation], tokens: Tensor, image_size: ImageSize) -> Tensor:
        rows, columns = self.patch_embed.dynamic_feat_size(image_size)
        all_present = tokens.shape[1] == self.num_prefix_tokens + rows * columns  # false after timm's own patch dropout
        view = Tokens(tokens, self.num_prefix_tokens, (rows, columns) if all_present else None)
        for augmentation in augmentations:
            view = augmentation.tokens(view)
        return view.values


@dataclass
class StemSite:
    """Output (B, H', W', D) of `module`, the patch embedding; `owner` has the parameter `mask_token`."""

    module: nn.Module
    owner: nn.Module

    def apply(self, augmentations: Sequence[SubModelAugmentation], features: Tensor, image_size: ImageSize) -> Tensor:
        view = StemFeatures(features, self.owner.mask_token, image_size)
        for augmentation in augmentations:
            view = augmentation.stem(view)
        return view.values


@dataclass
class ModuleSite:
    """Modules whose attributes an augmentation sets during the sub-forward."""

    modules: list[nn.Module]


Site = ImageSite | TokenSite | StemSite | ModuleSite
HookedSite = TokenSite | StemSite
