"""MaskSub in the loop of timm's train.py: moving average, compilation, DDP, checkpoints.

python examples/timm_task.py
torchrun --nproc_per_node=2 examples/timm_task.py
"""

from __future__ import annotations

import os
import tempfile

import timm
import torch
from digits import DIGITS, EPOCHS, accuracy, adamw, batches, masksub, small_vit
from timm.utils import CheckpointSaver
from timm.utils.distributed import init_distributed_device_so
from torch import distributed, nn
from torch.utils.data import Dataset, Subset

import augsub
from augsub.integrations.timm import SubModelTask


def train(
    model: nn.Module,
    objective: augsub.Objective,
    dataset: Dataset,
    epochs: int,
    shuffle: bool = True,
    average: bool = False,
    compiled: bool = False,
    folder: str | None = None,
) -> SubModelTask:
    """Train a model as timm's train.py does with a task. Under DDP each process has its share of the data.

    Args:
        average: keep a moving average of the weights.
        folder: where the main process saves timm's checkpoints.
    """
    device = next(model.parameters()).device
    task = SubModelTask(model, objective, device=device, verbose=False)
    optimizer = adamw(task.get_trainable_module())
    if average:
        task.setup_ema(decay=0.99)
    if compiled:
        task.compile()
    rank, world_size = 0, 1
    if distributed.is_initialized():
        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        dataset = Subset(dataset, range(rank, len(dataset), world_size))
        task.prepare_distributed(device_ids=[device] if device.type == "cuda" else None)
    saver = None
    if folder is not None and rank == 0:
        saver = CheckpointSaver(model, optimizer, checkpoint_dir=folder, recovery_dir=folder, task=task)

    updates = 0
    for epoch in range(epochs):
        task.get_trainable_module().train()
        for images, labels in batches(dataset, shuffle):
            task(images.to(device), labels.to(device))["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
        if saver is not None:
            saver.save_checkpoint(epoch)
    return task


def main() -> None:
    """Train on digits, print the accuracies of the model, of its average, and of timm's checkpoint."""
    device = init_distributed_device_so("cuda" if torch.cuda.is_available() else "cpu")["device"]
    torch.manual_seed(0)
    model = small_vit().to(device)
    with tempfile.TemporaryDirectory() as folder:
        task = train(model, masksub(), DIGITS.train, EPOCHS, average=True, folder=folder)
        if int(os.environ.get("RANK", 0)) == 0:
            plain = small_vit()
            timm.models.load_checkpoint(plain, os.path.join(folder, "last.pth.tar"), use_ema=False)
            average = task.get_eval_model(ema=True).module
            for name, evaluated in ("model", model), ("moving average", average), ("checkpoint", plain):
                print(f"timm's task, {name}: {accuracy(evaluated.cpu().eval()):.2f} % of the held-out digits")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
