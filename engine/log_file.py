"""log.txt: everything that is logged during a run, by timm too."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from pathlib import Path


class LogFile(MemoryHandler):
    """Keeps what is logged until the run's folder exists, then appends it and all that follows to a file.

    A run that is refused for bad input thus leaves no folder behind, and one that starts loses no line.
    """

    def __init__(self) -> None:
        super().__init__(capacity=sys.maxsize, flushLevel=sys.maxsize, flushOnClose=False)

    def open(self, path: Path) -> None:
        """Write to `path` from now on."""
        file = _File(path, encoding="utf-8", errors="backslashreplace")
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.setTarget(file)
        self.capacity = 1
        self.flush()

    def __enter__(self) -> LogFile:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        logging.getLogger().removeHandler(self)
        if self.target is not None:
            self.target.close()
        self.close()


class _File(logging.FileHandler):
    """A file that is given up, with one line, when it cannot be written: a full disk must not fill the terminal too."""

    def handleError(self, record: logging.LogRecord) -> None:
        self.emit = lambda record: None
        print(f"{self.baseFilename} cannot be written: {sys.exc_info()[1]}; the log goes on here only", file=sys.stderr)
