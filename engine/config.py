"""The configuration schema: every field with its type, its default and what it means.

`engine/config_file.py` reads YAML files into it; `engine/defaults.py` builds a trainer from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Union  # noqa: UP035  (OmegaConf reads these at run time)

# ruff: noqa: UP006, UP007, UP045

UNTRANSFORMED = ("digits", "synthetic")  # values of data.dataset whose images are used as they are
# keys of transform that null leaves to the model
MODELS_TRANSFORM = ("mean", "std", "eval_crop", "eval_crop_mode", "eval_interpolation")


@dataclass
class ModelConfig:
    """A timm model. `num_classes` and `in_chans` come from the data."""

    name: str = "vit_base_patch16_224"  # any timm model, hf-hub:USER/MODEL or local-dir:FOLDER
    pretrained: Union[bool, str] = False  # timm's weights for that name; if_available: random ones where it is offline
    checkpoint: Optional[str] = None  # file to start from instead: ours, timm's, MAE's, CLIP's, DeiT's or Swin's
    pos_embed_antialias: bool = True  # when a position table of model.checkpoint is resized to another image size
    restart: List[str] = field(default_factory=list)  # modules that start anew although weights were loaded
    frozen: List[str] = field(default_factory=list)  # modules and parameters that stay as they are
    drop_path_rate: Optional[float] = None  # stochastic depth of the main model; null: timm's default
    drop_path_shape: str = "linear"  # linear: from 0 in the first block to the rate in the last | uniform
    drop_rate: Optional[float] = None  # dropout before the head; null: timm's default
    class_token_std: Optional[float] = None  # new class token, truncated normal; null: as timm has it
    head_std: Optional[float] = None  # new head, truncated normal weights; null: as timm or the checkpoint has it
    head_bias_bound: float = 0.0  # biases of a new head, uniform up to this bound
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else that timm.create_model takes


@dataclass
class DataConfig:
    """Where images come from. The number of classes is inferred."""

    dataset: str = "folder"  # folder | digits | synthetic | a timm dataset name (hfds/…, torch/…)
    root: Optional[str] = None  # folder with <train_split>/<class>/*.jpg and <eval_split>/<class>/*.jpg
    train_split: str = "train"  # folder or split name of the training images
    eval_split: str = "validation"  # of a folder any of val, valid, validation, eval, evaluation, test
    image_size: Optional[int] = 224  # pixels, square; null: the model's own
    repeats: int = 1  # repeated augmentation: copies of each drawn image in an epoch of the same length
    workers: int = 4  # loader processes per training process; 0 loads in the training process
    bad_files: int = 0  # unreadable image files that a run may skip; one more stops it
    allow_mismatch: bool = False  # go on although classes or images are not those that the weights come from
    synthetic_samples: int = 512  # images per split of the synthetic dataset


@dataclass
class TransformConfig:
    """timm's image transforms; digits and synthetic images are used as they are."""

    scale: List[float] = field(default_factory=lambda: [0.08, 1.0])  # area of the random resized crop
    ratio: List[float] = field(default_factory=lambda: [0.75, 4 / 3])  # its aspect ratio
    interpolation: str = "bicubic"  # of training images: bicubic | bilinear | random (of both)
    hflip: float = 0.5  # probability of a horizontal flip
    vflip: float = 0.0  # probability of a vertical flip
    color_jitter: Optional[float] = None  # strength; without effect where auto_augment is RandAugment
    auto_augment: Optional[str] = None  # timm's spelling: rand-m9-mstd0.5-inc1, 3a, augmix-m5-w4-d2 …
    random_erase: float = 0.0  # probability of erasing rectangles, after normalisation
    erase_mode: str = "pixel"  # what erased pixels become: pixel (normal noise) | rand (one colour) | const (0)
    erase_count: int = 1  # most rectangles in an image
    erase_area: List[float] = field(default_factory=lambda: [0.02, 1 / 3])  # of the image, all rectangles together
    erase_aspect: List[float] = field(default_factory=lambda: [0.3, 10 / 3])  # of a rectangle
    eval_crop: Optional[float] = 0.875  # share of the resized image's side that the centre crop keeps; null: model's
    eval_crop_mode: Optional[str] = "center"  # center | squash (both sides alike) | border (pad); null: the model's
    eval_interpolation: Optional[str] = "bicubic"  # bicubic | bilinear; null: the model's
    mean: Optional[List[float]] = field(default_factory=lambda: [0.485, 0.456, 0.406])  # ImageNet's; null: the model's
    std: Optional[List[float]] = field(default_factory=lambda: [0.229, 0.224, 0.225])  # ImageNet's; null: the model's


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
    global_batch: Optional[int] = 1024  # images per optimiser step, over all processes; null: follows from the data
    micro_batch: Optional[int] = None  # most images at once in one process: the published batch per GPU
    accumulation: Optional[int] = None  # micro-batches per optimiser step; null: as few as micro_batch allows
    amp: str = "off"  # off | bf16 | fp16 (with gradient scaling, on GPUs; a CPU runs float32 instead and says so)
    loss_scale: float = 65536.0  # fp16: the loss scale at the start
    loss_scale_window: int = 2000  # fp16: steps without overflow after which the loss scale doubles
    clip_norm: Optional[float] = None  # global L2 norm of the gradient
    compile: bool = False  # torch.compile for the main and the sub-model
    channels_last: bool = False  # memory layout of images and of convolutions' weights: faster on GPUs with amp
    grad_checkpointing: bool = False  # recompute activations in backward: less memory, about a third more computation
    profile: bool = False  # trace.json of a few early steps, and what they spend most time on, as a table in the log


@dataclass
class OptimizerConfig:
    """A timm optimiser. Biases, 1-D tensors and what the model names itself have no weight decay."""

    name: str = "adamw"  # any name of timm.optim.list_optimizers()
    lr: float = 1e-3  # peak
    lr_reference_batch: Optional[int] = None  # lr is for that global batch and grows with it; null: lr is absolute
    layer_decay: Optional[float] = None  # lr of each layer in parts of the next one's, counted from the head
    full_lr: List[str] = field(default_factory=list)  # modules that learn at the head's rate under layer_decay
    weight_decay: float = 0.05  # decoupled or not, as the optimiser has it
    betas: Optional[List[float]] = None  # null: the optimiser's default
    eps: Optional[float] = None  # null: the optimiser's default
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else the optimiser takes


@dataclass
class ScheduleConfig:
    """Linear warmup, then half a cosine; `engine/schedule.py` has the formula."""

    unit: str = "iteration"  # iteration | epoch: how often the learning rate changes
    warmup_epochs: float = 5  # linear from warmup_lr
    warmup_lr: float = 1e-6  # learning rate of the first step
    warmup_prefix: bool = False  # whether the cosine starts after the warmup instead of under it
    warmup_reaches_peak: bool = False  # whether the last step of the warmup, not the next one, has the peak
    min_lr: float = 1e-5  # learning rate at the end of the cosine
    cooldown_epochs: float = 0  # last epochs of the run, all at min_lr
    lag: int = 0  # iterations or epochs by which the whole curve comes late
    scale_with_batch: bool = False  # whether warmup_lr and min_lr grow with the batch as optimizer.lr does


@dataclass
class LossConfig:
    """Loss of the main model."""

    name: str = "cross_entropy"  # cross_entropy | bce
    smoothing: float = 0.0  # label smoothing, in [0, 1)
    target_threshold: Optional[float] = None  # bce: mixed targets above it become 1, others 0


@dataclass
class MixupConfig:
    """timm's Mixup and CutMix, on each micro-batch of a process. Both alphas 0: off."""

    mixup_alpha: float = 0.0  # Beta(alpha, alpha) of the mixing weight
    cutmix_alpha: float = 0.0  # Beta(alpha, alpha) of the kept area
    prob: float = 1.0  # probability that a batch is mixed
    switch_prob: float = 0.5  # probability of CutMix where both are on
    mode: str = "batch"  # batch | pair | elem
    cutmix_minmax: Optional[List[float]] = None  # CutMix with sides between these shares of the image's instead
    correct_lam: bool = True  # whether the label's weight follows a CutMix box that the border cut
    integer_pixels: bool = False  # round mixed pixels to whole numbers of 0 to 255, as mixing before normalisation does
    off_epoch: Optional[int] = None  # from this epoch on images are not mixed


@dataclass
class EmaConfig:
    """Exponential moving average of the weights, evaluated beside them as ema_top1."""

    enabled: bool = False  # costs one copy of the model
    decay: float = 0.9999  # share of the old average that stays per step
    warmup: bool = False  # ramp the decay up from 0, for short runs
    evaluate: bool = True  # false keeps the average in the checkpoints only


@dataclass
class EvaluationConfig:
    """Accuracy on held-out images."""

    period: int = 1  # epochs between evaluations; the last epoch is always evaluated
    batch: int = 256  # images at once per process
    checkpoint: Optional[str] = None  # what --eval-only evaluates; null: the run's last one, else where it starts
    metric: str = "top1"  # what makes a checkpoint the best one: top1 | ema_top1


@dataclass
class CheckpointConfig:
    """When the state of the run is saved. `last`, `previous` and `best` exist beside the numbered ones."""

    period: Optional[int] = None  # iterations; null: one epoch
    every_minutes: Optional[float] = None  # also after that much time
    keep: int = 2  # numbered checkpoints that stay
    background: bool = True  # write while training goes on, from a copy in the CPU's memory; fsdp2 always waits


@dataclass
class DistributedConfig:
    """Several processes, started by torchrun."""

    strategy: str = "ddp"  # ddp: every process has the whole model | fsdp2: parameters and states are divided
    reshard_after_forward: bool = True  # fsdp2: gather parameters again in backward: less memory, more traffic
    sync_batchnorm: bool = False  # BatchNorm over the images of all processes, on GPUs
    timeout_minutes: float = 10.0  # after which a hung collective ends the run


@dataclass
class LogConfig:
    """How often losses are read from the device, printed and written, and where to beside the run's own files."""

    period: int = 50  # iterations
    csv: bool = False  # metrics.csv, the records of metrics.jsonl as a table
    wandb: Optional[str] = None  # project of Weights & Biases, whose package must be installed; null: nothing is sent


@dataclass
class PublishedConfig:
    """What the paper reports of the recipe, for the documentation and the table at the end of a run."""

    gpus: Optional[int] = None  # they trained on that many
    baseline: Optional[float] = None  # top-1 in percent without sub-model
    masksub: Optional[float] = None  # top-1 in percent with MaskSub


@dataclass
class Config:
    """A whole run."""

    output_dir: Optional[str] = None  # null: runs/<name of the config file>
    seed: int = 0  # of the initial weights, the data order and everything random
    plugins: List[str] = field(default_factory=list)  # modules to import, with augmentations and hooks (they run code!)
    hooks: List[Any] = field(default_factory=list)  # of the plugins: [{name: MyHook, …its arguments}, …]
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
    published: PublishedConfig = field(default_factory=PublishedConfig)
