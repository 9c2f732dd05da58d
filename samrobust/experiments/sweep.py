"""A grid of runs, shared in turns by all that work on its directory.

A run whose first epochs another is training just now is put off once, for those that
begin otherwise.

What a worker does next follows from what `samrobust.experiments.run.run` returns or
raises, and from `failure.json`: processes that agree on these and on `should_stop` stay
in step.
"""

import collections
import concurrent.futures
import contextlib
import functools
import gc
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

from samrobust.checks import check
from samrobust.data import Dataset
from samrobust.experiments import methods
from samrobust.experiments.configuration import as_dict
from samrobust.experiments.identity import identity_of
from samrobust.experiments.reporting.results import unlike
from samrobust.experiments.run import PlannedRun, run
from samrobust.experiments.scoring import Observer
from samrobust.experiments.survey import read_plan, survey_run
from samrobust.experiments.trunks import in_the_making
from samrobust.experiments.turns import take_turns
from samrobust.experiments.workdir import OtherConfigError, config_changes, read_result
from samrobust.system.claims.lease import ClaimedError, claim_in_turn
from samrobust.system.distributed import broadcast_from_primary, met_by_all
from samrobust.system.failures import describe, is_transient, read_failure
from samrobust.system.files import WorkdirError, write_json
from samrobust.training import InterruptedRunError
from samrobust.training.lockstep import Lockstep
from samrobust.types import Config

__all__ = [
    "check_seeds_per_program",
    "collect",
    "finished",
    "record_plan",
    "refuse_other_configs",
    "run_all",
]

# The result; or why the run failed; or None if another holds it.
Outcome: TypeAlias = dict[str, Any] | str | None


def run_all(
    runs: Sequence[PlannedRun],
    load_data: Callable[[Config], Dataset],
    observe: Callable[[Sequence[PlannedRun]], Sequence[Observer]],
    *,
    on_failure: Callable[[PlannedRun, str], None],
    on_wait: Callable[[Sequence[PlannedRun]], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    seeds_per_program: int = 1,
) -> list[dict[str, Any]]:
    """Runs one after another; one that fails, for whatever reason, stops no other.

    With several processes that holds for what they all meet alike; what one of them
    meets alone, such as a lack of memory, is raised and ends them all. So is what
    passes by, such as a file server or a process that is gone: no run failed then.

    Args:
      runs: with a workdir of its own each.
      load_data: of a run's config, again and again.
      observe: gives the observers of runs that are about to be tried together; what it
        raises ends all.
      on_failure: is told at the end of each run that failed, and why, here or at
        another worker meanwhile, unless one has finished it since. A run that had
        failed before is tried again.
      on_wait: is told now and then which runs others hold, when only those are left.
      should_stop: asked now and then.
      seeds_per_program: how many seeds of a row are trained at a time, by one program;
        see `samrobust.training.lockstep` and `check_seeds_per_program`.

    Returns:
      The results of those that finished, here or elsewhere, in order.

    Raises:
      InterruptedRunError: after `should_stop`.
    """
    before = broadcast_from_primary(
        lambda: {p.workdir: read_failure(p.workdir) for p in runs}
    )

    def attempt(planned: PlannedRun, observer: Observer, **how: Any) -> Outcome:
        look = functools.partial(read_failure, planned.workdir)
        failure = broadcast_from_primary(look)
        if failure is not None and failure != before[planned.workdir]:
            return f"{failure.get('message')} (on {failure.get('host')})"
        try:
            how |= {"dataset": load_data(planned.config), "shared": planned.shared}
            return run(planned.config, planned.workdir, observer, **how)
        except InterruptedRunError:
            raise
        except Exception as error:  # a bug in one row must not stop the others
            if not met_by_all(error) or is_transient(error):
                raise  # these processes are out of step, or all rows would fail
            if isinstance(error, ClaimedError):
                return None
            why = describe(error)
        gc.collect()  # the error held what the run had on the device
        return why

    outcomes: dict[pathlib.Path, dict[str, Any] | str] = {}
    put_off: set[pathlib.Path] = set()

    def attempt_all(left: Sequence[PlannedRun]) -> list[PlannedRun]:
        held = []
        for group in _groups(left, seeds_per_program):
            fresh = [t for p in group if p.workdir not in put_off for t in p.shared]
            if broadcast_from_primary(functools.partial(in_the_making, fresh)):
                put_off.update(planned.workdir for planned in group)
                held += group
                continue
            attempts = [
                functools.partial(attempt, planned, observer)
                for planned, observer in zip(group, observe(group), strict=True)
            ]
            found = _attempt_together(attempts, should_stop)
            for planned, outcome in zip(group, found, strict=True):
                if outcome is None:
                    held.append(planned)
                else:
                    outcomes[planned.workdir] = outcome
        return held

    def finished_since() -> set[pathlib.Path]:
        failed = {w for w, outcome in outcomes.items() if isinstance(outcome, str)}
        ended = {p.workdir for p in runs if p.workdir in failed and p.has_result}
        return {workdir for workdir in ended if read_failure(workdir) is None}

    take_turns(runs, attempt_all, on_wait=on_wait, should_stop=should_stop)
    since = broadcast_from_primary(finished_since)
    again = [planned for planned in runs if planned.workdir in since]
    take_turns(again, attempt_all, on_wait=on_wait, should_stop=should_stop)
    for planned in runs:
        if isinstance(why := outcomes.get(planned.workdir), str):
            on_failure(planned, why)
    found = (outcomes.get(planned.workdir) for planned in runs)
    return [outcome for outcome in found if isinstance(outcome, dict)]


def check_seeds_per_program(count: int, runs: Sequence[PlannedRun]) -> None:
    """Refuses to train several seeds in one program where that cannot be.

    Raises:
      ValueError: if there are several devices, fewer seeds of each row, or a tracker
        that knows one run a process; where `count` is 1, never.
    """
    if count == 1 or not runs:
        return
    wanted = {"seeds_per_program": count}
    check(
        jax.device_count() == 1,
        "one device for several seeds in a program",
        "Let a process with one device do each part of the table: --shard.",
        **wanted,
        devices=jax.device_count(),
    )
    rows = collections.Counter(planned.config.row for planned in runs)
    check(
        count <= max(rows.values()),
        f"seeds_per_program <= {max(rows.values())}, the seeds of a row to train here",
        "Raise --seeds: runs of other rows are other programs.",
        **wanted,
    )
    tracker = runs[0].config.tracking.wandb
    fix = "W&B knows one run a process. TensorBoard and metrics.jsonl know each seed."
    condition = "no tracking.wandb with several seeds in a program"
    check(not tracker, condition, fix, **wanted, **{"tracking.wandb": tracker})


def _groups(runs: Sequence[PlannedRun], size: int) -> Iterator[list[PlannedRun]]:
    """Yields runs in order, each with later ones that differ in their seeds alone."""
    left = list(runs)
    while left:
        alike = left[:1]
        if size > 1 and not left[0].has_result:
            siblings = (p for p in left[1:] if _is_sibling(p, left[0]))
            alike += [p for p in siblings if not p.has_result]
        group = alike[:size]
        left = [p for p in left if not any(p is taken for taken in group)]
        yield group


def _is_sibling(planned: PlannedRun, other: PlannedRun) -> bool:
    """Tells whether two runs differ in their seeds alone."""
    ours, theirs = planned.config, other.config
    return ours.row == theirs.row and as_dict(ours) == {
        **as_dict(theirs),
        "seed": ours.seed,
    }


def _attempt_together(
    attempts: Sequence[Callable[..., Outcome]], should_stop: Callable[[], bool]
) -> list[Outcome]:
    """Returns the outcomes of runs whose steps are taken by one program."""
    if len(attempts) == 1:
        return [attempts[0](should_stop=should_stop)]
    lockstep = Lockstep(len(attempts), should_stop)

    def join(attempt: Callable[..., Outcome]) -> Outcome:
        with lockstep.joined() as companion:
            return attempt(should_stop=companion.should_stop, companion=companion)

    with concurrent.futures.ThreadPoolExecutor(len(attempts)) as pool:
        return list(pool.map(join, attempts))


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
    runs: Sequence[PlannedRun], failed: Mapping[pathlib.Path, str]
) -> tuple[list[dict[str, Any]], list[tuple[PlannedRun, str]]]:
    """Returns the results of finished runs, and the other runs, each with the reason.

    A result that is not comparable with the first one counts as missing.

    Args:
      runs: of the table.
      failed: by its workdir, why a run failed just now; a result is of other data.
    """
    results: list[Any] = []
    missing = []
    for planned in runs:
        result, why = None, failed.get(planned.workdir, "")
        try:
            result = None if why else finished(planned)
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
      WorkdirError: if the directory is that of a run.
    """
    if (workdir / "config.json").exists():
        raise WorkdirError(
            f"Expected a table's directory, got workdir={str(workdir)!r}, that of a "
            "run. Choose another --workdir."
        )
    changed = []
    for planned in runs:
        with contextlib.suppress(WorkdirError):  # a damaged file fails its run alone
            if fields := config_changes(planned.workdir, planned.config):
                changed.append(fields)
    if changed:
        what = f"{len(changed)} of the {len(runs)} runs"
        raise OtherConfigError.over(workdir, what, max(changed, key=changed.count))


def record_plan(workdir: pathlib.Path, runs: Sequence[PlannedRun]) -> None:
    """Adds the runs to the table's `plan.json`; in their order, if that is all of it.

    `samrobust status`, and whatever measures finished runs, takes its order from there.

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
            # Of each phase, from its first epoch on.
            "work": " ".join(
                f"{epochs.start}:{methods.passes_at(config, epochs.start).total:.4f}"
                for epochs in methods.phases_of(config)
            ),
        }

    def together(theirs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        is_all = theirs.keys() <= ours.keys()
        return list((ours if is_all else theirs | ours).values())

    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if list((known := read_plan(workdir)).values()) == together(known):
            return
        with claim_in_turn(workdir / ".planning"):  # others may be adding theirs
            plan = together(read_plan(workdir))
            write_json(workdir / "plan.json", {"runs": plan})
    except OSError as error:
        what = f"Expected a writable directory, got workdir={str(workdir)!r}: {error}."
        raise WorkdirError(what) from error
