"""What a trained network is worth: natural accuracy and accuracy under attack."""

from samrobust.evaluation.autoattack import make_autoattack_evaluator
from samrobust.evaluation.early_stop import make_early_stop_evaluator
from samrobust.evaluation.evaluate import Evaluator, accuracies, make_evaluator
from samrobust.evaluation.measure import BatchFn, Measure, make_measure
from samrobust.evaluation.outcome import Outcome

__all__ = [
    "BatchFn",
    "Evaluator",
    "Measure",
    "Outcome",
    "accuracies",
    "make_autoattack_evaluator",
    "make_early_stop_evaluator",
    "make_evaluator",
    "make_measure",
]
