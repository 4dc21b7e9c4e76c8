"""What is trained in the benchmark, and what a step of it must cost by its FLOPs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

import augsub
from engine.config_file import load_config
from models.build import create_model
from models.complexity import analyze

CONFIG = Path(__file__).parents[2] / "configs" / "_base_" / "benchmark.yaml"
SUB_MODELS = {
    "masking 0.5": "{name: masking, ratio: 0.5}",
    "masking 0.5, windows left out": "{name: masking, ratio: 0.5, mode: drop_windows}",
    "random_crop 0.5": "{name: random_crop, ratio: 0.5}",
    "drop_path 0.2": "{name: drop_path, ratio: 0.2}",
    "dropout 0.2": "{name: dropout, ratio: 0.2}",
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 and fp16 FLOP/s of the SXM boards, NVIDIA


@dataclass(frozen=True)
class Setting:
    """What is trained, and how."""

    model: str
    image_size: int
    batch: int
    amp: str
    compiled: bool
    channels_last: bool

    def __str__(self) -> str:
        switches = [name for name in ("compiled", "channels_last") if getattr(self, name)]
        precision = "fp32" if self.amp == "off" else self.amp
        return ", ".join([self.model, f"{self.image_size} px", f"batch {self.batch}", precision, *switches])


@dataclass(frozen=True)
class Costs:
    """What arithmetic asks of a step.

    Attributes:
        forward: multiply-adds of the main model for one image.
        ratios: a step with every sub-model that the model allows, in parts of plain training's.
    """

    forward: int
    ratios: dict[str, float]

    def ratio(self, name: str) -> float:
        """A step's cost in parts of plain training's."""
        return self.ratios.get(name, 1.0)

    def flops(self, name: str) -> float:
        """FLOPs of a step for one image: a multiply-add is two, a backward two forwards."""
        return 3 * 2 * self.forward * self.ratio(name)


def training_costs(setting: Setting) -> Costs:
    """By counting the FLOPs of the forwards; what the model does not allow is left out."""
    model = create_model(setting.model, image_size=setting.image_size, num_classes=10)
    shape = (3, setting.image_size, setting.image_size)
    costs = Costs(analyze(model, shape, []).main.flops, {})
    for name, spec in SUB_MODELS.items():
        config = load_config(CONFIG, [f"augsub.sub_models=[{{augmentations: [{spec}]}}]"])
        (augmentations,) = [sub.augmentations for sub in config.augsub.sub_models]
        try:
            costs.ratios[name] = analyze(model, shape, [augsub.build(augmentations)]).training_cost
        except ValueError:
            continue
    return costs


def peak_flops(setting: Setting, device: torch.device) -> float | None:
    """What the device could do in the setting's precision at most, if it is known."""
    if device.type != "cuda" or setting.amp == "off":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for board, flops in PEAK.items() if board in name), None)
