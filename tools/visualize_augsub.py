"""Draw what the main model and its sub-models see: masked cells, crops, dropped paths and activations.

    python tools/visualize_augsub.py                                          # three families, every augmentation
    python tools/visualize_augsub.py --model vit_small_patch16_224 --augsub masking --ratio 0.25 0.5 0.75
    python tools/visualize_augsub.py --model convnext_tiny --augsub random_crop+masking drop_path --images my_folder
    python tools/visualize_augsub.py --config configs/digits_swin.yaml model.drop_path_rate=0.1

Everything drawn was noted in a real forward of the sub-model. Weights are random: they change nothing of it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.utils.data import default_collate

import augsub
from engine.command_line import as_path, exit_code, located, tool_parser
from engine.config import TransformConfig
from engine.config_file import load_config
from engine.data.files import DecodingError, UnreadableImage, decode, is_image, natural_order, reason_of
from engine.data.source import IMAGENET, DataSource
from engine.data.transforms import Delivery, Normalise, build_delivery, build_eval_transform, normalisation
from engine.defaults import build_sub_models, complete
from engine.errors import InputError, input_errors
from engine.paths import readable
from engine.run_model import create_configured_model
from models.build import build_model, image_settings
from models.seen import Seen, see
from tools.analysis import data_source
from tools.seen_figure import Row, draw

FAMILIES = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnet18")
AUGMENTATIONS = ("masking", "random_crop", "random_crop+masking", "drop_path", "dropout")
BUNDLED = "flower.jpg"  # with scikit-learn
SAMPLES = 6  # draws for each image
SHOWN = 3  # images of a configuration's data, or of --images
NamedImage = tuple[str, Tensor]  # normalised, (C, H, W)
OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=.*", re.DOTALL)


@dataclass(frozen=True)
class Drawn:
    """A patched model and images for it; mean and std as they were normalised, if known."""

    name: str
    model: nn.Module
    images: list[NamedImage]
    mean: Sequence[float] | None
    std: Sequence[float] | None


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", help="the model and the sub-models of a configuration")
    what.add_argument(
        "--model", type=located, metavar="NAME", help="any timm model (default: one each of three families)"
    )
    parser.add_argument("--augsub", nargs="+", metavar="NAME", help="sub-models; + composes several into one")
    parser.add_argument("--ratio", nargs="+", type=float, metavar="R", help="one or more for each (default 0.5)")
    parser.add_argument(
        "--images", nargs="+", type=as_path, metavar="PATH", help="files or folders (default: a flower)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default 0)")
    parser.add_argument("--output", type=as_path, default=Path("what_the_sub_model_sees.png"), help="PNG file to write")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of --config, for example data.image_size=64")
    words = sys.argv[1:]
    overrides = [word for word in words if OVERRIDE.fullmatch(word)]  # --augsub and --images would swallow them
    return parser.parse_args([*(word for word in words if word not in overrides), "--", *overrides])


def configured(arguments: argparse.Namespace) -> tuple[Drawn, list[augsub.SubModelAugmentation]]:
    """The model of a configuration with images for it, and its sub-models."""
    config = complete(load_config(arguments.config, arguments.overrides))
    sub_models = [sub_model.augmentation for sub_model in build_sub_models(config)]
    source = data_source(config)
    model = augsub.patch(create_configured_model(config, source))
    if source is not IMAGENET and not arguments.images:
        deliver = build_delivery(config, torch.device("cpu"), is_training=False)
        return Drawn(config.model.name, model, held_out_images(source, deliver), *normalisation(config)), sub_models
    images = photographs(arguments.images, config.transform, config.data.image_size)
    if source.in_chans != len(config.transform.mean):
        grey = [(name, image.mean(dim=0, keepdim=True).expand(source.in_chans, -1, -1)) for name, image in images]
        return Drawn(config.model.name, model, grey, None, None), sub_models
    return Drawn(config.model.name, model, images, config.transform.mean, config.transform.std), sub_models


def named(name: str, files: Sequence[Path]) -> Drawn:
    """A timm model as timm builds it, with images as timm evaluates it."""
    with input_errors("--model"):
        settings = image_settings(name)
        model = build_model(name)
    if settings.image_size is None:
        raise InputError(f"--model {name}: timm lists no image size for it; give a configuration that does, --config")
    transform = TransformConfig(**settings.transform)
    return Drawn(name, model, photographs(files, transform, settings.image_size), transform.mean, transform.std)


def held_out_images(source: DataSource, deliver: Delivery) -> list[NamedImage]:
    """A few held-out images, from the first to the last."""
    indices = evenly(range(len(source.held_out)), SHOWN)
    try:
        images, _ = deliver(*default_collate([source.held_out[index] for index in indices]))
    except UnreadableImage as error:
        name, reason = error.args
        raise InputError(f"{name} cannot be read: {reason}") from error
    return [(f"held-out image {index}", image) for index, image in zip(indices, images, strict=True)]


def photographs(files: Sequence[Path], transform: TransformConfig, image_size: int) -> list[NamedImage]:
    """The user's image files, or the bundled one, as the main model sees them in evaluation."""
    to_bytes, normalise = build_eval_transform(transform, image_size), Normalise(transform.mean, transform.std)
    if not files:
        return [(BUNDLED, normalise(to_bytes(Image.fromarray(load_sample_image(BUNDLED)))))]
    return [(readable(file.name), normalise(to_bytes(read(file)))) for file in files]


def chosen(paths: Sequence[Path]) -> list[Path]:
    """A few of all image files, and of those directly in folders."""
    files = [file for path in paths for file in image_files(path)]
    if len(files) > SHOWN:
        print(f"--images: {SHOWN} of {len(files):,} images are drawn, evenly chosen")
    return evenly(files, SHOWN)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def image_files(path: Path) -> list[Path]:
    """The file itself, or the images directly in a folder."""
    if not path.is_dir():
        return [path]
    files = sorted((file for file in path.iterdir() if is_image(file.name)), key=lambda file: natural_order(file.name))
    if not files:
        raise InputError(f"--images {path}: the folder holds no image")
    return files


def read(file: Path) -> Image.Image:
    """The image in a file, as RGB."""
    try:
        with file.open("rb") as opened:
            return decode(opened)
    except (OSError, DecodingError) as error:
        raise InputError(f"--images {file}: cannot be read: {reason_of(error)}") from error


def build_augmentations(names: Sequence[str], ratios: Sequence[float]) -> list[augsub.SubModelAugmentation]:
    """Every name with every ratio; a + composes."""
    with input_errors("--augsub"):
        return [
            augsub.build([{"name": member, "ratio": ratio} for member in name.split("+")])
            for name, ratio in product(names, ratios)
        ]


def rows_of(subject: Drawn, sub_models: Sequence[augsub.SubModelAugmentation], seed: int, may_lack: bool) -> list[Row]:
    """One row for each image of a subject; `may_lack` leaves augmentations open that the model does not offer."""
    batch = torch.stack([image for _, image in subject.images]).repeat_interleave(SAMPLES, dim=0)
    offered = augsub.supports(subject.model)
    seen: list[Seen | None] = []
    for augmentation in sub_models:
        if may_lack and any(member.name not in offered for member in augmentation.members):
            seen.append(None)
            continue
        with input_errors(f"{augmentation} for {subject.name}"):
            seen.append(see(subject.model, batch, augmentation, seed))
    return [
        Row(f"{subject.name}\n{name}", slice(first, first + SAMPLES), batch, seen, subject.mean, subject.std)
        for first, (name, _) in zip(range(0, len(batch), SAMPLES), subject.images, strict=True)
    ]


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if arguments.overrides and not arguments.config:
        raise InputError(f"{arguments.overrides[0]}: key=value belongs to --config")
    if not 0 <= arguments.seed < 2**32:
        raise InputError(f"--seed {arguments.seed}: allowed is a whole number in [0, 2**32)")
    if arguments.output.suffix != ".png":
        raise InputError(f"--output {arguments.output}: the name must end in .png")
    if not arguments.output.parent.is_dir():
        raise InputError(f"--output {arguments.output}: no such folder")
    arguments.images = chosen(arguments.images or [])
    if arguments.config:
        subject, sub_models = configured(arguments)
        subjects = [subject]
        if arguments.augsub:
            sub_models = build_augmentations(arguments.augsub, arguments.ratio or [0.5])
        elif arguments.ratio:
            raise InputError("--ratio: belongs to --augsub; the sub-models of a configuration have their own")
        if not sub_models:
            raise InputError(f"{arguments.config}: augsub.sub_models is empty; --augsub says what to draw")
    else:
        sub_models = build_augmentations(arguments.augsub or AUGMENTATIONS, arguments.ratio or [0.5])
        subjects = [named(name, arguments.images) for name in ([arguments.model] if arguments.model else FAMILIES)]
    may_lack = not arguments.config and not (arguments.model and arguments.augsub)
    rows = [row for subject in subjects for row in rows_of(subject, sub_models, arguments.seed, may_lack)]
    draw(rows, sub_models, arguments.output)
    print(arguments.output)


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    return exit_code(partial(run, parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
