from __future__ import annotations

import dataclasses
import logging
import socket

import huggingface_hub.constants
import pytest
import timm
import torch
from timm.layers import convert_sync_batchnorm

import augsub
from engine.config_file import load_config
from engine.defaults import complete
from engine.errors import InputError
from models.build import build_on_meta, check_image_shape, create_model, image_settings, takes_image_size
from models.complexity import count_forward
from tests.zoo import load_rows


def test_a_model_is_built_for_the_data():
    model = build_on_meta("vit_tiny_patch16_224", num_classes=7, in_chans=1, image_size=32, depth=2, patch_size=8)
    assert model(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 7)
    assert len(model.blocks) == 2
    resnet = build_on_meta("resnet18", num_classes=7, in_chans=3, image_size=50)  # any size, no img_size argument
    assert resnet(torch.empty(2, 3, 50, 50, device="meta")).shape == (2, 7)


def patched(name: str, **arguments) -> torch.nn.Module:
    return augsub.patch(build_on_meta(name, **arguments))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_tiny_patch16_242", {}, "timm has no model 'vit_tiny_patch16_242', did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_224", {"embed_dim": 100}, "cannot build vit_tiny_patch16_224 with .*: dim should be div"),
        ("resnet18", {"zero_init_lst": 1}, "with .*'zero_init_lst': 1}: .*unexpected keyword argument 'zero_init_lst'"),
    ],
)
def test_models_that_cannot_be_built_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        build_on_meta(name, num_classes=7, in_chans=3, image_size=32, **kwargs)


def test_sizes_are_checked_without_computing(caplog):
    model = augsub.patch(create_model("vit_tiny_patch16_224"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_image_shape(model, (3, 224, 224), [augsub.build("masking"), augsub.build("random_crop", ratio=0.5)])
    with pytest.raises(ValueError, match="200 x 200 pixels do not fit: Input height"):
        check_image_shape(model, (3, 200, 200))
    with pytest.raises(ValueError, match=r"ratio = 0\.999 leaves none of 196 cells visible"):
        check_image_shape(model, (3, 224, 224), [augsub.build("masking", ratio=0.999)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and not value.is_meta
    with caplog.at_level(logging.WARNING):
        check_image_shape(patched("vit_tiny_patch16_224", image_size=40), (3, 40, 40))
    assert "40 x 40 pixels are no multiple of the patch size" in caplog.text


def test_batchnorm_over_several_processes_passes_the_check():
    """It runs on GPUs alone, and a single image of each process is not all that it sees."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        model = augsub.patch(convert_sync_batchnorm(timm.create_model("test_resnet")))
        check_image_shape(model, (3, 64, 64), [augsub.build("random_crop", ratio=0.5)], batch=1)
    finally:
        torch.distributed.destroy_process_group()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("name", "kwargs", "found"),
    [
        ("test_resnet", {"features_only": True}, "list"),
        ("inception_v3", {"aux_logits": True}, "tuple"),
        ("test_resnet", {"num_classes": 0, "global_pool": ""}, r"torch.Size\(\[2, 96, 10, 10\]\)"),
    ],
)
def test_what_gives_no_logits_is_no_classifier(name, kwargs, found):
    with pytest.raises(ValueError, match=rf"the model is no classifier: its output is {found}, no logits \(B, K\)"):
        check_image_shape(patched(name, **kwargs), (3, 299, 299))


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "efficientvit_m0"])  # whose patch size is one number
def test_sizes_are_checked_whatever_a_model_calls_its_patch_size(name):
    check_image_shape(patched(name), (3, 224, 224), [augsub.build("masking")])


def test_what_is_not_listed_of_a_model_is_left_out_and_must_be_set(monkeypatch):
    def test_untold(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        model = timm.models.vit_tiny_patch16_224(**kwargs)
        model.pretrained_cfg = {"input_size": (3, 96, 96), "mean": (0.5, 0.5, 0.5)}
        return model

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_untold", test_untold)
    assert image_settings("test_untold") == (96, {"mean": [0.5, 0.5, 0.5]})
    with pytest.raises(InputError) as error:
        complete(load_config("finetune_folder", ["model.name=test_untold"]))
    message = "model.name = test_untold: timm lists no transform.std, transform.eval_crop, transform.eval_crop_mode, "
    assert str(error.value) == message + "transform.eval_interpolation for it, set them"
    given = ["transform.std=[1,1,1]", "transform.eval_crop=0.9", "transform.eval_crop_mode=center"]
    given += ["model.name=test_untold", "transform.eval_interpolation=bicubic"]
    config = complete(load_config("finetune_folder", given))
    assert (config.data.image_size, config.transform.mean, config.transform.eval_crop) == (96, [0.5] * 3, 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({row.smallest for row in load_rows()}))
def test_every_class_of_models_passes_the_check_of_its_own_size(name):
    model, (size, _) = patched(name), image_settings(name)
    try:
        check_image_shape(model, (3, size, size))
    except ValueError as error:  # encoders without a head, some of which give features (B, K) and pass
        assert not model.num_classes and "the model is no classifier" in str(error)


@pytest.mark.parametrize(("name", "takes"), [("vit_tiny_patch16_224", True), ("levit_128s", True), ("resnet18", False)])
def test_what_a_model_must_be_told_of_the_image_size(name, takes):
    assert takes_image_size(build_on_meta(name)) == takes


@pytest.mark.slow
def test_no_class_of_timm_swallows_an_argument():
    for row in load_rows():
        with pytest.raises(ValueError, match="no_such_argument"):
            build_on_meta(row.smallest, no_such_argument=1)


def test_where_the_hub_has_no_address_its_cache_is_asked_and_nothing_stays_changed(monkeypatch):
    def no_address(*host):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    before = vars(huggingface_hub.constants).copy()
    with pytest.raises(ValueError, match=r"and its pretrained weights: "):
        create_model("test_vit.r160_in1k", pretrained=True, cache_dir="/nowhere")
    assert vars(huggingface_hub.constants) == before


class AboveTheMean(augsub.SubModelAugmentation):
    """Keeps as many tokens as the image with the fewest has above its mean: a number that only values tell."""

    sites = ("tokens",)

    def tokens(self, tokens):
        norms = tokens.values[:, tokens.num_prefix_tokens :].norm(dim=-1)
        fewest = int((norms > norms.mean(dim=1, keepdim=True)).sum(dim=1).min())
        return tokens.keep(norms.topk(fewest, dim=1).indices)


class WrongSize(AboveTheMean):
    """The same, and then tokens that the model cannot take."""

    def tokens(self, tokens):
        kept = super().tokens(tokens)
        return dataclasses.replace(kept, values=kept.values[..., :-1])


def test_an_augmentation_whose_shapes_depend_on_values_is_checked_and_counted_with_random_images():
    model = augsub.patch(create_model("vit_tiny_patch16_224", image_size=32))
    before, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    check_image_shape(model, (3, 32, 32), [AboveTheMean(0.5)])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"^32 x 32 pixels do not fit: "):
        check_image_shape(model, (3, 32, 32), [WrongSize(0.5)])
    with torch.device("meta"):
        larger = augsub.patch(create_model("vit_tiny_patch16_224"))
    main, sub = (count_forward(larger.eval(), (1, 3, 224, 224), each).flops for each in (None, AboveTheMean(0.5)))
    assert 0.3 < sub / main < 0.7
    assert count_forward(larger, (1, 3, 224, 224), augsub.build("masking")).flops == pytest.approx(main / 2, rel=0.05)
