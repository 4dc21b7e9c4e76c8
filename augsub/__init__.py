"""augsub: sub-model augmentation for timm models (MaskSub, arXiv 2306.11339)."""

from augsub import downscale, drops, masking, random_crop  # noqa: F401  (importing registers them)
from augsub.augmentation import Compose, SubModelAugmentation
from augsub.lessons import LESSONS, Lesson, Step, register_lesson
from augsub.mutual import CoSubObjective, RDropObjective
from augsub.objective import (
    OBJECTIVES,
    Objective,
    ObjectiveOutput,
    SubModelObjective,
    register_objective,
)
from augsub.patching import is_patched, patch, supports, unpatch
from augsub.registry import AUGSUB_REGISTRY, build, list_augmentations, register
from augsub.sub_model import Ramp, SubModel

__version__ = "0.1.0"
__all__ = [
    "AUGSUB_REGISTRY",
    "LESSONS",
    "OBJECTIVES",
    "CoSubObjective",
    "Compose",
    "Lesson",
    "Objective",
    "ObjectiveOutput",
    "RDropObjective",
    "Ramp",
    "Step",
    "SubModel",
    "SubModelAugmentation",
    "SubModelObjective",
    "build",
    "is_patched",
    "list_augmentations",
    "patch",
    "register",
    "register_lesson",
    "register_objective",
    "supports",
    "unpatch",
]
