"""Forward and backward passes over a batch: over all of it, or over groups of it.

The network is any Flax Linen module, with or without `batch_stats` and dropout. The
training step does not depend on whether its passes run over groups. Over groups (for
m-sharpness) each group of m examples is a batch of its own: mean loss, BatchNorm,
gradient. Losses, logits and statistics are merged; gradients stay apart, [G, ...], for
SAM to perturb each group along its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from samrobust.checks import check, check_whole
from samrobust.sharpness.refusals import kind_of
from samrobust.sharpness.trees import mean_norm_of_groups, norm
from samrobust.system.distributed import map_groups
from samrobust.training.parts import Objective, name_of
from samrobust.types import Array, PyTree

__all__ = ["Pass", "PassFn", "Passes", "Views", "apply_in_training", "make_passes"]

# Images [B, H, W, C] by the names of the views; `weights` [B], where there are some.
Views: TypeAlias = dict[str, Array]


class Pass(NamedTuple):
    """Outcome of one pass.

    Attributes:
      loss: the mean over the batch, float32 scalar.
      logits: [B, K] of the adversarial view, in the order of the batch; of the natural
        one where none is adversarial.
      losses: [B], of each example, in the order of the batch.
      batch_stats: the running statistics after the pass; of groups, their mean.
      grads: of the mean loss; of groups, of each one's own, [G, ...].
      image_grads: of the batch's mean loss with respect to the adversarial images,
        [B, H, W, C]; None unless requested.
    """

    loss: Array
    logits: Array
    losses: Array
    batch_stats: PyTree
    grads: PyTree
    image_grads: Array | None


PassFn = Callable[[PyTree, PyTree, Views, Array, Array], Pass]


class Passes(NamedTuple):
    """The two passes of a step, of (params, batch_stats, views, labels, key).

    The key drives what is random in the network; each group has its own.

    Attributes:
      first: at parameters that are those of the whole batch.
      second: at parameters that SAM perturbed; of groups, [G, ...].
      losses: at any parameters of the whole batch, [B], by forward passes alone;
        differentiable.
      norm: of gradients, float32 scalar; of groups, the mean of their norms.
    """

    first: PassFn
    second: PassFn
    losses: Callable[..., Array]
    norm: Callable[[PyTree], Array]


def apply_in_training(
    model: nn.Module, params: PyTree, batch_stats: PyTree, images: Array, key: Array
) -> tuple[Array, PyTree]:
    """Returns logits [B, K] of a network that trains, and its updated `batch_stats`.

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
    objective: Objective,
    *,
    group_size: int = 0,
    mesh: Mesh | None = None,
    image_grads: bool = False,
) -> Passes:
    """Builds the passes.

    Args:
      model: see `make_train_step`.
      objective: its views are the forward passes of a pass, in order.
      group_size: see `make_train_step`.
      mesh: see there.
      image_grads: whether the first pass gives gradients of the adversarial images.
    """
    check_whole(0, group_size=group_size)
    judged = "adversarial" if "adversarial" in objective.views else "natural"

    def mean_loss(
        params: PyTree,
        adversarial: Array,
        batch_stats: PyTree,
        views: Views,
        labels: Array,
        key: Array,
    ) -> tuple[Array, tuple[PyTree, Array, Array]]:
        views = views | {"adversarial": adversarial}
        outputs: dict[str, Array] = {}
        for view in objective.views:
            # A repeated view updates the statistics again, but needs no backward pass
            # of its own. On CPUs XLA computes its forward pass once; elsewhere it
            # rounds otherwise, for BatchNorm's sums start from the statistics.
            again = view in outputs
            at = jax.lax.stop_gradient(params) if again else params
            found, batch_stats = apply_in_training(
                model, at, batch_stats, views[view], key
            )
            outputs.setdefault(view, found)
        logits = [outputs[view] for view in objective.views]
        weights = [views["weights"]] if "weights" in views else []
        losses = objective.loss(*logits, labels, *weights)
        check(
            getattr(losses, "shape", None) == labels.shape
            and jnp.issubdtype(losses.dtype, jnp.floating),
            f"an objective that gives a loss [{len(labels)}] to each example",
            **{name_of(objective.loss): jax.tree.map(kind_of, losses)},
        )
        return jnp.mean(losses), (batch_stats, outputs[judged], losses)

    def whole(
        params: PyTree,
        batch_stats: PyTree,
        views: Views,
        labels: Array,
        key: Array,
        *,
        image_grads: bool = False,
    ) -> Pass:
        inputs = (params, views["adversarial"], batch_stats, views, labels, key)
        if not image_grads:  # less to trace; XLA would drop them
            differentiate = jax.value_and_grad(mean_loss, has_aux=True)
            (loss, (batch_stats, logits, losses)), grads = differentiate(*inputs)
            return Pass(loss, logits, losses, batch_stats, grads, None)
        differentiate = jax.value_and_grad(mean_loss, argnums=(0, 1), has_aux=True)
        (loss, outputs), (grads, of_images) = differentiate(*inputs)
        batch_stats, logits, losses = outputs
        return Pass(loss, logits, losses, batch_stats, grads, of_images)

    def losses(
        params: PyTree, batch_stats: PyTree, views: Views, labels: Array, key: Array
    ) -> Array:
        inputs = (params, views["adversarial"], batch_stats, views, labels, key)
        return mean_loss(*inputs)[1][2]

    of_first = functools.partial(whole, image_grads=image_grads)
    if group_size == 0:
        return Passes(of_first, whole, losses, norm)

    def over_groups(
        one: Callable[..., Pass],
        shared: PyTree,
        own: PyTree,
        views: Views,
        labels: Array,
        key: Array,
    ) -> Pass:
        num_groups = _count(len(labels), group_size)
        return _merge(
            map_groups(
                lambda shared, own, batch: one(**shared, **own, **batch),
                shared,
                own | {"key": jax.random.split(key, num_groups)},
                {"views": views, "labels": labels},
                num_groups=num_groups,
                mesh=mesh,
            )
        )

    def first(params: PyTree, batch_stats: PyTree, *batch_and_key: Any) -> Pass:
        shared = {"params": params, "batch_stats": batch_stats}
        return over_groups(of_first, shared, {}, *batch_and_key)

    def second(params: PyTree, batch_stats: PyTree, *batch_and_key: Any) -> Pass:
        shared, own = {"batch_stats": batch_stats}, {"params": params}
        return over_groups(whole, shared, own, *batch_and_key)

    return Passes(first, second, losses, mean_norm_of_groups)


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
    """Returns the pass over a batch from those over its groups, all of one size."""
    image_grads = groups.image_grads
    if image_grads is not None:  # of the batch's mean loss, the mean of the groups'
        image_grads = image_grads / len(groups.loss)
        image_grads = image_grads.reshape(-1, *image_grads.shape[2:])
    return Pass(
        loss=jnp.mean(groups.loss),
        logits=groups.logits.reshape(-1, groups.logits.shape[-1]),
        losses=groups.losses.reshape(-1),
        batch_stats=jax.tree.map(
            lambda leaf: leaf.mean(axis=0).astype(leaf.dtype), groups.batch_stats
        ),
        grads=groups.grads,
        image_grads=image_grads,
    )
