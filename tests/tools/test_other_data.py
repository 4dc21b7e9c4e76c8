"""Wherever weights meet data of other classes, or a run meets other images: one line, or a warning if it is meant."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine import defaults
from engine.config_file import load_config, to_yaml
from engine.data.imagenet_family import synsets
from engine.distributed import Process
from models.build import create_model
from tools import eval_net
from tools.exporting import export

CONFIG = Path(__file__).parents[2] / "configs" / "finetune_folder.yaml"
SETTINGS = (
    "model.name=test_vit", "model.pretrained=false", "data.image_size=32", "train.epochs=3",
    "schedule.warmup_epochs=1", "data.workers=0",
)  # fmt: skip
DIFFERENT = "is for other classes than the data have, or numbers them in another order:"
OTHER = f"{DIFFERENT} 1 differ, number 2 is fox, in the data elk"
MEANT = "data.allow_mismatch=true"


@pytest.fixture
def train(train_net):
    """Call train_net.py with a configuration for folders of tiny images."""
    return partial(train_net, "--config", CONFIG, *SETTINGS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with tiny `images` of cats, dogs and foxes, and a `run` of three iterations on them."""
    folder, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in ("cat", "dog", "fox"):
            (folder / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / name / f"{index}.png")
    own = (f"data.root={folder}/images", f"output_dir={folder}/run", "train.max_iters=3")
    defaults.train(load_config(CONFIG, [*SETTINGS, *own]), Process(0, 1, torch.device("cpu")), resume=False)
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> tuple[Path, Path, Path]:
    """The run, its images, and the same where the foxes are elks."""
    run, images, elks = (tmp_path / name for name in ("run", "images", "elks"))
    for source, target in ((trained / "run", run), (trained / "images", images), (trained / "images", elks)):
        shutil.copytree(source, target)
    for split in ("train", "val"):
        (elks / split / "fox").rename(elks / split / "elk")
    return run, images, elks


def assert_refused(ended: tuple[int, str, str], message: str) -> None:
    code, _, error = ended
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert message in error and error.endswith(f"; {MEANT} goes on all the same\n")


def test_weights_are_not_evaluated_on_other_classes(train, call, copied, tmp_path):
    run, _, elks = copied
    last = run / "checkpoints" / "last.pt"
    ways = {
        "a run": partial(call, eval_net, run, "data.workers=0", "--output", tmp_path / "results"),
        "a file": partial(call, eval_net, last, "data.workers=0", "--output", tmp_path / "results"),
        "--eval-only": partial(train, f"output_dir={run}", "--eval-only"),
        "evaluation.checkpoint": partial(train, f"evaluation.checkpoint={last}", "--eval-only"),
        "model.checkpoint": partial(train, f"model.checkpoint={last}", f"output_dir={tmp_path}/new", "--eval-only"),
    }
    for evaluate in ways.values():
        assert_refused(evaluate(f"data.root={elks}"), OTHER)
    assert not (tmp_path / "results").exists()
    for name, evaluate in ways.items():
        assert evaluate(f"data.root={elks}", MEANT)[0] == 0, name


def test_a_head_that_is_kept_is_for_the_same_classes(train, copied, tmp_path):
    run, _, elks = copied
    last = run / "checkpoints" / "last.pt"
    start = (f"model.checkpoint={last}", f"data.root={elks}", "train.max_iters=1")
    new = f"output_dir={tmp_path}/new"
    assert_refused(train(*start, new), f"model.checkpoint = {last}, whose head is kept, {OTHER}")
    assert not (tmp_path / "new").exists()
    for number, new_head in enumerate((MEANT, "model.restart=[head]", "model.head_std=0.01")):
        assert train(*start, new_head, f"output_dir={tmp_path}/{number}")[0] == 0
    for split in ("train", "val"):
        shutil.copytree(elks / split / "cat", elks / split / "cow")  # four classes: the head is new
    assert train(*start, new)[0] == 0


def test_the_classes_of_a_folder_in_the_hubs_layout_are_compared(train, call, copied, tmp_path):
    run, images, elks = copied
    export(run / "checkpoints" / "last.pt", tmp_path / "hub", ema=False)
    hub = f"model.name=local-dir:{tmp_path}/hub"
    message = f"model.name = local-dir:{tmp_path}/hub {OTHER}"
    start = (hub, "model.pretrained=true", "train.max_iters=1")
    assert_refused(train(*start, f"data.root={elks}", f"output_dir={tmp_path}/new"), message)
    assert train(*start, f"data.root={elks}", f"output_dir={tmp_path}/restarted", "model.restart=[head]")[0] == 0
    assert train(*start, f"data.root={images}", f"output_dir={tmp_path}/same")[0] == 0
    evaluate = partial(call, eval_net, f"local-dir:{tmp_path}/hub", "data.workers=0", "--output", tmp_path / "results")
    assert_refused(evaluate(f"data.root={elks}"), message)
    assert evaluate(f"data.root={images}")[0] == 0


def test_a_run_is_resumed_with_its_own_data_only(train, call, copied):
    run, images, elks = copied
    last = run / "checkpoints" / "last.pt"
    before = last.read_bytes()
    resume = partial(train, f"output_dir={run}", "train.max_iters=4", "--resume")
    shutil.copy(images / "train/cat/0.png", images / "train/cat/new.png")
    cases = {images: f"training images are not those of {last}: 25, the run has 24;", elks: OTHER}
    for root, message in cases.items():
        for options in ((), ("--dry-run",)):
            assert_refused(resume(f"data.root={root}", *options), message)
    assert last.read_bytes() == before
    assert resume(f"data.root={images}", MEANT)[0] == 0
    assert f"WARNING: --resume: the {cases[images]}" in (run / "log.txt").read_text()
    assert resume(f"data.root={images}", "train.max_iters=5")[0] == 0  # these are the run's images now
    assert resume(f"data.root={elks}", "train.max_iters=6", MEANT)[0] == 0
    state = torch.load(last, weights_only=True)  # which allows it the run, but not its evaluation
    assert "allow_mismatch: true" in state["config"] and "elk" in state["class_names"]
    evaluated = call(eval_net, last, f"data.root={images}", "data.workers=0", "--output", run / "no")
    assert_refused(evaluated, "number 2 is elk, in the data fox")


def test_a_variant_of_imagenet_is_for_models_of_imagenets_classes(call, tmp_path):
    """The variant's images have 200 of 1000 classes: those of the model are compared with all of ImageNet's."""
    folder = tmp_path / "imagenet_a" / "n01498041"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "0.png")
    for synset in (files("timm.data") / "_info" / "imagenet_a_synsets.txt").read_text().split()[1:]:
        shutil.copytree(folder, folder.with_name(synset))
    model = create_model("test_vit", num_classes=1000, image_size=32)
    state = {"model": model.state_dict(), "config": to_yaml(load_config(CONFIG, list(SETTINGS)))}
    variant = ("--variant", "a", f"data.root={folder.parent}", "--output", tmp_path / "out")
    evaluate = partial(call, eval_net, tmp_path / "model.pt", *variant)
    names = synsets()
    torch.save({**state, "class_names": names}, tmp_path / "model.pt")
    assert evaluate()[0] == 0
    torch.save({**state, "class_names": [*names[1:], names[0]]}, tmp_path / "model.pt")
    assert_refused(evaluate(), f"{DIFFERENT} 1000 differ, number 0 is n01443537, in the data n01440764")
