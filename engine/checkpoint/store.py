"""The checkpoints of a run: `last`, the one before it, `best` and a few numbered ones."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from engine import atomic
from engine.checkpoint import file, sharded
from engine.checkpoint.background import Background, snapshot
from engine.checkpoint.reading import verify
from engine.distributed import Process
from engine.errors import InputError, RunError
from engine.run_folder import RunFolder

LOGGER = logging.getLogger("engine")


class CheckpointStore:
    """Writes and finds the checkpoints of a run.

    A new one is complete on the disk before it takes the name `last` and the old `last` becomes
    `previous`: whenever a save is interrupted, two intact checkpoints are there, or the only one so far. A damaged
    `last` is replaced at once.

    Args:
        keep: numbered checkpoints that stay.
        is_sharded: write a folder, every process its shards; else the main process writes one file.
        in_background: write files while training goes on, from a copy in memory.
    """

    def __init__(
        self, folder: RunFolder, process: Process, keep: int = 0, is_sharded: bool = False, in_background: bool = False
    ) -> None:
        self._folder = folder
        self._process = process
        self._keep = keep
        self._is_sharded = is_sharded
        self._background = Background() if in_background and not is_sharded else None
        self._is_last_damaged = False

    def save(self, state: dict[str, Any], is_best: bool, is_numbered: bool) -> None:
        """Save a state with its `iteration`. All processes call it together.

        Raises:
            RunError: the disk refuses, now or at the save before this one.
        """
        iteration = state["iteration"]
        numbered = self._folder.numbered(iteration) if is_numbered and self._keep else None
        names = [name for name in (self._folder.best if is_best else None, numbered) if name is not None]
        if self._is_sharded:
            target = self._folder.shards(iteration)
            sharded.save(state, target, self._process)
            if self._process.is_main:
                self._put(target, names)
        elif self._process.is_main and self._background is not None:
            self._background.submit(self._write, snapshot(state), names)
        elif self._process.is_main:
            self._write(state, names)

    def check(self) -> None:
        """Raise the error of a save in the background as soon as there is one."""
        if self._background is not None:
            self._background.check()

    def wait(self) -> None:
        """Until everything is on the disk."""
        if self._background is not None:
            self._background.wait()

    def newest(self) -> Path | None:
        """The newest intact checkpoint, the same for all processes; damaged ones before it are named in the log.

        Raises:
            InputError: all are damaged, or other processes do not see it.
        """
        found = self._process.broadcast(self._find().name if self._process.is_main and self._candidates() else None)
        path = self._folder.checkpoints / (found or self._folder.last.name)
        return path if self._process.agree(path.exists(), f"--resume: {path} exists") else None

    def _find(self) -> Path:
        problems = []
        for path in self._candidates():
            try:
                verify(path)
            except InputError as error:
                problems.append(str(error))
                continue
            self._is_last_damaged = path != self._folder.last
            for problem in problems:
                LOGGER.warning("WARNING: %s; using %s instead", problem, path.name)
            return path
        raise InputError(f"--resume: no intact checkpoint in {self._folder.checkpoints}: {'; '.join(problems)}")

    def _candidates(self) -> list[Path]:
        """Checkpoints, newest first, each content once."""
        folder = self._folder
        names = [folder.last, folder.previous, *reversed(folder.list_numbered()), folder.best]
        contents: dict[tuple[int, int], Path] = {}
        for path in names:
            if path.exists():
                contents.setdefault((path.stat().st_dev, path.stat().st_ino), path)
        return list(contents.values())

    def _write(self, state: dict[str, Any], names: list[Path]) -> None:
        """Write one file, and give it its names."""
        staged = self._folder.checkpoints / ".new.pt"
        file.save(state, staged, known_as=self._folder.last)
        self._put(staged, names)
        staged.unlink()

    def _put(self, staged: Path, names: list[Path]) -> None:
        """Let `last` and other names mean a complete checkpoint, and remove what is not kept."""
        folder = self._folder
        try:
            if folder.last.exists() and not self._is_last_damaged:
                _name(folder.last.resolve(), folder.previous)
            for name in (folder.last, *names):
                _name(staged, name)
            self._is_last_damaged = False
            for old in folder.list_numbered()[: -self._keep] if self._keep else ():
                old.unlink()
            self._remove_unnamed_shards()
        except OSError as error:
            raise RunError(file.cannot_write(folder.last, error)) from error

    def _remove_unnamed_shards(self) -> None:
        """Those of killed saves too: when one is complete, no other is being written."""
        named = {path.resolve() for path in self._folder.checkpoints.glob("*.pt")}
        for shards in self._folder.all_shards():
            if shards.resolve() not in named:
                shutil.rmtree(shards)


def _name(content: Path, name: Path) -> None:
    (atomic.link_folder if content.is_dir() else atomic.link)(content, name)
