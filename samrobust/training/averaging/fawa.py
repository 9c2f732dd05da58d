"""Fairness-aware weight averaging: epochs that fail a class do not count.

Reference: Wei et al. (2023), "CFA: Class-wise Calibrated Fair Adversarial Training",
arXiv 2303.14460, Section 4.3.
"""

import jax.numpy as jnp

from samrobust.checks import below_one, share
from samrobust.training.averaging.ema import exact, mix
from samrobust.training.parts import Averaging
from samrobust.types import Array, Entry, PyTree

__all__ = ["ENTRY", "fawa"]


def fawa(threshold: float, decay: float = 0.88) -> Averaging:
    """Builds a <- decay a + (1 - decay) w after each epoch in which min_k R_k suffices.

    R_k is the accuracy of w on the held-out images of class k, under the attack of the
    training where it has one: `validation_worst_class` in the log, in percent. Costs an
    evaluation of w on the held-out images an epoch, and no pass of the training.

    Args:
      threshold: in [0, 1], the least min_k R_k of an epoch that counts; 0.24 in the
        authors' code, 0.2 in their example for adversarial training at 8/255.
      decay: in [0, 1).

    Returns:
      An averaging of all variables, including BatchNorm's running statistics. The first
      epoch that counts is copied; before, it is the last weights. **Guarantees**: with
      a threshold of 0 it is `ema(decay)` of the weights after each epoch bit for bit.

    Raises:
      ValueError: for a value out of range.

    Reference: Wei et al. (2023), arXiv 2303.14460, Section 4.3, as their code,
    PKU-ML/CFA. *Our deviation*: before an epoch has counted, their average is the
    weights of another initialization; R_k is a share of the held-out images of class k,
    in their code of a tenth of all; classes without one do not count.
    """
    share(threshold=threshold)
    below_one(decay=decay)

    def init(variables: PyTree) -> PyTree:
        return {**exact(variables), "begun": jnp.zeros([], bool)}

    def update(average: PyTree, variables: PyTree, step: Array) -> PyTree:
        del step
        return _mixed(average, variables, jnp.where(average["begun"], 1.0, 0.0))

    def admit(average: PyTree, variables: PyTree, worst: Array) -> PyTree:
        admitted, begun = worst >= threshold, average["begun"]
        kept = jnp.where(begun, decay, 0.0)
        average = _mixed(average, variables, jnp.where(admitted, kept, 1.0))
        return {**average, "begun": begun | admitted}

    return Averaging(init, update, admit=admit)


def _mixed(average: PyTree, variables: PyTree, kept: Array) -> PyTree:
    weights = {name: average[name] for name in variables}
    return {**average, **mix(weights, variables, kept)}


ENTRY = Entry(
    fawa,
    "FAWA (threshold = {threshold:g})",
    fields={
        "threshold": share,
        "decay": below_one,
    },
)
