"""Every configuration against its published recipe: what happens to images, losses and weights in a step."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision import transforms as tv
from torchvision.transforms import InterpolationMode

import augsub
from engine.data.source import DataSource
from engine.data.transforms import Delivery, Normalise, build_transform
from engine.defaults import build_run_model
from engine.distributed import Process
from engine.loss import IntegerMixup, build_criterion, build_mixup, build_objective
from engine.optim import build_optimizer
from models.recipe import param_groups

CLASSES = 1000
CPU = torch.device("cpu")


def test_loss(recipe):
    """Main and sub loss on a mixed batch of constant images, by the published formulas in float64."""
    facts, config = recipe.facts, recipe.config
    torch.manual_seed(0), np.random.seed(0)
    brightness = torch.tensor([-1.5, -0.5, 0.5, 2.0])
    images, labels = brightness[:, None, None, None].expand(4, 3, 32, 32).clone(), torch.tensor([3, 700, 41, 999])
    mixup = build_mixup(config, DataSource(None, None, CLASSES, 3), micro_batch=4, device=CPU)
    assert (mixup is None) == (facts["mix"]["mixup_alpha"] == 0)
    mixed, targets = (images, labels) if mixup is None else mixup(images, labels)
    expected_targets = published_targets(facts, mixed, labels, targets, brightness)
    model = augsub.patch(
        VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, num_classes=CLASSES)
    )
    nn.init.normal_(model.head.weight, std=0.3)
    objective = build_objective(config, build_criterion(config.loss, soft_labels=mixup is not None))
    objective = augsub.SubModelObjective(objective.criterion, [augsub.SubModel("masking", ratio=0.5)])
    torch.manual_seed(1)
    out = objective(model, mixed, targets)
    torch.manual_seed(1)
    main = model(mixed).double().detach()
    sub = model(mixed, augsub="masking", augsub_ratio=0.5).double().detach()
    binary = facts["loss"]["main"].startswith(("binary", "timm BinaryCrossEntropy"))
    loss, teaching = (bce, main.sigmoid()) if binary else (cross_entropy, main.softmax(-1))
    assert out.main_loss.item() == pytest.approx(loss(main, expected_targets).item(), rel=1e-5)
    assert out.sub_losses[0].item() == pytest.approx(loss(sub, teaching).item(), rel=1e-5)
    assert out.loss.item() == pytest.approx(0.5 * (out.main_loss + out.sub_losses[0]).item(), rel=1e-6)


def published_targets(facts, mixed, labels, targets, brightness) -> torch.Tensor:
    """Label i with the share of image i that is left in the mixed image, its partner with the rest; smoothed."""
    smoothing, one_hot = facts["loss"]["label_smoothing"], torch.eye(CLASSES, dtype=torch.float64)
    off, on = smoothing / CLASSES, 1 - smoothing + smoothing / CLASSES
    share = torch.ones(())
    if targets.ndim == 2:
        partner = brightness.flip(0)
        seen = (mixed.mean((1, 2, 3)) - partner) / (brightness - partner)
        share = (targets[torch.arange(4), labels].double() - off) / (on - off)
        if facts["loss"].get("bce_target_threshold") is None or facts["family"] != "deit3":
            torch.testing.assert_close(seen.double(), share, rtol=0, atol=5e-3)
        assert 0 < share[0] < 1
    soft = share.double().view(-1, 1) * one_hot[labels] + (1 - share.double()).view(-1, 1) * one_hot[labels.flip(0)]
    if facts["loss"].get("bce_target_threshold") == 0.0:
        return (soft > 0).double()
    return soft * (on - off) + off


def bce(logits, targets):
    return -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log()).mean()


def cross_entropy(logits, targets):
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def test_train_transform(recipe):
    facts, config = recipe.facts["augmentation"], recipe.config
    ops = build_transform(config, is_training=True).transforms
    three, rand, erase = facts["three_augment"], facts["auto_augment"], facts["random_erase"]
    colours = [AutoAugment, tv.ColorJitter] if three else [RandAugment]
    expected = [RandomResizedCropAndInterpolation, tv.RandomHorizontalFlip, *colours, MaybePILToTensor]
    assert [type(op) for op in ops] == expected
    delivered = Delivery(config, CPU, is_training=True).transforms
    assert [type(op) for op in delivered] == [Normalise, *([RandomErasing] if erase["active"] else [])]
    crop, flip = ops[:2]
    assert (list(crop.scale), list(crop.ratio)) == (facts["crop"]["scale"], pytest.approx(facts["crop"]["ratio"]))
    assert crop.size == (config.data.image_size,) * 2
    bicubic_only = facts["train_interpolation"] == "bicubic"
    both = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
    assert crop.interpolation == (InterpolationMode.BICUBIC if bicubic_only else both)
    assert flip.p == facts["horizontal_flip"]
    if three:
        check_three_augment(ops[2], ops[3], three)
    else:
        check_rand_augment(ops[2], rand, config, bicubic_only)
    normalise = delivered[0]
    assert normalise.mean.flatten().tolist() == pytest.approx(facts["normalise"]["mean"])
    assert normalise.std.flatten().tolist() == pytest.approx(facts["normalise"]["std"])
    if erase["active"]:
        op = delivered[1]
        assert (op.probability, op.mode, op.max_count) == (erase["probability"], erase["mode"], erase["count"])
        assert [op.min_area, op.max_area] == pytest.approx(erase["area"])
        assert op.log_aspect_ratio == pytest.approx(np.log(erase["aspect"]))


def check_three_augment(choice, jitter, facts) -> None:
    """Exactly one of three ops, each always applied; then colour jitter."""
    ops = {op.name: op for (op,) in choice.policy}
    assert sorted(ops) == ["Desaturate", "GaussianBlurRand", "Solarize"] and {op.prob for op in ops.values()} == {1}
    ranges: list[tuple[float, float]] = []
    image = tv.ToPILImage()(torch.linspace(0, 1, 3 * 16 * 16).view(3, 16, 16))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("timm.data.auto_augment.random.uniform", lambda low, high: ranges.append((low, high)) or high)
        ops["GaussianBlurRand"](image)
    assert ranges == [tuple(facts["gaussian_blur"]["radius_uniform"])]
    factors = pytest.approx(facts["color_jitter"]["factor_range"])
    assert [list(jitter.brightness), list(jitter.contrast), list(jitter.saturation)] == [factors] * 3
    assert jitter.hue is None
    drawn = (image, ops["Desaturate"](image), ops["Solarize"](image))
    pixels, grey, solarised = (np.asarray(one).astype(int) for one in drawn)
    assert (grey == grey[..., :1]).all()
    assert (solarised == np.where(pixels < facts["solarize_threshold"], pixels, 255 - pixels)).all()


def check_rand_augment(op, facts, config, bicubic_only) -> None:
    assert (op.num_layers, op.choice_weights) == (facts["ops_per_image"], None)
    published = [name.removesuffix("Increasing") for name in facts["ops"]]
    assert [one.name.removesuffix("Increasing") for one in op.ops] == published
    assert sum("Increasing" in one.name for one in op.ops) == 6 * facts["increasing_severity_set"]
    strength = tuple(facts[key] for key in ("op_probability", "magnitude", "magnitude_std"))
    for one in op.ops:
        assert isinstance(one, AugmentOp)
        assert (one.prob, one.magnitude, one.magnitude_std) == strength
        assert one.magnitude_max is None  # then levels are clipped to [0, 10]
        assert one.kwargs["fillcolor"] == tuple(round(255 * mean) for mean in config.transform.mean)
        assert ("resample" in one.kwargs and not isinstance(one.kwargs["resample"], tuple)) == bicubic_only


def test_eval_transform(recipe):
    facts, config = recipe.facts["eval"], recipe.config
    resize, crop, *_ = build_transform(config, is_training=False).transforms
    assert resize.size == facts["resize"]
    assert resize.interpolation == InterpolationMode.BICUBIC and facts["interpolation"].startswith("bicubic")
    assert tuple(crop.size) == (facts["center_crop"],) * 2
    assert config.transform.eval_crop == facts["crop_ratio"]


def test_optimizer_step(recipe):
    """Two steps on a tensor with decay and one without, against the published update in float64."""
    settings, facts, rate = recipe.config.optimizer, recipe.facts["optimizer"], recipe.facts["lr"]["absolute"]
    torch.manual_seed(0)
    values = {"matrix": torch.randn(4, 3).double(), "vector": torch.randn(5).double()}
    module = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in values.items()})
    optimizer = build_optimizer(settings, param_groups(module, settings.weight_decay))
    reference = {name: Published(value, facts) for name, value in values.items()}
    for _ in range(2):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter in module.values():
            parameter.grad = torch.randn_like(parameter)
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in module.values()]).item()
        for name, tensor in reference.items():
            tensor.step(module[name].grad.clone(), norm, rate, decays=name == "matrix")
        optimizer.step()
    for name, tensor in reference.items():
        torch.testing.assert_close(module[name].data - values[name], tensor.value - values[name], rtol=1e-6, atol=1e-12)


class Published:
    """One tensor under LAMB (decay inside the trust ratio, inner clipping) or AdamW (decoupled decay)."""

    def __init__(self, value, facts) -> None:
        self.value, self.facts = value.clone(), facts
        self.first, self.second, self.count = torch.zeros_like(value), torch.zeros_like(value), 0

    def step(self, gradient, norm: float, rate: float, decays: bool) -> None:
        beta1, beta2 = self.facts["betas"]
        eps, decay = self.facts["eps"], self.facts["weight_decay"] if decays else 0.0
        limit = self.facts.get("max_grad_norm_inside_optimizer")
        gradient = gradient / max(1.0, norm / limit) if limit else gradient
        self.count += 1
        self.first = beta1 * self.first + (1 - beta1) * gradient
        self.second = beta2 * self.second + (1 - beta2) * gradient**2
        corrected = self.second / (1 - beta2**self.count)
        update = self.first / (1 - beta1**self.count) / (corrected.sqrt() + eps)
        if limit:
            update = update + decay * self.value
            trust = self.value.norm() / update.norm() if decay else 1.0
            self.value = self.value - rate * trust * update
        else:
            self.value = self.value * (1 - rate * decay) - rate * update


def test_hyper_parameters(recipe):
    facts, config = recipe.facts, recipe.config
    published, mix, ema, amp = facts["optimizer"], facts["mix"], facts["ema"], facts["amp"]
    optimizer, mixup, train = config.optimizer, config.mixup, config.train
    assert (optimizer.betas, optimizer.eps) == (published["betas"], published["eps"])
    assert optimizer.weight_decay == published["weight_decay"]
    assert optimizer.kwargs.get("max_grad_norm") == published.get("max_grad_norm_inside_optimizer")
    assert train.clip_norm == published.get("clip_grad_norm")
    chances = ("mixup_alpha", "cutmix_alpha", "probability", "switch_to_cutmix_probability")
    ours = [mixup.mixup_alpha, mixup.cutmix_alpha, mixup.prob, mixup.switch_prob]
    assert ours == [mix[key] for key in chances]
    assert (mixup.mode, mixup.cutmix_minmax) == (mix["mode"], mix.get("cutmix_minmax"))
    assert mixup.correct_lam == mix.get("correct_lambda_for_clipped_box", True)
    assert mixup.off_epoch is None and mix["off_epoch"] in (None, "0, meaning never switched off")
    assert mixup.integer_pixels == ("uint8" in mix.get("where", ""))
    assert (
        isinstance(build_mixup(config, DataSource(None, None, CLASSES, 3), 2, CPU), IntegerMixup)
        == mixup.integer_pixels
    )
    assert config.loss.smoothing == facts["loss"]["label_smoothing"]
    assert config.ema.enabled == ema["kept"]
    if ema["kept"]:
        assert (config.ema.decay, config.ema.evaluate) == (ema["decay"], ema["evaluated"])
    assert train.amp == "fp16" and amp["dtype"] == "float16"
    assert train.loss_scale == amp.get("scaler_init", amp.get("initial_scale"))
    assert train.loss_scale_window == amp.get("scaler_growth_interval", amp.get("loss_scale_window"))
    assert config.seed == int(re.search(r"(\d+) \+ rank", facts["seed"]).group(1))
    assert config.schedule.cooldown_epochs == facts["schedule"]["cooldown_epochs_run"]


def test_initial_values(recipe):
    """One block of each full-width model, as a run starts it."""
    config = recipe.config
    config.model.pretrained, config.model.checkpoint = False, None
    config.model.kwargs |= {"swin": {"depths": [1, 1, 1, 1]}, "resnet_rsb": {"layers": [1, 1, 1, 1]}}.get(
        recipe.family, {"depth": 1}
    )
    torch.manual_seed(0)

    source = DataSource(train=None, held_out=None, num_classes=CLASSES, in_chans=3)
    model = build_run_model(config, source, Process(rank=0, world_size=1, device=torch.device("cpu")))
    head, facts = model.get_classifier(), recipe.facts["model"]["init"]
    if recipe.family == "resnet_rsb":
        assert head.weight.std().item() == pytest.approx(0.0128, rel=0.02)
        assert all((stage[-1].bn3.weight == 0).all() for stage in (model.layer1, model.layer4))
        return
    assert head.weight.std().item() == pytest.approx(2e-5 if "2e-5" in facts["head"] else 0.02, rel=0.02)
    if recipe.family == "ft_clip":
        bound = 0.001 / recipe.facts["model"]["embed_dim"] ** 0.5
        assert 0.9 * bound < head.bias.abs().max().item() <= bound * 1.001
        assert (model.norm.weight == 1).all() and (model.norm.bias == 0).all()
    else:
        assert (head.bias == 0).all()
    if recipe.family == "deit3":
        assert (model.blocks[0].ls1.gamma == recipe.facts["model"]["layer_scale_init"]).all()
        assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
        if recipe.config.model.class_token_std is not None:
            assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
        assert (recipe.config.model.class_token_std is None) == ("start_from" in recipe.facts)
    if recipe.family == "swin":
        assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.3)
        table = model.layers[0].blocks[0].attn.relative_position_bias_table
        assert table.std().item() == pytest.approx(0.02, rel=0.15)
