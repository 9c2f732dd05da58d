"""Measures of how sharp a minimum is, for any loss and any JAX model.

Of a loss in its weights, `loss_fn(params)`: `worst_case_sharpness`,
`average_sharpness`, `hessian_eigenvalues`, `hessian_trace`. Of what a network says:
`relative_flatness`, and how confident it is, `logit_norm` and `logit_gap`.

Measures around images are attacks' (`samrobust.attacks.margins`); `samrobust sharpness`
measures all of them on finished runs, and docs/flatness.md explains them.
"""

from samrobust.sharpness.measures.hessian import hessian_eigenvalues, hessian_trace
from samrobust.sharpness.measures.outputs import (
    logit_gap,
    logit_norm,
    relative_flatness,
)
from samrobust.sharpness.measures.perturbations import (
    ParamsLoss,
    average_sharpness,
    worst_case_sharpness,
)

__all__ = [
    "ParamsLoss",
    "average_sharpness",
    "hessian_eigenvalues",
    "hessian_trace",
    "logit_gap",
    "logit_norm",
    "relative_flatness",
    "worst_case_sharpness",
]
