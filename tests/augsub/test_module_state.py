"""drop_path and dropout: the rates that modules have while the sub-model runs."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import augsub
from tests.conftest import tiny_vit


def rates_during(model, images, module_class, attribute, **sub_model):
    """The attribute of every module of that class at the time it runs."""
    seen = {}
    handles = [
        module.register_forward_pre_hook(lambda module, _, name=name: seen.update({name: getattr(module, attribute)}))
        for name, module in model.named_modules()
        if isinstance(module, module_class)
    ]
    model(images, **sub_model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize(
    ("variant", "places"),
    [("vit", 6), ("vit_drop", 6), ("swin", 8), ("swin_drop", 8), ("resnet", 4), ("resnet_drop", 4)],
)
def test_every_residual_branch_has_the_ratio(variant, places, make_model, images):
    model = augsub.patch(make_model(variant)).train()
    own = rates_during(model, images, DropPath, "drop_prob")
    during = rates_during(model, images, DropPath, "drop_prob", augsub="drop_path", augsub_ratio=0.3)
    assert list(during.values()) == [0.3] * places
    assert rates_during(model, images, DropPath, "drop_prob") == own
    assert (set(own.values()) == {0.0}) == ("drop" not in variant)


@pytest.mark.parametrize("variant", ["vit_drop", "swin"])
def test_projection_and_mlp_dropouts_have_the_ratio_and_no_other(variant, make_model, images):
    model = augsub.patch(make_model(variant)).train()
    own = rates_during(model, images, nn.Dropout, "p")
    during = rates_during(model, images, nn.Dropout, "p", augsub="dropout", augsub_ratio=0.3)
    meant = ("attn.proj_drop", "mlp.drop1", "mlp.drop2")
    assert during == {name: 0.3 if name.endswith(meant) else rate for name, rate in own.items()}
    assert sum(rate == 0.3 for rate in during.values()) == 3 * sum(name.endswith("proj_drop") for name in during) > 0
    assert rates_during(model, images, nn.Dropout, "p") == own


@pytest.mark.parametrize("name", ["drop_path", "dropout"])
def test_a_sub_model_is_one_in_evaluation_mode_too(name, make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    main, (sub, other) = model(images), (model(images, augsub=name, augsub_ratio=0.5) for _ in range(2))
    assert not torch.equal(sub, main) and not torch.equal(sub, other)
    assert torch.equal(model(images), main)


def test_drop_path_drops_that_share_of_paths(make_model):
    """A block whose branches are dropped hands its input on."""
    model, unchanged = augsub.patch(make_model("vit")).train(), []
    model.blocks[0].register_forward_hook(
        lambda module, args, output: unchanged.append((args[0] == output).flatten(1).all(dim=1).float().mean().item())
    )
    images = torch.randn(256, 3, 32, 32)
    torch.manual_seed(0)
    model(images, augsub="drop_path", augsub_ratio=0.5)
    model(images)
    assert unchanged[0] == pytest.approx(0.25, abs=0.09)  # both branches: 0.5 ** 2, three standard errors
    assert unchanged[1] == 0


@pytest.mark.parametrize("is_unpatched", [False, True])
def test_nothing_is_left_of_a_backward_that_failed(images, labels, is_unpatched):
    """What the sub-model's backward had set must not come back over evaluation mode, nor stay in the plain model."""
    model = augsub.patch(tiny_vit(drop_path_rate=0.5)).train()
    rates = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    out = model(images, augsub="drop_path", augsub_ratio=0.3)

    def fail(gradient):
        raise RuntimeError("out of memory")

    model.patch_embed.proj.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        nn.functional.cross_entropy(out, labels).backward()
    if is_unpatched:
        augsub.unpatch(model)
    model.eval()
    assert torch.equal(model(images), model(images))
    assert not any(module.training for module in model.modules())
    found = {name: module.drop_prob for name, module in model.named_modules() if isinstance(module, DropPath)}
    assert found.items() <= rates.items() and len(found) == (4 if is_unpatched else 6)  # of rate 0 timm has none


@pytest.mark.parametrize("name", ["mobilevitv2_050", "ese_vovnet39b", "xception41", "hgnetv2_b0"])
def test_no_block_loses_all_of_an_image(name):
    """Of blocks without a residual connection timm calls the drop path of some: the branch is all that they have."""
    model, erased = augsub.patch(timm.create_model(name, num_classes=10)).train(), []

    def note(block, args, output):
        if isinstance(output, torch.Tensor) and not output.any():
            erased.append(type(block).__name__)

    for block in model.modules():
        if any(isinstance(child, DropPath) for child in block.children()):
            block.register_forward_hook(note)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64), augsub="drop_path", augsub_ratio=0.999)
    assert erased == []
