"""Training: what a method is composed of, the one step, the epoch, the loop.

method = make_train_step(model, tx, adversary=..., objective=...)
outcome = fit(method, split, epochs=20, batch_size=64, key=key)
"""

from samrobust.training.fit import FitResult, InterruptedRunError, Progress, fit
from samrobust.training.log import RunFolder, RunLog, TrainingDivergedError
from samrobust.training.parts import (
    Adversary,
    Averaging,
    Objective,
    as_adversary,
)
from samrobust.training.state import TrainState
from samrobust.training.step import Method, TrainStep, make_train_step

__all__ = [
    "Adversary",
    "Averaging",
    "FitResult",
    "InterruptedRunError",
    "Method",
    "Objective",
    "Progress",
    "RunFolder",
    "RunLog",
    "TrainState",
    "TrainStep",
    "TrainingDivergedError",
    "as_adversary",
    "fit",
    "make_train_step",
]
