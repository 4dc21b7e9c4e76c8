"""Compare finished runs over seeds, or make a whole study: train all its runs, then write its report.

    python tools/compare_runs.py runs/baseline_seed* runs/masking_seed* --picture curves.png
    python tools/compare_runs.py baseline=runs/a,runs/b masking='runs/mask_*' --metric ema_top1
    python tools/compare_runs.py --study configs/studies/digits.yaml
    python tools/compare_runs.py --study configs/studies/cifar10_vit_small.yaml --minutes 60 data.dataset=folder

Runs whose configurations differ in nothing but the seed make one way of training; the first way is the baseline.
A study keeps a line for each finished run beside its page: it repeats none of them, and goes on when it is interrupted.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence

from engine.command_line import AtLeast, as_path, main_of, tool_parser
from engine.errors import InputError
from tools.comparison.runs import (
    CAPTION,
    METRICS,
    check_comparable,
    configuration_lines,
    images_table,
    read_ways,
    robustness_tables,
    summary_table,
)

DEFAULT_JOBS = 2


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = tool_parser(__doc__)
    parser.add_argument(
        "runs",
        nargs="*",
        metavar="FOLDER",
        help="run folders, or NAME=FOLDER,FOLDER for one way; with --study key=value for all of its runs",
    )
    parser.add_argument("--metric", choices=METRICS, help="what to compare (default top1, of several labels map)")
    parser.add_argument("--picture", metavar="FILE", type=as_path, help="draw losses and accuracies over epochs")
    parser.add_argument("--report", metavar="FILE", type=as_path, help="write tables and curves as one HTML file")
    parser.add_argument("--study", metavar="FILE", type=as_path, help="train and report what this file says")
    parser.add_argument("--minutes", type=float, metavar="M", help="of a study; what still runs then goes on next time")
    parser.add_argument(
        "--jobs",
        type=int,
        action=AtLeast,
        const=1,
        metavar="N",
        help=f"runs of a study at a time (default {DEFAULT_JOBS})",
    )
    return parser.parse_intermixed_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Print a table of runs that exist, and draw their curves; or train and report a study."""
    if arguments.study is None:
        if (arguments.jobs, arguments.minutes) != (None, None):
            raise InputError("--jobs, --minutes: belong to --study")
        ways = read_ways(arguments.runs)
        measured = ways[0].first.summary if ways else ()
        metric = arguments.metric or ("map" if "map" in measured else "top1")
        check_comparable(ways, metric)
        tables = [summary_table(ways, metric), CAPTION, robustness_tables(ways, metric), images_table(ways)]
        parts = [*tables, configuration_lines(ways)]
        text = "\n\n".join(filter(None, parts))
        print(text)
        if arguments.picture or arguments.report:
            from engine.figure import save
            from engine.html_report import write_report
            from tools.comparison.pictures import DPI, draw_curves

            curves = draw_curves(ways, metric)
            if arguments.picture:
                save(curves, arguments.picture, DPI)
            if arguments.report:
                text = f"# {' and '.join(way.name for way in ways)}\n\n{text}\n\n![Losses and accuracies](curves)"
                write_report(arguments.report, text, {"curves": curves})
        return
    from tools.comparison.study import run_study  # here: it brings torch

    if arguments.picture or arguments.report or arguments.metric:
        raise InputError("--picture, --report, --metric: not with --study, whose file says what is trained and written")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise InputError(f"--minutes = {arguments.minutes}: allowed is above 0")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)  # as Ctrl-C: the runs save their state first
    seconds = math.inf if arguments.minutes is None else 60 * arguments.minutes
    written, left = run_study(arguments.study, arguments.jobs or DEFAULT_JOBS, arguments.runs, seconds)
    print(*written, *([f"{len(left)} runs are left: the same command goes on"] if left else []), sep="\n")


main = main_of(parse_arguments, run, "the same command goes on")


if __name__ == "__main__":
    sys.exit(main())
