"""Refresh what pages show of commands: run the commands, and put what they print in the place of what stands there.

    python docs/refresh.py docs/recipes.md docs/first_run.md

- Between `<!-- $ COMMAND -->` and `<!-- end -->` stands the output of a command, which is Markdown.
- In a ```console block the outputs stand under lines `$ COMMAND`; the middle of a long one is left out.

A page stays as it is if one of its commands fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

MARKED = re.compile(r"^<!-- \$ ([^\n]*) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(\$ .*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = 14  # lines of a long console output that are kept at its beginning, and as many at its end


def output(command: str) -> str:
    """What a shell command prints, with this Python in front of the path."""
    print(f"$ {command}", flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command}: ended with exit code {done.returncode}: {done.stderr.strip()}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def marked(block: re.Match[str]) -> str:
    """The block with its command's output."""
    return f"<!-- $ {block[1]} -->\n\n{output(block[1])}\n\n<!-- end -->"


def console(block: re.Match[str]) -> str:
    """The block with the outputs of its commands, errors among them."""
    shown = ["```console"]
    for command in re.findall(r"^\$ (.*)$", block[1], re.MULTILINE):
        lines = output(f"{command} 2>&1").splitlines()
        if len(lines) > 2 * SHOWN:
            lines[SHOWN:-SHOWN] = [f"… {len(lines) - 2 * SHOWN} more lines"]
        shown += [f"$ {command}", *lines]
    return "\n".join([*shown, "```"])


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:]):
        page.write_text(CONSOLE.sub(console, MARKED.sub(marked, page.read_text())))
