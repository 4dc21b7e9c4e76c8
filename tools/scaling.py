"""What a step with sub-models sends between GPUs and keeps in each, by arithmetic; measured in two processes.

    python tools/scaling.py                                     # ViT-H/14 on 64 GPUs, configs/deit3_h_400e.yaml
    python tools/scaling.py --config configs/swin_b.yaml --processes 8 train.accumulation=2
    python tools/scaling.py --model vit_large_patch16_224       # with one sub-model and AdamW
    python tools/scaling.py --measure                           # small models in two processes of this machine
    python tools/scaling.py --page docs/scaling.md              # both, as a page

Activations are not counted. Nothing is computed with weights: the model is built on the meta device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

from engine.command_line import as_path, exit_code, tool_parser
from engine.config import Config
from engine.config_file import CONFIGS, load_config
from engine.defaults import complete
from engine.errors import InputError
from engine.json_text import to_json
from engine.table import text_table
from tools.analysis import data_source
from tools.pages.page import write_page
from tools.step_costs.costs import WAYS, Step, memory, traffic
from tools.step_costs.measure import Measured, cases, measure
from tools.step_costs.step import build_step
from tools.step_costs.tables import agreement, arithmetic, measured_table, memory_table, page, traffic_table

DEFAULT = CONFIGS / "deit3_h_400e.yaml"
OF_A_MODEL = CONFIGS / "_base_" / "imagenet.yaml"  # what --model is trained with
GPUS = 64


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--config", metavar="FILE", default=DEFAULT, help="default configs/deit3_h_400e.yaml")
    what.add_argument("--model", metavar="NAME", help="any timm model, with one sub-model and AdamW")
    what.add_argument("--measure", action="store_true", help="count the collectives of small models in two processes")
    what.add_argument("--page", metavar="FILE", type=as_path, help="write the default's tables and the measured ones")
    parser.add_argument("--processes", type=int, default=GPUS, metavar="N", help=f"GPUs (default {GPUS})")
    parser.add_argument("--json", action="store_true", help="plain numbers instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    return parser.parse_intermixed_args()


def configured(arguments: argparse.Namespace) -> Config:
    """The configuration, complete but for its data."""
    if arguments.processes < 2:
        raise InputError(f"--processes = {arguments.processes}, allowed is 2 or more")
    chosen = [f"model.name={arguments.model}"] if arguments.model else []
    return complete(load_config(OF_A_MODEL if arguments.model else arguments.config, [*chosen, *arguments.overrides]))


def summary(config: Config, step: Step) -> str:
    """What the tables are for."""
    count = sum(parameter.numel() for parameter in step.model.parameters())
    autocast = "float32" if config.train.amp == "off" else f"{config.train.amp} autocast, weights and gradients float32"
    return text_table([
        ("model", f"{config.model.name}, {count / 1e6:.2f} M parameters"),
        ("processes", f"{step.processes}"),
        ("branches", f"main model and {step.branches - 1} sub-model{'s' if step.branches != 2 else ''}"),
        ("micro-batches", f"{step.accumulation}"),
        ("optimiser", f"{config.optimizer.name}{', average of the weights' if step.averages else ''}"),
        ("precision", autocast),
    ])  # fmt: skip


def as_numbers(step: Step) -> dict[str, dict]:
    """Both tables in bytes."""
    return {
        way.title: {
            **asdict(traffic(way, step)),
            "sent": traffic(way, step).sent(step.processes),
            "memory": asdict(memory(way, step)),
        }
        for way in WAYS
    }


def print_step(config: Config, step: Step, as_json: bool) -> None:
    """The tables of a configuration."""
    if as_json:
        print(to_json(as_numbers(step), indent=2))
        return
    print(f"{summary(config, step)}\n\n{traffic_table(step)}\n\n{arithmetic(step)}\n")
    print(f"Kept by each GPU, activations not counted\n\n{memory_table(step)}")


def print_measured(measured: Sequence[Measured], as_json: bool) -> None:
    """What two processes did."""
    if as_json:
        print(to_json([asdict(item) for item in measured], indent=2))
    else:
        print(f"{measured_table(measured)}\n\n{agreement(measured)}")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; 1 if measured and computed differ."""
    is_changed = bool(arguments.overrides) or arguments.processes != GPUS
    if arguments.measure:
        if is_changed:
            raise InputError("--measure: trains models of its own in two processes; nothing of them can be changed")
        measured = measure(cases())
        print_measured(measured, arguments.json)
        return _disagree(measured)
    if arguments.page and (is_changed or arguments.json):
        raise InputError("--page: its text is about the default on its number of GPUs; nothing of that can be changed")
    config = configured(arguments)
    step = build_step(config, data_source(config), arguments.processes)
    if arguments.page is None:
        print_step(config, step, arguments.json)
        return 0
    measured = measure(cases())
    write_page(arguments.page, page(step, measured))
    return _disagree(measured)


def _disagree(measured: Sequence[Measured]) -> int:
    return int(any(item.seen != item.computed for item in measured))


def main() -> int:
    """Exit code 0, or 2 with one line for an error that the user can mend; 1 if measured and computed differ."""
    return exit_code(partial(run, parse_arguments()))


if __name__ == "__main__":
    sys.exit(main())
