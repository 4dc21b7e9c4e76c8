"""Modules that are exchanged after `patch`: an augmentation must not act on those that are gone."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import augsub


def replace_patch_drop(model):
    model.patch_drop = nn.Identity()


def replace_block(model):
    model.blocks[1] = copy.deepcopy(model.blocks[1])


def replace_drop_path(model):
    model.blocks[0].drop_path1 = DropPath(0.1)


def replace_dropout(model):
    model.blocks[2].mlp.drop1 = nn.Dropout(0.2)


def replace_stem(model):
    model.patch_embed = copy.deepcopy(model.patch_embed)


SMALL_CELLS = {"name": "masking", "ratio": 0.5, "cell": 8}  # of images of 32 pixels
REPLACED = {
    "patch_drop": ("vit", replace_patch_drop, {"name": "masking", "ratio": 0.5}, "patch_drop"),
    "block, drop_path": ("vit", replace_block, {"name": "drop_path", "ratio": 0.5}, r"blocks\.1\.drop_path1"),
    "block, dropout": ("vit", replace_block, {"name": "dropout", "ratio": 0.5}, r"blocks\.1\.[\w.]+"),
    "drop path": ("vit", replace_drop_path, {"name": "drop_path", "ratio": 0.5}, r"blocks\.0\.drop_path1"),
    "dropout": ("vit", replace_dropout, {"name": "dropout", "ratio": 0.5}, r"blocks\.2\.mlp\.drop1"),
    "stem": ("swin", replace_stem, SMALL_CELLS, "patch_embed"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_a_site_that_is_gone_is_noticed_everywhere_until_the_model_is_patched_again(name, make_model, images):
    variant, replace, augmentation, place = REPLACED[name]
    model = augsub.patch(make_model(variant))
    replace(model)
    message = rf"{place} was replaced after augsub\.patch.*augsub\.unpatch the model and patch it again"
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(augmentation)])
    with pytest.raises(ValueError, match=message):
        model(images, augsub=augmentation)
    with pytest.raises(ValueError, match=message):
        objective.prepare(model)
    with pytest.raises(ValueError, match=message):
        augsub.supports(model)
    assert torch.isfinite(model(images)).all()  # the main model has no site
    augsub.patch(augsub.unpatch(model)).eval()
    with torch.no_grad():
        assert not torch.equal(model(images, augsub=augmentation), model(images))


def test_other_parts_may_be_replaced(make_model, images):
    model = augsub.patch(make_model("vit"))
    model.reset_classifier(3)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")  # a wrapper, with the same modules inside
    for augmentation in augsub.supports(model):
        assert model(images, augsub=augmentation, augsub_ratio=0.5).shape == (len(images), 3)


@pytest.mark.parametrize("variant", ["vit", "vit_drop"])
def test_a_block_that_was_added_is_noticed_before_training(variant, make_model, images):
    """Its drop paths and dropouts would keep their own rates."""
    model = augsub.patch(make_model(variant))
    model.blocks.append(make_model(variant).blocks[0])
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("drop_path", ratio=0.5)])
    for use in (objective.prepare, augsub.supports):
        with pytest.raises(ValueError, match=r"VisionTransformer\.blocks\.3.* was added after augsub\.patch"):
            use(model)
    objective.prepare(augsub.patch(augsub.unpatch(model)))
