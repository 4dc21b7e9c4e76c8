"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) of linear layers, by peft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.weights import head_tensors


def add_lora(model: nn.Module, rank: int, targets: Sequence[str]) -> None:
    """Give linear layers adapters: these, the head and a sub-model's mask token learn, all else stays.

    The adapters' scale is 1 (peft's lora_alpha is the rank), so that their weights alone say what they add.

    Args:
        rank: of the adapters.
        targets: the last part, or parts, of the layers' names: qkv, attn.proj, fc1.

    Raises:
        ValueError: peft is missing, or no linear layer has such a name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora needs another package, pip install 'augsub[lora]'") from error
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ValueError(f"lora.targets: the model has no linear layer named {target!r}, but {_some(linear)}")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=[*targets]), model)
    head = head_tensors(model)
    for name, parameter in model.named_parameters():
        if name in head or name == "mask_token":
            parameter.requires_grad_(True)


def _some(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
