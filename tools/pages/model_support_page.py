"""Write docs/model_support.md: every timm class, its smallest model, and where augmentations act in it.

python tools/pages/model_support_page.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import timm

from models.support import support_of, support_table
from models.zoo import load_rows
from tools.pages.page import filled, run_page_tool


def page() -> str:
    """The page's text."""
    rows = load_rows()
    support = [support_of(row.smallest) for row in rows]
    known = [(row.file, row.model_class, row.num_models, row.smallest) for row in rows]
    return filled(
        Path(__file__).with_suffix(".md"),
        version=timm.__version__,
        models=sum(row.num_models for row in rows),
        rows=len(rows),
        table=support_table(["file", "class", "models", "smallest"], list(zip(known, support, strict=True))),
        **Counter(sites["masking"] for sites in support),
    )


if __name__ == "__main__":
    sys.exit(run_page_tool(__doc__, "model_support.md", page))
