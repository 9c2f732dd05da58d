"""The same world trained for real: samples, the package's own step, SAM and PGD.

A feature is a pixel, so that nothing of the package is bypassed: x = (pixel - 1/2) *
span, undone by the first layer as normalization would be, and radii are divided by the
span. The classifier has the logits (-z/2, z/2), whose cross entropy is the logistic
loss of z.

The methods are `st`; `at`, which leaves x_1 alone as Theorem 4.2 as printed assumes,
and `at all features`; `sam`, which trains and perturbs w_1 alone, the other weights
being 2 eta, and `sam all weights`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.typing import ArrayLike

from samrobust.attacks import identity, linf, pgd
from samrobust.checks import check
from samrobust.sharpness import sam
from samrobust.studies.theory.closed_forms import standard_weight
from samrobust.studies.theory.world import World, sample
from samrobust.training.state import TrainState
from samrobust.training.step import make_train_step
from samrobust.types import Array

__all__ = ["TrainingEffort", "train"]

_TAIL = 8.0  # standard deviations that fit into a pixel: none of 1e14 samples is cut


@dataclasses.dataclass(frozen=True)
class TrainingEffort:
    """The amount of training.

    Attributes:
      seeds: independent runs of each method, >= 2; 0 trains nothing.
      samples: fresh samples of a run, >= 10 batches.
      batch_size: of SGD, >= 1.

    Raises:
      ValueError: if one is out of range.
    """

    seeds: int = 5
    samples: int = 300_000
    batch_size: int = 1_000

    def __post_init__(self) -> None:
        """Checks the ranges."""
        enough = self.seeds == 0 or self.seeds >= 2
        fix = "One run has no confidence band."
        check(enough, "seeds >= 2, or 0 for no training", fix, seeds=self.seeds)
        check(self.batch_size >= 1, "batch_size >= 1", batch_size=self.batch_size)
        check(
            self.samples >= 10 * self.batch_size,
            f"samples >= 10 batches of {self.batch_size}",
            samples=self.samples,
        )


def train(
    world: World,
    method: str,
    effort: TrainingEffort,
    radius: float = 0.0,
    *,
    near_bayes: bool = False,
) -> np.ndarray:
    """Trains on fresh samples.

    Args:
      world: of scalars.
      method: see the module.
      effort: how much.
      radius: of the attack, > 0, or of SAM, relative to other weights of 1.
      near_bayes: whether w_1 begins where the Bayes classifier has it and the other
        weights, if they are trained, at half of theirs (so that w_1 relative to them
        is not w* if nothing moves); False: all begin at 0.

    Returns:
      float64 [seeds]: w_1 relative to the other weights, an average over the second
      half of the steps. The samples depend on the seed and the step alone: runs may be
      compared in pairs.
    """
    p, eta, d = float(world.p), float(world.eta), int(world.d)
    span, pixel_radius, rho = 2 * (_TAIL + 1 + eta), 0.0, radius
    if method.startswith("at"):
        # Few different ones, so that radii of one size share a compiled program.
        pixel_radius = float(16.0 ** np.floor(np.log(radius / span) / np.log(16.0)))
        span, rho = radius / pixel_radius, 0.0
    elif method == "sam all weights":
        rho = 2 * eta * radius  # those of the logistic loss are 2 eta
    start = np.array(0.0) if method == "sam" else np.zeros(d + 1)
    if near_bayes and method == "sam":
        start = standard_weight(world)
    elif near_bayes:
        start = np.array([world.log_odds, *[eta] * d])
    keys = jax.random.split(jax.random.key(0), effort.seeds)
    static = World(p, eta, d), method, effort, pixel_radius
    traced = jnp.float32(span), jnp.float32(rho), jnp.asarray(start, jnp.float32)
    means = _train(*static, *traced, keys)
    return np.asarray(jax.device_get(means), float)


class _Linear(nn.Module):
    """A linear classifier of pixels.

    Attributes:
      span: what a pixel's range [0, 1] stands for.
      rounds: whether x_1 is read as its sign, which no small perturbation changes.
      scale: if not 0, w_1 alone is trained, and z = scale * (w_1 x_1 + x_2 + ...).
      start: what is trained, before the first step: [], or [d + 1].
    """

    span: Array
    rounds: bool
    scale: float
    start: Array

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        del train
        features = (images.reshape(len(images), -1) - 0.5) * self.span
        if self.rounds:
            features = features.at[:, 0].set(jnp.sign(features[:, 0]))
        if self.scale:
            robust = self.param("robust", lambda _: self.start)
            others = jnp.ones(features.shape[1] - 1)
            weights = self.scale * jnp.concatenate([robust[None], others])
        else:
            weights = self.param("weights", lambda _: self.start)
        margin = features @ weights
        return jnp.stack([-margin / 2, margin / 2], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _train(
    world: World,
    method: str,
    effort: TrainingEffort,
    pixel_radius: float,
    span: Array,
    rho: Array,
    start: Array,
    keys: Array,
) -> Array:
    scale = 2 * float(world.eta) if method == "sam" else 0.0
    model = _Linear(span=span, rounds=method == "at", scale=scale, start=start)
    if method == "sam":
        rate = _rate(_curvature_of_one(world, effort.batch_size, rho))
    else:
        rate = _rate(_curvature(world, pixel_radius * span))
    tx = optax.with_extra_args_support(optax.sgd(rate))
    if method.startswith("sam"):
        tx = optax.with_extra_args_support(optax.chain(sam(rho, aux={}), tx))
    attack = identity
    if pixel_radius:
        # The gradient's sign is the same everywhere: two steps reach the corner.
        attack = pgd(
            linf(pixel_radius), step_size=pixel_radius, num_steps=2, random_start=False
        )
    init, step = make_train_step(model, tx, adversary=attack)
    num_steps = effort.samples // effort.batch_size

    def average(key: Array) -> Array:
        def advance(
            carry: tuple[TrainState, Array], number: Array
        ) -> tuple[tuple[TrainState, Array], None]:
            state, mean = carry
            draw, attack = jax.random.split(jax.random.fold_in(key, number))
            features, labels = sample(world, effort.batch_size, draw)
            pixels = jnp.clip(features / span + 0.5, 0, 1)[:, None, :, None]
            state, _ = step(state, pixels, (labels + 1) // 2, attack)
            # Polyak's average over the second half of the steps.
            count = jnp.maximum(number - num_steps // 2, 0)
            (weights,) = jax.tree.leaves(state.params)
            return (state, mean + (weights - mean) / (count + 1)), None

        state = init(key, jnp.zeros([1, 1, int(world.d) + 1, 1]))
        (weights,) = jax.tree.leaves(state.params)
        (_, mean), _ = jax.lax.scan(advance, (state, weights), jnp.arange(num_steps))
        return mean

    means = jax.vmap(average)(keys)
    if method == "sam":
        return means
    return means[:, 0] / jnp.mean(means[:, 1:], axis=1)


def _rate(curvature: ArrayLike) -> optax.Schedule:
    """Builds a rate that falls as 1 / sqrt(step), from the curvature's inverse."""
    return lambda count: 1 / (curvature * jnp.sqrt(1 + jnp.asarray(count) / 50))


def _curvature(world: World, epsilon: Array) -> Array:
    """Bounds that of the logistic loss in all weights, under an attack."""
    # 1/4 bounds sigmoid', and 1 + ||E[x | y]||^2 the largest eigenvalue of E[x x'].
    return jnp.asarray((2 + world.d * (world.eta + 2 * epsilon) ** 2) / 4)


def _curvature_of_one(world: World, batch_size: int, rho: Array) -> Array:
    """Bounds that in w_1 alone, where z is 2 eta times its margin, under SAM.

    For p near 1 or a large eta far above the curvature at w*: training may then need
    more samples than it has, the more the larger rho is.

    SAM on one weight steepens the expected gradient where the batch's sign changes: by
    2 rho sqrt(B) phi(0) curvature / sigma, sigma an example's deviation.
    """
    scale = 2 * world.eta
    curvature = scale**2 / 4
    deviation = scale * np.sqrt(world.p * (1 - world.p))
    steepening = 0.8 * rho * np.sqrt(batch_size) * curvature / deviation
    return curvature * (1 + steepening)
