"""The wheel ships `augsub` alone; an editable install puts the whole checkout on the path."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "augsub" / "__init__.py").read_text()).group(1)

TRAIN = [
    "omegaconf>=2.3",
    "markdown",
    "matplotlib",
    "numpy",
    "scikit-learn",
    "scipy",
    "tabulate",
    "tensorboard",
    "tqdm",
]
TRAINERS = {
    "timm": ["timm>=1.0.24"],
    "lightning": ["lightning>=2.2"],
    "accelerate": ["accelerate>=1.0"],
    "transformers": ["transformers>=5.0", "accelerate>=1.0"],
}
ONNX = ["onnx", "onnxruntime", "onnxscript"]
PARQUET = ["pyarrow"]
LORA = ["peft"]
TIFF = ["tifffile"]
SHARDS = ["webdataset", "fsspec", "aiohttp"]
DEVELOP = [
    "mkdocstrings[python]",
    "mypy",
    "playwright",
    "pytest",
    "pytest-xdist",
    "ruff",
    "setuptools>=77",
    "zensical",
]

setup(
    name="augsub",
    version=VERSION,
    description="Sub-model augmentation (MaskSub) for timm models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"": "."},
    packages=find_packages(include=["augsub", "augsub.*"]),
    package_data={"augsub": ["py.typed"]},
    install_requires=["torch>=2.6", "timm>=1.0.20", "fvcore", "typing_extensions>=4.10"],
    extras_require={
        **TRAINERS,
        "onnx": ONNX,
        "parquet": PARQUET,
        "lora": LORA,
        "tiff": TIFF,
        "shards": SHARDS,
        "train": TRAIN,
        "dev": [
            *TRAIN,
            *sorted({package for packages in TRAINERS.values() for package in packages}),
            *ONNX,
            *PARQUET,
            *SHARDS,
            *LORA,
            *TIFF,
            *DEVELOP,
        ],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords=["timm", "pytorch", "image-classification", "data-augmentation", "masking"],
)
