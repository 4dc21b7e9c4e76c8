"""The configuration schema: every key with its type, which values it may have, its default and what it means.

`engine/config_file.py` reads YAML files into it; `engine/defaults.py` completes it and builds a trainer from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import (  # noqa: UP035  (OmegaConf reads these at run time)
    Annotated,
    Any,
    Dict,
    List,
    Optional,
    Union,
    get_args,
    get_type_hints,
)

from engine.config_rules import (
    BETAS,
    MINMAX,
    SEED,
    SIZE,
    WANDB,
    Count,
    Extendable,
    File,
    Interval,
    Mark,
    NotNegative,
    NotNegativeInt,
    Part,
    Positive,
    Probability,
    Rule,
    Share,
    Tunable,
    at_least,
    channels,
    increasing,
    one_of,
)

# ruff: noqa: UP006, UP007, UP045

UNTRANSFORMED = {"digits": 1, "synthetic": 3}  # values of data.dataset whose images are used as they are: channels
RGB = 3  # channels of an image where nobody says otherwise
PHOTOGRAPHS = (1, RGB)  # numbers of channels for which there are timm's transforms of colours
# The names under which a split is looked for: timm's, and test
SPLIT_NAMES = (("train", "training"), ("val", "valid", "validation", "eval", "evaluation", "test"))
OF_SEVERAL_LABELS = ("map", "f1_macro", "f1_micro")  # values of evaluation.metric where an image may have several
COMPILE_MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # torch's
METRICS = ("top1", "top5", "balanced_accuracy", "eval_loss", *OF_SEVERAL_LABELS)
COLUMNS = ("path", "labels", "split", "image", "label")  # that data.columns may rename
SCHEDULES = ("cosine", "linear", "constant", "step", "multistep", "polynomial", "wsd", "one_cycle", "plateau")
# keys of transform that null leaves to the model
MODELS_TRANSFORM = ("mean", "std", "eval_crop", "eval_crop_mode", "eval_interpolation")
# what null leaves to the model or to the data
FILLED_IN = ("data.image_size", "train.global_batch", *(f"transform.{key}" for key in MODELS_TRANSFORM))


class Section:
    """Keys with values. What `freeze` has made read-only stays as it is on its way through the engine."""

    def freeze(self) -> None:
        """Let nobody set a key any more, neither here nor in the sections inside."""
        for value in vars(self).values():
            if isinstance(value, Section):
                value.freeze()
        self.__dict__["is_frozen"] = True

    def __setattr__(self, key: str, value: Any) -> None:
        if self.__dict__.get("is_frozen"):
            raise dataclasses.FrozenInstanceError(f"{type(self).__name__}.{key}: the configuration is complete")
        super().__setattr__(key, value)


@dataclass
class LoraConfig(Section):
    """Low-rank adapters of linear layers: they and the head learn, all else stays. Exported models have them merged."""

    rank: Count = 8  # of the adapters
    targets: List[str] = field(default_factory=list)  # ends of the layers' names: qkv, proj, fc1 …; empty: no adapters


@dataclass
class ModelConfig(Section):
    """A timm model. `num_classes` and `in_chans` come from the data."""

    name: File = "vit_base_patch16_224"  # any timm model, hf-hub:USER/MODEL or local-dir:FOLDER
    # timm's weights for that name; if_available: random ones where it is offline
    pretrained: Tunable[Annotated[Union[bool, str], one_of(True, False, "if_available")]] = False
    # file to start from instead: ours, timm's, MAE's, CLIP's, DeiT's or Swin's
    checkpoint: Tunable[Optional[File]] = None
    pos_embed_antialias: bool = True  # when a position table of model.checkpoint is resized to another image size
    restart: List[str] = field(default_factory=list)  # modules that start anew although weights were loaded
    # modules and parameters that stay as they are; patterns (blocks.[0-5].*); all_but_head
    frozen: List[str] = field(default_factory=list)
    lora: LoraConfig = field(default_factory=LoraConfig)
    drop_path_rate: Optional[Share] = None  # stochastic depth of the main model; null: timm's default
    # linear: from 0 in the first block to the rate in the last | uniform
    drop_path_shape: Annotated[str, one_of("linear", "uniform")] = "linear"
    drop_rate: Optional[Share] = None  # dropout before the head; null: timm's default
    class_token_std: Optional[Positive] = None  # new class token, truncated normal; null: as timm has it
    head_std: Optional[Positive] = None  # new head, truncated normal weights; null: as timm or the checkpoint has it
    head_bias_bound: NotNegative = 0.0  # biases of a new head, uniform up to this bound
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else that timm.create_model takes


@dataclass
class DataConfig(Section):
    """Where images come from. The number of classes is inferred."""

    # folder | table | wds (tar files) | parquet | digits | synthetic | a timm dataset name (hfds/…, torch/…)
    dataset: str = "folder"
    root: Tunable[Optional[File]] = None  # folder with <train_split>/<class>/*.jpg and <eval_split>/<class>/*.jpg
    train_split: str = "train"  # folder or split name of the training images; of wds and parquet also files {00..99}
    eval_split: str = "validation"  # of a folder any of val, valid, validation, eval, evaluation, test
    table: Tunable[Optional[File]] = None  # of dataset=table: a CSV or Parquet file with a row for each image
    # a table's columns, where they are not called path, labels and split; labels may list columns with 0 and 1.
    # Of Parquet data its columns, where they are not called image and label
    columns: Dict[str, Any] = field(default_factory=dict)
    label_separator: str = "|"  # between the labels of an image in a table
    classes: List[str] = field(default_factory=list)  # of all there are those to use, in their order; empty: all
    # of each class's training images, held out in place of eval_split: always the same ones, whatever the seed
    validation_share: Share = 0.0
    images_per_class: Optional[Count] = None  # train on so many at most, always the same ones; null: on all
    # of files: 3, red, green and blue | 1, grey | any other number, that of each file (TIFF, PNG with transparency);
    # null: 3, of other data what they have
    in_chans: Optional[Count] = None
    image_size: Annotated[Any, SIZE] = 224  # pixels of a square's side, or [height, width]; null: the model's own
    # null: each image once in an epoch | balanced: drawn, each class as often | sqrt: by the root of the classes' sizes
    sampling: Annotated[Optional[str], one_of("balanced", "sqrt")] = None
    repeats: Count = 1  # repeated augmentation: copies of each drawn image in an epoch of the same length
    # ram: all images are decoded once, before training, and kept
    cache: Tunable[Annotated[Optional[str], one_of("ram")]] = None
    # decode JPEG files at 1/2, 1/4 or 1/8 of their size where a crop needs no more: faster, other pixels
    draft_decoding: bool = False
    exif_orientation: bool = False  # turn photographs as their camera says; timm does not
    max_megapixels: Tunable[Positive] = 179.0  # larger images count as bad files; Pillow's own limit
    patience: Tunable[Positive] = 60.0  # seconds without a byte after which a shard's URL or pipe is tried again
    workers: Tunable[NotNegativeInt] = 4  # loader processes per training process; 0 loads in the training process
    bad_files: Tunable[NotNegativeInt] = 0  # unreadable image files that a run may skip; one more stops it
    allow_mismatch: Tunable[bool] = False  # go on although classes or images are not those that the weights come from
    synthetic_samples: Count = 512  # images per split of the synthetic dataset


@dataclass
class TransformConfig(Section):
    """timm's image transforms; digits and synthetic images are used as they are."""

    scale: Interval = field(default_factory=lambda: [0.08, 1.0])  # area of the random resized crop
    ratio: Interval = field(default_factory=lambda: [0.75, 4 / 3])  # its aspect ratio
    # of training images: bicubic | bilinear | random (of both)
    interpolation: Annotated[str, one_of("bicubic", "bilinear", "random")] = "bicubic"
    hflip: Probability = 0.5  # probability of a horizontal flip
    vflip: Probability = 0.0  # probability of a vertical flip
    color_jitter: Optional[NotNegative] = None  # strength; without effect where auto_augment is RandAugment
    auto_augment: Optional[str] = None  # timm's spelling: rand-m9-mstd0.5-inc1, 3a, augmix-m5-w4-d2 …
    random_erase: Probability = 0.0  # probability of erasing rectangles, after normalisation
    # what erased pixels become: pixel (normal noise) | rand (one colour) | const (0)
    erase_mode: Annotated[str, one_of("pixel", "rand", "const")] = "pixel"
    erase_count: Count = 1  # most rectangles in an image
    # of the image, all rectangles together
    erase_area: Annotated[List[float], increasing(0, 1, "in (0, 1]")] = field(default_factory=lambda: [0.02, 1 / 3])
    erase_aspect: Interval = field(default_factory=lambda: [0.3, 10 / 3])  # of a rectangle
    eval_crop: Optional[Part] = 0.875  # share of the resized image's side that the centre crop keeps; null: model's
    # center | squash (both sides alike) | border (pad); null: the model's
    eval_crop_mode: Annotated[Optional[str], one_of("center", "squash", "border")] = "center"
    # bicubic | bilinear; null: the model's
    eval_interpolation: Annotated[Optional[str], one_of("bicubic", "bilinear")] = "bicubic"
    # of each channel, of pixels between 0 and 1; of other channels than red, green and blue three stand for their
    # average. ImageNet's; null: the model's
    mean: Annotated[Optional[List[float]], channels(-math.inf, "numbers")] = field(
        default_factory=lambda: [0.485, 0.456, 0.406]
    )
    # likewise
    std: Annotated[Optional[List[float]], channels(0, "numbers above 0")] = field(
        default_factory=lambda: [0.229, 0.224, 0.225]
    )


@dataclass
class SubModelConfig(Section):
    """One sub-model: augmentations applied in order, and the weight of its loss.

    A ratio or the weight may go in a line over the first epochs: {from: 0.1, to: 0.5, epochs: 20}.
    """

    weight: Any = 0.5  # of its loss
    share: Part = 1.0  # of the images of a micro-batch that it sees
    learn_from: str = "main"  # main | labels | ema | teacher | augmented_teacher | a registered lesson
    augmentations: List[Any] = field(default_factory=list)  # [{name: masking, ratio: 0.5}, …]


@dataclass
class TeacherConfig(Section):
    """Another model from which sub-models learn. It has the classes of the data and sees the same images."""

    name: Optional[File] = None  # any timm model; null: there is none
    checkpoint: Tunable[Optional[File]] = None  # file with its weights; null: timm's pretrained ones
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else that timm.create_model takes


@dataclass
class AugsubConfig(Section):
    """loss = main_weight * main + sum of weight * sub. `sub_models: []` is plain training."""

    objective: str = "masksub"  # masksub | cosub | rdrop (sub-models that teach each other) | a registered objective
    main_weight: NotNegative = 0.5  # of the loss on the labels; masksub
    alpha: NotNegative = 1.0  # of the divergences; rdrop
    # sub-models' forwards update BatchNorm's running statistics, as the paper's do; false: the main model's alone
    update_batch_norm: bool = True
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sub_models: List[SubModelConfig] = field(default_factory=list)  # any number, each one more forward


@dataclass
class TrainConfig(Section):
    """How long, how much at once, and in which precision."""

    epochs: Extendable[Count] = 300  # the schedule runs over these; iterations are derived
    # --resume goes on although epochs, global_batch or schedule are others: with all of the state, exact from there
    extend: Tunable[bool] = False
    max_iters: Tunable[Optional[Count]] = None  # stop earlier, after this many optimiser steps
    # images per optimiser step, over all processes; null: follows from the data
    global_batch: Extendable[Optional[Count]] = 1024
    micro_batch: Tunable[Optional[Count]] = None  # most images at once in one process: the published batch per GPU
    # micro-batches per optimiser step; null: as few as micro_batch allows
    accumulation: Tunable[Optional[Count]] = None
    # off | bf16 | fp16 (with gradient scaling, on GPUs; a CPU runs float32 instead and says so)
    amp: Tunable[Annotated[str, one_of("off", "bf16", "fp16")]] = "off"
    loss_scale: Annotated[float, at_least(1)] = 65536.0  # fp16: the loss scale at the start
    loss_scale_window: Count = 2000  # fp16: steps without overflow after which the loss scale doubles
    clip_norm: Tunable[Optional[Positive]] = None  # global L2 norm of the gradient
    # torch.compile for the main and the sub-model: true, or a mode: reduce-overhead (CUDA graphs) | max-autotune |
    # max-autotune-no-cudagraphs
    compile: Tunable[Annotated[Union[bool, str], one_of(False, True, *COMPILE_MODES)]] = False
    # memory layout of images and of convolutions' weights: faster on GPUs with amp
    channels_last: Tunable[bool] = False
    # the model's stochastic depth computes no branch that it drops: int(B * (1 - rate)) of B images have one
    skip_dropped_paths: bool = False
    # recompute activations in backward: less memory, about a third more computation
    grad_checkpointing: Tunable[bool] = False
    # trace.json of a few early steps, and what they spend most time on, as a table in the log
    profile: Tunable[bool] = False


@dataclass
class OptimizerConfig(Section):
    """A timm optimiser. Biases, 1-D tensors and what the model names itself have no weight decay."""

    name: str = "adamw"  # any name of timm.optim.list_optimizers()
    lr: Tunable[Positive] = 1e-3  # peak
    lr_reference_batch: Optional[Count] = None  # lr is for that global batch and grows with it; null: lr is absolute
    layer_decay: Optional[Part] = None  # lr of each layer in parts of the next one's, counted from the head
    full_lr: List[str] = field(default_factory=list)  # modules that learn at the head's rate under layer_decay
    weight_decay: NotNegative = 0.05  # decoupled or not, as the optimiser has it
    betas: Annotated[Optional[List[float]], BETAS] = None  # null: the optimiser's default
    eps: Optional[Positive] = None  # null: the optimiser's default
    kwargs: Dict[str, Any] = field(default_factory=dict)  # anything else the optimiser takes


@dataclass
class ScheduleConfig(Section):
    """Linear warmup, then a curve from optimizer.lr to min_lr; `engine/optim.py` has the formulas."""

    name: Annotated[str, one_of(*SCHEDULES)] = "cosine"  # cosine | linear | constant | step | multistep | …
    power: Positive = 1.0  # polynomial: of what is left of the way
    decay_epochs: List[float] = field(default_factory=list)  # step: each so many epochs | multistep: at these epochs
    # step, multistep, plateau: what stays of the learning rate
    decay_rate: Annotated[float, Rule(lambda value: 0 < value < 1, "in (0, 1)")] = 0.1
    decay_share: Part = 0.2  # wsd: of the way after the warmup, on which the learning rate falls
    patience: Count = 2  # plateau: evaluations without a better evaluation.metric before the learning rate falls
    # iteration | epoch: how often the learning rate changes
    unit: Annotated[str, one_of("iteration", "epoch")] = "iteration"
    warmup_epochs: NotNegative = 5  # linear from warmup_lr
    warmup_lr: NotNegative = 1e-6  # learning rate of the first step
    warmup_prefix: bool = False  # whether the cosine starts after the warmup instead of under it
    warmup_reaches_peak: bool = False  # whether the last step of the warmup, not the next one, has the peak
    min_lr: NotNegative = 1e-5  # learning rate at the end of the cosine
    cooldown_epochs: NotNegative = 0  # last epochs of the run, all at min_lr
    lag: NotNegativeInt = 0  # iterations or epochs by which the whole curve comes late
    scale_with_batch: bool = False  # whether warmup_lr and min_lr grow with the batch as optimizer.lr does


@dataclass
class LossConfig(Section):
    """Loss of the main model."""

    name: Annotated[str, one_of("cross_entropy", "bce")] = "cross_entropy"  # cross_entropy | bce
    smoothing: Share = 0.0  # label smoothing, in [0, 1)
    target_threshold: Optional[Share] = None  # bce: mixed targets above it become 1, others 0
    # of the main model's loss: balanced (the rarer, the more) | {name: weight}, others 1; null: all 1
    class_weights: Any = None


@dataclass
class MixupConfig(Section):
    """timm's Mixup and CutMix, on each micro-batch of a process. Both alphas 0: off."""

    mixup_alpha: NotNegative = 0.0  # Beta(alpha, alpha) of the mixing weight
    cutmix_alpha: NotNegative = 0.0  # Beta(alpha, alpha) of the kept area
    prob: Probability = 1.0  # probability that a batch is mixed
    switch_prob: Probability = 0.5  # probability of CutMix where both are on
    mode: Annotated[str, one_of("batch", "pair", "elem")] = "batch"  # batch | pair | elem
    # CutMix with sides between these shares of the image's instead
    cutmix_minmax: Annotated[Optional[List[float]], MINMAX] = None
    correct_lam: bool = True  # whether the label's weight follows a CutMix box that the border cut
    integer_pixels: bool = False  # round mixed pixels to whole numbers of 0 to 255, as mixing before normalisation does
    off_epoch: Optional[NotNegativeInt] = None  # from this epoch on images are not mixed


@dataclass
class EmaConfig(Section):
    """Exponential moving average of the weights, evaluated beside them as ema_top1."""

    enabled: bool = False  # costs one copy of the model
    decay: Share = 0.9999  # share of the old average that stays per step
    warmup: bool = False  # ramp the decay up from 0, for short runs
    evaluate: bool = True  # false keeps the average in the checkpoints only


@dataclass
class EvaluationConfig(Section):
    """Accuracy on held-out images."""

    period: Tunable[Count] = 1  # epochs between evaluations; the last epoch is always evaluated
    patience: Tunable[Optional[Count]] = None  # end the run after so many evaluations without a better metric
    batch: Tunable[Count] = 256  # images at once per process
    # what --eval-only evaluates; null: the run's last one, else where it starts
    checkpoint: Tunable[Optional[File]] = None
    # what makes a checkpoint the best one: accuracy of all images (top1, top5), or the mean over classes, or the lowest
    # loss (eval_loss); of images with several labels map (mean average precision), f1_macro, f1_micro; ema_…: of the
    # average
    metric: Annotated[str, one_of(*METRICS, *(f"ema_{name}" for name in METRICS))] = "top1"


@dataclass
class CheckpointConfig(Section):
    """When the state of the run is saved. `last`, `previous` and `best` exist beside the numbered ones."""

    period: Optional[Count] = None  # iterations; null: one epoch
    every_minutes: Optional[Positive] = None  # also after that much time
    keep: NotNegativeInt = 2  # numbered checkpoints that stay
    background: bool = True  # write while training goes on, from a copy in the CPU's memory


@dataclass
class DistributedConfig(Section):
    """Several processes, started by torchrun."""

    # ddp: every process has the whole model | fsdp2: parameters and states are divided
    strategy: Annotated[str, one_of("ddp", "fsdp2")] = "ddp"
    reshard_after_forward: bool = True  # fsdp2: gather parameters again in backward: less memory, more traffic
    # in which gradients travel; bf16: half the bytes
    reduce_dtype: Annotated[str, one_of("float32", "bf16")] = "float32"
    sync_batchnorm: bool = False  # BatchNorm over the images of all processes, on GPUs
    timeout_minutes: Positive = 10.0  # after which a hung collective ends the run


@dataclass
class LogConfig(Section):
    """How often losses are read from the device, printed and written, and where to beside the run's own files."""

    period: Count = 50  # iterations
    csv: bool = False  # metrics.csv, the records of metrics.jsonl as a table
    # project of Weights & Biases, whose package must be installed; null: nothing is sent
    wandb: Annotated[Optional[str], WANDB] = None


@dataclass
class PublishedConfig(Section):
    """What the paper reports of the recipe, for the documentation and the table at the end of a run."""

    gpus: Optional[int] = None  # they trained on that many
    baseline: Optional[float] = None  # top-1 in percent without sub-model
    masksub: Optional[float] = None  # top-1 in percent with MaskSub


@dataclass
class Config(Section):
    """A whole run."""

    output_dir: Tunable[Optional[File]] = None  # null: runs/<name of the config file>
    seed: Annotated[int, SEED] = 0  # of the initial weights, the data order and everything random
    # modules to import, with augmentations and hooks (they run code!)
    plugins: Tunable[List[str]] = field(default_factory=list)
    hooks: Tunable[List[Any]] = field(default_factory=list)  # of the plugins: [{name: MyHook, …its arguments}, …]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    augsub: AugsubConfig = field(default_factory=AugsubConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: Extendable[ScheduleConfig] = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    ema: Tunable[EmaConfig] = field(default_factory=EmaConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: Tunable[CheckpointConfig] = field(default_factory=CheckpointConfig)
    distributed: Tunable[DistributedConfig] = field(default_factory=DistributedConfig)
    log: Tunable[LogConfig] = field(default_factory=LogConfig)
    published: Tunable[PublishedConfig] = field(default_factory=PublishedConfig)


@cache
def notes(section: type[Section]) -> dict[str, tuple[Rule | Mark, ...]]:
    """Rules and marks of the keys of a section."""
    return {key: tuple(_notes(hint)) for key, hint in get_type_hints(section, include_extras=True).items()}


def _notes(hint: Any) -> Iterator[Rule | Mark]:
    yield from getattr(hint, "__metadata__", ())
    for inner in get_args(hint):
        yield from _notes(inner)


def marked(mark: Mark, section: type[Section] | None = None, prefix: str = "") -> list[str]:
    """Keys with a mark, such as "data.root"; a section whose keys all have it is "ema.*"."""
    found = []
    for key, hint in get_type_hints(section or Config).items():
        is_section = isinstance(hint, type) and issubclass(hint, Section)
        if mark in notes(section or Config)[key]:
            found.append(f"{prefix}{key}.*" if is_section else prefix + key)
        elif is_section:
            found += marked(mark, hint, f"{prefix}{key}.")
    return found


def image_channels(data: DataConfig) -> int:
    """Channels of an image in a file, as it is read."""
    return data.in_chans or RGB


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width in pixels of what `data.image_size` says."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def has_several_labels(config: Config) -> bool:
    """Whether an image may have several labels, or none: `evaluation.metric` says so."""
    return config.evaluation.metric.removeprefix("ema_") in OF_SEVERAL_LABELS
