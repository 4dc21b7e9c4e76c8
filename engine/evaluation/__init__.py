"""What a model is worth on held-out images, each counted exactly once whatever the number of processes."""

from engine.evaluation.loop import evaluate, measure

__all__ = ["evaluate", "measure"]
