"""Families of models: where augmentations act. One file each; importing it registers it."""

from augsub.families import swin, vit  # noqa: F401
from augsub.families.base import Family, family_of, register_family

__all__ = ["Family", "family_of", "register_family"]
