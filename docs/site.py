"""The sources of the site, in `build/docs/`: the pages, and every file of the repository that they link to as a page.

python docs/site.py && zensical build --strict
"""

from __future__ import annotations

import posixpath
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS, SOURCE = ROOT / "docs", ROOT / "build" / "docs"
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(#[^)\s]*)?(?=\))")
FENCES = {".py": "python", ".yaml": "yaml", ".md": "markdown"}


def main() -> None:
    """Write them anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    shutil.copytree(DOCS, SOURCE, ignore=shutil.ignore_patterns("*.py", "__pycache__", "results"))
    for page in sorted(SOURCE.rglob("*.md")):
        page.write_text(LINK.sub(lambda link, page=page: _target(link, page), page.read_text()))


def _target(link: re.Match[str], page: Path) -> str:
    """Where a link of a page leads on the site; a file outside of docs/ becomes a page without places in it."""
    path = posixpath.normpath(posixpath.join("docs", page.relative_to(SOURCE).parent, link[1]))
    file, own = ROOT / path, SOURCE / "source" / f"{path}.md"
    if path.startswith("docs/") or not file.is_file():
        return link[0]
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(f"# {path}\n\n````{FENCES.get(file.suffix, 'text')}\n{file.read_text().rstrip()}\n````\n")
    return posixpath.relpath(own, page.parent)


if __name__ == "__main__":
    main()
