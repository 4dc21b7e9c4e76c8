"""Terminals and file systems without UTF-8, names that are none, and `~` wherever a path enters."""

from __future__ import annotations

import importlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import tools.compare_runs
import tools.eval_net
import tools.export
import tools.train_net
import tools.visualize_augsub
from engine.config_file import load_config
from engine.figure import save
from tools.comparison.study import load_study

ROOT = Path(__file__).parents[2]
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
LATIN_1 = os.fsdecode(b"caf\xe9 $^_{")  # no UTF-8, and no formula
SETTINGS = """
data: {dataset: folder, root: bäume, image_size: 16, workers: 1, eval_split: val}
model: {kwargs: {depth: 1, embed_dim: 16, num_heads: 1, patch_size: 4}}
train: {global_batch: 4, max_iters: 2}
log: {csv: true, period: 1}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder: a configuration and images whose names are no ASCII, or no UTF-8."""
    monkeypatch.chdir(tmp_path)
    for name in ("Bäume", LATIN_1):
        for split, count in (("train", 4), ("val", 2)):
            classes = tmp_path / "bäume" / split / name
            classes.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(np.full((16, 16, 3), 9 * number, np.uint8)).save(classes / f"é{number}.png")
    (tmp_path / "ünï.yaml").write_text(f"_base_: {ROOT}/configs/digits_vit.yaml{SETTINGS}", encoding="utf-8")
    return tmp_path


def test_a_run_where_nothing_is_utf_8_and_its_evaluation(call, folder):
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config", "ünï.yaml", "output_dir=läufe/ä"]
    ended = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "results          l\\xe4ufe/\\xe4" in ended.stdout.decode("ascii")
    assert load_config("läufe/ä/config.yaml").data.root == "bäume"
    assert "results          läufe/ä" in Path("läufe/ä/log.txt").read_text(encoding="utf-8")
    assert call(tools.eval_net, "läufe/ä", "--output", "ß")[0] == 0
    table = Path("ß/classes.csv").read_text(encoding="utf-8")
    assert "trained,Bäume,2," in table and "trained,caf\\xe9 $^_{,2," in table
    code, _, error = call(tools.train_net, "--config", "ünï.yaml", f"output_dir={LATIN_1}")
    assert code == 2 and error.startswith("error: override 'output_dir=caf\\udce9 $^_{': must be UTF-8")


@pytest.mark.parametrize("name", TOOLS)
def test_the_help_of_every_tool_can_be_printed(monkeypatch, name):
    tool = importlib.import_module(f"tools.{name}")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    assert ended.value.code == 0
    print("\u2026 \xb1 \udce9")  # and all that follows
    terminal.flush()
    printed = terminal.buffer.getvalue().decode("ascii")
    assert "usage: " in printed and printed.endswith("\\u2026 \\xb1 \\udce9\n")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("train_net", ["--epochs", "3"], "unrecognized arguments: --epochs; did you mean train.epochs=…?"),
        (
            "train_net",
            ["--weight-decay=0.1"],
            "unrecognized arguments: --weight-decay=0.1; did you mean optimizer.weight_decay=…?",
        ),
        ("eval_net", ["--frobnicate", "x"], "unrecognized arguments: --frobnicate; --help says what is allowed"),
        ("eval_net", [], "the following arguments are required: WHAT; --help says"),
        ("compare_runs", ["--jobs", "x"], "argument --jobs: invalid int value: 'x'; --help says"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, tool, arguments, message):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"tools.{tool}").main(arguments)
    assert ended.value.code == 2
    printed, said = capsys.readouterr()
    assert not printed and said.count("\n") == 1 and said.startswith(f"error: {message}")


def test_nothing_heavy_is_imported_for_help():
    code = f"import importlib, sys\nfor name in {TOOLS}: importlib.import_module(f'tools.{{name}}')\n"
    code += "print(*{'torch', 'timm', 'matplotlib', 'scipy'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.stdout, ended.stderr) == ("\n", "")


def test_pictures_take_any_name(call, folder):
    figure = Figure()
    figure.subplots().set_title("a $x$ $_{ \\frac")
    save(figure, folder / "a.png")
    image = folder / LATIN_1
    (folder / "bäume" / "val" / "Bäume" / "é0.png").rename(image)
    named = ("--model", "vit_tiny_patch16_224", "--augsub", "masking", "--images", str(image), "--output", "ä.png")
    code, output, _ = call(tools.visualize_augsub, *named)
    assert (code, output) == (0, "ä.png\n") and Path("ä.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_in_the_home_folder_is_found_by_every_tool(tmp_path, monkeypatch, call):
    """Trained, compared, evaluated and exported with `~` throughout; nothing appears where the commands were given."""
    home, here = tmp_path / "home", tmp_path / "here"
    for path in (home, here):
        path.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    (home / "base.yaml").write_text(f"_base_: {ROOT}/configs/digits_vit.yaml\n")
    (home / "plain.yaml").write_text("_base_: [~/base.yaml]\n")
    text = "title: a\nconfigs: [~/base.yaml]\nseeds: [1]\nways: {a: [], b: []}\nreport: ~/r.md\noutput_dir: ~/x\n"
    (home / "study.yaml").write_text(text)
    study = load_study(home / "study.yaml")
    assert (study.configs, study.report, study.output_dir) == ([f"{home}/base.yaml"], f"{home}/r.md", f"{home}/x")
    for seed in (0, 1):
        run = ("--config", "~/plain", f"output_dir=~/runs/r{seed}", f"seed={seed}", "train.max_iters=2")
        assert call(tools.train_net, *run)[0] == 0
    assert load_config(home / "runs" / "r0" / "config.yaml").output_dir == f"{home}/runs/r0"
    assert call(tools.train_net, *run, "--eval-only", "evaluation.checkpoint=~/runs/r0/checkpoints/last.pt")[0] == 0
    assert call(tools.compare_runs, "a=~/runs/r0", "b=~/runs/r*1", "--picture", "~/c.png")[0] == 0
    assert call(tools.eval_net, "~/runs/r0", "--output", "~/evaluated")[0] == 0
    code, output, _ = call(tools.export, "~/runs/r0/checkpoints/last.pt", "~/model")
    assert code == 0 and f"local-dir:{home}/model" in output
    own = ("data.dataset=digits", "data.image_size=8")
    assert call(tools.eval_net, "local-dir:~/model", "--output", "~/e", *own)[0] == 0
    assert call(tools.visualize_augsub, "--config", "~/plain.yaml", "--output", "~/seen.png")[0] == 0
    assert all((home / name).is_file() for name in ("c.png", "evaluated/results.json", "seen.png"))
    assert not list(here.iterdir())
