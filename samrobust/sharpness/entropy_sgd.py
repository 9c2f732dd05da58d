"""Entropy-SGD: descent on the local entropy, estimated by Langevin dynamics.

Reference: Chaudhari et al. (2017), arXiv 1611.01838, Algorithm 1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import (
    LARGEST_REAL,
    amount,
    below_one,
    check,
    check_real,
    count,
)
from samrobust.sharpness.refusals import check_present, check_whole_tree
from samrobust.sharpness.state import OffsetState
from samrobust.sharpness.trees import at_least_float32, norm, normal_like, width, zeros
from samrobust.types import Array, Entry, PyTree

__all__ = ["ENTRY", "entropy_sgd"]

_KEPT = 0.75  # share of the old mean that an inner step keeps, alpha in the paper


_rate = functools.partial(check_real, 1e-12, 1e3)


def entropy_sgd(
    gamma: float,
    inner_steps: int = 20,
    inner_rate: float = 0.1,
    noise: float = 1e-4,
    scoping: float = 1e-3,
    *,
    learning_rate: float | optax.Schedule,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    total_steps: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Builds Entropy-SGD: every L steps w <- w - lr (w - mu), mu the mean nearby.

    Meanwhile w' walks from w, and mu follows:

        v  <- momentum v + g(w')
        w' <- w' - eta (g(w') + momentum v - gamma_t (w - w') + decay w'
                        + noise N(0, 1) / sqrt(eta / 2))
        mu <- 0.75 mu + 0.25 w'

    Each step is an update with a gradient of its own, on a batch of its own, taken at
    w' = `gradient_point(params, opt_state)`. Weights stay w, and change in every L-th
    update; then w' and mu begin again at w, v at 0. gamma_t = gamma (1 + scoping)^t in
    the t-th round.

    Args:
      gamma: >= 0, how strongly w' is held at w.
      inner_steps: L >= 1.
      inner_rate: eta, in (0, 1e3].
      noise: >= 0, of the Langevin dynamics.
      scoping: >= 0, growth of gamma from round to round.
      learning_rate: lr > 0 of the step of w, or a schedule of the number of updates. It
        is of another size than SGD's; the authors' begins with 1.
      momentum: of Nesterov's form, in [0, 1), of w'.
      weight_decay: >= 0, at w'.
      total_steps: updates of the training, of which L or more are wanted, if given; the
        last ones, less than a round, leave w where it is.

    Returns:
      A transformation that is the whole optimizer: nothing follows. `update` wants a
      `key` where there is noise. Costs no further pass, but L updates move w once.
      Metrics: `distance`, ||w' - w||, and `entropy_gradient_norm`, ||w - mu||.

    Raises:
      ValueError: for a value out of range; in `update`, without `params` or `key`.

    Reference: Chaudhari et al. (2017), arXiv 1611.01838, Algorithm 1; as the authors'
    `entropyoptim.lua`, ucla-vision/entropy-sgd. *Our deviation*: the evaluation at w
    with which their rounds begin, and whose gradient their code throws away, is left
    out, and BatchNorm's running statistics are those of the walk. Their Python port is
    another method: momentum and weight decay act on w too, and gamma does not grow.
    """
    amount(gamma=gamma, noise=noise, scoping=scoping, weight_decay=weight_decay)
    _rate(inner_rate=inner_rate)
    if not callable(learning_rate):
        check_real(1e-12, LARGEST_REAL, learning_rate=learning_rate)
    below_one(momentum=momentum)
    count(inner_steps=inner_steps)
    fix = "Weights move once in inner_steps updates."
    enough = total_steps is None or inner_steps <= total_steps
    check(enough, f"inner_steps <= {total_steps} updates", fix, inner_steps=inner_steps)
    outer = learning_rate if callable(learning_rate) else lambda _: learning_rate
    spread = noise / (0.5 * inner_rate) ** 0.5

    # All is kept relative to w: the offset w' - w, and mu - w.
    def init(params: PyTree) -> OffsetState:
        exact = jax.tree.map(at_least_float32, params)

        def nothing() -> PyTree:  # with buffers of its own, which can be donated
            return jax.tree.map(lambda w: zeros(w.shape, w.dtype, w), exact)

        measured = {name: zeros((), jnp.float32, params) for name in _METRICS}
        inner = {"velocity": nothing(), "mean": nothing()}
        return OffsetState(jnp.zeros([], jnp.int32), nothing(), inner, measured)

    def update(
        updates: PyTree,
        state: OffsetState,
        params: PyTree | None = None,
        *,
        key: Any = None,
        **extra_args: Any,
    ) -> tuple[PyTree, OffsetState]:
        del extra_args
        check_present(params=params)
        check_whole_tree(updates, params)
        step = state.step
        velocity, mean = state.inner["velocity"], state.inner["mean"]
        number = (step // inner_steps + 1).astype(width(updates))  # of the round
        strength = gamma * (1 + scoping) ** number
        grads = jax.tree.map(at_least_float32, updates)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, grads)

        def walk(g: Array, v: Array, e: Array, w: Any, drawn: Array) -> Array:
            pull = strength.astype(e.dtype) * e + weight_decay * (w + e)
            return e - inner_rate * (g + momentum * v + pull + spread * drawn)

        if noise:
            check_present(key=key)
            drawn = normal_like(grads, key)
        else:
            drawn = jax.tree.map(jnp.zeros_like, grads)
        offset = jax.tree.map(walk, grads, velocity, state.offset, params, drawn)
        mean = jax.tree.map(lambda m, e: _KEPT * m + (1 - _KEPT) * e, mean, offset)
        shown = (value.astype(jnp.float32) for value in (norm(offset), norm(mean)))
        measured = dict(zip(_METRICS, shown, strict=True))
        # The last step of a round: w moves to mu, and all begins again.
        is_last = (step + 1) % inner_steps == 0
        rate = jnp.where(is_last, outer(step), 0.0)
        moved = jax.tree.map(
            lambda g, m: (rate.astype(m.dtype) * m).astype(g.dtype), updates, mean
        )
        offset, velocity, mean = jax.tree.map(
            lambda leaf: jnp.where(is_last, jnp.zeros_like(leaf), leaf),
            (offset, velocity, mean),
        )
        inner = {"velocity": velocity, "mean": mean}
        count = jnp.asarray(optax.safe_increment(step))
        return moved, OffsetState(count, offset, inner, measured)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore


_METRICS: tuple[str, ...] = ("distance", "entropy_gradient_norm")


ENTRY = Entry(
    entropy_sgd,
    "Entropy-SGD (gamma = {gamma:g})",
    fields={
        "gamma": amount,
        "inner_steps": count,
        "inner_rate": _rate,
        "noise": amount,
        "scoping": amount,
    },
    passes=0.0,
)
