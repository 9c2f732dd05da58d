"""Why a network is robust: flatness, confidence, margin, measured on any JAX model.

Of a loss in its weights, `loss_fn(params)`: `worst_case_sharpness`,
`average_sharpness`, `hessian_eigenvalues`, `hessian_trace`. Of what a network says:
`relative_flatness`, `logit_norm`, `logit_gap`. Around its images:
`input_gradient_norm`, `local_linearity_error`, `boundary_distance`.

`samrobust sharpness` measures all finished runs of a table (`probe`), and holds the
measures against robust accuracy (`findings`); docs/flatness.md explains it.
"""

from samrobust.studies.sharpness.hessian import hessian_eigenvalues, hessian_trace
from samrobust.studies.sharpness.inputs import (
    boundary_distance,
    input_gradient_norm,
    local_linearity_error,
)
from samrobust.studies.sharpness.outputs import (
    logit_gap,
    logit_norm,
    relative_flatness,
)
from samrobust.studies.sharpness.perturbations import (
    average_sharpness,
    worst_case_sharpness,
)

__all__ = [
    "average_sharpness",
    "boundary_distance",
    "hessian_eigenvalues",
    "hessian_trace",
    "input_gradient_norm",
    "local_linearity_error",
    "logit_gap",
    "logit_norm",
    "relative_flatness",
    "worst_case_sharpness",
]
