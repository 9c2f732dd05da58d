"""The cost of a training step on paper: operations, and elements through memory.

A step is a number of passes forward and backward, which XLA's cost analysis counts for
any network. It cannot count the step itself: of a loop it counts the body once, and an
attack is a loop. Nor can it count on a GPU, where programs are analyzed after
compilation alone and products are calls without operations; so all is counted on a CPU.

Operations are those of a pass as traced, without what nobody reads: a multiply-add is
two, one with a zero of the padding is none. Elements are those that the operations of
the compiled pass read and write, with elementwise work fused as on a CPU.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.types import Array, PyTree

__all__ = ["StepCost", "count_passes", "step_cost"]

# Passes by what they differentiate: positions of arguments.
_PASSES = {"weights": 0, "images": 1, "both": (0, 1)}


class StepCost(NamedTuple):
    """The cost of a training step, or of one pass of it, for each image.

    Attributes:
      flops: floating point operations.
      elements: read from and written to memory.
    """

    flops: float
    elements: float


def count_passes(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int = 128
) -> dict[str, StepCost]:
    """Counts the passes of a network in training; no array is allocated.

    Args:
      model: called as `model.apply(variables, images, train=True)`.
      image_shape: (H, W, C).
      batch_size: of a pass; each image bears its share of the weights' elements.

    Returns:
      The costs of the passes for gradients of `weights`, `images` and `both`.

    Raises:
      ValueError: where JAX's default device is not a CPU.
    """
    platform = jax.default_backend()
    check(platform == "cpu", "a CPU to count on", "Set JAX_PLATFORMS.", device=platform)
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
    key = jax.random.key(0)
    variables = jax.eval_shape(lambda x: model.init(key, x, train=False), images)
    params = variables.pop("params")

    def loss(params: PyTree, images: Array, rest: PyTree) -> tuple[Array, Any]:
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": key}}
        logits, updated = model.apply({"params": params, **rest}, images, **options)
        return jnp.sum(logits), updated

    def cost(argnums: int | tuple[int, int]) -> StepCost:
        both_ways = jax.value_and_grad(loss, argnums, has_aux=True)
        lowered: Any = jax.jit(both_ways).lower(params, images, variables)
        num_bytes = lowered.compile().cost_analysis()["bytes accessed"]
        flops = lowered.cost_analysis()["flops"]
        elements = num_bytes / images.dtype.itemsize
        return StepCost(flops / batch_size, elements / batch_size)

    return {name: cost(argnums) for name, argnums in _PASSES.items()}


def step_cost(
    passes: Mapping[str, StepCost],
    attack_steps: float = 0,
    num_passes: float = 1,
    *,
    attack_weight_gradients: bool = False,
) -> StepCost:
    """Returns the cost of a training step.

    Args:
      passes: of `count_passes`.
      attack_steps: gradient steps of the attack; 0: none.
      num_passes: forward and backward over the weights: 1, with SAM 2.
      attack_weight_gradients: the attack computes gradients of the weights too, as the
        paper's code does, and throws them away.
    """
    attack = passes["both" if attack_weight_gradients else "images"]
    terms = zip(passes["weights"], attack, strict=True)
    return StepCost(*(num_passes * own + attack_steps * more for own, more in terms))
