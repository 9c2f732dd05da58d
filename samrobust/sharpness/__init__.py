"""Sharpness-aware optimization as optax gradient transformations, for any JAX loop.

    tx = optax.chain(sam(rho=0.2), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

Independent of the rest of the package: parameters are any pytree, whether they come
from Flax Linen, NNX, Equinox or a plain function. Your own method is a `two_pass`
with another ascent, or any optax transformation that takes `grad_fn`.
"""

from samrobust.sharpness.asam import asam
from samrobust.sharpness.awp import awp
from samrobust.sharpness.sam import sam
from samrobust.sharpness.two_pass import (
    GradFn,
    TwoPassMetrics,
    TwoPassState,
    last_aux,
    last_metrics,
    two_pass,
)

__all__ = [
    "SHARPNESS",
    "GradFn",
    "TwoPassMetrics",
    "TwoPassState",
    "asam",
    "awp",
    "last_aux",
    "last_metrics",
    "sam",
    "two_pass",
]

# By their names in rows of tables.
SHARPNESS = {
    "sam": "samrobust.sharpness.sam:ENTRY",
    "asam": "samrobust.sharpness.asam:ENTRY",
    "awp": "samrobust.sharpness.awp:ENTRY",
}
