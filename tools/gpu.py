"""All that wants a GPU in one command of at most nine minutes: checks first, then the benchmark, then studies.

    python tools/gpu.py                                   # results in runs/gpu, each as soon as it exists
    python tools/gpu.py --only compiled_512               # what the nine minutes had no room for
    python tools/gpu.py --only study_vit study_resnet     # make study-gpu: on with the studies of CIFAR-10
    python tools/gpu.py --device cpu                      # the same scripts without a GPU, with tiny models

Nothing is installed: whatever `import` finds will do, wheels unpacked into a folder on PYTHONPATH too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import atomic
from engine.command_line import as_path, main_of, tool_parser
from engine.errors import InputError, RunError, input_errors
from engine.text import text_table, to_json

ROOT = Path(__file__).parents[1]
WHOLE = {"cuda": 530, "cpu": 3600}  # seconds: nine minutes with the start of this tool; a busy CPU may take longer
RESULTS = "results.json"
CHECKS = "-m pytest -q -m gpu tests/gpu --device {device} --junitxml={folder}/checks.xml"
BENCHMARK = "tools/benchmark.py --device {device} --json {folder}/{name}.json train.amp=bf16 train.channels_last=true"
STEPS = f"{BENCHMARK} --parts steps"
CHOSEN = "'our trainer' 'masking 0.5' 'masking 0.5, windows left out' 'random_crop 0.5'"
COMPILED = "--only 'our trainer' 'masking 0.5' train.compile="
SKIPPING = f"{BENCHMARK} --parts steps memory --rounds 3 --only 'timm task' 'masking 0.5' 'masking 0.5, paths skipped'"
HUGE = "deit3_huge_patch14_224:160:128 model.drop_path_rate=0.5 model.drop_path_shape=uniform"  # as its recipe
TINY = "test_vit:160:2"
STUDIED = "data.dataset=folder train.amp=bf16 data.workers=3"  # of each of five runs: transforms keep 16 cores busy
STUDY = f"tools/compare_runs.py --jobs 5 --minutes {{minutes}} --study {{study}} {STUDIED}"
ENDING = 45  # seconds that a study has beside its minutes: to plan, to save what still runs, to write its page


def models(batch: int) -> str:
    """The three models at a batch size; a model is done, and on the disk, before the next one begins."""
    return f"--models vit_base_patch16_224:224:{batch} swin_tiny_patch4_window7_224:224:{batch} resnet50:224:{batch}"


# By device and name, what says most first: seconds, fewer where the whole has fewer left; and a command of Python's,
# with {device}, {folder}, {name} and {minutes} to fill in.
PARTS: dict[str, dict[str, tuple[int, str]]] = {
    "cuda": {
        "checks": (210, f"{CHECKS} -n 8 --dist worksteal"),
        "eager_128": (110, f"{STEPS} --rounds 5 --only 'bare loop' 'timm task' {CHOSEN} {models(128)}"),
        "captured_128": (150, f"{STEPS} --rounds 5 {COMPILED}reduce-overhead {models(128)}"),
        "skipping": (60, f"{SKIPPING} --models {HUGE}"),
        "runs": (60, f"{BENCHMARK} --parts runs --rounds 3 --workers 16 --models resnet50:224:128"),
        "memory_128": (60, f"{BENCHMARK} --parts memory {models(128)}"),
        "loading": (45, f"{BENCHMARK} --parts data --rounds 5 --workers 16"),
        "eager_512": (110, f"{STEPS} --rounds 2 --only {CHOSEN} {models(512)}"),
        "compiled_512": (150, f"{STEPS} --rounds 2 {COMPILED}true {models(512)}"),
        **{  # one after the other, each goes on next time
            f"study_{model}": (525, STUDY.replace("{study}", f"configs/studies/cifar10_{model}.yaml"))
            for model in ("vit", "resnet", "swin")
        },
    },
    "cpu": {
        "checks": (1200, f"{CHECKS} -n 2 --dist worksteal"),
        "steps": (1200, f"{STEPS} memory --rounds 1 --models {TINY} --only {CHOSEN}"),
        "skipping": (1200, f"{SKIPPING} --models test_vit:160:4 model.drop_path_rate=0.5"),
        "captured": (1200, f"{STEPS} --rounds 1 --models {TINY} {COMPILED}reduce-overhead"),
        "runs": (1200, f"{BENCHMARK} --parts runs --rounds 1 --workers 2 --models test_vit:160:16"),
        "loading": (1200, f"{BENCHMARK} --parts data --quick --rounds 1 --workers 2"),
    },
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--device", choices=PARTS, default="cuda", help="default cuda")
    parser.add_argument("--output", type=as_path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """All parts, one after the other, and a summary.

    Raises:
        InputError: no such device, or no such part.
        RunError: a part failed or was cut off; all others were run.
    """
    device, folder, parts = arguments.device, arguments.output.absolute(), PARTS[arguments.device]
    if unknown := [name for name in arguments.only or () if name not in parts]:
        raise InputError(f"--only {unknown[0]}: allowed are {', '.join(parts)}")
    import torch  # here: --help needs none

    from tools.machine import machine

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device; --device cpu runs the same scripts without one")
    about = {**machine(device == "cuda"), "date": time.strftime("%Y-%m-%d")}
    folder.mkdir(parents=True, exist_ok=True)
    earlier = earlier_parts(folder / RESULTS, about["device"])
    end, outcomes = time.monotonic() + WHOLE[device], []
    for name in arguments.only or parts:
        outcomes.append({**run_part(name, device, folder, end - time.monotonic()), "date": about["date"]})
        print(f"{name}: {outcomes[-1]['ended']}", flush=True)
        now = {part["name"] for part in outcomes}
        parts = [part for part in earlier if part["name"] not in now] + outcomes
        atomic.write_text(folder / RESULTS, to_json({**about, "parts": parts}, indent=1))
    rows = [(part["name"], f"{part['ended']}, {part['seconds']:.0f} s: {part['found']}") for part in outcomes]
    print(f"\n{', '.join(f'{key} {value}' for key, value in about.items())}\n{text_table(rows)}")
    if undone := [part["name"] for part in outcomes if part["ended"] != "done"]:
        raise RunError(f"not done: {', '.join(undone)}; what they printed is in {folder}")


def earlier_parts(file: Path, device: str) -> list[dict[str, Any]]:
    """What a results file has of the same device."""
    with input_errors(str(file)):
        content = json.loads(file.read_text()) if file.exists() else {"parts": []}
        return content["parts"] if content.get("device") == device else []


def run_part(name: str, device: str, folder: Path, seconds_left: float) -> dict[str, Any]:
    """Run a part, what it prints into a file; how it ended, and its last line, as the results file has it."""
    seconds, command = PARTS[device][name]
    start, limit = time.monotonic(), min(seconds, seconds_left)
    working = limit - ENDING if "{minutes}" in command else limit
    minutes = f"{working / 60:.1f}"
    command = command.format(device=device, folder=shlex.quote(str(folder)), name=name, minutes=minutes)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    outcome = {"name": name, "ended": "left out", "seconds": 0.0, "found": "no time was left", "command": command}
    if working <= 0:
        return outcome
    printed = folder / f"{name}.txt"
    with open(printed, "w") as output:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,  # its own processes end with it
        )
        try:
            ended = "failed" if process.wait(limit) else "done"
        except subprocess.TimeoutExpired:
            ended = f"cut off after {limit:.0f} s"
        finally:  # after Ctrl-C too
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    found = (printed.read_text().strip().splitlines() or ["nothing printed"])[-1]
    return outcome | {"ended": ended, "seconds": time.monotonic() - start, "found": found}


main = main_of(parse_arguments, run)


if __name__ == "__main__":
    sys.exit(main())
