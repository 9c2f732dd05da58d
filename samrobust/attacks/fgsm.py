"""The fast gradient method: one step of full length from the image itself."""

from samrobust.attacks.balls import Ball
from samrobust.attacks.losses import cross_entropy
from samrobust.attacks.pgd import pgd
from samrobust.checks import check
from samrobust.types import CheckedAttack, LossFn

__all__ = ["fgsm"]


def fgsm(
    ball: Ball,
    *,
    loss: LossFn = cross_entropy,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds the fast gradient sign method, and its l2 form.

    `x + radius * steepest_ascent(grad loss(x))`, clipped to the box: with `linf` the
    sign of the gradient, with `l2` the gradient at unit length. A quick look at a
    network and a check of its gradients; no measure of robustness.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      loss: what is maximized, per example.
      box: the range of pixel values.

    Returns:
      As from `pgd`, with its guarantees; nothing is random.

    Raises:
      ValueError: as `pgd` does.

    Reference: Goodfellow et al. (2015), arXiv 1412.6572.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from samrobust.attacks import linf
    >>> images, labels = jnp.array([[0.5, 0.25]]), jnp.array([0])
    >>> fgsm(linf(0.25))(lambda x: x, images, labels, key=jax.random.key(0))
    Array([[0.25, 0.5 ]], dtype=float32)
    """
    check(isinstance(ball, Ball), "a ball from `linf` or `l2`", ball=ball)
    return pgd(
        ball,
        step_size=ball.radius,
        num_steps=1,
        random_start=False,
        loss=loss,
        box=box,
    )
