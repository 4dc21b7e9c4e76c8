"""The sweep over timm ends with its count."""

from __future__ import annotations

from collections import Counter

from models.zoo import load_rows


def pytest_terminal_summary(terminalreporter) -> None:
    passed = terminalreporter.stats.get("passed", [])
    sites = Counter(value for report in passed for key, value in report.user_properties if key == "row_masked_at")
    if sites:
        by_site = ", ".join(f"{count} at {site}" for site, count in sites.most_common())
        terminalreporter.write_line(
            f"timm's (file, class) rows covered: {sites.total()} of {len(load_rows())}; masked: {by_site}"
        )
