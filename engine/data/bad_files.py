"""Image files that cannot be read: how they are reported, counted and limited."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from engine.distributed import Process
from engine.errors import InputError

LOGGER = logging.getLogger("engine")


class BadFile(NamedTuple):
    """Name of an image that cannot be read, and why."""

    name: str
    reason: str


class UnreadableImage(Exception):
    """A data set cannot give an image; raised with the fields of :class:`BadFile`."""

    @property
    def bad_file(self) -> BadFile:
        """The file behind it."""
        return BadFile(*self.args)


class BadFiles:
    """The bad files that a run has met so far, each counted once.

    Args:
        allowed: how many there may be, `data.bad_files`.
        logs: whether this process logs them.
    """

    def __init__(self, allowed: int, logs: bool = True) -> None:
        self.allowed = allowed
        self._logs = logs
        self._reasons: dict[str, str] = {}  # by name

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, found: Iterable[BadFile]) -> None:
        """Count files and log those that are new; InputError if there are more than allowed.

        A file that is not met again, because somebody repaired it, does not stop a run that was resumed.
        """
        for name, reason in found:
            is_new = name not in self._reasons
            self._reasons.setdefault(name, reason)
            count = len(self)
            if count > self.allowed:
                raise InputError(
                    f"data.bad_files = {self.allowed}: {name} cannot be read: {reason}; bad file number {count}: "
                    f"repair or remove it, or skip such files with data.bad_files={count} or more"
                )
            if is_new and self._logs:
                LOGGER.warning("bad file %d of %d allowed (data.bad_files): %s: %s", count, self.allowed, name, reason)

    def unite(self, process: Process) -> None:
        """Count what the other processes found too. All processes must call it together."""
        for reasons in process.gather(self._reasons):
            self.record(BadFile(*item) for item in reasons.items() if item[0] not in self._reasons)

    def state_dict(self) -> dict[str, Any]:
        """Names and reasons, for a checkpoint."""
        return {"reasons": dict(self._reasons)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._reasons = dict(state["reasons"])
