"""MkDocs hook: a page may link to any file of the repository, which then is a page of the site too."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=\))")
FENCES = {".py": "python", ".yaml": "yaml", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside of docs/ that a page links to."""
    for page in files.documentation_pages():
        for target in filter(None, (_outside(link, page.src_uri) for link in LINK.findall(page.content_string))):
            if files.get_file_from_path(_page_of(target)) is None:
                files.append(_as_page(target, config))
    return files


def on_page_markdown(markdown: str, page: Any, **unused: Any) -> str:
    """Let links to such files lead to their pages."""

    def replace(match: re.Match[str]) -> str:
        target = _outside(match[1], page.file.src_uri)
        here = posixpath.dirname(page.file.src_uri)
        return match[1] if target is None else posixpath.relpath(_page_of(target), here or ".")

    return LINK.sub(replace, markdown)


def _outside(link: str, page: str) -> str | None:
    """Path of the linked file in the repository; None if it is a part of the documentation."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    is_documentation = path.startswith("docs/")
    return path if not is_documentation and (ROOT / path).is_file() else None


def _as_page(target: str, config: Any) -> File:
    return File.generated(config, _page_of(target), content=_show(target), inclusion=InclusionLevel.NOT_IN_NAV)


def _page_of(target: str) -> str:
    return f"source/{target}.md"


def _show(target: str) -> str:
    path = ROOT / target
    return f"# {target}\n\n```{FENCES.get(path.suffix, 'text')}\n{path.read_text().rstrip()}\n```\n"
