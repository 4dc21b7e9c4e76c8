"""Run the commands that a page shows, and write what they print under them.

    python tools/pages/console_page.py docs/first_run.md

The commands are the lines of ```console blocks that begin with "$ "; all other lines of these blocks are replaced.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

from engine import atomic
from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import InputError, RunError, input_errors, writing_errors

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "$ "
SHOWN = 14  # lines of a long output that are kept at its beginning, and as many at its end


def filled(block: re.Match) -> str:
    """The block with the outputs of its commands.

    Raises:
        RunError: a command failed.
    """
    commands = [line for line in block[1].splitlines() if line.startswith(PROMPT)]
    if not commands:
        raise InputError(f"a console block without a line that begins with '{PROMPT}': {block[1].strip()!r}")
    return "\n".join(["```console", *(f"{command}\n{_output(command)}" for command in commands), "```"])


def _output(command: str) -> str:
    print(command, flush=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        command.removeprefix(PROMPT),
        shell=True,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line.rstrip() for line in done.stdout.strip().splitlines()]
    if done.returncode:
        raise RunError(f"{command}: ended with exit code {done.returncode}: {''.join(lines[-1:])}")
    if len(lines) > 2 * SHOWN:
        lines[SHOWN:-SHOWN] = [f"… {len(lines) - 2 * SHOWN} more lines"]
    return "\n".join(lines)


def run(page: Path) -> None:
    """Fill a page, or leave it as it was after an error."""
    try:
        text = page.read_text()
    except OSError as error:
        raise InputError(f"{page}: cannot be read: {error.strerror}") from error
    with input_errors(str(page)):
        text = BLOCK.sub(filled, text)
    with writing_errors(page):
        atomic.write_text(page, text)


def main() -> int:
    """Exit code 0, or 2 with one line for an error."""
    parser = tool_parser(__doc__)
    parser.add_argument("page", type=as_path, help="a Markdown file")
    return exit_code(partial(run, parser.parse_args().page))


if __name__ == "__main__":
    sys.exit(main())
