"""Two hundred spoilt checkpoints: the run goes on from an intact one, or ends in one line, and executes no code."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load
from engine.checkpoint_file import split_tensors

DIGITS = Path(__file__).parents[2] / "configs" / "digits_vit.yaml"
RUN = ("--config", DIGITS, "model.kwargs.depth=1", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=1",
       "evaluation.batch=800", "log.period=1", "checkpoint.period=2", "checkpoint.keep=2")  # fmt: skip
TIMEOUT = 60
REFUSED = re.compile(r"error: [^\n]+\n")
FILES, CONTENTS = 120, 80
EVERY = 8  # of the mutants is evaluated and started from too

Change = Callable[[random.Random, bytes, Path], bytes]


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, sentinel: Path) -> None:
        self._sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._sentinel}",)


def flipped(rng: random.Random, data: bytes, sentinel: Path) -> bytes:
    """One to forty bytes changed."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 3, 40))):
        damaged[rng.randrange(len(damaged))] ^= rng.randint(1, 255)
    return bytes(damaged)


def zeroed(rng: random.Random, data: bytes, sentinel: Path) -> bytes:
    """A range that never reached the disk."""
    start = rng.randrange(len(data))
    length = min(rng.choice((16, 512, 4096, len(data))), len(data) - start)
    return data[:start] + bytes(length) + data[start + length :]


def truncated(rng: random.Random, data: bytes, sentinel: Path) -> bytes:
    """Cut, at the front or at the end; or with something behind."""
    at = rng.randrange(len(data))
    return rng.choice((data[:at], data[:at], data[at:], data[:-1], b"", data + rng.randbytes(50)))


def swapped(rng: random.Random, data: bytes, sentinel: Path) -> bytes:
    """Another file under that name."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("notes.txt", "hello")
    evil = Evil(sentinel)
    others = (
        b"hello\n", b"\n" * 100, archive.getvalue(), pickle.dumps({"iteration": 4}), saved({"iteration": 10**9}),
        pickle.dumps(evil), saved(evil), saved({"iteration": 4, "model": evil}), saved([1, 2]), saved(torch.zeros(3)),
        saved({}), b"PK\x03\x04", b"\x80\x02}q\x00.", rng.randbytes(2000),
    )  # fmt: skip
    return rng.choice(others)


def saved(content: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# Content that somebody else wrote, its checksums intact
WORST = (None, 5, "x", [], {}, float("nan"), True, torch.zeros(2), [torch.zeros(1)], -1, 10**30)


def nonsense(rng: random.Random, state: dict[str, Any]) -> dict[str, Any]:
    """A state with something missing, added, or of another type or shape."""
    kind = rng.choice(("missing", "wrong", "wrong", "wrong", "deep", "deep", "deep", "extra", "shape", "nan", "other"))
    holder = state if kind in ("missing", "wrong", "extra") else rng.choice(holders(state))
    key = rng.choice(list(holder))
    if kind == "other":
        state["model"] = {f"layer{index}": torch.zeros(3) for index in range(4)}
    elif kind == "nan":
        name = rng.choice(list(state["model"]))
        state["model"][name] = torch.full_like(state["model"][name], float("nan"))
    elif kind == "shape":
        name = rng.choice(list(state["model"]))
        state["model"][name] = torch.zeros(7, 3)
    elif kind == "extra":
        holder[rng.choice(("unknown", 5, "model.weight"))] = rng.choice(WORST)
    elif kind == "missing" or rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(WORST)
    return state


def holders(state: Any) -> list[dict]:
    """All dictionaries in a state that hold something."""
    if isinstance(state, list):
        return [holder for value in state for holder in holders(value)]
    if not isinstance(state, dict) or not state:
        return []
    return [state, *(holder for value in state.values() for holder in holders(value))]


def copied(original: Path, folder: Path) -> Path:
    """A run's folder with new files, linked to each other as they were; its checkpoints."""
    copies: dict[int, Path] = {}
    for path in sorted(original.rglob("*")):
        new = folder / path.relative_to(original)
        new.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.stat().st_ino in copies:
            os.link(copies[path.stat().st_ino], new)
        elif path.is_file():
            shutil.copyfile(path, new)
            copies[path.stat().st_ino] = new
    return folder / "checkpoints"


def replace(path: Path, data: bytes, in_place: bool) -> None:
    """New bytes under a name; or in the file itself, whatever other names it has."""
    if not in_place:
        path.unlink()
    path.write_bytes(data)


def weights_and_results(folder: Path) -> tuple[dict, list]:
    """Every tensor that a run ends with, and what it reports."""
    tensors, _ = split_tensors(load(folder / "checkpoints" / "last.pt"))
    summary = json.loads((folder / "summary.json").read_text())
    return tensors, [summary[key] for key in ("top1", "main_loss", "sub_loss", "iterations")]


def complaint(ended) -> str | None:
    """How a process breaks the promise, or None."""
    if "Traceback" in ended.err or "unforeseen" in ended.err or ended.code not in (0, 2):
        return f"exit code {ended.code}: {ended.err[-700:]}"
    if ended.code == 2 and not REFUSED.fullmatch(ended.err):
        return f"not one line: {ended.err[-700:]}"
    return None


def is_same_end(one: Path, other: Path) -> bool:
    """Whether two runs end with the same weights and results, bit by bit."""
    (tensors, results), (other_tensors, other_results) = weights_and_results(one), weights_and_results(other)
    same = tensors.keys() == other_tensors.keys() and results == other_results
    return same and all(torch.equal(tensors[path], other_tensors[path]) for path in tensors)


@pytest.fixture(scope="module")
def finished(server, tmp_path_factory) -> Path:
    """Runs of four iterations, and of six that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    for iterations in (4, 6):
        ended = server.run(*RUN, f"train.max_iters={iterations}", f"output_dir={folder}/{iterations}")
        assert ended.code == 0, ended.err
    return folder


@pytest.fixture
def resumed(server, finished, tmp_path):
    """Resume a copy of the short run whose `last.pt` has other bytes; what went wrong, in words."""
    sentinel = tmp_path / "executed"

    def attempt(number: int, data: bytes, in_place: bool, must_end_equal: bool) -> list[str]:
        folder = tmp_path / str(number)
        checkpoints = copied(finished / "4", folder)
        earlier = {name: (checkpoints / name).read_bytes() for name in ("previous.pt", "iter_2.pt")}
        replace(checkpoints / "last.pt", data, in_place)
        problems = []
        if number % EVERY == 0:
            started = [f"model.checkpoint={checkpoints}/last.pt", "train.max_iters=1", f"output_dir={folder}/new"]
            for more in (["--eval-only", f"output_dir={folder}"], started):
                problems.append(complaint(server.wait(server.start(*RUN, *more), TIMEOUT)))
        ended = server.wait(server.start(*RUN, "train.max_iters=6", "--resume", f"output_dir={folder}"), TIMEOUT)
        problems.append(complaint(ended))
        if must_end_equal and (ended.code or not is_same_end(folder, finished / "6")):
            problems.append(f"exit code {ended.code}, another end: {ended.err}")
        if not ended.code and data != (finished / "4" / "checkpoints" / "last.pt").read_bytes():
            used = re.search(r"resumed \S+/(\S+\.pt)", ended.out)
            if used is None or (used[1] != "last.pt") != ("WARNING: checkpoint" in ended.out):
                problems.append("went on from another checkpoint without naming the damaged one")
        if ended.code and any((checkpoints / name).read_bytes() != before for name, before in earlier.items()):
            problems.append("an earlier checkpoint has changed")
        if sentinel.exists():
            problems.append("code was executed")
        shutil.rmtree(folder)
        return [f"{number}: {problem}" for problem in problems if problem is not None]

    return attempt


@pytest.mark.faults(
    fault="last.pt damaged: bits flipped, zeroed, cut, replaced by another file",
    promise="the run goes on from the newest intact checkpoint, ends as one of undamaged files, and names the damage",
)
@pytest.mark.parametrize("change", [flipped, zeroed, truncated, swapped], ids=lambda change: change.__name__)
def test_damaged_bytes(resumed, finished, tmp_path, change):
    rng, problems = random.Random(change.__name__), []
    whole = (finished / "4" / "checkpoints" / "last.pt").read_bytes()
    for number in range(FILES // 4):
        data = change(rng, whole, tmp_path / "executed")
        problems += resumed(number, data, in_place=rng.random() < 0.2, must_end_equal=change is not swapped)
    assert not problems, "\n".join(problems)


@pytest.mark.faults(
    fault="last.pt intact, its content nonsense: entries missing, added, of another type, shape or model",
    promise="the run goes on, or ends in one line; the checkpoints before stay",
)
def test_nonsensical_content(resumed, finished):
    rng, problems = random.Random(5), []
    for number in range(CONTENTS):
        state = nonsense(rng, load(finished / "4" / "checkpoints" / "last.pt"))
        problems += resumed(number, saved(state), in_place=False, must_end_equal=False)
    assert not problems, "\n".join(problems)
