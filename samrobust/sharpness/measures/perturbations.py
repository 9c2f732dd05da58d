"""Sharpness: how far the loss rises when weights are perturbed.

A loss is a function `loss_fn(params)` of a pytree of floating arrays to a number, over
examples that are held fixed, with BatchNorm in evaluation mode. Perturbations are of
all leaves at once.

Reference: Andriushchenko, Croce, Mueller, Hein and Flammarion (2023), "A Modern Look at
the Relationship between Sharpness and Generalization", arXiv 2302.07011.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from samrobust.checks import check_real, check_whole
from samrobust.sharpness.trees import at_least_float32, norm, normal_like
from samrobust.types import Array, PyTree

__all__ = ["ParamsLoss", "average_sharpness", "worst_case_sharpness"]

ParamsLoss = Callable[[PyTree], Array]


def worst_case_sharpness(
    loss_fn: ParamsLoss,
    params: PyTree,
    *,
    rho: float,
    num_steps: int = 10,
    adaptive: bool = False,
    key: Array,
) -> Array:
    """Returns the largest rise of the loss in a ball around the weights.

        max L(w + e) - L(w)   over   || e / c ||_2 <= rho,   c = |w| if adaptive, else 1

    Found by SAM's ascent, repeated: `e <- rho c^2 g / ||c g||` with `g` the gradient at
    `w + e`, from `e = 0` on. The first of these is what SAM descends by, ASAM's if
    adaptive.

    Args:
      loss_fn: see the module.
      params: the weights w.
      rho: radius >= 0, in the unit of the weights; adaptive: a fraction of each.
      num_steps: number of perturbations tried, >= 1; a gradient each, and one more.
      adaptive: scale the ball by `|w|`, elementwise. A weight of 0 then stays.
      key: of the direction to begin with where the gradient is exactly zero.

    Returns:
      A number, in the unit of the loss. **Guarantees.** Not negative, not less with
      more steps, 0 for a radius of 0; at most the maximum, which it reaches where the
      loss is linear. Where the loss is not finite, neither is it.

    Raises:
      ValueError: if an argument is outside its range.

    Reference: Andriushchenko et al. (2023), arXiv 2302.07011, the worst-case l2
    sharpness. *Our deviation*: they search by APGD, and average over batches where
    `loss_fn` has all examples.

    >>> slope = lambda w: jnp.sum(jnp.array([3.0, 4.0]) * w)
    >>> worst_case_sharpness(slope, jnp.zeros(2), rho=0.1, key=jax.random.key(0))
    Array(0.5, dtype=float32)
    """
    check_real(0, float("inf"), rho=rho)
    check_whole(1, num_steps=num_steps)
    scale = _scale(params, adaptive=adaptive)
    value_and_grad = jax.value_and_grad(loss_fn)

    def uphill(grads: PyTree, otherwise: PyTree) -> PyTree:
        """Returns u = c g / ||c g||, the unit direction in which c u rises fastest."""
        # Of complex weights, too, of which JAX gives the conjugate.
        scaled = jax.tree.map(lambda c, g: c * jnp.conj(g), scale, grads)
        length = norm(scaled)
        return jax.tree.map(
            lambda s, o: jnp.where(length > 0, s / jnp.where(length > 0, length, 1), o),
            scaled,
            otherwise,
        )

    def step(_: Array, carry: tuple[PyTree, Array]) -> tuple[PyTree, Array]:
        direction, worst = carry
        moved = _moved(params, scale, direction, rho)
        loss, grads = value_and_grad(moved)
        return uphill(grads, direction), jnp.maximum(worst, loss)

    start, grads = value_and_grad(params)
    noise = normal_like(scale, key)
    direction = uphill(grads, uphill(noise, noise))
    _, worst = jax.lax.fori_loop(0, num_steps, step, (direction, start))
    return worst - start


def average_sharpness(
    loss_fn: ParamsLoss,
    params: PyTree,
    *,
    sigma: float,
    num_samples: int = 20,
    adaptive: bool = False,
    key: Array,
) -> Array:
    """Returns the mean rise of the loss under Gaussian noise on the weights.

        E L(w + sigma c z) - L(w)   over   z ~ N(0, I),   c = |w| if adaptive, else 1

    Each draw counts with both signs, so that the loss's slope cancels and what is left
    is its curvature: to second order `sigma^2 / 2` times the trace of `c H c`.

    Args:
      loss_fn: see the module.
      params: the weights w.
      sigma: standard deviation >= 0, in the unit of the weights; adaptive: a fraction
        of each.
      num_samples: number of draws, >= 1; two forward passes each.
      adaptive: noise in proportion to `|w|`.
      key: of the noise.

    Returns:
      A number, in the unit of the loss; negative where the loss curves downwards. An
      unbiased estimate.

    Raises:
      ValueError: if an argument is outside its range.

    Reference: Andriushchenko et al. (2023), arXiv 2302.07011, the average-case
    sharpness. *Our deviation*: the pairs of signs.

    >>> bowl = lambda w: jnp.sum(w**2)  # it rises by sigma^2 for each weight
    >>> options = {"sigma": 0.1, "num_samples": 9999, "key": jax.random.key(0)}
    >>> average_sharpness(bowl, jnp.zeros(2), **options).round(3)
    Array(0.02, dtype=float32)
    """
    check_real(0, float("inf"), sigma=sigma)
    check_whole(1, num_samples=num_samples)
    scale, start = _scale(params, adaptive=adaptive), loss_fn(params)

    def rise(key: Array) -> Array:
        noise = normal_like(scale, key)
        losses = [loss_fn(_moved(params, scale, noise, s)) for s in (sigma, -sigma)]
        # Differences first: their mean would be lost in the rounding of the losses'.
        return ((losses[0] - start) + (losses[1] - start)) / 2

    return jnp.mean(jax.lax.map(rise, jax.random.split(key, num_samples)))


def _scale(params: PyTree, *, adaptive: bool) -> PyTree:
    """Returns c: `|w|`, or ones."""
    size = jnp.abs if adaptive else jnp.ones_like
    return jax.tree.map(lambda w: size(at_least_float32(w)), params)


def _moved(params: PyTree, scale: PyTree, direction: PyTree, length: float) -> PyTree:
    """Returns w + length c u."""
    return jax.tree.map(
        lambda w, c, u: (w + length * c * u).astype(w.dtype), params, scale, direction
    )
