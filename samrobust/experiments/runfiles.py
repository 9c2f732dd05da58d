"""The workdir of a run in progress: claimed, its failures recorded, its epochs tracked.

Of several processes, 0 alone opens it; in the others it stays empty and does nothing.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import Any

from samrobust.experiments.tracking import Tracking, track
from samrobust.system.claims import Claim, claim
from samrobust.system.failures import recording_failure
from samrobust.system.files import write_sealed
from samrobust.types import Config

__all__ = ["RunFiles"]


class RunFiles(contextlib.ExitStack):
    """What process 0 holds of a run's workdir; a context manager.

    Args:
      is_failure: tells errors that are a failure of the run from others.
    """

    def __init__(self, *, is_failure: Callable[[Exception], bool]):
        super().__init__()
        self._is_failure = is_failure
        self._claim: Claim | None = None
        self._tracking: Tracking | None = None

    def open(self, config: Config, workdir: pathlib.Path) -> None:
        """Claims the workdir; from now on failures are recorded and epochs tracked."""
        self._claim = self.enter_context(claim(workdir))
        self.enter_context(recording_failure(workdir, is_failure=self._is_failure))
        self._tracking = self.enter_context(track(config, workdir))

    def check_claim(self) -> None:
        """Raises `ClaimedError` if another process took over."""
        if self._claim is not None:
            self._claim.check()

    def guard(self, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """`should_stop`, that raises `ClaimedError` once another process took over."""
        return should_stop if self._claim is None else self._claim.guard(should_stop)

    def following(self, on_progress: Callable[[Any], None]) -> Callable[[Any], None]:
        """An `on_progress` that also passes new epochs on to the trackers."""
        if self._tracking is None:
            return on_progress
        return self._tracking.following(on_progress)

    def finish(self, result: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
        """Writes and tracks the result, and returns it."""
        self.check_claim()
        write_sealed(workdir / "result.json", result)
        if self._tracking is not None:
            self._tracking.finish(result["accuracy"])
        return result
