"""Masking: the sub-model sees a random part of the cells of each image (arXiv 2306.11339, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from augsub.augmentation import Images, StemFeatures, SubModelAugmentation, Tokens
from augsub.registry import register

DEFAULT_CELL = 32  # pixels; Swin's 7 x 7 cells at 224 px, as in masked image modelling (SimMIM)
SITE_OF_MODE = {"drop_tokens": "tokens", "drop_windows": "windows", "mask_token": "stem", "zero_pixels": "image"}


@register("masking")
class Masking(SubModelAugmentation):
    """Hide `ratio` of the cells of every image, drawn anew per sample.

    By default in the first of the paper's ways that the model allows: remove patch tokens, else replace
    stem features by a learnable mask token, else set input pixels to zero. Ratio 0 equals the main model.
    Of these the first alone saves computation; Swin can leave out groups of windows instead.

    Args:
        ratio: share of hidden cells in [0, 1); int(L * (1 - ratio)) of L cells stay visible.
        cell: side of a square cell in pixels for ``mask_token`` and ``zero_pixels`` (default 32);
            with ``drop_tokens`` a cell is one patch, with ``drop_windows`` a group of windows.
        mode: ``drop_tokens``, ``mask_token`` or ``zero_pixels`` to insist on one way; ``drop_windows`` for
            Swin: a quarter of the image is a cell (112 of 224 pixels), and what is hidden is not computed.
        strategy: which cells are hidden, always as many: ``random``; ``block``, those nearest to a random point, a
            rectangle of random shape; ``grid``, spread evenly, as a chequerboard at 0.5.

    Raises:
        ValueError: for an argument out of range and, in the sub-forward, for a cell larger than
            the image or a ratio that leaves no cell.
    """

    sites: Sequence[str] = ("tokens", "stem", "image")

    def __init__(
        self, ratio: float = 0.5, cell: int | None = None, mode: str | None = None, strategy: str = "random"
    ) -> None:
        super().__init__(ratio)
        if strategy not in STRATEGIES:
            raise ValueError(f"masking: strategy = {strategy!r}, allowed are {', '.join(STRATEGIES)}")
        if mode is not None and mode not in SITE_OF_MODE:
            raise ValueError(f"masking: mode = {mode!r}, allowed are {', '.join(SITE_OF_MODE)}")
        if cell is not None and (isinstance(cell, bool) or not isinstance(cell, int) or cell < 1):
            raise ValueError(f"masking: cell = {cell!r}, allowed is a whole number of pixels, at least 1")
        self.cell = cell
        self.mode = mode
        self.strategy = strategy
        if mode is not None:
            self.sites = (SITE_OF_MODE[mode],)

    def tokens(self, tokens: Tokens) -> Tokens:
        if self.cell is not None:
            raise ValueError(f"masking: cell = {self.cell} px, but here the model says what a cell is: leave it unset")
        if self.ratio == 0:
            return tokens
        batch, device = tokens.values.shape[0], tokens.values.device
        if self.strategy == "random":
            return tokens.keep(random_keep(batch, tokens.num_patches, self.ratio, device))
        if tokens.grid is None:
            raise ValueError(f"masking: strategy = {self.strategy!r}: the tokens form no grid any more; put it first")
        return tokens.keep(STRATEGIES[self.strategy](batch, tokens.grid, self.ratio, device))

    def windows(self, groups: Tokens) -> Tokens:
        return self.tokens(groups)

    def stem(self, features: StemFeatures) -> StemFeatures:
        if self.ratio == 0:
            return features
        batch, *resolution, _ = features.values.shape
        visible = self._visible(batch, features.image_size, resolution, features.values.device)
        mask_token = features.mask_token.to(features.values.dtype)
        masked = torch.where(visible.unsqueeze(-1), features.values, mask_token)
        return StemFeatures(masked, features.mask_token, features.image_size)

    def image(self, images: Images) -> Images:
        if self.ratio == 0:
            return images
        batch, _, *size = images.values.shape
        visible = self._visible(batch, size, size, images.values.device)
        return Images(images.values * visible.unsqueeze(1), images.stride)

    def _visible(
        self, batch: int, image_size: Sequence[int], resolution: Sequence[int], device: torch.device
    ) -> Tensor:
        """Visible positions (B, rows, columns) of a map of that resolution; cells lie on the image."""
        cell = self.cell or DEFAULT_CELL
        if cell > min(image_size):
            raise ValueError(f"masking: cell = {cell} px is larger than the image of {tuple(image_size)} px")
        cells = [-(-side // cell) for side in image_size]
        keep = STRATEGIES[self.strategy](batch, (cells[0], cells[1]), self.ratio, device)
        visible = torch.zeros(batch, cells[0] * cells[1], dtype=torch.bool, device=device).scatter_(1, keep, 1)
        rows, columns = (
            cell_of_position(positions, side, cell, device)
            for positions, side in zip(resolution, image_size, strict=True)
        )
        return visible.view(batch, *cells)[:, rows][:, :, columns]


def random_keep(batch: int, num_cells: int, ratio: float, device: torch.device) -> Tensor:
    """Cells that stay visible, per sample: the int(L * (1 - ratio)) of lowest uniform noise.

    Exactly one draw, ``torch.rand(B, L, device=device)``, so that one seed reproduces the choice.

    Returns:
        (B, K) int64 indices in [0, L), in order of their noise.

    Raises:
        ValueError: if no cell would stay.
    """
    num_keep = number_kept(num_cells, ratio)
    noise = torch.rand(batch, num_cells, device=device)
    return noise.topk(num_keep, dim=1, largest=False).indices


def block_keep(batch: int, grid: tuple[int, int], ratio: float, device: torch.device) -> Tensor:
    """As `random_keep`, the cells farthest from a random point: hidden is a rectangle, cut off at the border.

    One draw, ``torch.rand(B, 3)``: the point's row and column, and the rectangle's shape, rows : columns in [1/2, 2],
    uniform in its logarithm.
    """
    num_keep = number_kept(grid[0] * grid[1], ratio)
    row, column, shape = torch.rand(batch, 3, 1, device=device).unbind(dim=1)
    rows, columns = positions_of(grid, device)
    stretch = 2 ** (shape - 0.5)
    distance = torch.maximum(
        (rows + 0.5 - row * grid[0]).abs() / stretch, (columns + 0.5 - column * grid[1]).abs() * stretch
    )
    return distance.topk(num_keep, dim=1).indices


def grid_keep(batch: int, grid: tuple[int, int], ratio: float, device: torch.device) -> Tensor:
    """As `random_keep`, cells that are spread evenly: those first in the order of a Bayer matrix at a random place.

    One draw, ``torch.rand(B, L + 2)``: which of equal cells come first, and the matrix's row and column.
    """
    num_keep = number_kept(grid[0] * grid[1], ratio)
    noise, row, column = torch.rand(batch, grid[0] * grid[1] + 2, device=device).split([grid[0] * grid[1], 1, 1], dim=1)
    side = 2**BAYER_BITS
    rows, columns = positions_of(grid, device)
    rows, columns = rows + (side * row).long(), columns + (side * column).long()
    order = torch.zeros_like(noise)
    for bit in range(BAYER_BITS):  # the lowest bits of the place are the highest of the order
        one, other = (rows >> bit) & 1, (columns >> bit) & 1
        order = 4 * order + 2 * (one ^ other) + one
    kept: Tensor = (order + noise).topk(num_keep, dim=1, largest=False).indices
    return kept


def number_kept(num_cells: int, ratio: float) -> int:
    """int(L * (1 - ratio)); ValueError if that is none."""
    num_keep = int(num_cells * (1 - ratio))
    if num_keep < 1:
        raise ValueError(
            f"masking: ratio = {ratio} leaves none of {num_cells} cells visible: lower it, or take smaller cells"
        )
    return num_keep


def positions_of(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and column of each cell of a grid, (1, L) int64 each."""
    cells = torch.arange(grid[0] * grid[1], device=device)[None]
    return cells // grid[1], cells % grid[1]


BAYER_BITS = 3  # 8 x 8 cells, of which every quarter, eighth … is spread evenly
STRATEGIES: dict[str, Callable[[int, tuple[int, int], float, torch.device], Tensor]] = {
    "random": lambda batch, grid, ratio, device: random_keep(batch, grid[0] * grid[1], ratio, device),
    "block": block_keep,
    "grid": grid_keep,
}


def cell_of_position(positions: int, side: int, cell: int, device: torch.device) -> Tensor:
    """Index of the cell in which the centre of each of `positions` evenly spaced positions lies.

    Whole-number arithmetic on centres: exact when positions divide the side (Swin's stride 4), and
    still right when they do not (stems without padding). The last cell may be a partial one.
    """
    centres = (2 * torch.arange(positions, device=device) + 1) * side
    return centres.div(2 * positions * cell, rounding_mode="floor")
