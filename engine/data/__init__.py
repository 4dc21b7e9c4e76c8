"""Images: where they come from, in which order, and how they are loaded."""

from engine.data.loaders import DataLoaders, build_held_out, build_loaders, build_source
from engine.data.source import DataSource

__all__ = ["DataLoaders", "DataSource", "build_held_out", "build_loaders", "build_source"]
