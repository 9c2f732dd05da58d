"""Work that several commands share: joining, judging trained runs, showing.

With JAX: commands import it inside `run`.
"""

import functools
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rich.console import Console

from samrobust.checks import check
from samrobust.cli import flags
from samrobust.experiments.methods import training_passes
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.notes import (
    averaging_note,
    overfitting_note,
    sharpness_note,
)
from samrobust.experiments.reporting.results import num_steps
from samrobust.experiments.workdir import inode_of, refuse_moved
from samrobust.system import distributed
from samrobust.system.claims.lease import await_verdict
from samrobust.system.files import check_writable, read_json_lines
from samrobust.system.provenance import commit
from samrobust.system.runtime import RESUME
from samrobust.training import InterruptedRunError
from samrobust.types import Config

__all__ = [
    "apply_flags",
    "await_holder",
    "join",
    "once_per",
    "open_workdir",
    "passes_of",
    "show_accuracies",
    "show_failures",
    "show_notes",
    "show_written",
]

_T = TypeVar("_T")
_OF_EVALUATION = (
    *("attack", "linf", "l2", "checkpoint", "batch_size"),
    *("num_steps", "restarts", "loss", "judge", "early_stop", "version", "members"),
)
_FIELDS = {
    **{name: f"evaluation.{name}" for name in _OF_EVALUATION},
    **{"num_examples": "data.test_size", "dtype": "model.dtype", "seed": "seed"},
}


def join(stop: Callable[[], bool]) -> tuple[Callable[[], bool], Console]:
    """Joins the other processes; returns their common stop, and process 0's console."""
    commit()  # of the code that runs now
    should_stop = distributed.join(stop)
    return should_stop, make_console(quiet=not distributed.is_primary())


def open_workdir(workdir: pathlib.Path) -> Callable[[], None]:
    """Makes a table's directory, in which process 0 can write.

    Returns:
      What refuses, in process 0, a directory that is not this one any more, with a
      `ClaimedError`: it was removed or moved meanwhile.

    Raises:
      WorkdirError: if it cannot be written.
    """

    def opened() -> tuple[int, int] | None:
        check_writable(workdir)
        return inode_of(workdir)

    inode = distributed.broadcast_from_primary(opened)
    return functools.partial(refuse_moved, workdir, inode)


def await_holder(
    folder: pathlib.Path, console: Console, should_stop: Callable[[], bool]
) -> None:
    """Waits, in all processes, as `await_verdict`.

    Raises:
      InterruptedRunError: after `should_stop`.
    """
    await_verdict(
        folder,
        should_stop=should_stop,
        on_wait=console.print,
        agree=distributed.broadcast_from_primary,
    )
    if should_stop():
        message = f"Stopped while waiting for another process. {RESUME}"
        raise InterruptedRunError(message)


def apply_flags(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a run's config with the flags that are given written into it."""
    config = config.copy_and_resolve_references()
    given = flags.given(values, _FIELDS)
    check(
        "num_examples" not in given or config.evaluation.split == "test",
        "evaluation.split=test with --num-examples",
        **{"evaluation.split": config.evaluation.split},
    )
    if given.get("attack", config.evaluation.attack) == "pgd":
        config.evaluation.update(version="standard", members=())  # AutoAttack's
    # Without what the run has beside another choice, and no flag takes away.
    if given.get("version", "custom") != "custom":
        config.evaluation.members = ()
    if given.get("judge") == "final":
        config.evaluation.early_stop = False
    config.update_from_flattened_dict({_FIELDS[n]: v for n, v in given.items()})
    return config


def once_per(make: Callable[[Config], _T], *sections: str) -> Callable[[Config], _T]:
    """Returns a function of configs that is called once for equal sections of them."""
    made: dict[tuple[str, ...], _T] = {}

    def get(config: Config) -> _T:
        key = tuple(config[name].to_json_best_effort() for name in sections)
        if key not in made:
            made[key] = make(config)
        return made[key]

    return get


def show_accuracies(console: Console, name: str, accuracy: Mapping[str, float]) -> None:
    """Prints a line with the accuracy of every column."""
    cells = ", ".join(f"{column} {value:.2f}" for column, value in accuracy.items())
    console.print(f"{name}: {cells} (accuracy in %)")


def show_failures(console: Console, failures: Mapping[str, str]) -> None:
    """Prints a line for each run that failed: what it is called, and why."""
    for name, why in failures.items():
        console.print("failed", style="red", end=" ")
        console.print(f"{name}: {why}")


def show_notes(console: Console, workdir: pathlib.Path) -> None:
    """Prints whether a run's method was on, and whether it overfitted at once."""
    if distributed.is_primary():  # who alone sees the workdir
        lines = read_json_lines(workdir / "metrics.jsonl")
        for says in (sharpness_note, averaging_note, overfitting_note):
            if note := says(lines):
                console.print(note)


def passes_of(
    results: Iterable[Mapping[str, Any]], configs: Mapping[str, Config]
) -> dict[str, float]:
    """Returns what the training of each row took, where known, by runs and configs."""
    found = {
        result["row"]: training_passes(configs[result["row"]], num_steps(result))
        for result in results
    }
    return {row: passes for row, passes in found.items() if passes is not None}


def show_written(
    console: Console, folder: pathlib.Path, paths: Iterable[pathlib.Path | str]
) -> None:
    """Prints which files were written."""
    names = ", ".join(pathlib.Path(path).name for path in paths)
    console.print(f"Written to {folder}: {names}")
