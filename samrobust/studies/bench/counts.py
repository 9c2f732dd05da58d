"""The cost of a training step on paper: operations, and elements through memory.

A step is a number of passes forward and backward, which XLA's cost analysis counts for
any network. It cannot count the step itself: of a loop it counts the body once, and an
attack is a loop. Nor can it count on a GPU, where programs are analyzed after
compilation alone and products are calls without operations; so all is counted on a CPU.

Operations are those of a pass as traced, without what nobody reads: a multiply-add is
two, one with a zero of the padding is none. Elements are those that the operations of
the compiled pass read and write, with elementwise work fused as on a CPU.

Conventions: counts are per image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from samrobust.checks import check
from samrobust.types import Array, PyTree

__all__ = ["Counts", "Work", "count"]

# Passes by what they differentiate: positions of arguments.
_PASSES = {"weights": 0, "images": 1, "both": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Work:
    """The passes of a training step.

    Attributes:
      attack_steps: gradient steps of the attack; 0: none.
      passes: forward and backward passes over the weights: 1, with SAM 2.
      attack_weight_gradients: the attack computes gradients of the weights too, as the
        paper's code does, and throws them away.
    """

    attack_steps: int = 0
    passes: int = 1
    attack_weight_gradients: bool = False


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts of one network, by pass: `weights`, `images` or `both`.

    Attributes:
      operations: floating point operations.
      elements: read and written in memory.
    """

    operations: Mapping[str, float]
    elements: Mapping[str, float]

    def flops(self, work: Work) -> float:
        """Returns the operations of a training step."""
        return _total(self.operations, work)

    def traffic(self, work: Work) -> float:
        """Returns the elements through memory in a training step."""
        return _total(self.elements, work)


def _total(by_pass: Mapping[str, float], work: Work) -> float:
    attack = "both" if work.attack_weight_gradients else "images"
    return work.passes * by_pass["weights"] + work.attack_steps * by_pass[attack]


def count(
    model: nn.Module, image_shape: tuple[int, ...], batch_size: int = 128
) -> Counts:
    """Counts the passes of a network in training; no array is allocated.

    Args:
      model: called as `model.apply(variables, images, train=True)`.
      image_shape: (H, W, C).
      batch_size: of a pass; each image bears its share of the weights' elements.

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
        logits, updated = model.apply(
            {"params": params, **rest},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        return jnp.sum(logits), updated

    operations, elements = {}, {}
    for name, argnums in _PASSES.items():
        both_ways = jax.value_and_grad(loss, argnums, has_aux=True)
        lowered: Any = jax.jit(both_ways).lower(params, images, variables)
        operations[name] = lowered.cost_analysis()["flops"] / batch_size
        accessed = lowered.compile().cost_analysis()["bytes accessed"]
        elements[name] = accessed / images.dtype.itemsize / batch_size
    return Counts(operations, elements)
