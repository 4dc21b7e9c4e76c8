"""Files that lie elsewhere: names for many of them, and copies on this machine's disk."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from engine.config import DataConfig
from engine.data.files import natural_order, split_names
from engine.errors import InputError, input_errors

PIPE = "pipe:"  # WebDataset's: what follows is a command of the shell, which prints the file
ATTEMPTS, PAUSE = 3, 1.0  # and seconds between the first two; doubled for the next
POLL = 0.05  # seconds between looks at a copy
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what some network file systems say
# In a process of its own, which can be stopped wherever it hangs
COPY = "import fsspec, shutil, sys; shutil.copyfileobj(fsspec.open(sys.argv[1]).open(), sys.stdout.buffer)"


def is_remote(place: str) -> bool:
    """Whether it is a URL or a command, not a path."""
    return place.startswith(PIPE) or "://" in place


def split_places(data: DataConfig, split: str, suffix: str, folders: Sequence[str] = ("",)) -> list[str]:
    """The files of a split in natural order: <root>/<split>-*<suffix>, or those that the split's name describes itself.

    It describes some by a suffix, a URL or `pipe:` in it; braces as in {00..99} or {a,b} and * stand for many.

    Args:
        folders: of the root in which they may lie, with their slash.

    Raises:
        InputError: there are none, or a package is not installed.
    """
    if suffix in split or is_remote(split):
        root = "" if data.root is None or is_remote(split) or os.path.isabs(split) else os.path.join(data.root, "")
        patterns = [split]
    elif data.root is None:
        raise InputError(f"data.root is not set: it names the folder or the URL with <split>-*{suffix}")
    else:
        root = os.path.join(data.root, "")
        patterns = [f"{folder}{name}-*{suffix}" for folder in folders for name in split_names(split)]
    places = next((found for pattern in patterns if (found := expand(pattern, root))), [])
    if not places:
        tried = ", ".join(root + pattern for pattern in patterns)
        raise InputError(f"data.dataset = {data.dataset}: no file for the split {split}: {tried}")
    return places


def expand(pattern: str, root: str = "") -> list[str]:
    """The places that braces and stars mean, below a root, which on this machine is no pattern itself."""
    places = [pattern]
    if "{" in pattern:
        with input_errors("names with braces need other packages, pip install 'augsub[shards]'"):
            from webdataset.shardlists import expand_urls
        places = expand_urls(pattern)
    return [name for place in places for name in (_matches(place, root) if "*" in place else [root + place])]


def _matches(pattern: str, root: str) -> list[str]:
    if not is_remote(root + pattern):
        return sorted(glob.glob(glob.escape(root) + pattern), key=natural_order)
    pattern = root + pattern
    if pattern.startswith(PIPE):
        return [pattern]
    with input_errors("URLs need other packages, pip install 'augsub[shards]'"):
        import fsspec
    with input_errors(pattern, Exception):  # of as many packages as there are protocols
        system, path = fsspec.core.url_to_fs(pattern)
        return [system.unstrip_protocol(name) for name in sorted(system.glob(path), key=natural_order)]


def cache_folder() -> Path:
    """Where copies and indices lie: ~/.cache/augsub, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "augsub"


@dataclass(frozen=True)
class Copies:
    """The latest copies of some files from elsewhere; processes share them.

    Attributes:
        folder: they lie in.
        most: kept at a time.
        patience: seconds without a byte after which an attempt has failed.
    """

    folder: Path
    most: int
    patience: float

    @classmethod
    def of(cls, places: Sequence[str], most: int, patience: float) -> Copies:
        """Those of some places."""
        digest = hashlib.sha256("\n".join(places).encode()).hexdigest()[:16]
        return cls(cache_folder() / "shards" / digest, most, patience)

    def get(self, place: str) -> Path:
        """The path of a file itself, or of a copy of what lies elsewhere; it may go when other copies are made.

        Raises:
            OSError: it cannot be had, after some attempts.
        """
        if not is_remote(place):
            return Path(place)
        self.folder.mkdir(parents=True, exist_ok=True)
        copy = self.path_of(place)
        with alone(copy):
            if copy.exists():
                os.utime(copy)
                return copy
            fetch(place, copy, self.patience)
            self.clear(self.most)
        return copy

    def path_of(self, place: str) -> Path:
        """Where the copy of a place lies, if there is one."""
        return self.folder / hashlib.sha256(place.encode()).hexdigest()[:24]

    def clear(self, most: int = 0) -> None:
        """Remove all but the latest copies; what has a suffix is none."""
        copies = [path for path in self.folder.iterdir() if not path.suffix]
        for old in sorted(copies, key=lambda path: path.stat().st_mtime)[: len(copies) - most]:
            old.unlink(missing_ok=True)  # who has it open can read it on


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """One process at a time makes a file; if it dies, the next one. A file system without locks has none."""
    path = file.with_name(f".{file.name}.lock")
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            if _is_at(path, lock):  # else whoever had it has removed it
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return


def _is_at(path: Path, opened: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened.fileno()))
    except FileNotFoundError:
        return False


def fetch(place: str, target: Path, patience: float, attempts: int = ATTEMPTS) -> None:
    """Copy what a URL or a command gives to a file, whole or not at all.

    Args:
        patience: seconds without a byte after which an attempt has failed.

    Raises:
        OSError: all attempts have failed.
    """
    command = place.removeprefix(PIPE) if place.startswith(PIPE) else shlex.join([sys.executable, "-c", COPY, place])
    for attempt in range(attempts):
        try:
            return _fetch_once(command, target, patience)
        except OSError as error:
            if attempt + 1 == attempts:
                raise OSError(f"{error}, in {attempts} attempts") from error
            time.sleep(PAUSE * 2**attempt)


def _fetch_once(command: str, target: Path, patience: float) -> None:
    part = target.with_name(f"{target.name}.part")
    with open(part, "wb") as output, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, shell=True, stdout=output, stderr=said, start_new_session=True)
        try:
            seen, since = 0, time.monotonic()
            while process.poll() is None:
                time.sleep(POLL)
                if (size := os.fstat(output.fileno()).st_size) != seen:
                    seen, since = size, time.monotonic()
                if time.monotonic() - since > patience:
                    raise OSError(f"no byte for {patience:g} s (data.patience) after {seen}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
    if process.returncode:
        raise OSError(lines[-1] if lines else f"exit code {process.returncode}")
    os.replace(part, target)
