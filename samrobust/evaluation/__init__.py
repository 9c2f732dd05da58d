"""What a trained network is worth: natural accuracy and accuracy under attack."""

from samrobust.evaluation.autoattack import make_autoattack_evaluator
from samrobust.evaluation.early_stop import make_early_stop_evaluator
from samrobust.evaluation.evaluate import (
    Evaluator,
    accuracies,
    check_finite,
    make_evaluator,
    warn_of_non_finite,
)
from samrobust.evaluation.measure import (
    BatchFn,
    Measure,
    is_correct,
    is_finite,
    make_measure,
    of_name,
)
from samrobust.evaluation.outcome import Outcome

__all__ = [
    "BatchFn",
    "Evaluator",
    "Measure",
    "Outcome",
    "accuracies",
    "check_finite",
    "is_correct",
    "is_finite",
    "make_autoattack_evaluator",
    "make_early_stop_evaluator",
    "make_evaluator",
    "make_measure",
    "of_name",
    "warn_of_non_finite",
]
