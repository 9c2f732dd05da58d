"""How long a table will take, before it runs: a few timed steps, and counts.

A step's time follows from its passes through the network. Rows with as many passes of
each kind differ in strengths and in elementwise work, so the first of them is timed for
all, each in a process of its own, as `samrobust bench` does. A row whose parts begin
late is the sum of its phases. Images are judged under one attack; others, AutoAttack
too, are counted by their passes.
"""

import collections
import heapq
import json
import operator
import pathlib
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from samrobust.checks import NORMS
from samrobust.data import DatasetFacts
from samrobust.evaluation.measure import usual_batch_size
from samrobust.experiments import building, configuration, methods
from samrobust.experiments.networks import checkpoints_of
from samrobust.experiments.run import PlannedRun
from samrobust.experiments.scoring import passes_to_judge
from samrobust.experiments.trunks import epochs_given, until
from samrobust.studies.bench.plan import Options, Task
from samrobust.studies.bench.programs import num_steps
from samrobust.studies.bench.suite import Launcher, Outcome
from samrobust.types import Config

__all__ = ["RowEstimate", "TableEstimate", "estimate", "tasks_of", "time_tasks"]

# What programs have in common whose time is taken to be the same.
Family: TypeAlias = Hashable


class RowEstimate(NamedTuple):
    """A row of the table.

    Attributes:
      label: of the row.
      runs: how many are left to do.
      timed: rows that were timed for it, one for each of its phases.
      phases: their epochs, and seconds of each of these.
      evaluation: seconds of a run.
      compilation: seconds of the first run.
      memory: bytes, the most of a step or an evaluation.
      total: seconds of all runs, with compilation, and without epochs that another run
        has trained already.
    """

    label: str
    runs: int
    timed: tuple[str, ...]
    phases: list[tuple[range, float]]
    evaluation: float
    compilation: float
    memory: float
    total: float = 0.0

    def training(self, first: int = 0) -> float:
        """Returns the seconds of a run's epochs from the first one on."""
        return sum(
            len(range(max(epochs.start, first), epochs.stop)) * seconds
            for epochs, seconds in self.phases
        )


class TableEstimate(NamedTuple):
    """A table.

    Attributes:
      rows: those of which all is known.
      seconds: until the last run ends.
      devices: that work on it.
      device: what one is.
      failures: (row, why it could not be timed).
    """

    rows: list[RowEstimate]
    seconds: float
    devices: int
    device: str
    failures: list[tuple[str, str]]


def tasks_of(
    runs: Sequence[PlannedRun], *, devices: int, seeds_per_program: int
) -> dict[Family, Task]:
    """Returns what is to be timed, by family: the first row of each.

    Args:
      runs: those that are to be done.
      devices: of the process that trains a run; 0: all there are.
      seeds_per_program: see `samrobust table`.
    """
    tasks: dict[Family, Task] = {}
    for config in _by_row(runs).values():
        dtype, training = config.model.dtype, config.training
        size, steps = training.batch_size, training.steps_per_call
        setting = {"steps_per_call": steps, "seeds": seeds_per_program}
        *families, judged = _families(config)
        for family, epochs in zip(families, methods.phases_of(config), strict=True):
            row = until(config, epochs.stop).row
            task = Task("step", row, row, size, dtype, devices, **setting)
            tasks.setdefault(family, task)
        size = _one_attack(config)["batch_size"]
        task = Task("evaluation", config.row, config.row, size, dtype, devices)
        tasks.setdefault(judged, task)
    return tasks


def time_tasks(
    tasks: Mapping[Family, Task],
    path: str,
    overrides: Sequence[str],
    folder: pathlib.Path,
    *,
    on_task: Callable[[int, str], None],
    should_stop: Callable[[], bool],
) -> dict[Family, Outcome]:
    """Times each program in a process of its own; as `bench.suite.Launcher`.

    Args:
      tasks: of `tasks_of`.
      path: of the config file.
      overrides: of the config.
      folder: for compiled programs, empty.
      on_task: is told the number and name of each before it begins.
      should_stop: asked while waiting.
    """
    found = {}
    for number, (family, task) in enumerate(tasks.items()):
        on_task(number, task.name)
        given = overrides
        if task.kind == "evaluation":
            config = configuration.load_config(f"{path}:{task.row}", overrides)
            given = _with_one_attack(config, overrides)
        effort = {"repeats": 2, "min_seconds": 1.0, "no_rates": True}
        options = Options(path, tuple(given), **effort)
        found[family] = Launcher(options, folder, should_stop)(task)
    return found


def estimate(
    runs: Sequence[PlannedRun],
    tasks: Mapping[Family, Task],
    outcomes: Mapping[Family, Outcome],
    *,
    workers: int,
) -> TableEstimate:
    """Adds up what was timed.

    Args:
      runs: those that are to be done, in order.
      tasks: of `tasks_of`.
      outcomes: of `time_tasks`.
      workers: take the next run each as they are free.
    """
    facts = building.load_facts(runs[0].config)
    good = {family: raw for family, raw in outcomes.items() if "error" not in raw}
    counts = collections.Counter(planned.config.row for planned in runs)
    rows: dict[str, RowEstimate] = {}
    for row, config in _by_row(runs).items():
        *families, judged = _families(config)
        if not {*families, judged} <= good.keys():
            continue
        programs = [good[family] for family in families]
        steps = num_steps(config, facts)
        seconds = [
            steps * statistics.median(program["seconds"])
            + program["checkpoint_seconds"]
            for program in programs
        ]
        programs.append(good[judged])
        rows[row] = RowEstimate(
            label=config.label,
            runs=counts[row],
            timed=tuple(tasks[family].row for family in families),
            phases=list(zip(methods.phases_of(config), seconds, strict=True)),
            evaluation=_evaluation_seconds(config, facts, good[judged]),
            compilation=sum(program["compile_seconds"] for program in programs),
            memory=max(program["peak_memory"] for program in programs),
        )
    timed, ends = [run for run in runs if run.config.row in rows], [0.0] * workers
    given = epochs_given(planned.shared for planned in timed)
    for planned, first in zip(timed, given, strict=True):
        row = rows[planned.config.row]
        seconds = row.training(first) + row.evaluation
        seconds += 0.0 if row.total else row.compilation
        rows[planned.config.row] = row._replace(total=row.total + seconds)
        heapq.heapreplace(ends, ends[0] + seconds)
    about: dict[str, Any] = next(iter(good.values()), {})
    return TableEstimate(
        rows=list(rows.values()),
        seconds=max(ends),
        devices=workers * about.get("num_devices", 1),
        device=about.get("provenance", {}).get("device", ""),
        failures=[
            (tasks[family].name, raw["error"])
            for family, raw in outcomes.items()
            if family not in good
        ],
    )


def _by_row(runs: Sequence[PlannedRun]) -> dict[str, Config]:
    """Returns the config of each row, as one of its seeds has it."""
    return {planned.config.row: planned.config for planned in runs}


def _families(config: Config) -> list[Family]:
    """Returns what decides how long each phase's steps take, and last an evaluation."""
    network = json.dumps(configuration.as_dict(config)["model"], sort_keys=True)
    training, families = config.training, []
    for epochs in methods.phases_of(config):
        passes = methods.passes_at(config, epochs.start)
        own = "" if passes.is_known else config.row, methods.group_size(config)
        of_step = training.batch_size, training.optimizer, network
        families.append((passes, *own, *of_step))
    return [*families, ("evaluation", network, _one_attack(config)["batch_size"])]


def _one_attack(config: Config) -> dict[str, Any]:
    """Returns the fields of an evaluation by one attack, in batches as in training.

    Larger ones may take minutes on a CPU.
    """
    linf, l2 = (tuple(config.evaluation[norm])[:1] for norm in NORMS)
    return {
        **{"attack": "pgd", "version": "standard", "members": (), "restarts": 1},
        **{"early_stop": False, "linf": linf, "l2": () if linf else l2},
        "batch_size": min(
            usual_batch_size(config.evaluation.batch_size),
            config.training.batch_size,
        ),
    }


def _with_one_attack(config: Config, overrides: Sequence[str]) -> list[str]:
    """Returns overrides for an evaluation by one attack."""
    values = _one_attack(config)
    own = [f"--config.evaluation.{name}={value}" for name, value in values.items()]
    named = {item.partition("=")[0] for item in own}  # of tuples, both would count
    return [item for item in overrides if item.partition("=")[0] not in named] + own


def _evaluation_seconds(config: Config, facts: DatasetFacts, timed: Outcome) -> float:
    """Scales the time of a batch under one attack to all images and all attacks."""
    one = config.copy_and_resolve_references()
    one.evaluation.update(_one_attack(config))
    passes = (passes_to_judge(c, facts.num_classes) for c in (config, one))
    count = facts.num_test if config.data.test_size is None else config.data.test_size
    if config.evaluation.split == "validation":
        count = config.data.validation_size
    batches = len(checkpoints_of(config)) * count / one.evaluation.batch_size
    return batches * statistics.median(timed["seconds"]) * operator.truediv(*passes)
