"""States of runs, read from their files while others work on them.

Nothing is written and nothing need be whole: a file that is missing, half written or
anything else but what it should be counts as absent, and so does a value in it. Whether
a worker on another machine is alive is judged by this machine's clock. Nothing here
needs JAX.
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import pathlib
import re
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from samrobust.system.claims.holder import Holder, read_holder
from samrobust.system.failures import read_failure
from samrobust.system.files import WorkdirError, glance, read_json_lines
from samrobust.system.runtime import one_line

__all__ = [
    "STATES",
    "RunStatus",
    "read_plan",
    "remaining",
    "remaining_together",
    "survey",
    "survey_run",
]

_PHASE = r"\d{1,9}:\d{1,9}(\.\d{1,9})?"
_WORK = rf"{_PHASE}( {_PHASE})*"
STATES = ("done", "running", "stale", "waiting", "not started", "failed")


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """One run.

    Attributes:
      name: label and seed, or the directory's name.
      state: `done`; `running`; `stale` (its worker died, the next one takes it over);
        `waiting` (started and stopped, nobody works on it); `not started`; `failed`.
      host: the machine of the worker, where `running` or `stale`; else empty.
      worker: tells it from others, where `running`; else empty.
      epoch: finished ones.
      epochs: of the whole training; None if unknown.
      loss: of the last epoch; None before.
      accuracy: of the last epoch, on training images, in percent; None before.
      epoch_seconds: of an epoch that is left: the median over the finished ones, scaled
        by the predicted costs; None without a finished one.
      work: predicted cost relative to ST of an epoch that is left, the mean; None if
        unknown.
      error: of the last attempt, where that failed; else empty.
    """

    name: str
    state: str
    host: str = ""
    worker: str = ""
    epoch: int = 0
    epochs: int | None = None
    loss: float | None = None
    accuracy: float | None = None
    epoch_seconds: float | None = None
    work: float | None = None
    error: str = ""

    @property
    def description(self) -> str:
        """Returns the state in words: `running on node7`."""
        return f"{self.state} on {self.host}" if self.host else self.state


def survey(workdir: pathlib.Path) -> list[RunStatus]:
    """Returns the runs of a table, the planned ones first, or the run of its workdir.

    Raises:
      WorkdirError: if it is neither.
    """
    try:
        if _is_run(workdir):
            return [survey_run(workdir)]
        found = [path.parent for path in workdir.glob("*/seed*/config.json")]
    except OSError as error:
        message = f"Expected a directory to look at, got {workdir}: {error}."
        raise WorkdirError(message) from error
    plan = read_plan(workdir)
    paths = sorted(path.relative_to(workdir).as_posix() for path in found)
    plan |= {path: {} for path in paths if path not in plan}
    if not plan:
        raise WorkdirError(
            "Expected the directory of a table or of a run, got "
            f"workdir={str(workdir)!r}. It is made by `samrobust table` or `train`."
        )
    # At a time, since an object store answers late.
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(survey_run, map(workdir.joinpath, plan), plan.values()))


def read_plan(workdir: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the runs in a table's `plan.json`, by their directories; may be none."""
    runs = glance(workdir / "plan.json").get("runs")
    return {
        run["path"]: {name: value for name, value in run.items() if _is_plain(value)}
        for run in (runs if isinstance(runs, list) else [])
        if isinstance(run, dict) and _is_below(run.get("path"))
    }


def _is_plain(value: Any) -> bool:
    """Tells whether it is a text or a number, to be written again and compared."""
    return isinstance(value, str) or _number(value) is not None


def _is_below(path: Any) -> bool:
    """Tells whether it is the relative path of something in a directory."""
    if not isinstance(path, str) or not path or not path.isprintable():
        return False
    return not path.startswith("/") and ".." not in path.split("/")


def survey_run(
    folder: pathlib.Path, planned: dict[str, Any] | None = None
) -> RunStatus:
    """Returns the state of one run.

    Args:
      folder: its workdir; may not exist.
      planned: what `plan.json` says of it.
    """
    planned = planned or {}
    config = glance(folder / "config.json")
    training, lines, holder = config.get("training"), [], None
    with contextlib.suppress(OSError):
        holder = read_holder(folder)
    with contextlib.suppress(OSError, RecursionError):
        if (folder / "metrics.jsonl").is_file():
            lines = read_json_lines(folder / "metrics.jsonl")
    last = lines[-1] if lines else {}
    state = _state(folder, holder, started=bool(config or lines))
    label = _text(planned.get("label")) or _text(config.get("label"))
    seed = _count(planned.get("seed"), config.get("seed"))
    seed = "?" if seed is None else seed
    at_work = holder if state == "running" else None
    of_config = training.get("epochs") if isinstance(training, dict) else None
    epoch = _count(last.get("epoch")) or 0
    epochs = _count(of_config, planned.get("epochs"))
    costs = planned.get("work")
    work = _mean_cost(costs, epoch, epochs)
    finished = [
        seconds * (work or 1.0) / (_mean_cost(costs, end - 1, end) or 1.0)
        for line in lines
        if (seconds := _positive(line.get("seconds")))
        and (end := _count(line.get("epoch")))
    ]
    message = _text((read_failure(folder) or {}).get("message"))
    with contextlib.suppress(OSError):
        if state not in ("done", "running") and (folder / "result.json").is_file():
            state, message = "failed", "result.json is damaged. Restore it from a copy."
    return RunStatus(
        name=one_line(f"{label}, seed {seed}" if label else folder.name),
        state=state,
        host=one_line(holder.host) if holder and state in ("running", "stale") else "",
        worker=str(at_work.process) if at_work and at_work.pid else "",
        epoch=epoch,
        epochs=epochs,
        loss=_number(last.get("loss")),
        accuracy=_number(last.get("accuracy")),
        epoch_seconds=statistics.median(finished) if finished else None,
        work=work,
        error="" if state == "done" else one_line(message),
    )


def _mean_cost(work: Any, begin: int, epochs: int | None) -> float | None:
    """Returns the mean cost of some epochs, of all if none is left; None if unknown.

    Args:
      work: the first epoch of each phase and its cost, as `record_plan` writes it; of
        older versions a number, that of all.
      begin: the first of the epochs.
      epochs: the end of the training.

    >>> _mean_cost("0:1 8:7", 6, 10), _mean_cost("0:1 8:7", 10, 10)
    (4.0, 2.2)
    """
    if not epochs:
        return None
    if not re.fullmatch(_WORK, _text(work)):
        return _positive(work)
    begin = begin if begin < epochs else 0
    phases = [item.split(":") for item in work.split()]
    starts = [min(max(int(start), begin), epochs) for start, _ in phases]
    spans = pairwise([*starts, epochs])
    costs = [
        (end - start) / (epochs - begin) * float(cost)
        for (start, end), (_, cost) in zip(spans, phases, strict=True)
    ]
    return _positive(sum(costs))


def _text(value: Any) -> str:
    """Returns a text; empty if it is none."""
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    """Returns a finite number; None if it is none."""
    with contextlib.suppress(OverflowError):
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    return None


def _positive(value: Any) -> float | None:
    """Returns a number that can be multiplied and divided by; None if it is none."""
    number = _number(value)
    return number if number is not None and 1e-9 < number < 1e12 else None


def _count(*values: Any) -> int | None:
    """Returns the first of some values that is a number of things; None if none is."""
    return next((v for v in values if type(v) is int and 0 <= v < 2**53), None)


def remaining(runs: Sequence[RunStatus]) -> list[float | None]:
    """Returns the seconds of training that each run has left.

    Evaluation is not counted. Of a run without a finished epoch they are predicted from
    the others and the cost of its row. None where nothing is known, or nothing will be
    done: failed runs.
    """
    # Runs of one worker, seeds in one program, share its time.
    company = Counter(run.worker for run in runs)
    company[""] = 1
    shares = zip(runs, _shares(runs), strict=True)
    return [x if x is None else company[run.worker] * x for run, x in shares]


def _shares(runs: Sequence[RunStatus]) -> list[float | None]:
    """Returns the seconds of a worker by itself that each run has left."""
    rates = [r.epoch_seconds / r.work for r in runs if r.epoch_seconds and r.work]
    rate = statistics.fmean(rates) if rates else None

    def left(run: RunStatus) -> float | None:
        if run.state == "done":
            return 0.0
        predicted = rate * run.work if rate and run.work else None
        seconds = run.epoch_seconds or predicted
        if run.state == "failed" or seconds is None or run.epochs is None:
            return None
        return max(run.epochs - run.epoch, 0) * seconds

    return [left(run) for run in runs]


def remaining_together(runs: Sequence[RunStatus]) -> float | None:
    """Returns the seconds of training until all are done by this number of workers.

    None without a worker, or where a run's own time is unknown.
    """
    running = [run for run in runs if run.state == "running"]
    at_work = len({run.worker or number for number, run in enumerate(running)})
    shares = [x for x in _shares(runs) if x is not None]
    unknown = len(shares) < sum(run.state != "failed" for run in runs)
    if unknown or not at_work:
        return None
    return max(sum(shares) / at_work, *(x for x in remaining(runs) if x is not None))


def _is_run(folder: pathlib.Path) -> bool:
    names = ("config.json", "metrics.jsonl", "result.json", ".claim")
    return any((folder / name).exists() for name in names)


def _state(folder: pathlib.Path, holder: Holder | None, *, started: bool) -> str:
    if glance(folder / "result.json"):
        return "done"
    now = time.time()
    # A claim from the future is no sign of life, unless a clock is a little off.
    if holder and not holder.is_over(now) and holder.refreshed < now + holder.lease:
        return "running"
    if read_failure(folder) is not None:
        return "failed"
    if holder is not None and not holder.released:
        return "stale"
    return "waiting" if started or holder is not None else "not started"
