"""The repeated blocks of a model: what is sharded, or computed again in backward, as a whole."""

from __future__ import annotations

from torch import nn


def innermost_blocks(model: nn.Module) -> list[nn.Module]:
    """Entries of the model's lists of modules that are composed and hold no such entries themselves.

    Transformer blocks of a ViT, blocks of all stages of a Swin Transformer, bottlenecks of a ResNet.
    """
    blocks = {
        id(entry): entry
        for container in model.modules()
        if isinstance(container, (nn.Sequential, nn.ModuleList))
        for entry in container
        if not isinstance(entry, (nn.Sequential, nn.ModuleList)) and any(entry.children())
    }
    return [block for block in blocks.values() if not any(id(part) in blocks for part in list(block.modules())[1:])]


def checkpoint_gradients(model: nn.Module) -> None:
    """Keep only the inputs of the blocks for backward, as timm does it.

    Raises:
        ValueError: the model has no such mode.
    """
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError("this model cannot checkpoint gradients") from error
