"""`samrobust table`: all rows of a config, as one worker or as one of many."""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from samrobust.checks import LARGEST_SEED, check, check_whole
from samrobust.experiments import building, configuration, reporting
from samrobust.experiments.components import model_fields
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.reporting.results import unlike
from samrobust.experiments.run import PlannedRun, work
from samrobust.experiments.survey import survey_run
from samrobust.experiments.sweep import (
    finished,
    record_plan,
    refuse_other_configs,
    run_all,
)
from samrobust.experiments.tracking import check_installed
from samrobust.experiments.workdir import run_folder
from samrobust.system import distributed
from samrobust.system.files import WorkdirError
from samrobust.system.runtime import StopRequest
from samrobust.types import Config

__all__ = ["table_command"]

_FAILED = 1


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A table as it is asked for.

    Attributes:
      workdir: of the table.
      configs: by row, in order.
      runs: all of them, the first seed of every row first: the whole table comes
        before its spread.
      share: those that this process is to do.
      note: what was changed from the config file, a sentence or empty.
    """

    workdir: pathlib.Path
    configs: dict[str, Config]
    runs: Sequence[PlannedRun]
    share: Sequence[PlannedRun]
    note: str


def table_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    """Trains and shows a table, or lists or collects it; returns the exit code.

    Raises:
      ValueError: for flags, rows, fields or values that are not valid.
      WorkdirError: if the workdir cannot be written; with `--collect` if nothing has
        finished.
    """
    plan = _make_plan(arguments, overrides)
    if (arguments.list or arguments.collect) and not distributed.starts_first():
        return 0
    if arguments.list:
        return _list(plan)
    if arguments.collect:
        return _collect(plan, make_console())
    check_installed(plan.runs[0].config)
    should_stop = distributed.join(stop)
    console = make_console(quiet=not distributed.is_primary())
    distributed.from_primary(lambda: refuse_other_configs(plan.workdir, plan.share))
    distributed.from_primary(lambda: record_plan(plan.workdir, plan.runs))
    failed = _run(plan.share, console, should_stop)
    distributed.from_primary(lambda: _conclude(plan, arguments.shard, console))
    return _FAILED if failed else 0


def _conclude(plan: _Plan, shard: str | None, console: Console) -> None:
    """Shows the table, or how one comes by it where others are still at work."""
    results, missing = _results(plan.runs)
    if results and (not missing or not shard):
        _show(plan, results, console)
    elif missing and shard:
        _say(
            console,
            f"This share is done. {len(missing)} of the table's {len(plan.runs)} runs "
            "are missing: `samrobust status` shows them, and the same command with "
            f"--collect instead of --shard={shard} builds the table.",
        )


def _make_plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> _Plan:
    check(
        not (arguments.collect and arguments.shard),
        "--collect without --shard",
        "The table is made of all runs.",
        shard=arguments.shard,
    )
    name = pathlib.Path(arguments.config).stem
    workdir = pathlib.Path(arguments.workdir or f"runs/{name}")
    configs = {
        row: configuration.load_config(f"{arguments.config}:{row}", overrides)
        for row in _rows(arguments.rows) or configuration.load_rows(arguments.config)
    }
    runs = [
        PlannedRun(_with_seed(config, seed), run_folder(workdir, row, seed))
        for i in range(arguments.seeds)
        for row, config in configs.items()
        for seed in (config.seed + i,)
    ]
    changed = ", ".join(item.removeprefix("--config.") for item in overrides)
    note = f" Changed from {arguments.config}: {changed}." if changed else ""
    return _Plan(workdir, configs, runs, runs[_shard(arguments.shard)], note)


def _shard(text: str | None) -> slice:
    """Which runs `--shard` names."""
    if text is None:
        return slice(None)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(match[1]), int(match[2])) if match else (0, 0)
    fix = "The first of four shards is --shard=0/4, the last one --shard=3/4."
    check(index < count, "--shard=I/N with 0 <= I < N", fix, shard=text)
    return slice(index, None, count)


def _rows(values: Sequence[str] | None) -> list[str]:
    parts = [row.strip() for value in values or () for row in value.split(";")]
    rows = [row for row in parts if row]
    for row in rows:
        configuration.parse_row(row)
    return list(dict.fromkeys(rows))


def _with_seed(config: Config, seed: int) -> Config:
    check_whole(0, LARGEST_SEED, seed=seed)
    copy = config.copy_and_resolve_references()
    copy.seed = seed
    return copy


def _list(plan: _Plan) -> int:
    """Prints the runs for programs to read: nothing else goes to standard output."""
    share = {planned.workdir for planned in plan.share}
    for index, planned in enumerate(plan.runs):
        if planned.workdir in share:
            config, state = planned.config, survey_run(planned.workdir).state
            print(index, config.row, config.seed, state, sep="\t")
    return 0


def _run(
    runs: Sequence[PlannedRun], console: Console, should_stop: Callable[[], bool]
) -> bool:
    """Does a share; returns whether a run failed."""
    if not runs:
        return False
    dataset = building.load_data(runs[0].config)
    done = distributed.from_primary(
        lambda: [(planned.workdir / "result.json").exists() for planned in runs]
    )
    works = {
        planned.workdir: (0.0, 0.0) if is_done else work(planned.config, dataset)
        for planned, is_done in zip(runs, done, strict=True)
    }
    display = ProgressDisplay(console, sum(sum(w) for w in works.values()))
    failures: list[tuple[PlannedRun, str]] = []

    def on_wait(held: Sequence[PlannedRun]) -> None:
        names = ", ".join(planned.name for planned in held)
        display.say(f"waiting for other workers: {names}")

    with display.live():
        run_all(
            runs,
            dataset,
            lambda planned: display.run(planned.name, *works[planned.workdir]),
            on_failure=lambda planned, error: failures.append((planned, error)),
            on_wait=on_wait,
            should_stop=should_stop,
        )
    for planned, error in failures:
        console.print("failed", style="red", end=" ")
        _say(console, f"{planned.name}: {error}")
    return bool(failures)


def _collect(plan: _Plan, console: Console) -> int:
    results, missing = _results(plan.runs)
    if results:
        _show(plan, results, console)
    for why in dict.fromkeys(why for _, why in missing):
        names = "; ".join(planned.name for planned, its in missing if its == why)
        _say(console, f"missing {names}: {why}")
    if not results:
        message = (
            f"Expected a finished run in {plan.workdir}, got none of the "
            f"{len(plan.runs)}. Train them first: the same command without --collect."
        )
        raise WorkdirError(message)
    return _FAILED if missing else 0


def _results(
    runs: Sequence[PlannedRun],
) -> tuple[list[dict[str, Any]], list[tuple[PlannedRun, str]]]:
    """What has finished, by whomever; and the other runs, each with its state."""
    results, missing = [], []
    for planned in runs:
        try:
            result, why = finished(planned), ""
        except WorkdirError as error:
            result, why = None, str(error)
        if result is not None and results:
            why = _incomparable(result, results[0])
        if result is None or why:
            missing.append((planned, why or _describe(planned)))
        else:
            results.append(result)
    return results, missing


def _incomparable(result: dict[str, Any], first: dict[str, Any]) -> str:
    """Says why two results make no one table; empty if they do."""
    told = [f"{n} is {a!r}, not {b!r}" for n, (a, b) in unlike(result, first).items()]
    beside = f"{first['label']}, seed {first['seed']}"
    return f"not comparable with {beside}: {'; '.join(told)}" if told else ""


def _describe(planned: PlannedRun) -> str:
    status = survey_run(planned.workdir)
    return ": ".join(filter(None, (status.description, status.error)))


def _show(plan: _Plan, results: list[dict[str, Any]], console: Console) -> None:
    """Prints and writes the table."""
    config = next(iter(plan.configs.values()))
    table = reporting.summarize(
        results,
        rows=[(row, c.label) for row, c in plan.configs.items()],
        paper={row: dict(c.paper) for row, c in plan.configs.items() if c.paper},
        title=f"Natural and robust accuracy on {config.data.name}",
        caption=_caption(config) + plan.note,
    )
    console.print(reporting.to_rich(table))
    paths = reporting.write_table(table, plan.workdir)
    _say(console, f"Written to {plan.workdir}: {', '.join(p.name for p in paths)}")


def _caption(config: Config) -> str:
    evaluation, training = config.evaluation, config.training
    size = config.data.train_size
    images = f"{size:,} training images, " if size is not None else ""
    return (
        f"{config.data.name}, {images}{evaluation.split} set; "
        f"{_network(config.model)}, {training.epochs} epochs, {config.model.dtype}; "
        f"{_attack(evaluation)}, {evaluation.checkpoint} checkpoint."
    )


def _network(model: Config) -> str:
    """Names the network and its fields: `preact_resnet of width 16, blocks 1-1-1`."""
    fields = {name: model[name] for name in model_fields(model.name)}
    shown = [
        f"{name} {'-'.join(map(str, v)) if isinstance(v, tuple | list) else v}"
        for name, v in fields.items()
    ]
    return f"{model.name} of {', '.join(shown)}" if shown else model.name


def _attack(evaluation: Config) -> str:
    if evaluation.attack == "autoattack":
        members = ", ".join(evaluation.members)
        return f"AutoAttack, {evaluation.version}" + (members and f" ({members})")
    restarts = f" x {evaluation.restarts}" if evaluation.restarts > 1 else ""
    return (
        f"PGD-{evaluation.num_steps}{restarts} on the {evaluation.loss} loss, "
        f"{evaluation.judge} iterate judged"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
