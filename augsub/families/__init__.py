"""Families of models: where augmentations act. One file each; importing it registers it."""

from augsub.families import crossvit, eva, gemma4, hiera, stem, swin, vit  # noqa: F401
from augsub.families.base import FAMILIES, Family, family_of, register_family

__all__ = ["FAMILIES", "Family", "family_of", "register_family"]
