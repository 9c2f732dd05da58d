"""TRADES: trades natural accuracy for a decision boundary away from the data.

Reference: Zhang et al. (2019), arXiv 1901.08573, equation (5).
"""

import functools

import jax
import jax.numpy as jnp

from samrobust import attacks
from samrobust.attacks import Ball, draws
from samrobust.attacks.losses import cross_entropy
from samrobust.checks import amount
from samrobust.sharpness.trees import at_least_float32
from samrobust.training.adversaries.radii import (
    PGD_FIELDS,
    attack_passes,
    check_options,
    check_steps,
    make_ball,
)
from samrobust.training.parts import Adversary, Objective, as_adversary
from samrobust.types import Array, Attack, Entry, LogitsFn

__all__ = [
    "ENTRY",
    "FIELDS",
    "VIEWS",
    "beside",
    "kl_divergence",
    "kl_pgd",
    "trades",
    "trades_loss",
]

VIEWS = ("natural", "adversarial", "natural")  # as the authors' code has them
_START = 1e-3  # standard deviation of the noise that the attack starts from


def kl_divergence(logits: Array, others: Array) -> Array:
    """Returns KL(softmax(logits) || softmax(others)) of each example, [B].

    Args:
      logits: [B, K].
      others: [B, K].
    """
    log_p, log_q = (jax.nn.log_softmax(at_least_float32(z)) for z in (logits, others))
    p = jnp.exp(log_p)
    # Classes that p rules out, with a logit of -inf, have no part in it.
    log_p, log_q = (jnp.where(p > 0, log, 0.0) for log in (log_p, log_q))
    return jnp.sum(p * (log_p - log_q), axis=-1)


def beside(ball: Ball) -> Ball:
    """Returns the ball with starts at 0.001 N(0, 1), beside the image itself."""

    def sample(key: Array, shape: tuple[int, ...]) -> Array:
        return _START * draws.normal(key, shape)

    return ball._replace(sample=sample)


def trades_loss(beta: float) -> Objective:
    """Builds the objective CE(f(x), y) + beta KL(f(x) || f(x')).

    Args:
      beta: >= 0; 0 is standard training. The authors' is 6.

    Returns:
      An objective of three views, as the authors' code has three forward passes, of
      which the last repeats the first: BatchNorm's statistics are updated by x, x' and
      x. Gradients flow through both arguments of KL.

    Raises:
      ValueError: if beta is negative or not finite.

    Reference: Zhang et al. (2019), arXiv 1901.08573, equation (5), as in their code.
    """
    amount(beta=beta)
    if beta == 0:
        return Objective(cross_entropy, ("natural",))

    def loss(natural: Array, adversarial: Array, again: Array, labels: Array) -> Array:
        divergence = kl_divergence(again, adversarial)
        return cross_entropy(natural, labels) + beta * divergence

    return Objective(loss, VIEWS)


def kl_pgd(ball: Ball, *, step_size: float, num_steps: int) -> Attack:
    """Builds the attack that maximizes KL(f(x) || f(x')) over x' in a ball.

    Args:
      ball: of the perturbations.
      step_size: in pixel units.
      num_steps: of PGD, from x + 0.001 N(0, 1).

    Raises:
      ValueError: as `pgd`.

    Reference: Zhang et al. (2019), arXiv 1901.08573, Algorithm 1. *Our deviation*: the
    start lies in the ball and in the box; in l2 steps are normalized as PGD's are,
    where their code has an SGD optimizer.
    """
    ascend = functools.partial(
        attacks.pgd, beside(ball), step_size=step_size, num_steps=num_steps
    )
    ascend()  # refuses now what it would refuse at every call

    def attack(
        logits_fn: LogitsFn, images: Array, labels: Array, *, key: Array
    ) -> Array:
        natural = jax.lax.stop_gradient(logits_fn(images))

        def divergence(logits: Array, labels: Array) -> Array:
            del labels
            return kl_divergence(natural, logits)

        return ascend(loss=divergence)(logits_fn, images, labels, key=key)

    return attack


def trades(
    norm: str,
    epsilon: float,
    beta: float,
    step_size: float,
    num_steps: int = 10,
    batch_norm: str = "eval",
    gradient_floor: float = 128e-10,
) -> tuple[Adversary, Objective]:
    """Builds the adversary and the objective of TRADES.

    Args:
      norm: `linf` or `l2`.
      epsilon: radius in 1/255 units; the authors' is 0.031 of 1, near 8.
      beta: >= 0, see `trades_loss`.
      step_size: in 1/255 units; the authors' is 0.007 of 1, near 2.
      num_steps: of the attack.
      batch_norm: see `Adversary`; `eval` in the authors' code.
      gradient_floor: see `samrobust.attacks.l2`.

    Returns:
      `kl_pgd`, lifted, and `trades_loss`.

    Raises:
      ValueError: for a value out of range.

    Reference: Zhang et al. (2019), arXiv 1901.08573, equation (5) and Algorithm 1, as
    in their code, yaodongyu/TRADES. *Our deviation*: as of `kl_pgd`.
    """
    check_steps(norm, epsilon, step_size)
    attack = kl_pgd(
        make_ball(norm, epsilon, gradient_floor),
        step_size=step_size / 255,
        num_steps=num_steps,
    )
    return as_adversary(attack, batch_norm=batch_norm), trades_loss(beta)


FIELDS = {**PGD_FIELDS, "beta": amount}
ENTRY = Entry(
    trades,
    "TRADES ({norm}, eps = {eps:g}/255, beta = {beta:g})",
    options={"norm": "norm", "eps": "epsilon", "beta": "beta"},
    fields=FIELDS,
    attack_passes=lambda values: attack_passes(values) + 1 / 3,
    check=check_options,
)
