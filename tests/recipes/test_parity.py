"""Every configuration against its published recipe: schedule, groups, batches, model."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
import torch
from timm.layers import DropPath

import augsub
from augsub.masking import random_keep
from engine.data.loaders import accumulation_for
from engine.data.stream import TrainingOrder
from models.recipe import param_groups
from tests.recipes.conftest import TRAINING_IMAGES


def published_lr(facts: dict, epoch: int) -> float:
    """The recipe's formula at the first iteration of an epoch."""
    schedule, peak, epochs = facts["schedule"], facts["lr"]["absolute"], facts["epochs"]
    iterations, floor, start = facts["iterations_per_epoch"], schedule["min_lr"], schedule["warmup_start_lr"]

    def cosine(fraction: float) -> float:
        return floor + 0.5 * (peak - floor) * (1 + math.cos(math.pi * fraction))

    warmup, family = schedule["warmup_epochs"], facts["family"]
    if family == "deit3":
        t = max(0, epoch - 1)
        return start + t / 5 * (peak - start) if t < 5 else cosine(t / epochs)
    if family == "resnet_rsb":
        return start + epoch / 5 * (peak - start) if epoch < 5 else cosine(epoch / epochs)
    if family == "mae_finetune":
        return peak * epoch / warmup if epoch < warmup else cosine((epoch - warmup) / (epochs - warmup))
    step = epoch * iterations
    if family == "swin":
        t = max(0, step - 1)
        return start + t / 25020 * (peak - start) if t < 25020 else cosine(t / 375300)
    warmup_steps = warmup * iterations
    if step < warmup_steps:
        return peak * step / (warmup_steps - 1)
    return cosine((step - warmup_steps) / (facts["total_updates"] - warmup_steps))


def test_learning_rate(recipe):
    """Constant within an epoch in recipes that step per epoch, moving in the others."""
    facts, rate, per_epoch = recipe.facts, recipe.schedule, recipe.config.schedule.unit == "epoch"
    assert per_epoch == (facts["schedule"]["step_unit"] == "per epoch")
    ours = [rate(epoch * (1 if per_epoch else facts["iterations_per_epoch"])) for epoch in range(facts["epochs"])]
    assert ours == pytest.approx([published_lr(facts, epoch) for epoch in range(facts["epochs"])], rel=1e-6, abs=0)
    for epoch, published in [*facts.get("reference_lr", ()), *facts.get("reference_lr_more", ())]:
        assert ours[epoch] == pytest.approx(published, rel=1e-6, abs=0), epoch
    if recipe.family == "swin":
        assert rate(0) == rate(1) < rate(2)  # the lag of one iteration
    if recipe.family == "ft_clip":
        last = facts["schedule"]["warmup_iterations"] - 1
        assert rate(last) == rate(last + 1) == facts["lr"]["absolute"]


def test_weight_decay(recipe):
    groups = param_groups(recipe.model, recipe.config.optimizer.weight_decay)
    for decays, key in ((True, "with_weight_decay"), (False, "without_weight_decay")):
        tensors = [tensor for group in groups if (group["weight_decay"] > 0) == decays for tensor in group["params"]]
        published = recipe.facts["param_counts"][key]
        found = (len(tensors), sum(tensor.numel() for tensor in tensors))
        assert found == (published["tensors"], published["elements"]), key


def test_frozen_parameters(recipe):
    """FT-CLIP's own model has a second patch convolution that it never uses; timm's has one."""
    frozen = [name for name, parameter in recipe.model.named_parameters() if not parameter.requires_grad]
    assert frozen == (["patch_embed.proj.weight"] if "frozen" in recipe.facts["param_counts"] else [])
    trainable = sum(parameter.numel() for parameter in recipe.model.parameters() if parameter.requires_grad)
    assert trainable == recipe.facts["param_counts"]["trainable"]["elements"]


def layer_of(name: str, depth: int) -> int:
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("cls_token", "pos_embed", "patch_embed", "norm_pre")) else depth + 1


def test_layer_decay(recipe):
    optimizer, published = recipe.config.optimizer, recipe.facts["lr"]["layer_decay"]
    published = published if isinstance(published, dict) else {"rate": 1.0}
    groups = param_groups(recipe.model, optimizer.weight_decay, optimizer.layer_decay, optimizer.full_lr)
    scale_of = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    depth, rate = recipe.facts["model"].get("depth"), published["rate"]
    for name, parameter in recipe.model.named_parameters():
        if parameter.requires_grad:
            expected = rate ** (depth + 1 - layer_of(name, depth)) if rate < 1 else 1.0
            assert scale_of[id(parameter)] == pytest.approx(expected, rel=1e-12), name
    assert len(groups) == published.get("groups", len(groups))
    assert min(scale_of.values()) == pytest.approx(published.get("smallest_scale", 1.0), rel=1e-9)


def test_drop_path(recipe):
    rates = defaultdict(set)
    for name, module in recipe.model.named_modules():
        if isinstance(module, DropPath):
            rates[name.rpartition(".")[0]].add(module.drop_prob)
    facts = recipe.facts["model"]
    blocks, rate = facts.get("blocks") or facts.get("depth") or sum(facts["depths"]), facts["drop_path"]
    assert len(rates) == blocks
    constant = facts["drop_path_pattern"].startswith(("constant", "none"))
    for index, seen in enumerate(rates.values()):
        expected = rate if constant else rate * index / (blocks - 1)
        assert list(seen) == [pytest.approx(expected, abs=1e-6)], index


def test_batch(recipe):
    batch, train = recipe.facts["batch"], recipe.config.train
    accumulation = accumulation_for(train, batch["gpus"])
    assert (train.global_batch, recipe.config.published.gpus) == (batch["global_batch"], batch["gpus"])
    assert accumulation == batch["gradient_accumulation"]
    assert train.global_batch // batch["gpus"] // accumulation == batch["per_gpu"]


def test_samples_of_an_epoch(recipe):
    facts, sampler, config = recipe.facts, recipe.facts["sampler"], recipe.config
    of_one = {"accumulation": 1, "rank": 0, "world_size": 1, "first_iteration": 0, "last_iteration": 1}
    order = TrainingOrder(
        num_samples=TRAINING_IMAGES,
        repeats=config.data.repeats,
        micro_batch=config.train.global_batch,
        seed=config.seed,
        **of_one,
    )
    images = order.epoch_images(0)
    assert order.iterations_per_epoch == facts["iterations_per_epoch"]
    assert config.train.epochs == facts["epochs"]
    assert order.iterations_per_epoch * config.train.epochs == facts["total_updates"]
    drawn = sampler["samples_drawn_per_epoch"]
    distinct = sampler["distinct_images_per_epoch"] if sampler["repeated_augmentation"] else drawn
    assert (len(images), len(set(images)), config.data.repeats) == (drawn, distinct, sampler["repeats"])


def test_model(recipe):
    facts, model = recipe.facts["model"], recipe.model
    assert recipe.config.model.name.split(".")[0] == facts["timm_name"]
    assert recipe.config.model.name == facts.get("timm_pretrained_tag", facts["timm_name"])
    assert recipe.config.data.image_size == recipe.facts["image_size"]
    if recipe.family == "resnet_rsb":
        assert [len(getattr(model, f"layer{stage}")) for stage in range(1, 5)] == facts["layers"]
        assert {m.eps for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {facts["batch_norm"]["eps"]}
        return
    assert model.embed_dim == facts["embed_dim"]
    assert model.patch_embed.patch_size == (facts["patch_size"],) * 2
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {facts["layer_norm_eps"]}
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {facts["dropout"]}
    if recipe.family == "swin":
        assert [len(stage.blocks) for stage in model.layers] == facts["depths"]
        assert [stage.blocks[0].attn.num_heads for stage in model.layers] == facts["num_heads"]
        assert model.layers[0].blocks[0].attn.window_size == (facts["window_size"],) * 2
        return
    assert (len(model.blocks), model.blocks[0].attn.num_heads) == (facts["depth"], facts["num_heads"])
    pooling = "token" if facts["pooling"].startswith("class token") else "avg"
    assert model.global_pool == pooling
    assert hasattr(model.fc_norm, "weight") == (recipe.family == "mae_finetune")


def test_masking(recipe):
    sub_model, *others = recipe.config.augsub.sub_models
    (masking,) = sub_model.augmentations
    assert not others and masking["name"] == "masking"
    site = {"swin": "stem", "resnet_rsb": "image"}.get(recipe.family, "tokens")
    assert augsub.supports(recipe.model)["masking"] == site
    ours = (masking["ratio"], recipe.config.augsub.main_weight, sub_model.weight)
    if recipe.family == "ft_clip":  # not published: the paper's default
        assert ours == (0.5, 0.5, 0.5)
        return
    facts = recipe.facts["augsub"]
    assert ours == (facts["ratio"], *facts["loss_weights"].values())
    kept = random_keep(1, math.prod(facts["grid"]), masking["ratio"], torch.device("cpu")).shape[1]
    if site == "tokens":
        assert kept == facts["kept_patch_tokens"] and list(recipe.model.patch_embed.grid_size) == facts["grid"]
    else:  # the original of ResNet shows the complement of what it keeps
        assert kept == facts["visible_cells" if site == "stem" else "zeroed_cells"]
        assert masking["cell"] == facts["mask_cell_pixels"]


def test_head_comment(recipe):
    """Accuracies, GPUs times batch, and the command."""
    comment = "".join(line for line in recipe.path.read_text().splitlines(True) if line.startswith("#"))
    top1, batch, ours = recipe.facts["reported_top1"], recipe.facts["batch"], recipe.config.published
    top1 = top1.get("after_400", top1)
    assert f"baseline {top1['baseline']}" in comment and ours.baseline == top1["baseline"]
    if isinstance(top1["masksub"], float):
        assert f"MaskSub {top1['masksub']}" in comment and ours.masksub == top1["masksub"]
    assert f"8 GPUs x {batch['per_gpu']} images" in comment and f"= {batch['global_batch']}" in comment
    assert f"--config configs/{recipe.path.name} data.root=" in comment
    assert ("--nnodes=8" in comment) == (batch["nodes"] == 8)
