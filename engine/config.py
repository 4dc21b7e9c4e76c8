"""The configuration schema: every field with its type, its default and what it means.

`engine/config_file.py` reads YAML files into it; `engine/defaults.py` builds a trainer from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional  # noqa: UP035  (OmegaConf reads these at run time)

# ruff: noqa: UP006, UP045


@dataclass
class ModelConfig:
    """A timm model. `num_classes` and `in_chans` come from the data."""

    name: str = "vit_base_patch16_224"  # any timm model
    pretrained: bool = False  # timm's weights for that name
    checkpoint: Optional[str] = None  # a checkpoint of ours or a timm state dict to start from
    drop_path_rate: Optional[float] = None  # stochastic depth of the main model; null: timm's default
    drop_rate: Optional[float] = None  # dropout before the head; null: timm's default
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else that timm.create_model takes


@dataclass
class DataConfig:
    """Where images come from. The number of classes is inferred."""

    dataset: str = "folder"  # folder | digits | synthetic | a timm dataset name (hfds/…, torch/…, wds/…)
    root: Optional[str] = None  # folder with <train_split>/<class>/*.jpg and <eval_split>/<class>/*.jpg
    train_split: str = "train"  # folder or split name of the training images
    eval_split: str = "validation"  # for a folder also val, eval or test, as in timm
    image_size: int = 224  # pixels, square
    workers: int = 4  # loader processes per training process; 0 loads in the training process
    synthetic_samples: int = 512  # images per split of the synthetic dataset


@dataclass
class TransformConfig:
    """timm's image transforms; digits and synthetic images are used as they are."""

    scale: List[float] = field(default_factory=lambda: [0.08, 1.0])  # area of the random resized crop
    ratio: List[float] = field(default_factory=lambda: [0.75, 4 / 3])  # its aspect ratio
    interpolation: str = "bicubic"  # bicubic | bilinear | random (of both, training only)
    hflip: float = 0.5  # probability of a horizontal flip
    color_jitter: Optional[float] = None  # strength; without effect where auto_augment is RandAugment
    auto_augment: Optional[str] = None  # timm's spelling: rand-m9-mstd0.5-inc1, 3a, augmix-m5-w4-d2 …
    random_erase: float = 0.0  # probability of erasing a rectangle (pixel noise)
    eval_crop: float = 0.875  # share of the resized image's side that the centre crop keeps
    mean: List[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # ImageNet's
    std: List[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # ImageNet's


@dataclass
class SubModelConfig:
    """One sub-model: augmentations applied in order, and the weight of its loss."""

    weight: float = 0.5  # of its loss
    augmentations: List[Any] = field(default_factory=list)  # [{name: masking, ratio: 0.5}, …]


@dataclass
class AugsubConfig:
    """loss = main_weight * main + sum of weight * sub. `sub_models: []` is plain training."""

    main_weight: float = 0.5  # of the loss on the labels
    sub_models: List[SubModelConfig] = field(default_factory=list)  # any number, each one more forward


@dataclass
class TrainConfig:
    """How long, how much at once, and in which precision."""

    epochs: int = 300  # the schedule runs over these; iterations are derived
    max_iters: Optional[int] = None  # stop earlier, after this many optimiser steps
    global_batch: int = 1024  # images per optimiser step, over all processes and micro-batches
    accumulation: int = 1  # micro-batches per optimiser step
    amp: str = "off"  # off | bf16 | fp16 (with gradient scaling, on GPUs; a CPU runs float32 instead and says so)
    clip_norm: Optional[float] = None  # global L2 norm of the gradient
    compile: bool = False  # torch.compile for the main and the sub-model


@dataclass
class OptimizerConfig:
    """A timm optimiser. Biases, norms and what the model names itself have no weight decay."""

    name: str = "adamw"  # any name of timm.optim.list_optimizers()
    lr: float = 1e-3  # peak, absolute (not scaled by the batch)
    weight_decay: float = 0.05  # decoupled or not, as the optimiser has it
    betas: Optional[List[float]] = None  # null: the optimiser's default
    eps: Optional[float] = None  # null: the optimiser's default
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else the optimiser takes


@dataclass
class ScheduleConfig:
    """Linear warmup, then cosine, by timm's scheduler."""

    warmup_epochs: float = 5  # linear from warmup_lr
    warmup_lr: float = 1e-6  # learning rate of the first step
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    unit: str = "iteration"  # iteration | epoch: how often the learning rate changes
    warmup_prefix: bool = False  # whether the cosine starts after the warmup instead of under it


@dataclass
class LossConfig:
    """Loss of the main model."""

    name: str = "cross_entropy"  # cross_entropy | bce
    smoothing: float = 0.0  # label smoothing, in [0, 1)
    target_threshold: Optional[float] = None  # bce: mixed targets above it become 1, others 0


@dataclass
class MixupConfig:
    """timm's Mixup and CutMix, on the batch of each process. Both alphas 0: off."""

    mixup_alpha: float = 0.0  # Beta(alpha, alpha) of the mixing weight
    cutmix_alpha: float = 0.0  # Beta(alpha, alpha) of the kept area
    prob: float = 1.0  # probability that a batch is mixed
    switch_prob: float = 0.5  # probability of CutMix where both are on
    mode: str = "batch"  # batch | pair | elem


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside them as ema_top1."""

    enabled: bool = False  # costs one copy of the model
    decay: float = 0.9999  # share of the old average that stays per step
    warmup: bool = False  # ramp the decay up from 0, for short runs


@dataclass
class EvaluationConfig:
    """Accuracy on held-out images."""

    period: int = 1  # epochs between evaluations; the last epoch is always evaluated
    batch: int = 256  # images at once per process
    metric: str = "top1"  # what makes a checkpoint the best one: top1 | ema_top1


@dataclass
class CheckpointConfig:
    """When the state of the run is saved. `last` and `best` always exist beside the numbered ones."""

    period: Optional[int] = None  # iterations; null: one epoch
    every_minutes: Optional[float] = None  # also after that much time
    keep: int = 2  # numbered checkpoints that stay


@dataclass
class DistributedConfig:
    """Several processes, started by torchrun."""

    strategy: str = "ddp"  # ddp
    timeout_minutes: float = 10.0  # after which a hung collective ends the run


@dataclass
class LogConfig:
    """How often losses are read from the device, printed and written."""

    period: int = 50  # iterations


@dataclass
class Config:
    """A whole run."""

    output_dir: Optional[str] = None  # null: runs/<name of the config file>
    seed: int = 0  # of the initial weights, the data order and everything random
    plugins: List[str] = field(default_factory=list)  # modules to import; they register augmentations (they run code!)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    augsub: AugsubConfig = field(default_factory=AugsubConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    log: LogConfig = field(default_factory=LogConfig)
