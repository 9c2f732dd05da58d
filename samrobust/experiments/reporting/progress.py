"""A live progress bar over a grid of runs; plain lines where there is no terminal."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

__all__ = ["ProgressDisplay", "RunDisplay"]

_SECONDS_BETWEEN_LINES = 15.0


class ProgressDisplay:
    """Shows how far a grid of runs is, in units of predicted work.

    Args:
      console: a terminal gets a live bar with an ETA, anything else a line now and
        then.
      total_work: of all runs together, in any unit.
    """

    def __init__(self, console: Console, total_work: float):
        self._console, self._total = console, total_work
        self._done, self._started, self._last_line = 0.0, time.monotonic(), 0.0
        self._skipped = 0.0
        self._latest: RunDisplay | None = None
        self._left_out: dict[str, float] = {}
        self._progress = Progress(
            TextColumn(
                "{task.description}",
                markup=False,
                table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%", table_column=_fixed(4)),
            TimeElapsedColumn(table_column=_fixed(8)),
            TextColumn("eta", table_column=_fixed(3)),
            TimeRemainingColumn(table_column=_fixed(8)),
            console=console,
            expand=True,
            speed_estimate_period=120,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("", total=total_work)

    @contextlib.contextmanager
    def live(self) -> Iterator["ProgressDisplay"]:
        """Shows the bar inside the context."""
        with self._progress:
            yield self

    def run(
        self, name: str, training_work: float, evaluation_work: float
    ) -> "RunDisplay":
        """The display of the next run; the runs' work adds up to the total.

        A run that is never told of progress is done elsewhere: it is left out, and
        may come again.
        """
        self._leave_out_latest()
        self._total += self._left_out.pop(name, 0.0)
        self._latest = RunDisplay(
            self, name, self._done, training_work, evaluation_work
        )
        self._done += self._latest.work
        return self._latest

    def say(self, text: str) -> None:
        """Says why nothing moves."""
        self._leave_out_latest()
        self.show(text, self._done)

    def skip(self, work: float) -> None:
        """Leaves out work that was done before, lest the ETA promise its speed."""
        self._skipped += work
        self._progress.update(self._task, total=self._total - self._skipped)

    def _leave_out_latest(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None and not latest.was_told:
            self._left_out[latest.name] = latest.work
            self._done -= latest.work
            self._total -= latest.work
            self._progress.update(self._task, total=self._total - self._skipped)

    def show(self, text: str, done: float) -> None:
        """Moves the bar to `done` units of work and says what is going on."""
        done -= self._skipped
        self._progress.update(self._task, completed=done, description=text)
        now = time.monotonic()
        if self._console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        total = self._total - self._skipped
        share = done / total if total > 0 else 0.0
        elapsed = now - self._started
        eta = f"{elapsed * (1 - share) / share:.0f} s" if share > 0.02 else "-"
        line = f"{share:4.0%}  {text}  (elapsed {elapsed:.0f} s, eta {eta})"
        self._console.print(line)


def _fixed(width: int) -> Column:
    return Column(no_wrap=True, min_width=width)


class RunDisplay:
    """One run's part of a `ProgressDisplay`."""

    def __init__(
        self,
        display: ProgressDisplay,
        name: str,
        start: float,
        training_work: float,
        evaluation_work: float,
    ):
        self._display, self.name, self._start = display, name, start
        self._training, self._evaluation = training_work, evaluation_work
        self.work = training_work + evaluation_work
        self.was_told = False

    def on_progress(self, progress: Any) -> None:
        """Shows a `samrobust.training.Progress`."""
        share = progress.step / progress.num_steps
        self._skip_once(share * self._training)
        text = f"{self.name}: {progress.phase} {share:.0%}"
        if progress.metrics:
            loss, accuracy = progress.metrics["loss"], progress.metrics["accuracy"]
            text += f", loss {loss:.3f}, accuracy {accuracy:.1f} %"
        self._display.show(text, self._start + share * self._training)

    def on_batch(self, done: int, num_examples: int, doing: str = "") -> None:
        """Shows how many examples were attacked, or what is being done."""
        self._skip_once(self._training)
        share = done / num_examples
        doing = doing or f"attacked {done:,} of {num_examples:,} images"
        text = f"{self.name}: {doing}"
        work = self._start + self._training + share * self._evaluation
        self._display.show(text, work)

    def _skip_once(self, work: float) -> None:
        """Leaves out what an earlier process did, known at the first call."""
        if not self.was_told:
            self.was_told = True
            self._display.skip(work)
