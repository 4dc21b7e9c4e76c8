"""What a training step sends between GPUs and keeps in each of them, by arithmetic.

    python tools/scaling.py                                     # ViT-H/14 on 64 GPUs, configs/deit3_h_400e.yaml
    python tools/scaling.py --config configs/swin_b.yaml --processes 8 train.accumulation=2
    python tools/scaling.py --model vit_large_patch16_224       # with one sub-model and AdamW

Collectives and sizes are those of torch's DistributedDataParallel and FSDP2 as `engine/distributed.py` sets them up; a
test counts them in two real processes. Activations are not counted. The model is built without weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from engine.command_line import exit_code, tool_parser
from engine.config_file import CONFIGS, load_config
from engine.errors import InputError
from engine.text import markdown_table, readable_size, to_json

OF_A_MODEL = CONFIGS / "_base_" / "imagenet.yaml"  # what --model is trained with
HEADER = (
    "", "collectives per step", "sent by each GPU", "parameters", "gradients", "optimiser states", "EMA", "kept by each"
)  # fmt: skip
COLLECTIVES = ("all_gathers", "reduce_scatters", "all_reduces", "broadcasts")


def run(arguments: argparse.Namespace) -> None:
    """Print what the configuration costs."""
    from engine.defaults import complete  # here: --help needs no torch
    from tools.analysis import data_source
    from tools.step_costs import STRATEGIES, build_step, memory, sent_bytes, traffic

    count = arguments.processes
    if count < 2:
        raise InputError(f"--processes = {count}, allowed is 2 or more")
    chosen = (OF_A_MODEL, [f"model.name={arguments.model}"]) if arguments.model else (arguments.config, [])
    config = complete(load_config(chosen[0], [*chosen[1], *arguments.overrides]))
    step = build_step(config, data_source(config), count)
    if step.uncounted:
        raise InputError(step.uncounted)
    found = {}
    for title, strategy in STRATEGIES.items():
        costs = traffic(strategy, step)
        found[title] = {**costs, "sent": sent_bytes(costs, count), "memory": memory(strategy, step)}
    if arguments.json:
        print(to_json(found, indent=2))
        return
    parameters = sum(parameter.numel() for parameter in step.model.parameters()) / 1e6
    print(f"{config.model.name}, {parameters:.2f} M parameters, {count} processes, {step.passes} passes per step\n")
    print(markdown_table(HEADER, [row(title, costs) for title, costs in found.items()]))


def row(title: str, costs: dict[str, Any]) -> list[str]:
    """What a strategy costs, for people."""
    counts = [(costs.get(name), name.replace("_", "-")) for name in COLLECTIVES if costs.get(name)]
    named = " + ".join(f"{count} {name if count > 1 else name[:-1]}" for count, name in counts)
    kept = costs["memory"].values()
    return [title, named, *map(readable_size, (costs["sent"], *kept, sum(kept)))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for an error."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", default="deit3_h_400e", help="default deit3_h_400e")
    what.add_argument("--model", metavar="NAME", help="any timm model, with one sub-model and AdamW")
    parser.add_argument("--processes", type=int, default=64, metavar="N", help="GPUs (default 64)")
    parser.add_argument("--json", action="store_true", help="plain numbers instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return exit_code(partial(run, parser.parse_intermixed_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
