"""Section 4 of the paper, checked: robust and non-robust features in a linear world.

What ST, AT and SAM do to the weight of the robust feature: as formulas, printed and
corrected (`closed_forms`), as direct minima of the exact loss (`population`), and
trained (`experiment`). `samrobust theory` puts them side by side; docs/theory.md
derives them.
"""

from samrobust.theory.closed_forms import (
    adversarial_weight,
    adversarial_weight_all_features,
    all_weights_coefficient,
    equal_attack_radius,
    equal_attack_radius_corrected,
    equal_attack_radius_printed,
    sam_weight,
    sam_weight_bounds,
    sam_weight_corrected,
    sam_weight_printed,
    standard_weight,
)
from samrobust.theory.grid import Grid, study
from samrobust.theory.logistic import SamLogistic, logistic_weight
from samrobust.theory.population import (
    accuracy,
    adversarial,
    minimise,
    natural,
    sam_all_weights,
    sam_robust_weight,
)
from samrobust.theory.verdicts import judge
from samrobust.theory.world import World, sample

__all__ = [
    "Grid",
    "SamLogistic",
    "World",
    "accuracy",
    "adversarial",
    "adversarial_weight",
    "adversarial_weight_all_features",
    "all_weights_coefficient",
    "equal_attack_radius",
    "equal_attack_radius_corrected",
    "equal_attack_radius_printed",
    "judge",
    "logistic_weight",
    "minimise",
    "natural",
    "sam_all_weights",
    "sam_robust_weight",
    "sam_weight",
    "sam_weight_bounds",
    "sam_weight_corrected",
    "sam_weight_printed",
    "sample",
    "standard_weight",
    "study",
]
