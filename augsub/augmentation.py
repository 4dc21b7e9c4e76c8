"""The base class of every sub-model augmentation, their composition, and what they see: a tensor at a site."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


@dataclass
class Images:
    """The input of the sub-model.

    Attributes:
        values: images, (B, C, H, W), as the main model sees them.
        stride: the model's total stride in pixels; the side of a crop must be a multiple of it.
    """

    values: Tensor
    stride: int


@dataclass
class Tokens:
    """The token sequence after position embedding, before the first block.

    Attributes:
        values: tokens, (B, P + N, D): P prefix tokens (class, register …), then N patch tokens.
        num_prefix_tokens: P.
        grid: (rows, columns) of the patch tokens with rows * columns == N, or None once tokens
            were removed in a pattern that is no rectangle.
        kept: (B, N) indices of the patch tokens among those that were there first, None while all are.
    """

    values: Tensor
    num_prefix_tokens: int
    grid: tuple[int, int] | None
    kept: Tensor | None = None

    @property
    def num_patches(self) -> int:
        """Number of patch tokens, N."""
        return self.values.shape[1] - self.num_prefix_tokens

    def keep(self, indices: Tensor, grid: tuple[int, int] | None = None) -> Tokens:
        """Keep the prefix tokens and, per sample, the patch tokens at `indices`.

        Args:
            indices: (B, K) int64, each in [0, N).
            grid: rows and columns of the kept tokens if they still form a rectangle.
        """
        prefix, patches = self.values.split([self.num_prefix_tokens, self.num_patches], dim=1)
        kept = patches.gather(1, indices.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        indices = indices if self.kept is None else self.kept.gather(1, indices)
        return Tokens(torch.cat([prefix, kept], dim=1), self.num_prefix_tokens, grid, indices)


@dataclass
class StemFeatures:
    """The feature map that the stem (patch embedding) hands to the first stage.

    Attributes:
        values: features, (B, H', W', D), channels last whatever the model's own layout.
        mask_token: the learnable replacement for a masked position, (1, 1, D).
        image_size: (H, W) of the input image in pixels.
    """

    values: Tensor
    mask_token: Tensor
    image_size: tuple[int, int]


class SubModelAugmentation:
    """What changes in the sub-model, at one kind of site of a model.

    A subclass names in `sites` the sites where it can act, best first, and overrides the method of
    each. In a given model it acts at the first of them that the model has:

    =============  ==================  ====================================================
    site           method              what it is
    =============  ==================  ====================================================
    ``image``      :meth:`image`       the input images
    ``tokens``     :meth:`tokens`      the token sequence after position embedding
    ``windows``    :meth:`windows`     groups of Swin's windows after the stem, each as one token
    ``stem``       :meth:`stem`        the feature map of the stem, with a learnable mask token
    ``drop_path``  :meth:`module_state`  every stochastic-depth module
    ``dropout``    :meth:`module_state`  every projection and MLP dropout
    =============  ==================  ====================================================

    Args:
        ratio: strength in [0, 1).

    Raises:
        ValueError: if `ratio` is outside [0, 1).
    """

    name: ClassVar[str] = ""
    sites: Sequence[str] = ()
    resizes_images: ClassVar[bool] = False  # whether `image` returns images of another size

    def __init__(self, ratio: float) -> None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
            raise ValueError(f"{self.name or type(self).__name__}: ratio = {ratio!r}, allowed is a number in [0, 1)")
        self.ratio = float(ratio)

    @property
    def skips_paths(self) -> bool:
        """Whether residual branches that drop are not computed, at the site ``drop_path``."""
        return False

    @property
    def members(self) -> tuple[SubModelAugmentation, ...]:
        """The augmentations to apply, in order: itself, unless it is composed of others."""
        return (self,)

    def image(self, images: Images) -> Images:
        """Change the input images of the sub-model."""
        return images

    def tokens(self, tokens: Tokens) -> Tokens:
        """Change or remove tokens of the sub-model."""
        return tokens

    def windows(self, groups: Tokens) -> Tokens:
        """Change or remove groups of windows of the sub-model."""
        return groups

    def stem(self, features: StemFeatures) -> StemFeatures:
        """Change the stem features of the sub-model."""
        return features

    def module_state(self, module: nn.Module) -> Mapping[str, Any]:
        """Attributes that `module` has during the sub-forward; afterwards its own are restored."""
        return {}

    def __str__(self) -> str:
        """In a few characters, with what is not as usual: "masking 0.5 strategy=block + dropout 0.1"."""
        return " + ".join(
            " ".join([f"{member.name or type(member).__name__} {member.ratio:g}", *member._unusual()])
            for member in self.members
        )

    def _unusual(self) -> Iterator[str]:
        """Arguments beside the ratio, kept under their names, that are not the defaults."""
        for name, parameter in inspect.signature(type(self)).parameters.items():
            value = vars(self).get(name, parameter.default)
            if name != "ratio" and value != parameter.default:
                yield f"{name}={value}"

    def __repr__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in vars(self).items() if key != "sites")
        return f"{type(self).__name__}({arguments})"


class Compose(SubModelAugmentation):
    """Several augmentations, applied in order to one sub-model.

    Args:
        members: at least one augmentation.

    Raises:
        ValueError: if `members` is empty.
    """

    name = "compose"

    def __init__(self, members: Sequence[SubModelAugmentation]) -> None:
        if not members:
            raise ValueError("Compose: no augmentation given, at least one is needed")
        self._members = tuple(member for composed in members for member in composed.members)

    @property
    def members(self) -> tuple[SubModelAugmentation, ...]:
        return self._members

    @property
    def skips_paths(self) -> bool:
        return any(member.skips_paths for member in self._members)

    def __repr__(self) -> str:
        return f"Compose({list(self._members)!r})"
