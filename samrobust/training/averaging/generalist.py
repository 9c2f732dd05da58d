"""Generalist: a robust and a natural expert, and the mixture of both.

Reference: Wang and Wang (2023), "Generalist: Decoupling Natural and Robust
Generalization", arXiv 2303.13813.
"""

import dataclasses

import jax
import jax.numpy as jnp

from samrobust.checks import below_one, count, share
from samrobust.training.averaging.ema import mix, moving
from samrobust.training.parts import Averaging
from samrobust.training.phases import first_epoch
from samrobust.training.state import TrainState
from samrobust.training.step import Method
from samrobust.types import Array, Entry, PyTree

__all__ = ["ENTRY", "generalist"]


def generalist(
    beta: float,
    first_beta: float = 1.0,
    decay: float = 0.999,
    begin: float = 2 / 3,
    reset: float = 0.625,
    every: int = 5,
    *,
    steps_per_epoch: int,
    total_steps: int,
) -> Averaging:
    """Builds the average of beta a + (1 - beta) b, of a robust and a natural expert.

    a and b are themselves averages, of what the row's method and standard training
    learn beside each other from the same batches, with the same optimizer. All three
    are moving averages of decay min(decay, (t + 1) / (t + 10)) at step t, from 0. In
    some late epochs both experts go on, after every step, from the mixture. Costs one
    pass with weight gradients a step beside the row's, and a second network in memory.

    Args:
      beta: in [0, 1], share of the robust expert in the last epoch; the authors' is
        0.4.
      first_beta: in [0, 1], its share at first.
      decay: in [0, 1).
      begin: fraction of the epochs, rounded up to whole ones, from which the share
        moves linearly from `first_beta` to `beta`.
      reset: fraction of the epochs, rounded up to whole ones, from which every
        `every`-th epoch is one in which the experts go on from the mixture.
      every: see there.
      steps_per_epoch: >= 1.
      total_steps: >= 1, of the training.

    Returns:
      An averaging whose `join(robust, natural)` is the method that trains both; each of
      these methods has this averaging too. Its state is the robust expert's, and the
      natural one's is in `average`; the log has `natural_loss` and `natural_accuracy`.
      **Guarantees**: where decay is 0, shares of 1 are the robust method bit for bit,
      shares of 0 standard training; up to the first reset the experts are so whatever
      the decay.

    Raises:
      ValueError: for a value out of range.

    Reference: Wang and Wang (2023), arXiv 2303.13813, as their code,
    PKU-ML/Generalist: 120 epochs, resets in epochs 75, 80, ..., 120. *Our deviation*:
    the experts share the learning rate, as there, and weight decay, which is 5e-4 there
    for the natural one and 3.5e-3 for the other.
    """
    share(beta=beta, first_beta=first_beta, begin=begin, reset=reset)
    below_one(decay=decay)
    count(every=every, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    epochs = total_steps // steps_per_epoch
    moves, resets = (first_epoch(fraction, epochs) for fraction in (begin, reset))

    def warmed_up(step: Array) -> Array:
        taken = step.astype(float)
        return jnp.minimum(decay, (taken + 1) / (taken + 10))

    averaging = moving(warmed_up)

    def of_robust(epoch: Array) -> Array:
        late = epoch.astype(float) - moves
        moved = jnp.clip(late / max(1, epochs - moves), 0, 1)
        return first_beta + moved * (beta - first_beta)

    def join(robust: Method, natural: Method) -> Method:
        def init(key: Array, images: Array | jax.ShapeDtypeStruct) -> TrainState:
            state = robust.init(key, images)
            others = {"robust": state.average, "natural": natural.init(key, images)}
            average = {**averaging.init(state.variables), **others}
            return dataclasses.replace(state, average=average)

        def train_step(
            state: TrainState, images: Array, labels: Array, key: Array
        ) -> tuple[TrainState, dict[str, Array]]:
            memory, epoch = state.average, state.step // steps_per_epoch + 1
            one = dataclasses.replace(state, average=memory["robust"])
            one, metrics = robust.train_step(one, images, labels, key)
            other, found = natural.train_step(memory["natural"], images, labels, key)
            mixed = mix(one.eval_variables, other.eval_variables, of_robust(epoch))
            average = {name: memory[name] for name in mixed}
            average = averaging.update(average, mixed, state.step)
            due = (epoch >= resets) & (epoch % every == 0)
            one, other = (_moved_to(average, expert, due) for expert in (one, other))
            memory = {**average, "robust": one.average, "natural": other}
            of_natural = {f"natural_{n}": found[n] for n in ("loss", "accuracy")}
            return dataclasses.replace(one, average=memory), metrics | of_natural

        return Method(init, train_step, robust.logits)

    return averaging._replace(join=join)


def _moved_to(variables: PyTree, state: TrainState, due: Array) -> TrainState:
    """Returns the state, with other variables where that is due."""

    def of(new: Array, own: Array) -> Array:
        return jnp.where(due, new.astype(own.dtype), own)

    return dataclasses.replace(state, **jax.tree.map(of, variables, state.variables))


ENTRY = Entry(
    generalist,
    "Generalist (beta = {beta:g})",
    fields={
        "beta": share,
        "first_beta": share,
        "decay": below_one,
        "begin": share,
        "reset": share,
        "every": count,
    },
    # The natural expert's pass.
    attack_passes=1.0,
)
