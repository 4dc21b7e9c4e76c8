"""Configurations, checkpoints and model folders from strangers run no code; `plugins` is the only door."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.conftest import DIGITS, Evil

RUN = ("--config", DIGITS, "model.kwargs.depth=1", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=1",
       "checkpoint.period=2", "train.max_iters=2")  # fmt: skip
PROMISE = "no code of it is executed, and the run ends in one line"

YAML = {
    "a call": "!!python/object/apply:os.system ['touch SENTINEL']",
    "a new object": "!!python/object/new:os.system ['touch SENTINEL']",
    "a function": "!!python/name:os.system",
    "a module": "!!python/module:os",
    "subprocess": "!!python/object/apply:subprocess.check_output [['touch', 'SENTINEL']]",
    "a short tag": "!python/object/apply:os.system ['touch SENTINEL']",
    "a resolver": '${oc.eval:\'__import__("os").system("touch SENTINEL")\'}',
    "another resolver": '${eval:\'__import__("os").system("touch SENTINEL")\'}',
    "a shell": "$(touch SENTINEL)",
}


@pytest.fixture
def sentinel(tmp_path) -> Path:
    """Exists once code was executed."""
    return tmp_path / "executed"


@pytest.fixture
def assert_refused(server, sentinel, tmp_path):
    """Run, and see that it ends in one line without having executed anything."""

    def check(*arguments: Any) -> None:
        server.refused(*RUN, f"output_dir={tmp_path}/run", *arguments)
        assert not sentinel.exists(), arguments

    return check


@pytest.fixture
def malicious_files(sentinel, tmp_path) -> list[Path]:
    """Files that run code for whoever unpickles them without care."""
    code, files = Evil(sentinel), [tmp_path / "legacy.pt"]
    torch.save(code, files[0], _use_new_zipfile_serialization=False)
    for suffix in ("pt", "pth", "bin", "safetensors"):
        for name, content in {"alone": code, "inside": {"model": {"head.weight": code}}}.items():
            files += [tmp_path / f"{name}_{kind}.{suffix}" for kind in ("zip", "pickle")]
            torch.save(content, files[-2])
            files[-1].write_bytes(pickle.dumps(content))
    torch.load(files[1], weights_only=False)
    assert sentinel.exists()
    sentinel.unlink()
    return files


@pytest.mark.faults(fault="a configuration that would run code: YAML tags, resolvers", promise=PROMISE)
@pytest.mark.parametrize("name", YAML)
def test_a_malicious_configuration(assert_refused, sentinel, tmp_path, name):
    value, config = YAML[name].replace("SENTINEL", str(sentinel)), tmp_path / "config.yaml"
    for content in (f"seed: {value}\n", f"model: {{name: vit_tiny_patch16_224, kwargs: {{depth: {value}}}}}\n", value):
        config.write_text(content)
        assert_refused("--config", config, "data.dataset=digits")
    assert_refused(f"seed={value}")
    assert_refused(f"model.kwargs.depth={value}")


@pytest.mark.faults(fault="a pickle that would run code, wherever a run reads weights", promise=PROMISE)
def test_malicious_weights(assert_refused, malicious_files):
    for file in malicious_files:
        assert_refused(f"model.checkpoint={file}")
        assert_refused("--eval-only", f"evaluation.checkpoint={file}")
    for file in malicious_files[::5]:
        assert_refused(f"model.kwargs.checkpoint_path={file}")
        assert_refused("model.pretrained=true", f"model.kwargs.pretrained_cfg={{file: {file}}}")


@pytest.mark.faults(fault="last.pt, the only checkpoint, is a pickle that would run code", promise=PROMISE)
def test_a_malicious_checkpoint(assert_refused, malicious_files, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for file in malicious_files:
        (checkpoints / "last.pt").write_bytes(file.read_bytes())
        assert_refused("--resume")
        assert_refused("--eval-only")


@pytest.mark.faults(fault="a model folder (local-dir:) that would run code", promise=PROMISE)
def test_a_malicious_model_folder(assert_refused, malicious_files, sentinel, tmp_path):
    folder, code = tmp_path / "folder", f"__import__('os').system('touch {sentinel}')"
    folder.mkdir()
    own = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": {"input_size": [1, 8, 8]}}
    run = (f"model.name=local-dir:{folder}", "model.kwargs.patch_size=2")
    for file in malicious_files[:4]:
        (folder / "config.json").write_text(json.dumps(own))
        (folder / "pytorch_model.bin").write_bytes(file.read_bytes())
        assert_refused(*run, "model.pretrained=true")
    for config in (
        own | {"architecture": code},
        own | {"model_args": {"act_layer": code}},
        {"architecture": ["x"]},
        [],
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert_refused(*run)
    (folder / "config.json").write_bytes(malicious_files[1].read_bytes())
    assert_refused(*run)


def test_plugins_are_the_only_door(server, assert_refused, sentinel, tmp_path):
    name = f"door_of_{tmp_path.name}"
    (server.folder / f"{name}.py").write_text(f"from pathlib import Path\nPath({str(sentinel)!r}).touch()\n")
    assert_refused(f"model.name={name}")
    server.succeed(*RUN, "train.max_iters=1", f"output_dir={tmp_path}/run", f"plugins=[{name}]")
    assert sentinel.exists()
