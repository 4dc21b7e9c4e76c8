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


def commands(page: Path) -> list[str]:
    """Every command of our tools in the page's shell blocks, from the name of the tool on."""
    found = []
    for block in re.findall(r"^```(?:bash|console)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.search(r"^(?:\$ )?(?:python|torchrun .*?) ?(tools/[\w/]+\.py.*)", line)
            if command:
                found.append(command[1])
    return found


ALL_COMMANDS = [
    pytest.param(page, command, id=f"{page.relative_to(ROOT)}: {command}")
    for page in PAGES
    for command in commands(page)
]


@cache
def options(tool: str) -> set[str]:
    shown = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(re.findall(OPTION, shown.stdout))


def test_there_are_commands():
    assert len(ALL_COMMANDS) > 30


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS)
def test_a_command_names_what_exists(page, command):
    tool, *arguments = shlex.split(command, comments=True)
    assert set(re.findall(OPTION, " ".join(arguments))) <= options(tool)
    is_whole = page.parent.name != "howto"  # those need the page's file of Python; test_docs.py trains with them
    if is_whole and "--config" in arguments and "NAME" not in arguments:
        overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        load_config(arguments[arguments.index("--config") + 1], overrides)


@pytest.mark.parametrize(("page", "command"), ALL_COMMANDS)
def test_no_shell_takes_a_list_for_a_pattern(page, command):
    """zsh refuses an unquoted `key=[]`, for which no file is found."""
    words = shlex.split(command, comments=True, posix=False)
    assert not [word for word in words if re.match(r"[\w.]+=[\[{]", word)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_has_the_targets(page):
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)\b(?=`|\s+#)", page.read_text())) <= set(targets)
