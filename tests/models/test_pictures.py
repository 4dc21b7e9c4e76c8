"""What is noted of a sub-forward, against what the modules of the model got and gave."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F

import augsub
from models.pictures import MASK_TOKEN, PixelState, record, render, render_main

SEED = 7
STATE_OF_FAMILY = {"vit": PixelState.REMOVED, "swin": PixelState.REPLACED, "resnet": PixelState.ZEROED}


@pytest.fixture(params=STATE_OF_FAMILY)
def family(request):
    return request.param


@pytest.fixture
def model(family, make_model):
    torch.manual_seed(0)
    return augsub.patch(make_model(family))


def masking(family, ratio):
    return {"name": "masking", "ratio": ratio} | ({} if family == "vit" else {"cell": 8})


def kept_cells(batch: int, cells: int, ratio: float) -> torch.Tensor:
    """By the definition: the int(L * (1 - ratio)) lowest of one uniform draw."""
    noise = torch.rand(batch, cells)
    return noise.argsort(dim=1).argsort(dim=1) < int(cells * (1 - ratio))


@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_masked_cells_are_those_of_the_seed(ratio, family, model, images):
    recording = record(model, images, masking(family, ratio), SEED)
    torch.manual_seed(SEED)
    kept = kept_cells(4, 16, ratio).view(4, 4, 4)
    pixels = F.interpolate(kept[:, None].float(), scale_factor=8)[:, 0].bool()
    assert torch.equal(recording.states == PixelState.VISIBLE, pixels)
    assert torch.equal(recording.states == STATE_OF_FAMILY[family], ~pixels)
    (hidden,) = recording.hidden
    assert torch.equal(F.interpolate(hidden.cells[:, None].float(), size=(32, 32))[:, 0].bool(), ~pixels)


@pytest.mark.parametrize("augmentation", augsub.list_augmentations())
def test_logits_are_those_of_a_forward_that_nobody_watches(augmentation, family, model, images):
    if augmentation not in augsub.supports(model):
        with pytest.raises(ValueError, match=f"{augmentation} has no site"):
            record(model, images, {"name": augmentation, "ratio": 0.5}, SEED)
        return
    recording = record(model, images, {"name": augmentation, "ratio": 0}, SEED)
    assert (recording.states == PixelState.VISIBLE).all() and recording.hidden == []
    assert torch.equal(recording.pixels, images) and torch.equal(render(recording), render_main(images))
    assert all(kept.all() for calls in recording.kept.values() for kept in calls)
    assert torch.equal(recording.logits, model.eval()(images))

    images = torch.randn(4, 3, 32, 32) if family == "vit" else torch.randn(2, 3, 64, 64)
    if family == "swin":
        model = augsub.patch(SwinTransformer(64, 2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=8))
    for batch_norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(batch_norm.running_mean)
    sub_model = {"name": augmentation, "ratio": 0.5}
    recording = record(model, images, sub_model, SEED)
    for module in model.eval().modules():
        module.training = isinstance(module, (DropPath, nn.Dropout))
    torch.manual_seed(SEED)
    assert torch.equal(recording.logits, model(images, augsub=sub_model))
    assert not torch.equal(recording.logits, model(images))


def test_model_and_random_numbers_stay_as_they_are(family, model, images):
    model.train()
    if family != "resnet":
        model.patch_embed.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, random_state = [module.training for module in model.modules()], torch.get_rng_state()
    record(model, images, [masking(family, 0.5), {"name": "drop_path", "ratio": 0.5}], SEED)
    with pytest.raises(ValueError, match="leaves none of"):
        record(model, images, masking(family, 0.99), SEED)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(
        module._forward_pre_hooks for module in model.modules() if isinstance(module, (DropPath, nn.Dropout))
    )


@pytest.mark.parametrize(("site", "kind"), [("drop_path", DropPath), ("dropout", nn.Dropout)])
def test_paths_and_activations_are_those_that_the_modules_drop(site, kind, family, model, images):
    """Of every call the share that came through; blocks add to outputs in place later."""
    if site not in augsub.supports(model):
        pytest.skip("not offered")
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, kind) and not name.endswith(("attn_drop", "pos_drop", "head_drop", "head.drop")):
            module.register_forward_hook(lambda _, args, output: calls.append((args[0].clone(), output.clone())))
    kept = record(model, images, {"name": site, "ratio": 0.3}, SEED).kept[site]
    assert len(kept) == len(calls) > 2
    for noted, (given, output) in zip(kept, calls, strict=True):
        if site == "drop_path":
            assert torch.equal(noted[:, 0], (output != 0).flatten(1).any(dim=1))
        else:
            assert torch.equal(~noted, ((output == 0) & (given != 0)).reshape(4, -1))
    assert {noted.float().mean().item() for noted in kept} - {0.0, 1.0}


def test_a_path_is_dropped_where_the_module_adds_its_input_itself():
    """timm's ResidualDrop, whose output is never zero."""
    model = augsub.patch(timm.create_model("efficientvit_m0", num_classes=2))
    recording = record(model, torch.randn(4, 3, 224, 224), {"name": "drop_path", "ratio": 0.5}, SEED)
    kept = torch.cat(recording.kept["drop_path"], dim=1)
    assert kept.shape[1] > 10 and 0.3 < kept.float().mean() < 0.7


def test_crops_are_the_pixels_that_the_model_gets(make_model):
    images = torch.randn(3, 3, 96, 128)
    model = augsub.patch(make_model("resnet"))
    given = []
    model.conv1.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    recording = record(model, images, {"name": "random_crop", "ratio": 0.75}, SEED)
    assert torch.equal(recording.inputs, given[0]) and recording.inputs.shape == (3, 3, 64, 64)
    assert torch.equal(recording.boxes, recording.crops) and len(recording.boxes.unique(dim=0)) == 3
    for sample, (top, left, height, width) in enumerate(recording.crops.tolist()):
        assert torch.equal(given[0][sample], images[sample, :, top : top + height, left : left + width])
        assert (recording.states[sample, top : top + height, left : left + width] == PixelState.VISIBLE).all()
    assert (recording.states == PixelState.REMOVED).sum() == 3 * (96 * 128 - 64 * 64)
    assert torch.equal(recording.pixels, images)


def test_crops_of_the_token_grid_are_the_tokens_that_the_blocks_get(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    given = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: given.append(args[0]))
    crop = {"name": "random_crop", "ratio": 0.5}
    recording = record(model, images, crop, SEED)
    tokens = model._pos_embed(model.patch_embed(images))[:, 1:].unflatten(1, (4, 4))
    for sample, place in enumerate(recording.crops):
        top, left, height, width = (place // 8).tolist()
        assert (place % 8 == 0).all() and (height, width) == (3, 3)
        window = tokens[sample, top : top + height, left : left + width].flatten(0, 1)
        torch.testing.assert_close(given[0][sample, 1:], window)
        assert (recording.states[sample] == PixelState.REMOVED).sum() == 32 * 32 - 24 * 24
    assert torch.equal(recording.inputs, images)
    masked = record(model, images, [crop, {"name": "masking", "ratio": 0.5}], SEED)
    (hidden,) = masked.hidden  # tokens masked in a crop are counted once
    assert (~hidden.cells).sum(dim=(1, 2)).tolist() == [4] * 4  # int(9 / 2)
    assert ((masked.states == PixelState.VISIBLE).sum(dim=(1, 2)) == 4 * 64).all()


@pytest.mark.parametrize("order", [("random_crop", "masking"), ("masking", "random_crop")])
def test_masks_and_crops_compose_in_both_orders(order, make_model):
    images = torch.randn(3, 3, 96, 96)
    sub_model = [{"name": name, "ratio": 0.5, **({"cell": 16} if name == "masking" else {})} for name in order]
    recording = record(augsub.patch(make_model("resnet")), images, sub_model, SEED)
    for sample, (top, left, height, width) in enumerate(recording.boxes.tolist()):
        inside = recording.states[sample, top : top + height, left : left + width]
        hidden = inside == PixelState.ZEROED
        assert 0.3 < hidden.float().mean() < 0.7
        original = images[sample, :, top : top + height, left : left + width]
        assert torch.equal(recording.inputs[sample], torch.where(hidden, torch.zeros(()), original))
    assert (recording.states == PixelState.REMOVED).sum() == 3 * (96 * 96 - 64 * 64)


def test_of_two_streams_what_either_sees_is_visible():
    model = augsub.patch(timm.create_model("crossvit_tiny_240"))
    recording = record(model, torch.randn(2, 3, 240, 240), {"name": "masking", "ratio": 0.5}, SEED)
    torch.manual_seed(SEED)
    kept = [kept_cells(2, side * side, 0.5).view(2, 1, side, side).float() for side in (20, 14)]  # 12 and 16 px
    pixels = [F.interpolate(cells, size=(240, 240), mode="nearest-exact") for cells in kept]
    assert torch.equal(recording.states == PixelState.VISIBLE, torch.stack(pixels).amax(0)[:, 0].bool())


class Changed(augsub.SubModelAugmentation):
    """An augmentation of the input that neither crops nor masks."""

    sites = ("image",)
    resizes_images = True

    def __init__(self, change):
        super().__init__(0.5)
        self.change = change

    def image(self, images):
        images.values = self.change(images.values)
        return images


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (lambda values: values.flip(-1), 64),
        (lambda values: values + torch.randn_like(values), 64),
        (lambda values: F.avg_pool2d(values, 2), 32),
    ],
    ids=["flip", "noise", "half the size"],
)
def test_any_other_change_is_shown_as_it_is(change, size, make_model):
    images = torch.randn(2, 3, 64, 64)
    recording = record(augsub.patch(make_model("resnet")), images, Changed(change), SEED)
    torch.manual_seed(SEED)
    expected = change(images)
    assert recording.inputs.shape[-1] == size and torch.equal(recording.inputs, expected)
    assert torch.equal(recording.pixels, F.interpolate(expected, size=(64, 64)))
    assert (recording.states == PixelState.VISIBLE).all()


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_colours_say_what_became_of_a_pixel(family, model):
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = (pixels / 255 - mean) / std
    assert torch.equal(render_main(images, MEAN, STD), pixels)
    recording = record(model, images, masking(family, 0.5), SEED)
    picture = render(recording, MEAN, STD)
    visible = (recording.states == PixelState.VISIBLE)[:, None].expand_as(pixels)
    assert picture.dtype == torch.uint8 and torch.equal(picture[visible], pixels[visible])
    hidden = picture.permute(0, 2, 3, 1)[recording.states != PixelState.VISIBLE]
    if family == "vit":
        assert (hidden >= 216).all()  # 85 % white
    else:
        colour = MASK_TOKEN if family == "swin" else [round(255 * value) for value in MEAN]
        assert hidden.unique(dim=0).tolist() == [list(colour)]


def test_grey_images_fill_the_range_from_black_to_white():
    picture = render_main(torch.tensor([-2.0, 0.0, 2.0, 6.0]).view(1, 1, 2, 2))
    assert picture.tolist() == [[[[0, 64], [128, 255]]] * 3]
