"""The Hessian of a loss in its weights, seen through its products with vectors.

For a loss over a pytree of weights, as in `perturbations`. A product takes two reverse
passes, one through the other, since networks with gradients of their own making (our
convolution, `jax.custom_vjp`) have no forward mode; it costs about three gradients.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from samrobust.checks import check_whole
from samrobust.sharpness.measures.perturbations import ParamsLoss
from samrobust.sharpness.trees import at_least_float32, norm
from samrobust.types import Array, PyTree

__all__ = ["hessian_eigenvalues", "hessian_trace"]

_BREAKDOWN = 100  # units of rounding: what is left of a product is then noise


def hessian_eigenvalues(
    loss_fn: ParamsLoss, params: PyTree, *, num_steps: int = 20, key: Array
) -> Array:
    """Returns Ritz values of the Hessian, by Lanczos; the last one is lambda_max.

    With `q_1` random of unit norm and `q_1, ..., q_m` orthonormal in the Krylov space
    of `q_1`, they are the eigenvalues of the tridiagonal `T = Q^T H Q`.

    Every new vector is made orthogonal to all before it, twice: without that rounding
    brings found eigenvalues back as copies. Memory: `num_steps` times the weights.

    Args:
      loss_fn: a loss of the weights, twice differentiable by reverse mode.
      params: the weights, D in number.
      num_steps: m >= 1, a product with the Hessian each; of D weights at most D.
      key: of the first vector.

    Returns:
      [min(m, D)], rising. **Guarantees.** All lie between the smallest and the largest
      eigenvalue, up to rounding; the last does not fall with more steps, nor the first
      rise. With m >= D these are all eigenvalues, as often as they occur.

    Raises:
      ValueError: if num_steps < 1.

    Reference: Golub and Van Loan (2013), "Matrix Computations", 10.1 to 10.3.

    >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2) / 2
    >>> hessian_eigenvalues(loss, jnp.ones(3), key=jax.random.key(0)).round(3)
    Array([1., 2., 5.], dtype=float32)
    """
    check_whole(1, num_steps=num_steps)
    flat, product = _product(loss_fn, params)
    num_steps = min(num_steps, flat.size)
    first, *keys = jax.random.split(key, num_steps + 1)
    restarts = jnp.stack(keys)

    def orthogonal(vector: Array, basis: Array) -> Array:
        for _ in range(2):  # "twice is enough"
            vector = vector - (basis @ vector) @ basis
        return vector

    def step(
        k: Array, carry: tuple[Array, Array, Array, Array]
    ) -> tuple[Array, Array, Array, Array]:
        basis, diagonal, beside, vector = carry
        basis, image = basis.at[k].set(vector), product(vector)
        diagonal = diagonal.at[k].set(jnp.sum(vector * image))
        rest = orthogonal(image, basis)  # rows that are not filled yet are zero
        length = norm(rest)
        smallest = _BREAKDOWN * jnp.finfo(flat.dtype).eps * norm(image)

        def elsewhere() -> Array:
            # An invariant subspace: T falls apart, and goes on from outside of it.
            noise = jax.random.normal(restarts[k], flat.shape, flat.dtype)
            return _unit(orthogonal(_unit(noise), basis))

        is_over = length <= smallest
        vector = jax.lax.cond(is_over, elsewhere, lambda: _unit(rest))
        beside = beside.at[k].set(jnp.where(is_over, 0.0, length))
        return basis, diagonal, beside, vector

    nothing = jnp.zeros(num_steps, flat.dtype)
    start = _unit(jax.random.normal(first, flat.shape, flat.dtype))
    basis = jnp.zeros((num_steps, flat.size), flat.dtype)
    carry = (basis, nothing, nothing, start)
    _, diagonal, beside, _ = jax.lax.fori_loop(0, num_steps, step, carry)
    beside = jnp.diag(beside[:-1], 1)
    return jnp.linalg.eigvalsh(jnp.diag(diagonal) + beside + beside.T)


def hessian_trace(
    loss_fn: ParamsLoss, params: PyTree, *, num_samples: int = 20, key: Array
) -> Array:
    """Returns the trace of the Hessian, by Hutchinson's estimate.

        tr H  =  E v^T H v   over random signs v

    Args:
      loss_fn: a loss of the weights, twice differentiable by reverse mode.
      params: the weights.
      num_samples: number of draws, >= 1, a product with the Hessian each.
      key: of the signs.

    Returns:
      A number. Unbiased, with the variance `2 sum_{i != j} H_ij^2 / num_samples`: exact
      for a diagonal Hessian.

    Raises:
      ValueError: if num_samples < 1.

    Reference: Hutchinson (1989), "A Stochastic Estimator of the Trace of the Influence
    Matrix for Laplacian Smoothing Splines".

    >>> loss = lambda w: jnp.sum(jnp.array([1.0, 2.0, 5.0]) * w**2) / 2
    >>> hessian_trace(loss, jnp.ones(3), num_samples=1, key=jax.random.key(0))
    Array(8., dtype=float32)
    """
    check_whole(1, num_samples=num_samples)
    flat, product = _product(loss_fn, params)

    def draw(key: Array) -> Array:
        signs = jax.random.rademacher(key, flat.shape, flat.dtype)
        return jnp.sum(signs * product(signs))

    return jnp.mean(jax.lax.map(draw, jax.random.split(key, num_samples)))


def _product(
    loss_fn: ParamsLoss, params: PyTree
) -> tuple[Array, Callable[[Array], Array]]:
    """Returns the weights as a vector, and the function v -> H v of such vectors.

    In float32 at least; the loss gets the weights in their own precision.
    """
    exact, unravel = ravel_pytree(jax.tree.map(at_least_float32, params))

    def as_given(vector: Array) -> PyTree:
        return jax.tree.map(lambda x, w: x.astype(w.dtype), unravel(vector), params)

    gradient = jax.grad(lambda w: loss_fn(as_given(w)))
    return exact, lambda v: jax.grad(lambda w: jnp.sum(gradient(w) * v))(exact)


def _unit(vector: Array) -> Array:
    length = norm(vector)
    return vector / jnp.where(length > 0, length, 1.0)
