"""Paths as people write them: a `~` at the start is a home folder, whether or not a shell has seen it."""

from __future__ import annotations

import os

from engine.errors import InputError

LOCAL_MODEL = "local-dir:"  # timm's prefix for a folder in place of a model's name


def readable(name: str) -> str:
    """A file's name as text: of bytes that are not UTF-8, which Python keeps as lone surrogates, escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def expanded(path: str, place: str = "") -> str:
    """A path, or a model's name that holds one, with the home folder that `~` or `~user` means.

    Args:
        place: what stands before the path in a message: "data.root = ".

    Raises:
        InputError: there is no such user.
    """
    prefix = LOCAL_MODEL if path.startswith(LOCAL_MODEL) else ""
    found = os.path.expanduser(path.removeprefix(prefix))
    if found.startswith("~"):
        raise InputError(
            f"{place}{path}: {found.partition('/')[0]} has no home folder; what is called so here is ./{found}"
        )
    return prefix + found
