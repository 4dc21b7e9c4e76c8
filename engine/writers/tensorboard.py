"""TensorBoard: curves, images, the configuration as text, and its values beside the results of other runs."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from engine.writers.writer import AXES, Record, Writer

RESULTS = ("top1", "main_loss")  # beside which the HPARAMS page shows the configuration


class TensorBoardWriter(Writer):
    """TensorBoard events; what an interrupted run wrote after `iteration` is hidden.

    Args:
        config_yaml: the configuration, for the page TEXT.
        config_values: the same by keys with dots, for the page HPARAMS.
    """

    def __init__(self, folder: Path, iteration: int, config_yaml: str, config_values: dict[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed on one process only
        from torch.utils.tensorboard.summary import hparams

        self._writer = SummaryWriter(str(folder), purge_step=iteration + 1)
        self._writer.add_text("config", f"```yaml\n{config_yaml}```", iteration)
        plain = {key: str(value) if isinstance(value, list | dict) else value for key, value in config_values.items()}
        for summary in hparams(plain, dict.fromkeys(RESULTS)):  # add_hparams would put them into a run of their own
            self._writer.file_writer.add_summary(summary)

    def write(self, record: Record) -> None:
        for name, value in record.items():
            if name not in AXES:
                self._writer.add_scalar(name, value, record["iteration"])

    def write_images(self, images: dict[str, Tensor]) -> None:
        for title, batch in images.items():
            self._writer.add_images(title, batch)

    def close(self) -> None:
        self._writer.close()
