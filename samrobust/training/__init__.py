"""Training: the state, the one step, the compiled epoch, checkpoints, the loop."""

from samrobust.training.history import TrainingDivergedError
from samrobust.training.loop import InterruptedRunError, Outcome, Progress, train
from samrobust.training.saved import Network, load_network, save_variables
from samrobust.training.state import TrainState, init_state
from samrobust.training.step import TrainStep, make_train_step

__all__ = [
    "InterruptedRunError",
    "Network",
    "Outcome",
    "Progress",
    "TrainState",
    "TrainStep",
    "TrainingDivergedError",
    "init_state",
    "load_network",
    "make_train_step",
    "save_variables",
    "train",
]
