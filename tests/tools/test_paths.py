"""`~` is a home folder wherever a path enters: in configurations, on command lines and in studies."""

from __future__ import annotations

from pathlib import Path

import pytest

import tools.compare_runs
import tools.eval_net
import tools.export
import tools.train_net
import tools.visualize_augsub
from engine.config import FILE, marked
from engine.config_file import load_config, parse_config
from engine.errors import InputError
from engine.text import expanded
from tools.comparison.study import load_study

NOBODY = "~no_such_user_of_ours"
DIGITS = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """The home folder; the working folder is another, empty one."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.mark.parametrize("key", marked(FILE))
def test_paths_of_a_configuration(home, key):
    section, _, name = key.rpartition(".")
    prefix = "local-dir:" if key == "model.name" else ""

    def given(path: str, overrides: list[str]) -> str:
        config = parse_config(f"{section}:\n  {name}: {path}" if section else f"{name}: {path}", "here", overrides)
        return getattr(getattr(config, section) if section else config, name)

    assert given(f"{prefix}~/x", []) == given(f"{prefix}a", [f"{key}={prefix}~/x"]) == f"{prefix}{home}/x"
    for as_it_is in ("a/~/x", "./~x", "/x~", "x"):
        assert given(as_it_is, []) == as_it_is
    with pytest.raises(
        InputError, match=rf"^{key} = {prefix}{NOBODY}/x: {NOBODY} has no home folder; .* \./{NOBODY}/x"
    ):
        given(prefix + NOBODY + "/x", [])


def test_the_home_folder_of_a_user():
    pwd = pytest.importorskip("pwd")
    user = pwd.getpwuid(0)
    assert expanded(f"~{user.pw_name}/x") == f"{user.pw_dir}/x"


def test_other_keys_are_no_paths(home):
    assert parse_config("", "here", ["data.train_split=~/x"]).data.train_split == "~/x"


def test_configurations_and_what_they_inherit_from(home):
    (home / "base.yaml").write_text("seed: 5\n")
    (home / "run.yaml").write_text("train: {amp: off}\n_base_: [~/base.yaml]\n")
    for path in ("~/run.yaml", "~/run", Path("~/run.yaml")):
        assert load_config(path).seed == 5
    with pytest.raises(InputError, match=f"{NOBODY}/run.yaml: {NOBODY} has no home folder"):
        load_config(f"{NOBODY}/run.yaml")


def test_a_study(home):
    (home / "base.yaml").write_text("seed: 5\n")
    path = home / "study.yaml"
    text = "title: a\nconfigs: [~/base.yaml]\nseeds: [1]\nways: {a: [], b: []}\nreport: ~/r.md\noutput_dir: ~/x\n"
    path.write_text(text)
    study = load_study(path)
    assert (study.configs, study.report, study.output_dir) == ([f"{home}/base.yaml"], f"{home}/r.md", f"{home}/x")


def test_a_run_in_the_home_folder_is_found_by_every_tool(home, call):
    """Trained, compared, evaluated and exported with `~` throughout; nothing appears where the commands were given."""
    (home / "plain.yaml").write_text(f"_base_: {DIGITS}\n")
    for seed in (0, 1):
        run = ("--config", "~/plain.yaml", f"output_dir=~/runs/r{seed}", f"seed={seed}", "train.max_iters=2")
        assert call(tools.train_net, *run)[0] == 0
    assert load_config(home / "runs" / "r0" / "config.yaml").output_dir == f"{home}/runs/r0"
    assert call(tools.train_net, *run, "--eval-only", "evaluation.checkpoint=~/runs/r0/checkpoints/last.pt")[0] == 0
    assert call(tools.compare_runs, "a=~/runs/r0", "b=~/runs/r*1", "--picture", "~/c.png")[0] == 0
    assert (home / "c.png").is_file()
    assert call(tools.eval_net, "~/runs/r0", "--output", "~/evaluated")[0] == 0
    assert (home / "evaluated" / "results.json").is_file()
    code, output, _ = call(tools.export, "~/runs/r0/checkpoints/last.pt", "~/model")
    assert code == 0 and f"local-dir:{home}/model" in output
    own = ("data.dataset=digits", "data.image_size=8")
    assert call(tools.eval_net, "local-dir:~/model", "--output", "~/e", *own)[0] == 0
    assert call(tools.visualize_augsub, "--config", "~/plain.yaml", "--output", "~/seen.png")[0] == 0
    assert (home / "seen.png").is_file()
    assert list(Path.cwd().iterdir()) == []
