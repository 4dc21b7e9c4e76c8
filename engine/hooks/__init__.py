"""What happens around training steps. The order in which they run stands in `engine/defaults.py`."""

from engine.hooks.bad_files import UniteBadFiles
from engine.hooks.batchnorm import FrozenStatistics, SameBatchNormStatistics
from engine.hooks.checkpoint import Checkpoint
from engine.hooks.ema import ExponentialMovingAverage
from engine.hooks.evaluation import Evaluation
from engine.hooks.gradient_norm import GradientNorm
from engine.hooks.lr_schedule import LearningRateSchedule
from engine.hooks.nan_guard import NaNGuard
from engine.hooks.own import HOOK_REGISTRY, build_own_hooks
from engine.hooks.preemption import Preemption
from engine.hooks.profiler import Profiler
from engine.hooks.progress import ProgressBar
from engine.hooks.report import Report
from engine.hooks.stop_mixing import StopMixing
from engine.hooks.sub_model_pictures import SubModelPictures
from engine.hooks.writers import WriteRecords

__all__ = [
    "HOOK_REGISTRY",
    "Checkpoint",
    "Evaluation",
    "ExponentialMovingAverage",
    "FrozenStatistics",
    "GradientNorm",
    "LearningRateSchedule",
    "NaNGuard",
    "Preemption",
    "Profiler",
    "ProgressBar",
    "Report",
    "SameBatchNormStatistics",
    "StopMixing",
    "SubModelPictures",
    "UniteBadFiles",
    "WriteRecords",
    "build_own_hooks",
]
