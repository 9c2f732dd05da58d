"""The same world trained for real: samples, the package's own step, SAM and PGD.

A feature is a pixel, so that nothing of the package is bypassed: x = (pixel - 1/2) *
span, undone by the first layer as normalisation would be, and radii are divided by the
span. The classifier has the logits (-z/2, z/2), whose cross entropy is the logistic
loss of z.
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
from samrobust.sharpness import sam
from samrobust.theory.world import World, sample
from samrobust.training.state import TrainState
from samrobust.training.step import make_train_step
from samrobust.types import Array, Attack

__all__ = ["METHODS", "Training", "train"]

METHODS = ("st", "at", "at all features", "sam", "sam all weights")
_TAIL = 8.0  # standard deviations that fit into a pixel: none of 1e14 samples is cut


@dataclasses.dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
      method: of METHODS. `at` leaves x_1 alone, as Theorem 4.2 as printed assumes;
        `sam` trains and perturbs w_1 alone, the other weights being 2 eta.
      num_steps: of SGD.
      batch_size: fresh samples a step.
    """

    method: str
    num_steps: int
    batch_size: int


class _Linear(nn.Module):
    """A linear classifier of pixels.

    Attributes:
      span: what a pixel's range [0, 1] stands for.
      rounds: whether x_1 is read as its sign, which no small perturbation changes.
      scale: if not 0, w_1 alone is trained, and z = scale * (w_1 x_1 + x_2 + ...).
    """

    span: Array
    rounds: bool
    scale: float

    @nn.compact
    def __call__(self, images: Array, *, train: bool = False) -> Array:
        del train
        features = (images.reshape(len(images), -1) - 0.5) * self.span
        if self.rounds:
            features = features.at[:, 0].set(jnp.sign(features[:, 0]))
        zeros = nn.initializers.zeros
        if self.scale:
            robust = self.param("robust", zeros, ())
            others = jnp.ones(features.shape[1] - 1)
            weights = self.scale * jnp.concatenate([robust[None], others])
        else:
            weights = self.param("weights", zeros, (features.shape[1],))
        margin = features @ weights
        return jnp.stack([-margin / 2, margin / 2], axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _train(
    p: float,
    eta: float,
    d: int,
    training: Training,
    pixel_radius: float,
    span: Array,
    rho: Array,
    keys: Array,
) -> Array:
    world = World(p, eta, d)
    model = _Linear(
        span=span,
        rounds=training.method == "at",
        scale=2 * eta if training.method == "sam" else 0.0,
    )
    tx = _optimizer(world, training, pixel_radius * span, rho, model.scale)
    init, step = make_train_step(model, tx, adversary=_attack(pixel_radius))

    def average(key: Array) -> Array:
        def advance(
            carry: tuple[TrainState, Array], number: Array
        ) -> tuple[tuple[TrainState, Array], None]:
            state, mean = carry
            draw, attack = jax.random.split(jax.random.fold_in(key, number))
            features, labels = sample(world, training.batch_size, draw)
            pixels = jnp.clip(features / span + 0.5, 0, 1)[:, None, :, None]
            state, _ = step(state, pixels, (labels + 1) // 2, attack)
            count = jnp.maximum(number - training.num_steps // 2, 0)
            (weights,) = jax.tree.leaves(state.params)
            return (state, mean + (weights - mean) / (count + 1)), None

        state = init(key, jnp.zeros([1, 1, d + 1, 1]))
        (weights,) = jax.tree.leaves(state.params)
        numbers = jnp.arange(training.num_steps)
        (_, mean), _ = jax.lax.scan(advance, (state, weights), numbers)
        return mean

    means = jax.vmap(average)(keys)
    if training.method == "sam":
        return means
    return means[:, 0] / jnp.mean(means[:, 1:], axis=1)


def train(
    world: World,
    training: Training,
    num_seeds: int,
    *,
    epsilon: float = 0.0,
    rho: float = 0.0,
) -> np.ndarray:
    """Trains on fresh samples and gives w_1 relative to the other weights.

    Args:
      world: of scalars.
      training: what to do.
      num_seeds: independent runs.
      epsilon: the radius of the attack, > 0 for the methods with one.
      rho: the radius of SAM.

    Returns:
      float64 [num_seeds]: the weights' average over the second half of the steps. The
      samples depend on the seed and the step alone: runs may be compared in pairs.
    """
    p, eta, d = float(world.p), float(world.eta), int(world.d)
    span, pixel_radius = 2 * (_TAIL + 1 + eta), 0.0
    if training.method.startswith("at"):
        # Few different ones, so that radii of one size share a compiled program.
        pixel_radius = 16.0 ** np.floor(np.log(epsilon / span) / np.log(16.0))
        span = epsilon / pixel_radius
    keys = jax.random.split(jax.random.key(0), num_seeds)
    weights = _train(
        *(p, eta, d, training, float(pixel_radius)),
        *(jnp.float32(span), jnp.float32(rho), keys),
    )
    return np.asarray(jax.device_get(weights), float)


def _attack(pixel_radius: float) -> Attack:
    if not pixel_radius:
        return identity
    # The gradient's sign is the same everywhere: two steps reach the corner.
    ball = linf(pixel_radius)
    return pgd(ball, step_size=pixel_radius, num_steps=2, random_start=False)


def _optimizer(
    world: World,
    training: Training,
    epsilon: ArrayLike,
    rho: Array,
    scale: float,
) -> optax.GradientTransformationExtraArgs:
    """SGD whose rate falls as 1 / sqrt(step), from the inverse of the curvature.

    SAM on one weight steepens the expected gradient where the batch's sign changes: by
    2 rho sqrt(B) phi(0) curvature / sigma, sigma an example's deviation.
    """
    if scale:
        curvature = scale**2 / 4
        deviation = scale * np.sqrt(world.p * (1 - world.p))
        steepening = 0.8 * rho * np.sqrt(training.batch_size) * curvature / deviation
        curvature = curvature * (1 + steepening)
    else:
        curvature = (2 + world.d * (world.eta + 2 * jnp.asarray(epsilon)) ** 2) / 4

    def rate(count: ArrayLike) -> Array:
        return jnp.asarray(1 / (curvature * jnp.sqrt(1 + jnp.asarray(count) / 50)))

    descent = optax.sgd(rate)
    if not training.method.startswith("sam"):
        return optax.with_extra_args_support(descent)
    return optax.with_extra_args_support(optax.chain(sam(rho, aux={}), descent))
