"""MaskSub in the Trainer of Hugging Face Transformers, for a timm model and for a ViT of theirs.

python examples/transformers_trainer.py
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from digits import DIGITS, EPOCHS, accuracy, adamw, masksub
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import augsub
from augsub.integrations.transformers import SubModelTrainer


def timm_in_transformers() -> nn.Module:
    """The small ViT of the other examples, a timm model in Transformers' wrapper."""
    size = {"img_size": 8, "patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4}
    config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args={"in_chans": 1, **size}, num_labels=10)
    return TimmWrapperForImageClassification(config)


def vit_of_transformers() -> nn.Module:
    """The same size in Transformers' own ViT."""
    size = {"image_size": 8, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ViTConfig(**size, intermediate_size=256, num_channels=1, num_labels=10)
    return ViTForImageClassification(config)


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Batches with the names that Transformers' models use."""
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def train(
    model: nn.Module,
    objective: augsub.Objective,
    dataset: Dataset,
    epochs: int,
    shuffle: bool = True,
    **arguments: Any,
) -> None:
    """Train a model of Transformers whose backbone is patched."""
    optimizer = adamw(model)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=50,
            train_sampling_strategy="random" if shuffle else "sequential",
            max_grad_norm=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            **arguments,
        )
        SubModelTrainer(
            model,
            settings,
            objective=objective,
            train_dataset=dataset,
            data_collator=collate,
            optimizers=(optimizer, constant),
        ).train()


def main() -> None:
    """Train on digits, print the accuracies."""
    for create in (timm_in_transformers, vit_of_transformers):
        set_seed(0)
        model = create()
        augsub.patch(model.base_model)
        train(model, masksub(), DIGITS.train, EPOCHS)
        augsub.unpatch(model.base_model)
        model.cpu().eval()
        figure = accuracy(lambda images, model=model: model(images).logits)
        print(f"Transformers, {type(model).__name__}: {figure:.2f} % of the held-out digits")


if __name__ == "__main__":
    main()
