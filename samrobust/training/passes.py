"""Forward and backward passes over a batch: over all of it, or over groups of it.

The network is any Flax Linen module: with a collection `batch_stats` or without, with
dropout or without. The training step takes its passes from here and does not ask which
they are. Over groups (for
m-sharpness) each group of m examples is a batch of its own: mean loss, BatchNorm,
gradient. Losses, logits and statistics are merged; gradients stay apart, [G, ...], for
SAM to perturb each group along its own.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from samrobust.checks import check
from samrobust.parallel import map_groups
from samrobust.types import Array, LossFn, PyTree

__all__ = ["Pass", "PassFn", "Passes", "apply_in_training", "make_passes"]


class Pass(NamedTuple):
    """What one pass gives.

    Attributes:
      loss: the mean over the batch, float32 scalar.
      logits: [B, K], in the order of the batch.
      batch_stats: the running statistics after the pass; of groups, their mean.
      grads: of the mean loss; of groups, of each one's own, [G, ...].
    """

    loss: Array
    logits: Array
    batch_stats: PyTree
    grads: PyTree


PassFn = Callable[[PyTree, PyTree, Array, Array, Array], Pass]


class Passes(NamedTuple):
    """The two passes of a step, of (params, batch_stats, images, labels, key).

    The key decides what is random in the network; of groups, each has its own of it.

    Attributes:
      first: at parameters that are those of the whole batch.
      second: at parameters that SAM perturbed; of groups, [G, ...].
      norm: of gradients, float32 scalar; of groups, the mean of their norms.
    """

    first: PassFn
    second: PassFn
    norm: Callable[[PyTree], Array]


def apply_in_training(
    model: nn.Module, params: PyTree, batch_stats: PyTree, images: Array, key: Array
) -> tuple[Array, PyTree]:
    """Logits [B, K] of a network that trains, and its updated `batch_stats`.

    The key is consumed by dropout and whatever else in the network is random.
    """
    # Flax draws what has another name than `dropout` from `params`.
    dropout, other = jax.random.split(key)
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": dropout, "params": other},
    )
    check(
        logits.ndim == 2 and len(logits) == len(images) and logits.shape[1] > 1,
        f"logits [{len(images)}, K] of {len(images)} images and K >= 2 classes",
        shape=logits.shape,
    )
    return logits, updated.get("batch_stats", {})


def make_passes(
    model: nn.Module,
    objective: LossFn,
    *,
    group_size: int = 0,
    mesh: Mesh | None = None,
) -> Passes:
    """Builds the passes; the arguments are those of `make_train_step`."""
    check(group_size >= 0, "0 <= group_size", group_size=group_size)

    def mean_loss(
        params: PyTree, batch_stats: PyTree, images: Array, labels: Array, key: Array
    ) -> tuple[Array, tuple[PyTree, Array]]:
        logits, updated = apply_in_training(model, params, batch_stats, images, key)
        losses = objective(logits, labels)
        check(
            losses.shape == labels.shape,
            f"an objective that gives a loss [{len(labels)}] to each example",
            shape=losses.shape,
        )
        return jnp.mean(losses), (updated, logits)

    differentiate = jax.value_and_grad(mean_loss, has_aux=True)

    def whole(
        params: PyTree, batch_stats: PyTree, images: Array, labels: Array, key: Array
    ) -> Pass:
        (loss, (batch_stats, logits)), grads = differentiate(
            params, batch_stats, images, labels, key
        )
        return Pass(loss, logits, batch_stats, grads)

    if group_size == 0:
        return Passes(whole, whole, optax.tree.norm)

    def over_groups(
        shared: PyTree, own: PyTree, images: Array, labels: Array, key: Array
    ) -> Pass:
        num_groups = _count(len(images), group_size)
        return _merge(
            map_groups(
                lambda shared, own, batch: whole(**shared, **own, **batch),
                shared,
                own | {"key": jax.random.split(key, num_groups)},
                {"images": images, "labels": labels},
                num_groups=num_groups,
                mesh=mesh,
            )
        )

    def first(params: PyTree, batch_stats: PyTree, *batch_and_key: Array) -> Pass:
        shared = {"params": params, "batch_stats": batch_stats}
        return over_groups(shared, {}, *batch_and_key)

    def second(params: PyTree, batch_stats: PyTree, *batch_and_key: Array) -> Pass:
        shared, own = {"batch_stats": batch_stats}, {"params": params}
        return over_groups(shared, own, *batch_and_key)

    return Passes(first, second, _mean_norm)


def _count(batch_size: int, group_size: int) -> int:
    check(
        batch_size % group_size == 0,
        "a batch divisible by group_size",
        "Choose a size that divides every batch, or 0 for the whole batch.",
        group_size=group_size,
        batch_size=batch_size,
    )
    return batch_size // group_size


def _merge(groups: Pass) -> Pass:
    """The pass over a batch from those over its groups, which are of one size."""
    return Pass(
        loss=jnp.mean(groups.loss),
        logits=groups.logits.reshape(-1, groups.logits.shape[-1]),
        batch_stats=jax.tree.map(
            lambda leaf: leaf.mean(axis=0).astype(leaf.dtype), groups.batch_stats
        ),
        grads=groups.grads,
    )


def _mean_norm(grads: PyTree) -> Array:
    return jnp.mean(jax.vmap(optax.tree.norm)(grads))
