"""Finished runs, which of them belong together, and what a way of training gains over the baseline, as tables."""

from __future__ import annotations

import csv
import glob
import json
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from engine.config import Config
from engine.config_file import leaves, load_config
from engine.errors import InputError, input_errors
from engine.run_folder import RunFolder
from engine.text import expanded, markdown_table, with_nan
from engine.typed_yaml import Dumper
from engine.writers import Record, read_lines

CONFIDENCE = 0.95  # texts say 95 %
CORRUPTED = "corrupted_top1"
METRICS = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "ema_top1": "top-1 accuracy of the EMA",
    "ema_top5": "top-5 accuracy of the EMA",
    "balanced_accuracy": "mean accuracy of the classes",
    CORRUPTED: "top-1 accuracy under corruptions",
    "map": "mean average precision",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
}  # on held-out images, in percent
CAPTION = (
    "Mean ± standard error over seeds, of the last evaluation and of the main model's training loss at the end: "
    "of the runs' last checkpoints, not of their best ones. "
    "Differences are paired by seed, in points, with their interval of 95 % (Student's t). "
    "Seconds depend on the machine and on what runs beside."
)
BESIDE = {  # further columns, with decimals, where all runs have them
    "top5": ("top-5, %", 2),
    "main_loss": ("training loss", 4),
    "seconds": ("seconds", 1),
}
ROBUSTNESS = {  # what eval_net.py finds of last checkpoints
    CORRUPTED: "top-1 under corruptions, %",
    "ece": "calibration error, %",
    "corrupted_ece": "calibration error under corruptions, %",
}
BY_CORRUPTION = "corrupted/"  # prefix of the accuracy under one of them
AS_MUCH = 0.05  # by so much the computation of two ways may differ that are called equal in it
EVALUATED = {"": "last", "corrupted_": "last_variant=corrupted"}  # folders of eval_net.py, by prefix of its figures
OWN_KEYS = ("seed", "output_dir")  # what the runs of one way may differ in


@dataclass(frozen=True)
class Run:
    """A run that reached its end: `summary` is what summary.json holds, `records` are the lines of metrics.jsonl.

    Of a study's results it is also known where it was trained, and on how many images.
    """

    path: Path
    config: Config
    summary: Record
    records: list[Record]
    machine: str = ""
    training_images: int = 0


@dataclass
class Way:
    """Runs of one way of training.

    Attributes:
        runs: by seed, lowest first.
        baseline: what this way is compared with; None if it is a baseline itself.
        flops: multiply-adds of all forwards of one run; 0 if nobody counted them.
    """

    name: str
    runs: dict[int, Run]
    baseline: Way | None = None
    flops: float = 0.0

    @property
    def first(self) -> Run:
        """Any run, where all are alike."""
        return next(iter(self.runs.values()))

    def values(self, name: str) -> list[float]:
        """One value of the summaries per seed."""
        return [run.summary[name] for run in self.runs.values()]

    def differences(self, metric: str) -> dict[int, float]:
        """This way minus its baseline, for each seed that both have."""
        before = self.baseline.runs
        return {
            seed: run.summary[metric] - before[seed].summary[metric]
            for seed, run in self.runs.items()
            if seed in before
        }


def interval(values: Collection[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Mean, and half the width of Student's t interval around it: NaN for a single value, which has none."""
    from scipy import stats  # here: a command's --help does not need it

    half = math.nan
    if len(values) > 1:
        half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem([*values]))
    return statistics.fmean(values), half


def finished_run(path: str | Path) -> Run | None:
    """The run in a folder; None if there is none, or not at its end: one that was continued outgrows its summary."""
    folder = RunFolder(path)
    if not folder.summary.exists():
        return None
    with input_errors(str(folder.summary)):
        summary, records = with_nan(json.loads(folder.summary.read_text())), read_lines(folder.metrics)
    if not records or records[-1]["iteration"] != summary["iterations"]:
        return None
    return Run(folder.path, load_config(folder.config), {**evaluated(folder.path, summary), **summary}, records)


def evaluated(run: Path, summary: Record) -> Record:
    """What eval_net.py has found of the last checkpoint: `ece`, and under corruptions `corrupted_top1` and the like.

    Accuracies under one corruption are means over its severities.
    """
    found: Record = {}
    for prefix, name in EVALUATED.items():
        folder = run / "evaluation" / name
        for figures in _results(folder, summary):
            with input_errors(str(folder)):
                found |= {prefix + name: figures[name] for name in ("top1", "ece")}
                errors = figures.get("corruption_errors", {})
                found |= {f"{BY_CORRUPTION}{name}": 100 - error for name, error in errors.items()}
    return found


def _results(folder: Path, summary: Record) -> list[Record]:
    """What a folder of eval_net.py says of a run's weights; nothing of a checkpoint that was the last one before."""
    file = folder / "results.json"
    if not file.exists():
        return []
    with input_errors(str(file)):
        content = json.loads(file.read_text())
        return content["results"][:1] if content.get("iteration") == summary["iterations"] else []


def read_ways(arguments: Sequence[str]) -> list[Way]:
    """Ways of training, in the order in which they are first mentioned; the first one is the baseline.

    Args:
        arguments: folders, and `name=folder,folder` for runs that make one way whatever their configurations;
            a folder may have wildcards.

    Raises:
        InputError: a folder without a finished run, a seed that comes twice in one way.
    """
    groups: dict[str, list[Run]] = {}  # by the name that the user gave, or else by the configuration
    named = set()
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        is_named = equals and not Path(argument).exists()
        named |= {name} if is_named else set()
        for pattern in map(expanded, folders.split(",") if is_named else [argument]):
            for path in sorted(glob.glob(pattern)) or [pattern]:
                run = finished_run(path)
                if run is None and not Path(path).exists():
                    raise InputError(f"{path}: no such folder")
                if run is None:
                    raise InputError(f"{path}: holds no finished run; one that was stopped goes on with --resume")
                key = name if is_named else yaml.dump(recipe(run.config), Dumper=Dumper)
                groups.setdefault(key, []).append(run)
    found = iter(_find_names([runs for key, runs in groups.items() if key not in named]))
    return make_ways([(key if key in named else next(found), runs) for key, runs in groups.items()])


def make_ways(groups: Iterable[tuple[str, Sequence[Run]]]) -> list[Way]:
    """Ways of these names and runs, compared with the first one."""
    ways: list[Way] = []
    for name, runs in groups:
        by_seed = {run.config.seed: run for run in sorted(runs, key=lambda run: run.config.seed)}
        for run in runs:
            if run is not (other := by_seed[run.config.seed]):
                raise InputError(f"{name}: two runs of seed {run.config.seed}, {run.path} and {other.path}")
        ways.append(Way(name, by_seed, ways[0] if ways else None))
    return ways


def _find_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """Those of the first folders without their seeds, or whole paths where these do not tell the groups apart."""
    paths = [runs[0].path for runs in groups]
    names = [
        re.sub(rf"(^|[_-])(seed[_-]?)?{runs[0].config.seed}$", "", path.resolve().name) or str(path)
        for path, runs in zip(paths, groups, strict=True)
    ]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def override_text(key: str, value: object) -> str:
    """`key=value` as the command line takes it."""
    flow = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=float("inf"), sort_keys=False)
    return f"{key}={flow.strip().removesuffix('...').strip()}"  # YAML ends a bare value with a line of dots


def recipe(config: Config) -> dict[str, object]:
    """A configuration but for what the runs of one way may differ in."""
    return {key: value for key, value in leaves(config).items() if key not in OWN_KEYS}


def differing_keys(configs: Sequence[Config]) -> dict[str, list[object]]:
    """Keys in which recipes differ, with the value of each."""
    recipes = [recipe(config) for config in configs]
    values = {key: [content[key] for content in recipes] for key in recipes[0]}
    return {key: of_all for key, of_all in values.items() if any(value != of_all[0] for value in of_all)}


def held_out_checksum(run: Run) -> str | None:
    """Of the names and labels of the images on which a run was evaluated; None of runs before they were told."""
    return run.summary.get("fingerprints", {}).get("held-out", {}).get("sha256")


def check_comparable(ways: Sequence[Way], metric: str) -> None:
    """Raise InputError if there is nothing to compare, or if runs did not measure it on the same images."""
    if len(ways) < 2:
        raise InputError("nothing to compare: name the folders of runs, trained in at least two ways")
    expected: dict[str, tuple[object, Path]] = {}
    for run in (run for way in ways for run in way.runs.values()):
        if metric not in run.summary:
            raise InputError(f"{run.path}: has no {metric}; its summary.json has {', '.join(run.summary)}")
        data, checksum = run.config.data, held_out_checksum(run)
        of_run = {"dataset": data.dataset, "split": data.eval_split, "images": run.summary["images"]}
        if checksum is not None:
            of_run["names and labels, SHA-256,"] = checksum
        for what, value in of_run.items():
            other, path = expected.setdefault(what, (value, run.path))
            if value != other:
                raise InputError(
                    f"{run.path}: evaluated on the {what} {value}, {path} on {other}: "
                    "accuracies on different images cannot be compared"
                )


def summary_table(ways: Sequence[Way], metric: str) -> str:
    """A row per way: mean ± standard error over seeds, and the paired difference to the baseline with its interval."""
    runs = [run for way in ways for run in way.runs.values()]
    beside = {
        name: column for name, column in BESIDE.items() if name != metric and all(name in run.summary for run in runs)
    }
    header = ["training", "seeds", f"{METRICS[metric].replace(' accuracy', '')}, %", "difference"]
    header += [*(title for title, _ in beside.values()), *(["FLOPs"] if ways[0].flops else [])]
    rows = [
        [
            way.name,
            len(way.runs),
            f"**{_mean(way, metric, 2)}**",
            difference_text(way, metric),
            *(_mean(way, name, decimals) for name, (_, decimals) in beside.items()),
            *([f"{way.flops / (way.baseline or way).flops:.2f}"] if way.flops else []),
        ]
        for way in ways
    ]
    return markdown_table(header, rows)


def _mean(way: Way, name: str, decimals: int) -> str:
    """Over seeds, with its standard error; one seed has none."""
    values = way.values(name)
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.{decimals}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{decimals}f}{error}"


def difference_text(way: Way, metric: str, confidence: float = CONFIDENCE) -> str:
    """`+3.82 [+2.12, +5.52]`, or why there is no interval or nothing to compare with."""
    if way.baseline is None:
        return "baseline"
    by_seed = way.differences(metric)
    if not by_seed:
        return "no seed in common"
    mean, half = interval(by_seed.values(), confidence)
    if len(by_seed) == 1:
        return f"{mean:+.2f} (one seed: no interval)"
    is_partial = len(by_seed) < max(len(way.runs), len(way.baseline.runs))
    common = f" over seeds {', '.join(map(str, by_seed))}" if is_partial else ""
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]{common}"


def robustness_tables(ways: Sequence[Way], metric: str) -> str:
    """Calibration and accuracy under corruptions, with differences to the baseline; "" if nobody has measured them."""
    runs = [run for way in ways for run in way.runs.values()]
    measured = [name for name in runs[0].summary if all(name in run.summary for run in runs)]
    found = {name: title for name, title in ROBUSTNESS.items() if name in measured and name != metric}
    corruptions = [name for name in measured if name.startswith(BY_CORRUPTION)]
    rows = [
        [way.name, *(cell for name in found for cell in (_mean(way, name, 2), difference_text(way, name)))]
        for way in ways
    ]
    header = ["training", *(cell for title in found.values() for cell in (title, "difference"))]
    tables = [markdown_table(header, rows)] if found else []
    if corruptions:
        names = [name.removeprefix(BY_CORRUPTION).replace("_", " ") for name in corruptions]
        means = [[way.name, *(_mean(way, name, 2) for name in corruptions)] for way in ways]
        tables.append(markdown_table(["top-1 under, %", *names], means))
    return "\n\n".join(tables)


def images_table(ways: Sequence[Way]) -> str:
    """Runs by the images that eval_net.py has shown their last checkpoints; "" without such.

    The accuracy of each with the interval that a bootstrap over images gives, and McNemar's exact test against the run
    of the baseline with the same seed: whether two models differ on these images, where the intervals over seeds ask
    whether two ways of training do.

    Raises:
        InputError: two runs were evaluated on different images.
    """
    from scipy.stats import binomtest  # here: a command's --help does not need them

    from engine.evaluation.metrics import accuracy_interval

    rows = []
    for way in ways:
        for seed, run in way.runs.items():
            other = way.baseline.runs.get(seed) if way.baseline else None
            own, others = predictions(run), {} if other is None else predictions(other)
            if not own:
                continue
            low, high = accuracy_interval(sum(own.values()), len(own))
            accuracy = f"{100 * statistics.fmean(own.values()):.2f} [{low:.2f}, {high:.2f}]"
            rows.append([way.name, seed, accuracy])
            if not others:
                continue
            if own.keys() != others.keys():
                raise InputError(f"{run.path}: its predictions are of other images than those of {other.path}")
            changes = [own[image] - others[image] for image in own]
            gained, lost = changes.count(1), changes.count(-1)
            p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
            rows[-1] += [gained, lost, f"{p:.2g}"]
    header = ["training", "seed", "top-1, % [over images]", "right here alone", "in the baseline alone", "McNemar's p"]
    return markdown_table(header, [row + [""] * (len(header) - len(row)) for row in rows]) if rows else ""


def predictions(run: Run) -> dict[tuple[str, str], bool]:
    """By image and true class whether eval_net.py has found the last checkpoint right; nothing if it has not."""
    folder = run.path / "evaluation" / EVALUATED[""]
    file = folder / "predictions.csv"
    if not file.exists() or not _results(folder, run.summary):
        return {}
    with file.open(newline="", encoding="utf-8") as opened:
        return {(row["image"], row["true"]): row["true"] == row["predicted"] for row in csv.DictReader(opened)}


def configuration_lines(ways: Sequence[Way]) -> str:
    """What the configuration of each way has of its own."""
    differing = differing_keys([way.first.config for way in ways])
    lines = []
    for index, way in enumerate(ways):
        own = ", ".join(f"`{override_text(key, values[index])}`" for key, values in differing.items())
        mixed = ", ".join(f"`{key}`" for key in differing_keys([run.config for run in way.runs.values()]))
        lines.append(f"- **{way.name}**: {own or 'as the others'}{mixed and f'; its runs differ in {mixed}'}")
    return "\n".join(lines)


def conclusions(ways: Sequence[Way], metric: str) -> str:
    """Verdicts that hold for all differences together."""
    tried = [way for way in ways if way.baseline]
    confidence = 1 - (1 - CONFIDENCE) / len(tried)  # Bonferroni
    verdicts = {"better than the baseline": "", "worse than the baseline": "", "undecided": ""}
    for way in tried:
        mean, half = interval(way.differences(metric).values(), confidence)
        verdict = "better than the baseline" if mean > half else "worse than the baseline"
        verdicts[verdict if abs(mean) > half else "undecided"] += (
            f"\n  - {way.name}: {difference_text(way, metric, confidence)}"
        )
    text = f"There is one comparison, which its interval of {100 * confidence:.4g} % decides."
    if len(tried) > 1:
        text = (
            f"Each of the {len(tried)} intervals above is of 95 %: a few would miss zero by chance "
            f"although nothing differs. Intervals of {100 * confidence:.4g} % (Bonferroni) hold all together with "
            "95 %; by those the ways are"
        )
    return f"{text}\n\n" + "\n".join(f"- **{verdict}**:{names or ' none'}" for verdict, names in verdicts.items())


def contrasts(ways: Sequence[Way], pairs: Mapping[str, str], metric: str) -> str:
    """Ways against others than their baseline, as a paragraph with a list; empty if there are none.

    Args:
        pairs: names of ways, and of those that they are compared with.
    """
    meant = [
        (way, other)
        for way in ways
        for other in ways
        if other.name == pairs.get(way.name) and (way.baseline or way) is (other.baseline or other)
    ]
    return _against("Against each other", meant, metric)


def equal_computation(ways: Sequence[Way], metric: str) -> str:
    """Longer baselines against the ways that compute as much, as a paragraph with a list; empty if there are none.

    A longer baseline is one that is named so: "baseline, 60 epochs".
    """
    longer_ones = [way for way in ways if way.baseline and way.name.startswith(way.baseline.name)]
    as_much = [
        (way, longer)
        for longer in longer_ones
        for way in ways
        if way.baseline is longer.baseline and way is not longer and abs(way.flops / longer.flops - 1) < AS_MUCH
    ]
    return _against("For as much computation", as_much, metric)


def _against(title: str, pairs: Iterable[tuple[Way, Way]], metric: str) -> str:
    """Each way against the other one of its pair, where they have common seeds; under corruptions too if evaluated."""
    lines = []
    for way, other in pairs:
        compared = replace(way, baseline=other)
        if not compared.differences(metric):
            continue
        line = f"- {way.name}, against {other.name}: {difference_text(compared, metric)}"
        if all(CORRUPTED in run.summary for one in (way, other) for run in one.runs.values()):
            line += f"; under corruptions {difference_text(compared, CORRUPTED)}"
        lines.append(line)
    return "\n".join([f"\n\n{title}, with intervals of 95 %:\n", *lines]) if lines else ""
