"""`samrobust curves`: measures all finished runs of a table, draws, writes."""

import argparse
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from samrobust.attacks import ATTACKS_VERSION
from samrobust.checks import check
from samrobust.data import Dataset, Split, fingerprint
from samrobust.evaluation.diagnostics import some_of
from samrobust.experiments import building
from samrobust.experiments.curves import (
    CurveSettings,
    curves_of,
    draw_curves,
    make_curve_evaluator,
    measure_run,
)
from samrobust.experiments.networks import Trained, load_network
from samrobust.experiments.reporting.console import make_console
from samrobust.experiments.reporting.pictures import write_figure
from samrobust.experiments.reporting.progress import ProgressDisplay
from samrobust.experiments.scoring import evaluated_split, evaluation_key
from samrobust.experiments.workdir import finished_runs
from samrobust.system import distributed
from samrobust.system.files import (
    WorkdirError,
    check_writable,
    read_sealed,
    set_aside,
    write_sealed,
)
from samrobust.system.provenance import provenance
from samrobust.system.runtime import StopRequest
from samrobust.training import InterruptedRunError
from samrobust.types import Config

__all__ = ["curves_command"]

_POINTS = 8  # of a curve, beside radius 0


def curves_command(
    arguments: argparse.Namespace, overrides: Sequence[str], stop: StopRequest
) -> int:
    """Measures and draws as a command line says; returns the exit code.

    Runs that `curves.json` holds under the same settings are not measured again, so
    that the command goes on where it was stopped.

    Raises:
      ValueError: for flags out of range, or a directory without finished runs.
      InterruptedRunError: if it was asked to stop.
    """
    check(not overrides, "no --config overrides for curves", overrides=overrides)
    should_stop = distributed.join(stop)
    console = make_console(quiet=not distributed.is_primary())
    workdir = pathlib.Path(arguments.workdir)
    configs = distributed.from_primary(
        lambda: finished_runs(workdir, arguments.rows or ())
    )
    settings = _settings(next(iter(configs.values())), arguments)
    distributed.from_primary(lambda: check_writable(workdir))
    stored = distributed.from_primary(lambda: _stored(workdir, settings))
    datasets: dict[str, Dataset] = {}
    evaluators: dict[Any, Any] = {}

    def source_of(path: str) -> "_Source":
        return _source(configs[path], workdir / path, settings, datasets)

    left = [path for path in configs if not _is_of(stored.get(path), source_of(path))]
    display = ProgressDisplay(console, float(len(left)))
    with display.live():
        for path in left:
            config, source = configs[path], source_of(path)
            shown = display.run(f"{config.label}, seed {config.seed}", 0.0, 1.0)

            def on_batch(
                done: int, total: int, doing: str = "", shown: Any = shown
            ) -> None:
                shown.on_batch(done, total, doing)
                if should_stop():
                    message = "Stopped between runs. Rerun the same command to resume."
                    raise InterruptedRunError(message)

            stored[path] = {
                **_measure(config, source, settings, evaluators, on_batch),
                **_about(source),
                "provenance": provenance(),
            }
            _keep(workdir, settings, stored)
    found = [(c.row, c.label, stored[path]) for path, c in configs.items()]
    distributed.from_primary(lambda: _write(workdir, settings, found, stored, configs))
    names = "curves.json, curves.png, curves.pdf"
    console.print(f"Written to {workdir}: {names}")
    return 0


def _settings(config: Config, arguments: argparse.Namespace) -> CurveSettings:
    """Returns how to measure; by default up to twice the table's largest radius."""
    radii = {}
    for norm in ("linf", "l2"):
        given = getattr(arguments, norm)
        largest = max(config.evaluation[norm], default=0.0)
        if given is not None:
            radii[norm] = tuple(given)
        elif largest:
            grid = np.linspace(0, min(2 * largest, 255.0), _POINTS + 1)[1:]
            radii[norm] = tuple(float(f"{radius:.4g}") for radius in grid)
    names = ("num_steps", "loss", "num_examples")
    given = {name: getattr(arguments, name) for name in names}
    return CurveSettings(radii, **{n: v for n, v in given.items() if v is not None})


class _Source(NamedTuple):
    """A network and the images that it is measured on."""

    network: Trained
    dataset: Dataset
    split: Split


def _source(
    config: Config,
    folder: pathlib.Path,
    settings: CurveSettings,
    datasets: dict[str, Dataset],
) -> _Source:
    """Loads the network of a run; runs of the same data share them."""
    data = config.data.to_json_best_effort()
    if data not in datasets:
        datasets[data] = building.load_data(config)
    dataset = datasets[data]
    network = load_network(config, dataset, folder, config.evaluation.checkpoint)
    split = some_of(evaluated_split(config, dataset), settings.num_examples)
    return _Source(network, dataset, split)


def _about(source: _Source) -> dict[str, Any]:
    """Returns of what a curve is one, in JSON's types."""
    return {
        "identity": source.network.identity.hash,
        "step": source.network.step,
        "images": fingerprint(source.split),
        "num_images": len(source.split),
        "attacks_version": ATTACKS_VERSION,
    }


def _is_of(stored: dict[str, Any] | None, source: _Source) -> bool:
    """Says whether stored curves are of this network and these images."""
    return stored is not None and stored.items() >= _about(source).items()


def _measure(
    config: Config,
    source: _Source,
    settings: CurveSettings,
    evaluators: dict[Any, Any],
    on_batch: Any,
) -> dict[str, list[float]]:
    """Measures one run; runs of the same model share the program."""
    model = building.make_model(config, source.dataset)
    if model not in evaluators:
        size = config.evaluation.batch_size
        evaluators[model] = make_curve_evaluator(model, settings, batch_size=size)
    return measure_run(
        *(evaluators[model], source.network.variables, source.split, settings),
        key=evaluation_key(config),
        on_batch=on_batch,
    )


def _as_json(settings: CurveSettings) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _stored(workdir: pathlib.Path, settings: CurveSettings) -> dict[str, Any]:
    """Returns what was measured before under the same settings."""
    path = workdir / "curves.json"
    try:
        known, problem = read_sealed(path), f"{path} is of other settings"
    except WorkdirError as error:
        known, problem = {}, str(error)
    if known is None:
        return {}
    if known.get("settings") == _as_json(settings):
        return known["runs"]
    kept = set_aside(path).name
    warnings.warn(f"{problem}. It is kept as {kept}; all is measured.", stacklevel=2)
    return {}


def _keep(workdir: pathlib.Path, settings: CurveSettings, runs: dict[str, Any]) -> None:
    content = {"settings": _as_json(settings), "runs": runs}
    distributed.from_primary(lambda: write_sealed(workdir / "curves.json", content))


def _write(
    workdir: pathlib.Path,
    settings: CurveSettings,
    found: list[tuple[str, str, Any]],
    runs: dict[str, Any],
    configs: dict[str, Config],
) -> None:
    """Writes the file and the pictures."""
    curves = curves_of(found, settings)
    content = {
        "settings": _as_json(settings),
        "runs": runs,
        "curves": [dataclasses.asdict(curve) for curve in curves],
    }
    write_sealed(workdir / "curves.json", content)
    first = next(iter(configs.values()))
    title = (
        f"{first.data.name}: accuracy under PGD-{settings.num_steps} "
        f"({settings.loss.replace('_', ' ')}, any iterate), "
        f"{next(iter(runs.values()))['num_images']} {first.evaluation.split} images"
    )
    write_figure(draw_curves(curves, title), workdir, "curves")
