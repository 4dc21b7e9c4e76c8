"""Parameters and FLOPs of well-known models as their papers and those who compare with them state them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """Published figures of one model for images of 224 x 224 pixels and 1000 classes.

    Attributes:
        title: the model's usual name.
        name: timm's.
        mega_params: parameters in millions.
        giga_flops: multiply-adds of one image in billions.
    """

    title: str
    name: str
    mega_params: float
    giga_flops: float


LITERATURE = (
    Reference("ViT-S/16", "vit_small_patch16_224", 22.0, 4.6),  # DeiT-III, arXiv 2204.07118, as ViT-B, -L and -H
    Reference("ViT-B/16", "vit_base_patch16_224", 86.6, 17.5),
    Reference("ViT-L/16", "vit_large_patch16_224", 304.4, 61.6),
    Reference("ViT-H/14", "vit_huge_patch14_224", 632.1, 167.4),
    Reference("Swin-T", "swin_tiny_patch4_window7_224", 28.3, 4.5),  # Swin, arXiv 2103.14030, as Swin-S and -B
    Reference("Swin-S", "swin_small_patch4_window7_224", 49.6, 8.7),
    Reference("Swin-B", "swin_base_patch4_window7_224", 87.9, 15.4),
    Reference("ResNet-50", "resnet50", 25.6, 4.1),  # torchvision's table of weights, as ResNet-101 and -152
    Reference("ResNet-101", "resnet101", 44.5, 7.9),
    Reference("ResNet-152", "resnet152", 60.2, 11.6),
)
