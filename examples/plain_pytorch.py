"""MaskSub in a loop of plain PyTorch, with mixed precision.

python examples/plain_pytorch.py
"""

from __future__ import annotations

import torch
from digits import DIGITS, EPOCHS, accuracy, adamw, batches, masksub, small_vit
from torch import nn
from torch.utils.data import Dataset

import augsub


def train(
    model: nn.Module,
    objective: augsub.Objective,
    dataset: Dataset,
    epochs: int,
    shuffle: bool = True,
    amp: torch.dtype | None = None,
) -> None:
    """Train a patched model; `amp` is torch.float16, torch.bfloat16 or None."""
    optimizer = adamw(objective.prepare(model))
    scaler = torch.amp.GradScaler(enabled=amp is torch.float16)
    device = next(model.parameters()).device
    model.train()
    for _ in range(epochs):
        for images, labels in batches(dataset, shuffle):
            with torch.autocast(device.type, amp, enabled=amp is not None):
                objective.backward(
                    model,
                    images.to(device),
                    labels.to(device),
                    backward=lambda loss: scaler.scale(loss).backward(),
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


def main() -> None:
    """Train on digits, print the accuracy."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    model = augsub.patch(small_vit()).to("cuda" if on_gpu else "cpu")
    train(model, masksub(), DIGITS.train, EPOCHS, amp=torch.bfloat16 if on_gpu else None)
    print(f"plain PyTorch: {accuracy(augsub.unpatch(model).cpu().eval()):.2f} % of the held-out digits")


if __name__ == "__main__":
    main()
