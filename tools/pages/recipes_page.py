"""Write docs/recipes.md: every ImageNet recipe in configs/ with the paper's figures and what it costs.

python tools/pages/recipes_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from engine.config import Config
from engine.config_file import CONFIGS, load_config
from engine.data.batch_sizes import accumulation_for
from engine.table import markdown_table
from tools.analysis import analyze_configured
from tools.pages.page import filled, run_page_tool

HEADER = (
    "config",
    "model",
    "pixels",
    "baseline",
    "MaskSub",
    "GPUs",
    "images per GPU",
    "accumulation",
    "global batch",
    "epochs",
    "training cost",
)


def recipes() -> dict[str, Config]:
    """Configurations with published figures, by name."""
    configs = {path.stem: load_config(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    return {name: config for name, config in configs.items() if config.published.baseline is not None}


def row(name: str, config: Config) -> list[object]:
    """One line of the table."""
    complexity, _ = analyze_configured(config)
    train, paper = config.train, config.published
    accumulation = accumulation_for(train, paper.gpus)
    return [
        f"[{name}](../configs/{name}.yaml)",
        config.model.name,
        config.data.image_size,
        paper.baseline,
        "-" if paper.masksub is None else paper.masksub,
        paper.gpus,
        train.global_batch // paper.gpus // accumulation,
        accumulation,
        train.global_batch,
        train.epochs,
        f"{complexity.training_cost:.3f}",
    ]


def page() -> str:
    """The page's text."""
    rows = [row(name, config) for name, config in recipes().items()]
    return filled(Path(__file__).with_suffix(".md"), table=markdown_table(HEADER, rows))


if __name__ == "__main__":
    sys.exit(run_page_tool(__doc__, "recipes.md", page))
