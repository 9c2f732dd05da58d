"""What a run leaves behind: checkpoints, the best score, the log of its epochs.

Of several processes, 0 alone reads and writes files. A checkpoint that falls due is its
business; what all must know, such as a failed write at the end, reaches all of them.
"""

import contextlib
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from samrobust.identity import Identity
from samrobust.parallel import from_primary, is_primary
from samrobust.training.checkpoint import CheckpointError, Checkpoints
from samrobust.training.epoch import Carry, Totals
from samrobust.training.saved import (
    checkpoint_folder,
    checkpoint_metadata,
    identity_in,
    restore,
)
from samrobust.types import Config
from samrobust.workdir import MetricsLog

__all__ = ["History", "TrainingDivergedError"]


class TrainingDivergedError(RuntimeError):
    """The loss, a gradient or the parameters stopped being finite."""


class History(contextlib.AbstractContextManager):
    """The files of a training run; a context manager.

    Args:
      config: of the run.
      workdir: receives `metrics.jsonl` and `checkpoints/`.
      identity: of the run.
      may_write: called before each checkpoint, by process 0; raises if not.

    Attributes:
      identity: of the run as it was begun, with the libraries that took part.
      earlier_seconds: of the current epoch, spent before this process.
      lines: of `metrics.jsonl`, an epoch each.
    """

    def __init__(
        self,
        config: Config,
        workdir: pathlib.Path,
        identity: Identity,
        may_write: Callable[[], None],
    ):
        self._may_write = may_write
        self.identity = identity
        self._minutes = config.checkpoint.minutes
        self._workdir = workdir
        self._folder = checkpoint_folder(workdir, "last")
        self._checkpoints = Checkpoints(self._folder, keep=config.checkpoint.keep)
        self._best = Checkpoints(checkpoint_folder(workdir, "best"), keep=1)
        self._best_score: float | None = None
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._log: MetricsLog | None = None  # of process 0
        self.earlier_seconds = 0.0
        self.lines: list[dict[str, Any]] = []

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        # What a pending write meets is not to hide an error that is on its way: that
        # one the other processes may have met, too.
        hidden = () if error_type is None else (CheckpointError,)
        with contextlib.suppress(*hidden), self._checkpoints, self._best:
            pass  # waits for both

    def restore(self, fresh: Carry, mesh: Mesh, num_steps: int) -> Carry:
        """The newest intact state, or the fresh one, and what is known beside it.

        The log is written anew from the checkpoint, which holds it: losing it, or
        lines behind the step that the run goes on from, costs nothing.

        Raises:
          CheckpointError: if the state is not of this run, or beyond `num_steps`.
        """
        restored = restore(self._folder, _abstract(fresh), mesh, self.identity)
        if restored is not None:
            step, metadata = restored.step, restored.metadata
            if not step == int(restored.state.state.step) <= num_steps:
                raise CheckpointError(
                    f"Expected a step <= {num_steps} in {self._folder}, got the state "
                    f"of step {int(restored.state.state.step)} as step {step}. Move it "
                    "away, or use another directory."
                )
            self.identity = identity_in(metadata).continued_by(self.identity)
            self.earlier_seconds = metadata["epoch_seconds"]
            self._best_score = metadata["best_score"]
            self._saved_step = step
            self.lines = list(metadata["lines"])

        def open_log() -> None:
            self._workdir.mkdir(parents=True, exist_ok=True)
            self._log = MetricsLog(self._workdir / "metrics.jsonl", self.lines)

        from_primary(open_log)
        return fresh if restored is None else restored.state

    def append(self, line: dict[str, Any]) -> None:
        """Adds an epoch to the log."""
        self.lines.append(line)
        from_primary(lambda: self._log and self._log.append(line))

    def save(self, carry: Carry, step: int, epoch_seconds: float) -> None:
        """Saves the state and waits until it is written, in all processes.

        Raises:
          TrainingDivergedError: if its numbers are not finite.
          CheckpointError: if it cannot be written.
        """
        self.check_finite(jax.device_get(carry.totals))

        def write() -> None:
            self._begin_to_save(carry, step, epoch_seconds)
            self._checkpoints.wait()

        from_primary(write)

    def save_if_due(self, carry: Carry, step: int, epoch_seconds: float) -> None:
        """Process 0: begins to save the state where the last checkpoint is old enough.

        A state that is not finite is not saved; one process says so at once, several
        do so together when the epoch ends.
        """
        due = time.monotonic() - self._saved_at >= 60 * self._minutes
        if not due or not is_primary():
            return
        totals = jax.device_get(carry.totals)
        if jax.process_count() == 1:
            self.check_finite(totals)
        if int(totals["first_bad_step"]) < 0:
            self._begin_to_save(carry, step, epoch_seconds)

    def keep_best(self, carry: Carry, step: int, scores: dict[str, float]) -> None:
        """Saves the state apart if its score is the best so far."""

        def keep() -> float:
            score = scores["score"]
            if self._best_score is not None and score <= self._best_score:
                return self._best_score
            self._may_write()
            metadata = self._metadata() | {"validation": scores}
            self._best.save(step, carry, metadata, wait=True)
            return score

        self._best_score = from_primary(keep)

    def check_finite(self, totals: Totals) -> None:
        """Raises `TrainingDivergedError` if a step of this epoch was not finite."""
        bad_step = int(totals["first_bad_step"])
        if bad_step < 0:
            return

        def refuse() -> None:
            self._checkpoints.wait()
            good = self._checkpoints.latest_step()
            where = "none was saved before" if good is None else f"step {good}"
            raise TrainingDivergedError(
                "The loss, a gradient or the parameters are not finite at step "
                f"{bad_step}. Last good checkpoint: {where} ({self._folder}). Lower "
                "training.learning_rate or sam.rho and use a new --workdir."
            )

        from_primary(refuse)

    def _begin_to_save(self, carry: Carry, step: int, epoch_seconds: float) -> None:
        """Saves in the background, unless this step is saved."""
        if step != self._saved_step:
            self._checkpoints.wait()
            self._may_write()
            self._checkpoints.save(step, carry, self._metadata(epoch_seconds))
            self._saved_step = step
        self._saved_at = time.monotonic()

    def _metadata(self, epoch_seconds: float = 0.0) -> dict[str, Any]:
        return checkpoint_metadata(
            self.identity,
            epoch_seconds=epoch_seconds,
            best_score=self._best_score,
            lines=self.lines,
        )


def _abstract(carry: Carry) -> Carry:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), carry)
