"""Errors that end a run with one clear line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models import first_line as first_line


class RunError(Exception):
    """A run cannot start or go on; the message names the place, the value and what is allowed."""


class InputError(RunError):
    """Something the user gave is wrong: a config value, a file, a folder."""


class NonFiniteLossError(RunError):
    """The loss is NaN or infinite, or the fp16 loss scale has collapsed."""


class Preempted(Exception):
    """The run was asked to stop, and saved its state first."""


NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")  # torch says


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the device or of the CPU was wanting."""
    message = " ".join(str(error).split())
    return isinstance(error, MemoryError) or any(words in message for words in NO_MEMORY)


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Report that memory ran out, and what the user can do about it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"{remedy}: out of memory: {' '.join(str(error).split()) or type(error).__name__}") from error


@contextmanager
def writing_errors(place: str | Path, remedy: str = "") -> Iterator[None]:
    """Report that something cannot be written, and what the user can do about it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__  # torch hides it behind an error of its own
        if reason is None:
            raise
        raise RunError(f"{place} cannot be written: {reason.strerror or reason}{remedy}") from error


@contextmanager
def input_errors(place: str, *kinds: type[Exception]) -> Iterator[None]:
    """Report a refusal of other code as an InputError at `place`; this project's own errors stay as they are.

    Args:
        kinds: of other code's errors, which may have many lines: the first one is told. None given: those that Python
            has for a wrong value, as they are.
    """
    refusals = kinds or (ValueError, TypeError, AssertionError, ImportError)
    try:
        yield
    except RunError:
        raise
    except refusals as error:
        reason = first_line(error) if kinds else str(error) or type(error).__name__
        raise InputError(f"{place}: {reason}") from error
