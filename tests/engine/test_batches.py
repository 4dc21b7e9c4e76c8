"""What loader workers deliver, and what becomes of a run whose worker dies."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from engine.data.loaders import BadFiles, Batches, HeldOutLoader, collate
from engine.data.transforms import Delivery
from engine.errors import RunError

AS_THEY_ARE = Delivery(torch.device("cpu"))


class Faulty(Dataset):
    """Sixteen numbers; at the fifth something happens to the process that reads it."""

    def __init__(self, fault) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int):
        if index == 4:
            self.fault()
        return torch.tensor(index), index


@pytest.mark.parametrize("code", [1, 7])
def test_a_worker_that_crashes_ends_in_one_line(code):
    loader = DataLoader(Faulty(lambda: os._exit(code)), batch_size=2, num_workers=1, collate_fn=collate)
    with pytest.raises(RunError) as error:
        for _ in Batches(loader, BadFiles(0), AS_THEY_ARE):
            pass
    assert str(error.value).startswith("a data loading worker died: DataLoader worker (pid")
    assert str(error.value).endswith("lower data.workers (now 1) or train.micro_batch")
    assert "\n" not in str(error.value)


def test_an_end_is_no_fault_and_a_second_round_is_the_same():
    loader = HeldOutLoader(
        DataLoader(Faulty(lambda: None), batch_size=3, num_workers=2, collate_fn=collate), BadFiles(0), AS_THEY_ARE
    )
    assert len(loader) == 6
    for _ in range(2):
        assert torch.cat([images for images, _ in loader]).tolist() == list(range(16))


def test_closing_ends_the_workers_though_they_heed_no_signal():
    def ignore(worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    data = Faulty(lambda: None)
    loader = DataLoader(data, batch_size=2, num_workers=2, collate_fn=collate, worker_init_fn=ignore)
    batches = Batches(loader, BadFiles(0), AS_THEY_ARE)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [OSError, FileNotFoundError, ConnectionResetError, EOFError, RuntimeError])
def test_an_error_of_user_code_in_a_worker_stays_what_it_is(workers, error):
    def fail() -> None:
        raise error("the overlay of this transform is missing")

    loader = DataLoader(Faulty(fail), batch_size=2, num_workers=workers, collate_fn=collate)
    with pytest.raises(error, match="the overlay of this transform is missing"):
        list(Batches(loader, BadFiles(5), AS_THEY_ARE))
