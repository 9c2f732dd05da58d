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
from ml_collections import ConfigDict

from samrobust import building
from samrobust.data import Dataset, epoch_permutation
from samrobust.parallel import data_mesh, replicated
from samrobust.training.checkpoint import Checkpoints
from samrobust.training.epoch import Call, make_run_steps
from samrobust.training.setup import checkpoint_folder, make_parts, make_plan
from samrobust.training.state import TrainState
from samrobust.workdir import MetricsLog

__all__ = [
    "Interrupted",
    "Outcome",
    "Progress",
    "TrainingDiverged",
    "train",
]


class TrainingDiverged(RuntimeError):
    """The loss or the gradient stopped being finite."""


class Interrupted(RuntimeError):
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
    """

    state: TrainState
    seconds: float
    step_seconds: float


Validate = Callable[[TrainState], dict[str, float]]


def train(
    config: ConfigDict,
    dataset: Dataset,
    workdir: pathlib.Path,
    *,
    validate: Validate | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Trains to the end, from the newest intact checkpoint where there is one.

    Args:
      config: validated.
      dataset: with images of one shape.
      workdir: receives `metrics.jsonl` and `checkpoints/`; claimed by the caller.
      validate: called after each epoch with the state; its `score` (higher is better)
        decides which state is kept as the best one.
      on_progress: called after each call of the device.
      should_stop: asked as often; if true, the state is saved and the run stops.

    Raises:
      TrainingDiverged: with the step and the last good checkpoint.
      Interrupted: after `should_stop`.
      CheckpointError: if there are checkpoints and none is intact.
    """
    run = _Run(config, dataset, workdir, validate, on_progress, should_stop)
    with run.checkpoints, run.best:
        run.prepare()
        while run.epoch < config.training.epochs:
            run.train_epoch()
        run.save(wait=True)
        seconds = [line["seconds"] for line in run.log.lines]
        per_step = [s / run.plan.num_steps for s in seconds]
        return Outcome(run.state, sum(seconds), statistics.median(per_step))


class _Run:
    """What a training holds on to between calls of the device."""

    def __init__(
        self,
        config: ConfigDict,
        dataset: Dataset,
        workdir: pathlib.Path,
        validate: Validate | None,
        on_progress: Callable[[Progress], None],
        should_stop: Callable[[], bool],
    ):
        self.config, self.dataset, self.workdir = config, dataset, workdir
        self.validate, self.on_progress = validate, on_progress
        self.should_stop = should_stop
        self.plan = make_plan(config, len(dataset.train))
        self.num_steps = self.plan.num_steps * config.training.epochs
        keep = config.checkpoint.keep
        self.checkpoints = Checkpoints(checkpoint_folder(workdir, "last"), keep=keep)
        self.best = Checkpoints(checkpoint_folder(workdir, "best"), keep=1)
        self.best_score = float("-inf")
        self.epoch_seconds = 0.0  # spent in the current epoch before this process
        self.saved_step, self.saved_at = -1, time.monotonic()

    @property
    def epoch(self) -> int:
        return self.step // self.plan.num_steps

    def prepare(self) -> None:
        """Puts data and state on the device, restores, compiles."""
        self.report("compiling", step=0)
        mesh = data_mesh()
        placement = replicated(mesh)
        init_key, self.shuffle_key, self.step_key = jax.random.split(
            jax.random.key(self.config.seed), 3
        )
        train_split = self.dataset.train
        self.images = jax.device_put(train_split.images, placement)
        self.labels = jax.device_put(train_split.labels, placement)
        parts = make_parts(self.config, self.dataset, self.plan.num_steps)
        self.zero_totals = jax.device_put(parts.zero_totals, placement)
        state = jax.jit(parts.init, out_shardings=placement)(init_key)
        self._restore({"state": state, "totals": self.zero_totals})
        augmentation = {n: self.config.data[n] for n in ("padding", "flip")}
        self._run_steps = make_run_steps(
            parts.train_step, self.plan, mesh=mesh, **augmentation
        )
        self._permute = jax.jit(
            lambda key, epoch: epoch_permutation(key, epoch, len(train_split)),
            out_shardings=placement,
        )
        self._placement = placement
        self._compiled: dict[Call, Callable] = {}
        if self.step < self.num_steps:
            for call in dict.fromkeys(self.plan.calls()):
                self._compile(call)

    def _restore(self, like: dict[str, Any]) -> None:
        restored = self.checkpoints.restore_latest(like)
        tree = like if restored is None else restored.state
        self.state = tree["state"]
        self.totals = jax.tree.map(jax.numpy.copy, tree["totals"])  # to be donated
        self.step = 0 if restored is None else restored.step
        if restored is not None:
            self.epoch_seconds = restored.metadata["epoch_seconds"]
            best_score = restored.metadata["best_score"]
            self.best_score = float("-inf") if best_score is None else best_score
            self.saved_step = restored.step
        self.log = MetricsLog(self.workdir / "metrics.jsonl", last_step=self.step)

    def _compile(self, call: Call) -> Callable:
        """The compiled function of a call; a new shape is compiled once."""
        if call not in self._compiled:
            jitted = jax.jit(
                self._run_steps(call),
                donate_argnums=(0, 1),
                out_shardings=self._placement,
            )
            arguments = (self.state, self.totals, self.images, self.labels)
            permutation = jax.ShapeDtypeStruct(
                self.labels.shape, "int32", sharding=self._placement
            )
            lowered = jitted.lower(*arguments, permutation, self.step_key)
            self._compiled[call] = lowered.compile()
        return self._compiled[call]

    def report(self, phase: str, step: int | None = None) -> None:
        done = self.step if step is None else step
        metrics = self.log.lines[-1] if step is None and self.log.lines else {}
        self.on_progress(Progress(phase, done, self.num_steps, metrics))

    def train_epoch(self) -> None:
        """From the current step to the end of its epoch, its metrics and validation."""
        started = time.monotonic()
        permutation = self._permute(self.shuffle_key, self.epoch)
        previous = None
        for call in self.plan.calls(self.step % self.plan.num_steps):
            self.state, self.totals, done = self._compile(call)(
                self.state,
                self.totals,
                self.images,
                self.labels,
                permutation,
                self.step_key,
            )
            self.step += call.num_steps
            # At most two calls in flight: a signal is heard soon, the ETA is true.
            jax.block_until_ready(previous)
            previous = done
            self.report("training")
            if self.step % self.plan.num_steps:
                self._pause_within_epoch(started)
        epoch = self.step // self.plan.num_steps - 1
        line = self._summarise(epoch, started)
        if self.validate is not None:
            self.report("validating")
            line |= self._keep_best(self.validate(self.state))
        self.log.append(line)
        self.totals = jax.tree.map(jax.numpy.copy, self.zero_totals)  # to be donated
        self.epoch_seconds = 0.0
        self.report("training")
        self._pause_within_epoch(time.monotonic())

    def _pause_within_epoch(self, started: float) -> None:
        """Saves when it is time to, or when the run is asked to stop."""
        stop = self.should_stop()
        minutes = (time.monotonic() - self.saved_at) / 60
        if stop or minutes >= self.config.checkpoint.minutes:
            spent = self.epoch_seconds + time.monotonic() - started
            self.save(wait=stop, epoch_seconds=spent)
        if stop and self.step < self.num_steps:
            message = (
                f"Stopped at step {self.step} of {self.num_steps}; the state is saved in "
                f"{self.workdir}. The same command goes on."
            )
            raise Interrupted(message)

    def _summarise(self, epoch: int, started: float) -> dict[str, Any]:
        totals = jax.device_get(self.totals)
        self._check_finite(totals)
        seconds = self.epoch_seconds + time.monotonic() - started
        examples = float(totals["examples"])
        means = {name: float(v) / examples for name, v in totals["sums"].items()}
        schedule = building.learning_rate_schedule(self.config, self.plan.num_steps)
        return {
            "step": self.step,
            "epoch": epoch + 1,
            **means,
            "accuracy": 100 * means["accuracy"],
            "learning_rate": float(schedule(self.step - 1)),
            "examples_per_second": examples / seconds,
            "seconds": seconds,
        }

    def _check_finite(self, totals: dict[str, Any]) -> None:
        bad_step = int(totals["first_bad_step"])
        if bad_step >= 0:
            good = self.checkpoints.latest_step()
            where = "none was saved before" if good is None else f"step {good}"
            message = (
                f"The loss or its gradient is not finite at step {bad_step}. Last good "
                f"checkpoint: {where} ({checkpoint_folder(self.workdir, 'last')}). Lower "
                "training.learning_rate or sam.rho and start in a new --workdir."
            )
            raise TrainingDiverged(message)

    def _keep_best(self, scores: dict[str, float]) -> dict[str, float]:
        if scores["score"] > self.best_score:
            self.best_score = scores["score"]
            tree = {"state": self.state, "totals": self.zero_totals}
            self.best.save(self.step, tree, {"validation": scores}, wait=True)
        return {f"validation_{name}": value for name, value in scores.items()}

    def save(self, *, wait: bool, epoch_seconds: float = 0.0) -> None:
        """Saves the state, unless this step is saved or its numbers are not finite."""
        if self.step != self.saved_step:
            self._check_finite(jax.device_get(self.totals))
            has_best = self.best_score > float("-inf")
            metadata = {
                "epoch_seconds": epoch_seconds,
                "best_score": self.best_score if has_best else None,
            }
            tree = {"state": self.state, "totals": self.totals}
            self.checkpoints.save(self.step, tree, metadata)
            self.saved_step = self.step
        self.saved_at = time.monotonic()
        if wait:
            self.checkpoints.wait()
