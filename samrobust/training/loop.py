"""The training loop: epochs, checkpoints, validation, interruption and resumption.

The same call goes on where the last one stopped, and ends bit-identical to a run that
was never stopped. Nothing is read from the device within an epoch, but for the checks
that come with a checkpoint.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from samrobust import building
from samrobust.data import Dataset
from samrobust.identity import Identity, identity_of
from samrobust.parallel import data_mesh, replicated
from samrobust.training.epoch import Carry, EpochPlan, EpochRunner, Totals
from samrobust.training.history import History, TrainingDivergedError
from samrobust.training.setup import make_parts, make_plan
from samrobust.training.state import TrainState
from samrobust.types import Config

__all__ = [
    "InterruptedRunError",
    "Outcome",
    "Progress",
    "TrainingDivergedError",
    "train",
]

Validate = Callable[[TrainState], dict[str, float]]


class InterruptedRunError(RuntimeError):
    """The run was asked to stop, saved its state and can go on."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run is.

    Attributes:
      phase: `compiling`, `training` or `validating`.
      step: steps done, of `num_steps`.
      num_steps: of the whole run.
      metrics: of the last finished epoch; empty before.
    """

    phase: str
    step: int
    num_steps: int
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished training.

    Attributes:
      state: after the last step.
      seconds: spent in training steps, over all restarts.
      step_seconds: median over the epochs of the mean seconds of a step.
      step: the last one.
      identity: of the run.
    """

    state: TrainState
    seconds: float
    step_seconds: float
    step: int
    identity: Identity


def train(
    config: Config,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    validate: Validate | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    may_write: Callable[[], None] = lambda: None,
) -> Outcome:
    """Trains to the end, from the newest intact checkpoint where there is one.

    Args:
      config: validated.
      dataset: that of `config.data`.
      workdir: receives `metrics.jsonl` and `checkpoints/`; claimed by the caller. Of
        several processes, 0 alone sees it.
      validate: called after each epoch with the state; its `score` (higher is better)
        decides which state is kept as the best one.
      on_progress: called after each call of the device.
      should_stop: asked as often; if true, the state is saved and the run stops. Of
        several processes all must get the same answer, see `AgreedStop`.
      may_write: called before each checkpoint, by process 0; raises if not.

    Raises:
      TrainingDivergedError: with the step and the last good checkpoint.
      InterruptedRunError: after `should_stop`.
      CheckpointError: if there are checkpoints and none is intact, or the newest intact
        one is of another run.
    """
    plan = make_plan(config, len(dataset.train))
    parts = make_parts(config, dataset, plan.num_steps)
    init_key, run_key = jax.random.split(jax.random.key(config.seed))
    mesh = data_mesh()
    runner = EpochRunner(
        parts.train_step,
        plan,
        dataset.train,
        padding=config.data.padding,
        flip=config.data.flip,
        mesh=mesh,
        key=run_key,
    )
    init = jax.jit(
        lambda key: Carry(parts.init(key), parts.zero_totals),
        out_shardings=replicated(mesh),
    )
    fresh = init(init_key)
    zeros = jax.tree.map(jnp.copy, fresh.totals)  # fresh itself is donated
    identity = identity_of(config, dataset)
    with History(config, workdir, identity, may_write) as history:
        carry = history.restore(fresh, mesh, plan.num_steps * config.training.epochs)
        run = _Run(
            config, plan, runner, zeros, history, validate, on_progress, should_stop
        )
        return run.to_the_end(carry)


@dataclasses.dataclass
class _Run:
    """The loop over epochs and calls."""

    config: Config
    plan: EpochPlan
    runner: EpochRunner
    zero_totals: Totals
    history: History
    validate: Validate | None
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps * self.config.training.epochs

    def to_the_end(self, carry: Carry) -> Outcome:
        """Trains what is left."""
        step = int(carry.state.step)
        if step < self.num_steps:
            self._report("compiling", step)
            for call in dict.fromkeys(self.plan.calls()):
                self.runner.compile(call, carry)
        while step < self.num_steps:
            carry, step = self._epoch(carry, step)
        self.history.save(carry, step, 0.0)
        seconds = [line["seconds"] for line in self.history.lines]
        step_seconds = statistics.median(seconds) / self.plan.num_steps
        return Outcome(
            carry.state, sum(seconds), step_seconds, step, self.history.identity
        )

    def _epoch(self, carry: Carry, step: int) -> tuple[Carry, int]:
        """From a step to the end of its epoch; then its metrics and validation."""
        epoch = step // self.plan.num_steps
        started = time.monotonic() - self.history.earlier_seconds
        self.history.earlier_seconds = 0.0
        permutation = self.runner.permutation(epoch)
        previous = None
        for call in self.plan.calls(step % self.plan.num_steps):
            carry, done = self.runner.run(call, carry, permutation)
            step += call.num_steps
            # At most two calls in flight: a signal is heard soon, the ETA is true.
            jax.block_until_ready(previous)
            previous = done
            self._report("training", step)
            if step % self.plan.num_steps:
                self._pause(carry, step, time.monotonic() - started)
        totals = jax.device_get(carry.totals)
        self.history.check_finite(totals)
        line = self._summarise(totals, step, time.monotonic() - started)
        carry = Carry(carry.state, jax.tree.map(jnp.copy, self.zero_totals))
        if self.validate is not None:
            self._report("validating", step)
            scores = self.validate(carry.state)
            self.history.keep_best(carry, step, scores)
            line |= {f"validation_{name}": score for name, score in scores.items()}
        self.history.append(line)
        self._report("training", step)
        self._pause(carry, step, 0.0)
        return carry, step

    def _pause(self, carry: Carry, step: int, epoch_seconds: float) -> None:
        """Saves when it is time to, or when the run is asked to stop."""
        stop = self.should_stop()
        if stop:
            self.history.save(carry, step, epoch_seconds)
        else:
            self.history.save_if_due(carry, step, epoch_seconds)
        if stop and step < self.num_steps:
            message = (
                f"Stopped at step {step} of {self.num_steps}; the state is saved. "
                "The same command goes on."
            )
            raise InterruptedRunError(message)

    def _summarise(self, totals: Totals, step: int, seconds: float) -> dict[str, Any]:
        """The epoch's line of `metrics.jsonl`."""
        examples = float(totals["examples"])
        means = {name: float(v) / examples for name, v in totals["sums"].items()}
        schedule = building.learning_rate_schedule(self.config, self.plan.num_steps)
        return {
            "step": step,
            "epoch": step // self.plan.num_steps,
            **means,
            "accuracy": 100 * means["accuracy"],
            "learning_rate": float(jnp.asarray(schedule(step - 1))),
            "examples_per_second": examples / seconds,
            "seconds": seconds,
        }

    def _report(self, phase: str, step: int) -> None:
        lines = self.history.lines
        metrics = lines[-1] if lines else {}
        self.on_progress(Progress(phase, step, self.num_steps, metrics))
