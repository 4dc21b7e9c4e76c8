"""Two hundred spoilt checkpoints: the run goes on from an intact one, or ends in one line, and executes no code."""

from __future__ import annotations

import io
import pickle
import random
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import load
from tests.faults.conftest import DIGITS, REFUSED, Evil, outcome

RUN = ("--config", DIGITS, "model.kwargs.depth=1", "model.kwargs.embed_dim=16", "model.kwargs.num_heads=1",
       "evaluation.batch=800", "log.period=1", "log.csv=true", "checkpoint.period=2", "checkpoint.keep=2")  # fmt: skip
FILES, CONTENTS = 30, 80  # of each kind of damage, of nonsense
EVERY = 8  # of the mutants is evaluated and started from too


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


def is_same_end(one: Path, other: Path) -> bool:
    """Whether two runs end with the same weights and results, bit by bit."""
    (tensors, *_, summary), (other_tensors, *_, other_summary) = outcome(one), outcome(other)
    same = all(summary[key] == other_summary[key] for key in ("top1", "main_loss", "sub_loss", "iterations"))
    return same and all(torch.equal(tensors[path], other_tensors[path]) for path in other_tensors)


def complaint(ended) -> str | None:
    """How a process breaks the promise, or None."""
    if "Traceback" in ended.err or "unforeseen" in ended.err or ended.code not in (0, 2):
        return f"exit code {ended.code}: {ended.err[-700:]}"
    return f"not one line: {ended.err[-700:]}" if ended.code and not REFUSED.fullmatch(ended.err) else None


@pytest.fixture
def resumed(server, finished, tmp_path):
    """Resume a copy of a run of four iterations whose `last.pt` has other bytes; what went wrong, in words."""
    before, whole = (finished(*RUN, f"train.max_iters={iterations}") for iterations in (4, 6))

    def attempt(data: bytes, in_place: bool = False, is_evaluated: bool = False, must_end_equal: bool = False) -> list:
        folder, problems = tmp_path / "run", []
        subprocess.run(["cp", "-a", before, folder], check=True)  # its files linked to each other as they were
        last, *earlier = (folder / "checkpoints" / name for name in ("last.pt", "previous.pt", "iter_2.pt"))
        if not in_place:  # else in the file itself, whatever other names it has
            last.unlink()
        last.write_bytes(data)
        contents = [path.read_bytes() for path in earlier]
        commands = [["train.max_iters=6", "--resume", f"output_dir={folder}"]]
        if is_evaluated:
            start = [f"model.checkpoint={last}", "train.max_iters=1", f"output_dir={folder}/new"]
            commands = [["--eval-only", f"output_dir={folder}"], start, *commands]
        for command in commands:
            ended = server.wait(server.start(*RUN, *command), timeout=60)
            problems.append(complaint(ended))
        if must_end_equal and (ended.code or not is_same_end(folder, whole)):
            problems.append(f"exit code {ended.code}, another end: {ended.err}")
        if not ended.code and data != (before / "checkpoints" / "last.pt").read_bytes():
            used = re.search(r"resumed \S+/(\S+\.pt)", ended.out)
            if used is None or (used[1] != "last.pt") != ("WARNING: checkpoint" in ended.out):
                problems.append("went on from another checkpoint without naming the damaged one")
        if ended.code and [path.read_bytes() for path in earlier if path.exists()] != contents:
            problems.append("an earlier checkpoint has changed")
        if (tmp_path / "executed").exists():
            problems.append("code was executed")
        shutil.rmtree(folder)
        return [problem for problem in problems if problem is not None]

    return attempt


@pytest.mark.faults(
    fault="last.pt damaged: bits flipped, zeroed, cut, replaced by another file",
    promise="the run goes on from the newest intact checkpoint, ends as one of undamaged files, and names the damage",
)
@pytest.mark.parametrize("change", [flipped, zeroed, truncated, swapped], ids=lambda change: change.__name__)
def test_damaged_bytes(resumed, finished, tmp_path, change):
    rng, problems = random.Random(change.__name__), {}
    whole = (finished(*RUN, "train.max_iters=4") / "checkpoints" / "last.pt").read_bytes()
    for number in range(FILES):
        data = change(rng, whole, tmp_path / "executed")
        problems[number] = resumed(data, rng.random() < 0.2, number % EVERY == 0, must_end_equal=change is not swapped)
    assert not any(problems.values()), "\n".join(f"{number}: {found}" for number, found in problems.items() if found)


@pytest.mark.faults(
    fault="last.pt intact, its content nonsense: entries missing, added, of another type, shape or model",
    promise="the run goes on, or ends in one line; the checkpoints before stay",
)
def test_nonsensical_content(resumed, finished):
    rng, problems = random.Random(5), {}
    for number in range(CONTENTS):
        state = nonsense(rng, load(finished(*RUN, "train.max_iters=4") / "checkpoints" / "last.pt"))
        problems[number] = resumed(saved(state), is_evaluated=number % EVERY == 0)
    assert not any(problems.values()), "\n".join(f"{number}: {found}" for number, found in problems.items() if found)
