"""Errors that end a run with one clear line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RunError(Exception):
    """A run cannot start or go on; the message names the place, the value and what is allowed."""


class InputError(RunError):
    """Something the user gave is wrong: a config value, a file, a folder."""


class NonFiniteLossError(RunError):
    """The loss is NaN or infinite, or the fp16 loss scale has collapsed."""


class Preempted(Exception):
    """The run was asked to stop, and saved its state first."""


@contextmanager
def input_errors(place: str) -> Iterator[None]:
    """Report a refusal of other code as an InputError at `place`."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(f"{place}: {error or type(error).__name__}") from error
