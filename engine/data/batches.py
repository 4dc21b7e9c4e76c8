"""What comes out of loader workers: batches, the bad files found on the way, and sometimes their death."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from engine.data.bad_files import BadFile, BadFiles
from engine.data.decoding import reason_of
from engine.data.delivery import Delivery
from engine.errors import InputError, RunError

WORKER_DIED = "DataLoader worker (pid"  # so begins torch's message
RAISED_IN_WORKER = "in DataLoader worker process"  # so goes on the message of a user's error, after "Caught OSError"
PATIENCE = 5.0  # seconds between a connection that broke and the notice that the process behind it is dead


def collate(samples: list[Any]) -> tuple[list[Tensor] | None, list[BadFile]]:
    """A batch [images (B, C, H, W), labels (B,)] and the bad files met in making it.

    Args:
        samples: pairs (image, label) and bad files; None is an image for which no other could be found.
    """
    bad_files = [sample for sample in samples if isinstance(sample, BadFile)]
    pairs = [sample for sample in samples if not isinstance(sample, BadFile)]
    return None if any(pair is None for pair in pairs) else default_collate(pairs), bad_files


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Delivered pairs (images (B, C, H, W), labels (B,)) of a loader whose bad files are recorded.

    Raises:
        InputError: more bad files than allowed.
        RunError: a worker died.
    """

    def __init__(self, loader: DataLoader, bad_files: BadFiles, deliver: Delivery) -> None:
        self._bad_files = bad_files
        self._deliver = deliver
        self._workers = loader.num_workers
        with worker_deaths(self._workers):
            self._batches = iter(loader)  # draws from the global generator: not to be put off to the first batch

    def __next__(self) -> tuple[Tensor, Tensor]:
        with worker_deaths(self._workers):
            delivered = self._receive()
        if delivered is None:
            raise StopIteration
        batch, found = delivered
        self._bad_files.record(BadFile(*bad_file) for bad_file in found)
        if batch is None:
            name, reason = found[0]
            raise InputError(f"no training image can be read in place of {name}, which cannot either: {reason}")
        return self._deliver(*batch)

    def close(self) -> None:
        """End the workers. The garbage collector may close the queue to them before it tells them to end,
        and they heed no SIGTERM."""
        if self._workers:
            self._batches._shutdown_workers()  # torch has no public name for it

    def _receive(self) -> Any:
        """What `collate` gave, or None at the end; a connection that a dead worker left broken is its death."""
        try:
            return next(self._batches, None)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if not self._workers or RAISED_IN_WORKER in str(error):
                raise
            time.sleep(PATIENCE)  # cut short by torch's handler of the signal, which knows who died and why
            raise RuntimeError(f"{WORKER_DIED} unknown) is gone: {reason_of(error)}") from error


class HeldOutLoader:
    """This process's held-out images, to be gone through many times, as :class:`Batches`."""

    def __init__(self, loader: DataLoader, bad_files: BadFiles, deliver: Delivery) -> None:
        self._loader = loader
        self._deliver = deliver
        self.bad_files = bad_files

    def __len__(self) -> int:
        return len(self._loader)

    def examples(self, count: int) -> Tensor:
        """At most `count` images (B, C, H, W), spread over the data, loaded by this process; black if unreadable."""
        dataset = self._loader.dataset
        positions = range(0, len(dataset), math.ceil(len(dataset) / count))
        pairs = dataset.__getitems__(list(positions))[: len(positions)]
        images, _ = self._deliver(*default_collate(pairs))
        return images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with closing(Batches(self._loader, self.bad_files, self._deliver)) as batches:
            yield from batches


@contextmanager
def worker_deaths(workers: int) -> Iterator[None]:
    """End the run with one line if a loader worker is killed or crashes; its exceptions stay as they are.

    torch reports a death from a signal handler, so in the middle of whatever the process is doing.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(WORKER_DIED):
            raise
        for worker in multiprocessing.active_children():
            worker.kill()  # it may wait for a lock that the dead one holds, and does not heed SIGTERM
        reason = str(error).splitlines()[0].rstrip(". ")
        raise RunError(
            f"a data loading worker died: {reason}; if memory ran out, lower data.workers (now {workers}) "
            "or train.micro_batch"
        ) from error
