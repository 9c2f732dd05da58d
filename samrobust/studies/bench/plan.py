"""The plan of a bench: from the flags of a command line to the rows it measures."""

import dataclasses
import importlib.util
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

from samrobust.checks import check, check_choice
from samrobust.evaluation.measure import usual_batch_size
from samrobust.experiments import config_files, configuration
from samrobust.experiments.rows import parse_row
from samrobust.studies.bench import comparison
from samrobust.system.compiler import parse_compiler_options
from samrobust.system.files import glance
from samrobust.types import Config

__all__ = ["Options", "Task", "config_of", "known_ceilings", "plan"]


@dataclasses.dataclass(frozen=True)
class Options:
    """The choices of a command line.

    Attributes:
      config: the config file.
      overrides: of the config, `--config.FIELD=VALUE`.
      measure: of step, evaluation and unrolled.
      methods: of the config's table: st, sam, at, at+sam; the first row of each.
      row: rows of any method, instead of `methods`.
      batch_sizes: over all devices; the config's where empty.
      precisions: float32, bfloat16; the config's where empty.
      devices: numbers of devices; 0: all there are; with `aot` one.
      steps_per_call: 0: the default of the device.
      xla_flags: XLA's options for the programs measured, one string a variant.
      seeds_per_program: how many runs' steps are taken by one program.
      compare: `pytorch`, or nothing.
      aot: of `aot.TARGETS`, a device to compile for instead of measuring, or nothing.
      variants: of PyTorch, see `twin/reference.py`.
      repeats: in every process.
      rounds: processes for each row.
      cache: of compiled programs, which is kept; an empty one where it is not given.
      ceilings: JSON file of rooflines by precision, `{"bfloat16": {"matmul": ...,
        "copy": ...}}`, measured before; what it lacks is measured, and all where its
        `device` is another.
      no_rates: leave out the roofline and the counts of operations.
      min_seconds: of a repeat.
    """

    config: str
    overrides: tuple[str, ...] = ()
    measure: tuple[str, ...] = ("step", "evaluation")
    methods: tuple[str, ...] = ("st", "sam", "at")
    row: tuple[str, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    devices: tuple[int, ...] = (0,)
    steps_per_call: tuple[int, ...] = (0,)
    xla_flags: tuple[str, ...] = ("",)
    seeds_per_program: tuple[int, ...] = (1,)
    compare: str | None = None
    aot: str | None = None
    variants: tuple[str, ...] = ("reference", "resident", "tuned", "compiled")
    repeats: int = 5
    rounds: int = 2
    cache: str | None = None
    ceilings: str | None = None
    no_rates: bool = False
    min_seconds: float = 2.0


@dataclasses.dataclass(frozen=True)
class Task:
    """One measurement, in a process of its own.

    Attributes:
      kind: of a row: step, evaluation, unrolled or pytorch; beside the rows: roofline,
        counts, parity or probe.
      method: st, sam, at, at+sam, or a row; "" where a method makes no difference.
      row: of the config.
      batch_size: over all devices; of an evaluation on all there are, without a size
        in the config, that of one.
      precision: dtype of the network.
      devices: how many; 0: all; of a target one.
      steps_per_call: 0: the default.
      xla_flags: XLA's options for the program.
      seeds: whose steps the program takes.
      variant: of PyTorch.
    """

    kind: str
    method: str
    row: str
    batch_size: int
    precision: str
    devices: int = 0
    steps_per_call: int = 0
    xla_flags: str = ""
    seeds: int = 1
    variant: str = ""

    @property
    def name(self) -> str:
        """Returns a name for people: `at step, batch 128, float32`."""
        parts = [
            " ".join(filter(None, (self.method, self.kind, self.variant))),
            f"batch {self.batch_size}",
            self.precision,
            f"{self.devices} devices" if self.devices else "",
            f"{self.steps_per_call} steps a call" if self.steps_per_call else "",
            self.xla_flags,
            f"{self.seeds} seeds a program" if self.seeds > 1 else "",
        ]
        return ", ".join(filter(None, parts))


def plan(options: Options) -> list[Task]:
    """Returns the rows to measure, in order.

    Raises:
      ValueError: for a method the config's table has no row of, for a config that the
        settings make invalid, for a comparison that cannot be made, or where nothing is
        left to measure; before anything runs.
    """
    rows = config_files.load_rows(options.config)
    first = {parse_row(row).method: row for row in reversed(rows)}
    for method in options.methods:
        check_choice(tuple(first), method=method)
    chosen = {method: first[method] for method in options.methods}
    chosen = {row: row for row in options.row} or chosen
    row = next(iter(chosen.values()))
    default = configuration.load_config(f"{options.config}:{row}", options.overrides)
    for flags in options.xla_flags:
        parse_compiler_options(flags)
    counted = options.aot is None or {"step", "evaluation"} >= {*options.measure}
    wanted = "--measure in {step, evaluation} with --aot"
    check(counted, wanted, "Nothing runs.", **{"--measure": options.measure})
    known = options.ceilings is None or bool(known_ceilings(options))
    wanted = "a JSON file with the matmul and the copy of a precision"
    fix = "A campaign's machine.json is one."
    check(known, wanted, fix, **{"--ceilings": options.ceilings})
    if options.compare is not None:
        _check_comparison(options, chosen)
    settings: Any = itertools.product(
        options.batch_sizes or (default.training.batch_size,),
        options.precisions or (default.model.dtype,),
        options.devices,
        options.steps_per_call,
        options.xla_flags,
        options.seeds_per_program,
    )
    tasks = []
    attacked = {name: row for name, row in chosen.items() if name.startswith("at")}
    of_kind = {"evaluation": {"": row}, "unrolled": attacked}
    for size, precision, *setting in settings:
        for kind in options.measure:
            own, batch = list(setting), size
            if kind == "evaluation":  # which has no steps
                given = default.evaluation.batch_size
                batch = usual_batch_size(given, max(1, own[0]))
                own[1] = 0
            if kind != "step":
                own[3] = 1
            tasks += [
                Task(kind, name, row, batch, precision, *own)
                for name, row in of_kind.get(kind, chosen).items()
            ]
        if options.compare is not None:
            tasks += [
                Task("pytorch", name, row, size, precision, variant=variant)
                for name, row in chosen.items()
                for variant in comparison.fitting(precision, options.variants)
            ]
    tasks = list(dict.fromkeys(tasks))
    check(
        bool(tasks),
        "a row to measure",
        "Only an attack has a loop to unroll: add at to --methods.",
        **{"--measure": options.measure, "--methods": options.methods},
    )
    for task in tasks:
        config = config_of(task, options)
        if task.kind == "pytorch":
            comparison.check_config(config)
    return tasks


def _check_comparison(options: Options, chosen: Mapping[str, str]) -> None:
    """Refuses a comparison of something else than steps, or without PyTorch."""
    given = {"--compare": options.compare}
    steps = "step" in options.measure
    check(steps, "step in --measure", "Steps are compared.", **given)
    flag = {"--row": options.row} if options.row else {"--methods": options.methods}
    known = all(parse_row(row).method in ("st", "sam", "at") for row in chosen.values())
    check(known, "rows of st, sam, at with --compare=pytorch", **flag)
    has_torch = importlib.util.find_spec("torch") is not None
    check(has_torch, "the package torch", "Install it: pip install torch.", **given)


def known_ceilings(options: Options) -> dict[str, dict[str, float]]:
    """Returns the rooflines that are not measured, by precision."""
    stored, names = glance(pathlib.Path(options.ceilings or "")), ("matmul", "copy")
    return {
        precision: {name: ceilings[name] for name in names}
        for precision in ("float32", "bfloat16")
        if isinstance(ceilings := stored.get(precision), dict)
        and all(isinstance(ceilings.get(name), float | int) for name in names)
    }


def config_of(task: Task, options: Options) -> Config:
    """Returns the config of a task.

    Raises:
      ValueError: for one that is not valid.
    """
    own = [f"--config.model.dtype={task.precision}"]
    if task.kind != "evaluation":
        own.append(f"--config.training.batch_size={task.batch_size}")
        steps = 1 if task.kind == "unrolled" else task.steps_per_call
        own.append(f"--config.training.steps_per_call={steps}")
    path = f"{options.config}:{task.row}"
    return configuration.load_config(path, (*options.overrides, *own))
