"""Sparse SAM: half of the weights, or fewer, are perturbed.

Reference: Mi et al. (2022), arXiv 2210.05177, Algorithms 1 to 3.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check_choice, check_strength, count, one_of, share
from samrobust.sharpness.masks import (
    largest,
    live,
    masked,
    nothing,
    restricted,
    size,
    where_given,
)
from samrobust.sharpness.refusals import check_losses, check_present, check_ungrouped
from samrobust.sharpness.trees import at_least_float32, norm, of_length
from samrobust.sharpness.two_pass import two_pass
from samrobust.types import Array, ArrayLike, Entry, Field, PyTree

__all__ = ["ENTRY", "ssam"]


def ssam(
    mask: str,
    rho: ArrayLike | optax.Schedule,
    sparsity: float = 0.5,
    every: int = 1,
    num_samples: int = 16,
    drop_rate: float = 0.5,
    *,
    steps_per_epoch: int,
    total_steps: int,
    aux: PyTree = None,
    grouped: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Builds SSAM: the gradient at w + m rho g / ||g||_2, m a sparse mask.

    Args:
      mask: `fisher`: m keeps the largest sums of g_n^2 over examples n, the empirical
        Fisher information; before the first mask, at the first update, m = 0. Or
        `dynamic`: m is drawn, drops where |g| is smallest, and grows elsewhere at
        random, by a fraction of m that falls to 0 as a cosine.
      rho: as of `sam`; the norm is that of the whole gradient.
      sparsity: in [0, 1], the fraction of the weights that m leaves out.
      every: >= 1, epochs between two masks.
      num_samples: >= 1, examples whose gradients make a `fisher` mask; of a smaller
        batch all.
      drop_rate: in [0, 1], of a `dynamic` mask, at the first epoch.
      steps_per_epoch: >= 1, updates of an epoch.
      total_steps: >= 1, updates of the training.
      aux: see `two_pass`.
      grouped: must be False: the mask is that of the batch.

    Returns:
      A transformation with the contract of `two_pass`, whose state holds m. In `update`
      `dynamic` wants a `key`, `fisher` wants `losses` and a `grad_fn` that takes
      examples. Costs one further pass; a new mask costs a sort, a `fisher` one also
      `num_samples` passes over one example. **Guarantees**: with sparsity and drop rate
      0, `dynamic` is `sam` bit for bit. The metric `live` is the fraction of the
      weights that were perturbed.

    Raises:
      ValueError: as `two_pass`; for an unknown mask or a number out of range.

    Reference: Mi et al. (2022), arXiv 2210.05177; when masks are made and how many
    weights they keep as in the authors' code,
    Mi-Peng/Sparse-Sharpness-Aware-Minimization, whose default drops by gradient and
    grows at random (where less is free than a mask drops, it shrinks). *Our deviation*:
    a `fisher` mask comes from the first examples of the batch after the one where it is
    due, and not from examples drawn from all; of its passes, each over one example, the
    first begins without a gradient (theirs with what the last second pass left), and
    none moves BatchNorm's running statistics; no 1e-7 is added to the norm, zero is
    treated exactly instead.
    """
    check_choice(("fisher", "dynamic"), mask=mask)
    check_ungrouped("ssam", grouped=grouped)
    share(sparsity=sparsity, drop_rate=drop_rate)
    counts = {"every": every, "num_samples": num_samples}
    count(**counts, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    period = every * steps_per_epoch
    if mask == "fisher":
        before, after = _fisher(sparsity, period, num_samples), _unchanged
    else:
        rates = [
            drop_rate * (1 + math.cos(math.pi * step / total_steps)) / 2
            for step in range(0, total_steps, period)
        ]
        before, after = _drawn(sparsity), _moved(sparsity, period, rates)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, PyTree]:
        del params
        current = restricted(state, updates)
        current = before(updates, current, **extra_args)
        ascent = of_length(extra_args["rho"], updates, norm(updates))
        following = after(updates, current, **extra_args)
        kept = where_given(lambda *new: new[-1], updates, state, following)
        return masked(current, ascent), kept

    ascent = optax.GradientTransformationExtraArgs(nothing, update)
    return two_pass(rho, ascent, measure=live, aux=aux)


# A step of a mask: of the gradients, the mask so far, and what `two_pass` gives.
_Mask: TypeAlias = Callable[..., PyTree]


def _unchanged(grads: PyTree, mask: PyTree, **extra_args: Any) -> PyTree:
    del grads, extra_args
    return mask


def _fisher(sparsity: float, period: int, num_samples: int) -> _Mask:
    """Returns the mask of Algorithm 2: where sums of squared gradients are large."""

    def update(
        grads: PyTree,
        mask: PyTree,
        *,
        step: Array,
        example_grads: Any,
        losses: Any = None,
        **_: Any,
    ) -> PyTree:
        check_present(losses=losses)
        check_losses(losses=losses)
        count = min(num_samples, len(losses))

        def add(sums: PyTree, number: Array) -> tuple[PyTree, None]:
            squares = jax.tree.map(
                lambda g: jnp.abs(at_least_float32(g)) ** 2, example_grads(number[None])
            )
            return jax.tree.map(jnp.add, sums, squares), None

        def renew() -> PyTree:
            nothing = jax.tree.map(lambda g: jnp.zeros_like(jnp.abs(g)), grads)
            scores, _ = jax.lax.scan(add, nothing, jnp.arange(count))
            return largest(scores, int(size(scores) * (1 - sparsity)))

        # Due after the first update of an epoch: made in the one that follows.
        is_due = (step > 0) & ((step - 1) % period == 0)
        return jax.lax.cond(is_due, renew, lambda: mask)

    return update


def _drawn(sparsity: float) -> _Mask:
    """Returns the mask that is drawn at the first update and then left alone."""

    def update(
        grads: PyTree, mask: PyTree, *, step: Array, key: Any = None, **_: Any
    ) -> PyTree:
        check_present(key=key)
        count = size(grads) - math.ceil(size(grads) * sparsity)

        def draw() -> PyTree:
            return largest(_random(key, grads), count)

        return jax.lax.cond(step == 0, draw, lambda: mask)

    return update


def _moved(sparsity: float, period: int, rates: Sequence[float]) -> _Mask:
    """Returns the mask of Algorithm 3: some weights are dropped, as many are grown."""

    def update(
        grads: PyTree, mask: PyTree, *, step: Array, key: Any, **_: Any
    ) -> PyTree:
        total = size(grads)
        most = total - total * sparsity  # of the weights that are kept
        stay = jnp.array([int(most * (1 - rate)) for rate in rates], jnp.int32)
        grow = [int(min(most * rate, total * sparsity)) for rate in rates]

        def renew() -> PyTree:
            epoch = jnp.minimum(step // period, len(rates) - 1)
            chances = _random(jax.random.fold_in(key, 1), grads)
            staying, growing = (
                jax.tree.map(lambda m, g: jnp.where(m, jnp.abs(g), -1.0), mask, grads),
                jax.tree.map(lambda m, r: jnp.where(m, -1.0, r), mask, chances),
            )
            grown = jnp.array(grow, jnp.int32)[epoch]
            return jax.tree.map(
                jnp.logical_or,
                largest(staying, stay[epoch]),
                largest(growing, grown),
            )

        return jax.lax.cond(step % period == 0, renew, lambda: mask)

    return update


def _random(key: Array, like: PyTree) -> PyTree:
    """Returns uniform numbers, split over devices as another tree is."""
    leaves, structure = jax.tree.flatten(like)
    drawn = []
    for i, leaf in enumerate(leaves):
        numbers = jax.random.uniform(
            jax.random.fold_in(key, i), leaf.shape, jnp.float32
        )
        drawn.append(jnp.where(jnp.abs(leaf) >= 0, numbers, numbers))
    return jax.tree.unflatten(structure, drawn)


ENTRY = Entry(
    ssam,
    "SSAM ({mask}, rho = {rho:g})",
    fields={
        "mask": Field("fisher", one_of("fisher", "dynamic")),
        "rho": check_strength,
        "sparsity": share,
        "every": count,
        "num_samples": count,
        "drop_rate": share,
    },
    chosen=lambda values, _: int(values["mask"] == "fisher"),
)
