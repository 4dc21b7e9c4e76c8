"""Write docs/recipes.md: every ImageNet recipe in configs/ with the paper's figures and what it costs.

python tools/recipes_page.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tabulate import tabulate

from engine.config import Config
from engine.config_file import CONFIGS, load_config
from engine.data.loaders import accumulation_for
from tools.analyze_model import analyze_configured

ROOT = CONFIGS.parent
PAGE = ROOT / "docs" / "recipes.md"
TEMPLATE = Path(__file__).with_name("recipes_page.md")
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
    complexity, _ = analyze_configured(CONFIGS / f"{name}.yaml")
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
    table = tabulate(rows, headers=HEADER, tablefmt="github", disable_numparse=True)
    return TEMPLATE.read_text().replace("TABLE", table)


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="default: docs/recipes.md")
    parser.parse_args().output.write_text(page())


if __name__ == "__main__":
    main()
