"""All that wants a GPU in one command of at most nine minutes: checks first, then the benchmark, then studies.

    python tools/gpu.py                                   # results in runs/gpu, each as soon as it exists
    python tools/gpu.py --only compiled_512               # what the nine minutes had no room for
    python tools/gpu.py --only study_vit study_resnet     # make study-gpu: on with the studies of CIFAR-10
    python tools/gpu.py --device cpu                      # the same scripts without a GPU, with tiny models
    python tools/gpu.py --show docs/performance           # what GPUs have shown so far, as Markdown

Nothing is installed: whatever `import` finds will do, wheels unpacked into a folder on PYTHONPATH too.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from engine import atomic
from engine.command_line import as_path, exit_code, tool_parser
from engine.errors import InputError, RunError
from engine.text import markdown_table, text_table, to_json

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / "tests" / "gpu"
WHOLE = {"cuda": 530, "cpu": 3600}  # seconds: nine minutes with the start of this tool; a busy CPU may take longer
RESULTS = "results.json"
IN_SUMMARY = (
    "our trainer",
    "masking 0.5",
    "masking 0.5, paths skipped",
    "our loader",
    "our run",
)  # of the benchmark's lines
BENCHMARK = "tools/benchmark.py --device {device} --json {folder}/{name}.json train.amp=bf16 train.channels_last=true"
MODELS = "vit_base_patch16_224:224:{batch} swin_tiny_patch4_window7_224:224:{batch} resnet50:224:{batch}"
CHOSEN = "'our trainer' 'masking 0.5' 'masking 0.5, windows left out' 'random_crop 0.5'"


@dataclass(frozen=True)
class Part:
    """A command of Python's, under a time limit.

    Attributes:
        seconds: at most; fewer where the whole has fewer left.
        command: with {device}, {folder} and {name} to fill in.
    """

    name: str
    seconds: int
    command: str


@dataclass
class Outcome:
    """What became of a part, as the results file has it.

    Attributes:
        ended: done, failed, cut off, or left out.
        found: in one line.
    """

    name: str
    ended: str
    seconds: float
    found: str
    command: str


def benchmark(name: str, seconds: int, batch: int, options: str) -> Part:
    """The three models at a batch size; a model is done, and on the disk, before the next one begins."""
    return Part(name, seconds, f"{BENCHMARK} {options} --models {MODELS.replace('{batch}', str(batch))}")


COMPILED = "--only 'our trainer' 'masking 0.5' train.compile="
HUGE = "deit3_huge_patch14_224:160:{batch} model.drop_path_rate=0.5 model.drop_path_shape=uniform"  # as its recipe
SKIPPING = "--parts steps memory --rounds 3 --only 'timm task' 'masking 0.5' 'masking 0.5, paths skipped'"
STUDIES = {f"study_{model}": f"configs/studies/cifar10_{model}.yaml" for model in ("vit", "resnet", "swin")}
STUDYING = "tools/compare_runs.py --jobs 6 --minutes 2.4 --study {study} data.dataset=folder train.amp=bf16"


CHECKING = "-m pytest -q -m gpu tests/gpu --device {device} --junitxml={folder}/checks.xml"
PARTS = {  # by device, what says most first
    "cuda": (
        Part("checks", 210, CHECKING),
        benchmark("eager_128", 110, 128, f"--parts steps --rounds 5 --only 'bare loop' 'timm task' {CHOSEN}"),
        benchmark("captured_128", 150, 128, f"--parts steps --rounds 5 {COMPILED}reduce-overhead"),
        Part("skipping", 60, f"{BENCHMARK} {SKIPPING} --models {HUGE.replace('{batch}', '128')}"),
        Part("runs", 60, f"{BENCHMARK} --parts runs --rounds 3 --workers 16 --models resnet50:224:128"),
        benchmark("memory_128", 60, 128, "--parts memory"),
        Part("loading", 45, f"{BENCHMARK} --parts data --rounds 5 --workers 16"),
        benchmark("eager_512", 110, 512, f"--parts steps --rounds 2 --only {CHOSEN}"),
        benchmark("compiled_512", 150, 512, f"--parts steps --rounds 2 {COMPILED}true"),
        *(
            Part(name, 165, STUDYING.replace("{study}", study)) for name, study in STUDIES.items()
        ),  # each goes on next time
    ),
    "cpu": (
        Part("checks", 1200, CHECKING),
        Part("steps", 1200, f"{BENCHMARK} --parts steps memory --rounds 1 --models test_vit:160:2 --only {CHOSEN}"),
        Part("skipping", 1200, f"{BENCHMARK} {SKIPPING} --models test_vit:160:4 model.drop_path_rate=0.5"),
        Part(
            "captured", 1200, f"{BENCHMARK} --parts steps --rounds 1 --models test_vit:160:2 {COMPILED}reduce-overhead"
        ),
        Part("runs", 1200, f"{BENCHMARK} --parts runs --rounds 1 --workers 2 --models test_vit:160:16"),
        Part("loading", 1200, f"{BENCHMARK} --parts data --quick --rounds 1 --workers 2"),
    ),
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument("--device", choices=PARTS, default="cuda", help="default cuda")
    parser.add_argument("--output", type=as_path, default=Path("runs/gpu"), help="folder of the results")
    parser.add_argument("--only", nargs="+", metavar="PART", help="some of the parts")
    parser.add_argument("--show", type=as_path, metavar="FOLDER", help="print what results in it say instead")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """All parts, one after the other, and a summary; or what was shown.

    Raises:
        InputError: no such device, or no such part.
        RunError: a part failed or was cut off; all others were run.
    """
    if arguments.show is not None:
        if not arguments.show.is_dir():
            raise InputError(f"--show {arguments.show}: no such folder")
        print(shown_table(arguments.show))
        return
    device, folder = arguments.device, arguments.output.absolute()
    parts = {part.name: part for part in PARTS[device]}
    if unknown := [name for name in arguments.only or () if name not in parts]:
        raise InputError(f"--only {unknown[0]}: allowed are {', '.join(parts)}")
    import timm  # here: --help needs none
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no such device; --device cpu runs the same scripts without one")
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        **{"torch": torch.__version__, "timm": timm.__version__, "date": time.strftime("%Y-%m-%d")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + WHOLE[device], []
    for name in arguments.only or parts:
        outcomes.append(run_part(parts[name], device, folder, end - time.monotonic()))
        print(f"{name}: {outcomes[-1].ended}", flush=True)
        results = {**machine, "parts": [asdict(outcome) for outcome in outcomes], "checks": checks_of(folder)}
        atomic.write_text(folder / RESULTS, to_json(results, indent=1))
    rows = [(outcome.name, f"{outcome.ended}, {outcome.seconds:.0f} s: {outcome.found}") for outcome in outcomes]
    print(f"\n{', '.join(f'{key} {value}' for key, value in machine.items())}\n{text_table(rows)}")
    if undone := [outcome.name for outcome in outcomes if outcome.ended != "done"]:
        raise RunError(f"not done: {', '.join(undone)}; what they printed is in {folder}")


def run_part(part: Part, device: str, folder: Path, seconds_left: float) -> Outcome:
    """Run a part, what it prints into a file."""
    command = part.command.format(device=device, folder=shlex.quote(str(folder)), name=part.name)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    start, limit = time.monotonic(), min(part.seconds, seconds_left)
    printed = folder / f"{part.name}.txt"
    if limit <= 0:
        return Outcome(part.name, "left out", 0, "no time was left", command)
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
            os.killpg(process.pid, 9)
            process.wait()
            ended = f"cut off after {limit:.0f} s"
    return Outcome(part.name, ended, time.monotonic() - start, found_by(part, folder, printed), command)


def found_by(part: Part, folder: Path, printed: Path) -> str:
    """In one line: a benchmark's most telling ratios, else what was printed last."""
    file = folder / f"{part.name}.json"
    if file.exists():
        lines = [line for line in json.loads(file.read_text())["lines"] if line["name"] in IN_SUMMARY and line["ratio"]]
        return ", ".join(
            f"{line['case'].partition(',')[0].partition('_')[0]} {line['name']} {line['ratio']:.3f}" for line in lines
        )
    return (printed.read_text().strip().splitlines() or ["nothing printed"])[-1]


def checks_of(folder: Path) -> dict[str, dict[str, int]]:
    """How many cases of each test passed and failed."""
    file = folder / "checks.xml"
    counts: dict[str, dict[str, int]] = {}
    for case in ElementTree.parse(file).iter("testcase") if file.exists() else ():
        of_test = counts.setdefault(case.get("name", "").partition("[")[0], {"passed": 0, "failed": 0})
        of_test["failed" if len(case) else "passed"] += 1
    return counts


def shown_table(folder: Path) -> str:
    """A row for every check and every case of the benchmark: which GPUs have shown it, by the results in a folder."""
    shown: dict[str, list[str]] = {}
    for file in sorted(CHECKS.glob("test_*.py")):
        tests = [node.name for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]
        shown |= {test: [] for test in tests if test.startswith("test_")}
    cases: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.json")):
        content: dict[str, Any] = json.loads(file.read_text())
        if file.name == RESULTS:
            for test, counts in content["checks"].items():
                passed = f"{counts['passed']} of {sum(counts.values())}"
                shown.setdefault(test, []).append(f"{passed} on {content['device']}, {content['date']}")
        elif "--device cuda" in content["command"]:
            for line in content["lines"]:
                device = content["machine"]["device"]
                found = cases.setdefault(f"{line['part']}: {line['case']}", [])
                found += [device] if device not in found else []
    rows = [[test.removeprefix("test_").replace("_", " "), "; ".join(found)] for test, found in shown.items()]
    rows += [[case, "; ".join(devices)] for case, devices in cases.items()]
    return markdown_table(["", "shown by"], [[what, found or "no GPU yet"] for what, found in rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line for an error."""
    return exit_code(partial(run, parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
