"""Reading a configuration: inheritance, overrides, mistakes, files by name; what a resumed run may change."""

from __future__ import annotations

import dataclasses
from functools import reduce

import pytest

from engine.config import Config, marked
from engine.config_file import CONFIGS, changes_on_resume, load_config, parse_config, to_yaml
from engine.config_rules import FILE
from engine.defaults import complete
from engine.errors import InputError


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_base_files_overrides_and_schema_are_merged_in_that_order(write):
    write("_base_/grand.yaml", "seed: 1\ntrain: {epochs: 10, global_batch: 8}\n")
    write("_base_/first.yaml", "_base_: grand.yaml\ntrain: {global_batch: 16}\nmodel: {kwargs: {depth: 2, width: 3}}\n")
    write("_base_/second.yaml", "optimizer: {lr: 0.5}\nseed: 2\n")  # after the first one
    path = write(
        "run.yaml", "_base_: [_base_/first.yaml, _base_/second.yaml]\nmodel: {kwargs: {depth: 4}}\nlog: {period: 7}\n"
    )
    config = load_config(path, ["train.epochs=20", "augsub.sub_models=[{augmentations: [masking]}]"])
    assert isinstance(config, Config)
    assert (config.seed, config.train.epochs, config.train.global_batch) == (2, 20, 16)
    assert (config.optimizer.lr, config.log.period) == (0.5, 7)
    assert config.model.kwargs == {"depth": 4, "width": 3}
    assert config.augsub.sub_models[0].weight == 0.5
    assert config.output_dir == "runs/run"


def test_free_keys_are_set_one_by_one_or_replaced_as_a_whole(write):
    path = write("run.yaml", "model: {kwargs: {depth: 4, width: 3}}")
    assert load_config(path, ["model.kwargs.depth=5"]).model.kwargs == {"depth": 5, "width": 3}
    assert load_config(path, ["model.kwargs={depth: 5}"]).model.kwargs == {"depth": 5}
    assert load_config(path, ["model.kwargs={}"]).model.kwargs == {}


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("trian: {epochs: 3}", [], "trian"),
        ("train: {epoch: 3}", [], "Did you mean: 'epochs'"),
        ("", ["train.epoch=3"], "Did you mean: 'epochs'"),
        ("", ["augsub.sub_models=[{weigth: 1}]"], "Did you mean: 'weight'"),
        ("", ["train.epochs=many"], "train.epochs: Value 'many'"),
        ("", ["train.epochs=0"], "train.epochs = 0: allowed is at least 1"),
        ("", ["train.amp=half"], "train.amp = half: allowed is one of off, bf16, fp16"),
        ("", ["optimizer.lr=-1"], "optimizer.lr = -1"),
        ("", ["optimizer.lr=.nan"], "optimizer.lr = nan"),
        ("", ["ema.decay=1"], "ema.decay = 1.0: allowed is in [0, 1)"),
        ("", ["transform.scale=[1,0.5]"], "transform.scale"),
        ("", ["model=3"], "override 'model=3'"),
        ("", ["epochs"], "must have the form key=value"),
        ("", ["train.epochs='"], "override"),
        ("", ["output_dir=${nothing}"], "nothing"),
        ("", ["loss.target_threshold=0.1"], "only loss.name = bce has a threshold"),
        ("", ["evaluation.metric=ema_top1"], "needs ema.enabled"),
        ("", ["seed=-1"], "seed = -1: allowed is in [0, 2**32)"),
        ("", ["transform.std=[0,1,1]"], "transform.std = [0.0, 1.0, 1.0]: allowed is a list of numbers above 0"),
        ("", ["transform.mean=[0.5,0.5]"], "allowed is one number for each of 3 channels"),
        ("", ["mixup.cutmix_minmax=[0.5,0.5]"], "= [0.5, 0.5]: allowed is two increasing numbers above 0, at most 1"),
        ("", ["mixup.cutmix_minmax=[0.5,1.5]"], "allowed is two increasing numbers above 0, at most 1"),
        ("", ["transform.erase_area=[0.5,3.0]"], "allowed is two increasing numbers in (0, 1]"),
        ("", ["loss.name=bce", "loss.target_threshold=0.0", "loss.smoothing=0.1"], "goes with loss.smoothing = 0 only"),
        ("", ["model.drop_path_shape=uniform"], "needs model.drop_path_rate"),
        ("", ["mixup.integer_pixels=true", "data.dataset=digits"], "has no pixels of 0 to 255"),
        ("", ["optimizer.full_lr=[norm]"], "without optimizer.layer_decay"),
        ("", ["schedule.scale_with_batch=true"], "needs optimizer.lr_reference_batch"),
        ("", ["log.wandb=a/b"], "log.wandb = a/b: allowed is 1 to 128 characters, none of"),
        ("", ["train.loss_scale=0.5"], "train.loss_scale = 0.5: allowed is at least 1"),
        ("", ["schedule.warmup_epochs=300"], "must be less than train.epochs"),
        ("train: [", [], "not a readable YAML file"),
        ("- 1", [], "top level"),
        ("!!python/object/apply:os.system ['true']", [], "not a readable YAML file"),
        ('transform: "a\\nb"', [], r"transform = 'a\nb': must be keys with values"),
        ('_base_: {"a\\nb": 1}', [], "must be the name of a file"),
        ("_base_: missing.yaml", [], "missing.yaml does not exist"),
        ("_base_: run.yaml", [], "_base_ leads back"),
    ],
)
def test_mistakes_are_one_clear_line(write, text, overrides, message):
    with pytest.raises(InputError) as error:
        load_config(write("run.yaml", text), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_configuration_is_found_by_its_name(write, monkeypatch):
    folder = write("swin_x.yaml", "seed: 5\n").parent
    recipe = load_config("swin_b")
    for spelling in ("swin_b.yaml", CONFIGS / "swin_b", str(CONFIGS / "swin_b.yaml")):
        assert load_config(spelling) == recipe
    assert recipe.output_dir == "runs/swin_b" and recipe.model.name == "swin_base_patch4_window7_224"
    assert load_config(folder / "swin_x").seed == 5
    monkeypatch.chdir(folder)
    assert load_config("swin_x").seed == 5
    write("swin_b.yaml", "seed: 6\n")
    assert load_config("swin_b").seed == 6  # what lies here comes first


def test_an_unknown_name_is_met_with_the_nearest(write, monkeypatch):
    monkeypatch.chdir(write("swin_bc.yaml", "").parent)
    with pytest.raises(
        InputError, match=r"config file swin_bb does not exist, did you mean swin_b or swin_bc.yaml or swin_t\?"
    ):
        load_config("swin_bb")
    with pytest.raises(InputError, match=r"config file nothing_like_it does not exist$"):
        load_config("nothing_like_it")


def test_a_complete_configuration_is_read_only(write):
    config = load_config("digits_vit")
    config.train.epochs = 30
    config.freeze()
    for section, key in ((config, "seed"), (config.train, "epochs")):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"{key}: the configuration is complete"):
            setattr(section, key, 4)
    assert load_config(write("again.yaml", to_yaml(config))) == config


@pytest.mark.parametrize("key", marked(FILE))
def test_a_tilde_is_the_home_folder_in_keys_that_name_files(monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/x")
    prefix = "local-dir:" if key == "model.name" else ""
    for given, meant in (("~/x", "/home/x/x"), ("a/~/x", "a/~/x"), ("./~x", "./~x")):
        config = parse_config("", "here", [f"{key}={prefix}{given}", "data.train_split=~/x"])
        assert reduce(getattr, key.split("."), config) == prefix + meant
        assert config.data.train_split == "~/x"  # no file


LEFT_TO_THE_MODEL = ("data.image_size=null", "transform.mean=null", "transform.eval_crop=null")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "transform.auto_augment=null",
            "--resume: transform.auto_augment = None, the run has 3a: this would be another run: ",
        ),
        (
            "transform.color_jitter=null",
            "--resume: transform.color_jitter = None, the run has 0.3: this would be another run: ",
        ),
        ("seed=5", "--resume: seed = 5, the run has 0: this would be another run: "),
        ("train.epochs=900", "--resume: train.epochs = 900, the run has 400: train.extend=true goes on so"),
        ("schedule.min_lr=0.5", "--resume: schedule.min_lr = 0.5, the run has 1e-05: train.extend=true goes on so"),
        ("data.workers=3", None),
    ],
)
def test_a_resumed_run_keeps_what_it_found_and_changes_what_may_change(override, message):
    """null means none for the transforms, and left to the model for others."""
    saved = parse_config(to_yaml(complete(load_config("deit3_b_400e", LEFT_TO_THE_MODEL))), "saved")
    current = complete(load_config("deit3_b_400e", [*LEFT_TO_THE_MODEL, override, "output_dir=elsewhere"]), saved)
    assert (current.data.image_size, current.transform.mean) == (224, [0.485, 0.456, 0.406])
    assert current.transform.eval_crop == 0.9  # timm's
    if message is None:
        assert changes_on_resume(current, saved) == ["data.workers: 10 -> 3"]
    else:
        with pytest.raises(InputError) as refused:
            changes_on_resume(current, saved)
        assert str(refused.value).startswith(message)
