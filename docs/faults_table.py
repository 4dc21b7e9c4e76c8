"""Print the table of docs/reliability.md: every fault that `make test-faults` causes, the promise, and the tests."""

from __future__ import annotations

import contextlib
import io

import pytest

from engine.text import markdown_table


class Collected:
    """Keeps the rows of the tests that pytest collects."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[str]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Called by pytest, before any test runs."""
        for item in items:
            marker = item.get_closest_marker("faults")
            if marker is not None and marker.kwargs:
                tests = self.rows.setdefault((marker.kwargs["fault"], marker.kwargs["promise"]), [])
                test = f"`{item.path.name}::{item.originalname}`"
                tests += [test] if test not in tests else []


if __name__ == "__main__":
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-m", "faults", "-p", "no:xdist", "tests"], plugins=[collected])
    rows = [[fault, promise, ", ".join(tests)] for (fault, promise), tests in sorted(collected.rows.items())]
    print(markdown_table(["fault", "what is promised", "how it is tested"], rows))
