"""What the examples share: scikit-learn's handwritten digits, a small ViT, an optimiser and an accuracy."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import augsub
from engine.data.source import build_digits

DIGITS = build_digits(image_size=8)  # images (1, 8, 8), labels
EPOCHS = 20


def small_vit() -> nn.Module:
    """Four blocks on 4 x 4 patches of 2 pixels."""
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **size)


def masksub() -> augsub.SubModelObjective:
    """Cross-entropy, and a sub-model that sees half of the patches."""
    return augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking", ratio=0.5)])


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of all examples, at a constant rate."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)


def batches(dataset: Dataset, shuffle: bool = True) -> DataLoader:
    """Images and labels, 50 at a time."""
    return DataLoader(dataset, batch_size=50, shuffle=shuffle)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor]) -> float:
    """Top-1 accuracy in percent of a model in evaluation mode on the held-out digits."""
    hits = [model(images).argmax(dim=1) == labels for images, labels in batches(DIGITS.held_out, shuffle=False)]
    return 100 * torch.cat(hits).double().mean().item()
