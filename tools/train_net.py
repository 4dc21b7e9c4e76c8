"""Train a timm model with sub-model augmentation, as a configuration says.

python tools/train_net.py --config configs/digits_vit.yaml
python tools/train_net.py --config configs/digits_vit.yaml augsub.sub_models=[] output_dir=runs/baseline
torchrun --nproc_per_node=8 tools/train_net.py --config configs/swin_b.yaml data.root=imagenet
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from itertools import pairwise

from engine.config_file import load_config, to_yaml
from engine.data import worker_deaths
from engine.defaults import evaluate_only, train
from engine.distributed import launched_rank, process_group
from engine.errors import Preempted, RunError

FAILED = 2
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command with --resume goes on; schedulers can requeue on it
INTERRUPTED = 130  # 128 + SIGINT, as shells count


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file, see configs/")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=["auto"],
        help="continue the run in output_dir from its newest intact checkpoint; start it if there is none",
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate evaluation.checkpoint or the run's last one")
    parser.add_argument("--print-config", action="store_true", help="print the complete configuration and stop")
    parser.add_argument("--traceback", action="store_true", help="show the Python traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.epochs=10")
    words = sys.argv[1:]
    for index, (word, after) in enumerate(pairwise([*words, ""])):
        if word == "--resume" and "=" in after:
            words[index] = "--resume=auto"  # what follows is an override, not its value
    return parser.parse_intermixed_args(words)  # options and overrides in any order


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return
    timeout = config.distributed.timeout_minutes
    with process_group(timeout) as process, worker_deaths(config.data.workers):
        if process.is_main:
            logging.basicConfig(format="%(message)s", stream=sys.stdout)
            logging.getLogger().setLevel(logging.INFO)
        if arguments.eval_only:
            results = evaluate_only(config, process)
            if process.is_main:
                print(json.dumps(results, indent=2))
        else:
            train(config, process, resume=arguments.resume is not None)


def main() -> int:
    """Exit code 0; 2 with one line after an error; 75 after a preemption, 130 after Ctrl-C, both to be resumed."""
    arguments = parse_arguments()
    try:
        run(arguments)
    except Preempted as stop:
        return _end(PREEMPTED, f"{stop}; --resume goes on")
    except KeyboardInterrupt:
        return _end(INTERRUPTED, "interrupted: --resume continues from the last checkpoint")
    except RunError as error:
        if arguments.traceback:
            raise
        return _end(FAILED, f"error: {error}")
    except Exception as error:
        if arguments.traceback:
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        return _end(FAILED, f"error: {type(error).__name__}: {reason} (unforeseen; --traceback shows where)")
    return 0


def _end(code: int, line: str) -> int:
    rank = launched_rank()
    print(f"[rank {rank}] {line}" if rank else line, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
