"""The sweeps over timm end with their count, and with a table of gradients."""

from __future__ import annotations

from collections import Counter

from tabulate import tabulate

import augsub
from tests.zoo import load_rows


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    sites = Counter(value for report in passed for key, value in report.user_properties if key == "row_masked_at")
    if sites:
        by_site = ", ".join(f"{count} at {site}" for site, count in sites.most_common())
        terminalreporter.write_line(
            f"timm's (file, class) rows covered: {sites.total()} of {len(load_rows())}; masked: {by_site}"
        )
    rows = [value for report in passed for key, value in report.user_properties if key == "gradients"]
    if rows:
        names = augsub.list_augmentations()
        table = [[model, *(shares.get(name, "-") for name in names)] for model, shares in rows]
        terminalreporter.write_line(
            "norms of the sub-models' gradients in parts of the main model's, before and after 3 steps"
        )
        terminalreporter.write_line(tabulate(table, headers=["model", *names]))
