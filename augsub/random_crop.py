"""Random crop: the sub-model sees one random square window of each image, and computes only that."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from augsub.augmentation import Images, SubModelAugmentation, Tokens
from augsub.registry import register


@register("random_crop")
class RandomCrop(SubModelAugmentation):
    """Keep one square window per sample with about 1 - `ratio` of the area.

    Models with a token grid keep a window of the grid, so that position embeddings stay true; the
    others get a crop of the input whose side is a multiple of their stride. Ratio 0 keeps all.

    Raises:
        ValueError: in the sub-forward, if the window would be the whole image or grid, or if
            tokens were removed before (put `random_crop` first).
    """

    sites = ("tokens", "image")
    resizes_images = True

    def tokens(self, tokens: Tokens) -> Tokens:
        if self.ratio == 0:
            return tokens
        if tokens.grid is None:
            raise ValueError(
                "random_crop: the tokens form no grid any more; put random_crop before what removes them "
                "(the model itself does with timm's patch_drop_rate)"
            )
        side = self._side(tokens.grid, multiple=1)
        rows, columns = random_window(tokens.values.shape[0], tokens.grid, side, tokens.values.device)
        indices = rows[:, :, None] * tokens.grid[1] + columns[:, None, :]
        return tokens.keep(indices.flatten(1), grid=(side, side))

    def image(self, images: Images) -> Images:
        if self.ratio == 0:
            return images
        batch, channels, height, width = images.values.shape
        side = self._side((height, width), multiple=images.stride)
        rows, columns = random_window(batch, (height, width), side, images.values.device)
        sample = torch.arange(batch, device=images.values.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.values.device)[:, None, None]
        return Images(images.values[sample, channel, rows[:, None, :, None], columns[:, None, None, :]], images.stride)

    def _side(self, size: tuple[int, int], multiple: int) -> int:
        """Side of the square nearest to 1 - ratio of the area, a multiple that fits into `size`."""
        wanted = math.sqrt(size[0] * size[1] * (1 - self.ratio))
        side = max(1, round(wanted / multiple)) * multiple
        if side >= max(size) or side > min(size):
            raise ValueError(
                f"random_crop: ratio = {self.ratio} allows no crop of {size[0]} x {size[1]}: "
                f"its side must be a multiple of {multiple} and smaller"
            )
        return side


def random_window(batch: int, size: tuple[int, int], side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows and columns, (B, side) int64 each, of one uniformly placed square per sample: a draw (B, 2) of corners."""
    noise, window = torch.rand(batch, 2, device=device), torch.arange(side, device=device)
    top, left = ((noise[:, axis, None] * (size[axis] - side + 1)).long() for axis in (0, 1))
    return top + window, left + window
