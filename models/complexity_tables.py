"""Complexity as text for people: one model, its modules, many models, and the literature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

import augsub
from models.build import create_model
from models.complexity import Complexity, analyze
from models.flop_counting import count_with_torch
from models.literature import LITERATURE, Reference

MEGA, GIGA = 1e6, 1e9
Augmentations = Sequence[augsub.SubModelAugmentation]
COMPARED = (augsub.build("masking", ratio=0.5), augsub.build("random_crop", ratio=0.5))


def summary_rows(complexity: Complexity, augmentations: Augmentations) -> list[tuple[str, str]]:
    """Figures of one model, (name, value)."""
    activations = ("activations", f"{_number(complexity.main.activations, MEGA)} M")
    return [*cost_rows(complexity, augmentations), activations]


def cost_rows(complexity: Complexity, augmentations: Augmentations) -> list[tuple[str, str]]:
    """Parameters, and FLOPs of one image's forwards."""
    main = complexity.main.flops
    subs = [
        (f"sub-model {augmentation}", f"{_number(sub.flops, GIGA)} GFLOPs, {sub.flops / main:.3f} of main")
        for augmentation, sub in zip(augmentations, complexity.subs, strict=True)
    ]
    return [
        ("parameters", f"{_number(complexity.params, MEGA)} M"),
        ("main model", f"{_number(main, GIGA)} GFLOPs"),
        *subs,
        ("training cost", f"{complexity.training_cost:.3f} of plain training"),
    ]


def module_table(complexity: Complexity, augmentations: Augmentations, depth: int) -> str:
    """Parameters and GFLOPs of the modules down to `depth` levels, the model itself first."""
    forwards = (complexity.main, *complexity.subs)
    rows = [
        [name or "(model)", _number(params, MEGA), *(_number(cost.flops_by_module[name], GIGA) for cost in forwards)]
        for name, params in complexity.params_by_module.items()
        if all(name in cost.flops_by_module for cost in forwards) and (not name or name.count(".") < depth)
    ]
    subs = [f"{augmentation}, GFLOPs" for augmentation in augmentations]
    return _table(["module", "parameters, M", "main, GFLOPs", *subs], rows)


def uncounted_line(complexity: Complexity) -> str:
    """Names of the ops that the FLOPs leave out."""
    names = ", ".join(f"{name} ({calls})" for name, calls in complexity.uncounted.items())
    return f"not counted in the FLOPs (number of calls): {names or 'nothing'}"


def comparison_table(models: Mapping[str, tuple[Complexity, Augmentations]]) -> str:
    """One line per model, by title."""
    rows = [
        [
            title,
            _number(complexity.params, MEGA),
            _number(complexity.main.flops, GIGA),
            ", ".join(map(str, augmentations)) or "none",
            _number(complexity.sub_flops, GIGA),
            f"{complexity.training_cost:.3f}",
            _number(complexity.main.activations, MEGA),
        ]
        for title, (complexity, augmentations) in models.items()
    ]
    header = ["", "parameters, M", "main, GFLOPs", "sub-models", "subs, GFLOPs", "training cost", "activations, M"]
    return _table(header, rows)


def literature_table() -> str:
    """Well-known models beside their published figures, torch's own count, and the cost of their sub-models."""
    subs = [f"{augmentation}, of main" for augmentation in COMPARED]
    header = ["", "parameters, M", "published", "GFLOPs", "published", "by torch", *subs]
    return _table(header, [_literature_row(reference) for reference in LITERATURE])


def _literature_row(reference: Reference) -> list[str]:
    model = create_model(reference.name, num_classes=1000)  # timm's ViT-H/14 has no classifier by default
    complexity = analyze(model, (3, 224, 224), COMPARED)
    flops = complexity.main.flops
    return [
        reference.title,
        _number(complexity.params, MEGA),
        f"{reference.mega_params:.1f}",
        _number(flops, GIGA),
        f"{reference.giga_flops:.1f}",
        _number(count_with_torch(model, (3, 224, 224)), GIGA),
        *(f"{sub.flops / flops:.3f}" for sub in complexity.subs),
    ]


def _number(count: int, unit: float) -> str:
    """Four significant digits."""
    return f"{count / unit:.4g}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    align = ("left", *["right"] * (len(header) - 1))
    return tabulate(rows, headers=header, tablefmt="github", disable_numparse=True, colalign=align)
