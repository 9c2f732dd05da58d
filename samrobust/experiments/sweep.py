"""A grid of runs, shared by all that work on its directory.

Whoever comes takes the next run that nobody holds. A run held by another is put off and
asked for again, until that one has finished it, or died and left it. So every worker
ends when all of its share is done, and one more of them is always of use. A run whose
first epochs another is training just now is put off once, for those that begin
otherwise.

What a worker does next follows from what `samrobust.experiments.run.run` returns or
raises, and from `failure.json`: processes that agree on these and on `should_stop` stay
in step.
"""

import contextlib
import functools
import gc
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from samrobust.data import Dataset
from samrobust.experiments import methods
from samrobust.experiments.identity import identity_of
from samrobust.experiments.reporting.results import unlike
from samrobust.experiments.run import PlannedRun, run
from samrobust.experiments.scoring import Observer
from samrobust.experiments.survey import read_plan, survey_run
from samrobust.experiments.trunks import in_the_making
from samrobust.experiments.workdir import (
    OtherConfigError,
    config_changes,
    read_result,
)
from samrobust.system.claims import ClaimedError
from samrobust.system.distributed import broadcast_from_primary, met_by_all
from samrobust.system.failures import describe, read_failure
from samrobust.system.files import WorkdirError, write_json
from samrobust.system.runtime import RESUME
from samrobust.training import InterruptedRunError

__all__ = ["collect", "finished", "record_plan", "refuse_other_configs", "run_all"]

_TICK, _LONGEST_PAUSE = 0.5, 5.0  # seconds


def run_all(
    runs: Sequence[PlannedRun],
    dataset: Dataset,
    observe: Callable[[PlannedRun], Observer],
    *,
    on_failure: Callable[[PlannedRun, str], None],
    on_wait: Callable[[Sequence[PlannedRun]], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """Runs one after another; one that fails, for whatever reason, stops no other.

    With several processes that holds for what they all meet alike; what one of them
    meets alone, such as a lack of memory, is raised and ends them all.

    Args:
      runs: with a workdir of its own each.
      dataset: that of all of them.
      observe: gives the observer of a run that is about to be tried.
      on_failure: is told of a run that failed, and why, here or at another worker
        meanwhile. A run that had failed before is tried again.
      on_wait: is told now and then which runs others hold, when only those are left.
      should_stop: asked now and then.

    Returns:
      The results of those that finished, here or elsewhere, in order.

    Raises:
      InterruptedRunError: after `should_stop`.
    """
    before = broadcast_from_primary(
        lambda: {p.workdir: read_failure(p.workdir) for p in runs}
    )
    results: dict[pathlib.Path, dict[str, Any]] = {}
    left, pause = list(runs), _TICK
    put_off: set[pathlib.Path] = set()
    while left:
        held = []
        for planned in left:
            failure = broadcast_from_primary(
                functools.partial(read_failure, planned.workdir)
            )
            if failure is not None and failure != before[planned.workdir]:
                why = f"{failure.get('message')} (on {failure.get('host')})"
                on_failure(planned, why)
                continue
            if planned.workdir not in put_off and broadcast_from_primary(
                functools.partial(in_the_making, planned.shared)
            ):
                put_off.add(planned.workdir)
                held.append(planned)
                continue
            outcome = _attempt(planned, dataset, observe(planned), should_stop)
            if outcome is None:
                held.append(planned)
            elif isinstance(outcome, str):
                gc.collect()  # its error held what the run had on the device
                on_failure(planned, outcome)
            else:
                results[planned.workdir] = outcome
        if len(held) == len(left):
            on_wait(held)
            _wait(pause, should_stop)
            pause = min(2 * pause, _LONGEST_PAUSE)
        else:
            pause = _TICK
        left = held
    return [results[p.workdir] for p in runs if p.workdir in results]


def _attempt(
    planned: PlannedRun,
    dataset: Dataset,
    observer: Observer,
    should_stop: Callable[[], bool],
) -> dict[str, Any] | str | None:
    """Returns the result; or why it failed; or None if another holds the run."""
    try:
        config, workdir = planned.config, planned.workdir
        options = {"should_stop": should_stop, "shared": planned.shared}
        return run(config, workdir, observer, dataset=dataset, **options)
    except InterruptedRunError:
        raise
    except Exception as error:  # a bug in one row must not stop the others
        if not met_by_all(error):  # these processes are out of step
            raise
        return None if isinstance(error, ClaimedError) else describe(error)


def finished(planned: PlannedRun) -> dict[str, Any] | None:
    """Returns the content of a run's `result.json`; None if it has not finished.

    Raises:
      WorkdirError: if the directory or the result is of another config, or a file is
        damaged.
    """
    changed = config_changes(planned.workdir, planned.config)
    if changed:
        message = f"it is of another config, which differs in {', '.join(changed)}"
        raise WorkdirError(message)
    if changed is None:
        return None
    return read_result(planned.workdir, identity_of(planned.config, None))


def collect(
    runs: Sequence[PlannedRun],
) -> tuple[list[dict[str, Any]], list[tuple[PlannedRun, str]]]:
    """Returns the results of finished runs, and the other runs, each with the reason.

    A result that is not comparable with the first one counts as missing.
    """
    results: list[Any] = []
    missing = []
    for planned in runs:
        result, why = None, ""
        try:
            result = finished(planned)
        except WorkdirError as error:
            why = str(error)
        if result is None and not why:
            status = survey_run(planned.workdir)
            why = ": ".join(filter(None, (status.description, status.error)))
        elif result and results and (fields := unlike(result, first := results[0])):
            told = "; ".join(f"{n} is {a!r}, not {b!r}" for n, (a, b) in fields.items())
            beside = f"{first['label']}, seed {first['seed']}"
            why = f"not comparable with {beside}: {told}"
        if why:
            missing.append((planned, why))
        else:
            results.append(result)
    return results, missing


def refuse_other_configs(workdir: pathlib.Path, runs: Sequence[PlannedRun]) -> None:
    """Refuses a table whose runs there were started with another config.

    Raises:
      OtherConfigError: says once what differs, before any work.
    """
    changed = []
    for planned in runs:
        with contextlib.suppress(WorkdirError):  # a damaged file fails its run alone
            if fields := config_changes(planned.workdir, planned.config):
                changed.append(fields)
    if changed:
        what = f"{len(changed)} of the {len(runs)} runs"
        raise OtherConfigError.over(workdir, what, max(changed, key=changed.count))


def record_plan(workdir: pathlib.Path, runs: Sequence[PlannedRun]) -> None:
    """Adds the runs to the table's `plan.json`, for `samrobust status`.

    Raises:
      WorkdirError: if the directory cannot be written.
    """
    ours = {}
    for planned in runs:
        path, config = planned.workdir.relative_to(workdir).as_posix(), planned.config
        ours[path] = {
            "path": path,
            "row": config.row,
            "label": config.label,
            "seed": config.seed,
            "epochs": config.training.epochs,
            "work": methods.cost(config),
        }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Read again after writing: others may be adding theirs.
        while (plan := read_plan(workdir)) != (together := plan | ours):
            write_json(workdir / "plan.json", {"runs": list(together.values())})
    except OSError as error:
        what = f"Expected a writable directory, got workdir={str(workdir)!r}: {error}."
        raise WorkdirError(what) from error


def _wait(seconds: float, should_stop: Callable[[], bool]) -> None:
    """Waits by counting and not by the clock: processes in step ask equally often."""
    for _ in range(round(seconds / _TICK)):
        if should_stop():
            message = f"Stopped while others held the last runs. {RESUME}"
            raise InterruptedRunError(message)
        time.sleep(_TICK)
