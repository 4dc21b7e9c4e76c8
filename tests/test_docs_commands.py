"""Commands on the pages: the tools, options, configurations, keys and make targets that they name exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from engine.config_file import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTION = r"(?<![\w-])--[a-z][a-z-]*"


def commands(page: Path) -> list[list[str]]:
    """Words of every command of our tools in the page's shell blocks, from the name of the tool on."""
    found = []
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.search(r"^(?:\$ )?(?:python|torchrun .*?) ?(tools/\w+\.py.*)", line)
            if command:
                found.append(shlex.split(command[1], comments=True))
    return found


COMMANDS = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}: {' '.join(words)}")
    for page in PAGES
    if page.parent.name != "howto"  # those train, in test_docs.py
    for words in commands(page)
]


@cache
def options(tool: str) -> set[str]:
    shown = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(re.findall(OPTION, shown.stdout))


def test_there_are_commands():
    assert len(COMMANDS) > 30


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_names_what_exists(words):
    tool, *arguments = words
    assert set(re.findall(OPTION, " ".join(arguments))) <= options(tool)
    if "--config" in arguments and "NAME" not in arguments:
        overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        load_config(arguments[arguments.index("--config") + 1], overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_has_the_targets(page):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)\b(?=`|\s+#)", page.read_text())) <= set(targets)
