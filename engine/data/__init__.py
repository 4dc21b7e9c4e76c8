"""Images: where they come from, in which order, and how they are loaded."""

from engine.data.bad_files import BadFiles
from engine.data.batches import worker_deaths
from engine.data.held_out import IGNORED
from engine.data.loaders import DataLoaders, build_held_out, build_held_out_source, build_loaders, build_source
from engine.data.source import IMAGENET, DataSource

__all__ = [
    "IGNORED",
    "IMAGENET",
    "BadFiles",
    "DataLoaders",
    "DataSource",
    "build_held_out",
    "build_held_out_source",
    "build_loaders",
    "build_source",
    "worker_deaths",
]
