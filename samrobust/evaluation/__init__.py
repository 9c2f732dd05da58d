"""What a trained network is worth: natural accuracy and accuracy under attack."""

from samrobust.evaluation.accuracy import (
    Archive,
    Evaluator,
    Outcome,
    check_finite,
    make_evaluator,
)
from samrobust.evaluation.autoattack import make_autoattack_evaluator
from samrobust.evaluation.fates import Fates
from samrobust.evaluation.measure import (
    BatchFn,
    Measure,
    OnBatch,
    is_correct,
    make_measure,
    of_name,
)
from samrobust.evaluation.skip_broken import make_skip_broken_evaluator

__all__ = [
    "Archive",
    "BatchFn",
    "Evaluator",
    "Fates",
    "Measure",
    "OnBatch",
    "Outcome",
    "check_finite",
    "is_correct",
    "make_autoattack_evaluator",
    "make_evaluator",
    "make_measure",
    "make_skip_broken_evaluator",
    "of_name",
]
