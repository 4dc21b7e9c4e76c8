"""Make one plain timm file of a run's checkpoint, a file or a folder of shards.

python tools/export.py runs/digits_vit/checkpoints/best.pt model.safetensors
python tools/export.py runs/digits_vit/checkpoints/last.pt average.pth --ema
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save
from torch import Tensor

from engine import atomic
from engine.checkpoint.reading import load
from engine.command_line import exit_code
from engine.errors import InputError, input_errors, writing_errors
from models.build import create_model


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="last.pt, best.pt or iter_<n>.pt of a run")
    parser.add_argument("file", type=Path, help="what to write: *.safetensors, *.pt or *.pth")
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the trained ones")
    return parser.parse_args()


def plain_weights(state: dict[str, Any], ema: bool, source: Path) -> dict[str, Tensor]:
    """The state dict of the timm model, without the mask token, which only sub-models use.

    Raises:
        InputError: the checkpoint is not one of a run, or has no averaged weights.
    """
    if "model" not in state or "model_name" not in state:
        raise InputError(f"checkpoint {source} is not one of a run: it has {', '.join(map(str, [*state][:5]))}")
    if ema and "ema" not in state["hooks"]:
        raise InputError(f"--ema: checkpoint {source} has no averaged weights, its run had ema.enabled = false")
    weights = state["hooks"]["ema"]["model"] if ema else state["model"]
    return {name: tensor.contiguous() for name, tensor in weights.items() if name != "mask_token"}


def model_arguments(state: dict[str, Any]) -> dict[str, Any]:
    """What makes the model of a run with `models.build.create_model`, beside its name."""
    config = yaml.safe_load(state["config"])
    return {**state["data"], "image_size": config["data"]["image_size"], **config["model"]["kwargs"]}


def export(checkpoint: Path, file: Path, ema: bool) -> str:
    """Write the file, after timm's model has taken all of it; says how to load it.

    Raises:
        InputError: a checkpoint of something else, or another kind of file.
        RunError: the file cannot be written.
    """
    if file.suffix not in (".safetensors", ".pt", ".pth"):
        raise InputError(f"{file}: the name must end in .safetensors, .pt or .pth")
    state = load(checkpoint)
    weights, name, arguments = plain_weights(state, ema, checkpoint), state["model_name"], model_arguments(state)
    with input_errors(f"checkpoint {checkpoint}"):
        model = create_model(name, **arguments)
        model.load_state_dict(weights)
    image_size = arguments.pop("image_size")
    if getattr(getattr(model, "patch_embed", None), "img_size", None) is not None:
        arguments["img_size"] = image_size
    with writing_errors(file), atomic.new_content(file) as opened:
        if file.suffix == ".safetensors":
            opened.write(save(weights, metadata={"format": "pt"}))
        else:
            torch.save(weights, opened)
    settings = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return f'timm.create_model("{name}", checkpoint_path="{file}"{settings})'


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    arguments = parse_arguments()
    return exit_code(lambda: print(export(arguments.checkpoint, arguments.file, arguments.ema)))


if __name__ == "__main__":
    sys.exit(main())
