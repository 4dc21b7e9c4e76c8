"""Models that are not timm's, and what the sub-forward refuses, with one line each."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import augsub


class DictModel(nn.Module):
    """Takes its input by name and returns a mapping, as models of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)
        self.grad_checkpointing = True

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(pixel_values.mean((2, 3)))}


def test_a_model_of_another_library_is_masked_at_its_input():
    model = augsub.patch(resnet18(num_classes=10)).eval()
    images = torch.randn(2, 3, 128, 128)
    torch.manual_seed(5)
    sub = model(images, augsub="masking", augsub_ratio=0.5)
    torch.manual_seed(5)
    keep = torch.rand(2, 16).argsort(1)[:, :8]
    visible = torch.zeros(2, 16).scatter_(1, keep, 1.0).view(2, 1, 4, 4)
    hidden = nn.functional.interpolate(visible, size=128, mode="nearest")
    torch.testing.assert_close(sub, model(images * hidden))
    with pytest.raises(ValueError, match=r"drop_path has no site in ResNet.* offers masking, random_crop"):
        model(images, augsub="drop_path", augsub_ratio=0.5)


def test_a_model_with_inputs_by_name_keeps_its_own_call():
    model = augsub.patch(DictModel())
    images = torch.randn(2, 3, 64, 64)
    main = model(pixel_values=images)["logits"]
    sub = model(images, augsub="masking", augsub_ratio=0.5)["logits"]
    assert not torch.equal(main, sub)
    sub.sum().backward()
    torch.manual_seed(1)
    by_name = model(pixel_values=images, augsub="masking", augsub_ratio=0.5)["logits"]
    torch.manual_seed(1)
    assert torch.equal(by_name, model(images, augsub="masking", augsub_ratio=0.5)["logits"])
    with pytest.raises(TypeError, match="takes images as its first argument, not NoneType"):
        model(pixels=images, augsub="masking")
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking")])
    with pytest.raises(TypeError, match=r"needs logits .* not a dict"):
        objective(model, images, torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"images \(B, C, H, W\), not a tensor of shape \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "normalized floating-point images, not torch.uint8"),
        (torch.zeros(2, 3, 32, 48), "VisionTransformer takes images of 32 x 32 pixels, not 32 x 48"),
        ([[0.0]], "takes images as its first argument, not list"),
    ],
)
def test_images_that_do_not_fit(images, message, make_model):
    with pytest.raises((TypeError, ValueError), match=message):
        augsub.patch(make_model("vit"))(images, augsub="masking")


def test_a_crop_is_refused_where_only_the_built_size_fits():
    model = augsub.patch(timm.create_model("beit_base_patch16_224", depth=1, img_size=64))
    assert "random_crop" not in augsub.supports(model)
    with pytest.raises(ValueError, match=r"random_crop has no site in Beit: .*\(images of its built size only\)"):
        model(torch.randn(1, 3, 64, 64), augsub="random_crop", augsub_ratio=0.5)


@pytest.mark.parametrize(("family", "site"), [("resnet", "image"), ("vit", "tokens"), ("swin", "stem")])
def test_an_augmentation_that_returns_nothing_is_named(family, site, make_model, images):
    class Forgetful(augsub.SubModelAugmentation):
        sites = (site,)

        def image(self, images):
            pass

        tokens = stem = image

    with pytest.raises(TypeError, match=rf"Forgetful: {site}\(\) must return \w+, not NoneType"):
        augsub.patch(make_model(family))(images, augsub=Forgetful(0.5))
