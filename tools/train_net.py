"""Train a timm model with sub-model augmentation, as a configuration says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from engine.command_line import (
    exit_code,
    launched_processes,
    leave,
    log_to_terminal,
    parse_with_overrides,
    tool_parser,
)
from engine.config_file import load_config, to_yaml
from engine.errors import InputError
from engine.run_folder import RunFolder
from engine.text import expanded, to_json

IN_OUTPUT_DIR = "auto"  # value of --resume: the run in output_dir

EXAMPLES = """\
examples:
  python tools/train_net.py --config digits_vit
  python tools/train_net.py --config digits_vit "augsub.sub_models=[]" \\
      output_dir=runs/baseline
  python tools/train_net.py --config swin_b data.root=/data/imagenet --dry-run
  torchrun --nproc_per_node=8 tools/train_net.py --config swin_b \\
      data.root=/data/imagenet --resume
  python tools/train_net.py --resume runs/digits_vit \\
      train.extend=true train.epochs=90

keys:
  engine/config.py explains every key; --print-config shows the values.
  docs/recipes.md lists the recipes in configs/ with their launch commands.

exit codes:
  0    finished
  2    an error, said in one line; --traceback shows where it came from
  75   stopped by SIGTERM or SIGUSR1 with everything saved; --resume goes on
  130  interrupted by Ctrl-C; --resume goes on from the last checkpoint
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; None: of this process."""
    parser = tool_parser(__doc__, EXAMPLES)
    run = parser.add_argument_group("the run")
    run.add_argument("--config", metavar="NAME", help="a file in configs/ (swin_b), or any YAML file")
    run.add_argument(
        "--resume",
        nargs="?",
        const=IN_OUTPUT_DIR,
        metavar="RUN",
        help="continue the run in output_dir from its newest intact checkpoint, and start it if there is none; "
        "or that in the folder RUN, whose own configuration is taken",
    )
    instead = parser.add_argument_group("instead of training")
    action = instead.add_mutually_exclusive_group()
    action.add_argument("--eval-only", action="store_true", help="evaluate evaluation.checkpoint or the run's last one")
    action.add_argument(
        "--dry-run", action="store_true", help="check everything and show the plan: costs, length, memory, schedule"
    )
    action.add_argument("--print-config", action="store_true", help="print the complete configuration")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    return parse_with_overrides(parser, arguments, "change the configuration: train.epochs=10")


def _meant(arguments: argparse.Namespace) -> tuple[Path | str, list[str]]:
    """The file of the configuration, and the overrides."""
    if arguments.config is not None:
        if arguments.resume not in (None, IN_OUTPUT_DIR):
            raise InputError(
                f"--resume {arguments.resume}: has its own configuration, --config goes with --resume alone"
            )
        return arguments.config, arguments.overrides
    if arguments.resume in (None, IN_OUTPUT_DIR):
        raise InputError(
            "--config NAME is missing: a file in configs/, or any YAML file; or --resume RUN, a run's folder"
        )
    if elsewhere := [key for key in arguments.overrides if key.startswith("output_dir=")]:
        raise InputError(f"--resume {arguments.resume} {elsewhere[0]}: a run goes on in its own folder; copy it first")
    folder = RunFolder(expanded(arguments.resume))
    if not folder.config.exists():
        raise InputError(f"--resume {arguments.resume}: is not the folder of a run, it has no {folder.config.name}")
    return folder.config, [f"output_dir={to_json(str(folder.path))}", *arguments.overrides]


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    config = load_config(*_meant(arguments))
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    # here: these bring torch and timm, for which a typo need not wait
    from engine.data.loaders import worker_deaths
    from engine.defaults import train
    from engine.distributed import process_group
    from engine.evaluation.run import evaluate_only
    from tools.dry_run import dry_run

    with process_group(config.distributed.timeout_minutes) as process, worker_deaths(config.data.workers):
        if process.is_main:
            log_to_terminal()
        if arguments.eval_only:
            results = evaluate_only(config, process)
            if process.is_main:
                print(to_json(results, indent=2))
        elif arguments.dry_run:
            dry_run(config, process, resume=arguments.resume is not None)
        else:
            train(config, process, resume=arguments.resume is not None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0; 2 with one line after an error; 75 after a preemption, 130 after Ctrl-C, both to be resumed."""
    parsed = parse_arguments(arguments)
    after_interrupt = "--resume continues from the last checkpoint"
    return exit_code(partial(run, parsed), parsed.traceback, after_interrupt)


if __name__ == "__main__":
    leave(main(), launched_processes())
