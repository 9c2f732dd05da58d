"""The rows of a bench, run in rounds, each in a process of its own.

Every row once, then every row again, so that a machine that grows slow for a minute
slows a round of them all and not one of them. The first round compiles anew, into a
cache that the later ones find.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from samrobust.studies.bench.plan import Options, Task, spec_of
from samrobust.studies.bench.process import Launcher, StoppedError

__all__ = ["StoppedError", "run_suite"]


def run_suite(
    tasks: Sequence[Task],
    options: Options,
    *,
    on_outcome: Callable[[Task, dict[str, Any]], None],
    on_start: Callable[[str, int, int], None],
    should_stop: Callable[[], bool],
) -> None:
    """Measures all rows, round after round.

    Args:
      tasks: from `plan`.
      options: the same as there.
      on_outcome: called after every process with the row (of kinds `ceilings` and
        `counts` first) and the worker's outcome, or `{"error": ...}`.
      on_start: called before every process, with its name, its number and how many
        there are.
      should_stop: asked all the time; if true, the process is ended and
        `StoppedError` raised.
    """
    with tempfile.TemporaryDirectory(prefix="samrobust-bench-") as folder:
        launch = Launcher(pathlib.Path(folder), should_stop)
        order = list(_order(tasks, options))
        for number, (name, task) in enumerate(order):
            on_start(name, number, len(order))
            if task.kind in ("ceilings", "counts"):
                on_outcome(task, launch.worker(spec_of(task, options)))
            elif task.kind == "pytorch":
                on_outcome(task, launch.pytorch(task, options))
            else:
                on_outcome(task, launch.worker(spec_of(task, options), task))


def _order(tasks: Sequence[Task], options: Options) -> Iterator[tuple[str, Task]]:
    """Yields what runs: ceilings, counts, then every row once, and once again."""
    for precision in dict.fromkeys(task.precision for task in tasks):
        ceiling = dataclasses.replace(
            tasks[0], kind="ceilings", precision=precision, xla_flags="", devices=0
        )
        yield f"ceilings, {precision}", ceiling
    yield "counts", dataclasses.replace(tasks[0], kind="counts")
    for number in range(options.rounds):
        for task in tasks:
            yield f"round {number + 1}: {task.name}", task
