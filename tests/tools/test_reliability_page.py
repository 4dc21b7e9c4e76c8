"""docs/reliability.md: written from results, and complete."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from engine.config import MAY_CHANGE, marked

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "pages" / "reliability_page.py"
PAGE = (ROOT / "docs" / "reliability.md").read_text()
REPORT = """<testsuites><testsuite>
<testcase classname="tests.faults.test_a" name="test_one[x]"><properties><property name="fault" value="F"/>
<property name="promise" value="P"/><property name="survived" value="3"/></properties></testcase>
<testcase classname="tests.faults.test_a" name="test_one[y]"><properties><property name="fault" value="F"/>
<property name="promise" value="P"/><property name="survived" value="2"/></properties></testcase>
<testcase classname="tests.faults.test_b" name="test_two"><properties><property name="fault" value="G"/>
<property name="promise" value="Q"/><property name="survived" value="9"/></properties><failure/></testcase>
<testcase classname="tests.b" name="test_plain"/>
</testsuite></testsuites>"""


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=ROOT)


def test_runs_are_counted_and_failures_are_not_hidden(tmp_path):
    (tmp_path / "faults.xml").write_text(REPORT)
    assert run(tmp_path / "faults.xml", "--output", tmp_path / "page.md").returncode == 0
    page = (tmp_path / "page.md").read_text()
    assert re.search(r"\| F +\| P +\| `test_a\.py::test_one` +\| 5 +\|", page)
    assert re.search(r"\| G +\| Q +\| `test_b\.py::test_two` +\| 0; failure +\|", page)
    assert "5 runs survived 2 kinds of faults" in page


def test_a_file_that_is_no_report_is_one_line(tmp_path):
    (tmp_path / "faults.xml").write_text("<testsuites>")
    for name in ("faults.xml", "none.xml"):
        done = run(tmp_path / name, "--output", tmp_path / "page.md")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "page.md").exists()


def test_the_page_has_a_row_for_every_fault_and_no_failure():
    faults = {
        keyword.value.value
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "faults"
        for keyword in node.keywords
        if keyword.arg == "fault"
    }
    rows = re.findall(r"^\| (.+?) +\| .+ \| ([^|]+?) +\|$", PAGE.partition("## Faults")[2], re.MULTILINE)[1:]
    assert {fault for fault, _ in rows if not fault.startswith("--")} == faults
    assert all(survived.strip().isdecimal() for fault, survived in rows if not fault.startswith("--"))


def test_the_page_lists_what_may_change():
    listed = PAGE.partition("What the command may change")[2].partition("```")[2].partition("```")[0]
    assert tuple(re.split(r",\s+", listed.strip())) == tuple(marked(MAY_CHANGE))
