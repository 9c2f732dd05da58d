"""The state of runs for the terminal: a line each, then totals, then errors."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from samrobust.experiments import survey
from samrobust.system.tables import TextTable

__all__ = ["duration", "status_to_rich"]

_STYLES = {"done": "green", "running": "bold", "failed": "red", "stale": "yellow"}


def status_to_rich(runs: Sequence[survey.RunStatus]) -> RenderableType:
    """Returns the runs as a table, how many are in which state, and the errors."""
    rows = [
        (
            run.name,
            Text(run.description, style=_STYLES.get(run.state, "")),
            f"{run.epoch}/{run.epochs or '?'}",
            "-" if run.loss is None else f"{run.loss:.3f}",
            "-" if run.accuracy is None else f"{run.accuracy:.1f} %",
            "-" if seconds is None or run.state == "done" else duration(seconds),
        )
        for run, seconds in zip(runs, survey.remaining(runs), strict=True)
    ]
    header = ("run", "state", "epoch", "loss", "accuracy", "ETA")
    errors = [f"{run.name}: {run.error}" for run in runs if run.error]
    below = [Text(), Text("\n".join(errors), style="red")] if errors else []
    grid = TextTable(header, rows, words=2).to_rich()
    return Group(grid, Text(), _totals(runs), *below)


def duration(seconds: float) -> str:
    """Formats a time as precisely as a prediction deserves.

    >>> [duration(seconds) for seconds in (8, 400, 20_000, 400_000)]
    ['8 s', '7 min', '5 h 33 min', '111 h']
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h" if hours >= 48 else f"{hours} h {minutes:02} min"


def _totals(runs: Sequence[survey.RunStatus]) -> Text:
    counts = Counter(run.state for run in runs)
    shown = ", ".join(f"{counts[s]} {s}" for s in survey.STATES if counts[s])
    text = f"{len(runs)} run{'s' if len(runs) > 1 else ''}: {shown}."
    together = survey.remaining_together(runs)
    if together is not None:
        text += f" ETA of all: {duration(together)} at this number of workers."
    if any(seconds for seconds in survey.remaining(runs)):
        text += " ETAs cover training only."
    return Text(text)
