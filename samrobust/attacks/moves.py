"""The moves of the Square attack: its random starts and changes, in either ball.

What a query draws (`draw`) is apart from what it does with that (`move`), so that the
same numbers can be given to another implementation. They are drawn in float32, the same
ones for images in float64; each example draws its own (`samrobust.attacks.draws`).
Windows of all sizes are masks of the images' shape. Images are [B, H, W, C].

Reference: Andriushchenko et al. (2020), arXiv 1912.00049, Algorithms 2 and 3.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.windows import pulse, pulses
from samrobust.types import Array

__all__ = ["L2Moves", "LinfMoves"]

_FLOOR = 1e-12  # upstream adds it to every norm that it divides by


class LinfMoves(NamedTuple):
    """Where the search starts in the l-inf ball, and how it goes on."""

    images: Array
    radius: float
    box: tuple[float, float]
    sizes: np.ndarray

    def start(self, key: Array) -> Array:
        """Stripes along the columns, each of a random sign."""
        batch, _, width, channels = self.images.shape
        signs = _signs(key, (batch, 1, width, channels), self.images.dtype)
        return jnp.clip(self.images + self.radius * signs, *self.box)

    def draw(self, query: Array, key: Array) -> dict[str, Array]:
        """The random numbers of a query."""
        batch, _, _, channels = self.images.shape
        place_key, sign_key = draws.split(key)
        size = jnp.asarray(self.sizes)[query]
        numbers = draws.uniform(place_key, (batch, 2))
        return {
            "size": size,
            "corner": _corner(numbers, size, self.images.shape),
            "signs": _signs(sign_key, (batch, 1, 1, channels), self.images.dtype),
        }

    def move(self, best: Array, *, size: Array, corner: Array, signs: Array) -> Array:
        """The best images with one window changed."""
        window = _window(best.shape, corner, size)
        moved = jnp.where(window, best + 2 * self.radius * signs, best)
        low = jnp.maximum(self.images - self.radius, self.box[0])
        high = jnp.minimum(self.images + self.radius, self.box[1])
        return jnp.clip(moved, low, high)


class L2Moves(NamedTuple):
    """Where the search starts in the l2 ball, and how it goes on."""

    images: Array
    radius: float
    box: tuple[float, float]
    sizes: np.ndarray

    def start(self, key: Array) -> Array:
        """Tiles of pulses, each of a random direction and sign, five along H."""
        batch, height, width, channels = self.images.shape
        side = max(height // 5, 1)
        before = max((height - 5 * side) // 2, 0)
        grid = (height // side, width // side)
        flip_key, sign_key = draws.split(key)
        flipped = draws.coins(flip_key, (batch, *grid, 1, 1))
        upright = jnp.asarray(pulse(side), self.images.dtype)[None, None, None]
        tiles = jnp.where(flipped, upright.mT, upright).transpose(0, 1, 3, 2, 4)
        signs = _signs(
            sign_key, (batch, grid[0], 1, grid[1], 1, channels), self.images.dtype
        )
        laid = (tiles[..., None] * signs).reshape(
            batch, grid[0] * side, grid[1] * side, channels
        )
        room = [(0, 0), (before, height), (before, width), (0, 0)]
        return self.into_set(jnp.pad(laid, room)[:, :height, :width])

    def draw(self, query: Array, key: Array) -> dict[str, Array]:
        """The random numbers of a query."""
        batch, _, _, channels = self.images.shape
        place_key, sign_key = draws.split(key)
        size = jnp.asarray(self.sizes)[query]
        numbers = draws.uniform(place_key, (batch, 5))
        table, which = pulses(self.sizes)
        return {
            "size": size,
            "corner": _corner(numbers[:, :2], size, self.images.shape),
            "source": _corner(numbers[:, 2:4], size, self.images.shape),
            "upright": jnp.asarray(table, self.images.dtype)[jnp.asarray(which)[query]],
            "flipped": numbers[:, 4] >= 0.5,
            "signs": _signs(sign_key, (batch, 1, 1, channels), self.images.dtype),
        }

    def move(
        self,
        best: Array,
        *,
        size: Array,
        corner: Array,
        source: Array,
        upright: Array,
        flipped: Array,
        signs: Array,
    ) -> Array:
        """The best images with one window changed and another one emptied."""
        delta = best - self.images
        window = _window(best.shape, corner, size)
        emptied = _window(best.shape, source, size)
        inside = jnp.where(window, delta, 0.0)
        unspent = jnp.maximum(
            self.radius**2 - jnp.sum(_energy(delta), -1)[..., None], 0
        )
        held = _energy(jnp.where(window | emptied, delta, 0.0))
        budget = jnp.sqrt(unspent / best.shape[-1] + held)
        pulses_laid = _placed(upright, flipped, best.shape, corner)
        fresh = _unit_channels(pulses_laid * signs + _unit_channels(inside)) * budget
        kept = jnp.where(emptied, 0.0, delta)
        return self.into_set(jnp.where(window, fresh, kept))

    def into_set(self, delta: Array) -> Array:
        """The images with perturbations of full length, clipped to the box."""
        return jnp.clip(self.images + self.radius * _unit(delta), *self.box)


def _signs(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.where(draws.coins(key, shape), 1.0, -1.0).astype(dtype)


def _corner(uniform: Array, size: Array, shape: tuple[int, ...]) -> Array:
    """The upper left pixels of windows, int [B, 2]; as upstream, short of the last."""
    room = jnp.array(shape[1:3], jnp.int32) - size
    return jnp.floor(uniform * room.astype(uniform.dtype)[None]).astype(jnp.int32)


def _window(shape: tuple[int, ...], corner: Array, size: Array) -> Array:
    """Which pixels the windows cover, bool [B, H, W, 1]."""
    rows, columns = (
        (places >= 0) & (places < size)
        for axis, length in enumerate(shape[1:3])
        for places in [_places(length, corner[:, axis])]
    )
    return rows[:, :, None, None] & columns[:, None, :, None]


def _placed(
    upright: Array, flipped: Array, shape: tuple[int, ...], corner: Array
) -> Array:
    """A pulse [S, S] in images of zeros, [B, H, W, 1], on its side where `flipped`.

    Cut off at the edge. Rows and columns are taken by products with zeros and ones,
    exact at this precision: an indexing that differs by example does not shard.
    """
    pulses_of = jnp.where(flipped[:, None, None], upright.T[None], upright[None])
    sides = jnp.arange(len(upright), dtype=jnp.int32)[None, None]
    rows, columns = (
        _places(length, corner[:, axis])[:, :, None] == sides
        for axis, length in enumerate(shape[1:3])
    )
    taken = jnp.matmul(rows.astype(upright.dtype), pulses_of, precision="highest")
    across = columns.astype(upright.dtype).mT
    return jnp.matmul(taken, across, precision="highest")[..., None]


def _places(length: int, start: Array) -> Array:
    """Where each row or column of an image lies in a window, int [B, length]."""
    return jnp.arange(length, dtype=jnp.int32)[None, :] - start[:, None]


def _energy(delta: Array) -> Array:
    """The sum of squares of each channel, [B, 1, 1, C].

    Rows first: on the CPU twice as fast as the sum over both axes at once.
    """
    rows = jnp.sum(jnp.square(delta), axis=1, keepdims=True)
    return jnp.sum(rows, axis=2, keepdims=True)


def _unit_channels(delta: Array) -> Array:
    return delta / (_FLOOR + jnp.sqrt(_energy(delta)))


def _unit(delta: Array) -> Array:
    whole = jnp.sum(_energy(delta), axis=3, keepdims=True)
    return delta / (_FLOOR + jnp.sqrt(whole))
