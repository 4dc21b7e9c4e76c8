"""A model as ONNX, compared with what onnxruntime makes of it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from engine.errors import InputError, RunError, writing_errors
from tools.exporting.exported import Exported

TOLERANCE = 1e-3  # absolute, of logits: kernels add in other orders


def write_onnx(file: Path, exported: Exported) -> str:
    """Write the file for batches of any number of images; its logits were compared with the model's.

    Raises:
        InputError: a package is missing, or the exporter cannot take this model.
        RunError: the logits differ, or the file cannot be written.
    """
    try:
        import onnxruntime  # noqa: F401  (torch runs the program with it)
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as error:
        raise InputError(f"{file}: ONNX needs {error.name}: pip install 'augsub[onnx]'") from error
    images = exported.example(batch=3)
    with torch.no_grad():
        logits = exported.model(images)
    program = _converted(exported)
    (found,) = program(images)
    difference = (found - logits).abs().max().item()
    if not difference < TOLERANCE:
        raise RunError(f"{file}: onnxruntime's logits differ by {difference:.2g}, so nothing was written")
    with writing_errors(file):
        program.save(file)
    return (
        f'onnxruntime.InferenceSession("{file}").run(["logits"], {{"images": images}})  # images (B, C, H, W) float32; '
        f"logits within {difference:.0e} of timm's"
    )


def _converted(exported: Exported) -> torch.onnx.ONNXProgram:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.onnx.export(
                exported.model,
                (exported.example(batch=2),),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: batch},),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # whatever part of the model the exporter stumbles over
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"torch cannot convert {exported.name} to ONNX: {reason}") from error
