"""How far runs are, read from their files while others work on them.

Nothing is written and nothing need be whole: a file that is missing or half written
counts as absent. Whether a worker on another machine is alive is judged by this
machine's clock. Nothing here needs JAX.
"""

import contextlib
import dataclasses
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

from samrobust.claims import Holder, read_holder
from samrobust.failures import read_failure
from samrobust.files import WorkdirError, glance, read_json_lines

__all__ = [
    "STATES",
    "RunStatus",
    "read_plan",
    "remaining",
    "remaining_together",
    "survey",
    "survey_run",
]

STATES = ("done", "running", "stale", "waiting", "not started", "failed")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
      name: label and seed, or the directory's name.
      state: `done`; `running`; `stale` (its worker died, the next one takes it over);
        `waiting` (started and stopped, nobody works on it); `not started`; `failed`.
      host: the machine of the worker, where `running` or `stale`; else empty.
      epoch: finished ones.
      epochs: of the whole training; None if unknown.
      loss: of the last epoch; None before.
      accuracy: of the last epoch, on training images, in percent; None before.
      epoch_seconds: median over the finished epochs; None without one.
      work: predicted cost of an epoch relative to ST; None if unknown.
      error: of the last attempt, where that failed; else empty.
    """

    name: str
    state: str
    host: str = ""
    epoch: int = 0
    epochs: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    epoch_seconds: float | None = None
    work: float | None = None
    error: str = ""

    @property
    def description(self) -> str:
        """The state in words: `running on node7`."""
        return f"{self.state} on {self.host}" if self.host else self.state


def survey(workdir: pathlib.Path) -> list[RunStatus]:
    """The runs of a table's workdir, the planned ones first, or the one of a run's.

    Raises:
      WorkdirError: if it is neither.
    """
    if _is_run(workdir):
        return [survey_run(workdir)]
    plan = read_plan(workdir)
    found = (path.parent for path in workdir.glob("*/seed*/config.json"))
    paths = sorted(path.relative_to(workdir).as_posix() for path in found)
    plan |= {path: {} for path in paths if path not in plan}
    if not plan:
        message = (
            "Expected the directory of a table or of a run, got "
            f"workdir={str(workdir)!r}. It is made by `samrobust table` or `train`."
        )
        raise WorkdirError(message)
    return [survey_run(workdir / path, planned) for path, planned in plan.items()]


def read_plan(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The runs in a table's `plan.json`, by their directories' names; may be none."""
    runs = glance(workdir / "plan.json").get("runs", [])
    return {run["path"]: run for run in runs}


def survey_run(
    folder: pathlib.Path, planned: dict[str, Any] | None = None
) -> RunStatus:
    """The state of one run.

    Args:
      folder: its workdir; may not exist.
      planned: what `plan.json` says of it.
    """
    planned = planned or {}
    config = glance(folder / "config.json")
    lines, holder = [], None
    with contextlib.suppress(OSError):
        lines = read_json_lines(folder / "metrics.jsonl")
        holder = read_holder(folder)
    last = lines[-1] if lines else {}
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    state = _state(folder, holder, started=bool(config or lines))
    failure = read_failure(folder) or {}
    label = planned.get("label") or config.get("label")
    seed = planned.get("seed", config.get("seed"))
    return RunStatus(
        name=f"{label}, seed {seed}" if label else folder.name,
        state=state,
        host=holder.host if holder and state in ("running", "stale") else "",
        epoch=last.get("epoch", 0),
        epochs=config.get("training", {}).get("epochs", planned.get("epochs")),
        loss=last.get("loss"),
        accuracy=last.get("accuracy"),
        epoch_seconds=statistics.median(seconds) if seconds else None,
        work=planned.get("work"),
        error="" if state == "done" else failure.get("message", ""),
    )


def remaining(runs: Sequence[RunStatus]) -> list[float | None]:
    """The seconds of training that each run has left; evaluation is not counted.

    Of a run without a finished epoch they are predicted from the others and the cost
    of its row. None where nothing is known, or nothing will be done: failed runs.
    """
    rates = [r.epoch_seconds / r.work for r in runs if r.epoch_seconds and r.work]
    rate = statistics.fmean(rates) if rates else None

    def left(run: RunStatus) -> float | None:
        if run.state == "done":
            return 0.0
        seconds = run.epoch_seconds
        if seconds is None and rate is not None and run.work:
            seconds = rate * run.work
        if run.state == "failed" or seconds is None or run.epochs is None:
            return None
        return max(run.epochs - run.epoch, 0) * seconds

    return [left(run) for run in runs]


def remaining_together(runs: Sequence[RunStatus]) -> float | None:
    """The seconds of training until all are done, by as many workers as there are now.

    None without a worker, or where a run's own time is unknown.
    """
    at_work = sum(run.state == "running" for run in runs)
    left = [
        seconds
        for run, seconds in zip(runs, remaining(runs), strict=True)
        if run.state != "failed"
    ]
    known = [seconds for seconds in left if seconds is not None]
    if not at_work or len(known) < len(left):
        return None
    return max(sum(known) / at_work, *known)


def _is_run(folder: pathlib.Path) -> bool:
    names = ("config.json", "metrics.jsonl", "result.json", ".claim")
    return any((folder / name).exists() for name in names)


def _state(folder: pathlib.Path, holder: Holder | None, *, started: bool) -> str:
    if glance(folder / "result.json"):
        return "done"
    if holder is not None and not holder.is_over(time.time()):
        return "running"
    if read_failure(folder) is not None:
        return "failed"
    if holder is not None and not holder.released:
        return "stale"
    return "waiting" if started or holder is not None else "not started"
