"""Files that are either the old ones or the new ones, never a part: temporary file, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def temporary_name(path: Path) -> Path:
    """Where the next content of `path` is written first. What an interrupted write leaves there, the next replaces."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def new_content(path: Path) -> Iterator[BinaryIO]:
    """A file to write; `path` gets its content at the end, or keeps the old one after an error."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the content of a text file, in UTF-8; a file's name in it that is none is written with escapes."""
    with new_content(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def link(source: Path, path: Path) -> None:
    """Make `path` another name of a file's content as it is now, whatever `source` becomes later.

    Where links are impossible it is a copy.
    """
    temporary = temporary_name(path)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
        sync(temporary)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename, and make sure that the new name itself survives a power failure."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
