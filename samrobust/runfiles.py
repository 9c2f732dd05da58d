"""The workdir of a run in progress: claimed, its failures recorded, its epochs tracked.

Of several processes, 0 alone opens it; in the others it stays empty and does nothing.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from samrobust.claims import Claim, claim
from samrobust.failures import recording_failure
from samrobust.files import write_json
from samrobust.parallel import request_stop
from samrobust.tracking import Tracking, track
from samrobust.types import Config

__all__ = ["RunFiles"]


class RunFiles(contextlib.ExitStack):
    """What process 0 holds of a run's workdir; a context manager.

    Args:
      apart_from: errors that are no failure of the run.
    """

    def __init__(self, *, apart_from: tuple[type[Exception], ...]):
        super().__init__()
        self._apart_from = apart_from
        self._claim: Claim | None = None
        self._tracking: Tracking | None = None

    def open(self, config: Config, workdir: pathlib.Path) -> None:
        """Claims the workdir; from now on failures are recorded and epochs tracked."""
        self._claim = self.enter_context(claim(workdir))
        self.enter_context(recording_failure(workdir, apart_from=self._apart_from))
        self._tracking = self.enter_context(track(config, workdir))

    def guard(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """`should_stop`, that also ends a run whose workdir another process took.

        A single process raises `ClaimedError`; several stop together.
        """
        claim = self._claim
        if claim is None:
            return should_stop
        if jax.process_count() == 1:
            return claim.guard(should_stop)

        def ask() -> bool:
            if claim.is_lost():
                request_stop()
            return should_stop()

        return ask

    def following(self, on_progress: Callable[[Any], None]) -> Callable[[Any], None]:
        """An `on_progress` that also passes new epochs on to the trackers."""
        if self._tracking is None:
            return on_progress
        return self._tracking.following(on_progress)

    def finish(self, result: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
        """Writes and tracks the result, and returns it."""
        write_json(workdir / "result.json", result)
        if self._tracking is not None:
            self._tracking.finish(result["accuracy"])
        return result
