"""The log of a run: checkpoints, the best score, the lines of its epochs.

Only process 0 reads and writes files. It alone saves a checkpoint when one is due; what
all processes must know, such as a failed write at the end, reaches all of them.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, Self

import jax

from samrobust.system.distributed import broadcast_from_primary, is_primary
from samrobust.system.files import append_json_line, write_text
from samrobust.system.storage import to_path
from samrobust.training.checkpoint import CheckpointError, Checkpoints, Restored
from samrobust.training.epoch import LoopState, MetricSums
from samrobust.training.restoring import abstract, read_and_spread
from samrobust.types import Array

__all__ = [
    "EndedEpoch",
    "RunFolder",
    "RunIdentity",
    "RunLog",
    "TrainingDivergedError",
    "checkpoint_folder",
    "checkpoint_metadata",
]


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or the parameters stopped being finite."""


@dataclasses.dataclass(frozen=True)
class EndedEpoch:
    """An epoch whose totals may still be on their way.

    Attributes:
      number: of the epoch, from 1.
      step: its last one.
      totals: of the metrics.
      shown: values of the schedules and of the state, computed before the next epoch's
        first chunk has the device.
      seconds: the time of the epoch so far.
    """

    number: int
    step: int
    totals: MetricSums
    shown: dict[str, Array]
    seconds: Callable[[], float]


class RunIdentity(Protocol):
    """The identity of checkpoints; see `samrobust.experiments.identity`."""

    @property
    def hash(self) -> str:
        """Names the run."""
        ...

    def refuse(self, stored: Any) -> str:
        """Says why a checkpoint is of another run; empty if it is of this one."""
        ...

    def resumed(self, stored: Any) -> "RunIdentity":
        """Returns the identity of the run that resumes from such a checkpoint."""
        ...

    def branched(self, stored: Any) -> "RunIdentity":
        """Returns the identity of this run where it goes on from another's part."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint stores of the identity, in JSON's types."""
        ...


def checkpoint_folder(workdir: pathlib.Path, which: str) -> pathlib.Path:
    """Returns the folder of the `last` or the `best` checkpoints."""
    return workdir / "checkpoints" / which


def checkpoint_metadata(
    identity: RunIdentity | None,
    *,
    epoch_seconds: float = 0.0,
    best_score: float | None = None,
    best_step: int | None = None,
    lines: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Returns what a checkpoint holds besides the state.

    Args:
      identity: of the run.
      epoch_seconds: of the epoch in progress.
      best_score: so far.
      best_step: the step of the `best` checkpoint with that score.
      lines: of `metrics.jsonl`, so that it can be written again.
    """
    return {
        "identity": None if identity is None else identity.as_dict(),
        "epoch_seconds": epoch_seconds,
        "best_score": best_score,
        "best_step": best_step,
        "lines": list(lines),
    }


class RunLog:
    """Log of a training run in memory, without checkpoints; a context manager.

    Attributes:
      identity: of the run as it was begun, with the libraries that took part.
      trunk_steps: after which `pass_on` has something to do.
      earlier_seconds: of the current epoch, spent before this process.
      lines: of the epochs, one each.
    """

    identity: RunIdentity | None = None
    trunk_steps: Collection[int] = ()

    def __init__(self) -> None:
        self.earlier_seconds = 0.0
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        pass

    def restore(self, fresh: LoopState, num_steps: int) -> LoopState:
        """Returns the state that the run resumes from."""
        del num_steps
        return fresh

    def line_of(self, ended: EndedEpoch) -> dict[str, Any]:
        """Returns an epoch's line of `metrics.jsonl`; waits for its totals.

        Raises:
          TrainingDivergedError: if a step was not finite.
        """
        totals, shown = jax.device_get((ended.totals, ended.shown))
        self.check_finite(totals)
        seconds, examples = ended.seconds(), float(totals["examples"])
        means = {name: float(v) / examples for name, v in totals["sums"].items()}
        # Of another network that is trained beside, too, as Generalist's.
        shares = [name for name in means if name.endswith("accuracy")]
        return {
            "step": ended.step,
            "epoch": ended.number,
            **means,
            **{name: 100 * means[name] for name in shares},
            **{name: float(value) for name, value in shown.items()},
            "examples_per_second": examples / seconds,
            "seconds": seconds,
        }

    def append(self, line: dict[str, Any]) -> None:
        """Adds an epoch."""
        self.lines.append(line)

    def pass_on(self, carry: LoopState, step: int) -> None:
        """Leaves the state at the end of an epoch to runs that begin alike."""

    def save(self, carry: LoopState, step: int, epoch_seconds: float) -> None:
        """Saves the state.

        Raises:
          TrainingDivergedError: if its numbers are not finite.
        """
        del step, epoch_seconds
        self.check_finite(jax.device_get(carry.totals))

    def may_save(self, carry: LoopState) -> bool:
        """Says whether the last state saved is old enough, and this one finite."""
        del carry
        return False

    def begin_to_save(self, carry: LoopState, step: int, epoch_seconds: float) -> None:
        """Saves the state in the background."""

    def keep_best(self, carry: LoopState, step: int, scores: dict[str, float]) -> None:
        """Keeps the state if its score is the best so far."""

    def check_finite(self, totals: MetricSums) -> None:
        """Raises `TrainingDivergedError` if a step so far was not finite."""
        bad_step = int(totals["first_bad_step"])
        if bad_step >= 0:
            raise TrainingDivergedError(
                "The loss, a gradient or the parameters are not finite at step "
                f"{bad_step}. {self._last_good()}Lower the learning rate or rho."
            )

    def _last_good(self) -> str:
        """Says in a sentence which checkpoint is the last good one."""
        return ""


class RunFolder(RunLog):
    """Log of a training run in files, with its checkpoints; a context manager.

    Args:
      workdir: receives `metrics.jsonl` and `checkpoints/`; one job at a time.
      minutes: between checkpoints; a kill costs no more.
      keep: how many of the newest checkpoints are kept.
      identity: of the run; None: any checkpoint there is taken for this run's.
      may_write: called before each checkpoint, by process 0; raises if not.
      clock: in seconds, that says when a checkpoint is due.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        minutes: float = 5.0,
        keep: int = 2,
        identity: RunIdentity | None = None,
        may_write: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__()
        self._may_write, self._clock = may_write, clock
        self.identity = identity
        self._minutes = minutes
        self._workdir = to_path(workdir)
        self._folder = checkpoint_folder(self._workdir, "last")
        self._checkpoints = Checkpoints(self._folder, keep=keep)
        self._best = Checkpoints(checkpoint_folder(self._workdir, "best"), keep=1)
        self._best_score: float | None = None
        self._best_step: int | None = None
        # Those that the kept checkpoints, and one in the making, name as their best.
        self._named = collections.deque[int](maxlen=keep + 1)
        self._saved_step, self._saved_at = -1, clock()
        self._log = self._workdir / "metrics.jsonl"

    def __exit__(
        self, error_type: type[BaseException] | None, *exc_info: object
    ) -> None:
        # A failure of the pending write must not hide the error on its way, which other
        # processes may have met, too.
        hidden = () if error_type is None else (CheckpointError,)
        with contextlib.suppress(*hidden), self._checkpoints, self._best:
            pass  # waits for both

    def restore(self, fresh: LoopState, num_steps: int) -> LoopState:
        """Returns the newest intact state, or the fresh one, and restores the log.

        The log is written again from the checkpoint, which holds it: a lost file, or
        lines after the step that the run resumes from, cost nothing.

        Raises:
          CheckpointError: if the state is not of this run, or beyond `num_steps`.
        """
        restored, own = self._find(fresh), self.identity
        if restored is None:  # a best one is left of a run that was killed
            broadcast_from_primary(lambda: self._best.retain(lambda _: False))
        else:
            step, metadata = restored.step, restored.metadata
            if not step == int(restored.state.state.step) <= num_steps:
                raise CheckpointError(
                    f"Expected a step <= {num_steps} in {self._folder}, got the state "
                    f"of step {int(restored.state.state.step)} as step {step}. Move it "
                    "away, or use another directory."
                )
            if own is not None:
                self.identity = own.resumed(metadata["identity"])
            self.earlier_seconds = metadata["epoch_seconds"]
            self.lines = list(metadata["lines"])
            self._restore_best(metadata)

        def write_log() -> None:
            self._workdir.mkdir(parents=True, exist_ok=True)
            write_text(self._log, "".join(json.dumps(x) + "\n" for x in self.lines))

        broadcast_from_primary(write_log)
        return fresh if restored is None else restored.state

    def _restore_best(self, metadata: dict[str, Any]) -> None:
        """Goes back to the best of then: rounding may lead elsewhere after it."""
        self._best_score = metadata["best_score"]
        if "best_step" in metadata:  # else of an older version
            self._best_step = best = metadata["best_step"]
            self._named.extend([] if best is None else [best])
            newest = -1 if best is None else best
            broadcast_from_primary(lambda: self._best.retain(lambda s: s <= newest))

    def _find(self, fresh: LoopState) -> Restored | None:
        """Returns the checkpoint that the run resumes from; None for a new run."""
        like, own = abstract(fresh), self.identity

        def refuse(metadata: dict[str, Any]) -> str:
            return "" if own is None else own.refuse(metadata.get("identity"))

        restored = read_and_spread(
            self._folder, like, lambda c: c.restore_latest(like, refuse=refuse)
        )
        if restored is not None:
            self._saved_step = restored.step
        return restored

    def append(self, line: dict[str, Any]) -> None:
        """Adds an epoch to the log; no other process waits for process 0's disk."""
        self.lines.append(line)
        if is_primary():
            self._may_write()
            append_json_line(self._log, line)

    def save(self, carry: LoopState, step: int, epoch_seconds: float) -> None:
        """Saves the state and waits until it is written, in all processes.

        Raises:
          TrainingDivergedError: if its numbers are not finite.
          CheckpointError: if it cannot be written.
        """
        self.check_finite(jax.device_get(carry.totals))

        def write() -> None:
            self.begin_to_save(carry, step, epoch_seconds)
            self._checkpoints.wait()
            if self._best_step is not None:
                self._may_write()
                self._best.retain(self._named.__contains__)

        broadcast_from_primary(write)

    def may_save(self, carry: LoopState) -> bool:
        """Says, in process 0, whether a checkpoint is due and the state is finite.

        Where it is not finite one process raises at once; several raise together, when
        the epoch's totals are read.
        """
        due = self._clock() - self._saved_at >= 60 * self._minutes
        if not due or not is_primary():
            return False
        totals = jax.device_get(carry.totals)
        if jax.process_count() == 1:
            self.check_finite(totals)
        return int(totals["first_bad_step"]) < 0

    def begin_to_save(self, carry: LoopState, step: int, epoch_seconds: float) -> None:
        """Saves the state in the background, in process 0, unless this step is saved.

        The lines of all epochs before must be there.
        """
        if step != self._saved_step:
            self._checkpoints.wait()
            self._may_write()
            self._named.extend([] if self._best_step is None else [self._best_step])
            self._checkpoints.save(step, carry, self._metadata(epoch_seconds))
            self._saved_step = step
        self._saved_at = self._clock()

    def keep_best(self, carry: LoopState, step: int, scores: dict[str, float]) -> None:
        """Saves the state apart if its score is the best so far."""

        def keep() -> tuple[float | None, int | None]:
            score, best = scores["score"], self._best_score
            if best is not None and score <= best:
                return best, self._best_step
            self._may_write()
            metadata = self._metadata() | {"validation": scores}
            self._best.save(step, carry, metadata, wait=True, needed=self._named)
            return score, step

        self._best_score, self._best_step = broadcast_from_primary(keep)

    def check_finite(self, totals: MetricSums) -> None:
        """Raises `TrainingDivergedError`, if in one process, in all."""
        if int(totals["first_bad_step"]) >= 0:
            refuse = super().check_finite
            broadcast_from_primary(lambda: refuse(totals))

    def _last_good(self) -> str:
        self._checkpoints.wait()
        good = self._checkpoints.latest_step()
        where = "none was saved before" if good is None else f"step {good}"
        return f"Last good checkpoint: {where} ({self._folder}). "

    def _metadata(self, epoch_seconds: float = 0.0) -> dict[str, Any]:
        return checkpoint_metadata(
            self.identity,
            epoch_seconds=epoch_seconds,
            best_score=self._best_score,
            best_step=self._best_step,
            lines=self.lines,
        )
