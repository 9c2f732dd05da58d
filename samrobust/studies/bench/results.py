"""Rows from raw outcomes: medians, rates, fractions of ceilings, costs.

No device is asked for, since this process would then hold memory of it.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from samrobust.experiments import building, methods
from samrobust.studies.bench.counts import StepCost, step_cost
from samrobust.studies.bench.plan import Options, Task, config_of, known_ceilings
from samrobust.studies.bench.programs import num_steps
from samrobust.studies.bench.suite import Outcome
from samrobust.studies.bench.twin.variants import VARIANTS
from samrobust.system.provenance import command
from samrobust.types import Config

__all__ = ["PAPER_COSTS", "BenchReport", "Row", "summarize"]

# The paper's claim of the time of a step, Section 5: SAM doubles that of ST, AT with
# ten steps takes eleven times as long.
PAPER_COSTS = {"st": 1.0, "sam": 2.0, "at": 11.0}
# Rows are of one setting where these agree.
_SETTING = ("batch_size", "precision", "devices", "steps_per_call", "xla_flags")
_SETTING += ("seeds",)

Row: TypeAlias = dict[str, Any]


class BenchReport(NamedTuple):
    """A bench, ready for JSON.

    Attributes:
      rows: a dict a row; see `summarize`.
      ceilings: of the roofline by precision: `matmul` in operations and `copy` in bytes
        per second.
      failures: (row's name, complaint).
      provenance: of the first outcome, and the command.
    """

    rows: list[Row]
    ceilings: dict[str, dict[str, float]]
    failures: list[tuple[str, str]]
    provenance: dict[str, Any]


def summarize(
    outcomes: Mapping[Task, Sequence[Outcome]], options: Options
) -> BenchReport:
    """Makes the rows of a bench.

    Args:
      outcomes: of each task, in the order of `schedule`, an outcome a round; all that
        there are as yet.
      options: of the bench.

    Returns:
      A report, whose rows have the fields of their `Task` and: `num_devices` that it
      ran on, `seconds` (a list a round, of a step; of a batch for evaluations),
      `step_seconds`, `step_iqr`, `images_per_second`, `tflops`, `matmul_fraction`,
      `copy_fraction`, `compile_cold`, `compile_cached`, `peak_memory`,
      `epoch_seconds`, `pipeline_share`, `cost` and `flop_cost` relative to ST,
      `paper_cost`; of a PyTorch row its `parity` (deviations from ours), `versions`,
      `float32_matmul`, and `ratio` of its time to ours on one device. `cost` and
      `ratio` are medians of the rounds' ratios of medians, with `_low` and `_high` over
      the rounds. What does not apply is left out.
    """
    rows: list[Row] = []
    failures, passes, first = [], {}, {}
    ceilings = known_ceilings(options)
    for task, raws in outcomes.items():
        failures += [(task.name, raw["error"]) for raw in raws if "error" in raw]
        good = [raw for raw in raws if "error" not in raw]
        if not good:
            continue
        if task.kind == "counts":
            passes = {name: StepCost(*cost) for name, cost in good[0]["passes"].items()}
            continue
        first = first or good[0]
        if task.kind == "roofline":
            ceilings[task.precision] = {n: good[0][n] for n in ("matmul", "copy")}
            continue
        config = config_of(task, options)
        rows.append(_row(task, raws, config))
        if passes and task.kind != "evaluation":
            ceiling = ceilings.get(task.precision)
            rows[-1] |= _rates(rows[-1], task, config, passes, ceiling)
    for row in rows:
        row |= _compared(row, rows)
    provenance = first.get("provenance", {}) | {
        "matmul_precision": first.get("matmul_precision"),
        "command": command(),
    }
    return BenchReport(rows, ceilings, failures, provenance)


def _row(task: Task, raws: Sequence[Outcome], config: Config) -> Row:
    """Makes a row by itself, of all its rounds; one at least did not fail."""
    seconds = [raw.get("seconds", []) for raw in raws]
    first, raws = raws[0], [raw for raw in raws if "error" not in raw]
    low, median, high = np.percentile(np.concatenate(seconds), (25, 50, 75)).tolist()
    batch_size = raws[0].get("batch_size", task.batch_size)
    row = dataclasses.asdict(task) | {
        "batch_size": batch_size,
        "num_devices": raws[0].get("num_devices", 1),  # PyTorch has one
        "seconds": seconds,
        "step_seconds": median,
        "step_iqr": high - low,
        "images_per_second": batch_size / median,
        "peak_memory": max(raw["peak_memory"] for raw in raws),
    }
    told = ("parity", "versions", "float32_matmul")
    row |= {name: raws[0][name] for name in told if name in raws[0]}
    compiled = [raw["compile_seconds"] for raw in raws if "compile_seconds" in raw]
    # The first round found an empty cache, or one with another bench's programs; one
    # that failed left nobody knows what.
    if compiled and not raws[0].get("from_cache"):
        row |= {"compile_cold": compiled[0]} if raws[0] is first else {}
        del compiled[0]
    row |= {"compile_cached": statistics.median(compiled)} if compiled else {}
    if task.method in PAPER_COSTS:
        row["paper_cost"] = PAPER_COSTS[task.method]
    facts = building.load_facts(config)
    if task.kind == "evaluation":
        row["num_test"] = facts.num_test
        row["test_set_seconds"] = median / batch_size * facts.num_test
    if task.kind == "step":
        saving = statistics.median(raw["checkpoint_seconds"] for raw in raws)
        pipeline = statistics.median(raw["pipeline_seconds"] for raw in raws)
        row["epoch_seconds"] = num_steps(config, facts) * median + saving
        row["checkpoint_seconds"] = saving
        row["pipeline_share"] = pipeline / median
    return row


def _rates(
    row: Row,
    task: Task,
    config: Config,
    passes: Mapping[str, StepCost],
    ceiling: Mapping[str, float] | None,
) -> Row:
    """Returns what the hardware did, and how much of what it can."""
    counted = methods.passes_at(config, config.training.epochs - 1)
    if not counted.is_known:
        return {}
    # Of three matrix products in a pass a step of the attack has two.
    work = (passes, counted.attack * 3 / 2, counted.views * (1 + counted.ascents))
    wasteful = task.kind == "pytorch" and not VARIANTS[task.variant].is_tuned
    flops = step_cost(*work, attack_weight_gradients=wasteful).flops
    rate, st = row["images_per_second"], step_cost(passes)
    found = {"tflops": rate * flops / 1e12, "flop_cost": flops / st.flops}
    if ceiling:
        devices = row["num_devices"]
        traffic = step_cost(*work).elements * jnp.dtype(task.precision).itemsize
        found["matmul_fraction"] = rate * flops / ceiling["matmul"] / devices
        found["copy_fraction"] = rate * traffic / ceiling["copy"] / devices
    return found


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    """Returns the cost relative to ST, and the time relative to our own step's."""

    def plainness(other: Row) -> tuple:
        own = other["seeds"], other["steps_per_call"]
        return bool(other["xla_flags"]), other["num_devices"], *own

    def other(*alike: str, **wanted: Any) -> Row | None:
        wanted |= {name: row[name] for name in alike}
        found = (r for r in rows if wanted.items() <= r.items())
        return min(found, key=plainness, default=None)

    found = {}
    if row["method"] and (st := other("kind", "variant", *_SETTING, method="st")):
        found |= _ratio("cost", row, st)
    alike = {
        "pytorch": ("batch_size", "precision", "num_devices"),
        "unrolled": _SETTING,
    }
    names = alike.get(row["kind"])
    if names and (ours := other("method", *names, kind="step")):
        found |= _ratio("ratio", row, ours)
    st = other("precision", "devices", "xla_flags", kind="step", method="st")
    if st and row["kind"] == "evaluation":
        found["st_epochs"] = row["test_set_seconds"] / st["epoch_seconds"]
    return found


def _ratio(name: str, row: Row, other: Row) -> Row:
    """Returns a row's time relative to another's, round by round."""
    ratios = [
        statistics.median(own) / statistics.median(theirs)
        for own, theirs in zip(row["seconds"], other["seconds"], strict=False)
        if own and theirs
    ]
    if not ratios:
        return {}
    median = statistics.median(ratios)
    return {name: median, f"{name}_low": min(ratios), f"{name}_high": max(ratios)}
