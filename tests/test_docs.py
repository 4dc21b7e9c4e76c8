"""Pages of the documentation: their Python runs as it stands, their links exist, their figures are those measured."""

from __future__ import annotations

import inspect
import os
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import augsub

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HOW_TO = sorted((DOCS / "howto").glob("*.md"))
ACCURACY = r"\d\d\.\d\d ± \d\.\d\d"


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = [
    pytest.param(code, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, code in enumerate(code_blocks(page, "python"))
    if page.parent != ROOT
]


@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_runs_as_it_stands(code, tmp_path):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", HOW_TO, ids=name)
def test_a_how_to_is_a_file_and_the_commands_that_use_it(page, tmp_path):
    (code,), (commands,) = code_blocks(page, "python"), code_blocks(page, "bash")
    (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code)
    commands = commands.replace("python tools", f"{sys.executable} {ROOT}/tools")
    shortly = "set -e\n" + commands.replace("train_net.py", "train_net.py train.max_iters=20")
    result = subprocess.run(shortly, shell=True, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert ("distance" in metrics.read_text()) == (page.stem == "hook")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_exist(page):
    links = [link for link in re.findall(r"\]\(([^)#]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not os.path.exists(page.parent / link)] == []


def test_every_picture_is_shown_somewhere():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[[^]]*\]\(([^)]+)", page.read_text())
    }
    assert {path.resolve() for path in DOCS.rglob("*.png")} <= shown


def test_every_augmentation_has_a_card_with_the_same_headings():
    own = [path.stem for path in (ROOT / "augsub").glob("*.py") if "@register(" in path.read_text()]
    assert set(own) <= set(augsub.list_augmentations())
    for augmentation in own:
        card = (DOCS / "augmentations" / f"{augmentation}.md").read_text()
        assert re.findall(r"^## (.+)", card, re.MULTILINE) == [
            "What it does", "When to use it", "Cost", "Measured", "Code",
        ]  # fmt: skip
        assert f"]({augmentation}.png)" in card and f'"{augmentation}"' in card


def test_the_accuracies_on_the_cards_are_those_of_the_studies():
    measured = {}
    for study, model in {"digits": "", "cheap_swin": "Swin-T, ", "cheap_resnet": "ResNet-18, "}.items():
        summary = (DOCS / f"study_{study}.md").read_text().partition("## What can")[0]
        rows = [cells(line) for line in summary.splitlines() if line.startswith("| ") and "±" in line]
        measured |= {model + row[0]: [row[2], row[3], row[7]] for row in rows}
    measured["none"], measured["none, as many FLOPs as masking 0.5"] = (
        measured["baseline"],
        measured["baseline, 90 epochs"],
    )
    quoted = [
        cells(line)
        for page in (DOCS / "augmentations").glob("*.md")
        for line in page.read_text().splitlines()
        if re.match(rf"\| .* \| {ACCURACY} \|", line)
    ]
    assert len(quoted) == 24
    for way, *figures in quoted:
        assert figures == measured[way][: len(figures)]
    for page in (DOCS / "augmentations").glob("*.md"):
        assert set(re.findall(ACCURACY, page.read_text())) <= {accuracy for accuracy, *_ in measured.values()}


def test_the_costs_on_the_cards_are_those_of_the_benchmark():
    performance = (DOCS / "performance.md").read_text()
    quoted = [
        figure for page in DOCS.glob("augmentations/*.md") for figure in re.findall(r"\b1\.\d{3}\b", page.read_text())
    ]
    assert len(quoted) == 8 and [figure for figure in quoted if figure not in performance] == []


def test_pages_show_what_their_commands_print():
    """Those that take seconds."""
    pages = "".join(page.read_text() for page in PAGES)
    path = f"PATH={Path(sys.executable).parent}:$PATH"
    blocks = re.findall(r"^<!-- \$ ([^\n]*) -->\n\n(.*?)\n\n<!-- end -->$", pages, re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 6
    for command, shown in blocks:
        if "zoo.py" not in command and "recipes_table.py" not in command:
            done = subprocess.run(f"{path}; {command}", shell=True, capture_output=True, text=True, cwd=ROOT)
            assert "\n".join(map(str.rstrip, done.stdout.strip().splitlines())) == shown, command


def public_callables():
    """What docs/api.md lists: functions, and of classes the constructor and the methods that are defined there."""
    for path in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE):
        found = pydoc.locate(path)
        assert found is not None, path
        if inspect.isfunction(found):
            yield pytest.param(found, found.__doc__, id=path)
        for key, member in vars(found).items() if inspect.isclass(found) else ():
            if inspect.isfunction(member) and (key == "__init__" or not key.startswith("_")):
                inherited = inspect.getdoc(getattr(found, key)) or ""
                text = found.__doc__ if key == "__init__" else inherited
                yield pytest.param(member, text, id=f"{path}.{key}")


@pytest.mark.parametrize(("function", "docstring"), list(public_callables()))
def test_docstrings_of_the_api_name_every_parameter(function, docstring):
    parameters = set(inspect.signature(function).parameters) - {"self"}
    if not function.__doc__ and function.__name__ != "__init__":
        return  # an override, which is documented where it is defined
    missing = [parameter for parameter in parameters if not re.search(rf"\b{parameter}\b", docstring)]
    assert missing == []


def test_the_site_is_built_without_a_warning(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", tmp_path / "site"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "SubModelObjective" in api and "weighted sum of all branches" in api
    assert (tmp_path / "site" / "source" / "configs" / "swin_b.yaml" / "index.html").exists()
