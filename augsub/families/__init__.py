"""Families of models: where augmentations act. One file each; importing it registers it."""

from augsub.families import (  # noqa: F401
    crossvit,
    eva,
    gemma4,
    hiera,
    huggingface,
    naflexvit,
    stem,
    swin,
    vit,
)
from augsub.families.base import FAMILIES, Family, family_of, register_family

__all__ = ["FAMILIES", "Family", "family_of", "register_family"]
