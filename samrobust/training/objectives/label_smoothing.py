"""Label smoothing: a share of each label is spread over all classes.

Reference: Szegedy et al. (2016), arXiv 1512.00567, Section 7.
"""

import jax
import jax.numpy as jnp

from samrobust.attacks.losses import cross_entropy
from samrobust.checks import share
from samrobust.sharpness.trees import at_least_float32
from samrobust.training.parts import Objective
from samrobust.types import Array, Entry

__all__ = ["ENTRY", "label_smoothing"]


def label_smoothing(alpha: float) -> Objective:
    """Builds the objective (1 - alpha) CE(f(x), y) + (alpha / K) sum_k CE(f(x), k).

    Of the images that are trained on, so that it joins with an adversary, which keeps
    attacking the plain cross entropy. A control for SAM: confidence falls without
    sharpness being looked at. Costs nothing.

    Args:
      alpha: in [0, 1], the share of the uniform distribution over the K classes; 0.1 in
        the paper.

    Returns:
      An objective of one view. **Guarantees**: `alpha=0` is standard training bit for
      bit.

    Raises:
      ValueError: if alpha is out of range.

    Reference: Szegedy et al. (2016), arXiv 1512.00567, Section 7; as
    `torch.nn.CrossEntropyLoss(label_smoothing=alpha)`.
    """
    share(alpha=alpha)
    if alpha == 0:
        return Objective(cross_entropy)

    def loss(logits: Array, labels: Array) -> Array:
        log_p = jax.nn.log_softmax(at_least_float32(logits))
        uniform = -jnp.mean(log_p, axis=-1)
        return (1 - alpha) * cross_entropy(logits, labels) + alpha * uniform

    return Objective(loss)


ENTRY = Entry(
    label_smoothing,
    "label smoothing (alpha = {alpha:g})",
    fields={"alpha": share},
)
