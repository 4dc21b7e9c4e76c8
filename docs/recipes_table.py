"""Print the table of docs/recipes.md: every ImageNet recipe with the paper's figures, its batches and its cost."""

from __future__ import annotations

from engine.config_file import CONFIGS, load_config
from engine.data.loaders import accumulation_for
from engine.text import markdown_table
from tools.analysis import analyze_configured

HEADER = (
    "config", "model", "pixels", "baseline", "MaskSub", "GPUs", "images per GPU", "accumulation", "global batch",
    "epochs", "training cost",
)  # fmt: skip


def rows() -> list[list[object]]:
    """A row for each configuration with published figures."""
    found = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        config = load_config(path)
        train, paper = config.train, config.published
        if paper.baseline is None:
            continue
        accumulation, complexity = accumulation_for(train, paper.gpus), analyze_configured(config)
        batches = [train.global_batch // paper.gpus // accumulation, accumulation, train.global_batch]
        found.append([
            f"[{path.stem}](../configs/{path.name})", config.model.name, config.data.image_size, paper.baseline,
            "-" if paper.masksub is None else paper.masksub, paper.gpus, *batches, train.epochs,
            f"{complexity.training_cost:.3f}",
        ])  # fmt: skip
    return found


if __name__ == "__main__":
    print(markdown_table(HEADER, rows()))
