"""Print the tables of docs/performance.md: what the benchmark has measured, and what GPUs have shown.

Of files that tools/benchmark.py wrote, a table for each question; of a folder, where results of tools/gpu.py may lie
too, which checks and cases a GPU has run.
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engine.text import markdown_table
from tools.benchmark import HEADERS, cells
from tools.gpu import RESULTS

CHECKS = Path(__file__).parents[1] / "tests" / "gpu"
QUESTIONS: dict[str, Callable[[Mapping[str, Any]], bool]] = {  # of the lines of all results, the first that takes one
    "What do skipped paths save?": lambda line: re.search("skipped|stochastic", line["name"]) is not None,
    "What does torch.compile give?": lambda line: "compiled" in line["name"],
    "How much memory does it need?": lambda line: line["part"] == "memory",
    "How fast are images read?": lambda line: line["part"] == "data",
    "How fast is a whole run?": lambda line: line["part"] == "runs",
    "What does the trainer cost?": lambda line: line["name"] in ("bare loop", "timm task", "our trainer"),
    "What does a sub-model cost?": lambda line: True,
}
ORDER = [*reversed(QUESTIONS)]  # on a page


def show(files: Sequence[Path]) -> None:
    """Print files that the benchmark wrote, as Markdown: a table for each question."""
    results = {file: json.loads(file.read_text()) for file in files}
    by_question: dict[str, list[list[str]]] = {question: [] for question in ORDER}
    for result in results.values():
        cases = groupby(result["lines"], key=lambda line: (_question(line), line["case"]))
        for (question, case), lines in cases:
            of_case, first = [*lines], [result["machine"]["device"], case]
            if len(of_case) > 1 or of_case[0]["ratio"] is not None:  # one thing alone answers nothing
                by_question[question] += [
                    [*(["", ""] if number else first), *cells(line)] for number, line in enumerate(of_case)
                ]
    for question, rows in by_question.items():
        if rows:
            print(f"### {question}\n\n{markdown_table(['on', 'case', *HEADERS], rows)}\n")
    if feeding := cores([*results.values()]):
        print(
            f"### How many cores feed a GPU?\n\n{markdown_table(['GPU', 'case', '', 'images/s', 'cores'], feeding)}\n"
        )
    for file, result in results.items():
        facts = result["machine"]
        versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "timm", "python"))
        print(f"- {file.name}: {facts['device']}, {facts['cores']} CPU cores, {versions}; `{result['command']}`")


def cores(results: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """For each step on a GPU how many loader workers keep up with it, one a core, each as fast as was measured."""
    lines = [(result["machine"]["device"], line) for result in results for line in result["lines"]]
    readers = [line for _, line in lines if line["name"] == "our loader"]
    if not readers:
        return []
    of_one = min(line["value"] / int(re.search(r"(\d+) workers", line["case"])[1]) for line in readers)
    rows = []
    for device, line in lines:
        speed = re.match(r"([\d.]+) images/s", line["note"])
        if device.startswith("NVIDIA") and speed and line["name"] not in ("bare loop", "timm task"):
            rows.append([device, line["case"], line["name"], speed[1], math.ceil(float(speed[1]) / of_one)])
    return rows


def _question(line: Mapping[str, Any]) -> str:
    return next(question for question, takes in QUESTIONS.items() if takes(line))


def checks_of(file: Path) -> dict[str, dict[str, int]]:
    """How many cases of each test passed and failed, by pytest's report."""
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(file).iter("testcase") if file.exists() else ():
        of_test = counts.setdefault(case.get("name", "").partition("[")[0], {"passed": 0, "failed": 0})
        of_test["failed" if len(case) else "passed"] += 1
    return counts


def shown_table(folder: Path) -> str:
    """A row for every check and every case of the benchmark: which GPUs have shown it, by the results in a folder."""
    shown: dict[str, list[str]] = {}
    for file in sorted(CHECKS.glob("test_*.py")):
        tests = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        shown |= {test: [] for test in tests if test.startswith("test_")}
    cases: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.json")):
        content: dict[str, Any] = json.loads(file.read_text())
        if file.name == RESULTS:
            for test, counts in checks_of(file.with_name("checks.xml")).items():
                passed = f"{counts['passed']} of {sum(counts.values())}"
                shown.setdefault(test, []).append(f"{passed} on {content['device']}, {content['date']}")
        elif "--device cuda" in content["command"]:
            for line in content["lines"]:
                device = content["machine"]["device"]
                found = cases.setdefault(f"{line['part']}: {line['case']}", [])
                found += [device] if device not in found else []
    rows = [[test.removeprefix("test_").replace("_", " "), "; ".join(found)] for test, found in shown.items()]
    rows += [[case, "; ".join(devices)] for case, devices in cases.items()]
    return markdown_table(["", "shown by"], [[what, found or "no GPU yet"] for what, found in rows])


if __name__ == "__main__":
    paths = [*map(Path, sys.argv[1:])]
    if [path.is_dir() for path in paths] == [True]:
        print(shown_table(*paths))
    else:
        show(paths)
