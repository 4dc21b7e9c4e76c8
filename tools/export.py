"""Give the model of a run to others: one plain timm file, a folder in the hub's layout, or ONNX.

    python tools/export.py runs/digits_vit/checkpoints/best.pt model.safetensors    # or .pth, .pt
    python tools/export.py runs/digits_vit/checkpoints/best.pt my_model             # a folder
    python tools/export.py runs/digits_vit/checkpoints/last.pt model.onnx --ema

Prints how to load it. The folder holds safetensors, config.json and a model card, as timm's models on the Hugging Face
hub do; timm loads it from the disk or, uploaded, from there. ONNX needs `pip install 'augsub[onnx]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from engine import atomic
from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import InputError, writing_errors
from tools.exporting.exported import Exported, load_exported
from tools.exporting.hub_folder import write_folder
from tools.exporting.onnx_file import write_onnx

SUFFIXES = {".safetensors", ".pt", ".pth"}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("checkpoint", type=as_path, help="last.pt, best.pt or iter_<n>.pt of a run")
    parser.add_argument(
        "target", type=as_path, help="what to write: *.safetensors, *.pt, *.pth, *.onnx, or a new folder"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="the averaged weights, or not (default: those by which the run chose its best checkpoint)",
    )
    parser.add_argument("--plugins", nargs="+", metavar="MODULE", default=[], help="that register the run's model")
    return parser.parse_args()


def export(checkpoint: Path, target: Path, ema: bool | None = None, plugins: Sequence[str] = ()) -> str:
    """Write the target, after timm's model has taken all weights; says which they are and how to load them.

    Raises:
        InputError: a checkpoint of something else, or another kind of target.
        RunError: the target cannot be written.
    """
    if target.suffix not in {*SUFFIXES, ".onnx", ""}:
        raise InputError(f"{target}: allowed is a name that ends in .safetensors, .pt, .pth or .onnx, or a new folder")
    exported = load_exported(checkpoint, ema, plugins)
    write = {"": write_folder, ".onnx": write_onnx}.get(target.suffix, write_weights)
    loading = write(target, exported)
    return f"{loading}  # the averaged weights" if exported.is_average else loading


def write_weights(file: Path, exported: Exported) -> str:
    """One file that `timm.create_model` loads strictly."""
    weights = exported.model.state_dict()
    with writing_errors(file), atomic.new_content(file) as opened:
        if file.suffix == ".safetensors":
            opened.write(save(weights, metadata={"format": "pt"}))
        else:
            torch.save(weights, opened)
    settings = "".join(f", {key}={value!r}" for key, value in exported.arguments.items())
    return f'timm.create_model("{exported.name}", checkpoint_path="{file}"{settings})'


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    arguments = parse_arguments()
    return exit_code(lambda: print(export(**vars(arguments))))


if __name__ == "__main__":
    sys.exit(main())
