"""What is measured of a network under attack: who stands, and how near to falling."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from samrobust.attacks import Ball, cross_entropy, margin, staged_pgd
from samrobust.evaluation import BatchFn, is_correct, is_finite, of_name
from samrobust.sanity.network import logits_of
from samrobust.types import Array, Attack, PyTree

__all__ = ["Craft", "measure_crafts", "measure_steps", "rescaled_cross_entropy"]


class Craft(NamedTuple):
    """How adversarial images are made: an attack, and the network it is shown.

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
    classified rightly, under `NAME margin` the margin loss, and under `NAME finite`
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
    """The cross entropy [B] of logits that are divided by the size of their margin.

    The scale of each example is taken as a constant: its logits may be as large as they
    like, and its gradient still does not vanish.
    """
    size = jnp.abs(margin(logits, labels))
    scale = jax.lax.stop_gradient(jnp.where(size > 0, size, 1.0))
    return cross_entropy(logits.astype(jnp.float32) / scale[:, None], labels)
