"""tools/export.py: what leaves is timm's, and gives the run's own logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from engine.checkpoint import load
from tools import export

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(call):
    return partial(call, export)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """The last checkpoints of short runs with averaged weights."""
    root, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("digits_vit", "digits_swin", "digits_resnet"):
        command = [sys.executable, ROOT / "tools" / "train_net.py", "--config", name, f"output_dir={root}/{name}"]
        command += ["train.max_iters=4", "ema.enabled=true", "ema.decay=0.5"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found[name] = root / name / "checkpoints" / "last.pt"
    return found


@torch.no_grad()
def logits_of(checkpoint: Path, images: torch.Tensor, ema: bool = False) -> torch.Tensor:
    """By a model built here, without tools/export.py."""
    name = checkpoint.parents[1].name
    settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["model"]
    size = {} if "resnet" in name else {"img_size": 8}
    model = timm.create_model(settings["name"], num_classes=10, in_chans=1, **size, **settings["kwargs"])
    state = load(checkpoint)
    weights = dict(state["hooks"]["ema"]["model"] if ema else state["model"])
    weights.pop("mask_token", None)
    model.load_state_dict(weights)
    return model.eval()(images)


def digits(checkpoint: Path, batch: int = 5) -> torch.Tensor:
    side = 32 if "resnet" in str(checkpoint) else 8
    return torch.randn(batch, 1, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["digits_vit", "digits_swin", "digits_resnet"])
@pytest.mark.parametrize("ema", [False, True])
def test_timm_loads_the_folder_and_gives_the_same_logits(tool, checkpoints, tmp_path, name, ema):
    folder, checkpoint = tmp_path / "exported", checkpoints[name]
    code, printed, error = tool(checkpoint, folder, *(["--ema"] if ema else []))
    assert code == 0, error
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = eval(printed, {"timm": timm}).eval()
    images = digits(checkpoint)
    with torch.no_grad():
        assert torch.equal(model(images), logits_of(checkpoint, images, ema))
    data = timm.data.resolve_data_config(model=model)
    assert data["input_size"] == (1, *images.shape[-2:]) and (*data["mean"], *data["std"]) == (0.0, 1.0)
    assert json.loads((folder / "config.json").read_text())["label_names"] == [str(digit) for digit in range(10)]


def test_a_model_that_is_built_for_one_size_is_told_it(tool, train_net, tmp_path):
    settings = ["model.name=levit_128s", "model.kwargs={}", "data.image_size=64", "train.max_iters=1"]
    assert train_net("--config", "digits_resnet", *settings, f"output_dir={tmp_path}/run")[0] == 0
    code, printed, error = tool(tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "levit.safetensors")
    assert code == 0, error
    model = eval(printed, {"timm": timm}).eval()
    assert "img_size=64" in printed and model(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


PLUGIN = """
import timm

@timm.models.register_model
def test_of_mine(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return timm.models.vit_tiny_patch16_224(**kwargs)
"""


def test_a_model_of_a_plugin_is_exported_where_the_plugin_is_named(tool, train_net, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    run = ["--config", "digits_vit", "plugins=[mine]", "model.name=test_of_mine", "train.max_iters=2"]
    assert train_net(*run, "output_dir=run")[0] == 0
    checkpoint = Path("run", "checkpoints", "last.pt")
    assert tool(checkpoint, "model.pth", "--plugins", "mine")[0] == 0
    assert torch.load("model.pth", weights_only=True).keys() == load(checkpoint)["model"].keys()
    monkeypatch.delitem(timm.models._registry._model_entrypoints, "test_of_mine")
    code, _, errors = tool(checkpoint, "other.pth")
    assert code == 2 and "last.pt, whose run had --plugins mine: timm has no model 'test_of_mine'" in errors


def test_the_card_has_recipe_figures_and_how_to_load(tool, checkpoints, tmp_path):
    folder = tmp_path / "my_digits"
    assert tool(checkpoints["digits_vit"], folder)[0] == 0
    card = (folder / "README.md").read_text()
    summary = json.loads((checkpoints["digits_vit"].parents[1] / "summary.json").read_text())
    assert f"- top1: {summary['top1']:.4g}" in card and "after 4 steps" in card
    assert "name: masking" in card and "lr: 0.002" in card
    assert 'timm.create_model("hf-hub:USER/my_digits", pretrained=True)' in card


def test_images_from_files_keep_their_preprocessing(tmp_path, tool, checkpoints):
    state = torch.load(checkpoints["digits_vit"], weights_only=True)
    settings = yaml.safe_load(state["config"])
    settings["data"] |= {"dataset": "folder", "root": "somewhere"}
    settings["transform"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "eval_crop": 1.0}
    state["config"] = yaml.safe_dump(settings)
    changed = tmp_path / "folder.pt"
    torch.save(state, changed)
    code, _, error = tool(changed, tmp_path / "exported")
    assert code == 0, error
    config = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (*config["mean"], *config["std"], config["crop_pct"]) == pytest.approx((0.2, 0.5, 1.0))  # of one channel
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", ["digits_vit", "digits_swin", "digits_resnet"])
def test_onnx_gives_the_same_logits_for_any_batch(tool, checkpoints, tmp_path, name):
    onnxruntime = pytest.importorskip("onnxruntime")
    file, checkpoint = tmp_path / "model.onnx", checkpoints[name]
    code, printed, error = tool(checkpoint, file)
    assert code == 0, error
    assert printed.startswith(f'onnxruntime.InferenceSession("{file}")')
    session = onnxruntime.InferenceSession(str(file))
    for batch in (1, 7):
        images = digits(checkpoint, batch)
        (found,) = session.run(["logits"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), logits_of(checkpoint, images), atol=1e-4, rtol=1e-4)


def test_errors_are_one_line_and_leave_nothing(tool, checkpoints, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    plain = tmp_path / "plain.pt"
    torch.save({"weight": torch.zeros(1)}, plain)
    for checkpoint, target, complaint in (
        (checkpoints["digits_vit"], taken, "is there already; a folder to export to must be new"),
        (checkpoints["digits_vit"], tmp_path / "model.bin", "allowed is a name that ends in"),
        (checkpoints["digits_vit"], plain / "model", "cannot be written"),
        (plain, tmp_path / "model.pt", "is not one of a run: it has weight"),
        (tmp_path / "none.pt", tmp_path / "model.pt", "does not exist"),
    ):
        code, _, error = tool(checkpoint, target)
        assert (code, error.count("\n")) == (2, 1) and complaint in error, (target, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pt", "taken"]


@pytest.mark.parametrize("choice", [None, "--ema", "--no-ema"])
def test_what_chose_the_best_checkpoint_is_what_is_exported(choice, tool, tmp_path):
    """The average, if the run's metric is ema_top1, unless the command says otherwise."""
    run, target = tmp_path / "run", tmp_path / "model.safetensors"
    settings = ["train.max_iters=4", "ema.enabled=true", "ema.decay=0.5", "evaluation.metric=ema_top1"]
    command = [
        sys.executable,
        ROOT / "tools" / "train_net.py",
        "--config",
        "digits_vit",
        f"output_dir={run}",
        *settings,
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    code, output, _ = tool(run / "checkpoints" / "best.pt", target, *([choice] if choice else []))
    assert code == 0 and output.endswith("  # the averaged weights\n") == (choice != "--no-ema")
    state = load(run / "checkpoints" / "best.pt")
    wanted = state["model"] if choice == "--no-ema" else state["hooks"]["ema"]["model"]
    assert torch.equal(load_file(target)["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"])


def test_a_card_and_its_configuration_tell_nothing_of_others_weights_nor_of_this_machine(tool, image_folder, tmp_path):
    run, target = tmp_path / "run", tmp_path / "hub"
    command = [sys.executable, ROOT / "tools" / "train_net.py", "--config", "finetune_folder", f"output_dir={run}"]
    command += [
        f"data.root={image_folder}",
        "model.name=test_vit.r160_in1k",
        "model.pretrained=false",
        "train.epochs=4",
    ]
    command += ["schedule.warmup_epochs=1", "data.workers=0", "data.image_size=32", "optimizer.layer_decay=null"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert tool(run / "checkpoints" / "last.pt", target)[0] == 0
    config, card = json.loads((target / "config.json").read_text()), (target / "README.md").read_text()
    assert config["architecture"] == "test_vit" and not {"tag", "license"} & config["pretrained_cfg"].keys()
    assert "r160_in1k" not in card and str(tmp_path) not in card and str(image_folder) not in card


def test_folders_that_a_run_read_from_are_not_published(tool, checkpoints, tmp_path):
    """Neither the folder of a model in the hub's layout nor where timm keeps its files."""
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10, in_chans=1), tmp_path / "secret")
    state = torch.load(checkpoints["digits_resnet"], weights_only=True)
    settings = yaml.safe_load(state["config"])
    settings["model"] |= {"name": f"local-dir:{tmp_path}/secret", "kwargs": {"cache_dir": f"{tmp_path}/secret"}}
    state |= {"model_name": settings["model"]["name"], "config": yaml.safe_dump(settings)}
    state["model"] = timm.create_model("test_resnet", num_classes=10, in_chans=1).state_dict()
    torch.save(state, tmp_path / "last.pt")
    code, _, error = tool(tmp_path / "last.pt", tmp_path / "hub")
    assert code == 0, error
    published = [(tmp_path / "hub" / name).read_text() for name in ("README.md", "config.json")]
    assert "`test_resnet` of timm" in published[0] and not any("secret" in text for text in published)
