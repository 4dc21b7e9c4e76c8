"""A save that is cut off at any point, or refused by the disk, never costs the checkpoint before it."""

from __future__ import annotations

import io
import itertools
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint import CheckpointStore, load
from engine.distributed import Process
from engine.errors import RunError
from engine.run_folder import RunFolder
from tests.faults.conftest import assert_same_end

ALONE = Process(rank=0, world_size=1, device=torch.device("cpu"))
FULL = OSError(28, "No space left on device")


def state(iteration: int) -> dict:
    tensors = {f"layer{index}": torch.full((300,), float(iteration)) for index in range(8)}
    return {"iteration": iteration, "config": "", "model": tensors}


def store(folder: Path) -> CheckpointStore:
    return CheckpointStore(RunFolder(folder), ALONE, keep=2)


def fault_at_call(monkeypatch, number: int, fault: Callable[[], None]) -> None:
    """Let the n-th call that changes something on the disk meet the fault instead."""
    calls = itertools.count(1)

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                fault()
            return function(*args, **kwargs)

        return call

    class CountedFile(io.FileIO):
        write = counted(io.FileIO.write)

    for name in ("fsync", "replace", "link", "symlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr("engine.atomic.open", counted(CountedFile), raising=False)


def save_in_child(folder: Path, fault: Callable[[], None], number: int) -> int:
    """Save state 3 in a process of its own, which meets a fault; how it ended."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            fault_at_call(pytest.MonkeyPatch(), number, fault)
            store(folder).save(state(3), is_best=True, is_numbered=True)
            code = 0
        except RunError as error:
            code = 2 if "Make room" in str(error) and "No space left on device" in str(error) else 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def refuse() -> None:
    raise FULL


@pytest.mark.faults(
    fault="a save interrupted at every call that writes, syncs, renames or links",
    promise="the newest complete checkpoint is found and read whole; the next save works",
)
@pytest.mark.parametrize(("fault", "ends"), [(kill, -signal.SIGKILL), (refuse, 2)], ids=["SIGKILL", "ENOSPC"])
def test_interrupted_saves(tmp_path, fault, ends):
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        (folder / "checkpoints").mkdir(parents=True)
        for iteration in (1, 2):
            store(folder).save(state(iteration), is_best=iteration == 1, is_numbered=True)
        code = save_in_child(folder, fault, number)
        if code == 0:
            break
        assert code == ends
        newest = load(store(folder).newest())
        assert newest["iteration"] in (2, 3)
        assert all((tensor == newest["iteration"]).all() for tensor in newest["model"].values())
        store(folder).save(state(4), is_best=False, is_numbered=True)
        assert load(store(folder).newest())["iteration"] == 4
        names = {path.name for path in (folder / "checkpoints").iterdir()}
        assert len([name for name in names if name.startswith("iter_")]) == 2
    assert number > 30  # every tensor is a write of its own


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a disk of some KiB at a folder; its size can be changed."""
    mounted = tmp_path / "disk"
    mounted.mkdir()

    def size(kibibytes: int, *options: str) -> Path:
        remount = ",".join(["remount"] * os.path.ismount(mounted) + [f"size={kibibytes}k", *options])
        command = ["mount", "-t", "tmpfs", "-o", remount, "tmpfs", mounted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"only root may mount a disk: {done.stderr.strip()}")
        return mounted

    yield size
    if os.path.ismount(mounted):
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.faults(
    fault="the disk is full",
    promise="one line with the cause and the remedy, exit code 2; with room again the run goes on to the same bits",
)
@pytest.mark.parametrize("background", ["true", "false"])
@pytest.mark.parametrize("room", [0.3, 1.5, 2.01, 2.6, 3.3])  # in checkpoints; a fourth one at once is never needed
def test_a_full_disk(server, digits, finished, small_disk, background, room):
    run = [*digits, f"checkpoint.background={background}"]
    size = (finished(*run) / "checkpoints" / "last.pt").stat().st_size >> 10
    folder = small_disk(int(room * size)) / "run"
    error = server.refused(*run, f"output_dir={folder}")
    assert "cannot be written: No space left on device" in error and "Make room" in error
    small_disk(20 * size)
    out = server.succeed(*run, f"output_dir={folder}", "--resume")
    assert ("resumed" in out) == (room > 1.1)
    assert_same_end(finished(*run), folder)


@pytest.mark.faults(
    fault="a read-only output folder, at the start or later",
    promise="one line that names the folder, exit code 2; what was saved stays, and the run can go on",
)
def test_a_read_only_folder(server, digits, small_disk):
    folder = small_disk(100_000) / "run"
    server.succeed(*digits, f"output_dir={folder}", "train.max_iters=8")
    small_disk(100_000, "ro")
    for name, arguments in {"run": ["--resume"], "other": []}.items():
        error = server.refused(*digits, f"output_dir={folder.parent}/{name}", *arguments)
        assert f"output_dir = {folder.parent}/{name}: cannot be written: Read-only file system" in error
    assert load(folder / "checkpoints" / "last.pt")["iteration"] == 8
    small_disk(100_000, "rw")
    server.succeed(*digits, f"output_dir={folder}", "--resume")
