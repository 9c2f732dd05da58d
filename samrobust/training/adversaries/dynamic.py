"""Dynamic adversarial training: an attack that converges better as training proceeds.

Reference: Wang et al. (2019), arXiv 2112.08304, Algorithm 1.
"""

import functools

import jax
import jax.numpy as jnp

from samrobust.attacks import linf, staged_pgd
from samrobust.attacks.balls import into_set
from samrobust.attacks.calls import Call, attack_of
from samrobust.attacks.losses import cross_entropy
from samrobust.attacks.per_example import spread
from samrobust.checks import (
    BATCH_NORM,
    amount,
    check_choice,
    check_radius,
    check_real,
    count,
)
from samrobust.training.adversaries.radii import (
    PGD_FIELDS,
    attack_passes,
    check_alpha,
    check_options,
)
from samrobust.training.parts import Adversary
from samrobust.types import Array, Entry, LogitsFn, PyTree

__all__ = ["ENTRY", "dynamic", "first_order_condition"]

_BOX = (0.0, 1.0)


_end = functools.partial(check_real, 1e-6, 1)


def first_order_condition(gradients: Array, delta: Array, radius: float) -> Array:
    """Returns max <v - d, g> over v in the ball, eps ||g||_1 - <d, g>, [B].

    Not negative for d in the ball, and 0 where it is a corner that a step does not
    leave: the smaller, the better the attack has converged.

    Args:
      gradients: g, of each example's loss, [B, ...].
      delta: d, [B, ...].
      radius: eps, in pixel units.
    """
    axes = tuple(range(1, delta.ndim))
    return jnp.sum(radius * jnp.abs(gradients) - delta * gradients, axis=axes)


def dynamic(
    epsilon: float,
    alpha: float = 0.25,
    num_steps: int = 10,
    c_max: float = 0.5,
    end: float = 100 / 120,
    batch_norm: str = "train",
    *,
    steps_per_epoch: int,
    total_steps: int,
) -> Adversary:
    """Builds PGD that leaves an example once its FOSC is at most c_t.

    c_t = max(0, c_max (1 - t / T)) in epoch t = 0, 1, ..; one step is always taken.
    FOSC is `first_order_condition`. Costs what PGD does, 2/3 of a pass a step: no
    program runs shorter for the examples that stand still.

    Args:
      epsilon: radius in 1/255 units, in the l-inf norm.
      alpha: the step in radii.
      num_steps: at most.
      c_max: >= 0, the bound in the first epoch; 0: PGD.
      end: in (0, 1], T as a fraction of the epochs: full PGD from there on.
      batch_norm: see `Adversary`.
      steps_per_epoch: of the training.
      total_steps: of it.

    Returns:
      An adversary whose memory is the number of steps so far. **Guarantees**: `c_max=0`
      gives the images of `at` bit for bit.

    Raises:
      ValueError: for a value out of range.

    Reference: Wang et al. (2019), arXiv 2112.08304, Algorithm 1; defaults are theirs.
    *Our deviation* from their code, YisenWang/dynamic_adv_training: d is counted from
    the image, as in the paper, and not from the random start; examples are not weighted
    by their loss, which the paper does not have.
    """
    check_radius("linf", epsilon=epsilon)
    check_alpha(alpha=alpha)
    amount(c_max=c_max)
    _end(end=end)
    check_choice(BATCH_NORM, batch_norm=batch_norm)
    count(steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    radius = epsilon / 255
    ball, step_size = linf(radius), alpha * radius
    pieces = staged_pgd(ball, step_size=step_size, num_steps=num_steps)
    last = end * total_steps / steps_per_epoch

    def attacked(call: Call, bound: Array) -> Array:
        def total_loss(current: Array) -> Array:
            return jnp.sum(cross_entropy(call.logits_fn(current), call.labels))

        def step(number: Array, current: Array) -> Array:
            gradient = jax.grad(total_loss)(current)
            moved = current + step_size * ball.steepest_ascent(gradient)
            moved = into_set(moved, call.images, ball, _BOX)
            fosc = first_order_condition(gradient, current - call.images, radius)
            goes_on = (fosc > bound) | (bound == 0) | (number == 0)
            return jnp.where(spread(goes_on, current), moved, current)

        start = pieces.start(call.images, call.labels, 0, key=call.key)
        return jax.lax.fori_loop(0, num_steps, step, start)

    def perturb(
        logits_fn: LogitsFn, images: Array, labels: Array, state: PyTree, *, key: Array
    ) -> tuple[Array, PyTree]:
        epoch = state // steps_per_epoch
        bound = jnp.maximum(0.0, c_max * (1 - epoch / last))
        attack = attack_of(lambda call: attacked(call, bound), box=_BOX, ball=ball)
        return attack(logits_fn, images, labels, key=key), state + 1

    return Adversary(perturb, lambda _: jnp.zeros([], jnp.int32), batch_norm=batch_norm)


ENTRY = Entry(
    dynamic,
    "Dynamic AT (eps = {eps:g}/255)",
    options={"eps": "epsilon"},
    fields={
        "epsilon": PGD_FIELDS["epsilon"],
        "alpha": check_alpha,
        "num_steps": PGD_FIELDS["num_steps"],
        "c_max": amount,
        "end": _end,
        "batch_norm": PGD_FIELDS["batch_norm"],
    },
    attack_passes=attack_passes,
    check=check_options,
)
