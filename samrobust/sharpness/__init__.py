"""Sharpness-aware optimization as optax gradient transformations, for any JAX loop.

    tx = optax.chain(sam(rho=0.2), optax.sgd(0.1, momentum=0.9))
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)

Independent of the rest of the package: parameters are any pytree, whether they come
from Flax Linen, NNX, Equinox or a plain function. Your own method is a `two_pass`
with another ascent, or any optax transformation that takes `grad_fn`.
"""

from samrobust.sharpness.asam import asam
from samrobust.sharpness.asam_davda import asam_davda
from samrobust.sharpness.awp import awp
from samrobust.sharpness.entropy_sgd import entropy_sgd
from samrobust.sharpness.esam import esam
from samrobust.sharpness.fisher_sam import fisher_sam
from samrobust.sharpness.friendly_sam import friendly_sam
from samrobust.sharpness.fsam import fsam
from samrobust.sharpness.gsam import gsam
from samrobust.sharpness.looksam import looksam
from samrobust.sharpness.msam import msam
from samrobust.sharpness.rwp import rwp
from samrobust.sharpness.sam import sam
from samrobust.sharpness.sam_on import sam_on
from samrobust.sharpness.ssam import ssam
from samrobust.sharpness.state import (
    OffsetState,
    TwoPassMetrics,
    TwoPassState,
    gradient_point,
    last_aux,
    last_metrics,
)
from samrobust.sharpness.two_pass import GradFn, two_pass

__all__ = [
    "SHARPNESS",
    "GradFn",
    "OffsetState",
    "TwoPassMetrics",
    "TwoPassState",
    "asam",
    "asam_davda",
    "awp",
    "entropy_sgd",
    "esam",
    "fisher_sam",
    "friendly_sam",
    "fsam",
    "gradient_point",
    "gsam",
    "last_aux",
    "last_metrics",
    "looksam",
    "msam",
    "rwp",
    "sam",
    "sam_on",
    "ssam",
    "two_pass",
]

# By their names in rows of tables.
SHARPNESS = {
    "sam": "samrobust.sharpness.sam:ENTRY",
    "asam": "samrobust.sharpness.asam:ENTRY",
    "asam_davda": "samrobust.sharpness.asam_davda:ENTRY",
    "awp": "samrobust.sharpness.awp:ENTRY",
    "rwp": "samrobust.sharpness.rwp:ENTRY",
    "gsam": "samrobust.sharpness.gsam:ENTRY",
    "friendly_sam": "samrobust.sharpness.friendly_sam:ENTRY",
    "msam": "samrobust.sharpness.msam:ENTRY",
    "looksam": "samrobust.sharpness.looksam:ENTRY",
    "esam": "samrobust.sharpness.esam:ENTRY",
    "sam_on": "samrobust.sharpness.sam_on:ENTRY",
    "fisher_sam": "samrobust.sharpness.fisher_sam:ENTRY",
    "fsam": "samrobust.sharpness.fsam:ENTRY",
    "ssam": "samrobust.sharpness.ssam:ENTRY",
    "entropy_sgd": "samrobust.sharpness.entropy_sgd:ENTRY",
}
