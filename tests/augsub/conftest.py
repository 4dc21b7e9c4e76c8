"""The sweep of gradients over timm ends with a table of them."""

from __future__ import annotations

from tabulate import tabulate

import augsub


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    rows = [value for report in passed for key, value in report.user_properties if key == "gradients"]
    if rows:
        names = augsub.list_augmentations()
        table = [[model, *(shares.get(name, "-") for name in names)] for model, shares in rows]
        terminalreporter.write_line(
            "norms of the sub-models' gradients in parts of the main model's, before and after 3 steps"
        )
        terminalreporter.write_line(tabulate(table, headers=["model", *names]))
