"""Models and wrappers that are not timm's, and what goes wrong in other people's loops, each with one line."""

from __future__ import annotations

import peft
import pytest
import timm
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import ViTConfig, ViTForImageClassification

import augsub
from augsub.integrations.lightning import SubModelMixin

HALF = augsub.SubModel("masking", ratio=0.5)
WRAPPER = "is a wrapper: patch the model itself, before wrapping it"


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def masksub(criterion: nn.Module | None = None, **arguments) -> augsub.SubModelObjective:
    return augsub.SubModelObjective(criterion or nn.CrossEntropyLoss(), [HALF], **arguments)


class DictModel(nn.Module):
    """Takes its input by name and returns a mapping, as models of other libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(pixel_values.mean((2, 3)))}


class Module(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


class TwoOptimisers(SubModelMixin, Module):
    automatic_optimization = False
    objective = masksub()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.parameters(), lr=rate) for rate in (0.1, 0.01)]


def in_transformers(model: nn.Module) -> nn.Module:
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**size, num_labels=10))


def fsdp1(model: nn.Module) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]))


def test_a_model_with_inputs_by_name_keeps_its_own_call(images, labels):
    model = augsub.patch(DictModel())
    found = []
    for arguments, inputs in (((images,), {}), ((), {"pixel_values": images})):
        torch.manual_seed(1)
        found.append(model(*arguments, **inputs, augsub={"name": "masking", "cell": 8})["logits"])
    assert torch.equal(*found) and not torch.equal(found[0], model(pixel_values=images)["logits"])
    with pytest.raises(TypeError, match=r"needs logits .* not a dict"):
        masksub()(model, images, labels)


@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel, torch.compile, Module, in_transformers])
def test_a_model_that_was_not_patched(wrap, one_process, make_model, images, labels):
    model = wrap(make_model("vit"))
    for use in (masksub(), masksub().backward):
        with pytest.raises(ValueError, match=r"is not patched: call augsub.patch on the model first, before Distrib"):
            use(model, images, labels)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        *((wrap, WRAPPER) for wrap in (DistributedDataParallel, nn.DataParallel, torch.compile, Module, fsdp1, lora)),
        (lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (1,))), WRAPPER),
        (lambda model: lora(model).base_model, WRAPPER),
        (in_transformers, "ViTForImageClassification has a head around its model: patch its base_model"),
        (augsub.patch, "VisionTransformer is patched already; augsub.unpatch undoes it"),
    ],
)
def test_what_cannot_be_patched(wrap, message, one_process, make_model):
    with pytest.raises(ValueError, match=message):
        augsub.patch(wrap(make_model("vit")))


def test_a_model_goes_into_peft_patched(make_model, images, labels):
    model = lora(augsub.patch(make_model("vit")))
    assert torch.isfinite(masksub().backward(masksub().prepare(model), images, labels).loss)
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("is_reduced", [False, True])
def test_fsdp2_reduces_in_the_callers_backward_or_not(one_process, make_model, images, labels, is_reduced):
    model = masksub().prepare(augsub.patch(make_model("vit")))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model.set_requires_gradient_sync(is_reduced)
    masksub()(model, images, labels).loss.backward()
    assert all((parameter.grad is not None) == is_reduced for parameter in model.parameters())


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda model, images, _: model(images, augsub_ratio=0.5), ValueError, "0.5 was given without augsub"),
        (lambda model, images, _: model(images[0], augsub="masking"), TypeError, r"\(B, C, H, W\).*\[3, 32, 32\]"),
        (lambda model, images, _: model([[0.0]], augsub="masking"), TypeError, "as its first argument, not list"),
        (lambda model, *_: augsub.unpatch(augsub.unpatch(model)), ValueError, "VisionTransformer is not patched"),
        (lambda *_: augsub.patch("resnet18"), TypeError, "not 'resnet18'"),
        # as DataParallel makes one for each GPU
        (
            lambda model, images, _: model._replicate_for_data_parallel()(images, augsub="masking"),
            ValueError,
            r"^DataParallel computes in copies .* use DistributedDataParallel$",
        ),
        (lambda model, *_: masksub().prepare(nn.DataParallel(model)), ValueError, "use DistributedDataParallel"),
        (lambda model, *batch: masksub()(nn.DataParallel(model), *batch), ValueError, "use DistributedDataParallel"),
        (lambda model, *_: masksub().prepare(DistributedDataParallel(model)), ValueError, "prepare before wrapping it"),
        (lambda *_: augsub.SubModel("masking", weight=-1), ValueError, "weight of a sub-model = -1"),
        (lambda *_: masksub(main_weight=float("nan")), ValueError, "main_weight = nan"),
        (lambda *_: augsub.SubModelObjective(nn.CrossEntropyLoss(), HALF), TypeError, r"is a list of augsub\.SubModel"),
        (lambda *_: augsub.SubModelObjective(nn.CrossEntropyLoss(), ["masking"]), TypeError, "needed is a list of"),
    ],
)
def test_misuse_is_refused(use, error, message, one_process, make_model, images, labels):
    with pytest.raises(error, match=message):
        use(augsub.patch(make_model("vit")), images, labels)


class Head(nn.Module):
    """A model that does not pass on what it is called with beside the images."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, **kwargs: object) -> Tensor:
        return self.backbone(images)


@pytest.mark.parametrize("objective", [masksub(), augsub.CoSubObjective(nn.CrossEntropyLoss(), [HALF] * 2)])
def test_a_sub_model_that_is_none_is_noticed(objective, make_model, images, labels):
    model = Head(augsub.patch(make_model("vit")))
    objective.prepare(model)
    with pytest.raises(ValueError, match="Head keeps augsub=… from the PatchedVisionTransformer inside of it"):
        objective(model, images, labels)
    model.forward = lambda images, **kwargs: model.backbone(images, **kwargs)
    assert torch.isfinite(objective(model, images, labels).loss)


def test_a_forward_inside_of_a_sub_forward_is_refused(make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    expected = model(images)
    handle = model.blocks[0].register_forward_pre_hook(lambda *_: (model(images), None)[1])
    with pytest.raises(ValueError, match="VisionTransformer was called inside of its own sub-forward"):
        model(images, augsub="masking")
    handle.remove()
    assert torch.equal(model(images), expected)


def test_a_distilled_model_must_return_one_output(make_model, images, labels):
    model = augsub.patch(make_model("deit_distilled")).train()
    model.set_distilled_training(True)
    with pytest.raises(TypeError, match="set_distilled_training"):
        masksub()(model, images, labels)


def test_where_an_augmentation_has_no_site(make_model, images):
    model = augsub.patch(timm.create_model("beit_base_patch16_224", depth=1, img_size=64))
    with pytest.raises(ValueError, match=r"random_crop has no site in Beit: .*\(images of its built size only\)"):
        model(torch.randn(1, 3, 64, 64), augsub="random_crop", augsub_ratio=0.5)
    resnet, dropout = augsub.patch(make_model("resnet")), augsub.build("dropout", ratio=0.5)
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(dropout)])
    for use in (lambda: resnet(images, augsub=dropout), lambda: objective.prepare(resnet)):
        with pytest.raises(ValueError, match=r"dropout has no site in ResNet.* offers downscale, drop_path, masking"):
            use()


def test_branch_by_branch_lightning_steps_one_optimiser(tmp_path, make_model, images, labels):
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"has 2 optimisers, SubModelMixin steps one: call self\.objective"):
        trainer.fit(TwoOptimisers(augsub.patch(make_model("vit"))), DataLoader(list(zip(images, labels, strict=True))))


@pytest.mark.parametrize(
    ("criterion", "targets", "message"),
    [
        (LabelSmoothingCrossEntropy(), "soft", r"Smoothing\w+ cannot take targets \(4, 10\), torch.float"),
        (nn.NLLLoss(), "soft", r"NLLLoss cannot take .*soft targets \(B, K\), .*timm.loss.SoftTargetCrossEntropy"),
        (SoftTargetCrossEntropy(), "labels", r"cannot take targets \(4,\).* would broadcast .*labels \(B,\).* need nn"),
        (nn.CrossEntropyLoss(), "too large", r"CrossEntropyLoss cannot .*out of bounds; labels \(B,\), below 10,"),
        (nn.CrossEntropyLoss(reduction="none"), "labels", r"loss of shape \(4,\), needed is .*: reduction='mean'"),
        (BinaryCrossEntropy(reduction="none"), "soft", r"loss of shape \(4, 10\), needed is a scalar"),
    ],
)
def test_a_criterion_that_does_not_fit(criterion, targets, message, make_model, images, labels):
    given = {"labels": labels, "soft": torch.full((4, 10), 0.1), "too large": labels + 10}[targets]
    form = "softmax" if isinstance(criterion, nn.NLLLoss) else None
    with pytest.raises(ValueError, match=message) as caught:
        masksub(criterion, targets=form)(augsub.patch(make_model("vit")), images, given)
    assert "\n" not in str(caught.value)
