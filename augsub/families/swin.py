"""Swin transformers: stem features become a mask token, or groups of windows are left out and not computed; crops
of the image get windows that fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from augsub.augmentation import SubModelAugmentation, Tokens
from augsub.families.base import register_family
from augsub.families.stem import StemFamily
from augsub.sites import Assignment, ForeignModule, HookedSite, ImageSize, Site, augmented


class SwinTransformerFamily(StemFamily):
    """The stem is `patch_embed`, its norm included."""

    def sites(self, model: ForeignModule) -> dict[str, Site]:
        sites = super().sites(model)
        if len(model.layers) > 1:
            windows = WindowGroupSite(model)
            if windows.divides(model.patch_embed.grid_size):
                sites["windows"] = windows
        return sites

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        yield model.patch_embed, "strict_img_size", False
        for block in model.modules():
            if hasattr(block, "dynamic_mask"):
                yield from scaled_windows(block, model.patch_embed.img_size, image_size)


class SwinTransformerV2CrFamily(StemFamily):
    """As Swin, but position biases of this one are computed for its built windows."""

    def resized_state(self, model: ForeignModule, image_size: ImageSize) -> Iterator[Assignment]:
        yield model.patch_embed, "strict_img_size", False
        for block in model.modules():
            if hasattr(block, "dynamic_mask"):
                yield block, "dynamic_mask", True  # the stored attention mask fits the built size only


def scaled_windows(block: ForeignModule, built_size: ImageSize, image_size: ImageSize) -> Iterator[Assignment]:
    """Windows with the same share of the map as in the main model, as timm's `set_input_size` gives them.

    Windows of the built size would need padding: at 160 of 224 pixels they cost Swin-B 65 % of the main
    model's FLOPs instead of 51 %.
    """
    window = tuple(
        max(1, min(side, side * now // built))  # of larger images as they were built
        for side, now, built in zip(block.attn.window_size, image_size, built_size, strict=True)
    )
    shifts = tuple(side // 2 if shift else 0 for side, shift in zip(window, block.shift_size, strict=True))
    yield from with_windows(block, window, shifts)


class WindowGroupSite(HookedSite):
    """The stem's map (B, H', W', D) as square groups of whole windows.

    An augmentation sees each group as one token. If it removes some, the others go through the stages as images
    of their own, (B * K, side, side, D), so that no window has neighbours that are none; `end` gets their last
    maps side by side again, (B, K * h, w, D').

    A group is as large as one window of the last but one stage: in all stages up to there it consists of whole
    windows, a quarter of the map of Swin-T at 224 pixels (28 x 28 of 56 x 56 positions).

    Args:
        model: a Swin with at least two stages.
    """

    def __init__(self, model: ForeignModule) -> None:
        self.module, self.end = model.patch_embed, model.norm
        self._stages = [list(stage.blocks) for stage in model.layers]
        halvings = 2 ** (len(self._stages) - 2)
        self.side = tuple(side * halvings for side in self._stages[-2][0].window_size)
        self._kept = 1  # groups of a sample, in the sub-forward under way

    def divides(self, resolution: Sequence[int]) -> bool:
        """Whether a map of that resolution consists of whole groups, and of more than one."""
        return self.side != tuple(resolution) and not any(
            length % side for length, side in zip(resolution, self.side, strict=True)
        )

    def state(self, augmentations: Sequence[SubModelAugmentation], batch: int) -> Iterator[Assignment]:
        """Windows no larger than the map of a group, shifted only where there are several."""
        if not _removes(augmentations):
            return
        resolution = self.side
        for blocks in self._stages:
            for block in blocks:
                window = tuple(map(min, block.window_size, resolution))
                shift = (
                    shift if side < length else 0
                    for shift, side, length in zip(block.shift_size, window, resolution, strict=True)
                )
                yield from with_windows(block, window, tuple(shift))
            resolution = tuple(-(-length // 2) for length in resolution)  # patch merging pads odd maps

    def apply(self, augmentations: Sequence[SubModelAugmentation], output: Tensor, image_size: ImageSize) -> Tensor:
        if not _removes(augmentations):
            return output
        batch, *resolution, width = output.shape
        rows, columns = self.side
        if not self.divides(resolution):
            raise ValueError(
                f"a map of {resolution[0]} x {resolution[1]} positions does not divide into several groups of windows "
                f"of {rows} x {columns}"
            )
        grid = (int(resolution[0]) // rows, int(resolution[1]) // columns)  # tensors while torch.jit traces
        groups = (
            output.view(batch, grid[0], rows, grid[1], columns, width)
            .transpose(2, 3)
            .reshape(batch, grid[0] * grid[1], -1)
        )
        kept = augmented(Tokens(groups, 0, grid), augmentations, "windows")
        self._kept = kept.num_patches
        return kept.values.reshape(batch * self._kept, rows, columns, width)

    def leave(self, augmentations: Sequence[SubModelAugmentation], output: Tensor, image_size: ImageSize) -> Tensor:
        return output.unflatten(0, (-1, self._kept)).flatten(1, 2) if _removes(augmentations) else output


def _removes(augmentations: Sequence[SubModelAugmentation]) -> bool:
    return any(augmentation.ratio for augmentation in augmentations)


def with_windows(block: ForeignModule, window: tuple[int, ...], shift: tuple[int, ...]) -> Iterator[Assignment]:
    """A block of Swin with smaller windows.

    Position biases depend on the distance alone, so those of a smaller window are a part of the built ones.
    """
    yield block, "dynamic_mask", True  # the stored attention mask fits the built size only
    yield block, "shift_size", shift
    (rows, columns), built = window, block.attn.window_size
    index = block.attn.relative_position_index.view(*built, *built)[:rows, :columns, :rows, :columns]
    yield block.attn, "relative_position_index", index.reshape(rows * columns, rows * columns)
    for module in (block, block.attn):
        yield module, "window_size", window
        if hasattr(module, "window_area"):
            yield module, "window_area", window[0] * window[1]


register_family(
    SwinTransformerFamily("patch_embed", "NHWC"),
    "swin_transformer.SwinTransformer",
    "swin_transformer_v2.SwinTransformerV2",
)
register_family(SwinTransformerV2CrFamily("patch_embed", "NCHW"), "swin_transformer_v2_cr.SwinTransformerV2Cr")
