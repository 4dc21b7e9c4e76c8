"""A page gets the outputs of the commands that it shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = """# Title

```console
$ echo 1 && echo 2 >&2
what it printed last time
$ seq 40
```

```bash
$ echo untouched
```
"""


def fill(page: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "pages" / "console_page.py", page], capture_output=True, text=True, cwd=ROOT
    )


def test_outputs_replace_those_of_last_time_and_long_ones_are_cut_in_the_middle(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert fill(page).returncode == 0
    numbers = [*map(str, range(1, 15)), "… 12 more lines", *map(str, range(27, 41))]
    console = "\n".join(["$ echo 1 && echo 2 >&2", "1", "2", "$ seq 40", *numbers])
    expected = PAGE.replace("$ echo 1 && echo 2 >&2\nwhat it printed last time\n$ seq 40", console)
    assert page.read_text() == expected
    assert fill(page).returncode == 0 and page.read_text() == expected


def test_python_is_the_one_that_runs_the_tool(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ python -c 'import sys; print(sys.prefix)'\n```\n")
    assert fill(page).returncode == 0
    assert sys.prefix in page.read_text()


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("```console\n$ echo gone; exit 3\n```\n", "ended with exit code 3: gone"),
        ("```console\necho 1\n```\n", "without a line that begins with '$ '"),
        (None, "cannot be read"),
    ],
)
def test_errors_are_one_line_and_leave_the_page(tmp_path, text, complaint):
    page = tmp_path / "page.md"
    if text is not None:
        page.write_text(text)
    done = fill(page)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1
    assert text is None or page.read_text() == text
