"""Images: where they come from, in which order, and how they are loaded."""

from engine.data.loaders import DataLoaders, build_loaders, build_source

__all__ = ["DataLoaders", "build_loaders", "build_source"]
