"""Square: a black-box attack by random search, which asks for logits alone.

At each query a window of every image is changed at random, and an example keeps the
change where it raises the loss. Without gradients, the attack tells whether a network
that holds against gradients merely hides them. The queries run in one
`lax.while_loop`; windows of all sizes are masks of one shape, [B, H, W, C].

What a query draws (`draw`) is apart from what it does with that (`move`), so that
another implementation can be given the same numbers, float32 for all images.

Reference: Andriushchenko et al. (2020), arXiv 1912.00049, and the code of AutoAttack.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from samrobust.attacks import draws
from samrobust.attacks.balls import Ball
from samrobust.attacks.calls import Call, attack_of, check_losses, check_set
from samrobust.attacks.losses import margin
from samrobust.attacks.numbers import real, whole
from samrobust.attacks.per_example import (
    BestSoFar,
    any_is_left,
    better,
    factor,
    repeat_while,
    score,
    select,
)
from samrobust.checks import check
from samrobust.types import Array, CheckedAttack, LogitsFn, LossFn

__all__ = ["L2Moves", "LinfMoves", "pulse", "pulses", "square", "window_sizes"]

_FLOOR = 1e-12  # upstream adds it to every norm that it divides by
# The share of the image that a window covers halves after each of these queries.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_HALVINGS_END = 10000  # the number of queries that they are made for


def square(
    ball: Ball,
    *,
    num_queries: int = 5000,
    p_init: float = 0.8,
    rescale_schedule: bool = False,
    restarts: int = 1,
    loss: LossFn = margin,
    box: tuple[float, float] = (0.0, 1.0),
) -> CheckedAttack:
    """Builds the Square attack: random search over square windows, no gradients.

    A query changes a window of side `sqrt(p H W)` at a random place, another one in
    every example; p falls from `p_init` in steps. In the l-inf ball each channel of the
    window goes to one side of the ball. In the l2 ball two opposite pulses are added to
    the window's perturbation, paid for by the norm that a second window held. An
    example takes the change where its loss rises or its label no longer has the single
    highest logit, and is left alone once it is misclassified.

    Args:
      ball: the allowed perturbations, from `linf` or `l2`.
      num_queries: how many changes are tried in a run, >= 1; the search ends earlier
        when all examples of the batch are misclassified. The start is one query more.
      p_init: the share of the image that the first window covers, in (0, 1].
      rescale_schedule: stretch the schedule of p, which is made for 10,000 queries, to
        `num_queries`. AutoAttack leaves it: its 5000 queries end at `p_init / 128`.
      restarts: number of independent runs, >= 1.
      loss: what is maximized, per example; `margin` (AutoAttack) or `cross_entropy`. It
        need not be differentiable, nor need the classifier.
      box: the range of pixel values.

    Returns:
      `attack(logits_fn, images, labels, *, key) -> images` on images [B, H, W, C] in
      the box, float32 (or float64), and labels int [B]. Wrap it in `jax.jit`.

      **Guarantees.** Shape and dtype of the images are kept. The result lies in the
      box, and in the ball up to the rounding of a norm. Radius 0 and misclassified
      images return unchanged. The result is misclassified wherever a query found such
      an image, else it is the one of highest loss seen, the original included. With a
      key for each example, its outcome does not depend on the batch it is in; with one
      key it depends on its place there. No gradient flows through the result.

    Raises:
      ValueError: if an argument is outside its range; when called, if the images are of
        another shape or dtype, or the logits of fewer than 2 classes.

    Reference: Andriushchenko et al. (2020), arXiv 1912.00049, Algorithms 1 to 3, as in
    the standard AutoAttack of Croce and Hein (2020), arXiv 2003.01690. Kept from its
    code: windows never reach the last row and column unless they are as large as the
    image; where H and W differ, sides derive from the area and stop at the shorter one,
    and the l2 start lays its tiles out from H alone. *Our deviations*: an example whose
    label ties for the highest logit and is still predicted goes on, where upstream
    counts it as robust; an unbroken example is returned with the highest loss found,
    not as the image; every example has windows of its own, where upstream's batch
    shares them; l2 tiles that do not fit are cut off, where upstream fails.

    >>> from samrobust.attacks import linf
    >>> attack = square(linf(8 / 255), num_queries=50)
    >>> def logits_fn(images):  # a step: its gradient is zero everywhere
    ...     bright = jnp.floor(100 * jnp.mean(images, (1, 2, 3)))
    ...     return jnp.stack([bright, jnp.full_like(bright, 49.5)], -1)
    >>> images, labels = jnp.full([1, 8, 8, 1], 0.5), jnp.array([0])
    >>> adversarial = attack(logits_fn, images, labels, key=jax.random.key(0))
    >>> jnp.argmax(logits_fn(images), -1), jnp.argmax(logits_fn(adversarial), -1)
    (Array([0], dtype=int32), Array([1], dtype=int32))
    """
    num_queries = whole(1, num_queries=num_queries)
    p_init, restarts = real(p_init=p_init), whole(1, restarts=restarts)
    box, loss = check_set(ball, box), check_losses(loss)
    check(0 < p_init <= 1, "0 < p_init <= 1", p_init=p_init)
    moves_of = LinfMoves if math.isinf(ball.order) else L2Moves
    schedule = {"rescale": rescale_schedule, "odd": moves_of is L2Moves}

    def attacked(call: Call) -> Array:
        images, radius = call.images, factor(ball.radius, call.images)
        sizes = window_sizes(num_queries, p_init, images.shape[1:], **schedule)
        moves = moves_of(images, radius, box, sizes)
        run = _SquareRun(call.logits_fn, call.labels, loss, moves)

        def restart(index: Array | int, best: BestSoFar) -> BestSoFar:
            return run.outcome(best, draws.fold_in(call.key, index))

        natural, _ = run.judged(images)
        return jax.lax.fori_loop(0, restarts, restart, natural).images

    return attack_of(attacked, box=box, ball=ball, ndim=4)


class LinfMoves(NamedTuple):
    """Start and changes of the search in the l-inf ball, the paper's Algorithm 2."""

    images: Array
    radius: float | Array  # or [B, 1, 1, 1]
    box: tuple[float, float]
    sizes: np.ndarray

    def start(self, key: Array) -> Array:
        """Lays stripes along the columns, each of a random sign."""
        batch, _, width, channels = self.images.shape
        signs = _signs(key, (batch, 1, width, channels), self.images.dtype)
        return jnp.clip(self.images + self.radius * signs, *self.box)

    def draw(self, query: Array, key: Array) -> dict[str, Array]:
        """Draws the random numbers of a query."""
        batch, _, _, channels = self.images.shape
        place_key, sign_key = draws.split(key)
        size = jnp.asarray(self.sizes)[query]
        numbers = draws.uniform(place_key, (batch, 2))
        return {
            "size": size,
            "corner": _corner(numbers, size, self.images.shape),
            "signs": _signs(sign_key, (batch, 1, 1, channels), self.images.dtype),
        }

    def move(self, best: Array, drawn: dict[str, Array]) -> Array:
        """Returns the best images with one window changed."""
        window = _window(best.shape, drawn["corner"], drawn["size"])
        # From either side of the ball 2 radii lead across it; the clip does the rest.
        moved = jnp.where(window, best + 2 * self.radius * drawn["signs"], best)
        low = jnp.maximum(self.images - self.radius, self.box[0])
        high = jnp.minimum(self.images + self.radius, self.box[1])
        return jnp.clip(moved, low, high)


class L2Moves(NamedTuple):
    """Start and changes of the search in the l2 ball, the paper's Algorithm 3."""

    images: Array
    radius: float | Array  # or [B, 1, 1, 1]
    box: tuple[float, float]
    sizes: np.ndarray

    def start(self, key: Array) -> Array:
        """Lays tiles of pulses, each of a random direction and sign, five along H."""
        batch, height, width, channels = self.images.shape
        side = max(height // 5, 1)
        before = max((height - 5 * side) // 2, 0)
        grid = (height // side, width // side)
        flip_key, sign_key = draws.split(key)
        flipped = draws.coins(flip_key, (batch, *grid, 1, 1))
        upright = jnp.asarray(pulse(side), self.images.dtype)[None, None, None]
        tiles = jnp.where(flipped, upright.mT, upright).transpose(0, 1, 3, 2, 4)
        each_tile = (batch, grid[0], 1, grid[1], 1, channels)
        laid = tiles[..., None] * _signs(sign_key, each_tile, self.images.dtype)
        laid = laid.reshape(batch, grid[0] * side, grid[1] * side, channels)
        room = [(0, 0), (before, height), (before, width), (0, 0)]
        return self.scaled(jnp.pad(laid, room)[:, :height, :width])

    def draw(self, query: Array, key: Array) -> dict[str, Array]:
        """Draws the random numbers of a query."""
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

    def move(self, best: Array, drawn: dict[str, Array]) -> Array:
        """Returns the best images with one window changed and another one emptied."""
        delta = best - self.images
        window = _window(best.shape, drawn["corner"], drawn["size"])
        emptied = _window(best.shape, drawn["source"], drawn["size"])
        inside = jnp.where(window, delta, 0.0)
        spent = jnp.sum(_energy(delta), -1)[..., None]  # ||delta||^2
        unspent = jnp.maximum(self.radius**2 - spent, 0)  # lost at the box
        held = _energy(jnp.where(window | emptied, delta, 0.0))
        budget = jnp.sqrt(unspent / best.shape[-1] + held)  # the norm of a channel
        laid = _placed(drawn["upright"], drawn["flipped"], drawn["corner"], best.shape)
        fresh = _unit_channels(laid * drawn["signs"] + _unit_channels(inside)) * budget
        kept = jnp.where(emptied, 0.0, delta)
        return self.scaled(jnp.where(window, fresh, kept))

    def scaled(self, delta: Array) -> Array:
        """Returns images with perturbations of full length, clipped to the box."""
        return jnp.clip(self.images + self.radius * _unit(delta), *self.box)


class _SquareRun(NamedTuple):
    """Options and data of a run: what it depends on beside its key."""

    logits_fn: LogitsFn
    labels: Array
    loss: LossFn
    moves: LinfMoves | L2Moves

    def outcome(self, best: BestSoFar, key: Array) -> BestSoFar:
        """Runs on what is not broken yet; returns the best of the run and before."""
        start_key, query_key = draws.split(key)
        start, _ = self.judged(self.moves.start(start_key))

        def ask(query: Array, current: BestSoFar) -> BestSoFar:
            drawn = self.moves.draw(query, draws.fold_in(query_key, query))
            tried, level = self.judged(self.moves.move(current.images, drawn))
            is_broken = jnp.isposinf(current.score)
            take = ~is_broken & (level | (tried.score > current.score))
            # What is taken for being level must not make a lower loss look better.
            highest = jnp.maximum(tried.score, current.score)
            return select(take, tried._replace(score=highest), current)

        known = jnp.where(jnp.isposinf(best.score), jnp.inf, start.score)
        start = start._replace(score=known)
        found = repeat_while(any_is_left, len(self.moves.sizes), ask, start)
        return better(best, found)

    def judged(self, images: Array) -> tuple[BestSoFar, Array]:
        """Returns images with their score, and where another logit is as high, [B]."""
        logits = jax.lax.stop_gradient(self.logits_fn(images))
        losses = self.loss(logits, self.labels).astype(images.dtype)
        reached = score(losses, logits, self.labels)
        level = jnp.isposinf(reached) | (margin(logits, self.labels) >= 0)
        return BestSoFar(images, reached), level


def _signs(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.where(draws.coins(key, shape), 1.0, -1.0).astype(dtype)


def _corner(uniform: Array, size: Array, shape: tuple[int, ...]) -> Array:
    """Returns upper left pixels of windows, int [B, 2]; as upstream, never the last."""
    room = jnp.array(shape[1:3], jnp.int32) - size
    return jnp.floor(uniform * room.astype(uniform.dtype)[None]).astype(jnp.int32)


def _window(shape: tuple[int, ...], corner: Array, size: Array) -> Array:
    """Returns the pixels that the windows cover, bool [B, H, W, 1]."""
    rows, columns = (
        (places >= 0) & (places < size)
        for axis, length in enumerate(shape[1:3])
        for places in [_places(length, corner[:, axis])]
    )
    return rows[:, :, None, None] & columns[:, None, :, None]


def _placed(
    upright: Array, flipped: Array, corner: Array, shape: tuple[int, ...]
) -> Array:
    """Lays a pulse [S, S] in zeros, [B, H, W, 1], on its side where `flipped`.

    Cut off at the edge. Products with zeros and ones take rows and columns, exactly at
    this precision: indexing that differs by example does not shard.
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
    """Returns the place of each row or column in a window, int [B, length]."""
    return jnp.arange(length, dtype=jnp.int32)[None, :] - start[:, None]


def _energy(delta: Array) -> Array:
    """Sums the squares of each channel, [B, 1, 1, C].

    Rows first: on the CPU twice as fast as the sum over both axes at once.
    """
    rows = jnp.sum(jnp.square(delta), axis=1, keepdims=True)
    return jnp.sum(rows, axis=2, keepdims=True)


def _unit_channels(delta: Array) -> Array:
    return delta / (_FLOOR + jnp.sqrt(_energy(delta)))


def _unit(delta: Array) -> Array:
    whole = jnp.sum(_energy(delta), axis=3, keepdims=True)
    return delta / (_FLOOR + jnp.sqrt(whole))


def window_sizes(
    num_queries: int, p_init: float, shape: tuple[int, ...], *, rescale: bool, odd: bool
) -> np.ndarray:
    """Returns the side of the square window of each query in images [H, W, C].

    int32 [num_queries], not rising, each at least 1 and at most min(H, W). The first
    covers the share `p_init`. With `odd`, as the l2 attack has it, even sides are
    rounded up and none is below 3.

    >>> window_sizes(60, 0.8, (32, 32, 3), rescale=False, odd=False)[[0, 10, 11, 51]]
    array([29, 29, 20, 14], dtype=int32)
    """
    sides = [
        _side(p_init / 2 ** _halvings(query, num_queries, rescale), shape, odd)
        for query in range(num_queries)
    ]
    return np.array(sides, np.int32)


def _halvings(query: int, num_queries: int, rescale: bool) -> int:
    if rescale:
        query = int(query / num_queries * _HALVINGS_END)
    return sum(query > after for after in _HALVINGS)


def _side(share: float, shape: tuple[int, ...], odd: bool) -> int:
    height, width, channels = shape
    # Multiplied and divided by the channels as in upstream's code: the same rounding.
    side = round(math.sqrt(share * (height * width * channels) / channels))
    side = max(side, 3) | 1 if odd else max(side, 1)
    return min(side, height, width)


def pulse(size: int) -> np.ndarray:
    """Returns what the l2 attack writes into a window: two opposite pulses, of norm 1.

    The upper half falls off from its center in square rings, the lower half is minus
    the same; where `size` is odd the lower half is a row higher. float32 [size, size].

    >>> pulse(2).round(4)
    array([[ 0.1387,  0.6934],
           [-0.1387, -0.6934]], dtype=float32)
    """
    upper, lower = _half(size // 2, size), _half(size - size // 2, size)
    both = np.concatenate([upper, -lower])
    return (both / np.sqrt(np.sum(both**2))).astype(np.float32)


def _half(height: int, width: int) -> np.ndarray:
    """Returns a pulse of unit norm, float64 [height, width]; none of height 0.

    At distance d from the center, in rings, it is `1/(d+1)**2 + ... + 1/M**2`: M
    squares of growing side and falling height lie on top of each other.
    """
    rows = np.abs(np.arange(height) - height // 2)[:, None]
    columns = np.abs(np.arange(width) - width // 2)[None, :]
    num_squares = max(height // 2, width // 2) + 1
    heights = 1 / np.arange(1, num_squares + 1) ** 2
    stacked = np.cumsum(heights[::-1])[::-1]  # all squares that reach a ring
    values = stacked[np.maximum(rows, columns)]
    return values / np.sqrt(np.sum(values**2)) if height else values


def pulses(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pulses of all windows, and int32 [num_queries], which a query takes.

    float32 [D, S, S]: the D distinct ones, S the largest size; smaller pulses have
    zeros below and to the right.
    """
    distinct, which = np.unique(sizes, return_inverse=True)
    padded = [np.pad(pulse(size), (0, distinct[-1] - size)) for size in distinct]
    return np.stack(padded), which.astype(np.int32)
