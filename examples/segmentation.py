"""MaskSub for dense predictions: every pixel of a map learns from the main model's prediction for it.

python examples/segmentation.py

Circles and squares in noise, made on the spot; the model gives logits (B, K, H, W), the sub-model sees masked pixels.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import augsub

EPOCHS = 4
SIDE, CLASSES = 32, 3  # pixels; background, circle, square
MASKING = {"name": "masking", "ratio": 0.5, "cell": 4}


def shapes(count: int, seed: int) -> TensorDataset:
    """Images (1, 32, 32) and the class of every pixel (32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    row, column = torch.randint(8, SIDE - 8, (2, count, 1, 1), generator=generator)
    radius = torch.randint(4, 9, (count, 1, 1), generator=generator)
    down, right = (rows - row).abs(), (columns - column).abs()
    is_circle = torch.rand(count, 1, 1, generator=generator) < 0.5
    inside = torch.where(is_circle, down**2 + right**2 <= radius**2, torch.maximum(down, right) <= radius)
    labels = inside * torch.where(is_circle, 1, 2)
    images = inside.float() + torch.randn(count, SIDE, SIDE, generator=generator)
    return TensorDataset(images[:, None], labels)


def small_network() -> nn.Module:
    """Convolutions down and up again: logits (B, K, H, W)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(),
        nn.Conv2d(32, 64, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(64, 64, 5, padding=2), nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, CLASSES, 5, padding=2),
    )  # fmt: skip


def train(model: nn.Module, objective: augsub.Objective, dataset: TensorDataset) -> None:
    """Train a patched model."""
    optimizer = torch.optim.AdamW(objective.prepare(model).parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for images, labels in DataLoader(dataset, batch_size=32, shuffle=True):
            objective.backward(model, images, labels)
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: TensorDataset) -> float:
    """Pixels of the right class, in percent."""
    images, labels = dataset.tensors
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def main() -> None:
    """Without a sub-model, and with one."""
    for name, sub_models in {"plain": [], "MaskSub": [augsub.SubModel(MASKING)]}.items():
        torch.manual_seed(0)
        model = augsub.patch(small_network())
        train(model, augsub.SubModelObjective(nn.CrossEntropyLoss(), sub_models), shapes(256, seed=0))
        print(f"{name}: {accuracy(model, shapes(256, seed=1)):.1f} % of the held-out pixels")


if __name__ == "__main__":
    main()
