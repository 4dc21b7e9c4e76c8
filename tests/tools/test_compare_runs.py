"""tools/compare_runs.py on run folders: against scipy and sums by hand, with every kind of folder it may be given."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from engine.config_file import load_config, to_yaml
from engine.run_folder import RunFolder
from tools import compare_runs
from tools.comparison.pictures import curve
from tools.comparison.runs import estimate, paired_difference, read_ways

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_vit.yaml"
BASELINE, MASKSUB = (91.72, 92.47, 94.60, 94.98, 94.35), (97.24, 97.24, 97.87, 97.24, 97.62)
NO_SUB_MODEL = "augsub.sub_models=[]"


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Make the folder of a finished run; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, top1: float, *overrides: str, seed: int = 0, **more: float) -> Path:
        folder = RunFolder(tmp_path / name)
        folder.checkpoints.mkdir(parents=True)
        folder.config.write_text(to_yaml(load_config(DIGITS, [f"seed={seed}", f"output_dir={name}", *overrides])))
        summary = {
            "main_loss": 0.1,
            "top1": top1,
            "top5": 99.0,
            "images": 797,
            "iterations": 40,
            "seconds": 7.0,
            **more,
        }
        folder.summary.write_text(json.dumps(summary))
        records = [
            {"iteration": 20, "epoch": 1.0, "main_loss": 1.0 + seed},
            {"iteration": 40, "epoch": 2.0, "main_loss": 0.1, "top1": top1, **more},
        ]
        folder.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return folder.path

    return make


@pytest.fixture
def two_ways(finished) -> None:
    for seed in range(5):
        finished(f"baseline_seed{seed}", BASELINE[seed], NO_SUB_MODEL, seed=seed)
        finished(f"masksub_seed{seed}", MASKSUB[seed], seed=seed)


@pytest.fixture
def compare(call):
    """Call the tool."""
    return partial(call, compare_runs)


def rows(printed: str) -> dict[str, list[str]]:
    """Cells of the table by name of the way."""
    table = [re.split(r"\s*\|\s*", line.strip("| ")) for line in printed.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in table[2:]}


def test_means_errors_and_intervals_are_those_of_scipy(two_ways):
    baseline, masksub = read_ways(["baseline_*", "masksub_*"])
    assert estimate(BASELINE).mean == pytest.approx(93.624)
    assert estimate(BASELINE).error == pytest.approx(stats.sem(BASELINE))
    assert estimate(BASELINE).error == pytest.approx(np.std(BASELINE, ddof=1) / math.sqrt(5))
    for confidence in (0.95, 0.995):
        expected = stats.ttest_rel(MASKSUB, BASELINE).confidence_interval(confidence)
        found = paired_difference(masksub, baseline, "top1", confidence)
        assert found.mean - found.half_width == pytest.approx(expected.low)
        assert found.mean + found.half_width == pytest.approx(expected.high)
    assert found.by_seed == pytest.approx({0: 5.52, 1: 4.77, 2: 3.27, 3: 2.26, 4: 3.27})
    assert paired_difference(masksub, baseline, "top1").sign == 1
    assert paired_difference(baseline, masksub, "top1").sign == -1
    assert paired_difference(masksub, baseline, "seconds").sign == 0


def test_the_table(two_ways, compare):
    code, printed, _ = compare(*(f"{way}_seed{seed}" for seed in (3, 1, 4, 0, 2) for way in ("baseline", "masksub")))
    assert code == 0
    # t(0.975, 4) = 2.776; differences 5.52 4.77 3.27 2.26 3.27: mean 3.818, standard error 0.5827
    assert rows(printed) == {
        "baseline": ["5", "**93.62 ± 0.64**", "baseline", "99.00 ± 0.00", "0.1000 ± 0.0000", "7.0 ± 0.0"],
        "masksub": ["5", "**97.44 ± 0.13**", "+3.82 [+2.20, +5.44]", "99.00 ± 0.00", "0.1000 ± 0.0000", "7.0 ± 0.0"],
    }
    assert f"- **baseline**: `{NO_SUB_MODEL}`\n" in printed
    assert "- **masksub**: `augsub.sub_models=[{weight: 0.5, augmentations: [{name: masking, ratio: 0.5}]}]`" in printed


def test_one_seed_has_no_interval_and_other_seeds_are_not_paired(finished, compare):
    finished("baseline", 90.0, NO_SUB_MODEL)
    finished("masksub", 91.5)
    finished("longer", 92.0, "train.epochs=70", seed=7)
    table = rows(compare("baseline", "masksub", "longer")[1])
    assert table["masksub"][:3] == ["1", "**91.50**", "+1.50 (one seed: no interval)"]
    assert table["longer"][2] == "no seed in common"
    for seed, (first, second) in enumerate([(90, 93), (91, 92), (89, 94)], start=1):
        finished(f"baseline_{seed}", first, NO_SUB_MODEL, seed=seed)
        finished(f"masksub_{seed}", second, seed=seed)
    table = rows(compare("baseline*", "masksub_1", "masksub_2", "masksub_3")[1])
    assert re.fullmatch(r"\+3\.00 \[-1\.97, \+7\.97\] over seeds 1, 2, 3", table["masksub"][2])


def test_another_metric_and_curves(finished, compare, tmp_path):
    for seed in (0, 1):
        finished(f"a_{seed}", 90.0, NO_SUB_MODEL, seed=seed, ema_top1=80.0 + seed)
        finished(f"b_{seed}", 91.0, seed=seed, ema_top1=85.0 - seed)
    code, printed, _ = compare("a_*", "b_*", "--metric", "ema_top1", "--picture", tmp_path / "pictures" / "c.png")
    assert code == 0 and "top-1 of the EMA, %" in printed
    assert rows(printed)["b"][2] == "+4.00 [-8.71, +16.71]"  # 5 and 3; t(0.975, 1) = 12.706
    assert Image.open(tmp_path / "pictures" / "c.png").size[0] > 1000
    epochs, losses = curve(read_ways(["a_*"])[0], "main_loss")
    assert epochs.tolist() == [1, 2] and losses.tolist() == [[1.0, 0.1], [2.0, 0.1]]


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["x/vit_seed0", "x/vit_seed1", "x/swin_seed10", "x/swin_seed11"], ["vit", "swin"]),
        (["vit-0", "vit-1", "masking_0.1", "masking_0.1_11"], ["vit", "masking_0.1"]),
        (["a/seed0", "a/seed1", "b/seed10", "b/seed11"], ["train.epochs=60", "train.epochs=61"]),
        (["a/vit_0", "a/vit_1", "b/vit_10", "b/vit_11"], ["train.epochs=60", "train.epochs=61"]),
    ],
    ids=["common", "decimals", "seeds_alone", "same_names"],
)
def test_ways_are_named_by_folders_or_else_by_configurations(finished, folders, names):
    for folder, seed, epochs in zip(folders, (0, 1, 10, 11), (60, 60, 61, 61), strict=True):
        finished(folder, 90.0, f"train.epochs={epochs}", seed=seed)
    ways = read_ways(folders)
    assert [way.name for way in ways] == names
    assert [list(way.runs) for way in ways] == [[0, 1], [10, 11]]


def test_the_user_says_what_belongs_together(finished, compare):
    finished("a", 90.0, "data.workers=0")
    finished("b", 91.0, "data.workers=1", seed=1)
    finished("c", 95.0, NO_SUB_MODEL)
    finished("d", 96.0, NO_SUB_MODEL, seed=1)
    code, printed, _ = compare("plain=c,d", "sub=[ab]")
    assert code == 0 and list(rows(printed)) == ["plain", "sub"]
    assert rows(printed)["sub"][2] == "-5.00 [-5.00, -5.00]"
    assert "its runs differ in `data.workers`" in printed


def test_wrong_folders_are_one_line(finished, compare, tmp_path):
    finished("good", 90.0)
    finished("other", 90.0, NO_SUB_MODEL)
    finished("again", 90.0)
    for name in ("unfinished", "continued", "damaged", "odd", "config"):
        finished(name, 90.0, "train.epochs=9")
    (tmp_path / "unfinished" / "summary.json").unlink()
    with open(tmp_path / "continued" / "metrics.jsonl", "a") as metrics:
        metrics.write('{"iteration": 60, "epoch": 3.0}\n')
    (tmp_path / "damaged" / "summary.json").write_text('{"top1": ')
    (tmp_path / "odd" / "summary.json").write_text("3")
    (tmp_path / "config" / "config.yaml").write_text("trian: {}")
    (tmp_path / "empty").mkdir()
    finished("images", 90.0, NO_SUB_MODEL, images=100)
    finished("synthetic", 90.0, "data.dataset=synthetic")
    cases = {
        (): "nothing to compare: here is none; name the folders of runs",
        ("good",): "nothing to compare: here is only good; name the folders of runs",
        ("good", "none"): "none: no such folder",
        ("good", "no*"): "no*: no such folder",
        ("good", "empty"): "empty: is no folder of a run, it has no config.yaml",
        ("good", "unfinished"): "unfinished: the run is not finished, summary.json is missing; continue it",
        ("good", "continued"): "continued: the run is not finished, summary.json is of iteration 40, metrics.jsonl",
        ("good", "damaged"): "damaged/summary.json: cannot be read: Expecting value",
        ("good", "odd"): "odd/summary.json: is no summary of a run",
        ("good", "config"): "Key 'trian' not in 'Config'",
        ("good", "again"): "two runs of seed 0, good and again",
        ("x=good", "x=other"): "x: 2 ways have this name",
        ("good", "images"): "images: the number of held-out images is 100, 797 in good",
        ("good", "synthetic"): "synthetic: data.dataset is synthetic, digits in good",
        ("good", "other", "--metric", "ema_top1"): "good: has no ema_top1; its summary.json has main_loss, top1",
        ("good", "other", "--picture", "curves.docx"): "curves.docx: Format 'docx' is not supported",
        ("good", "other", "--picture", "good/config.yaml/c.png"): "good/config.yaml/c.png cannot be written",
        ("good", "other", "--jobs", "1"): "--jobs: belongs to --study",
        ("good", "--study", "s.yaml"): "--study: goes with --jobs alone",
        ("--jobs", "0", "--study", "s.yaml"): "--jobs = 0: allowed is at least 1",
        ("--study", "s.yaml"): "config file s.yaml does not exist",
    }
    for arguments, message in cases.items():
        code, _, error = compare(*arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (arguments, error)
        assert message in error


def test_a_folder_that_somebody_writes_into_is_refused(finished, compare):
    folder = finished("running", 90.0)
    script = "import sys; from engine.run_folder import RunFolder; folder = RunFolder(sys.argv[1])\n"
    script += "with folder.opened(folder.config.read_text(), True): print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as holder:
        assert holder.stdout.readline() == "open\n"
        code, _, error = compare("running", "running")
        holder.communicate("\n")
    assert code == 2 and error.startswith(f"error: running: a run is still writing into it (process {holder.pid} on ")
    assert RunFolder(folder).writer() is None
