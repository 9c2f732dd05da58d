"""The plan of a bench: from the flags of a command line to the rows it measures."""

import dataclasses
import itertools
from typing import Any

from samrobust.checks import check, check_choice
from samrobust.experiments import configuration, entries, methods, rows
from samrobust.studies.bench.counts import Work

__all__ = [
    "KINDS",
    "VARIANTS",
    "Options",
    "Task",
    "plan",
    "spec_of",
    "task_overrides",
    "work_of",
]

KINDS = ("step", "epoch", "evaluation", "unrolled")
VARIANTS = ("reference", "resident", "tuned", "compiled")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure, from the command line.

    Attributes:
      config: the config file.
      overrides: of the config, `--config.FIELD=VALUE`.
      measure: which of `KINDS`.
      methods: of the config's table: st, sam, at, at+sam; the first row of each.
      batch_sizes: over all devices; the config's where empty.
      precisions: float32, bfloat16; the config's where empty.
      devices: numbers of devices; 0: all there are.
      steps_per_call: 0: the default of the device.
      xla_flags: flags added to `XLA_FLAGS`, one string a variant; "" adds none.
      compare: `pytorch`, or nothing.
      variants: of PyTorch.
      repeats: in every process.
      rounds: processes for each row.
      min_seconds: of a repeat.
    """

    config: str
    overrides: tuple[str, ...] = ()
    measure: tuple[str, ...] = ("step", "epoch", "evaluation")
    methods: tuple[str, ...] = ("st", "sam", "at")
    batch_sizes: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    devices: tuple[int, ...] = (0,)
    steps_per_call: tuple[int, ...] = (0,)
    xla_flags: tuple[str, ...] = ("",)
    compare: str | None = None
    variants: tuple[str, ...] = VARIANTS
    repeats: int = 5
    rounds: int = 2
    min_seconds: float = 2.0

    def __post_init__(self) -> None:
        for kind in self.measure:
            check_choice(KINDS, measure=kind)
        for variant in self.variants:
            check_choice(VARIANTS, variants=variant)
        for name in ("repeats", "rounds"):
            value = getattr(self, name)
            check(value >= 1, f"--{name} >= 1", **{name: value})
        check(self.min_seconds > 0, "--min-seconds > 0", min_seconds=self.min_seconds)
        for number in (*self.devices, *self.steps_per_call):
            check(number >= 0, "numbers >= 0 (0: the default)", number=number)
        for size in self.batch_sizes:
            check(size >= 1, "--batch-sizes >= 1", batch_size=size)


@dataclasses.dataclass(frozen=True)
class Task:
    """A row: what is measured, and how.

    Attributes:
      kind: one of `KINDS`, or `pytorch`.
      method: st, sam, at, at+sam; "" for an evaluation.
      row: of the config's table.
      batch_size: over all devices.
      precision: dtype of the network.
      devices: how many; 0: all.
      steps_per_call: 0: the default.
      xla_flags: added to the environment's.
      variant: of PyTorch, see `twin/reference.py`.
    """

    kind: str
    method: str
    row: str
    batch_size: int
    precision: str
    devices: int = 0
    steps_per_call: int = 0
    xla_flags: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        """For people: `at epoch, batch 128, float32`."""
        what = f"pytorch {self.variant}" if self.kind == "pytorch" else self.kind
        parts = [f"{self.method} {what}".strip(), f"batch {self.batch_size}"]
        parts += [self.precision]
        parts += [f"{self.devices} devices"] if self.devices else []
        parts += [f"{self.steps_per_call} steps a call"] if self.steps_per_call else []
        parts += [self.xla_flags] if self.xla_flags else []
        return ", ".join(parts)

    @property
    def setting(self) -> tuple[Any, ...]:
        """What rows must share for their methods to be compared."""
        return (
            self.batch_size,
            self.precision,
            self.devices,
            self.steps_per_call,
            self.xla_flags,
        )


def plan(options: Options) -> list[Task]:
    """The rows to measure, in order.

    Raises:
      ValueError: for a method the config's table has no row of, or a config that the
        settings make invalid; before anything runs.
    """
    rows = configuration.load_rows(options.config)
    first = {configuration.parse_row(row).method: row for row in reversed(rows)}
    for method in options.methods:
        check_choice(tuple(first), method=method)
    path = f"{options.config}:{rows[0]}"
    default = configuration.load_config(path, options.overrides)
    settings = list(
        itertools.product(
            options.batch_sizes or (default.training.batch_size,),
            options.precisions or (default.model.dtype,),
            options.devices,
            options.steps_per_call,
            options.xla_flags,
        )
    )
    tasks = []
    for setting in settings:
        for kind in options.measure:
            if kind == "evaluation":
                size = default.evaluation.batch_size
                tasks.append(Task(kind, "", rows[0], size, *setting[1:]))
                continue
            attacked = [m for m in options.methods if m.startswith("at")]
            chosen = attacked if kind == "unrolled" else options.methods
            tasks += [Task(kind, m, first[m], *setting) for m in chosen]
        if options.compare and "step" in options.measure:
            tasks += [
                Task("pytorch", method, first[method], *setting[:2], variant=variant)
                for method in options.methods
                for variant in options.variants
                if setting[1] == "float32" or variant in ("tuned", "compiled")
            ]
    tasks = list(dict.fromkeys(tasks))
    for task in tasks:
        configuration.load_config(
            f"{options.config}:{task.row}", task_overrides(task, options)
        )
    return tasks


def task_overrides(task: Task, options: Options) -> tuple[str, ...]:
    """The overrides of a row's config."""
    own = [f"--config.model.dtype={task.precision}"]
    if task.kind != "evaluation":
        own.append(f"--config.training.batch_size={task.batch_size}")
        own.append(f"--config.training.steps_per_call={task.steps_per_call}")
    return (*options.overrides, *own)


def work_of(task: Task, options: Options) -> Work:
    """What a step of the row does."""
    config = configuration.load_config(f"{options.config}:{task.row}")
    attack_steps, passes = 0, 1.0
    for part in rows.parse_row(task.row).parts:
        values = methods.values_of(config, part.name)
        attack_steps += values.get("num_steps", 0) * values.get("restarts", 1)
        passes += entries.added_passes(part.name)
    return Work(
        attack_steps=attack_steps,
        passes=round(passes),
        attack_weight_gradients=task.variant in ("reference", "resident"),
    )


def spec_of(task: Task, options: Options) -> dict[str, Any]:
    """A worker's specification of a row."""
    return {
        "kind": task.kind,
        "config": f"{options.config}:{task.row}",
        "overrides": task_overrides(task, options),
        "repeats": options.repeats,
        "min_seconds": options.min_seconds,
    }
