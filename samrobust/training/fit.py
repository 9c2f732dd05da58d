"""The training loop: epochs, checkpoints, validation, interruption and resumption.

The same call resumes where the last one stopped, and ends bit-identical to a run that
was never stopped. The device does not wait for the host: an epoch's totals are read
while the first chunk of the next epoch runs. It waits for a checkpoint that is due, and
for what is done between epochs, such as validation. Configs, tables and data sets by
name are out of scope.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from samrobust.checks import check
from samrobust.data import Split
from samrobust.system.compiler import deterministic_programs
from samrobust.system.distributed import data_mesh, replicated
from samrobust.system.runtime import RESUME
from samrobust.training.epoch import (
    EpochPlan,
    EpochRunner,
    LoopState,
    MetricSums,
    make_plan,
    zero_sums,
)
from samrobust.training.lockstep import Companion
from samrobust.training.log import (
    EndedEpoch,
    RunFolder,
    RunIdentity,
    RunLog,
    TrainingDivergedError,
)
from samrobust.training.phases import Phase, check_phases, check_total_steps, phase_of
from samrobust.training.state import TrainState, measured
from samrobust.training.step import Method, check_fits, metric_names
from samrobust.types import Array, Augmentation

__all__ = [
    "FitResult",
    "InterruptedRunError",
    "Progress",
    "TrainingDivergedError",
    "fit",
    "fresh_carry",
]

Validate = Callable[[TrainState], dict[str, float]]
AfterEpoch = Callable[[TrainState], tuple[TrainState, dict[str, float]]]


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; where it has a log, a rerun resumes from there."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """Position of a run.

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
class FitResult:
    """A finished training.

    Attributes:
      state: after the last step.
      seconds: spent in training steps, over all restarts.
      step_seconds: median over the epochs of the mean seconds of a step; with several
        phases, their mean, weighted by their epochs.
      step: the last one.
      identity: of the run; None if the log has none.
    """

    state: TrainState
    seconds: float
    step_seconds: float
    step: int
    identity: RunIdentity | None


def fit(
    method: Method,
    split: Split,
    *,
    epochs: int,
    batch_size: int,
    key: Array,
    earlier: Sequence[Phase] = (),
    padding: int = 0,
    flip: bool = False,
    augment: Augmentation | None = None,
    drop_remainder: bool = False,
    replays: int = 1,
    steps_per_call: int = 0,
    deterministic: bool = False,
    log: RunLog | None = None,
    schedules: Mapping[str, optax.Schedule] | None = None,
    after_epoch: AfterEpoch | None = None,
    validate: Validate | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    companion: Companion | None = None,
) -> FitResult:
    """Trains to the end, from the newest intact checkpoint where there is one.

    Args:
      method: from `make_train_step`.
      split: training images uint8 [N, H, W, C] and labels, copied to every device.
      epochs: number of them, >= 1.
      batch_size: over all devices.
      key: of the initialization, the order of examples, augmentation, and all that is
        random in the steps. Consumed.
      earlier: phases with steps of their own, in order, before `method.train_step` is
        taken; see `samrobust.training.phases`.
      padding: reflect-pad by this many pixels and crop at random; 0: none.
      flip: mirror left-right at random.
      augment: applied to each batch thereafter; None: nothing more.
      drop_remainder: whether an incomplete last batch of an epoch is left out.
      replays: steps in a row on each batch, for `free` adversarial training; the number
        of all steps stays.
      steps_per_call: steps in one call of the device; 0: see `make_plan`.
      deterministic: on GPUs, take only algorithms that give the same bits again.
      log: keeps checkpoints and the lines of the epochs, `RunFolder(workdir)` in files;
        None: in memory, and no checkpoints.
      schedules: functions of the step, by name; the log records their values at the
        last step of each epoch.
      after_epoch: called after each epoch with the state, for what no step can do;
        returns the state to go on with, in shapes and placement alike, and numbers for
        the epoch's line, which begin with `validation_` there. Pure. The arrays of the
        state are donated to the next step: copy what you keep.
      validate: called thereafter with the state, to which that applies, too; its
        `score` (higher is better) decides which state is kept as the best one.
      on_progress: called after each call of the device.
      should_stop: called then, too; if true, the log saves the state and the run stops.
        It must return the same in all processes, see `AgreedStop`.
      companion: of a `Lockstep`, for a run whose calls are taken together with others;
        `should_stop` is then its own.

    Returns:
      The final state and how long it took. **Guarantees**: a run that was stopped or
      killed and called again ends bit-identical to one that was not, on CPUs; on GPUs
      with `deterministic`, as far as XLA's deterministic kernels are.

    Raises:
      ValueError: if there is not one batch, the devices do not divide a batch, there
        are more steps than an int32 counts, a phase does not end with an epoch, or
        `after_epoch` or `validate` returns a number that is not finite, or the latter
        no score; for a label without a logit of the network, weights in float64, or an
        `augment` that changes shape or dtype.
      TrainingDivergedError: with the step and the last good checkpoint.
      InterruptedRunError: after `should_stop`.
      CheckpointError: if there are checkpoints and none is intact, or the newest intact
        one is of another run.
    """
    wanted = "a samrobust.data.Split(images, labels) to train on"
    check(isinstance(split, Split), wanted, split=type(split).__name__)
    plan = make_plan(
        len(split),
        batch_size,
        steps_per_call=steps_per_call,
        drop_remainder=drop_remainder,
        replays=replays,
    )
    check_total_steps(epochs, plan.num_steps)
    check_phases(earlier, plan.num_steps)
    init_key, run_key = jax.random.split(key)
    mesh = data_mesh()
    make_runner = EpochRunner if companion is None else companion.make_runner
    with deterministic_programs(deterministic):
        runner = make_runner(
            [*(phase.train_step for phase in earlier), method.train_step],
            plan,
            split,
            padding=padding,
            flip=flip,
            augment=augment,
            mesh=mesh,
            key=run_key,
        )
    init = jax.jit(
        fresh_carry(method, batch_size, split.images.shape[1:]),
        out_shardings=replicated(mesh),
    )
    fresh = init(init_key)
    check_fits(method, fresh.state, split)
    zeros = jax.tree.map(jnp.copy, fresh.totals)  # fresh itself is donated
    with log or RunLog() as kept:
        carry = kept.restore(fresh, plan.num_steps * epochs)
        run = _Run(
            *(earlier, epochs, plan, runner, zeros, kept, schedules or {}),
            *(after_epoch, validate, on_progress, should_stop),
        )
        return run.to_the_end(carry)


def fresh_carry(
    method: Method, batch_size: int, image_shape: tuple[int, ...]
) -> Callable[[Array], LoopState]:
    """Returns the function from a key to the `LoopState` that a run begins with.

    Args:
      method: of the run.
      batch_size: of a full batch.
      image_shape: (H, W, C).
    """
    images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)

    def begin(key: Array) -> LoopState:
        state = method.init(key, images)
        return LoopState(state, zero_sums(metric_names(state)))

    return begin


@dataclasses.dataclass
class _Run:
    """The loop over epochs and chunks.

    Attributes:
      ended: the last epoch, until it has a line.
      began: when the first epoch without a line began, as the runner tells time.
    """

    earlier: Sequence[Phase]
    epochs: int
    plan: EpochPlan
    runner: EpochRunner | Companion
    zero_sums: MetricSums
    log: RunLog
    schedules: Mapping[str, optax.Schedule]
    after_epoch: AfterEpoch | None
    validate: Validate | None
    on_progress: Callable[[Progress], None]
    should_stop: Callable[[], bool]
    ended: EndedEpoch | None = None
    began: float = 0.0
    in_flight: Array | None = None  # ready when the last chunk is done

    @property
    def num_steps(self) -> int:
        return self.plan.num_steps * self.epochs

    def to_the_end(self, carry: LoopState) -> FitResult:
        """Trains the remaining steps."""
        step = int(carry.state.step)
        if step < self.num_steps:
            self._report("compiling", step)
            jax.block_until_ready(measured(carry.state))
            for phase in range(phase_of(self.earlier, step), len(self.earlier) + 1):
                for chunk in dict.fromkeys(self.plan.chunks(phase=phase)):
                    self.runner.compile(chunk, [carry])
        try:
            while step < self.num_steps:
                carry, step = self._epoch(carry, step)
        finally:  # a process that ends while a program runs may crash
            with contextlib.suppress(Exception):
                jax.block_until_ready(self.in_flight)
        self.log.save(carry, step, 0.0)
        seconds = sum(line["seconds"] for line in self.log.lines)
        each = self._epoch_seconds() / self.plan.num_steps
        return FitResult(carry.state, seconds, each, step, self.log.identity)

    def _epoch_seconds(self) -> float:
        """Returns the mean over the phases, weighted by epochs, of their medians."""
        phases = [phase_of(self.earlier, line["step"] - 1) for line in self.log.lines]
        medians = [
            statistics.median(
                line["seconds"]
                for line, other in zip(self.log.lines, phases, strict=True)
                if other == phase
            )
            for phase in phases
        ]
        return statistics.mean(medians)

    def _epoch(self, carry: LoopState, step: int) -> tuple[LoopState, int]:
        """Trains from a step to the end of its epoch, whose line may still come."""
        epoch = step // self.plan.num_steps
        earlier, self.log.earlier_seconds = self.log.earlier_seconds, 0.0
        if self.ended is None:
            self.began = self.runner.seconds()

        def seconds() -> float:
            """Returns this run's share of the time of the epoch so far."""
            return earlier + self.runner.seconds() - self.began

        permutation = self.runner.permutation(epoch)
        phase = phase_of(self.earlier, step)
        for chunk in self.plan.chunks(step % self.plan.num_steps, phase):
            carry, done = self.runner.run(chunk, carry, permutation)
            step += chunk.num_steps
            # At most two chunks in flight: signals are handled soon, the ETA is right.
            previous, self.in_flight = self.in_flight, done
            jax.block_until_ready(previous)
            self._settle()  # of the first chunk the one before is the last epoch's
            self._report("training", step)
            if step % self.plan.num_steps:
                self._pause(carry, step, seconds())
        shown = measured(carry.state)
        for name, schedule in self.schedules.items():
            shown[name] = jnp.asarray(schedule(step - 1))
        ended = EndedEpoch(epoch + 1, step, carry.totals, shown, seconds)
        zeros = jax.tree.map(jnp.copy, self.zero_sums)
        # Kept, so that no state is saved after a step that was not finite.
        zeros["first_bad_step"] = jnp.copy(carry.totals["first_bad_step"])
        carry = LoopState(carry.state, zeros)
        if self.after_epoch is None and self.validate is None:
            self.ended = ended
        else:
            carry = self._between(ended, carry)
        if step == self.num_steps or step in self.log.trunk_steps:
            self._settle()
            self.runner.rest()
        self.log.pass_on(carry, step)
        self._report("training", step)
        self._pause(carry, step, 0.0)
        return carry, step

    def _between(self, ended: EndedEpoch, carry: LoopState) -> LoopState:
        """Does what is done between epochs, and writes the line of the last one."""
        step, line, found = ended.step, self.log.line_of(ended), {}
        self.runner.rest()
        if self.after_epoch is not None:
            self._report("validating", step)
            state, numbers = self.after_epoch(carry.state)
            found = _finite(numbers, "after_epoch")
            carry = dataclasses.replace(carry, state=state)
            line |= jax.tree.map(float, measured(state))
        if self.validate is not None:
            self._report("validating", step)
            scores = _finite(self.validate(carry.state), "validate")
            check("score" in scores, "a score from validate", names=sorted(scores))
            self.log.keep_best(carry, step, scores)
            found |= scores
        line |= {f"validation_{name}": number for name, number in found.items()}
        self.log.append(line)
        return carry

    def _settle(self) -> None:
        """Writes the line of the epoch that has none; waits for its totals."""
        if self.ended is not None:
            ended, self.ended = self.ended, None
            self.log.append(self.log.line_of(ended))
            self.began = self.runner.seconds()

    def _pause(self, carry: LoopState, step: int, epoch_seconds: float) -> None:
        """Saves when it is time to, or when the run is asked to stop."""
        if self.should_stop():
            self._settle()
            self.log.save(carry, step, epoch_seconds)
            if step < self.num_steps:
                saved = "it had no log."
                if isinstance(self.log, RunFolder):
                    saved = f"the state is saved. {RESUME}"
                raise InterruptedRunError(
                    f"Stopped at step {step} of {self.num_steps}; {saved}"
                )
        elif self.log.may_save(carry):
            self._settle()
            self.log.begin_to_save(carry, step, epoch_seconds)

    def _report(self, phase: str, step: int) -> None:
        lines = self.log.lines
        metrics = lines[-1] if lines else {}
        self.on_progress(Progress(phase, step, self.num_steps, metrics))


def _finite(numbers: Mapping[str, Any], source: str) -> dict[str, float]:
    """Returns the numbers of a function of one's own as floats; refuses NaN."""
    floats = {name: float(number) for name, number in numbers.items()}
    for name, number in floats.items():
        check(math.isfinite(number), f"a finite {name} from {source}", **{name: number})
    return floats
