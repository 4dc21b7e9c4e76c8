"""The costs of a step as text: tables, the arithmetic with its numbers, and docs/scaling.md."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from engine.table import markdown_table, readable
from tools.pages.page import filled
from tools.step_costs.costs import (
    DDP_EACH,
    DDP_ONCE,
    FSDP_KEPT,
    FSDP_ONCE,
    WAYS,
    Step,
    Traffic,
    memory,
    padded_bytes,
    sharding_units,
    total_bytes,
    traffic,
    trained,
)  # fmt: skip
from tools.step_costs.measure import SETTINGS, Measured

COSTS = ("", "collectives per step", "gradients reduced", "parameters gathered", "sent by each GPU")
MEMORY = ("", "parameters", "gradients", "optimiser states", "EMA", "together")
MEASURED = (
    "model", "", "reductions of each gradient, sub-models 0, 1, 2", "with accumulation 2", "collectives, one sub-model",
    "gradient bytes reduced", "parameter bytes gathered",
)  # fmt: skip


def traffic_table(step: Step) -> str:
    """What is communicated, a row for each way."""
    rows = []
    for way in WAYS:
        costs = traffic(way, step)
        sizes = (costs.reduced, costs.gathered, costs.sent(step.processes))
        rows.append([way.title, collectives(costs), *map(readable, sizes)])
    return markdown_table(COSTS, rows)


def memory_table(step: Step) -> str:
    """What each process keeps, a row for each way."""
    rows = []
    for way in WAYS:
        costs = memory(way, step)
        sizes = (costs.parameters, costs.gradients, costs.states, costs.averages, costs.total)
        rows.append([way.title, *map(readable, sizes)])
    return markdown_table(MEMORY, rows)


def arithmetic(step: Step) -> str:
    """The rows of both tables with their numbers put in."""
    each, once, reshard, keep = (traffic(way, step) for way in (DDP_EACH, DDP_ONCE, FSDP_ONCE, FSDP_KEPT))
    count, gradient = step.processes, total_bytes(trained(step.model.parameters()))
    units = sharding_units(step.model)
    *blocks, root = [padded_bytes(unit, count) for unit in units]
    whole, held = sum(blocks) + root, memory(FSDP_ONCE, step)
    turns = f" x {step.accumulation} micro-batches" if step.accumulation > 1 else ""
    passes, part = f"{step.branches} branches{turns}", f"{count - 1}/{count}"
    average = " and average" if step.averages else ""
    kept = ", the gradient whole until its one reduction" if step.passes > 1 else ""
    lines = {
        "gradient": f"{gradient // 4:,} numbers of 4 bytes = {readable(gradient)}",
        "DDP sends": f"2 x {part} x {readable(gradient)} = {readable(once.sent(count))}",
        "  after every branch": f"2 x {part} x {passes} x {readable(gradient)} = {readable(each.sent(count))}",
        "FSDP2 gathers": f"{len(units)} units, padded to {count} equal shards each = {readable(whole)}",
        "FSDP2 sends": f"{part} x ({passes} x (2 x {readable(sum(blocks))} + {readable(root)}) + "
        f"{readable(reshard.reduced)}) "
        f"= {readable(reshard.sent(count))}",
        "  without resharding": f"{part} x ({passes} x {readable(whole)} + {readable(keep.reduced)}) "
        f"= {readable(keep.sent(count))}",
        "DDP keeps": f"weights, gradient, states{average}, each whole = {readable(memory(DDP_ONCE, step).total)}",
        "FSDP2 keeps": f"1/{count} of weights, states{average}, units in use{kept} = {readable(held.total)}",
    }
    return "\n".join(f"{name:<22}{line}" for name, line in lines.items())


def measured_table(measured: Sequence[Measured]) -> str:
    """A row for each model and way: how often gradients were reduced, and the bytes with one sub-model."""
    rows = []
    for (model, title), cases in groupby(measured, key=lambda item: (item.case.model, item.case.way.title)):
        by_setting = {(item.case.accumulation, item.case.sub_models): item for item in cases}
        reductions = [
            ", ".join(f"{by_setting[setting].reductions:g}" for setting in SETTINGS if setting[0] == accumulation)
            for accumulation in (1, 2)
        ]
        seen = by_setting[1, 1].seen
        rows.append([model, title, *reductions, collectives(seen), f"{seen.reduced:,}", f"{seen.gathered:,}"])
    return markdown_table(MEASURED, rows)


def agreement(measured: Sequence[Measured]) -> str:
    """Whether what was measured is what was computed, in a line."""
    equal = sum(item.seen == item.computed for item in measured)
    return f"{equal} of {len(measured)} cases: collectives and bytes equal the computed ones, to the byte"


def page(step: Step, measured: Sequence[Measured]) -> str:
    """The text of docs/scaling.md."""
    return filled(
        Path(__file__).with_name("page.md"),
        traffic=traffic_table(step),
        arithmetic=arithmetic(step),
        memory=memory_table(step),
        measured=measured_table(measured),
        agreement=agreement(measured),
    )


def collectives(costs: Traffic) -> str:
    """Their numbers: "98 all-reduces"."""
    numbers = {
        "all-gather": costs.all_gathers,
        "reduce-scatter": costs.reduce_scatters,
        "all-reduce": costs.all_reduces,
        "broadcast": costs.broadcasts,
    }
    return " + ".join(f"{number} {name}{'s' if number > 1 else ''}" for name, number in numbers.items() if number)
