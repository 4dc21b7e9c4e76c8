"""What a measured number depends on."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import timm
import torch


def machine(is_gpu: bool) -> dict[str, str]:
    """Device, cores and versions; the device is the GPU or the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = processor[1].strip() if processor else platform.processor()
    return {
        "device": torch.cuda.get_device_name() if is_gpu else name,
        "cores": str(os.cpu_count()),
        **{"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
    }
