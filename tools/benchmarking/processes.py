"""What two processes send to each other in a step: with DDP, in the usual way and in ours."""

from __future__ import annotations

from tools.benchmarking.figures import Figure, ratio_of
from tools.step_costs.costs import DDP_EACH, DDP_ONCE
from tools.step_costs.measure import Case, measure


def measure_processes() -> list[Figure]:
    """Reductions of a gradient and their bytes, of plain training and with one sub-model."""
    plain, usual, ours = measure(
        [Case("ViT", DDP_ONCE, 1, 0), Case("ViT", DDP_EACH, 1, sub_models=1), Case("ViT", DDP_ONCE, 1, sub_models=1)]
    )
    figures = []
    for name, measured in (("plain training", plain), ("MaskSub, usual way", usual), ("MaskSub, ours", ours)):
        ratio = ratio_of([measured.seen.reduced], [plain.seen.reduced])
        compared = {} if measured is plain else {**ratio, "against": "plain training", "limit": 1.0}
        if measured is ours:
            compared["target"] = 1.0
        note = f"{measured.reductions:.0f} reduction{'s' if measured.reductions > 1 else ''} of each gradient"
        figures.append(
            Figure("processes", "a small ViT in two processes of DDP", name, measured.seen.reduced / 1e6, "MB reduced",
                   **compared, note=note)
        )  # fmt: skip
    return figures
