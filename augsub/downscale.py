"""Downscale: the sub-model sees the whole image at a lower resolution."""

from __future__ import annotations

import math

from torch.nn import functional as F

from augsub.augmentation import Images, SubModelAugmentation
from augsub.registry import register


@register("downscale")
class Downscale(SubModelAugmentation):
    """Shrink the images to about 1 - `ratio` of their area, antialiased. Nothing is drawn; ratio 0 keeps them.

    Each side becomes the nearest multiple of the model's stride. A ViT resamples its position embedding to the smaller
    grid, as timm does with `dynamic_img_size`. What an image of low resolution shows is what it has in low frequencies
    (EfficientTrain++, arXiv 2405.08768).

    Raises:
        ValueError: in the sub-forward, if no smaller size is a multiple of the stride.
    """

    sites = ("image",)
    resizes_images = True

    def image(self, images: Images) -> Images:
        if self.ratio == 0:
            return images
        size, stride = images.values.shape[-2:], images.stride
        sides = [max(1, round(side * math.sqrt(1 - self.ratio) / stride)) * stride for side in size]
        if sides[0] >= size[0] or sides[1] >= size[1]:
            raise ValueError(
                f"downscale: ratio = {self.ratio} allows no smaller size than {size[0]} x {size[1]}: its sides must be "
                f"multiples of {stride}"
            )
        values = images.values.float()  # CPUs have no antialiased kernel for half precision
        values = F.interpolate(values, size=sides, mode="bilinear", antialias=True)
        return Images(values.to(images.values.dtype), stride)
