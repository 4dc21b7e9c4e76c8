"""Skipped paths: the sums of stochastic depth, computed for the kept images alone."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.eva import Eva
from torch import Tensor, nn

import augsub
from augsub.residual_branches import ResidualBranch
from tests.conftest import VIT, tiny_resnet, tiny_swin, tiny_vit
from tests.skipping import skipped_and_computed

SKIP = augsub.build("drop_path", ratio=0.5, mode="skip")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def alive(model: nn.Module) -> nn.Module:
    """With branches that are not zero, as some are at their start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.9])
def test_sums_and_gradients_are_those_of_computed_and_dropped_paths(any_model, images, rate):
    model = augsub.patch(alive(any_model)).eval()
    images.requires_grad_()
    skipped, computed = skipped_and_computed(model, images, rate)
    torch.testing.assert_close(skipped, computed, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(computed, model(images), rtol=1e-2)
    weights = torch.randn_like(skipped)
    found, expected = (gradients(model, (weights * logits).sum()) for logits in (skipped, computed))
    assert found.keys() - {"mask_token"} == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-6 * max(1, expected[name].norm()), name


@pytest.mark.parametrize("options", [{}, {"scale_attn_inner": True, "use_post_norm": True}, {"rope_type": "mixed"}])
def test_rotary_positions_of_masked_images_are_those_of_the_kept_ones(images, options):
    eva = Eva(**VIT, use_rot_pos_emb=True, dynamic_img_size=False, **options)
    skipped, computed = skipped_and_computed(
        augsub.patch(alive(eva)).eval(), images, 0.5, {"name": "masking", "ratio": 0.5}
    )
    torch.testing.assert_close(skipped, computed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_images_and_their_parts_go_and_come_back_in_their_memory_format(layout, parts):
    drop = timm.layers.DropPath(0.0)
    branch = ResidualBranch(drop, (drop,), drop, rate=0.5, batch=4)
    values = torch.randn(4 * parts, 5, 2, 3).contiguous(memory_format=layout)
    torch.manual_seed(0)
    kept = torch.randperm(4)[:2]
    torch.manual_seed(0)
    (chosen,) = branch.choose(nn.Identity(), (values,))
    assert torch.equal(chosen, values.unflatten(0, (4, parts))[kept].flatten(0, 1))
    whole = branch.put_back(nn.Identity(), (chosen,), chosen)
    expected = torch.zeros(4, parts, 5, 2, 3).index_copy(0, kept, 2 * values.unflatten(0, (4, parts))[kept])
    assert torch.equal(whole, expected.flatten(0, 1))
    assert chosen.is_contiguous(memory_format=layout) and whole.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 6), (0.3, 4), (0.5, 3), (0.9, 1)])
def test_a_branch_sees_an_exact_number_of_images(images, rate, kept):
    seen = []
    model = augsub.patch(tiny_vit())
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    plain = model(images)
    seen.clear()
    sub = model(images, augsub={"name": "drop_path", "ratio": rate, "mode": "skip"})
    assert seen == [kept] * 3
    assert torch.equal(sub, plain) == (rate == 0)


def test_the_mean_over_draws_is_the_branch_itself():
    """As stochastic depth's: kept branches are scaled up."""
    drop, x = timm.layers.DropPath(0.0), torch.randn(5, 7)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.drop_path = nn.Identity(), drop

        def forward(self, x):
            return x + self.drop_path(3 * self.norm1(x))

    Block.__module__, Block.__qualname__, Block.__name__ = "timm.models.convit", "Block", "Block"
    model = augsub.patch(nn.Sequential(Block(), nn.Identity()))
    torch.manual_seed(0)
    draws = torch.stack([model(x[..., None, None], augsub=SKIP)[..., 0, 0] for _ in range(2000)])
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - 4 * x).abs() < 4 * error).all() and (error > 0).all()


def rates(model: nn.Module) -> list[float]:
    return [branch.rate for branch in model._augsub.sites["drop_path"].branches]


class TestMainModel:
    """`patch(model, skip_dropped_paths=True)`: the model's own rates, in training."""

    @pytest.mark.parametrize("make", [tiny_vit, tiny_swin, tiny_resnet])
    def test_skips_by_its_own_rates_in_training_alone(self, make, images):
        plain = alive(make(drop_path_rate=0.4))
        model = augsub.patch(copy.deepcopy(plain), skip_dropped_paths=True)
        assert torch.equal(model.eval()(images), plain.eval()(images))
        seen: dict[nn.Module, int] = {}
        for branch in model._augsub.sites["drop_path"].branches:
            branch.end.register_forward_pre_hook(lambda module, args: seen.update({module: len(args[0])}))
        torch.manual_seed(0)
        skipped = model.train()(images)
        expected = {drop: max(1, int(6 * (1 - drop.drop_prob))) for drop in seen}
        assert seen == expected and min(seen.values()) < 6
        torch.manual_seed(0)
        assert torch.equal(copy.deepcopy(model)(images), skipped)
        assert set(rates(model)) == {0.0}  # again, after the forward
        assert type(augsub.unpatch(model)) is type(plain)
        torch.manual_seed(0)
        dropped = model(images)
        torch.manual_seed(0)
        assert torch.equal(dropped, plain.train()(images))

    def test_is_skipped_in_the_sub_model_too_unless_that_has_a_rate_of_its_own(self, images):
        model = augsub.patch(tiny_vit(drop_path_rate=0.5), skip_dropped_paths=True).train()
        seen = []
        model.blocks[2].mlp.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
        model(images, augsub="masking", augsub_ratio=0.5)
        model(images, augsub={"name": "drop_path", "ratio": 0.9, "mode": "skip"})
        model(images, augsub="drop_path", augsub_ratio=0.9)
        assert seen == [(3, 9), (1, 17), (6, 17)]

    @pytest.mark.parametrize("checkpointed", [False, True])
    def test_gradient_checkpointing_chooses_the_same_images_again(self, images, checkpointed):
        model = augsub.patch(tiny_vit(drop_path_rate=0.5), skip_dropped_paths=True).train()
        objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(SKIP)])
        labels = torch.arange(6)

        def step(model: nn.Module) -> dict[str, Tensor]:
            torch.manual_seed(0)
            out = objective(model, images, labels)
            return gradients(model, out.loss)

        expected = step(model)
        model.set_grad_checkpointing(checkpointed)
        found = step(model)
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    @pytest.mark.parametrize(
        ("model", "error"),
        [
            (lambda: nn.Sequential(nn.Conv2d(3, 8, 1)), "Sequential has no stochastic depth"),
            (lambda: timm.create_model("gcvit_xxtiny"), "the first is stages.0.blocks.0.drop_path1"),
        ],
    )
    def test_a_model_that_cannot_skip_says_so_and_stays_as_it_was(self, model, error):
        with torch.device("meta"):
            plain = model()
        keys, modules = list(plain.state_dict()), list(plain.named_modules())
        with pytest.raises(ValueError, match=f"^skip_dropped_paths: .*{error}"):
            augsub.patch(plain, skip_dropped_paths=True)
        assert list(plain.state_dict()) == keys and list(plain.named_modules()) == modules
        assert not augsub.is_patched(plain)


def test_everything_is_restored_after_an_error(images):
    model = augsub.patch(tiny_vit())
    expected = model.eval()(images)
    broken = model.blocks[1].attn.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(images, augsub=SKIP)
    broken.remove()
    assert torch.equal(model(images), expected) and set(rates(model)) == {0.0}


def test_a_model_without_such_branches_refuses_to_skip_alone():
    with torch.device("meta"):
        model = augsub.patch(timm.create_model("gcvit_xxtiny"))
    objective = augsub.SubModelObjective(nn.CrossEntropyLoss(), [augsub.SubModel(SKIP)])
    with pytest.raises(ValueError, match=r"^drop_path 0.5 mode=skip: the branches of 24 of 24 drop paths"):
        objective.prepare(model)
    assert augsub.supports(model)["drop_path"] == "drop_path"


def test_a_replaced_start_of_a_branch_is_noticed(images):
    model = augsub.patch(tiny_vit())
    model.blocks[1].norm2 = nn.LayerNorm(48)
    with pytest.raises(ValueError, match=r"replaced after augsub\.patch"):
        model(images, augsub=SKIP)


def test_the_mode_is_checked():
    with pytest.raises(ValueError, match=r"^drop_path: mode = 'skipp', allowed are compute and skip$"):
        augsub.build("drop_path", ratio=0.5, mode="skipp")


def test_deep_copies_skip_by_themselves(images):
    model = augsub.patch(timm.create_model("deit3_small_patch16_224", drop_path_rate=0.1, **VIT)).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(0)
    assert twin(images, augsub=SKIP).abs().max() > 0
