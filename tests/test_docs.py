"""README and docs: their Python runs as it stands, commands and links name what exists, figures are those measured."""

from __future__ import annotations

import glob
import importlib
import inspect
import io
import os
import pydoc
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats

import augsub
from engine.config_file import load_config

ROOT = Path(__file__).parents[1]
DOCS, README = ROOT / "docs", ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
TOOLS = sorted((ROOT / "tools").glob("*.py"))
ACCURACY = r"\d\d\.\d\d ± \d\.\d\d"
FILE = r"# (\w+\.py)\n"  # the first line of code that is a file of its own
OPTION = r"(?<![\w-])--[a-z][a-z-]*"


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```(?:{language})\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def cells(line: str) -> list[str]:
    return [cell.strip().strip("*") for cell in line.strip("|").split("|")]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tool_commands(page: Path) -> list[str]:
    """Every command of our tools in a page's shell blocks or at a tool's top, from the name of the tool on."""
    source = re.sub(r"^ +", "", page.read_text().replace("\\\\\n", "\\\n"), flags=re.MULTILINE)
    found: list[str] = []
    for block in [source] if page.suffix == ".py" else code_blocks(page, "bash|console"):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.search(r"^(?:\$ )?(?:python|torchrun .*?) ?(tools/[\w/]+\.py.*)", line)
            found += [command[1]] if command else []
    return found


BLOCKS = [
    pytest.param(code, id=f"{name(page)}-{number}")
    for page in PAGES
    for number, code in enumerate(code_blocks(page, "python"))
    if not re.match(FILE, code)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_the_python_runs_as_it_stands(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", sorted((DOCS / "howto").glob("*.md")), ids=name)
def test_a_file_of_python_trains_with_the_command_that_names_it(page, tmp_path, monkeypatch, call):
    (code,) = [code for code in code_blocks(page, "python") if re.match(FILE, code)]
    (tmp_path / re.match(FILE, code)[1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    for command in tool_commands(page):
        tool, *arguments = shlex.split(command, comments=True)
        shortly = ["train.max_iters=20"] if "train_net" in tool else []
        ended, _, error = call(module_of(tool), *arguments, *shortly)
        assert ended == 0, error
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    assert ("distance" in metrics.read_text()) == (page.stem == "hook")


def module_of(tool: str) -> ModuleType:
    return importlib.import_module(tool.removesuffix(".py").replace("/", "."))


@cache
def options(tool: str) -> set[str]:
    module, shown = module_of(tool), io.StringIO()
    with redirect_stdout(shown), pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [tool, "--help"])
        module.main()
    return set(re.findall(OPTION, shown.getvalue()))


@pytest.mark.parametrize("page", [*PAGES, *TOOLS], ids=name)
def test_commands_and_links_name_what_exists(page):
    for command in tool_commands(page):
        tool, *arguments = shlex.split(command, comments=True)
        assert set(re.findall(OPTION, " ".join(arguments))) <= options(tool), command
        if page.parent.name != "howto" and "--config" in arguments and "NAME" not in arguments:
            overrides = [word for word in arguments if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
            load_config(arguments[arguments.index("--config") + 1], overrides)
        if "--study" in arguments and "mine.yaml" not in command:
            assert (ROOT / arguments[arguments.index("--study") + 1]).exists(), command
        # zsh refuses an unquoted `key=[]`, for which no file is found
        words = shlex.split(command, comments=True, posix=False)
        assert not [word for word in words if re.match(r"[\w.]+=[\[{]", word)], command
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"\bmake ([\w-]+)\b(?=`|\s+#)", page.read_text())) <= set(targets)
    text = "" if page.suffix == ".py" else page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not os.path.exists(page.parent / link)] == []


def test_every_config_and_every_augmentation_is_shown():
    text = README.read_text() + (DOCS / "recipes.md").read_text()
    assert [path.name for path in (ROOT / "configs").glob("*.yaml") if path.name not in text] == []
    for augmentation in augsub.list_augmentations():
        card = (DOCS / "augmentations" / f"{augmentation}.md").read_text()
        assert f"]({augmentation}.png)" in card and f'"{augmentation}"' in card


def test_the_accuracies_on_the_cards_are_those_of_the_studies():
    measured = {}
    for study, model in {"digits": "", "cheap_swin": "Swin-T, ", "cheap_resnet": "ResNet-18, "}.items():
        summary = (DOCS / f"study_{study}.md").read_text().partition("## What can")[0]
        rows = [cells(line) for line in summary.splitlines() if line.startswith("| ") and "±" in line]
        measured |= {model + row[0]: [row[2], row[3], row[7]] for row in rows}
    measured["none"] = measured["baseline"]
    measured["none, as many FLOPs as masking 0.5"] = measured["baseline, 90 epochs"]
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
        figure
        for page in DOCS.glob("augmentations/*.md")
        for figure in re.findall(r"\b[12]\.\d{3}\b", page.read_text())
    ]
    assert len(quoted) == 11 and [figure for figure in quoted if figure not in performance] == []


def results(study: str) -> dict[str, list[str]]:
    """Of each way of training in a study's first table: seeds, accuracy, difference and more, computation last."""
    table = (DOCS / f"study_{study}.md").read_text().partition("## Results")[2].partition("## What can")[0]
    return {
        name: values
        for name, *values in map(cells, table.splitlines())
        if values and re.match(r"\d\d\.\d\d", values[1])
    }


def table_rows(page: Path, start: str) -> list[list[str]]:
    return [cells(line) for line in page.read_text().splitlines() if re.match(rf"\| {start} \|", line)]


def longer_digits() -> str:
    """What the study of digits does not say: masking against the baseline of as much computation, by its runs."""
    runs = (DOCS / "study_digits.md").read_text().partition("## Every run")[2]
    by_way = {name: values for name, *values in map(cells, runs.splitlines()) if values}
    masked, longer = (np.array(by_way[way], float) for way in ("masking 0.5", "baseline, 90 epochs"))
    gained = masked - longer
    half = stats.t.ppf(0.975, len(gained) - 1) * stats.sem(gained)
    return f"{gained.mean():+.2f} [{gained.mean() - half:+.2f}, {gained.mean() + half:+.2f}]"


SMALL = {"ViT": "cifar10_vit_small", "Swin": "cifar10_swin_small", "ResNet": "cifar10_resnet_small"}


def test_tables_of_results_are_those_of_the_studies():
    page = DOCS / "results.md"
    measured = results("families")
    rows = table_rows(page, r"digits_\w+")
    assert len(rows) == 6
    for model, way, *figures in rows:
        assert figures == [measured[f"{model}, {way}"][column] for column in (1, 2, -1)]
    for model, study in SMALL.items():
        shown = {way: figures for _, way, *figures in table_rows(page, model)}
        assert len(shown) >= 3 and shown == {
            way: [values[1], values[2].partition(" over seeds")[0], values[-1]]
            for way, values in results(study).items()
        }
    shown = {way: figures for way, *figures in table_rows(page, r"(?:baseline(?:, 24 epochs)?|MaskSub 0\.5)")}
    assert shown == {way: [*values[:3], values[-1], values[-2]] for way, values in results("cifar10_vit").items()}
    measured, text = results("cifar10_mechanism_small"), (DOCS / "study_cifar10_mechanism_small.md").read_text()
    against = dict(re.findall(r"^- (MaskSub .+), against plain masking .+?: (.+)$", text, re.MULTILINE))
    rows = table_rows(page, r"0\.\d")
    assert len(rows) == 4
    for ratio, *figures in rows:
        ways = [measured[f"{way} {ratio}"][2] for way in ("plain masking", "MaskSub")]
        assert figures == [*ways, against[f"MaskSub {ratio}"]]


def test_the_readme_quotes_what_the_pages_have():
    (run,) = code_blocks(README, "console")
    assert "held-out top-1" in run and run in (DOCS / "first_run.md").read_text()
    rows = table_rows(README, "digits")
    assert len(rows) == 3 and rows[0][-1] == longer_digits()
    for _, model, *figures in rows:
        name, seeds = model.split(", ")
        plain, masked = (results("families")[f"digits_{name.lower()}, {way}"] for way in ("baseline", "MaskSub"))
        assert [seeds, *figures[:-1]] == [masked[0], plain[1], masked[1], masked[2]]
    rows = table_rows(README, "CIFAR-10")
    assert len(rows) == 3
    for _, model, *figures in rows:
        name, seeds = model.split(", ")
        plain, masked = (results(SMALL[name])[way] for way in ("baseline", "MaskSub 0.5"))
        (longer,) = re.findall(
            r"^- MaskSub 0\.5, against baseline, .+?: (.+)$",
            (DOCS / f"study_{SMALL[name]}.md").read_text(),
            re.MULTILINE,
        )
        assert [seeds, *figures] == [masked[0], plain[1], masked[1], masked[2].partition(" over seeds")[0], longer]
    recipes = {config: figures for config, *figures in map(cells, (DOCS / "recipes.md").read_text().splitlines())}
    published = {name: figures for name, *figures in table_rows(README, "(?:published recipe|with MaskSub)")}
    configs = ("deit3_b_400e", "deit3_l_400e", "mae_l", "swin_b", "resnet152")
    found = [recipes[f"[{config}](../configs/{config}.yaml)"][2:4] for config in configs]
    assert [*map(list, zip(*found, strict=True))] == [published["published recipe"], published["with MaskSub"]]
    section = README.read_text().partition("## What it costs")[2].partition("## Training")[0]
    figures = re.findall(r"\b[12]\.\d{3}\b|\d{4} images/s|\d{4}(?= to)", section)
    performance = (DOCS / "performance.md").read_text()
    assert len(figures) > 20 and [figure for figure in figures if figure not in performance] == []


@pytest.mark.parametrize(
    "page", [README, DOCS / "results.md", DOCS / "objectives.md", *DOCS.glob("augmentations/*.md")], ids=name
)
def test_every_difference_is_one_of_a_study(page):
    studies = "".join(study.read_text() for study in DOCS.glob("study_*.md")) + longer_digits()
    differences = re.findall(r"(?<![\w.])[+-]\d+\.\d\d(?: \[.+?\])?", " ".join(page.read_text().split()))
    assert [one for one in differences if one not in studies] == []
    assert len(differences) > 25 or page not in (README, DOCS / "results.md")


def printed(command: str, monkeypatch, capsys) -> str:
    """What `python FILE ARGUMENTS` prints, run in this process."""
    monkeypatch.chdir(ROOT)
    words = [file for word in shlex.split(command)[1:] for file in (sorted(glob.glob(word)) or [word])]
    monkeypatch.setattr(sys, "argv", words)
    with suppress(SystemExit):
        if words[0] == "-c":
            exec(words[1], {})
        else:
            runpy.run_path(words[0], run_name="__main__")
    return "\n".join(map(str.rstrip, capsys.readouterr().out.strip().splitlines()))


def test_pages_show_what_their_commands_print(monkeypatch, capsys):
    """Those that take seconds. The table of faults collects tests, which takes a process of its own."""
    pages = "".join(page.read_text() for page in PAGES)
    blocks = dict(re.findall(r"^<!-- \$ ([^\n]*) -->\n\n(.*?)\n\n<!-- end -->$", pages, re.MULTILINE | re.DOTALL))
    assert len(blocks) >= 6
    for command, shown in blocks.items():
        if not any(word in command for word in ("zoo.py", "recipes_table.py", "faults_table.py")):
            assert printed(command, monkeypatch, capsys) == shown, command


def test_every_fault_has_a_row():
    page = (DOCS / "reliability.md").read_text()
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    faults = re.findall(r'faults\(\s*fault="(.+?)"', tests)
    rows = re.findall(r"^\| (.+?) +\|", page.partition("## Faults")[2], re.MULTILINE)[1:]
    assert len(faults) > 30 and set(faults) == set(rows)


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


def test_the_site_is_built_without_a_warning():
    for command in (["docs/site.py"], ["-m", "zensical", "build", "--clean", "--strict"]):
        result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stdout
    api = (ROOT / "site" / "api" / "index.html").read_text()
    assert "SubModelObjective" in api and "weighted sum of all branches" in api
    assert (ROOT / "site" / "source" / "configs" / "swin_b.yaml" / "index.html").exists()


def test_no_code_of_the_readme_scrolls():
    """A page of 1,280 pixels has room for some 93 characters; on the site lines are folded."""
    lines = [line for block in code_blocks(README, r"\w*") for line in block.splitlines()]
    assert [line for line in lines if len(line) > 93] == []
