"""Sharpness-aware optimisation as optax gradient transformations, for any JAX loop.

    tx = optax.chain(sam(rho=0.2), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

Independent of the rest of the package: parameters are any pytree, whether they come
from Flax Linen, NNX, Equinox or a plain function.
"""

from samrobust.sharpness.sam import (
    GradFn,
    SamMetrics,
    SamState,
    last_aux,
    last_metrics,
    sam,
)

__all__ = ["GradFn", "SamMetrics", "SamState", "last_aux", "last_metrics", "sam"]
