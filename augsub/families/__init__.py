"""Families of models: where augmentations act. One file each; importing it registers it."""

from augsub.families import crossvit, eva, fixed_size, gemma4, hiera, naflexvit, stem, swin, vit  # noqa: F401
from augsub.families.base import Family, family_of, register_family, registered_classes

__all__ = ["Family", "family_of", "register_family", "registered_classes"]
