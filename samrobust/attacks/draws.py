"""Random numbers of which every example of a batch has its own.

What an attack is given as `key` is one PRNG key or a key array [B], one an example, and
stays of that kind while numbers are folded in. Only where numbers are drawn does each
example get a key: its own, or the one key with its position folded in. So what an
example draws depends neither on the batch it stands in nor on padding or devices; with
one key it depends on its position. (JAX vectorises `threefry`, its default, key by key;
of `rbg` keys it does not say so.)
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.types import Array

__all__ = ["check_key", "coins", "fold_in", "normal", "split", "uniform"]

_Keys = TypeVar("_Keys")


def check_key(key: Array, batch: int) -> None:
    """Refuses what is neither one key nor as many as there are examples.

    Raises:
      ValueError: see above.
    """
    check(
        not _is_one_an_example(key) or key.shape[0] == batch,
        "one key, or a key array [B] of one an example",
        key_shape=key.shape,
        batch=batch,
    )


def fold_in(key: Array, number: Array | int) -> Array:
    """The key, or each example's, with a number folded in."""
    return _map(lambda own: jax.random.fold_in(own, number), key)


def split(key: Array) -> tuple[Array, Array]:
    """Two keys, or two for each example."""

    def halves(own: Array) -> tuple[Array, Array]:
        first, second = jax.random.split(own)
        return first, second

    return _map(halves, key)


def uniform(
    key: Array, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0
) -> Array:
    """Numbers in [low, high), float32 [B, ...].

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> alone = uniform(keys[2:], (1, 4))
    >>> bool(jnp.all(uniform(keys, (3, 4))[2:] == alone))
    True
    """
    return _draw(
        lambda own: jax.random.uniform(own, shape[1:], jnp.float32, low, high),
        key,
        shape,
    )


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Numbers of the standard normal distribution, float32 [B, ...]."""
    return _draw(lambda own: jax.random.normal(own, shape[1:], jnp.float32), key, shape)


def coins(key: Array, shape: tuple[int, ...]) -> Array:
    """Fair coins, bool [B, ...]; the same ones whatever the images' precision."""
    half = jnp.float32(0.5)
    return _draw(lambda own: jax.random.bernoulli(own, half, shape[1:]), key, shape)


def _draw(
    sampler: Callable[[Array], Array], key: Array, shape: tuple[int, ...]
) -> Array:
    """What each example draws with its own key."""
    check_key(key, shape[0])
    if not _is_one_an_example(key):
        positions = jnp.arange(shape[0], dtype=jnp.uint32)
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
    return jax.vmap(sampler)(key)


def _map(function: Callable[[Array], _Keys], key: Array) -> _Keys:
    return (jax.vmap(function) if _is_one_an_example(key) else function)(key)


def _is_one_an_example(key: Array) -> bool:
    """A key array [B]; keys of the old kind are arrays of numbers, [2] each."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == (1 if is_typed else 2)
