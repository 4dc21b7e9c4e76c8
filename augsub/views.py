"""What an augmentation sees at each site of a model: a tensor and what is known about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
