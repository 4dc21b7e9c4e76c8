"""augsub: sub-model augmentation for timm models (MaskSub, arXiv 2306.11339)."""

from augsub import drops, masking, random_crop  # noqa: F401  (importing registers them)
from augsub.augmentation import Compose, SubModelAugmentation
from augsub.objective import SubModel, SubModelObjective
from augsub.patching import is_patched, patch, supports, unpatch
from augsub.registry import AUGSUB_REGISTRY, build, list_augmentations, register

__version__ = "0.1.0"
__all__ = [
    "AUGSUB_REGISTRY",
    "Compose",
    "SubModel",
    "SubModelAugmentation",
    "SubModelObjective",
    "build",
    "is_patched",
    "list_augmentations",
    "patch",
    "register",
    "supports",
    "unpatch",
]
