"""Write docs/model_support.md: every timm class, its smallest model, and where augmentations act in it.

python tools/model_support.py
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import timm

from engine.command_line import exit_code
from models.support import support_of, support_table
from models.zoo import load_rows
from tools import pages

PAGE = pages.DOCS / "model_support.md"
TEXT = """# Model support

Written by `python tools/model_support.py` for timm {version}: {models} models of {rows} classes, with the smallest
model of each. `python tools/analyze_model.py --list-support 'vit_*'` prints the same for any models.

The columns on the right name the site where an augmentation acts; - means that the model does not offer it.
Other models of a class may offer more: only test_efficientnet has no residual connection to drop, for example.

- **tokens**: patch tokens are removed, the blocks compute only what is left ({tokens} classes).
- **stem**: features of the stem become a learnable mask token ({stem} classes).
- **image**: input pixels are set to zero, or cropped away ({image} classes are masked so).
- **drop_path**, **dropout**: the model's own modules get the rate, also where theirs is 0.

{table}
"""


def page() -> str:
    """The page's text."""
    rows = load_rows()
    support = [support_of(row.smallest) for row in rows]
    known = [(row.file, row.model_class, row.num_models, row.smallest) for row in rows]
    return TEXT.format(
        version=timm.__version__,
        models=sum(row.num_models for row in rows),
        rows=len(rows),
        table=support_table(["file", "class", "models", "smallest"], list(zip(known, support, strict=True))),
        **Counter(sites["masking"] for sites in support),
    )


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PAGE, help="default: docs/model_support.md")
    output = parser.parse_args().output
    return exit_code(lambda: pages.write(output, page()))


if __name__ == "__main__":
    sys.exit(main())
