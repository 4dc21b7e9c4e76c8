"""tools/export.py: what leaves is timm's, and gives the run's own logits."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from engine import defaults
from engine.checkpoint import load
from engine.config_file import load_config
from engine.distributed import Process
from tools import export

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ("digits_vit", "digits_swin", "digits_resnet")


def trained(folder: Path, config: str, *settings: str) -> Path:
    """The last checkpoint of a short run."""
    settings = (*settings, f"output_dir={folder}", "data.workers=0")
    defaults.train(load_config(config, settings), Process(0, 1, torch.device("cpu")), resume=False)
    return folder / "checkpoints" / "last.pt"


@pytest.fixture
def tool(call):
    return partial(call, export)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """With averaged weights."""
    root = tmp_path_factory.mktemp("runs")
    settings = ("train.max_iters=2", "ema.enabled=true", "ema.decay=0.5", "evaluation.batch=800")
    return {name: trained(root / name, name, *settings) for name in NAMES}


def changed(checkpoint: Path, path: Path, state: dict | None = None, **sections: dict) -> Path:
    """A copy of a checkpoint with other content, and other values in sections of its configuration."""
    state = torch.load(checkpoint, weights_only=True) | (state or {})
    settings = yaml.safe_load(state["config"])
    for section, values in sections.items():
        settings[section] |= values
    torch.save(state | {"config": yaml.safe_dump(settings)}, path)
    return path


@torch.no_grad()
def logits_of(checkpoint: Path, images: torch.Tensor, ema: bool = False) -> torch.Tensor:
    """By a model built here, without tools/export.py."""
    name = checkpoint.parents[1].name
    settings = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]
    size = {} if "resnet" in name else {"img_size": 8}
    model = timm.create_model(settings["name"], num_classes=10, in_chans=1, **size, **settings["kwargs"])
    state = load(checkpoint)
    weights = dict(state["hooks"]["ema"]["model"] if ema else state["model"])
    weights.pop("mask_token", None)
    model.load_state_dict(weights)
    return model.eval()(images)


def digits(checkpoint: Path, batch: int = 5) -> torch.Tensor:
    side = 32 if "resnet" in str(checkpoint) else 8
    return torch.randn(batch, 1, side, side)


@pytest.mark.parametrize(("name", "ema"), [(NAMES[0], True), (NAMES[0], False), (NAMES[1], False), (NAMES[2], True)])
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
    card, summary = (folder / "README.md").read_text(), json.loads((checkpoint.parents[1] / "summary.json").read_text())
    assert f"- top1: {summary['ema_top1' if ema else 'top1']:.4g}" in card and "after 2 steps" in card
    assert "name: masking" in card and "lr: 0.00" in card
    assert 'timm.create_model("hf-hub:USER/exported", pretrained=True)' in card


def test_a_model_that_is_built_for_one_size_is_told_it(tool, tmp_path):
    settings = ("model.name=levit_128s", "model.kwargs={}", "data.image_size=64", "train.max_iters=1")
    checkpoint = trained(tmp_path / "run", "digits_resnet", *settings)
    code, printed, error = tool(checkpoint, tmp_path / "levit.safetensors")
    assert code == 0, error
    model = eval(printed, {"timm": timm}).eval()
    assert "img_size=64" in printed and model(torch.zeros(1, 1, 64, 64)).shape == (1, 10)


PLUGIN = """
import timm

@timm.models.register_model
def test_of_mine(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    return timm.models.vit_tiny_patch16_224(**kwargs)
"""


def test_a_model_of_a_plugin_is_exported_where_the_plugin_is_named(tool, checkpoints, tmp_path, monkeypatch, caplog):
    (tmp_path / "mine.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    state = torch.load(checkpoints["digits_vit"], weights_only=True)
    config = yaml.safe_load(state["config"]) | {"plugins": ["mine"]}
    torch.save(state | {"model_name": "test_of_mine", "config": yaml.safe_dump(config)}, "last.pt")
    assert tool("last.pt", "model.pth", "plugins=[mine]")[0] == 0
    assert torch.load("model.pth", weights_only=True).keys() == state["model"].keys()
    monkeypatch.delitem(timm.models._registry._model_entrypoints, "test_of_mine")
    with caplog.at_level("WARNING"):
        code, _, errors = tool("last.pt", "other.pth")
    assert code == 2 and "last.pt: timm has no model 'test_of_mine'" in errors
    assert "last.pt: its run had plugins=[mine], which a file cannot ask for" in caplog.text


def test_images_from_files_keep_their_preprocessing(tmp_path, tool, checkpoints):
    transform = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "eval_crop": 1.0}
    data = {"dataset": "folder", "root": "somewhere"}
    checkpoint = changed(checkpoints["digits_vit"], tmp_path / "folder.pt", data=data, transform=transform)
    code, _, error = tool(checkpoint, tmp_path / "exported")
    assert code == 0, error
    config = json.loads((tmp_path / "exported" / "config.json").read_text())["pretrained_cfg"]
    assert (*config["mean"], *config["std"], config["crop_pct"]) == pytest.approx((0.2, 0.5, 1.0))  # of one channel
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
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


@pytest.mark.parametrize(
    ("checkpoint", "target", "complaint"),
    [
        (None, "taken", "is there already; a folder to export to must be new"),
        (None, "model.bin", "allowed is a name that ends in"),
        (None, "plain.pt/model", "cannot be written"),
        ("plain.pt", "model.pt", "is not one of a run: it has weight"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tool, checkpoints, tmp_path, checkpoint, target, complaint):
    (tmp_path / "taken").mkdir()
    torch.save({"weight": torch.zeros(1)}, tmp_path / "plain.pt")
    code, _, error = tool(tmp_path / checkpoint if checkpoint else checkpoints["digits_vit"], tmp_path / target)
    assert (code, error.count("\n")) == (2, 1) and complaint in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain.pt", "taken"]


def test_what_chose_the_best_checkpoint_is_what_is_exported(tool, checkpoints, tmp_path):
    """The average, if the run's metric is ema_top1, unless the command says otherwise."""
    checkpoint = changed(checkpoints["digits_vit"], tmp_path / "best.pt", evaluation={"metric": "ema_top1"})
    state, name = load(checkpoint), "blocks.0.attn.qkv.weight"
    for choice in ([], ["--ema"], ["--no-ema"]):
        code, output, _ = tool(checkpoint, tmp_path / "model.safetensors", *choice)
        assert code == 0 and output.endswith("  # the averaged weights\n") == (choice != ["--no-ema"])
        wanted = state["model"] if choice == ["--no-ema"] else state["hooks"]["ema"]["model"]
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], wanted[name])


def test_nothing_is_told_of_others_weights_nor_of_this_machine(tool, checkpoints, tmp_path):
    """Neither the tag and licence of timm's weights, nor where images, models and timm's files lie."""
    own = timm.create_model("test_vit", num_classes=10, in_chans=1)
    state = {"model_name": "test_vit.r160_in1k", "model": own.state_dict()}
    sections = {"data": {"root": "/secret", "image_size": 160}, "model": {"pretrained": False, "kwargs": {}}}
    tagged = changed(checkpoints["digits_vit"], tmp_path / "tagged.pt", state, **sections)
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=10, in_chans=1), tmp_path / "secret")
    name = f"local-dir:{tmp_path}/secret"
    state = {"model_name": name, "model": timm.create_model(name).state_dict()}
    sections = {"model": {"name": name, "kwargs": {"cache_dir": f"{tmp_path}/secret"}}}
    local = changed(checkpoints["digits_resnet"], tmp_path / "local.pt", state, **sections)
    for checkpoint, architecture in ((tagged, "test_vit"), (local, "test_resnet")):
        folder = tmp_path / architecture
        code, _, error = tool(checkpoint, folder)
        assert code == 0, error
        card, text = ((folder / file).read_text() for file in ("README.md", "config.json"))
        assert f"`{architecture}` of timm" in card and not any("secret" in part for part in (card, text))
        config = json.loads(text)
        assert config["architecture"] == architecture and "r160_in1k" not in card + text
        assert not {"tag", "license"} & config["pretrained_cfg"].keys()
