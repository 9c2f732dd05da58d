"""What the device can do at most: a matrix product, and a copy through memory.

Measured, not looked up, in the process's own precision settings, so that a fraction of
it says how much is left to gain on this machine.
"""

import jax
import jax.numpy as jnp

from samrobust.studies.bench.timing import Protocol, measure
from samrobust.types import Array

__all__ = ["copy_bandwidth", "matmul_rate"]


def matmul_rate(precision: str, protocol: Protocol) -> float:
    """Operations per second of a large square matrix product, two a multiply-add.

    Args:
      precision: dtype of the operands, `float32` or `bfloat16`; float32 products on a
        GPU run at `jax_default_matmul_precision`.
      protocol: the fastest repeat counts.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    key = jax.random.key(0)
    matrix = jax.random.normal(key, (size, size)).astype(precision) / size**0.5
    seconds = _fastest(lambda x: matrix @ x, matrix, protocol)
    return 2 * size**3 / seconds


def copy_bandwidth(protocol: Protocol) -> float:
    """Bytes per second, read and written, of a pass over arrays beyond any cache."""
    size = (128 if jax.default_backend() == "cpu" else 1024) * 2**20
    numbers = jnp.ones(size // 4, jnp.float32)
    return 2 * size / _fastest(lambda x: x * 1.0001, numbers, protocol)


def _fastest(function, start: Array, protocol: Protocol) -> float:
    """Seconds of the fastest repeat of `x <- function(x)`, in place."""
    apply = jax.jit(function, donate_argnums=0)
    state = [jnp.copy(start)]

    def call() -> Array:
        state[0] = apply(state[0])
        return state[0]

    return min(measure(call, protocol))
