"""Who may run a model while a sub-forward changes it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Turns:
    """Lets threads run a model's main forward side by side, and a sub-forward alone.

    A thread that is inside may call the model again. A copy, also a pickled one, begins anew.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: Counter[int] = Counter()  # forwards under way, by thread
        self._alone: int | None = None  # the thread of a sub-forward
        self._waiting = 0  # sub-forwards: they go first, or many main forwards would keep them out

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        """The turn of a sub-forward, `alone`, or of a main forward."""
        me = threading.get_ident()
        with self._changed:
            self._waiting += alone
            try:
                self._changed.wait_for(lambda: self._may_enter(me, alone))
            finally:
                self._waiting -= alone
            self._inside[me] += 1
            self._alone = me if alone else self._alone
        try:
            yield
        finally:
            with self._changed:
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                    self._alone = None if self._alone == me else self._alone
                self._changed.notify_all()

    def _may_enter(self, me: int, alone: bool) -> bool:
        if alone:
            return not self._inside.keys() - {me}
        return me in self._inside or (self._alone is None and not self._waiting)

    def __reduce__(self) -> tuple[Any, ...]:
        return Turns, ()
