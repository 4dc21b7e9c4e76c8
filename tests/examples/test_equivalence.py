"""Ten steps from the same weights, batches and seeds: every loop gives the weights of our own trainer.

pytest tests/examples/test_equivalence.py -s prints the table.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import accelerate_loop
import lightning_module
import plain_pytorch
import pytest
import timm_task
import torch
import transformers_trainer
from digits import DIGITS, adamw, small_vit
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import augsub
from engine.checkpoint import CheckpointStore
from engine.config_file import load_config
from engine.data.source import build_source
from engine.defaults import build_trainer, complete
from engine.distributed import Process
from engine.run_folder import RunFolder
from engine.seeding import derive_seed, seed_all

STEPS = 10
CONFIG = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"


def seeded(objective: augsub.Objective) -> augsub.Objective:
    """Seed every step as our own trainer does: the other loops draw from the global generator."""

    class Seeded(type(objective)):
        step, is_computing = 0, False

        def __call__(self, *arguments, **named):
            return self.from_its_seed(super().__call__, *arguments, **named)

        def backward(self, *arguments, **named):
            return self.from_its_seed(super().backward, *arguments, **named)

        def from_its_seed(self, compute: Callable, *arguments, **named):
            if self.is_computing:  # a mutual objective's backward calls it
                return compute(*arguments, **named)
            seed_all(derive_seed(0, 0, self.step))
            self.step, self.is_computing = self.step + 1, True
            out = compute(*arguments, **named)
            self.is_computing = False
            return out

    objective.__class__ = Seeded
    return objective


def masksub(*sub_models: augsub.SubModel, **arguments) -> augsub.SubModelObjective:
    return augsub.SubModelObjective(nn.CrossEntropyLoss(label_smoothing=0.1), sub_models, **arguments)


def a_teacher() -> nn.Module:
    torch.manual_seed(1)
    return patched_vit()


PATHS = augsub.build("drop_path", ratio=0.3, mode="skip")
OBJECTIVES = {
    "MaskSub": lambda: masksub(
        augsub.SubModel("masking", ratio=0.5, weight=0.3),
        augsub.SubModel([{"name": "masking", "ratio": 0.25}, {"name": "drop_path", "ratio": 0.2}], weight=0.2),
    ),
    "shares": lambda: masksub(
        augsub.SubModel("masking", ratio=0.5, share=0.5, learn_from="labels"), augsub.SubModel(PATHS, share=0.3)
    ),
    "teacher": lambda: masksub(
        augsub.SubModel("masking", ratio=0.5, learn_from="augmented_teacher"), main_weight=0, teacher=a_teacher()
    ),
    "several labels": lambda: augsub.SubModelObjective(nn.BCEWithLogitsLoss(), [augsub.SubModel("masking", ratio=0.5)]),
    "CoSub": lambda: augsub.CoSubObjective(nn.CrossEntropyLoss(), [augsub.SubModel(PATHS)] * 2),
    "R-Drop": lambda: augsub.RDropObjective(nn.CrossEntropyLoss(), [augsub.SubModel("dropout", ratio=0.1)] * 2),
}


SLOW = ("shares", "teacher", "CoSub", "R-Drop", "several labels")  # all but the default


def with_their_neighbours(labels: Tensor) -> Tensor:
    """Targets (B, 10) of images with two labels each."""
    return nn.functional.one_hot(labels, 10).float() + nn.functional.one_hot((labels + 1) % 10, 10)


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in OBJECTIVES]
)
def ours(request, tmp_path_factory) -> tuple[str, dict[str, Tensor], TensorDataset, dict[str, Tensor]]:
    """Our own trainer without its hooks: the objective, first weights, the batches in their order, last weights."""
    config = load_config(CONFIG, [f"output_dir={tmp_path_factory.mktemp('run')}", f"train.max_iters={STEPS}"])
    config = complete(config)
    process = Process(rank=0, world_size=1, device=torch.device("cpu"))
    store = CheckpointStore(RunFolder(config.output_dir), process)
    trainer = build_trainer(config, build_source(config), process, store)
    trainer.hooks = []
    trainer.objective = OBJECTIVES[request.param]()
    trainer.optimizer = adamw(trainer.bare_model)
    first = copy.deepcopy(trainer.bare_model.state_dict())
    batches = trainer.data.train_from(0)
    images, labels = zip(*(next(batches) for _ in range(STEPS)), strict=True)
    batches.close()
    targets = torch.cat(labels)
    if request.param == "several labels":
        trainer.mix, targets = (
            lambda images, labels: (images, with_their_neighbours(labels)),
            with_their_neighbours(targets),
        )
    trainer.train()
    return request.param, first, TensorDataset(torch.cat(images), targets), trainer.bare_model.state_dict()


def patched_vit() -> nn.Module:
    return augsub.patch(small_vit())


def patched_in_transformers() -> nn.Module:
    model = transformers_trainer.timm_in_transformers()
    augsub.patch(model.base_model)
    return model


ON_CPU = {"accelerator": "cpu"}
LOOPS: dict[str, tuple[Callable[[], nn.Module], Callable]] = {
    "plain PyTorch": (patched_vit, plain_pytorch.train),
    "timm's task": (small_vit, timm_task.train),
    "Lightning, automatic": (patched_vit, partial(lightning_module.train, **ON_CPU)),
    "Lightning, manual": (patched_vit, partial(lightning_module.train, manual=True, **ON_CPU)),
    "Accelerate": (patched_vit, accelerate_loop.train),
    "Transformers": (patched_in_transformers, partial(transformers_trainer.train, use_cpu=True)),
}


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, str]]]:
    rows: list[tuple[str, str, str]] = []
    yield rows
    header = ["objective", "loop", f"largest difference of a weight after {STEPS} steps"]
    print(f"\n\n{tabulate(rows, header, tablefmt='github')}")


class Noting(augsub.SubModelObjective):
    """Every epoch that it was told."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "epoch":
            self.__dict__.setdefault("epochs", []).append(value)


@pytest.mark.parametrize("name", ["Lightning, automatic", "Lightning, manual", "Transformers"])
def test_a_ramp_follows_the_epochs_of_a_trainer(name):
    sub_model = augsub.SubModel("masking", ratio=0.5, weight=augsub.Ramp(0.1, 0.5, epochs=2))
    objective = Noting(nn.CrossEntropyLoss(), [sub_model])
    create, train = LOOPS[name]
    train(create(), objective, Subset(DIGITS.train, range(100)), epochs=2)  # two batches each
    assert objective.epochs == [None, 0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("name", LOOPS)
def test_the_weights_are_those_of_our_own_trainer(name, ours, table):
    objective, first, dataset, last = ours
    create, train = LOOPS[name]
    model = create()
    vit = getattr(model, "timm_model", model)
    vit.load_state_dict(first)
    train(model, seeded(OBJECTIVES[objective]()), dataset, epochs=1, shuffle=False)
    differences = {key: (tensor - last[key]).abs().max().item() for key, tensor in vit.state_dict().items()}
    moved = max((tensor - first[key]).abs().max().item() for key, tensor in last.items())
    table.append((objective, name, f"{max(differences.values()):.1e}"))
    assert moved > 5e-3  # ten steps of Adam at 1e-3
    # Backward in one piece adds gradients in another order, and Adam divides by the root of tiny ones
    assert max(differences.values()) < 1e-5, differences
