"""Random numbers, drawn separately for every example of a batch.

An attack is given one PRNG key, or a key array [B] with one for each example. Each
example draws with its own key, or with the one key and its position folded in. So its
numbers depend neither on the batch that it is in nor on padding or devices; with one
key they depend on its position. (JAX vectorizes `threefry`, its default, key by key; of
`rbg` keys it does not say so.)
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks.per_example import factor, filled
from samrobust.checks import check
from samrobust.types import Array

__all__ = [
    "check_key",
    "coins",
    "fold_in",
    "normal",
    "of_run",
    "one_an_example",
    "split",
    "uniform",
]

_Keys = TypeVar("_Keys")


def check_key(key: Array, batch: int) -> None:
    """Refuses what is neither one key nor as many as there are examples.

    Raises:
      ValueError: see above.
    """
    check(_is_key(key), "a key, as from `jax.random.key(0)`", key=key)
    check(
        not _is_one_an_example(key) or key.shape[0] == batch,
        "one key, or a key array [B] of one an example",
        key_shape=key.shape,
        batch=batch,
    )


def one_an_example(key: Array, images: Array) -> Array:
    """Returns the key of each example, [B], split over devices as the images are."""
    keys = _each(key, len(images))
    zeros = filled(images, 0, jnp.uint32)[:, None]
    if not jnp.issubdtype(keys.dtype, jax.dtypes.prng_key):
        return keys + zeros
    numbers = jax.random.key_data(keys) + zeros
    return jax.random.wrap_key_data(numbers, impl=jax.random.key_impl(keys))


def fold_in(key: Array, number: Array | int) -> Array:
    """Folds a number into the key, or into each example's."""
    return _map(lambda own: jax.random.fold_in(own, number), key)


def of_run(key: Array, restarts: int, num_targets: int, index: Array) -> Array:
    """Returns the key of a run: the same whatever number of restarts there are.

    Args:
      key: one, or one an example.
      restarts: toward each target.
      num_targets: at most.
      index: of the run, all restarts toward a target before the next target.
    """
    return fold_in(key, index // restarts + index % restarts * num_targets)


def split(key: Array) -> tuple[Array, Array]:
    """Splits the key into two, or each example's."""

    def halves(own: Array) -> tuple[Array, Array]:
        first, second = jax.random.split(own)
        return first, second

    return _map(halves, key)


def uniform(
    key: Array,
    shape: tuple[int, ...],
    low: float | Array = 0.0,
    high: float | Array = 1.0,
) -> Array:
    """Draws numbers in [low, high), float32 [B, ...]; the ends may be [B].

    >>> keys = jax.random.split(jax.random.key(0), 3)
    >>> alone = uniform(keys[2:], (1, 4))
    >>> bool(jnp.all(uniform(keys, (3, 4))[2:] == alone))
    True
    """
    numbers = _draw(
        lambda own: jax.random.uniform(own, shape[1:], jnp.float32), key, shape
    )
    low, high = factor(low, numbers), factor(high, numbers)
    # The formula of `jax.random.uniform`, whose own ends cannot be [B].
    return jnp.maximum(low, numbers * (high - low) + low)


def normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Draws numbers of the standard normal distribution, float32 [B, ...]."""
    return _draw(lambda own: jax.random.normal(own, shape[1:], jnp.float32), key, shape)


def coins(key: Array, shape: tuple[int, ...]) -> Array:
    """Tosses fair coins, bool [B, ...]; the same ones whatever images are made of."""
    half = jnp.float32(0.5)
    return _draw(lambda own: jax.random.bernoulli(own, half, shape[1:]), key, shape)


def _draw(
    sampler: Callable[[Array], Array], key: Array, shape: tuple[int, ...]
) -> Array:
    """Draws for each example with its own key."""
    check_key(key, shape[0])
    return jax.vmap(sampler)(_each(key, shape[0]))


def _each(key: Array, batch: int) -> Array:
    """Returns keys [B]: themselves, or the one key with each position folded in."""
    if _is_one_an_example(key):
        return key
    positions = jnp.arange(batch, dtype=jnp.uint32)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def _map(function: Callable[[Array], _Keys], key: Array) -> _Keys:
    return (jax.vmap(function) if _is_one_an_example(key) else function)(key)


def _is_key(key: Any) -> bool:
    """Tells a key or an array of keys; those of the old kind are numbers, [2] each."""
    if not isinstance(key, (jax.Array, np.ndarray)):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim <= 1
    return key.dtype == jnp.uint32 and key.ndim in (1, 2)


def _is_one_an_example(key: Array) -> bool:
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == (1 if is_typed else 2)
