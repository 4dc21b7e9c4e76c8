"""Where the records of a run go. Which of them a run has, and in which order, stands in `engine/defaults.py`."""

from engine.writers.csv_file import CSVWriter
from engine.writers.json_lines import JSONLinesWriter, read_lines
from engine.writers.log import LogWriter
from engine.writers.tensorboard import TensorBoardWriter
from engine.writers.weights_and_biases import WandbWriter, require_wandb
from engine.writers.writer import Record, Writer

__all__ = [
    "CSVWriter",
    "JSONLinesWriter",
    "LogWriter",
    "Record",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "read_lines",
    "require_wandb",
]
