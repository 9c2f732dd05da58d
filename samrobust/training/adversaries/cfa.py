"""CFA: every class is attacked as far as its own robust accuracy suggests.

Reference: Wei et al. (2023), "CFA: Class-wise Calibrated Fair Adversarial Training",
arXiv 2303.14460.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust import attacks
from samrobust.attacks import linf
from samrobust.checks import BATCH_NORM, check, check_choice, check_radius, count, share
from samrobust.training.adversaries.radii import (
    PGD_FIELDS,
    attack_passes,
    check_alpha,
    check_extent,
    check_options,
)
from samrobust.training.parts import Adversary
from samrobust.training.phases import first_epoch
from samrobust.types import Array, Attack, Entry, LogitsFn, PyTree

__all__ = ["ENTRY", "FIELDS", "ClassRates", "cfa", "class_wise"]


class ClassRates(NamedTuple):
    """Memory of `cfa`.

    Attributes:
      rates: robust accuracy of each class on the images trained on, over the epoch
        before, float32 [K] in [0, 1].
      correct: right ones in this epoch so far, float32 [K].
      seen: examples in this epoch so far, float32 [K].
      step: number of steps so far, int32.
    """

    rates: Array
    correct: Array
    seen: Array
    step: Array


def class_wise(
    make_attack: Callable[[Any], Attack],
    strength: float,
    *,
    base: float,
    begin: float,
    batch_norm: str,
    num_classes: int,
    steps_per_epoch: int,
    total_steps: int,
) -> tuple[Adversary, Callable[[ClassRates, float, float], Array]]:
    """Builds an adversary whose strength follows the robust accuracy of each class.

    Args:
      make_attack: of the strengths [B], the attack.
      strength: of a class before `begin`; from there on times base + R_k.
      base: >= 0, added to R_k.
      begin: the fraction of the epochs, rounded up to whole ones, 1 at least.
      batch_norm: see `Adversary`.
      num_classes: K; with a network of another number, `perturb` raises `ValueError`.
      steps_per_epoch: of the training.
      total_steps: of it.

    Returns:
      The adversary, with a `ClassRates`; and the function from that, a base and a
      strength to the strength of each class, [K].
    """
    check_choice(BATCH_NORM, batch_norm=batch_norm)
    count(num_classes=num_classes)
    count(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    make_attack(np.full(1, strength, np.float32))  # refuses now what it would later
    first = max(1, first_epoch(begin, total_steps // steps_per_epoch))

    def of_classes(state: ClassRates, base: float, strength: float) -> Array:
        calibrated = state.step // steps_per_epoch >= first
        return strength * jnp.where(calibrated, base + state.rates, 1.0)

    def init(images: Array) -> ClassRates:
        del images
        zeros = [jnp.zeros(num_classes, jnp.float32) for _ in range(3)]
        return ClassRates(*zeros, step=jnp.zeros([], jnp.int32))

    def perturb(
        logits_fn: LogitsFn, images: Array, labels: Array, state: PyTree, *, key: Array
    ) -> tuple[Array, PyTree]:
        logits = jax.eval_shape(logits_fn, images)
        wanted = f"num_classes={logits.shape[-1]}, of the network's logits"
        check(logits.shape[-1] == num_classes, wanted, num_classes=num_classes)
        attack = make_attack(of_classes(state, base, strength)[labels])
        return attack(logits_fn, images, labels, key=key), state

    def learn(
        state: PyTree, images: Array, labels: Array, gradients: Array, correct: Array
    ) -> PyTree:
        del images, gradients
        of_class = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        right = state.correct + jnp.sum(of_class * correct[:, None], axis=0)
        seen = state.seen + jnp.sum(of_class, axis=0)
        step = state.step + 1
        ends = step % steps_per_epoch == 0
        # R_k of this epoch; a class without examples keeps its own.
        rates = jnp.where(ends & (seen > 0), right / jnp.maximum(seen, 1), state.rates)
        kept = 1.0 - ends
        return ClassRates(rates, kept * right, kept * seen, step)

    return Adversary(perturb, init, learn, batch_norm=batch_norm), of_classes


def cfa(
    epsilon: float,
    alpha: float = 0.25,
    num_steps: int = 10,
    base: float = 0.5,
    begin: float = 0.05,
    batch_norm: str = "train",
    *,
    num_classes: int,
    steps_per_epoch: int,
    total_steps: int,
) -> Adversary:
    """Builds class-wise calibrated margins: PGD in a ball of radius eps (base + R_k).

    R_k is the robust accuracy of class k on the images trained on, over the epoch
    before. Costs what PGD does, 2/3 of a pass with weight gradients a step. The
    authors' third part, fairness-aware weight averaging, joins as `fawa`.

    Args:
      epsilon: radius in 1/255 units, in the l-inf norm.
      alpha: the step in radii epsilon, for every class.
      num_steps: of PGD.
      base: lambda_1 >= 0; the authors' is 0.5.
      begin: the fraction of the epochs before R_k counts, one epoch at least; theirs is
        10 of 200 epochs.
      batch_norm: see `Adversary`.
      num_classes: of the data.
      steps_per_epoch: of the training.
      total_steps: of it.

    Returns:
      An adversary whose memory is a `ClassRates`.

    Raises:
      ValueError: for a value out of range.

    Reference: Wei et al. (2023), arXiv 2303.14460, as their code, PKU-ML/CFA. *Our
    deviation*: R_k is a share of the examples of class k, in their code of a tenth of
    all examples.
    """
    check_radius("linf", epsilon=epsilon)
    check_alpha(alpha=alpha)
    check_extent(base=base)
    share(begin=begin)
    radius = epsilon / 255

    def make_attack(radii: Array) -> Attack:
        return attacks.pgd(linf(radii), step_size=alpha * radius, num_steps=num_steps)

    adversary, _ = class_wise(
        *(make_attack, radius),
        base=base,
        begin=begin,
        batch_norm=batch_norm,
        num_classes=num_classes,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
    )
    return adversary


FIELDS = {
    "epsilon": PGD_FIELDS["epsilon"],
    "alpha": check_alpha,
    "num_steps": PGD_FIELDS["num_steps"],
    "base": check_extent,
    "begin": share,
    "batch_norm": PGD_FIELDS["batch_norm"],
}
ENTRY = Entry(
    cfa,
    "CFA (eps = {eps:g}/255)",
    options={"eps": "epsilon"},
    fields=FIELDS,
    attack_passes=attack_passes,
    check=check_options,
)
