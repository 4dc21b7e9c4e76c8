"""Studies: what their files may say, and a real one that is interrupted, continued and written again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.errors import InputError, RunError
from tools.comparison.report import run_study
from tools.comparison.study import load_study, planned_runs, variants

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compare_runs.py"
STUDIES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
CONFIG = f"""
_base_: {ROOT}/configs/digits_vit.yaml
model: {{kwargs: {{depth: 1}}}}
train: {{max_iters: 60}}
evaluation: {{period: 3}}
log: {{period: 5}}
"""
STUDY = """
title: A tiny study
configs: [tiny.yaml]
seeds: [3, 5]
ways:
  plain: ["augsub.sub_models=[]"]
  drop path: ["augsub.sub_models=[{augmentations: [{name: drop_path, ratio: 0.5}]}]"]
report: OUT/report.md
output_dir: OUT/runs
"""


@pytest.fixture
def study(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.replace("OUT", str(tmp_path)))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_our_studies_are_well_formed(path):
    study = load_study(path)
    runs = planned_runs(study, variants(study, path))
    assert len({run.folder for run in runs}) == len(study.configs) * len(study.ways) * len(study.seeds)
    assert runs[0].load().augsub.sub_models == []  # the baseline is plain training
    assert f"--study {path.relative_to(ROOT)}" in path.read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds:", "seed:", r"Key 'seed' not in 'Study'. Did you mean: 'seeds'\?"),
        ("title: A tiny study", "", "missing mandatory value: title"),
        ("[3, 5]", "[3, 3]", "seeds: 3 comes 2 times"),
        ("[3, 5]", "[]", r"seeds = \[\]: at least one is needed"),
        ("[3, 5]", "[x]", "Value 'x' of type 'str' could not be converted to Integer"),
        ("[3, 5]", "[-1]", "seed = -1: allowed is in"),
        ("tiny.yaml]", "tiny.yml]", "study.yaml: config file .*tiny.yml does not exist, did you mean .*tiny.yaml"),
        ("drop path:", "plain:", "line 7: found duplicate key plain"),
        ("drop path:", '"plain+":', "folders of the runs: .*tiny_plain comes 2 times"),
        ("  drop path: [", "  other: [seed=1, ", "ways: other: override 'seed=1': seed and output_dir are the study's"),
        ("drop path:", "again: ['augsub.sub_models=[]']\n  drop path:", "again: is the same configuration as plain"),
        ("ratio: 0.5", "ratio: 1.5", "ways: drop path: augsub.sub_models: .*ratio"),
        ("drop_path,", "drop_pat,", "ways: drop path: augsub.sub_models: .*drop_path"),
        ("augmentations:", "augmentation:", "ways: drop path: override .*Did you mean: 'augmentations'"),
        ("  plain: ", "  # ", r"ways = \['drop path'\]: at least two are needed"),
        ('["augsub.sub_models=[]"]', "3", "ways"),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused_before_anything_runs(study, old, new, message):
    assert old in study.read_text()
    study.write_text(study.read_text().replace(old, new))
    with pytest.raises(InputError, match=message) as refused:
        run_study(study, jobs=1)
    assert "\n" not in str(refused.value) and str(study) in str(refused.value)
    assert not (study.parent / "runs").exists()


def test_a_study_is_interrupted_continued_and_written_again(study, capsys):
    runs, report = study.parent / "runs", study.parent / "report.md"
    first = runs / "tiny_plain_seed3"
    tool = [sys.executable, str(TOOL), "--study", str(study)]
    with subprocess.Popen(
        [*tool, "--jobs", "1"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    ) as started:
        deadline = time.monotonic() + 120
        while not ((first / "metrics.jsonl").exists() and (first / "metrics.jsonl").stat().st_size):
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(started.pid, signal.SIGINT)  # as a terminal does for Ctrl-C
        said = started.communicate(timeout=120)[1]
    assert started.returncode == 130 and said.endswith("interrupted: the same command goes on\n")
    assert (first / "checkpoints" / "last.pt").exists() and "the state is saved" not in said
    assert not (first / "summary.json").exists() and not report.exists()

    assert report in run_study(study, jobs=2)
    assert sorted(capsys.readouterr().err.splitlines()) == sorted(
        f"{runs}/tiny_{way}_seed{seed}: finished" for way in ("plain", "drop_path") for seed in (3, 5)
    )
    assert "resumed" in (first / "log.txt").read_text()

    text, finished = report.read_text(), {path: path.stat().st_mtime_ns for path in runs.glob("*/summary.json")}
    assert len(finished) == 4
    pictures = [study.parent / name for name in re.findall(r"\]\((\w+\.png)\)", text)]
    assert len(pictures) == 3
    for path in (report, *pictures):
        path.unlink()
    assert set(run_study(study, jobs=2)) == {report, *pictures}
    assert report.read_text() == text and all(path.exists() for path in pictures)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished

    assert f"Written by `python tools/compare_runs.py --study {study}`: 4 runs" in text
    assert "1000 training images and 797 held-out ones of 8 x 8 pixels" in text
    table = {row.split("|")[1].strip(): row for row in text.partition("## What")[0].splitlines() if row.startswith("|")}
    assert table["plain"].endswith("| 1.00    |") and table["drop path"].endswith("| 2.00    |")
    assert re.search(r"\| \*\*\d+\.\d\d ± \d+\.\d\d\*\* +\| baseline ", table["plain"])
    assert "There is one comparison, which its interval of 95 % decides." in text

    study.write_text(study.read_text().replace("ratio: 0.5", "ratio: 0.25"))
    with pytest.raises(InputError, match=r"tiny_drop_path_seed3: was trained with augsub.sub_models = .*'ratio': 0.5"):
        run_study(study, jobs=1)


def test_a_failing_run_ends_the_study(study):
    (study.parent / "tiny.yaml").write_text(f"{CONFIG}optimizer: {{name: adamx}}\n")
    with pytest.raises(RunError, match=r"/runs/tiny_plain_seed3: optimizer.*adamx") as failed:
        run_study(study, jobs=1)
    assert "\n" not in str(failed.value) and not (study.parent / "report.md").exists()
    assert list((study.parent / "runs").glob("*")) == []
