"""The folder of a run: what lies where, and who may write into it."""

from __future__ import annotations

from pathlib import Path

from engine.config import Config
from engine.config_file import to_yaml
from engine.errors import InputError


class RunFolder:
    """Paths of one run's results."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"

    def numbered(self, iteration: int) -> Path:
        """The checkpoint after that many steps."""
        return self.checkpoints / f"iter_{iteration}.pt"

    def list_numbered(self) -> list[Path]:
        """Numbered checkpoints, oldest first."""
        return sorted(self.checkpoints.glob("iter_*.pt"), key=lambda path: int(path.stem.removeprefix("iter_")))

    def refuse_if_taken(self) -> None:
        """Raise InputError if the folder holds a run's results, which a new run would overwrite."""
        if self.metrics.exists() or self.last.exists():
            raise InputError(
                f"output_dir = {self.path} holds a run already: continue it with --resume, or choose another output_dir"
            )

    def open(self, config: Config) -> None:
        """Create the folder and save the complete configuration in it; InputError if that is impossible."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.config.write_text(to_yaml(config))
        except OSError as error:
            raise InputError(f"output_dir = {self.path}: cannot be written: {error.strerror}") from error
