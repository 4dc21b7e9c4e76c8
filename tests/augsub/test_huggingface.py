"""Vision transformers of Hugging Face Transformers lose tokens, as timm's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import augsub

SIZE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 10,
}
DINO = {key: value for key, value in SIZE.items() if key != "intermediate_size"}
MODELS = {  # model, prefix tokens
    "vit": (lambda: ViTForImageClassification(ViTConfig(**SIZE)), 1),
    "deit": (lambda: DeiTForImageClassification(DeiTConfig(**SIZE)), 2),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**DINO)), 1),
    "dinov2 with registers": (
        lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
        4,
    ),
}


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    create, prefix = MODELS[request.param]
    return create().eval(), prefix


def test_masked_tokens_are_gone(case):
    """The last hidden state of the sub-model is that of the blocks on the kept tokens alone."""
    model, prefix = case
    backbone = augsub.patch(model.base_model)
    assert augsub.supports(backbone)["masking"] == "tokens"
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(5)
    sub = backbone(images, augsub="masking", augsub_ratio=0.75).last_hidden_state
    torch.manual_seed(5)
    kept = torch.rand(3, 16).argsort(1)[:, :4].sort(1).values
    index = torch.cat([torch.arange(prefix).expand(3, prefix), kept + prefix], 1).unsqueeze(-1)
    embeddings = backbone.embeddings(images)
    alone = embeddings.gather(1, index.expand(-1, -1, embeddings.shape[-1]))
    plain = copy.deepcopy(augsub.unpatch(backbone))
    plain.embeddings = Constant(alone)
    expected = plain(images).last_hidden_state
    assert sub.shape == (3, prefix + 4, 32)
    torch.testing.assert_close(sub.sort(1).values, expected.sort(1).values, atol=1e-5, rtol=1e-5)


class Constant(nn.Module):
    """Embeddings of whatever it is given."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value
        self.patch_embeddings = nn.Module()
        self.patch_embeddings.projection = nn.Linear(1, 1)  # Transformers asks for its dtype

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return self.value


def test_main_model_and_undoing_it(case):
    model, _ = case
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images).logits
        augsub.patch(model.base_model)
        assert torch.equal(model(images).logits, plain)
        assert not torch.equal(model(images, augsub="masking", augsub_ratio=0.5).logits, plain)
        assert model(images, augsub="random_crop", augsub_ratio=0.5).logits.shape == (2, 10)
        augsub.unpatch(model.base_model)
        assert torch.equal(model(images).logits, plain)


def test_any_other_model_is_masked_at_its_input():
    model = ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=10)
    )
    augsub.patch(model.base_model)
    assert augsub.supports(model.base_model)["masking"] == "image"
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("masking")])
    out = objective(model, torch.randn(2, 3, 64, 64), torch.tensor([1, 2]))
    assert out.logits.shape == (2, 10)
