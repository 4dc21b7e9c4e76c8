"""tools/compare_runs.py: against scipy and sums by hand, on every kind of folder and study that it may be given."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from engine.config_file import load_config, to_yaml
from engine.data.source import build_digits
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder
from tools import compare_runs
from tools.comparison import study as studies
from tools.comparison.pictures import curve
from tools.comparison.runs import interval, read_ways
from tools.comparison.study import load_study, plan, run_study

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "configs" / "digits_vit.yaml"
STUDIES = [  # one is enough at once
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem != "cifar10_vit_small"))
    for path in sorted((ROOT / "configs" / "studies").glob("*.yaml"))
]
BASELINE, MASKSUB = (91.72, 92.47, 94.60, 94.98, 94.35), (97.24, 97.24, 97.87, 97.24, 97.62)
NO_SUB_MODEL = "augsub.sub_models=[]"
STUDY = """
title: A tiny study
configs: [tiny.yaml]
seeds: [5, 3]
ways:
  plain: ["augsub.sub_models=[]"]
  drop path: ["augsub.sub_models=[{augmentations: [{name: drop_path, ratio: 0.5}]}]"]
report: report.md
"""


def forge(path: str, config: str, top1: float, seed: int, **more: float) -> None:
    """The folder of a finished run."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    folder.config.write_text(config)
    measured = {"main_loss": 0.1, "top1": top1, "top5": 99.0, **more}
    folder.summary.write_text(json.dumps({"images": 797, "iterations": 40, "epochs": 2.0, "seconds": 7.0, **measured}))
    records = [{"iteration": 20, "epoch": 1.0, "main_loss": 1.0 + seed}, {"iteration": 40, "epoch": 2.0, **measured}]
    folder.metrics.write_text("".join(f"{json.dumps(record)}\n" for record in records))


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Make the folder of a finished run of the digits; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, top1: float, *overrides: str, seed: int = 0, **more: float) -> None:
        config = load_config(DIGITS, [f"seed={seed}", f"output_dir={name}", *overrides])
        forge(name, to_yaml(config), top1, seed, **more)

    return make


@pytest.fixture
def study(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny = "model: {kwargs: {depth: 1}}\ntrain: {max_iters: 60}\nevaluation: {period: 3}\nlog: {period: 5}\n"
    Path("tiny.yaml").write_text(f"_base_: {DIGITS}\n{tiny}")
    Path("study.yaml").write_text(STUDY)
    return Path("study.yaml")


def rows(printed: str) -> dict[str, list[str]]:
    """Cells of the table by name of the way."""
    table = [re.split(r"\s*\|\s*", line.strip("| ")) for line in printed.splitlines() if line.startswith("|")]
    return {name: cells for name, *cells in table[2:]}


def test_means_errors_and_intervals_are_those_of_scipy(finished, call):
    for seed in range(5):
        finished(f"baseline_seed{seed}", BASELINE[seed], NO_SUB_MODEL, seed=seed)
        finished(f"masksub_seed{seed}", MASKSUB[seed], seed=seed)
    masksub = read_ways(["baseline_*", "masksub_*"])[1]
    for confidence in (0.95, 0.995):
        expected = stats.ttest_rel(MASKSUB, BASELINE).confidence_interval(confidence)
        mean, half = interval(masksub.differences("top1").values(), confidence)
        assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    code, printed, _ = call(
        compare_runs, *(f"{way}_seed{seed}" for seed in (3, 1, 4, 0, 2) for way in ("baseline", "masksub"))
    )
    assert code == 0
    # t(0.975, 4) = 2.776; differences 5.52 4.77 3.27 2.26 3.27: mean 3.818, standard error 0.5827
    assert rows(printed) == {
        "baseline": ["5", "**93.62 ± 0.64**", "baseline", "99.00 ± 0.00", "0.1000 ± 0.0000", "7.0 ± 0.0"],
        "masksub": ["5", "**97.44 ± 0.13**", "+3.82 [+2.20, +5.44]", "99.00 ± 0.00", "0.1000 ± 0.0000", "7.0 ± 0.0"],
    }
    assert f"{stats.sem(BASELINE):.2f} {stats.sem(MASKSUB):.2f}" == "0.64 0.13"
    assert f"- **baseline**: `{NO_SUB_MODEL}`\n" in printed
    assert "- **masksub**: `augsub.sub_models=[{weight: 0.5, augmentations: [{name: masking, ratio: 0.5}]}]`" in printed


def test_one_seed_has_no_interval_and_other_seeds_are_not_paired(finished, call):
    finished("baseline", 90.0, NO_SUB_MODEL)
    finished("masksub", 91.5)
    finished("longer", 92.0, "train.epochs=70", seed=7)
    table = rows(call(compare_runs, "baseline", "masksub", "longer")[1])
    assert table["masksub"][:3] == ["1", "**91.50**", "+1.50 (one seed: no interval)"]
    assert table["longer"][2] == "no seed in common"
    for seed, (first, second) in enumerate([(90, 93), (91, 92), (89, 94)], start=1):
        finished(f"baseline_{seed}", first, NO_SUB_MODEL, seed=seed)
        finished(f"masksub_{seed}", second, seed=seed)
    table = rows(call(compare_runs, "baseline*", "masksub_1", "masksub_2", "masksub_3")[1])
    assert table["masksub"][2] == "+3.00 [-1.97, +7.97] over seeds 1, 2, 3"


def test_another_metric_and_curves(finished, call, tmp_path):
    for seed in (0, 1):
        finished(f"a_{seed}", 90.0, NO_SUB_MODEL, seed=seed, ema_top1=80.0 + seed)
        finished(f"b_{seed}", 91.0, seed=seed, ema_top1=85.0 - seed)
    code, printed, _ = call(
        compare_runs, "a_*", "b_*", "--metric", "ema_top1", "--picture", tmp_path / "pictures" / "c.png"
    )
    assert code == 0 and "top-1 of the EMA, %" in printed
    assert rows(printed)["b"][2] == "+4.00 [-8.71, +16.71]"  # 5 and 3; t(0.975, 1) = 12.706
    assert Image.open(tmp_path / "pictures" / "c.png").size[0] > 1000
    epochs, losses = curve(read_ways(["a_*"])[0], "main_loss")
    assert epochs.tolist() == [1, 2] and losses.tolist() == [[1.0, 0.1], [2.0, 0.1]]


def test_what_evaluations_found_of_the_last_checkpoints(finished, call):
    for seed, (plain, masked) in enumerate([(40.0, 45.0), (42.0, 46.0)]):
        for name, top1, overrides in (("a", plain, [NO_SUB_MODEL]), ("b", masked, [])):
            finished(f"{name}_{seed}", 90.0, *overrides, seed=seed)
            for folder, ece, errors in (
                ("last", 3.0, {}),
                ("last_variant=corrupted", top1 / 2, {"shot_noise": 100 - top1 + 1}),
                ("best", 99.0, {}),
                ("last_data.image_size=16_variant=corrupted", 99.0, {"shot_noise": 50}),
            ):
                file = Path(f"{name}_{seed}/evaluation/{folder}/results.json")
                file.parent.mkdir(parents=True)
                figures = {"weights": "trained", "top1": top1, "ece": ece, "corruption_errors": errors}
                file.write_text(json.dumps({"iteration": 40, "results": [figures]}))
    code, printed, _ = call(compare_runs, "a_*", "b_*")
    summary, robustness, by_corruption = re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE)
    assert code == 0 and "90.00 ± 0.00" in rows(summary)["b"][1] and "under shot noise" not in summary
    assert rows(robustness) == {
        "a": ["41.00 ± 1.00", "baseline", "3.00 ± 0.00", "baseline", "20.50 ± 0.50", "baseline"],
        # 5 and 4, halves of them for what is called the calibration error here; t(0.975, 1) = 12.706
        "b": [
            *("45.50 ± 0.50", "+4.50 [-1.85, +10.85]"),
            *("3.00 ± 0.00", "+0.00 [+0.00, +0.00]"),
            *("22.75 ± 0.25", "+2.25 [-0.93, +5.43]"),
        ],
    }
    assert "shot noise" in by_corruption and rows(by_corruption) == {"a": ["40.00 ± 1.00"], "b": ["44.50 ± 0.50"]}
    code, printed, _ = call(compare_runs, "a_*", "b_*", "--metric", "corrupted_top1")
    assert code == 0 and "top-1 under corruptions, %" in printed and printed.count("+4.50 [-1.85, +10.85]") == 1
    file = Path("a_1/evaluation/last_variant=corrupted/results.json")
    file.write_text(file.read_text().replace('"iteration": 40', '"iteration": 20'))  # of an earlier checkpoint
    printed = call(compare_runs, "a_*", "b_*")[1]
    assert "calibration error, %" in printed and "under corruptions" not in printed
    shutil.rmtree("a_1/evaluation")
    assert "calibration" not in call(compare_runs, "a_*", "b_*")[1]


def test_two_models_are_compared_image_by_image(finished, call):
    """Ten images: the second model is right where the first is wrong in six, and the other way round in one."""
    true, first = "aabbababab", "aabbbabaaa"
    second = "abbbababab"
    for name, predicted, overrides in (("plain", first, [NO_SUB_MODEL]), ("masked", second, [])):
        finished(name, 90.0, *overrides)
        file = Path(name, "evaluation", "last", "predictions.csv")
        file.parent.mkdir(parents=True)
        lines = [f"{number},{one},{other}" for number, (one, other) in enumerate(zip(true, predicted, strict=True))]
        file.write_text("\n".join(["image,true,predicted", *lines]))
        file.with_name("results.json").write_text(
            json.dumps({"iteration": 40, "results": [{"top1": 50.0, "ece": 1.0}]})
        )
    gained = sum(mine == label != theirs for label, theirs, mine in zip(true, first, second, strict=True))
    lost = sum(theirs == label != mine for label, theirs, mine in zip(true, first, second, strict=True))
    code, printed, _ = call(compare_runs, "plain", "masked", "--report", "compared.html")
    p = 2 * sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    right = np.array([mine == label for label, mine in zip(true, second, strict=True)])
    drawn = np.random.default_rng(0).choice(right, (20000, len(right))).mean(axis=1)  # a bootstrap
    low, high = 100 * np.quantile(drawn, [0.025, 0.975])
    accuracy = rf"{100 * right.mean():.2f} \[{low:.2f}, {high:.2f}\]"
    assert code == 0 and re.search(rf"masked +\| 0 +\| {accuracy} +\| {gained} +\| {lost} +\| {p:.2g} +\|", printed)
    assert re.search(r"plain +\| 0 +\| \d+\.00 \[.*\] +\| +\| +\| +\|", printed)
    report = Path("compared.html").read_text()
    assert "<h1>plain and masked</h1>" in report and f"<td>{p:.2g}</td>" in report and "data-curves" in report
    Path("plain/evaluation/last/predictions.csv").write_text("image,true,predicted\n0,b,b\n")
    code, _, error = call(compare_runs, "plain", "masked")
    assert code == 2 and "masked: its predictions are of other images than those of plain" in error


def test_what_belongs_together_and_its_names(finished, call):
    """By the configurations but for seeds, or as the user says; named by the folders."""
    folders = {"vit-0": 60, "vit-1": 60, "masking_0.1_seed10": 61, "masking_0.1_11": 61, "a/seed3": 62}
    for folder, epochs in folders.items():
        seed = int(re.search(r"\d+$", folder)[0])
        finished(folder, 90.0, f"train.epochs={epochs}", seed=seed)
    ways = read_ways(["vit-*", "a/seed3", "masking*"])
    assert [(way.name, list(way.runs)) for way in ways] == [
        ("vit", [0, 1]),
        ("a/seed3", [3]),
        ("masking_0.1", [10, 11]),
    ]
    finished("c", 95.0, NO_SUB_MODEL)
    finished("d", 96.0, NO_SUB_MODEL, "data.workers=1", seed=1)
    code, printed, _ = call(compare_runs, "plain=c,d", "sub=vit-0", "sub=vit-[1]")
    assert code == 0 and list(rows(printed)) == ["plain", "sub"]
    assert rows(printed)["sub"][2] == "-5.50 [-11.85, +0.85]"
    assert "its runs differ in `data.workers`" in printed


def test_wrong_folders_are_one_line(finished, call, tmp_path):
    finished("good", 90.0)
    finished("other", 90.0, NO_SUB_MODEL)
    for name in ("again", "continued", "damaged"):
        finished(name, 90.0)
    with open("continued/metrics.jsonl", "a") as metrics:
        metrics.write('{"iteration": 60, "epoch": 3.0}\n')
    Path("damaged/summary.json").write_text('{"top1": ')
    Path("empty").mkdir()
    finished("images", 90.0, NO_SUB_MODEL, images=100)
    finished("synthetic", 90.0, "data.dataset=synthetic")
    cases = {
        (): "nothing to compare: name the folders of runs",
        ("good",): "nothing to compare: name the folders of runs",
        ("good", "no*"): "no*: no such folder",
        ("good", "empty"): "empty: holds no finished run",
        ("good", "continued"): "continued: holds no finished run; one that was stopped goes on with --resume",
        ("good", "damaged"): "damaged/summary.json: Expecting value",
        ("good", "again"): "two runs of seed 0, good and again",
        ("good", "images"): "images: evaluated on the images 100, good on 797",
        ("good", "synthetic"): "synthetic: evaluated on the dataset synthetic, good on digits",
        ("good", "other", "--metric", "ema_top1"): "good: has no ema_top1; its summary.json has images, iterations",
        ("good", "other", "--picture", "curves.docx"): "curves.docx: Format 'docx' is not supported",
        ("good", "other", "--picture", "good/config.yaml/c.png"): "good/config.yaml/c.png cannot be written",
        ("good", "other", "--jobs", "1"): "--jobs, --minutes: belong to --study",
        ("--study", "s.yaml", "--picture", "a.png"): "--picture, --report, --metric: not with --study",
        ("--study", "s.yaml", "--minutes", "0"): "--minutes = 0.0: allowed is above 0",
        ("--jobs", "0", "--study", "s.yaml"): "--jobs 0: allowed is 1 or more",
    }
    for arguments, message in cases.items():
        code, _, error = call(compare_runs, *arguments)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (arguments, error)
        assert message in error, error


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_our_studies_are_well_formed(path):
    study = load_study(path)
    runs = plan(study, path)
    assert len(runs) == len(study.configs) * len(study.ways) * len(study.seeds)
    assert runs[0].config.augsub.sub_models == []  # the baseline is plain training
    assert f"--study {path.relative_to(ROOT)}" in path.read_text()


def test_a_wrong_study_is_refused_before_anything_runs(study):
    cases = [
        ("seeds:", "seed:", r"Key 'seed' not in 'Study'. Did you mean: 'seeds'\?"),
        ("title: A tiny study", "", "missing mandatory value: title"),
        ("[5, 3]", "[]", "needs one of configs and of seeds, and two ways or more"),
        ("  plain: ", "  # ", "needs one of configs and of seeds, and two ways or more"),
        ("[5, 3]", "[-1]", "study.yaml: .*seed = -1: allowed is in"),
        ("tiny.yaml]", "tiny.yml]", "study.yaml: .*config file .*tiny.yml does not exist, did you mean .*tiny.yaml"),
        ("drop path:", '"plain+":', "runs/study/tiny_plain_seed5 would be the folder of two runs"),
        ("ratio: 0.5", "ratio: 1.5", "ways: drop path: augsub.sub_models: .*ratio"),
    ]
    for old, new, message in cases:
        assert old in STUDY
        study.write_text(STUDY.replace(old, new))
        with pytest.raises(InputError, match=message) as refused:
            run_study(study, jobs=1)
        assert "\n" not in str(refused.value) and str(study) in str(refused.value)
    assert not Path("runs").exists()


def test_the_report_of_a_finished_study(study, capsys):
    for run, top1 in zip(plan(load_study(study), study), (90.0, 95.0, 91.0, 96.5), strict=True):  # seed 5, then 3
        forge(run.config.output_dir, to_yaml(run.config), top1, run.config.seed, seconds=3.0 * top1)
    written, left = run_study(study, jobs=2)
    text = Path("report.md").read_text()
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert written == [*map(Path, ["report.md", *pictures]), Path("runs/study/report.html")]
    assert (
        not left and len(written) == 7 and all(path.stat().st_size for path in written) and not capsys.readouterr().err
    )
    assert "Written by `python tools/compare_runs.py --study study.yaml`: 4 runs" in text
    assert "1000 training images and 797 held-out ones of 8 x 8 pixels" in text
    table, _, singles = text.partition("## What can be concluded")
    assert rows(table)["plain"][:3] + rows(table)["plain"][-1:] == ["2", "**90.50 ± 0.50**", "baseline", "1.00"]
    # differences 5 and 5.5: mean 5.25, standard error 0.25, t(0.975, 1) = 12.706
    assert rows(table)["drop path"][2] == "+5.25 [+2.07, +8.43]" and rows(table)["drop path"][-1] == "2.00"
    assert rows(singles) == {"plain": ["91.00", "90.00"], "drop path": ["96.50", "95.00"]}  # seed 3, then 5
    assert "There is one comparison, which its interval of 95 % decides." in text
    assert "- **better than the baseline**:\n  - drop path: +5.25 [+2.07, +8.43]\n- **worse" in text
    assert "an accuracy of 90.5 % has a standard deviation of 1.04 points over" in text  # (90.5 * 9.5 / 797) ** 0.5

    shutil.rmtree("runs")  # the results file has all that the page needs
    Path("report.md").unlink()
    assert run_study(study, jobs=2)[0] == written and Path("report.md").read_text() == text
    study.write_text(STUDY.replace("ratio: 0.5", "ratio: 0.25"))
    before = Path("report.jsonl").read_text()
    assert [run.way for run in run_study(study, jobs=1, seconds=0)[1]] == ["drop path", "drop path"]
    message = (
        "report.jsonl: 2 runs were trained otherwise and do not count: tiny_drop_path_seed5 with augsub.sub_models = "
    )
    assert capsys.readouterr().err.startswith(message) and Path("report.jsonl").read_text() == before
    study.write_text(STUDY)
    Path("tiny.yaml").write_text(f"{Path('tiny.yaml').read_text()}optimizer: {{lr: 0.5}}\n")
    assert len(run_study(study, jobs=1, seconds=0)[1]) == 4
    assert "do not count: tiny_plain_seed5 with optimizer.lr = 0.002, the study says 0.5" in capsys.readouterr().err


def test_runs_of_other_images_are_not_compared_though_names_and_counts_agree(finished, study, call):
    """The runs of one folder of images and of another one."""
    for name, overrides, digit in (("here", (), "a"), ("there", (NO_SUB_MODEL,), "b"), ("before", (), None)):
        told = {} if digit is None else {"fingerprints": {"held-out": {"images": 797, "sha256": digit * 64}}}
        finished(name, 90.0, *overrides, seed=1 + (digit is None), **told)
    code, _, error = call(compare_runs, "here", "there")
    assert code == 2 and f"there: evaluated on the names and labels, SHA-256, {'b' * 64}, here on {'a' * 64}" in error
    assert call(compare_runs, "one=before", "other=there")[0] == 0  # a run from before they were told
    own = build_digits(8).facts["fingerprints"]
    for checksum in ("c" * 64, own["held-out"]["sha256"]):
        for run in plan(load_study(study), study)[:1]:
            told = {"held-out": {"images": 797, "sha256": checksum}}
            forge(run.config.output_dir, to_yaml(run.config), 90.0, run.config.seed, fingerprints=told)
        run_study(study, jobs=1, seconds=0)
        if checksum != own["held-out"]["sha256"]:
            with pytest.raises(InputError, match=r"^report\.jsonl: its results of tiny are of other held-out images"):
                run_study(study, jobs=1, seconds=1)
            before, run = Path("report.jsonl").read_bytes(), plan(load_study(study), study)[1]
            told = {"held-out": {"images": 797, "sha256": "d" * 64}}  # of a run that was finished elsewhere
            forge(run.config.output_dir, to_yaml(run.config), 90.0, run.config.seed, fingerprints=told)
            with pytest.raises(InputError, match="of other held-out images"):
                run_study(study, jobs=1, seconds=0)
            assert Path("report.jsonl").read_bytes() == before
        else:
            assert len(run_study(study, jobs=1, seconds=0)[1]) == 3
        shutil.rmtree("runs")
        Path("report.jsonl").unlink()


@pytest.mark.slow
def test_results_of_two_machines_are_not_paired(study, monkeypatch):
    """Seed 5 was begun on one machine and finished on another, which has all of it; seed 3 is left to any of them."""
    machines = {"one": {"plain": (80, 85)}, "two": {"plain": (90,), "drop path": (96,)}}
    for machine, of_ways in machines.items():
        monkeypatch.setattr(
            studies, "machine", lambda is_gpu, name=machine: dict.fromkeys(("device", "cores", "torch", "timm"), name)
        )
        for run in plan(load_study(study), study):
            top1 = dict(zip((5, 3), of_ways.get(run.way, ()), strict=False)).get(run.config.seed)
            if top1 is not None:
                forge(run.config.output_dir, to_yaml(run.config), top1, run.config.seed)
        written, left = run_study(study, jobs=1, seconds=0)
        shutil.rmtree("runs")
        assert bool(written) == (machine == "two")
    assert [(run.way, run.config.seed) for run in left] == [("plain", 3), ("drop path", 3)]  # by the second machine
    table, _, singles = Path("report.md").read_text().partition("## What can be concluded")
    assert rows(table)["drop path"][:3] == ["1", "**96.00**", "+6.00 (one seed: no interval)"]
    assert rows(singles)["plain"] == ["85.00", "90.00"]  # seed 3, which has no pair, then 5
    assert "- seed 5: two, two cores, torch two, timm two\n" in table and "2 are still to come" in table


@pytest.mark.slow
def test_a_longer_baseline_is_compared_with_what_computes_as_much(study):
    longer = '  "plain, longer": ["augsub.sub_models=[]", train.epochs=120]\n'
    study.write_text(STUDY.replace("  drop path:", f"{longer}  drop path:"))
    top1 = {"plain": (90, 91), "plain, longer": (92, 94), "drop path": (95, 96)}
    for run in plan(load_study(study), study):
        epochs = {"epochs": 4.0} if run.way == "plain, longer" else {}  # drop path computes twice as much a step
        forge(
            run.config.output_dir, to_yaml(run.config), top1[run.way][run.config.seed == 3], run.config.seed, **epochs
        )
    run_study(study, jobs=1)
    text = Path("report.md").read_text()
    # 3 and 2: mean 2.5, standard error 0.5, t(0.975, 1) = 12.706
    assert "computation, with intervals of 95 %:\n\n- drop path, against plain, longer: +2.50 [-3.85, +8.85]\n" in text


@pytest.mark.slow
def test_several_configurations_have_their_own_baselines_and_hold_together(study):
    """Two comparisons: of 95 % each, and by Bonferroni of 97.5 %."""
    Path("other.yaml").write_text("_base_: tiny.yaml\n")
    study.write_text(STUDY.replace("[tiny.yaml]", "[tiny.yaml, other.yaml]"))
    top1 = {("tiny", "plain"): 90, ("tiny", "drop path"): 95, ("other", "plain"): 80, ("other", "drop path"): 79}
    for run in plan(load_study(study), study):
        seed, noise = run.config.seed, 0.5 * (run.config.seed == 3) * (run.way != "plain")
        forge(run.config.output_dir, to_yaml(run.config), top1[run.base.stem, run.way] + noise, seed)
    run_study(study, jobs=1)
    text = Path("report.md").read_text()
    assert re.search(r"\| other, drop path +\| 2 +\| \*\*79.25 ± 0.25\*\* \| -0.75 \[-3.93, \+2.43\]", text)
    assert "Each of the 2 intervals above is of 95 %" in text and "Intervals of 97.5 % (Bonferroni)" in text
    # t(0.9875, 1) = 25.45: 5.25 +- 6.36 and -0.75 +- 6.36
    assert (
        "undecided**:\n  - tiny, drop path: +5.25 [-1.11, +11.61]\n  - other, drop path: -0.75 [-7.11, +5.61]" in text
    )
    assert text.count("1000 training images") == 2


@pytest.mark.slow
def interrupted(study: Path, ready: Callable[[], bool], plugins: Path) -> str:
    """What a study says that is interrupted once something is there."""
    with subprocess.Popen(
        [sys.executable, compare_runs.__file__, "--study", study, "--jobs", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{plugins}"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as started:
        deadline = time.monotonic() + 120
        while not ready():
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
        said = started.communicate(timeout=120)[1]
    assert started.returncode == 130 and said.endswith("interrupted: the same command goes on\n")
    return said


def test_a_study_is_interrupted_and_continued(study, tmp_path, capsys):
    study.write_text(STUDY.replace("[5, 3]", "[3]"))
    first, report = RunFolder("runs/study/tiny_plain_seed3"), Path("report.md")
    said = interrupted(study, lambda: first.metrics.exists() and first.metrics.stat().st_size, tmp_path)
    assert first.last.exists() and "the state is saved" not in said
    assert not first.summary.exists() and not report.exists()
    assert report in run_study(study, jobs=2)[0]
    lines = [f"runs/study/tiny_{way}_seed3: finished" for way in ("drop_path", "plain")]
    assert sorted(capsys.readouterr().err.splitlines()) == lines and "resumed" in first.log.read_text()


@pytest.mark.slow
def test_a_run_that_ends_while_its_study_is_stopped_is_kept(study, tmp_path):
    Path("lingering.py").write_text("import atexit, time; atexit.register(time.sleep, 5)")
    Path("tiny.yaml").write_text(f"{Path('tiny.yaml').read_text()}plugins: [lingering]\n")
    interrupted(study, Path("runs/study/tiny_plain_seed5/report.html").exists, tmp_path)
    assert [json.loads(line)["run"] for line in Path("report.jsonl").read_text().splitlines()] == ["tiny_plain_seed5"]


@pytest.mark.slow
def test_a_failing_run_ends_the_study(study):
    Path("tiny.yaml").write_text(f"{Path('tiny.yaml').read_text()}optimizer: {{name: adamx}}\n")
    with pytest.raises(RunError, match=r"^runs/study/tiny_plain_seed5: optimizer.*adamx") as failed:
        run_study(study, jobs=1)
    assert "\n" not in str(failed.value) and not Path("report.md").exists()
    assert not list(Path("runs").glob("*/*"))


@pytest.mark.slow
def test_a_study_evaluates_its_runs_under_corruptions(study, image_folder, capsys):
    """It says what eval_net.py wrote, without the runs too; an evaluation that is lost is made again.

    What was finished without corruptions is evaluated, not trained again.
    """
    Path("tiny.yaml").write_text(
        f"_base_: {DIGITS}\n"
        "model: {kwargs: {depth: 1}}\n"
        f"data: {{dataset: folder, root: {image_folder}, train_split: train, eval_split: val}}\n"
        "train: {max_iters: 2, global_batch: 8}\n"
    )
    plain = STUDY.replace("[5, 3]", "[3]")
    study.write_text(plain)
    run_study(study, jobs=2)
    trained = {path: path.read_bytes() for path in Path("runs").rglob("metrics.jsonl")}
    study.write_text(f"{plain}corruptions: true\nagainst: {{drop path: plain}}\n")
    planned = plan(load_study(study), study)
    assert len(trained) == 2 and len(run_study(study, jobs=1, seconds=0)[1]) == 2
    assert Path("report.md") in run_study(study, jobs=2)[0]
    assert {path: path.read_bytes() for path in trained} == trained
    assert len(Path("report.jsonl").read_text().splitlines()) == 4
    text = Path("report.md").read_text()
    robustness = text.partition("## Under corruptions")[2].partition("## ")[0]
    gained = "; under corruptions ([+-].+? .one seed: no interval.)\n"
    assert re.search(f"- drop path, against plain: .+?{gained}", text)[1] in robustness
    for run in planned:
        found = Path(run.config.output_dir, "evaluation", "last_variant=corrupted", "results.json")
        figures = json.loads(found.read_text())["results"][0]
        assert f"{figures['top1']:.2f}" in robustness and f"{figures['ece']:.2f}" in robustness
        assert figures["top1"] == pytest.approx(100 - figures["mean_corruption_error"])
    assert "| gaussian noise" in robustness.replace("  ", " ")
    shutil.rmtree(found.parent)
    assert planned[-1].finished is None and planned[0].finished is not None
    Path("report.jsonl").unlink()
    run_study(study, jobs=2)
    assert found.exists() and Path("report.md").read_text() == text
