"""From raw outcomes to rows: medians, rates, fractions of ceilings, costs, hours."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from samrobust.experiments import configuration
from samrobust.studies.bench.counts import Counts, Work
from samrobust.studies.bench.images import NUM_EXAMPLES
from samrobust.studies.bench.plan import Options, Task, task_overrides, work_of
from samrobust.studies.bench.timing import spread

__all__ = ["PAPER_COSTS", "Report", "summarise"]

# What the paper says of the time of a step, Section 5: SAM doubles that of ST, AT with
# ten steps takes eleven times as long.
PAPER_COSTS = {"st": 1.0, "sam": 2.0, "at": 11.0}
_ITEM_SIZES = {"float32": 4, "bfloat16": 2}
_SEEDS = 3

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Report:
    """A bench, ready for JSON.

    Attributes:
      rows: a dict a row; see `summarise`.
      ceilings: by precision, `matmul` in operations and `copy` in bytes per second.
      projection: seconds and hours of the config's table; None if a method is missing.
      failures: (row's name, complaint).
      provenance: of the first worker.
    """

    rows: list[Row]
    ceilings: dict[str, dict[str, float]]
    projection: dict[str, Any] | None
    failures: list[tuple[str, str]]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain dicts and lists."""
        return dataclasses.asdict(self)


def summarise(
    tasks: Sequence[Task],
    outcomes: Mapping[Task, Sequence[dict[str, Any]]],
    ceilings: Mapping[str, dict[str, Any]],
    counts: Mapping[str, Any],
    options: Options,
) -> Report:
    """Makes the rows of a bench.

    Args:
      tasks: in order.
      outcomes: of each row, a dict a round, raw or with an `error`.
      ceilings: raw outcomes, by precision.
      counts: raw outcome, empty before there is one.
      options: of the bench.

    Returns:
      A report, whose rows have the fields of their `Task` and: `seconds` (a list a
      round, of a step; of a batch for evaluations), `step_seconds`, `step_iqr`,
      `images_per_second`, `tflops`, `matmul_fraction`, `copy_fraction`,
      `compile_cold`, `compile_cached`, `peak_memory`, `epoch_seconds`,
      `pipeline_share`, `cost` and `flop_cost` relative to ST, `paper_cost`; of a
      PyTorch row its `parity` (deviations from ours), `float32_matmul`, and `ratio` (of
      its time to ours, with `ratio_low` and `ratio_high` over the rounds). What does
      not apply is left out.
    """
    rows, failures = [], []
    for task in tasks:
        good = [raw for raw in outcomes.get(task, ()) if "error" not in raw]
        failures += [
            (task.name, raw["error"])
            for raw in outcomes.get(task, ())
            if "error" in raw
        ]
        if good:
            rows.append(_row(task, good, options))
            _add_rates(
                rows[-1], task, ceilings.get(task.precision, {}), counts, options
            )
    for row in rows:
        _compare(row, rows)
    clean = {
        precision: {name: raw[name] for name in ("matmul", "copy")}
        for precision, raw in ceilings.items()
        if "error" not in raw
    }
    failures += [
        (f"ceilings {precision}", raw["error"])
        for precision, raw in ceilings.items()
        if "error" in raw
    ]
    failures += [("counts", counts["error"])] if "error" in counts else []
    first = next((raw for raw in ceilings.values() if "error" not in raw), {})
    return Report(
        rows,
        clean,
        _projection(rows, options),
        failures,
        first.get("provenance", {})
        | {"matmul_precision": first.get("matmul_precision")},
    )


def _row(
    task: Task,
    good: Sequence[dict[str, Any]],
    options: Options,
) -> Row:
    """A row by itself."""
    seconds = [raw.get("seconds") or raw["seconds_per_step"] for raw in good]
    median, iqr = spread([value for values in seconds for value in values])
    row = dataclasses.asdict(task) | {
        "seconds": seconds,
        "step_seconds": median,
        "step_iqr": iqr,
        "images_per_second": task.batch_size / median,
        "peak_memory": max(raw["peak_memory"] for raw in good)
        if "peak_memory" in good[0]
        else max(raw["peak_memory_bytes"] for raw in good),
    }
    row |= {k: good[0][k] for k in ("parity", "float32_matmul") if k in good[0]}
    if "compile_seconds" in good[0]:
        row["compile_cold"] = (
            good[0].get("lower_seconds", 0) + good[0]["compile_seconds"]
        )
    if "compile_seconds" in good[0] and len(good) > 1:
        later = [
            raw.get("lower_seconds", 0) + raw["compile_seconds"] for raw in good[1:]
        ]
        row["compile_cached"] = statistics.median(later)
    config = configuration.load_config(
        f"{options.config}:{task.row}", task_overrides(task, options)
    )
    if task.kind == "evaluation":
        num_test = NUM_EXAMPLES[config.data.name][1]
        row["num_test"] = num_test
        row["test_set_seconds"] = median / task.batch_size * num_test
        return row
    if task.kind == "epoch":
        steps = -(-NUM_EXAMPLES[config.data.name][0] // task.batch_size)
        saving = statistics.median(raw["checkpoint_seconds"] for raw in good)
        pipeline = statistics.median(raw["pipeline_seconds"] for raw in good)
        row["epoch_seconds"] = steps * median + saving
        row["checkpoint_seconds"] = saving
        row["pipeline_share"] = pipeline / median
    if "parity" in good[0]:
        row["parity"] = good[0]["parity"]
        row["versions"] = good[0]["versions"]
    return row


def _add_rates(
    row: Row,
    task: Task,
    ceiling: Mapping[str, Any],
    counts: Mapping[str, Any],
    options: Options,
) -> None:
    """Adds what the hardware did, and how much of what it can."""
    if task.method in PAPER_COSTS:
        row["paper_cost"] = PAPER_COSTS[task.method]
    if task.kind == "evaluation" or "counts" not in counts:
        return
    of_pass, work = Counts(**counts["counts"]), work_of(task, options)
    rate, flops = row["images_per_second"], of_pass.flops(work)
    row["tflops"] = rate * flops / 1e12
    row["flop_cost"] = flops / of_pass.flops(Work())
    devices = max(1, task.devices)
    if "matmul" in ceiling:
        row["matmul_fraction"] = rate * flops / ceiling["matmul"] / devices
        own = dataclasses.replace(work, attack_weight_gradients=False)
        traffic = of_pass.traffic(own) * _ITEM_SIZES[task.precision]
        row["copy_fraction"] = rate * traffic / ceiling["copy"] / devices


def _compare(row: Row, rows: Sequence[Row]) -> None:
    """The cost relative to ST, and PyTorch's time relative to ours."""
    shared = ("batch_size", "precision")
    own = ("devices", "steps_per_call", "xla_flags")
    st = [
        other
        for other in rows
        if other["method"] == "st"
        and all(other[name] == row[name] for name in ("kind", "variant", *shared, *own))
    ]
    if st and row["method"]:
        row["cost"] = row["step_seconds"] / st[0]["step_seconds"]
    if row["kind"] in ("pytorch", "unrolled"):
        wanted = [
            other
            for other in rows
            if other["kind"] == "step"
            and all(other[name] == row[name] for name in ("method", *shared))
        ]
        if wanted:
            row |= _ratio(row, wanted[0])
    if row["kind"] == "evaluation":
        epochs = [r for r in rows if r["kind"] == "epoch" and r["method"] == "st"]
        if epochs:
            row["st_epochs"] = row["test_set_seconds"] / epochs[0]["epoch_seconds"]


def _ratio(row: Row, ours: Row) -> Row:
    """A row's time in units of our own step's, round by round."""
    ratios = [
        statistics.median(theirs) / statistics.median(own)
        for theirs, own in zip(row["seconds"], ours["seconds"], strict=False)
    ]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }


def _projection(rows: Sequence[Row], options: Options) -> dict[str, Any] | None:
    """Hours for the config's table with three seeds, from the epochs measured."""
    seconds = {
        r["method"]: r["epoch_seconds"] for r in reversed(rows) if r["kind"] == "epoch"
    }
    names = configuration.load_rows(options.config)
    methods = [configuration.parse_row(name).method for name in names]
    if not set(methods) <= seconds.keys():
        return None
    config = configuration.load_config(
        f"{options.config}:{names[0]}", options.overrides
    )
    evaluations = [r["test_set_seconds"] for r in rows if r["kind"] == "evaluation"]
    training = config.training.epochs * sum(seconds[method] for method in methods)
    total = _SEEDS * (training + len(methods) * (evaluations or [0.0])[0])
    tables = 2 if config.data.name.startswith("cifar") else 1
    return {
        "tables": tables,
        "models": tables * _SEEDS * len(methods),
        "hours": tables * total / 3600,
    }
