"""The loop and its hooks, in the manner of detectron2: iterations count, everything else is a hook."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class HookBase:
    """Something that happens around training steps. Hooks run in the order of the trainer's list.

    A hook with a `state_name` is saved and resumed with the run under that name.
    """

    trainer: TrainerBase
    state_name: str | None = None

    def before_train(self) -> None:
        """Before the first step of this process."""

    def before_step(self) -> None:
        """Before a step; `trainer.iteration` steps are done."""

    def after_backward(self) -> None:
        """After the backward of each branch of each micro-batch; gradients add up until the step."""

    def after_step(self) -> None:
        """After a step; `trainer.iteration` steps are done, this one included."""

    def after_train(self) -> None:
        """After the last step, not after an error."""

    def close(self) -> None:
        """At the very end, also after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this hook."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""

    def start_late(self) -> None:
        """Instead of that, in a resumed run that did not have this hook before."""


class TrainerBase:
    """Runs `run_step` until `max_iterations` steps are done."""

    def __init__(self, max_iterations: int) -> None:
        self.iteration = 0
        self.max_iterations = max_iterations
        self.hooks: list[HookBase] = []

    def register_hooks(self, hooks: Sequence[HookBase]) -> None:
        """Append hooks to the list."""
        for hook in hooks:
            hook.trainer = self
            self.hooks.append(hook)

    @property
    def is_last(self) -> bool:
        """Whether all steps are done."""
        return self.iteration >= self.max_iterations

    def run_step(self) -> None:
        """One optimiser step."""
        raise NotImplementedError

    def run_iteration(self) -> None:
        """One step with its hooks."""
        self._call("before_step")
        self.run_step()
        self.iteration += 1
        self._call("after_step")

    def train(self) -> None:
        """All steps that are left, with their hooks."""
        try:
            self._call("before_train")
            while not self.is_last:
                self.run_iteration()
            self._call("after_train")
        finally:
            self._call("close")

    def _call(self, point: str) -> None:
        for hook in self.hooks:
            getattr(hook, point)()
