"""All randomness is a function of the seed and of where the run stands, so nothing of it is saved."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*key: int) -> int:
    """A 32-bit seed from non-negative integers; different keys of one length give unrelated seeds."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators, those of all devices included."""
    seed_cpu(seed)
    if torch.cuda.is_available():  # torch.manual_seed writes down a stack trace for every kind of device that is not
        torch.cuda.manual_seed_all(seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Give the CPU's global generators their state back at the end."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])


def seed_cpu(seed: int) -> None:
    """Seed the CPU's global generators only."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
