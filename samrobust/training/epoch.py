"""The compiled part of the loop: data on the device in, several steps, state out.

Batches are gathered, augmented and trained on inside `jit`; metrics are summed on the
device. Every random number is a pure function of the seed and the step, so that a run
can go on from any step as if it had never stopped.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from samrobust.data import random_crop_and_flip, take_batch
from samrobust.parallel import shard_batch
from samrobust.training.state import TrainState
from samrobust.training.step import TrainStep
from samrobust.types import Array

__all__ = ["Call", "EpochPlan", "Totals", "make_run_steps", "zero_totals"]

Totals: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the device: `num_steps` steps on batches of `batch_size`."""

    num_steps: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """How the examples of an epoch are cut into batches, and the batches into calls.

    Attributes:
      num_examples: of the training split.
      batch_size: over all devices.
      steps_per_call: at most this many steps a call.
      drop_remainder: leave out an incomplete last batch.
    """

    num_examples: int
    batch_size: int
    steps_per_call: int
    drop_remainder: bool

    @property
    def remainder(self) -> int:
        """Size of the incomplete last batch; 0 if there is none."""
        return 0 if self.drop_remainder else self.num_examples % self.batch_size

    @property
    def num_steps(self) -> int:
        """Steps in an epoch."""
        return self.num_examples // self.batch_size + (self.remainder > 0)

    def calls(self, start: int = 0) -> list[Call]:
        """The calls from step `start` of an epoch to its end."""
        full = self.num_examples // self.batch_size
        calls = []
        for step in range(start, full, self.steps_per_call):
            steps = min(self.steps_per_call, full - step)
            calls.append(Call(steps, self.batch_size))
        if self.remainder and start < self.num_steps:
            calls.append(Call(1, self.remainder))
        return calls


def zero_totals(metrics: Iterable[str]) -> Totals:
    """Sums over no step at all of metrics of these names."""
    return {
        "examples": jnp.zeros([], jnp.float32),
        "first_bad_step": jnp.full([], -1, jnp.int32),
        "sums": {name: jnp.zeros([], jnp.float32) for name in metrics},
    }


def _add(totals: Totals, metrics: dict[str, Array], size: int, step: Array) -> Totals:
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    is_first = ~finite & (totals["first_bad_step"] < 0)
    sums = {
        name: total + size * metrics[name] for name, total in totals["sums"].items()
    }
    return {
        "examples": totals["examples"] + size,
        "first_bad_step": jnp.where(is_first, step, totals["first_bad_step"]),
        "sums": sums,
    }


def make_run_steps(
    train_step: TrainStep, plan: EpochPlan, *, padding: int, flip: bool, mesh: Mesh
) -> Callable[[Call], Callable]:
    """Builds the function of a call, to be jitted with the first two donated.

    Args:
      train_step: the pure step.
      plan: of the epoch.
      padding: of the random crop, in pixels.
      flip: mirror at random.
      mesh: over which the batch is split.

    Returns:
      `run_steps(call)(state, totals, images, labels, permutation, key) ->
      (state, totals, done)`: images uint8 [N, H, W, C], labels int32 [N], the epoch's
      permutation int32 [N], the run's key. `done` is ready when the call is.
    """

    def run_steps(call: Call) -> Callable:
        def one_step(
            state: TrainState,
            totals: Totals,
            data: tuple[Array, Array, Array],
            key: Array,
        ) -> tuple[TrainState, Totals]:
            images, labels, permutation = data
            start = (state.step % plan.num_steps) * plan.batch_size
            batch = take_batch(images, labels, permutation, start, call.batch_size)
            batch_images, batch_labels = shard_batch(batch, mesh)
            crop_key, attack_key = jax.random.split(jax.random.fold_in(key, state.step))
            batch_images = random_crop_and_flip(
                batch_images, padding=padding, flip=flip, key=crop_key
            )
            new_state, metrics = train_step(
                state, batch_images, batch_labels, attack_key
            )
            return new_state, _add(totals, metrics, call.batch_size, state.step)

        def run(
            state: TrainState,
            totals: Totals,
            images: Array,
            labels: Array,
            permutation: Array,
            key: Array,
        ) -> tuple[TrainState, Totals, Array]:
            data = (images, labels, permutation)
            if call.num_steps == 1:  # no loop: XLA's CPU compiler is better outside one
                state, totals = one_step(state, totals, data, key)
            else:
                (state, totals), _ = jax.lax.scan(
                    lambda carry, _: (one_step(*carry, data, key), None),
                    (state, totals),
                    length=call.num_steps,
                )
            return state, totals, state.step + 0

        return run

    return run_steps
