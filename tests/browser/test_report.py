"""report.html as its readers see it: of a run, of an evaluation, of a study."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page

import tools.compare_runs
import tools.eval_net
import tools.train_net
from engine.html_report import plain, write_report

pytestmark = pytest.mark.browser
CONFIG = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    settings = ["train.epochs=4", "evaluation.period=1", "schedule.warmup_epochs=1", f"output_dir={folder}"]
    assert tools.train_net.main(["--config", str(CONFIG), *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def evaluation(run: Path) -> Path:
    """With sub-models."""
    folder = run / "evaluated"
    assert tools.eval_net.main([str(run), "--ratios", "0.25,0.75", "--speed", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of two epochs."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.yaml").write_text(f"""
title: A study
configs: [{CONFIG}]
seeds: [0, 1]
ways: {{baseline: ["augsub.sub_models=[]"], masking 0.5: []}}
report: {folder}/study.md
output_dir: {folder}/runs
""")
    settings = ["train.epochs=2", "evaluation.period=1", "schedule.warmup_epochs=1"]
    assert tools.compare_runs.main(["--study", str(folder / "study.yaml"), *settings]) == 0
    return folder


def show(page: Page, file: Path) -> None:
    page.goto(file.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")


def column(page: Page, table: int, name: str) -> list[str]:
    found = page.locator("table").nth(table)
    index = found.locator("th").all_inner_texts().index(name)
    return [row.locator("td").nth(index).inner_text() for row in found.locator("tbody tr").all()]


def test_a_run_shows_its_records_and_a_table_is_sorted(page, run):
    show(page, run / "report.html")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [f"{record['eval_loss']:.5g}" for record in records if "eval_loss" in record]
    assert column(page, 1, "eval_loss") == losses and len(losses) == 4
    head = page.get_by_role("button", name="eval_loss")
    head.click()
    assert column(page, 1, "eval_loss") == sorted(losses, key=float)
    head.click()
    assert column(page, 1, "eval_loss") == sorted(losses, key=float, reverse=True)
    assert page.locator(".photograph").count() == 16  # of main model and sub-model


def test_curves_are_read_off(page, run):
    show(page, run / "report.html")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    drawing = page.locator(".drawing").first
    drawing.scroll_into_view_if_needed()
    box = drawing.bounding_box()
    page.mouse.move(box["x"] + 0.97 * box["width"], box["y"] + 0.5 * box["height"])
    expected = [f"{last['epoch']:.4g}"]
    names = {"main_loss": "main model", "sub_loss": "sub-model", "eval_loss": "main model, held-out images"}
    expected += [f"{label}: {last[name]:.4g}" for name, label in names.items()]
    assert drawing.locator(".values").inner_text().splitlines() == expected
    shown = drawing.locator(".values").bounding_box()
    assert shown["x"] >= 0 and shown["x"] + shown["width"] <= page.viewport_size["width"]
    page.mouse.move(0, 0)
    assert not drawing.locator(".values").is_visible()


def test_an_evaluation_shows_the_figures_beside_it_and_mistakes(page, evaluation):
    show(page, evaluation / "report.html")
    (result,) = json.loads((evaluation / "results.json").read_text())["results"]
    figures = dict(zip(column(page, 0, ""), column(page, 0, "value"), strict=True))
    low, high = result["intervals"]["top1"]
    assert figures["top1"] == f"{round(result['top1'], 3)} [{round(low, 3)}, {round(high, 3)}]"
    assert float(figures["ece"]) == round(result["ece"], 3)
    assert column(page, 1, "top1") == [f"{round(sub['figures']['top1'], 3):.5g}" for sub in result["sub_models"]]
    for pair in result["most_confused"][:6]:
        caption = f"{pair['true']}, taken for {pair['predicted']}: {pair['images']} images"
        shown = page.locator("figure").filter(has=page.get_by_text(caption, exact=True))
        assert shown.locator(".photograph").count() == min(pair["images"], 8)


def test_a_study_is_its_page_with_drawings(page, study):
    show(page, study / "runs" / "study.html")
    text = (study / "study.md").read_text()
    assert page.locator("h2").all_inner_texts() == [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert page.locator("figure").count() == text.count("![")
    assert column(page, 0, "training") == ["baseline", "masking 0.5"]
    assert all(cell in text for cell in column(page, 0, "difference"))


def test_names_are_shown_as_they_are(page, tmp_path):
    names = ["<script>alert(1)</script>", "a|b", "*c* _d_ `e`", "[f](g)", "&amp; & <", "n01440764_tench", "\\(h\\)"]
    rows = "".join(f"| {plain(name)} | {number} |\n" for number, name in enumerate(names))
    write_report(tmp_path / "report.html", f"# {plain(names[0])}\n\n| class | n |\n|---|---|\n{rows}", {})
    show(page, tmp_path / "report.html")
    assert column(page, 0, "class") == names and page.locator("h1").inner_text() == names[0] == page.title()


def test_text_stands_out_in_both_schemes(page, scheme, run):
    show(page, run / "report.html")
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    text, paper = (sum(map(int, colour.strip("rgb()").split(", "))) / 3 for colour in colours)
    assert (paper < 40 and text > 200) if scheme == "dark" else (paper > 240 and text < 50)
    inverted = page.locator(".drawing img").first.evaluate("image => getComputedStyle(image).filter !== 'none'")
    assert inverted == (scheme == "dark")  # drawings have dark lines and no paper
