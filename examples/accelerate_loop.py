"""MaskSub in a loop of Hugging Face Accelerate, with accumulation and mixed precision.

accelerate launch examples/accelerate_loop.py
"""

from __future__ import annotations

from accelerate import Accelerator
from accelerate.utils import set_seed
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
    accelerator: Accelerator | None = None,
) -> None:
    """Train a patched model, on all processes of the accelerator."""
    accelerator = accelerator or Accelerator()
    objective.prepare(model)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), batches(dataset, shuffle))
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                objective.backward(
                    model, images, labels, backward=accelerator.backward, sync=accelerator.sync_gradients
                )
                optimizer.step()
                optimizer.zero_grad()


def main() -> None:
    """Train on digits, print the accuracy."""
    set_seed(0)
    accelerator = Accelerator()
    model = augsub.patch(small_vit())
    train(model, masksub(), DIGITS.train, EPOCHS, accelerator=accelerator)
    model = augsub.unpatch(accelerator.unwrap_model(model, keep_fp32_wrapper=False)).cpu().eval()
    accelerator.print(f"Accelerate: {accuracy(model):.2f} % of the held-out digits")


if __name__ == "__main__":
    main()
