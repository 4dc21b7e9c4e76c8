"""What a person wants to see at the end: a table, a summary file and the curves."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence, Sized
from typing import Any

from engine import atomic
from engine.curves import draw_curves
from engine.hooks.evaluation import Evaluation
from engine.json_text import to_json
from engine.run_folder import RunFolder
from engine.table import text_table
from engine.train_loop import HookBase
from engine.writers import read_lines

LOGGER = logging.getLogger("engine")


class Report(HookBase):
    """Writes summary.json and curves.png and prints the table, after the last step.

    Args:
        facts: more rows of the table, name and value; a resumed run keeps those of its start.
        bad_files: as many as were skipped.
    """

    state_name = "report"

    def __init__(
        self,
        folder: RunFolder,
        evaluation: Evaluation,
        title: str,
        facts: Sequence[tuple[str, str]] = (),
        bad_files: Sized = (),
    ) -> None:
        self._folder = folder
        self._evaluation = evaluation
        self._title = title
        self._facts = facts
        self._bad_files = bad_files
        self._seconds_before = 0.0
        self._started = time.monotonic()

    def before_train(self) -> None:
        self._started = time.monotonic()

    def after_train(self) -> None:
        records = read_lines(self._folder.metrics)
        summary = self._summary(records[-1] if records else {})
        atomic.write_text(self._folder.summary, f"{to_json(summary, indent=2)}\n")
        draw_curves(records, self._title, self._folder.curves)
        LOGGER.info("\n%s\n%s", self._title, text_table(self._rows(summary)))

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "facts": [list(fact) for fact in self._facts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds_before = state["seconds"]
        self._facts = [tuple(fact) for fact in state["facts"]]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _summary(self, last_record: dict[str, float]) -> dict[str, Any]:
        losses = {name: value for name, value in last_record.items() if name.endswith("loss") or "sub_loss" in name}
        best = {f"best_{name}": value for name, value in self._evaluation.best.items()}
        return {
            **losses,
            **self._evaluation.latest,
            **best,
            "iterations": self.trainer.iteration,
            "epochs": self.trainer.epoch,
            "seconds": self._seconds(),
            "bad_files": len(self._bad_files),
        }

    def _rows(self, summary: dict[str, Any]) -> list[tuple[str, str]]:
        rows = [
            ("main loss", f"{summary['main_loss']:.4f}"),
            ("sub loss", f"{summary['sub_loss']:.4f}" if "sub_loss" in summary else "no sub-model"),
            ("held-out top-1", f"{summary['top1']:.2f} % of {summary['images']} images"),
            ("held-out top-5", f"{summary['top5']:.2f} %"),
        ]
        if "ema_top1" in summary:
            rows.append(("held-out top-1, EMA", f"{summary['ema_top1']:.2f} %"))
        skipped = [("bad files skipped", f"{summary['bad_files']} (named in {self._folder.log.name})")]
        return [
            *rows,
            ("best", f"{summary['best_value']:.2f} % after epoch {summary['best_epoch']:.4g}"),
            *self._facts,
            *(skipped if summary["bad_files"] else []),
            ("trained for", f"{summary['epochs']:.4g} epochs, {summary['iterations']} iterations"),
            ("time", f"{summary['seconds']:.0f} s"),
            ("results", str(self._folder.path)),
        ]
