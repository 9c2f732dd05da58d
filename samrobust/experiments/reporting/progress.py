"""A live progress bar over a grid of runs; plain lines where there is no terminal."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from samrobust.experiments.reporting.names import attacked_in_words
from samrobust.experiments.reporting.status import duration

__all__ = ["ProgressDisplay"]

_SECONDS_BETWEEN_LINES = 15.0
_COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX's event


class ProgressDisplay:
    """Display of how far a grid of runs is, in units of predicted work.

    The ETA does not count the time that programs took to compile: the work that is left
    needs few new ones.

    Args:
      console: a terminal gets a live bar with an ETA, anything else a line now and
        then.
      total_work: of all runs together, in any unit.
    """

    def __init__(self, console: Console, total_work: float):
        self._console, self._total = console, total_work
        self._started, self._last_line = time.monotonic(), 0.0
        self._runs: dict[str, RunDisplay] = {}
        self._compiling: Callable[[], float] = lambda: 0.0
        text = Column(ratio=1, no_wrap=True, overflow="ellipsis")
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=text),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f}%", table_column=_fixed(4)),
            TimeElapsedColumn(table_column=_fixed(8)),
            TextColumn("eta {task.fields[eta]}", table_column=_fixed(14)),
            console=console,
            expand=True,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total_work, eta="-")

    def live(self) -> contextlib.AbstractContextManager[object]:
        """Returns the context in which the bar is shown."""
        return self._progress

    def run(
        self, name: str, training: float, evaluation: float, given: float = 0.0
    ) -> "RunDisplay":
        """Returns the display of the next run; see `run_together`."""
        (shown,) = self.run_together({name: (training, evaluation, given)})
        return shown

    def run_together(
        self, works: Mapping[str, tuple[float, float, float]]
    ) -> list["RunDisplay"]:
        """Returns displays of the next runs; those before have ended.

        A run that is never told of progress is done elsewhere: it is left out, and
        may come again.

        Args:
          works: by their names the work of the training, of the evaluation, and what
            of the training an earlier run leaves, which counts for nothing. That of all
            runs adds up to the total.
        """
        if not self._runs:
            clock = _compilation_clock()
            begun = clock()
            self._compiling = lambda: clock() - begun
        self._end_all()
        shown = {
            name: RunDisplay(self.say, name, *work) for name, work in works.items()
        }
        self._runs |= shown
        return list(shown.values())

    def say(self, text: str) -> None:
        """Says what is going on, or why nothing moves."""
        runs = self._runs.values()
        skipped = sum(run.skipped or 0.0 for run in runs)
        self.show(text, sum(run.done for run in runs) - skipped, self._total - skipped)

    def wait_for(self, names: Iterable[str]) -> None:
        """Says that other workers have the last runs, by their names."""
        self._end_all()
        self.say(f"waiting for other workers: {', '.join(names)}")

    def _end_all(self) -> None:
        for run in self._runs.values():
            run.end()

    def show(self, text: str, done: float, total: float | None = None) -> None:
        """Moves the bar to `done` units of work and says what is going on."""
        total = self._total if total is None else total
        now = time.monotonic()
        share = min(1.0, done / total) if total > 0 else 0.0  # sums may round up
        elapsed = now - self._started
        left = (elapsed - self._compiling()) * (1 - share)
        eta = duration(left / share) if share > 0.02 else "-"
        moved: dict[str, Any] = {"completed": done, "total": total, "eta": eta}
        self._progress.update(self._task, description=text, **moved)
        if self._console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        line = f"{share:4.0%}  {text}  (elapsed {duration(elapsed)}, eta {eta})"
        self._console.print(line, soft_wrap=True)


@functools.cache
def _compilation_clock() -> Callable[[], float]:
    """Returns a clock of the seconds in which this process has compiled programs."""
    import jax.monitoring  # not for displays of what other processes do

    seconds = [0.0]

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILATION:
            seconds[0] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: seconds[0]


def _fixed(width: int) -> Column:
    return Column(no_wrap=True, min_width=width)


@dataclasses.dataclass(eq=False)
class RunDisplay:
    """Part of one run in a `ProgressDisplay`.

    Attributes:
      say: shows a text.
      name: of the run.
      training, evaluation: their work.
      given: what of the training an earlier run leaves.
      done: work, without what is given.
      skipped: what other processes did beyond what is given, known in part as soon as
        the run is told of progress, and whole at its end; None before. The ETA must not
        promise that speed.
    """

    say: Callable[[str], None]
    name: str
    training: float
    evaluation: float
    given: float = 0.0
    done: float = 0.0
    skipped: float | None = None

    def on_progress(self, progress: Any) -> None:
        """Shows a `samrobust.training.Progress`."""
        share = progress.step / progress.num_steps
        text = f"{progress.phase} {share:.0%}"
        if progress.metrics:
            loss, accuracy = progress.metrics["loss"], progress.metrics["accuracy"]
            text += f", loss {loss:.3f}, accuracy {accuracy:.1f} %"
        self._move(share * self.training, share * self.training, text)

    def on_batch(self, done: int, num_examples: int, doing: str = "") -> None:
        """Shows how many examples were attacked, or what is being done."""
        work = self.training + done / num_examples * self.evaluation
        doing = doing or attacked_in_words(done, num_examples)
        self._move(self.training, work, doing)

    def end(self) -> None:
        """Ends the run: the work that it was never told of is done elsewhere."""
        work = self.training + self.evaluation - self.given
        self.skipped = (self.skipped or 0.0) + work - self.done
        self.done = work

    def _move(self, before: float, done: float, text: str) -> None:
        if self.skipped is None:
            self.skipped = before - self.given
        self.done = done - self.given
        self.say(f"{self.name}: {text}")
