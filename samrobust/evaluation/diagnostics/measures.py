"""Measurements of a network, on natural and on adversarial images."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.errors import InvalidRngError

from samrobust.attacks import Ball, cross_entropy, margin, staged_pgd
from samrobust.attacks.losses import is_finite
from samrobust.evaluation import BatchFn, is_correct, of_name
from samrobust.system.jaxprs import equations
from samrobust.types import Array, Attack, LogitsFn, LossFn, PyTree

__all__ = [
    "Craft",
    "count_products",
    "float32_copy",
    "logits_of",
    "measure_crafts",
    "measure_gradients",
    "measure_logits",
    "measure_steps",
    "rescaled_cross_entropy",
]

_PRODUCTS = ("dot_general", "conv_general_dilated")


def logits_of(
    model: nn.Module, variables: PyTree, key: Array | None = None
) -> LogitsFn:
    """Returns the network as a function of images, its random numbers held fixed.

    Args:
      model: `apply(variables, images, train=False)` gives logits.
      variables: of the model.
      key: what the draws of a random network depend on; the same one makes it
        deterministic. One for all images, or a key array [B]. None: one and the same.
    """
    key = jax.random.key(0) if key is None else key

    def drawn(image: Array, key: Array) -> Array:
        # Flax takes `params` for every stream that it is not given by name.
        rngs = {"params": key}
        return cast(Array, model.apply(variables, image[None], train=False, rngs=rngs))

    def logits_fn(images: Array) -> Array:
        try:
            return cast(Array, model.apply(variables, images, train=False))
        except InvalidRngError:  # one image at a time, whatever batch it stands in
            return jax.vmap(drawn, (0, 0 if key.ndim else None))(images, key)[:, 0]

    return logits_fn


def float32_copy(model: nn.Module) -> nn.Module | None:
    """Returns the model in float32; None if it is, or has no `dtype` to set."""
    dtype: Any = getattr(model, "dtype", None)
    if dtype is None or jnp.dtype(dtype) == jnp.float32:
        return None
    return model.clone(dtype=jnp.float32)


def count_products(
    model: nn.Module, variables: PyTree, image_shape: tuple[int, ...]
) -> dict[str, int]:
    """Counts matrix products and convolutions by the precision of their factors.

    The names are `float32` (or `float64`) where the factors keep their precision on
    every backend; `float32 rounded` where GPUs and TPUs may round them to 10 or 7 bits,
    since the model asks for that; else the narrower factor's, as in `bfloat16`.
    """

    def logits(variables: PyTree, images: Array) -> Array:
        return logits_of(model, variables)(images)

    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    with jax.default_matmul_precision("highest"):  # as an evaluation sets it
        traced = jax.make_jaxpr(logits)(variables, images)
    return dict(Counter(_products(traced.jaxpr)))


def _products(jaxpr: Any) -> Iterator[str]:
    for equation in equations(jaxpr):
        if equation.primitive.name in _PRODUCTS:
            dtypes = [operand.aval.dtype for operand in equation.invars]
            narrow = str(min(dtypes, key=lambda dtype: dtype.itemsize))
            asked = equation.params["precision"]
            exact = asked == (jax.lax.Precision.HIGHEST,) * 2
            yield f"{narrow} rounded" if narrow == "float32" and not exact else narrow


def measure_logits(model: nn.Module) -> BatchFn:
    """Measures `logits` [B, K] in float32 and whether they are `finite`, bool [B].

    A random network draws by the keys.
    """

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        del labels
        logits = logits_of(model, variables, key)(images)
        return {"logits": logits.astype(jnp.float32), "finite": is_finite(logits)}

    return measure


def measure_gradients(model: nn.Module) -> BatchFn:
    """Measures where the losses are flat, in float32 whatever the model's precision.

    The outcome, each [B]: `correct`; `saturated`, whether the cross entropy is exactly
    zero; `zero` and `zero_margin`, whether every entry of the gradient of the
    cross entropy and of the margin is exactly zero.
    """
    model = float32_copy(model) or model

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        del key
        logits_fn = logits_of(model, variables)

        def is_flat(loss: LossFn) -> Array:
            gradient = jax.grad(lambda x: jnp.sum(loss(logits_fn(x), labels)))(images)
            return jnp.all(gradient == 0, axis=tuple(range(1, images.ndim)))

        logits = logits_fn(images)
        return {
            "correct": is_correct(logits, labels),
            "saturated": cross_entropy(logits, labels) == 0,
            "zero": is_flat(cross_entropy),
            "zero_margin": is_flat(margin),
        }

    return measure


class Craft(NamedTuple):
    """The making of adversarial images: an attack, and the network it is shown.

    Attributes:
      attack: the attack.
      model: the network that the attack sees.
      source: the name of that network's variables; empty: those of the network itself.
    """

    attack: Attack
    model: nn.Module
    source: str = ""


def measure_crafts(model: nn.Module, crafts: Mapping[str, Craft]) -> BatchFn:
    """Measures a network on adversarial images, its own or those made on others.

    `variables` are a dictionary by the names of the sources, the network's own under
    the empty name. The outcome, each [B], by the crafts' names: whether the image is
    classified correctly, under `NAME margin` the margin loss, and under `NAME finite`
    whether its logits make a decision.
    """

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        judge = logits_of(model, variables[""])
        outcome = {}
        for name, craft in crafts.items():
            seen = logits_of(craft.model, variables[craft.source])
            attacked = craft.attack(seen, images, labels, key=of_name(key, name))
            logits = judge(attacked)
            outcome[name] = is_correct(logits, labels)
            outcome[f"{name} margin"] = margin(logits, labels)
            outcome[f"{name} finite"] = is_finite(logits)
        return outcome

    return measure


def measure_steps(
    model: nn.Module, ball: Ball, stages: Sequence[int], restarts: int
) -> BatchFn:
    """Measures PGD on the cross entropy after some numbers of steps, and restarts.

    A step is a quarter of the radius; any misclassified iterate counts.

    Args:
      model: the network.
      ball: the ball.
      stages: numbers of steps, rising; one run passes them all.
      restarts: runs, one after the other.

    Returns:
      The measure; its outcome is `standing` and `margin` [B, restarts, stages]: whether
      no iterate of this run was misclassified so far, and the margin at the iterate.
    """
    attack = staged_pgd(ball, step_size=ball.radius / 4, num_steps=stages[-1])
    lengths = jnp.diff(jnp.array([0, *stages]))

    def measure(
        variables: PyTree, images: Array, labels: Array, *, key: Array
    ) -> dict[str, Array]:
        logits_fn = logits_of(model, variables)

        def stage(carry: tuple[Array, Array], length: Array) -> tuple:
            current, standing = carry
            current, broken = attack.advance(logits_fn, current, images, labels, length)
            standing = standing & ~broken
            return (current, standing), (standing, margin(logits_fn(current), labels))

        def run(restart: Array) -> tuple[Array, Array]:
            start = attack.start(images, labels, restart, key=key)
            begin = (start, jnp.ones(labels.shape, bool))
            return jax.lax.scan(stage, begin, lengths)[1]

        standing, margins = jax.lax.map(run, jnp.arange(restarts))
        return {
            "standing": jnp.moveaxis(standing, -1, 0),
            "margin": jnp.moveaxis(margins, -1, 0),
        }

    return measure


def rescaled_cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the cross entropy [B] of logits divided by the size of their margin.

    The scale of each example is taken as a constant: its logits may be as large as they
    like, and its gradient still does not vanish.
    """
    size = jnp.abs(margin(logits, labels))
    usable = (size > 0) & (size < jnp.inf)
    scale = jax.lax.stop_gradient(jnp.where(usable, size, 1.0))
    return cross_entropy(logits.astype(jnp.float32) / scale[:, None], labels)
