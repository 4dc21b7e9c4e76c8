"""drop_path and dropout: the rates that modules have while the sub-model runs."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.utils.checkpoint import checkpoint

import augsub


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
    during = rates_during(model, images, DropPath, "drop_prob", augsub="droppath", augsub_ratio=0.3)
    assert len(during) == places
    assert set(during.values()) == {0.3}
    assert rates_during(model, images, DropPath, "drop_prob") == own
    assert (set(own.values()) == {0.0}) == ("drop" not in variant)


@pytest.mark.parametrize("variant", ["vit", "vit_drop", "swin", "swin_drop"])
def test_projection_and_mlp_dropouts_have_the_ratio_and_no_other(variant, make_model, images):
    model = augsub.patch(make_model(variant)).train()
    own = rates_during(model, images, torch.nn.Dropout, "p")
    during = rates_during(model, images, torch.nn.Dropout, "p", augsub="dropout", augsub_ratio=0.3)
    for name, rate in during.items():
        expected = 0.3 if name.endswith(("attn.proj_drop", "mlp.drop1", "mlp.drop2")) else own[name]
        assert rate == expected, name
    assert sum(rate == 0.3 for rate in during.values()) == 3 * len([n for n in during if n.endswith("proj_drop")])
    assert rates_during(model, images, torch.nn.Dropout, "p") == own


@pytest.mark.parametrize("name", ["drop_path", "dropout"])
def test_a_sub_model_is_one_in_evaluation_mode_too(name, make_model, images):
    model = augsub.patch(make_model("vit")).eval()
    main, (sub, other) = model(images), (model(images, augsub=name, augsub_ratio=0.5) for _ in range(2))
    assert not torch.equal(sub, main) and not torch.equal(sub, other)
    assert torch.equal(model(images), main)


def test_drop_path_drops_that_share_of_paths(make_model):
    """A block whose branches are dropped hands its input on."""
    model = augsub.patch(make_model("vit")).train()
    images = torch.randn(256, 3, 32, 32)
    block, unchanged = model.blocks[0], []
    block.register_forward_hook(
        lambda module, args, output: unchanged.append((args[0] == output).flatten(1).all(dim=1).float().mean().item())
    )
    torch.manual_seed(0)
    model(images, augsub="drop_path", augsub_ratio=0.5)
    model(images)
    assert unchanged[0] == pytest.approx(0.25, abs=0.09)  # both branches: 0.5 ** 2, three standard errors
    assert unchanged[1] == 0


class Recomputing(nn.Module):
    """Computes its residual branches again in backward, by torch alone: no attribute tells of it."""

    def __init__(self, is_reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.drop_path = nn.ModuleList(DropPath(0.1) for _ in range(4))
        self.head = nn.Linear(8, 10)
        self.is_reentrant = is_reentrant
        self.recomputes = True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.stem(images).flatten(2).mT
        for branch, drop_path in zip(self.branches, self.drop_path, strict=True):
            block = lambda tokens, a=branch, b=drop_path: tokens + b(a(tokens).tanh())  # noqa: E731
            tokens = checkpoint(block, tokens, use_reentrant=self.is_reentrant) if self.recomputes else block(tokens)
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("one_graph", [False, True])
def test_anybodys_gradient_checkpointing_finds_the_same_state(is_reentrant, one_graph, images, labels):
    model = augsub.patch(Recomputing(is_reentrant)).train()
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel("drop_path", ratio=0.5)])
    gradients = []
    for model.recomputes in (False, True):
        model.zero_grad()
        torch.manual_seed(3)
        if one_graph:
            objective(model, images, labels).loss.backward()
        else:
            objective.backward(model, images, labels)
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-6)
    assert {module.drop_prob for module in model.drop_path} == {0.1}


@pytest.mark.parametrize("name", ["mobilevitv2_050", "ese_vovnet39b", "xception41", "hgnetv2_b0"])
def test_no_block_loses_all_of_an_image(name):
    """Of blocks without a residual connection timm calls the drop path of some: the branch is all that they have."""
    model = augsub.patch(timm.create_model(name, num_classes=10)).train()
    erased = []

    def note(block, args, output):
        if isinstance(output, torch.Tensor) and not output.any():
            erased.append(type(block).__name__)

    for block in model.modules():
        if any(isinstance(child, DropPath) for child in block.children()):
            block.register_forward_hook(note)
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64), augsub="drop_path", augsub_ratio=0.999)
    assert erased == []
