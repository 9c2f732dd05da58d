"""What the subcommands do: read, run, show. See `samrobust.cli` for their flags."""

import argparse
import json
import pathlib
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.markup import escape

from samrobust import building, configuration, parallel, reporting
from samrobust.bench.command import bench_command
from samrobust.bench.suite import StoppedError
from samrobust.checks import check
from samrobust.data import Dataset, DatasetUnavailableError
from samrobust.experiments import PlannedRun, evaluate_run, run, run_all, work
from samrobust.provenance import provenance
from samrobust.reporting.progress import ProgressDisplay
from samrobust.runtime import (
    StopRequest,
    enable_compilation_cache,
    keep_freed_memory,
)
from samrobust.training import InterruptedRunError, TrainingDivergedError
from samrobust.training.checkpoint import CheckpointError
from samrobust.types import Config
from samrobust.validation import validate
from samrobust.workdir import WorkdirError, append_json_line, read_json

__all__ = ["execute"]

_EVALUATION_FLAGS = (
    "num_steps",
    "restarts",
    "loss",
    "judge",
    "early_stop",
    "checkpoint",
    "batch_size",
)
_FAILED, _BAD_INPUT, _LOST_PEER, _TERMINATED, _CTRL_C = 1, 2, 69, 75, 130


def execute(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Runs a subcommand; turns the errors a user can mend into a line and a code."""
    enable_compilation_cache()
    keep_freed_memory()
    warnings.formatwarning = lambda message, *_: f"samrobust: warning: {message}\n"
    command = {
        "table": _table,
        "train": _train,
        "evaluate": _evaluate,
        "bench": bench_command,
    }
    stop = StopRequest()
    try:
        with stop.listening():
            code = command[arguments.command](arguments, overrides, stop)
    except (InterruptedRunError, StoppedError) as error:
        _say(str(error), error)
        code = _CTRL_C if stop.signal and stop.signal.name == "SIGINT" else _TERMINATED
    except KeyboardInterrupt:
        code = _CTRL_C
    except Exception as error:
        code = _code_of(error)
        if code is None and not parallel.is_joined():
            raise
        if code is None:
            traceback.print_exc()
            code = _FAILED
        message = f"{_LOST} ({error})" if code == _LOST_PEER else str(error)
        _say(f"error: {message}", error)
        if parallel.is_joined():
            parallel.leave(code, message)
    parallel.part()
    return code


_LOST = (
    "Another process of this run is gone. Start all of them again with the same "
    "command: the run goes on from its last checkpoint."
)


def _code_of(error: Exception) -> int | None:
    """The exit code of an error that the user can mend; None for any other."""
    if parallel.lost_a_peer(error):
        return _LOST_PEER
    if isinstance(error, ValueError | WorkdirError | DatasetUnavailableError):
        return _BAD_INPUT
    if isinstance(
        error,
        TrainingDivergedError | CheckpointError | parallel.DistributedError | OSError,
    ):
        return _FAILED
    return None


def _say(text: str, error: BaseException) -> None:
    """Says it once, where all processes have the same to say."""
    if not parallel.is_joined() or parallel.is_primary():
        print(f"samrobust: {text}", file=sys.stderr)
    elif not (parallel.is_shared(error) or isinstance(error, InterruptedRunError)):
        print(f"samrobust (process {jax.process_index()}): {text}", file=sys.stderr)


def _join(stop: StopRequest) -> tuple[Console, parallel.AgreedStop]:
    """Joins the other processes of the run, if any; process 0 alone shows things."""
    parallel.initialize()
    parallel.watch_for_failures()
    return Console(quiet=not parallel.is_primary()), parallel.AgreedStop(stop)


def _table(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    check(arguments.seeds >= 1, "--seeds >= 1", seeds=arguments.seeds)
    console = Console()
    name = pathlib.Path(arguments.config).stem
    workdir = pathlib.Path(arguments.workdir or f"runs/{name}")
    rows = _rows(arguments.rows) or configuration.load_rows(arguments.config)
    configs = {
        row: configuration.load_config(f"{arguments.config}:{row}", overrides)
        for row in rows
    }
    runs = []
    for seed in range(arguments.seeds):  # the whole table first, then its spread
        for row, config in configs.items():
            folder = workdir / row / f"seed{seed}"
            runs.append(PlannedRun(_with_seed(config, seed), folder))
    results, failures = _run_all(runs, console, stop)
    for planned, error in failures:
        console.print(f"[red]failed[/red] {planned.name}: {escape(str(error))}")
    if results:
        changed = ", ".join(item.removeprefix("--config.") for item in overrides)
        note = f" Changed from {arguments.config}: {changed}." if changed else ""
        table = _summarise(results, configs, note)
        paths = reporting.write_table(table, workdir)
        console.print(reporting.to_rich(table))
        files = ", ".join(path.name for path in paths)
        console.print(f"Written to {workdir}: {files}", highlight=False)
    return _FAILED if failures else 0


def _run_all(
    runs: Sequence[PlannedRun], console: Console, stop: StopRequest
) -> tuple[list[dict[str, Any]], list[tuple[PlannedRun, Exception]]]:
    dataset = building.load_data(runs[0].config)
    works = {
        planned.workdir: (0.0, 0.0)
        if (planned.workdir / "result.json").exists()
        else work(planned.config, dataset)
        for planned in runs
    }
    display = ProgressDisplay(console, sum(sum(w) for w in works.values()))
    failures: list[tuple[PlannedRun, Exception]] = []
    with display.live():
        results = run_all(
            runs,
            dataset,
            lambda planned: display.run(planned.name, *works[planned.workdir]),
            on_failure=lambda planned, error: failures.append((planned, error)),
            should_stop=stop,
        )
    return results, failures


def _summarise(
    results: list[dict[str, Any]], configs: dict[str, Config], note: str
) -> reporting.Table:
    config = next(iter(configs.values()))
    paper = {row: dict(c.paper) for row, c in configs.items() if c.paper}
    return reporting.summarise(
        results,
        rows=[(row, c.label) for row, c in configs.items()],
        paper=paper,
        title=f"Natural and robust accuracy on {config.data.name}",
        caption=_caption(config) + note,
    )


def _caption(config: Config) -> str:
    model, evaluation, training = config.model, config.evaluation, config.training
    blocks = "-".join(str(count) for count in model.blocks)
    restarts = f" x {evaluation.restarts}" if evaluation.restarts > 1 else ""
    size = config.data.train_size
    images = f"{size:,} training images, " if size is not None else ""
    return (
        f"{config.data.name}, {images}{evaluation.split} set; PreActResNet of width "
        f"{model.width} and {blocks} blocks, {training.epochs} epochs, {model.dtype}; "
        f"PGD-{evaluation.num_steps}{restarts} on the {evaluation.loss} loss, "
        f"{evaluation.judge} iterate judged, {evaluation.checkpoint} checkpoint."
    )


def _rows(values: Sequence[str] | None) -> list[str]:
    parts = [row.strip() for value in values or () for row in value.split(";")]
    rows = [row for row in parts if row]
    for row in rows:
        configuration.parse_row(row)
    return list(dict.fromkeys(rows))


def _with_seed(config: Config, seed: int) -> Config:
    copy = config.copy_and_resolve_references()
    copy.seed = seed
    return copy


def _train(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    config = configuration.load_config(arguments.config, overrides)
    console, should_stop = _join(stop)
    planned = PlannedRun(config, pathlib.Path(arguments.workdir))
    dataset = building.load_data(config)
    works = work(config, dataset)
    display = ProgressDisplay(console, sum(works))
    with display.live():
        observer = display.run(planned.name, *works)
        result = run(
            config, planned.workdir, observer, dataset=dataset, should_stop=should_stop
        )
    _print_accuracies(console, planned.name, result["accuracy"])
    console.print(f"Written to {planned.workdir}: result.json", highlight=False)
    return 0


def _print_accuracies(console: Console, name: str, accuracy: dict[str, float]) -> None:
    cells = ", ".join(f"{column} {value:.2f}" for column, value in accuracy.items())
    console.print(f"{name}: {cells} (accuracy in %)", highlight=False)


def _evaluate(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    check(
        not overrides,
        "no --config overrides for evaluate",
        "The run's own config is used; see `samrobust evaluate --help`.",
        overrides=list(overrides),
    )
    workdir = pathlib.Path(arguments.workdir)
    console, should_stop = _join(stop)
    config = parallel.from_primary(lambda: _evaluation_config(workdir, arguments))
    dataset: Dataset = building.load_data(config)
    works = work(config, dataset)
    display = ProgressDisplay(console, works[1])
    with display.live():
        accuracy = evaluate_run(
            config,
            workdir,
            display.run(config.label, 0.0, works[1]),
            dataset=dataset,
            should_stop=should_stop,
        )
    line = {
        "accuracy": accuracy,
        "evaluation": config.evaluation.to_dict(),
        "seed": config.seed,
        "provenance": provenance(),
    }
    path = workdir / "evaluations.jsonl"
    parallel.from_primary(lambda: append_json_line(path, line))
    _print_accuracies(console, config.label, accuracy)
    console.print(f"Added to {path}", highlight=False)
    return 0


def _evaluation_config(workdir: pathlib.Path, arguments: argparse.Namespace) -> Config:
    """The run's config with the flags written into its `evaluation` section."""
    stored = read_json(workdir / "config.json")
    check(
        stored is not None,
        "a run's --workdir, with a config.json",
        "Train it first: `samrobust train`.",
        workdir=str(workdir),
    )
    defaults = configuration.base_config().to_json_best_effort()
    config: Config = ConfigDict(json.loads(defaults), type_safe=False)
    config.update(stored)  # a run of an older version lacks the newest fields
    evaluation: Config = config.evaluation
    for name in _EVALUATION_FLAGS:
        value = getattr(arguments, name)
        if value is not None:
            evaluation[name] = value
    if arguments.seed is not None:
        config.seed = arguments.seed
    _set_radii(evaluation, arguments)
    validate(config)
    return config


def _set_radii(evaluation: Config, arguments: argparse.Namespace) -> None:
    norms, epsilons = arguments.norm or ["linf", "l2"], arguments.epsilon
    check(
        epsilons is None or len(norms) == 1,
        "one --norm with --epsilon",
        "For several norms call the command once for each.",
        norm=arguments.norm,
        epsilon=epsilons,
    )
    for norm in ("linf", "l2"):
        if norm not in norms:
            evaluation[norm] = ()
        elif epsilons is not None:
            evaluation[norm] = tuple(epsilons)
    step_size = arguments.step_size
    if step_size is not None:
        radii = [r for norm in norms for r in evaluation[norm]]
        check(
            len(radii) == 1,
            "one --norm and one --epsilon with --step-size",
            step_size=step_size,
            radii=radii,
        )
        evaluation[f"{norms[0]}_step"] = step_size / radii[0]
